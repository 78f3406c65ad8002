/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Replicas and peers that return: whoever is lost, and whenever, the rows come back right, only what
 * was outstanding is sent once more, and with nobody left the step waits or fails by name.
 */
#include "transport_rig.h"

#include <stdio.h>

#include "lossy.h"

enum { ROWS = 40, PARTS_OF = 7 };

static struct server servers[4];
static float x[ROWS * HIDDEN], y[ROWS * HIDDEN];

static const struct afd_transport_params parts_of_7 = { .max_rows = PARTS_OF, .deadline_ms = 400 };

static afd_transport *connect_to(int n_servers, const struct afd_transport_params *params)
{
	struct afd_transport_params p = *params;
	const char *addresses[4];
	afd_transport *net;

	for (int i = 0; i < n_servers; i++)
		addresses[i] = servers[i].address;
	p.size = sizeof(p);
	p.connect = addresses;
	p.n_connect = (uint32_t)n_servers;
	rig_secret(&p);
	if (afd_transport_create(&net, client_ctx, &rig_contract, &p))
		fail_msg("%s", afd_last_error());
	return net;
}

static afd_transport *join_replicas(int n, const struct afd_transport_params *params)
{
	afd_transport *net;

	for (int i = 0; i < n; i++)
		server_start(&servers[i], NULL);
	net = connect_to(n, params);
	if (afd_transport_wait(net, 0) != 1)
		fail_msg("%s", afd_last_error());
	return net;
}

static void wait_for_state(afd_transport *net, uint32_t index, int32_t state)
{
	for (int i = 0; i < 1000 && peer_of(net, index).state != state; i++) {
		afd_transport_poll(net);
		afd__transport_sleep(net, -1, 5);
	}
	assert_int_equal(peer_of(net, index).state, state);
}

