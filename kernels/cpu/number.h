/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One stored number to float, in plain C. Exact; the vector variants use the CPU's own conversions,
 * which agree.
 */
#ifndef AFD_KERNELS_NUMBER_H
#define AFD_KERNELS_NUMBER_H

#include <stdint.h>
#include <string.h>

#include <afd/context.h>

static inline float afd_k_float_of_bits(uint32_t bits)
{
	float f;

	memcpy(&f, &bits, sizeof(f));
	return f;
}

static inline float afd_k_float_of_bf16(uint16_t h)
{
	return afd_k_float_of_bits((uint32_t)h << 16);
}

static inline float afd_k_float_of_f16(uint16_t h)
{
	uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3ff;

	if (exponent == 31) /* infinity or NaN, which becomes quiet */
		return afd_k_float_of_bits(
			sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0));
	if (exponent)
		return afd_k_float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
	float f = (float)fraction * 0x1p-24f;
	return sign ? -f : f;
}

/* e4m3 without infinities: 1 sign, 4 exponent, 3 fraction bits. */
static inline float afd_k_float_of_fp8(uint8_t b)
{
	uint32_t sign = (uint32_t)(b & 0x80) << 24, magnitude = b & 0x7f;

	if (magnitude == 0x7f)
		return afd_k_float_of_bits(sign | 0x7fc00000u);
	if (magnitude >= 8)
		return afd_k_float_of_bits(sign | (magnitude + (120 << 3)) << 20);
	float f = (float)magnitude * 0x1p-9f;
	return sign ? -f : f;
}

/* Number i of an array of the dtype, which need not be aligned: weights in place lie as the file
 * has them. */
static inline float afd_k_float_at(const void *numbers, size_t i, int32_t dtype)
{
	uint32_t bits = 0;
	uint16_t half;

	if (dtype == AFD_DTYPE_F32) {
		memcpy(&bits, (const char *)numbers + 4 * i, sizeof(bits));
		return afd_k_float_of_bits(bits);
	}
	if (dtype == AFD_DTYPE_FP8)
		return afd_k_float_of_fp8(((const uint8_t *)numbers)[i]);
	memcpy(&half, (const char *)numbers + 2 * i, sizeof(half));
	return dtype == AFD_DTYPE_BF16 ? afd_k_float_of_bf16(half) : afd_k_float_of_f16(half);
}

#endif
