/* SPDX-License-Identifier: Apache-2.0 */
/*
 * out[i] = row ids[i] of the table, times scale. A block copies one row.
 */
#include "dispatch.h"

enum { THREADS = 256 };

template <class T>
GPU_KERNEL(THREADS) embed_kernel(struct afd__embed_args a, size_t row_bytes)
{
	size_t row = block_x(), width = a.table.k;
	const T *from = (const T *)((const char *)a.table.data + (size_t)a.ids[row] * row_bytes);
	float *out = a.out + row * width;

	for (size_t i = thread_x(); i < width; i += THREADS)
		out[i] = to_float(from[i]) * a.scale;
}

int afd_gpu_embed(const struct afd_gpu *gpu, const struct afd__embed_args *a)
{
	return with_wide_dtype(a->table.dtype, [&](auto t) {
		return gpu_launch(gpu, "embed", embed_kernel<decltype(t)>, { a->n_rows, 1, 1 },
			THREADS, 0, *a, matrix_row_bytes(&a->table));
	});
}
