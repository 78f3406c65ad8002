/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows to the FFN peers and back: the transport asks for a part's rows when it has a slot, and
 * offers what came. The device writes and reads slots itself; a ticket tells when it has. Partial
 * results of shards are added in their order, to +0.0.
 */
#include "attn.h"

/* 1 when the device has done it already, which the cpu device always has. */
static int enqueued(struct afd_attn *attn, struct afd__lane *lane)
{
	int rc = afd__queue_ticket(&attn->queue, &lane->ticket);

	rc = rc ? rc : afd__queue_reached(&attn->queue, lane->ticket);
	lane->moving = rc == 0;
	return rc;
}

static int reached(void *user, uint32_t index, uint32_t target)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc = afd__queue_reached(&attn->queue, lane->ticket);

	lane->moving = rc == 0;
	return rc;
}

static int fill(void *user, uint32_t index, uint32_t target, uint32_t row0, uint32_t n_rows,
	const struct afd__slot_rows *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];
	uint32_t hidden = attn->arch->hidden_size;
	const struct afd__convert_args convert = {
		.src = afd__attn_rows(attn, attn->memory.x, lane->row0 + row0),
		.dst = slot->rows,
		.src_stride = hidden * sizeof(float),
		.dst_stride = hidden * afd_dtype_bytes(attn->params.to_ffn_dtype),
		.n_rows = n_rows,
		.width = hidden,
		.src_dtype = AFD_DTYPE_F32,
		.dst_dtype = attn->params.to_ffn_dtype,
	};
	int rc = afd__convert(&attn->queue, &convert);

	return rc ? rc : enqueued(attn, lane);
}

static int drain(void *user, uint32_t index, uint32_t target, uint32_t row0, uint32_t n_rows,
	const void *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];
	float *y = afd__attn_rows(attn, attn->memory.y, lane->row0 + row0);
	int rc = target ? 0 : afd__attn_clear_rows(attn, y, n_rows);

	rc = rc ? rc : afd__attn_add_rows(attn, slot, attn->params.to_attention_dtype, y, n_rows);
	return rc ? rc : enqueued(attn, lane);
}

int afd__attn_remote_send(struct afd_attn *attn, uint32_t index)
{
	const struct afd__frame_io io = {
		.fill = fill, .filled = reached, .drain = drain, .drained = reached, .user = attn,
		.in_order = true
	};
	const struct afd__lane *lane = &attn->step.lanes[index];
	uint32_t target, n_rows[AFD__TARGETS_MAX];
	struct afd__exchange_info info;

	afd__transport_info(attn->net, &info);
	for (target = 0; target < info.n_targets; target++)
		n_rows[target] = lane->n_rows;
	return afd__exchange_send(attn->net, index, lane->layer, n_rows, &io);
}

int afd__attn_remote_done(struct afd_attn *attn, uint32_t index)
{
	return afd__exchange_done(attn->net, index);
}
