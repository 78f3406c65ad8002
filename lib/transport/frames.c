/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames on the attention side: the rows of one lane at one layer, cut into parts that take the
 * lane's two slots in turn, for each target by itself. The stage fills a slot, the part is posted,
 * its reply comes, the stage drains it, and only then the slot is free: the reply is the credit. At
 * most one fill and one drain of a lane and target are under way, because the stage is asked so.
 *
 * A frame that ends early abandons its slots: what is on the wire is dropped when its reply comes,
 * what the stage is still writing or reading is waited for.
 */
#include <assert.h>
#include <string.h>

#include "net.h"

/* ---- the end of a frame ---- */

/* y has been read: the peer may have the slot again. */
static void release(struct afd__link *link, struct afd__slot_out *out)
{
	bool replied = out->state == AFD__SLOT_ARRIVED || out->state == AFD__SLOT_DRAINING;
	int rc;

	out->state = AFD__SLOT_FREE;
	out->abandoned = false;
	if (!replied || link->phase != AFD__LINK_JOINED)
		return;
	rc = link->wire.ops->post_receive(&link->wire, afd__link_wire_slot(link, out));
	if (rc < 0)
		afd__link_fail(link, rc);
}

static void abandon(struct afd__link *link, uint32_t lane)
{
	struct afd__slot_out *out = afd__link_out(link, lane);

	for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
		switch (out[i].state) {
		case AFD__SLOT_FREE:
			break;
		case AFD__SLOT_FILLED:
		case AFD__SLOT_ARRIVED:
			release(link, &out[i]);
			break;
		default:
			out[i].abandoned = true;
		}
	}
}

void afd__frame_end(afd_transport *net, uint32_t lane, int rc)
{
	struct afd__frame_out *frame = &net->frames[lane];

	if (!frame->active)
		return;
	frame->active = false;
	frame->error = rc;
	if (rc < 0)
		afd__error_save(frame->error_text, sizeof(frame->error_text));
	for (uint32_t i = 0; i < net->n_addresses; i++)
		abandon(net->links[i], lane);
}

/* ---- another peer for the same shard ---- */

uint32_t afd__frame_count_parts(const struct afd__frame_target *target)
{
	uint32_t n_parts = 0;

	for (uint32_t i = 0; target->link && i < target->n_pieces; i++)
		n_parts += (target->pieces[i].n_rows - 1) / target->link->max_rows + 1;
	return n_parts;
}

/* Rows that are to be sent (again). -ENOSPC: they lie in too many pieces. */
static int give_back(struct afd__frame_target *target, uint32_t row0, uint32_t n_rows)
{
	struct afd__piece *pieces = target->pieces;
	uint32_t at = 0;

	while (at < target->n_pieces && pieces[at].row0 < row0)
		at++;
	if (at < target->n_pieces && row0 + n_rows == pieces[at].row0) {
		pieces[at].row0 = row0;
		pieces[at].n_rows += n_rows;
		return 0;
	}
	if (target->n_pieces == AFD__PIECES_MAX)
		return afd__error(-ENOSPC, "frame: its rows are lost in more than %d pieces",
			AFD__PIECES_MAX);
	memmove(&pieces[at + 1], &pieces[at], (target->n_pieces - at) * sizeof(*pieces));
	pieces[at] = (struct afd__piece){ row0, n_rows };
	target->n_pieces++;
	return 0;
}

/* A slot of a link that is lost. What has come is here and is still drained. */
static void recover(struct afd__link *link, uint32_t lane, struct afd__slot_out *out)
{
	struct afd__frame_out *frame = &link->net->frames[lane];
	struct afd__frame_target *target = &frame->targets[link->rank];
	bool posted = out->state == AFD__SLOT_POSTED;

	if (!posted && out->state != AFD__SLOT_FILLED && out->state != AFD__SLOT_FILLING)
		return;
	if (posted)
		afd__times_lost(link, out);
	if (frame->active && !out->abandoned) {
		target->n_again += posted ? out->n_rows : 0;
		if (give_back(target, out->row0, out->n_rows))
			afd__frame_end(link->net, lane, -ENOSPC);
	}
	if (out->state == AFD__SLOT_FILLING)
		out->abandoned = true;
	else
		release(link, out);
}

/* The pieces become a frame of the present holder's. False: they are too many parts, and the lane's
 * frame has ended. */
static bool begin_frame(afd_transport *net, uint32_t lane, struct afd__frame_target *target)
{
	struct afd__link *link = target->link;

	target->next_part = 0;
	if (afd__frame_count_parts(target) > UINT16_MAX) {
		afd__frame_end(net, lane,
			afd__error(-EINVAL, "frame: its rows make more than %d parts of %u rows",
				UINT16_MAX, link->max_rows));
		return false;
	}
	target->n_parts = (uint16_t)afd__frame_count_parts(target);
	if (!link)
		return true;
	link->counts.n_resent_rows += target->n_again;
	afd__metric_count(net->resent_metric, target->n_again);
	target->n_again = 0;
	return true;
}

