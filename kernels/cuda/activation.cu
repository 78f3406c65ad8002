/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SwiGLU: out = silu(gate) * up, silu(x) = x / (1 + e^-x). Each number stands alone.
 */
#include "gpu.h"

enum { THREADS = 256, COLUMNS = 4 * THREADS };

GPU_KERNEL(THREADS) activation_kernel(struct afd__activation_args a)
{
	size_t row = block_x(), first = (size_t)block_y() * COLUMNS + thread_x();
	const float *gate = a.gate_up + row * 2 * a.width, *up = gate + a.width;

	GPU_UNROLL
	for (size_t i = first; i < first + COLUMNS; i += THREADS) {
		if (i < a.width)
			a.out[row * a.width + i] = gate[i] / (1 + expf(-gate[i])) * up[i];
	}
}

int afd_gpu_activation(const struct afd_gpu *gpu, const struct afd__activation_args *a)
{
	return gpu_launch(gpu, "activation", activation_kernel,
		{ a->n_rows, (unsigned)divide_up(a->width, COLUMNS), 1 }, THREADS, 0, *a);
}
