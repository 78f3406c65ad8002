/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a frame's header, a control payload or a message of the handshake; the first byte
 * says as which. What is decoded is encoded to the same bytes, what is refused has a text, and
 * nothing is read beyond the input (sanitizers see it: the input lies in memory of its own size).
 */
#include <stdlib.h>
#include <string.h>

#include "../../lib/transport/hello.h"
#include "../../lib/transport/ops.h"
#include "../../lib/transport/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { HIDDEN = 16, MAX_ROWS = 8 };

static void expect(int holds)
{
	if (!holds)
		abort();
}

static void expect_refused(int rc)
{
	expect(rc == -EPROTO && afd_last_error()[0]);
}

/* As docs/wire.md has it: rows (those of fp8 with their scale), then ids, then weights, each from a
 * multiple of 16 on. */
static size_t part_bytes(const struct afd__header *h)
{
	size_t row_bytes = h->dtype == AFD_DTYPE_FP8 ? HIDDEN + 16 : HIDDEN * afd_dtype_bytes(h->dtype);
	size_t bytes = h->n_rows * row_bytes;
	size_t choices = (size_t)h->n_rows * h->top_k * 4;

	if (!choices)
		return bytes;
	bytes = (bytes + 15) & ~(size_t)15;
	return bytes + ((choices + 15) & ~(size_t)15) + choices;
}

static void fuzz_header(const uint8_t *data, size_t n_bytes)
{
	uint8_t copy[AFD__HEADER_BYTES], back[AFD__HEADER_BYTES];
	struct afd__header h;
	int rc;

	memcpy(copy, data, n_bytes < sizeof(copy) ? n_bytes : sizeof(copy));
	rc = afd__wire_decode(&h, copy, n_bytes);
	if (rc) {
		expect_refused(rc);
		return;
	}
	afd__wire_encode(back, &h);
	expect(!memcmp(copy, back, sizeof(back)));
	expect(h.header_bytes <= n_bytes);
	if (h.kind != AFD__FRAME_ROWS)
		return;
	rc = afd__wire_check_rows(&h, n_bytes, HIDDEN, MAX_ROWS);
	if (rc)
		expect_refused(rc);
	else
		expect(h.n_rows <= MAX_ROWS && h.header_bytes + part_bytes(&h) == n_bytes);
}

static void fuzz_control(const uint8_t *data, size_t n_bytes)
{
	uint8_t back[AFD__STEP_CLOSE_BYTES + AFD__TEXT_MAX];
	struct afd__step_close close;
	struct afd__step_open open;
	char text[AFD__TEXT_MAX];
	uint32_t reason;

	if (!afd__wire_decode_open(&open, data, n_bytes)) {
		afd__wire_encode_open(back, &open);
		/* But for the word that is reserved. */
		expect(!memcmp(back, data, 28) && !memcmp(back + 32, data + 32, 16));
	}
	if (!afd__wire_decode_close(&close, data, n_bytes)) {
		size_t bytes = afd__wire_encode_close(back, &close);

		expect(bytes <= n_bytes && !memcmp(back, data, 12));
	}
	if (!afd__wire_decode_goodbye(&reason, text, data, n_bytes)) {
		expect(strlen(text) < sizeof(text));
		expect(afd__wire_encode_goodbye(back, reason, text) <= n_bytes);
	}
}

static void fuzz_hello(const uint8_t *data, size_t n_bytes)
{
	static struct afd__hello hello, again, refusal;
	uint8_t bytes[AFD__HELLO_MAX];
	size_t encoded;
	int rc = afd__hello_decode(&hello, data, n_bytes);

	if (rc) {
		expect_refused(rc);
		return;
	}
	if (hello.wire_version != AFD__WIRE_VERSION)
		return;
	encoded = afd__hello_encode(bytes, sizeof(bytes), &hello);
	expect(encoded);
	expect(!afd__hello_decode(&again, bytes, encoded));
	expect(!memcmp(&hello, &again, sizeof(hello)));
	if (hello.kind == AFD__HELLO || hello.kind == AFD__WELCOME)
		expect(!afd__hello_compare(&hello, &again, &refusal));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	if (!n_bytes)
		return 0;
	switch (data[0]) {
	case 'f':
		fuzz_header(data + 1, n_bytes - 1);
		break;
	case 'c':
		fuzz_control(data + 1, n_bytes - 1);
		break;
	default:
		fuzz_hello(data + 1, n_bytes - 1);
		break;
	}
	return 0;
}
