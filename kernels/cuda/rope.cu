/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens to q, k and v between the projection and attention: norm per head, rotation of the
 * pairs (i, i + head_dim / 2), and the append of k and v to the cache in its dtype. A warp does one
 * head of a row; a lane keeps to its pairs.
 */
#include "dispatch.h"

enum { WARPS = 4 };

struct head {
	const float *x;      /* [head_dim] */
	const float *weight; /* or NULL */
	const float *angles; /* or NULL */
	float scale;
	unsigned half;
};

/* Numbers i and i + half after norm and rotation. */
GPU_FN void make_pair(const head &h, unsigned i, float *first, float *second)
{
	float a = h.x[i], b = h.x[i + h.half];

	if (h.weight) {
		a = a * h.scale * h.weight[i];
		b = b * h.scale * h.weight[i + h.half];
	}
	*first = a;
	*second = b;
	if (h.angles) {
		*first = a * h.angles[i] - b * h.angles[h.half + i];
		*second = b * h.angles[i] + a * h.angles[h.half + i];
	}
}

GPU_FN float norm_scale(const float *x, unsigned head_dim, float eps)
{
	float sum = 0;

	for (unsigned i = lane_id(); i < head_dim / 2; i += 32)
		sum += x[i] * x[i] + x[i + head_dim / 2] * x[i + head_dim / 2];
	return 1 / sqrtf(warp_sum(sum) / (float)head_dim + eps);
}

template <class T> GPU_KERNEL(WARPS * 32) rope_kernel(struct afd__rope_args a)
{
	unsigned head_dim = a.kv.head_dim, n_kv = a.kv.n_kv_heads, n = a.n_heads + 2 * n_kv;
	unsigned which = block_y() * WARPS + warp_id();
	size_t row = block_x();
	float *x = a.qkv + (row * n + which) * head_dim;

	if (which >= n) /* the whole warp */
		return;
	bool is_q = which < a.n_heads, is_v = which >= a.n_heads + n_kv;
	head h = { x, is_v ? NULL : is_q ? a.q_norm : a.k_norm,
		a.angles && !is_v ? a.angles + row * head_dim : NULL, 1, head_dim / 2 };
	if (h.weight)
		h.scale = norm_scale(x, head_dim, a.eps);
	if (is_q) {
		for (unsigned i = lane_id(); i < h.half; i += 32)
			make_pair(h, i, &x[i], &x[i + h.half]);
		return;
	}
	unsigned slot = (unsigned)a.slots[row], kv_head = (which - a.n_heads) % n_kv;
	float scale = is_v ? a.kv.v_scale : a.kv.k_scale; /* of FP8 only */
	T *to = (T *)((char *)a.kv.data + slot / a.kv.page_size * a.kv.page_stride +
		      slot % a.kv.page_size * a.kv.position_stride + kv_head * a.kv.head_stride +
		      (is_v ? a.kv.v_offset : 0));
	for (unsigned i = lane_id(); i < h.half; i += 32) {
		float first, second;

		make_pair(h, i, &first, &second);
		to[i] = from_float<T>(sizeof(T) == 1 ? first / scale : first);
		to[i + h.half] = from_float<T>(sizeof(T) == 1 ? second / scale : second);
	}
}

int afd_gpu_rope(const struct afd_gpu *gpu, const struct afd__rope_args *a)
{
	unsigned n = a->n_heads + 2 * a->kv.n_kv_heads;

	return with_dtype(a->kv.dtype, [&](auto t) {
		return gpu_launch(gpu, "rope", rope_kernel<decltype(t)>,
			{ a->n_rows, (unsigned)divide_up(n, WARPS), 1 }, WARPS * 32, 0, *a);
	});
}
