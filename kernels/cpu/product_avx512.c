/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with AVX-512. A k of a bf16 panel is one cache line, which a shift and a mask turn into 32 floats.
 * Tiles: up to 6 rows x 64 columns as they lie (bound by memory: two streams of weights per thread), up to 12 rows x 32
 * columns blocked (24 accumulators hide the latency of FMA and leave one broadcast per two FMAs).
 */
#include "product_drive.h"

#include <immintrin.h>

#define INLINE AFD_K_INLINE
#define UNROLL AFD_K_UNROLL
/* About 300 ns at the rate of DRAM; nearer, rows of more than two arrive late. */
#define PREFETCH_BYTES 4096

struct pair {
	__m512 low, high; /* columns 0..15, 16..31 */
};

INLINE struct pair load_pair(const char *w, const int dtype)
{
	if (dtype == AFD_DTYPE_BF16) {
		__m512i v = _mm512_loadu_si512(w);

		return (struct pair){ _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
				      _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000u))) };
	}
	if (dtype == AFD_DTYPE_F16)
		return (struct pair){ _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w)),
				      _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 32))) };
	return (struct pair){ _mm512_loadu_ps(w), _mm512_loadu_ps(w + 64) };
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

/* A direct tile fetches ahead in its own panels, a blocked one the block that comes next. */
INLINE void run_tile(const struct afd_k_tile *t, const int n_rows, const int n_panels, const int dtype, const size_t x_stride,
		     const bool blocked)
{
	const size_t k_bytes = dtype == AFD_DTYPE_F32 ? 128 : 64, w_stride = t->w_stride, y_stride = t->y_stride;
	const char *w = t->w, *ahead = blocked ? t->prefetch : w + PREFETCH_BYTES;
	const float *x = t->x, *bias = t->bias;
	const uint32_t n_k = t->n_k;
	float *y = t->y;
	__m512 acc[AFD_K_TILE_ROWS][4]; /* [n_rows][2 * n_panels] */

	UNROLL for (int r = 0; r < n_rows; r++) {
		UNROLL for (int c = 0; c < 2 * n_panels; c++)
			acc[r][c] = t->resume ? _mm512_loadu_ps(y + r * y_stride + 16 * c) : _mm512_setzero_ps();
	}
	for (uint32_t k = 0; k < n_k; k++) {
		struct pair p[2];

		UNROLL for (int i = 0; i < n_panels; i++) {
			p[i] = load_pair(w + i * w_stride, dtype);
			fetch(ahead + i * w_stride, k_bytes, blocked);
		}
		UNROLL for (int r = 0; r < n_rows; r++) {
			__m512 b = _mm512_set1_ps(x[r * x_stride]);

			UNROLL for (int i = 0; i < n_panels; i++) {
				acc[r][2 * i] = _mm512_fmadd_ps(b, p[i].low, acc[r][2 * i]);
				acc[r][2 * i + 1] = _mm512_fmadd_ps(b, p[i].high, acc[r][2 * i + 1]);
			}
		}
		x++;
		w += k_bytes;
		ahead += k_bytes;
	}
	UNROLL for (int r = 0; r < n_rows; r++) {
		UNROLL for (int c = 0; c < 2 * n_panels; c++) {
			if (bias)
				acc[r][c] = _mm512_add_ps(acc[r][c], _mm512_loadu_ps(bias + 16 * c));
			_mm512_storeu_ps(y + r * y_stride + 16 * c, acc[r][c]);
		}
	}
}

#define DIRECT(rows, panels, name, dtype)                                              \
	static void direct_##rows##x##panels##_##name(const struct afd_k_tile *t)      \
	{                                                                              \
		run_tile(t, rows, panels, dtype, t->x_stride, false);                  \
	}
#define BLOCKED(rows, name, dtype)                                                     \
	static void blocked_##rows##_##name(const struct afd_k_tile *t)                \
	{                                                                              \
		run_tile(t, rows, 1, dtype, AFD_K_X_STRIDE, true);                     \
	}
#define DIRECT_ROWS(X, panels, name, dtype) \
	X(1, panels, name, dtype) X(2, panels, name, dtype) X(3, panels, name, dtype) X(4, panels, name, dtype) \
	X(5, panels, name, dtype) X(6, panels, name, dtype)
#define BLOCKED_ROWS(X, name, dtype) \
	X(4, name, dtype) X(5, name, dtype) X(6, name, dtype) X(7, name, dtype) X(8, name, dtype) X(9, name, dtype) \
	X(10, name, dtype) X(11, name, dtype) X(12, name, dtype)
#define DTYPES(X) X(f32, AFD_DTYPE_F32) X(bf16, AFD_DTYPE_BF16) X(f16, AFD_DTYPE_F16)

#define TILES(name, dtype)                        \
	DIRECT_ROWS(DIRECT, 1, name, dtype)       \
	DIRECT_ROWS(DIRECT, 2, name, dtype)       \
	BLOCKED_ROWS(BLOCKED, name, dtype)
DTYPES(TILES)

#define DIRECT_ENTRY(rows, panels, name, dtype) [rows] = direct_##rows##x##panels##_##name,
#define BLOCKED_ENTRY(rows, name, dtype) [rows] = blocked_##rows##_##name,
#define DIRECT_WIDE_ENTRIES(name, dtype) [dtype] = { DIRECT_ROWS(DIRECT_ENTRY, 2, name, dtype) },
#define DIRECT_ONE_ENTRIES(name, dtype) [dtype] = { DIRECT_ROWS(DIRECT_ENTRY, 1, name, dtype) },
#define BLOCKED_ENTRIES(name, dtype) [dtype] = { BLOCKED_ROWS(BLOCKED_ENTRY, name, dtype) },

static const struct afd_k_tiles tiles = {
	.direct_rows = 6,
	.direct_panels = 2,
	.direct = { DTYPES(DIRECT_WIDE_ENTRIES) },
	.direct_one = { DTYPES(DIRECT_ONE_ENTRIES) },
	.blocked_rows = 12,
	.blocked = { DTYPES(BLOCKED_ENTRIES) },
};

void afd_k_product_avx512(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	afd_k_product_drive(&tiles, a, n0, n1);
}
