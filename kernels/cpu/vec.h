/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A vector of AFD_K_LANES floats, the only thing in which the variants of an operation differ: each
 * operation is one source, compiled once per variant with 4 (plain C), 8 (AVX2) or 16 (AVX-512)
 * lanes.
 *
 * Every function here has one order of operations: lane i of a result depends on lane i of the
 * arguments, and sums over lanes are trees of halves. So a row's bits depend on the variant, never
 * on its neighbours. The plain variant has no fused multiply-add, because a CPU without one would
 * pay a library call for each.
 *
 * Included by the operations' sources only; their public names are made by AFD_K().
 */
#ifndef AFD_KERNELS_VEC_H
#define AFD_KERNELS_VEC_H

#include <string.h>

#include "kernels.h"
#include "number.h"

#if AFD_K_LANES > 4
#include <immintrin.h>
#endif

#define AFD_K_PASTE_(a, b) afd_k_##a##_##b
#define AFD_K_PASTE(a, b)  AFD_K_PASTE_(a, b)
#define AFD_K(name)        AFD_K_PASTE(name, AFD_K_VARIANT) /* norm -> afd_k_norm_avx2 */

#define LANES  AFD_K_LANES
#define INLINE static inline __attribute__((always_inline, unused))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES)));
typedef int32_t vec_int __attribute__((vector_size(4 * LANES)));
typedef uint16_t vec_half __attribute__((vector_size(2 * LANES)));
typedef uint8_t vec_byte __attribute__((vector_size(LANES)));

INLINE vec vec_splat(float x)
{
	return x - (vec){ 0 }; /* minus, because -0 + 0 is +0 */
}

INLINE vec vec_load(const float *p)
{
	vec v;

	memcpy(&v, p, sizeof(v));
	return v;
}

INLINE void vec_store(float *p, vec v)
{
	memcpy(p, &v, sizeof(v));
}

INLINE vec vec_select(vec_int mask, vec yes, vec no)
{
	return (vec)(((vec_int)yes & mask) | ((vec_int)no & ~mask));
}

/* a > b ? a : b, so b when one of them is NaN; likewise the smaller. */
INLINE vec vec_max(vec a, vec b)
{
#if LANES == 16
	return _mm512_max_ps(a, b);
#elif LANES == 8
	return _mm256_max_ps(a, b);
#else
	return vec_select(a > b, a, b);
#endif
}

INLINE vec vec_min(vec a, vec b)
{
#if LANES == 16
	return _mm512_min_ps(a, b);
#elif LANES == 8
	return _mm256_min_ps(a, b);
#else
	return vec_select(a < b, a, b);
#endif
}

/* a * b + c */
INLINE vec vec_fma(vec a, vec b, vec c)
{
#if LANES == 16
	return _mm512_fmadd_ps(a, b, c);
#elif LANES == 8
	return _mm256_fmadd_ps(a, b, c);
#else
	return a * b + c;
#endif
}

/* Halves added to halves. */
INLINE float vec_sum(vec v)
{
#if LANES == 16
	__m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif LANES == 8
	__m256 half = v;
#endif
#if LANES > 4
	__m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
	vec quarter = v;
#endif
	return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

#if LANES == 16
INLINE vec add_halves(vec a, vec b)
{
	return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
}

INLINE vec add_quarters(vec a, vec b)
{
	return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
}

/* Numbers two apart, within quarters. */
INLINE vec add_pairs(vec a, vec b)
{
	__m512d low = _mm512_unpacklo_pd((__m512d)a, (__m512d)b),
		high = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);

	return (vec)low + (vec)high;
}

INLINE vec add_neighbours(vec a, vec b)
{
	return _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
}
#elif LANES == 8
INLINE vec add_halves(vec a, vec b)
{
	return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
}

INLINE vec add_pairs(vec a, vec b)
{
	__m256d low = _mm256_unpacklo_pd((__m256d)a, (__m256d)b),
		high = _mm256_unpackhi_pd((__m256d)a, (__m256d)b);

	return (vec)low + (vec)high;
}

