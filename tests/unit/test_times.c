/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The split of a round trip: the times add up to it whatever a peer states, what was measured is
 * taken as it is, and what nobody could see is told apart by what is usual.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "../../lib/transport/times.h"

enum { NS = 1000 };

static struct afd__header reply_of(uint32_t queue_ns, uint32_t gather_ns, uint32_t compute_ns)
{
	return (struct afd__header){
		.queue_ns = queue_ns, .gather_ns = gather_ns, .compute_ns = compute_ns
	};
}

static void expect_whole(const struct afd__times *t)
{
	assert_int_equal(t->wire_ns + t->queue_ns + t->gather_ns + t->compute_ns + t->unread_ns,
		t->round_trip_ns);
}

static void what_a_peer_has_measured_is_taken_and_the_rest_is_the_wire(void **state)
{
	struct afd__header reply = reply_of(10, 20, 300);
	struct afd__times t;

	afd__times_split(&t, &reply, NS, 0, 5);
	assert_int_equal(t.queue_ns, 10);
	assert_int_equal(t.gather_ns, 20);
	assert_int_equal(t.compute_ns, 300);
	assert_int_equal(t.wire_ns, NS - 330);
	assert_int_equal(t.unread_ns, 0);
	assert_false(t.estimated);
	expect_whole(&t);
}

static void x_that_came_while_nobody_looked_waited_for_what_exceeds_the_usual_wire(void **state)
{
	struct afd__header reply = reply_of(800, 0, 100);
	struct afd__times t;

	reply.flags = AFD__FLAG_QUEUE_LONGEST;
	afd__times_split(&t, &reply, NS, 0, 300);
	assert_int_equal(t.wire_ns, 300);
	assert_int_equal(t.queue_ns, 600);
	assert_true(t.estimated);
	/* No more than the peer says is possible. */
	reply.queue_ns = 50;
	afd__times_split(&t, &reply, NS, 0, 300);
	assert_int_equal(t.queue_ns, 50);
	assert_int_equal(t.wire_ns, 850);
	expect_whole(&t);
}

static void y_that_was_not_looked_for_is_no_time_of_the_wire(void **state)
{
	struct afd__header reply = reply_of(0, 0, 100);
	struct afd__times t;

	afd__times_split(&t, &reply, NS, 700, 50);
	assert_int_equal(t.unread_ns, 700);
	assert_int_equal(t.wire_ns, 200);
	afd__times_split(&t, &reply, NS, 2000, 50);
	assert_int_equal(t.unread_ns, 850);
	assert_int_equal(t.wire_ns, 50);
	assert_true(t.estimated);
	expect_whole(&t);
}

/* 4.3 s and more do not fit. */
static void a_time_that_is_full_takes_what_nothing_else_explains(void **state)
{
	const uint64_t round_trip_ns = UINT64_C(9000000000);
	struct afd__header reply = reply_of(7, 8, UINT32_MAX);
	struct afd__times t;

	afd__times_split(&t, &reply, round_trip_ns, 0, 100);
	assert_int_equal(t.compute_ns, round_trip_ns - 7 - 8 - 100);
	assert_int_equal(t.wire_ns, 100);
	expect_whole(&t);
}

static void lies_never_exceed_the_round_trip(void **state)
{
	static const uint32_t values[] = { 0, 1, 999, 1000, 1001, UINT32_MAX - 1, UINT32_MAX };
	static const uint64_t trips[] = { 0, 1, NS, UINT64_MAX };
	enum { N = sizeof(values) / sizeof(values[0]), N_TRIPS = 4 };
	struct afd__times t;

	for (uint32_t i = 0; i < N * N * N * N_TRIPS * 8; i++) {
		uint32_t at = i / 8 / N_TRIPS;
		struct afd__header reply =
			reply_of(values[at % N], values[at / N % N], values[at / N / N]);

		reply.flags = i % 2 ? AFD__FLAG_QUEUE_LONGEST : 0;
		afd__times_split(&t, &reply, trips[i / 8 % N_TRIPS], i % 4 / 2 ? UINT64_MAX : 0,
			i % 8 / 4 ? UINT64_MAX : 0);
		expect_whole(&t);
		assert_true(t.wire_ns <= t.round_trip_ns && t.queue_ns <= t.round_trip_ns &&
			    t.gather_ns <= t.round_trip_ns && t.compute_ns <= t.round_trip_ns &&
			    t.unread_ns <= t.round_trip_ns);
	}
}

static void what_is_usual_falls_at_once_and_rises_slowly(void **state)
{
	struct afd__times t = { .wire_ns = 160 };

	assert_int_equal(afd__times_usual(0, &t), 160);
	assert_int_equal(afd__times_usual(4000, &t), 160);
	assert_int_equal(afd__times_usual(144, &t), 145);
}

static void what_was_told_apart_by_the_usual_does_not_confirm_it(void **state)
{
	struct afd__times t = { .wire_ns = 160, .estimated = true };

	assert_int_equal(afd__times_usual(160, &t), 160);
	assert_int_equal(afd__times_usual(4000, &t), 160);
	assert_int_equal(afd__times_usual(144, &t), 145);
}

static void series_are_as_many_as_layers_until_there_are_too_many(void **state)
{
	assert_int_equal(afd__times_group(94, 1), 1);
	assert_int_equal(afd__times_group(128, 4), 1);
	assert_int_equal(afd__times_group(129, 4), 2);
	assert_int_equal(afd__times_group(1024, 1), 2);
	assert_int_equal(afd__times_group(94, 64), 12);
	for (uint32_t n_peers = 1; n_peers <= 64; n_peers++) {
		for (uint32_t n_layers = 1; n_layers <= 1024; n_layers++) {
			uint32_t group = afd__times_group(n_layers, n_peers);
			uint32_t n_series = (n_layers - 1) / group + 1;

			assert_true(n_series * n_peers <= AFD__TIMES_SERIES_MAX);
		}
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_a_peer_has_measured_is_taken_and_the_rest_is_the_wire),
		cmocka_unit_test(
			x_that_came_while_nobody_looked_waited_for_what_exceeds_the_usual_wire),
		cmocka_unit_test(y_that_was_not_looked_for_is_no_time_of_the_wire),
		cmocka_unit_test(a_time_that_is_full_takes_what_nothing_else_explains),
		cmocka_unit_test(lies_never_exceed_the_round_trip),
		cmocka_unit_test(what_is_usual_falls_at_once_and_rises_slowly),
		cmocka_unit_test(what_was_told_apart_by_the_usual_does_not_confirm_it),
		cmocka_unit_test(series_are_as_many_as_layers_until_there_are_too_many),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
