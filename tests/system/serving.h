/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A server in a thread of its own and attention peers that are plain hosts: they dispatch rows that
 * they have drawn, and know what must come back, since afd_ffn_forward of a second stage says it.
 */
#ifndef AFD_TEST_SERVING_H
#define AFD_TEST_SERVING_H

#include "ffn_model.h"

#include <pthread.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

enum { SERVING_HIDDEN = 24, SERVING_WIDTH = 40, SERVING_LAYERS = 3 };

struct serving {
	afd_context *ctx;
	struct ffn_model model;
	struct afd_contract contract;
	char address[80];
	afd_transport *net;
	afd_ffn *ffn;
	afd_ffn *local; /* the same layers, for what must come back */
	pthread_t thread;
	int served; /* what afd_ffn_serve returned */
	bool runs;
};

static void *serve(void *arg)
{
	struct serving *s = arg;

	s->served = afd_ffn_serve(s->ffn);
	if (s->served)
		fprintf(stderr, "serve: %s\n", afd_last_error());
	return NULL;
}

static int n_servings;

/* Where the next server will listen: for peers that are processes and must be forked before there
 * are threads. */
static inline void serving_next_address(char address[80], const char *scheme)
{
	snprintf(address, 80, "%s:serve-%d-%d", scheme, (int)getpid(), n_servings);
}

/* Context, model and transport; the caller makes the stage, or takes serving_create. */
static inline void serving_prepare(struct serving *s, const char *scheme)
{
	struct afd_transport_params tp = { .size = sizeof(tp), .n_listen = 1 };
	const char *listen[1] = { s->address };

	*s = (struct serving){ .model = { .hidden = SERVING_HIDDEN,
				       .width = SERVING_WIDTH,
				       .n_layers = SERVING_LAYERS } };
	for (int k = 0; k < 3; k++)
		s->model.dtype[k] = AFD_DTYPE_BF16;
	assert_int_equal(afd_context_create(&s->ctx, NULL), 0);
	ffn_model_open(&s->model, s->ctx, AFD_WEIGHTS_PACKED);
	s->contract.size = sizeof(s->contract);
	assert_int_equal(afd_model_contract(s->model.model, &s->contract), 0);
	serving_next_address(s->address, scheme);
	n_servings++;
	tp.listen = listen;
	if (afd_transport_create(&s->net, s->ctx, &s->contract, &tp))
		fail_msg("%s", afd_last_error());
}

static inline void serving_start(struct serving *s)
{
	s->runs = true;
	assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static inline void serving_stage(struct serving *s, const struct afd_ffn_params *like)
{
	struct afd_ffn_params params = like ? *like : (struct afd_ffn_params){ 0 };
	struct afd_ffn_params local = { .size = sizeof(local), .device = test_device() };

	params.size = sizeof(params);
	params.device = params.compute ? NULL : test_device();
	if (afd_ffn_create(&s->ffn, params.compute ? NULL : s->model.model, s->net, &params))
		fail_msg("%s", afd_last_error());
	assert_int_equal(afd_ffn_create(&s->local, s->model.model, NULL, &local), 0);
}

static inline void serving_create(
	struct serving *s, const char *scheme, const struct afd_ffn_params *like)
{
	serving_prepare(s, scheme);
	serving_stage(s, like);
	serving_start(s);
}

/* The server must have ended well. */
static inline void serving_stop(struct serving *s)
{
	if (!s->runs)
		return;
	afd_ffn_stop(s->ffn);
	pthread_join(s->thread, NULL);
	s->runs = false;
	assert_int_equal(s->served, 0);
}

static inline void serving_destroy(struct serving *s)
{
	serving_stop(s);
	afd_ffn_destroy(s->ffn);
	afd_ffn_destroy(s->local);
	afd_transport_destroy(s->net);
	ffn_model_close(&s->model);
	afd_context_destroy(s->ctx);
}

/* ---- an attention peer ---- */

static inline afd_transport *peer_create(
	struct serving *s, uint32_t lanes, uint32_t max_rows, int32_t dtype)
{
	const char *connect[1] = { s->address };
	struct afd_transport_params tp = { .size = sizeof(tp),
		.connect = connect,
		.n_connect = 1,
		.lanes = lanes,
		.max_rows = max_rows,
		.to_ffn_dtype = dtype,
		.to_attention_dtype = dtype };
	afd_transport *net;

	if (afd_transport_create(&net, s->ctx, &s->contract, &tp))
		fail_msg("%s", afd_last_error());
	return net;
}

static inline void peer_join(afd_transport *net)
{
	if (afd_transport_wait(net, 0) != 1)
		fail_msg("%s", afd_last_error());
}

static inline int peer_begin(afd_transport *net, uint32_t n_lanes, uint32_t n_rows)
{
	struct afd_step_params step = { .size = sizeof(step) };

	for (uint32_t lane = 0; lane < n_lanes; lane++)
		step.n_rows[lane] = n_rows;
	return afd_transport_begin(net, &step);
}

static inline struct afd_frame frame_of(
	int32_t layer, int32_t lane, uint32_t n_rows, const float *x, float *y)
{
	return (struct afd_frame){ .size = sizeof(struct afd_frame),
		.layer = layer,
		.lane = lane,
		.n_rows = n_rows,
		.x = x,
		.y = y };
}

static inline int peer_exchange(
	afd_transport *net, int32_t layer, uint32_t n_rows, const float *x, float *y)
{
	struct afd_frame frame = frame_of(layer, 0, n_rows, x, y);

	return afd_transport_exchange(net, &frame);
}

/* What must come back of f32 rows. */
static inline void expect_rows(
	struct serving *s, int32_t layer, uint32_t n_rows, const float *x, float *y)
{
	struct afd_ffn_rows rows = {
		.size = sizeof(rows), .layer = layer, .n_rows = n_rows, .x = x, .y = y
	};

	if (afd_ffn_forward(s->local, &rows))
		fail_msg("%s", afd_last_error());
}

static inline void sleep_ms(uint32_t ms)
{
	struct timespec t = { .tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000 };

	nanosleep(&t, NULL);
}

static inline double metric_value(const afd_context *ctx, const char *name)
{
	static char text[65536];
	char line[96];
	const char *at;

	assert_in_range(afd_context_metrics(ctx, text, sizeof(text)), 1, (int)sizeof(text) - 1);
	snprintf(line, sizeof(line), "\n%s ", name);
	at = strstr(text, line);
	if (!at)
		fail_msg("no metric %s in:\n%s", name, text);
	return atof(at + strlen(line));
}

#endif
