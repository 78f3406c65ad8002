/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised activations of both stages: logits against the NumPy decoder that rounds the same way,
 * one process against two, and nothing where no matrix is e4m3. What a wrong group, a wrong scale
 * or a product left out would change is far above the limit: the rounding itself is 4e-3 and more.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "../support/rig.h"

static const char *const cases[] = { "rounded/inputs", "rounded/inputs-ragged",
	"rounded/inputs-some", "rounded/inputs-moe", "rounded/inputs-afmoe" };
enum { N_CASES = sizeof(cases) / sizeof(*cases) };

static float *decode(const struct golden *golden, struct rig_params params, uint32_t chunk)
{
	params.attn.max_outputs = 64;
	return rig_run(golden, &params, chunk);
}

static double error_of(const struct golden *golden, struct rig_params params)
{
	float *logits = decode(golden, params, 0);
	double error =
		nmse(logits, golden->logits, (uint64_t)golden->n_positions * golden->vocab);

	free(logits);
	return error;
}

static void logits_are_those_of_the_reference_that_rounds_inputs(void **state)
{
	struct golden golden;
	size_t i;

	for (i = 0; i < N_CASES; i++) {
		double error;

		golden_open(&golden, cases[i]);
		error = error_of(&golden, (struct rig_params){ .quantize_activations = 1 });
		if (!(error <= 1e-9))
			fail_msg("%s: NMSE %g, limit 1e-9", cases[i], error);
		golden_close(&golden);
	}
}

static void without_the_parameter_of_both_stages_the_numbers_are_others(void **state)
{
	struct golden golden;
	size_t i;

	for (i = 0; i < N_CASES; i++) {
		golden_open(&golden, cases[i]);
		assert_true(error_of(&golden, (struct rig_params){ .lanes = 1 }) > 1e-3);
		assert_true(error_of(&golden, (struct rig_params){
						      .attn.quantize_activations = 1 }) > 1e-4);
		golden_close(&golden);
	}
}

static void neither_layout_nor_chunk_nor_lanes_show(void **state)
{
	const struct rig_params others[] = {
		{ .quantize_activations = 1, .address = "loop:quantized" },
		{ .quantize_activations = 1, .lanes = 2, .n_threads = 2 },
		{ .quantize_activations = 1, .weights = AFD_WEIGHTS_IN_PLACE },
		{ .quantize_activations = 1,
			.weights = AFD_WEIGHTS_IN_PLACE,
			.address = "loop:quantized",
			.n_threads = 2 },
	};
	struct golden golden;
	size_t i, n, c;

	for (c = 0; c < N_CASES; c++) {
		float *want[2], *got;

		golden_open(&golden, cases[c]);
		n = (size_t)golden.n_positions * golden.vocab;
		want[0] = decode(&golden, (struct rig_params){ .quantize_activations = 1 }, 0);
		/* Packed weights and weights in place are two variants. */
		want[1] = decode(&golden, others[2], 0);
		for (i = 0; i < 4; i++) {
			got = decode(&golden, others[i], (uint32_t)i + 3);
			if (memcmp(got, want[i / 2], n * sizeof(*got)))
				fail_msg("%s: layout %zu has other bits", cases[c], i);
			free(got);
		}
		free(want[0]);
		free(want[1]);
		golden_close(&golden);
	}
}

static void weights_that_are_not_e4m3_quantize_nothing(void **state)
{
	static const char *const names[] = { "bf16-tied", "afmoe-f32" };
	struct golden golden;
	float *off, *on;
	size_t i;

	for (i = 0; i < 2; i++) {
		golden_open(&golden, names[i]);
		off = decode(&golden, (struct rig_params){ .lanes = 1 }, 0);
		on = decode(&golden, (struct rig_params){ .quantize_activations = 1 }, 0);
		assert_memory_equal(
			on, off, (size_t)golden.n_positions * golden.vocab * sizeof(*on));
		free(off);
		free(on);
		golden_close(&golden);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(logits_are_those_of_the_reference_that_rounds_inputs),
		cmocka_unit_test(without_the_parameter_of_both_stages_the_numbers_are_others),
		cmocka_unit_test(neither_layout_nor_chunk_nor_lanes_show),
		cmocka_unit_test(weights_that_are_not_e4m3_quantize_nothing),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
