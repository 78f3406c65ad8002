/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parts on the FFN side: what arrives waits in one queue, oldest first, until the stage takes it,
 * and is answered in the slot of the same number. The slots of a part stay mapped until its answer,
 * also when its peer is gone: a link lives as long as the stage holds a part of it.
 *
 * A peer's frames must follow each other as docs/wire.md says; one that breaks the order loses its
 * link and nothing else happens.
 */
#include <assert.h>
#include <string.h>

#include "net.h"

static struct afd__slot_in *in_of(struct afd__link *link, uint32_t slot)
{
	assert(slot >= AFD__N_CONTROL && slot < AFD__N_CONTROL + AFD__N_ROW_SLOTS);
	return &link->in[slot - AFD__N_CONTROL];
}

/* ---- the queue ---- */

static void enqueue(afd_transport *net, struct afd__slot_in *in)
{
	in->next = NULL;
	*net->arrived_end = in;
	net->arrived_end = &in->next;
}

/* Takes all parts of the link out of the queue; returns them as a list. */
static struct afd__slot_in *unqueue(afd_transport *net, const struct afd__link *link)
{
	struct afd__slot_in *taken = NULL, **taken_end = &taken, **at = &net->arrived, *in;

	while ((in = *at)) {
		if (in->link != link) {
			at = &in->next;
			continue;
		}
		*at = in->next;
		in->next = NULL;
		*taken_end = in;
		taken_end = &in->next;
	}
	net->arrived_end = at;
	return taken;
}

/* ---- what arrives ---- */

static int check_part(
	const struct afd__link *link, uint32_t row_slot, const struct afd__header *h, size_t bytes)
{
	const afd_transport *net = link->net;
	const struct afd__lane_in *lane;
	uint32_t top_k;

	if (h->type != AFD__ROWS_X)
		return afd__error(
			-EPROTO, "frame of rows: type %u is not for the FFN side", h->type);
	if (h->lane >= link->lanes || h->lane != row_slot / AFD__SLOTS_PER_LANE)
		return afd__error(-EPROTO, "frame of rows: lane is %u in slot %u, limit %u",
			h->lane, row_slot, link->lanes - 1);
	if (h->layer < net->params.first_layer ||
		h->layer - net->params.first_layer >= net->params.n_layers)
		return afd__error(-EPROTO, "frame of rows: layer is %u, held are %u .. %u",
			h->layer, net->params.first_layer,
			net->params.first_layer + net->params.n_layers - 1);
	if (!link->step || h->step != (uint32_t)link->step)
		return afd__error(-EPROTO, "frame of rows: step is %u, open is %llu", h->step,
			(unsigned long long)link->step);
	top_k = link->gate == AFD_GATE_ATTENTION && net->ffn_kinds[h->layer] == AFD_FFN_MOE
			? net->contract.top_k
			: 0;
	if (h->top_k != top_k)
		return afd__error(-EPROTO, "frame of rows: top_k is %u at layer %u, must be %u",
			h->top_k, h->layer, top_k);
	if (h->dtype != link->to_ffn_dtype)
		return afd__error(-EPROTO, "frame of rows: dtype is %s, agreed was %s",
			afd_dtype_name(h->dtype), afd_dtype_name(link->to_ffn_dtype));
	lane = &link->lane[h->lane];
	if (h->part && (h->part != lane->next_part || h->n_parts != lane->n_parts ||
			       h->layer != lane->layer))
		return afd__error(-EPROTO,
			"frame of rows: part %u of %u of layer %u follows part %d of %u of layer "
			"%u",
			h->part, h->n_parts, h->layer, (int)lane->next_part - 1, lane->n_parts,
			lane->layer);
	/* Part 0 may come before the last frame was whole: that one has failed, here or at the peer
	 * of another shard. */
	return afd__wire_check_rows(h, bytes, net->contract.hidden_size, link->max_rows);
}

int afd__parts_take(struct afd__link *link, uint32_t slot, const struct afd__header *h,
	size_t bytes, uint64_t now)
{
	struct afd__slot_in *in = in_of(link, slot);
	struct afd__lane_in *lane;
	int rc = check_part(link, slot - AFD__N_CONTROL, h, bytes);

	if (rc)
		return rc;
	assert(in->state == AFD__PART_NONE);
	lane = &link->lane[h->lane];
	lane->layer = h->layer;
	lane->n_parts = h->n_parts;
	lane->next_part = h->part + 1;
	lane->last_ns = now;
	if (lane->next_part == lane->n_parts)
		lane->next_layer = (uint32_t)h->layer + 1;
	in->header = *h;
	in->arrived_ns = now;
	in->since_ns = afd__times_since(link, now);
	in->state = AFD__PART_ARRIVED;
	if (!link->n_owed++)
		link->spoke_ns = now;
	enqueue(link->net, in);
	return 0;
}

/* ---- replies ---- */

