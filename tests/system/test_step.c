/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step as a resumable object, with the FFN in the same process: it can be stopped anywhere and
 * leaves no trace, refuses what it must, and tells what was not finite.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../support/rig.h"

struct bench {
	struct golden golden;
	struct rig rig;
};

static int set_up_with(void **state, const char *name, struct rig_params params)
{
	struct bench *b = calloc(1, sizeof(*b));

	assert_non_null(b);
	golden_open(&b->golden, name);
	params.checkpoint = b->golden.checkpoint;
	rig_open(&b->rig, &params);
	*state = b;
	return 0;
}

/* Three pages of four positions for two sequences: little enough to run out of. */
static int set_up(void **state)
{
	const struct rig_params params = { .lanes = 2,
		.attn = { .page_size = 4,
			.kv_pages = 6,
			.max_sequences = 3,
			.max_rows = 24,
			.max_outputs = 24 } };

	return set_up_with(state, "window-layer-types", params);
}

static int tear_down(void **state)
{
	struct bench *b = *state;

	rig_close(&b->rig);
	golden_close(&b->golden);
	free(b);
	return 0;
}

static uint32_t pages_free(struct bench *b)
{
	struct afd_attn_stats stats = { .size = sizeof(stats) };

	assert_int_equal(afd_attn_stats(b->rig.attn, &stats), 0);
	return stats.pages_free;
}

/* ---- cancel ---- */

/* Two sequences of unequal length, one of them a fork that must copy a page. */
static void prepare(struct bench *b)
{
	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	rig_append(&b->rig, 1, b->golden.ids, 6, NULL);
	assert_int_equal(afd_attn_fork(b->rig.attn, 1, 2, 5), 0);
}

static int begin(struct bench *b, float *logits)
{
	const struct afd_entry entries[] = {
		{ .sequence = 1, .ids = b->golden.ids + 6, .n_ids = 3, .outputs = AFD_OUTPUT_ALL },
		{ .sequence = 2, .ids = b->golden.ids + 5, .n_ids = 2, .outputs = AFD_OUTPUT_ALL },
	};
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = 2,
		.entry_bytes = sizeof(*entries),
		.logits = logits,
		.logits_rows = 5 };

	return afd_attn_begin(b->rig.attn, &batch);
}

/* Polls at most n times; 1 when the step is done. */
static int poll_times(struct bench *b, uint32_t n)
{
	int rc = 0;

	while (n-- > 0 && !rc)
		rc = afd_attn_poll(b->rig.attn);
	assert_true(rc >= 0);
	return rc;
}

static void a_step_cancelled_after_any_poll_leaves_no_trace(void **state)
{
	struct bench *b = *state;
	size_t n = 5 * (size_t)b->rig.vocab;
	float *cancelled = calloc(n, sizeof(float)), *whole = calloc(n, sizeof(float));
	/* The deferred device answers when it likes: there many polls do nothing. */
	bool every = !strcmp(rig_device(), "cpu");
	uint32_t polls, n_free;

	prepare(b);
	n_free = pages_free(b);
	for (polls = 0;; polls += every ? 1 : 1 + polls / 2) {
		assert_int_equal(begin(b, cancelled), 0);
		if (poll_times(b, polls))
			break;
		assert_int_equal(afd_attn_cancel(b->rig.attn), 0);
		assert_int_equal(afd_attn_busy(b->rig.attn), 0);
		assert_int_equal(pages_free(b), n_free);
		assert_int_equal(afd_attn_length(b->rig.attn, 1), 6);
		assert_int_equal(afd_attn_length(b->rig.attn, 2), 5);
	}
	/* Start, two lanes of each layer, head. */
	assert_true(polls > 2 * b->rig.n_layers);
	assert_int_equal(afd_attn_truncate(b->rig.attn, 1, 6), 0);
	assert_int_equal(afd_attn_truncate(b->rig.attn, 2, 5), 0);
	assert_int_equal(begin(b, whole), 0);
	assert_int_equal(afd_attn_wait(b->rig.attn, 0), 0);
	assert_memory_equal(cancelled, whole, n * sizeof(float));
	/* The rows of both sequences are those of the recorded one. */
	assert_true(nmse(whole, b->golden.logits + 6 * (size_t)b->rig.vocab,
			    3 * (size_t)b->rig.vocab) < 1e-9);
	assert_true(
		nmse(whole + 3 * (size_t)b->rig.vocab, b->golden.logits + 5 * (size_t)b->rig.vocab,
			2 * (size_t)b->rig.vocab) < 1e-9);
	free(cancelled);
	free(whole);
}

