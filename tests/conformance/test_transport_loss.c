/* SPDX-License-Identifier: Apache-2.0 */
/* Peers that leave, die, stall or are merely slow: who is told, when, by which words, and who is
 * not disturbed. */
#include "transport_rig.h"

#include "../../lib/transport/net.h"

/* A client with a frame out that the server holds. */
static afd_transport *join_with_a_frame_out(
	struct server *server, const struct afd_transport_params *params, float *x, float *y)
{
	struct afd_frame frame = frame_of(1, 0, 1, x, y);
	afd_transport *net;

	server_start(server, NULL);
	net = join(server, params);
	server->hold = 1;
	fill_rows(x, 1, 1);
	assert_int_equal(begin_step(net, 1), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	wait_for(&server->n_held, 1);
	return net;
}

/* ---- leaving ---- */

static void a_server_that_leaves_is_named_and_the_cause_stays(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y);
	uint64_t start;

	/* It goes without an answer. */
	park(&server);
	server.n_held = 0;
	server_stop(&server);
	start = now_ms();
	expect_error(collect_within(net, 0, 2000), -ECONNRESET, "the FFN peer has left");
	assert_non_null(strstr(afd_last_error(), server.address));
	assert_in_range(now_ms() - start, 0, 1000);
	expect_error(afd_transport_collect(net, 0), -ECONNRESET, "the FFN peer has left");
	expect_error(begin_step(net, 1), -ECONNRESET, "the FFN peer has left");
	expect_error(afd_transport_poll(net), -ECONNRESET, "the FFN peer has left");
	afd_transport_destroy(net);
}

static void a_goodbye_finds_room_behind_beats_that_nobody_reads(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y);

	sleep_ms((AFD__N_CONTROL + 2) * AFD__BEAT_MS);
	park(&server);
	server.n_held = 0;
	server_stop(&server);
	expect_error(collect_within(net, 0, 2000), -ECONNRESET, "the FFN peer has left");
	afd_transport_destroy(net);
}

static void an_answer_that_came_before_the_end_still_counts(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y);

	/* The server answers what it holds, and ends; only then the client looks. */
	server_stop(&server);
	expect_done(net, 0);
	expect_rows(x, y, 1, 1);
	expect_error(begin_step(net, 1), -ECONNRESET, server.address);
	afd_transport_destroy(net);
}

static void a_draining_server_answers_what_it_has_and_takes_nobody_new(void **state)
{
	struct afd_transport_params soon = { .connect_timeout_ms = 300 };
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y), *late;

	park(&server);
	assert_int_equal(afd__exchange_drain(server.net), 0);
	server.silent = 0;
	late = make_client(server.address, &soon);
	expect_error(afd_transport_wait(late, 0), -EPROTO, "state is draining there");
	server.hold = 0;
	expect_done(net, 0);
	expect_rows(x, y, 1, 1);
	park(&server);
	assert_int_equal(afd__exchange_drain(server.net), 1);
	expect_error(begin_step(net, 1), -ECONNRESET, "the FFN peer is leaving");
	assert_int_equal(afd_transport_poll(net), -ECONNRESET);
	afd_transport_destroy(late);
	afd_transport_destroy(net);
	server.silent = 0;
	server_stop(&server);
}

/* As the end of its process does it: the connection ends without a word. */
static void hang_up(afd_transport *net)
{
	struct afd__wire *wire = &net->links[0]->wire;

	wire->ops->shut(wire);
}

static void turn_until_nobody_is_joined(struct server *server)
{
	for (int i = 0; i < 2000 && afd__exchange_n_joined(server->net); i++) {
		assert_true(afd_transport_poll(server->net) >= 0);
		sleep_ms(1);
	}
	assert_int_equal(afd__exchange_n_joined(server->net), 0);
}

