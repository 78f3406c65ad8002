/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operands for a library's matrix product (modules/cuda/blaslt_product.c): x as our own products take
 * it (tile_form.h), but FP8 in e4m3; and scales where cuBLASLt looks for them: of
 * x one for a row and 128 columns, rows side by side; of the weights one for a block of 128 x 128,
 * columns side by side, in a multiple of 4.
 *
 * Invariant: x of FP8 was quantised, or is here, so that its numbers are taken exactly.
 */
#include "tile_form.h"

enum { WARPS = 4, SCALES_STEP = 4, ALIGNMENT = 256 };

struct operands {
	struct tile_source from;
	struct tile_x made; /* instead of from, unless numbers is NULL */
	uint32_t k, row_numbers;
	uint8_t *numbers;
	float *scales;
};

/* Number `at` of a row, 0 behind it. */
GPU_FN float operand_at(const operands &a, size_t row, unsigned at)
{
	f16 half;

	if (at >= a.k)
		return 0;
	if (a.made.numbers) {
		half.bits = tile_numbers(a.made, row)[at / 16 * 16 + fp8_place(at % 16)];
		return to_float(half) * tile_scales(a.made, row)[at / GROUP];
	}
	return source_at(a.from, row, at);
}

/* A warp makes a group of a row; rows of the grid are rows of x. */
GPU_KERNEL(WARPS * 32) operands_fp8_kernel(operands a)
{
	unsigned group = block_y() * WARPS + warp_id();
	size_t row = block_x();
	float v[GROUP_LANE], scale;

	if (group * GROUP >= a.row_numbers) /* the whole warp */
		return;
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = operand_at(a, row, group * GROUP + i * 32 + lane_id());
	scale = group_scale(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		a.numbers[row * a.row_numbers + group * GROUP + i * 32 + lane_id()] =
			from_float<fp8>(v[i] / scale).bits;
	if (lane_id() == 0)
		a.scales[(size_t)group * a.from.n_rows + row] = scale;
}

/* A block does a row of blocks. */
GPU_KERNEL(WARPS * 32) operands_scales_kernel(struct product p, float *out, unsigned n_columns)
{
	for (unsigned i = thread_x(); i < n_columns; i += WARPS * 32)
		out[(size_t)block_x() * n_columns + i] =
			i < p.n_blocks ? *scale_at(p, block_x() * GPU_BLOCK, i) : 0;
}

/* Rows of y times their scale, which the library does not know, and the bias. */
GPU_KERNEL(WARPS * 32)
operands_finish_kernel(struct tile_x x, const float *bias, float *y, size_t y_stride, unsigned n)
{
	size_t row = block_x();
	unsigned i = block_y() * WARPS * 32 + thread_x();

	if (i < n) {
		float number = y[row * y_stride + i] * (x.scales ? *tile_scales(x, row) : 1);

		y[row * y_stride + i] = bias ? number + bias[i] : number;
	}
}

static unsigned scale_columns(const struct afd__matrix *w)
{
	return (unsigned)divide_up(divide_up(w->k, GPU_BLOCK), SCALES_STEP) * SCALES_STEP;
}

int afd_gpu_operands_fit(const struct afd__matrix *w)
{
	return w->dtype == AFD_DTYPE_F32 || tile_fits(w);
}

void afd_gpu_operands_shape(const struct afd__matrix *w, struct afd_gpu_operands *o)
{
	const struct tile_x x = tile_shape(w);
	size_t scales = divide_up(w->n, GPU_BLOCK) * scale_columns(w) * sizeof(float);

	o->fixed_bytes = o->row_bytes = 0;
	o->inputs_bytes = x.row_bytes;
	o->w_numbers = matrix_row_bytes(w) / number_bytes(w->dtype);
	o->ends = w->dtype == AFD_DTYPE_F16 || w->dtype == AFD_DTYPE_FP8;
	o->row_numbers = w->dtype == AFD_DTYPE_FP8 ? x.row_numbers : x.row_bytes / 2;
	if (w->dtype == AFD_DTYPE_FP8) {
		o->fixed_bytes = divide_up(scales, ALIGNMENT) * ALIGNMENT;
		o->row_bytes = x.row_numbers + x.row_numbers / GROUP * sizeof(float);
	} else if (w->dtype != AFD_DTYPE_F32 && !o->inputs) {
		o->row_bytes = x.row_bytes;
	}
}

void afd_gpu_operands_place(const struct afd__matrix *w, struct afd_gpu_operands *o, void *memory)
{
	char *numbers = (char *)memory + o->fixed_bytes;
	bool fp8 = w->dtype == AFD_DTYPE_FP8;

	o->numbers = o->inputs && !fp8 ? (void *)o->inputs : numbers;
	o->w_scales = fp8 ? (float *)memory : NULL;
	o->x_scales = fp8 ? (float *)(numbers + o->n_rows * o->row_numbers) : NULL;
}

static int operands_fp8(const struct afd_gpu *gpu, const struct afd__matrix *w,
	const struct afd_gpu_operands *o, const tile_source &from)
{
	operands a = { from, tile_x_at(tile_shape(w), (void *)o->inputs), w->k,
		(uint32_t)o->row_numbers, (uint8_t *)o->numbers, o->x_scales };
	unsigned groups = (unsigned)divide_up(o->row_numbers / GROUP, WARPS);
	int rc = gpu_launch(gpu, "operands_fp8", operands_fp8_kernel, { o->n_rows, groups, 1 },
		WARPS * 32, 0, a);

	if (rc)
		return rc;
	return gpu_launch(gpu, "operands_scales", operands_scales_kernel,
		{ (unsigned)divide_up(w->n, GPU_BLOCK), 1, 1 }, WARPS * 32, 0, product_of(w),
		o->w_scales, scale_columns(w));
}

int afd_gpu_operands(
	const struct afd_gpu *gpu, const struct afd__matrix *w, const struct afd_gpu_operands *o)
{
	tile_source from = { o->x, o->up, o->x_stride, o->n_rows, NULL, 0 };
	tile_x to = tile_x_at(tile_shape(w), o->numbers);

	if (w->dtype == AFD_DTYPE_FP8)
		return operands_fp8(gpu, w, o, from);
	return w->dtype == AFD_DTYPE_F32 || o->inputs ? 0 : tile_inputs(gpu, w, &from, &to);
}

int afd_gpu_operands_finish(const struct afd_gpu *gpu, const struct afd__matrix *w,
	const struct afd_gpu_operands *o, const float *bias, float *y, size_t y_stride)
{
	bool scaled = w->dtype == AFD_DTYPE_F16;
	tile_x x = tile_x_at(tile_shape(w), scaled ? o->numbers : NULL);

	if (!o->ends || (!scaled && !bias))
		return 0;
	return gpu_launch(gpu, "operands_finish", operands_finish_kernel,
		{ o->n_rows, (unsigned)divide_up(w->n, WARPS * 32), 1 }, WARPS * 32, 0, x, bias, y,
		y_stride, w->n);
}
