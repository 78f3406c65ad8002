/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Times of parts at a server whose compute function sleeps for a known while: what was slept is
 * compute, what waited for another pass is queue, what waited for another peer is gather, and
 * together they never exceed what the attention side has measured. Server and peers have a context
 * each, and meet over what the argument of a test names.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <afd/afd.h>

enum { H = 24, LAYERS = 3, ROWS = 5, MAX_SPANS = 256, N_SHARDS = 2, N_PEERS = 2 };

static const uint64_t MS = 1000000;
static const struct afd_contract contract = {
	.size = sizeof(contract), .hidden_size = H, .n_layers = LAYERS
};

struct server {
	afd_context *ctx;
	afd_transport *net;
	afd_ffn *ffn;
	pthread_t thread, worker;
	char address[96];
	_Atomic uint32_t sleep_ms, n_begun;
	_Atomic uint64_t ended_ns; /* when the last sleep was over */
	bool later, has_worker;    /* the function completes from another thread */
	uint64_t id;
};

struct peer {
	afd_context *ctx;
	afd_transport *net;
	struct {
		struct afd_span span;
		char peer[96];
	} spans[MAX_SPANS];
	uint32_t n_spans;
	float x[2][ROWS * H], y[2][ROWS * H]; /* by lane */
};

static struct server servers[N_SHARDS];
static struct peer peers[N_PEERS];

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void sleep_ms(uint32_t ms)
{
	const struct timespec t = { ms / 1000, (long)(ms % 1000) * 1000000 };

	nanosleep(&t, NULL);
}

/* ---- the server ---- */

static void *complete_later(void *arg)
{
	struct server *s = arg;

	sleep_ms(s->sleep_ms);
	s->ended_ns = now_ns();
	if (afd_ffn_complete(s->ffn, s->id, 0))
		abort();
	return NULL;
}

static int compute(void *user, const struct afd_ffn_pass *pass)
{
	struct server *s = user;

	memcpy(pass->y, pass->x, (size_t)pass->n_rows * H * sizeof(float));
	if (s->has_worker)
		pthread_join(s->worker, NULL);
	s->has_worker = false;
	s->id = pass->id;
	s->n_begun++;
	if (s->later) {
		s->has_worker = !pthread_create(&s->worker, NULL, complete_later, s);
		return s->has_worker ? -EINPROGRESS : -EIO;
	}
	sleep_ms(s->sleep_ms);
	s->ended_ns = now_ns();
	return 0;
}

static void *serve(void *arg)
{
	struct server *s = arg;

	if (afd_ffn_serve(s->ffn))
		abort();
	return NULL;
}

static void start(struct server *s, const char *scheme, struct afd_shard shard, uint32_t gather_us)
{
	static int n_addresses;
	struct afd_transport_params tp = { .size = sizeof(tp), .n_listen = 1, .shard = shard };
	struct afd_ffn_params fp = { .size = sizeof(fp),
		.compute = compute,
		.compute_user = s,
		.gather_us = gather_us,
		.shard = shard };
	const char *listen = s->address;

	snprintf(s->address, sizeof(s->address), "shm:times-%d-%d", (int)getpid(), n_addresses++);
	if (!strcmp(scheme, "tcp"))
		snprintf(s->address, sizeof(s->address), "tcp:127.0.0.1:0");
	tp.listen = &listen;
	if (afd_context_create(&s->ctx, NULL) ||
		afd_transport_create(&s->net, s->ctx, &contract, &tp) ||
		afd_ffn_create(&s->ffn, NULL, s->net, &fp) ||
		afd_transport_address(s->net, 0, s->address, sizeof(s->address)))
		fail_msg("%s", afd_last_error());
	assert_int_equal(pthread_create(&s->thread, NULL, serve, s), 0);
}

static void stop(struct server *s)
{
	if (!s->ffn)
		return;
	afd_ffn_stop(s->ffn);
	pthread_join(s->thread, NULL);
	if (s->has_worker)
		pthread_join(s->worker, NULL);
	afd_ffn_destroy(s->ffn);
	afd_transport_destroy(s->net);
	afd_context_destroy(s->ctx);
}

/* ---- attention peers ---- */

