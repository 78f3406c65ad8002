/* SPDX-License-Identifier: Apache-2.0 */
/*
 * h += add; out = h / rms(h) * weight, as float32, or in the form in which tensor cores take x
 * (tile_form.h), so that no product has to make it. A block does one row.
 *
 * Invariant: the sum is over the same numbers in the same order whatever is written, so the two
 * forms of a row have the same bits as `norm` and `inputs` one after the other.
 */
#include "block.h"
#include "tile_form.h"

enum { THREADS = 512, WARPS = THREADS / 32 };

/* As it is after crossing a wire in the dtype. */
GPU_FN float cross(float x, int32_t wire)
{
	return wire == AFD_DTYPE_BF16  ? to_float(from_float<bf16>(x))
	       : wire == AFD_DTYPE_F16 ? to_float(from_float<f16>(x))
				       : x;
}

/* Adds; returns the thread's sum of squares. */
GPU_FN float add_and_square(const struct afd__norm_args &a, size_t row)
{
	float *h = a.h + row * a.width, sum = 0;

	for (size_t i = thread_x(); i < a.width; i += THREADS) {
		float x = h[i];

		if (a.add) {
			float more = a.add[row * a.width + i];

			x += a.add_wire ? 0.0f + cross(more, a.add_wire) : more;
			h[i] = x;
		}
		sum += x * x;
	}
	return sum;
}

/* FORM: the dtype of the matrix whose inputs are written; 0: none are. */
template <int FORM> GPU_KERNEL(THREADS) norm_kernel(struct afd__norm_args a, row_form f)
{
	size_t row = block_x();
	const float *h = a.h + row * a.width;
	float sum = add_and_square(a, row), scale;

	if (!FORM && !a.out)
		return;
	sum = block_sum<THREADS>(sum); /* its barrier: others' h can be read */
	scale = 1 / sqrtf(sum / (float)a.width + a.eps);
	auto number = [&](unsigned i) { return cross(h[i] * scale * a.weight[i], a.out_wire); };
	if (a.out) {
		for (unsigned i = thread_x(); i < a.width; i += THREADS)
			a.out[row * a.width + i] = number(i);
	}
	if (FORM == AFD_DTYPE_F16)
		form_f16<THREADS>(f, row, number);
	for (unsigned group = warp_id(); group < form_groups(f); group += WARPS) {
		if (FORM == AFD_DTYPE_BF16)
			form_bf16(f, row, group, number);
		if (FORM == AFD_DTYPE_FP8)
			form_fp8(f, row, group, number);
	}
}

template <int FORM>
static int launch(const struct afd_gpu *gpu, const struct afd__norm_args *a, const row_form &f)
{
	return gpu_launch(gpu, FORM ? "norm_inputs" : "norm", norm_kernel<FORM>, { a->n_rows, 1, 1 },
		THREADS, 0, *a, f);
}

int afd_gpu_norm(const struct afd_gpu *gpu, const struct afd__norm_args *a)
{
	const struct afd__inputs *i = &a->inputs;
	struct afd__matrix w = {};
	row_form f = {};

	if (!i->rows)
		return launch<0>(gpu, a, f);
	w.dtype = i->dtype;
	w.k = a->width;
	w.column_offset = i->column_offset;
	f = { tile_x_at(tile_shape(&w), i->rows), w.k, w.column_offset % TILE_K, i->quantize };
	return i->dtype == AFD_DTYPE_BF16  ? launch<AFD_DTYPE_BF16>(gpu, a, f)
	       : i->dtype == AFD_DTYPE_F16 ? launch<AFD_DTYPE_F16>(gpu, a, f)
					   : launch<AFD_DTYPE_FP8>(gpu, a, f);
}
