/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of the largest number of a row, the lowest among equals; or -1 - index of the first
 * number that is not finite. A block does one row.
 */
#include "gpu.h"

enum { THREADS = 1024, WARPS = THREADS / 32, NONE = 0x7fffffff };

struct best {
	float value;
	int index;  /* of the largest */
	int broken; /* of the first that is not finite */
};

GPU_FN void join(best *a, float value, int index, int broken)
{
	if (value > a->value || (value == a->value && index < a->index)) {
		a->value = value;
		a->index = index;
	}
	if (broken < a->broken)
		a->broken = broken;
}

GPU_FN void join_warp(best *a)
{
	GPU_UNROLL
	for (unsigned lanes = 16; lanes; lanes /= 2) {
		float value = shuffle_xor(a->value, lanes);
		int index = shuffle_xor(a->index, lanes), broken = shuffle_xor(a->broken, lanes);

		join(a, value, index, broken);
	}
}

GPU_KERNEL(THREADS) argmax_kernel(struct afd__argmax_args a)
{
	GPU_SHARED(best, bests, WARPS);
	const float *x = a.x + (size_t)block_x() * a.width;
	best b = { -INFINITY, NONE, NONE };

	for (unsigned i = thread_x(); i < a.width; i += THREADS)
		join(&b, x[i], (int)i, is_finite(x[i]) ? (int)NONE : (int)i);
	join_warp(&b);
	if (lane_id() == 0)
		bests[warp_id()] = b;
	barrier();
	if (warp_id() == 0) {
		b = bests[lane_id()];
		join_warp(&b);
		if (lane_id() == 0)
			a.ids[block_x()] = b.broken != NONE ? -1 - b.broken : b.index;
	}
}

int afd_gpu_argmax(const struct afd_gpu *gpu, const struct afd__argmax_args *a)
{
	return gpu_launch(gpu, "argmax", argmax_kernel, { a->n_rows, 1, 1 }, THREADS, 0, *a);
}
