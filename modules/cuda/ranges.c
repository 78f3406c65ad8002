/* SPDX-License-Identifier: Apache-2.0 */
/*
 * NVTX ranges: names in a profiler's time line for what a stage enqueues. The header loads a
 * profiler when the environment names one, and costs a branch when not.
 *
 * Invariant: needs no library of its own. Called by the stages through the seam.
 */
#include "cuda.h"

#if defined(__has_include) && __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

void cuda_range_push(const char *name)
{
	nvtxRangePushA(name);
}

void cuda_range_pop(void)
{
	nvtxRangePop();
}
#endif