void afd__frames_retarget(afd_transport *net, uint32_t rank)
{
	struct afd__link *link = net->targets[rank];

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		struct afd__frame_target *target = &net->frames[lane].targets[rank];

		if (!net->frames[lane].active || target->link == link)
			continue;
		target->link = link;
		begin_frame(net, lane, target);
	}
	if (link && net->step_open)
		afd__steps_tell(link);
}

void afd__frames_give_up(afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		const struct afd__frame_out *frame = &net->frames[lane];

		for (uint32_t t = 0; frame->active && t < frame->n_targets; t++) {
			if (!frame->targets[t].link && frame->targets[t].n_pieces)
				afd__frame_end(net, lane,
					afd__error(net->error, "%s", net->error_text));
		}
	}
}

void afd__frames_lost(struct afd__link *link)
{
	afd_transport *net = link->net;

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		for (int i = 0; i < AFD__SLOTS_PER_LANE; i++)
			recover(link, lane, &afd__link_out(link, lane)[i]);
	}
	link->n_owed = 0;
	afd__shards_left(link);
	if (net->error && !afd__shards_waits(net))
		afd__frames_give_up(net);
}

bool afd__frames_untouched(const struct afd__link *link)
{
	for (uint32_t i = 0; i < AFD__N_ROW_SLOTS; i++) {
		if (link->out[i].state != AFD__SLOT_FREE)
			return false;
	}
	return true;
}

void afd__frames_disown(afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		afd__frame_end(net, lane, 0);
		for (uint32_t i = 0; i < net->n_addresses; i++) {
			struct afd__slot_out *out = afd__link_out(net->links[i], lane);

			for (int k = 0; k < AFD__SLOTS_PER_LANE; k++) {
				if (out[k].state == AFD__SLOT_FILLING ||
					out[k].state == AFD__SLOT_DRAINING)
					release(net->links[i], &out[k]);
			}
		}
	}
}

/* ---- replies ---- */

static int check_reply(const struct afd__link *link, const struct afd__slot_out *out,
	const struct afd__header *h, size_t bytes)
{
	if (h->type != AFD__ROWS_Y)
		return afd__error(
			-EPROTO, "frame of rows: type %u is not for the attention side", h->type);
	if (out->state != AFD__SLOT_POSTED || h->sequence != out->sequence)
		return afd__error(-EPROTO, "reply: sequence is %llu, the slot %s %llu",
			(unsigned long long)h->sequence,
			out->state == AFD__SLOT_POSTED ? "waits for"
						       : "waits for none; its last was",
			(unsigned long long)out->sequence);
	if (h->step != out->step || h->lane != out->lane || h->layer != out->layer ||
		h->part != out->part || h->n_parts != out->n_parts)
		return afd__error(-EPROTO,
			"reply: is of step %u, lane %u, layer %u, part %u of %u; "
			"asked was step %u, lane %u, layer %u, part %u of %u",
			h->step, h->lane, h->layer, h->part, h->n_parts, out->step, out->lane,
			out->layer, out->part, out->n_parts);
	if (h->status)
		return 0;
	if (h->n_rows != out->n_rows || h->dtype != link->to_attention_dtype)
		return afd__error(-EPROTO, "reply: has %u rows of %s, asked were %u of %s",
			h->n_rows, afd_dtype_name(h->dtype), out->n_rows,
			afd_dtype_name(link->to_attention_dtype));
	return afd__wire_check_rows(h, bytes, link->net->contract.hidden_size, link->max_rows);
}

/* The peer could not compute: the frame ends, the link lives. */
static void take_refusal(struct afd__link *link, struct afd__slot_out *out,
	const struct afd__header *h, size_t bytes)
{
	const char *memory =
		link->wire.ops->receive_slot(&link->wire, afd__link_wire_slot(link, out));
	size_t text_bytes = bytes - h->header_bytes;
	char text[AFD__TEXT_MAX];

	if (text_bytes >= sizeof(text))
		text_bytes = sizeof(text) - 1;
	memcpy(text, memory + h->header_bytes, text_bytes);
	text[text_bytes] = '\0';
	for (char *c = text; *c; c++) {
		if (*c < ' ' || *c > '~')
			*c = '?';
	}
	afd__frame_end(link->net, out->lane,
		afd__error(afd__wire_errno(h->status), "FFN peer %s: layer %u: %s", link->name,
			out->layer, text));
}

int afd__frames_take(
	struct afd__link *link, uint32_t slot, const struct afd__header *h, size_t bytes)
{
	struct afd__slot_out *out = &link->out[slot - AFD__N_CONTROL];
	int rc = check_reply(link, out, h, bytes);

