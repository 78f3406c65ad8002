/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step whose FFN is a peer: lanes overlap, parts are counted, an FFN that fails or is lost leaves
 * the sequences intact, and a host's event loop can drive both ends by their descriptors alone.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../support/batches.h"

enum { MAX_SPANS = 1000, N_EQUAL = 4 };

struct bench {
	struct golden golden;
	struct rig rig;
	struct afd_span spans[MAX_SPANS];
	uint32_t n_spans;
	int n_failures_left; /* of the compute function */
};

static void keep_span(void *user, const struct afd_span *span)
{
	struct bench *b = user;

	assert_true(b->n_spans < MAX_SPANS);
	/* The server's own share the tracer; they are those without a peer. */
	if (strcmp(span->name, "ffn") || span->peer)
		b->spans[b->n_spans++] = *span;
	if (span->peer)
		assert_int_equal(strncmp(span->peer, "loop:", 5), 0);
}

static void open_bench(void **state, struct rig_params params)
{
	struct bench *b = calloc(1, sizeof(*b));

	assert_non_null(b);
	golden_open(&b->golden, "f32-untied");
	params.checkpoint = b->golden.checkpoint;
	params.tracer = (struct afd_tracer){ keep_span, b };
	if (params.compute)
		params.compute_user = b;
	rig_open(&b->rig, &params);
	*state = b;
}

static int set_up(void **state)
{
	const struct rig_params params = { .address = "loop:step", .lanes = 2 };

	open_bench(state, params);
	return 0;
}

static int tear_down(void **state)
{
	struct bench *b = *state;

	rig_close(&b->rig);
	golden_close(&b->golden);
	free(b);
	return 0;
}

/* Four sequences that append as many ids each. */
static int step_equal(struct bench *b, uint32_t n_ids, int32_t *greedy)
{
	struct afd_entry entries[N_EQUAL] = { 0 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = N_EQUAL,
		.entry_bytes = sizeof(*entries),
		.greedy_ids = greedy,
		.greedy_rows = N_EQUAL };
	uint32_t i;

	for (i = 0; i < N_EQUAL; i++)
		entries[i] = (struct afd_entry){
			.sequence = i, .ids = b->golden.ids + i, .n_ids = n_ids
		};
	return rig_step(&b->rig, &batch);
}

static void add_equal(struct bench *b)
{
	uint64_t i;

	for (i = 0; i < N_EQUAL; i++)
		assert_int_equal(afd_attn_add(b->rig.attn, i), 0);
}

static uint64_t parts_sent(struct bench *b)
{
	struct afd_peer_info peer = { .size = sizeof(peer) };

	assert_int_equal(afd_transport_peer(b->rig.attn_net, 0, &peer), 0);
	return peer.n_parts;
}

/* ---- lanes ---- */

static void parts_count_layers_times_lanes(void **state)
{
	struct bench *b = *state;
	int32_t greedy[N_EQUAL];

	add_equal(b);
	assert_int_equal(step_equal(b, 3, greedy), 0);
	assert_int_equal(parts_sent(b), 2 * b->rig.n_layers);
	assert_int_equal(step_equal(b, 1, greedy), 0);
	assert_int_equal(parts_sent(b), 4 * b->rig.n_layers);
}

static void a_lane_without_rows_sends_no_part(void **state)
{
	struct bench *b = *state;

	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	rig_append(&b->rig, 1, b->golden.ids, 3, NULL);
	assert_int_equal(parts_sent(b), b->rig.n_layers);
}

static const struct afd_span *find_span(
	const struct bench *b, const char *name, int32_t layer, int32_t lane)
{
	uint32_t i;

	for (i = 0; i < b->n_spans; i++) {
		const struct afd_span *span = &b->spans[i];

		if (!strcmp(span->name, name) && span->layer == layer && span->lane == lane)
			return span;
	}
	fail_msg("no span %s of layer %d, lane %d", name, layer, lane);
	return NULL;
}

static bool overlap(const struct afd_span *a, const struct afd_span *b)
{
	return a->start_ns < b->start_ns + b->duration_ns &&
	       b->start_ns < a->start_ns + a->duration_ns;
}

/* Lanes need not be at the same layer. */
static bool overlaps_ffn_of(const struct bench *b, const struct afd_span *attention, int32_t lane)
{
	int32_t layer;

	for (layer = 0; layer < (int32_t)b->rig.n_layers; layer++) {
		if (overlap(attention, find_span(b, "ffn", layer, lane)))
			return true;
	}
	return false;
}

static void one_lane_attends_while_the_other_is_at_the_ffn(void **state)
{
	struct bench *b = *state;
	int32_t greedy[N_EQUAL], layer;

	add_equal(b);
	assert_int_equal(step_equal(b, 3, greedy), 0);
	for (layer = 0; layer < (int32_t)b->rig.n_layers; layer++) {
		const struct afd_span *a0 = find_span(b, "attention", layer, 0);
		const struct afd_span *a1 = find_span(b, "attention", layer, 1);

		assert_int_equal(a1->n_rows, 6);
		assert_false(overlap(a0, a1));
		assert_true(overlaps_ffn_of(b, a0, 1) || overlaps_ffn_of(b, a1, 0));
	}
	assert_int_equal(find_span(b, "head", -1, -1)->n_rows, N_EQUAL);
}

