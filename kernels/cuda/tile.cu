/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product of a tile (tile.h): COLUMNS rows of w against ROWS rows of x. Weights stream through
 * a ring of cp.async stages of 128 columns; the four warps of a block share the tile and divide the
 * steps of a stage, and their sums are added in the end. Weights are the operand of 16 rows of mma,
 * so 8 rows of x cost one mma.
 *
 * Called by product.cu and experts.cu. Bound by the bytes of w up to about 64 rows.
 */
#include "tile.h"

enum { WARPS = 4, THREADS = WARPS * 32, STEPS = TILE_K / 16 / WARPS, X_CHUNKS = TILE_K / 8 };

/* The numbers that mma takes for weights of a dtype. */
template <class T> struct tile_number {
	typedef T type;
};
template <> struct tile_number<fp8> {
	typedef f16 type;
};

template <class T, int ROWS, int COLUMNS> struct tile_sizes {
	static const int w_chunks = TILE_K * (int)sizeof(T) / 16; /* of a row of w in a stage */
	static const int w_vecs = COLUMNS * w_chunks, x_vecs = ROWS * X_CHUNKS;
	static const int stages = sizeof(T) == 1 && ROWS <= 16 ? 8 : 4;
	static const int stage_bytes = (w_vecs + x_vecs) * 16;
	static const int sum_bytes = WARPS * ROWS * COLUMNS * 4;
	static const int bytes =
		stages * stage_bytes > sum_bytes ? stages * stage_bytes : sum_bytes;
};

/* What this block works on. */
struct tile_place {
	const char *w;       /* of its first row */
	const float *scales; /* of its matrix */
	uint32_t n0, n_columns; /* of y */
	uint32_t first, n_rows; /* first: of y's rows, and of x's or x_rows */
	uint32_t stage0, n_stages;
};

/* Chunk c of a row lies where eight rows of an ldmatrix meet eight groups of banks. */
template <int CHUNKS> GPU_FN unsigned chunk_place(unsigned row, unsigned c)
{
	return row * CHUNKS + (c ^ (row & 7));
}

/* Row of w, from at.n0 on, of a column of the tile; of a SwiGLU the second half of them is the up. */
template <int COLUMNS> GPU_FN unsigned w_row_of(const tile_work &t, unsigned column)
{
	return t.half && column >= COLUMNS / 2 ? t.half + column - COLUMNS / 2 : column;
}

template <int COLUMNS>
GPU_FN bool has_column(const tile_work &t, const tile_place &at, unsigned column)
{
	return (t.half ? column % (COLUMNS / 2) : column) < at.n_columns;
}

GPU_FN unsigned x_row_of(const tile_work &t, const tile_place &at, unsigned row)
{
	return t.x_rows ? t.x_rows[at.first + row] : at.first + row;
}

/* Starts the copies of a stage; what lies outside of w or x becomes zeros. */
template <class T, int ROWS, int COLUMNS>
GPU_FN void load_stage(const tile_work &t, const tile_place &at, unsigned stage, vec16 *memory)
{
	typedef tile_sizes<T, ROWS, COLUMNS> sizes;

	GPU_UNROLL
	for (unsigned i = thread_x(); i < sizes::w_vecs; i += THREADS) {
		unsigned row = i / sizes::w_chunks, c = i % sizes::w_chunks;
		unsigned k = stage * TILE_K + c * (16 / sizeof(T)) - t.lead, bytes = 0;

		/* Before the first column k is a very large number. */
		if (has_column<COLUMNS>(t, at, row) && k < t.p.k)
			bytes = least((t.p.k - k) * (unsigned)sizeof(T), 16);
		copy_async(&memory[chunk_place<sizes::w_chunks>(row, c)],
			bytes ? at.w + w_row_of<COLUMNS>(t, row) * t.p.w_row_bytes +
						(size_t)k * sizeof(T)
			      : at.w, bytes);
	}
	GPU_UNROLL
	for (unsigned i = thread_x(); i < sizes::x_vecs; i += THREADS) {
		unsigned row = i / X_CHUNKS, c = i % X_CHUNKS;
		const uint16_t *x = t.x.numbers;

		if (row < at.n_rows)
			x = tile_numbers(t.x, x_row_of(t, at, row)) + stage * TILE_K + c * 8;
		copy_async(&memory[sizes::w_vecs + chunk_place<X_CHUNKS>(row, c)], x,
			row < at.n_rows ? 16 : 0);
	}
}

