/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tensors of routed layers: an expert is the same matrix under the same name whether the checkpoint stores it apart, fused or
 * stacked, and under whatever spelling; what both roles agree on follows from it.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>

#include <afd/attn.h>

#include "expert_layer.h"

/* ---- the same experts, however they lie ---- */

static void experts_that_lie_apart_are_found(void **state)
{
	lend_apart(AFD_DTYPE_BF16, "mlp.experts.", usual);
	open_model(MOE);
	check_experts(AFD_DTYPE_BF16);
}

static void fused_experts_are_the_same_matrices(void **state)
{
	lend_fused(AFD_DTYPE_BF16);
	open_model(MOE);
	check_experts(AFD_DTYPE_BF16);
}

static void stacked_experts_are_the_same_matrices(void **state)
{
	lend_stacked(AFD_DTYPE_F32);
	open_model(MOE);
	check_experts(AFD_DTYPE_F32);
}

static void experts_numbered_as_minimax_does_are_the_same_matrices(void **state)
{
	lend_apart(AFD_DTYPE_F16, "block_sparse_moe.experts.", numbered);
	open_model(MINIMAX);
	check_experts(AFD_DTYPE_F16);
}

static void experts_numbered_inside_mlp_are_the_same_matrices(void **state)
{
	lend_apart(AFD_DTYPE_F32, "mlp.experts.", numbered);
	open_model(DEEPSEEK);
	check_experts(AFD_DTYPE_F32);
}

static void a_missing_expert_is_told_with_every_name_that_was_looked_for(void **state)
{
	struct afd__tensor t;

	lend_apart(AFD_DTYPE_BF16, "mlp.experts.", usual);
	lent.n--;
	free((void *)lent.tensors[lent.n].data);
	open_model(MOE);
	assert_int_equal(afd__model_expert(model, 0, 2, AFD__TENSOR_EXPERT_DOWN, &t), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "tensor model.layers.0.mlp.experts.2.down_proj.weight, "));
	assert_non_null(strstr(afd_last_error(), "model.layers.0.mlp.experts.down_proj, "));
	assert_non_null(strstr(afd_last_error(), "model.layers.0.block_sparse_moe.experts.2.w2.weight"));
}

/* A transposed [E][H][2 MI] has as many numbers; only its shape tells. */
static void fused_experts_of_another_order_are_refused_with_both_shapes(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_BF16, N_EXPERTS, HIDDEN, 2 * WIDTH, "model.layers.0.mlp.experts.gate_up_proj");
	open_model(MOE);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &t), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "shape is [3, 136, 192], config.json says [3, 192, 136] "
						 "(num_experts, 2 * moe_intermediate_size, hidden_size)"));
}

static void fused_experts_without_their_own_dimension_are_refused(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_BF16, HIDDEN, WIDTH, 0, "model.layers.0.mlp.experts.down_proj");
	open_model(MOE);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_DOWN, &t), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "shape is [136, 96], config.json says [3, 136, 96]"));
}

/* ---- names of one meaning, and one name of two ---- */

static const struct spelling {
	const char *name, *config, *tensor;
	int32_t kind;
	uint64_t rows, columns;
} spellings[] = {
	{ "the_router_of_qwen3_moe_is_found", MOE, "mlp.gate.weight", AFD__TENSOR_ROUTER, 3, HIDDEN },
	{ "the_router_of_afmoe_is_found", AFMOE, "mlp.router.gate.weight", AFD__TENSOR_ROUTER, 3, HIDDEN },
	{ "the_router_of_minimax_is_found", MINIMAX, "block_sparse_moe.gate.weight", AFD__TENSOR_ROUTER, 3, HIDDEN },
	{ "a_router_of_moe_gate_is_found", DEEPSEEK, "moe.gate.weight", AFD__TENSOR_ROUTER, 3, HIDDEN },
	{ "the_bias_of_afmoe_is_found", AFMOE, "mlp.expert_bias", AFD__TENSOR_ROUTER_BIAS, 3, 0 },
	{ "the_bias_of_deepseek_is_found", DEEPSEEK, "mlp.gate.e_score_correction_bias", AFD__TENSOR_ROUTER_BIAS, 3, 0 },
	{ "the_bias_of_minimax_is_found", MINIMAX, "block_sparse_moe.e_score_correction_bias", AFD__TENSOR_ROUTER_BIAS, 3, 0 },
	{ "shared_experts_are_found", AFMOE, "mlp.shared_experts.up_proj.weight", AFD__TENSOR_SHARED_UP, WIDTH, HIDDEN },
	{ "a_shared_expert_is_found", DEEPSEEK, "mlp.shared_expert.gate_proj.weight", AFD__TENSOR_SHARED_GATE, WIDTH, HIDDEN },
	{ "a_share_expert_is_found", DEEPSEEK, "share_expert.down_proj.weight", AFD__TENSOR_SHARED_DOWN, HIDDEN, WIDTH },
	{ "the_gate_of_attention_is_found", AFMOE, "self_attn.gate_proj.weight", AFD__TENSOR_OUTPUT_GATE, 8, HIDDEN },
	{ "post_attention_layernorm_of_qwen3_is_the_norm_before_the_ffn", MOE, "post_attention_layernorm.weight",
	  AFD__TENSOR_FFN_NORM, HIDDEN, 0 },
	{ "post_attention_layernorm_of_afmoe_is_the_norm_after_attention", AFMOE, "post_attention_layernorm.weight",
	  AFD__TENSOR_AFTER_ATTENTION_NORM, HIDDEN, 0 },
	{ "pre_mlp_layernorm_is_the_norm_before_the_ffn", AFMOE, "pre_mlp_layernorm.weight", AFD__TENSOR_FFN_NORM, HIDDEN, 0 },
	{ "post_mlp_layernorm_is_the_norm_after_the_ffn", AFMOE, "post_mlp_layernorm.weight", AFD__TENSOR_AFTER_FFN_NORM, HIDDEN,
	  0 },
};