static void keep_span(void *user, const struct afd_span *span)
{
	struct peer *p = user;

	assert_true(p->n_spans < MAX_SPANS && span->id && span->peer);
	p->spans[p->n_spans].span = *span;
	snprintf(p->spans[p->n_spans++].peer, sizeof(p->spans[0].peer), "%s", span->peer);
}

static void join(struct peer *p, uint32_t n_servers, uint32_t lanes)
{
	const struct afd_context_params params = { .size = sizeof(params),
		.tracer = { keep_span, p } };
	const char *connect[N_SHARDS] = { servers[0].address, servers[1].address };
	const struct afd_transport_params tp = { .size = sizeof(tp),
		.connect = connect,
		.n_connect = n_servers,
		.lanes = lanes };

	if (afd_context_create(&p->ctx, &params) ||
		afd_transport_create(&p->net, p->ctx, &contract, &tp) ||
		afd_transport_wait(p->net, 0) != 1)
		fail_msg("%s", afd_last_error());
}

static void begin(struct peer *p, uint32_t n_lanes)
{
	struct afd_step_params step = { .size = sizeof(step) };

	for (uint32_t lane = 0; lane < n_lanes; lane++)
		step.n_rows[lane] = ROWS;
	assert_int_equal(afd_transport_begin(p->net, &step), 0);
}

static void dispatch(struct peer *p, int32_t layer, int32_t lane)
{
	struct afd_frame frame = { .size = sizeof(frame),
		.layer = layer,
		.lane = lane,
		.n_rows = ROWS,
		.x = p->x[lane],
		.y = p->y[lane] };

	if (afd_transport_dispatch(p->net, &frame))
		fail_msg("%s", afd_last_error());
}

/* Until the lane's frame is complete; looks on and on, as a host that waits does. */
static void collect(struct peer *p, int32_t lane)
{
	uint64_t end_ns = now_ns() + 10000 * MS;
	int rc;

	while (!(rc = afd_transport_collect(p->net, lane)))
		assert_true(now_ns() < end_ns);
	if (rc != 1)
		fail_msg("%s", afd_last_error());
}

static void exchange(struct peer *p, int32_t layer)
{
	dispatch(p, layer, 0);
	collect(p, 0);
}

static int set_up(void **state)
{
	memset(servers, 0, sizeof(servers));
	memset(peers, 0, sizeof(peers));
	return 0;
}

static int tear_down(void **state)
{
	for (int i = 0; i < N_PEERS; i++) {
		afd_transport_destroy(peers[i].net);
		afd_context_destroy(peers[i].ctx);
	}
	for (int i = 0; i < N_SHARDS; i++)
		stop(&servers[i]);
	return 0;
}

/* ---- what the spans say ---- */

static uint64_t sum_of(const struct peer *p, const char *name, int32_t layer, const char *peer)
{
	uint64_t ns = 0;

	for (uint32_t i = 0; i < p->n_spans; i++) {
		if (!strcmp(p->spans[i].span.name, name) && p->spans[i].span.layer == layer &&
			(!peer || !strcmp(p->spans[i].peer, peer)))
			ns += p->spans[i].span.duration_ns;
	}
	return ns;
}

static uint64_t wire_of(const struct peer *p, int32_t layer)
{
	return sum_of(p, "wire out", layer, NULL) + sum_of(p, "wire back", layer, NULL);
}

static uint64_t posted_ns(const struct peer *p, int32_t layer)
{
	for (uint32_t i = 0; i < p->n_spans; i++) {
		if (p->spans[i].span.layer == layer && !strcmp(p->spans[i].span.name, "wire out"))
			return p->spans[i].span.start_ns;
	}
	fail_msg("no part of layer %d", layer);
	return 0;
}

/* All spans of the peer lie in what it has measured. */
static void expect_within(const struct peer *p, uint64_t begin_ns, uint64_t end_ns)
{
	for (uint32_t i = 0; i < p->n_spans; i++) {
		const struct afd_span *s = &p->spans[i].span;

		assert_true(s->start_ns >= begin_ns && s->start_ns + s->duration_ns <= end_ns);
	}
}

