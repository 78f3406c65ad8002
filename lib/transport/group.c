/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations over an attention group: each rank sends its f32 rows to every other one, in parts
 * that take the lane's two slots of that link in turn; nothing is answered, a slot's return is the
 * credit. Every rank cuts the same rows into the same parts, so each knows what must come next from
 * each other one (ranks.c).
 *
 * What is drained, and in which order, depends on ranks only (reduce) or does not matter (gather):
 * bits never depend on who was first. Driven by net.c; called by the attention stage.
 */
#include <assert.h>
#include <string.h>

#include "ranks.h"

static void filled(afd_transport *net, uint32_t lane, int rc);

/* ---- the end of an operation ---- */

static void stop_waiting(struct afd__group_op *op, struct afd__link *link)
{
	if (op->waits[link->rank] && link->n_owed)
		link->n_owed--;
	op->waits[link->rank] = false;
}

/* A slot that will not be sent: the next part has it, since the peer expects slots in turn. */
static void take_back(struct afd__link *link, uint32_t lane, struct afd__slot_out *out)
{
	out->state = AFD__SLOT_FREE;
	link->turn[lane] ^= 1;
}

static void end_op(afd_transport *net, uint32_t lane, int rc)
{
	struct afd__group_op *op = &net->groups[lane];

	if (!op->active)
		return;
	op->active = false;
	op->error = rc;
	if (rc < 0)
		afd__error_save(op->error_text, sizeof(op->error_text));
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		struct afd__link *link = afd__rank_link(net, rank);

		if (!link)
			continue;
		stop_waiting(op, link);
		for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
			struct afd__slot_out *out = &afd__link_out(link, lane)[i];

			if (out->state == AFD__SLOT_FILLED)
				take_back(link, lane, out);
		}
	}
}

void afd__group_lost(struct afd__link *link)
{
	afd_transport *net = link->net;

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		struct afd__group_op *op = &net->groups[lane];

		if (op->active && !afd__rank_is_settled(net, op, link, lane))
			end_op(net, lane, afd__group_error(link));
	}
	link->n_owed = 0;
}

void afd__group_cancel(afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		end_op(net, lane, 0);
		net->groups[lane].error = 0;
	}
}

void afd__group_disown(afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		struct afd__group_op *op = &net->groups[lane];

		end_op(net, lane, 0);
		if (op->filling != AFD__NOBODY)
			filled(net, lane, 0);
		if (op->draining != AFD__NOBODY && op->draining != afd__rank_own(net))
			afd__rank_release(afd__rank_link(net, op->draining), lane);
		op->filling = op->draining = AFD__NOBODY;
	}
}

/* ---- sending ---- */

static int post(struct afd__link *link, const struct afd__group_op *op, struct afd__slot_out *out)
{
	size_t bytes = afd__wire_rows_bytes(
		out->n_rows, link->net->contract.hidden_size, AFD_DTYPE_F32);
	struct afd__header h = {
		.kind = AFD__FRAME_COLLECTIVE,
		.type = op->type,
		.lane = (uint8_t)out->lane,
		.dtype = AFD_DTYPE_F32,
		.layer = (uint16_t)out->layer,
		.step = out->step,
		.n_rows = out->n_rows,
		.part = out->part,
		.n_parts = out->n_parts,
	};
	int rc = afd__link_post(link, afd__link_wire_slot(link, out), &h, bytes);

	if (rc <= 0)
		return rc < 0;
	out->state = AFD__SLOT_FREE;
	out->unsent = true;
	link->counts.n_parts++;
	link->counts.n_rows += out->n_rows;
	return 1;
}

/* The slot is written; its turn to be posted comes when the step has been told. */
static void filled(afd_transport *net, uint32_t lane, int rc)
{
	struct afd__group_op *op = &net->groups[lane];
	struct afd__link *link = afd__rank_link(net, op->filling);
	struct afd__slot_out *out = afd__link_out(link, lane);

	out += out->state != AFD__SLOT_FILLING;
	op->filling = AFD__NOBODY;
	if (op->active && rc == 1)
		out->state = AFD__SLOT_FILLED;
	else
		take_back(link, lane, out);
	if (rc < 0)
		end_op(net, lane, rc);
}

