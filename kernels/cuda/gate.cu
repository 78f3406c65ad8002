/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate on the output of attention: x = x * sigmoid(gate). Each number stands alone.
 */
#include "gpu.h"

enum { THREADS = 256, COLUMNS = 4 * THREADS };

GPU_KERNEL(THREADS) gate_kernel(struct afd__gate_args a)
{
	size_t row = block_x(), first = (size_t)block_y() * COLUMNS + thread_x();
	const float *gate = a.gate + row * a.gate_stride;
	float *x = a.x + row * a.width;

	GPU_UNROLL
	for (size_t i = first; i < first + COLUMNS; i += THREADS) {
		if (i < a.width)
			x[i] = x[i] * (1 / (1 + expf(-gate[i])));
	}
}

int afd_gpu_gate(const struct afd_gpu *gpu, const struct afd__gate_args *a)
{
	return gpu_launch(gpu, "gate", gate_kernel,
		{ a->n_rows, (unsigned)divide_up(a->width, COLUMNS), 1 }, THREADS, 0, *a);
}
