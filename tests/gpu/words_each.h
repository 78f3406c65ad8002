/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For the cases in which a thread turns one word into another: F::of(uint32_t) does it. And where a
 * block's part of the numbers begins.
 */
#ifndef AFD_TESTS_GPU_WORDS_EACH_H
#define AFD_TESTS_GPU_WORDS_EACH_H

#include "../../kernels/cuda/gpu.h"
#include "words.h"

enum { WORDS_THREADS = 128 };

template <class F>
GPU_KERNEL(WORDS_THREADS)
each_kernel(const uint32_t *in, uint32_t *out, uint32_t n)
{
	for (uint32_t i = thread_x(); i < n; i += WORDS_THREADS)
		out[block_x() * n + i] = F::of(in[block_x() * n + i]);
}

template <class F, uint32_t N>
static int launch_each(const struct afd_gpu *gpu, const uint32_t *in, uint32_t *out)
{
	return gpu_launch(
		gpu, "each", each_kernel<F>, { WORDS_BLOCKS, 1, 1 }, WORDS_THREADS, 0, in, out, N);
}

/* One launch of a kernel (in, out) with blocks of N_THREADS. */
template <void (*KERNEL)(const uint32_t *, uint32_t *), unsigned N_THREADS, size_t SHARED_BYTES>
static int launch_blocks(const struct afd_gpu *gpu, const uint32_t *in, uint32_t *out)
{
	return gpu_launch(
		gpu, "words", KERNEL, { WORDS_BLOCKS, 1, 1 }, N_THREADS, SHARED_BYTES, in, out);
}

#endif
