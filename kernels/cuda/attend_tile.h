/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a warp does with a tile of 16 positions and up to 8 pairs of a row and a query head, on tensor
 * cores; and how a row's positions are cut into parts, whose sums are joined one after the other.
 *
 * mma has 16 rows: the upper 8 carry what is lost when q, and the weights of the softmax, are rounded
 * to 16 bits. So nearly float32, where reading the cache takes longer anyway.
 *
 * Invariant: a tile is 16 positions at a fixed absolute place; how they are cut into parts is decided
 * by what the row sees, and sums are taken in one order, with products that no compiler fuses in one
 * kernel and not in the other. So attend_split.cu and attend_chunk.cu give a row the same bits.
 */
#ifndef AFD_KERNELS_CUDA_ATTEND_TILE_H
#define AFD_KERNELS_CUDA_ATTEND_TILE_H

#include "attend.h"

enum { TILE = 16, PAIRS = 8, PARTS = 64, SPLIT_PARTS = 4, PART_TILES = 2 };

template <class T> struct tile_number {
	typedef T type;
};
template <> struct tile_number<fp8> {
	typedef f16 type;
};

template <class T, int DIM> struct tile_shape {
	static const int chunks = DIM * (int)sizeof(T) / 16; /* of 16 bytes in a row of k or v */
	static const int vecs = 2 * TILE * chunks;           /* k, then v */
};

/* What a row sees: positions first .. end-1, in tiles tile0 .. tile0+n_tiles-1, in parts of about
 * as many tiles each. A split is SPLIT_PARTS of them. */
struct span {
	unsigned first, end, tile0, n_tiles, n_parts;
};

GPU_FN span span_of(const struct afd__attend_args &a, size_t row)
{
	span s;

	s.end = (unsigned)a.positions[row] + 1;
	s.first = first_seen(a, s.end - 1);
	s.tile0 = s.first / TILE;
	s.n_tiles = (s.end - 1) / TILE + 1 - s.tile0;
	s.n_parts = least((s.n_tiles + PART_TILES - 1) / PART_TILES, PARTS);
	return s;
}

GPU_FN unsigned splits_of(const span &s)
{
	return (s.n_parts + SPLIT_PARTS - 1) / SPLIT_PARTS;
}

/* The first tile of a part; of part n_parts: behind the last. */
GPU_FN unsigned part_begin(const span &s, unsigned part)
{
	return s.tile0 + s.n_tiles / s.n_parts * part + least(part, s.n_tiles % s.n_parts);
}

/* Running softmax of a part: of pair lane / 4, as mma has the sums. */
template <int DIM> struct tile_state {
	float maximum, total; /* total: of this lane's positions */
	float out[DIM / 8][4];
};

template <int CHUNKS> GPU_FN unsigned tile_place(unsigned row, unsigned c)
{
	const unsigned rows_of_a_line = CHUNKS < 8 ? 8 / CHUNKS : 1,
		       mask = CHUNKS < 8 ? CHUNKS - 1 : 7;

	return row * CHUNKS + (c ^ (row / rows_of_a_line & mask));
}

/* Starts the copies of N rows of k and v from row0 of a tile on; positions from `base` on, of which
 * the row of lane i % N is the lane's own to find. Zeros where nothing is seen. */
