/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The plan of a batch, without a device: what is refused, how rows are laid out for the upload, how
 * entries spread over lanes.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "../../lib/attn/batch.h"

enum { PAGE = 4, PAGES = 8, MAX_ROWS = 10, VOCAB = 100 };

struct bench {
	struct afd_context *ctx;
	struct afd__kv kv;
	struct afd__sequences sequences;
	struct afd__batch batch;
};

static int set_up(void **state)
{
	static struct bench b;
	static const uint32_t n_pages[2] = { PAGES, PAGES }, windows[2] = { 0, 0 };
	struct afd__kv_shape shape = { 2, n_pages, windows, PAGE, 4, PAGES * PAGE };
	struct afd__batch_limits limits = { MAX_ROWS, 4, 3, VOCAB, 2 };
	uint64_t id;

	assert_int_equal(afd_context_create(&b.ctx, NULL), 0);
	assert_int_equal(afd__kv_create(&b.kv, b.ctx, &shape), 0);
	assert_int_equal(afd__sequences_create(&b.sequences, b.ctx, 4), 0);
	assert_int_equal(afd__batch_create(&b.batch, b.ctx, &limits, &b.kv, &b.sequences), 0);
	for (id = 10; id < 13; id++)
		assert_true(afd__sequences_add(&b.sequences, id) >= 0);
	*state = &b;
	return 0;
}

static int tear_down(void **state)
{
	struct bench *b = *state;

	afd__batch_destroy(&b->batch);
	afd__sequences_destroy(&b->sequences);
	afd__kv_destroy(&b->kv);
	afd_context_destroy(b->ctx);
	return 0;
}

static const int32_t ids[] = { 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17 };
static float logits[1];

static int plan(struct bench *b, const struct afd_entry *entries, uint32_t n)
{
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = n,
		.entry_bytes = sizeof(*entries),
		.logits = logits,
		.logits_rows = 100 };

	return afd__batch_plan(&b->batch, &batch);
}

static void rows_are_laid_out_in_the_order_of_entries_and_ids(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entries[] = {
		{ .sequence = 11, .ids = ids, .n_ids = 5 },
		{ .sequence = 10, .ids = ids + 5, .n_ids = 2, .outputs = AFD_OUTPUT_ALL },
	};
	static const int32_t first[] = {
		7,
		8,
		9,
		10,
		11,
		12,
		13, /* ids */
		0,
		1,
		2,
		3,
		4,
		0,
		1, /* positions */
		0,
		0,
		0,
		0,
		0,
		1,
		1, /* rows of the page table */
		4,
		5,
		6, /* rows with an output */
	};
	/* The first group: slots, and page tables of two pages each. */
	static const int32_t group[] = { 0, 1, 2, 3, 4, 8, 9, /* pages */ 0, 1, 2, 0 };

	assert_int_equal(plan(b, entries, 2), 0);
	assert_int_equal(b->batch.n_words, 24 + 2 * 11);
	assert_memory_equal(b->batch.words, first, sizeof(first));
	assert_memory_equal(
		b->batch.words + afd__batch_slots_at(&b->batch, 0), group, sizeof(group));
	assert_memory_equal(
		b->batch.words + afd__batch_slots_at(&b->batch, 1), group, sizeof(group));
	assert_int_equal(afd__batch_entry_of(&b->batch, 4)->id, 11);
	assert_int_equal(afd__batch_entry_of(&b->batch, 5)->id, 10);
}

static void positions_go_on_where_the_last_batch_ended(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entry = { .sequence = 12, .ids = ids, .n_ids = 3 };

	assert_int_equal(plan(b, &entry, 1), 0);
	afd__batch_commit(&b->batch);
	assert_int_equal(plan(b, &entry, 1), 0);
	assert_int_equal(b->batch.words[b->batch.positions_at], 3);
	assert_int_equal(b->batch.last_position, 5);
	/* Position 4 is the first of the second page. */
	assert_int_equal(b->batch.words[afd__batch_slots_at(&b->batch, 0) + 1], PAGE);
	afd__batch_restore(&b->batch);
	assert_int_equal(b->kv.sequences[afd__sequences_find(&b->sequences, 12)].length, 3);
}

static void a_bad_batch_is_refused_by_name_and_changes_nothing(void **state)
{
	const struct afd_entry good = { .sequence = 10, .ids = ids, .n_ids = 4 };
	static const int32_t high[] = { 1, VOCAB }, low[] = { -1 };
	const struct {
		struct afd_entry second;
		int rc;
		const char *text;
	} cases[] = {
		{ { .sequence = 10, .ids = ids, .n_ids = 1 }, -EINVAL,
			"sequence 10: it stands in the batch twice" },
		{ { .sequence = 10, .ids = ids, .n_ids = 1, .user_id = 77 }, -EINVAL,
			"user 77: sequence 10: it stands" },
		{ { .sequence = 99, .ids = ids, .n_ids = 1 }, -ENOENT, "sequence 99" },
		{ { .sequence = 11, .ids = ids, .n_ids = 0 }, -EINVAL, "n_ids is 0" },
		{ { .sequence = 11, .ids = NULL, .n_ids = 1 }, -EINVAL, "ids is NULL" },
		{ { .sequence = 11, .ids = high, .n_ids = 2 }, -EINVAL,
			"id 1 is 100, the vocabulary has 100" },
		{ { .sequence = 11, .ids = low, .n_ids = 1 }, -EINVAL, "id 0 is -1" },
		{ { .sequence = 11, .ids = ids, .n_ids = 7 }, -ENOSPC, "max_rows = 10" },
		{ { .sequence = 11, .ids = ids, .n_ids = UINT32_MAX }, -ENOSPC, "max_rows = 10" },
		{ { .sequence = 11, .ids = ids, .n_ids = 1, .outputs = 4 }, -EINVAL,
			"outputs is 4" },
		{ { .sequence = 11, .ids = ids, .n_ids = 3, .outputs = AFD_OUTPUT_ALL }, -ENOSPC,
			"max_outputs is 3" },
	};
	struct bench *b = *state;
	size_t i;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		const struct afd_entry entries[] = { good, cases[i].second };

		assert_int_equal(plan(b, entries, 2), cases[i].rc);
		if (!strstr(afd_last_error(), cases[i].text))
			fail_msg("\"%s\" does not say \"%s\"", afd_last_error(), cases[i].text);
		assert_int_equal(afd__kv_free(&b->kv), PAGES);
		assert_int_equal(b->kv.sequences[0].reserved, 0);
	}
	assert_int_equal(plan(b, &good, 1), 0);
}

