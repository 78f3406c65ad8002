/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A layer's FFN computed plainly in double precision, from the tensors of an opened model and its
 * description: dense, or router, experts and shared experts. What the stage computes is held
 * against it. Nothing of lib/ffn or the kernels is used here.
 */
#ifndef AFD_TEST_FFN_REFERENCE_H
#define AFD_TEST_FFN_REFERENCE_H

#include "../system/ffn_model.h"

#include <stdbool.h>

#include "../../lib/model/model.h"

enum { REFERENCE_TOP_K = 16, REFERENCE_EXPERTS = 64 };

/* 1 sign, 4 bits of exponent with bias 7, 3 of fraction; no infinity. */
static inline double e4m3(uint8_t bits)
{
	int exponent = bits >> 3 & 15, fraction = bits & 7;
	double x = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);

	if ((bits & 127) == 127)
		return NAN;
	return bits & 128 ? -x : x;
}

static inline double weight_at(const struct afd__tensor *t, uint64_t row, uint64_t column)
{
	uint64_t at = row * (t->n_dims > 1 ? t->shape[1] : 1) + column;
	uint64_t block;

	if (t->dtype != AFD_DTYPE_FP8)
		return number_at(t->data, at, t->dtype);
	block = (t->scales.row_offset + row) / 128 * t->scales.columns + column / 128;
	return e4m3(((const uint8_t *)t->data)[at]) *
	       number_at(t->scales.data, block, t->scales.dtype);
}

/* y = x w^T */
static inline void reference_product(const struct afd__tensor *w, const double *x, double *y)
{
	for (uint64_t i = 0; i < w->shape[0]; i++) {
		y[i] = 0;
		for (uint64_t k = 0; k < w->shape[1]; k++)
			y[i] += x[k] * weight_at(w, i, k);
	}
}

/* y += weight * down(silu(gate x) * up x) */
static inline void reference_mlp(
	const struct afd__tensor w[3], const double *x, double weight, double *y)
{
	uint64_t width = w[0].shape[0], hidden = w[2].shape[0];
	double *a = calloc(2 * width + hidden, sizeof(*a)), *up = a + width, *out = up + width;

	assert_non_null(a);
	reference_product(&w[0], x, a);
	reference_product(&w[1], x, up);
	for (uint64_t i = 0; i < width; i++)
		a[i] = a[i] / (1 + exp(-a[i])) * up[i];
	reference_product(&w[2], a, out);
	for (uint64_t i = 0; i < hidden; i++)
		y[i] += weight * out[i];
	free(a);
}

static inline void reference_tensors(const struct afd_model *m, uint32_t layer, int expert,
	int32_t first_kind, struct afd__tensor t[3])
{
	for (int i = 0; i < 3; i++) {
		int rc = expert < 0 ? afd__model_tensor(m, (int32_t)layer, first_kind + i, &t[i])
				    : afd__model_expert(m, (int32_t)layer, (uint32_t)expert,
					      first_kind + i, &t[i]);

		if (rc)
			fail_msg("%s", afd_last_error());
	}
}

/* ---- routing ---- */

static inline int best_of(const double *x, const bool *taken, int n)
{
	int best = -1;

	for (int i = 0; i < n; i++) {
		if (!taken[i] && (best < 0 || x[i] > x[best]))
			best = i;
	}
	return best;
}

/* Takes all experts that are in none of the best groups. */
static inline void leave_groups_out(
	const struct afd__layer *l, const double *selection, bool *taken)
{
	int n = (int)(l->n_experts / l->router.n_groups);
	double score[REFERENCE_EXPERTS];
	bool kept[REFERENCE_EXPERTS] = { false };

	for (uint32_t g = 0; g < l->router.n_groups; g++) {
		bool first[REFERENCE_EXPERTS] = { false };
		const double *x = selection + g * n;
		int best = best_of(x, first, n);

		first[best] = true;
		score[g] = x[best] + x[best_of(x, first, n)];
	}
	for (uint32_t i = 0; i < l->router.top_groups; i++)
		kept[best_of(score, kept, (int)l->router.n_groups)] = true;
	for (uint32_t e = 0; e < l->n_experts; e++)
		taken[e] = !kept[e / n];
}

