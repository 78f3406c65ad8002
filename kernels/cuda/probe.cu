/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a bench holds operations against: reading memory and nothing else, multiplying on tensor
 * cores and nothing else, each in a few ways of which the best is the ceiling; and a clock and a
 * delay, so that work is timed on the device itself while the host is ahead of it.
 *
 * Invariant: what is read is needed for a number that is written only where it is a certain one, so
 * nothing is left out by the compiler.
 */
#include "gpu.h"

enum { THREADS = 256, MAGIC = 0x5eed1e55 };

template <unsigned N_AHEAD>
GPU_KERNEL(THREADS)
read_kernel(const vec16 *memory, size_t n_pieces, uint32_t *out)
{
	const size_t piece = (size_t)N_AHEAD * THREADS;
	uint32_t sum = 0;

	for (size_t i = block_x(); i < n_pieces; i += grid_x()) {
		const vec16 *p = memory + i * piece + thread_x();
		vec16 v[N_AHEAD];

		GPU_UNROLL
		for (unsigned j = 0; j < N_AHEAD; j++)
			v[j] = load_once(p + j * THREADS);
		GPU_UNROLL
		for (unsigned j = 0; j < N_AHEAD; j++)
			sum ^= v[j].words[0] + v[j].words[1] + v[j].words[2] + v[j].words[3];
	}
	if (sum == MAGIC)
		*out = sum;
}

template <unsigned N_CHAINS> GPU_KERNEL(THREADS) multiply_kernel(uint64_t n, uint32_t *out)
{
	uint32_t a[4], b[2];
	float d[N_CHAINS][4] = {}, sum = 0;

	/* Numbers around 1 of both signs. */
	for (unsigned i = 0; i < 4; i++)
		a[i] = 0x3f803f80 ^ (thread_x() * 2654435761u >> i & 0x807f807f);
	b[0] = a[1] ^ 0x80000000;
	b[1] = a[2] ^ 0x00008000;
	for (uint64_t i = 0; i < n; i++) {
		GPU_UNROLL
		for (unsigned c = 0; c < N_CHAINS; c++)
			mma(bf16{}, d[c], a, b[0], b[1]);
	}
	GPU_UNROLL
	for (unsigned c = 0; c < N_CHAINS; c++)
		sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
	if (bits_of(sum) == MAGIC)
		*out = bits_of(sum);
}

/* The bound is for a clock that stands still. */
GPU_KERNEL(32) delay_kernel(uint64_t ns)
{
	uint64_t start = now_ns();

	for (unsigned i = 0; i < 1u << 24 && now_ns() - start < ns; i++)
		;
}

GPU_KERNEL(32) stamp_kernel(uint64_t *out)
{
	if (thread_x() == 0)
		*out = now_ns();
}

template <unsigned N_AHEAD>
static int launch_read(
	const struct afd_gpu *gpu, const struct afd__probe_args *a, unsigned n_blocks, double *work)
{
	size_t n_pieces = a->amount / 16 / N_AHEAD / THREADS;

	*work = (double)(n_pieces * N_AHEAD * THREADS * 16);
	return gpu_launch(gpu, "read", read_kernel<N_AHEAD>, { n_blocks, 1, 1 }, THREADS, 0,
		(const vec16 *)a->memory, n_pieces, (uint32_t *)a->out);
}

template <unsigned N_CHAINS>
static int launch_multiply(const struct afd_gpu *gpu, const struct afd__probe_args *a, double *work)
{
	unsigned n_blocks = 2 * gpu->n_sms;

	*work = 4096.0 * (double)a->amount * N_CHAINS * (THREADS / 32) * n_blocks;
	return gpu_launch(gpu, "multiply", multiply_kernel<N_CHAINS>, { n_blocks, 1, 1 }, THREADS,
		0, a->amount, (uint32_t *)a->out);
}

int afd_gpu_probe(const struct afd_gpu *gpu, const struct afd__probe_args *a, double *work)
{
	*work = 0;
	switch (a->kind) {
	case AFD__PROBE_READ:
		if (a->way % 3 == 0)
			return launch_read<4>(gpu, a, gpu->n_sms * (a->way / 3 ? 8 : 4), work);
		if (a->way % 3 == 1)
			return launch_read<8>(gpu, a, gpu->n_sms * (a->way / 3 ? 8 : 4), work);
		return launch_read<16>(gpu, a, gpu->n_sms * (a->way / 3 ? 4 : 2), work);
	case AFD__PROBE_MULTIPLY:
		return a->way % 2 ? launch_multiply<8>(gpu, a, work)
				  : launch_multiply<4>(gpu, a, work);
	case AFD__PROBE_DELAY:
		return gpu_launch(gpu, "delay", delay_kernel, { 1, 1, 1 }, 32, 0, a->amount);
	default:
		return gpu_launch(
			gpu, "stamp", stamp_kernel, { 1, 1, 1 }, 32, 0, (uint64_t *)a->out);
	}
}
