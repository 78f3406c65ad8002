/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activations as a GPU quantises them for an FP8 product: per row and group of 128, to e4m3 and
 * back. The scale is the largest magnitude / 448, so nothing saturates; a group of zeros has the
 * smallest scale and stays zero. Called by the seam, and by `experts` for its two products.
 */
#include "variants.h"
#include "vec.h"

#define SMALLEST 1e-10f

static void quantize_group(float *x, size_t n)
{
	vec largest = vec_splat(SMALLEST);
	float scale;

	for (size_t i = 0; i < n; i += LANES) {
		vec v = vec_load_some(x + i, AFD_DTYPE_F32, n - i);

		largest = vec_max((vec)((vec_bits)v & 0x7fffffff), largest);
	}
	scale = vec_largest(largest) / 448.0f;
	for (size_t i = 0; i < n; i += LANES) {
		vec v = vec_load_some(x + i, AFD_DTYPE_F32, n - i);

		vec_store_some(x + i, vec_round_fp8(v / scale) * scale, AFD_DTYPE_F32, n - i);
	}
}

void AFD_K(quantize)(const struct afd__quantize_args *a, uint32_t row0, uint32_t row1)
{
	uint32_t first = AFD__SCALE_ROWS - a->column_offset % AFD__SCALE_ROWS;

	for (size_t row = row0; row < row1; row++) {
		float *x = a->x + row * a->width; /* [width] */
		uint32_t end = first;

		for (uint32_t i = 0; i < a->width; i = end, end += AFD__SCALE_ROWS) {
			if (end > a->width)
				end = a->width;
			quantize_group(x + i, end - i);
		}
	}
}
