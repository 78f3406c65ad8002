/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPU kernels: the math, and nothing else. Each takes its arguments and a range of independent
 * work, so that the caller spreads ranges over threads as it likes: the result of a row never
 * depends on the range, the number of rows or the variant of a neighbour. One table per variant;
 * the plain C table is the reference.
 *
 * Arguments are those of the device seam (lib/device/device.h): here dev memory is plain memory.
 */
#ifndef AFD_KERNELS_CPU_H
#define AFD_KERNELS_CPU_H

#include "../../lib/device/device.h"

/* Columns of a packed panel. Layout of a packed [n][k]: [ceil(n/32)][k][32], rows beyond n are 0;
 * bf16 is interleaved inside the 32 so that the low half-words are columns 0..15 and the high
 * half-words columns 16..31. */
#define AFD_K_PANEL 32

/* The only limit of `attend`: query heads of one kv head. head_dim may be any even number. */
#define AFD_K_GROUP_MAX 64

/* Limits of `route` and `experts`. */
#define AFD_K_EXPERTS_MAX 4096 /* also the most of a stack */
#define AFD_K_TOP_K_MAX   64

struct afd_k_experts;

struct afd_cpu_kernels {
	const char *name; /* "c", "avx2", "avx512" */

	/* y[:, n0:n1] = x * w[n0:n1]^T + bias; w packed; n0 a multiple of AFD_K_PANEL, n1 too or n.
	 */
	void (*product)(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
	/* The same, with w in place: [n][k] row-major. May differ in bits from `product`, never in
	 * itself. */
	void (*product_in_place)(const struct afd__product_args *a, uint32_t n0, uint32_t n1);
	/* Rows [row0 + i] of a packed matrix from row-major rows; panels p0 .. p1-1 of the touched
	 * ones only. */
	void (*pack)(const struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows,
		uint32_t p0, uint32_t p1);

	void (*embed)(const struct afd__embed_args *a, uint32_t row0, uint32_t row1);
	void (*norm)(const struct afd__norm_args *a, uint32_t row0, uint32_t row1);
	void (*angles)(const struct afd__angles_args *a, uint32_t row0, uint32_t row1);
	void (*rope)(const struct afd__rope_args *a, uint32_t row0, uint32_t row1);
	/* Tasks are (row, kv head): task = row * n_kv_heads + head. */
	void (*attend)(const struct afd__attend_args *a, uint32_t task0, uint32_t task1);
	void (*activation)(const struct afd__activation_args *a, uint32_t row0, uint32_t row1);
	void (*convert)(const struct afd__convert_args *a, uint32_t row0, uint32_t row1);
	void (*argmax)(const struct afd__argmax_args *a, uint32_t row0, uint32_t row1);
	void (*gate)(const struct afd__gate_args *a, uint32_t row0, uint32_t row1);
	void (*quantize)(const struct afd__quantize_args *a, uint32_t row0, uint32_t row1);
	void (*route)(const struct afd__route_args *a, uint32_t row0, uint32_t row1);

	/* The steps of `experts` (experts.h). */
	void (*experts_gather)(const struct afd_k_experts *e, uint32_t entry0, uint32_t entry1);
	void (*experts_activate)(const struct afd_k_experts *e, uint32_t entry0, uint32_t entry1);
	void (*experts_combine)(const struct afd_k_experts *e, uint32_t row0, uint32_t row1);
};

/* The table of a variant (enum afd__isa); the caller has checked that this CPU can run it. */
const struct afd_cpu_kernels *afd__cpu_kernels(int isa);

size_t afd_k_packed_bytes(uint32_t n, uint32_t k, int32_t dtype);

#endif
