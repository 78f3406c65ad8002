/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wire format of frames: what is encoded is decoded, the bytes are those of docs/wire.md, and
 * every field that contradicts itself is refused by name.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/transport/wire.h"

static struct afd__header rows_header(void)
{
	return (struct afd__header){
		.header_bytes = 64,
		.kind = AFD__FRAME_ROWS,
		.type = AFD__ROWS_X,
		.lane = 3,
		.dtype = AFD_DTYPE_BF16,
		.layer = 0x0102,
		.flags = 0x0004,
		.sequence = 0x0102030405060708,
		.step = 0x0a0b0c0d,
		.n_rows = 7,
		.part = 1,
		.n_parts = 2,
		.queue_ns = 5,
		.gather_ns = 6,
		.compute_ns = UINT32_MAX,
		.stamp_ns = UINT64_MAX - 1,
	};
}

static struct afd__header control_header(uint8_t type)
{
	return (struct afd__header){ .header_bytes = 64,
		.kind = AFD__FRAME_CONTROL,
		.type = type,
		.sequence = 9,
		.step = 2 };
}

static void expect_same(const struct afd__header *a, const struct afd__header *b)
{
	uint8_t x[AFD__HEADER_BYTES], y[AFD__HEADER_BYTES];

	afd__wire_encode(x, a);
	afd__wire_encode(y, b);
	assert_memory_equal(x, y, sizeof(x));
}

/* ---- headers ---- */

static void a_header_is_decoded_as_it_was_encoded(void **state)
{
	struct afd__header headers[] = { rows_header(), rows_header(), control_header(AFD__BEAT),
		control_header(AFD__GOODBYE) };
	uint8_t bytes[AFD__HEADER_BYTES];
	struct afd__header back;

	headers[1].type = AFD__ROWS_Y;
	headers[1].n_rows = 0;
	headers[1].status = 4;
	for (size_t i = 0; i < sizeof(headers) / sizeof(headers[0]); i++) {
		afd__wire_encode(bytes, &headers[i]);
		assert_int_equal(afd__wire_decode(&back, bytes, sizeof(bytes)), 0);
		expect_same(&headers[i], &back);
	}
}

static void bytes_of_a_header_lie_where_the_document_says(void **state)
{
	/* clang-format off */
	static const uint8_t expected[AFD__HEADER_BYTES] = {
		'A', 'F', 'D', 'F', 1, 0, 64, 0, 1, 1, 3, 2, 0x02, 0x01, 0x04, 0x00,
		8, 7, 6, 5, 4, 3, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a, 0, 0, 0, 0,
		7, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0, 5, 0, 0, 0,
		6, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
	};
	/* clang-format on */
	struct afd__header h = rows_header();
	uint8_t bytes[AFD__HEADER_BYTES];

	afd__wire_encode(bytes, &h);
	assert_memory_equal(bytes, expected, sizeof(bytes));
}

static void an_unknown_tail_of_a_header_is_skipped(void **state)
{
	struct afd__header h = rows_header(), back;
	uint8_t bytes[AFD__HEADER_BYTES];

	h.header_bytes = 96;
	afd__wire_encode(bytes, &h);
	assert_int_equal(afd__wire_decode(&back, bytes, 96 + 7 * 32 * 2), 0);
	assert_int_equal(back.header_bytes, 96);
	assert_int_equal(afd__wire_check_rows(&back, 96 + 7 * 32 * 2, 32, 7), 0);
}

struct bad_header {
	const char *name, *text;
	uint8_t at, value;
};

