/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An fp8 KV cache: logits against the NumPy decoder that rounds the same way, one process against
 * two, pages that are shared and copied, and the scales that a checkpoint brings.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../support/rig.h"

static float *decode(const struct golden *golden, struct rig_params params, uint32_t chunk)
{
	params.attn.kv_dtype = AFD_DTYPE_FP8;
	params.attn.max_outputs = 64;
	return rig_run(golden, &params, chunk);
}

/* ---- numbers ---- */

static void logits_are_those_of_the_reference_that_rounds_k_and_v(void **state)
{
	static const char *const names[] = { "rounded/kv", "rounded/kv-window",
		"rounded/kv-scales" };
	struct golden golden;
	float *logits;
	double error;
	size_t i;

	for (i = 0; i < sizeof(names) / sizeof(*names); i++) {
		golden_open(&golden, names[i]);
		logits = decode(&golden, (struct rig_params){ .attn.page_size = 3 }, 0);
		error = nmse(logits, golden.logits,
			(uint64_t)golden.n_positions * golden.vocab);
		if (!(error <= 1e-9))
			fail_msg("%s: NMSE %g, limit 1e-9", names[i], error);
		free(logits);
		golden_close(&golden);
	}
}

/* docs/operations.md tells what it was; random weights feel it more than trained ones. */
static void rounding_costs_what_the_documentation_says(void **state)
{
	static const struct {
		const char *name;
		double least, most;
	} cases[] = {
		{ "tiny-qwen3", 1e-5, 1e-3 },
		{ "moe-bf16", 1e-4, 5e-2 },
		{ "afmoe-bf16", 1e-4, 5e-2 },
	};
	struct golden golden;
	float *logits;
	double error;
	size_t i;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		golden_open(&golden, cases[i].name);
		logits = decode(&golden, (struct rig_params){ .attn.page_size = 0 }, 0);
		error = nmse(logits, golden.logits,
			(uint64_t)golden.n_positions * golden.vocab);
		print_message("%s: NMSE %.1e\n", cases[i].name, error);
		assert_true(error >= cases[i].least && error <= cases[i].most);
		free(logits);
		golden_close(&golden);
	}
}

static void neither_layout_nor_chunk_nor_page_size_shows(void **state)
{
	const struct rig_params others[] = {
		{ .address = "loop:fp8" },
		{ .attn.page_size = 5 },
		{ .address = "loop:fp8", .attn.page_size = 1, .n_threads = 2 },
	};
	struct golden golden;
	float *want, *got;
	size_t i, n;

	golden_open(&golden, "rounded/kv-scales");
	n = (size_t)golden.n_positions * golden.vocab;
	want = decode(&golden, (struct rig_params){ .attn.page_size = 16 }, 0);
	for (i = 0; i < sizeof(others) / sizeof(*others); i++) {
		got = decode(&golden, others[i], (uint32_t)i + 1);
		assert_memory_equal(got, want, n * sizeof(*got));
		free(got);
	}
	free(want);
	golden_close(&golden);
}

static void forks_copies_and_truncation_keep_the_bits(void **state)
{
	struct rig_params params = { .attn = { .page_size = 4, .kv_dtype = AFD_DTYPE_FP8,
					     .max_outputs = 32 } };
	struct golden golden;
	struct rig rig;
	float *want, *got;
	size_t row;

	golden_open(&golden, "rounded/kv-scales");
	row = golden.vocab;
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	want = calloc(32 * row, sizeof(*want));
	got = calloc(32 * row, sizeof(*got));
	assert_true(want && got && !afd_attn_add(rig.attn, 1));
	rig_append(&rig, 1, golden.ids, 12, want);
	/* Both write to the page that they share, 1 with other ids. */
	assert_int_equal(afd_attn_truncate(rig.attn, 1, 10), 0);
	assert_int_equal(afd_attn_fork(rig.attn, 1, 2, 6), 0);
	rig_append(&rig, 1, golden.ids, 1, got);
	rig_append(&rig, 2, golden.ids + 6, 6, got);
	assert_memory_equal(got, want + 6 * row, 6 * row * sizeof(*got));
	assert_int_equal(afd_attn_truncate(rig.attn, 1, 10), 0);
	rig_append(&rig, 1, golden.ids + 10, 2, got);
	assert_memory_equal(got, want + 10 * row, 2 * row * sizeof(*got));
	free(want);
	free(got);
	rig_close(&rig);
	golden_close(&golden);
}

/* ---- scales ---- */

