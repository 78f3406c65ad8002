/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Logits against transformers' float32 ones, for every recorded case: prefill and decode, and
 * greedily the same ids. With f32 wire and KV nothing but the order of sums may differ.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../support/rig.h"

enum { MAX_CASES = 200 };
static const double LIMIT = 1e-9;

static int32_t argmax(const float *row, uint32_t n)
{
	uint32_t best = 0, i;

	for (i = 1; i < n; i++)
		best = row[i] > row[best] ? i : best;
	return (int32_t)best;
}

static void check_generated(const struct golden *golden, const float *logits)
{
	uint32_t i;

	for (i = 0; i < golden->n_generated; i++) {
		const float *row = logits + (size_t)(golden->n_prompt - 1 + i) * golden->vocab;

		assert_int_equal(argmax(row, golden->vocab), golden->ids[golden->n_prompt + i]);
	}
}

static void logits_agree_with_transformers(void **state)
{
	struct rig_params params = { .attn.max_outputs = 2048 };
	struct golden golden;
	struct rig rig;
	uint64_t n;
	float *logits;
	double error;

	golden_open(&golden, *state);
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	assert_int_equal(rig.vocab, golden.vocab);
	n = (uint64_t)golden.n_positions * golden.vocab;
	logits = calloc(n, sizeof(*logits));
	rig_decode(&rig, &golden, 0, logits);
	error = nmse(logits, golden.logits, n);
	if (!(error <= LIMIT))
		fail_msg("%s: NMSE %g, limit %g", (char *)*state, error, LIMIT);
	check_generated(&golden, logits);
	free(logits);
	rig_close(&rig);
	golden_close(&golden);
}

/* Recorded for later work. */
static void a_family_that_is_not_supported_is_refused(void **state)
{
	struct golden golden;
	afd_context *ctx;
	afd_model *model = NULL;

	golden_open(&golden, *state);
	assert_int_equal(afd_context_create(&ctx, NULL), 0);
	assert_int_equal(afd_model_open(&model, ctx, golden.checkpoint, NULL), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "config.json"));
	assert_null(model);
	afd_context_destroy(ctx);
	golden_close(&golden);
}

int main(void)
{
	static char names[MAX_CASES][64], titles[MAX_CASES][128];
	static struct CMUnitTest tests[MAX_CASES];
	uint32_t n = golden_names(names, MAX_CASES), n_supported = 0, i;

	for (i = 0; i < n; i++) {
		bool supported = golden_is_supported(names[i]);

		snprintf(titles[i], sizeof(titles[i]), "%s: %.63s",
			supported ? "logits_agree_with_transformers"
				  : "a_family_that_is_not_supported_is_refused",
			names[i]);
		tests[i] = (struct CMUnitTest){ .name = titles[i], .initial_state = names[i] };
		tests[i].test_func = supported ? logits_agree_with_transformers
					       : a_family_that_is_not_supported_is_refused;
		n_supported += supported;
	}
	/* A folder that was not found must not pass. */
	if (n_supported < 37)
		return 1;
	return _cmocka_run_group_tests("goldens", tests, n, NULL, NULL);
}