	if (rc)
		return rc;
	link->n_owed--;
	out->reply = *h;
	out->state = AFD__SLOT_ARRIVED;
	afd__times_take(link, out, h);
	if (h->status && !out->abandoned)
		take_refusal(link, out, h, bytes);
	else if (out->abandoned)
		release(link, out);
	return 0;
}

/* ---- moving a lane on ---- */

static bool lane_has(struct afd__link *link, uint32_t lane, int state, int other)
{
	const struct afd__slot_out *out = afd__link_out(link, lane);

	for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
		if (out[i].state == state || out[i].state == other)
			return true;
	}
	return false;
}

bool afd__frame_is_touched(const afd_transport *net, uint32_t lane)
{
	for (uint32_t i = 0; i < net->n_addresses; i++) {
		if (lane_has(net->links[i], lane, AFD__SLOT_FILLING, AFD__SLOT_DRAINING))
			return true;
	}
	return false;
}

/* The same of all peers of one shard: at most one of its slots is filled, and one drained. */
static bool shard_has(afd_transport *net, uint32_t rank, uint32_t lane, int state)
{
	for (uint32_t i = 0; i < net->n_addresses; i++) {
		if (net->links[i]->rank == rank && lane_has(net->links[i], lane, state, state))
			return true;
	}
	return false;
}

static int post(struct afd__link *link, struct afd__slot_out *out)
{
	struct afd__wire_part part;
	struct afd__header h = {
		.kind = AFD__FRAME_ROWS,
		.type = AFD__ROWS_X,
		.lane = (uint8_t)out->lane,
		.dtype = (uint8_t)link->to_ffn_dtype,
		.layer = (uint16_t)out->layer,
		.step = out->step,
		.n_rows = out->n_rows,
		.part = out->part,
		.n_parts = out->n_parts,
		.scale_format = afd__wire_scales(link->to_ffn_dtype),
		.top_k = out->top_k,
	};
	int rc;

	afd__wire_part(&part, out->n_rows, link->net->contract.hidden_size, link->to_ffn_dtype,
		out->top_k);
	rc = afd__link_post(link, afd__link_wire_slot(link, out), &h, part.bytes);
	if (rc <= 0)
		return rc < 0;
	out->sequence = h.sequence;
	out->posted_ns = h.stamp_ns;
	out->state = AFD__SLOT_POSTED;
	out->unsent = true;
	if (!link->n_owed++) {
		link->quiet_ns = h.stamp_ns;
		link->noticed_ns = 0;
	}
	link->counts.n_parts++;
	link->counts.n_rows += out->n_rows;
	afd__metric_count(link->metrics.parts, 1);
	afd__metric_count(link->metrics.rows, out->n_rows);
	return 1;
}

/* With in_order: an earlier target has rows that are not drained yet. */
static bool waits_for_its_turn(const struct afd__frame_out *frame, uint32_t t)
{
	for (uint32_t i = 0; frame->active && frame->io.in_order && i < t; i++) {
		if (frame->targets[i].rows_done < frame->targets[i].n_rows)
			return true;
	}
	return false;
}

static int drain(afd_transport *net, struct afd__link *link, struct afd__slot_out *out)
{
	struct afd__frame_out *frame = &net->frames[out->lane];
	uint32_t t = link->rank;

	if (shard_has(net, t, out->lane, AFD__SLOT_DRAINING) || waits_for_its_turn(frame, t))
		return 0;
	out->state = AFD__SLOT_DRAINING;
	return out->io.drain(out->io.user, out->lane, t, out->row0, out->n_rows,
		afd__link_receive_rows(link, afd__link_wire_slot(link, out), &out->reply));
}

static void drained(afd_transport *net, struct afd__link *link, struct afd__slot_out *out)
{
	struct afd__frame_out *frame = &net->frames[out->lane];
	struct afd__frame_target *target = &frame->targets[link->rank];
	bool counts = !out->abandoned;
	uint32_t lane = out->lane;

	release(link, out);
	if (!counts || !frame->active)
		return;
	target->rows_done += out->n_rows;
	for (uint32_t t = 0; t < frame->n_targets; t++) {
		if (frame->targets[t].rows_done < frame->targets[t].n_rows)
			return;
	}
	afd__frame_end(net, lane, 0);
}

