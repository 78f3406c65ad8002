/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes on a tcp: connection: as messages of the handshake ('h'), or as records after it. What
 * is reported lies inside its slot, a slot is reported at most once until it is given back, and the
 * first error stays.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../lib/transport/tcp.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum { N_SLOTS = 8, N_CONTROL = 4, CONTROL_BYTES = 64, SLOT_BYTES = 192, CHUNK = 7 };

static const struct afd__wire_slots geometry = { .n_slots = N_SLOTS,
	.n_control = N_CONTROL,
	.control_bytes = CONTROL_BYTES,
	.slot_bytes = SLOT_BYTES };

static void expect(int holds)
{
	if (!holds)
		abort();
}

static void feed(int fd, const uint8_t **data, size_t *n_bytes)
{
	size_t n = *n_bytes < CHUNK ? *n_bytes : CHUNK;

	expect(send(fd, *data, n, MSG_NOSIGNAL) == (ssize_t)n);
	*data += n;
	*n_bytes -= n;
}

static void fuzz_messages(struct afd__wire *wire, int peer, const uint8_t *data, size_t n_bytes)
{
	uint8_t message[AFD__HELLO_MAX];
	size_t bytes;
	int rc = 0;

	while (n_bytes && rc >= 0) {
		feed(peer, &data, &n_bytes);
		while ((rc = afd__stream_hello_receive(wire, message, sizeof(message), &bytes)) == 1)
			expect(bytes >= 12 && bytes <= sizeof(message) &&
				!memcmp(message, "AFDH", 4));
	}
	if (rc < 0)
		expect(wire->error == rc &&
			afd__stream_hello_receive(wire, message, sizeof(message), &bytes) == rc);
}

/* What a front door does: reads what came, and gives most of it back. */
static void take(struct afd__wire *wire, const struct afd__completion *done, int held[N_SLOTS])
{
	uint32_t capacity = done->slot < N_CONTROL ? CONTROL_BYTES : SLOT_BYTES;
	volatile uint8_t sum = 0;

	expect(done->slot < N_SLOTS);
	if (done->kind == AFD__SENT)
		return;
	expect(done->kind == AFD__RECEIVED && done->bytes && done->bytes <= capacity);
	expect(!held[done->slot]);
	for (uint32_t i = 0; i < done->bytes; i++)
		sum = (uint8_t)(sum + ((const uint8_t *)afd__stream_receive_slot(
					      wire, done->slot))[i]);
	held[done->slot] = 1;
	if (sum % 4 == 3)
		return;
	held[done->slot] = 0;
	expect(!afd__stream_post_receive(wire, done->slot));
}

static void fuzz_records(struct afd__wire *wire, int peer, const uint8_t *data, size_t n_bytes)
{
	struct afd__completion done[4];
	int held[N_SLOTS] = { 0 }, rc = 0;

	expect(afd__stream_bind(wire, &geometry, 1) == 1);
	for (uint32_t slot = 0; slot < N_SLOTS; slot += 3)
		expect(!afd__stream_post_send(wire, slot, 5));
	while (n_bytes && rc >= 0) {
		feed(peer, &data, &n_bytes);
		tcp_of(wire)->readable = true;
		do {
			rc = afd__stream_poll(wire, done, 4);
			for (int i = 0; i < rc; i++)
				take(wire, &done[i], held);
		} while (rc > 0);
		afd__stream_arm(wire);
	}
	if (rc < 0)
		expect(wire->error == rc && afd__stream_poll(wire, done, 4) == rc);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	struct afd__tag tag = { .kind = AFD__TAG_WIRE };
	struct afd__wire wire = { .ops = &afd__transport_tcp, .epoll_fd = -1, .tag = &tag };
	int ends[2];

	if (!n_bytes)
		return 0;
	expect(!afd_context_create(&wire.ctx, NULL));
	expect(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends));
	wire.state = afd__alloc(wire.ctx, 1, sizeof(struct tcp));
	expect(wire.state != NULL);
	tcp_of(&wire)->fd = ends[0];
	if (data[0] == 'h')
		fuzz_messages(&wire, ends[1], data + 1, n_bytes - 1);
	else
		fuzz_records(&wire, ends[1], data + 1, n_bytes - 1);
	close(ends[1]);
	wire.ops->close(&wire);
	afd_context_destroy(wire.ctx);
	return 0;
}
