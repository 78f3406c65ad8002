/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations over an attention group: each rank sends its f32 rows to every other one, in parts
 * that take the lane's two slots of that link in turn; nothing is answered, a slot's return is the
 * credit. Every rank cuts the same rows into the same parts, so each knows what must come next from
 * each other one, and a header that says otherwise ends the operation with both sides named.
 *
 * What is drained, and in which order, depends on ranks only (reduce) or does not matter (gather):
 * bits never depend on who was first. Driven by net.c; called by the attention stage.
 */
#include <assert.h>
#include <string.h>

#include "net.h"

static const uint64_t MS = 1000000;

static const char *const op_names[] = { "", "reduce", "gather" };

/* ---- ranks, rows, slots ---- */

static uint32_t own_rank(const afd_transport *net)
{
	return net->params.group_index;
}

static struct afd__link *link_of(const afd_transport *net, uint32_t rank)
{
	return net->links[afd__group_link_index(net, rank)];
}

/* The rows that a rank sends. */
static void rows_of(const afd_transport *net, const struct afd__group_op *op, uint32_t rank,
	uint32_t *begin, uint32_t *end)
{
	uint64_t n = net->params.group_size, rows = op->n_rows;

	*begin = op->type == AFD__REDUCE ? 0 : (uint32_t)(rank * rows / n);
	*end = op->type == AFD__REDUCE ? op->n_rows : (uint32_t)((rank + 1) * rows / n);
}

static uint32_t parts_of(const afd_transport *net, const struct afd__group_op *op, uint32_t rank)
{
	uint32_t begin, end, limit = net->params.max_rows;

	rows_of(net, op, rank, &begin, &end);
	return end > begin ? (end - begin - 1) / limit + 1 : 0;
}

struct piece { uint32_t row0, n_rows; };

static struct piece piece_of(
	const afd_transport *net, const struct afd__group_op *op, uint32_t rank, uint32_t part)
{
	uint32_t begin, end, limit = net->params.max_rows;
	struct piece piece;

	rows_of(net, op, rank, &begin, &end);
	piece.row0 = begin + part * limit;
	piece.n_rows = end - piece.row0 < limit ? end - piece.row0 : limit;
	return piece;
}

/* The slot that the peer's next part is in, once it has come. */
static struct afd__slot_in *head_of(struct afd__link *link, uint32_t lane)
{
	return &link->in[lane * AFD__SLOTS_PER_LANE + link->turn_in[lane]];
}

static void release(struct afd__link *link, uint32_t lane)
{
	struct afd__slot_in *in = head_of(link, lane);
	int rc;

	in->state = AFD__PART_NONE;
	link->turn_in[lane] ^= 1;
	if (link->phase != AFD__LINK_JOINED)
		return;
	rc = link->wire.ops->post_receive(&link->wire, in->slot);
	if (rc < 0)
		afd__link_fail(link, rc);
}

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
		struct afd__link *link = rank == own_rank(net) ? NULL : link_of(net, rank);

		if (!link)
			continue;
		stop_waiting(op, link);
		for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
			struct afd__slot_out *out = &link->out[lane * AFD__SLOTS_PER_LANE + i];

			if (out->state == AFD__SLOT_FILLED)
				take_back(link, lane, out);
		}
	}
}

/* All that is needed of this rank is here, and all that it needs of us has gone. */
static bool is_settled(
	const afd_transport *net, const struct afd__group_op *op, struct afd__link *link, uint32_t lane)
{
	uint32_t n_here = 0;

	for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
		if (link->out[lane * AFD__SLOTS_PER_LANE + i].state != AFD__SLOT_FREE)
			return false;
		n_here += link->in[lane * AFD__SLOTS_PER_LANE + i].state != AFD__PART_NONE;
	}
	return op->sent[link->rank] == parts_of(net, op, own_rank(net)) &&
	       op->read[link->rank] + n_here >= parts_of(net, op, link->rank);
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