static int fill_next(afd_transport *net, uint32_t lane, struct afd__link *link)
{
	struct afd__group_op *op = &net->groups[lane];
	struct afd__slot_out *out = &afd__link_out(link, lane)[link->turn[lane]];
	uint32_t part = op->sent[link->rank], n_parts = afd__rank_parts(net, op, afd__rank_own(net));
	struct afd__piece piece;
	int rc;

	if (part == n_parts || out->state != AFD__SLOT_FREE || out->unsent)
		return 0;
	piece = afd__rank_piece(net, op, afd__rank_own(net), part);
	*out = (struct afd__slot_out){
		.lane = lane,
		.layer = op->layer,
		.step = (uint32_t)net->step,
		.row0 = piece.row0,
		.n_rows = piece.n_rows,
		.part = (uint16_t)part,
		.n_parts = (uint16_t)n_parts,
		.state = AFD__SLOT_FILLING,
	};
	link->turn[lane] ^= 1;
	op->sent[link->rank]++;
	op->filling = link->rank;
	rc = op->io.fill(op->io.user, lane, piece.row0, piece.n_rows,
		afd__link_send_rows(link, afd__link_wire_slot(link, out)));
	if (rc)
		filled(net, lane, rc);
	return 1;
}

static int send_parts(afd_transport *net, uint32_t lane, struct afd__link *link)
{
	struct afd__group_op *op = &net->groups[lane];
	int moved = 0;

	if (link->phase != AFD__LINK_JOINED)
		return 0;
	if (op->filling == AFD__NOBODY)
		moved |= fill_next(net, lane, link);
	/* In the order in which they were filled: the older one stands where the next will. */
	for (int i = 0; i < AFD__SLOTS_PER_LANE && op->active && !link->open_due; i++) {
		struct afd__slot_out *out =
			&afd__link_out(link, lane)[link->turn[lane] ^ i];

		if (out->state == AFD__SLOT_FILLED && link->phase == AFD__LINK_JOINED)
			moved |= post(link, op, out);
	}
	return moved;
}

/* ---- reading ---- */

static void drained(afd_transport *net, uint32_t lane, int rc)
{
	struct afd__group_op *op = &net->groups[lane];
	uint32_t rank = op->draining;

	op->draining = AFD__NOBODY;
	if (rank != afd__rank_own(net))
		afd__rank_release(afd__rank_link(net, rank), lane);
	if (rc < 0) {
		end_op(net, lane, rc);
		return;
	}
	op->read[rank]++;
	if (op->type == AFD__REDUCE && ++op->rank == net->params.group_size)
		op->rank = 0;
}

/* 1: the stage reads; 0: nothing to read yet. */
static int drain_rank(afd_transport *net, uint32_t lane, uint32_t rank)
{
	struct afd__group_op *op = &net->groups[lane];
	struct afd__link *link = afd__rank_link(net, rank);
	struct afd__slot_in *in = link ? afd__rank_slot(link, lane) : NULL;
	struct afd__piece piece;
	const void *memory = NULL;
	int rc = 0;

	if (op->read[rank] == afd__rank_parts(net, op, rank) ||
		(in && in->state != AFD__PART_ARRIVED))
		return 0;
	if (link)
		rc = afd__rank_check_part(net, op, link, &in->header);
	if (rc) {
		end_op(net, lane, rc);
		return 1;
	}
	if (link)
		memory = afd__link_receive_rows(link, in->slot, &in->header);
	piece = afd__rank_piece(net, op, rank, op->read[rank]);
	if (in)
		in->state = AFD__PART_TAKEN;
	op->draining = rank;
	rc = op->io.drain(
		op->io.user, lane, rank, piece.row0, piece.n_rows, memory);
	if (rc)
		drained(net, lane, rc);
	return 1;
}

static int drain_next(afd_transport *net, uint32_t lane)
{
	struct afd__group_op *op = &net->groups[lane];
	int moved = 0;

	if (op->type == AFD__REDUCE) {
		while (op->active && op->draining == AFD__NOBODY &&
			drain_rank(net, lane, op->rank))
			moved = 1;
		return moved;
	}
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		while (rank != afd__rank_own(net) && op->active && op->draining == AFD__NOBODY &&
			drain_rank(net, lane, rank))
			moved = 1;
	}
	return moved;
}

/* ---- moving on ---- */

static bool is_complete(afd_transport *net, const struct afd__group_op *op, uint32_t lane)
{
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		struct afd__link *link = afd__rank_link(net, rank);

		if (!link && op->type == AFD__GATHER)
			continue;
		if (op->read[rank] < afd__rank_parts(net, op, rank))
			return false;
		if (link && !afd__rank_is_settled(net, op, link, lane))
			return false;
	}
	return op->draining == AFD__NOBODY;
}

