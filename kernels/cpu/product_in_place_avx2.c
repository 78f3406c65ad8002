/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with weights as the checkpoint has them, with AVX2: a dot of 16 lanes, two registers,
 * per (row, column). The lanes and the tree that adds them are the same for every tile, so a row's
 * bits do not depend on how many rows there are.
 */
#include "product_drive.h"

#include <immintrin.h>
#include <string.h>

#define INLINE  AFD_K_INLINE
#define UNROLL  AFD_K_UNROLL
#define ROWS    2 /* of x in a tile */
#define COLUMNS 3 /* of y in a tile: as many streams of weights */
#define LANES   16

struct pair {
	__m256 low, high; /* lanes 0..7, 8..15 */
};

INLINE __m256 load8(const char *w, const int dtype)
{
	if (dtype == AFD_DTYPE_BF16)
		return _mm256_castsi256_ps(_mm256_slli_epi32(
			_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)w)), 16));
	if (dtype == AFD_DTYPE_F16)
		return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w));
	return _mm256_loadu_ps((const float *)w);
}

/* n_left numbers, zeros behind them. */
INLINE struct pair load16(const char *w, uint32_t n_left, const int dtype)
{
	const size_t number_bytes = dtype == AFD_DTYPE_F32 ? 4 : 2;
	char padded[LANES * 4] = { 0 };

	if (n_left < LANES) {
		memcpy(padded, w, n_left * number_bytes);
		w = padded;
	}
	return (struct pair){ load8(w, dtype), load8(w + 8 * number_bytes, dtype) };
}

/* Halves onto each other: 8, 4, 2, 1. */
INLINE float add_lanes(struct pair v)
{
	__m256 v8 = _mm256_add_ps(v.low, v.high);
	__m128 v4 = _mm_add_ps(_mm256_castps256_ps128(v8), _mm256_extractf128_ps(v8, 1));
	__m128 v2 = _mm_add_ps(v4, _mm_movehl_ps(v4, v4));

	return _mm_cvtss_f32(_mm_add_ss(v2, _mm_movehdup_ps(v2)));
}

INLINE void run_step(struct pair acc[][COLUMNS], const float *x, size_t x_stride, const char *w,
	size_t w_stride, uint32_t n_left, const int n_rows, const int n_columns, const int dtype)
{
	UNROLL
	for (int c = 0; c < n_columns; c++) {
		struct pair w16 = load16(w + c * w_stride, n_left, dtype);

		/* The columns that come next: along a row there is nothing to fetch for long. */
		_mm_prefetch(w + (n_columns + c) * w_stride, _MM_HINT_T1);
		UNROLL
		for (int r = 0; r < n_rows; r++) {
			struct pair x16 =
				load16((const char *)(x + r * x_stride), n_left, AFD_DTYPE_F32);

			acc[r][c].low = _mm256_fmadd_ps(x16.low, w16.low, acc[r][c].low);
			acc[r][c].high = _mm256_fmadd_ps(x16.high, w16.high, acc[r][c].high);
		}
	}
}

INLINE void run_tile(const struct afd__product_args *a, uint32_t row, uint32_t n, const int n_rows,
	const int n_columns, const int dtype)
{
	const size_t number_bytes = dtype == AFD_DTYPE_F32 ? 4 : 2,
		     w_stride = a->w.k * number_bytes;
	const char *w = (const char *)a->w.data + n * w_stride;
	const float *x = a->x + row * a->x_stride;
	struct pair acc[ROWS][COLUMNS];
	uint32_t k = 0;

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		UNROLL
		for (int c = 0; c < n_columns; c++)
			acc[r][c] = (struct pair){ _mm256_setzero_ps(), _mm256_setzero_ps() };
	}
	for (; a->w.k - k >= LANES; k += LANES)
		run_step(acc, x + k, a->x_stride, w + k * number_bytes, w_stride, LANES, n_rows,
			n_columns, dtype);
	if (k < a->w.k)
		run_step(acc, x + k, a->x_stride, w + k * number_bytes, w_stride, a->w.k - k,
			n_rows, n_columns, dtype);
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

void afd_k_product_in_place_avx2(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	if (a->w.dtype == AFD_DTYPE_FP8)
		afd_k_product_in_place_fp8_avx2(a, n0, n1);
	else if (a->w.dtype == AFD_DTYPE_BF16)
		run_range(a, n0, n1, AFD_DTYPE_BF16);
	else if (a->w.dtype == AFD_DTYPE_F16)
		run_range(a, n0, n1, AFD_DTYPE_F16);
	else
		run_range(a, n0, n1, AFD_DTYPE_F32);
}