static void check_spelling(void **state)
{
	const struct spelling *c = *state;
	struct afd__tensor t;
	char name[100];
	void *data;

	snprintf(name, sizeof(name), "model.layers.0.%s", c->tensor);
	data = lend(&lent, AFD_DTYPE_BF16, c->rows, c->columns, 0, "%s", name);
	open_model(c->config);
	if (afd__model_tensor(model, 0, c->kind, &t))
		fail_msg("%s", afd_last_error());
	assert_ptr_equal(t.data, data);
}

static void the_attention_gate_is_not_the_gate_of_a_dense_ffn(void **state)
{
	lend(&lent, AFD_DTYPE_BF16, 8, HIDDEN, 0, "model.layers.0.self_attn.gate_proj.weight");
	open_model(MOE);
	assert_null(afd__slot_find(model, 0, -1, AFD__TENSOR_OUTPUT_GATE));
	assert_null(afd__slot_find(model, 0, -1, AFD__TENSOR_GATE));
}

static void a_bias_of_the_selection_keeps_its_dtype(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_F32, 3, 0, 0, "model.layers.0.mlp.expert_bias");
	lend(&lent, AFD_DTYPE_BF16, 3, HIDDEN, 0, "model.layers.0.mlp.router.gate.weight");
	open_model(AFMOE);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_ROUTER_BIAS, &t), 0);
	assert_int_equal(t.dtype, AFD_DTYPE_F32);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_ROUTER, &t), 0);
	assert_int_equal(t.dtype, AFD_DTYPE_BF16);
}

static void a_missing_bias_of_the_selection_is_refused_by_name(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_BF16, 3, HIDDEN, 0, "model.layers.0.mlp.router.gate.weight");
	open_model(AFMOE);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_ROUTER_BIAS, &t), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "model.layers.0.mlp.expert_bias, "));
}

/* Some models norm the whole projection: [n_heads * head_dim] is not one vector for all heads. */
static void a_norm_over_the_whole_of_q_is_refused(void **state)
{
	struct afd__tensor t;

	lend(&lent, AFD_DTYPE_BF16, 8, 0, 0, "model.layers.0.self_attn.q_norm.weight");
	open_model(MOE);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_Q_NORM, &t), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "shape is [8], config.json says [4] (head_dim)"));
}

/* ---- roles ---- */

static void the_attention_of_an_ffn_only_family_is_refused_by_name(void **state)
{
	struct afd_role_info info = { .size = sizeof(info) };
	struct afd_model_info about = { .size = sizeof(about) };

	lend_apart(AFD_DTYPE_BF16, "mlp.experts.", usual);
	open_model(DEEPSEEK);
	assert_int_equal(afd_model_role(model, AFD_ROLE_ATTENTION, &info), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "the attention of model_type \"deepseek_v3\" is not supported"));
	assert_int_equal(afd_model_info(model, &about), 0);
	assert_int_equal(about.ffn_only, 1);
	assert_int_equal(about.n_moe_layers, 1);
}

static void an_attention_stage_of_an_ffn_only_family_is_refused_by_name(void **state)
{
	struct afd_attn_params p = { .size = sizeof(p) };
	afd_attn *attn = NULL;

	lend_apart(AFD_DTYPE_BF16, "mlp.experts.", usual);
	open_model(DEEPSEEK);
	assert_int_equal(afd_attn_create(&attn, model, NULL, &p), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "the attention of model_type \"deepseek_v3\" is not supported"));
	assert_int_equal(afd_attn_kv_bytes(model, &p), 0);
	assert_null(attn);
}