static void pages_that_do_not_reach_for_the_second_entry_are_given_back(void **state)
{
	struct bench *b = *state;
	struct afd_entry entries[] = {
		{ .sequence = 10, .ids = ids, .n_ids = 8 },
		{ .sequence = 11, .ids = ids, .n_ids = 1 },
	};
	int i;

	for (i = 0; i < 3; i++) {
		assert_int_equal(plan(b, entries, 1), 0);
		afd__batch_commit(&b->batch);
	}
	assert_int_equal(afd__kv_free(&b->kv), 2);
	assert_int_equal(plan(b, entries, 2), -ENOSPC);
	assert_non_null(strstr(afd_last_error(), "sequence 11: 1 KV pages needed, 0 free of 8"));
	assert_int_equal(afd__kv_free(&b->kv), 2);
	assert_int_equal(b->kv.sequences[0].length, 24);
}

static void a_room_that_is_too_small_for_outputs_is_refused(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entry = {
		.sequence = 10, .ids = ids, .n_ids = 3, .outputs = AFD_OUTPUT_ALL
	};
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry),
		.logits = logits,
		.logits_rows = 2 };
	int32_t greedy[3];

	assert_int_equal(afd__batch_plan(&b->batch, &batch), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "logits_rows is 2"));
	batch.logits = NULL;
	batch.greedy_ids = greedy;
	batch.greedy_rows = 2;
	assert_int_equal(afd__batch_plan(&b->batch, &batch), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "greedy_rows is 2"));
	batch.greedy_ids = NULL;
	assert_int_equal(afd__batch_plan(&b->batch, &batch), 0);
	assert_int_equal(b->batch.n_outputs, 0);
}

static void entries_of_a_newer_host_are_read_by_their_stride(void **state)
{
	struct bench *b = *state;
	struct {
		struct afd_entry known;
		uint64_t unknown;
	} entries[2] = {
		{ { .sequence = 10, .ids = ids, .n_ids = 1 }, 0 },
		{ { .sequence = 11, .ids = ids, .n_ids = 2 }, 0 },
	};
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entries[0].known,
		.n_entries = 2,
		.entry_bytes = sizeof(entries[0]) };

	assert_int_equal(afd__batch_plan(&b->batch, &batch), 0);
	assert_int_equal(b->batch.n_rows, 3);
	afd__batch_restore(&b->batch);
	entries[1].unknown = 1;
	assert_int_equal(afd__batch_plan(&b->batch, &batch), -E2BIG);
	entries[1].unknown = 0;
	batch.entry_bytes = offsetof(struct afd_entry, sample) - 8;
	assert_int_equal(afd__batch_plan(&b->batch, &batch), -EINVAL);
}

/* ---- lanes ---- */

static void entries_spread_evenly_over_lanes(void **state)
{
	static const struct {
		uint32_t n_lanes, n_entries, rows[6], expected[4];
	} cases[] = {
		{ 1, 3, { 5, 1, 1 }, { 7 } },
		{ 2, 4, { 1, 1, 1, 1 }, { 2, 2 } },
		{ 2, 4, { 100, 1, 1, 1 }, { 100, 3 } },
		{ 2, 4, { 1, 1, 1, 100 }, { 3, 100 } },
		{ 2, 1, { 9 }, { 9, 0 } },
		{ 2, 0, { 0 }, { 0, 0 } },
		{ 4, 4, { 9, 1, 1, 1 }, { 9, 1, 1, 1 } },
		{ 4, 5, { 1, 1, 1, 1, 50 }, { 2, 1, 1, 50 } },
		{ 3, 6, { 2, 2, 2, 2, 2, 2 }, { 4, 4, 4 } },
		{ 4, 2, { 3, 3 }, { 3, 3, 0, 0 } },
	};
	struct afd__batch_entry entries[6];
	struct afd__batch_lane lanes[4];
	uint32_t i, j, row;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		for (j = 0; j < cases[i].n_entries; j++)
			entries[j].n_rows = cases[i].rows[j];
		afd__batch_split(entries, cases[i].n_entries, lanes, cases[i].n_lanes);
		for (row = j = 0; j < cases[i].n_lanes; j++) {
			assert_int_equal(lanes[j].n_rows, cases[i].expected[j]);
			assert_int_equal(lanes[j].row0, row);
			row += lanes[j].n_rows;
		}
	}
}

#define WITH_BENCH(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_BENCH(rows_are_laid_out_in_the_order_of_entries_and_ids),
		WITH_BENCH(positions_go_on_where_the_last_batch_ended),
		WITH_BENCH(a_bad_batch_is_refused_by_name_and_changes_nothing),
		WITH_BENCH(pages_that_do_not_reach_for_the_second_entry_are_given_back),
		WITH_BENCH(a_room_that_is_too_small_for_outputs_is_refused),
		WITH_BENCH(entries_of_a_newer_host_are_read_by_their_stride),
		cmocka_unit_test(entries_spread_evenly_over_lanes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
