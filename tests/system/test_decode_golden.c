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

/* transformers takes 1 for it, and the wrong scale reads fluently. */
static void a_missing_route_scale_is_refused(void **state)
{
	struct golden golden;
	afd_context *ctx;
	afd_model *model = NULL;

	golden_open(&golden, *state);
	assert_int_equal(afd_context_create(&ctx, NULL), 0);
	assert_true(afd_model_open(&model, ctx, golden.checkpoint, NULL) < 0);
	assert_non_null(strstr(afd_last_error(), "route_scale is missing"));
	assert_null(model);
	afd_context_destroy(ctx);
	golden_close(&golden);
}

int main(void)
{
	static char names[MAX_CASES][64], titles[MAX_CASES][128];
	static struct CMUnitTest tests[MAX_CASES];
	uint32_t n = golden_names(names, MAX_CASES), i;

	for (i = 0; i < n; i++) {
		bool lacks_scale = !strcmp(names[i], "afmoe-scale-absent");

		snprintf(titles[i], sizeof(titles[i]), "%s: %.63s",
			lacks_scale ? "a_missing_route_scale_is_refused"
				    : "logits_agree_with_transformers",
			names[i]);
		tests[i] = (struct CMUnitTest){ .name = titles[i], .initial_state = names[i] };
		tests[i].test_func = lacks_scale ? a_missing_route_scale_is_refused
						 : logits_agree_with_transformers;
	}
	/* A folder that was not found must not pass. */
	if (n < 84)
		return 1;
	return _cmocka_run_group_tests("goldens", tests, n, NULL, NULL);
}
