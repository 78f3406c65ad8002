/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the time of a part went: spans of every FFN peer stand one behind the other and fill the
 * round trip, what a server states is attributed to it and to nobody else, lies are bounded by what
 * this side has measured, and the histograms say the same.
 */
#include "transport_rig.h"

#include <stdio.h>
#include <string.h>

enum { ROWS = 40, PARTS_OF = 7, MAX_SPANS = 4096, N_LEGS = 6 };

static const uint64_t MS = 1000000;
static const char *const legs[N_LEGS] = { "wire out", "queue", "gather", "compute", "wire back",
	"unread" };

static struct server servers[2];
static float x[4][ROWS * HIDDEN], y[4][ROWS * HIDDEN];
static struct span {
	struct afd_span span;
	char peer[96];
} spans[MAX_SPANS];
static uint32_t n_spans;
static char metrics[1 << 18];

static void keep_span(void *user, const struct afd_span *span)
{
	struct span *kept = &spans[n_spans++];

	assert_true(n_spans <= MAX_SPANS);
	kept->span = *span;
	snprintf(kept->peer, sizeof(kept->peer), "%s", span->peer);
}

static void trace(void)
{
	n_spans = 0;
	client_ctx->tracer = (struct afd_tracer){ .span = keep_span };
}

static afd_transport *join_both(const struct afd_transport_params *params)
{
	struct afd_transport_params p = *params;
	const char *addresses[2] = { servers[0].address, servers[1].address };
	afd_transport *net;

	p.size = sizeof(p);
	p.connect = addresses;
	p.n_connect = 2;
	rig_secret(&p);
	if (afd_transport_create(&net, client_ctx, &rig_contract, &p) ||
		afd_transport_wait(net, 0) != 1)
		fail_msg("%s", afd_last_error());
	return net;
}

static void leave(afd_transport *net, int n_servers)
{
	afd_transport_destroy(net);
	client_ctx->tracer = (struct afd_tracer){ 0 };
	for (int i = 0; i < n_servers; i++)
		server_stop(&servers[i]);
}

static void dispatch(afd_transport *net, int32_t layer, int32_t lane, uint32_t n_rows)
{
	struct afd_frame frame = frame_of(layer, lane, n_rows, x[lane], y[lane]);

	fill_rows(x[lane], n_rows, lane);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
}

/* The sum over the spans of this name and peer (NULL: any). */
static uint64_t sum_of(const char *name, const char *peer)
{
	uint64_t ns = 0;

	for (uint32_t i = 0; i < n_spans; i++) {
		if (!strcmp(spans[i].span.name, name) && (!peer || !strcmp(spans[i].peer, peer)))
			ns += spans[i].span.duration_ns;
	}
	return ns;
}

static int leg_of(const struct afd_span *span)
{
	for (int i = 0; i < N_LEGS; i++) {
		if (!strcmp(span->name, legs[i]))
			return i;
	}
	fail_msg("%s is no leg", span->name);
	return 0;
}

/* Spans of a part come together, in order, each where the last one ended. Returns the parts. */
static uint32_t expect_chains(void)
{
	uint32_t n_parts = 0;

	for (uint32_t i = 0; i < n_spans; i++) {
		const struct afd_span *s = &spans[i].span, *before = i ? &spans[i - 1].span : NULL;

		if (!before || s->id != before->id) {
			assert_int_equal(leg_of(s), 0);
			assert_true(!before || !strcmp(before->name, "wire back") ||
				    !strcmp(before->name, "unread"));
			n_parts++;
			continue;
		}
		assert_true(leg_of(s) > leg_of(before));
		assert_int_equal(s->start_ns, before->start_ns + before->duration_ns);
		assert_string_equal(spans[i].peer, spans[i - 1].peer);
	}
	return n_parts;
}

static double metric(const char *name, const char *labels)
{
	char line[256];
	const char *at;

	assert_in_range(afd_context_metrics(client_ctx, metrics, sizeof(metrics)), 1,
		(int)sizeof(metrics) - 1);
	snprintf(line, sizeof(line), "\nafd_transport_%s{%s} ", name, labels);
	at = strstr(metrics, line);
	if (!at)
		fail_msg("no %s in:\n%s", line + 1, metrics);
	return atof(at + strlen(line));
}

