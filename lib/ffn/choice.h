/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The choice of experts for rows of one layer, wherever it is made: an FFN stage makes it for the
 * rows that come without ids, an attention stage for those that it sends with them. Both do these
 * operations with the same packed router on x as it crosses the wire, so both have the same bits.
 */
#ifndef AFD_LIB_CHOICE_H
#define AFD_LIB_CHOICE_H

#include "../device/device.h"
#include "../model/model.h"

struct afd__choice {
	const struct afd__layer *arch;
	struct afd__matrix router; /* [n_experts][hidden], packed */
	const float *bias;         /* dev [n_experts], or NULL */
	const float *x;            /* dev [n_rows][hidden] */
	float *logits;             /* dev [n_rows][n_experts]: scratch */
	int32_t *ids;              /* dev [n_rows][top_k]: is written */
	float *weights;            /* dev [n_rows][top_k]: is written */
	uint32_t n_rows;
};
int afd__choose_experts(struct afd__queue *q, const struct afd__choice *choice);

#endif
