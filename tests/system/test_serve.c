/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The FFN server over loop: and shm:, with attention peers that keep their own attention: the bits
 * are those of afd_ffn_forward, whatever the parts, the lanes and the neighbours; it idles without
 * a core and ends when it is told to.
 */
#include "serving.h"

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>

static const char *const schemes[] = { "loop", "shm" };
enum { N_SCHEMES = 2, H = SERVING_HIDDEN };

static int collect(afd_transport *net, int32_t lane)
{
	int rc = 0;

	while (!rc)
		rc = afd_transport_collect(net, lane);
	return rc;
}

static void layers_of_a_step_have_the_bits_of_forward(void **state)
{
	for (int i = 0; i < N_SCHEMES; i++) {
		float x[5 * H], y[5 * H], expected[5 * H];
		struct serving s;
		afd_transport *net;

		serving_create(&s, schemes[i], NULL);
		net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
		peer_join(net);
		for (int step = 0; step < 3; step++) {
			assert_int_equal(peer_begin(net, 1, 5), 0);
			for (int32_t layer = 0; layer < SERVING_LAYERS; layer++) {
				draw_rows(x, 5 * H, 10 * (uint64_t)step + (uint64_t)layer);
				if (peer_exchange(net, layer, 5, x, y))
					fail_msg("%s: %s", schemes[i], afd_last_error());
				expect_rows(&s, layer, 5, x, expected);
				assert_memory_equal(y, expected, sizeof(y));
			}
		}
		afd_transport_destroy(net);
		serving_destroy(&s);
	}
}

static void a_wire_of_16_bits_rounds_y_and_nothing_else(void **state)
{
	static const int32_t dtypes[] = { AFD_DTYPE_BF16, AFD_DTYPE_F16 };

	for (int i = 0; i < 2; i++) {
		float x[3 * H], y[3 * H];
		uint16_t expected[3 * H];
		struct afd_ffn_rows rows = { .size = sizeof(rows),
			.n_rows = 3,
			.x = x,
			.y = expected,
			.y_dtype = dtypes[i] };
		struct serving s;
		afd_transport *net;

		serving_create(&s, "shm", NULL);
		net = peer_create(&s, 1, 0, dtypes[i]);
		peer_join(net);
		draw_rows(x, 3 * H, 4);
		assert_int_equal(peer_begin(net, 1, 3), 0);
		assert_int_equal(peer_exchange(net, 0, 3, x, y), 0);
		assert_int_equal(afd_ffn_forward(s.local, &rows), 0);
		for (int k = 0; k < 3 * H; k++)
			assert_true((double)y[k] == number_at(expected, (size_t)k, dtypes[i]));
		afd_transport_destroy(net);
		serving_destroy(&s);
	}
}

static void frames_of_many_parts_and_passes_have_the_bits_of_forward(void **state)
{
	/* Parts of 4 rows; passes of 3, of 7 (which hold a part and no second one), and of all. */
	static const uint32_t max_rows[] = { 3, 7, 64 };

	for (int i = 0; i < 3; i++) {
		struct afd_ffn_params params = { .max_rows = max_rows[i] };
		float x[23 * H], y[23 * H], expected[23 * H];
		struct serving s;
		afd_transport *net;

		serving_create(&s, schemes[i % N_SCHEMES], &params);
		net = peer_create(&s, 1, 4, AFD_DTYPE_F32);
		peer_join(net);
		draw_rows(x, 23 * H, 9);
		assert_int_equal(peer_begin(net, 1, 23), 0);
		assert_int_equal(peer_exchange(net, 1, 23, x, y), 0);
		expect_rows(&s, 1, 23, x, expected);
		assert_memory_equal(y, expected, sizeof(y));
		afd_transport_destroy(net);
		serving_destroy(&s);
	}
}

static void no_rows_are_answered_at_once(void **state)
{
	struct serving s;
	afd_transport *net;

	serving_create(&s, "shm", NULL);
	net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
	peer_join(net);
	assert_int_equal(peer_begin(net, 1, 0), 0);
	assert_int_equal(peer_exchange(net, 0, 0, NULL, NULL), 0);
	afd_transport_destroy(net);
	serving_destroy(&s);
}

