/* SPDX-License-Identifier: Apache-2.0 */
/*
 * e4m3: scales come with the blocks that are theirs, in each dtype and under each name, or the tensor is refused. Beside them
 * the scales of an fp8 cache, and fingerprints, to which neither storage nor spelling matters.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>

#include "../../lib/model/fingerprint.h"
#include "expert_layer.h"

/* ---- scales ---- */

#define UP "model.layers.0.mlp.experts.1.up_proj.weight"

static void lend_fp8_apart(const char *suffix, int32_t scale_dtype)
{
	char name[128];

	lend_apart(AFD_DTYPE_FP8, "mlp.experts.", usual);
	for (unsigned e = 0; e < N_EXPERTS; e++) {
		for (int part = 0; part < 3; part++) {
			uint64_t rows = part == 2 ? BLOCKS : 1, columns = part == 2 ? 1 : BLOCKS;

			snprintf(name, sizeof(name), "model.layers.0.mlp.experts.%u.%s.weight%s", e, usual[part], suffix);
			lend_matrix(scale_dtype, 100 + which(e, AFD__TENSOR_EXPERT_GATE + part), rows, columns, name);
		}
	}
}

static void check_scales(const char *suffix, int32_t dtype)
{
	uint32_t number[BLOCKS] = { 0 };
	struct afd__tensor t;

	lend_fp8_apart(suffix, dtype);
	open_model(MOE);
	check_experts(AFD_DTYPE_FP8);
	if (afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &t))
		fail_msg("%s", afd_last_error());
	put_matrix(number, dtype, 100 + which(1, AFD__TENSOR_EXPERT_UP), 1, BLOCKS);
	assert_int_equal(t.scales.rows, 1);
	assert_int_equal(t.scales.columns, BLOCKS);
	assert_int_equal(t.scales.row_offset, 0);
	assert_int_equal(t.scales.dtype, dtype);
	assert_int_equal(t.scales.bytes, BLOCKS * lent_number_bytes(dtype));
	assert_memory_equal(t.scales.data, number, t.scales.bytes);
}

static void float32_scales_are_found(void **state)
{
	check_scales("_scale_inv", AFD_DTYPE_F32);
}

static void bfloat16_scales_are_found(void **state)
{
	check_scales("_scale_inv", AFD_DTYPE_BF16);
}

static void float16_scales_are_found_under_the_other_name(void **state)
{
	check_scales("_scale", AFD_DTYPE_F16);
}

/* Fused [3][192][136]: 2 rows of blocks; row 96, where up begins, is inside the first. */
static void the_up_half_of_a_fused_tensor_says_where_in_a_block_it_begins(void **state)
{
	struct afd__tensor gate, up;
	float *scales;

	lend_fused(AFD_DTYPE_FP8);
	scales = lend(&lent, AFD_DTYPE_F32, N_EXPERTS, 2, BLOCKS, "model.layers.0.mlp.experts.gate_up_proj_scale_inv");
	lend(&lent, AFD_DTYPE_F32, N_EXPERTS, BLOCKS, 1, "model.layers.0.mlp.experts.down_proj_scale_inv");
	open_model(MOE);
	check_experts(AFD_DTYPE_FP8);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_GATE, &gate), 0);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &up), 0);
	assert_ptr_equal(gate.scales.data, scales + 4);
	assert_int_equal(gate.scales.rows, 1);
	assert_int_equal(gate.scales.row_offset, 0);
	assert_ptr_equal(up.scales.data, scales + 4);
	assert_int_equal(up.scales.rows, 2);
	assert_int_equal(up.scales.row_offset, 96);
}

