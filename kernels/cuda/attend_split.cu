/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention of rows that stand alone, flash-decoding: a row's positions are divided among up to 16
 * blocks per kv head, each with four warps; a warp walks over a part (attend_tile.h) with a ring of
 * cp.async of its own, and needs no other until the end. Then warps are joined, and splits by a
 * second kernel.
 *
 * Invariant: how a row is divided is decided by what it sees; so its bits depend on no other row.
 * What it does not see is not read.
 */
#include "attend_tile.h"

enum { WARPS = SPLIT_PARTS, SPLITS = PARTS / SPLIT_PARTS };

template <class T, int DIM> struct split_sizes {
	static const int tile_vecs = tile_shape<T, DIM>::vecs;
	static const int stages = sizeof(T) == 1 ? 4 : 3;
	static const int ring_bytes = WARPS * stages * tile_vecs * 16;
	static const int join_bytes = WARPS * PAIRS * (DIM + 2) * 4;
	static const int bytes = ring_bytes > join_bytes ? ring_bytes : join_bytes;
};

/* What a warp works on. */
struct split_place {
	size_t row;
	unsigned kv_head, head0, n_heads; /* the pass's query heads */
	span s;
	unsigned split, n_splits, n_pieces; /* parts of this split */
	unsigned tile0, n_tiles;            /* of the warp's part */
	const int32_t *pages;
};

/* False when the block has nothing to do. */
GPU_FN bool find_split(const struct afd__attend_args &a, split_place *at)
{
	unsigned group = a.n_heads / a.kv.n_kv_heads,
		 passes = (group + PAIRS - 1) / PAIRS, pass = block_y() % passes;
	unsigned part = block_z() * SPLIT_PARTS + warp_id();

	at->row = block_x();
	at->kv_head = block_y() / passes;
	at->head0 = at->kv_head * group + pass * PAIRS;
	at->n_heads = least(group - pass * PAIRS, PAIRS);
	at->s = span_of(a, at->row);
	at->n_splits = splits_of(at->s);
	at->split = block_z();
	if (at->split >= at->n_splits)
		return false;
	at->n_pieces = least(at->s.n_parts - at->split * SPLIT_PARTS, SPLIT_PARTS);
	at->tile0 = part_begin(at->s, part);
	at->n_tiles = part < at->s.n_parts ? part_begin(at->s, part + 1) - at->tile0 : 0;
	at->pages = a.page_table + (size_t)a.sequences[at->row] * a.table_stride;
	return true;
}

/* Joins n pieces of maximum, total and sums, `stride` floats apart, ascending; gives sum d. */
GPU_FN float join_pieces(const float *pieces, size_t stride, unsigned n, unsigned d, float *maximum,
	float *total)
{
	float out = 0;

	*maximum = -INFINITY;
	*total = 0;
	for (unsigned i = 0; i < n; i++) {
		const float *piece = pieces + i * stride;
		joint j = join(*maximum, piece[0]);

		*maximum = j.maximum;
		*total = join_numbers(j, *total, piece[1]);
		out = join_numbers(j, out, piece[2 + d]);
	}
	return out;
}

template <class T>
GPU_FN void write_number(
	const struct afd__attend_args &a, size_t place, unsigned d, float sum, float total)
{
	a.out[place * a.kv.head_dim + d] = sum / total * (sizeof(T) == 1 ? a.kv.v_scale : 1);
}

/* Joins the warps and writes the split. parts: [n_rows][n_heads][SPLITS][DIM + 2] */
template <class T, int DIM>
GPU_FN void finish_split(const struct afd__attend_args &a, const split_place &at,
	tile_state<DIM> *state, float *memory, float *parts)
{
	float *mine = memory + (warp_id() * PAIRS + lane_id() / 4) * (DIM + 2);

	state->total += shuffle_xor(state->total, 1);
	state->total += shuffle_xor(state->total, 2);
	if (lane_id() % 4 == 0) {
		mine[0] = state->maximum;
		mine[1] = state->total;
	}
	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 8; i++) {
		GPU_UNROLL
		for (unsigned e = 0; e < 2; e++)
			mine[2 + column_of<T>(i, e)] = state->out[i][e] + state->out[i][e + 2];
	}
	barrier();
	for (unsigned i = thread_x(); i < at.n_heads * DIM; i += WARPS * 32) {
		unsigned head = i / DIM, d = i % DIM;
		size_t place = at.row * a.n_heads + at.head0 + head;
		float maximum, total, sum = join_pieces(memory + head * (DIM + 2),
					      PAIRS * (DIM + 2), at.n_pieces, d, &maximum, &total);

		if (at.n_splits > 1) {
			float *part = parts + (place * SPLITS + at.split) * (DIM + 2);

			part[2 + d] = sum;
			if (d == 0) {
				part[0] = maximum;
				part[1] = total;
			}
		} else if (d < a.kv.head_dim) {
			joint j = join(-INFINITY, maximum); /* as of several */

			write_number<T>(a, place, d, join_numbers(j, 0, sum),
				join_numbers(j, 0, total));
		}
	}
}