static void lanes_of_two_peers_have_the_bits_of_forward(void **state)
{
	enum { LANES = 3, ROWS = 2 };
	float x[2][LANES][ROWS * H], y[2][LANES][ROWS * H], expected[ROWS * H];
	struct serving s;
	afd_transport *net[2];

	serving_create(&s, "shm", NULL);
	for (int p = 0; p < 2; p++) {
		net[p] = peer_create(&s, LANES, 0, AFD_DTYPE_F32);
		peer_join(net[p]);
		assert_int_equal(peer_begin(net[p], LANES, ROWS), 0);
	}
	for (int p = 0; p < 2; p++) {
		for (int32_t lane = 0; lane < LANES; lane++) {
			struct afd_frame frame = frame_of(2, lane, ROWS, x[p][lane], y[p][lane]);

			draw_rows(x[p][lane], ROWS * H, (uint64_t)(10 * p + lane));
			assert_int_equal(afd_transport_dispatch(net[p], &frame), 0);
		}
	}
	for (int p = 0; p < 2; p++) {
		for (int32_t lane = 0; lane < LANES; lane++) {
			assert_int_equal(collect(net[p], lane), 1);
			expect_rows(&s, 2, ROWS, x[p][lane], expected);
			assert_memory_equal(y[p][lane], expected, sizeof(expected));
		}
		afd_transport_destroy(net[p]);
	}
	serving_destroy(&s);
}

static void a_row_of_nan_leaves_another_peer_alone(void **state)
{
	float nan_row[H], x[H], y[2][H], expected[H];
	struct serving s;
	afd_transport *net[2];

	serving_create(&s, "loop", NULL);
	draw_rows(x, H, 3);
	for (int k = 0; k < H; k++)
		nan_row[k] = NAN;
	for (int p = 0; p < 2; p++) {
		struct afd_frame frame = frame_of(0, 0, 1, p ? x : nan_row, y[p]);

		net[p] = peer_create(&s, 1, 0, AFD_DTYPE_F32);
		peer_join(net[p]);
		assert_int_equal(peer_begin(net[p], 1, 1), 0);
		assert_int_equal(afd_transport_dispatch(net[p], &frame), 0);
	}
	for (int p = 0; p < 2; p++)
		assert_int_equal(collect(net[p], 0), 1);
	expect_rows(&s, 0, 1, x, expected);
	assert_memory_equal(y[1], expected, sizeof(expected));
	assert_true(isnan(y[0][0]));
	afd_transport_destroy(net[0]);
	afd_transport_destroy(net[1]);
	serving_destroy(&s);
}

static void a_peer_that_leaves_in_a_step_leaves_another_alone(void **state)
{
	float x[H] = { 0 }, y[H], expected[H];
	struct afd_frame frame = frame_of(0, 0, 1, x, y);
	struct serving s;
	afd_transport *net[2];

	serving_create(&s, "shm", NULL);
	draw_rows(x, H, 3);
	for (int p = 0; p < 2; p++) {
		net[p] = peer_create(&s, 1, 0, AFD_DTYPE_F32);
		peer_join(net[p]);
		assert_int_equal(peer_begin(net[p], 1, 1), 0);
	}
	assert_int_equal(afd_transport_dispatch(net[0], &frame), 0);
	afd_transport_destroy(net[0]);
	for (int32_t layer = 0; layer < SERVING_LAYERS; layer++) {
		assert_int_equal(peer_exchange(net[1], layer, 1, x, y), 0);
		expect_rows(&s, layer, 1, x, expected);
		assert_memory_equal(y, expected, sizeof(expected));
	}
	afd_transport_destroy(net[1]);
	serving_destroy(&s);
}

static void a_stage_that_lacks_layers_of_its_transport_is_refused(void **state)
{
	struct afd_ffn_params params = { .size = sizeof(params), .first_layer = 1 };
	struct serving s;
	afd_ffn *ffn = NULL;

	serving_prepare(&s, "shm");
	assert_int_equal(afd_ffn_create(&ffn, s.model.model, s.net, &params), -EINVAL);
	assert_non_null(
		strstr(afd_last_error(), "holds layers 1 .. 2, but net was made for 0 .. 2"));
	assert_null(ffn);
	/* The transport is free for a stage that fits. */
	serving_stage(&s, NULL);
	serving_destroy(&s);
}

static void a_stage_for_another_model_is_refused_by_the_field(void **state)
{
	struct ffn_model other = { .hidden = H + 1,
		.width = 8,
		.n_layers = SERVING_LAYERS,
		.dtype = { AFD_DTYPE_F32, AFD_DTYPE_F32, AFD_DTYPE_F32 } };
	struct serving s;
	afd_ffn *ffn = NULL;

	serving_prepare(&s, "shm");
	ffn_model_open(&other, s.ctx, AFD_WEIGHTS_PACKED);
	assert_int_equal(afd_ffn_create(&ffn, other.model, s.net, NULL), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "hidden_size 24, the model has 25"));
	ffn_model_close(&other);
	serving_destroy(&s);
}

static void a_transport_serves_one_stage_at_a_time(void **state)
{
	struct serving s;
	afd_ffn *second = NULL;

	serving_prepare(&s, "loop");
	serving_stage(&s, NULL);
	assert_int_equal(afd_ffn_create(&second, s.model.model, s.net, NULL), -EBUSY);
	assert_null(second);
	assert_true(afd_ffn_poll(s.ffn) >= 0);
	serving_destroy(&s);
}

