/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with AVX-512. A k of a bf16 panel is one cache line, which a shift and a mask turn
 * into 32 floats. A tile is up to 12 rows x 32 columns: 24 accumulators hide the latency of FMA and
 * leave one broadcast per two FMAs. Up to 8 rows go direct, which is also the associativity of the
 * smallest L1.
 */
#include "product_fp8_avx512.h"

#include <immintrin.h>

#define INLINE AFD_K_INLINE
#define UNROLL AFD_K_UNROLL

struct pair {
	__m512 low, high; /* columns 0..15, 16..31 */
};

INLINE struct pair load_pair(const char *w, const int dtype)
{
	if (dtype == AFD_DTYPE_BF16) {
		__m512i v = _mm512_loadu_si512(w);

		return (struct pair){ _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
			_mm512_castsi512_ps(
				_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000u))) };
	}
	if (dtype == AFD_DTYPE_F16)
		return (struct pair){ _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)w)),
			_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + 32))) };
	return (struct pair){ _mm512_loadu_ps(w), _mm512_loadu_ps(w + 64) };
}

INLINE void run_tile(const struct afd_k_tile *t, const int n_rows, const int dtype)
{
	const size_t k_bytes = dtype == AFD_DTYPE_F32 ? 128 : 64, x_stride = t->x_stride,
		     y_stride = t->y_stride;
	const char *w = t->w, *ahead = t->prefetch;
	const float *x = t->x, *bias = t->bias;
	const uint32_t n_k = t->n_k;
	float *y = t->y;
	struct pair acc[AFD_K_TILE_ROWS]; /* [n_rows] */

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		acc[r].low = t->resume ? _mm512_loadu_ps(y + r * y_stride) : _mm512_setzero_ps();
		acc[r].high =
			t->resume ? _mm512_loadu_ps(y + r * y_stride + 16) : _mm512_setzero_ps();
	}
	for (uint32_t k = 0; k < n_k; k++) {
		struct pair p = load_pair(w, dtype);

		_mm_prefetch(ahead, _MM_HINT_T0);
		if (dtype == AFD_DTYPE_F32)
			_mm_prefetch(ahead + 64, _MM_HINT_T0);
		UNROLL
		for (int r = 0; r < n_rows; r++) {
			__m512 b = _mm512_set1_ps(x[r * x_stride]);

			acc[r].low = _mm512_fmadd_ps(b, p.low, acc[r].low);
			acc[r].high = _mm512_fmadd_ps(b, p.high, acc[r].high);
		}
		x++;
		w += k_bytes;
		ahead += k_bytes;
	}
	UNROLL
	for (int r = 0; r < n_rows; r++) {
		if (bias) {
			acc[r].low = _mm512_add_ps(acc[r].low, _mm512_loadu_ps(bias));
			acc[r].high = _mm512_add_ps(acc[r].high, _mm512_loadu_ps(bias + 16));
		}
		_mm512_storeu_ps(y + r * y_stride, acc[r].low);
		_mm512_storeu_ps(y + r * y_stride + 16, acc[r].high);
	}
}

#define ROWS(X, name, dtype) \
	X(1, name, dtype) \
	X(2, name, dtype) X(3, name, dtype) X(4, name, dtype) X(5, name, dtype) X(6, name, dtype) \
		X(7, name, dtype) X(8, name, dtype) X(9, name, dtype) X(10, name, dtype) \
			X(11, name, dtype) X(12, name, dtype)
#define DTYPES(X) X(f32, AFD_DTYPE_F32) X(bf16, AFD_DTYPE_BF16) X(f16, AFD_DTYPE_F16)

#define TILE(rows, name, dtype) \
	static void run_##rows##_##name(const struct afd_k_tile *t) \
	{ \
		run_tile(t, rows, dtype); \
	}
#define TILES(name, dtype) ROWS(TILE, name, dtype)
DTYPES(TILES)

#define ENTRY(rows, name, dtype) [rows] = run_##rows##_##name,
#define ENTRIES(name, dtype)     [dtype] = { ROWS(ENTRY, name, dtype) },

static const struct afd_k_tiles tiles = {
	.direct_rows = 8,
	.tile_rows = AFD_K_TILE_ROWS,
	.single_block = 4 * AFD_K_BLOCK,
	.run = { DTYPES(ENTRIES) },
};

void afd_k_product_avx512(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	const struct afd_k_tiles *with = &tiles;

	if (a->w.dtype == AFD_DTYPE_FP8)
		with = __builtin_cpu_supports("avx512vbmi") ? &afd_k_fp8_tiles_vbmi
							    : &afd_k_fp8_tiles_avx512;
	afd_k_product_drive(with, a, n0, n1);
}