static uint32_t saturated(uint64_t ns)
{
	return ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

static uint64_t rest_of(uint64_t all_ns, uint64_t ns)
{
	return all_ns > ns ? all_ns - ns : 0;
}

static int send_reply(struct afd__link *link, struct afd__slot_in *in, int status,
	uint64_t gather_ns, uint64_t compute_ns)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	uint8_t *memory = ops->send_slot(&link->wire, in->slot);
	struct afd__header h = in->header;
	uint64_t now = afd__now_ns(), stay_ns = now - in->since_ns;
	size_t bytes;
	int rc;

	h.header_bytes = AFD__HEADER_BYTES;
	h.type = AFD__ROWS_Y;
	h.flags = in->since_ns < in->arrived_ns ? AFD__FLAG_QUEUE_LONGEST : 0;
	h.top_k = 0;
	h.dtype = (uint8_t)link->to_attention_dtype;
	h.scale_format = afd__wire_scales(link->to_attention_dtype);
	h.queue_ns = saturated(rest_of(rest_of(stay_ns, gather_ns), compute_ns));
	h.gather_ns = saturated(gather_ns);
	h.compute_ns = saturated(compute_ns);
	bytes = afd__wire_rows_bytes(
		h.n_rows, link->net->contract.hidden_size, link->to_attention_dtype);
	if (status) {
		h.status = afd__wire_status(status);
		h.n_rows = 0;
		bytes = strnlen(afd_last_error(), AFD__TEXT_MAX - 1);
		memcpy(memory + AFD__HEADER_BYTES, afd_last_error(), bytes);
	}
	afd__wire_encode(memory, &h);
	/* The slot of x goes back first: when the reply is there, so is the credit. */
	rc = ops->post_receive(&link->wire, in->slot);
	if (!rc)
		rc = afd__link_post_slot(link, in->slot, &h, bytes);
	if (rc == -EAGAIN)
		rc = afd__error(-EPROTO,
			"the peer asked in slot %u before it had read the last reply there",
			in->slot);
	link->spoke_ns = now;
	afd__metric_observe(link->metrics.stay, (double)(now - in->arrived_ns) * 1e-9);
	return rc;
}

static void finish(struct afd__link *link, struct afd__slot_in *in, int status, uint64_t gather_ns,
	uint64_t compute_ns)
{
	int rc;

	in->state = AFD__PART_NONE;
	link->n_owed--;
	rc = send_reply(link, in, status, gather_ns, compute_ns);
	if (rc < 0) {
		afd__link_fail(link, rc);
		return;
	}
	link->lane[in->header.lane].last_ns = link->spoke_ns;
	if (status)
		return;
	link->counts.n_parts++;
	link->counts.n_rows += in->header.n_rows;
	afd__metric_count(link->metrics.parts, 1);
	afd__metric_count(link->metrics.rows, in->header.n_rows);
}

/* ---- steps of a peer ---- */

static void forget_step(struct afd__link *link)
{
	for (uint32_t i = 0; i < AFD_MAX_LANES; i++) {
		link->lane[i].n_rows = 0;
		link->lane[i].next_part = link->lane[i].n_parts = 0;
	}
}

static void cancel_arrived(struct afd__link *link)
{
	struct afd__slot_in *in = unqueue(link->net, link), *next;

	for (; in && link->phase == AFD__LINK_JOINED; in = next) {
		next = in->next;
		finish(link, in, afd__error(-ECANCELED, "the step was cancelled"), 0, 0);
	}
}

/* So that a host's requests are found again in this process's log. */
static void tell_step(const struct afd__link *link, const struct afd__step_open *open)
{
	char id[AFD__TRACE_TEXT];

	if (link->net->ctx->log.max_level < AFD_LOG_DEBUG)
		return;
	afd__log(link->net->ctx, AFD_LOG_DEBUG,
		"link %s: step %llu, trace id %s, rows of its lanes %u, %u, %u, %u", link->name,
		(unsigned long long)open->step, afd__trace_text(id, open->trace_id),
		open->n_rows[0], open->n_rows[1], open->n_rows[2], open->n_rows[3]);
}

static int take_open(struct afd__link *link, const void *payload, size_t bytes, uint64_t now)
{
	struct afd__step_open open;
	int rc = afd__wire_decode_open(&open, payload, bytes);

	if (rc)
		return rc;
	if (open.step <= link->step)
		return afd__error(-EPROTO, "step open: step is %llu after %llu",
			(unsigned long long)open.step, (unsigned long long)link->step);
	forget_step(link);
	link->step = open.step;
	memcpy(link->trace_id, open.trace_id, sizeof(link->trace_id));
	tell_step(link, &open);
	for (uint32_t i = 0; i < link->lanes; i++) {
		link->lane[i].n_rows = open.n_rows[i];
		link->lane[i].next_layer = link->net->params.first_layer;
		link->lane[i].last_ns = now;
	}
	return 0;
}

int afd__parts_control(struct afd__link *link, const struct afd__header *h, const void *payload,
	size_t bytes, uint64_t now)
{
	struct afd__step_close close;
	int rc;

	if (h->type == AFD__STEP_OPEN)
		return take_open(link, payload, bytes, now);
	rc = afd__wire_decode_close(&close, payload, bytes);
	if (rc)
		return rc;
	if (close.step != link->step)
		return afd__error(-EPROTO, "step close: step is %llu, open is %llu",
			(unsigned long long)close.step, (unsigned long long)link->step);
	forget_step(link);
	if (close.reason == AFD__CLOSE_CANCELLED)
		cancel_arrived(link);
	return 0;
}

