/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a row of x becomes what tensor cores take (tile.h), whoever makes it: `number` gives number i
 * of the row. A warp makes a group of 128 numbers, a block a row whose scale is the row's.
 *
 * Invariant: the same numbers give the same bits, so a kernel may write its rows in this form
 * instead of leaving that to the product. Included by tile_inputs.cu, norm.cu and operands.cu.
 *
 * FP8 pairs of weights stand in a register as k = 4t .. 4t+3, where mma wants 2t, 2t+1 and 2t+8,
 * 2t+9: so inside each 16 the numbers of x are stored in that order.
 */
#ifndef AFD_KERNELS_CUDA_TILE_FORM_H
#define AFD_KERNELS_CUDA_TILE_FORM_H

#include "group.h"
#include "tile.h"

struct row_form {
	struct tile_x x;
	uint32_t k, lead; /* numbers of a row, and zeros in front of them */
	int quantize;     /* for weights in FP8 only: as they are after e4m3 */
};

/* Number i of a row of the source. */
GPU_FN float source_at(const tile_source &from, size_t row, unsigned i)
{
	size_t at = row * from.x_stride + i;
	float x = from.x[at];

	return from.up ? x / (1 + expf(-x)) * from.up[at] : x;
}

GPU_FN unsigned form_groups(const row_form &f)
{
	return f.x.row_numbers / GROUP;
}

/* What stands at a place of the row: columns before and behind it are 0. */
template <class F> GPU_FN float form_number(const row_form &f, unsigned at, F &&number)
{
	return at >= f.lead && at - f.lead < f.k ? number(at - f.lead) : 0;
}

template <class F> GPU_FN void form_bf16(const row_form &f, size_t row, unsigned group, F &&number)
{
	uint32_t *out = (uint32_t *)(tile_numbers(f.x, row) + group * GROUP);

	GPU_UNROLL
	for (unsigned i = lane_id(); i < GROUP / 2; i += 32) {
		unsigned at = group * GROUP + 2 * i;

		out[i] = pack2<bf16>(form_number(f, at, number), form_number(f, at + 1, number));
	}
}

/* Where number i of 16 stands. */
GPU_FN unsigned fp8_place(unsigned i)
{
	return i / 4 * 2 + i % 2 + (i & 2 ? 8 : 0);
}

/* The power of two that brings `largest` to 2^14 .. 2^15; 1 for 0 and for what is not finite. */
GPU_FN float power_scale(float largest)
{
	uint32_t exponent = bits_of(largest) >> 23;

	if (exponent == 255 || largest == 0)
		return 1;
	return float_of_bits((exponent > 15 ? exponent - 14 : 1) << 23);
}

/* Of a group: a power of two when it loses nothing, as with numbers that were bf16; else the scale
 * that `quantize` took, by which its numbers are taken exactly. */
GPU_FN float fp8_scale(const float (&v)[GROUP_LANE])
{
	float largest = 0, power, scale;
	bool exact = true;

	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		largest = fmaxf(largest, fabsf(v[i]));
	largest = warp_max(largest);
	power = power_scale(largest);
	scale = fmaxf(largest / 448, 0x1p-126f);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		exact = exact && to_float(from_float<f16>(v[i] / power)) * power == v[i];
	return warp_ballot(exact) == ~0u ? power : scale;
}

template <class F> GPU_FN void form_fp8(const row_form &f, size_t row, unsigned group, F &&number)
{
	uint16_t *out = tile_numbers(f.x, row) + group * GROUP;
	float v[GROUP_LANE], scale;

	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = form_number(f, group * GROUP + i * 32 + lane_id(), number);
	if (f.quantize)
		group_quantize(v);
	scale = fp8_scale(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		unsigned at = i * 32 + lane_id();

		out[at / 16 * 16 + fp8_place(at % 16)] = from_float<f16>(v[i] / scale).bits;
	}
	if (lane_id() == 0)
		tile_scales(f.x, row)[group] = scale;
}

/* By a block of N_THREADS, once. */
template <int N_THREADS, class F> GPU_FN void form_f16(const row_form &f, size_t row, F &&number)
{
	GPU_SHARED(float, largest, N_THREADS / 32);
	uint32_t *out = (uint32_t *)tile_numbers(f.x, row);
	float most = 0, scale;

	for (unsigned i = thread_x(); i < f.k; i += N_THREADS)
		most = fmaxf(most, fabsf(number(i)));
	most = warp_max(most);
	if (lane_id() == 0)
		largest[warp_id()] = most;
	barrier();
	GPU_UNROLL
	for (unsigned i = 0; i < N_THREADS / 32; i++)
		most = fmaxf(most, largest[i]);
	scale = power_scale(most);
	for (unsigned i = thread_x(); i < f.x.row_numbers / 2; i += N_THREADS)
		out[i] = pack2<f16>(form_number(f, 2 * i, number) / scale,
			form_number(f, 2 * i + 1, number) / scale);
	if (thread_x() == 0)
		*tile_scales(f.x, row) = scale;
}

#endif
