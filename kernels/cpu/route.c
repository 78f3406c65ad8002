/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The router's choice: scores of all experts in float32, the top_k of score + bias, and their
 * weights, which know nothing of the bias. Equal scores take the lower id.
 *
 * Whatever the logits are, the ids of a row are distinct and in range: a number that is not
 * comparable only loses against those before it.
 */
#include <afd/model.h>

#include "variants.h"
#include "vec.h"

struct best {
	float *keys;  /* [n], largest first */
	int32_t *ids; /* [n] */
	uint32_t n, limit;
};

/* Candidates come with ascending ids, so an equal key stays behind. */
static void offer(struct best *b, float key, int32_t id)
{
	uint32_t i;

	if (b->n == b->limit) {
		if (!(key > b->keys[b->n - 1]))
			return;
		b->n--;
	}
	for (i = b->n++; i && key > b->keys[i - 1]; i--) {
		b->keys[i] = b->keys[i - 1];
		b->ids[i] = b->ids[i - 1];
	}
	b->keys[i] = key;
	b->ids[i] = id;
}

static void softmax(const float *logits, float *scores, uint32_t n)
{
	vec largest = vec_splat(logits[0]), sum = { 0 };
	uint32_t i;
	float top, total;

	for (i = 0; i + LANES <= n; i += LANES)
		largest = vec_max(vec_load(logits + i), largest);
	top = vec_largest(largest);
	for (; i < n; i++)
		top = logits[i] > top ? logits[i] : top;
	for (i = 0; i + LANES <= n; i += LANES) {
		vec v = vec_exp(vec_load(logits + i) - top);

		vec_store(scores + i, v);
		sum += v;
	}
	total = vec_sum(sum);
	if (i < n) {
		vec v = vec_exp(vec_load_some(logits + i, AFD_DTYPE_F32, n - i) - top);

		vec_store_some(scores + i, v, AFD_DTYPE_F32, n - i);
	}
	for (; i < n; i++)
		total += scores[i];
	for (i = 0; i < n; i++)
		scores[i] /= total;
}

static void sigmoid(const float *logits, float *scores, uint32_t n)
{
	for (uint32_t i = 0; i < n; i += LANES) {
		vec v = vec_load_some(logits + i, AFD_DTYPE_F32, n - i);

		vec_store_some(scores + i, 1.0f / (1.0f + vec_exp(-v)), AFD_DTYPE_F32, n - i);
	}
}

/* open[g] = 1 for the groups whose experts may be chosen. */
static void open_groups(const struct afd__route_args *a, const float *keys, uint8_t *open)
{
	uint32_t size = a->n_experts / a->n_groups;
	float group_keys[AFD_K_EXPERTS_MAX];
	int32_t group_ids[AFD_K_EXPERTS_MAX];
	struct best groups = { .keys = group_keys, .ids = group_ids, .limit = a->top_groups };

	for (uint32_t g = 0; g < a->n_groups; g++) {
		float two[2];
		int32_t ids[2];
		struct best best = { .keys = two, .ids = ids, .limit = 2 };

		for (uint32_t e = 0; e < size; e++)
			offer(&best, keys[g * size + e], (int32_t)e);
		offer(&groups, best.n > 1 ? two[0] + two[1] : two[0], (int32_t)g);
		open[g] = 0;
	}
	for (uint32_t i = 0; i < groups.n; i++)
		open[group_ids[i]] = 1;
}

static void choose(const struct afd__route_args *a, const float *keys, int32_t *ids)
{
	uint32_t size = a->n_experts / a->n_groups;
	uint8_t open[AFD_K_EXPERTS_MAX];
	float best_keys[AFD_K_TOP_K_MAX];
	struct best best = { .keys = best_keys, .ids = ids, .limit = a->top_k };

	if (a->top_groups < a->n_groups)
		open_groups(a, keys, open);
	else
		memset(open, 1, a->n_groups);
	for (uint32_t g = 0; g < a->n_groups; g++) {
		for (uint32_t e = g * size; open[g] && e < (g + 1) * size; e++)
			offer(&best, keys[e], (int32_t)e);
	}
}

static void weigh(const struct afd__route_args *a, const float *scores, const int32_t *ids,
	float *weights)
{
	float sum = 0;

	for (uint32_t i = 0; i < a->top_k; i++) {
		weights[i] = scores[ids[i]];
		sum += weights[i];
	}
	for (uint32_t i = 0; i < a->top_k; i++) {
		if (a->normalize)
			weights[i] /= sum + a->epsilon;
		weights[i] *= a->scale;
	}
}

void AFD_K(route)(const struct afd__route_args *a, uint32_t row0, uint32_t row1)
{
	float scores[AFD_K_EXPERTS_MAX], keys[AFD_K_EXPERTS_MAX]; /* [n_experts] */

	for (size_t row = row0; row < row1; row++) {
		const float *logits = a->logits + row * a->n_experts;
		int32_t *ids = a->ids + row * a->top_k;

		if (a->score == AFD_ROUTER_SOFTMAX)
			softmax(logits, scores, a->n_experts);
		else
			sigmoid(logits, scores, a->n_experts);
		for (uint32_t e = 0; a->bias && e < a->n_experts; e++)
			keys[e] = scores[e] + a->bias[e];
		choose(a, a->bias ? keys : scores, ids);
		weigh(a, scores, ids, a->weights + row * a->top_k);
	}
}
