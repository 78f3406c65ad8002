/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows to an FFN of this process and back. They never leave the device, but they are rounded as if
 * they had crossed a wire: x to its dtype and back, y to its dtype and then added to +0.0, as
 * partial results of shards are. So one process gives the bits of two. Called by step.
 */
#include "attn.h"

int afd__attn_local_enqueue(struct afd_attn *attn, const struct afd__lane *lane)
{
	int32_t in = attn->params.to_attention_dtype;
	float *x = afd__attn_rows(attn, attn->memory.x, lane->own_row0),
	      *y = afd__attn_rows(attn, attn->memory.y, lane->own_row0);
	int rc = afd__attn_round_rows(attn, lane);

	rc = rc ? rc
		: afd__ffn_enqueue(
			  attn->ffn, &attn->queue, (int32_t)lane->layer, lane->n_own_rows, x, x);
	rc = rc ? rc
		: afd__attn_convert_rows(
			  attn, x, AFD_DTYPE_F32, NULL, attn->memory.wire, in, lane->n_own_rows);
	rc = rc ? rc : afd__attn_clear_rows(attn, y, lane->n_own_rows);
	rc = rc ? rc
		: afd__attn_add_rows(attn, attn->memory.wire, in, y, NULL, lane->n_own_rows);
	return rc;
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