INLINE vec add_neighbours(vec a, vec b)
{
	return _mm256_shuffle_ps(a, b, 0x88) + _mm256_shuffle_ps(a, b, 0xdd);
}
#endif

/* Lane i is vec_sum(v[i]), bit for bit, at a third of the work. */
INLINE vec vec_sums(const vec v[LANES])
{
#if LANES > 4
	vec fours[4]; /* [i]: of v[i], v[4 + i], .., a quarter for each */

	for (int i = 0; i < 4; i++) {
#if LANES == 16
		fours[i] = add_quarters(
			add_halves(v[i], v[4 + i]), add_halves(v[8 + i], v[12 + i]));
#else
		fours[i] = add_halves(v[i], v[4 + i]);
#endif
	}
	return add_neighbours(add_pairs(fours[0], fours[1]), add_pairs(fours[2], fours[3]));
#else
	return (vec){ vec_sum(v[0]), vec_sum(v[1]), vec_sum(v[2]), vec_sum(v[3]) };
#endif
}

/* NaN only among its like: what vec_max made of a NaN at the beginning is NaN in every lane. */
INLINE float vec_largest(vec v)
{
#if LANES == 16
	__m256 half = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif LANES == 8
	__m256 half = v;
#endif
#if LANES > 4
	__m128 four = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
	vec four = v;
#endif
	float even = four[0] > four[2] ? four[0] : four[2],
	      odd = four[1] > four[3] ? four[1] : four[3];

	return even > odd ? even : odd;
}

/* ---- numbers of any dtype; `p` need not be aligned ---- */

INLINE size_t dtype_bytes(const int dtype)
{
	return dtype == AFD_DTYPE_F32 ? 4 : dtype == AFD_DTYPE_FP8 ? 1 : 2;
}

#if LANES == 4
INLINE uint16_t f16_of_float(float x)
{
	uint32_t bits, sign, magnitude;
	float shifted;

	memcpy(&bits, &x, sizeof(bits));
	sign = bits >> 16 & 0x8000;
	magnitude = bits & 0x7fffffff;
	if (magnitude > 0x7f800000)
		return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
	if (magnitude >= 0x477ff000) /* 65520, halfway to what would be 65536 */
		return (uint16_t)(sign | 0x7c00);
	if (magnitude >= 0x38800000) {
		magnitude += 0xfff + (magnitude >> 13 & 1);
		return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
	}
	/* Denormal: one half has the ulp of a denormal f16, so the addition rounds rightly. */
	shifted = afd_k_float_of_bits(magnitude) + 0.5f;
	memcpy(&bits, &shifted, sizeof(bits));
	return (uint16_t)(sign | (bits - 0x3f000000));
}
#endif

/* Wider integers, a byte with its sign and a half without, and back without what is above: one
 * instruction each, which compilers do not find. */
INLINE vec_bits bits_of_half(vec_half h)
{
#if LANES == 16
	return (vec_bits)_mm512_cvtepu16_epi32((__m256i)h);
#elif LANES == 8
	return (vec_bits)_mm256_cvtepu16_epi32((__m128i)h);
#else
	return __builtin_convertvector(h, vec_bits);
#endif
}

#if LANES > 4
INLINE vec_half half_of_byte(vec_byte b)
{
#if LANES == 16
	return (vec_half)_mm256_cvtepi8_epi16((__m128i)b);
#else
	return (vec_half)_mm_cvtepi8_epi16(_mm_set_epi64x(0, (int64_t)b));
#endif
}
#endif

INLINE vec_half half_of_bits(vec_bits bits)
{
#if LANES == 16
	return (vec_half)_mm512_cvtepi32_epi16((__m512i)bits);
#else
	return __builtin_convertvector(bits, vec_half);
#endif
}