template <class T, int DIM, int N>
GPU_FN void load_rows(const struct afd__attend_args &a, const int32_t *pages, unsigned kv_head,
	unsigned first, unsigned end, unsigned base, unsigned row0, vec16 *tile)
{
	const int chunks = tile_shape<T, DIM>::chunks;
	unsigned mine = base + lane_id() % N;
	bool seen = mine >= first && mine < end;
	size_t offset = seen ? k_offset(a, pages, kv_head, mine) : 0;
	unsigned head_bytes = a.kv.head_dim * (unsigned)sizeof(T);

	GPU_UNROLL
	for (unsigned i = lane_id(); i < N * chunks; i += 32) {
		unsigned row = i / chunks, c = i % chunks, bytes = 0;
		size_t from = (size_t)shuffle((unsigned)(offset >> 32), row) << 32 |
			      shuffle((unsigned)offset, row);

		if (base + row >= first && base + row < end && c * 16 < head_bytes)
			bytes = 16;
		const char *k = (const char *)a.kv.data + (bytes ? from + c * 16 : 0);
		unsigned place = tile_place<chunks>(row0 + row, c);
		copy_async(&tile[place], k, bytes);
		copy_async(&tile[TILE * chunks + place], bytes ? k + a.kv.v_offset : k, bytes);
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

/* q of pair lane / 4 (x; NULL: there is none) as the operand of 16 rows, and what its scores are
 * multiplied with. Numbers of f16 are first brought into its range by a power of two. */
template <class T, int DIM>
GPU_FN float load_query(
	const struct afd__attend_args &a, const float *x, uint32_t (&q)[DIM / 16][4])
{
	typedef typename tile_number<T>::type number;
	unsigned t = lane_id() % 4, dim = a.kv.head_dim;
	float largest = 0, power = 1;
	bool is_bf16 = sizeof(T) == 2 && from_float<number>(1).bits == 0x3f80;

	for (unsigned d = t; !is_bf16 && x && d < dim; d += 4)
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
			bool there = x && d < dim;

			split_pair<number>(there ? x[d] / power : 0, there ? x[d + 1] / power : 0,
				&q[i][2 * half], &q[i][2 * half + 1]);
		}
	}
	/* in units of log2 */
	return a.scale * power * 1.44269504f * (sizeof(T) == 1 ? a.kv.k_scale : 1);
}

/* s[i] = scores of pair lane / 4 and positions 8 i + 2 t, + 1, before the scale */
template <class T, int DIM>
GPU_FN void score_tile(float (&s)[2][2], const uint32_t (&q)[DIM / 16][4], const vec16 *k)
{
	typedef typename tile_number<T>::type number;
	const int chunks = tile_shape<T, DIM>::chunks;
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
	typedef typename tile_number<T>::type number;
	const int chunks = tile_shape<T, DIM>::chunks;
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

/* Adds the tile of positions base .. base+15 to the state of the lane's pair, which sees those of
 * first .. end-1. */
template <class T, int DIM>
GPU_FN void add_tile(tile_state<DIM> *state, unsigned first, unsigned end, unsigned base,
	const uint32_t (&q)[DIM / 16][4], float scale, const vec16 *tile)
{
	typedef typename tile_number<T>::type number;
	float s[2][2], now = state->maximum, keep;
	uint32_t p[4];

	score_tile<T, DIM>(s, q, tile);
	GPU_UNROLL
	for (unsigned i = 0; i < 4; i++) {
		unsigned position = base + i / 2 * 8 + lane_id() % 4 * 2 + i % 2;

		s[i / 2][i % 2] = multiply(s[i / 2][i % 2], scale);
		if (position < first || position >= end)
			s[i / 2][i % 2] = -INFINITY;
		now = fmaxf(now, s[i / 2][i % 2]);
	}
	now = fmaxf(now, shuffle_xor(now, 1));
	now = fmaxf(now, shuffle_xor(now, 2));
	/* Nothing seen yet: every weight is 0, not e^(inf - inf). */
	float from = now == -INFINITY ? 0 : now;
	keep = exp2f(state->maximum - from);
	state->maximum = now;
	GPU_UNROLL
	for (unsigned i = 0; i < 4; i++)
		s[i / 2][i % 2] = exp2f(s[i / 2][i % 2] - from);
	state->total = fmaf(state->total, keep, (s[0][0] + s[0][1]) + (s[1][0] + s[1][1]));
	GPU_UNROLL
	for (unsigned i = 0; i < 2; i++)
		split_pair<number>(s[i][0], s[i][1], &p[2 * i], &p[2 * i + 1]);
	if (warp_ballot(keep != 1)) { /* times 1 changes nothing */
		GPU_UNROLL
		for (unsigned i = 0; i < DIM / 8; i++) {
			GPU_UNROLL
			for (unsigned e = 0; e < 4; e++)
				state->out[i][e] *= keep;
		}
	}
	add_values<T, DIM>(state->out, p, tile + TILE * tile_shape<T, DIM>::chunks);
}

/* What two sums are multiplied with before they are added, when the second has this maximum. Joins
 * begin with the empty sum, of maximum -infinity. */
struct joint {
	float maximum, keep, add;
};

GPU_FN joint join(float maximum, float other)
{
	float now = fmaxf(maximum, other), from = now == -INFINITY ? 0 : now;

	return { now, exp2f(maximum - from), exp2f(other - from) };
}

GPU_FN float join_numbers(const joint &j, float was, float other)
{
	return fmaf(other, j.add, multiply(was, j.keep));
}

#endif