static void the_ffn_role_has_router_and_experts_and_shared_experts(void **state)
{
	struct afd_role_info info = { .size = sizeof(info) };

	lend_fused(AFD_DTYPE_BF16);
	lend(&lent, AFD_DTYPE_BF16, 3, HIDDEN, 0, "model.layers.0.mlp.router.gate.weight");
	lend(&lent, AFD_DTYPE_F32, 3, 0, 0, "model.layers.0.mlp.expert_bias");
	lend(&lent, AFD_DTYPE_BF16, WIDTH, HIDDEN, 0, "model.layers.0.mlp.shared_experts.gate_proj.weight");
	lend(&lent, AFD_DTYPE_BF16, WIDTH, HIDDEN, 0, "model.layers.0.mlp.shared_experts.up_proj.weight");
	lend(&lent, AFD_DTYPE_BF16, HIDDEN, WIDTH, 0, "model.layers.0.mlp.shared_experts.down_proj.weight");
	open_model(AFMOE);
	assert_int_equal(afd_model_role(model, AFD_ROLE_FFN, &info), 0);
	assert_int_equal(info.n_tensors, 7);
	assert_int_equal(info.bytes, 2 * 3 * (N_EXPERTS + 1) * WIDTH * HIDDEN + 2 * 3 * HIDDEN + 4 * 3);
}

static void a_fused_tensor_is_listed_once(void **state)
{
	struct afd_model_info info = { .size = sizeof(info) };
	struct afd_tensor_info t = { .size = sizeof(t) };
	uint32_t i, n_fused = 0;

	lend_fused(AFD_DTYPE_BF16);
	open_model(DEEPSEEK);
	assert_int_equal(afd_model_info(model, &info), 0);
	for (i = 0; i < info.n_tensors; i++) {
		if (afd_model_tensor(model, i, &t))
			continue;
		assert_int_equal(t.n_dims, 3);
		assert_int_equal(t.role, AFD_ROLE_FFN);
		n_fused++;
	}
	assert_int_equal(n_fused, 2);
}

static void the_contract_says_how_rows_are_routed(void **state)
{
	struct afd_contract c = { .size = sizeof(c) };

	lend_fused(AFD_DTYPE_BF16);
	open_model(AFMOE);
	assert_int_equal(afd_model_contract(model, &c), 0);
	assert_int_equal(c.ffn_kinds[0], AFD_FFN_MOE);
	assert_int_equal(c.n_experts, 3);
	assert_int_equal(c.top_k, 2);
	assert_int_equal(c.router, AFD_ROUTER_SIGMOID);
	assert_int_equal(c.shared_experts, 1);
}

static void a_contract_of_dense_layers_has_no_experts(void **state)
{
	struct afd_contract c = { .size = sizeof(c) };

	lend(&lent, AFD_DTYPE_F32, HIDDEN, 0, 0, "model.norm.weight");
	open_model(
		"{\"model_type\":\"qwen3_moe\",\"hidden_size\":136,\"num_hidden_layers\":1,\"vocab_size\":5,"
		"\"num_attention_heads\":2,\"head_dim\":4,\"num_experts\":3,\"num_experts_per_tok\":2,"
		"\"moe_intermediate_size\":96,\"intermediate_size\":9,"
		"\"mlp_only_layers\":[0]}");
	assert_int_equal(afd_model_contract(model, &c), 0);
	assert_int_equal(c.n_experts, 0);
	assert_int_equal(c.top_k, 0);
	assert_int_equal(c.router, AFD_ROUTER_NONE);
	assert_int_equal(c.shared_experts, 0);
}

/* ---- all cases ---- */

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)

static const struct CMUnitTest single[] = {
	T(experts_that_lie_apart_are_found),
	T(fused_experts_are_the_same_matrices),
	T(stacked_experts_are_the_same_matrices),
	T(experts_numbered_as_minimax_does_are_the_same_matrices),
	T(experts_numbered_inside_mlp_are_the_same_matrices),
	T(a_missing_expert_is_told_with_every_name_that_was_looked_for),
	T(fused_experts_of_another_order_are_refused_with_both_shapes),
	T(fused_experts_without_their_own_dimension_are_refused),
	T(the_attention_gate_is_not_the_gate_of_a_dense_ffn),
	T(a_bias_of_the_selection_keeps_its_dtype),
	T(a_missing_bias_of_the_selection_is_refused_by_name),
	T(a_norm_over_the_whole_of_q_is_refused),
	T(the_attention_of_an_ffn_only_family_is_refused_by_name),
	T(an_attention_stage_of_an_ffn_only_family_is_refused_by_name),
	T(the_ffn_role_has_router_and_experts_and_shared_experts),
	T(a_fused_tensor_is_listed_once),
	T(the_contract_says_how_rows_are_routed),
	T(a_contract_of_dense_layers_has_no_experts),
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(spellings)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(spellings); i++)
		tests[n++] = (struct CMUnitTest){ spellings[i].name, check_spelling, begin, end, (void *)&spellings[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