INLINE vec_byte byte_of_bits(vec_bits bits)
{
#if LANES == 16
	return (vec_byte)_mm512_cvtepi32_epi8((__m512i)bits);
#else
	return __builtin_convertvector(bits, vec_byte);
#endif
}

INLINE vec vec_of_f16(vec_half h)
{
#if LANES == 16
	return _mm512_cvtph_ps((__m256i)h);
#elif LANES == 8
	return _mm256_cvtph_ps((__m128i)h);
#else
	vec v;

	for (int i = 0; i < LANES; i++)
		v[i] = afd_k_float_of_f16(h[i]);
	return v;
#endif
}

INLINE vec_half vec_to_f16(vec v)
{
#if LANES == 16
	return (vec_half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES == 8
	return (vec_half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
	vec_half h;

	for (int i = 0; i < LANES; i++)
		h[i] = f16_of_float(v[i]);
	return h;
#endif
}

INLINE vec_half vec_to_bf16(vec v)
{
	vec_bits bits = (vec_bits)v, even = bits + 0x7fff + (bits >> 16 & 1),
		 quiet = bits | 0x400000;
	vec_int is_nan = v != v;

	return half_of_bits((vec_bits)vec_select(is_nan, (vec)quiet, (vec)even) >> 16);
}

/* The seven low bits stand as an f16 whose exponent is 8 too small, denormals included. */
INLINE vec vec_of_fp8(vec_byte b)
{
#if LANES > 4
	vec_half h = half_of_byte(b) << 7 & 0xbf80;
#if LANES == 16
	const __m256i magnitude = _mm256_set1_epi16(0x3f80), all = _mm256_set1_epi16(0x7fff);
	__m256i v = (__m256i)h;
	__mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(v, magnitude), magnitude);

	h = (vec_half)_mm256_mask_mov_epi16(v, nan, _mm256_or_si256(v, all));
#else
	h |= (vec_half)((h & 0x3f80) == 0x3f80) & 0x7fff; /* NaN */
#endif
	return vec_of_f16(h) * 256.0f;
#else
	vec v;

	for (int i = 0; i < LANES; i++)
		v[i] = afd_k_float_of_fp8(b[i]);
	return v;
#endif
}

/* The nearest number of e4m3, ties to even; beyond 448 it is 448; NaN stays. */
INLINE vec vec_round_fp8(vec v)
{
	const float denormal = 0x1p14f; /* its ulp is that of denormals, 2^-9 */
	vec_bits bits = (vec_bits)v & 0x7fffffff, sign = (vec_bits)v & 0x80000000u;
	vec size = (vec)bits, even, small;

	even = (vec)((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000u);
	small = (size + denormal) - denormal;
	even = vec_select(size < 0x1p-6f, small, even);
	even = vec_select(size > 448.0f, vec_splat(448.0f), even);
	return vec_select(v != v, v, (vec)((vec_bits)even | sign));
}

/* The same as its pattern, which a carry out of the fraction rounds up rightly. */
INLINE vec_byte vec_to_fp8(vec v)
{
	const float denormal = 0x1p14f;
	vec_bits bits = (vec_bits)v, size, code, small;
	vec magnitude = vec_min((vec)(bits & 0x7fffffff), vec_splat(448.0f));

	size = (vec_bits)magnitude;
	code = ((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3);
	small = (vec_bits)(magnitude + denormal) & 15;
	code = (vec_bits)vec_select(magnitude < 0x1p-6f, (vec)small, (vec)code);
	code = (vec_bits)vec_select(v != v, (vec)((vec_bits){ 0 } + 0x7f), (vec)code);
	return byte_of_bits(code | (bits >> 24 & 0x80));
}

INLINE vec vec_load_as(const void *p, const int dtype)
{
	vec_half h;
	vec_byte b;

	if (dtype == AFD_DTYPE_F32)
		return vec_load(p);
	if (dtype == AFD_DTYPE_FP8) {
		memcpy(&b, p, sizeof(b));
		return vec_of_fp8(b);
	}
	memcpy(&h, p, sizeof(h));
	if (dtype == AFD_DTYPE_BF16)
		return (vec)(bits_of_half(h) << 16);
	return vec_of_f16(h);
}

INLINE void vec_store_as(void *p, vec v, const int dtype)
{
	vec_half h;
	vec_byte b;

	if (dtype == AFD_DTYPE_F32) {
		vec_store(p, v);
		return;
	}
	if (dtype == AFD_DTYPE_FP8) {
		b = vec_to_fp8(v);
		memcpy(p, &b, sizeof(b));
		return;
	}
	h = dtype == AFD_DTYPE_BF16 ? vec_to_bf16(v) : vec_to_f16(v);
	memcpy(p, &h, sizeof(h));
}

/* The first n numbers, or as many as there are lanes; the other lanes are +0. */
INLINE vec vec_load_some(const void *p, const int dtype, size_t n)
{
	if (n >= LANES)
		return vec_load_as(p, dtype);
#if LANES == 16
	__mmask16 mask = (__mmask16)((1u << n) - 1);
	vec_half h;

	if (dtype == AFD_DTYPE_F32)
		return _mm512_maskz_loadu_ps(mask, p);
	if (dtype == AFD_DTYPE_FP8)
		return vec_of_fp8((vec_byte)_mm_maskz_loadu_epi8(mask, p));
	h = (vec_half)_mm256_maskz_loadu_epi16(mask, p);
	return vec_load_as(&h, dtype);
#else
	char buffer[4 * LANES] = { 0 };

	memcpy(buffer, p, n * dtype_bytes(dtype));
	return vec_load_as(buffer, dtype);
#endif
}

INLINE void vec_store_some(void *p, vec v, const int dtype, size_t n)
{
	if (n >= LANES) {
		vec_store_as(p, v, dtype);
		return;
	}
#if LANES == 16
	__mmask16 mask = (__mmask16)((1u << n) - 1);

	if (dtype == AFD_DTYPE_F32)
		_mm512_mask_storeu_ps(p, mask, v);
	else if (dtype == AFD_DTYPE_FP8)
		_mm_mask_storeu_epi8(p, mask, (__m128i)vec_to_fp8(v));
	else
		_mm256_mask_storeu_epi16(p, mask,
			(__m256i)(dtype == AFD_DTYPE_BF16 ? vec_to_bf16(v) : vec_to_f16(v)));
#else
	char buffer[4 * LANES];

	vec_store_as(buffer, v, dtype);
	memcpy(p, buffer, n * dtype_bytes(dtype));
#endif
}

/*
 * e^x within 2 ulp, denormal results and overflow to infinity included; NaN stays NaN. x = k ln 2 +
 * r with |r| <= ln 2 / 2, and e^r = 1 + r + r^2 p(r), where p is a minimax fit of this project. 2^k
 * goes in as two factors, so that k may leave the range of normal exponents.
 */
INLINE vec vec_exp(vec x)
{
	const float round = 0x1.8p23f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
	vec biased, k, r, p;
	vec_int n, half;

	x = vec_min(vec_splat(89.0f), vec_max(vec_splat(-104.0f), x));
	biased = x * 0x1.715476p0f + round;
	k = biased - round;
	r = (x - k * ln2_high) - k * ln2_low;
	p = r * 0x1.6a2352p-10f + 0x1.123a6cp-7f;
	p = p * r + 0x1.5558f4p-5f;
	p = p * r + 0x1.55549p-3f;
	p = p * r + 0x1.fffffcp-2f;
	p = (r * r) * p + r + 1.0f;
	n = (vec_int)((vec_bits)biased - (vec_bits)vec_splat(round));
	half = n >> 1;
	return p * (vec)((vec_bits)(half + 127) << 23) * (vec)((vec_bits)(n - half + 127) << 23);
}

#endif
