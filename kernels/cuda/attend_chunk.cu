/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention of rows that follow each other in a sequence, such as a chunk of a prompt: a block has
 * up to 64 pairs of a row and a query head of one kv head, eight in a warp, and all its warps read
 * the same tiles of the cache from one ring. Rows of several sequences go through it one run after
 * the other.
 *
 * Invariant: of a pair the tiles, parts, splits and joins are those of attend_split.cu, in its order,
 * so a row has the bits that it has alone. But where a row of the block sees a v that is no number,
 * the others of its run get NaN too.
 */
#include "attend_tile.h"

enum { WARPS = 8, BLOCK_PAIRS = WARPS * PAIRS, STAGE_TILES = 4, STAGE = STAGE_TILES * TILE,
	STAGE_ROWS = STAGE / WARPS /* that a warp copies */, STAGES = 3, PAYS_ROWS = 16 };

/* Sums of parts, and of splits, of the lane's pair. */
template <int DIM> struct chunk_sum {
	float maximum, total;
	float out[DIM / 8][2];
};

/* What a warp's lane works on. */
struct chunk_place {
	size_t row;
	unsigned head;
	bool mine; /* there is such a pair in the run */
	span s;
	unsigned part, part_end; /* under way: its number, and the tile behind it */
};

/* Rows of one sequence at consecutive positions. */
struct chunk_run {
	size_t row0;
	unsigned n_rows, first, end; /* first, end: positions that its rows see */
	const int32_t *pages;
};

GPU_FN bool follows(const struct afd__attend_args &a, size_t row)
{
	return a.sequences[row] == a.sequences[row - 1] &&
	       a.positions[row] == a.positions[row - 1] + 1;
}

/* The run that begins with row0, of at most `most` rows. */
GPU_FN chunk_run find_run(const struct afd__attend_args &a, size_t row0, unsigned most)
{
	chunk_run run = { row0, 0, first_seen(a, (unsigned)a.positions[row0]), 0,
		a.page_table + (size_t)a.sequences[row0] * a.table_stride };

	for (unsigned base = 1; !run.n_rows; base += 32) {
		unsigned i = base + lane_id();
		unsigned ends = warp_ballot(i >= most || !follows(a, row0 + i));

		if (ends)
			run.n_rows = base + count_bits((ends & -ends) - 1);
	}
	run.end = (unsigned)a.positions[row0 + run.n_rows - 1] + 1;
	return run;
}

GPU_FN chunk_place find_pair(const struct afd__attend_args &a, const chunk_run &run,
	unsigned kv_head, size_t block_row0)
{
	unsigned group = a.n_heads / a.kv.n_kv_heads, pair = warp_id() * PAIRS + lane_id() / 4;
	chunk_place at = {};

	at.row = block_row0 + pair / group;
	at.head = kv_head * group + pair % group;
	at.mine = at.row >= run.row0 && at.row < run.row0 + run.n_rows;
	if (at.mine) {
		at.s = span_of(a, at.row);
		at.part_end = part_begin(at.s, 1);
	}
	return at;
}

/* The warp's share of a stage. */
template <class T, int DIM>
GPU_FN void load_stage(const struct afd__attend_args &a, const chunk_run &run, unsigned kv_head,
	unsigned stage, vec16 *memory)
{
	unsigned row = warp_id() * STAGE_ROWS;

	load_rows<T, DIM, STAGE_ROWS>(a, run.pages, kv_head, run.first, run.end,
		stage * STAGE + row, row % TILE,
		memory + row / TILE * (unsigned)tile_shape<T, DIM>::vecs);
}

template <int DIM> GPU_FN void join_sums(chunk_sum<DIM> *to, chunk_sum<DIM> *from)
{
	joint j = join(to->maximum, from->maximum);

	to->maximum = j.maximum;
	to->total = join_numbers(j, to->total, from->total);
	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 8; i++) {
		GPU_UNROLL
		for (unsigned e = 0; e < 2; e++)
			to->out[i][e] = join_numbers(j, to->out[i][e], from->out[i][e]);
	}
	*from = { -INFINITY, 0, {} };
}

/* Ends the part of lanes that have come to its last tile. */
template <int DIM>
GPU_FN void end_part(chunk_place *at, unsigned next_tile, tile_state<DIM> *state,
	chunk_sum<DIM> *split, chunk_sum<DIM> *all)
{
	bool ends = at->mine && next_tile == at->part_end && at->part < at->s.n_parts;
	chunk_sum<DIM> part;

	if (!warp_ballot(ends))
		return;
	part.total = state->total + shuffle_xor(state->total, 1);
	part.total += shuffle_xor(part.total, 2);
	if (!ends)
		return;
	part.maximum = state->maximum;
	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 8; i++) {
		GPU_UNROLL
		for (unsigned e = 0; e < 2; e++)
			part.out[i][e] = state->out[i][e] + state->out[i][e + 2];
	}
	join_sums(split, &part);
	*state = { -INFINITY, 0, {} };
	at->part++;
	if (at->part % SPLIT_PARTS == 0 || at->part == at->s.n_parts)
		join_sums(all, split);
	if (at->part < at->s.n_parts)
		at->part_end = part_begin(at->s, at->part + 1);
}

