/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention of one row over its cached positions: softmax(q k^T * scale) v, one pass, with a
 * running maximum.
 *
 * Invariant: positions are combined in blocks at fixed absolute positions (block b covers 64 b ..
 * 64 b + 63), and inside a block in an order that only the positions decide. So pages, chunks,
 * neighbours and threads do not show in the bits. Positions that the row does not see are skipped;
 * their k and v are never read.
 *
 * A task is one row and one kv head with all its query heads, so that k and v stream from memory
 * once. The accumulators stand in `out`; nothing grows with head_dim.
 */
#include <math.h>

#include "variants.h"
#include "vec.h"

#define BLOCK 64
#define BATCH 4 /* query heads whose dot products and sums are in registers at once */

struct task {
	const struct afd__attend_args *a;
	const float *q;       /* [group][head_dim]: the query heads of this kv head */
	float *out;           /* [group][head_dim] */
	const int32_t *pages; /* of the sequence, in order of position */
	size_t head_bytes;    /* from a page to this kv head */
	uint32_t group;
	float score_scale, v_scale; /* the scales of an FP8 cache included */
};

struct block {
	const char *k[BLOCK]; /* k of each visible position; v is v_offset further */
	uint32_t first, end;  /* the visible ones: first .. end-1 */
	bool resume;          /* a block came before */
};

/* Where the k of positions first .. end-1 of block b lie. */
static void find_block(const struct task *t, uint32_t b, struct block *block)
{
	const struct afd__kv_view *kv = &t->a->kv;
	uint32_t position = b * BLOCK + block->first, page = position / kv->page_size,
		 offset = position % kv->page_size;

	for (uint32_t j = block->first; j < block->end; j++) {
		block->k[j] = (const char *)kv->data + (size_t)t->pages[page] * kv->page_stride +
			      t->head_bytes + offset * kv->position_stride;
		if (++offset == kv->page_size) {
			offset = 0;
			page++;
		}
	}
}

/* scores[h][j] = q[h] . k[j] * scale of n_heads heads; two positions at a time, the last one twice
 * when they are odd. */
INLINE void score_heads(const struct task *t, const struct block *block, const float *q,
	float scores[][BLOCK], const int n_heads, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim, number = dtype_bytes(dtype),
		     v_offset = t->a->kv.v_offset;

	for (uint32_t j = block->first; j < block->end; j += 2) {
		uint32_t next = j + 1 < block->end ? j + 1 : j;
		const char *k0 = block->k[j], *k1 = block->k[next];
		vec sum0[BATCH] = { { 0 } }, sum1[BATCH] = { { 0 } };
		size_t d = 0;

		for (; d + LANES <= head_dim; d += LANES) {
			vec x0 = vec_load_as(k0 + d * number, dtype),
			    x1 = vec_load_as(k1 + d * number, dtype);

			/* v is read column by column, which no hardware prefetcher follows. */
			__builtin_prefetch(k0 + v_offset + d * number);
			__builtin_prefetch(k1 + v_offset + d * number);
			for (int h = 0; h < n_heads; h++) {
				vec v = vec_load(q + h * head_dim + d);

				sum0[h] = vec_fma(v, x0, sum0[h]);
				sum1[h] = vec_fma(v, x1, sum1[h]);
			}
		}
		if (d < head_dim) {
			vec x0 = vec_load_some(k0 + d * number, dtype, head_dim - d);
			vec x1 = vec_load_some(k1 + d * number, dtype, head_dim - d);

			for (int h = 0; h < n_heads; h++) {
				vec v = vec_load_some(
					q + h * head_dim + d, AFD_DTYPE_F32, head_dim - d);

				sum0[h] = vec_fma(v, x0, sum0[h]);
				sum1[h] = vec_fma(v, x1, sum1[h]);
			}
		}
		for (int h = 0; h < n_heads; h++) {
			scores[h][j] = vec_sum(sum0[h]) * t->score_scale;
			scores[h][next] = vec_sum(sum1[h]) * t->score_scale;
		}
	}
}

/* Columns d .. d + n_columns - 1 (at most n_vecs vectors): out = out * keep + sum of p[j] * v[j], j
 * ascending. */
INLINE void add_columns(const struct task *t, const struct block *block, float p[][BLOCK],
	const float *keep, float *out, size_t d, size_t n_columns, const int n_heads,
	const int n_vecs, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim, number = dtype_bytes(dtype);
	const size_t from = t->a->kv.v_offset + d * number;
	vec sum[BATCH][2];

	for (int h = 0; h < n_heads; h++) {
		for (int i = 0; i < n_vecs; i++) {
			sum[h][i] = (vec){ 0 };
			if (block->resume)
				sum[h][i] =
					keep[h] * vec_load_some(out + h * head_dim + d + i * LANES,
							  AFD_DTYPE_F32, n_columns - i * LANES);
		}
	}
	for (uint32_t j = block->first; j < block->end; j++) {
		vec v[2];

		for (int i = 0; i < n_vecs; i++)
			v[i] = vec_load_some(block->k[j] + from + i * LANES * number, dtype,
				n_columns - i * LANES);
		for (int h = 0; h < n_heads; h++) {
			vec weight = vec_splat(p[h][j]);

			for (int i = 0; i < n_vecs; i++)
				sum[h][i] = vec_fma(weight, v[i], sum[h][i]);
		}
	}
	for (int h = 0; h < n_heads; h++) {
		for (int i = 0; i < n_vecs; i++)
			vec_store_some(out + h * head_dim + d + i * LANES, sum[h][i], AFD_DTYPE_F32,
				n_columns - i * LANES);
	}
}