/* The operand of 16 rows of w, for both steps of the warp. */
template <class T>
GPU_FN void load_weights(uint32_t (&a)[STEPS][4], const vec16 *w, unsigned row0, unsigned step)
{
	GPU_UNROLL
	for (unsigned j = 0; j < STEPS; j++)
		load_matrices<false>(a[j], &w[chunk_place<TILE_K / 8>(
			row0 + lane_id() % 16, 2 * (step + j) + lane_id() / 16)]);
}

template <>
GPU_INLINE void load_weights<fp8>(
	uint32_t (&a)[STEPS][4], const vec16 *w, unsigned row0, unsigned step)
{
	uint32_t r[4]; /* rows g and g + 8 of the first step, then of the second */

	load_matrices<false>(r,
		&w[chunk_place<TILE_K / 16>(row0 + lane_id() % 16, step + lane_id() / 16)]);
	GPU_UNROLL
	for (unsigned j = 0; j < STEPS; j++) {
		a[j][0] = f16x2_of_fp8x2(r[2 * j]);
		a[j][1] = f16x2_of_fp8x2(r[2 * j + 1]);
		a[j][2] = f16x2_of_fp8x2(r[2 * j] >> 16);
		a[j][3] = f16x2_of_fp8x2(r[2 * j + 1] >> 16);
	}
}

/* acc += the warp's steps of a stage */
template <class T, int ROWS, int COLUMNS>
GPU_FN void add_stage(float (&acc)[COLUMNS / 16][ROWS / 8][4], const vec16 *memory)
{
	typedef tile_sizes<T, ROWS, COLUMNS> sizes;
	const vec16 *x = memory + sizes::w_vecs;
	unsigned step = warp_id() * STEPS, lane = lane_id();
	uint32_t a[COLUMNS / 16][STEPS][4];

	GPU_UNROLL
	for (int i = 0; i < COLUMNS / 16; i++)
		load_weights<T>(a[i], memory, (unsigned)i * 16, step);
	GPU_UNROLL
	for (unsigned j = 0; j < STEPS; j++) {
		GPU_UNROLL
		for (int r = 0; r < ROWS / 8; r += 2) {
			unsigned row = (unsigned)r * 8 + lane % 8 + (ROWS > 8 ? lane / 16 * 8 : 0);
			uint32_t b[4]; /* k and k + 8 of rows 0 .. 7, then of rows 8 .. 15 */

			load_matrices<false>(b,
				&x[chunk_place<X_CHUNKS>(row, 2 * (step + j) + lane / 8 % 2)]);
			GPU_UNROLL
			for (int i = 0; i < COLUMNS / 16; i++) {
				mma(typename tile_number<T>::type{}, acc[i][r], a[i][j], b[0], b[1]);
				if (ROWS > 8)
					mma(typename tile_number<T>::type{},
						acc[i][ROWS > 8 ? r + 1 : r], a[i][j], b[2], b[3]);
			}
		}
	}
}

/* sum += part * the scales of their column and row in this stage */
template <int ROWS, int COLUMNS>
GPU_FN void add_scaled(const tile_work &t, const tile_place &at, unsigned stage,
	float (&sum)[COLUMNS / 16][ROWS / 8][4], const float (&part)[COLUMNS / 16][ROWS / 8][4])
{
	struct product p = t.p;
	float w[COLUMNS / 16][2];

	p.scales = at.scales;
	GPU_UNROLL
	for (int i = 0; i < COLUMNS / 16; i++) {
		GPU_UNROLL
		for (unsigned half = 0; half < 2; half++) {
			unsigned n = at.n0 + w_row_of<COLUMNS>(t, (unsigned)i * 16 +
								  lane_id() / 4 + half * 8);

			w[i][half] = *scale_at(p, least(n, p.n - 1), stage);
		}
	}
	GPU_UNROLL
	for (int r = 0; r < ROWS / 8; r++) {
		GPU_UNROLL
		for (int e = 0; e < 2; e++) {
			unsigned row = (unsigned)r * 8 + lane_id() % 4 * 2 + (unsigned)e;
			float x = row < at.n_rows ? tile_scales(t.x, x_row_of(t, at, row))[stage]
						  : 0;

			GPU_UNROLL
			for (int i = 0; i < COLUMNS / 16; i++) {
				sum[i][r][e] = fmaf(part[i][r][e], w[i][0] * x, sum[i][r][e]);
				sum[i][r][e + 2] =
					fmaf(part[i][r][e + 2], w[i][1] * x, sum[i][r][e + 2]);
			}
		}
	}
}