static void a_client_that_goes_because_the_server_drains_has_left(void **state)
{
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	run_step(net, 2, 1);
	park(&server);
	assert_int_equal(afd__exchange_drain(server.net), 1);
	while (afd_transport_poll(net) >= 0)
		sleep_ms(1);
	expect_error(afd_transport_poll(net), -ECONNRESET, "the FFN peer has left: it drains");
	turn_until_nobody_is_joined(&server);
	assert_int_equal(peer_of(server.net, 0).state, AFD_PEER_LEFT);
	afd_transport_destroy(net);
	server.silent = 0;
	server_stop(&server);
}

static void a_client_that_hangs_up_while_it_is_owed_an_answer_is_lost(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y);

	park(&server);
	assert_int_equal(afd__exchange_drain(server.net), 0);
	hang_up(net);
	turn_until_nobody_is_joined(&server);
	assert_int_equal(peer_of(server.net, 0).state, AFD_PEER_LOST);
	afd_transport_destroy(net);
	server.n_held = 0;
	server.silent = 0;
	server_stop(&server);
}

static void a_draining_server_that_hangs_up_before_it_has_answered_has_left(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y);

	park(&server);
	assert_int_equal(afd__exchange_drain(server.net), 0);
	hang_up(server.net);
	expect_error(collect_within(net, 0, 2000), -ECONNRESET, "the FFN peer has left");
	afd_transport_destroy(net);
	server.n_held = 0;
	server.silent = 0;
	server_stop(&server);
}

static void a_client_that_leaves_disturbs_nobody(void **state)
{
	struct server server;
	afd_transport *nets[3];

	server_start(&server, NULL);
	for (int i = 0; i < 3; i++)
		nets[i] = join(&server, NULL);
	run_step(nets[1], 3, 1);
	assert_int_equal(begin_step(nets[0], 5), 0);
	afd_transport_destroy(nets[0]);
	for (int i = 1; i < 3; i++)
		run_step(nets[i], 3, i);
	wait_for(&server.n_joined, 2);
	rig_wait_logged("peer left: ");
	park(&server);
	assert_int_equal(peer_of(server.net, 0).state, AFD_PEER_LEFT);
	assert_int_equal(peer_of(server.net, 2).state, AFD_PEER_JOINED);
	assert_int_equal(peer_of(server.net, 2).n_parts, LAYERS);
	afd_transport_destroy(nets[1]);
	afd_transport_destroy(nets[2]);
	server.silent = 0;
	server_stop(&server);
}

