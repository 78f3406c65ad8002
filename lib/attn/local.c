/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows to an FFN of this process and back. They never leave the device, but they are rounded as if
 * they had crossed a wire: x to its dtype and back, y to its dtype and then added to +0.0, as
 * partial results of shards are. So one process gives the bits of two. The norms see to both where
 * numbers are rounded one by one. Called by step.
 */
#include "attn.h"

int32_t afd__attn_y_wire(const struct afd_attn *attn, uint32_t layer)
{
	int32_t wire = attn->params.to_attention_dtype;

	/* A norm of y itself reads it complete. */
	if (!attn->ffn || wire == AFD_DTYPE_FP8 || attn->weights.layers[layer].after_ffn_norm)
		return 0;
	return wire;
}

/* y = +0.0 + what is left of x on the wire */
static int enqueue_y(struct afd_attn *attn, const struct afd__lane *lane, const float *x, float *y)
{
	int32_t wire = attn->params.to_attention_dtype;
	int rc = afd__attn_convert_rows(
		attn, x, AFD_DTYPE_F32, NULL, attn->memory.wire, wire, lane->n_own_rows);

	rc = rc ? rc : afd__attn_clear_rows(attn, y, lane->n_own_rows);
	return rc ? rc
		  : afd__attn_add_rows(
			    attn, attn->memory.wire, wire, y, NULL, lane->n_own_rows);
}

int afd__attn_local_enqueue(struct afd_attn *attn, const struct afd__lane *lane)
{
	const struct afd__attn_layer *w = &attn->weights.layers[lane->layer];
	const struct afd__inputs inputs =
		afd__attn_inputs(attn, &w->ffn_inputs, lane->row0, lane->own_row0);
	float *x = afd__attn_rows(attn, attn->memory.x, lane->own_row0),
	      *y = afd__attn_rows(attn, attn->memory.y, lane->own_row0);
	bool later = afd__attn_y_wire(attn, lane->layer) != 0;
	int rc = afd__attn_round_rows(attn, lane);

	rc = rc ? rc
		: afd__ffn_enqueue(attn->ffn, &attn->queue, (int32_t)lane->layer,
			  lane->n_own_rows, x, inputs.rows, later ? y : x);
	return rc || later ? rc : enqueue_y(attn, lane, x, y);
}

int afd__attn_local_send(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc;

	afd__range_push(&attn->queue, "afd ffn");
	rc = afd__attn_local_enqueue(attn, lane);
	afd__range_pop(&attn->queue);
	return rc ? rc : afd__queue_ticket(&attn->queue, &lane->ticket);
}

int afd__attn_local_done(struct afd_attn *attn, uint32_t index)
{
	return afd__queue_reached(&attn->queue, attn->step.lanes[index].ticket);
}
