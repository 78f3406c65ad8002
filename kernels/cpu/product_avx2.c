/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with AVX2 and FMA. Of a panel's 32 columns half h holds 8h..8h+7 and 16+8h..23+8h: in bf16 these are one
 * register, which a shift and a mask turn into two of floats. Tiles: up to 2 rows x 32 columns as they lie (bound by
 * memory), up to 6 rows x 16 columns blocked, one half after the other (12 accumulators of 16 registers).
 */
#include "product_drive.h"

#include <immintrin.h>

#define INLINE AFD_K_INLINE
#define UNROLL AFD_K_UNROLL
#define PREFETCH_BYTES 4096
#define ROWS_MAX 6

struct pair {
	__m256 low, high; /* columns 8h..8h+7, 16+8h..23+8h */
};

INLINE struct pair load_pair(const char *w, const int half, const int dtype)
{
	if (dtype == AFD_DTYPE_BF16) {
		__m256i v = _mm256_loadu_si256((const __m256i *)(w + 32 * half));

		return (struct pair){ _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
				      _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000u))) };
	}
	if (dtype == AFD_DTYPE_F16)
		return (struct pair){ _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + 16 * half))),
				      _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + 16 * half + 32))) };
	return (struct pair){ _mm256_loadu_ps((const float *)(w + 32 * half)), _mm256_loadu_ps((const float *)(w + 32 * half + 64)) };
}

INLINE void fetch(const char *at, const size_t bytes, const bool far)
{
	for (size_t line = 0; line < bytes; line += 64) {
		if (far)
			_mm_prefetch(at + line, _MM_HINT_T1);
		else
			_mm_prefetch(at + line, _MM_HINT_T0);
	}
}

INLINE void start(__m256 acc[][4], const struct afd_k_tile *t, const int n_rows, const int half0, const int n_halves)
{
	UNROLL for (int r = 0; r < n_rows; r++) {
		UNROLL for (int h = 0; h < n_halves; h++) {
			const float *y = t->y + r * t->y_stride + 8 * (half0 + h);

			acc[r][2 * h] = t->resume ? _mm256_loadu_ps(y) : _mm256_setzero_ps();
			acc[r][2 * h + 1] = t->resume ? _mm256_loadu_ps(y + 16) : _mm256_setzero_ps();
		}
	}
}

INLINE void finish(__m256 acc[][4], const struct afd_k_tile *t, const int n_rows, const int half0, const int n_halves)
{
	const float *bias = t->bias;

	UNROLL for (int r = 0; r < n_rows; r++) {
		UNROLL for (int h = 0; h < n_halves; h++) {
			const int column = 8 * (half0 + h);
			float *y = t->y + r * t->y_stride + column;

			if (bias) {
				acc[r][2 * h] = _mm256_add_ps(acc[r][2 * h], _mm256_loadu_ps(bias + column));
				acc[r][2 * h + 1] = _mm256_add_ps(acc[r][2 * h + 1], _mm256_loadu_ps(bias + column + 16));
			}
			_mm256_storeu_ps(y, acc[r][2 * h]);
			_mm256_storeu_ps(y + 16, acc[r][2 * h + 1]);
		}
	}
}

/* Halves half0 .. half0+n_halves-1 of one panel; the pass over half 0 fetches for both. */
INLINE void run_halves(const struct afd_k_tile *t, const int n_rows, const int half0, const int n_halves, const int dtype,
		       const size_t x_stride, const bool blocked)
{
	const size_t k_bytes = dtype == AFD_DTYPE_F32 ? 128 : 64;
	const char *w = t->w, *ahead = blocked ? t->prefetch : w + PREFETCH_BYTES;
	const float *x = t->x;
	const uint32_t n_k = t->n_k;
	__m256 acc[ROWS_MAX][4]; /* [n_rows][2 * n_halves] */

	start(acc, t, n_rows, half0, n_halves);
	for (uint32_t k = 0; k < n_k; k++) {
		if (half0 == 0)
			fetch(ahead, k_bytes, blocked);
		UNROLL for (int h = 0; h < n_halves; h++) {
			struct pair p = load_pair(w, half0 + h, dtype);

			UNROLL for (int r = 0; r < n_rows; r++) {
				__m256 b = _mm256_broadcast_ss(x + r * x_stride);

				acc[r][2 * h] = _mm256_fmadd_ps(b, p.low, acc[r][2 * h]);
				acc[r][2 * h + 1] = _mm256_fmadd_ps(b, p.high, acc[r][2 * h + 1]);
			}
		}
		x++;
		w += k_bytes;
		ahead += k_bytes;
	}
	finish(acc, t, n_rows, half0, n_halves);
}

#define DIRECT(rows, name, dtype)                                              \
	static void direct_##rows##_##name(const struct afd_k_tile *t)         \
	{                                                                      \
		run_halves(t, rows, 0, 2, dtype, t->x_stride, false);          \
	}
#define BLOCKED(rows, name, dtype)                                             \
	static void blocked_##rows##_##name(const struct afd_k_tile *t)        \
	{                                                                      \
		run_halves(t, rows, 0, 1, dtype, AFD_K_X_STRIDE, true);        \
		run_halves(t, rows, 1, 1, dtype, AFD_K_X_STRIDE, true);        \
	}
#define DIRECT_ROWS(X, name, dtype) X(1, name, dtype) X(2, name, dtype)
#define BLOCKED_ROWS(X, name, dtype) X(3, name, dtype) X(4, name, dtype) X(5, name, dtype) X(6, name, dtype)
#define DTYPES(X) X(f32, AFD_DTYPE_F32) X(bf16, AFD_DTYPE_BF16) X(f16, AFD_DTYPE_F16)

#define TILES(name, dtype)              \
	DIRECT_ROWS(DIRECT, name, dtype) \
	BLOCKED_ROWS(BLOCKED, name, dtype)
DTYPES(TILES)

#define DIRECT_ENTRY(rows, name, dtype) [rows] = direct_##rows##_##name,
#define BLOCKED_ENTRY(rows, name, dtype) [rows] = blocked_##rows##_##name,
#define DIRECT_ENTRIES(name, dtype) [dtype] = { DIRECT_ROWS(DIRECT_ENTRY, name, dtype) },
#define BLOCKED_ENTRIES(name, dtype) [dtype] = { BLOCKED_ROWS(BLOCKED_ENTRY, name, dtype) },

static const struct afd_k_tiles tiles = {
	.direct_rows = 2,
	.direct_panels = 1,
	.direct = { DTYPES(DIRECT_ENTRIES) },
	.direct_one = { DTYPES(DIRECT_ENTRIES) },
	.blocked_rows = ROWS_MAX,
	.blocked = { DTYPES(BLOCKED_ENTRIES) },
};

void afd_k_product_avx2(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	afd_k_product_drive(&tiles, a, n0, n1);
}