static void a_step_under_way_can_be_destroyed(void **state)
{
	struct bench *b = *state;
	float *logits = calloc(5 * (size_t)b->rig.vocab, sizeof(float));

	prepare(b);
	assert_int_equal(begin(b, logits), 0);
	assert_int_equal(poll_times(b, 3), 0);
	afd_attn_destroy(b->rig.attn);
	b->rig.attn = NULL;
	free(logits);
}

static void a_step_under_way_refuses_what_would_disturb_it(void **state)
{
	struct bench *b = *state;
	afd_attn *attn = b->rig.attn;
	float *logits = calloc(5 * (size_t)b->rig.vocab, sizeof(float));
	int32_t page;

	prepare(b);
	assert_int_equal(begin(b, logits), 0);
	assert_int_equal(afd_attn_busy(attn), 1);
	assert_int_equal(begin(b, logits), -EBUSY);
	assert_int_equal(afd_attn_add(attn, 3), -EBUSY);
	assert_int_equal(afd_attn_drop(attn, 1), -EBUSY);
	assert_int_equal(afd_attn_fork(attn, 1, 3, 1), -EBUSY);
	assert_int_equal(afd_attn_truncate(attn, 1, 1), -EBUSY);
	assert_int_equal(afd_attn_pages(attn, 1, 0, &page, 1), -EBUSY);
	assert_int_equal(afd_attn_length(attn, 1), 6);
	assert_int_equal(afd_attn_wait(attn, 0), 0);
	assert_int_equal(afd_attn_length(attn, 1), 9);
	free(logits);
}

static void a_poll_computes_one_layer_of_one_lane_and_asks_to_come_again(void **state)
{
	struct bench *b = *state;
	float *logits = calloc(5 * (size_t)b->rig.vocab, sizeof(float));
	uint32_t polls = 0;

	prepare(b);
	assert_int_equal(afd_attn_timeout_ms(b->rig.attn), -1);
	assert_int_equal(begin(b, logits), 0);
	for (; !afd_attn_poll(b->rig.attn); polls++) {
		if (!strcmp(rig_device(), "cpu"))
			assert_int_equal(afd_attn_timeout_ms(b->rig.attn), 0);
	}
	assert_true(polls >= 2 * b->rig.n_layers);
	assert_int_equal(afd_attn_timeout_ms(b->rig.attn), -1);
	assert_int_equal(afd_attn_poll(b->rig.attn), 1);
	free(logits);
}

static void a_step_that_takes_too_long_is_cancelled(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entry = { .sequence = 1, .ids = b->golden.ids + 6, .n_ids = 3 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };

	prepare(b);
	/* -1: only look. One look is not enough for a step of several layers. */
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, -1), -ETIMEDOUT);
	assert_int_equal(afd_attn_busy(b->rig.attn), 0);
	assert_int_equal(afd_attn_length(b->rig.attn, 1), 6);
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, 0), 0);
	assert_int_equal(afd_attn_length(b->rig.attn, 1), 9);
}

/* ---- capacity ---- */

static void a_batch_that_finds_too_few_pages_changes_nothing(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entries[] = {
		{ .sequence = 1, .ids = b->golden.ids, .n_ids = 3 },
		{ .sequence = 2, .ids = b->golden.ids, .n_ids = 17 },
	};
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = 2,
		.entry_bytes = sizeof(*entries) };

	prepare(b);
	/* Two pages are shared, four free: the first needs one more and a copy, the second four
	 * more and a copy. */
	assert_int_equal(pages_free(b), 4);
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, 0), -ENOSPC);
	assert_non_null(strstr(afd_last_error(), "sequence 2"));
	assert_int_equal(pages_free(b), 4);
	assert_int_equal(afd_attn_busy(b->rig.attn), 0);
	assert_int_equal(afd_attn_length(b->rig.attn, 1), 6);
	batch.n_entries = 1;
	assert_int_equal(afd_attn_step(b->rig.attn, &batch, 0), 0);
}

