/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tiles of the FP8 product with AVX-512 (product_drive.h). A k of a panel is 32 bytes. A tile walks
 * blocks of scales: the sum of a block stands in registers, the result in y.
 *
 * The numbers become floats on their way. With VBMI, for which this file is compiled once more, by a
 * table of the two high bytes of each magnitude's float; else as an f16 whose exponent is 8 too
 * small, denormals included. Both are exact, so both give the same bits.
 *
 * Used by product_avx512.c.
 */
#include "product_fp8_avx512.h"

#include <immintrin.h>

#define INLINE AFD_K_INLINE
#define UNROLL AFD_K_UNROLL

struct pair {
	__m512 low, high; /* columns 0..15, 16..31 */
};

#if defined(__AVX512VBMI__)
#define DECODE_ROWS UINT32_MAX /* looking up again is as fast as reading floats */
#define SIXTEEN(b) b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b
#define FRACTION   0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xf0
#define FRACTIONS  0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, FRACTION

/* By magnitude: 8 denormals, the rest in order, and NaN. */
static const uint8_t low_bytes[128] __attribute__((aligned(64))) = { 0, 0, 0x80, 0xc0, 0, 0x20,
	0x40, 0x60, FRACTION, FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS, FRACTIONS, 0,
	0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0xa0, 0xb0, 0xc0, 0xd0, 0xe0, 0xc0 };
static const uint8_t high_bytes[128] __attribute__((aligned(64))) = { 0, 0x3b, 0x3b, 0x3b, 0x3c,
	0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, 0x3c, SIXTEEN(0x3d),
	SIXTEEN(0x3e), SIXTEEN(0x3f), SIXTEEN(0x40), SIXTEEN(0x41), SIXTEEN(0x42), 0x43, 0x43, 0x43,
	0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x43, 0x7f };

/* Lane i: twice the number of column i, twice that of column 16 + i. */
#define TWICE(i) ((0x1010 + 0x0101 * (i)) << 16 | 0x0101 * (i))

INLINE struct pair load_fp8(const char *w)
{
	const __m512i places = _mm512_setr_epi32(TWICE(0), TWICE(1), TWICE(2), TWICE(3), TWICE(4),
		TWICE(5), TWICE(6), TWICE(7), TWICE(8), TWICE(9), TWICE(10), TWICE(11), TWICE(12),
		TWICE(13), TWICE(14), TWICE(15));
	const __m512i sign = _mm512_set1_epi16((short)0x8000);
	const __mmask64 even = 0x5555555555555555u;
	__m256i line = _mm256_loadu_si256((const __m256i *)w);
	__m512i v = _mm512_permutexvar_epi8(places, _mm512_castsi256_si512(line));
	__m512i low = _mm512_maskz_permutex2var_epi8(
		even, _mm512_load_si512(low_bytes), v, _mm512_load_si512(low_bytes + 64));
	__m512i high = _mm512_maskz_permutex2var_epi8(
		~even, _mm512_load_si512(high_bytes), v, _mm512_load_si512(high_bytes + 64));

	v = _mm512_or_si512(_mm512_and_si512(v, sign), _mm512_or_si512(high, low));
	return (struct pair){ _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)),
		_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000u))) };
}
#else
#define DECODE_ROWS (AFD_K_TILE_ROWS + 1)
INLINE struct pair load_fp8(const char *w)
{
	const __m512i magnitude = _mm512_set1_epi16(0x3f80);
	const __m512 exponent = _mm512_set1_ps(256);
	__m512i v = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w));
	__mmask32 nan;

	v = _mm512_and_si512(_mm512_slli_epi16(v, 7), _mm512_set1_epi16((short)0xbf80));
	nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, magnitude), magnitude);
	v = _mm512_mask_mov_epi16(v, nan, _mm512_set1_epi16(0x7e00));
	return (struct pair){
		_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(v)), exponent),
		_mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1)), exponent) };
}
#endif

static void decode(const char *w, uint32_t n_k, float *out)
{
	for (uint32_t k = 0; k < n_k; k++) {
		struct pair p = load_fp8(w + 32 * k);

		_mm512_store_ps(out + 32 * k, p.low);
		_mm512_store_ps(out + 32 * k + 16, p.high);
	}
}

