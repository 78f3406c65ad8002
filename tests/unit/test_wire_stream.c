/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tcp: connection whose TLS is ours: it takes and gives what the test says, and insists, as
 * OpenSSL does, that what it has refused is offered again before anything else.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>
#include <sys/epoll.h>

#include "../../lib/transport/secret.h"
#include "../../lib/transport/tcp.h"

enum { N_CONTROL = 4, CONTROL_BYTES = 64, SLOT_BYTES = 192, RECORD_BYTES = 8 };

static struct {
	uint8_t in[1024], out[1024], refused[1024];
	size_t in_bytes, in_taken, out_bytes, refused_bytes;
	bool is_full; /* takes nothing now */
	int end;      /* after all that came in; 0: there may be more */
	int broken;   /* what writing says */
} tls;

static ssize_t tls_read(void *session, void *bytes, size_t n_bytes, char *text)
{
	size_t n = tls.in_bytes - tls.in_taken;

	if (!n)
		return tls.end;
	n = n < n_bytes ? n : n_bytes;
	memcpy(bytes, tls.in + tls.in_taken, n);
	tls.in_taken += n;
	return (ssize_t)n;
}

static ssize_t tls_write(void *session, const void *bytes, size_t n_bytes, char *text)
{
	if (tls.broken) {
		strcpy(text, "worn out");
		return tls.broken;
	}
	if (tls.refused_bytes > n_bytes || memcmp(bytes, tls.refused, tls.refused_bytes))
		return -EACCES;
	if (tls.is_full) {
		tls.refused_bytes = n_bytes;
		memcpy(tls.refused, bytes, n_bytes);
		return 0;
	}
	tls.refused_bytes = 0;
	memcpy(tls.out + tls.out_bytes, bytes, n_bytes);
	tls.out_bytes += n_bytes;
	return (ssize_t)n_bytes;
}

static void tls_close(void *session)
{
}

static const struct afd__secret_ops secret_ops = {
	.tls_read = tls_read, .tls_write = tls_write, .tls_close = tls_close
};
static const struct afd__secret secret = { .ops = &secret_ops };
static struct afd__tag tag = { .kind = AFD__TAG_WIRE };
static struct afd__wire wire;

static int open_wire(void **state)
{
	static const struct afd__wire_slots geometry = { .n_slots = 8,
		.n_control = N_CONTROL,
		.control_bytes = CONTROL_BYTES,
		.slot_bytes = SLOT_BYTES };

	memset(&tls, 0, sizeof(tls));
	wire = (struct afd__wire){
		.ops = &afd__transport_tcp, .epoll_fd = -1, .tag = &tag, .secret = &secret
	};
	assert_int_equal(afd_context_create(&wire.ctx, NULL), 0);
	wire.state = afd__alloc(wire.ctx, 1, sizeof(struct tcp));
	assert_non_null(wire.state);
	*tcp_of(&wire) = (struct tcp){ .fd = -1, .tls = &tls, .readable = true };
	assert_int_equal(afd__stream_bind(&wire, &geometry, 1), 1);
	return 0;
}

static int close_wire(void **state)
{
	wire.ops->close(&wire);
	afd_context_destroy(wire.ctx);
	return 0;
}

/* A frame of one byte in a slot comes in. */
static void come(uint8_t slot)
{
	const uint8_t record[RECORD_BYTES + 1] = { 1, 0, slot, 0, 1, 0, 0, 0, 7 };

	memcpy(tls.in + tls.in_bytes, record, sizeof(record));
	tls.in_bytes += sizeof(record);
	afd__stream_event(&wire, 0, EPOLLIN);
}

static void expect_came(uint32_t slot)
{
	struct afd__completion done[4];

	assert_int_equal(afd__stream_poll(&wire, done, 4), 1);
	assert_int_equal(done[0].kind, AFD__RECEIVED);
	assert_int_equal(done[0].slot, slot);
}

