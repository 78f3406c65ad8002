/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention on tensor cores, flash-decoding: a row's positions are divided among up to SPLITS blocks
 * per kv head, each with four warps; a warp walks over tiles of 16 positions with a ring of
 * cp.async of its own, and needs no other until the end. Then warps are merged, and splits by a
 * second kernel.
 *
 * mma has 16 rows where a kv head has at most 8 query heads in a pass: the upper 8 carry what is
 * lost when q, and the weights of the softmax, are rounded to 16 bits. So nearly float32, for free.
 *
 * Invariant: a tile is 16 positions at a fixed absolute place, and how a row is divided is decided
 * by what it sees; so its bits depend on no other row. What it does not see is not read.
 */
#include "attend.h"

enum { WARPS = 4, TILE = 16, BLOCK = WARPS * TILE, HEADS = 8, SPLITS = 16, SPLIT_BLOCKS = 2 };

template <class T> struct split_number {
	typedef T type;
};
template <> struct split_number<fp8> {
	typedef f16 type;
};

template <class T, int DIM> struct split_sizes {
	static const int chunks = DIM * (int)sizeof(T) / 16; /* of 16 bytes in a row of k or v */
	static const int tile_vecs = 2 * TILE * chunks;
	static const int stages = sizeof(T) == 1 ? 4 : 3;
	static const int ring_bytes = WARPS * stages * tile_vecs * 16;
	static const int merge_bytes = WARPS * HEADS * (DIM + 2) * 4;
	static const int bytes = ring_bytes > merge_bytes ? ring_bytes : merge_bytes;
};

/* What a block works on. */
struct split_place {
	size_t row;
	unsigned kv_head, head0, n_heads; /* the pass's query heads */
	unsigned first, end;              /* positions that the row sees */
	unsigned block0, n_blocks;        /* of this split */
	unsigned split, n_splits;
	const int32_t *pages;
};

/* Running softmax of a warp: of head lane / 4, as mma has the sums. */
template <int DIM> struct split_state {
	float maximum, total; /* total: of this lane's positions */
	float out[DIM / 8][4];
};

template <int CHUNKS> GPU_FN unsigned tile_place(unsigned row, unsigned c)
{
	const unsigned rows_of_a_line = CHUNKS < 8 ? 8 / CHUNKS : 1,
		       mask = CHUNKS < 8 ? CHUNKS - 1 : 7;

	return row * CHUNKS + (c ^ (row / rows_of_a_line & mask));
}

