/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model of FFN tensors in the test's memory, and its layers computed plainly in double precision.
 * Weights and rows are drawn from a seed, so every number can be had again. The tensors of
 * attention are missing: an FFN stage needs none.
 */
#ifndef AFD_TEST_FFN_MODEL_H
#define AFD_TEST_FFN_MODEL_H

#include <afd/afd.h>

#include <errno.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { FFN_MODEL_MAX_LAYERS = 8 };

struct ffn_model {
	uint32_t hidden, width, n_layers;
	int32_t dtype[3]; /* of gate, up and down */
	void *data[FFN_MODEL_MAX_LAYERS][3];
	afd_model *model;
};

/* ---- numbers ---- */

static inline float drawn(uint64_t *seed)
{
	*seed = *seed * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
	return (float)((double)(*seed >> 40) / (1 << 23) - 1);
}

static inline uint16_t bf16_of(float x)
{
	uint32_t bits;

	memcpy(&bits, &x, sizeof(bits));
	return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline double number_at(const void *data, size_t index, int32_t dtype)
{
	uint16_t h = dtype == AFD_DTYPE_F32 ? 0 : ((const uint16_t *)data)[index];
	uint32_t bits = (uint32_t)h << 16;
	float x;

	if (dtype == AFD_DTYPE_F32)
		return ((const float *)data)[index];
	if (dtype == AFD_DTYPE_BF16) {
		memcpy(&x, &bits, sizeof(x));
		return x;
	}
	if (!(h >> 10 & 31))
		return (h >> 15 ? -1 : 1) * ldexp(h & 1023, -24);
	return (h >> 15 ? -1 : 1) * ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25);
}

/* A drawn number that the dtype holds exactly: multiples of 2^-7 below 1. */
static inline void draw_number(uint64_t *seed, void *data, size_t index, int32_t dtype)
{
	float x = floorf(drawn(seed) * 128) / 128;
	int exponent;
	float fraction = frexpf(fabsf(x), &exponent);

	if (dtype == AFD_DTYPE_F32)
		((float *)data)[index] = drawn(seed);
	else if (dtype == AFD_DTYPE_BF16)
		((uint16_t *)data)[index] = bf16_of(x);
	else
		((uint16_t *)data)[index] =
			(uint16_t)(x == 0 ? 0
					  : (x < 0) << 15 | (exponent + 14) << 10 |
						    ((int)(fraction * 2048) & 1023));
}

/* ---- the model ---- */

static inline void ffn_model_config(const struct ffn_model *m, char *json, size_t capacity)
{
	snprintf(json, capacity,
		"{\"architectures\": [\"Qwen3ForCausalLM\"], \"model_type\": \"qwen3\", "
		"\"hidden_size\": %u, "
		"\"intermediate_size\": %u, \"num_hidden_layers\": %u, \"num_attention_heads\": 2, "
		"\"num_key_value_heads\": 1, \"head_dim\": 8, \"vocab_size\": 32, "
		"\"rms_norm_eps\": 1e-6, "
		"\"rope_theta\": 10000.0, \"hidden_act\": \"silu\", \"torch_dtype\": \"float32\", "
		"\"tie_word_embeddings\": true}",
		m->hidden, m->width, m->n_layers);
}

static inline void ffn_model_open(struct ffn_model *m, afd_context *ctx, int32_t weights)
{
	static const char *const kinds[3] = { "gate_proj", "up_proj", "down_proj" };
	const uint64_t shapes[3][2] = { { m->width, m->hidden }, { m->width, m->hidden },
		{ m->hidden, m->width } };
	char json[512], names[FFN_MODEL_MAX_LAYERS * 3][80];
	struct afd_tensor tensors[FFN_MODEL_MAX_LAYERS * 3];
	struct afd_model_params params = { .size = sizeof(params),
		.weights = weights,
		.config_json = json,
		.tensors = tensors,
		.tensor_bytes = sizeof(tensors[0]) };
	uint64_t seed = 11;

	ffn_model_config(m, json, sizeof(json));
	for (uint32_t n = 0; n < 3 * m->n_layers; n++) {
		uint32_t layer = n / 3, kind = n % 3;

		m->data[layer][kind] = malloc((size_t)m->hidden * m->width * 4);
		assert_non_null(m->data[layer][kind]);
		for (uint32_t i = 0; i < m->hidden * m->width; i++)
			draw_number(&seed, m->data[layer][kind], i, m->dtype[kind]);
		snprintf(names[n], sizeof(names[n]), "model.layers.%u.mlp.%s.weight", layer,
			kinds[kind]);
		tensors[n] = (struct afd_tensor){ .name = names[n],
			.shape = shapes[kind],
			.data = m->data[layer][kind],
			.n_dims = 2,
			.dtype = m->dtype[kind] };
	}
	params.n_tensors = 3 * m->n_layers;
	if (afd_model_open(&m->model, ctx, NULL, &params))
		fail_msg("model: %s", afd_last_error());
}

static inline void ffn_model_close(struct ffn_model *m)
{
	afd_model_close(m->model);
	for (uint32_t layer = 0; layer < m->n_layers; layer++) {
		for (int k = 0; k < 3; k++)
			free(m->data[layer][k]);
	}
}

/* y[hidden] of one row, in double. */
static inline void ffn_model_row(
	const struct ffn_model *m, uint32_t layer, const float *x, double *y)
{
	double *a = calloc(m->width, sizeof(*a));

	assert_non_null(a);
	for (uint32_t i = 0; i < m->width; i++) {
		double gate = 0, up = 0;

		for (uint32_t k = 0; k < m->hidden; k++) {
			gate += x[k] * number_at(m->data[layer][0], (size_t)i * m->hidden + k,
					       m->dtype[0]);
			up += x[k] *
			      number_at(m->data[layer][1], (size_t)i * m->hidden + k, m->dtype[1]);
		}
		a[i] = gate / (1 + exp(-gate)) * up;
	}
	for (uint32_t i = 0; i < m->hidden; i++) {
		y[i] = 0;
		for (uint32_t k = 0; k < m->width; k++)
			y[i] += a[k] *
				number_at(m->data[layer][2], (size_t)i * m->width + k, m->dtype[2]);
	}
	free(a);
}

/* ---- rows ---- */

/* Rows that every wire dtype holds exactly. */
static inline void draw_rows(float *x, size_t n, uint64_t seed)
{
	for (size_t i = 0; i < n; i++)
		x[i] = floorf(drawn(&seed) * 64) / 64;
}

static inline const char *test_device(void)
{
	const char *device = getenv("AFD_TEST_DEVICE");

	return device && *device ? device : "cpu";
}

#endif