/* ---- one peer ---- */

static void what_a_server_states_is_attributed_and_the_rest_is_the_wire(void **state)
{
	afd_transport *net;

	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	servers[0].hold = 1;
	servers[0].gather_ns = 3 * MS;
	servers[0].compute_ns = 10 * MS;
	trace();
	assert_int_equal(begin_step(net, 5), 0);
	dispatch(net, 2, 0, 5);
	wait_for(&servers[0].n_held, 1);
	sleep_ms(30);
	servers[0].hold = 0;
	expect_done(net, 0);
	assert_int_equal(expect_chains(), 1);
	assert_int_equal(sum_of("compute", servers[0].address), 10 * MS);
	assert_int_equal(sum_of("gather", servers[0].address), 3 * MS);
	/* It lay there for 30 ms, of which 13 are told. */
	assert_true(sum_of("queue", servers[0].address) >= 17 * MS);
	assert_int_equal(spans[0].span.layer, 2);
	assert_int_equal(spans[0].span.n_rows, 5);
	leave(net, 1);
}

static void halves_of_the_wire_are_marked_as_estimates_and_measured_times_are_not(void **state)
{
	afd_transport *net;

	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	servers[0].compute_ns = 1;
	trace();
	run_step(net, 5, 1);
	assert_int_equal(expect_chains(), LAYERS);
	for (uint32_t i = 0; i < n_spans; i++) {
		const struct afd_span *s = &spans[i].span;
		bool wire = !strncmp(s->name, "wire", 4);

		assert_int_equal(s->flags, wire ? AFD_SPAN_ESTIMATED : 0);
	}
	leave(net, 1);
}

static void lies_of_a_server_do_not_exceed_what_was_measured(void **state)
{
	uint64_t begin_ns, end_ns;
	afd_transport *net;

	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	servers[0].gather_ns = UINT64_MAX;
	servers[0].compute_ns = UINT64_MAX - 1;
	trace();
	begin_ns = afd__now_ns();
	for (int i = 0; i < 5; i++)
		run_step(net, 5, i);
	end_ns = afd__now_ns();
	assert_int_equal(expect_chains(), 5 * LAYERS);
	for (uint32_t i = 0; i < n_spans; i++) {
		const struct afd_span *s = &spans[i].span;

		assert_true(s->start_ns >= begin_ns && s->start_ns + s->duration_ns <= end_ns);
	}
	leave(net, 1);
}

static void a_reply_that_comes_while_the_host_computes_is_unread_and_no_wire(void **state)
{
	afd_transport *net;
	uint64_t before;

	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	for (int i = 0; i < 5; i++)
		run_step(net, 5, i);
	trace();
	assert_int_equal(begin_step(net, 5), 0);
	servers[0].n_answered = 0;
	dispatch(net, 0, 0, 5);
	afd__exchange_computes(net, afd__now_ns());
	for (int i = 0; i < 2000 && !servers[0].n_answered; i++)
		sleep_ms(1);
	sleep_ms(60);
	expect_done(net, 0);
	assert_int_equal(expect_chains(), 1);
	assert_true((before = sum_of("unread", NULL)) >= 40 * MS);
	/* The next look is a look again; only where this thread did not run was there none. */
	dispatch(net, 1, 0, 5);
	expect_done(net, 0);
	assert_int_equal(expect_chains(), 2);
	assert_true(sum_of("unread", NULL) < before + 40 * MS);
	leave(net, 1);
}

static void spans_carry_the_step_and_its_trace_id(void **state)
{
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { 5 },
		.trace_id = { 0xab, 2, 3, [15] = 0xcd } };
	afd_transport *net;

	server_ctx->log.max_level = AFD_LOG_DEBUG;
	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	run_step(net, 5, 1);
	trace();
	assert_int_equal(afd_transport_begin(net, &step), 0);
	dispatch(net, 0, 0, 5);
	expect_done(net, 0);
	for (uint32_t i = 0; i < n_spans; i++) {
		assert_memory_equal(spans[i].span.trace_id, step.trace_id, 16);
		assert_int_equal(spans[i].span.step, 2);
	}
	rig_wait_logged("step 2, trace id ab0203000000000000000000000000cd, rows of its lanes 5, 0");
	leave(net, 1);
}

