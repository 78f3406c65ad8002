/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mark of a ticket: a counter in device memory goes up by one, and its value to a word of the
 * host. What came before on the stream is done when the host sees it. The counter makes a replayed
 * graph count on.
 */
#include "gpu.h"

GPU_KERNEL(32) mark_kernel(uint64_t *counter, uint64_t *word)
{
	if (thread_x() == 0)
		store_release_system(word, ++*counter);
}

int afd_gpu_mark(const struct afd_gpu *gpu, uint64_t *counter, uint64_t *word)
{
	return gpu_launch(gpu, "mark", mark_kernel, { 1, 1, 1 }, 32, 0, counter, word);
}