static void what_was_refused_is_offered_again_before_what_came_to_wait_later(void **state)
{
	const uint8_t record[RECORD_BYTES] = { 1, 0, N_CONTROL, 0, SLOT_BYTES };
	const uint8_t given_back[RECORD_BYTES] = { 2, 0, 0, 0, 0 };
	struct afd__completion done[4];

	tls.is_full = true;
	assert_int_equal(afd__stream_post_send(&wire, N_CONTROL, SLOT_BYTES), 0);
	come(0);
	expect_came(0);
	assert_int_equal(afd__stream_post_receive(&wire, 0), 0);
	for (int i = 0; i < 3; i++)
		assert_int_equal(afd__stream_poll(&wire, done, 4), 0);
	tls.is_full = false;
	assert_int_equal(afd__stream_poll(&wire, done, 4), 0);
	assert_int_equal(tls.out_bytes, 2 * RECORD_BYTES + SLOT_BYTES);
	assert_memory_equal(tls.out, record, RECORD_BYTES);
	assert_memory_equal(tls.out + RECORD_BYTES + SLOT_BYTES, given_back, RECORD_BYTES);
}

static void returns_that_were_refused_stay_before_a_record(void **state)
{
	const uint8_t both[2 * RECORD_BYTES] = { 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1 };
	struct afd__completion done[4];

	tls.is_full = true;
	for (uint8_t slot = 0; slot < 2; slot++) {
		come(slot);
		expect_came(slot);
		assert_int_equal(afd__stream_post_receive(&wire, slot), 0);
		assert_int_equal(afd__stream_poll(&wire, done, 4), 0);
	}
	assert_int_equal(afd__stream_post_send(&wire, N_CONTROL, SLOT_BYTES), 0);
	tls.is_full = false;
	afd__stream_event(&wire, 0, EPOLLOUT);
	assert_int_equal(tls.out_bytes, 3 * RECORD_BYTES + SLOT_BYTES);
	assert_memory_equal(tls.out, both, sizeof(both));
}

static void an_end_that_writing_finds_too_is_told_once_behind_what_had_come(void **state)
{
	struct afd__completion done[4];

	come(0);
	expect_came(0);
	assert_int_equal(afd__stream_post_receive(&wire, 0), 0);
	come(1);
	tls.end = tls.broken = -ECONNRESET;
	expect_came(1);
	afd__stream_event(&wire, 0, EPOLLHUP);
	for (int i = 0; i < 2; i++)
		assert_int_equal(afd__stream_poll(&wire, done, 4), -ECONNRESET);
}

static void why_writing_failed_is_told_when_what_had_come_is_read(void **state)
{
	struct afd__completion done[4];

	come(0);
	tls.broken = -EACCES;
	assert_int_equal(afd__stream_post_send(&wire, N_CONTROL, SLOT_BYTES), 0);
	expect_came(0);
	assert_int_equal(afd__stream_poll(&wire, done, 4), -EACCES);
	assert_non_null(strstr(afd_last_error(), "tls: worn out"));
}

/* No event of the kernel's tells of it. */
static void a_wait_does_not_sleep_when_writing_has_failed(void **state)
{
	struct afd__completion done[4];

	assert_int_equal(afd__stream_poll(&wire, done, 4), 0);
	assert_int_equal(afd__stream_arm(&wire), 0);
	tls.broken = -EACCES;
	assert_int_equal(afd__stream_post_send(&wire, N_CONTROL, SLOT_BYTES), 0);
	assert_int_equal(afd__stream_ready(&wire), 1);
	assert_int_equal(afd__stream_arm(&wire), 1);
	assert_int_equal(afd__stream_poll(&wire, done, 4), -EACCES);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(
			what_was_refused_is_offered_again_before_what_came_to_wait_later, open_wire,
			close_wire),
		cmocka_unit_test_setup_teardown(
			returns_that_were_refused_stay_before_a_record, open_wire, close_wire),
		cmocka_unit_test_setup_teardown(
			an_end_that_writing_finds_too_is_told_once_behind_what_had_come, open_wire,
			close_wire),
		cmocka_unit_test_setup_teardown(
			why_writing_failed_is_told_when_what_had_come_is_read, open_wire, close_wire),
		cmocka_unit_test_setup_teardown(
			a_wait_does_not_sleep_when_writing_has_failed, open_wire, close_wire),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