template <class T, int DIM>
GPU_KERNEL(WARPS * 32, 3) attend_split_kernel(struct afd__attend_args a, float *parts)
{
	typedef split_sizes<T, DIM> sizes;
	GPU_DYNAMIC_SHARED(memory);
	vec16 *ring = (vec16 *)memory + warp_id() * sizes::stages * sizes::tile_vecs;
	tile_state<DIM> state = { -INFINITY, 0, {} };
	uint32_t q[DIM / 16][4];
	split_place at;

	if (!find_split(a, &at)) /* the whole block */
		return;
	GPU_UNROLL
	for (unsigned s = 0; s < sizes::stages - 1; s++) {
		if (s < at.n_tiles)
			load_rows<T, DIM, TILE>(a, at.pages, at.kv_head, at.s.first, at.s.end,
				(at.tile0 + s) * TILE, 0, ring + s * sizes::tile_vecs);
		copy_commit();
	}
	size_t width = (size_t)(a.n_heads + 2 * a.kv.n_kv_heads) * a.kv.head_dim;
	unsigned head = lane_id() / 4;
	float scale = load_query<T, DIM>(a,
		head < at.n_heads ? a.qkv + at.row * width + (size_t)(at.head0 + head) * a.kv.head_dim
				  : NULL, q);
	for (unsigned s = 0; s < at.n_tiles; s++) {
		unsigned next = s + sizes::stages - 1;

		copy_wait<sizes::stages - 2>();
		warp_sync(); /* the warp's tile s is here, and tile s - 1 is done with */
		if (next < at.n_tiles)
			load_rows<T, DIM, TILE>(a, at.pages, at.kv_head, at.s.first, at.s.end,
				(at.tile0 + next) * TILE, 0,
				ring + next % sizes::stages * sizes::tile_vecs);
		copy_commit();
		add_tile<T, DIM>(&state, at.s.first, at.s.end, (at.tile0 + s) * TILE, q, scale,
			ring + s % sizes::stages * sizes::tile_vecs);
	}
	copy_wait<0>();
	barrier(); /* the rings are free for the pieces */
	finish_split<T, DIM>(a, at, &state, (float *)memory, parts);
}

/* Joins the splits of rows that have several; a block does one head of one row. */
template <class T, int DIM>
GPU_KERNEL(DIM) join_splits_kernel(struct afd__attend_args a, const float *parts)
{
	size_t row = block_x(), place = row * a.n_heads + block_y();
	unsigned n_splits = splits_of(span_of(a, row)), d = thread_x();
	float maximum, total, sum;

	if (n_splits == 1 || d >= a.kv.head_dim)
		return;
	sum = join_pieces(parts + place * SPLITS * (DIM + 2), DIM + 2, n_splits, d, &maximum, &total);
	write_number<T>(a, place, d, sum, total);
}

int attend_split_fits(const struct afd__attend_args *a)
{
	size_t number = number_bytes(a->kv.dtype);

	return a->kv.dtype != AFD_DTYPE_F32 && a->kv.head_dim <= 128 &&
	       a->kv.head_dim * number % 16 == 0 &&
	       ((uintptr_t)a->kv.data | a->kv.page_stride | a->kv.v_offset | a->kv.head_stride |
		       a->kv.position_stride) % 16 == 0;
}

template <class T, int DIM>
static int launch(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	unsigned group = a->n_heads / a->kv.n_kv_heads;
	size_t most = gpu->workspace_bytes / ((size_t)a->n_heads * SPLITS * (DIM + 2) * 4);
	struct afd__attend_args part = *a;
	int rc = most ? 0 : GPU_INVALID;

	for (uint32_t left = a->n_rows; !rc && left; left -= part.n_rows) {
		part.n_rows = left < most ? left : (uint32_t)most;
		rc = gpu_launch(gpu, "attend_split", attend_split_kernel<T, DIM>,
			{ part.n_rows,
				(unsigned)(a->kv.n_kv_heads * divide_up(group, PAIRS)), SPLITS },
			WARPS * 32, split_sizes<T, DIM>::bytes, part, (float *)gpu->workspace);
		if (!rc)
			rc = gpu_launch(gpu, "join_splits", join_splits_kernel<T, DIM>,
				{ part.n_rows, a->n_heads, 1 }, DIM, 0, part,
				(const float *)gpu->workspace);
		part.qkv += part.n_rows * (size_t)(a->n_heads + 2 * a->kv.n_kv_heads) *
			    a->kv.head_dim;
		part.out += part.n_rows * (size_t)a->n_heads * a->kv.head_dim;
		part.positions += part.n_rows;
		part.sequences += part.n_rows;
	}
	return rc;
}

template <class T>
static int launch_dim(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	return a->kv.head_dim <= 64 ? launch<T, 64>(gpu, a) : launch<T, 128>(gpu, a);
}

int attend_split(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	return a->kv.dtype == AFD_DTYPE_BF16  ? launch_dim<bf16>(gpu, a)
	       : a->kv.dtype == AFD_DTYPE_F16 ? launch_dim<f16>(gpu, a)
					      : launch_dim<fp8>(gpu, a);
}
