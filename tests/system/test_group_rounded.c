/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the ranks of an attention group round: K and V of their heads in an fp8 cache, and inputs in
 * e4m3, where a rank has a part of a group of 128 of what enters o_proj. Held against the NumPy
 * decoder, which cuts there too. And pages leave the windows of all ranks alike.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "../support/ranks.h"

enum { N_RANKS = 2, MAX_PAGES = 64 };

static void free_logits(float *logits[N_RANKS])
{
	free(logits[0]);
	free(logits[1]);
}

static void open_case(
	struct golden *golden, struct ranks *ranks, const char *name, struct ranks_params params,
	float *logits[N_RANKS])
{
	int i;

	golden_open(golden, name);
	params.checkpoint = golden->checkpoint;
	params.n_ranks = N_RANKS;
	params.attn.max_outputs = 64;
	ranks_open(ranks, &params);
	for (i = 0; i < N_RANKS; i++) {
		logits[i] = calloc((size_t)golden->n_positions * golden->vocab, sizeof(float));
		assert_non_null(logits[i]);
	}
}

static void check_case(const char *name, struct ranks_params params)
{
	float *logits[N_RANKS];
	struct golden golden;
	struct ranks ranks;
	double error;

	open_case(&golden, &ranks, name, params, logits);
	ranks_decode(&ranks, &golden, 0, logits);
	error = nmse(logits[0], golden.logits, (uint64_t)golden.n_positions * golden.vocab);
	if (!(error <= 1e-9))
		fail_msg("%s, %u shards of the FFN: NMSE %g, limit 1e-9", name, params.n_shards,
			error);
	assert_memory_equal(logits[0], logits[1],
		(size_t)golden.n_positions * golden.vocab * sizeof(float));
	free_logits(logits);
	ranks_close(&ranks);
	golden_close(&golden);
}

static void a_rank_rounds_its_part_of_a_group_of_inputs(void **state)
{
	const struct ranks_params params = { .attn.quantize_activations = 1 };

	check_case("rounded/inputs-tp2", params);
}

static void ranks_keep_their_heads_in_an_fp8_cache(void **state)
{
	struct ranks_params params = { .attn.kv_dtype = AFD_DTYPE_FP8 };

	for (params.n_shards = 0; params.n_shards <= 1; params.n_shards++) {
		check_case("rounded/kv", params);
		check_case("rounded/kv-window", params);
		check_case("rounded/kv-scales", params);
	}
}

static void pages_leave_the_windows_of_all_ranks_alike(void **state)
{
	const struct ranks_params params = { .attn = { .page_size = 2, .kv_pages = MAX_PAGES } };
	int32_t pages[N_RANKS][MAX_PAGES];
	float *logits[N_RANKS];
	struct golden golden;
	struct ranks ranks;
	int rank, n[N_RANKS];

	open_case(&golden, &ranks, "afmoe-f32", params, logits);
	ranks_add(&ranks, 7);
	for (uint32_t i = 0; i < 30; i++) {
		struct afd_entry entry = { .sequence = 7, .ids = golden.ids + i, .n_ids = 1 };
		struct afd_batch batch = { .size = sizeof(batch),
			.entries = &entry,
			.n_entries = 1,
			.entry_bytes = sizeof(entry),
			.logits_rows = 1 };

		ranks_step(&ranks, &batch, logits);
	}
	for (rank = 0; rank < N_RANKS; rank++)
		n[rank] = afd_attn_pages(ranks.attns[rank], 7, 0, pages[rank], MAX_PAGES);
	assert_true(n[0] == 15 && n[1] == 15);
	/* Position 29 saw 22 .. 29. */
	assert_true(pages[0][10] == -1 && pages[0][11] >= 0);
	assert_memory_equal(pages[0], pages[1], 15 * sizeof(int32_t));
	free_logits(logits);
	ranks_close(&ranks);
	golden_close(&golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_rank_rounds_its_part_of_a_group_of_inputs),
		cmocka_unit_test(ranks_keep_their_heads_in_an_fp8_cache),
		cmocka_unit_test(pages_leave_the_windows_of_all_ranks_alike),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