/* The warps' sums of a column of a row, ascending. */
template <int ROWS, int COLUMNS>
GPU_FN float add_warps(const float *sums, unsigned row, unsigned column)
{
	float sum = 0;

	GPU_UNROLL
	for (int warp = 0; warp < WARPS; warp++)
		sum += sums[((unsigned)warp * ROWS + row) * COLUMNS + column];
	return sum;
}

/* silu(gate) * up of the tile becomes inputs of the next product, whose numbers before and behind the
 * row are made 0. */
template <class T, int ROWS, int COLUMNS>
GPU_FN void write_activated(const tile_work &t, const tile_place &at, const float *sums)
{
	const struct tile_x &out = t.activated;
	unsigned first = at.n0 ? 0 : t.activated_lead,
		 last = at.n0 + at.n_columns < t.half
				? 0 : out.row_numbers - t.activated_lead - t.half;

	for (unsigned i = thread_x(); i < at.n_rows * (COLUMNS / 2); i += THREADS) {
		unsigned column = i % (COLUMNS / 2), row = i / (COLUMNS / 2);
		size_t y_row = at.first + row;
		float scale = sizeof(T) == 2 && t.x.scales
			? *tile_scales(t.x, x_row_of(t, at, row)) : 1;
		float gate = add_warps<ROWS, COLUMNS>(sums, row, column) * scale;
		float up = add_warps<ROWS, COLUMNS>(sums, row, column + COLUMNS / 2) * scale;
		float x = gate / (1 + expf(-gate)) * up;

		if (column >= at.n_columns)
			continue;
		tile_numbers(out, y_row)[t.activated_lead + at.n0 + column] =
			from_float<bf16>(x).bits;
	}
	for (unsigned row = 0; row < at.n_rows; row++) {
		uint16_t *numbers = tile_numbers(out, at.first + row);

		for (unsigned i = thread_x(); i < first; i += THREADS)
			numbers[i] = 0;
		for (unsigned i = thread_x(); i < last; i += THREADS)
			numbers[t.activated_lead + t.half + i] = 0;
	}
}

/* Of a number of y: the sum of the slices, ascending, + bias. */
GPU_FN void add_slices(const tile_work &t, size_t row, unsigned n)
{
	size_t slice = (size_t)t.p.n_rows * t.p.n;
	float sum = 0;

	for (unsigned i = 0; i < t.n_slices; i++)
		sum += t.parts[i * slice + row * t.p.n + n];
	t.p.y[row * t.p.y_stride + n] = t.p.bias ? sum + t.p.bias[n] : sum;
}

/* The last block of a tile to come finds all its slices there, and adds them. */
template <int COLUMNS>
GPU_FN void finish_tile(const tile_work &t, const tile_place &at, uint32_t *is_last)
{
	uint32_t *counter = &t.counters[block_y() * grid_x() + block_x()];

	barrier(); /* the block's part is written, and the sums are read */
	if (thread_x() == 0) {
		*is_last = add_ordered(counter, 1) == t.n_slices - 1;
		if (*is_last)
			*counter = 0; /* for the next launch */
	}
	barrier();
	if (!*is_last)
		return;
	for (unsigned i = thread_x(); i < at.n_rows * COLUMNS; i += THREADS) {
		if (i % COLUMNS < at.n_columns)
			add_slices(t, at.first + i / COLUMNS, at.n0 + i % COLUMNS);
	}
}

