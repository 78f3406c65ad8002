/* SPDX-License-Identifier: Apache-2.0 */
/* What crosses: rows of every dtype, parts, lanes, several clients, errors of one frame, cancelled
 * steps, what is told of peers. */
#include "transport_rig.h"

#include <math.h>
#include <stdio.h>

enum { MAX_ROWS = 3 };

/* ---- rows ---- */

static void rows_of_every_layer_come_back(void **state)
{
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	for (int step = 0; step < 20; step++)
		run_step(net, 1 + (uint32_t)step % 5, step);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void rows_are_converted_for_every_pair_of_wire_dtypes(void **state)
{
	struct server server;

	server_start(&server, NULL);
	for (int32_t to_ffn = AFD_DTYPE_F32; to_ffn <= AFD_DTYPE_FP8; to_ffn++) {
		for (int32_t back = AFD_DTYPE_F32; back <= AFD_DTYPE_FP8; back++) {
			struct afd_transport_params params = { .to_ffn_dtype = to_ffn,
				.to_attention_dtype = back,
				.max_rows = back == to_ffn ? 2 : 0 };
			afd_transport *net = join(&server, &params);

			run_step(net, 9, to_ffn + back);
			afd_transport_destroy(net);
		}
	}
	server_stop(&server);
}

static void rows_may_lie_apart_and_in_place(void **state)
{
	enum { STRIDE = HIDDEN + 3, ROWS = 5 };
	float rows[ROWS * STRIDE] = { 0 }, expected[ROWS * STRIDE];
	struct server server;
	struct afd_frame frame = frame_of(1, 0, ROWS, rows, rows);
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	frame.x_row_bytes = frame.y_row_bytes = STRIDE * sizeof(float);
	for (int i = 0; i < ROWS * STRIDE; i++)
		expected[i] = (rows[i] = (float)i) + (i % STRIDE < HIDDEN ? 2 : 0);
	assert_int_equal(begin_step(net, ROWS), 0);
	assert_int_equal(afd_transport_exchange(net, &frame), 0);
	assert_memory_equal(rows, expected, sizeof(rows));
	afd_transport_destroy(net);
	server_stop(&server);
}

/* y of layer 1 came over a wire of one dtype into memory of another. */
static void expect_rounded(
	const float *x, const float *y, uint32_t n_rows, int32_t wire, int32_t memory)
{
	float want[MAX_ROWS * HIDDEN];

	memcpy(want, x, n_rows * HIDDEN * sizeof(*x));
	round_rows(want, n_rows, wire);
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++)
		want[i] += 2;
	round_rows(want, n_rows, wire);
	round_rows(want, n_rows, memory);
	assert_memory_equal(y, want, n_rows * HIDDEN * sizeof(*y));
}

static void rows_of_every_dtype_in_memory_cross_as_every_wire_dtype(void **state)
{
	enum { ROWS = MAX_ROWS };
	float x[ROWS * HIDDEN], y[ROWS * HIDDEN];
	uint32_t x_bits[ROWS * HIDDEN], y_bits[ROWS * HIDDEN];
	struct server server;

	server_start(&server, NULL);
	fill_rows(x, ROWS, 3);
	for (int32_t wire = AFD_DTYPE_F32; wire <= AFD_DTYPE_FP8; wire++) {
		struct afd_transport_params params = { .to_ffn_dtype = wire,
			.to_attention_dtype = wire };
		afd_transport *net = join(&server, &params);

		for (int32_t memory = AFD_DTYPE_F32; memory <= AFD_DTYPE_F16; memory++) {
			struct afd_frame frame =
				frame_of(1, 0, ROWS, (float *)x_bits, (float *)y_bits);

			frame.x_dtype = frame.y_dtype = memory;
			for (int i = 0; i < ROWS * HIDDEN; i++)
				put_number(x_bits, (size_t)i, memory, x[i]);
			assert_int_equal(begin_step(net, ROWS), 0);
			assert_int_equal(afd_transport_exchange(net, &frame), 0);
			for (int i = 0; i < ROWS * HIDDEN; i++)
				y[i] = number(y_bits, (size_t)i, memory);
			expect_rounded(x, y, ROWS, wire, memory);
		}
		afd_transport_destroy(net);
	}
	server_stop(&server);
}