/* ---- parts and lanes ---- */

static bool overlap(const struct afd_span *a, const struct afd_span *b)
{
	return a->start_ns < b->start_ns + b->duration_ns &&
	       b->start_ns < a->start_ns + a->duration_ns;
}

/* Of a lane of a peer at most two parts are out. */
static void expect_at_most_two_at_once(void)
{
	for (uint32_t i = 0; i < n_spans; i++) {
		int n = 0;

		for (uint32_t k = 0; k < n_spans; k++)
			n += spans[k].span.lane == spans[i].span.lane &&
			     !strcmp(spans[k].peer, spans[i].peer) &&
			     spans[k].span.start_ns <= spans[i].span.start_ns &&
			     spans[i].span.start_ns <
				     spans[k].span.start_ns + spans[k].span.duration_ns;
		assert_true(n <= 2);
	}
}

static void parts_of_two_lanes_have_spans_of_their_own(void **state)
{
	const struct afd_transport_params params = { .lanes = 2, .max_rows = PARTS_OF };
	afd_transport *net;
	bool met = false;

	server_start(&servers[0], NULL);
	net = join(&servers[0], &params);
	servers[0].hold = 1;
	trace();
	assert_int_equal(begin_step(net, ROWS), 0);
	dispatch(net, 0, 0, ROWS);
	dispatch(net, 0, 1, ROWS);
	for (int i = 0; i < 2000 && servers[0].n_held < 2; i++)
		sleep_ms(1);
	servers[0].hold = 0;
	expect_done(net, 0);
	expect_done(net, 1);
	assert_int_equal(expect_chains(), 2 * ((ROWS - 1) / PARTS_OF + 1));
	for (uint32_t i = 0; i < n_spans; i++) {
		assert_int_equal(spans[i].span.n_parts, (ROWS - 1) / PARTS_OF + 1);
		for (uint32_t k = 0; k < i; k++)
			met |= spans[i].span.lane != spans[k].span.lane &&
			       overlap(&spans[i].span, &spans[k].span);
	}
	assert_true(met);
	expect_at_most_two_at_once();
	leave(net, 1);
}

/* ---- several peers ---- */

static void each_shard_gets_its_own_times(void **state)
{
	const struct afd_transport_params halves[2] = { { .shard = { 0, 2, 0, 1 } },
		{ .shard = { 1, 2, 0, 1 } } };
	char labels[160];
	afd_transport *net;

	server_start(&servers[0], &halves[0]);
	server_start(&servers[1], &halves[1]);
	net = join_both(&(struct afd_transport_params){ 0 });
	servers[0].hold = servers[1].hold = 1;
	servers[1].compute_ns = 20 * MS;
	trace();
	assert_int_equal(begin_step(net, 5), 0);
	dispatch(net, 1, 0, 5);
	wait_for(&servers[0].n_held, 1);
	wait_for(&servers[1].n_held, 1);
	sleep_ms(25);
	servers[0].hold = servers[1].hold = 0;
	expect_done(net, 0);
	assert_int_equal(expect_chains(), 2);
	assert_int_equal(sum_of("compute", servers[0].address), 0);
	assert_int_equal(sum_of("compute", servers[1].address), 20 * MS);
	assert_true(sum_of("queue", servers[0].address) >= 25 * MS);
	snprintf(labels, sizeof(labels), "peer=\"%s\",layer=\"1\"", servers[1].address);
	assert_true(metric("compute_seconds_sum", labels) == 0.02);
	leave(net, 2);
}

