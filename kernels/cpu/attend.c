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

#define BLOCK   64
#define BATCH   4                      /* query heads whose sums are in registers at once */
#define COLUMNS (LANES == 16 ? 4 : 2) /* vectors of v, of which the same is true */
/* Positions whose dot products with so many heads fill a vector. */
#define POSITIONS(n_heads) (LANES / ((n_heads) > 2 ? 4 : (n_heads)))
#define LINE   64 /* bytes that one fetch brings */
#define UNROLL             _Pragma("GCC unroll 16")

struct task {
	const struct afd__attend_args *a;
	const float *q;       /* [group][head_dim]: the query heads of this kv head */
	float *out;           /* [group][head_dim] */
	const int32_t *pages; /* of the sequence, in order of position */
	size_t head_bytes;    /* from a page to this kv head */
	uint32_t from, to;    /* the positions that the row sees */
	uint32_t group;
	float score_scale, v_scale; /* the scales of an FP8 cache included */
};

struct block {
	const char *k[BLOCK]; /* k of each visible position; v is v_offset further */
	uint32_t first, end;  /* the visible ones: first .. end-1 */
	bool resume;          /* a block came before */
};

static void find_block(const struct task *t, uint32_t b, struct block *block)
{
	const struct afd__kv_view *kv = &t->a->kv;
	uint32_t position, j;

	block->first = b == t->from / BLOCK ? t->from % BLOCK : 0;
	block->end = b == t->to / BLOCK ? t->to % BLOCK + 1 : BLOCK;
	block->resume = b > t->from / BLOCK;
	for (j = block->first; j < block->end;) {
		uint32_t page, n;
		const char *k;

		position = b * BLOCK + j;
		page = position / kv->page_size;
		n = (page + 1) * kv->page_size - position;
		k = (const char *)kv->data + (size_t)t->pages[page] * kv->page_stride +
		    t->head_bytes + (size_t)(position % kv->page_size) * kv->position_stride;
		for (; n && j < block->end; n--, j++, k += kv->position_stride)
			block->k[j] = k;
	}
	/* What is fetched ahead may be any of them. */
	for (j = block->first; j--;)
		block->k[j] = block->k[block->first];
	for (j = block->end; j < BLOCK; j++)
		block->k[j] = block->k[block->end - 1];
}

/* sums[h][p] += q[h] . k[p] over LANES numbers, or the n that are left. */
INLINE void add_products(vec *sums, const float *q, size_t head_dim, const char *const *k,
	size_t offset, size_t n, const int n_heads, const int dtype)
{
	const int n_positions = POSITIONS(n_heads);
	vec x[LANES]; /* [n_positions] */

	UNROLL
	for (int p = 0; p < n_positions; p++)
		x[p] = vec_load_some(k[p] + offset, dtype, n);
	UNROLL
	for (int h = 0; h < n_heads; h++) {
		vec v = vec_load_some(q + h * head_dim, AFD_DTYPE_F32, n);

		UNROLL
		for (int p = 0; p < n_positions; p++)
			sums[h * n_positions + p] = vec_fma(v, x[p], sums[h * n_positions + p]);
	}
}

/* scores[h][j] = q[h] . k[j] * scale of n_heads heads. Positions go by a few, the last one several
 * times when they do not divide: what stands behind the end is not looked at. */
INLINE void score_heads(const struct task *t, const struct block *block, const float *q,
	size_t ahead, float scores[][BLOCK + LANES], const int n_heads, const int dtype)
{
	const int n_positions = POSITIONS(n_heads);
	const size_t head_dim = t->a->kv.head_dim, number = dtype_bytes(dtype);

	for (uint32_t j = block->first; j < block->end; j += n_positions) {
		const char *k[LANES];
		vec sums[LANES];
		float found[LANES];
		size_t d = 0;

		UNROLL
		for (int p = 0; p < n_positions; p++)
			k[p] = block->k[j + p < block->end ? j + p : block->end - 1];
		UNROLL
		for (int i = 0; i < LANES; i++)
			sums[i] = (vec){ 0 };
		for (; d + LANES <= head_dim; d += LANES) {
			if (d * number % LINE == 0) {
				UNROLL
				for (int p = 0; p < n_positions; p++)
					__builtin_prefetch(k[p] + ahead + d * number);
			}
			add_products(sums, q + d, head_dim, k, d * number, LANES, n_heads, dtype);
		}
		if (d < head_dim)
			add_products(sums, q + d, head_dim, k, d * number, head_dim - d, n_heads,
				dtype);
		vec_store(found, vec_sums(sums) * t->score_scale);
		for (int h = 0; h < n_heads; h++)
			memcpy(&scores[h][j], found + h * n_positions,
				n_positions * sizeof(float));
	}
}

