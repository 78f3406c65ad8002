/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of the largest number of a row, the lowest among equals; or -1 - index of the first
 * number that is not finite. A block does a piece of a row; rows of several pieces are joined by a
 * second kernel.
 *
 * Invariant: which is the best is decided by value and index alone, so pieces do not show.
 */
#include "dispatch.h"

enum { THREADS = 256, PIECE = 4096, NONE = 0x7fffffff };

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

GPU_FN int id_of(const best &b)
{
	return b.broken != NONE ? -1 - b.broken : b.index;
}

/* pieces: [n_rows][grid_x], when there are several */
GPU_KERNEL(THREADS) argmax_kernel(struct afd__argmax_args a, best *pieces)
{
	GPU_SHARED(best, bests, THREADS / 32);
	size_t row = block_y();
	const float *x = a.x + row * a.width;
	unsigned first = block_x() * PIECE, end = least(a.width, first + PIECE);
	best b = { -INFINITY, NONE, NONE };

	for (unsigned i = first + thread_x(); i < end; i += THREADS)
		join(&b, x[i], (int)i, is_finite(x[i]) ? (int)NONE : (int)i);
	join_warp(&b);
	if (lane_id() == 0)
		bests[warp_id()] = b;
	barrier();
	if (thread_x())
		return;
	for (unsigned i = 1; i < THREADS / 32; i++)
		join(&b, bests[i].value, bests[i].index, bests[i].broken);
	if (grid_x() == 1)
		a.ids[row] = id_of(b);
	else
		pieces[row * grid_x() + block_x()] = b;
}

/* A warp does one row. */
GPU_KERNEL(32) argmax_join_kernel(int32_t *ids, const best *pieces, unsigned n_pieces)
{
	size_t row = block_x();
	best b = { -INFINITY, NONE, NONE };

	for (unsigned i = lane_id(); i < n_pieces; i += 32) {
		best piece = pieces[row * n_pieces + i];

		join(&b, piece.value, piece.index, piece.broken);
	}
	join_warp(&b);
	if (lane_id() == 0)
		ids[row] = id_of(b);
}

int afd_gpu_argmax(const struct afd_gpu *gpu, const struct afd__argmax_args *a)
{
	unsigned n_pieces = (unsigned)divide_up(a->width, PIECE);
	size_t most = gpu->workspace_bytes / (n_pieces * sizeof(best));
	struct afd__argmax_args part = *a;
	best *pieces = (best *)gpu->workspace;
	int rc = most ? 0 : GPU_INVALID;

	for (uint32_t left = a->n_rows; !rc && left; left -= part.n_rows) {
		part.n_rows = least(left, most < 65535 ? (unsigned)most : 65535);
		rc = gpu_launch(gpu, "argmax", argmax_kernel, { n_pieces, part.n_rows, 1 }, THREADS,
			0, part, pieces);
		if (!rc && n_pieces > 1)
			rc = gpu_launch(gpu, "argmax_join", argmax_join_kernel, { part.n_rows, 1, 1 },
				32, 0, part.ids, (const best *)pieces, n_pieces);
		part.x += part.n_rows * (size_t)a->width;
		part.ids += part.n_rows;
	}
	return rc;
}
