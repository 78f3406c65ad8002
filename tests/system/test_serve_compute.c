/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A server around a host's compute function: what the function is given, how it may answer, and
 * what the attention peers see of its errors. The function doubles its rows and adds the layer,
 * which no FFN does by accident.
 */
#include "serving.h"

#include <stdatomic.h>

enum { H = SERVING_HIDDEN };

enum manner {
	AT_ONCE,
	LATER,
	FAILS,
	FAILS_LATER,
	FAILS_ONCE,
	RETURNS_7,
	REPORTS_FIRST,
	NEVER_REPORTS
};

struct host {
	struct serving *serving;
	enum manner manner;
	int status;
	uint32_t delay_ms;
	pthread_t thread;
	bool has_thread;
	struct afd_ffn_pass pass; /* the last one */
	_Atomic uint32_t n_passes, n_unknown;
	_Atomic uint64_t held_id;
};

static void compute(const struct afd_ffn_pass *pass)
{
	for (size_t i = 0; i < (size_t)pass->n_rows * H; i++)
		pass->y[i] = 2 * pass->x[i] + (float)pass->layer;
}

static void *compute_later(void *arg)
{
	struct host *host = arg;

	sleep_ms(host->delay_ms);
	if (host->manner != FAILS_LATER)
		compute(&host->pass);
	if (afd_ffn_complete(host->serving->ffn, host->pass.id,
		    host->manner == FAILS_LATER ? host->status : 0))
		abort();
	/* A second report of a pass is not taken. */
	if (afd_ffn_complete(host->serving->ffn, host->pass.id, 0) == -ENOENT)
		atomic_fetch_add(&host->n_unknown, 1);
	return NULL;
}

static int compute_function(void *user, const struct afd_ffn_pass *pass)
{
	struct host *host = user;
	uint32_t n = atomic_fetch_add(&host->n_passes, 1);

	if (host->has_thread)
		pthread_join(host->thread, NULL);
	host->has_thread = false;
	host->pass = *pass;
	switch (host->manner) {
	case FAILS:
		return host->status;
	case FAILS_ONCE:
		if (!n)
			return host->status;
		break;
	case RETURNS_7:
		return 7;
	case LATER:
	case FAILS_LATER:
		host->has_thread = !pthread_create(&host->thread, NULL, compute_later, host);
		return -EINPROGRESS;
	case REPORTS_FIRST:
		compute(pass);
		if (afd_ffn_complete(host->serving->ffn, pass->id, 0))
			abort();
		return -EINPROGRESS;
	case NEVER_REPORTS:
		atomic_store(&host->held_id, pass->id);
		return -EINPROGRESS;
	case AT_ONCE:
		break;
	}
	compute(pass);
	return 0;
}

static void host_create(struct serving *s, struct host *host, const char *scheme, uint32_t max_rows)
{
	struct afd_ffn_params params = { .compute = compute_function,
		.compute_user = host,
		.max_rows = max_rows,
		.weights = { 1, 2 } };

	host->serving = s;
	serving_create(s, scheme, &params);
}

static void host_destroy(struct serving *s, struct host *host)
{
	serving_stop(s);
	if (host->has_thread)
		pthread_join(host->thread, NULL);
	serving_destroy(s);
}

static afd_transport *joined_peer(struct serving *s, uint32_t n_rows, int32_t dtype)
{
	afd_transport *net = peer_create(s, 1, 0, dtype);

	peer_join(net);
	assert_int_equal(peer_begin(net, 1, n_rows), 0);
	return net;
}

static void assert_doubled(const float *x, const float *y, uint32_t n_rows, int32_t layer)
{
	for (size_t i = 0; i < (size_t)n_rows * H; i++)
		assert_true(y[i] == 2 * x[i] + (float)layer);
}