static void contradictions_of_a_header_are_refused_by_field(void **state)
{
	static const struct bad_header cases[] = {
		{ "another magic", "magic", 0, 'a' },
		{ "a later wire version", "wire_version is 2, ours is 1", 4, 2 },
		{ "a header shorter than ours", "header_bytes is 48", 6, 48 },
		{ "a header that is not of 16 bytes", "header_bytes is 72", 6, 72 },
		{ "a header beyond what came", "header_bytes is 80, 64 bytes came", 6, 80 },
		{ "a header of kilobytes", "header_bytes is 8256", 7, 0x20 },
		{ "kind 4", "kind is 4", 8, 4 },
		{ "kind 0", "kind is 0", 8, 0 },
		{ "rows of type 0", "type is 0", 9, 0 },
		{ "rows of type 3", "type is 3", 9, 3 },
		{ "fp8 without scales", "scale_format is 0, of fp8 it must be 1", 11, AFD_DTYPE_FP8 },
		{ "dtype 5", "dtype is 5, limit 4", 11, 5 },
		{ "dtype 0", "dtype is 0", 11, 0 },
		{ "an unknown flag that may not be skipped", "0x0100 are unknown", 15, 1 },
		{ "a request with a status", "status is 1", 28, 1 },
		{ "too many rows", "n_rows is 16777223, limit 65536", 35, 1 },
		{ "no rows", "n_rows is 0", 32, 0 },
		{ "a part beyond the last", "part is 2 of 2", 36, 2 },
		{ "no parts", "part is 1 of 0", 38, 0 },
		{ "scales", "scale_format is 1, of bf16 it must be 0", 40, 1 },
		{ "too many experts", "top_k is 65", 41, 65 },
		{ "metadata of rows", "row_meta_bytes is 1", 42, 1 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd__header h = rows_header(), back;
		uint8_t bytes[AFD__HEADER_BYTES];

		afd__wire_encode(bytes, &h);
		bytes[cases[i].at] = cases[i].value;
		if (afd__wire_decode(&back, bytes, sizeof(bytes)) != -EPROTO ||
			!strstr(afd_last_error(), cases[i].text))
			fail_msg("%s: \"%s\", should say \"%s\"", cases[i].name, afd_last_error(),
				cases[i].text);
	}
}

static void a_truncated_header_is_refused_with_its_size(void **state)
{
	struct afd__header h = rows_header(), back;
	uint8_t bytes[AFD__HEADER_BYTES];

	afd__wire_encode(bytes, &h);
	for (size_t n = 0; n < sizeof(bytes); n++)
		assert_int_equal(afd__wire_decode(&back, bytes, n), -EPROTO);
	assert_string_equal(afd_last_error(), "frame: 63 bytes came, the header has 64");
}

static void control_frames_of_unknown_type_are_refused(void **state)
{
	struct afd__header h = control_header(5), back;
	uint8_t bytes[AFD__HEADER_BYTES];

	afd__wire_encode(bytes, &h);
	assert_int_equal(afd__wire_decode(&back, bytes, sizeof(bytes)), -EPROTO);
	assert_string_equal(afd_last_error(), "control frame: type is 5, limit 4");
}

static void rows_must_fill_what_came_exactly(void **state)
{
	struct afd__header h = rows_header();
	size_t bytes = 64 + 7 * 24 * 2;

	assert_int_equal(afd__wire_check_rows(&h, bytes, 24, 7), 0);
	assert_int_equal(afd__wire_check_rows(&h, bytes - 1, 24, 7), -EPROTO);
	assert_int_equal(afd__wire_check_rows(&h, bytes + 1, 24, 7), -EPROTO);
	assert_int_equal(afd__wire_check_rows(&h, bytes, 24, 6), -EPROTO);
	assert_string_equal(afd_last_error(), "frame of rows: n_rows is 7, limit 6");
}

static void sizes_of_rows_do_not_overflow(void **state)
{
	assert_int_equal(afd__wire_rows_bytes(65536, 65536, AFD_DTYPE_F32), (size_t)1 << 34);
	assert_int_equal(afd__wire_rows_bytes(UINT32_MAX, UINT32_MAX, AFD_DTYPE_F32), 0);
	assert_int_equal(afd__wire_rows_bytes(7, 3, AFD_DTYPE_F16), 42);
	assert_int_equal(afd__wire_rows_bytes(7, 3, 0), 0);
	assert_int_equal(afd__wire_rows_bytes(65536, 65536, AFD_DTYPE_FP8),
		((size_t)1 << 32) + ((size_t)1 << 27));
	assert_int_equal(afd__wire_rows_bytes(UINT32_MAX, UINT32_MAX, AFD_DTYPE_FP8), 0);
}

/* Numbers up to a multiple of 16, then scales up to one. */
static void rows_of_fp8_bring_their_scales(void **state)
{
	static const uint32_t cases[][2] = { { 1, 32 }, { 16, 32 }, { 17, 48 }, { 128, 144 },
		{ 129, 160 }, { 512, 528 }, { 513, 560 }, { 1024, 1056 }, { 7168, 7392 } };
	struct afd__header h = rows_header();
	struct afd__wire_part part;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		assert_int_equal(afd__wire_rows_bytes(3, cases[i][0], AFD_DTYPE_FP8), 3 * cases[i][1]);
	afd__wire_part(&part, 3, 129, AFD_DTYPE_FP8, 2);
	assert_int_equal(part.ids, 480);
	assert_int_equal(part.weights, 480 + 32);
	assert_int_equal(part.bytes, 480 + 32 + 24);
	h.dtype = AFD_DTYPE_FP8;
	assert_int_equal(afd__wire_check_rows(&h, 64 + 7 * 48, 24, 7), 0);
	assert_int_equal(afd__wire_check_rows(&h, 64 + 7 * 24, 24, 7), -EPROTO);
}

static void a_status_comes_back_as_its_errno(void **state)
{
	static const int codes[] = { -EIO, -EINVAL, -ENOMEM, -EDOM, -ECANCELED, -ENOTSUP,
		-ETIMEDOUT, -ENOSPC, -ENODEV, -EBADMSG };

	for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); i++)
		assert_int_equal(afd__wire_errno(afd__wire_status(codes[i])), codes[i]);
	assert_int_equal(afd__wire_errno(afd__wire_status(-EXDEV)), -EIO);
	assert_int_equal(afd__wire_errno(9999), -EIO);
	assert_int_equal(afd__wire_status(0), 0);
}

