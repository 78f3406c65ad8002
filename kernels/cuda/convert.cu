/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows from one dtype to another, gathered or scattered by an index if there is one, or added to
 * float rows.
 * Exact: to nearest even, denormals kept. Source and destination may be slots in host memory. Rows of
 * e4m3 have a scale per group (lib/device/args.h); a warp does one group.
 */
#include "dispatch.h"
#include "group.h"

enum { THREADS = 256, COLUMNS = 4 * THREADS };

template <class From, class To>
GPU_KERNEL(THREADS) convert_kernel(struct afd__convert_args a)
{
	size_t row = block_x(), first = (size_t)block_y() * COLUMNS + thread_x();
	size_t other = a.index ? (size_t)a.index[row] : row, from = a.scatter ? row : other,
	       to = a.scatter ? other : row;
	const From *src = (const From *)((const char *)a.src + from * a.src_stride);
	To *dst = (To *)((char *)a.dst + to * a.dst_stride);

	GPU_UNROLL
	for (size_t i = first; i < first + COLUMNS; i += THREADS) {
		if (i < a.width) {
			float x = to_float(src[i]);

			if (a.accumulate)
				x += to_float(dst[i]);
			dst[i] = from_float<To>(x);
		}
	}
}

/* Of one dtype: the bits. */
template <class T> GPU_KERNEL(THREADS) move_kernel(struct afd__convert_args a)
{
	size_t row = block_x(), first = (size_t)block_y() * COLUMNS + thread_x();
	size_t other = a.index ? (size_t)a.index[row] : row, from = a.scatter ? row : other,
	       to = a.scatter ? other : row;
	const T *src = (const T *)((const char *)a.src + from * a.src_stride);
	T *dst = (T *)((char *)a.dst + to * a.dst_stride);

	GPU_UNROLL
	for (size_t i = first; i < first + COLUMNS; i += THREADS) {
		if (i < a.width)
			dst[i] = src[i];
	}
}

/* ---- e4m3 ---- */

enum { GROUP_WARPS = 4 };

/* Of a row of e4m3. */
struct row_layout {
	unsigned n_groups, scales_at, bytes;
};

struct row_pair {
	const char *src;
	char *dst;
};

GPU_FN row_pair rows_of(const struct afd__convert_args &a)
{
	size_t row = block_x(), other = a.index ? (size_t)a.index[row] : row;

	return { (const char *)a.src + (a.scatter ? row : other) * a.src_stride,
		(char *)a.dst + (a.scatter ? other : row) * a.dst_stride };
}

GPU_FN float wire_scale(const float (&v)[GROUP_LANE])
{
	float largest = 0;

	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		largest = is_finite(v[i]) ? fmaxf(largest, fabsf(v[i])) : largest;
	largest = warp_max(largest) / 448;
	largest = float_of_bits(bits_of(largest) >> AFD__SCALE_SPARE << AFD__SCALE_SPARE);
	return fmaxf(largest, AFD__SCALE_LEAST);
}

/* What is not finite is NaN with its sign. */
GPU_FN fp8 wire_number(float v, float scale)
{
	if (!is_finite(v))
		return { (uint8_t)(0x7f | (bits_of(v) >> 24 & 0x80)) };
	return from_float<fp8>(v / scale);
}

/* Zeros behind the numbers and behind the scales. */
GPU_FN void fill_row(char *row, unsigned width, const row_layout &layout)
{
	unsigned end = layout.scales_at + 4 * layout.n_groups;

	if (width + lane_id() < layout.scales_at)
		row[width + lane_id()] = 0;
	if (end + lane_id() < layout.bytes)
		row[end + lane_id()] = 0;
}

GPU_KERNEL(GROUP_WARPS * 32) to_fp8_kernel(struct afd__convert_args a, row_layout layout)
{
	unsigned group = block_y() * GROUP_WARPS + warp_id();
	row_pair rows = rows_of(a);
	const float *src = (const float *)rows.src;
	float v[GROUP_LANE], scale;

	if (group >= layout.n_groups) /* the whole warp */
		return;
	group_range range = group_at(group, 0, a.width);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++)
		v[i] = group_column(range, i) < range.end ? src[group_column(range, i)] : 0;
	scale = wire_scale(v);
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		if (group_column(range, i) < range.end)
			((fp8 *)rows.dst)[group_column(range, i)] = wire_number(v[i], scale);
	}
	if (lane_id() == 0)
		((float *)(rows.dst + layout.scales_at))[group] = scale;
	if (!group)
		fill_row(rows.dst, a.width, layout);
}

GPU_KERNEL(GROUP_WARPS * 32) from_fp8_kernel(struct afd__convert_args a, row_layout layout)
{
	unsigned group = block_y() * GROUP_WARPS + warp_id();
	row_pair rows = rows_of(a);
	const fp8 *src = (const fp8 *)rows.src;
	float *dst = (float *)rows.dst;

	if (group >= layout.n_groups)
		return;
	group_range range = group_at(group, 0, a.width);
	float scale = ((const float *)(rows.src + layout.scales_at))[group];
	GPU_UNROLL
	for (unsigned i = 0; i < GROUP_LANE; i++) {
		unsigned column = group_column(range, i);

		if (column < range.end) {
			float x = times(to_float(src[column]), scale);

			dst[column] = a.accumulate ? x + dst[column] : x;
		}
	}
}

static int launch_fp8(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	const row_layout layout = { afd__row_groups(a->width),
		(unsigned)afd__row_scales_at(a->width),
		(unsigned)afd__row_bytes(a->width, AFD_DTYPE_FP8) };

	return gpu_launch(gpu, "convert",
		a->dst_dtype == AFD_DTYPE_FP8 ? to_fp8_kernel : from_fp8_kernel,
		{ a->n_rows, (unsigned)divide_up(layout.n_groups, GROUP_WARPS), 1 },
		GROUP_WARPS * 32, 0, *a, layout);
}

/* ---- launchers ---- */

template <class From, class To>
static int launch(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	return gpu_launch(gpu, "convert", convert_kernel<From, To>,
		{ a->n_rows, (unsigned)divide_up(a->width, COLUMNS), 1 }, THREADS, 0, *a);
}

template <class T>
static int launch_move(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	return gpu_launch(gpu, "convert", move_kernel<T>,
		{ a->n_rows, (unsigned)divide_up(a->width, COLUMNS), 1 }, THREADS, 0, *a);
}

int afd_gpu_convert(const struct afd_gpu *gpu, const struct afd__convert_args *a)
{
	if (a->src_dtype == AFD_DTYPE_FP8 || a->dst_dtype == AFD_DTYPE_FP8)
		return launch_fp8(gpu, a);
	if (a->src_dtype == a->dst_dtype && !a->accumulate)
		return a->src_dtype == AFD_DTYPE_F32 ? launch_move<uint32_t>(gpu, a)
						     : launch_move<uint16_t>(gpu, a);
	if (a->dst_dtype == AFD_DTYPE_F32)
		return with_wide_dtype(a->src_dtype,
			[&](auto t) { return launch<decltype(t), float>(gpu, a); });
	return with_wide_dtype(a->dst_dtype,
		[&](auto t) { return launch<float, decltype(t)>(gpu, a); });
}
