/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Draws an id from a row of logits, as afd_sample does: candidates stand in one order, the larger
 * logit first and among equals the lower id; top_k and top_p cut it, and the draw walks along it. A
 * block does a row. Nothing is sorted: a place in the order is found digit by digit of the logit, in
 * histograms of what stands before it.
 *
 * Invariant: weights are integers, so sums are the same in any order, and the id depends on nothing
 * but the row, its parameters, seed and position: from the same logits it is the CPU's.
 */
#include "../draw.h"
#include "dispatch.h"

enum { THREADS = 1024, WARPS = THREADS / 32, BUCKETS = 2 * THREADS, NONE = 0x7fffffff };

/* What the threads of the block tell each other. */
struct sample_memory {
	uint64_t histogram[BUCKETS];
	uint64_t sums[WARPS];
	float values[WARPS];
	int32_t ids[WARPS], broken[WARPS];
	uint64_t before, rest;
	uint32_t bucket;
};

/* A row, and the candidates that are left: those before `key`, and of those with it up to last_id.
 * Keys ascend as logits fall. */
struct sample_row {
	const float *x;
	uint32_t width, key;
	int32_t last_id;
	struct afd__draw draw;
};

GPU_FN uint64_t weight_of(const sample_row &r, float x)
{
	return afd__draw_weight(&r.draw, x);
}

GPU_FN bool is_candidate(const sample_row &r, uint32_t key, uint32_t i)
{
	return key < r.key || (key == r.key && (int32_t)i <= r.last_id);
}

/* Sum over the lanes up to this one. */
GPU_FN uint64_t sum_through(uint64_t v)
{
	GPU_UNROLL
	for (unsigned step = 1; step < 32; step *= 2) {
		uint64_t other = shuffle(v, lane_id() - step);

		if (lane_id() >= step)
			v += other;
	}
	return v;
}

/* Sum over the threads before this one; *all: over all of them. The memory is free again. */
GPU_FN uint64_t sum_before(sample_memory *m, uint64_t v, uint64_t *all)
{
	uint64_t through = sum_through(v), warps, before;

	if (lane_id() == 31)
		m->sums[warp_id()] = through;
	barrier();
	warps = sum_through(m->sums[lane_id()]); /* a lane for each warp */
	barrier();
	*all = shuffle(warps, WARPS - 1);
	before = shuffle(warps, warp_id() - 1);
	return (warp_id() ? before : 0) + through - v;
}

GPU_FN void join_warp(float *value, int *id, int *broken)
{
	GPU_UNROLL
	for (unsigned lanes = 16; lanes; lanes /= 2) {
		float v = shuffle_xor(*value, lanes);
		int i = shuffle_xor(*id, lanes), b = shuffle_xor(*broken, lanes);

		if (v > *value || (v == *value && i < *id)) {
			*value = v;
			*id = i;
		}
		*broken = b < *broken ? b : *broken;
	}
}

/* Finds the largest logit and its id, or the first that is not finite. */
GPU_FN void find_largest(
	sample_memory *m, const float *x, uint32_t width, float *value, int *id, int *broken)
{
	*value = -INFINITY;
	*id = *broken = NONE;
	for (unsigned i = thread_x(); i < width; i += THREADS) {
		if (!is_finite(x[i]))
			*broken = *broken == NONE ? (int)i : *broken;
		if (x[i] > *value) {
			*value = x[i];
			*id = (int)i;
		}
	}
	join_warp(value, id, broken);
	if (lane_id() == 0) {
		m->values[warp_id()] = *value;
		m->ids[warp_id()] = *id;
		m->broken[warp_id()] = *broken;
	}
	barrier();
	*value = m->values[lane_id()];
	*id = m->ids[lane_id()];
	*broken = m->broken[lane_id()];
	join_warp(value, id, broken);
}

/* Takes one digit: which bucket of the candidates whose keys begin as `prefix` does holds the place
 * `rest` units behind their beginning. */
GPU_FN void take_digit(sample_memory *m, const sample_row &r, uint32_t prefix, unsigned shift,
	unsigned bits, bool by_weight, uint64_t rest)
{
	uint64_t all, first, second;

	m->histogram[thread_x()] = m->histogram[thread_x() + THREADS] = 0;
	barrier();
	for (unsigned i = thread_x(); i < r.width; i += THREADS) {
		uint32_t key = afd__draw_key(r.x[i]);

		if ((uint64_t)key >> (shift + bits) == (uint64_t)prefix >> (shift + bits) &&
			is_candidate(r, key, i))
			add_shared(&m->histogram[key >> shift & ((1u << bits) - 1)],
				by_weight ? weight_of(r, r.x[i]) : 1);
	}
	barrier();
	first = m->histogram[2 * thread_x()];
	second = m->histogram[2 * thread_x() + 1];
	uint64_t before = sum_before(m, first + second, &all);
	if (rest >= before && rest - before < first + second) {
		bool is_second = rest - before >= first;

		m->bucket = 2 * thread_x() + is_second;
		m->rest = rest - before - (is_second ? first : 0);
	}
	barrier();
}