/* With 128 rows a half, gate and up have blocks of their own. */
static void halves_of_whole_blocks_have_scales_of_their_own(void **state)
{
	struct afd__tensor up, down;
	float *scales;

	lend(&lent, AFD_DTYPE_FP8, N_EXPERTS, 256, HIDDEN, "model.layers.0.mlp.experts.gate_up_proj");
	lend(&lent, AFD_DTYPE_FP8, N_EXPERTS, HIDDEN, 128, "model.layers.0.mlp.experts.down_proj");
	scales = lend(&lent, AFD_DTYPE_F32, N_EXPERTS, 2, BLOCKS, "model.layers.0.mlp.experts.gate_up_proj_scale");
	lend(&lent, AFD_DTYPE_BF16, N_EXPERTS, BLOCKS, 1, "model.layers.0.mlp.experts.down_proj_scale");
	open_model(MOE_OF("qwen3_moe", "128"));
	assert_int_equal(afd__model_expert(model, 0, 2, AFD__TENSOR_EXPERT_UP, &up), 0);
	assert_ptr_equal(up.scales.data, scales + 2 * 4 + 2);
	assert_int_equal(up.scales.rows, 1);
	assert_int_equal(up.scales.row_offset, 0);
	assert_int_equal(afd__model_expert(model, 0, 2, AFD__TENSOR_EXPERT_DOWN, &down), 0);
	assert_int_equal(down.scales.rows, 2);
	assert_int_equal(down.scales.columns, 1);
	assert_int_equal(down.scales.dtype, AFD_DTYPE_BF16);
}

static void scales_count_to_the_role_and_are_listed(void **state)
{
	struct afd_role_info info = { .size = sizeof(info) };
	struct afd_tensor_info t = { .size = sizeof(t) };

	lend_fp8_apart("_scale_inv", AFD_DTYPE_F32);
	lend(&lent, AFD_DTYPE_BF16, 3, HIDDEN, 0, "model.layers.0.mlp.gate.weight");
	open_model(MOE);
	assert_int_equal(afd_model_role(model, AFD_ROLE_FFN, &info), 0);
	assert_int_equal(info.n_tensors, 1 + 2 * 9);
	assert_int_equal(info.bytes, 2 * 3 * HIDDEN + 9 * (WIDTH * HIDDEN + 4 * BLOCKS));
	assert_int_equal(afd_model_tensor(model, afd__slot_find(model, 0, 0, AFD__TENSOR_EXPERT_GATE) - model->slots + 1, &t), 0);
	assert_string_equal(t.name, "model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv");
	assert_int_equal(t.role, AFD_ROLE_FFN);
	assert_int_equal(t.bytes, 4 * BLOCKS);
}

static void lend_one(int32_t dtype, int32_t scale_dtype, uint64_t scale_rows, uint64_t scale_columns)
{
	lend(&lent, dtype, WIDTH, HIDDEN, 0, UP);
	if (scale_dtype)
		lend(&lent, scale_dtype, scale_rows, scale_columns, 0, UP "_scale_inv");
}

static const struct refusal {
	const char *name;
	int32_t dtype, scale_dtype;
	uint64_t rows, columns;
	int code;
	const char *text;
} refusals[] = {
	{ "e4m3_without_scales_is_refused", AFD_DTYPE_FP8, 0, 0, 0, -ENOENT,
	  "tensor " UP ": dtype is F8_E4M3, but its scales " UP "_scale_inv (or _scale) are not there" },
	{ "one_scale_for_all_is_refused", AFD_DTYPE_FP8, AFD_DTYPE_F32, 1, 0, -EBADMSG,
	  UP "_scale_inv: shape is [1], its matrix needs [1, 2] (blocks of 128 x 128)" },
	{ "a_scale_for_each_row_is_refused", AFD_DTYPE_FP8, AFD_DTYPE_F32, WIDTH, 1, -EBADMSG, "shape is [96, 1]" },
	{ "rounding_down_the_number_of_blocks_is_refused", AFD_DTYPE_FP8, AFD_DTYPE_F32, 1, 1, -EBADMSG, "shape is [1, 1]" },
	{ "transposed_scales_are_refused", AFD_DTYPE_FP8, AFD_DTYPE_BF16, 2, 1, -EBADMSG,
	  "shape is [2, 1], its matrix needs [1, 2]" },
	{ "scales_in_e4m3_are_refused", AFD_DTYPE_FP8, AFD_DTYPE_FP8, 1, 2, -ENOTSUP, "dtype F8_E4M3 is not supported for scales" },
	{ "scales_beside_another_dtype_are_refused", AFD_DTYPE_BF16, AFD_DTYPE_F32, 1, 2, -EBADMSG,
	  "tensor " UP ": dtype is bf16, but it has scales: " UP "_scale_inv" },
};

