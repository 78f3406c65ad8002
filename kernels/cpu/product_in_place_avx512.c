/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with weights as the checkpoint has them, with AVX-512: a dot of 16 lanes per (row,
 * column). The lanes and the tree that adds them are the same for every tile, so a row's bits do
 * not depend on how many rows there are.
 */
#include "product_drive.h"

#include <immintrin.h>

#define INLINE  AFD_K_INLINE
#define UNROLL  AFD_K_UNROLL
#define ROWS    4 /* of x in a tile */
#define COLUMNS 6 /* of y in a tile: as many streams of weights */

INLINE __m512 load16(const char *w, __mmask16 mask, const int dtype)
{
	if (dtype == AFD_DTYPE_BF16)
		return _mm512_castsi512_ps(_mm512_slli_epi32(
			_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w)), 16));
	if (dtype == AFD_DTYPE_F16)
		return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w));
	return _mm512_maskz_loadu_ps(mask, w);
}

/* Halves onto each other: 8, 4, 2, 1. */
INLINE float add_lanes(__m512 v)
{
	__m256 v8 = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
	__m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
	__m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));

	return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

INLINE void run_tile(const struct afd__product_args *a, uint32_t row, uint32_t n, const int n_rows,
	const int n_columns, const int dtype)
{
	const size_t number_bytes = dtype == AFD_DTYPE_F32 ? 4 : 2,
		     w_stride = a->w.k * number_bytes, x_stride = a->x_stride;
	const char *w = (const char *)a->w.data + n * w_stride;
	const float *x = a->x + row * x_stride;
	__m512 acc[ROWS][COLUMNS];

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		UNROLL
		for (int c = 0; c < n_columns; c++)
			acc[r][c] = _mm512_setzero_ps();
	}
	for (uint32_t left = a->w.k; left; left -= left < 16 ? left : 16) {
		const __mmask16 mask = left < 16 ? (__mmask16)((1u << left) - 1) : 0xffff;
		__m512 x16[ROWS];

		UNROLL
		for (int r = 0; r < n_rows; r++)
			x16[r] = _mm512_maskz_loadu_ps(mask, x + r * x_stride);
		UNROLL
		for (int c = 0; c < n_columns; c++) {
			__m512 w16 = load16(w + c * w_stride, mask, dtype);

			/* The columns that come next: along a row there is nothing to fetch for
			 * long. */
			_mm_prefetch(w + (n_columns + c) * w_stride, _MM_HINT_T1);
			UNROLL
			for (int r = 0; r < n_rows; r++)
				acc[r][c] = _mm512_fmadd_ps(x16[r], w16, acc[r][c]);
		}
		x += 16;
		w += 16 * number_bytes;
	}
	UNROLL
	for (int r = 0; r < n_rows; r++) {
		UNROLL
		for (int c = 0; c < n_columns; c++) {
			float sum = add_lanes(acc[r][c]);

			a->y[(row + r) * a->y_stride + n + c] =
				a->bias ? sum + a->bias[n + c] : sum;
		}
	}
}

INLINE void run_rows(
	const struct afd__product_args *a, uint32_t n, const int n_columns, const int dtype)
{
	uint32_t row = 0;

	for (; a->n_rows - row >= ROWS; row += ROWS)
		run_tile(a, row, n, ROWS, n_columns, dtype);
	for (; a->n_rows - row >= ROWS / 2; row += ROWS / 2)
		run_tile(a, row, n, ROWS / 2, n_columns, dtype);
	if (row < a->n_rows)
		run_tile(a, row, n, 1, n_columns, dtype);
}

INLINE void run_range(const struct afd__product_args *a, uint32_t n0, uint32_t n1, const int dtype)
{
	for (; n1 - n0 >= COLUMNS; n0 += COLUMNS)
		run_rows(a, n0, COLUMNS, dtype);
	for (; n0 < n1; n0++)
		run_rows(a, n0, 1, dtype);
}

void afd_k_product_in_place_avx512(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	if (a->w.dtype == AFD_DTYPE_FP8)
		afd_k_product_in_place_fp8_avx512(a, n0, n1);
	else if (a->w.dtype == AFD_DTYPE_BF16)
		run_range(a, n0, n1, AFD_DTYPE_BF16);
	else if (a->w.dtype == AFD_DTYPE_F16)
		run_range(a, n0, n1, AFD_DTYPE_F16);
	else
		run_range(a, n0, n1, AFD_DTYPE_F32);
}