/* Adds the warps' sums, ascending, and writes the tile. */
template <class T, int ROWS, int COLUMNS>
GPU_FN void write_tile(const tile_work &t, const tile_place &at,
	const float (&acc)[COLUMNS / 16][ROWS / 8][4], float *sums)
{
	GPU_UNROLL
	for (int i = 0; i < COLUMNS / 16; i++) {
		GPU_UNROLL
		for (int r = 0; r < ROWS / 8; r++) {
			GPU_UNROLL
			for (int e = 0; e < 4; e++) {
				unsigned column = (unsigned)i * 16 + lane_id() / 4 + e / 2 * 8,
					 row = (unsigned)r * 8 + lane_id() % 4 * 2 + e % 2;

				sums[(warp_id() * ROWS + row) * COLUMNS + column] = acc[i][r][e];
			}
		}
	}
	barrier();
	if (t.half) {
		write_activated<T, ROWS, COLUMNS>(t, at, sums);
		return;
	}
	for (unsigned i = thread_x(); i < at.n_rows * COLUMNS; i += THREADS) {
		unsigned column = i % COLUMNS, row = i / COLUMNS, n = at.n0 + column;
		size_t y_row = at.first + row;

		if (column >= at.n_columns)
			continue;
		float sum = add_warps<ROWS, COLUMNS>(sums, row, column);
		if (sizeof(T) == 2 && t.x.scales)
			sum *= *tile_scales(t.x, x_row_of(t, at, row));
		if (t.n_slices > 1)
			t.parts[((size_t)block_z() * t.p.n_rows + y_row) * t.p.n + n] = sum;
		else
			t.p.y[y_row * t.p.y_stride + n] = t.p.bias ? sum + t.p.bias[n] : sum;
	}
	if (t.counters)
		finish_tile<COLUMNS>(t, at, (uint32_t *)sums);
}

/* False when this block has nothing to do. */
template <int ROWS, int COLUMNS> GPU_FN bool find_place(const tile_work &t, tile_place *at)
{
	unsigned all = t.x.row_numbers / TILE_K;
	size_t expert = 0;

	at->n0 = block_x() * (t.half ? COLUMNS / 2 : COLUMNS);
	at->n_columns = t.half ? least(t.half - at->n0, COLUMNS / 2) : least(t.p.n - at->n0, COLUMNS);
	at->first = block_y() * ROWS;
	at->n_rows = least(t.p.n_rows - at->first, ROWS);
	at->stage0 = (unsigned)((size_t)all * block_z() / t.n_slices);
	at->n_stages = (unsigned)((size_t)all * (block_z() + 1) / t.n_slices) - at->stage0;
	if (t.tasks) {
		if (block_y() >= *t.n_tasks)
			return false;
		expert = t.tasks[block_y()].expert;
		at->first = t.tasks[block_y()].first;
		at->n_rows = t.tasks[block_y()].n_entries;
	}
	at->w = t.p.w + expert * t.w_stride + at->n0 * t.p.w_row_bytes;
	at->scales = (const float *)((const char *)t.p.scales + expert * t.scales_stride);
	return true;
}

