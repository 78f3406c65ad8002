/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the packed product of a variant is made of: tiles, which hold rows x panels of accumulators in registers, and one
 * driver, which cuts the work into tiles so that weights stream once and what is used again stays in L1 and L2.
 *
 * Few rows: a tile walks whole panels, x read as it lies. More: k in blocks, the x of a block copied to the stack at a
 * fixed stride, because rows of x lie at multiples of 4 KiB from each other and would fight for one set of L1.
 *
 * Used by product_avx2.c and product_avx512.c only; product.c stays free of it, so that it can be the reference.
 */
#ifndef AFD_KERNELS_PRODUCT_DRIVE_H
#define AFD_KERNELS_PRODUCT_DRIVE_H

#include <stdbool.h>

#include "product.h"

#define AFD_K_BLOCK 256      /* k of one block: 16 KiB of a bf16 panel */
#define AFD_K_X_STRIDE (AFD_K_BLOCK + 16) /* 17 lines: neighbours fall into different sets */
#define AFD_K_GROUP_ROWS 60 /* rows whose block of x is copied at once: 64 KiB of stack */
#define AFD_K_TILE_ROWS 12  /* most rows of a tile */

#define AFD_K_INLINE static inline __attribute__((always_inline))
/* Constant loops over accumulators must vanish, or these live in memory. */
#if defined(__clang__)
#define AFD_K_UNROLL _Pragma("clang loop unroll(full)")
#else
#define AFD_K_UNROLL _Pragma("GCC unroll 12")
#endif

/* One tile of work. y and bias have room for all columns of its panels. */
struct afd_k_tile {
	const float *x;       /* direct: [n_rows][x_stride]; blocked: [n_rows][AFD_K_X_STRIDE] */
	const void *w;        /* [n_panels][n_k of w_stride bytes apart][32] */
	const void *prefetch; /* blocked: the block that comes next, as large as this one */
	const float *bias;    /* NULL: none, or not the last block */
	float *y;             /* [n_rows][y_stride] */
	size_t x_stride, y_stride;
	size_t w_stride;      /* bytes from panel to panel */
	uint32_t n_k;
	bool resume;          /* start from y instead of 0 */
};
typedef void (*afd_k_tile_fn)(const struct afd_k_tile *t);

struct afd_k_tiles {
	uint32_t direct_rows;   /* up to so many rows go direct */
	uint32_t direct_panels; /* panels of a direct tile; the rest of a range is done one by one */
	afd_k_tile_fn direct[4][AFD_K_TILE_ROWS + 1];     /* [dtype][rows], direct_panels wide */
	afd_k_tile_fn direct_one[4][AFD_K_TILE_ROWS + 1]; /* one panel */
	uint32_t blocked_rows;  /* most rows of a blocked tile */
	afd_k_tile_fn blocked[4][AFD_K_TILE_ROWS + 1];
};

void afd_k_product_drive(const struct afd_k_tiles *tiles, const struct afd__product_args *a, uint32_t n0, uint32_t n1);

#endif
