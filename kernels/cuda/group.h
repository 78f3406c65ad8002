/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A group of up to 128 numbers of a row in a warp, four in a lane, and its way through e4m3 and
 * back. Groups lie at multiples of 128 of the whole row, of which a part may begin between.
 */
#ifndef AFD_KERNELS_CUDA_GROUP_H
#define AFD_KERNELS_CUDA_GROUP_H

#include "gpu.h"

enum { GROUP = AFD__SCALE_ROWS, GROUP_LANE = GROUP / 32 };

/* Columns first .. end-1 of the part are group g; column_offset is that of the part's first. */
struct group_range {
	unsigned first, end;
};

GPU_BOTH group_range group_at(unsigned g, unsigned column_offset, unsigned width)
{
	unsigned offset = column_offset % GROUP;

	return { g ? g * GROUP - offset : 0, least((g + 1) * GROUP - offset, width) };
}

GPU_BOTH unsigned groups_of(unsigned column_offset, unsigned width)
{
	return (unsigned)divide_up((size_t)column_offset % GROUP + width, GROUP);
}

GPU_FN unsigned group_column(const group_range &range, unsigned i)
{
	return range.first + i * 32 + lane_id();
}

/* Scale of the group: its largest magnitude / 448, at least 1e-10 / 448. */
GPU_FN float group_scale(const float (&v)[GROUP_LANE])
{
	float largest = 1e-10f;

	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		largest = fmaxf(largest, fabsf(v[i]));
	return warp_max(largest) / 448;
}

GPU_FN void group_quantize(float (&v)[GROUP_LANE])
{
	float scale = group_scale(v);

	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = to_float(from_float<fp8>(v[i] / scale)) * scale;
}

#endif