static void dispatch(afd_transport *net, int seed)
{
	struct afd_frame frame = frame_of(1, 0, ROWS, x, y);

	fill_rows(x, ROWS, seed);
	memset(y, 0, sizeof(y));
	assert_int_equal(begin_step(net, ROWS), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
}

static void expect_frame(afd_transport *net)
{
	expect_done(net, 0);
	expect_rows(x, y, ROWS, 1);
}

/* A part goes out when the one before has, which only the client moves on. */
static void wait_held(afd_transport *net, int s, int n)
{
	for (int i = 0; i < 400 && servers[s].n_held != n; i++) {
		for (int32_t lane = 0; lane < 4 && afd_transport_collect(net, lane) >= 0; lane++)
			;
		afd__transport_sleep(net, -1, 5);
	}
	assert_int_equal(servers[s].n_held, n);
}

/* It goes without an answer to what it holds. */
static void lose(int s)
{
	park(&servers[s]);
	servers[s].n_held = 0;
	server_stop(&servers[s]);
}

static void start_again(int s, const struct afd_transport_params *params)
{
	char address[96];

	snprintf(address, sizeof(address), "%s", servers[s].address);
	server_start_at(&servers[s], address, params);
}

static void stop_all(int n)
{
	for (int i = 0; i < n; i++)
		server_stop(&servers[i]);
}

/* ---- replicas ---- */

static void rows_without_an_answer_go_to_the_replica(void **state)
{
	afd_transport *net = join_replicas(2, &parts_of_7);
	int lost;

	servers[0].hold = servers[1].hold = 1;
	dispatch(net, 1);
	lost = rig_holder(servers);
	wait_held(net, lost, 2);
	servers[!lost].hold = 0;
	lose(lost);
	expect_frame(net);
	/* Two parts were out; the others had not been sent yet. */
	assert_int_equal(peer_of(net, (uint32_t)!lost).n_resent_rows, 2 * PARTS_OF);
	assert_int_equal(peer_of(net, (uint32_t)!lost).n_rows, ROWS);
	assert_int_equal(peer_of(net, (uint32_t)lost).n_rows, 2 * PARTS_OF);
	assert_int_equal(peer_of(net, (uint32_t)lost).state, AFD_PEER_LEFT);
	for (int i = 0; i < 3; i++)
		run_step(net, 9, i);
	rig_wait_logged("its shard is taken over by");
	afd_transport_destroy(net);
	stop_all(2);
}

static void a_replica_may_have_smaller_parts(void **state)
{
	struct afd_transport_params small = { .max_rows = 3 };
	afd_transport *net;

	server_start(&servers[0], NULL);
	rig_address(servers[1].address);
	net = connect_to(2, &parts_of_7);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	start_again(1, &small);
	wait_for_state(net, 1, AFD_PEER_JOINED);
	servers[0].hold = 1;
	dispatch(net, 1);
	wait_held(net, 0, 2);
	lose(0);
	expect_frame(net);
	assert_int_equal(peer_of(net, 1).n_parts, (ROWS + 2) / 3);
	afd_transport_destroy(net);
	stop_all(2);
}

static void a_silent_server_is_replaced_after_the_deadline(void **state)
{
	afd_transport *net = join_replicas(2, &parts_of_7);
	uint64_t start = now_ms();
	int lost;

	servers[0].hold = servers[1].hold = 1;
	dispatch(net, 1);
	lost = rig_holder(servers);
	park(&servers[lost]);
	servers[!lost].hold = 0;
	expect_frame(net);
	assert_in_range(now_ms() - start, 380, 3000);
	afd_transport_destroy(net);
	servers[lost].silent = 0;
	stop_all(2);
}

static void a_server_that_drains_answers_what_it_has_and_the_replica_does_the_rest(void **state)
{
	struct afd_transport_params patient = { .max_rows = PARTS_OF };
	afd_transport *net = join_replicas(2, &patient);
	int leaving;

	servers[0].hold = servers[1].hold = 1;
	dispatch(net, 1);
	leaving = rig_holder(servers);
	wait_held(net, leaving, 2);
	park(&servers[leaving]);
	assert_int_equal(afd__exchange_drain(servers[leaving].net), 0);
	servers[0].hold = servers[1].hold = 0;
	for (int i = 0; i < 40; i++) {
		assert_true(afd_transport_collect(net, 0) >= 0);
		afd__transport_sleep(net, -1, 5);
	}
	servers[leaving].silent = 0;
	expect_frame(net);
	assert_int_equal(peer_of(net, (uint32_t)!leaving).n_resent_rows, 0);
	assert_int_equal(peer_of(net, (uint32_t)!leaving).n_rows, ROWS - 2 * PARTS_OF);
	afd_transport_destroy(net);
	stop_all(2);
}

/* Its rows come back when the replica has done the rest, or is in the middle of it. */
static void a_server_that_drains_and_is_lost_leaves_its_rows_to_the_replica(void **state)
{
	for (int in_the_middle = 0; in_the_middle < 2; in_the_middle++) {
		afd_transport *net = join_replicas(2, &parts_of_7);
		int leaving;

		servers[0].hold = servers[1].hold = 1;
		dispatch(net, 1);
		leaving = rig_holder(servers);
		wait_held(net, leaving, 2);
		park(&servers[leaving]);
		assert_int_equal(afd__exchange_drain(servers[leaving].net), 0);
		servers[!leaving].hold = in_the_middle;
		for (int i = 0; i < 40; i++) {
			assert_true(afd_transport_collect(net, 0) >= 0);
			afd__transport_sleep(net, -1, 5);
		}
		servers[leaving].n_held = 0;
		server_stop(&servers[leaving]);
		for (int i = 0; i < 10; i++) {
			assert_true(afd_transport_collect(net, 0) >= 0);
			afd__transport_sleep(net, -1, 5);
		}
		servers[!leaving].hold = 0;
		expect_frame(net);
		assert_int_equal(peer_of(net, (uint32_t)!leaving).n_resent_rows, 2 * PARTS_OF);
		assert_int_equal(peer_of(net, (uint32_t)!leaving).n_rows, ROWS);
		afd_transport_destroy(net);
		stop_all(2);
	}
}

static void one_shard_of_two_fails_over_by_itself(void **state)
{
	static const struct afd_shard halves[4] = { { 0, 1, 0, 1 }, { 0, 2, 0, 1 }, { 1, 2, 0, 1 } };
	struct afd_transport_params params = { .shard = halves[1] };
	afd_transport *net;

	/* Replicas of half 0, and one of half 1. Each adds layer + 1 to x, and the halves are summed. */
	server_start(&servers[0], &params);
	server_start(&servers[1], &params);
	params.shard = halves[2];
	server_start(&servers[2], &params);
	net = connect_to(3, &parts_of_7);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	servers[0].hold = servers[1].hold = 1;
	dispatch(net, 1);
	{
		int lost = rig_holder(servers);

		wait_held(net, lost, 2);
		servers[!lost].hold = 0;
		lose(lost);
	}
	expect_done(net, 0);
	for (int i = 0; i < ROWS * HIDDEN; i++)
		assert_true(y[i] == 2 * (x[i] + 2));
	assert_int_equal(peer_of(net, 2).n_resent_rows, 0);
	afd_transport_destroy(net);
	stop_all(3);
}

static void with_four_lanes_out_every_row_comes_back(void **state)
{
	struct afd_transport_params params = { .lanes = 4, .max_rows = 5 };
	static float xs[4][30 * HIDDEN], ys[4][30 * HIDDEN];
	afd_transport *net = join_replicas(2, &params);
	int lost;

	servers[0].hold = servers[1].hold = 1;
	assert_int_equal(begin_step(net, 30), 0);
	for (int32_t lane = 0; lane < 4; lane++) {
		struct afd_frame frame = frame_of(2, lane, 30, xs[lane], ys[lane]);

		fill_rows(xs[lane], 30, lane);
		assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	}
	lost = rig_holder(servers);
	wait_held(net, lost, 8);
	servers[!lost].hold = 0;
	lose(lost);
	for (int32_t lane = 0; lane < 4; lane++) {
		expect_done(net, lane);
		expect_rows(xs[lane], ys[lane], 30, 2);
	}
	assert_int_equal(peer_of(net, (uint32_t)!lost).n_resent_rows, 8 * 5);
	afd_transport_destroy(net);
	stop_all(2);
}

/* The line is cut before slot n of either side, for every n of a step. */
static void wherever_the_line_is_cut_the_rows_come_back(void **state)
{
	if (strcmp(rig_scheme(), "lossy"))
		rig_skip("only lossy: can be cut at a chosen place");
	for (int side = LOSSY_ATTENTION; side <= LOSSY_FFN; side++) {
		for (unsigned n = 1; n <= 36; n++) {
			struct afd_transport_params params = { .max_rows = 2 };
			afd_transport *net = join_replicas(2, &params);
			uint64_t resent;

			lossy_begin(side);
			lossy_plan.cut = n;
			run_step(net, 9, (int)n);
			run_step(net, 9, (int)n);
			lossy_plan.cut = 0;
			resent = peer_of(net, 0).n_resent_rows + peer_of(net, 1).n_resent_rows;
			assert_in_range(resent, 0, 2 * 2);
			afd_transport_destroy(net);
			stop_all(2);
		}
	}
}

/* Whichever of the two servers comes second is refused, before the first is worked with or after. */
static void expect_not_taken(const char *text, const char *other_way)
{
	afd_transport *net = connect_to(2, &parts_of_7);
	int rc = afd_transport_wait(net, 1000);

	for (int i = 0; i < 400 && rc >= 0 && !rig_logged(text) && !rig_logged(other_way); i++) {
		afd__transport_sleep(net, -1, 5);
		rc = afd_transport_poll(net);
	}
	if (!rig_logged(text) && !rig_logged(other_way))
		expect_error(rc, -EPROTO, strstr(afd_last_error(), text) ? text : other_way);
	afd_transport_destroy(net);
	stop_all(2);
}

static void a_replica_with_other_weights_is_not_taken(void **state)
{
	rig_weights[0] = 1;
	server_start(&servers[0], NULL);
	rig_weights[0] = 2;
	server_start(&servers[1], NULL);
	rig_weights[0] = 0;
	expect_not_taken("its weights are 00000000000000000000000000000002, those of the shard's",
		"its weights are 00000000000000000000000000000001, those of the shard's");
}

static void a_replica_of_another_epoch_is_not_taken(void **state)
{
	rig_weights[0] = 1;
	rig_weights_epoch = 5;
	server_start(&servers[0], NULL);
	rig_weights_epoch = 6;
	server_start(&servers[1], NULL);
	rig_weights[0] = rig_weights_epoch = 0;
	expect_not_taken("its weights_epoch is 6, that of the shard's first peer was 5",
		"its weights_epoch is 5, that of the shard's first peer was 6");
}

static void replicas_of_one_epoch_are_taken_and_tell_it(void **state)
{
	struct afd_peer_info info;
	afd_transport *net;

	rig_weights[0] = 1;
	rig_weights_epoch = UINT64_MAX;
	server_start(&servers[0], NULL);
	server_start(&servers[1], NULL);
	rig_weights[0] = rig_weights_epoch = 0;
	net = connect_to(2, &parts_of_7);
	assert_int_equal(afd_transport_wait(net, 2000), 1);
	run_step(net, 5, 1);
	info = peer_of(net, 0);
	assert_true(info.weights_epoch == UINT64_MAX && info.weights[0] == 1);
	afd_transport_destroy(net);
	stop_all(2);
}

/* ---- who is not there yet, or comes back ---- */

static void a_replica_that_is_missing_is_warned_of_and_taken_when_it_comes(void **state)
{
	afd_transport *net;

	server_start(&servers[0], NULL);
	rig_address(servers[1].address);
	net = connect_to(2, &parts_of_7);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	rig_wait_logged("has not joined yet; the other FFN peers hold all shards");
	run_step(net, 9, 1);
	start_again(1, NULL);
	wait_for_state(net, 1, AFD_PEER_JOINED);
	servers[0].hold = 1;
	dispatch(net, 1);
	wait_held(net, 0, 2);
	lose(0);
	expect_frame(net);
	afd_transport_destroy(net);
	stop_all(2);
}

/* One half is there, goes, and comes back with the other. */
static void a_peer_that_goes_before_all_are_there_is_waited_for(void **state)
{
	struct afd_transport_params params = { .shard = { 0, 2, 0, 1 } };
	struct afd_frame frame = frame_of(1, 0, 3, x, y);
	afd_transport *net;

	server_start(&servers[0], &params);
	rig_address(servers[1].address);
	net = connect_to(2, &parts_of_7);
	wait_for_state(net, 0, AFD_PEER_JOINED);
	server_stop(&servers[0]);
	for (int i = 0; i < 20; i++) {
		assert_int_equal(afd_transport_poll(net), 0);
		afd__transport_sleep(net, -1, 5);
	}
	start_again(0, &params);
	params.shard.tp = 1;
	start_again(1, &params);
	assert_int_equal(afd_transport_wait(net, 0), 1);
	assert_int_equal(begin_step(net, 3), 0);
	assert_int_equal(afd_transport_exchange(net, &frame), 0);
	afd_transport_destroy(net);
	stop_all(2);
}

static void a_peer_that_goes_before_all_are_there_and_stays_away_is_named(void **state)
{
	struct afd_transport_params params = { .shard = { 0, 2, 0, 1 } },
				    patient = { .connect_timeout_ms = 600 };
	afd_transport *net;
	uint64_t start = now_ms();

	server_start(&servers[0], &params);
	rig_address(servers[1].address);
	net = connect_to(2, &patient);
	wait_for_state(net, 0, AFD_PEER_JOINED);
	server_stop(&servers[0]);
	expect_error(afd_transport_wait(net, 3000), -ETIMEDOUT, "no FFN peer joined within 600 ms");
	assert_in_range(now_ms() - start, 590, 2500);
	afd_transport_destroy(net);
}

static void a_peer_that_returns_is_taken_back_again_and_again(void **state)
{
	afd_transport *net = join_replicas(2, &parts_of_7);
	int before = settled_descriptors();

	for (int i = 0; i < 6; i++) {
		server_stop(&servers[i % 2]);
		run_step(net, 9, i);
		start_again(i % 2, NULL);
		wait_for_state(net, (uint32_t)i % 2, AFD_PEER_JOINED);
		run_step(net, 9, i);
	}
	expect_descriptors(before);
	afd_transport_destroy(net);
	stop_all(2);
}

static void with_nobody_left_the_step_goes_on_when_a_server_is_back(void **state)
{
	struct afd_transport_params params = { .max_rows = PARTS_OF, .reconnect_ms = 5000 };
	afd_transport *net = join_replicas(1, &params);

	servers[0].hold = 1;
	dispatch(net, 1);
	wait_held(net, 0, 2);
	lose(0);
	for (int i = 0; i < 30; i++) {
		assert_int_equal(afd_transport_collect(net, 0), 0);
		afd__transport_sleep(net, -1, 5);
	}
	start_again(0, NULL);
	expect_frame(net);
	run_step(net, 9, 2);
	/* Between steps, too. */
	server_stop(&servers[0]);
	sleep_ms(20);
	assert_true(afd_transport_poll(net) >= 0);
	start_again(0, NULL);
	wait_for_state(net, 0, AFD_PEER_JOINED);
	run_step(net, 9, 3);
	afd_transport_destroy(net);
	stop_all(1);
}

static void with_nobody_left_for_too_long_the_step_fails_by_name(void **state)
{
	struct afd_transport_params params = { .max_rows = PARTS_OF, .reconnect_ms = 300 };
	afd_transport *net = join_replicas(1, &params);
	uint64_t start;

	servers[0].hold = 1;
	dispatch(net, 1);
	wait_held(net, 0, 2);
	start = now_ms();
	lose(0);
	expect_error(collect_within(net, 0, 3000), -ECONNRESET, "the FFN peer has left");
	assert_in_range(now_ms() - start, 290, 1500);
	expect_error(begin_step(net, 1), -ECONNRESET, servers[0].address);
	afd_transport_destroy(net);
}

static void a_step_that_failed_is_repeated_when_a_server_is_back(void **state)
{
	afd_transport *net = join_replicas(1, &parts_of_7);

	servers[0].hold = 1;
	dispatch(net, 1);
	wait_held(net, 0, 2);
	lose(0);
	expect_error(collect_within(net, 0, 3000), -ECONNRESET, "the FFN peer has left");
	expect_error(begin_step(net, 1), -ECONNRESET, "the FFN peer has left");
	start_again(0, NULL);
	for (int i = 0; i < 400 && afd_transport_poll(net) != 1; i++)
		afd__transport_sleep(net, -1, 5);
	assert_int_equal(afd_transport_poll(net), 1);
	run_step(net, 9, 2);
	afd_transport_destroy(net);
	stop_all(1);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(rows_without_an_answer_go_to_the_replica),
		RIG_TEST(a_replica_may_have_smaller_parts),
		RIG_TEST(a_silent_server_is_replaced_after_the_deadline),
		RIG_TEST(a_server_that_drains_answers_what_it_has_and_the_replica_does_the_rest),
		RIG_TEST(a_server_that_drains_and_is_lost_leaves_its_rows_to_the_replica),
		RIG_TEST(one_shard_of_two_fails_over_by_itself),
		RIG_TEST(with_four_lanes_out_every_row_comes_back),
		RIG_TEST(wherever_the_line_is_cut_the_rows_come_back),
		RIG_TEST(a_replica_with_other_weights_is_not_taken),
		RIG_TEST(a_replica_of_another_epoch_is_not_taken),
		RIG_TEST(replicas_of_one_epoch_are_taken_and_tell_it),
		RIG_TEST(a_replica_that_is_missing_is_warned_of_and_taken_when_it_comes),
		RIG_TEST(a_peer_that_goes_before_all_are_there_is_waited_for),
		RIG_TEST(a_peer_that_goes_before_all_are_there_and_stays_away_is_named),
		RIG_TEST(a_peer_that_returns_is_taken_back_again_and_again),
		RIG_TEST(with_nobody_left_the_step_goes_on_when_a_server_is_back),
		RIG_TEST(with_nobody_left_for_too_long_the_step_fails_by_name),
		RIG_TEST(a_step_that_failed_is_repeated_when_a_server_is_back),
	};
	return RIG_RUN(argc, argv, tests);
}
