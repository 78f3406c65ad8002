/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows from one dtype to another, gathered or scattered by an index if there is one, or added to
 * float rows.
 * Exact: to nearest even, denormals kept. Source and destination may be slots in host memory.
 */
#include "dispatch.h"

enum { THREADS = 256, COLUMNS = 4 * THREADS };

template <class From, class To>
GPU_KERNEL(THREADS) convert_kernel(struct afd__convert_args a)
{
	size_t row = block_x(), first = (size_t)block_y() * COLUMNS + thread_x();
	size_t other = a.index ? (size_t)a.index[row] : row, from = a.scatter ? row : other,
	       to = a.scatter ? other : row;
	const From *src = (const From *)((const char *)a.src + from * a.src_stride);
	To *dst = (To *)((char *)a.dst + to * a.dst_stride);

	GPU_UNROLL
	for (size_t i = first; i < first + COLUMNS; i += THREADS) {
		if (i < a.width) {
			float x = to_float(src[i]);

			if (a.accumulate)
				x += to_float(dst[i]);
			dst[i] = from_float<To>(x);
		}
	}
}

/* Of one dtype: the bits. */
template <class T> GPU_KERNEL(THREADS) move_kernel(struct afd__convert_args a)
{
	size_t row = block_x(), first = (size_t)block_y() * COLUMNS + thread_x();
	size_t other = a.index ? (size_t)a.index[row] : row, from = a.scatter ? row : other,
	       to = a.scatter ? other : row;
	const T *src = (const T *)((const char *)a.src + from * a.src_stride);
	T *dst = (T *)((char *)a.dst + to * a.dst_stride);

	GPU_UNROLL
	for (size_t i = first; i < first + COLUMNS; i += THREADS) {
		if (i < a.width)
			dst[i] = src[i];
	}
}

template <class From, class To>
static int launch(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	return gpu_launch(gpu, "convert", convert_kernel<From, To>,
		{ a->n_rows, (unsigned)divide_up(a->width, COLUMNS), 1 }, THREADS, 0, *a);
}

template <class T>
static int launch_move(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	return gpu_launch(gpu, "convert", move_kernel<T>,
		{ a->n_rows, (unsigned)divide_up(a->width, COLUMNS), 1 }, THREADS, 0, *a);
}

int afd_gpu_convert(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	if (a->src_dtype == a->dst_dtype && !a->accumulate)
		return a->src_dtype == AFD_DTYPE_F32 ? launch_move<uint32_t>(gpu, a)
						     : launch_move<uint16_t>(gpu, a);
	if (a->dst_dtype == AFD_DTYPE_F32)
		return with_wide_dtype(a->src_dtype,
			[&](auto t) { return launch<decltype(t), float>(gpu, a); });
	return with_wide_dtype(a->dst_dtype,
		[&](auto t) { return launch<float, decltype(t)>(gpu, a); });
}
