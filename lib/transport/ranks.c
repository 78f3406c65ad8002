/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ranks of an attention group as seen from one of them: which rows each sends in an operation
 * and in which parts, what has come of them, and what they have said of their steps.
 *
 * Invariant: a part is read only when its header is that of the part that must come next; one that
 * says otherwise ends the operation with both sides named. Called by group.c, link.c and steps.c.
 */
#include <string.h>

#include "ranks.h"

static const uint64_t MS = 1000000;

static const char *const op_names[] = { "", "reduce", "gather" };

/* ---- rows and slots ---- */

/* The rows that a rank sends. */
static struct afd__range rows_of(
	const afd_transport *net, const struct afd__group_op *op, uint32_t rank)
{
	if (op->type == AFD__REDUCE)
		return (struct afd__range){ 0, op->n_rows };
	return afd__shard_range(op->n_rows, rank, net->params.group_size);
}

uint32_t afd__rank_parts(const afd_transport *net, const struct afd__group_op *op, uint32_t rank)
{
	uint32_t n_rows = afd__range_size(rows_of(net, op, rank));

	return n_rows ? (n_rows - 1) / net->params.max_rows + 1 : 0;
}

struct afd__piece afd__rank_piece(
	const afd_transport *net, const struct afd__group_op *op, uint32_t rank, uint32_t part)
{
	struct afd__range rows = rows_of(net, op, rank);
	uint32_t limit = net->params.max_rows, row0 = rows.begin + part * limit;
	uint32_t left = rows.end - row0;

	return (struct afd__piece){ row0, left < limit ? left : limit };
}

struct afd__slot_in *afd__rank_slot(struct afd__link *link, uint32_t lane)
{
	return &link->in[lane * AFD__SLOTS_PER_LANE + link->turn_in[lane]];
}

void afd__rank_release(struct afd__link *link, uint32_t lane)
{
	struct afd__slot_in *in = afd__rank_slot(link, lane);
	int rc;

	in->state = AFD__PART_NONE;
	link->turn_in[lane] ^= 1;
	if (link->phase != AFD__LINK_JOINED)
		return;
	rc = link->wire.ops->post_receive(&link->wire, in->slot);
	if (rc < 0)
		afd__link_fail(link, rc);
}

/* ---- what a rank has done ---- */

bool afd__rank_is_settled(const afd_transport *net, const struct afd__group_op *op,
	struct afd__link *link, uint32_t lane)
{
	uint32_t n_here = 0;

	for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
		if (afd__link_out(link, lane)[i].state != AFD__SLOT_FREE)
			return false;
		n_here += link->in[lane * AFD__SLOTS_PER_LANE + i].state != AFD__PART_NONE;
	}
	return op->sent[link->rank] == afd__rank_parts(net, op, afd__rank_own(net)) &&
	       op->read[link->rank] + n_here >= afd__rank_parts(net, op, link->rank);
}

/* What a rank said when it gave a step up tells more than that it left afterwards. */
int afd__group_error(const struct afd__link *link)
{
	const struct afd__step_close *closed = &link->peer_closed;
	unsigned long long step = closed->step;

	if (closed->step < link->net->step || (link->error && !closed->text[0]))
		return afd__link_error(link);
	if (!closed->text[0])
		return afd__error(-ECANCELED, "group: rank %u cancelled step %llu", link->rank, step);
	return afd__error(-ECANCELED, "group: rank %u failed in step %llu: %s", link->rank, step,
		closed->text);
}

/* ---- what comes ---- */

int afd__group_take(struct afd__link *link, uint32_t slot, const struct afd__header *h,
	size_t bytes, uint64_t now)
{
	uint32_t row_slot = slot - AFD__N_CONTROL, lane = row_slot / AFD__SLOTS_PER_LANE;
	struct afd__slot_in *in = &link->in[row_slot];
	int rc;

	if (h->kind != AFD__FRAME_COLLECTIVE)
		return afd__error(-EPROTO, "frame: kind %u is not for a group", h->kind);
	if (h->lane >= link->lanes || h->lane != lane)
		return afd__error(-EPROTO, "collective: lane is %u in slot %u, limit %u", h->lane,
			row_slot, link->lanes - 1);
	if (row_slot % AFD__SLOTS_PER_LANE != link->turn_came[lane] || in->state != AFD__PART_NONE)
		return afd__error(
			-EPROTO, "collective: slot %u of lane %u is out of turn", row_slot, lane);
	if (h->dtype != AFD_DTYPE_F32)
		return afd__error(-EPROTO, "collective: dtype is %s, must be f32",
			afd_dtype_name(h->dtype));
	rc = afd__wire_check_rows(h, bytes, link->net->contract.hidden_size, link->max_rows);
	if (rc)
		return rc;
	link->turn_came[lane] ^= 1;
	in->header = *h;
	in->arrived_ns = now;
	in->state = AFD__PART_ARRIVED;
	return 0;
}

