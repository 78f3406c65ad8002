/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Models with experts for tests of FFN stages: golden checkpoints, or drawn numbers for every FFN
 * tensor that a config.json asks for. And what an attention stage does with a router, by the
 * device's own operations.
 */
#ifndef AFD_TEST_ROUTED_MODEL_H
#define AFD_TEST_ROUTED_MODEL_H

#include "ffn_reference.h"
#include "lent_model.h"

#include "../../lib/ffn/ffn.h"

#define ROUTED_SIZES \
	"\"hidden_size\":%u,\"num_hidden_layers\":%u,\"intermediate_size\":%u," \
	"\"moe_intermediate_size\":%u,\"num_experts_per_tok\":%u,\"vocab_size\":32," \
	"\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":8,\"rms_norm_eps\":1e-" \
	"6," \
	"\"hidden_act\":\"silu\",\"torch_dtype\":\"float32\","

/* What routed_model_open() fills a family's text with. */
struct routed_sizes {
	uint32_t hidden, n_layers, width, expert_width, top_k, n_experts;
};

static const char qwen3_moe[] =
	"{\"model_type\":\"qwen3_moe\",\"architectures\":[\"Qwen3MoeForCausalLM\"]," ROUTED_SIZES
	"\"rope_theta\":10000.0,\"tie_word_embeddings\":true,\"norm_topk_prob\":true,"
	"\"num_experts\":%u}";
static const char deepseek_v3[] =
	"{\"model_type\":\"deepseek_v3\",\"architectures\":[\"DeepseekV3ForCausalLM\"]"
	"," ROUTED_SIZES
	"\"n_shared_experts\":1,\"first_k_dense_replace\":1,\"routed_scaling_factor\":2.5,"
	"\"scoring_func\":\"sigmoid\",\"topk_method\":\"noaux_tc\",\"n_group\":4,\"topk_group\":2,"
	"\"norm_topk_prob\":true,\"n_routed_experts\":%u}";

struct routed_model {
	struct lent_model lent;
	afd_model *model;
	uint64_t seed;
};

static inline void draw_tensor(struct routed_model *m, void *data, uint64_t n, int32_t dtype)
{
	for (uint64_t i = 0; i < n; i++) {
		if (dtype != AFD_DTYPE_FP8)
			draw_number(&m->seed, data, i, dtype);
		else /* of any sign and size, but never NaN */
			((uint8_t *)data)[i] = (uint8_t)(drawn(&m->seed) * 128 + 128) & 0xf7;
	}
}

static inline void lend_slot(
	struct routed_model *m, const struct afd__slot *slot, int32_t dtype, uint64_t columns)
{
	bool quantized =
		dtype == AFD_DTYPE_FP8 && slot->n_dims == 2 && slot->kind != AFD__TENSOR_ROUTER;
	int32_t stored = dtype != AFD_DTYPE_FP8 || quantized ? dtype : AFD_DTYPE_BF16;
	uint64_t rows = (slot->shape[0] + 127) / 128, blocks = (columns + 127) / 128;
	void *data = lend(&m->lent, stored, slot->shape[0], slot->n_dims > 1 ? columns : 0, 0, "%s",
		slot->name);

	draw_tensor(m, data, slot->shape[0] * columns, stored);
	if (!quantized)
		return;
	data = lend(&m->lent, AFD_DTYPE_F32, rows, blocks, 0, "%s_scale_inv", slot->name);
	for (uint64_t i = 0; i < rows * blocks; i++)
		((float *)data)[i] = (1.5f + drawn(&m->seed)) / 1024;
}

/* Every FFN tensor of the family drawn in a dtype. */
static inline void routed_model_open(struct routed_model *m, afd_context *ctx, const char *family,
	const struct routed_sizes *s, int32_t dtype)
{
	char config[1200];
	afd_model *bare;

	*m = (struct routed_model){ .seed = 29 };
	snprintf(config, sizeof(config), family, s->hidden, s->n_layers, s->width, s->expert_width,
		s->top_k, s->n_experts);
	lend(&m->lent, AFD_DTYPE_F32, 1, 0, 0, "of_nobody");
	if (open_lent(&bare, ctx, &m->lent, config))
		fail_msg("%s", afd_last_error());
	for (uint32_t i = 0; i < bare->n_slots; i++) {
		const struct afd__slot *slot = &bare->slots[i];

		if (slot->role & AFD_ROLE_FFN)
			lend_slot(m, slot, dtype, slot->n_dims > 1 ? slot->shape[1] : 1);
	}
	afd_model_close(bare);
	if (open_lent(&m->model, ctx, &m->lent, config))
		fail_msg("%s", afd_last_error());
}

static inline void routed_model_close(struct routed_model *m)
{
	afd_model_close(m->model);
	free_lent(&m->lent);
}

/* ---- attention's side of the gate ---- */

static inline float *device_floats(struct afd__device *dev, size_t n)
{
	void *memory;

	assert_int_equal(afd__device_alloc(dev, n * sizeof(float), "test", &memory), 0);
	return memory;
}

struct gate {
	struct afd__device *dev;
	struct afd__queue q;
	struct afd__matrix router;
	float *x, *logits, *bias, *weights;
	int32_t *ids;
};

static inline void gate_load_bias(struct gate *g, const struct afd__tensor *t)
{
	float *numbers = malloc(t->shape[0] * sizeof(float));

	for (uint64_t e = 0; e < t->shape[0]; e++)
		numbers[e] = (float)number_at(t->data, e, t->dtype);
	g->bias = device_floats(g->dev, t->shape[0]);
	assert_int_equal(
		afd__queue_upload(&g->q, g->bias, numbers, t->shape[0] * sizeof(float)), 0);
	free(numbers);
}