void afd__parts_lost(struct afd__link *link)
{
	struct afd__slot_in *in = unqueue(link->net, link);

	for (; in; in = in->next)
		in->state = AFD__PART_NONE;
	link->n_owed = 0;
	forget_step(link);
}

/* ---- what the FFN stage calls ---- */

int afd__exchange_take(afd_transport *net, struct afd__part *part)
{
	struct afd__wire_part layout;
	struct afd__slot_in *in;
	struct afd__link *link;
	const uint8_t *behind;

	if (!net->arrived)
		afd__net_move(net);
	in = net->arrived;
	if (!in)
		return 0;
	net->arrived = in->next;
	if (!net->arrived)
		net->arrived_end = &net->arrived;
	link = in->link;
	in->state = AFD__PART_TAKEN;
	link->n_taken++;
	behind = (const uint8_t *)link->wire.ops->receive_slot(&link->wire, in->slot) +
		 in->header.header_bytes;
	afd__wire_part(&layout, in->header.n_rows, net->contract.hidden_size, link->to_ffn_dtype,
		in->header.top_k);
	*part = (struct afd__part){
		.link = link,
		.peer = link->index,
		.lane = in->header.lane,
		.layer = in->header.layer,
		.part = in->header.part,
		.n_parts = in->header.n_parts,
		.n_rows = in->header.n_rows,
		.x_dtype = link->to_ffn_dtype,
		.y_dtype = link->to_attention_dtype,
		.step = link->step,
		.arrived_ns = in->arrived_ns,
		.slot = in->slot,
		.sequence = in->header.sequence,
		.x = afd__link_receive_rows(link, in->slot, &in->header),
		.y = afd__link_send_rows(link, in->slot),
		.top_k = in->header.top_k,
	};
	memcpy(part->trace_id, link->trace_id, sizeof(part->trace_id));
	if (part->top_k) {
		part->ids = (const int32_t *)(behind + layout.ids);
		part->weights = (const float *)(behind + layout.weights);
	}
	return 1;
}

int afd__exchange_reply(afd_transport *net, const struct afd__part *part, int status,
	uint64_t gather_ns, uint64_t compute_ns)
{
	struct afd__link *link = part->link;
	struct afd__slot_in *in = in_of(link, part->slot);

	assert(in->state == AFD__PART_TAKEN && in->header.sequence == part->sequence &&
		link->n_taken);
	link->n_taken--;
	if (link->phase == AFD__LINK_JOINED)
		finish(link, in, status, gather_ns, compute_ns);
	else
		in->state = AFD__PART_NONE;
	return 0;
}

uint32_t afd__exchange_sources(
	const afd_transport *net, struct afd__source *sources, uint32_t capacity)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < net->max_links; i++) {
		const struct afd__link *link = net->links[i];

		for (uint32_t lane = 0;
			afd__link_is_joined(link) && lane < link->lanes && n < capacity; lane++) {
			const struct afd__lane_in *in = &link->lane[lane];

			if (in->n_rows)
				sources[n++] = (struct afd__source){ .peer = i,
					.lane = lane,
					.next_layer = in->next_layer,
					.n_rows = in->n_rows,
					.last_ns = in->last_ns };
		}
	}
	return n;
}

uint32_t afd__exchange_n_joined(const afd_transport *net)
{
	return net->n_joined;
}

/* Whether the link may need a beat now. In a group that depends on what has come, so it is looked
 * at now and then. */
static bool is_beat_thought_of(struct afd__link *link, uint64_t now)
{
	if (link->kind == AFD__LINK_FROM_ATTENTION)
		return afd__link_is_beat_due(link, now);
	if (link->kind == AFD__LINK_TO_FFN || !link->net->step_open ||
		now < link->beat_ns + AFD__BEAT_MS / 2 * UINT64_C(1000000))
		return false;
	link->beat_ns = now;
	return true;
}

void afd__transport_beat(afd_transport *net)
{
	uint64_t now = afd__now_ns();

	for (uint32_t i = net->attention ? net->n_addresses : 0; i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		if (!afd__link_is_joined(link) || !is_beat_thought_of(link, now))
			continue;
		/* Slots of earlier beats come back by polling; what else came waits in the queue.
		 * Events are not looked at here, so the backend looks for itself. */
		link->wire.ops->ready(&link->wire);
		afd__link_poll(link, now);
		link->looked_ns = now;
		if (link->phase == AFD__LINK_JOINED)
			afd__link_timers(link, now);
	}
}

int afd__exchange_drain(afd_transport *net)
{
	int done = 1;

	net->draining = true;
	for (uint32_t i = 0; i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		if (!link || (link->phase != AFD__LINK_JOINED && !link->n_taken))
			continue;
		if (link->n_owed || link->n_taken)
			done = 0;
		if (link->phase == AFD__LINK_JOINED &&
			afd__link_goodbye(link, AFD__GOODBYE_DRAIN, "it drains") == 0)
			done = 0;
	}
	return done;
}