/* ---- payloads of control frames ---- */

static void a_step_open_is_decoded_as_it_was_encoded(void **state)
{
	struct afd__step_open open = { .step = UINT64_MAX - 7,
		.n_rows = { 1, 0, 70000, UINT32_MAX },
		.flags = 5,
		.trace_id = "0123456789abcde" };
	uint8_t payload[AFD__STEP_OPEN_BYTES];
	struct afd__step_open back;

	afd__wire_encode_open(payload, &open);
	assert_int_equal(afd__wire_decode_open(&back, payload, sizeof(payload)), 0);
	assert_int_equal(back.step, open.step);
	assert_memory_equal(back.n_rows, open.n_rows, sizeof(open.n_rows));
	assert_int_equal(back.flags, 5);
	assert_memory_equal(back.trace_id, open.trace_id, 16);
	assert_int_equal(afd__wire_decode_open(&back, payload, sizeof(payload) - 1), -EPROTO);
	assert_string_equal(afd_last_error(), "step open: 47 bytes came, it has 48");
}

static void a_step_close_is_decoded_as_it_was_encoded(void **state)
{
	struct afd__step_close close = {
		.step = 77, .reason = AFD__CLOSE_CANCELLED, .text = "rank 2 is gone"
	}, back;
	uint8_t payload[AFD__STEP_CLOSE_BYTES + AFD__TEXT_MAX];
	size_t bytes = afd__wire_encode_close(payload, &close);

	assert_int_equal(bytes, AFD__STEP_CLOSE_BYTES + strlen(close.text));
	assert_int_equal(afd__wire_decode_close(&back, payload, bytes), 0);
	assert_int_equal(back.step, 77);
	assert_int_equal(back.reason, AFD__CLOSE_CANCELLED);
	assert_string_equal(back.text, close.text);
	assert_int_equal(afd__wire_decode_close(&back, payload, bytes - 1), -EPROTO);
	assert_string_equal(
		afd_last_error(), "step close: text has 14 bytes, 13 came, limit 255");
	assert_int_equal(
		afd__wire_decode_close(&back, payload, AFD__STEP_CLOSE_BYTES - 1), -EPROTO);
}

static void a_goodbye_brings_its_text(void **state)
{
	uint8_t payload[AFD__GOODBYE_BYTES + AFD__TEXT_MAX];
	char text[AFD__TEXT_MAX];
	uint32_t reason;
	size_t bytes = afd__wire_encode_goodbye(payload, AFD__GOODBYE_DRAIN, "it drains");

	assert_int_equal(afd__wire_decode_goodbye(&reason, text, payload, bytes), 0);
	assert_int_equal(reason, AFD__GOODBYE_DRAIN);
	assert_string_equal(text, "it drains");
}

static void a_goodbye_whose_text_is_longer_than_what_came_is_refused(void **state)
{
	uint8_t payload[AFD__GOODBYE_BYTES + AFD__TEXT_MAX] = { 0 };
	char text[AFD__TEXT_MAX];
	uint32_t reason;

	payload[4] = 9;
	assert_int_equal(
		afd__wire_decode_goodbye(&reason, text, payload, AFD__GOODBYE_BYTES + 8), -EPROTO);
	assert_string_equal(afd_last_error(), "goodbye: text has 9 bytes, 8 came, limit 255");
	payload[5] = 1;
	assert_int_equal(
		afd__wire_decode_goodbye(&reason, text, payload, sizeof(payload)), -EPROTO);
	assert_int_equal(afd__wire_decode_goodbye(&reason, text, payload, 7), -EPROTO);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_header_is_decoded_as_it_was_encoded),
		cmocka_unit_test(bytes_of_a_header_lie_where_the_document_says),
		cmocka_unit_test(an_unknown_tail_of_a_header_is_skipped),
		cmocka_unit_test(contradictions_of_a_header_are_refused_by_field),
		cmocka_unit_test(a_truncated_header_is_refused_with_its_size),
		cmocka_unit_test(control_frames_of_unknown_type_are_refused),
		cmocka_unit_test(rows_must_fill_what_came_exactly),
		cmocka_unit_test(sizes_of_rows_do_not_overflow),
		cmocka_unit_test(rows_of_fp8_bring_their_scales),
		cmocka_unit_test(a_status_comes_back_as_its_errno),
		cmocka_unit_test(a_step_open_is_decoded_as_it_was_encoded),
		cmocka_unit_test(a_step_close_is_decoded_as_it_was_encoded),
		cmocka_unit_test(a_goodbye_brings_its_text),
		cmocka_unit_test(a_goodbye_whose_text_is_longer_than_what_came_is_refused),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
