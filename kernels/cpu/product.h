/* SPDX-License-Identifier: Apache-2.0 */
/*
 * y = x * w^T + bias, the heart of both stages, and the packing of w.
 *
 * One order for every variant, row count, range and blocking: an accumulator per (row, column)
 * starts at +0, takes fma(x[k], w[k]) for k ascending, and the bias is added last. Blocks of k park
 * the accumulator in y, which is exact. So all packed variants give the same bits. In place the sum
 * has 16 lanes (lane = k mod 16), each as above, added as a tree of halves; again the same in all
 * variants.
 *
 * FP8: such a sum is taken over each block of scales, and the result is fma(sum, scale, result),
 * blocks ascending, from +0. Blocks end at multiples of 128 of the whole tensor's columns, so a
 * shard adds what the whole would add. In place that holds per lane; a lane counts from the
 * beginning of its block.
 *
 * Linked by the tables (table.c): one function of each name per variant.
 */
#ifndef AFD_KERNELS_PRODUCT_H
#define AFD_KERNELS_PRODUCT_H

#include "kernels.h"

void afd_k_product_c(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
void afd_k_product_avx2(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
void afd_k_product_avx512(const struct afd__product_args *a, uint32_t n0, uint32_t n1);

void afd_k_product_in_place_c(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
void afd_k_product_in_place_avx2(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
void afd_k_product_in_place_avx512(const struct afd__product_args *a, uint32_t n0, uint32_t n1);

void afd_k_product_in_place_fp8_avx2(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
void afd_k_product_in_place_fp8_avx512(const struct afd__product_args *a, uint32_t n0, uint32_t n1);

/* Serves every variant: packing is bound by memory, not by instructions (pack.c). p0 and p1 count
 * panels of the whole matrix; only columns row0 .. row0+n_rows-1 are written, and the zeros beyond
 * n with the last of them. */
void afd_k_pack_c(const struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows,
	uint32_t p0, uint32_t p1);

/* The scales of columns row0 .. row0+n_rows-1 (struct afd__matrix says how they lie); those beyond
 * n with the last of them. */
void afd_k_load_scales(const struct afd__matrix *m, const struct afd__scale_blocks *blocks,
	uint32_t row0, uint32_t n_rows);

#endif
