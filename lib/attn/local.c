/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows to an FFN of this process and back. They never leave the device, but they are rounded as if
 * they had crossed a wire: x to its dtype and back, y to its dtype and then added to +0.0, as
 * partial results of shards are. So one process gives the bits of two. Called by step.
 */
#include "attn.h"

static int convert_rows(struct afd_attn *attn, const struct afd__lane *lane, const void *src,
	int32_t src_dtype, void *dst, int32_t dst_dtype)
{
	uint32_t hidden = attn->arch->hidden_size;
	const struct afd__convert_args convert = {
		.src = src,
		.dst = dst,
		.src_stride = hidden * afd_dtype_bytes(src_dtype),
		.dst_stride = hidden * afd_dtype_bytes(dst_dtype),
		.n_rows = lane->n_own_rows,
		.width = hidden,
		.src_dtype = src_dtype,
		.dst_dtype = dst_dtype,
	};

	return afd__convert(&attn->queue, &convert);
}

int afd__attn_local_send(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int32_t out = attn->params.to_ffn_dtype, in = attn->params.to_attention_dtype;
	float *x = afd__attn_rows(attn, attn->memory.x, lane->own_row0),
	      *y = afd__attn_rows(attn, attn->memory.y, lane->own_row0);
	int rc = 0;

	if (out != AFD_DTYPE_F32) {
		rc = convert_rows(attn, lane, x, AFD_DTYPE_F32, attn->memory.wire, out);
		rc = rc ? rc : convert_rows(attn, lane, attn->memory.wire, out, x, AFD_DTYPE_F32);
	}
	rc = rc ? rc
		: afd__ffn_enqueue(
			  attn->ffn, &attn->queue, (int32_t)lane->layer, lane->n_own_rows, x, x);
	rc = rc ? rc : convert_rows(attn, lane, x, AFD_DTYPE_F32, attn->memory.wire, in);
	rc = rc ? rc : afd__attn_clear_rows(attn, y, lane->n_own_rows);
	rc = rc ? rc
		: afd__attn_add_rows(attn, attn->memory.wire, in, y, NULL, lane->n_own_rows);
	return rc ? rc : afd__queue_ticket(&attn->queue, &lane->ticket);
}

int afd__attn_local_done(struct afd_attn *attn, uint32_t index)
{
	return afd__queue_reached(&attn->queue, attn->step.lanes[index].ticket);
}
