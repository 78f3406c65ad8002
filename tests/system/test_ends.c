/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps that end early, wherever they are: while ranks of a group sum, while the choice of experts
 * is awaited, at the FFN. Nothing of them is left: neither in sequences that share pages nor in
 * slots on the way, so the same step that is made after it has the bits that it always had.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../support/ranks.h"

enum { N_SEQUENCES = 3, PREFIX = 13, LAST_ROWS = 6, POLLS_MAX = 60 };

static struct golden golden;

/* Sequence 2 shares a part of what 1 has, and 3 is new: of one row, one and six. */
static struct afd_batch batch_of(struct afd_entry entries[N_SEQUENCES])
{
	uint32_t i;

	for (i = 0; i < N_SEQUENCES; i++)
		entries[i] = (struct afd_entry){ .sequence = i + 1,
			.ids = golden.ids + i,
			.n_ids = i == N_SEQUENCES - 1 ? LAST_ROWS : 1 };
	return (struct afd_batch){ .size = sizeof(struct afd_batch),
		.entries = entries,
		.n_entries = N_SEQUENCES,
		.entry_bytes = sizeof(*entries),
		.logits_rows = N_SEQUENCES };
}

static void prepare(struct ranks *ranks)
{
	struct afd_entry entry = { .sequence = 1, .ids = golden.ids, .n_ids = PREFIX };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	uint32_t i;

	ranks_add(ranks, 1);
	ranks_step(ranks, &batch, NULL);
	ranks_add(ranks, 3);
	for (i = 0; i < ranks->n_ranks; i++)
		assert_int_equal(afd_attn_fork(ranks->attns[i], 1, 2, PREFIX - 2), 0);
}

static uint32_t length_of(uint32_t sequence)
{
	static const uint32_t lengths[] = { PREFIX, PREFIX - 2, 0 };

	return lengths[sequence - 1];
}

static void expect_as_before(const struct ranks *ranks)
{
	uint32_t i, s;

	for (i = 0; i < ranks->n_ranks; i++) {
		for (s = 1; s <= N_SEQUENCES; s++)
			assert_int_equal(afd_attn_length(ranks->attns[i], s), length_of(s));
	}
}

static void take_back(afd_attn *attn)
{
	uint32_t s;

	for (s = 1; s <= N_SEQUENCES; s++)
		assert_int_equal(afd_attn_truncate(attn, s, length_of(s)), 0);
}

static void step_and_take_back(struct ranks *ranks, float *logits)
{
	struct afd_entry entries[N_SEQUENCES];
	const struct afd_batch batch = batch_of(entries);
	size_t n = N_SEQUENCES * (size_t)golden.vocab;
	float *of[RANKS_MAX];
	uint32_t i;

	for (i = 0; i < RANKS_MAX; i++)
		of[i] = logits + i * n;
	ranks_step(ranks, &batch, of);
	for (i = 0; i < ranks->n_ranks; i++) {
		assert_memory_equal(of[i], logits, n * sizeof(*logits));
		take_back(ranks->attns[i]);
	}
}

static void poll_ffns(struct ranks *ranks)
{
	uint32_t i;

	for (i = 0; i < ranks->n_shards; i++)
		assert_true(afd_ffn_poll(ranks->ffns[i]) >= 0);
}

/* Begins a step, polls all ranks so often, gives it up on some, and lets the others see it: those
 * that need nothing more of them succeed. Returns how many ranks were still at it. */
