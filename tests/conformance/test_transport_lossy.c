/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A wire that drops, delays, garbles and cuts. Whatever it does, rows that come back are right,
 * what does not come back is an error by the deadline, and another client of the same server
 * notices nothing.
 */
#include "transport_rig.h"

#include "lossy.h"

enum {
	DEADLINE_MS = 200,
	OPEN = 1,
	FIRST_ROWS = 2
}; /* numbers of slots that an attention peer sends */

static struct server server;
static float x[64 * HIDDEN], y[64 * HIDDEN];

static afd_transport *lossy_client(uint32_t max_rows)
{
	struct afd_transport_params params = {
		.deadline_ms = DEADLINE_MS, .max_rows = max_rows, .connect_timeout_ms = 2000
	};

	return join(&server, &params);
}

/* One frame; its result, after at most two seconds. */
static int exchange(afd_transport *net, uint32_t n_rows)
{
	struct afd_frame frame = frame_of(1, 0, n_rows, x, y);
	int rc = begin_step(net, n_rows);

	fill_rows(x, n_rows, 5);
	if (!rc)
		rc = afd_transport_dispatch(net, &frame);
	if (!rc)
		rc = collect_within(net, 0, 2000);
	if (rc == 1)
		expect_rows(x, y, n_rows, 1);
	return rc;
}

static void expect_that_a_new_client_is_served(void)
{
	afd_transport *net;

	lossy_begin(0);
	net = lossy_client(0);
	run_step(net, 3, 1);
	afd_transport_destroy(net);
}

/* ---- delays ---- */

static void rows_that_come_late_are_right(void **state)
{
	afd_transport *net;

	server_start(&server, NULL);
	for (int side = LOSSY_ATTENTION; side <= LOSSY_FFN; side++) {
		lossy_begin(side);
		lossy_plan.delay_ms = 8;
		net = lossy_client(5);
		run_step(net, 21, side);
		afd_transport_destroy(net);
	}
	server_stop(&server);
}

/* ---- losses ---- */

static void a_lost_request_is_an_error_by_the_deadline(void **state)
{
	afd_transport *net;

	server_start(&server, NULL);
	net = lossy_client(0);
	lossy_begin(LOSSY_ATTENTION);
	lossy_plan.drop = FIRST_ROWS;
	expect_error(exchange(net, 3), -ETIMEDOUT, "layer 1, lane 0, part 1 of 1");
	afd_transport_destroy(net);
	expect_that_a_new_client_is_served();
	server_stop(&server);
}

static void a_frame_behind_a_lost_one_is_refused_by_its_sequence(void **state)
{
	afd_transport *net;

	server_start(&server, NULL);
	for (unsigned lost = OPEN; lost <= FIRST_ROWS; lost++) {
		net = lossy_client(4);
		lossy_begin(LOSSY_ATTENTION);
		lossy_plan.drop = lost;
		expect_error(exchange(net, 8), -ECONNRESET, "the FFN peer is gone");
		rig_wait_logged(lost == OPEN ? "sequence is 2, must be 1: a frame was lost"
					     : "sequence is 3, must be 2: a frame was lost");
		afd_transport_destroy(net);
	}
	expect_that_a_new_client_is_served();
	server_stop(&server);
}

static void a_lost_reply_is_an_error_by_the_deadline(void **state)
{
	afd_transport *net;

	server_start(&server, NULL);
	net = lossy_client(4);
	lossy_begin(LOSSY_FFN);
	lossy_plan.drop = 2;
	expect_error(exchange(net, 16), -ETIMEDOUT, "limit 200");
	afd_transport_destroy(net);
	expect_that_a_new_client_is_served();
	server_stop(&server);
}