/* In a child: 0 when every call says that the handle is the parent's. */
static int use_in_child(struct serving *s)
{
	struct afd_ffn_rows rows = { .size = sizeof(rows) };
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	int wrong = afd_ffn_poll(s->ffn) != -EINVAL || afd_ffn_serve(s->ffn) != -EINVAL ||
		    afd_ffn_forward(s->local, &rows) != -EINVAL || afd_ffn_fd(s->ffn) != -EINVAL ||
		    afd_ffn_complete(s->ffn, 1, 0) != -EINVAL ||
		    afd_ffn_stats(s->ffn, &stats) != -EINVAL;

	afd_ffn_stop(s->ffn);
	afd_ffn_destroy(s->ffn);
	afd_ffn_destroy(s->local);
	afd_transport_destroy(s->net);
	return wrong;
}

static void a_child_of_fork_is_refused_and_disturbs_nobody(void **state)
{
	float x[H] = { 0.5f }, y[H], expected[H];
	struct serving s;
	afd_transport *net;
	int status;
	pid_t pid;

	serving_prepare(&s, "shm");
	serving_stage(&s, NULL);
	pid = fork();
	assert_true(pid >= 0);
	if (!pid)
		_exit(use_in_child(&s));
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	serving_start(&s);
	net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
	peer_join(net);
	assert_int_equal(peer_begin(net, 1, 1), 0);
	assert_int_equal(peer_exchange(net, 0, 1, x, y), 0);
	expect_rows(&s, 0, 1, x, expected);
	assert_memory_equal(y, expected, sizeof(y));
	afd_transport_destroy(net);
	serving_destroy(&s);
}

/* ---- stop ---- */

static void a_server_that_is_stopped_twice_returns_0(void **state)
{
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	struct serving s;

	serving_create(&s, "shm", NULL);
	sleep_ms(20);
	afd_ffn_stop(s.ffn);
	serving_stop(&s);
	assert_int_equal(afd_ffn_poll(s.ffn), -ECANCELED);
	assert_int_equal(afd_ffn_serve(s.ffn), 0);
	assert_int_equal(afd_ffn_stats(s.ffn, &stats), 0);
	serving_destroy(&s);
}

static afd_ffn *to_stop;

static void stop_on_signal(int signal)
{
	afd_ffn_stop(to_stop);
}

static void a_server_is_stopped_from_a_signal_handler(void **state)
{
	struct sigaction action = { .sa_handler = stop_on_signal }, before;
	struct serving s;

	serving_create(&s, "shm", NULL);
	to_stop = s.ffn;
	assert_int_equal(sigaction(SIGUSR1, &action, &before), 0);
	sleep_ms(20);
	assert_int_equal(pthread_kill(s.thread, SIGUSR1), 0);
	pthread_join(s.thread, NULL);
	s.runs = false;
	assert_int_equal(s.served, 0);
	assert_int_equal(sigaction(SIGUSR1, &before, NULL), 0);
	serving_destroy(&s);
}

static void peers_of_a_stopped_server_are_told(void **state)
{
	float x[H] = { 0 }, y[H];
	struct serving s;
	afd_transport *net;
	int rc;

	serving_create(&s, "shm", NULL);
	net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
	peer_join(net);
	assert_int_equal(peer_begin(net, 1, 1), 0);
	assert_int_equal(peer_exchange(net, 0, 1, x, y), 0);
	serving_stop(&s);
	rc = peer_exchange(net, 1, 1, x, y);
	assert_int_equal(rc, -ECONNRESET);
	assert_non_null(strstr(afd_last_error(), s.address));
	afd_transport_destroy(net);
	serving_destroy(&s);
}

/* ---- a host's loop, rest, and steadiness ---- */

/* One turn of a host's loop over a server and a peer of it: sleeps as both say, then polls the
 * server. */
static void loop_once(afd_ffn *ffn, afd_transport *net)
{
	struct pollfd fds[2] = {
		{ .fd = afd_ffn_fd(ffn), .events = POLLIN },
		{ .fd = afd_transport_fd(net), .events = POLLIN },
	};
	int32_t ours = afd_ffn_timeout_ms(ffn), theirs = afd_transport_timeout_ms(net);
	int32_t timeout_ms = ours < 0 || (theirs >= 0 && theirs < ours) ? theirs : ours;

	poll(fds, 2, timeout_ms < 0 || timeout_ms > 1000 ? 1000 : timeout_ms);
	assert_true(afd_ffn_poll(ffn) >= 0);
}

