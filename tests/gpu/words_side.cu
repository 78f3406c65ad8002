/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One side of the comparison (words.h): the cases of all groups, and a run of one from host memory
 * to host memory. Under nvcc the first GPU, under emulation the emulator.
 */
#include "../../kernels/cuda/gpu.h"
#include "words.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

static const struct word *const groups[] = { words_lanes, words_numbers, words_memory,
	words_matrices };

static const struct word *at(unsigned i)
{
	for (const struct word *group : groups) {
		for (; group->name; group++) {
			if (!i--)
				return group;
		}
	}
	return NULL;
}

static int run_between(const struct word *w, const uint32_t *in, uint32_t *out, uint32_t *dev_in,
	uint32_t *dev_out, cudaStream_t stream)
{
	size_t in_bytes = (size_t)WORDS_BLOCKS * w->n_in * 4,
	       out_bytes = (size_t)WORDS_BLOCKS * w->n_out * 4;
	struct afd_gpu gpu = {};
	int rc;

	gpu.stream = stream;
	gpu.n_sms = 1;
	rc = cudaMemcpyAsync(dev_in, in, in_bytes, cudaMemcpyHostToDevice, stream);
	if (!rc) /* what is not written is found */
		rc = cudaMemcpyAsync(dev_out, out, out_bytes, cudaMemcpyHostToDevice, stream);
	if (!rc)
		rc = w->launch(&gpu, dev_in, dev_out);
	if (!rc)
		rc = cudaMemcpyAsync(out, dev_out, out_bytes, cudaMemcpyDeviceToHost, stream);
	return rc ? rc : cudaStreamSynchronize(stream);
}

static int run(const struct word *w, const uint32_t *in, uint32_t *out, const char **error)
{
	void *dev_in = NULL, *dev_out = NULL;
	cudaStream_t stream = NULL;
	int rc = cudaMalloc(&dev_in, (size_t)WORDS_BLOCKS * w->n_in * 4);

	if (!rc)
		rc = cudaMalloc(&dev_out, (size_t)WORDS_BLOCKS * w->n_out * 4);
	if (!rc)
		rc = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
	if (!rc)
		rc = run_between(w, in, out, (uint32_t *)dev_in, (uint32_t *)dev_out, stream);
	*error = rc ? cudaGetErrorName((cudaError_t)rc) : NULL;
	if (stream)
		cudaStreamDestroy(stream);
	cudaFree(dev_in);
	cudaFree(dev_out);
	return rc;
}

extern "C" __attribute__((visibility("default"))) const struct words_side words_side;
extern "C" const struct words_side words_side = { at, run };