static void rows_come_back_as_the_function_wrote_them(void **state)
{
	static const enum manner manners[] = { AT_ONCE, LATER, REPORTS_FIRST };
	static const char *const schemes[] = { "loop", "shm" };

	for (int i = 0; i < 6; i++) {
		struct host host = { .manner = manners[i / 2], .delay_ms = 5 };
		float x[7 * H], y[7 * H];
		struct serving s;
		afd_transport *net;

		host_create(&s, &host, schemes[i % 2], 3);
		net = joined_peer(&s, 7, AFD_DTYPE_BF16);
		draw_rows(x, 7 * H, 1);
		for (int32_t layer = 0; layer < SERVING_LAYERS; layer++) {
			if (peer_exchange(net, layer, 7, x, y))
				fail_msg("manner %d: %s", host.manner, afd_last_error());
			assert_doubled(x, y, 7, layer);
		}
		assert_int_equal(host.n_passes, 3 * SERVING_LAYERS);
		afd_transport_destroy(net);
		host_destroy(&s, &host);
		assert_int_equal(host.n_unknown, host.manner == LATER ? 3 * SERVING_LAYERS : 0);
	}
}

struct failure {
	const char *name;
	enum manner manner;
	int status, seen;
	const char *text;
};

static void errors_of_the_function_reach_the_peer_with_text(void **state)
{
	static const struct failure failures[] = {
		{ "an errno", FAILS, -ENODEV, -ENODEV, "layer 1: 2 rows failed: No such device" },
		{ "an errno, later", FAILS_LATER, -EDOM, -EDOM, "layer 1: 2 rows failed" },
		{ "an errno of no list", FAILS, -ENOTTY, -EIO, "layer 1: 2 rows failed" },
		{ "no errno at all", RETURNS_7, 0, -EINVAL, "returned 7" },
	};

	for (size_t i = 0; i < sizeof(failures) / sizeof(failures[0]); i++) {
		const struct failure *f = &failures[i];
		struct host host = { .manner = f->manner, .status = f->status };
		float x[2 * H] = { 0 }, y[2 * H];
		struct serving s;
		afd_transport *net;

		print_message("%s\n", f->name);
		host_create(&s, &host, "shm", 0);
		net = joined_peer(&s, 2, AFD_DTYPE_F32);
		assert_int_equal(peer_exchange(net, 1, 2, x, y), f->seen);
		if (!strstr(afd_last_error(), f->text))
			fail_msg("\"%s\" lacks \"%s\"", afd_last_error(), f->text);
		assert_true(metric_value(s.ctx, "afd_ffn_errors_total") == 1);
		afd_transport_destroy(net);
		host_destroy(&s, &host);
	}
}

static void a_pass_that_failed_is_nobody_elses(void **state)
{
	struct host host = { .manner = FAILS_ONCE, .status = -EIO };
	float x[2 * H], y[2 * H];
	struct serving s;
	afd_transport *net[2];

	host_create(&s, &host, "shm", 0);
	draw_rows(x, 2 * H, 1);
	net[0] = joined_peer(&s, 2, AFD_DTYPE_F32);
	assert_int_equal(peer_exchange(net[0], 0, 2, x, y), -EIO);
	net[1] = joined_peer(&s, 2, AFD_DTYPE_F32);
	assert_int_equal(peer_exchange(net[1], 0, 2, x, y), 0);
	assert_doubled(x, y, 2, 0);
	afd_transport_destroy(net[0]);
	afd_transport_destroy(net[1]);
	host_destroy(&s, &host);
}

static void a_long_pass_beats_so_that_no_deadline_passes(void **state)
{
	struct host host = { .manner = LATER, .delay_ms = 700 };
	struct afd_transport_params tp = { .size = sizeof(tp),
		.n_connect = 1,
		.deadline_ms = 300,
		.to_ffn_dtype = AFD_DTYPE_F32,
		.to_attention_dtype = AFD_DTYPE_F32 };
	const char *connect[1];
	float x[H], y[H];
	struct serving s;
	afd_transport *net;

	host_create(&s, &host, "shm", 0);
	connect[0] = s.address;
	tp.connect = connect;
	assert_int_equal(afd_transport_create(&net, s.ctx, &s.contract, &tp), 0);
	peer_join(net);
	assert_int_equal(peer_begin(net, 1, 1), 0);
	draw_rows(x, H, 1);
	if (peer_exchange(net, 0, 1, x, y))
		fail_msg("%s", afd_last_error());
	assert_doubled(x, y, 1, 0);
	afd_transport_destroy(net);
	host_destroy(&s, &host);
}