static void a_hosts_event_loop_serves_by_descriptor_and_timeout(void **state)
{
	for (int i = 0; i < N_SCHEMES; i++) {
		float x[H] = { 0.5f }, y[H], expected[H];
		struct afd_frame frame = frame_of(0, 0, 1, x, y);
		struct serving s;
		afd_transport *net;
		int rc;

		serving_prepare(&s, schemes[i]);
		serving_stage(&s, NULL);
		net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
		while (!(rc = afd_transport_poll(net)))
			loop_once(s.ffn, net);
		assert_int_equal(rc, 1);
		assert_int_equal(peer_begin(net, 1, 1), 0);
		assert_int_equal(afd_transport_dispatch(net, &frame), 0);
		while (!(rc = afd_transport_collect(net, 0)))
			loop_once(s.ffn, net);
		assert_int_equal(rc, 1);
		expect_rows(&s, 0, 1, x, expected);
		assert_memory_equal(y, expected, sizeof(y));
		afd_transport_destroy(net);
		serving_destroy(&s);
	}
}

static double thread_seconds(pthread_t thread)
{
	struct timespec t;
	clockid_t clock;

	assert_int_equal(pthread_getcpuclockid(thread, &clock), 0);
	assert_int_equal(clock_gettime(clock, &t), 0);
	return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void an_idle_server_uses_under_one_percent_of_a_core(void **state)
{
	float x[H] = { 0 }, y[H];
	struct serving s;
	afd_transport *net;
	double before;

	serving_create(&s, "shm", NULL);
	net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
	peer_join(net);
	assert_int_equal(peer_begin(net, 1, 1), 0);
	for (int32_t layer = 0; layer < SERVING_LAYERS; layer++)
		assert_int_equal(peer_exchange(net, layer, 1, x, y), 0);
	sleep_ms(200);
	before = thread_seconds(s.thread);
	for (int i = 0; i < 15; i++) {
		sleep_ms(100);
		assert_true(afd_transport_poll(net) >= 0);
	}
	assert_true(thread_seconds(s.thread) - before < 0.015);
	afd_transport_destroy(net);
	serving_destroy(&s);
}

static void passes_and_rows_are_metrics(void **state)
{
	float x[2 * H] = { 0 }, y[2 * H];
	struct serving s;
	afd_transport *net;

	serving_create(&s, "loop", NULL);
	net = peer_create(&s, 1, 0, AFD_DTYPE_F32);
	peer_join(net);
	assert_int_equal(peer_begin(net, 1, 2), 0);
	for (int32_t layer = 0; layer < SERVING_LAYERS; layer++)
		assert_int_equal(peer_exchange(net, layer, 2, x, y), 0);
	assert_true(metric_value(s.ctx, "afd_ffn_passes_total") == SERVING_LAYERS);
	assert_true(metric_value(s.ctx, "afd_ffn_rows_total") == 2 * SERVING_LAYERS);
	assert_true(metric_value(s.ctx, "afd_ffn_rows_per_pass_sum") == 2 * SERVING_LAYERS);
	assert_true(metric_value(s.ctx, "afd_ffn_rows_per_pass_count") == SERVING_LAYERS);
	assert_true(metric_value(s.ctx, "afd_ffn_compute_seconds_sum") > 0);
	assert_true(metric_value(s.ctx, "afd_ffn_gather_seconds_count") == SERVING_LAYERS);
	assert_true(metric_value(s.ctx, "afd_ffn_peers") == 1);
	afd_transport_destroy(net);
	serving_destroy(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layers_of_a_step_have_the_bits_of_forward),
		cmocka_unit_test(a_wire_of_16_bits_rounds_y_and_nothing_else),
		cmocka_unit_test(frames_of_many_parts_and_passes_have_the_bits_of_forward),
		cmocka_unit_test(no_rows_are_answered_at_once),
		cmocka_unit_test(lanes_of_two_peers_have_the_bits_of_forward),
		cmocka_unit_test(a_row_of_nan_leaves_another_peer_alone),
		cmocka_unit_test(a_peer_that_leaves_in_a_step_leaves_another_alone),
		cmocka_unit_test(a_stage_that_lacks_layers_of_its_transport_is_refused),
		cmocka_unit_test(a_stage_for_another_model_is_refused_by_the_field),
		cmocka_unit_test(a_transport_serves_one_stage_at_a_time),
		cmocka_unit_test(a_child_of_fork_is_refused_and_disturbs_nobody),
		cmocka_unit_test(a_server_that_is_stopped_twice_returns_0),
		cmocka_unit_test(a_server_is_stopped_from_a_signal_handler),
		cmocka_unit_test(peers_of_a_stopped_server_are_told),
		cmocka_unit_test(a_hosts_event_loop_serves_by_descriptor_and_timeout),
		cmocka_unit_test(an_idle_server_uses_under_one_percent_of_a_core),
		cmocka_unit_test(passes_and_rows_are_metrics),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
