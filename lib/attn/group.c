/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An attention group: its ranks have the same rows and other heads. What a rank's heads add to the
 * residual stream is a part of a sum, which all ranks build in the same order from +0.0; then each
 * sends its share of the rows to the FFN, and y of the others' shares comes from them. So no row is
 * computed twice by an FFN, and all ranks have the same bits in the residual stream.
 *
 * Slots are written and read by the device, as in remote.c. Called by step.
 */
#include "attn.h"

bool afd__attn_in_group(const struct afd_attn *attn)
{
	return attn->params.group_size > 1;
}

void afd__attn_group_share(const struct afd_attn *attn, struct afd__lane *lane)
{
	struct afd__range own = afd__shard_range(
		lane->n_rows, attn->params.group_index, attn->params.group_size);

	lane->own_row0 = lane->row0 + own.begin;
	lane->n_own_rows = afd__range_size(own);
}

static int copy_rows(
	struct afd_attn *attn, struct afd__lane *lane, const float *src, float *dst, uint32_t n_rows)
{
	int rc = afd__attn_convert_rows(
		attn, src, AFD_DTYPE_F32, NULL, dst, AFD_DTYPE_F32, n_rows);

	return rc ? rc : afd__attn_slot_enqueued(attn, lane);
}

/* The rows leave before another lane computes. */
static int begun(struct afd_attn *attn, int rc)
{
	rc = rc ? rc : afd__exchange_progress(attn->net);
	return rc < 0 ? rc : 0;
}

static int reached(void *user, uint32_t index)
{
	struct afd_attn *attn = user;

	return afd__attn_slot_reached(attn, &attn->step.lanes[index]);
}

/* ---- the sum over the ranks ---- */

static int fill_part(void *user, uint32_t index, uint32_t row0, uint32_t n_rows, float *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];

	return copy_rows(attn, lane, afd__attn_rows(attn, attn->memory.x, lane->row0 + row0), slot,
		n_rows);
}

/* Ranks come in their order; slot NULL: our own part. */
static int add_part(void *user, uint32_t index, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];
	float *y = afd__attn_rows(attn, attn->memory.y, lane->row0 + row0);
	int rc = rank ? 0 : afd__attn_clear_rows(attn, y, n_rows);

	if (!slot)
		slot = afd__attn_rows(attn, attn->memory.x, lane->row0 + row0);
	rc = rc ? rc : afd__attn_add_rows(attn, slot, AFD_DTYPE_F32, y, NULL, n_rows);
	return rc ? rc : afd__attn_slot_enqueued(attn, lane);
}

int afd__attn_group_reduce(struct afd_attn *attn, uint32_t index)
{
	const struct afd__group_io io = { .fill = fill_part, .filled = reached, .drain = add_part,
		.drained = reached, .user = attn };
	const struct afd__lane *lane = &attn->step.lanes[index];

	return begun(attn,
		afd__group_reduce(attn->net, index, lane->layer, lane->n_rows, &io));
}

/* ---- y of all rows ---- */

static int fill_y(void *user, uint32_t index, uint32_t row0, uint32_t n_rows, float *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];

	return copy_rows(attn, lane, afd__attn_rows(attn, attn->memory.y, lane->row0 + row0), slot,
		n_rows);
}

static int take_y(void *user, uint32_t index, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	struct afd_attn *attn = user;
	struct afd__lane *lane = &attn->step.lanes[index];

	return copy_rows(attn, lane, slot, afd__attn_rows(attn, attn->memory.y, lane->row0 + row0),
		n_rows);
}

int afd__attn_group_gather(struct afd_attn *attn, uint32_t index)
{
	const struct afd__group_io io = { .fill = fill_y, .filled = reached, .drain = take_y,
		.drained = reached, .user = attn };
	const struct afd__lane *lane = &attn->step.lanes[index];

	return begun(attn,
		afd__group_gather(attn->net, index, lane->layer, lane->n_rows, &io));
}

int afd__attn_group_done(struct afd_attn *attn, uint32_t index)
{
	return afd__group_done(attn->net, index);
}
