/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What happens to q, k and v between the projection and attention: RMS norm per head, rotation of
 * the pairs (d, d + head_dim / 2), and the append of k and v to the cache, rounded to its dtype.
 * Attention reads a row's own k and v back from the cache, so that they are rounded like all
 * others.
 */
#include "variants.h"
#include "vec.h"

INLINE void norm_head(float *x, const float *weight, uint32_t head_dim, float eps)
{
	vec sum = { 0 };
	float scale;

	for (size_t i = 0; i < head_dim; i += LANES) {
		vec v = vec_load_some(x + i, AFD_DTYPE_F32, head_dim - i);

		sum = vec_fma(v, v, sum);
	}
	scale = 1.0f / __builtin_sqrtf(vec_sum(sum) / (float)head_dim + eps);
	for (size_t i = 0; i < head_dim; i += LANES) {
		vec v = vec_load_some(x + i, AFD_DTYPE_F32, head_dim - i) * scale;

		v *= vec_load_some(weight + i, AFD_DTYPE_F32, head_dim - i);
		vec_store_some(x + i, v, AFD_DTYPE_F32, head_dim - i);
	}
}

INLINE void rotate_head(float *x, const float *angles, uint32_t head_dim)
{
	size_t half = head_dim / 2;
	float *y = x + half;

	for (size_t i = 0; i < half; i += LANES) {
		vec cosine = vec_load_some(angles + i, AFD_DTYPE_F32, half - i);
		vec sine = vec_load_some(angles + half + i, AFD_DTYPE_F32, half - i);
		vec first = vec_load_some(x + i, AFD_DTYPE_F32, half - i);
		vec second = vec_load_some(y + i, AFD_DTYPE_F32, half - i);

		vec_store_some(x + i, first * cosine - second * sine, AFD_DTYPE_F32, half - i);
		vec_store_some(y + i, second * cosine + first * sine, AFD_DTYPE_F32, half - i);
	}
}

static void store_head(char *to, const float *x, uint32_t head_dim, int dtype, float scale)
{
	size_t number = dtype_bytes(dtype);

	for (size_t i = 0; i < head_dim; i += LANES) {
		vec v = vec_load_some(x + i, AFD_DTYPE_F32, head_dim - i);

		if (dtype == AFD_DTYPE_F32)
			vec_store_some(to + i * number, v, AFD_DTYPE_F32, head_dim - i);
		else if (dtype == AFD_DTYPE_BF16)
			vec_store_some(to + i * number, v, AFD_DTYPE_BF16, head_dim - i);
		else if (dtype == AFD_DTYPE_F16)
			vec_store_some(to + i * number, v, AFD_DTYPE_F16, head_dim - i);
		else
			vec_store_some(to + i * number, v / scale, AFD_DTYPE_FP8, head_dim - i);
	}
}

static void append_row(const struct afd__rope_args *a, size_t row, const float *k, const float *v)
{
	const struct afd__kv_view *kv = &a->kv;
	uint32_t slot = (uint32_t)a->slots[row], page = slot / kv->page_size,
		 offset = slot % kv->page_size;
	char *to = (char *)kv->data + page * kv->page_stride + offset * kv->position_stride;

	for (uint32_t head = 0; head < kv->n_kv_heads; head++) {
		store_head(to, k + head * kv->head_dim, kv->head_dim, kv->dtype, kv->k_scale);
		store_head(to + kv->v_offset, v + head * kv->head_dim, kv->head_dim, kv->dtype,
			kv->v_scale);
		to += kv->head_stride;
	}
}

void AFD_K(rope)(const struct afd__rope_args *a, uint32_t row0, uint32_t row1)
{
	uint32_t head_dim = a->kv.head_dim, n_kv_heads = a->kv.n_kv_heads;
	size_t row_width = ((size_t)a->n_heads + 2 * (size_t)n_kv_heads) * head_dim;

	for (size_t row = row0; row < row1; row++) {
		float *q = a->qkv + row * row_width;          /* [n_heads][head_dim] */
		float *k = q + (size_t)a->n_heads * head_dim; /* [n_kv_heads][head_dim] */
		const float *v = k + (size_t)n_kv_heads * head_dim;

		for (float *head = q; head < v; head += head_dim) {
			const float *weight = head < k ? a->q_norm : a->k_norm;

			if (weight)
				norm_head(head, weight, head_dim, a->eps);
			if (a->angles)
				rotate_head(head, a->angles + row * head_dim, head_dim);
		}
		append_row(a, row, k, v);
	}
}