static void expect_compute(const char *scheme, bool later)
{
	struct server *s = &servers[0];
	struct peer *p = &peers[0];
	uint64_t begin_ns, end_ns;

	s->later = later;
	s->sleep_ms = 20;
	start(s, scheme, (struct afd_shard){ 0 }, UINT32_MAX);
	join(p, 1, 1);
	begin(p, 1);
	for (int32_t layer = 0; layer < LAYERS; layer++) {
		p->n_spans = 0;
		begin_ns = now_ns();
		exchange(p, layer);
		end_ns = now_ns();
		expect_within(p, begin_ns, end_ns);
		assert_true(sum_of(p, "compute", layer, s->address) >= 20 * MS);
		assert_true(sum_of(p, "compute", layer, NULL) + wire_of(p, layer) <=
			    end_ns - begin_ns);
	}
}

static void what_a_function_that_blocks_sleeps_is_compute(void **state)
{
	expect_compute(*state, false);
}

static void what_a_function_that_completes_later_sleeps_is_compute(void **state)
{
	expect_compute(*state, true);
}

/* The second part is sent while the pass of the first one is under way. */
static void expect_queue(const char *scheme, bool later)
{
	struct server *s = &servers[0];
	uint64_t waited_ns;

	s->later = later;
	start(s, scheme, (struct afd_shard){ 0 }, UINT32_MAX);
	for (int i = 0; i < N_PEERS; i++) {
		join(&peers[i], 1, 1);
		begin(&peers[i], 1);
		for (int k = 0; k < 5; k++)
			exchange(&peers[i], 0);
		peers[i].n_spans = 0;
	}
	s->sleep_ms = 500;
	s->n_begun = 0;
	dispatch(&peers[0], 1, 0);
	while (!s->n_begun)
		sleep_ms(1);
	dispatch(&peers[1], 2, 0);
	while (s->n_begun < 2)
		(void)afd_transport_collect(peers[1].net, 0);
	waited_ns = s->ended_ns;
	collect(&peers[1], 0);
	collect(&peers[0], 0);
	waited_ns -= posted_ns(&peers[1], 2);
	/* What is usual on the wire is not known better than a busy machine lets it be. */
	assert_true(sum_of(&peers[1], "queue", 2, NULL) >= waited_ns / 2);
	assert_true(sum_of(&peers[1], "queue", 2, NULL) > wire_of(&peers[1], 2));
	assert_true(sum_of(&peers[1], "compute", 2, NULL) >= 500 * MS);
	assert_true(sum_of(&peers[0], "compute", 1, NULL) >= 500 * MS);
}

static void a_part_that_waits_for_another_pass_is_in_the_queue(void **state)
{
	expect_queue(*state, true);
}

/* Nobody saw when it came. */
static void a_part_that_comes_while_a_function_blocks_is_in_the_queue_and_not_on_the_wire(
	void **state)
{
	expect_queue(*state, false);
}

static void a_part_that_waits_for_another_peer_is_gathered(void **state)
{
	start(&servers[0], *state, (struct afd_shard){ 0 }, 5000000);
	for (int i = 0; i < N_PEERS; i++) {
		join(&peers[i], 1, 1);
		begin(&peers[i], 1);
		afd_transport_poll(peers[i].net);
	}
	/* Both steps are heard of before the first rows. */
	sleep_ms(200);
	dispatch(&peers[0], 0, 0);
	assert_int_equal(afd_transport_collect(peers[0].net, 0), 0);
	sleep_ms(60);
	assert_int_equal(afd_transport_collect(peers[0].net, 0), 0);
	dispatch(&peers[1], 0, 0);
	collect(&peers[1], 0);
	collect(&peers[0], 0);
	assert_int_equal(servers[0].n_begun, 1);
	assert_true(sum_of(&peers[0], "gather", 0, NULL) >= 40 * MS);
	assert_true(sum_of(&peers[0], "queue", 0, NULL) < sum_of(&peers[0], "gather", 0, NULL));
	assert_true(sum_of(&peers[1], "gather", 0, NULL) < sum_of(&peers[0], "gather", 0, NULL));
}

