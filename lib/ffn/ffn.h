/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an attention stage of this process asks of a local FFN stage: to enqueue the FFN of one
 * layer on a queue of its own. The stage routes by itself. Rows stay in dev memory of the one
 * device that both use; nothing is rounded here: x is rounded to the wire dtype before, and y
 * after, by the caller, as it would happen on a wire.
 */
#ifndef AFD_LIB_FFN_H
#define AFD_LIB_FFN_H

#include <afd/ffn.h>

#include "../device/device.h"

struct afd__ffn_info {
	struct afd_contract contract;   /* ffn_kinds lives as long as the stage */
	struct afd__device *device;     /* the stage's; a local attention stage uses the same one */
	uint32_t first_layer, n_layers; /* held */
	uint32_t max_rows;              /* of one pass; _enqueue takes any number */
	int32_t deterministic;          /* asked for */
	int32_t served;                 /* 1: made with a transport, not for local use */
};
void afd__ffn_info(const afd_ffn *ffn, struct afd__ffn_info *info);

/* A local attention stage takes the FFN stage for itself, since they share its activations; -EBUSY
 * when another has it, -EINVAL when it is a shard. NULL gives it back. */
int afd__ffn_own(afd_ffn *ffn, const void *stage);

/* The form in which the layer takes x, without rows, where it reads x in this form only; row_bytes 0:
 * it reads float32. */
struct afd__inputs afd__ffn_inputs(const afd_ffn *ffn, int32_t layer);
/* y = F(layer, x) behind what is on q already; x and y may be the same. inputs: x in the form of
 * afd__ffn_inputs, and then x is not read; or NULL. n_rows 0 is legal. -EINVAL: the layer is not
 * held. */
int afd__ffn_enqueue(afd_ffn *ffn, struct afd__queue *q, int32_t layer, uint32_t n_rows,
	const float *x /* dev [n_rows][hidden_size] */, const void *inputs,
	float *y /* dev [n_rows][hidden_size] */);
/* All layers of n_rows rows ran once more, from a recording of what _enqueue had enqueued. */
void afd__ffn_count_replayed(afd_ffn *ffn, uint32_t n_rows);

#endif
