/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames on the attention side: the rows of one lane at one layer, cut into parts that take the lane's two slots in turn.
 * The stage fills a slot, the part is posted, its reply comes, the stage drains it, and only then the slot is free: the
 * reply is the credit. At most one fill and one drain of a lane are under way, because the stage is asked by lane.
 *
 * A frame that ends early abandons its slots: what is on the wire is dropped when its reply comes, what the stage is still
 * writing or reading is waited for.
 */
#include <assert.h>
#include <string.h>

#include "net.h"

static struct afd__slot_out *slots_of(struct afd__link *link, uint32_t lane)
{
	return &link->out[lane * AFD__SLOTS_PER_LANE];
}

static uint32_t wire_slot(const struct afd__link *link, const struct afd__slot_out *out)
{
	return AFD__N_CONTROL + (uint32_t)(out - link->out);
}

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
	rc = link->wire.ops->post_receive(&link->wire, wire_slot(link, out));
	if (rc < 0)
		afd__link_fail(link, rc);
}

static void abandon(struct afd__link *link, uint32_t lane)
{
	struct afd__slot_out *out = slots_of(link, lane);

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

static void end_frame(struct afd__frame_out *frame, uint32_t lane, int rc)
{
	if (!frame->active)
		return;
	frame->active = false;
	frame->error = rc;
	if (rc < 0)
		afd__error_save(frame->error_text, sizeof(frame->error_text));
	for (uint32_t t = 0; t < frame->n_targets; t++)
		abandon(frame->targets[t].link, lane);
}

/* All that the frame needs of this link is here already, and only has to be read. */
static bool is_all_here(struct afd__frame_out *frame, const struct afd__frame_target *target, uint32_t lane)
{
	const struct afd__slot_out *out = slots_of(target->link, lane);

	for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
		if (out[i].state != AFD__SLOT_FREE && out[i].state != AFD__SLOT_ARRIVED && out[i].state != AFD__SLOT_DRAINING)
			return false;
	}
	return target->next_part == frame->n_parts;
}

void afd__frames_lost(struct afd__link *link)
{
	afd_transport *net = link->net;

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		struct afd__frame_out *frame = &net->frames[lane];
		struct afd__slot_out *out = slots_of(link, lane);

		for (uint32_t t = 0; t < frame->n_targets; t++) {
			struct afd__frame_target *target = &frame->targets[t];

			if (frame->active && target->link == link && !is_all_here(frame, target, lane))
				end_frame(frame, lane, afd__link_error(link));
		}
		for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
			if (out[i].state == AFD__SLOT_POSTED)
				release(link, &out[i]);
		}
	}
	link->n_owed = 0;
}

void afd__frames_disown(afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		end_frame(&net->frames[lane], lane, 0);
		for (uint32_t i = 0; i < net->max_links; i++) {
			struct afd__slot_out *out = slots_of(net->links[i], lane);

			for (int k = 0; k < AFD__SLOTS_PER_LANE; k++) {
				if (out[k].state == AFD__SLOT_FILLING || out[k].state == AFD__SLOT_DRAINING)
					release(net->links[i], &out[k]);
			}
		}
	}
}

/* ---- replies ---- */

static int check_reply(const struct afd__link *link, const struct afd__slot_out *out, const struct afd__header *h,
		       size_t bytes)
{
	if (h->type != AFD__ROWS_Y)
		return afd__error(-EPROTO, "frame of rows: type %u is not for the attention side", h->type);
	if (out->state != AFD__SLOT_POSTED || h->sequence != out->sequence)
		return afd__error(-EPROTO, "reply: sequence is %llu, the slot %s %llu", (unsigned long long)h->sequence,
				  out->state == AFD__SLOT_POSTED ? "waits for" : "waits for none; its last was",
				  (unsigned long long)out->sequence);
	if (h->step != out->step || h->lane != out->lane || h->layer != out->layer || h->part != out->part ||
	    h->n_parts != out->n_parts)
		return afd__error(-EPROTO, "reply: is of step %u, lane %u, layer %u, part %u of %u; asked was step %u, lane %u, "
				  "layer %u, part %u of %u", h->step, h->lane, h->layer, h->part, h->n_parts, out->step,
				  out->lane, out->layer, out->part, out->n_parts);
	if (h->status)
		return 0;
	if (h->n_rows != out->n_rows || h->dtype != link->to_attention_dtype)
		return afd__error(-EPROTO, "reply: has %u rows of %s, asked were %u of %s", h->n_rows, afd_dtype_name(h->dtype),
				  out->n_rows, afd_dtype_name(link->to_attention_dtype));
	return afd__wire_check_rows(h, bytes, link->net->contract.hidden_size, link->max_rows);
}