/* What is no number of e4m3 is NaN, and its neighbours stay what they are; on either way. */
static void numbers_that_are_not_finite_cross_as_nan_of_fp8(void **state)
{
	struct server server;

	server_start(&server, NULL);
	for (int back = 0; back < 2; back++) {
		const int32_t dtypes[2] = { AFD_DTYPE_FP8, AFD_DTYPE_F32 };
		const struct afd_transport_params params = { .to_ffn_dtype = dtypes[back],
			.to_attention_dtype = dtypes[!back] };
		float x[HIDDEN] = { back ? 447 : 448, [3] = INFINITY, [5] = NAN }, y[HIDDEN];
		struct afd_frame frame = frame_of(0, 0, 1, x, y);
		afd_transport *net = join(&server, &params);

		assert_int_equal(begin_step(net, 1), 0);
		assert_int_equal(afd_transport_exchange(net, &frame), 0);
		for (int i = 0; i < HIDDEN; i++)
			assert_true(i == 3 || i == 5 ? isnan(y[i]) : y[i] == x[i] + 1);
		afd_transport_destroy(net);
	}
	server_stop(&server);
}

static void rows_of_fp8_in_memory_are_refused(void **state)
{
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	assert_int_equal(begin_step(net, 1), 0);
	for (int i = 0; i < 2; i++) {
		struct afd_frame frame = frame_of(0, 0, 1, x, y);

		*(i ? &frame.y_dtype : &frame.x_dtype) = AFD_DTYPE_FP8;
		expect_error(afd_transport_dispatch(net, &frame), -ENOTSUP,
			i ? "frame: y_dtype is fp8, rows in memory are f32, bf16 or f16"
			  : "frame: x_dtype is fp8, rows in memory are f32, bf16 or f16");
	}
	run_step(net, 2, 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void more_rows_than_a_part_holds_cross_in_parts(void **state)
{
	struct afd_transport_params params = { .max_rows = 3 };
	struct afd_peer_info info;
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	run_step(net, 100, 1);
	info = peer_of(net, 0);
	assert_int_equal(info.max_rows, 3);
	assert_int_equal(info.n_parts, LAYERS * 34);
	assert_int_equal(info.n_rows, LAYERS * 100);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void the_smaller_max_rows_wins(void **state)
{
	struct afd_transport_params params = { .max_rows = 7 };
	struct afd_peer_info info;
	struct server server;
	afd_transport *net;

	server_start(&server, &params);
	net = join(&server, NULL);
	run_step(net, 15, 1);
	info = peer_of(net, 0);
	assert_int_equal(info.max_rows, 7);
	assert_int_equal(info.n_parts, LAYERS * 3);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_frame_without_rows_is_done_and_nothing_crosses(void **state)
{
	struct afd_peer_info info;
	struct afd_frame frame = frame_of(0, 0, 0, NULL, NULL);
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	assert_int_equal(begin_step(net, 0), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	assert_int_equal(afd_transport_collect(net, 0), 1);
	info = peer_of(net, 0);
	assert_int_equal(info.n_parts, 0);
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- lanes and clients ---- */

static void lanes_are_out_together_and_collected_in_any_order(void **state)
{
	struct afd_transport_params params = { .lanes = 4, .max_rows = 4 };
	static float x[4][11 * HIDDEN], y[4][11 * HIDDEN];
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	for (int32_t step = 0; step < 10; step++) {
		assert_int_equal(begin_step(net, 11), 0);
		for (int32_t lane = 0; lane < 4; lane++) {
			struct afd_frame frame =
				frame_of(lane % LAYERS, lane, 11, x[lane], y[lane]);

			fill_rows(x[lane], 11, step * 4 + lane);
			assert_int_equal(afd_transport_dispatch(net, &frame), 0);
		}
		for (int32_t lane = 3; lane >= 0; lane--) {
			expect_done(net, lane);
			expect_rows(x[lane], y[lane], 11, lane % LAYERS);
		}
	}
	afd_transport_destroy(net);
	server_stop(&server);
}

/* Outside the test's thread a failure cannot be told, only shown by ending. */
static void expect(int holds)
{
	if (!holds) {
		fprintf(stderr, "client: %s\n", afd_last_error());
		abort();
	}
}

static void *steps_of_a_client(void *address)
{
	afd_transport *net = make_client(address, NULL);
	float x[3 * HIDDEN], y[3 * HIDDEN];
	struct afd_frame frame;

	expect(afd_transport_wait(net, 0) == 1);
	for (int step = 0; step < 50; step++) {
		expect(!begin_step(net, 3));
		for (int32_t layer = 0; layer < LAYERS; layer++) {
			frame = frame_of(layer, 0, 3, x, y);
			fill_rows(x, 3, step);
			expect(!afd_transport_exchange(net, &frame));
			for (int i = 0; i < 3 * HIDDEN; i++)
				expect(y[i] == x[i] + (float)layer + 1);
		}
	}
	afd_transport_destroy(net);
	return NULL;
}

static void several_clients_are_served_at_once(void **state)
{
	pthread_t threads[4];
	struct server server;

	server_start(&server, NULL);
	for (int i = 0; i < 4; i++)
		assert_int_equal(
			pthread_create(&threads[i], NULL, steps_of_a_client, server.address), 0);
	for (int i = 0; i < 4; i++)
		pthread_join(threads[i], NULL);
	wait_for(&server.n_answered, 4 * 50 * LAYERS);
	server_stop(&server);
}

/* ---- one frame fails, the link lives ---- */

static void an_error_of_the_server_ends_its_frame_only(void **state)
{
	float x[40 * HIDDEN] = { 0 }, y[40 * HIDDEN];
	struct afd_transport_params params = { .max_rows = 8 };
	struct afd_frame frame = frame_of(2, 0, 40, x, y);
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	server.status = -EDOM;
	assert_int_equal(begin_step(net, 40), 0);
	expect_error(afd_transport_exchange(net, &frame), -EDOM, "layer 2: on purpose");
	server.status = 0;
	run_step(net, 40, 3);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_step_goes_on_after_a_frame_that_failed(void **state)
{
	float x[40 * HIDDEN] = { 0 }, y[40 * HIDDEN];
	struct afd_transport_params params = { .max_rows = 8 };
	struct afd_frame frame = frame_of(2, 0, 40, x, y);
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	assert_int_equal(begin_step(net, 40), 0);
	for (int i = 0; i < 20; i++) {
		server.status = -EDOM;
		expect_error(afd_transport_exchange(net, &frame), -EDOM, "layer 2: on purpose");
		server.status = 0;
		assert_int_equal(afd_transport_exchange(net, &frame), 0);
	}
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_cancelled_step_leaves_the_next_one_clean(void **state)
{
	float x[40 * HIDDEN] = { 0 }, y[40 * HIDDEN];
	struct afd_transport_params params = { .max_rows = 4, .lanes = 2 };
	struct afd_frame frame = frame_of(0, 1, 40, x, y);
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	for (int i = 0; i < 20; i++) {
		server.hold = i % 2;
		assert_int_equal(begin_step(net, 40), 0);
		assert_int_equal(afd_transport_dispatch(net, &frame), 0);
		afd_transport_poll(net);
		assert_int_equal(afd_transport_cancel(net), 0);
		server.hold = 0;
		run_step(net, 10, i);
	}
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- calls out of order ---- */

static void calls_out_of_order_are_refused_and_change_nothing(void **state)
{
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_frame frame = frame_of(0, 0, 1, x, y), bad;
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { 1, 1 } };
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = make_client(server.address, NULL);
	expect_error(begin_step(net, 1), -EAGAIN, "0 of 1 peers have joined");
	assert_int_equal(afd_transport_wait(net, 0), 1);
	expect_error(afd_transport_dispatch(net, &frame), -EINVAL, "no step is open");
	expect_error(afd_transport_begin(net, &step), -EINVAL,
		"lane 1 has 1 rows, the transport has 1 lanes");
	server.hold = 1;
	assert_int_equal(begin_step(net, 1), 0);
	bad = frame_of(LAYERS, 0, 1, x, y);
	expect_error(afd_transport_dispatch(net, &bad), -EINVAL, "layer is 3, limit 2");
	bad = frame_of(0, 1, 1, x, y);
	expect_error(afd_transport_dispatch(net, &bad), -EINVAL, "lane is 1, limit 0");
	bad = frame_of(0, 0, 1, NULL, y);
	expect_error(afd_transport_dispatch(net, &bad), -EINVAL, "x is NULL");
	bad = frame;
	bad.y_row_bytes = HIDDEN * 4 - 4;
	expect_error(afd_transport_dispatch(net, &bad), -EINVAL, "y_row_bytes is 92");
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	expect_error(afd_transport_dispatch(net, &frame), -EBUSY, "lane 0 has one out");
	expect_error(begin_step(net, 1), -EINVAL, "the frame of lane 0 at layer 0 is still out");
	server.hold = 0;
	expect_done(net, 0);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void a_server_sends_no_frames(void **state)
{
	struct server server;

	server_start(&server, NULL);
	park(&server);
	expect_error(begin_step(server.net, 1), -EINVAL, "made to listen");
	server_stop(&server);
}

/* ---- looking ---- */

static void peers_are_told_on_both_sides(void **state)
{
	struct afd_transport_params params = {
		.lanes = 2, .max_rows = 64, .to_ffn_dtype = AFD_DTYPE_BF16
	};
	struct afd_peer_info here = { .size = sizeof(here) }, there = { .size = sizeof(there) };
	struct server server;
	char address[96], name[128];
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	run_step(net, 2, 1);
	assert_int_equal(afd_transport_peer(net, 0, &here), 0);
	assert_string_equal(here.address, server.address);
	assert_string_equal(here.version, afd_version());
	assert_int_equal(here.state, AFD_PEER_JOINED);
	assert_int_equal(here.to_ffn_dtype, AFD_DTYPE_BF16);
	assert_int_equal(here.to_attention_dtype, AFD_DTYPE_F32);
	expect_error(afd_transport_peer(net, 1, &here), -ENOENT, "no peer has index 1");
	wait_for(&server.n_joined, 1);
	park(&server);
	assert_int_equal(afd_transport_peer(server.net, 0, &there), 0);
	snprintf(name, sizeof(name), "%s#1", server.address);
	if (!strcmp(rig_scheme(), "auto"))
		assert_memory_equal(there.address, "shm:auto-", 9);
	else
		assert_string_equal(there.address, name);
	assert_int_equal(there.lanes, 2);
	assert_int_equal(there.n_parts, LAYERS);
	assert_int_equal(afd_transport_address(server.net, 0, address, sizeof(address)), 0);
	assert_string_equal(address, server.address);
	expect_error(afd_transport_address(server.net, 0, address, 4), -ENOSPC, "the buffer has 4");
	afd_transport_destroy(net);
	server_stop(&server);
}

static void parts_and_rows_are_metrics(void **state)
{
	static char text[1 << 16];
	struct server server;
	char line[192];
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	run_step(net, 5, 1);
	assert_true(afd_context_metrics(client_ctx, text, sizeof(text)) < (int)sizeof(text));
	snprintf(line, sizeof(line), "afd_transport_rows_total{peer=\"%s\"} 15\n", server.address);
	assert_non_null(strstr(text, line));
	snprintf(line, sizeof(line), "afd_transport_round_trip_seconds_count{peer=\"%s\"} 3\n",
		server.address);
	assert_non_null(strstr(text, line));
	assert_non_null(strstr(text, "afd_transport_peers{role=\"attention\"} 1\n"));
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- what a gather is told ---- */

static void sources_tell_which_layer_each_lane_sends_next(void **state)
{
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_transport_params params = { .lanes = 2 };
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { 1, 0 } };
	struct afd_frame frame = frame_of(0, 0, 1, x, y);
	struct afd__source sources[8];
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, &params);
	server.hold = 1;
	assert_int_equal(afd_transport_begin(net, &step), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	wait_for(&server.n_held, 1);
	park(&server);
	assert_int_equal(afd__exchange_sources(server.net, sources, 8), 1);
	assert_int_equal(sources[0].lane, 0);
	assert_int_equal(sources[0].next_layer, 1);
	assert_int_equal(sources[0].n_rows, 1);
	server.hold = server.silent = 0;
	expect_done(net, 0);
	afd_transport_destroy(net);
	server_stop(&server);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(rows_of_every_layer_come_back),
		RIG_TEST(rows_are_converted_for_every_pair_of_wire_dtypes),
		RIG_TEST(rows_of_every_dtype_in_memory_cross_as_every_wire_dtype),
		RIG_TEST(numbers_that_are_not_finite_cross_as_nan_of_fp8),
		RIG_TEST(rows_of_fp8_in_memory_are_refused),
		RIG_TEST(rows_may_lie_apart_and_in_place),
		RIG_TEST(more_rows_than_a_part_holds_cross_in_parts),
		RIG_TEST(the_smaller_max_rows_wins),
		RIG_TEST(a_frame_without_rows_is_done_and_nothing_crosses),
		RIG_TEST(lanes_are_out_together_and_collected_in_any_order),
		RIG_TEST(several_clients_are_served_at_once),
		RIG_TEST(an_error_of_the_server_ends_its_frame_only),
		RIG_TEST(a_step_goes_on_after_a_frame_that_failed),
		RIG_TEST(a_cancelled_step_leaves_the_next_one_clean),
		RIG_TEST(calls_out_of_order_are_refused_and_change_nothing),
		RIG_TEST(a_server_sends_no_frames),
		RIG_TEST(peers_are_told_on_both_sides),
		RIG_TEST(parts_and_rows_are_metrics),
		RIG_TEST(sources_tell_which_layer_each_lane_sends_next),
	};
	return RIG_RUN(argc, argv, tests);
}