int afd__group_control(
	struct afd__link *link, const struct afd__header *h, const void *payload, size_t bytes)
{
	struct afd__step_close close;
	int rc;

	if (h->type == AFD__STEP_OPEN)
		return afd__wire_decode_open(&link->peer_open, payload, bytes);
	rc = afd__wire_decode_close(&close, payload, bytes);
	if (!rc && close.reason == AFD__CLOSE_CANCELLED)
		link->peer_closed = close;
	return rc;
}

/* Of a step that is over here: cancelled, since else it would have been read. */
static bool is_stale(const afd_transport *net, const struct afd__header *h)
{
	int32_t ahead = (int32_t)(h->step - (uint32_t)net->step);

	return ahead < 0 || (!ahead && !net->step_open);
}

int afd__rank_drop_stale(afd_transport *net, struct afd__link *link)
{
	int moved = 0;

	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
			struct afd__slot_in *in = afd__rank_slot(link, lane);

			if (in->state != AFD__PART_ARRIVED || !is_stale(net, &in->header))
				break;
			afd__rank_release(link, lane);
			moved = 1;
		}
	}
	return moved;
}

/* ---- is it what must come ---- */

int afd__rank_check_part(const afd_transport *net, const struct afd__group_op *op,
	const struct afd__link *link, const struct afd__header *h)
{
	uint32_t part = op->read[link->rank];
	struct afd__piece piece = afd__rank_piece(net, op, link->rank, part);
	uint32_t n_parts = afd__rank_parts(net, op, link->rank);

	if (h->step == (uint32_t)net->step && h->type == op->type && h->layer == op->layer &&
		h->part == part && h->n_parts == n_parts && h->n_rows == piece.n_rows)
		return 0;
	return afd__error(-EPROTO,
		"group: rank %u sent %s of step %u, layer %u, part %u of %u with %u rows; rank %u is at "
		"%s of step %u, layer %u, and waits for part %u of %u with %u rows",
		link->rank, op_names[h->type], h->step, h->layer, h->part + 1, h->n_parts, h->n_rows,
		afd__rank_own(net), op_names[op->type], (uint32_t)net->step, op->layer, part + 1, n_parts,
		piece.n_rows);
}

int afd__rank_check_step(const afd_transport *net, const struct afd__group_op *op,
	struct afd__link *link, uint32_t lane)
{
	const struct afd__step_open *theirs = &link->peer_open, *ours = &link->step_open;

	if ((link->error || link->peer_closed.step >= net->step) &&
		!afd__rank_is_settled(net, op, link, lane))
		return afd__group_error(link);
	if (theirs->step == net->step && theirs->n_rows[lane] != ours->n_rows[lane])
		return afd__error(-EPROTO,
			"group: in step %llu lane %u has %u rows at rank %u, %u at rank %u",
			(unsigned long long)net->step, lane, theirs->n_rows[lane], link->rank,
			ours->n_rows[lane], afd__rank_own(net));
	if (theirs->step > net->step && !afd__rank_is_settled(net, op, link, lane))
		return afd__error(-EPROTO, "group: rank %u is in step %llu, rank %u in step %llu",
			link->rank, (unsigned long long)theirs->step, afd__rank_own(net),
			(unsigned long long)net->step);
	return 0;
}

/* ---- time ---- */

/* The last operation of a step gathers what the FFN made of the last layer. */
static bool is_over(const afd_transport *net, uint32_t lane)
{
	const struct afd__group_op *op = &net->groups[lane];

	return op->step == net->step && op->type == AFD__GATHER && !op->active &&
	       op->layer + 1 == net->contract.n_layers;
}

/* Between operations, too: a rank whose rows all go to the FFN is waited for by those that have
 * none, and hears nothing of them. */
bool afd__group_owes(const struct afd__link *link)
{
	const afd_transport *net = link->net;

	if (!net->step_open)
		return false;
	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		if (link->step_open.n_rows[lane] && !is_over(net, lane))
			return true;
	}
	return false;
}

int afd__group_silence(const struct afd__link *link, uint64_t now)
{
	const afd_transport *net = link->net;
	uint32_t lane = 0;

	while (lane + 1 < net->params.lanes && !net->groups[lane].waits[link->rank])
		lane++;
	return afd__error(-ETIMEDOUT,
		"rank %u waited for %s: silent for %llu ms, limit %u, in %s of step %llu, layer %u, "
		"lane %u; last heard of %llu ms ago",
		afd__rank_own(net), link->who, (unsigned long long)((now - link->quiet_ns) / MS),
		net->params.deadline_ms, op_names[net->groups[lane].type],
		(unsigned long long)net->step, net->groups[lane].layer, lane,
		(unsigned long long)((now - link->heard_ns) / MS));
}