/* Columns d .. d + n_columns - 1 (at most n_vecs vectors): out = out * keep + sum of p[j] * v[j], j
 * ascending. Meanwhile the same columns of the k in `next` are fetched. */
INLINE void add_columns(const struct task *t, const struct block *block, const struct block *next,
	float p[][BLOCK + LANES], const float *keep, float *out, size_t d, size_t n_columns,
	const int n_heads, const int n_vecs, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim, number = dtype_bytes(dtype);
	const size_t from = t->a->kv.v_offset + d * number;
	vec sum[BATCH][COLUMNS];

	UNROLL
	for (int h = 0; h < n_heads; h++) {
		UNROLL
		for (int i = 0; i < n_vecs; i++) {
			sum[h][i] = (vec){ 0 };
			if (block->resume)
				sum[h][i] =
					keep[h] * vec_load_some(out + h * head_dim + d + i * LANES,
							  AFD_DTYPE_F32, n_columns - i * LANES);
		}
	}
	for (uint32_t j = block->first; j < block->end; j++) {
		vec v[COLUMNS];

		UNROLL
		for (int i = 0; i < n_vecs; i++) {
			v[i] = vec_load_some(block->k[j] + from + i * LANES * number, dtype,
				n_columns - i * LANES);
			__builtin_prefetch(next->k[j] + (d + i * LANES) * number);
		}
		UNROLL
		for (int h = 0; h < n_heads; h++) {
			vec weight = vec_splat(p[h][j]);

			UNROLL
			for (int i = 0; i < n_vecs; i++)
				sum[h][i] = vec_fma(weight, v[i], sum[h][i]);
		}
	}
	UNROLL
	for (int h = 0; h < n_heads; h++) {
		UNROLL
		for (int i = 0; i < n_vecs; i++)
			vec_store_some(out + h * head_dim + d + i * LANES, sum[h][i], AFD_DTYPE_F32,
				n_columns - i * LANES);
	}
}

INLINE void add_heads(const struct task *t, const struct block *block, const struct block *next,
	float p[][BLOCK + LANES], const float *keep, float *out, const int n_heads, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim, wide = COLUMNS * LANES;
	size_t d = 0;

	for (; d + wide <= head_dim; d += wide)
		add_columns(t, block, next, p, keep, out, d, wide, n_heads, COLUMNS, dtype);
	for (; d + LANES <= head_dim; d += LANES)
		add_columns(t, block, next, p, keep, out, d, LANES, n_heads, 1, dtype);
	if (d < head_dim)
		add_columns(t, block, next, p, keep, out, d, head_dim - d, n_heads, 1, dtype);
}

/* Scores of one head to weights e^(score - maximum). Returns what earlier sums must be multiplied
 * with. */
static float weigh(float scores[BLOCK + LANES], const struct block *block, float *maximum, float *total)
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

/* One block for n_heads query heads from head h0 of the group on. The first ones have their v
 * fetched, which is read column by column: no hardware prefetcher follows that. */
INLINE void run_heads(const struct task *t, const struct block *block, const struct block *next,
	uint32_t h0, float *maximum, float *total, const int n_heads, const int dtype)
{
	const size_t head_dim = t->a->kv.head_dim, ahead = h0 ? 0 : t->a->kv.v_offset;
	float scores[BATCH][BLOCK + LANES], keep[BATCH];

	score_heads(t, block, t->q + h0 * head_dim, ahead, scores, n_heads, dtype);
	for (int h = 0; h < n_heads; h++)
		keep[h] = weigh(scores[h], block, &maximum[h0 + h], &total[h0 + h]);
	add_heads(t, block, next, scores, keep, t->out + h0 * head_dim, n_heads, dtype);
}