/* Blocks of a multiprocessor that registers must leave room for. */
template <class T, int ROWS, int COLUMNS>
GPU_KERNEL(THREADS, ROWS <= 16 ? 5 : ROWS == 32 ? 2 : 1) tile_kernel(tile_work t)
{
	typedef tile_sizes<T, ROWS, COLUMNS> sizes;
	GPU_DYNAMIC_SHARED(memory);
	vec16 *ring = (vec16 *)memory; /* [stages][w_vecs + x_vecs] */
	const int stage_vecs = sizes::w_vecs + sizes::x_vecs;
	float acc[COLUMNS / 16][ROWS / 8][4] = {};
	tile_place at;

	if (!find_place<ROWS, COLUMNS>(t, &at)) /* the whole block */
		return;
	GPU_UNROLL
	for (unsigned s = 0; s < sizes::stages - 1; s++) {
		if (s < at.n_stages)
			load_stage<T, ROWS, COLUMNS>(t, at, at.stage0 + s, ring + s * stage_vecs);
		copy_commit();
	}
	for (unsigned s = 0; s < at.n_stages; s++) {
		unsigned next = s + sizes::stages - 1;

		copy_wait<sizes::stages - 2>(); /* this thread's part of stage s is here */
		barrier(); /* everybody's is; and everybody has done with stage s - 1 */
		if (next < at.n_stages)
			load_stage<T, ROWS, COLUMNS>(t, at, at.stage0 + next,
				ring + next % sizes::stages * stage_vecs);
		copy_commit();
		if (sizeof(T) == 1) {
			float part[COLUMNS / 16][ROWS / 8][4] = {};

			add_stage<T, ROWS, COLUMNS>(part, ring + s % sizes::stages * stage_vecs);
			add_scaled<ROWS, COLUMNS>(t, at, at.stage0 + s, acc, part);
		} else {
			add_stage<T, ROWS, COLUMNS>(acc, ring + s % sizes::stages * stage_vecs);
		}
	}
	copy_wait<0>();
	barrier(); /* the ring is free for the sums */
	write_tile<T, ROWS, COLUMNS>(t, at, acc, (float *)memory);
}

GPU_KERNEL(256) slices_kernel(tile_work t)
{
	unsigned n = block_x() * 256 + thread_x();

	if (n < t.p.n)
		add_slices(t, block_y(), n);
}

template <class T, int ROWS, int COLUMNS>
static int launch(const struct afd_gpu *gpu, const struct tile_work *t)
{
	unsigned tiles = t->tasks ? t->max_tasks : (unsigned)divide_up(t->p.n_rows, ROWS);

	return gpu_launch(gpu, "tile", tile_kernel<T, ROWS, COLUMNS>,
		{ (unsigned)(t->half ? divide_up(t->half, COLUMNS / 2) : divide_up(t->p.n, COLUMNS)),
			tiles, t->n_slices }, THREADS,
		tile_sizes<T, ROWS, COLUMNS>::bytes, *t);
}

template <class T> static int launch_rows(const struct afd_gpu *gpu, const struct tile_work *t)
{
	switch (t->rows) {
	case 8:
		return launch<T, 8, 32>(gpu, t);
	case 16:
		return launch<T, 16, 32>(gpu, t);
	case 32:
		return launch<T, 32, 32>(gpu, t);
	default:
		return launch<T, 64, sizeof(T) == 1 ? 32 : 64>(gpu, t);
	}
}

uint32_t tile_rows(uint32_t n_rows)
{
	return n_rows <= 8 ? 8 : n_rows <= 16 ? 16 : n_rows <= 32 ? 32 : 64;
}

uint32_t tile_slices(const struct afd_gpu *gpu, const struct product *p, uint32_t row_numbers)
{
	uint32_t tiles = (uint32_t)divide_up(p->n, 32), most = row_numbers / TILE_K / 4;
	uint32_t wanted = (uint32_t)divide_up(2 * (size_t)gpu->n_sms, tiles);

	return most < 1 ? 1 : least(least(wanted, most), 16);
}

int tile_product(const struct afd_gpu *gpu, const struct tile_work *work)
{
	struct tile_work t = *work;
	/* At most: some tiles have more columns. */
	size_t tiles = divide_up(t.p.n, 32) * divide_up(t.p.n_rows, t.rows);
	bool finishes = t.n_slices > 1 && tiles <= AFD_GPU_COUNTERS;
	int rc;

	t.counters = finishes ? gpu->counters : NULL;
	rc = t.p.dtype == AFD_DTYPE_BF16  ? launch_rows<bf16>(gpu, &t)
	     : t.p.dtype == AFD_DTYPE_F16 ? launch_rows<f16>(gpu, &t)
					  : launch_rows<fp8>(gpu, &t);
	if (!rc && t.n_slices > 1 && !finishes)
		rc = gpu_launch(gpu, "slices", slices_kernel,
			{ (unsigned)divide_up(t.p.n, 256), t.p.n_rows, 1 }, 256, 0, t);
	return rc;
}
