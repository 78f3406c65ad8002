/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The law that a row does not know its neighbours: the same bits whatever the chunk, the page size,
 * the threads, the lanes, and the other sequences of the batch; also on forks and after truncation.
 * Held with bf16 KV and wire, where rounding would show a value that was used before it was
 * rounded.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../support/batches.h"

/* Odd shapes, a window smaller than the prompt, rotation by YaRN, three dtypes. */
static const char *const CASES[] = { "bf16-tied", "odd-f32", "odd-f16", "window-layer-types",
	"yarn-v5", "mixed-dtypes" };
enum { N_CASES = sizeof(CASES) / sizeof(*CASES) };

static void set_narrow(struct rig_params *params)
{
	params->wire_dtype = AFD_DTYPE_BF16;
	params->attn.kv_dtype = AFD_DTYPE_BF16;
	params->attn.max_outputs = 2048;
}

static void expect_same_bits(const float *a, const float *b, size_t n, const char *name)
{
	if (memcmp(a, b, n * sizeof(*a)))
		fail_msg("%s: other bits", name);
}

/* Decodes each case under `reference` and under `changed`. */
static void compare(struct rig_params reference, struct rig_params changed, uint32_t chunk)
{
	uint32_t i;

	set_narrow(&reference);
	set_narrow(&changed);
	for (i = 0; i < N_CASES; i++) {
		struct golden golden;
		float *a, *b;

		golden_open(&golden, CASES[i]);
		a = rig_run(&golden, &reference, 0);
		b = rig_run(&golden, &changed, chunk);
		expect_same_bits(a, b, (size_t)golden.n_positions * golden.vocab, CASES[i]);
		free(a);
		free(b);
		golden_close(&golden);
	}
}

static void chunks_of_a_prompt_do_not_change_bits(void **state)
{
	const struct rig_params params = { 0 };

	compare(params, params, 1);
	compare(params, params, 7);
}

static void page_sizes_do_not_change_bits(void **state)
{
	static const uint32_t sizes[] = { 1, 3, 64, 4096 };
	const struct rig_params reference = { 0 };
	uint32_t i;

	for (i = 0; i < 4; i++) {
		const struct rig_params params = { .attn.page_size = sizes[i] };

		compare(reference, params, 5);
	}
}

static void threads_do_not_change_bits(void **state)
{
	const struct rig_params one = { .n_threads = 1 }, two = { .n_threads = 2 },
				three = { .n_threads = 3 };

	compare(one, two, 0);
	compare(one, three, 7);
}

/* ---- batches of several sequences ---- */

static float *run_narrow(const struct golden *golden, struct rig_params params, bool together)
{
	set_narrow(&params);
	return batches_run(golden, &params, together);
}

static void compare_batches(struct rig_params changed, bool together)
{
	uint32_t i;

	for (i = 0; i < N_CASES; i++) {
		const struct rig_params reference = { 0 };
		struct golden golden;
		float *a, *b;

		golden_open(&golden, CASES[i]);
		a = run_narrow(&golden, reference, true);
		b = run_narrow(&golden, changed, together);
		expect_same_bits(a, b, (size_t)BATCHES_ROWS * golden.vocab, CASES[i]);
		free(a);
		free(b);
		golden_close(&golden);
	}
}

static void neighbours_in_the_batch_do_not_change_bits(void **state)
{
	const struct rig_params params = { 0 };

	compare_batches(params, false);
}

static void lanes_do_not_change_bits(void **state)
{
	uint32_t lanes;

	for (lanes = 2; lanes <= 4; lanes++) {
		const struct rig_params params = { .lanes = lanes };

		compare_batches(params, true);
	}
}

/* More outputs than the head takes at a time. */
static void chunks_of_the_head_do_not_change_bits(void **state)
{
	const struct rig_params params = { .attn.max_outputs = 2048 };
	struct golden golden;
	float *a, *b;

	golden_open(&golden, "long-prompt");
	assert_true(golden.n_prompt > 64);
	a = rig_run(&golden, &params, 0);
	b = rig_run(&golden, &params, 1);
	expect_same_bits(a, b, (size_t)golden.n_positions * golden.vocab, "long-prompt");
	free(a);
	free(b);
	golden_close(&golden);
}

/* ---- forks and truncation ---- */

static void a_fork_goes_on_with_the_bits_of_its_source(void **state)
{
	struct rig_params params = { .attn.page_size = 4 };
	struct golden golden;
	struct rig rig;
	float *a, *b;

	golden_open(&golden, "window-layer-types");
	a = calloc(20 * (size_t)golden.vocab, sizeof(*a));
	b = calloc(20 * (size_t)golden.vocab, sizeof(*b));
	set_narrow(&params);
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	assert_int_equal(afd_attn_add(rig.attn, 1), 0);
	rig_append(&rig, 1, golden.ids, 10, a);
	assert_int_equal(afd_attn_fork(rig.attn, 1, 2, 6), 0);
	/* The fork writes other ids to the page that both share, then its source goes on. */
	rig_append(&rig, 2, golden.ids, 5, b);
	rig_append(&rig, 1, golden.ids + 10, 6, a + 10 * (size_t)golden.vocab);
	assert_int_equal(afd_attn_truncate(rig.attn, 2, 6), 0);
	rig_append(&rig, 2, golden.ids + 6, 10, b + 6 * (size_t)golden.vocab);
	expect_same_bits(a + 6 * (size_t)golden.vocab, b + 6 * (size_t)golden.vocab,
		10 * (size_t)golden.vocab, "fork");
	rig_close(&rig);
	free(a);
	free(b);
	golden_close(&golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(chunks_of_a_prompt_do_not_change_bits),
		cmocka_unit_test(page_sizes_do_not_change_bits),
		cmocka_unit_test(threads_do_not_change_bits),
		cmocka_unit_test(neighbours_in_the_batch_do_not_change_bits),
		cmocka_unit_test(lanes_do_not_change_bits),
		cmocka_unit_test(chunks_of_the_head_do_not_change_bits),
		cmocka_unit_test(a_fork_goes_on_with_the_bits_of_its_source),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