/* The peer could not compute: the frame ends, the link lives. */
static void take_refusal(struct afd__link *link, struct afd__slot_out *out, const struct afd__header *h, size_t bytes)
{
	const char *memory = link->wire.ops->receive_slot(&link->wire, wire_slot(link, out));
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
	end_frame(&link->net->frames[out->lane], out->lane,
		  afd__error(afd__wire_errno(h->status), "FFN peer %s: layer %u: %s", link->name, out->layer, text));
}

static void observe(struct afd__link *link, const struct afd__slot_out *out, const struct afd__header *h, uint64_t now)
{
	double there = ((double)h->queue_ns + h->gather_ns + h->compute_ns) * 1e-9;
	double all = (double)(now - out->posted_ns) * 1e-9;

	afd__metric_observe(link->metrics.round_trip, all);
	afd__metric_observe(link->metrics.wire, all > there ? all - there : 0);
}

int afd__frames_take(struct afd__link *link, uint32_t slot, const struct afd__header *h, size_t bytes, uint64_t now)
{
	struct afd__slot_out *out = &link->out[slot - AFD__N_CONTROL];
	int rc = check_reply(link, out, h, bytes);

	if (rc)
		return rc;
	link->n_owed--;
	out->reply = *h;
	out->state = AFD__SLOT_ARRIVED;
	observe(link, out, h, now);
	if (h->status && !out->abandoned)
		take_refusal(link, out, h, bytes);
	else if (out->abandoned)
		release(link, out);
	return 0;
}

/* ---- moving a lane on ---- */

static bool lane_has(struct afd__link *link, uint32_t lane, int state, int other)
{
	const struct afd__slot_out *out = slots_of(link, lane);

	for (int i = 0; i < AFD__SLOTS_PER_LANE; i++) {
		if (out[i].state == state || out[i].state == other)
			return true;
	}
	return false;
}

static int post(struct afd__link *link, struct afd__slot_out *out)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	uint32_t slot = wire_slot(link, out);
	size_t bytes = afd__wire_rows_bytes(out->n_rows, link->net->contract.hidden_size, link->to_ffn_dtype);
	struct afd__header h = {
		.header_bytes = AFD__HEADER_BYTES, .kind = AFD__FRAME_ROWS, .type = AFD__ROWS_X, .lane = (uint8_t)out->lane,
		.dtype = (uint8_t)link->to_ffn_dtype, .layer = (uint16_t)out->layer, .sequence = link->sequence_out + 1,
		.step = out->step, .n_rows = out->n_rows, .part = out->part, .n_parts = out->n_parts,
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
	out->sequence = ++link->sequence_out;
	out->posted_ns = link->spoke_ns = h.stamp_ns;
	out->state = AFD__SLOT_POSTED;
	out->unsent = true;
	if (!link->n_owed++)
		link->quiet_ns = h.stamp_ns;
	link->counts.n_parts++;
	link->counts.n_rows += out->n_rows;
	afd__metric_count(link->metrics.parts, 1);
	afd__metric_count(link->metrics.rows, out->n_rows);
	return 1;
}

static int drain(afd_transport *net, struct afd__frame_target *target, uint32_t shard, struct afd__slot_out *out)
{
	struct afd__link *link = target->link;
	const uint8_t *memory = link->wire.ops->receive_slot(&link->wire, wire_slot(link, out));

	if (lane_has(link, out->lane, AFD__SLOT_DRAINING, AFD__SLOT_DRAINING))
		return 0;
	out->state = AFD__SLOT_DRAINING;
	return out->io.drain(out->io.user, out->lane, out->row0, out->n_rows, memory + out->reply.header_bytes, shard);
}

static void drained(afd_transport *net, struct afd__frame_target *target, struct afd__slot_out *out)
{
	struct afd__frame_out *frame = &net->frames[out->lane];
	bool counts = !out->abandoned;
	uint32_t lane = out->lane;

	release(target->link, out);
	if (!counts || !frame->active)
		return;
	target->rows_done += out->n_rows;
	for (uint32_t t = 0; t < frame->n_targets; t++) {
		if (frame->targets[t].rows_done < frame->n_rows)
			return;
	}
	end_frame(frame, lane, 0);
}

