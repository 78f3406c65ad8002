/* SPDX-License-Identifier: Apache-2.0 */
/*
 * softmax(q k^T * scale) v over what a row sees: on tensor cores (attend_split.cu, attend_chunk.cu),
 * or, for caches in float32 and heads of odd or large sizes, here, in float32, a warp per query
 * head. A lane scores one of 32 positions, then adds its columns of v.
 *
 * Invariant: positions are combined in blocks of 32 at fixed absolute positions; what a row does not
 * see is not read.
 */
#include "attend.h"

enum { WARPS = 4, BLOCK = 32 };

struct task {
	const float *q;       /* [head_dim] */
	float *out;           /* [head_dim] */
	const int32_t *pages; /* of the sequence */
	unsigned kv_head;
};

GPU_FN const char *k_of(const struct afd__attend_args &a, const task &t, unsigned position)
{
	return (const char *)a.kv.data + k_offset(a, t.pages, t.kv_head, position);
}

/* The lane's position of a block; NULL: not seen. */
template <class T>
GPU_FN float score(const struct afd__attend_args &a, const task &t, const char *at)
{
	float sum = 0;

	if (!at)
		return -INFINITY;
	for (unsigned d = 0; d < a.kv.head_dim; d++)
		sum = fmaf(t.q[d], to_float(((const T *)at)[d]), sum);
	return sum * a.scale * (sizeof(T) == 1 ? a.kv.k_scale : 1);
}

/* out = out * keep + sum over the block's positions of their weight * v; weights [BLOCK] shared */
template <class T>
GPU_FN void add_block(const struct afd__attend_args &a, const task &t, unsigned base,
	unsigned first, unsigned end, const float *weights, float keep, bool resume)
{
	for (unsigned d0 = 0; d0 < a.kv.head_dim; d0 += 32) {
		unsigned d = d0 + lane_id();
		bool mine = d < a.kv.head_dim;
		float sum = mine && resume ? t.out[d] * keep : 0;

		for (unsigned j = first; j < end; j++) {
			const T *v = (const T *)(k_of(a, t, base + j) + a.kv.v_offset);

			if (mine)
				sum = fmaf(weights[j], to_float(v[d]), sum);
		}
		if (mine)
			t.out[d] = sum;
	}
}

template <class T>
GPU_KERNEL(WARPS * 32) attend_plain_kernel(struct afd__attend_args a)
{
	GPU_SHARED(float, all_weights, WARPS * BLOCK);
	float *weights = all_weights + warp_id() * BLOCK;
	unsigned head = block_y() * WARPS + warp_id(), head_dim = a.kv.head_dim;
	unsigned group = a.n_heads / a.kv.n_kv_heads;
	size_t row = block_x(), width = (size_t)(a.n_heads + 2 * a.kv.n_kv_heads) * head_dim;

	if (head >= a.n_heads) /* the whole warp */
		return;
	unsigned position = (unsigned)a.positions[row];
	unsigned from = first_seen(a, position);
	task t = { a.qkv + row * width + (size_t)head * head_dim,
		a.out + (row * a.n_heads + head) * head_dim,
		a.page_table + (size_t)a.sequences[row] * a.table_stride,
		head / group };
	float maximum = -INFINITY, total = 0;

	for (unsigned b = from / BLOCK; b <= position / BLOCK; b++) {
		unsigned first = b == from / BLOCK ? from % BLOCK : 0, lane = lane_id();
		unsigned end = b == position / BLOCK ? position % BLOCK + 1 : (unsigned)BLOCK;
		bool seen = lane >= first && lane < end, resume = b > from / BLOCK;
		float s = score<T>(a, t, seen ? k_of(a, t, b * BLOCK + lane) : NULL);
		float now = fmaxf(maximum, warp_max(s)), weight = seen ? expf(s - now) : 0;
		float keep = resume ? expf(maximum - now) : 0;

		total = total * keep + warp_sum(weight);
		maximum = now;
		weights[lane] = weight;
		warp_sync();
		add_block<T>(a, t, b * BLOCK, first, end, weights, keep, resume);
		warp_sync(); /* all have read the weights */
	}
	for (unsigned d = lane_id(); d < head_dim; d += 32)
		t.out[d] *= (sizeof(T) == 1 ? a.kv.v_scale : 1) / total;
}

int afd_gpu_attend(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	if (attend_split_fits(a))
		return attend_chunk_pays(gpu, a) ? attend_chunk(gpu, a) : attend_split(gpu, a);
	return with_dtype(a->kv.dtype, [&](auto t) {
		return gpu_launch(gpu, "attend_plain", attend_plain_kernel<decltype(t)>,
			{ a->n_rows, (unsigned)divide_up(a->n_heads, WARPS), 1 }, WARPS * 32, 0, *a);
	});
}
