/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loading, for the files that do it: load.c goes through the layers, experts.c through the experts
 * of one. What is loaded of a tensor is decided by the shard alone; model/slice.h brings it.
 */
#ifndef AFD_LIB_FFN_LOAD_H
#define AFD_LIB_FFN_LOAD_H

#include "../model/slice.h"
#include "stage.h"

struct afd__ffn_loader {
	struct afd_ffn *ffn;
	struct afd__loader to;
};

/* experts.c: the stacks of a routed layer. */
int afd__ffn_load_experts(struct afd__ffn_loader *ld, uint32_t index, struct afd__ffn_layer *layer);

#endif