static void a_stopped_server_waits_for_the_pass_that_is_under_way(void **state)
{
	struct host host = { .manner = LATER, .delay_ms = 200 };
	float x[H] = { 0 }, y[H];
	struct serving s;
	afd_transport *net;
	struct afd_frame frame = frame_of(2, 0, 1, x, y);
	int rc = 0;

	host_create(&s, &host, "shm", 0);
	net = joined_peer(&s, 1, AFD_DTYPE_F32);
	draw_rows(x, H, 1);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	while (!atomic_load(&host.n_passes))
		assert_int_equal(afd_transport_collect(net, 0), 0);
	serving_stop(&s);
	while (!rc)
		rc = afd_transport_collect(net, 0);
	assert_int_equal(rc, 1);
	assert_doubled(x, y, 1, 2);
	afd_transport_destroy(net);
	host_destroy(&s, &host);
}

static void an_unknown_pass_is_refused(void **state)
{
	struct host host = { .manner = NEVER_REPORTS };
	float x[H] = { 0 }, y[H];
	struct serving s;
	afd_transport *net;
	struct afd_frame frame = frame_of(0, 0, 1, x, y);

	host_create(&s, &host, "loop", 0);
	net = joined_peer(&s, 1, AFD_DTYPE_F32);
	assert_int_equal(afd_ffn_complete(s.ffn, 0, 0), -ENOENT);
	assert_int_equal(afd_ffn_complete(s.ffn, 1, 0), -ENOENT);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	while (!atomic_load(&host.held_id))
		assert_int_equal(afd_transport_collect(net, 0), 0);
	assert_int_equal(afd_ffn_complete(s.ffn, host.held_id + 1, 0), -ENOENT);
	assert_int_equal(afd_ffn_complete(s.ffn, host.held_id, 0), 0);
	assert_int_equal(afd_ffn_complete(s.ffn, host.held_id, 0), -ENOENT);
	afd_transport_destroy(net);
	host_destroy(&s, &host);
}

static void a_stage_of_a_function_states_its_fingerprint_and_has_no_forward(void **state)
{
	struct host host = { 0 };
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	float x[H] = { 0 };
	struct afd_ffn_rows rows = { .size = sizeof(rows), .n_rows = 1, .x = x, .y = x };
	struct serving s;

	host_create(&s, &host, "shm", 0);
	serving_stop(&s);
	assert_int_equal(afd_ffn_stats(s.ffn, &stats), 0);
	assert_int_equal(stats.weights[0], 1);
	assert_int_equal(stats.weights[1], 2);
	assert_int_equal(afd_ffn_forward(s.ffn, &rows), -EINVAL);
	host_destroy(&s, &host);
}

static void what_a_function_cannot_be_given_is_refused(void **state)
{
	struct afd_ffn_params params = { .size = sizeof(params), .compute = compute_function };
	struct serving s;
	afd_ffn *ffn = NULL;

	serving_prepare(&s, "loop");
	assert_int_equal(afd_ffn_create(&ffn, NULL, NULL, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "net is NULL"));
	assert_int_equal(afd_ffn_create(&ffn, s.model.model, s.net, &params), -EINVAL);
	params.device = "deferred";
	assert_int_equal(afd_ffn_create(&ffn, NULL, s.net, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "\"deferred\""));
	params = (struct afd_ffn_params){ .size = sizeof(params) };
	assert_int_equal(afd_ffn_create(&ffn, NULL, s.net, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "none of model and compute"));
	assert_null(ffn);
	serving_destroy(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_come_back_as_the_function_wrote_them),
		cmocka_unit_test(errors_of_the_function_reach_the_peer_with_text),
		cmocka_unit_test(a_pass_that_failed_is_nobody_elses),
		cmocka_unit_test(a_long_pass_beats_so_that_no_deadline_passes),
		cmocka_unit_test(a_stopped_server_waits_for_the_pass_that_is_under_way),
		cmocka_unit_test(an_unknown_pass_is_refused),
		cmocka_unit_test(a_stage_of_a_function_states_its_fingerprint_and_has_no_forward),
		cmocka_unit_test(what_a_function_cannot_be_given_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