/* Moves one slot on by as much as it can. 1: it moved. */
static int advance(afd_transport *net, struct afd__frame_target *target, uint32_t shard, struct afd__slot_out *out)
{
	struct afd__link *link = target->link;
	uint8_t before = out->state;
	int rc = 0;

	switch (out->state) {
	case AFD__SLOT_FILLING:
		rc = out->io.filled(out->io.user, out->lane);
		if (rc == 1)
			out->state = AFD__SLOT_FILLED;
		break;
	case AFD__SLOT_ARRIVED:
		rc = drain(net, target, shard, out);
		if (rc == 1)
			drained(net, target, out);
		break;
	case AFD__SLOT_DRAINING:
		rc = out->io.drained(out->io.user, out->lane);
		if (rc == 1)
			drained(net, target, out);
		break;
	default:
		break;
	}
	if (rc < 0) {
		end_frame(&net->frames[out->lane], out->lane, rc);
		release(link, out);
		return 1;
	}
	if (out->state == AFD__SLOT_FILLED && (out->abandoned || link->phase != AFD__LINK_JOINED))
		release(link, out);
	if (out->state == AFD__SLOT_FILLED && !link->open_due)
		post(link, out);
	return out->state != before;
}

static int fill_next(afd_transport *net, struct afd__frame_target *target, uint32_t lane)
{
	struct afd__frame_out *frame = &net->frames[lane];
	struct afd__link *link = target->link;
	struct afd__slot_out *out = &slots_of(link, lane)[link->turn[lane]];
	uint32_t row0 = target->next_part * frame->part_rows;
	uint8_t *memory;
	int rc;

	if (!frame->active || target->next_part == frame->n_parts || link->phase != AFD__LINK_JOINED || link->leaving)
		return 0;
	if (out->state != AFD__SLOT_FREE || out->unsent || lane_has(link, lane, AFD__SLOT_FILLING, AFD__SLOT_FILLED))
		return 0;
	*out = (struct afd__slot_out){
		.io = frame->io, .lane = lane, .layer = frame->layer, .step = (uint32_t)net->step, .row0 = row0,
		.part = target->next_part,
		.n_rows = frame->n_rows - row0 < frame->part_rows ? frame->n_rows - row0 : frame->part_rows,
		.n_parts = frame->n_parts, .state = AFD__SLOT_FILLING,
	};
	link->turn[lane] = (uint8_t)((link->turn[lane] + 1) % AFD__SLOTS_PER_LANE);
	target->next_part++;
	memory = link->wire.ops->send_slot(&link->wire, wire_slot(link, out));
	rc = out->io.fill(out->io.user, lane, row0, out->n_rows, memory + AFD__HEADER_BYTES);
	if (rc < 0) {
		end_frame(frame, lane, rc);
		release(link, out);
	} else if (rc == 1) {
		out->state = AFD__SLOT_FILLED;
		advance(net, target, 0, out);
	}
	return 1;
}

int afd__frames_round(afd_transport *net)
{
	int moved = 0;

	for (uint32_t lane = 0; lane < net->params.lanes; lane++) {
		for (uint32_t t = 0; t < net->frames[lane].n_targets; t++) {
			struct afd__frame_target *target = &net->frames[lane].targets[t];

			for (int i = 0; i < AFD__SLOTS_PER_LANE; i++)
				moved |= advance(net, target, t, &slots_of(target->link, lane)[i]);
			moved |= fill_next(net, target, lane);
		}
	}
	return moved;
}

/* ---- steps ---- */

/* The first cause of why nothing can be sent; 0 when something can. */
static int check_links(const afd_transport *net)
{
	if (!net->attention)
		return afd__error(-EINVAL, "transport: made to listen, frames are sent by the attention side");
	if (net->error)
		return afd__error(net->error, "%s", net->error_text);
	if (net->n_joined < net->n_addresses)
		return afd__error(-EAGAIN, "transport: %u of %u FFN peers have joined", net->n_joined, net->n_addresses);
	for (uint32_t i = 0; i < net->max_links; i++) {
		if (net->links[i]->leaving)
			return afd__error(-ECONNRESET, "link %s: the FFN peer is leaving", net->links[i]->name);
	}
	return 0;
}

int afd__frames_begin(afd_transport *net, const struct afd_step_params *params)
{
	int rc = check_links(net);

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		if (rc)
			return rc;
		if (net->frames[lane].active)
			rc = afd__error(-EINVAL, "step: the frame of lane %u at layer %u is still out", lane,
					net->frames[lane].layer);
		else if (lane >= net->params.lanes && params->n_rows[lane])
			rc = afd__error(-EINVAL, "step: lane %u has %u rows, the transport has %u lanes", lane,
					params->n_rows[lane], net->params.lanes);
	}
	if (rc)
		return rc;
	net->step++;
	net->step_open = true;
	for (uint32_t i = 0; i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		link->step_open.step = net->step;
		memcpy(link->step_open.n_rows, params->n_rows, sizeof(params->n_rows));
		memcpy(link->step_open.trace_id, params->trace_id, sizeof(params->trace_id));
		link->open_due = true;
		afd__link_timers(link, afd__now_ns());
	}
	return net->error ? afd__error(net->error, "%s", net->error_text) : 0;
}

