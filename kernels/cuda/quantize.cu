/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Activations as they are after e4m3 with a scale per row and group of 128, in place. A warp does
 * one group.
 */
#include "group.h"

enum { WARPS = 4 };

GPU_KERNEL(WARPS * 32) quantize_kernel(struct afd__quantize_args a, unsigned n_groups)
{
	unsigned group = block_y() * WARPS + warp_id();
	float *x = a.x + (size_t)block_x() * a.width, v[GROUP_LANE];

	if (group >= n_groups) /* the whole warp */
		return;
	group_range range = group_at(group, a.column_offset, a.width);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = group_column(range, i) < range.end ? x[group_column(range, i)] : 0;
	group_quantize(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		if (group_column(range, i) < range.end)
			x[group_column(range, i)] = v[i];
	}
}

int afd_gpu_quantize(const struct afd_gpu *gpu, const struct afd__quantize_args *a)
{
	unsigned n_groups = groups_of(a->column_offset, a->width);

	return gpu_launch(gpu, "quantize", quantize_kernel,
		{ a->n_rows, (unsigned)divide_up(n_groups, WARPS), 1 }, WARPS * 32, 0, *a, n_groups);
}