/* With one lane there is nothing else to do between a frame and its reply. */
static void times_of_attention_and_waiting_are_counted(void **state)
{
	struct bench *b = *state;
	struct afd_attn_stats stats = { .size = sizeof(stats) };

	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	rig_append(&b->rig, 1, b->golden.ids, 12, NULL);
	assert_int_equal(afd_attn_stats(b->rig.attn, &stats), 0);
	assert_int_equal(stats.n_steps, 1);
	assert_int_equal(stats.n_rows, 12);
	assert_int_equal(stats.n_sequences, 1);
	assert_true(stats.attention_ns > 0 && stats.wait_ns > 0);
	assert_true(find_span(b, "wait", 1, 0)->duration_ns > 0);
	assert_int_equal(stats.ffn_ns, 0);
}

/* ---- joining ---- */

static void a_poll_without_a_step_joins_the_peers(void **state)
{
	struct bench *b = *state;
	time_t end = time(NULL) + 10;
	int rc;

	while (!(rc = rig_turn(&b->rig)))
		assert_true(time(NULL) < end);
	assert_int_equal(rc, 1);
	assert_int_equal(afd_attn_busy(b->rig.attn), 0);
	assert_int_equal(afd_attn_wait(b->rig.attn, 0), 0);
}

static void a_wait_for_peers_that_do_not_come_ends_in_time(void **state)
{
	struct bench *b = *state;
	const int32_t id = 1;
	const struct afd_entry entry = { .sequence = 1, .ids = &id, .n_ids = 1 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };

	/* The server exists, but nobody polls it. */
	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	assert_int_equal(afd_attn_wait(b->rig.attn, 50), -ETIMEDOUT);
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, 50), -ETIMEDOUT);
	assert_non_null(strstr(afd_last_error(), "have not joined"));
	assert_int_equal(afd_attn_busy(b->rig.attn), 0);
	assert_int_equal(rig_step(&b->rig, &batch), 0);
}

static void a_step_whose_ffn_stalls_is_cancelled_in_time_and_can_be_repeated(void **state)
{
	struct bench *b = *state;
	int32_t first[N_EQUAL], second[N_EQUAL];
	struct afd_entry entries[N_EQUAL] = { 0 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = N_EQUAL,
		.entry_bytes = sizeof(*entries),
		.greedy_ids = second,
		.greedy_rows = N_EQUAL };
	uint32_t i;

	add_equal(b);
	assert_int_equal(step_equal(b, 5, first), 0);
	for (i = 0; i < N_EQUAL; i++) {
		entries[i] =
			(struct afd_entry){ .sequence = i, .ids = b->golden.ids + i, .n_ids = 5 };
		assert_int_equal(afd_attn_truncate(b->rig.attn, i, 0), 0);
	}
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, 50), -ETIMEDOUT);
	assert_non_null(strstr(afd_last_error(), "waits for the FFN of layer 0"));
	assert_int_equal(afd_attn_length(b->rig.attn, 2), 0);
	assert_int_equal(rig_step(&b->rig, &batch), 0);
	assert_memory_equal(first, second, sizeof(first));
}

static void a_step_cancelled_after_any_poll_can_be_repeated_with_the_same_bits(void **state)
{
	struct bench *b = *state;
	size_t n = (size_t)BATCHES_ROWS * b->rig.vocab;
	float *whole = calloc(n, sizeof(float)), *repeated = calloc(n, sizeof(float));
	const struct rig_params params = { .attn.max_outputs = 64 };
	struct afd_entry entry = { .sequence = 99, .ids = b->golden.ids, .n_ids = 5 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	float *reference = batches_run(&b->golden, &params, true);
	uint32_t polls, i;

	assert_int_equal(afd_attn_add(b->rig.attn, 99), 0);
	for (polls = 0; polls < 40; polls++) {
		assert_int_equal(afd_attn_begin(b->rig.attn, &batch), 0);
		for (i = 0; i < polls; i++)
			assert_true(rig_turn(&b->rig) >= 0);
		assert_int_equal(afd_attn_cancel(b->rig.attn), 0);
		assert_int_equal(afd_attn_truncate(b->rig.attn, 99, 0), 0);
	}
	batches_run_on(&b->rig, &b->golden, true, whole);
	assert_memory_equal(whole, reference, n * sizeof(float));
	free(reference);
	free(repeated);
	free(whole);
}

/* ---- failures ---- */

static void an_ffn_that_is_lost_ends_the_step_and_leaves_sequences_intact(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entry = { .sequence = 1, .ids = b->golden.ids + 5, .n_ids = 2 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	struct afd_attn_stats before = { .size = sizeof(before) }, after = before;
	int rc = 0, i;

	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	rig_append(&b->rig, 1, b->golden.ids, 5, NULL);
	assert_int_equal(afd_attn_stats(b->rig.attn, &before), 0);
	assert_int_equal(afd_attn_begin(b->rig.attn, &batch), 0);
	for (i = 0; i < 3; i++)
		assert_int_equal(afd_attn_poll(b->rig.attn), 0);
	afd_ffn_destroy(b->rig.ffn);
	afd_transport_destroy(b->rig.ffn_net);
	b->rig.ffn = NULL;
	b->rig.ffn_net = NULL;
	rc = afd_attn_wait(b->rig.attn, 5000);
	assert_int_equal(rc, -ECONNRESET);
	assert_non_null(strstr(afd_last_error(), "loop:step"));
	assert_int_equal(afd_attn_busy(b->rig.attn), 0);
	assert_int_equal(afd_attn_length(b->rig.attn, 1), 5);
	assert_int_equal(afd_attn_stats(b->rig.attn, &after), 0);
	assert_int_equal(after.pages_free, before.pages_free);
	/* The loss is told again, not waited for. */
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, 0), -ECONNRESET);
}