INLINE void run_block(const struct task *t, const struct block *block, const struct block *next,
	float *maximum, float *total, const int dtype)
{
	for (uint32_t h = 0; h < t->group; h += BATCH) {
		uint32_t n = t->group - h;

		if (n >= 4)
			run_heads(t, block, next, h, maximum, total, 4, dtype);
		else if (n == 3)
			run_heads(t, block, next, h, maximum, total, 3, dtype);
		else if (n == 2)
			run_heads(t, block, next, h, maximum, total, 2, dtype);
		else
			run_heads(t, block, next, h, maximum, total, 1, dtype);
	}
}

/* `then` is what comes next, whose k is fetched ahead; NULL at the end. */
static void run_task(const struct task *t, const struct task *then)
{
	float maximum[AFD_K_GROUP_MAX] = { 0 }, total[AFD_K_GROUP_MAX] = { 0 };
	size_t head_dim = t->a->kv.head_dim;
	struct block blocks[2], *block = &blocks[0], *next = &blocks[1], *last;

	find_block(t, t->from / BLOCK, block);
	for (uint32_t b = t->from / BLOCK; b <= t->to / BLOCK; b++) {
		last = block;
		if (b < t->to / BLOCK)
			find_block(t, b + 1, next);
		else if (then)
			find_block(then, then->from / BLOCK, next);
		else
			next = block;
		if (t->a->kv.dtype == AFD_DTYPE_F32)
			run_block(t, block, next, maximum, total, AFD_DTYPE_F32);
		else if (t->a->kv.dtype == AFD_DTYPE_BF16)
			run_block(t, block, next, maximum, total, AFD_DTYPE_BF16);
		else if (t->a->kv.dtype == AFD_DTYPE_F16)
			run_block(t, block, next, maximum, total, AFD_DTYPE_F16);
		else
			run_block(t, block, next, maximum, total, AFD_DTYPE_FP8);
		block = next;
		next = last;
	}
	for (uint32_t h = 0; h < t->group; h++) {
		float share = t->v_scale / total[h];

		for (size_t d = 0; d < head_dim; d++)
			t->out[h * head_dim + d] *= share;
	}
}

static struct task task_at(const struct afd__attend_args *a, uint32_t index)
{
	uint32_t head_dim = a->kv.head_dim, group = a->n_heads / a->kv.n_kv_heads;
	size_t row_width = ((size_t)a->n_heads + 2 * (size_t)a->kv.n_kv_heads) * head_dim,
	       row = index / a->kv.n_kv_heads, kv_head = index % a->kv.n_kv_heads,
	       head = kv_head * group;
	uint32_t position = (uint32_t)a->positions[row];
	bool fp8 = a->kv.dtype == AFD_DTYPE_FP8;

	return (struct task){ .a = a,
		.group = group,
		.from = a->window && position >= a->window ? position - a->window + 1 : 0,
		.to = position,
		.q = a->qkv + row * row_width + head * head_dim,
		.out = a->out + (row * a->n_heads + head) * head_dim,
		.pages = a->page_table + (size_t)a->sequences[row] * a->table_stride,
		.head_bytes = kv_head * a->kv.head_stride,
		.score_scale = a->scale * (fp8 ? a->kv.k_scale : 1),
		.v_scale = fp8 ? a->kv.v_scale : 1 };
}

void AFD_K(attend)(const struct afd__attend_args *a, uint32_t task0, uint32_t task1)
{
	struct task task, then;

	if (task0 < task1)
		then = task_at(a, task0);
	for (uint32_t index = task0; index < task1; index++) {
		task = then;
		if (index + 1 < task1)
			then = task_at(a, index + 1);
		run_task(&task, index + 1 < task1 ? &then : NULL);
	}
}