static void sequences_are_added_dropped_forked_and_truncated_by_id(void **state)
{
	struct bench *b = *state;
	afd_attn *attn = b->rig.attn;

	prepare(b);
	assert_int_equal(afd_attn_add(attn, 1), -EEXIST);
	assert_int_equal(afd_attn_fork(attn, 1, 2, 1), -EEXIST);
	assert_int_equal(afd_attn_fork(attn, 1, 3, 7), -EINVAL);
	assert_int_equal(afd_attn_truncate(attn, 1, 7), -EINVAL);
	assert_int_equal(afd_attn_truncate(attn, 9, 0), -ENOENT);
	assert_int_equal(afd_attn_add(attn, 3), 0);
	assert_int_equal(afd_attn_add(attn, 4), -ENOSPC);
	assert_int_equal(afd_attn_fork(attn, 1, 4, 1), -ENOSPC);
	assert_int_equal(afd_attn_drop(attn, 1), 0);
	assert_int_equal(afd_attn_length(attn, 1), -ENOENT);
	assert_int_equal(afd_attn_length(attn, 2), 5);
	assert_int_equal(afd_attn_drop(attn, 2), 0);
	assert_int_equal(pages_free(b), 6);
}

/* ---- outputs ---- */

static void an_empty_batch_is_done_at_once(void **state)
{
	struct bench *b = *state;
	const struct afd_batch batch = { .size = sizeof(batch) };

	assert_int_equal(afd_attn_begin(b->rig.attn, &batch), 0);
	assert_int_equal(afd_attn_poll(b->rig.attn), 1);
	assert_int_equal(afd_attn_begin(b->rig.attn, NULL), 0);
	assert_int_equal(afd_attn_wait(b->rig.attn, 0), 0);
}

static int32_t argmax(const float *row, uint32_t n)
{
	uint32_t best = 0, i;

	for (i = 1; i < n; i++)
		best = row[i] > row[best] ? i : best;
	return (int32_t)best;
}

static void outputs_come_in_the_order_of_entries_and_ids(void **state)
{
	struct bench *b = *state;
	size_t vocab = b->rig.vocab;
	const struct afd_entry entries[] = {
		{ .sequence = 1, .ids = b->golden.ids, .n_ids = 4, .outputs = AFD_OUTPUT_LAST },
		{ .sequence = 2, .ids = b->golden.ids, .n_ids = 2, .outputs = AFD_OUTPUT_NONE },
		{ .sequence = 3, .ids = b->golden.ids, .n_ids = 2, .outputs = AFD_OUTPUT_ALL },
	};
	float *logits = calloc(3 * vocab, sizeof(float));
	int32_t greedy[3];
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = 3,
		.entry_bytes = sizeof(*entries),
		.logits = logits,
		.logits_rows = 3,
		.greedy_ids = greedy,
		.greedy_rows = 3 };
	static const uint32_t positions[3] = { 3, 0, 1 };
	uint32_t i;

	for (i = 1; i <= 3; i++)
		assert_int_equal(afd_attn_add(b->rig.attn, i), 0);
	assert_int_equal(rig_step(&b->rig, &batch), 0);
	for (i = 0; i < 3; i++) {
		assert_true(nmse(logits + i * vocab, b->golden.logits + positions[i] * vocab,
				    vocab) < 1e-9);
		assert_int_equal(greedy[i], argmax(logits + i * vocab, (uint32_t)vocab));
	}
	free(logits);
}

