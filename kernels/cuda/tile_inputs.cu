/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of x as tensor cores take them (tile.h). A warp makes one group of 128 numbers.
 *
 * FP8 pairs of weights stand in a register as k = 4t .. 4t+3, where mma wants 2t, 2t+1 and 2t+8,
 * 2t+9: so inside each 16 the numbers of x are stored in that order.
 */
#include "group.h"
#include "tile.h"

enum { WARPS = 4 };

struct inputs {
	struct tile_source from;
	uint32_t k, lead;
	struct tile_x out;
};

GPU_FN bool is_used(const inputs &a, size_t row)
{
	return !a.from.n_used || row < *a.from.n_used;
}

/* Number i of a row of the source. */
GPU_FN float source_at(const inputs &a, size_t row, unsigned i)
{
	size_t at = row * a.from.x_stride + i;
	float x = a.from.x[at];

	return a.from.up ? x / (1 + expf(-x)) * a.from.up[at] : x;
}

/* Number i of the group, of which columns before and behind the row are 0. */
GPU_FN float number_at(const inputs &a, size_t row, unsigned group, unsigned i)
{
	unsigned at = group * GROUP + i;

	return at >= a.lead && at - a.lead < a.k ? source_at(a, row, at - a.lead) : 0;
}

GPU_KERNEL(WARPS * 32) inputs_bf16_kernel(inputs a)
{
	unsigned group = block_y() * WARPS + warp_id();
	size_t row = block_x();
	uint32_t *out = (uint32_t *)(a.out.numbers + row * a.out.row_numbers + group * GROUP);

	if (group * GROUP >= a.out.row_numbers || !is_used(a, row)) /* the whole warp */
		return;
	GPU_UNROLL
	for (unsigned i = lane_id(); i < GROUP / 2; i += 32)
		out[i] = pack2<bf16>(
			number_at(a, row, group, 2 * i), number_at(a, row, group, 2 * i + 1));
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

GPU_KERNEL(WARPS * 32) inputs_fp8_kernel(inputs a)
{
	unsigned group = block_y() * WARPS + warp_id();
	size_t row = block_x();
	uint16_t *out = a.out.numbers + row * a.out.row_numbers + group * GROUP;
	float v[GROUP_LANE], scale;

	if (group * GROUP >= a.out.row_numbers || !is_used(a, row)) /* the whole warp */
		return;
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = number_at(a, row, group, i * 32 + lane_id());
	if (a.from.quantize)
		group_quantize(v);
	scale = fp8_scale(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		unsigned at = i * 32 + lane_id();

		out[at / 16 * 16 + fp8_place(at % 16)] = from_float<f16>(v[i] / scale).bits;
	}
	if (lane_id() == 0)
		a.out.scales[row * a.out.n_scales + group] = scale;
}

/* A block does one row: the scale is the row's. */
GPU_KERNEL(WARPS * 32) inputs_f16_kernel(inputs a)
{
	GPU_SHARED(float, largest, WARPS);
	size_t row = block_x();
	uint32_t *out = (uint32_t *)(a.out.numbers + row * a.out.row_numbers);
	float most = 0, scale;

	if (!is_used(a, row)) /* the whole block */
		return;
	for (unsigned i = thread_x(); i < a.k; i += WARPS * 32)
		most = fmaxf(most, fabsf(source_at(a, row, i)));
	most = warp_max(most);
	if (lane_id() == 0)
		largest[warp_id()] = most;
	barrier();
	GPU_UNROLL
	for (unsigned i = 0; i < WARPS; i++)
		most = fmaxf(most, largest[i]);
	scale = power_scale(most);
	for (unsigned i = thread_x(); i < a.out.row_numbers / 2; i += WARPS * 32)
		out[i] = pack2<f16>(
			number_at(a, row, 0, 2 * i) / scale, number_at(a, row, 0, 2 * i + 1) / scale);
	if (thread_x() == 0)
		a.out.scales[row] = scale;
}

int tile_fits(const struct afd__matrix *w)
{
	size_t stride = matrix_row_bytes(w);

	return w->dtype != AFD_DTYPE_F32 && stride % 16 == 0 && (uintptr_t)w->data % 16 == 0 &&
	       w->data_stride % 16 == 0 && w->column_offset % 16 == 0;
}

struct tile_x tile_shape(const struct afd__matrix *w)
{
	struct tile_x x = {};
	unsigned lead = w->column_offset % TILE_K;

	x.row_numbers = (uint32_t)(divide_up((size_t)lead + w->k, TILE_K) * TILE_K);
	x.n_scales = w->dtype == AFD_DTYPE_FP8 ? x.row_numbers / TILE_K : w->dtype == AFD_DTYPE_F16;
	return x;
}

size_t tile_x_bytes(const struct tile_x *x, uint32_t n_rows)
{
	return (size_t)n_rows * (x->row_numbers * 2 + divide_up(x->n_scales * 4, 16) * 16);
}

int tile_inputs(const struct afd_gpu *gpu, const struct afd__matrix *w,
	const struct tile_source *from, const struct tile_x *out)
{
	inputs a = { *from, w->k, w->column_offset % TILE_K, *out };
	uint32_t n_rows = from->n_rows;
	unsigned groups = (unsigned)divide_up(out->row_numbers / GROUP, WARPS);

	if (w->dtype == AFD_DTYPE_BF16)
		return gpu_launch(gpu, "inputs_bf16", inputs_bf16_kernel, { n_rows, groups, 1 },
			WARPS * 32, 0, a);
	if (w->dtype == AFD_DTYPE_F16)
		return gpu_launch(
			gpu, "inputs_f16", inputs_f16_kernel, { n_rows, 1, 1 }, WARPS * 32, 0, a);
	return gpu_launch(gpu, "inputs_fp8", inputs_fp8_kernel, { n_rows, groups, 1 }, WARPS * 32,
		0, a);
}
