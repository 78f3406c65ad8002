/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with AVX2 and FMA. Of a panel's 32 columns half h holds 8h..8h+7 and 16+8h..23+8h: in
 * bf16 these are one register, which a shift and a mask turn into two of floats. A tile is up to 6
 * rows: two with all columns, more with 12 accumulators for one half and then for the other.
 */
#include "number.h"
#include "product_drive.h"

#include <immintrin.h>

#define INLINE   AFD_K_INLINE
#define UNROLL   AFD_K_UNROLL
#define ROWS_MAX 6
#define STRIP    64 /* k */

struct pair {
	__m256 low, high; /* columns 8h..8h+7, 16+8h..23+8h */
};

INLINE struct pair load_pair(const char *w, const int half, const int dtype)
{
	if (dtype == AFD_DTYPE_BF16) {
		__m256i v = _mm256_loadu_si256((const __m256i *)(w + 32 * half));

		return (struct pair){ _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)),
			_mm256_castsi256_ps(
				_mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000u))) };
	}
	if (dtype == AFD_DTYPE_F16)
		return (struct pair){ _mm256_cvtph_ps(
					      _mm_loadu_si128((const __m128i *)(w + 16 * half))),
			_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + 16 * half + 32))) };
	return (struct pair){ _mm256_loadu_ps((const float *)(w + 32 * half)),
		_mm256_loadu_ps((const float *)(w + 32 * half + 64)) };
}

INLINE void start(__m256 acc[][4], const struct afd_k_tile *t, const int n_rows, const int half0,
	const int n_halves)
{
	UNROLL
	for (int r = 0; r < n_rows; r++) {
		UNROLL
		for (int h = 0; h < n_halves; h++) {
			const float *y = t->y + r * t->y_stride + 8 * (half0 + h);

			acc[r][2 * h] = t->resume ? _mm256_loadu_ps(y) : _mm256_setzero_ps();
			acc[r][2 * h + 1] =
				t->resume ? _mm256_loadu_ps(y + 16) : _mm256_setzero_ps();
		}
	}
}

INLINE void finish(__m256 acc[][4], const struct afd_k_tile *t, const int n_rows, const int half0,
	const int n_halves)
{
	const float *bias = t->bias;

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		UNROLL
		for (int h = 0; h < n_halves; h++) {
			const int column = 8 * (half0 + h);
			float *y = t->y + r * t->y_stride + column;

			if (bias) {
				acc[r][2 * h] = _mm256_add_ps(
					acc[r][2 * h], _mm256_loadu_ps(bias + column));
				acc[r][2 * h + 1] = _mm256_add_ps(
					acc[r][2 * h + 1], _mm256_loadu_ps(bias + column + 16));
			}
			_mm256_storeu_ps(y, acc[r][2 * h]);
			_mm256_storeu_ps(y + 16, acc[r][2 * h + 1]);
		}
	}
}

/* Halves half0 .. half0+n_halves-1 of the panel; the pass over half 0 fetches for both. */
INLINE void run_halves(const struct afd_k_tile *t, const int n_rows, const int half0,
	const int n_halves, const int dtype)
{
	const size_t k_bytes = dtype == AFD_DTYPE_F32 ? 128 : 64, x_stride = t->x_stride;
	const char *w = t->w, *ahead = t->prefetch;
	const float *x = t->x;
	const uint32_t n_k = t->n_k;
	__m256 acc[ROWS_MAX][4]; /* [n_rows][2 * n_halves] */

	start(acc, t, n_rows, half0, n_halves);
	for (uint32_t k = 0; k < n_k; k++) {
		if (half0 == 0)
			_mm_prefetch(ahead, _MM_HINT_T0);
		if (half0 == 0 && dtype == AFD_DTYPE_F32)
			_mm_prefetch(ahead + 64, _MM_HINT_T0);
		UNROLL
		for (int h = 0; h < n_halves; h++) {
			struct pair p = load_pair(w, half0 + h, dtype);

			UNROLL
			for (int r = 0; r < n_rows; r++) {
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

/* Two rows keep all 32 columns in registers; more take the halves in turns, while the strip of
 * weights is in L1. */
INLINE void run_tile(const struct afd_k_tile *t, const int n_rows, const int dtype)
{
	const size_t k_bytes = dtype == AFD_DTYPE_F32 ? 128 : 64;
	struct afd_k_tile strip = *t;

	if (n_rows <= 2) {
		run_halves(t, n_rows, 0, 2, dtype);
		return;
	}
	for (uint32_t k = 0; k < t->n_k; k += strip.n_k) {
		strip.n_k = t->n_k - k < STRIP ? t->n_k - k : STRIP;
		strip.bias = k + strip.n_k == t->n_k ? t->bias : NULL;
		run_halves(&strip, n_rows, 0, 1, dtype);
		run_halves(&strip, n_rows, 1, 1, dtype);
		strip.x += strip.n_k;
		strip.w += strip.n_k * k_bytes;
		strip.prefetch += strip.n_k * k_bytes;
		strip.resume = true;
	}
}

/* ---- FP8: one block of a panel, as floats ---- */

/* The seven low bits stand as an f16 whose exponent is 8 too small, denormals included. */
INLINE void decode_half(const char *w, float *out)
{
	__m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
	const __m256 exponent = _mm256_set1_ps(256);

	v = _mm256_and_si256(_mm256_slli_epi16(v, 7), _mm256_set1_epi16((short)0xbf80));
	_mm256_store_ps(out,
		_mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), exponent));
	_mm256_store_ps(out + 8,
		_mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)), exponent));
}