static inline void gate_open(
	struct gate *g, const struct afd_model *m, uint32_t layer, uint32_t n_rows)
{
	const struct afd__layer *l = &m->arch.layers[layer];
	struct afd__tensor t;

	*g = (struct gate){ 0 };
	assert_int_equal(afd__device_open(&g->dev, m->ctx, test_device()), 0);
	assert_int_equal(afd__queue_open(&g->q, g->dev), 0);
	assert_int_equal(afd__model_tensor(m, (int32_t)layer, AFD__TENSOR_ROUTER, &t), 0);
	assert_int_equal(afd__matrix_create(g->dev, &g->router, (uint32_t)t.shape[0],
				 (uint32_t)t.shape[1], t.dtype, NULL),
		0);
	assert_int_equal(afd__matrix_load(g->dev, &g->router, t.data, 0, (uint32_t)t.shape[0]), 0);
	g->x = device_floats(g->dev, (size_t)n_rows * m->arch.hidden_size);
	g->logits = device_floats(g->dev, (size_t)n_rows * l->n_experts);
	g->weights = device_floats(g->dev, (size_t)n_rows * l->top_k);
	g->ids = (int32_t *)device_floats(g->dev, (size_t)n_rows * l->top_k);
	if (l->router.bias) {
		assert_int_equal(
			afd__model_tensor(m, (int32_t)layer, AFD__TENSOR_ROUTER_BIAS, &t), 0);
		gate_load_bias(g, &t);
	}
}

static inline void gate_close(
	struct gate *g, const struct afd_model *m, uint32_t layer, uint32_t n_rows)
{
	const struct afd__layer *l = &m->arch.layers[layer];
	size_t n_slots = (size_t)n_rows * l->top_k;

	afd__queue_close(&g->q);
	afd__matrix_destroy(g->dev, &g->router);
	afd__device_free(g->dev, g->x, (size_t)n_rows * m->arch.hidden_size * sizeof(float));
	afd__device_free(g->dev, g->logits, (size_t)n_rows * l->n_experts * sizeof(float));
	afd__device_free(g->dev, g->weights, n_slots * sizeof(float));
	afd__device_free(g->dev, g->ids, n_slots * sizeof(float));
	if (g->bias)
		afd__device_free(g->dev, g->bias, l->n_experts * sizeof(float));
	afd__device_close(g->dev);
}

/* ids and weights [n_rows][top_k] of rows x, as an attention stage finds them. */
static inline void gate_rows(const struct afd_model *m, uint32_t layer, uint32_t n_rows,
	const float *x, int32_t *ids, float *weights)
{
	const struct afd__layer *l = &m->arch.layers[layer];
	size_t slot_bytes = (size_t)n_rows * l->top_k * sizeof(float);
	uint32_t hidden = m->arch.hidden_size;
	struct gate g;
	uint64_t ticket;

	gate_open(&g, m, layer, n_rows);
	const struct afd__product_args product = { .x = g.x,
		.w = g.router,
		.y = g.logits,
		.x_stride = hidden,
		.y_stride = l->n_experts,
		.n_rows = n_rows };
	const struct afd__route_args route = { .logits = g.logits,
		.bias = g.bias,
		.ids = g.ids,
		.weights = g.weights,
		.n_rows = n_rows,
		.n_experts = l->n_experts,
		.top_k = l->top_k,
		.n_groups = l->router.n_groups,
		.top_groups = l->router.top_groups,
		.score = l->router.score,
		.normalize = l->router.normalize,
		.epsilon = l->router.epsilon,
		.scale = l->router.scale };

	assert_int_equal(
		afd__queue_upload(&g.q, g.x, x, (size_t)n_rows * hidden * sizeof(float)), 0);
	assert_int_equal(afd__product(&g.q, &product), 0);
	if (afd__route(&g.q, &route))
		fail_msg("%s", afd_last_error());
	assert_int_equal(afd__queue_download(&g.q, ids, g.ids, slot_bytes), 0);
	assert_int_equal(afd__queue_download(&g.q, weights, g.weights, slot_bytes), 0);
	assert_int_equal(afd__queue_ticket(&g.q, &ticket), 0);
	assert_int_equal(afd__queue_wait(&g.q, ticket, 0, "test"), 0);
	gate_close(&g, m, layer, n_rows);
}

/* ---- stages ---- */

static inline afd_ffn *routed_stage(
	const afd_model *model, const struct afd_shard *shard, uint32_t max_rows)
{
	struct afd_ffn_params params = {
		.size = sizeof(params), .device = test_device(), .max_rows = max_rows
	};
	afd_ffn *ffn;

	if (shard)
		params.shard = *shard;
	if (afd_ffn_create(&ffn, model, NULL, &params))
		fail_msg("%s", afd_last_error());
	return ffn;
}

/* ids NULL: the stage routes. */
static inline void routed_forward(afd_ffn *ffn, uint32_t layer, uint32_t n_rows, const float *x,
	const int32_t *ids, const float *weights, uint32_t top_k, float *y)
{
	struct afd_ffn_rows rows = { .size = sizeof(rows),
		.layer = (int32_t)layer,
		.n_rows = n_rows,
		.x = x,
		.y = y,
		.ids = ids,
		.weights = weights,
		.top_k = ids ? top_k : 0 };

	if (afd_ffn_forward(ffn, &rows))
		fail_msg("layer %u: %s", layer, afd_last_error());
}

static inline double nmse_of(const float *y, const double *expected, size_t n)
{
	double error = 0, size = 0;

	for (size_t i = 0; i < n; i++) {
		error += (y[i] - expected[i]) * (y[i] - expected[i]);
		size += expected[i] * expected[i];
	}
	return size == 0 ? error : error / size;
}

#endif
