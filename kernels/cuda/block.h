/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums over a block: each warp by exchange, then the warps ascending, so that the order is the same
 * in every thread and decided by the number of threads alone.
 */
#ifndef AFD_KERNELS_CUDA_BLOCK_H
#define AFD_KERNELS_CUDA_BLOCK_H

#include "gpu.h"

template <int N_THREADS> GPU_FN float block_sum(float v)
{
	GPU_SHARED(float, sums, N_THREADS / 32);
	float sum = 0;

	v = warp_sum(v);
	if (lane_id() == 0)
		sums[warp_id()] = v;
	barrier();
	GPU_UNROLL
	for (int i = 0; i < N_THREADS / 32; i++)
		sum += sums[i];
	return sum;
}

#endif
