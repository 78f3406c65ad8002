/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products on tensor cores, of one matrix or of a stack by tasks: tile_inputs makes the rows of x
 * that they take, tile_product runs.
 *
 * x in 16 bits: bf16 for weights in bf16; f16 for f16, divided by a power of two of the row; f16 for
 * FP8, divided by a scale of each group of 128, so that rows which were quantised, or were bf16, are
 * taken exactly. Columns lie `lead` further, so that blocks of scales begin at multiples of 128,
 * and zeros stand before and behind.
 *
 * Invariant: sums are cut in k at places that n and k decide, in steps of 16, so a row's bits depend
 * on no other row, nor on how many there are.
 */
#ifndef AFD_KERNELS_CUDA_TILE_H
#define AFD_KERNELS_CUDA_TILE_H

#include "experts.h"

enum { TILE_K = 128 }; /* of a stage: a block of scales */

struct tile_work {
	struct product p; /* of the stack's first matrix; x is not used */
	struct tile_x x;
	uint32_t lead, n_slices, rows;
	float *parts; /* [n_slices][n_rows][n] when there are several */
	uint32_t *counters; /* tile_product's: of each tile, or NULL: a second kernel adds the parts */
	/* Of a stack: */
	const expert_task *tasks; /* or NULL: one matrix, rows as they are */
	const uint32_t *n_tasks, *x_rows; /* x_rows: or NULL, entry by entry */
	uint32_t max_tasks;
	size_t w_stride, scales_stride;
	/* SwiGLU of a gate (rows 0 .. half-1 of w) and an up behind it, in one slice: not y is written,
	 * but the inputs of a second product with weights in bf16. 0: no. */
	uint32_t half;
	struct tile_x activated;
	uint32_t activated_lead;
};

/* Whether the kernels can take this matrix: dtype, alignment. */
int tile_fits(const struct afd__matrix *w);
/* Numbers of a row, scales of a row, its bytes; and with the rows in memory, at 16 bytes. */
struct tile_x tile_shape(const struct afd__matrix *w);
struct tile_x tile_x_at(struct tile_x shape, void *memory);

/* Where rows of x come from: x, or silu(x) * up; and, with quantize, as they are after e4m3. */
struct tile_source {
	const float *x, *up; /* [n_rows][x_stride]; up: or NULL */
	size_t x_stride;
	uint32_t n_rows;
	const uint32_t *n_used; /* dev, how many of the rows count, or NULL: all */
	int quantize;           /* for weights in FP8 only */
};

int tile_inputs(const struct afd_gpu *gpu, const struct afd__matrix *w,
	const struct tile_source *from, const struct tile_x *out);
/* Rows of a tile: 8, 16, 32 or 64, of which the product of n_rows makes best use. */
uint32_t tile_rows(uint32_t n_rows);
/* How often k is cut, so that a narrow matrix too keeps the whole GPU reading. */
uint32_t tile_slices(const struct afd_gpu *gpu, const struct product *p, uint32_t row_numbers);
int tile_product(const struct afd_gpu *gpu, const struct tile_work *t);

#endif
