/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of x as tensor cores take them (tile.h, tile_form.h), from rows in float32 or from what a
 * SwiGLU activates; and the shape of such rows.
 */
#include "tile_form.h"

enum { WARPS = 4 };

GPU_FN bool is_used(const tile_source &from, size_t row)
{
	return !from.n_used || row < *from.n_used;
}

GPU_KERNEL(WARPS * 32) inputs_bf16_kernel(tile_source from, row_form f)
{
	unsigned group = block_y() * WARPS + warp_id();
	size_t row = block_x();

	if (group >= form_groups(f) || !is_used(from, row)) /* the whole warp */
		return;
	form_bf16(f, row, group, [&](unsigned i) { return source_at(from, row, i); });
}

GPU_KERNEL(WARPS * 32) inputs_fp8_kernel(tile_source from, row_form f)
{
	unsigned group = block_y() * WARPS + warp_id();
	size_t row = block_x();

	if (group >= form_groups(f) || !is_used(from, row)) /* the whole warp */
		return;
	form_fp8(f, row, group, [&](unsigned i) { return source_at(from, row, i); });
}

/* A block does one row: the scale is the row's. */
GPU_KERNEL(WARPS * 32) inputs_f16_kernel(tile_source from, row_form f)
{
	size_t row = block_x();

	if (is_used(from, row)) /* the whole block */
		form_f16<WARPS * 32>(
			f, row, [&](unsigned i) { return source_at(from, row, i); });
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
	size_t groups = divide_up((size_t)lead + w->k, TILE_K);

	x.row_numbers = (uint32_t)(groups * TILE_K);
	x.n_scales = w->dtype == AFD_DTYPE_FP8 ? (uint32_t)groups : w->dtype == AFD_DTYPE_F16;
	x.row_bytes = groups * TILE_K * 2 + divide_up(x.n_scales * (size_t)4, 16) * 16;
	return x;
}

struct tile_x tile_x_at(struct tile_x shape, void *memory)
{
	shape.numbers = (uint16_t *)memory;
	shape.scales = shape.n_scales && memory ? (float *)(shape.numbers + shape.row_numbers) : NULL;
	return shape;
}

size_t afd_gpu_input_row_bytes(const struct afd__matrix *w)
{
	size_t row_bytes = tile_shape(w).row_bytes;

	return tile_fits(w) && row_bytes <= GPU_INPUT_ROW_MAX ? row_bytes : 0;
}

int tile_inputs(const struct afd_gpu *gpu, const struct afd__matrix *w,
	const struct tile_source *from, const struct tile_x *out)
{
	row_form f = { *out, w->k, w->column_offset % TILE_K, from->quantize };
	uint32_t n_rows = from->n_rows;
	unsigned groups = (unsigned)divide_up(out->row_numbers / GROUP, WARPS);

	if (w->dtype == AFD_DTYPE_BF16)
		return gpu_launch(gpu, "inputs_bf16", inputs_bf16_kernel, { n_rows, groups, 1 },
			WARPS * 32, 0, *from, f);
	if (w->dtype == AFD_DTYPE_F16)
		return gpu_launch(gpu, "inputs_f16", inputs_f16_kernel, { n_rows, 1, 1 },
			WARPS * 32, 0, *from, f);
	return gpu_launch(gpu, "inputs_fp8", inputs_fp8_kernel, { n_rows, groups, 1 }, WARPS * 32,
		0, *from, f);
}