static void decode(const char *w, uint32_t n_k, float *out)
{
	const __m256i sign = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi8(-1);

	for (uint32_t k = 0; k < n_k; k++, w += AFD_K_PANEL, out += AFD_K_PANEL) {
		__m256i line = _mm256_loadu_si256((const __m256i *)w), nan;

		decode_half(w, out);
		decode_half(w + 16, out + 16);
		nan = _mm256_cmpeq_epi8(_mm256_or_si256(line, sign), ones);
		if (__builtin_expect(!_mm256_testz_si256(nan, nan), 0)) {
			for (int i = 0; i < AFD_K_PANEL; i++)
				out[i] = afd_k_float_of_fp8((uint8_t)w[i]);
		}
	}
}

/* y = fma(sum, scale, y), and the bias after the last block. */
INLINE void add_scaled(__m256 acc[][4], const struct afd_k_tile *t, const int n_rows,
	const int column, const int at)
{
	__m256 scale = t->scale_stride > 1 ? _mm256_loadu_ps(t->scales + column)
					   : _mm256_set1_ps(*t->scales);

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		float *y = t->y + r * t->y_stride + column;
		__m256 sum = t->resume ? _mm256_loadu_ps(y) : _mm256_setzero_ps();

		sum = _mm256_fmadd_ps(acc[r][at], scale, sum);
		if (t->bias)
			sum = _mm256_add_ps(sum, _mm256_loadu_ps(t->bias + column));
		_mm256_storeu_ps(y, sum);
	}
}

INLINE void run_decoded(
	const struct afd_k_tile *t, const int n_rows, const int half0, const int n_halves)
{
	const float *x = t->x, *w = (const float *)t->w + 8 * half0;
	const char *ahead = t->prefetch;
	__m256 acc[ROWS_MAX][4]; /* [n_rows][2 * n_halves] */

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		UNROLL
		for (int i = 0; i < 2 * n_halves; i++)
			acc[r][i] = _mm256_setzero_ps();
	}
	for (uint32_t k = 0; k < t->n_k; k++) {
		if (half0 == 0)
			_mm_prefetch(ahead, _MM_HINT_T0);
		UNROLL
		for (int h = 0; h < n_halves; h++) {
			__m256 low = _mm256_load_ps(w + 8 * h), high = _mm256_load_ps(w + 8 * h + 16);

			UNROLL
			for (int r = 0; r < n_rows; r++) {
				__m256 b = _mm256_broadcast_ss(x + r * t->x_stride);

				acc[r][2 * h] = _mm256_fmadd_ps(b, low, acc[r][2 * h]);
				acc[r][2 * h + 1] = _mm256_fmadd_ps(b, high, acc[r][2 * h + 1]);
			}
		}
		x++;
		w += AFD_K_PANEL;
		ahead += AFD_K_PANEL;
	}
	UNROLL
	for (int h = 0; h < n_halves; h++) {
		add_scaled(acc, t, n_rows, 8 * (half0 + h), 2 * h);
		add_scaled(acc, t, n_rows, 8 * (half0 + h) + 16, 2 * h + 1);
	}
}

#define ROWS(X, name, dtype) \
	X(1, name, dtype) \
	X(2, name, dtype) X(3, name, dtype) X(4, name, dtype) X(5, name, dtype) X(6, name, dtype)
#define DTYPES(X) X(f32, AFD_DTYPE_F32) X(bf16, AFD_DTYPE_BF16) X(f16, AFD_DTYPE_F16)

#define TILE(rows, name, dtype) \
	static void run_##rows##_##name(const struct afd_k_tile *t) \
	{ \
		run_tile(t, rows, dtype); \
	}
#define TILES(name, dtype) ROWS(TILE, name, dtype)
DTYPES(TILES)

#define DECODED_TILE(rows, name, dtype) \
	static void run_##rows##_##name(const struct afd_k_tile *t) \
	{ \
		if (rows <= 2) { \
			run_decoded(t, rows, 0, 2); \
			return; \
		} \
		run_decoded(t, rows, 0, 1); \
		run_decoded(t, rows, 1, 1); \
	}
ROWS(DECODED_TILE, decoded, 0)

#define ENTRY(rows, name, dtype) [rows] = run_##rows##_##name,
#define ENTRIES(name, dtype)     [dtype] = { ROWS(ENTRY, name, dtype) },

static const afd_k_tile_fn decoded_tiles[AFD_K_TILE_ROWS + 1] = { ROWS(ENTRY, decoded, 0) };

static const struct afd_k_tiles tiles = {
	.direct_rows = ROWS_MAX,
	.tile_rows = ROWS_MAX,
	.single_block = AFD_K_BLOCK,
	.run = { DTYPES(ENTRIES) },
	.run_decoded = decoded_tiles,
	.decode = decode,
};

void afd_k_product_avx2(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	afd_k_product_drive(&tiles, a, n0, n1);
}
