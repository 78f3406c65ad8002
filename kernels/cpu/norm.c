/* SPDX-License-Identifier: Apache-2.0 */
/*
 * RMS norm of the residual stream: h += add; out = h / rms(h) * weight. Sums are kept per lane and
 * added as a tree, so a row's order of additions is fixed by its width alone.
 */
#include "variants.h"
#include "vec.h"

/* As it is after crossing a wire in the dtype. */
INLINE vec cross(vec v, int32_t wire)
{
	uint16_t numbers[LANES];

	if (wire != AFD_DTYPE_BF16 && wire != AFD_DTYPE_F16)
		return v;
	vec_store_some(numbers, v, wire, LANES);
	return vec_load_some(numbers, wire, LANES);
}

/* Adds `add` to the row when there is one; returns the sum of the squares. */
INLINE float add_and_square(float *h, const float *add, uint32_t width, int32_t wire)
{
	const vec zero = { 0 };
	vec even = { 0 }, odd = { 0 };

	for (size_t i = 0; i < width; i += LANES) {
		vec v = vec_load_some(h + i, AFD_DTYPE_F32, width - i), swap = odd;

		if (add) {
			vec more = vec_load_some(add + i, AFD_DTYPE_F32, width - i);

			v += wire ? zero + cross(more, wire) : more;
			vec_store_some(h + i, v, AFD_DTYPE_F32, width - i);
		}
		odd = vec_fma(v, v, even);
		even = swap;
	}
	return vec_sum(even + odd);
}

void AFD_K(norm)(const struct afd__norm_args *a, uint32_t row0, uint32_t row1)
{
	for (size_t row = row0; row < row1; row++) {
		float *h = a->h + row * a->width; /* [width] */
		float sum = add_and_square(
			h, a->add ? a->add + row * a->width : NULL, a->width, a->add_wire);
		float scale = 1.0f / __builtin_sqrtf(sum / (float)a->width + a->eps);

		if (!a->out)
			continue;
		for (size_t i = 0; i < a->width; i += LANES) {
			vec v = vec_load_some(h + i, AFD_DTYPE_F32, a->width - i) * scale;

			v *= vec_load_some(a->weight + i, AFD_DTYPE_F32, a->width - i);
			vec_store_some(a->out + row * a->width + i, cross(v, a->out_wire),
				AFD_DTYPE_F32, a->width - i);
		}
	}
}
