/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The slots that two ends share: order, who holds what, the doorbell, and entries of a peer that
 * contradict the account. Both ends are driven by hand, so that races are met on purpose.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "../../lib/transport/segment.h"

enum { N_SLOTS = 6, N_CONTROL = 2, MAX = 16 };

static const struct afd__wire_slots slots = {
	.n_slots = N_SLOTS, .n_control = N_CONTROL, .control_bytes = 64, .slot_bytes = 1024
};
static struct segment_end a, b;
static struct afd__completion done[MAX];
static void *memory;
static int bells[2];

static int begin(void **state)
{
	size_t bytes;

	assert_int_equal(afd__segment_bytes(&slots, &bytes), 0);
	memory = aligned_alloc(4096, bytes);
	memset(memory, 0, bytes);
	memset(&a, 0, sizeof(a));
	memset(&b, 0, sizeof(b));
	bells[0] = eventfd(0, EFD_NONBLOCK);
	bells[1] = eventfd(0, EFD_NONBLOCK);
	afd__segment_attach(&a, memory, &slots, 1, bells[1]);
	afd__segment_attach(&b, memory, &slots, 0, bells[0]);
	return 0;
}

static int end(void **state)
{
	free(memory);
	close(bells[0]);
	close(bells[1]);
	return 0;
}

static void expect_done(struct segment_end *side, int kind, uint32_t slot)
{
	assert_int_equal(afd__segment_poll(side, done, MAX), 1);
	assert_int_equal(done[0].kind, kind);
	assert_int_equal(done[0].slot, slot);
}

static void slots_arrive_whole_once_and_in_order(void **state)
{
	static const uint32_t order[] = { 5, 0, 3, 1 };

	for (int i = 0; i < 4; i++) {
		memset(afd__segment_send_slot(&a, order[i]), 10 + i, 64);
		assert_int_equal(afd__segment_post_send(&a, order[i], 64), 0);
	}
	assert_int_equal(afd__segment_poll(&b, done, MAX), 4);
	for (int i = 0; i < 4; i++) {
		assert_int_equal(done[i].kind, AFD__RECEIVED);
		assert_int_equal(done[i].slot, order[i]);
		assert_int_equal(done[i].bytes, 64);
		assert_int_equal(
			((const uint8_t *)afd__segment_receive_slot(&b, order[i]))[63], 10 + i);
	}
	assert_int_equal(afd__segment_poll(&b, done, MAX), 0);
}

static void no_two_slots_overlap(void **state)
{
	struct segment_end *ends[2] = { &a, &b };

	for (int e = 0; e < 2; e++) {
		for (uint32_t slot = 0; slot < N_SLOTS; slot++)
			memset(afd__segment_send_slot(ends[e], slot), 1 + e * N_SLOTS + (int)slot,
				slot < N_CONTROL ? 64 : 1024);
	}
	for (int e = 0; e < 2; e++) {
		for (uint32_t slot = 0; slot < N_SLOTS; slot++) {
			const uint8_t *bytes = afd__segment_receive_slot(ends[!e], slot);

			assert_int_equal(bytes[0], 1 + e * N_SLOTS + (int)slot);
			assert_int_equal(bytes[(slot < N_CONTROL ? 64 : 1024) - 1],
				1 + e * N_SLOTS + (int)slot);
		}
	}
}

static void a_slot_that_was_not_given_back_cannot_be_sent_again(void **state)
{
	assert_int_equal(afd__segment_post_send(&a, 2, 8), 0);
	assert_int_equal(afd__segment_post_send(&a, 2, 8), -EAGAIN);
	expect_done(&b, AFD__RECEIVED, 2);
	assert_int_equal(afd__segment_post_send(&a, 2, 8), -EAGAIN);
	assert_int_equal(afd__segment_post_receive(&b, 2), 0);
	expect_done(&a, AFD__SENT, 2);
	assert_int_equal(afd__segment_post_send(&a, 2, 8), 0);
}

/* The return and the next request were written between the two looks of one poll. */
static void a_slot_is_ours_again_although_no_poll_has_reported_it(void **state)
{
	assert_int_equal(afd__segment_post_send(&a, 3, 8), 0);
	expect_done(&b, AFD__RECEIVED, 3);
	assert_int_equal(afd__segment_post_receive(&b, 3), 0);
	assert_int_equal(afd__segment_post_send(&a, 3, 16), 0);
	assert_int_equal(afd__segment_poll(&a, done, MAX), 0);
	expect_done(&b, AFD__RECEIVED, 3);
	assert_int_equal(done[0].bytes, 16);
}

static void a_report_waits_for_room(void **state)
{
	for (uint32_t slot = 0; slot < N_SLOTS; slot++)
		assert_int_equal(afd__segment_post_send(&a, slot, 8), 0);
	for (uint32_t slot = 0; slot < N_SLOTS; slot++) {
		assert_int_equal(afd__segment_poll(&b, done, 1), 1);
		assert_int_equal(done[0].slot, slot);
		assert_int_equal(afd__segment_post_receive(&b, slot), 0);
	}
	for (uint32_t slot = 0; slot < N_SLOTS; slot++) {
		assert_int_equal(afd__segment_ready(&a), 1);
		assert_int_equal(afd__segment_poll(&a, done, 1), 1);
		assert_int_equal(done[0].slot, slot);
	}
	assert_int_equal(afd__segment_ready(&a), 0);
}