void afd__group_lost(struct afd__link *link)
{
	afd_transport *net = link->net;

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		struct afd__group_op *op = &net->groups[lane];

		if (op->active && !is_settled(net, op, link, lane))
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
		if (op->draining != AFD__NOBODY && op->draining != own_rank(net))
			release(link_of(net, op->draining), lane);
		op->filling = op->draining = AFD__NOBODY;
	}
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

static int drop_stale(afd_transport *net, struct afd__link *link)
{
	int moved = 0;

	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
			struct afd__slot_in *in = head_of(link, lane);

			if (in->state != AFD__PART_ARRIVED || !is_stale(net, &in->header))
				break;
			release(link, lane);
			moved = 1;
		}
	}
	return moved;
}

/* ---- is it what must come ---- */

static int check_head(
	const afd_transport *net, const struct afd__group_op *op, const struct afd__link *link,
	const struct afd__header *h)
{
	uint32_t part = op->read[link->rank];
	struct piece piece = piece_of(net, op, link->rank, part);
	uint32_t n_parts = parts_of(net, op, link->rank);

	if (h->step == (uint32_t)net->step && h->type == op->type && h->layer == op->layer &&
		h->part == part && h->n_parts == n_parts && h->n_rows == piece.n_rows)
		return 0;
	return afd__error(-EPROTO,
		"group: rank %u sent %s of step %u, layer %u, part %u of %u with %u rows; rank %u is at "
		"%s of step %u, layer %u, and waits for part %u of %u with %u rows",
		link->rank, op_names[h->type], h->step, h->layer, h->part + 1, h->n_parts, h->n_rows,
		own_rank(net), op_names[op->type], (uint32_t)net->step, op->layer, part + 1, n_parts,
		piece.n_rows);
}

/* What a rank said of its step, as far as it tells that nothing more will come. */
static int check_peer(const afd_transport *net, const struct afd__group_op *op,
	struct afd__link *link, uint32_t lane)
{
	const struct afd__step_open *theirs = &link->peer_open, *ours = &link->step_open;

	if ((link->error || link->peer_closed.step >= net->step) &&
		!is_settled(net, op, link, lane))
		return afd__group_error(link);
	if (theirs->step == net->step && theirs->n_rows[lane] != ours->n_rows[lane])
		return afd__error(-EPROTO,
			"group: in step %llu lane %u has %u rows at rank %u, %u at rank %u",
			(unsigned long long)net->step, lane, theirs->n_rows[lane], link->rank,
			ours->n_rows[lane], own_rank(net));
	if (theirs->step > net->step && !is_settled(net, op, link, lane))
		return afd__error(-EPROTO, "group: rank %u is in step %llu, rank %u in step %llu",
			link->rank, (unsigned long long)theirs->step, own_rank(net),
			(unsigned long long)net->step);
	return 0;
}

/* ---- sending ---- */

