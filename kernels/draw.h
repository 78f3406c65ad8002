/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a draw is made of: the order of candidates, their weights, the random number, and the places
 * that these cut out. Devices and hosts differ only in how they find the candidate at a place.
 *
 * Invariant: the same on every machine to the last bit. Weights are integers, so their sums are the
 * same in any order; what is not is one multiplication of doubles at a time, which no compiler can
 * contract. Called by lib/attn/sample.c and kernels/cuda/sample.cu.
 */
#ifndef AFD_KERNELS_DRAW_H
#define AFD_KERNELS_DRAW_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define AFD_DRAW_FN static __host__ __device__ __forceinline__
#else
#define AFD_DRAW_FN static inline
#endif

/* How logits of one row become weights. */
struct afd__draw {
	double largest, slope; /* log2 of a weight falls by slope for each 1 below the largest */
	int32_t shift;         /* the largest weighs 2^(32 + shift) */
};

/* All weights of a row sum up to 2^62 at most. */
AFD_DRAW_FN struct afd__draw afd__draw_of(float largest, float temperature, uint32_t width)
{
	struct afd__draw d = { largest, 1.4426950408889634 / (double)temperature, 30 };

	while (d.shift > -1 && (uint32_t)1 << (30 - d.shift) < width)
		d.shift--;
	return d;
}

/* 2^(32 - part / 2^32), within 4: the series of the exponential function, in fixed point. */
AFD_DRAW_FN uint64_t afd__draw_power(uint32_t part)
{
	const uint32_t terms[10] = { 0xb17217f8, 0x3d7f7bff, 0x0e35846c, 0x0276556e, 0x00576200,
		0x000a1849, 0x0000ffe6, 0x0000162c, 0x000001b5, 0x0000001e };
	uint64_t sum = 0;

	for (int k = 9; k >= 0; k--)
		sum = terms[k] - (part * sum >> 32);
	return ((uint64_t)1 << 32) - (part * sum >> 32);
}

AFD_DRAW_FN uint64_t afd__draw_weight(const struct afd__draw *d, float x)
{
	double fall = (d->largest - (double)x) * d->slope;
	uint64_t at, power;
	int32_t shift;

	if (fall >= 62)
		return 0;
	at = (uint64_t)(fall * 4294967296.0);
	power = afd__draw_power((uint32_t)at);
	shift = d->shift - (int32_t)(at >> 32);
	return shift >= 0 ? power << shift : power >> -shift;
}

/* Ascends as logits fall; -0 is 0. */
AFD_DRAW_FN uint32_t afd__draw_key(float x)
{
	uint32_t bits;

	x += 0.0f;
	memcpy(&bits, &x, sizeof(bits));
	return bits & 0x80000000 ? bits : ~(bits | 0x80000000);
}

AFD_DRAW_FN float afd__draw_logit(uint32_t key)
{
	uint32_t bits = key & 0x80000000 ? key : ~key & 0x7fffffff;
	float x;

	memcpy(&x, &bits, sizeof(x));
	return x;
}

/* The finaliser of splitmix64. */
AFD_DRAW_FN uint64_t afd__draw_mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

/* In [0, 1), from seed and position alone. */
AFD_DRAW_FN double afd__draw_uniform(uint64_t seed, uint64_t position)
{
	const uint64_t golden = 0x9e3779b97f4a7c15u;
	uint64_t x = afd__draw_mix(afd__draw_mix(seed + golden) + (position + 1) * golden);

	return (double)(x >> 11) * 0x1p-53;
}

/* The place in a sum of weights, 0 .. sum - 1, that is this part of it. */
AFD_DRAW_FN uint64_t afd__draw_place(double part, uint64_t sum)
{
	uint64_t at = (uint64_t)(part * (double)sum);

	return at < sum ? at : sum - 1;
}

/* The last place of the fewest weights that reach the part. */
AFD_DRAW_FN uint64_t afd__draw_last_place(double part, uint64_t sum)
{
	double wanted = part * (double)sum;
	uint64_t at = (uint64_t)wanted;

	at = at && (double)at == wanted ? at - 1 : at;
	return at < sum ? at : sum - 1;
}

#endif