/* The sums over one block. */
INLINE void add_block(struct pair *acc, const float *x, size_t x_stride, const char *w,
	const char *ahead, uint32_t n_k, const int n_rows, const bool decoded)
{
	UNROLL
	for (int r = 0; r < n_rows; r++)
		acc[r].low = acc[r].high = _mm512_setzero_ps();
	for (uint32_t k = 0; k < n_k; k++) {
		struct pair p;

		_mm_prefetch(ahead, _MM_HINT_T0);
		if (decoded)
			p = (struct pair){ _mm512_load_ps(w), _mm512_load_ps(w + 64) };
		else
			p = load_fp8(w);
		UNROLL
		for (int r = 0; r < n_rows; r++) {
			__m512 b = _mm512_set1_ps(x[r * x_stride]);

			acc[r].low = _mm512_fmadd_ps(b, p.low, acc[r].low);
			acc[r].high = _mm512_fmadd_ps(b, p.high, acc[r].high);
		}
		x++;
		w += decoded ? 128 : 32;
		ahead += 32;
	}
}

/* y = fma(sum, scale, y), and the bias after the last block. */
INLINE void add_scaled(const struct pair *acc, const struct afd_k_tile *t, const float *scales,
	bool resume, const float *bias, const int n_rows)
{
	const bool mixed = t->scale_stride > 1;
	__m512 low_scale = mixed ? _mm512_loadu_ps(scales) : _mm512_set1_ps(*scales),
	       high_scale = mixed ? _mm512_loadu_ps(scales + 16) : low_scale;

	UNROLL
	for (int r = 0; r < n_rows; r++) {
		float *y = t->y + r * t->y_stride;
		__m512 low = resume ? _mm512_loadu_ps(y) : _mm512_setzero_ps(),
		       high = resume ? _mm512_loadu_ps(y + 16) : _mm512_setzero_ps();

		low = _mm512_fmadd_ps(acc[r].low, low_scale, low);
		high = _mm512_fmadd_ps(acc[r].high, high_scale, high);
		if (bias) {
			low = _mm512_add_ps(low, _mm512_loadu_ps(bias));
			high = _mm512_add_ps(high, _mm512_loadu_ps(bias + 16));
		}
		_mm512_storeu_ps(y, low);
		_mm512_storeu_ps(y + 16, high);
	}
}

INLINE void run_tile(const struct afd_k_tile *t, const int n_rows, const bool decoded)
{
	const float *scales = t->scales;
	uint32_t n_k = t->first_k < t->n_k ? t->first_k : t->n_k;
	struct pair acc[AFD_K_TILE_ROWS]; /* [n_rows] */

	for (uint32_t k = 0; k < t->n_k; k += n_k, scales += t->scale_stride) {
		const float *bias = NULL;

		if (k)
			n_k = t->n_k - k < AFD__SCALE_ROWS ? t->n_k - k : AFD__SCALE_ROWS;
		if (k + n_k == t->n_k)
			bias = t->bias;
		add_block(acc, t->x + k, t->x_stride, t->w + (size_t)k * (decoded ? 128 : 32),
			t->prefetch + (size_t)k * 32, n_k, n_rows, decoded);
		add_scaled(acc, t, scales, t->resume || k, bias, n_rows);
	}
}

#define ROWS(X) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12)
#define TILES(rows) \
	static void run_##rows(const struct afd_k_tile *t) \
	{ \
		run_tile(t, rows, false); \
	} \
	static void run_decoded_##rows(const struct afd_k_tile *t) \
	{ \
		run_tile(t, rows, true); \
	}
ROWS(TILES)

#define ENTRY(rows)         [rows] = run_##rows,
#define ENTRY_DECODED(rows) [rows] = run_decoded_##rows,

static const afd_k_tile_fn run_decoded[AFD_K_TILE_ROWS + 1] = { ROWS(ENTRY_DECODED) };

#if defined(__AVX512VBMI__)
const struct afd_k_tiles afd_k_fp8_tiles_vbmi = {
#else
const struct afd_k_tiles afd_k_fp8_tiles_avx512 = {
#endif
	.direct_rows = 8,
	.tile_rows = AFD_K_TILE_ROWS,
	.single_block = 4 * AFD_K_BLOCK,
	.decode_rows = DECODE_ROWS,
	.run = { [AFD_DTYPE_FP8] = { ROWS(ENTRY) } },
	.run_decoded = run_decoded,
	.decode = decode,
};
