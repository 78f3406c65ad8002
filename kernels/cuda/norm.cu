/* SPDX-License-Identifier: Apache-2.0 */
/*
 * h += add; out = h / rms(h) * weight. A block does one row; a thread meets the same numbers in both
 * passes, so only the sum crosses threads.
 */
#include "block.h"

enum { THREADS = 512 };

GPU_KERNEL(THREADS) norm_kernel(struct afd__norm_args a)
{
	size_t row = block_x();
	float *h = a.h + row * a.width, sum = 0, scale;

	for (size_t i = thread_x(); i < a.width; i += THREADS) {
		float x = h[i];

		if (a.add) {
			x += a.add[row * a.width + i];
			h[i] = x;
		}
		sum += x * x;
	}
	if (!a.out)
		return;
	sum = block_sum<THREADS>(sum);
	scale = 1 / sqrtf(sum / (float)a.width + a.eps);
	for (size_t i = thread_x(); i < a.width; i += THREADS)
		a.out[row * a.width + i] = h[i] * scale * a.weight[i];
}

int afd_gpu_norm(const struct afd_gpu *gpu, const struct afd__norm_args *a)
{
	return gpu_launch(gpu, "norm", norm_kernel, { a->n_rows, 1, 1 }, THREADS, 0, *a);
}