template <class T, int DIM>
GPU_FN void write_pair(
	const struct afd__attend_args &a, const chunk_place &at, const chunk_sum<DIM> &all)
{
	float *out = a.out + (at.row * a.n_heads + at.head) * a.kv.head_dim;

	GPU_UNROLL
	for (unsigned i = 0; i < DIM / 8; i++) {
		GPU_UNROLL
		for (unsigned e = 0; e < 2; e++) {
			unsigned d = column_of<T>(i, e);

			if (at.mine && d < a.kv.head_dim)
				out[d] = all.out[i][e] / all.total *
					 (sizeof(T) == 1 ? a.kv.v_scale : 1);
		}
	}
}

template <class T, int DIM>
GPU_FN void attend_run(const struct afd__attend_args &a, const chunk_run &run, unsigned kv_head,
	size_t block_row0, vec16 *ring)
{
	const unsigned tile_vecs = tile_shape<T, DIM>::vecs, stage_vecs = STAGE_TILES * tile_vecs;
	unsigned stage0 = run.first / STAGE, n_stages = (run.end - 1) / STAGE + 1 - stage0;
	chunk_place at = find_pair(a, run, kv_head, block_row0);
	tile_state<DIM> state = { -INFINITY, 0, {} };
	chunk_sum<DIM> split = { -INFINITY, 0, {} }, all = { -INFINITY, 0, {} };
	size_t width = (size_t)(a.n_heads + 2 * a.kv.n_kv_heads) * a.kv.head_dim;
	uint32_t q[DIM / 16][4];

	GPU_UNROLL
	for (unsigned s = 0; s < STAGES - 1; s++) {
		if (s < n_stages)
			load_stage<T, DIM>(a, run, kv_head, stage0 + s, ring + s * stage_vecs);
		copy_commit();
	}
	float scale = load_query<T, DIM>(a,
		at.mine ? a.qkv + at.row * width + (size_t)at.head * a.kv.head_dim : NULL, q);
	for (unsigned s = 0; s < n_stages; s++) {
		unsigned next = s + STAGES - 1, tile0 = (stage0 + s) * STAGE_TILES;

		copy_wait<STAGES - 2>(); /* this thread's part of stage s is here */
		barrier(); /* everybody's is; and everybody has done with stage s - 1 */
		if (next < n_stages)
			load_stage<T, DIM>(a, run, kv_head, stage0 + next,
				ring + next % STAGES * stage_vecs);
		copy_commit();
		for (unsigned tile = tile0; tile < tile0 + STAGE_TILES; tile++) {
			bool seen = at.mine && tile >= at.s.tile0 &&
				    tile < at.s.tile0 + at.s.n_tiles;

			if (!warp_ballot(seen)) /* the whole warp */
				continue;
			add_tile<T, DIM>(&state, at.s.first, at.s.end, tile * TILE, q, scale,
				ring + s % STAGES * stage_vecs + (tile - tile0) * tile_vecs);
			end_part<DIM>(&at, tile + 1, &state, &split, &all);
		}
	}
	copy_wait<0>();
	write_pair<T, DIM>(a, at, all);
}

template <class T, int DIM>
GPU_KERNEL(WARPS * 32) attend_chunk_kernel(struct afd__attend_args a, unsigned block_rows)
{
	GPU_DYNAMIC_SHARED(memory);
	/* Those that see most begin. */
	size_t row0 = (size_t)(grid_x() - 1 - block_x()) * block_rows;
	unsigned n_rows = least((unsigned)(a.n_rows - row0), block_rows);

	for (unsigned i = 0; i < n_rows;) {
		chunk_run run = find_run(a, row0 + i, n_rows - i);

		attend_run<T, DIM>(a, run, block_y(), row0, (vec16 *)memory);
		i += run.n_rows;
		barrier(); /* the ring is free for the next run */
	}
}

static unsigned rows_of_block(const struct afd__attend_args *a)
{
	return BLOCK_PAIRS / (a->n_heads / a->kv.n_kv_heads);
}

/* Few rows have more blocks when each is divided by itself. */
int attend_chunk_pays(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	unsigned block_rows = rows_of_block(a);
	uint32_t n_rows = a->n_rows > a->run_rows ? a->n_rows : a->run_rows;

	return block_rows && a->run_rows >= PAYS_ROWS &&
	       divide_up(n_rows, block_rows) * a->kv.n_kv_heads * 2 >= gpu->n_sms;
}

template <class T, int DIM>
static int launch(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	unsigned block_rows = rows_of_block(a);

	return gpu_launch(gpu, "attend_chunk", attend_chunk_kernel<T, DIM>,
		{ (unsigned)divide_up(a->n_rows, block_rows), a->kv.n_kv_heads, 1 }, WARPS * 32,
		(size_t)STAGES * STAGE_TILES * tile_shape<T, DIM>::vecs * sizeof(vec16), *a,
		block_rows);
}

template <class T>
static int launch_dim(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	return a->kv.head_dim <= 64 ? launch<T, 64>(gpu, a) : launch<T, 128>(gpu, a);
}

int attend_chunk(const struct afd_gpu *gpu, const struct afd__attend_args *a)
{
	return a->kv.dtype == AFD_DTYPE_BF16  ? launch_dim<bf16>(gpu, a)
	       : a->kv.dtype == AFD_DTYPE_F16 ? launch_dim<f16>(gpu, a)
					      : launch_dim<fp8>(gpu, a);
}