static void rings_go_round(void **state)
{
	for (uint32_t i = 0; i < 5000; i++) {
		assert_int_equal(afd__segment_post_send(&a, i % N_SLOTS, 1 + i % 64), 0);
		expect_done(&b, AFD__RECEIVED, i % N_SLOTS);
		assert_int_equal(done[0].bytes, 1 + i % 64);
		assert_int_equal(afd__segment_post_receive(&b, i % N_SLOTS), 0);
		expect_done(&a, AFD__SENT, i % N_SLOTS);
	}
}

/* ---- the doorbell ---- */

static int rings(int bell)
{
	eventfd_t n = 0;

	return eventfd_read(bell, &n) ? 0 : (int)n;
}

static void the_doorbell_rings_once_and_only_for_a_sleeper(void **state)
{
	assert_int_equal(afd__segment_post_send(&a, 2, 8), 0);
	assert_int_equal(rings(bells[1]), 0);
	expect_done(&b, AFD__RECEIVED, 2);
	assert_int_equal(afd__segment_arm(&b), 0);
	assert_int_equal(afd__segment_post_send(&a, 3, 8), 0);
	assert_int_equal(afd__segment_post_send(&a, 4, 8), 0);
	assert_int_equal(rings(bells[1]), 1);
}

static void a_sleeper_that_has_something_is_told_before_it_sleeps(void **state)
{
	assert_int_equal(afd__segment_post_send(&a, 2, 8), 0);
	assert_int_equal(afd__segment_arm(&b), 1);
	expect_done(&b, AFD__RECEIVED, 2);
	assert_int_equal(afd__segment_post_receive(&b, 2), 0);
	assert_int_equal(afd__segment_arm(&a), 1);
}

static void looking_again_ends_the_sleep(void **state)
{
	assert_int_equal(afd__segment_arm(&b), 0);
	assert_int_equal(afd__segment_ready(&b), 0);
	assert_int_equal(afd__segment_post_send(&a, 2, 8), 0);
	assert_int_equal(rings(bells[1]), 0);
}

static void the_return_of_a_control_slot_wakes_who_may_wait_for_it(void **state)
{
	assert_int_equal(afd__segment_post_send(&a, 0, 8), 0);
	assert_int_equal(afd__segment_post_send(&a, 2, 8), 0);
	assert_int_equal(afd__segment_poll(&b, done, MAX), 2);
	assert_int_equal(afd__segment_arm(&a), 0);
	assert_int_equal(afd__segment_post_receive(&b, 2), 0);
	assert_int_equal(rings(bells[0]), 0);
	assert_int_equal(afd__segment_post_receive(&b, 0), 0);
	assert_int_equal(rings(bells[0]), 1);
}

/* ---- a hostile peer ---- */

static void refuse(int rc, const char *text)
{
	if (rc != -EPROTO || strcmp(afd_last_error(), text))
		fail_msg("%d \"%s\", should say \"%s\"", rc, afd_last_error(), text);
}

static void entries_that_contradict_the_account_are_refused_and_stay_refused(void **state)
{
	ring_write(&a.sent, N_SLOTS, 8);
	for (int i = 0; i < 2; i++)
		refuse(afd__segment_poll(&b, done, MAX),
			"the peer sent slot 6, which it did not have");
	ring_write(&a.freed, 3, 0);
	for (int i = 0; i < 2; i++)
		refuse(afd__segment_poll(&b, done, MAX),
			"the peer gave back slot 3, which it did not hold");
}

static void a_slot_that_is_sent_twice_is_refused_after_the_first(void **state)
{
	ring_write(&a.sent, 2, 8);
	ring_write(&a.sent, 2, 8);
	expect_done(&b, AFD__RECEIVED, 2);
	refuse(afd__segment_poll(&b, done, MAX), "the peer sent slot 2, which it did not have");
}

static void sizes_beyond_the_slot_are_refused(void **state)
{
	ring_write(&a.sent, 0, 65);
	refuse(afd__segment_poll(&b, done, MAX), "the peer sent 65 bytes in slot 0, limit 64");
	ring_write(&b.sent, 5, UINT64_C(1) << 32);
	refuse(afd__segment_poll(&a, done, MAX),
		"the peer sent 4294967296 bytes in slot 5, limit 1024");
}

static void a_geometry_without_sense_is_refused(void **state)
{
	struct afd__wire_slots bad = slots;
	size_t bytes;

	bad.n_slots = AFD__SLOTS_MAX + 1;
	assert_int_equal(afd__segment_bytes(&bad, &bytes), -EINVAL);
	bad = slots;
	bad.n_control = N_SLOTS + 1;
	assert_int_equal(afd__segment_bytes(&bad, &bytes), -EINVAL);
	bad = slots;
	bad.slot_bytes = SIZE_MAX - 100;
	assert_int_equal(afd__segment_bytes(&bad, &bytes), -EINVAL);
	bad.slot_bytes = 0;
	assert_int_equal(afd__segment_bytes(&bad, &bytes), -EINVAL);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, begin, end)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(slots_arrive_whole_once_and_in_order),
		TEST(no_two_slots_overlap),
		TEST(a_slot_that_was_not_given_back_cannot_be_sent_again),
		TEST(a_slot_is_ours_again_although_no_poll_has_reported_it),
		TEST(a_report_waits_for_room),
		TEST(rings_go_round),
		TEST(the_doorbell_rings_once_and_only_for_a_sleeper),
		TEST(a_sleeper_that_has_something_is_told_before_it_sleeps),
		TEST(looking_again_ends_the_sleep),
		TEST(the_return_of_a_control_slot_wakes_who_may_wait_for_it),
		TEST(entries_that_contradict_the_account_are_refused_and_stay_refused),
		TEST(a_slot_that_is_sent_twice_is_refused_after_the_first),
		TEST(sizes_beyond_the_slot_are_refused),
		TEST(a_geometry_without_sense_is_refused),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