static void a_logit_that_is_not_finite_is_an_error_that_names_sequence_and_position(void **state)
{
	struct rig_params params = { .attn.max_outputs = 24 };
	struct golden golden;
	char directory[64];
	struct rig rig;
	float *logits;
	struct afd_entry entry = {
		.sequence = 77, .n_ids = 6, .outputs = AFD_OUTPUT_ALL, .user_id = 5
	};
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry),
		.logits_rows = 6 };

	golden_open(&golden, "f32-untied");
	/* One number of one token's embedding: positions before it are sound. */
	golden_patch(&golden, "model.embed_tokens.weight", (uint64_t)golden.ids[4] * 48 + 3, NAN,
		directory);
	params.checkpoint = directory;
	rig_open(&rig, &params);
	batch.logits = logits = calloc(6 * (size_t)rig.vocab, sizeof(float));
	entry.ids = golden.ids;
	assert_int_equal(afd_attn_add(rig.attn, 77), 0);
	assert_int_equal(rig_step(&rig, &batch), -EDOM);
	assert_non_null(strstr(afd_last_error(), "user 5, sequence 77, position 4"));
	assert_int_equal(afd_attn_busy(rig.attn), 0);
	assert_int_equal(afd_attn_length(rig.attn, 77), 0);
	entry.n_ids = 4;
	assert_int_equal(rig_step(&rig, &batch), 0);
	assert_int_equal(afd_attn_length(rig.attn, 77), 4);
	rig_close(&rig);
	golden_patch_remove(directory);
	free(logits);
	golden_close(&golden);
}

/* ---- warnings ---- */

static void count_warnings(void *user, int32_t level, const char *text)
{
	if (level == AFD_LOG_WARN && strstr(text, "max_position_embeddings"))
		++*(int *)user;
}

static void positions_beyond_the_config_are_computed_with_one_warning(void **state)
{
	int n_warnings = 0;
	const struct rig_params params = { .log = { count_warnings, &n_warnings, 0 } };
	struct afd_model_info info = { .size = sizeof(info) };
	struct bench *b;
	uint32_t i;

	set_up_with(state, "yarn-v4", params);
	b = *state;
	assert_int_equal(afd_model_info(b->rig.model, &info), 0);
	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	for (i = 0; i < info.max_position_embeddings; i++)
		rig_append(&b->rig, 1, b->golden.ids, 1, NULL);
	assert_int_equal(n_warnings, 0);
	rig_append(&b->rig, 1, b->golden.ids, 1, NULL);
	assert_int_equal(n_warnings, 1);
	rig_append(&b->rig, 1, b->golden.ids, 1, NULL);
	assert_int_equal(n_warnings, 1);
	tear_down(state);
}

/* ---- fork ---- */

static int in_child(struct bench *b)
{
	if (afd_attn_poll(b->rig.attn) != -EINVAL || afd_attn_add(b->rig.attn, 3) != -EINVAL)
		return 1;
	if (!strstr(afd_last_error(), "fork"))
		return 2;
	afd_attn_destroy(b->rig.attn);
	return 0;
}

static void a_child_of_fork_is_refused_and_may_destroy(void **state)
{
	struct bench *b = *state;
	float *logits = calloc(5 * (size_t)b->rig.vocab, sizeof(float));
	int status;
	pid_t pid;

	prepare(b);
	assert_int_equal(begin(b, logits), 0);
	assert_int_equal(poll_times(b, 2), 0);
	pid = fork();
	if (!pid)
		_exit(in_child(b));
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_int_equal(afd_attn_wait(b->rig.attn, 0), 0);
	free(logits);
}

#define WITH_BENCH(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_BENCH(a_step_cancelled_after_any_poll_leaves_no_trace),
		WITH_BENCH(a_step_under_way_can_be_destroyed),
		WITH_BENCH(a_step_under_way_refuses_what_would_disturb_it),
		WITH_BENCH(a_poll_computes_one_layer_of_one_lane_and_asks_to_come_again),
		WITH_BENCH(a_step_that_takes_too_long_is_cancelled),
		WITH_BENCH(a_batch_that_finds_too_few_pages_changes_nothing),
		WITH_BENCH(sequences_are_added_dropped_forked_and_truncated_by_id),
		WITH_BENCH(an_empty_batch_is_done_at_once),
		WITH_BENCH(outputs_come_in_the_order_of_entries_and_ids),
		cmocka_unit_test(
			a_logit_that_is_not_finite_is_an_error_that_names_sequence_and_position),
		cmocka_unit_test(positions_beyond_the_config_are_computed_with_one_warning),
		WITH_BENCH(a_child_of_fork_is_refused_and_may_destroy),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