static void check_refusal(void **state)
{
	const struct refusal *c = *state;
	struct afd__tensor t;

	lend_one(c->dtype, c->scale_dtype, c->rows, c->columns);
	open_model(MOE);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &t), c->code);
	if (!strstr(afd_last_error(), c->text))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), c->text);
}

static void a_router_in_e4m3_is_refused(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_FP8, 3, HIDDEN, 0, "model.layers.0.mlp.gate.weight");
	lend(&lent, AFD_DTYPE_F32, 1, 2, 0, "model.layers.0.mlp.gate.weight_scale_inv");
	open_model(MOE);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_ROUTER, &t), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "model.layers.0.mlp.gate.weight: dtype F8_E4M3 is supported only for"));
}

static void a_norm_in_e4m3_is_refused(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_FP8, HIDDEN, 0, 0, "model.norm.weight");
	open_model(MOE);
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_FINAL_NORM, &t), -ENOTSUP);
}

static void an_embedding_and_a_head_in_e4m3_are_refused(void **state)
{
	static const struct {
		const char *name;
		int32_t kind;
	} cases[] = { { "model.embed_tokens.weight", AFD__TENSOR_EMBED }, { "lm_head.weight", AFD__TENSOR_HEAD } };
	struct afd__tensor t;

	for (size_t i = 0; i < 2; i++) {
		free_lent(&lent);
		lend(&lent, AFD_DTYPE_FP8, 5, HIDDEN, 0, "%s", cases[i].name);
		lend(&lent, AFD_DTYPE_F32, 1, BLOCKS, 0, "%s_scale_inv", cases[i].name);
		open_model(MOE);
		assert_int_equal(afd__model_tensor(model, -1, cases[i].kind, &t), -ENOTSUP);
		assert_non_null(strstr(afd_last_error(), cases[i].name));
		assert_non_null(strstr(afd_last_error(), "dtype F8_E4M3 is supported only for"));
		afd_model_close(model);
		model = NULL;
	}
}

/* ---- scales of the cache ---- */

static void the_cache_has_scales_of_1_without_any_in_the_checkpoint(void **state)
{
	float k, v;

	lend_fused(AFD_DTYPE_BF16);
	open_model(MOE);
	assert_int_equal(afd__model_kv_scales(model, 0, &k, &v), 0);
	assert_true(k == 1 && v == 1);
}

static void the_cache_takes_the_scales_of_the_checkpoint(void **state)
{
	float k, v;

	*(float *)lend(&lent, AFD_DTYPE_F32, 1, 0, 0, "model.layers.0.self_attn.k_proj.k_scale") = 0.25f;
	*(uint16_t *)lend(&lent, AFD_DTYPE_F16, 1, 0, 0, "model.layers.0.self_attn.v_scale") = 0x3e00; /* 1.5 */
	open_model(MOE);
	assert_int_equal(afd__model_kv_scales(model, 0, &k, &v), 0);
	assert_true(k == 0.25f && v == 1.5f);
}

static void a_scale_of_the_cache_in_bfloat16_is_widened(void **state)
{
	float k, v;

	*(uint16_t *)lend(&lent, AFD_DTYPE_BF16, 1, 0, 0, "model.layers.0.self_attn.k_scale") = 0x3dcd;
	open_model(MOE);
	assert_int_equal(afd__model_kv_scales(model, 0, &k, &v), 0);
	assert_true(fabsf(k - 0.1f) < 1e-3f && v == 1);
}

static void a_scale_of_the_cache_that_is_no_positive_number_is_refused(void **state)
{
	static const float bad[] = { 0, -1, NAN, INFINITY };
	float *scale = lend(&lent, AFD_DTYPE_F32, 1, 0, 0, "model.layers.0.self_attn.v_scale"), k, v;

	open_model(MOE);
	for (size_t i = 0; i < 4; i++) {
		*scale = bad[i];
		assert_int_equal(afd__model_kv_scales(model, 0, &k, &v), -EBADMSG);
		assert_non_null(strstr(afd_last_error(), "must be a positive number"));
	}
}

