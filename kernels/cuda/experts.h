/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The plan of `experts`: which rows each expert takes, made on the device, since the ids are there.
 * An entry is a (row, slot) that counts; entries are sorted by expert, then by row. A task is up to
 * task_rows entries of one expert: its weights are read once for all of them.
 *
 * Invariant: the host knows only how many tasks there can be; blocks beyond n_tasks leave.
 */
#ifndef AFD_KERNELS_CUDA_EXPERTS_H
#define AFD_KERNELS_CUDA_EXPERTS_H

#include "product.h"

struct expert_task {
	uint32_t expert, first, n_entries;
};

/* Rows as tensor cores take them (tile.h): of each row its numbers, then its scales. */
struct tile_x {
	uint16_t *numbers; /* [row_numbers], of a row */
	float *scales;     /* [n_scales], of a row; NULL: bf16 has none */
	uint32_t row_numbers, n_scales;
	size_t row_bytes; /* from row to row, a multiple of 16 */
};

GPU_BOTH uint16_t *tile_numbers(const struct tile_x &x, size_t row)
{
	return x.numbers + row * (x.row_bytes / 2);
}

GPU_BOTH float *tile_scales(const struct tile_x &x, size_t row)
{
	return x.scales + row * (x.row_bytes / 4);
}

/* All in scratch, of a chunk of n_rows. */
struct experts {
	const float *x; /* [n_rows][hidden] */
	const int32_t *ids;
	const float *weights; /* [n_rows][top_k] */
	float *y;             /* [n_rows][hidden] */
	uint32_t n_rows, top_k, n_stack, hidden, width, task_rows, max_tasks;
	int32_t first_expert;
	uint32_t *n_tasks, *n_entries;
	uint32_t *first;       /* [n_stack]: of each expert's entries */
	int32_t *entries;      /* [n_rows][top_k]: the slot's expert, then its entry; -1: none */
	uint32_t *rows;        /* [n_entries]: row of the chunk */
	expert_task *tasks;    /* [max_tasks] */
	float *x_quantized;    /* [n_rows][hidden], or NULL */
	float *gate_up;        /* [n_entries][2 * width]; activated in the first half */
	float *out;            /* [n_entries][hidden] */
	int on_tiles;          /* products run on tensor cores, from these: */
	struct tile_x x_tiles, activated_tiles;
};

int experts_plan(const struct afd_gpu *gpu, const experts &e);

#endif