/* logits become scores. */
static inline void reference_scores(const struct afd__layer *l, double *logits)
{
	double sum = 0, most = logits[0];

	for (uint32_t e = 0; e < l->n_experts; e++)
		most = logits[e] > most ? logits[e] : most;
	for (uint32_t e = 0; e < l->n_experts; e++) {
		logits[e] = l->router.score == AFD_ROUTER_SIGMOID ? 1 / (1 + exp(-logits[e]))
								  : exp(logits[e] - most);
		sum += logits[e];
	}
	for (uint32_t e = 0; l->router.score == AFD_ROUTER_SOFTMAX && e < l->n_experts; e++)
		logits[e] /= sum;
}

static inline void reference_route(
	const struct afd_model *m, uint32_t layer, const double *x, int32_t *ids, double *weights)
{
	const struct afd__layer *l = &m->arch.layers[layer];
	double score[REFERENCE_EXPERTS], selection[REFERENCE_EXPERTS], sum = 0;
	bool taken[REFERENCE_EXPERTS] = { false };
	struct afd__tensor router, bias;

	assert_true(l->n_experts <= REFERENCE_EXPERTS && l->top_k <= REFERENCE_TOP_K);
	assert_int_equal(afd__model_tensor(m, (int32_t)layer, AFD__TENSOR_ROUTER, &router), 0);
	reference_product(&router, x, score);
	reference_scores(l, score);
	memcpy(selection, score, sizeof(score));
	if (l->router.bias) {
		assert_int_equal(
			afd__model_tensor(m, (int32_t)layer, AFD__TENSOR_ROUTER_BIAS, &bias), 0);
		for (uint32_t e = 0; e < l->n_experts; e++)
			selection[e] += weight_at(&bias, e, 0);
	}
	if (l->router.n_groups > 1)
		leave_groups_out(l, selection, taken);
	for (uint32_t i = 0; i < l->top_k; i++) {
		ids[i] = best_of(selection, taken, (int)l->n_experts);
		taken[ids[i]] = true;
		weights[i] = score[ids[i]];
		sum += weights[i];
	}
	for (uint32_t i = 0; i < l->top_k; i++)
		weights[i] = (l->router.normalize ? weights[i] / (sum + l->router.epsilon)
						  : weights[i]) *
			     l->router.scale;
}

/* ---- a layer ---- */

static inline void reference_row(
	const struct afd_model *m, uint32_t layer, const float *row, double *y)
{
	const struct afd__layer *l = &m->arch.layers[layer];
	uint32_t hidden = m->arch.hidden_size;
	double *x = calloc(hidden, sizeof(*x)), weights[REFERENCE_TOP_K];
	int32_t ids[REFERENCE_TOP_K];
	struct afd__tensor t[3];

	assert_non_null(x);
	for (uint32_t k = 0; k < hidden; k++) {
		x[k] = row[k];
		y[k] = 0;
	}
	if (l->ffn_kind == AFD_FFN_DENSE || l->shared_size) {
		reference_tensors(m, layer, -1,
			l->shared_size ? AFD__TENSOR_SHARED_GATE : AFD__TENSOR_GATE, t);
		reference_mlp(t, x, 1, y);
	}
	if (l->ffn_kind == AFD_FFN_MOE) {
		reference_route(m, layer, x, ids, weights);
		for (uint32_t i = 0; i < l->top_k; i++) {
			reference_tensors(m, layer, ids[i], AFD__TENSOR_EXPERT_GATE, t);
			reference_mlp(t, x, weights[i], y);
		}
	}
	free(x);
}

#endif