GPU_FN bool find_split(const struct afd__attend_args &a, split_place *at)
{
	unsigned group = a.n_heads / a.kv.n_kv_heads,
		 passes = (group + HEADS - 1) / HEADS, pass = block_y() % passes;

	at->row = block_x();
	at->kv_head = block_y() / passes;
	at->head0 = at->kv_head * group + pass * HEADS;
	at->n_heads = least(group - pass * HEADS, HEADS);
	at->end = (unsigned)a.positions[at->row] + 1;
	at->first = first_seen(a, at->end - 1);
	unsigned block = at->first / BLOCK, blocks = (at->end - 1) / BLOCK + 1 - block;
	at->n_splits = least((blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS, SPLITS);
	at->split = block_z();
	if (at->split >= at->n_splits)
		return false;
	at->block0 = block + blocks * at->split / at->n_splits;
	at->n_blocks = block + blocks * (at->split + 1) / at->n_splits - at->block0;
	at->pages = a.page_table + (size_t)a.sequences[at->row] * a.table_stride;
	return true;
}

/* Starts the copies of the warp's tile of a block: k, then v; zeros where nothing is seen. */
template <class T, int DIM>
GPU_FN void load_tile(
	const struct afd__attend_args &a, const split_place &at, unsigned block, vec16 *tile)
{
	const int chunks = split_sizes<T, DIM>::chunks;
	unsigned base = block * BLOCK + warp_id() * TILE, mine = base + lane_id() % TILE;
	bool seen = mine >= at.first && mine < at.end;
	size_t offset = seen ? k_offset(a, at.pages, at.kv_head, mine) : 0;
	unsigned head_bytes = a.kv.head_dim * (unsigned)sizeof(T);

	GPU_UNROLL
	for (unsigned i = lane_id(); i < TILE * chunks; i += 32) {
		unsigned row = i / chunks, c = i % chunks, bytes = 0;
		size_t from = (size_t)shuffle((unsigned)(offset >> 32), row) << 32 |
			      shuffle((unsigned)offset, row);

		if (base + row >= at.first && base + row < at.end && c * 16 < head_bytes)
			bytes = 16;
		const char *k = (const char *)a.kv.data + (bytes ? from + c * 16 : 0);
		copy_async(&tile[tile_place<chunks>(row, c)], k, bytes);
		copy_async(&tile[TILE * chunks + tile_place<chunks>(row, c)],
			bytes ? k + a.kv.v_offset : k, bytes);
	}
}

/* A pair of numbers as mma takes them, and what they lose. */
template <class N>
GPU_FN void split_pair(float first, float second, uint32_t *high, uint32_t *low)
{
	*high = pack2<N>(first, second);
	*low = pack2<N>(first - to_float(N{ (uint16_t)*high }),
		second - to_float(N{ (uint16_t)(*high >> 16) }));
}

/* q of head lane / 4 as the operand of 16 rows, and what its scores are multiplied with. Numbers
 * of f16 are first brought into its range by a power of two. */
template <class T, int DIM>
GPU_FN float load_query(const struct afd__attend_args &a, const split_place &at,
	uint32_t (&q)[DIM / 16][4])
{
	typedef typename split_number<T>::type number;
	unsigned head = lane_id() / 4, t = lane_id() % 4, dim = a.kv.head_dim;
	size_t width = (size_t)(a.n_heads + 2 * a.kv.n_kv_heads) * dim;
	const float *x = a.qkv + at.row * width + (size_t)(at.head0 + head) * dim;
	float largest = 0, power = 1;
	bool is_bf16 = sizeof(T) == 2 && from_float<number>(1).bits == 0x3f80;

	for (unsigned d = t; !is_bf16 && head < at.n_heads && d < dim; d += 4)
		largest = fmaxf(largest, fabsf(x[d]));
	largest = fmaxf(largest, shuffle_xor(largest, 1));
	largest = fmaxf(largest, shuffle_xor(largest, 2));
	if (largest > 0 && largest < INFINITY)
		power = float_of_bits((bits_of(largest) >> 23 > 8 ? bits_of(largest) >> 23 : 8)
				      << 23);
	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 16; i++) {
		GPU_UNROLL
		for (unsigned half = 0; half < 2; half++) {
			/* FP8 has k = 4t .. 4t+3 of the cache in one register. */
			unsigned d = i * 16 +
				     (sizeof(T) == 1 ? 4 * t + 2 * half : 2 * t + 8 * half);
			bool there = head < at.n_heads && d < dim;

			split_pair<number>(there ? x[d] / power : 0, there ? x[d + 1] / power : 0,
				&q[i][2 * half], &q[i][2 * half + 1]);
		}
	}
	/* in units of log2 */
	return a.scale * power * 1.44269504f * (sizeof(T) == 1 ? a.kv.k_scale : 1);
}

/* s[i] = scores of head lane / 4 and positions 8 i + 2 t, + 1, before the scale */
template <class T, int DIM>
GPU_FN void score_tile(float (&s)[2][2], const uint32_t (&q)[DIM / 16][4], const vec16 *k)
{
	typedef typename split_number<T>::type number;
	const int chunks = split_sizes<T, DIM>::chunks;
	unsigned lane = lane_id(), row = lane % 8 + lane / 16 * 8, c = lane / 8 % 2;
	float sum[2][4] = {};

	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 16; i += sizeof(T) == 1 ? 2 : 1) {
		uint32_t b[4];

		load_matrices<false>(b,
			&k[tile_place<chunks>(row, (sizeof(T) == 1 ? i : 2 * i) + c)]);
		if (sizeof(T) == 1) {
			GPU_UNROLL
			for (unsigned j = 0; j < 4; j++)
				mma(number{}, sum[j / 2], q[i + j % 2], f16x2_of_fp8x2(b[j]),
					f16x2_of_fp8x2(b[j] >> 16));
		} else {
			mma(number{}, sum[0], q[i], b[0], b[1]);
			mma(number{}, sum[1], q[i], b[2], b[3]);
		}
	}
	GPU_UNROLL
	for (unsigned i = 0; i < 4; i++)
		s[i / 2][i % 2] = sum[i / 2][i % 2] + sum[i / 2][i % 2 + 2];
}