static void a_part_that_is_lost_ends_in_a_span_of_its_own_and_is_timed_at_the_replica(void **state)
{
	const struct afd_transport_params params = { .max_rows = PARTS_OF };
	afd_transport *net;
	int lost;

	server_start(&servers[0], NULL);
	server_start(&servers[1], NULL);
	net = join_both(&params);
	servers[0].hold = servers[1].hold = 1;
	trace();
	assert_int_equal(begin_step(net, PARTS_OF), 0);
	dispatch(net, 0, 0, PARTS_OF);
	lost = rig_holder(servers);
	park(&servers[lost]);
	servers[lost].n_held = servers[!lost].hold = 0;
	sleep_ms(20);
	server_stop(&servers[lost]);
	expect_done(net, 0);
	assert_string_equal(spans[0].span.name, "lost");
	assert_string_equal(spans[0].peer, servers[lost].address);
	assert_true(spans[0].span.duration_ns >= 20 * MS);
	memmove(spans, spans + 1, --n_spans * sizeof(*spans));
	assert_int_equal(expect_chains(), 1);
	for (uint32_t i = 0; i < n_spans; i++)
		assert_string_equal(spans[i].peer, servers[!lost].address);
	leave(net, 2);
}

/* ---- metrics ---- */

static void histograms_by_layer_add_up_to_the_round_trips(void **state)
{
	static const char *const kinds[] = { "wire", "queue", "gather", "compute" };
	char labels[160], name[48], of_peer[128];
	double sum = 0;
	afd_transport *net;

	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	servers[0].gather_ns = 1000;
	for (int i = 0; i < 4; i++)
		run_step(net, 5, i);
	snprintf(of_peer, sizeof(of_peer), "peer=\"%s\"", servers[0].address);
	for (int layer = 0; layer < LAYERS; layer++) {
		for (int kind = 0; kind < 4; kind++) {
			snprintf(labels, sizeof(labels), "%s,layer=\"%d\"", of_peer, layer);
			snprintf(name, sizeof(name), "%s_seconds_count", kinds[kind]);
			assert_true(metric(name, labels) == 4);
			snprintf(name, sizeof(name), "%s_seconds_sum", kinds[kind]);
			sum += metric(name, labels);
		}
	}
	sum += metric("unread_seconds_sum", of_peer) - metric("round_trip_seconds_sum", of_peer);
	assert_true(sum < 1e-9 && sum > -1e-9);
	assert_true(metric("round_trip_seconds_count", of_peer) == 4 * LAYERS);
	leave(net, 1);
}

static void series_of_a_lost_peer_stay_until_the_transport_goes(void **state)
{
	char of_peer[128];
	afd_transport *net;

	server_start(&servers[0], NULL);
	net = join(&servers[0], NULL);
	run_step(net, 5, 1);
	server_stop(&servers[0]);
	while (afd_transport_poll(net) >= 0)
		afd__transport_sleep(net, -1, 5);
	snprintf(of_peer, sizeof(of_peer), "peer=\"%s\"", servers[0].address);
	assert_true(metric("round_trip_seconds_count", of_peer) == LAYERS);
	afd_transport_destroy(net);
	afd_context_metrics(client_ctx, metrics, sizeof(metrics));
	assert_null(strstr(metrics, "afd_transport_round_trip_seconds_count{"));
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(what_a_server_states_is_attributed_and_the_rest_is_the_wire),
		RIG_TEST(halves_of_the_wire_are_marked_as_estimates_and_measured_times_are_not),
		RIG_TEST(lies_of_a_server_do_not_exceed_what_was_measured),
		RIG_TEST(a_reply_that_comes_while_the_host_computes_is_unread_and_no_wire),
		RIG_TEST(spans_carry_the_step_and_its_trace_id),
		RIG_TEST(parts_of_two_lanes_have_spans_of_their_own),
		RIG_TEST(each_shard_gets_its_own_times),
		RIG_TEST(a_part_that_is_lost_ends_in_a_span_of_its_own_and_is_timed_at_the_replica),
		RIG_TEST(histograms_by_layer_add_up_to_the_round_trips),
		RIG_TEST(series_of_a_lost_peer_stay_until_the_transport_goes),
	};

	return RIG_RUN(argc, argv, tests);
}