static void parts_of_a_client_that_left_can_still_be_read_and_answered(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, NULL, x, y);

	afd_transport_destroy(net);
	wait_for(&server.n_joined, 0);
	park(&server);
	assert_memory_equal(server.held[0].x, x, sizeof(x));
	memset(server.held[0].y, 1, sizeof(y));
	server.hold = server.silent = 0;
	wait_for(&server.n_answered, 1);
	net = join(&server, NULL);
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_place_is_not_given_away_while_its_parts_are_held(void **state)
{
	struct afd_transport_params one = { .max_peers = 1 }, soon = { .connect_timeout_ms = 300 };
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_frame frame = frame_of(0, 0, 1, x, y);
	struct server server;
	afd_transport *net;

	server_start(&server, &one);
	net = join(&server, NULL);
	server.hold = 1;
	assert_int_equal(begin_step(net, 1), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	wait_for(&server.n_held, 1);
	afd_transport_destroy(net);
	wait_for(&server.n_joined, 0);
	net = make_client(server.address, &soon);
	expect_error(afd_transport_wait(net, 0), -EPROTO, "max_peers is 1 there");
	afd_transport_destroy(net);
	server.hold = 0;
	wait_for(&server.n_answered, 1);
	net = join(&server, NULL);
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- silence ---- */

static void a_silent_server_is_named_after_the_deadline_and_not_before(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 250, .lanes = 2 };
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_frame frame = frame_of(2, 1, 1, x, y);
	struct server server;
	uint64_t start;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	park(&server);
	start = now_ms();
	assert_int_equal(begin_step(net, 1), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	expect_error(collect_within(net, 1, 3000), -ETIMEDOUT,
		"attention waited for the FFN peer: silent for ");
	assert_in_range(now_ms() - start, 245, 1250);
	assert_non_null(strstr(afd_last_error(), server.address));
	assert_non_null(
		strstr(afd_last_error(), "limit 250, layer 2, lane 1, part 1 of 1; last heard of"));
	afd_transport_destroy(net);
	server.silent = 0;
	server_stop(&server);
}

static void a_call_that_blocks_ends_at_the_deadline(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 250 };
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_frame frame = frame_of(2, 0, 1, x, y);
	struct server server;
	uint64_t start;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	park(&server);
	start = now_ms();
	assert_int_equal(begin_step(net, 1), 0);
	expect_error(afd_transport_exchange(net, &frame), -ETIMEDOUT, "limit 250, layer 2");
	assert_in_range(now_ms() - start, 245, 1250);
	afd_transport_destroy(net);
	server.silent = 0;
	server_stop(&server);
}

static void a_server_that_beats_may_take_longer_than_the_deadline(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 200 };
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *net = join_with_a_frame_out(&server, &params, x, y);
	uint64_t until = now_ms() + 700;

	while (now_ms() < until) {
		assert_int_equal(afd_transport_collect(net, 0), 0);
		afd__transport_sleep(net, -1, 20);
	}
	server.hold = 0;
	expect_done(net, 0);
	expect_rows(x, y, 1, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void an_idle_link_has_no_deadline(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 100 };
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	park(&server);
	sleep_ms(250);
	assert_int_equal(afd_transport_poll(net), 1);
	server.silent = 0;
	run_step(net, 2, 1);
	sleep_ms(250);
	run_step(net, 2, 2);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void time_in_which_the_host_did_not_look_is_not_the_servers_silence(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 200 };
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_frame frame = frame_of(1, 0, 1, x, y);
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	park(&server);
	fill_rows(x, 1, 1);
	assert_int_equal(begin_step(net, 1), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	/* As when both processes are frozen for a while, and the client is the first to go on. */
	sleep_ms(500);
	assert_int_equal(afd_transport_collect(net, 0), 0);
	server.silent = 0;
	expect_done(net, 0);
	expect_rows(x, y, 1, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_client_that_does_not_look_disturbs_nobody(void **state)
{
	struct server server;
	float x[HIDDEN], y[HIDDEN];
	afd_transport *stalled = join_with_a_frame_out(&server, NULL, x, y), *net;

	/* Beats to the stalled one find no free slot after the first few. */
	sleep_ms(400);
	server.hold = 0;
	net = join(&server, NULL);
	for (int i = 0; i < 10; i++)
		run_step(net, 2, i);
	expect_done(stalled, 0);
	expect_rows(x, y, 1, 1);
	afd_transport_destroy(net);
	afd_transport_destroy(stalled);
	server_stop(&server);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(a_server_that_leaves_is_named_and_the_cause_stays),
		RIG_TEST(a_goodbye_finds_room_behind_beats_that_nobody_reads),
		RIG_TEST(an_answer_that_came_before_the_end_still_counts),
		RIG_TEST(a_draining_server_answers_what_it_has_and_takes_nobody_new),
		RIG_TEST(a_client_that_goes_because_the_server_drains_has_left),
		RIG_TEST(a_client_that_hangs_up_while_it_is_owed_an_answer_is_lost),
		RIG_TEST(a_draining_server_that_hangs_up_before_it_has_answered_has_left),
		RIG_TEST(a_client_that_leaves_disturbs_nobody),
		RIG_TEST(parts_of_a_client_that_left_can_still_be_read_and_answered),
		RIG_TEST(a_place_is_not_given_away_while_its_parts_are_held),
		RIG_TEST(a_silent_server_is_named_after_the_deadline_and_not_before),
		RIG_TEST(a_call_that_blocks_ends_at_the_deadline),
		RIG_TEST(a_server_that_beats_may_take_longer_than_the_deadline),
		RIG_TEST(an_idle_link_has_no_deadline),
		RIG_TEST(time_in_which_the_host_did_not_look_is_not_the_servers_silence),
		RIG_TEST(a_client_that_does_not_look_disturbs_nobody),
	};
	return RIG_RUN(argc, argv, tests);
}