static void each_layer_tells_the_scales_of_the_checkpoint(void **state)
{
	static const float scales[2][2] = { { 0.02f, 0.015625f }, { 0x1.064p-8f, 0.3f } };
	struct rig_params params = { .attn.kv_dtype = AFD_DTYPE_FP8 };
	struct afd_kv_layout layout = { .size = sizeof(layout) };
	struct afd_kv_layer layer = { .size = sizeof(layer) };
	struct golden golden;
	struct rig rig;
	uint32_t i;

	golden_open(&golden, "rounded/kv-scales");
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	for (i = 0; i < 2; i++) {
		assert_int_equal(afd_attn_kv_layer(rig.attn, i, &layer), 0);
		assert_true(layer.k_scale == scales[i][0] && layer.v_scale == scales[i][1]);
	}
	assert_int_equal(afd_attn_kv_layer(rig.attn, 2, &layer), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "layer 2, the model has 2"));
	assert_int_equal(afd_attn_kv_layout(rig.attn, &layout), 0);
	assert_true(layout.k_scale == 0 && layout.v_scale == 0);
	assert_int_equal(layout.position_bytes, layout.head_dim);
	rig_close(&rig);
	golden_close(&golden);
}

static void caches_without_scales_or_of_another_dtype_say_1(void **state)
{
	static const struct {
		const char *name;
		int32_t dtype;
	} cases[] = { { "rounded/kv", AFD_DTYPE_FP8 }, { "rounded/kv-scales", AFD_DTYPE_BF16 } };
	struct afd_kv_layout layout = { .size = sizeof(layout) };
	struct afd_kv_layer layer = { .size = sizeof(layer) };
	struct golden golden;
	struct rig rig;
	size_t i;

	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		golden_open(&golden, cases[i].name);
		rig_open(&rig, &(struct rig_params){ .checkpoint = golden.checkpoint,
				       .attn.kv_dtype = cases[i].dtype });
		assert_int_equal(afd_attn_kv_layout(rig.attn, &layout), 0);
		assert_true(layout.k_scale == 1 && layout.v_scale == 1);
		assert_int_equal(afd_attn_kv_layer(rig.attn, 1, &layer), 0);
		assert_true(layer.k_scale == 1 && layer.v_scale == 1);
		rig_close(&rig);
		golden_close(&golden);
	}
}

static void check_refused(const char *directory, const char *tensor)
{
	struct rig_params params = { .checkpoint = directory };
	struct afd_attn_params attn = { .size = sizeof(attn), .kv_dtype = AFD_DTYPE_FP8 };
	afd_attn *out = NULL;
	struct rig rig;

	/* A cache of another dtype does not look at scales. */
	rig_open(&rig, &params);
	afd_attn_destroy(rig.attn);
	rig.attn = NULL;
	attn.ffn = rig.ffn;
	assert_int_equal(afd_attn_create(&out, rig.model, NULL, &attn), -EBADMSG);
	assert_null(out);
	assert_non_null(strstr(afd_last_error(), tensor));
	assert_non_null(strstr(afd_last_error(), "must be a positive number"));
	rig_close(&rig);
}

static void a_scale_that_is_no_positive_number_is_refused_by_name(void **state)
{
	static const float values[] = { 0, -0.5f, NAN, INFINITY };
	static const char *const names[] = { "model.layers.0.self_attn.k_proj.k_scale",
		"model.layers.1.self_attn.v_proj.v_scale" };
	struct golden golden;
	char directory[64];
	size_t i;

	golden_open(&golden, "rounded/kv-scales");
	for (i = 0; i < 8; i++) {
		golden_patch(&golden, names[i % 2], 0, values[i / 2], directory);
		check_refused(directory, names[i % 2]);
		golden_patch_remove(directory);
	}
	golden_close(&golden);
}

static void note_progress(void *user, uint64_t done, uint64_t total)
{
	uint64_t *seen = user;

	seen[0] = done;
	seen[1] = total;
}

static void scales_count_as_loaded(void **state)
{
	struct afd_role_info role = { .size = sizeof(role) };
	struct afd_attn_stats stats = { .size = sizeof(stats) };
	uint64_t seen[2] = { 0 };
	struct rig_params params = { .attn = { .progress = note_progress, .progress_user = seen } };
	struct golden golden;
	struct rig rig;

	golden_open(&golden, "rounded/kv-scales");
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	assert_int_equal(afd_model_role(rig.model, AFD_ROLE_ATTENTION, &role), 0);
	assert_int_equal(seen[0], role.bytes);
	assert_int_equal(seen[1], role.bytes);
	assert_int_equal(afd_attn_stats(rig.attn, &stats), 0);
	assert_int_equal(stats.stored_bytes, role.bytes);
	rig_close(&rig);
	golden_close(&golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(logits_are_those_of_the_reference_that_rounds_k_and_v),
		cmocka_unit_test(rounding_costs_what_the_documentation_says),
		cmocka_unit_test(neither_layout_nor_chunk_nor_page_size_shows),
		cmocka_unit_test(forks_copies_and_truncation_keep_the_bits),
		cmocka_unit_test(each_layer_tells_the_scales_of_the_checkpoint),
		cmocka_unit_test(caches_without_scales_or_of_another_dtype_say_1),
		cmocka_unit_test(a_scale_that_is_no_positive_number_is_refused_by_name),
		cmocka_unit_test(scales_count_as_loaded),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
