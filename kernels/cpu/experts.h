/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Routed experts: y of a row is the weighted sum of the outputs of the experts that it was sent to.
 * The rows of a chunk are grouped by expert, so that the weights of each are read once; an entry is
 * one (row, slot) that counts. The steps run one after the other, each over ranges that stand
 * alone: plan, gather, product with gate and up, activate, product with down, combine.
 *
 * Invariant: an entry's numbers depend on its row and expert alone, and combine adds them in the
 * order of the slots. So neither the grouping nor the chunk nor the other rows show in the bits.
 *
 * lib/device/cpu_experts.c runs the steps; all memory of a chunk lies in the scratch of the call.
 */
#ifndef AFD_KERNELS_EXPERTS_H
#define AFD_KERNELS_EXPERTS_H

#include "kernels.h"

#define AFD_K_EXPERTS_ENTRIES 4096 /* of a chunk: more rows take another pass over the weights */
#define AFD_K_EXPERTS_GROUP   128  /* rows of a group: more are bound by arithmetic anyhow */

/* Entries of one expert that take part in one product. */
struct afd_k_expert_group {
	uint32_t expert; /* in the stack */
	uint32_t first, n_entries;
	uint32_t cost_before; /* of the groups before; the cost of one is n_entries + WEIGHT */
};

/* What reading a panel costs, in rows of its product. */
#define AFD_K_EXPERTS_WEIGHT 4

struct afd_k_experts {
	const struct afd__experts_args *a;
	uint32_t row0, n_rows; /* of the chunk */
	uint32_t hidden, width;
	uint32_t n_entries, n_groups;
	size_t x_stride, gate_up_stride; /* in floats */

	/* in the scratch */
	uint32_t *counts;                  /* [n_stack] */
	int32_t *entries;                  /* [n_rows][top_k]: -1 for a slot that is skipped */
	uint32_t *rows;                    /* [n_entries]: of the chunk */
	struct afd_k_expert_group *groups; /* [n_groups] */
	float *x;       /* [n_entries][x_stride >= hidden]: inputs, then outputs */
	float *gate_up; /* [n_entries][gate_up_stride >= 2 * width]; activated in the first half */
};

/* Scratch of a chunk of n_rows; SIZE_MAX when it overflows. */
size_t afd_k_experts_bytes(const struct afd__experts_args *a, uint32_t n_rows);
/* The rows of a chunk, of which there is scratch for at least one. */
uint32_t afd_k_experts_chunk(const struct afd__experts_args *a);
/* Lays out the scratch and groups the rows row0 .. row0+n_rows-1. */
void afd_k_experts_plan(struct afd_k_experts *e, const struct afd__experts_args *a,
	uint32_t row0, uint32_t n_rows);

/* The work of a product, panels of all groups, cut by cost: where part i of n begins. */
struct afd_k_experts_place {
	uint32_t group, panel;
};
struct afd_k_experts_place afd_k_experts_cut(
	const struct afd_k_experts *e, uint32_t n_panels, uint32_t i, uint32_t n);

#endif