/* The bytes of even (or odd) places of a word, side by side. */
GPU_FN uint32_t bytes_of(uint32_t word, unsigned odd)
{
	word >>= 8 * odd;
	return (word & 0xff) | (word >> 8 & 0xff00);
}

/* out += p v, p: weights of 16 positions as the operand of 16 rows */
template <class T, int DIM>
GPU_FN void add_values(float (&out)[DIM / 8][4], const uint32_t (&p)[4], const vec16 *v)
{
	typedef typename split_number<T>::type number;
	const int chunks = split_sizes<T, DIM>::chunks;
	unsigned lane = lane_id(), row = lane % 16;

	GPU_UNROLL
	for (unsigned c = 0; c < (unsigned)chunks; c += 2) {
		uint32_t b[4];

		load_matrices<true>(b, &v[tile_place<chunks>(row, c + lane / 16)]);
		if (sizeof(T) == 1) {
			GPU_UNROLL
			for (unsigned j = 0; j < 4; j++)
				mma(number{}, out[2 * c + j], p,
					f16x2_of_fp8x2(bytes_of(b[j / 2 * 2], j % 2)),
					f16x2_of_fp8x2(bytes_of(b[j / 2 * 2 + 1], j % 2)));
		} else {
			mma(number{}, out[c], p, b[0], b[1]);
			mma(number{}, out[c + 1], p, b[2], b[3]);
		}
	}
}

/* Where number e of tile i of `out` stands in the head: FP8 has even and odd numbers apart. */
template <class T> GPU_FN unsigned column_of(unsigned i, unsigned e)
{
	unsigned n = lane_id() % 4 * 2 + e;

	return sizeof(T) == 1 ? i / 2 * 16 + 2 * n + i % 2 : i * 8 + n;
}

template <class T, int DIM>
GPU_FN void add_tile(split_state<DIM> *state, const split_place &at, unsigned base,
	const uint32_t (&q)[DIM / 16][4], float scale, const vec16 *tile)
{
	typedef typename split_number<T>::type number;
	float s[2][2], now = state->maximum, keep;
	uint32_t p[4];

	score_tile<T, DIM>(s, q, tile);
	GPU_UNROLL
	for (unsigned i = 0; i < 4; i++) {
		unsigned position = base + i / 2 * 8 + lane_id() % 4 * 2 + i % 2;

		s[i / 2][i % 2] *= scale;
		if (position < at.first || position >= at.end)
			s[i / 2][i % 2] = -INFINITY;
		now = fmaxf(now, s[i / 2][i % 2]);
	}
	now = fmaxf(now, shuffle_xor(now, 1));
	now = fmaxf(now, shuffle_xor(now, 2));
	/* Nothing seen yet: every weight is 0, not e^(inf - inf). */
	float from = now == -INFINITY ? 0 : now;
	keep = exp2f(state->maximum - from);
	state->maximum = now;
	state->total *= keep;
	GPU_UNROLL
	for (unsigned i = 0; i < 2; i++) {
		float first = exp2f(s[i][0] - from), second = exp2f(s[i][1] - from);

		state->total += first + second;
		split_pair<number>(first, second, &p[2 * i], &p[2 * i + 1]);
	}
	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 8; i++) {
		GPU_UNROLL
		for (unsigned e = 0; e < 4; e++)
			state->out[i][e] *= keep;
	}
	add_values<T, DIM>(state->out, p, tile + TILE * split_sizes<T, DIM>::chunks);
}

/* Maximum, total and sum of head h of n pieces of [HEADS or 1][DIM + 2], `stride` floats apart; the
 * pieces are added ascending. */
template <int DIM>
GPU_FN float merge(const float *pieces, size_t stride, unsigned n, unsigned d, float *maximum,
	float *total)
{
	float most = -INFINITY, sum = 0, out = 0;

	for (unsigned i = 0; i < n; i++)
		most = fmaxf(most, pieces[i * stride]);
	for (unsigned i = 0; i < n; i++) {
		float keep = exp2f(pieces[i * stride] - most);

		sum += pieces[i * stride + 1] * keep;
		out += pieces[i * stride + 2 + d] * keep;
	}
	*maximum = most;
	*total = sum;
	return out;
}

