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

/* Few rows leave FMA waiting for its own result, so two blocks go side by side. */
#define PAIRED_ROWS 2

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

/* Columns c, 16 + c, c + 1, 17 + c of one k, as bytes of a line. */
#define FOUR(c) (0x11011000 + 0x01010101 * (c))
#define EIGHT(c) FOUR(c), FOUR((c) + 2)

/* Of each quarter of a register eight bytes are of the first k and eight of the second, so that
 * unpacking parts them. */
static const uint32_t places[16] __attribute__((aligned(64))) = { EIGHT(0), EIGHT(32), EIGHT(4),
	EIGHT(36), EIGHT(8), EIGHT(40), EIGHT(12), EIGHT(44) };

INLINE void load_two(__m512i line, struct pair out[2])
{
	const __m512i sign = _mm512_set1_epi8((char)0x80);
	const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
	__m512i v = _mm512_permutexvar_epi8(_mm512_load_si512(places), line);
	__m512i low = _mm512_permutex2var_epi8(
		_mm512_load_si512(low_bytes), v, _mm512_load_si512(low_bytes + 64));
	__m512i high = _mm512_permutex2var_epi8(
		_mm512_load_si512(high_bytes), v, _mm512_load_si512(high_bytes + 64));

	high = _mm512_ternarylogic_epi32(high, v, sign, 0xf8); /* high | (v & sign) */
	v = _mm512_unpacklo_epi8(low, high);
	out[0].low = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
	out[0].high = _mm512_castsi512_ps(_mm512_and_si512(v, upper));
	v = _mm512_unpackhi_epi8(low, high);
	out[1].low = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
	out[1].high = _mm512_castsi512_ps(_mm512_and_si512(v, upper));
}
#else
#define DECODE_ROWS (AFD_K_TILE_ROWS + 1)
INLINE struct pair load_one(__m256i line)
{
	const __m512i magnitude = _mm512_set1_epi16(0x3f80);
	const __m512 exponent = _mm512_set1_ps(256);
	__m512i v = _mm512_cvtepi8_epi16(line);
	__mmask32 nan;

	v = _mm512_and_si512(_mm512_slli_epi16(v, 7), _mm512_set1_epi16((short)0xbf80));
	nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, magnitude), magnitude);
	v = _mm512_mask_mov_epi16(v, nan, _mm512_set1_epi16(0x7e00));
	return (struct pair){
		_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(v)), exponent),
		_mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1)), exponent) };
}

INLINE void load_two(__m512i line, struct pair out[2])
{
	out[0] = load_one(_mm512_castsi512_si256(line));
	out[1] = load_one(_mm512_extracti64x4_epi64(line, 1));
}
#endif

/* The last k of a block may stand alone: what lies behind it is not ours to read. */
INLINE void load_fp8(const char *w, const int n_k, struct pair out[2])
{
	if (n_k == 2)
		load_two(_mm512_loadu_si512(w), out);
	else
		load_two(_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i *)w)), out);
}

INLINE void decode_some(const char *w, const int n_k, float *out)
{
	struct pair p[2];

	load_fp8(w, n_k, p);
	for (int i = 0; i < n_k; i++) {
		_mm512_store_ps(out + 32 * i, p[i].low);
		_mm512_store_ps(out + 32 * i + 16, p[i].high);
	}
}

static void decode(const char *w, uint32_t n_k, float *out)
{
	uint32_t k = 0;

	for (; k + 2 <= n_k; k += 2)
		decode_some(w + 32 * k, 2, out + 32 * k);
	if (k < n_k)
		decode_some(w + 32 * k, 1, out + 32 * k);
}

/* One k or two. */
INLINE void add_lines(struct pair *acc, const float *x, size_t x_stride, const char *w,
	const int n_k, const int n_rows, const bool decoded)
{
	struct pair p[2];

	if (decoded) {
		for (int i = 0; i < n_k; i++)
			p[i] = (struct pair){ _mm512_load_ps(w + 128 * i),
				_mm512_load_ps(w + 128 * i + 64) };
	} else {
		load_fp8(w, n_k, p);
	}
	UNROLL
	for (int i = 0; i < n_k; i++) {
		UNROLL
		for (int r = 0; r < n_rows; r++) {
			__m512 v = _mm512_set1_ps(x[r * x_stride + i]);

			acc[r].low = _mm512_fmadd_ps(v, p[i].low, acc[r].low);
			acc[r].high = _mm512_fmadd_ps(v, p[i].high, acc[r].high);
		}
	}
}

/* The sums over n_blocks blocks of n_k each, side by side; of two both are whole. */
INLINE void add_blocks(struct pair acc[][AFD_K_TILE_ROWS], const struct afd_k_tile *t, uint32_t k0,
	uint32_t n_k, const int n_rows, const int n_blocks, const bool decoded)
{
	const size_t k_bytes = decoded ? 128 : 32, x_stride = t->x_stride;
	const char *w = t->w + k0 * k_bytes, *ahead = t->prefetch + (size_t)k0 * 32;
	const float *x = t->x + k0;
	uint32_t k = 0;

	UNROLL
	for (int b = 0; b < n_blocks; b++) {
		UNROLL
		for (int r = 0; r < n_rows; r++)
			acc[b][r].low = acc[b][r].high = _mm512_setzero_ps();
	}
	for (; k + 2 <= n_k; k += 2) {
		UNROLL
		for (int b = 0; b < n_blocks; b++) {
			const size_t at = b * AFD__SCALE_ROWS;

			/* In one run through both blocks: DRAM likes a single stream. */
			_mm_prefetch(ahead + 64 * b, _MM_HINT_T0);
			add_lines(acc[b], x + at, x_stride, w + at * k_bytes, 2, n_rows, decoded);
		}
		x += 2;
		w += 2 * k_bytes;
		ahead += 64 * n_blocks;
	}
	if (k < n_k)
		add_lines(acc[0], x, x_stride, w, 1, n_rows, decoded);
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
	const int at_once = n_rows <= PAIRED_ROWS ? 2 : 1;
	const float *scales = t->scales;
	struct pair acc[2][AFD_K_TILE_ROWS]; /* [at_once][n_rows] */
	uint32_t n_k, end, k = 0;

	for (; k < t->n_k; k = end) {
		n_k = k ? AFD__SCALE_ROWS : t->first_k;
		end = t->n_k - k < n_k ? t->n_k : k + n_k;
		if (at_once == 2 && n_k == AFD__SCALE_ROWS && t->n_k - k >= 2 * n_k) {
			add_blocks(acc, t, k, n_k, n_rows, 2, decoded);
			add_scaled(acc[0], t, scales, t->resume || k, NULL, n_rows);
			scales += t->scale_stride;
			end += n_k;
			add_scaled(acc[1], t, scales, true, end == t->n_k ? t->bias : NULL, n_rows);
		} else {
			add_blocks(acc, t, k, end - k, n_rows, 1, decoded);
			add_scaled(acc[0], t, scales, t->resume || k,
				end == t->n_k ? t->bias : NULL, n_rows);
		}
		scales += t->scale_stride;
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