static uint32_t end_early(struct ranks *ranks, uint32_t n_polls, uint32_t culprits)
{
	struct afd_entry entries[N_SEQUENCES];
	const struct afd_batch batch = batch_of(entries);
	time_t limit = time(NULL) + 60;
	uint32_t i, poll, n_busy, n_ended = 0;

	for (i = 0; i < ranks->n_ranks; i++)
		assert_int_equal(afd_attn_begin(ranks->attns[i], &batch), 0);
	for (poll = 0; poll < n_polls; poll++) {
		for (i = 0; i < ranks->n_ranks; i++)
			assert_true(afd_attn_poll(ranks->attns[i]) >= 0);
		poll_ffns(ranks);
	}
	for (i = 0; i < ranks->n_ranks; i++) {
		n_ended += afd_attn_busy(ranks->attns[i]) == 1;
		if (culprits >> i & 1)
			assert_int_equal(afd_attn_cancel(ranks->attns[i]), 0);
	}
	do {
		assert_true(time(NULL) < limit);
		for (i = n_busy = 0; i < ranks->n_ranks; i++) {
			bool busy = afd_attn_busy(ranks->attns[i]) == 1;

			/* Also one that is done: it may not have told the others yet. */
			if (afd_attn_poll(ranks->attns[i]) == 1 && busy)
				take_back(ranks->attns[i]);
			n_busy += (uint32_t)afd_attn_busy(ranks->attns[i]);
		}
		poll_ffns(ranks);
	} while (n_busy);
	return n_ended;
}

static void expect_no_trace(struct ranks_params p)
{
	size_t bytes = RANKS_MAX * N_SEQUENCES * (size_t)golden.vocab * sizeof(float);
	float *before = malloc(bytes), *after = malloc(bytes);
	struct ranks ranks;
	uint32_t n_polls = 1;

	assert_non_null(before);
	assert_non_null(after);
	p.checkpoint = golden.checkpoint;
	p.attn.page_size = 4;
	ranks_open(&ranks, &p);
	prepare(&ranks);
	memset(before, 0, bytes);
	memset(after, 0, bytes);
	step_and_take_back(&ranks, before);
	while (n_polls <= POLLS_MAX &&
		end_early(&ranks, n_polls, 1 + n_polls % ((1u << p.n_ranks) - 1)) == p.n_ranks) {
		expect_as_before(&ranks);
		step_and_take_back(&ranks, after);
		assert_memory_equal(after, before, bytes);
		n_polls++;
	}
	assert_true(n_polls > 5);
	ranks_close(&ranks);
	free(before);
	free(after);
}

static void a_step_that_ends_anywhere_leaves_no_trace(void **state)
{
	const struct ranks_params *p = *state;

	expect_no_trace(*p);
}

static const struct ranks_params ALONE = { .n_ranks = 1, .n_shards = 2, .by_experts = true,
	.gate = AFD_GATE_ATTENTION, .lanes = 3, .max_part_rows = 2, .wire_dtype = AFD_DTYPE_BF16 };
static const struct ranks_params PAIR = { .n_ranks = 2, .n_shards = 2, .by_experts = true,
	.gate = AFD_GATE_ATTENTION, .lanes = 3, .max_part_rows = 2, .wire_dtype = AFD_DTYPE_BF16 };
static const struct ranks_params FOUR = { .n_ranks = 4, .n_shards = 1, .lanes = 2,
	.max_part_rows = 1 };
static const struct ranks_params OWN_FFN = { .n_ranks = 2, .lanes = 4 };

static int open(void **state)
{
	golden_open(&golden, "moe-window");
	return 0;
}

static int close(void **state)
{
	golden_close(&golden);
	return 0;
}

#define CASE(what, params) \
	{ what, a_step_that_ends_anywhere_leaves_no_trace, NULL, NULL, (void *)&(params) }

int main(void)
{
	const struct CMUnitTest tests[] = {
		CASE("a_step_of_one_peer_that_ends_anywhere_leaves_no_trace", ALONE),
		CASE("a_step_of_two_ranks_that_ends_anywhere_leaves_no_trace", PAIR),
		CASE("a_step_of_more_ranks_than_rows_that_ends_anywhere_leaves_no_trace", FOUR),
		CASE("a_step_of_ranks_with_own_ffns_that_ends_anywhere_leaves_no_trace", OWN_FFN),
	};

	return cmocka_run_group_tests(tests, open, close);
}