/* The id of number `which` of the candidates with this key, ascending. */
GPU_FN int32_t find_equal(sample_memory *m, const sample_row &r, uint32_t key, uint64_t which)
{
	uint32_t each = (uint32_t)divide_up(r.width, THREADS), begin = thread_x() * each,
		 end = begin < r.width ? least(begin + each, r.width) : begin;
	uint64_t n = 0, all, before;

	for (uint32_t i = begin; i < end; i++)
		n += afd__draw_key(r.x[i]) == key;
	before = sum_before(m, n, &all);
	for (uint32_t i = begin; i < end && which >= before && which < before + n; i++) {
		if (afd__draw_key(r.x[i]) == key && which == before++) {
			m->bucket = i;
			break;
		}
	}
	barrier();
	int32_t id = (int32_t)m->bucket;
	barrier(); /* all have read it */
	return id;
}

/* The candidate that holds the place `at`, counted in candidates or in weight; *key is its key, and
 * the rest of the place in it is returned. */
GPU_FN int32_t find_place(
	sample_memory *m, const sample_row &r, bool by_weight, uint64_t at, uint32_t *key, uint64_t *rest)
{
	uint32_t prefix = 0;

	*rest = at;
	for (unsigned digit = 0; digit < 3; digit++) {
		unsigned bits = digit < 2 ? 11 : 10, shift = digit == 0 ? 21 : digit == 1 ? 10 : 0;

		take_digit(m, r, prefix, shift, bits, by_weight, *rest);
		prefix |= m->bucket << shift;
		*rest = m->rest;
		barrier(); /* all have read them */
	}
	uint64_t each = by_weight ? weight_of(r, afd__draw_logit(prefix)) : 1;
	uint64_t which = *rest / each;
	*rest %= each;
	*key = prefix;
	return find_equal(m, r, prefix, which);
}

GPU_FN uint64_t sum_weights(sample_memory *m, const sample_row &r)
{
	uint64_t sum = 0, all;

	for (unsigned i = thread_x(); i < r.width; i += THREADS) {
		if (is_candidate(r, afd__draw_key(r.x[i]), i))
			sum += weight_of(r, r.x[i]);
	}
	sum_before(m, sum, &all);
	return all;
}

/* The weights that stand in the order up to the candidate at the place `at`. */
GPU_FN uint64_t weight_through(const sample_row &r, uint64_t at, uint64_t rest)
{
	return at - rest + weight_of(r, afd__draw_logit(r.key));
}

GPU_KERNEL(THREADS, 1) sample_kernel(struct afd__sample_args a)
{
	GPU_SHARED(sample_memory, m, 1);
	size_t row = block_x();
	const struct afd__sample_row &p = a.rows[row]; /* read when wanted: registers are few */
	sample_row r = { a.logits + row * a.width, a.width, 0xffffffff, NONE, {} };
	int32_t id, broken;
	uint64_t rest, sum, at;
	uint32_t key;
	float largest;

	find_largest(m, r.x, r.width, &largest, &id, &broken);
	if (broken != NONE || p.temperature == 0) { /* the whole block */
		if (thread_x() == 0)
			a.ids[row] = broken != NONE ? -1 - broken : id;
		return;
	}
	r.draw = afd__draw_of(largest, p.temperature, r.width);
	if (p.top_k && p.top_k < r.width) {
		r.last_id = find_place(m, r, false, p.top_k - 1, &key, &rest);
		r.key = key;
	}
	sum = sum_weights(m, r);
	if (p.top_p > 0 && p.top_p < 1) {
		at = afd__draw_last_place(p.top_p, sum);
		r.last_id = find_place(m, r, true, at, &key, &rest);
		r.key = key;
		sum = weight_through(r, at, rest);
	}
	at = afd__draw_place(afd__draw_uniform(p.seed, p.position), sum);
	id = find_place(m, r, true, at, &key, &rest);
	if (thread_x() == 0)
		a.ids[row] = id;
}

int afd_gpu_sample(const struct afd_gpu *gpu, const struct afd__sample_args *a)
{
	return gpu_launch(gpu, "sample", sample_kernel, { a->n_rows, 1, 1 }, THREADS, 0, *a);
}