/* What the stage had begun, also of an operation that has ended. */
static int move_stage(afd_transport *net, uint32_t lane)
{
	struct afd__group_op *op = &net->groups[lane];
	int rc, moved = 0;

	if (op->filling != AFD__NOBODY) {
		rc = op->io.filled(op->io.user, lane);
		moved |= rc != 0;
		if (rc)
			filled(net, lane, rc);
	}
	if (op->draining != AFD__NOBODY) {
		rc = op->io.drained(op->io.user, lane);
		moved |= rc != 0;
		if (rc)
			drained(net, lane, rc);
	}
	return moved;
}

static int move_op(afd_transport *net, uint32_t lane)
{
	struct afd__group_op *op = &net->groups[lane];
	int moved = 0, rc;

	for (uint32_t rank = 0; op->active && rank < net->params.group_size; rank++) {
		struct afd__link *link = afd__rank_link(net, rank);

		if (!link)
			continue;
		moved |= send_parts(net, lane, link);
		rc = op->active ? afd__rank_check_step(net, op, link, lane) : 0;
		if (rc)
			end_op(net, lane, rc);
	}
	if (op->active)
		moved |= drain_next(net, lane);
	for (uint32_t rank = 0; op->active && rank < net->params.group_size; rank++) {
		struct afd__link *link = afd__rank_link(net, rank);

		if (link && afd__rank_is_settled(net, op, link, lane))
			stop_waiting(op, link);
	}
	if (op->active && is_complete(net, op, lane)) {
		end_op(net, lane, 0);
		moved = 1;
	}
	return moved;
}

int afd__group_round(afd_transport *net)
{
	int moved = 0;

	for (uint32_t i = net->n_addresses; i < net->max_links; i++) {
		if (net->links[i] && net->links[i]->phase >= AFD__LINK_JOINED)
			moved |= afd__rank_drop_stale(net, net->links[i]);
	}
	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		moved |= move_stage(net, lane);
		moved |= move_op(net, lane);
	}
	return moved;
}

/* ---- what the attention stage calls ---- */

static int check_start(const afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows)
{
	if (!net->step_open)
		return afd__error(-EINVAL, "group: no step is open");
	if (lane >= net->params.lanes)
		return afd__error(
			-EINVAL, "group: lane is %u, limit %u", lane, net->params.lanes - 1);
	if (layer >= net->contract.n_layers)
		return afd__error(
			-EINVAL, "group: layer is %u, limit %u", layer, net->contract.n_layers - 1);
	if (!afd__group_is_idle(&net->groups[lane]))
		return afd__error(-EBUSY, "group: lane %u has an operation out, at layer %u", lane,
			net->groups[lane].layer);
	if (n_rows && (n_rows - 1) / net->params.max_rows + 1 > UINT16_MAX)
		return afd__error(-EINVAL, "group: %u rows make more than %d parts of %u rows",
			n_rows, UINT16_MAX, net->params.max_rows);
	return 0;
}

/* A rank that has all it needs of us may leave before we read what it sent. */
static int check_ranks(const afd_transport *net, const struct afd__group_op *op, uint32_t lane)
{
	int rc = afd__shards_error(net);

	if (rc)
		return rc;
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		struct afd__link *link = afd__rank_link(net, rank);

		if (link && link->error && !afd__rank_is_settled(net, op, link, lane))
			return afd__group_error(link);
	}
	return 0;
}

static int start(afd_transport *net, uint8_t type, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__group_io *io)
{
	struct afd__group_op *op;
	uint64_t now = afd__now_ns();
	int rc = check_start(net, lane, layer, n_rows);

	if (rc)
		return rc;
	op = &net->groups[lane];
	*op = (struct afd__group_op){ .type = type, .step = net->step, .layer = layer,
		.n_rows = n_rows, .io = *io, .filling = AFD__NOBODY, .draining = AFD__NOBODY };
	rc = check_ranks(net, op, lane);
	if (rc || !n_rows || net->params.group_size == 1)
		return rc;
	op->active = true;
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		struct afd__link *link = afd__rank_link(net, rank);

		if (!link)
			continue;
		op->waits[rank] = true;
		if (!link->n_owed++) {
			link->quiet_ns = now;
			link->noticed_ns = 0;
		}
	}
	return 0;
}

int afd__group_reduce(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__group_io *io)
{
	return start(net, AFD__REDUCE, lane, layer, n_rows, io);
}

int afd__group_gather(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__group_io *io)
{
	return start(net, AFD__GATHER, lane, layer, n_rows, io);
}

int afd__group_done(afd_transport *net, uint32_t lane)
{
	const struct afd__group_op *op = &net->groups[lane];

	assert(lane < AFD_MAX_LANES);
	if (!afd__group_is_idle(op))
		return 0;
	return op->error ? afd__error(op->error, "%s", op->error_text) : 1;
}
