/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One routed layer of three experts, lent in each way that a checkpoint may store it, and the check that an expert is the same
 * matrix under the same name in all of them. Included by one test each.
 */
#ifndef AFD_TEST_EXPERT_LAYER_H
#define AFD_TEST_EXPERT_LAYER_H

#include <stdbool.h>

#include "../../lib/model/model.h"
#include "lent_model.h"

/* Three experts of 96 in a hidden size of 136: up begins inside a block of gate when they are fused. */
enum { HIDDEN = 136, WIDTH = 96, N_EXPERTS = 3, BLOCKS = 2 };

#define MOE_OF(type, width) \
	"{\"model_type\":\"" type "\",\"hidden_size\":136,\"num_hidden_layers\":1,\"vocab_size\":5," \
	"\"num_attention_heads\":2,\"head_dim\":4,\"num_experts\":3,\"num_experts_per_tok\":2," \
	"\"moe_intermediate_size\":" width "," \
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

static inline int begin(void **state)
{
	model = NULL;
	return afd_context_create(&ctx, NULL);
}

static inline int end(void **state)
{
	afd_model_close(model);
	afd_context_destroy(ctx);
	free_lent(&lent);
	return 0;
}

static inline void open_model(const char *config)
{
	if (open_lent(&model, ctx, &lent, config))
		fail_msg("%s", afd_last_error());
}

static inline unsigned which(unsigned expert, int32_t kind)
{
	return 10 * expert + (unsigned)(kind - AFD__TENSOR_EXPERT_GATE) + 1;
}

static inline void *lend_matrix(int32_t dtype, unsigned number, uint64_t rows, uint64_t columns, const char *name)
{
	void *data = lend(&lent, dtype, rows, columns, 0, "%s", name);

	put_matrix(data, dtype, number, rows, columns);
	return data;
}

static inline void lend_apart(int32_t dtype, const char *before, const char *const suffixes[3])
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

static inline void lend_fused(int32_t dtype)
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

static inline void lend_stacked(int32_t dtype)
{
	size_t matrix = (size_t)WIDTH * HIDDEN * lent_number_bytes(dtype);

	for (int part = 0; part < 3; part++) {
		uint64_t rows = part == 2 ? HIDDEN : WIDTH, columns = part == 2 ? WIDTH : HIDDEN;
		char *data = lend(&lent, dtype, N_EXPERTS, rows, columns, "model.layers.0.mlp.experts.%s.weight", usual[part]);

		for (unsigned e = 0; e < N_EXPERTS; e++)
			put_matrix(data + e * matrix, dtype, which(e, AFD__TENSOR_EXPERT_GATE + part), rows, columns);
	}
}

static inline void check_expert(unsigned expert, int32_t kind, int32_t dtype)
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

static inline void check_experts(int32_t dtype)
{
	for (unsigned e = 0; e < N_EXPERTS; e++) {
		for (int32_t kind = AFD__TENSOR_EXPERT_GATE; kind <= AFD__TENSOR_EXPERT_DOWN; kind++)
			check_expert(e, kind, dtype);
	}
}

#endif