/* Merges the warps; writes the row's output, or the split's part. parts: [n_rows][n_heads][SPLITS]
 * [DIM + 2] */
template <class T, int DIM>
GPU_FN void finish_split(const struct afd__attend_args &a, const split_place &at,
	split_state<DIM> *state, float *memory, float *parts)
{
	float *mine = memory + (warp_id() * HEADS + lane_id() / 4) * (DIM + 2);

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
		float maximum, total, sum = merge<DIM>(memory + head * (DIM + 2),
					      HEADS * (DIM + 2), WARPS, d, &maximum, &total);

		if (at.n_splits == 1) {
			if (d < a.kv.head_dim)
				a.out[place * a.kv.head_dim + d] =
					sum / total * (sizeof(T) == 1 ? a.kv.v_scale : 1);
			continue;
		}
		float *part = parts + (place * SPLITS + at.split) * (DIM + 2);
		part[2 + d] = sum;
		if (d == 0) {
			part[0] = maximum;
			part[1] = total;
		}
	}
}

template <class T, int DIM>
GPU_KERNEL(WARPS * 32) attend_split_kernel(struct afd__attend_args a, float *parts)
{
	typedef split_sizes<T, DIM> sizes;
	GPU_DYNAMIC_SHARED(memory);
	vec16 *ring = (vec16 *)memory + warp_id() * sizes::stages * sizes::tile_vecs;
	split_state<DIM> state = { -INFINITY, 0, {} };
	uint32_t q[DIM / 16][4];
	split_place at;

	if (!find_split(a, &at)) /* the whole block */
		return;
	GPU_UNROLL
	for (unsigned s = 0; s < sizes::stages - 1; s++) {
		if (s < at.n_blocks)
			load_tile<T, DIM>(a, at, at.block0 + s, ring + s * sizes::tile_vecs);
		copy_commit();
	}
	float scale = load_query<T, DIM>(a, at, q);
	for (unsigned s = 0; s < at.n_blocks; s++) {
		unsigned next = s + sizes::stages - 1;

		copy_wait<sizes::stages - 2>();
		warp_sync(); /* the warp's tile s is here, and tile s - 1 is done with */
		if (next < at.n_blocks)
			load_tile<T, DIM>(a, at, at.block0 + next,
				ring + next % sizes::stages * sizes::tile_vecs);
		copy_commit();
		add_tile<T, DIM>(&state, at, (at.block0 + s) * BLOCK + warp_id() * TILE, q, scale,
			ring + s % sizes::stages * sizes::tile_vecs);
	}
	copy_wait<0>();
	barrier(); /* the rings are free for the merge */
	finish_split<T, DIM>(a, at, &state, (float *)memory, parts);
}

/* Merges the splits of rows that have several; a block does one head of one row. */
template <class T, int DIM>
GPU_KERNEL(DIM) merge_splits_kernel(struct afd__attend_args a, const float *parts)
{
	size_t row = block_x(), place = row * a.n_heads + block_y();
	unsigned end = (unsigned)a.positions[row] + 1, d = thread_x();
	unsigned blocks = (end - 1) / BLOCK + 1 - first_seen(a, end - 1) / BLOCK;
	unsigned n_splits = least((blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS, SPLITS);
	float maximum, total, sum;

	if (n_splits == 1 || d >= a.kv.head_dim)
		return;
	sum = merge<DIM>(parts + place * SPLITS * (DIM + 2), DIM + 2, n_splits, d, &maximum, &total);
	a.out[place * a.kv.head_dim + d] = sum / total * (sizeof(T) == 1 ? a.kv.v_scale : 1);
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
				(unsigned)(a->kv.n_kv_heads * divide_up(group, HEADS)), SPLITS },
			WARPS * 32, split_sizes<T, DIM>::bytes, part, (float *)gpu->workspace);
		if (!rc)
			rc = gpu_launch(gpu, "merge_splits", merge_splits_kernel<T, DIM>,
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