/* y = x * (layer + 1), but for the passes that are to fail. */
static int compute(void *user, const struct afd_ffn_pass *pass)
{
	struct bench *b = user;
	uint32_t hidden = 48, i;

	if (pass->layer == 1 && b->n_failures_left > 0) {
		b->n_failures_left--;
		return -EIO;
	}
	for (i = 0; i < pass->n_rows * hidden; i++)
		pass->y[i] = pass->x[i] * (float)(pass->layer + 1);
	return 0;
}

static void a_compute_function_that_fails_ends_the_step_which_can_be_repeated(void **state)
{
	const struct rig_params params = {
		.address = "loop:compute", .lanes = 2, .compute = compute
	};
	int32_t undisturbed[N_EQUAL], repeated[N_EQUAL];
	struct bench *b;
	uint64_t i;

	open_bench(state, params);
	b = *state;
	add_equal(b);
	assert_int_equal(step_equal(b, 3, undisturbed), 0);
	for (i = 0; i < N_EQUAL; i++)
		assert_int_equal(afd_attn_truncate(b->rig.attn, i, 0), 0);
	b->n_failures_left = 1;
	assert_int_equal(step_equal(b, 3, repeated), -EIO);
	assert_non_null(strstr(afd_last_error(), "layer 1"));
	assert_int_equal(afd_attn_length(b->rig.attn, 0), 0);
	assert_int_equal(step_equal(b, 3, repeated), 0);
	assert_memory_equal(undisturbed, repeated, sizeof(repeated));
	tear_down(state);
}

/* ---- an event loop ---- */

static void an_event_loop_needs_only_descriptors_and_timeouts(void **state)
{
	struct bench *b = *state;

	rig_loop(&b->rig, b->golden.ids);
}

static void an_idle_stage_does_not_wake_its_loop(void **state)
{
	struct bench *b = *state;
	time_t end = time(NULL) + 1;
	int n_turns = 0;

	rig_append(&b->rig, (assert_int_equal(afd_attn_add(b->rig.attn, 1), 0), 1), b->golden.ids,
		4, NULL);
	while (time(NULL) <= end) {
		struct pollfd fd = { afd_attn_fd(b->rig.attn), POLLIN, 0 };
		int timeout_ms = afd_attn_timeout_ms(b->rig.attn);

		poll(&fd, 1, timeout_ms >= 0 && timeout_ms < 200 ? timeout_ms : 200);
		assert_int_equal(afd_attn_poll(b->rig.attn), 1);
		n_turns++;
	}
	assert_true(n_turns < 100);
}

#define WITH_BENCH(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_BENCH(parts_count_layers_times_lanes),
		WITH_BENCH(a_lane_without_rows_sends_no_part),
		WITH_BENCH(one_lane_attends_while_the_other_is_at_the_ffn),
		WITH_BENCH(times_of_attention_and_waiting_are_counted),
		WITH_BENCH(a_poll_without_a_step_joins_the_peers),
		WITH_BENCH(a_wait_for_peers_that_do_not_come_ends_in_time),
		WITH_BENCH(a_step_whose_ffn_stalls_is_cancelled_in_time_and_can_be_repeated),
		WITH_BENCH(a_step_cancelled_after_any_poll_can_be_repeated_with_the_same_bits),
		WITH_BENCH(an_ffn_that_is_lost_ends_the_step_and_leaves_sequences_intact),
		cmocka_unit_test(a_compute_function_that_fails_ends_the_step_which_can_be_repeated),
		WITH_BENCH(an_event_loop_needs_only_descriptors_and_timeouts),
		WITH_BENCH(an_idle_stage_does_not_wake_its_loop),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
