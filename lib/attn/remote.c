/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows to the FFN peers and back: the transport asks for a part's rows when it has a slot, and
 * offers what came. The device writes and reads slots itself; a ticket tells when it has. Partial
 * results of shards are added in their order, to +0.0. Where this side routes, a target gets some
 * of the lane's rows, and the others are none of its business.
 */
#include "attn.h"

int afd__attn_slot_enqueued(struct afd_attn *attn, struct afd__lane *lane)
{
	int rc = afd__queue_ticket(&attn->queue, &lane->ticket);

	return rc ? rc : afd__attn_slot_reached(attn, lane);
}

int afd__attn_slot_reached(struct afd_attn *attn, struct afd__lane *lane)
{
	int rc = afd__queue_reached(&attn->queue, lane->ticket);

	lane->moving = rc == 0;
	return rc;
}

static int reached(void *user, uint32_t index, uint32_t target)
{
	struct afd_attn *attn = user;

	return afd__attn_slot_reached(attn, &attn->step.lanes[index]);
}

static int fill(void *user, uint32_t index, uint32_t target, uint32_t row0, uint32_t n_rows,
	const struct afd__slot_rows *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];
	const int32_t *list = afd__attn_route_list(attn, index, target);
	const float *x = afd__attn_rows(attn, attn->memory.x, lane->own_row0 + (list ? 0 : row0));
	int rc = afd__attn_convert_rows(attn, x, AFD_DTYPE_F32, list ? list + row0 : NULL,
		slot->rows, attn->params.to_ffn_dtype, n_rows);

	if (slot->ids)
		afd__attn_route_fill(attn, index, target, row0, n_rows, slot);
	return rc ? rc : afd__attn_slot_enqueued(attn, lane);
}

static int clear_once(struct afd_attn *attn, struct afd__lane *lane)
{
	int rc = 0;

	if (!lane->cleared)
		rc = afd__attn_clear_rows(
			attn, afd__attn_rows(attn, attn->memory.y, lane->own_row0),
			lane->n_own_rows);
	lane->cleared = 1;
	return rc;
}

static int drain(void *user, uint32_t index, uint32_t target, uint32_t row0, uint32_t n_rows,
	const void *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];
	const int32_t *list = afd__attn_route_list(attn, index, target);
	int32_t dtype = attn->params.to_attention_dtype;
	int rc = clear_once(attn, lane);

	rc = rc ? rc
		: afd__attn_add_rows(attn, slot, dtype,
			  afd__attn_rows(attn, attn->memory.y, lane->own_row0 + (list ? 0 : row0)),
			  list ? list + row0 : NULL, n_rows);
	return rc ? rc : afd__attn_slot_enqueued(attn, lane);
}

int afd__attn_remote_send(struct afd_attn *attn, uint32_t index)
{
	const struct afd__frame_io io = {
		.fill = fill, .filled = reached, .drain = drain, .drained = reached, .user = attn,
		.in_order = true
	};
	struct afd__lane *lane = &attn->step.lanes[index];
	uint32_t target, n_rows[AFD__TARGETS_MAX];
	int rc;

	for (target = 0; target < attn->route.n_targets; target++)
		n_rows[target] = afd__attn_route_rows(attn, index, target);
	lane->cleared = 0;
	rc = afd__exchange_send(attn->net, index, lane->layer, n_rows, &io);
	rc = rc ? rc : afd__exchange_progress(attn->net);
	/* While the rows are away. */
	return rc < 0 ? rc : clear_once(attn, lane);
}

int afd__attn_remote_done(struct afd_attn *attn, uint32_t index)
{
	return afd__exchange_done(attn->net, index);
}