int afd__frames_cancel(afd_transport *net)
{
	if (!net->attention)
		return afd__error(-EINVAL, "transport: made to listen, steps are the attention side's");
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		end_frame(&net->frames[lane], lane, 0);
		net->frames[lane].error = 0;
	}
	for (uint32_t i = 0; net->step_open && i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		/* A step that the peer has not heard of need not be closed. */
		if (!link->open_due && afd__link_is_joined(link)) {
			link->step_close = (struct afd__step_close){ .step = net->step, .reason = AFD__CLOSE_CANCELLED };
			link->close_due = true;
			afd__link_timers(link, afd__now_ns());
		}
		link->open_due = false;
	}
	net->step_open = false;
	return 0;
}

/* ---- what the attention stage calls ---- */

int afd__exchange_begin(afd_transport *net, const struct afd_step_params *params)
{
	struct afd_step_params p;
	int rc = afd__params_copy(&p, sizeof(p), params, "step params");

	if (!rc && (p.flags || p._pad))
		rc = afd__error(-EINVAL, "step params: flags are 0x%x, _pad is %u, both must be 0", p.flags, p._pad);
	return rc ? rc : afd__frames_begin(net, &p);
}

int afd__frames_clear(afd_transport *net, uint32_t lane)
{
	int rc = check_links(net);

	net->frames[lane].error = 0;
	return rc;
}

int afd__exchange_cancel(afd_transport *net)
{
	return afd__frames_cancel(net);
}

static int check_frame(const afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows)
{
	if (!net->step_open)
		return afd__error(-EINVAL, "frame: no step is open");
	if (lane >= net->params.lanes)
		return afd__error(-EINVAL, "frame: lane is %u, limit %u", lane, net->params.lanes - 1);
	if (layer >= net->contract.n_layers)
		return afd__error(-EINVAL, "frame: layer is %u, limit %u", layer, net->contract.n_layers - 1);
	if (net->frames[lane].active)
		return afd__error(-EBUSY, "frame: lane %u has one out, at layer %u", lane, net->frames[lane].layer);
	if (!n_rows)
		return afd__error(-EINVAL, "frame: n_rows is 0, such a frame does not cross");
	return 0;
}

int afd__exchange_send(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows, const struct afd__frame_io *io)
{
	struct afd__link *link;
	struct afd__frame_out *frame;
	uint32_t n_parts;
	int rc = check_links(net);

	if (!rc)
		rc = check_frame(net, lane, layer, n_rows);
	if (rc)
		return rc;
	link = net->links[0];
	n_parts = (n_rows - 1) / link->max_rows + 1;
	if (n_parts > UINT16_MAX)
		return afd__error(-EINVAL, "frame: %u rows make %u parts of %u rows, limit %d", n_rows, n_parts, link->max_rows,
				  UINT16_MAX);
	frame = &net->frames[lane];
	frame->active = true;
	frame->error = 0;
	frame->layer = layer;
	frame->n_rows = n_rows;
	frame->part_rows = link->max_rows;
	frame->n_parts = (uint16_t)n_parts;
	frame->io = *io;
	frame->n_targets = 1;
	frame->targets[0] = (struct afd__frame_target){ .link = link };
	return 0;
}

static bool any_frame_is_out(const afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		if (net->frames[lane].active)
			return true;
	}
	return false;
}

int afd__exchange_progress(afd_transport *net)
{
	int moved = afd__net_move(net);

	if (moved < 0)
		return moved;
	/* What outlives its link needs nothing of it any more, and is let come to its end. */
	return net->error && !any_frame_is_out(net) ? afd__error(net->error, "%s", net->error_text) : moved;
}

int afd__exchange_done(afd_transport *net, uint32_t lane)
{
	struct afd__frame_out *frame = &net->frames[lane];

	assert(lane < AFD_MAX_LANES);
	if (frame->active)
		return 0;
	/* The stage may not take its memory back while it is still written or read. */
	for (uint32_t t = 0; t < frame->n_targets; t++) {
		if (lane_has(frame->targets[t].link, lane, AFD__SLOT_FILLING, AFD__SLOT_DRAINING))
			return 0;
	}
	return frame->error ? afd__error(frame->error, "%s", frame->error_text) : 1;
}
