/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The router's choice: scores of all experts in float32, the top_k of score + bias, and their
 * weights, which know nothing of the bias. A warp does one row.
 *
 * Invariant: keys are floats as integers of the same order, 0 when taken or closed, 1 for what is no
 * number; so ids are distinct and in range whatever the logits are. Equal keys take the lower id.
 */
#include <afd/model.h>

#include "dispatch.h"

enum { TAKEN = 0, NO_NUMBER = 1 };

/* Any two floats compare as their keys do; -0 equals +0. */
GPU_FN uint32_t key_of(float x)
{
	uint32_t bits = bits_of(x + 0.0f);

	if ((bits & 0x7fffffff) > 0x7f800000)
		return NO_NUMBER;
	return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

GPU_FN float float_of_key(uint32_t key)
{
	return key == NO_NUMBER ? -INFINITY
				: float_of_bits(key & 0x80000000 ? key & 0x7fffffff : ~key);
}

/* The place of the largest of keys, the lowest among equals; taken by all lanes. */
GPU_FN unsigned take_best(uint32_t *keys, unsigned n)
{
	uint32_t best = 0;
	unsigned place = 0xffffffff;

	for (unsigned i = lane_id(); i < n; i += 32) {
		if (keys[i] > best) {
			best = keys[i];
			place = i;
		}
	}
	GPU_UNROLL
	for (unsigned lanes = 16; lanes; lanes /= 2) {
		uint32_t other = (uint32_t)shuffle_xor((int)best, lanes);
		unsigned at = (unsigned)shuffle_xor((int)place, lanes);

		if (other > best || (other == best && at < place)) {
			best = other;
			place = at;
		}
	}
	warp_sync(); /* others have read what is now taken */
	if (lane_id() == 0)
		keys[place] = TAKEN;
	warp_sync();
	return place;
}

GPU_FN void make_scores(const struct afd__route_args &a, const float *logits, float *scores)
{
	float largest = -INFINITY, sum = 0;

	if (a.score == AFD_ROUTER_SIGMOID) {
		for (unsigned i = lane_id(); i < a.n_experts; i += 32)
			scores[i] = 1 / (1 + expf(-logits[i]));
		return;
	}
	for (unsigned i = lane_id(); i < a.n_experts; i += 32)
		largest = fmaxf(largest, logits[i]);
	largest = warp_max(largest);
	for (unsigned i = lane_id(); i < a.n_experts; i += 32) {
		scores[i] = expf(logits[i] - largest);
		sum += scores[i];
	}
	sum = warp_sum(sum);
	for (unsigned i = lane_id(); i < a.n_experts; i += 32)
		scores[i] /= sum;
}

/* Closes the keys of all groups but the best top_groups; a group scores the sum of its two best. */
GPU_FN void close_groups(const struct afd__route_args &a, uint32_t *keys, uint32_t *groups)
{
	unsigned size = a.n_experts / a.n_groups;

	for (unsigned g = lane_id(); g < a.n_groups; g += 32) {
		uint32_t best = 0, second = 0;

		for (unsigned i = g * size; i < (g + 1) * size; i++) {
			if (keys[i] > best) {
				second = best;
				best = keys[i];
			} else if (keys[i] > second) {
				second = keys[i];
			}
		}
		groups[g] = size > 1 ? key_of(float_of_key(best) + float_of_key(second)) : best;
	}
	warp_sync();
	for (unsigned i = 0; i < a.top_groups; i++)
		take_best(groups, a.n_groups);
	for (unsigned i = lane_id(); i < a.n_experts; i += 32) {
		if (groups[i / size] != TAKEN)
			keys[i] = TAKEN;
	}
	warp_sync();
}

GPU_FN void weigh(const struct afd__route_args &a, const float *scores, const int32_t *ids,
	float *weights)
{
	float sum = 0;

	for (unsigned i = 0; i < a.top_k; i++)
		sum += scores[ids[i]];
	for (unsigned i = 0; i < a.top_k; i++) {
		float weight = scores[ids[i]];

		if (a.normalize)
			weight /= sum + a.epsilon;
		weights[i] = weight * a.scale;
	}
}

GPU_KERNEL(128) route_kernel(struct afd__route_args a, unsigned warp_words)
{
	GPU_DYNAMIC_SHARED(memory);
	size_t row = (size_t)block_x() * (block_threads() / 32) + warp_id();
	float *scores = (float *)memory + warp_id() * warp_words; /* [n_experts] */
	uint32_t *keys = (uint32_t *)scores + a.n_experts, *groups = keys + a.n_experts;
	int32_t *ids = a.ids + row * a.top_k;

	if (row >= a.n_rows) /* the whole warp */
		return;
	make_scores(a, a.logits + row * a.n_experts, scores);
	for (unsigned i = lane_id(); i < a.n_experts; i += 32)
		keys[i] = key_of(a.bias ? scores[i] + a.bias[i] : scores[i]);
	warp_sync();
	if (a.top_groups < a.n_groups)
		close_groups(a, keys, groups);
	for (unsigned i = 0; i < a.top_k; i++) {
		unsigned id = take_best(keys, a.n_experts);

		if (lane_id() == 0)
			ids[i] = (int32_t)id;
	}
	if (lane_id() == 0)
		weigh(a, scores, ids, a.weights + row * a.top_k);
}

int afd_gpu_route(const struct afd_gpu *gpu, const struct afd__route_args *a)
{
	unsigned warp_words = 2 * a->n_experts + (a->top_groups < a->n_groups ? a->n_groups : 0);
	unsigned warps = a->n_experts <= 512 ? 4 : 1;

	return gpu_launch(gpu, "route", route_kernel,
		{ (unsigned)divide_up(a->n_rows, warps), 1, 1 }, warps * 32,
		(size_t)warps * warp_words * 4, *a, warp_words);
}
