/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tensors of routed layers and of e4m3: an expert is the same matrix under the same name whether the checkpoint stores it apart,
 * fused or stacked, and under whatever spelling; scales come with the blocks that are theirs.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>

#include "../../lib/model/fingerprint.h"
#include "../../lib/model/model.h"
#include "lent_model.h"

/* Three experts of 96 in a hidden size of 136: up begins inside a block of gate when they are fused. */
enum { HIDDEN = 136, WIDTH = 96, N_EXPERTS = 3, BLOCKS = 2 };

#define MOE_OF(type, width) \
	"{\"model_type\":\"" type "\",\"hidden_size\":136,\"num_hidden_layers\":1,\"vocab_size\":5," \
	"\"num_attention_heads\":2,\"head_dim\":4,\"num_experts\":3,\"num_experts_per_tok\":2,\"moe_intermediate_size\":" width "," \
	"\"mlp_only_layers\":[]}"
#define MOE MOE_OF("qwen3_moe", "96")
#define AFMOE "{\"model_type\":\"afmoe\",\"hidden_size\":136,\"num_hidden_layers\":1,\"vocab_size\":5,\"num_attention_heads\":2," \
	"\"head_dim\":4,\"num_experts\":3,\"num_experts_per_tok\":2,\"moe_intermediate_size\":96,\"num_dense_layers\":0," \
	"\"num_shared_experts\":1,\"route_scale\":1,\"mup_enabled\":true,\"rms_norm_eps\":1e-5,\"sliding_window\":4}"
#define DEEPSEEK \
	"{\"model_type\":\"deepseek_v3\",\"hidden_size\":136,\"num_hidden_layers\":1,\"vocab_size\":5,\"n_routed_experts\":3," \
	"\"num_experts_per_tok\":2,\"moe_intermediate_size\":96,\"first_k_dense_replace\":0,\"n_shared_experts\":1," \
	"\"routed_scaling_factor\":2.5,\"norm_topk_prob\":true,\"n_group\":1,\"topk_group\":1}"
#define MINIMAX \
	"{\"model_type\":\"minimax_m2\",\"hidden_size\":136,\"num_hidden_layers\":1,\"vocab_size\":5,\"num_local_experts\":3," \
	"\"num_experts_per_tok\":2,\"intermediate_size\":96}"

static afd_context *ctx;
static afd_model *model;
static struct lent_model lent;

static int begin(void **state)
{
	model = NULL;
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_model_close(model);
	afd_context_destroy(ctx);
	free_lent(&lent);
	return 0;
}

static void open_model(const char *config)
{
	if (open_lent(&model, ctx, &lent, config))
		fail_msg("%s", afd_last_error());
}

/* ---- the same layer, stored in several ways ---- */

static unsigned which(unsigned expert, int32_t kind)
{
	return 10 * expert + (unsigned)(kind - AFD__TENSOR_EXPERT_GATE) + 1;
}

static void *lend_matrix(int32_t dtype, unsigned number, uint64_t rows, uint64_t columns, const char *name)
{
	void *data = lend(&lent, dtype, rows, columns, 0, "%s", name);

	put_matrix(data, dtype, number, rows, columns);
	return data;
}

static void lend_apart(int32_t dtype, const char *before, const char *const suffixes[3])
{
	char name[128];

	for (unsigned e = 0; e < N_EXPERTS; e++) {
		for (int part = 0; part < 3; part++) {
			bool down = part == 2;

			snprintf(name, sizeof(name), "model.layers.0.%s%u.%s.weight", before, e, suffixes[part]);
			lend_matrix(dtype, which(e, AFD__TENSOR_EXPERT_GATE + part), down ? HIDDEN : WIDTH, down ? WIDTH : HIDDEN,
				    name);
		}
	}
}

static const char *const usual[3] = { "gate_proj", "up_proj", "down_proj" };
static const char *const numbered[3] = { "w1", "w3", "w2" };

static void lend_fused(int32_t dtype)
{
	size_t matrix = (size_t)WIDTH * HIDDEN * lent_number_bytes(dtype);
	char *gate_up = lend(&lent, dtype, N_EXPERTS, 2 * WIDTH, HIDDEN, "model.layers.0.mlp.experts.gate_up_proj");
	char *down = lend(&lent, dtype, N_EXPERTS, HIDDEN, WIDTH, "model.layers.0.mlp.experts.down_proj");

	for (unsigned e = 0; e < N_EXPERTS; e++) {
		put_matrix(gate_up + 2 * e * matrix, dtype, which(e, AFD__TENSOR_EXPERT_GATE), WIDTH, HIDDEN);
		put_matrix(gate_up + (2 * e + 1) * matrix, dtype, which(e, AFD__TENSOR_EXPERT_UP), WIDTH, HIDDEN);
		put_matrix(down + e * matrix, dtype, which(e, AFD__TENSOR_EXPERT_DOWN), HIDDEN, WIDTH);
	}
}