static void more_than_one_scale_of_the_cache_is_refused(void **state)
{
	float k, v;

	lend(&lent, AFD_DTYPE_F32, 2, 0, 0, "model.layers.0.self_attn.k_scale");
	open_model(MOE);
	assert_int_equal(afd__model_kv_scales(model, 0, &k, &v), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "shape is [2], config.json says [1] (one number)"));
}

/* ---- fingerprints ---- */

static void take_fingerprint(const char *config, uint64_t value[2])
{
	struct afd__fingerprint *fp = afd__fingerprint_create(NULL);
	struct afd__tensor t;

	open_model(config);
	for (unsigned e = 0; e < N_EXPERTS; e++) {
		for (int32_t kind = AFD__TENSOR_EXPERT_GATE; kind <= AFD__TENSOR_EXPERT_DOWN; kind++) {
			assert_int_equal(afd__model_expert(model, 0, e, kind, &t), 0);
			afd__fingerprint_tensor(fp, &t);
		}
	}
	afd__fingerprint_value(fp, value);
	afd__fingerprint_destroy(fp);
	afd_model_close(model);
	model = NULL;
	free_lent(&lent);
}

static void storage_and_spelling_do_not_change_the_fingerprint(void **state)
{
	uint64_t apart[2], fused[2], stacked[2], other[2];

	lend_apart(AFD_DTYPE_BF16, "mlp.experts.", usual);
	take_fingerprint(MOE, apart);
	lend_fused(AFD_DTYPE_BF16);
	take_fingerprint(MOE, fused);
	lend_stacked(AFD_DTYPE_BF16);
	take_fingerprint(MOE, stacked);
	lend_apart(AFD_DTYPE_BF16, "block_sparse_moe.experts.", numbered);
	take_fingerprint(MINIMAX, other);
	assert_memory_equal(fused, apart, sizeof(apart));
	assert_memory_equal(stacked, apart, sizeof(apart));
	assert_memory_equal(other, apart, sizeof(apart));
}

static void the_name_of_scales_does_not_change_the_fingerprint_but_a_scale_does(void **state)
{
	uint64_t inverse[2], plain[2], changed[2];

	lend_fp8_apart("_scale_inv", AFD_DTYPE_F32);
	take_fingerprint(MOE, inverse);
	lend_fp8_apart("_scale", AFD_DTYPE_F32);
	take_fingerprint(MOE, plain);
	lend_fp8_apart("_scale", AFD_DTYPE_F32);
	((float *)lent.tensors[lent.n - 1].data)[0] += 1;
	take_fingerprint(MOE, changed);
	assert_memory_equal(plain, inverse, sizeof(plain));
	if (inverse[0])
		assert_memory_not_equal(changed, inverse, sizeof(plain));
}

/* ---- all cases ---- */

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)

static const struct CMUnitTest single[] = {
	T(float32_scales_are_found),
	T(bfloat16_scales_are_found),
	T(float16_scales_are_found_under_the_other_name),
	T(the_up_half_of_a_fused_tensor_says_where_in_a_block_it_begins),
	T(halves_of_whole_blocks_have_scales_of_their_own),
	T(scales_count_to_the_role_and_are_listed),
	T(a_router_in_e4m3_is_refused),
	T(a_norm_in_e4m3_is_refused),
	T(an_embedding_and_a_head_in_e4m3_are_refused),
	T(the_cache_has_scales_of_1_without_any_in_the_checkpoint),
	T(the_cache_takes_the_scales_of_the_checkpoint),
	T(a_scale_of_the_cache_in_bfloat16_is_widened),
	T(a_scale_of_the_cache_that_is_no_positive_number_is_refused),
	T(more_than_one_scale_of_the_cache_is_refused),
	T(storage_and_spelling_do_not_change_the_fingerprint),
	T(the_name_of_scales_does_not_change_the_fingerprint_but_a_scale_does),
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(refusals)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(refusals); i++)
		tests[n++] = (struct CMUnitTest){ refusals[i].name, check_refusal, begin, end, (void *)&refusals[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