static int post(struct afd__link *link, const struct afd__group_op *op, struct afd__slot_out *out)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	uint32_t slot = AFD__N_CONTROL + (uint32_t)(out - link->out);
	size_t bytes = afd__wire_rows_bytes(
		out->n_rows, link->net->contract.hidden_size, AFD_DTYPE_F32);
	struct afd__header h = {
		.header_bytes = AFD__HEADER_BYTES,
		.kind = AFD__FRAME_COLLECTIVE,
		.type = op->type,
		.lane = (uint8_t)out->lane,
		.dtype = AFD_DTYPE_F32,
		.layer = (uint16_t)out->layer,
		.sequence = link->sequence_out + 1,
		.step = out->step,
		.n_rows = out->n_rows,
		.part = out->part,
		.n_parts = out->n_parts,
		.stamp_ns = afd__now_ns(),
	};
	int rc;

	afd__wire_encode(ops->send_slot(&link->wire, slot), &h);
	rc = ops->post_send(&link->wire, slot, (uint32_t)(AFD__HEADER_BYTES + bytes));
	if (rc == -EAGAIN)
		return 0;
	if (rc < 0) {
		afd__link_fail(link, rc);
		return 1;
	}
	link->sequence_out++;
	link->spoke_ns = h.stamp_ns;
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
	struct afd__link *link = link_of(net, op->filling);
	struct afd__slot_out *out = &link->out[lane * AFD__SLOTS_PER_LANE];

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
	struct afd__slot_out *out = &link->out[lane * AFD__SLOTS_PER_LANE + link->turn[lane]];
	uint32_t part = op->sent[link->rank], n_parts = parts_of(net, op, own_rank(net));
	struct piece piece;
	uint8_t *memory;
	int rc;

	if (part == n_parts || out->state != AFD__SLOT_FREE || out->unsent)
		return 0;
	piece = piece_of(net, op, own_rank(net), part);
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
	memory = link->wire.ops->send_slot(
		&link->wire, AFD__N_CONTROL + (uint32_t)(out - link->out));
	rc = op->io.fill(op->io.user, lane, piece.row0, piece.n_rows,
		(float *)(memory + AFD__HEADER_BYTES));
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
			&link->out[lane * AFD__SLOTS_PER_LANE + (link->turn[lane] ^ i)];

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
	if (rank != own_rank(net))
		release(link_of(net, rank), lane);
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
	struct afd__link *link = rank == own_rank(net) ? NULL : link_of(net, rank);
	struct afd__slot_in *in = link ? head_of(link, lane) : NULL;
	struct piece piece;
	const uint8_t *memory = NULL;
	int rc = 0;

	if (op->read[rank] == parts_of(net, op, rank) || (in && in->state != AFD__PART_ARRIVED))
		return 0;
	if (link)
		rc = check_head(net, op, link, &in->header);
	if (rc) {
		end_op(net, lane, rc);
		return 1;
	}
	if (link)
		memory = (const uint8_t *)link->wire.ops->receive_slot(&link->wire, in->slot) +
			 in->header.header_bytes;
	piece = piece_of(net, op, rank, op->read[rank]);
	if (in)
		in->state = AFD__PART_TAKEN;
	op->draining = rank;
	rc = op->io.drain(
		op->io.user, lane, rank, piece.row0, piece.n_rows, (const float *)memory);
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
		while (rank != own_rank(net) && op->active && op->draining == AFD__NOBODY &&
			drain_rank(net, lane, rank))
			moved = 1;
	}
	return moved;
}

/* ---- moving on ---- */

static bool is_complete(afd_transport *net, const struct afd__group_op *op, uint32_t lane)
{
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		struct afd__link *link = rank == own_rank(net) ? NULL : link_of(net, rank);

		if (!link && op->type == AFD__GATHER)
			continue;
		if (op->read[rank] < parts_of(net, op, rank))
			return false;
		if (link && !is_settled(net, op, link, lane))
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
		struct afd__link *link = rank == own_rank(net) ? NULL : link_of(net, rank);

		if (!link)
			continue;
		moved |= send_parts(net, lane, link);
		rc = op->active ? check_peer(net, op, link, lane) : 0;
		if (rc)
			end_op(net, lane, rc);
	}
	if (op->active)
		moved |= drain_next(net, lane);
	for (uint32_t rank = 0; op->active && rank < net->params.group_size; rank++) {
		if (rank != own_rank(net) && is_settled(net, op, link_of(net, rank), lane))
			stop_waiting(op, link_of(net, rank));
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
			moved |= drop_stale(net, net->links[i]);
	}
	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		moved |= move_stage(net, lane);
		moved |= move_op(net, lane);
	}
	return moved;
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
		own_rank(net), link->who, (unsigned long long)((now - link->quiet_ns) / MS),
		net->params.deadline_ms, op_names[net->groups[lane].type],
		(unsigned long long)net->step, net->groups[lane].layer, lane,
		(unsigned long long)((now - link->heard_ns) / MS));
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
	if (net->error)
		return afd__error(net->error, "%s", net->error_text);
	for (uint32_t rank = 0; rank < net->params.group_size; rank++) {
		struct afd__link *link = rank == own_rank(net) ? NULL : link_of(net, rank);

		if (link && link->error && !is_settled(net, op, link, lane))
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
		struct afd__link *link = rank == own_rank(net) ? NULL : link_of(net, rank);

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