/* Moves one slot on by as much as it can. 1: it moved. */
static int advance(
	afd_transport *net, struct afd__link *link, struct afd__slot_out *out, uint32_t lane)
{
	uint32_t t = link->rank;
	uint8_t before = out->state;
	int rc = 0;

	switch (out->state) {
	case AFD__SLOT_FILLING:
		rc = out->io.filled(out->io.user, lane, t);
		if (rc == 1)
			out->state = AFD__SLOT_FILLED;
		break;
	case AFD__SLOT_ARRIVED:
		rc = drain(net, link, out);
		if (rc == 1)
			drained(net, link, out);
		break;
	case AFD__SLOT_DRAINING:
		rc = out->io.drained(out->io.user, lane, t);
		if (rc == 1)
			drained(net, link, out);
		break;
	default:
		break;
	}
	if (rc < 0) {
		afd__frame_end(net, lane, rc);
		release(link, out);
		return 1;
	}
	if (out->state == AFD__SLOT_FILLED && (out->abandoned || link->phase != AFD__LINK_JOINED))
		release(link, out);
	if (out->state == AFD__SLOT_FILLED && !link->open_due)
		post(link, out);
	return out->state != before;
}

static int fill(afd_transport *net, uint32_t t, struct afd__slot_out *out, struct afd__link *link)
{
	uint8_t *memory = link->wire.ops->send_slot(&link->wire, afd__link_wire_slot(link, out));
	struct afd__slot_rows slot = {
		.rows = afd__link_send_rows(link, afd__link_wire_slot(link, out))
	};
	struct afd__wire_part part;

	afd__wire_part(&part, out->n_rows, net->contract.hidden_size, link->to_ffn_dtype,
		out->top_k);
	if (out->top_k) {
		slot.ids = (int32_t *)(memory + AFD__HEADER_BYTES + part.ids);
		slot.weights = (float *)(memory + AFD__HEADER_BYTES + part.weights);
	}
	return out->io.fill(out->io.user, out->lane, t, out->row0, out->n_rows, &slot);
}

/* The next rows of the frame for this shard. */
static struct afd__piece cut(struct afd__frame_target *target)
{
	struct afd__piece *first = &target->pieces[0], piece = *first;

	if (piece.n_rows > target->link->max_rows)
		piece.n_rows = target->link->max_rows;
	first->row0 += piece.n_rows;
	first->n_rows -= piece.n_rows;
	if (!first->n_rows)
		memmove(first, first + 1, --target->n_pieces * sizeof(*first));
	return piece;
}

static bool is_free(const struct afd__slot_out *out)
{
	return out->state == AFD__SLOT_FREE && !out->unsent;
}

static int fill_next(afd_transport *net, uint32_t t, uint32_t lane)
{
	struct afd__frame_out *frame = &net->frames[lane];
	struct afd__frame_target *target = &frame->targets[t];
	struct afd__link *link = target->link;
	struct afd__slot_out *out;
	struct afd__piece piece;
	int rc;

	if (!frame->active || !target->n_pieces || !afd__link_is_joined(link) || link->leaving)
		return 0;
	/* Rows of a peer that drained and was lost came back while its successor had a frame of its
	 * own: they are another one, behind that. */
	if (target->next_part == target->n_parts && !begin_frame(net, lane, target))
		return 1;
	/* A frame of one part takes the same slot each time, which is then still in the caches. */
	if (!target->next_part && is_free(&afd__link_out(link, lane)[0]))
		link->turn[lane] = 0;
	out = &afd__link_out(link, lane)[link->turn[lane]];
	if (!is_free(out) ||
		lane_has(link, lane, AFD__SLOT_FILLED, AFD__SLOT_FILLED) ||
		shard_has(net, t, lane, AFD__SLOT_FILLING))
		return 0;
	piece = cut(target);
	*out = (struct afd__slot_out){
		.io = frame->io,
		.lane = lane,
		.layer = frame->layer,
		.step = (uint32_t)net->step,
		.row0 = piece.row0,
		.part = target->next_part,
		.n_rows = piece.n_rows,
		.n_parts = target->n_parts,
		.state = AFD__SLOT_FILLING,
		.top_k = afd__exchange_routed(net, frame->layer) ? (uint8_t)net->contract.top_k : 0,
	};
	link->turn[lane] = (uint8_t)((link->turn[lane] + 1) % AFD__SLOTS_PER_LANE);
	target->next_part++;
	rc = fill(net, t, out, link);
	if (rc < 0) {
		afd__frame_end(net, lane, rc);
		release(link, out);
	} else if (rc == 1) {
		out->state = AFD__SLOT_FILLED;
		advance(net, link, out, lane);
	}
	return 1;
}

int afd__frames_round(afd_transport *net)
{
	int moved = 0;

	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		for (uint32_t i = 0; i < net->n_addresses; i++) {
			struct afd__link *link = net->links[i];

			for (int k = 0; k < AFD__SLOTS_PER_LANE; k++)
				moved |= advance(net, link, &afd__link_out(link, lane)[k], lane);
		}
		for (uint32_t t = 0; t < net->frames[lane].n_targets; t++)
			moved |= fill_next(net, t, lane);
	}
	if (net->error_passes && !afd__shards_waits(net))
		afd__frames_give_up(net);
	return moved;
}