static void the_slow_one_of_two_shards_is_told_by_its_address(void **state)
{
	struct peer *p = &peers[0];

	start(&servers[0], *state, (struct afd_shard){ 0, 2, 0, 1 }, UINT32_MAX);
	start(&servers[1], *state, (struct afd_shard){ 1, 2, 0, 1 }, UINT32_MAX);
	servers[1].sleep_ms = 60;
	join(p, 2, 1);
	begin(p, 1);
	exchange(p, 1);
	assert_true(sum_of(p, "compute", 1, servers[1].address) >= 60 * MS);
	assert_true(sum_of(p, "compute", 1, servers[0].address) <
		    sum_of(p, "compute", 1, servers[1].address));
	assert_true(sum_of(p, "wire out", 1, servers[0].address) > 0);
}

/* Of two lanes at different layers one waits for the pass of the other. */
static void lanes_wait_for_each_other_in_the_queue(void **state)
{
	struct peer *p = &peers[0];
	uint64_t begin_ns, queue_ns;

	start(&servers[0], *state, (struct afd_shard){ 0 }, UINT32_MAX);
	join(p, 1, 2);
	begin(p, 2);
	exchange(p, 0);
	p->n_spans = 0;
	servers[0].sleep_ms = 100;
	begin_ns = now_ns();
	dispatch(p, 1, 0);
	dispatch(p, 0, 1);
	collect(p, 0);
	collect(p, 1);
	expect_within(p, begin_ns, now_ns());
	queue_ns = sum_of(p, "queue", 0, NULL) + sum_of(p, "queue", 1, NULL);
	assert_true(queue_ns >= 60 * MS);
	for (int32_t layer = 0; layer < 2; layer++)
		assert_true(sum_of(p, "compute", layer, NULL) >= 100 * MS);
}

static double metric(afd_context *ctx, const char *name)
{
	static char text[1 << 18];
	const char *at;

	assert_in_range(afd_context_metrics(ctx, text, sizeof(text)), 1, (int)sizeof(text) - 1);
	at = strstr(text, name);
	if (!at)
		fail_msg("no %s in:\n%s", name, text);
	return atof(at + strlen(name));
}

static void both_sides_count_what_was_slept_by_layer(void **state)
{
	struct peer *p = &peers[0];
	char name[192];

	start(&servers[0], *state, (struct afd_shard){ 0 }, UINT32_MAX);
	servers[0].sleep_ms = 20;
	join(p, 1, 1);
	begin(p, 1);
	exchange(p, 1);
	snprintf(name, sizeof(name),
		"\nafd_transport_compute_seconds_sum{peer=\"%s\",layer=\"1\"} ", servers[0].address);
	assert_true(metric(p->ctx, name) >= 0.02);
	/* The reply is counted behind its sending. */
	for (int i = 0; i < 1000 && metric(servers[0].ctx, "\nafd_ffn_queue_seconds_count ") < 1; i++)
		sleep_ms(1);
	assert_true(metric(servers[0].ctx, "\nafd_ffn_layer_seconds_sum{layer=\"1\"} ") >= 0.02);
	assert_true(metric(servers[0].ctx, "\nafd_ffn_layer_seconds_count{layer=\"0\"} ") == 0);
	assert_true(metric(servers[0].ctx, "\nafd_ffn_queue_seconds_count ") == 1);
}

#define OVER(scheme, test) { #test "_over_" scheme, test, set_up, tear_down, scheme }
#define OVER_BOTH(test) OVER("shm", test), OVER("tcp", test)

int main(void)
{
	const struct CMUnitTest tests[] = {
		OVER_BOTH(what_a_function_that_blocks_sleeps_is_compute),
		OVER_BOTH(what_a_function_that_completes_later_sleeps_is_compute),
		OVER_BOTH(a_part_that_waits_for_another_pass_is_in_the_queue),
		OVER_BOTH(
			a_part_that_comes_while_a_function_blocks_is_in_the_queue_and_not_on_the_wire),
		OVER_BOTH(a_part_that_waits_for_another_peer_is_gathered),
		OVER_BOTH(the_slow_one_of_two_shards_is_told_by_its_address),
		OVER_BOTH(lanes_wait_for_each_other_in_the_queue),
		OVER_BOTH(both_sides_count_what_was_slept_by_layer),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