INLINE void add_heads(const struct task *t, const struct block *block, float p[][BLOCK],
	const float *keep, float *out, const int n_heads, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim;
	size_t d = 0;

	for (; d + 2 * LANES <= head_dim; d += 2 * LANES)
		add_columns(t, block, p, keep, out, d, 2 * LANES, n_heads, 2, dtype);
	if (d + LANES <= head_dim) {
		add_columns(t, block, p, keep, out, d, LANES, n_heads, 1, dtype);
		d += LANES;
	}
	if (d < head_dim)
		add_columns(t, block, p, keep, out, d, head_dim - d, n_heads, 1, dtype);
}

/* Scores of one head to weights e^(score - maximum). Returns what earlier sums must be multiplied
 * with. */
static float weigh(float scores[BLOCK], const struct block *block, float *maximum, float *total)
{
	vec largest = vec_splat(-INFINITY), sum = { 0 };
	float before = *maximum, now, keep;

	/* e^-inf is +0, so what is not seen adds nothing to the total. */
	for (uint32_t j = 0; j < BLOCK; j++) {
		if (j < block->first || j >= block->end)
			scores[j] = -INFINITY;
	}
	for (uint32_t j = 0; j < BLOCK; j += LANES)
		largest = vec_max(vec_load(scores + j), largest);
	now = vec_largest(largest);
	if (block->resume && before > now)
		now = before;
	for (uint32_t j = 0; j < BLOCK; j += LANES) {
		vec weights = vec_exp(vec_load(scores + j) - now);

		vec_store(scores + j, weights);
		sum += weights;
	}
	keep = block->resume ? vec_exp(vec_splat(before - now))[0] : 0;
	*total = (block->resume ? *total * keep : 0) + vec_sum(sum);
	*maximum = now;
	return keep;
}

/* One block for n_heads query heads from head h0 of the group on. */
INLINE void run_heads(const struct task *t, const struct block *block, uint32_t h0, float *maximum,
	float *total, const int n_heads, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim;
	float scores[BATCH][BLOCK], keep[BATCH];

	score_heads(t, block, t->q + h0 * head_dim, scores, n_heads, dtype);
	for (int h = 0; h < n_heads; h++)
		keep[h] = weigh(scores[h], block, &maximum[h0 + h], &total[h0 + h]);
	add_heads(t, block, scores, keep, t->out + h0 * head_dim, n_heads, dtype);
}

INLINE void run_block(const struct task *t, const struct block *block, float *maximum, float *total,
	const int dtype)
{
	for (uint32_t h = 0; h < t->group; h += BATCH) {
		uint32_t n = t->group - h;

		if (n >= 4)
			run_heads(t, block, h, maximum, total, 4, dtype);
		else if (n == 3)
			run_heads(t, block, h, maximum, total, 3, dtype);
		else if (n == 2)
			run_heads(t, block, h, maximum, total, 2, dtype);
		else
			run_heads(t, block, h, maximum, total, 1, dtype);
	}
}

static void run_task(const struct task *t, uint32_t from, uint32_t to)
{
	float maximum[AFD_K_GROUP_MAX] = { 0 }, total[AFD_K_GROUP_MAX] = { 0 };
	size_t head_dim = t->a->kv.head_dim;

	for (uint32_t b = from / BLOCK; b <= to / BLOCK; b++) {
		struct block block = { .first = b == from / BLOCK ? from % BLOCK : 0,
			.end = b == to / BLOCK ? to % BLOCK + 1 : BLOCK,
			.resume = b > from / BLOCK };

		find_block(t, b, &block);
		if (t->a->kv.dtype == AFD_DTYPE_F32)
			run_block(t, &block, maximum, total, AFD_DTYPE_F32);
		else if (t->a->kv.dtype == AFD_DTYPE_BF16)
			run_block(t, &block, maximum, total, AFD_DTYPE_BF16);
		else if (t->a->kv.dtype == AFD_DTYPE_F16)
			run_block(t, &block, maximum, total, AFD_DTYPE_F16);
		else
			run_block(t, &block, maximum, total, AFD_DTYPE_FP8);
	}
	for (uint32_t h = 0; h < t->group; h++) {
		float share = t->v_scale / total[h];

		for (size_t d = 0; d < head_dim; d++)
			t->out[h * head_dim + d] *= share;
	}
}

void AFD_K(attend)(const struct afd__attend_args *a, uint32_t task0, uint32_t task1)
{
	uint32_t head_dim = a->kv.head_dim, group = a->n_heads / a->kv.n_kv_heads;
	size_t row_width = ((size_t)a->n_heads + 2 * (size_t)a->kv.n_kv_heads) * head_dim;
	bool fp8 = a->kv.dtype == AFD_DTYPE_FP8;
	float k_scale = fp8 ? a->kv.k_scale : 1;

	for (uint32_t task = task0; task < task1; task++) {
		size_t row = task / a->kv.n_kv_heads, kv_head = task % a->kv.n_kv_heads,
		       head = kv_head * group;
		uint32_t position = (uint32_t)a->positions[row];
		struct task t = { .a = a,
			.group = group,
			.q = a->qkv + row * row_width + head * head_dim,
			.out = a->out + (row * a->n_heads + head) * head_dim,
			.pages = a->page_table + (size_t)a->sequences[row] * a->table_stride,
			.head_bytes = kv_head * a->kv.head_stride,
			.score_scale = a->scale * k_scale,
			.v_scale = fp8 ? a->kv.v_scale : 1 };

		run_task(&t, a->window && position >= a->window ? position - a->window + 1 : 0,
			position);
	}
}