static void lend_stacked(int32_t dtype)
{
	size_t matrix = (size_t)WIDTH * HIDDEN * lent_number_bytes(dtype);

	for (int part = 0; part < 3; part++) {
		uint64_t rows = part == 2 ? HIDDEN : WIDTH, columns = part == 2 ? WIDTH : HIDDEN;
		char *data = lend(&lent, dtype, N_EXPERTS, rows, columns, "model.layers.0.mlp.experts.%s.weight", usual[part]);

		for (unsigned e = 0; e < N_EXPERTS; e++)
			put_matrix(data + e * matrix, dtype, which(e, AFD__TENSOR_EXPERT_GATE + part), rows, columns);
	}
}

static void check_expert(unsigned expert, int32_t kind, int32_t dtype)
{
	bool down = kind == AFD__TENSOR_EXPERT_DOWN;
	uint64_t rows = down ? HIDDEN : WIDTH, columns = down ? WIDTH : HIDDEN;
	char *should = malloc((size_t)(rows * columns) * lent_number_bytes(dtype)), name[80];
	struct afd__tensor t;

	snprintf(name, sizeof(name), "model.layers.0.mlp.experts.%u.%s.weight", expert, usual[kind - AFD__TENSOR_EXPERT_GATE]);
	put_matrix(should, dtype, which(expert, kind), rows, columns);
	if (afd__model_expert(model, 0, expert, kind, &t))
		fail_msg("%s", afd_last_error());
	assert_string_equal(t.name, name);
	assert_int_equal(t.n_dims, 2);
	assert_int_equal(t.shape[0], rows);
	assert_int_equal(t.shape[1], columns);
	assert_int_equal(t.dtype, dtype);
	assert_int_equal(t.bytes, rows * columns * lent_number_bytes(dtype));
	assert_memory_equal(t.data, should, t.bytes);
	free(should);
}

static void check_experts(int32_t dtype)
{
	for (unsigned e = 0; e < N_EXPERTS; e++) {
		for (int32_t kind = AFD__TENSOR_EXPERT_GATE; kind <= AFD__TENSOR_EXPERT_DOWN; kind++)
			check_expert(e, kind, dtype);
	}
}

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
		"\"num_attention_heads\":2,\"head_dim\":4,\"num_experts\":3,\"num_experts_per_tok\":2,\"moe_intermediate_size\":96,\"intermediate_size\":9,"
		"\"mlp_only_layers\":[0]}");
	assert_int_equal(afd_model_contract(model, &c), 0);
	assert_int_equal(c.n_experts, 0);
	assert_int_equal(c.top_k, 0);
	assert_int_equal(c.router, AFD_ROUTER_NONE);
	assert_int_equal(c.shared_experts, 0);
}

/* ---- e4m3 ---- */

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
	T(the_attention_of_an_ffn_only_family_is_refused_by_name),
	T(the_ffn_role_has_router_and_experts_and_shared_experts),
	T(a_fused_tensor_is_listed_once),
	T(the_contract_says_how_rows_are_routed),
	T(a_contract_of_dense_layers_has_no_experts),
	T(float32_scales_are_found),
	T(bfloat16_scales_are_found),
	T(float16_scales_are_found_under_the_other_name),
	T(the_up_half_of_a_fused_tensor_says_where_in_a_block_it_begins),
	T(halves_of_whole_blocks_have_scales_of_their_own),
	T(scales_count_to_the_role_and_are_listed),
	T(a_router_in_e4m3_is_refused),
	T(a_norm_in_e4m3_is_refused),
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
	struct CMUnitTest tests[N(single) + N(spellings) + N(refusals)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(spellings); i++)
		tests[n++] = (struct CMUnitTest){ spellings[i].name, check_spelling, begin, end, (void *)&spellings[i] };
	for (i = 0; i < N(refusals); i++)
		tests[n++] = (struct CMUnitTest){ refusals[i].name, check_refusal, begin, end, (void *)&refusals[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
