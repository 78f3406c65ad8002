/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cosines and sines for rope: of the float32 product position * inv_freq, taken in double and
 * rounded once, as on the CPU. They are few.
 */
#include "gpu.h"

enum { THREADS = 64 };

GPU_KERNEL(THREADS) angles_kernel(struct afd__angles_args a)
{
	size_t row = block_x(), half = a.head_dim / 2;
	float *out = a.out + row * a.head_dim;

	for (size_t i = thread_x(); i < half; i += THREADS) {
		float angle = (float)a.positions[row] * a.inv_freq[i];

		out[i] = (float)cos((double)angle) * a.scale;
		out[half + i] = (float)sin((double)angle) * a.scale;
	}
}

int afd_gpu_angles(const struct afd_gpu *gpu, const struct afd__angles_args *a)
{
	return gpu_launch(gpu, "angles", angles_kernel, { a->n_rows, 1, 1 }, THREADS, 0, *a);
}