static void a_lost_beat_is_found_by_the_next_one(void **state)
{
	struct afd_frame frame = frame_of(1, 0, 2, x, y);
	afd_transport *net;

	server_start(&server, NULL);
	net = lossy_client(0);
	lossy_begin(LOSSY_FFN);
	lossy_plan.drop = 1;
	server.hold = 1;
	assert_int_equal(begin_step(net, 2), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	expect_error(collect_within(net, 0, 2000), -EPROTO, "sequence is 2, must be 1");
	afd_transport_destroy(net);
	server.hold = 0;
	expect_that_a_new_client_is_served();
	server_stop(&server);
}

static void a_peer_that_is_there_and_says_nothing_is_silent(void **state)
{
	afd_transport *net;

	server_start(&server, NULL);
	net = lossy_client(4);
	lossy_begin(LOSSY_FFN);
	lossy_plan.silent_from = 1;
	expect_error(exchange(net, 16), -ETIMEDOUT, "limit 200");
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- cuts ---- */

static void a_link_that_is_cut_anywhere_is_an_error_at_once(void **state)
{
	uint64_t start;
	int rc;

	server_start(&server, NULL);
	for (int side = LOSSY_ATTENTION; side <= LOSSY_FFN; side++) {
		for (unsigned cut = 1; cut <= 6; cut++) {
			afd_transport *net = lossy_client(4);

			lossy_begin(side);
			lossy_plan.cut = cut;
			start = now_ms();
			rc = exchange(net, 40);
			if (rc != -ECONNRESET)
				fail_msg(
					"side %d, slot %u: %d %s", side, cut, rc, afd_last_error());
			assert_in_range(now_ms() - start, 0, 1000);
			afd_transport_destroy(net);
		}
	}
	expect_that_a_new_client_is_served();
	server_stop(&server);
}

/* ---- garbled headers ---- */

static void a_garbled_header_gives_right_rows_or_an_error(void **state)
{
	int n_errors = 0, rc;

	server_start(&server, NULL);
	for (int side = LOSSY_ATTENTION; side <= LOSSY_FFN; side++) {
		for (unsigned at = 0; at < 64; at++) {
			afd_transport *net = lossy_client(8);

			lossy_begin(side);
			lossy_plan.garble = side == LOSSY_ATTENTION ? FIRST_ROWS : 1;
			lossy_plan.garble_at = at;
			rc = exchange(net, 8);
			n_errors += rc < 0;
			/* The clock's echo and the durations are told and not relied on. */
			if (rc < 0 && at >= 44)
				fail_msg("side %d, byte %u: %s", side, at, afd_last_error());
			afd_transport_destroy(net);
		}
	}
	/* All others, but the half of flags that a reader may skip. */
	assert_int_equal(n_errors, 2 * 43);
	expect_that_a_new_client_is_served();
	server_stop(&server);
}

static void another_client_notices_nothing(void **state)
{
	afd_transport *good, *bad;

	server_start(&server, NULL);
	good = lossy_client(0);
	for (unsigned at = 0; at < 44; at += 3) {
		bad = lossy_client(8);
		lossy_begin(LOSSY_ATTENTION);
		lossy_plan.garble = FIRST_ROWS;
		lossy_plan.garble_at = at;
		exchange(bad, 8);
		lossy_begin(0);
		run_step(good, 3, (int)at);
		afd_transport_destroy(bad);
	}
	afd_transport_destroy(good);
	server_stop(&server);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(rows_that_come_late_are_right),
		RIG_TEST(a_lost_request_is_an_error_by_the_deadline),
		RIG_TEST(a_frame_behind_a_lost_one_is_refused_by_its_sequence),
		RIG_TEST(a_lost_reply_is_an_error_by_the_deadline),
		RIG_TEST(a_lost_beat_is_found_by_the_next_one),
		RIG_TEST(a_peer_that_is_there_and_says_nothing_is_silent),
		RIG_TEST(a_link_that_is_cut_anywhere_is_an_error_at_once),
		RIG_TEST(a_garbled_header_gives_right_rows_or_an_error),
		RIG_TEST(another_client_notices_nothing),
	};
	return RIG_RUN(argc, argv, tests);
}
