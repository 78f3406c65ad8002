/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the packed product of a variant is made of: tiles, which hold rows x 32 columns of
 * accumulators in registers, and one driver, which cuts the work into tiles so that weights stream
 * once and what is used again stays in L1 and L2.
 *
 * Few rows: a tile walks a whole panel, x read as it lies; long runs of one stream are what DRAM
 * likes best. More rows: k in blocks, the x of a block copied to the stack at a stride of its own,
 * because rows of x lie at multiples of 4 KiB from each other and would fight for one set of L1.
 *
 * FP8 goes by blocks of scales. Few rows: a tile makes floats of the numbers as it goes. More: the
 * driver makes floats of a block of a panel once, in L1, for all tiles.
 *
 * Used by the products of AVX2 and AVX-512 only; product.c stays free of it, so that it can be
 * the reference.
 */
#ifndef AFD_KERNELS_PRODUCT_DRIVE_H
#define AFD_KERNELS_PRODUCT_DRIVE_H

#include <stdbool.h>

#include "product.h"

#define AFD_K_TILE_ROWS  12 /* most rows of a tile */
#define AFD_K_GROUP_ROWS 60 /* rows whose x is copied at once, when they take more than one tile \
			     */
#define AFD_K_BLOCK 256     /* k of their blocks: 16 KiB of a bf16 panel, read once per tile */
/* Where a tile's weights will be wanted in about 300 ns at the rate of DRAM. */
#define AFD_K_PREFETCH_BYTES 12288

#define AFD_K_INLINE static inline __attribute__((always_inline))
/* Constant loops over accumulators must vanish, or these live in memory. */
#if defined(__clang__)
#define AFD_K_UNROLL _Pragma("clang loop unroll(full)")
#else
#define AFD_K_UNROLL _Pragma("GCC unroll 12")
#endif

/* One tile of work. y and bias have room for all columns of the panel. */
struct afd_k_tile {
	const float *x;       /* [n_rows][x_stride] */
	const char *w;        /* [n_k][32] */
	const char *prefetch; /* as many bytes, wanted soon */
	const float *bias;    /* [32]; NULL: none, or not the last block */
	float *y;             /* [n_rows][y_stride] */
	size_t x_stride, y_stride;
	uint32_t n_k;
	bool resume; /* start from y instead of 0 */
	/* of FP8 */
	const float *scales;   /* of the first k's block: 1, or [32] when mixed */
	uint32_t scale_stride; /* floats from block to block: 1 or 32 */
	uint32_t first_k;      /* until the first block ends */
};
typedef void (*afd_k_tile_fn)(const struct afd_k_tile *t);

struct afd_k_tiles {
	uint32_t direct_rows;  /* up to so many rows go direct */
	uint32_t tile_rows;    /* most rows of a tile */
	uint32_t single_block; /* k of a block when one tile holds all rows; at most 4 * AFD_K_BLOCK
				*/
	afd_k_tile_fn run[AFD_DTYPE_FP8 + 1][AFD_K_TILE_ROWS + 1]; /* [dtype][rows] */
	/* of FP8: a tile whose w is one block as floats [n_k][32]; and what makes them */
	const afd_k_tile_fn *run_decoded; /* [rows] */
	void (*decode)(const char *w, uint32_t n_k, float *out);
	uint32_t decode_rows; /* from so many rows on */
};

void afd_k_product_drive(const struct afd_k_tiles *tiles, const struct afd__product_args *a,
	uint32_t n0, uint32_t n1);

#endif
