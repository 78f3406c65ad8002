/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A link: one peer and what crosses to and from it. Owns its slots' credits, the order of frames
 * (sequence numbers), what silence means, and the first cause when it ends. A link that has failed
 * stays failed; its slots stay mapped until nobody holds one.
 */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "net.h"

enum { MIN_SLOT_BYTES = 1024, COMPLETIONS = 16 };

static const uint64_t MS = 1000000;

struct afd__link *afd__link_create(afd_transport *net, const struct afd__address *address)
{
	struct afd__link *link = afd__alloc(net->ctx, 1, sizeof(*link));

	if (!link)
		return NULL;
	link->tag.kind = AFD__TAG_WIRE;
	link->net = net;
	link->index = UINT32_MAX;
	link->said = afd__alloc(net->ctx, 1, sizeof(*link->said));
	link->message = afd__alloc(net->ctx, 1, AFD__HELLO_MAX);
	if (!link->said || !link->message) {
		afd__link_destroy(link);
		return NULL;
	}
	link->wire = (struct afd__wire){ .ctx = net->ctx,
		.epoll_fd = net->epoll_fd,
		.tag = &link->tag,
		.shared = &net->shared,
		.secret = net->params.tls ? net->secret : NULL };
	link->address = link->via = address;
	if (address) {
		link->wire.ops = address->ops;
		snprintf(link->name, sizeof(link->name), "%s", address->text);
	}
	return link;
}

void afd__link_slots_added(struct afd__link *link)
{
	const struct afd__slot_memory *watch = &link->net->watch;
	size_t bytes = 0;
	bool is_peer = link->bound && !link->probing;
	void *memory = is_peer && watch->added && !link->slots && link->wire.ops->memory
			       ? link->wire.ops->memory(&link->wire, &bytes)
			       : NULL;

	if (!memory)
		return;
	link->slots = memory;
	link->slots_bytes = bytes;
	watch->added(watch->user, memory, bytes);
}

void afd__link_slots_removed(struct afd__link *link)
{
	if (link->slots)
		link->net->watch.removed(link->net->watch.user, link->slots, link->slots_bytes);
	link->slots = NULL;
	if (link->open && link->wire.device && link->wire.ops->leave_device)
		link->wire.ops->leave_device(&link->wire);
	link->wire.device = NULL;
}

/* ---- where rows lie ---- */

void *afd__link_send_rows(struct afd__link *link, uint32_t slot)
{
	const struct afd__transport_ops *ops = link->wire.ops;

	return ops->rows ? ops->rows(&link->wire, slot, true)
			 : (uint8_t *)ops->send_slot(&link->wire, slot) + AFD__HEADER_BYTES;
}

/* A header may have a tail that we do not know. */
const void *afd__link_receive_rows(
	struct afd__link *link, uint32_t slot, const struct afd__header *h)
{
	const struct afd__transport_ops *ops = link->wire.ops;

	return ops->rows ? (uint8_t *)ops->rows(&link->wire, slot, false) + h->header_bytes -
				     AFD__HEADER_BYTES
			 : (const uint8_t *)ops->receive_slot(&link->wire, slot) + h->header_bytes;
}

int afd__link_post_slot(
	struct afd__link *link, uint32_t slot, const struct afd__header *h, size_t bytes)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	size_t rows_bytes = h->kind == AFD__FRAME_CONTROL || h->status
				    ? 0
				    : afd__wire_rows_bytes(h->n_rows,
					      link->net->contract.hidden_size, h->dtype);

	if (!ops->post_rows)
		return ops->post_send(&link->wire, slot, (uint32_t)(AFD__HEADER_BYTES + bytes));
	return ops->post_rows(&link->wire, slot, (uint32_t)(AFD__HEADER_BYTES + bytes),
		(uint32_t)rows_bytes);
}

void afd__link_close_wire(struct afd__link *link)
{
	afd__link_slots_removed(link);
	if (link->open)
		link->wire.ops->close(&link->wire);
	link->net->n_echoing -= afd__link_is_echoing(link);
	if (afd__link_is_echoing(link))
		link->phase = AFD__LINK_LEFT;
	link->open = link->bound = false;
}

void afd__link_destroy(struct afd__link *link)
{
	if (!link)
		return;
	afd__link_close_wire(link);
	if (link->probing && !link->address)
		link->net->n_probes--;
	afd__times_destroy(link);
	afd__free(link->survey);
	afd__free(link->said);
	afd__free(link->message);
	afd__free(link);
}

void afd__link_geometry(
	const struct afd__link *link, uint32_t hidden_size, struct afd__wire_slots *geometry)
{
	bool in_group = link->kind == AFD__LINK_IN_GROUP;
	uint32_t top_k = !in_group && link->gate == AFD_GATE_ATTENTION ? link->net->contract.top_k : 0;
	size_t y = afd__wire_rows_bytes(link->max_rows, hidden_size,
		in_group ? AFD_DTYPE_F32 : link->to_attention_dtype);
	struct afd__wire_part x;
	size_t bytes;

	afd__wire_part(&x, link->max_rows, hidden_size, link->to_ffn_dtype, top_k);
	bytes = AFD__HEADER_BYTES + (x.bytes > y ? x.bytes : y);
	/* A reply that has no rows brings a text instead. */
	if (bytes < MIN_SLOT_BYTES)
		bytes = MIN_SLOT_BYTES;
	geometry->n_control = AFD__N_CONTROL;
	/* Nothing answers a part in a group, so a sender that waits for a slot has to be woken. */
	geometry->eager = in_group;
	geometry->n_slots = AFD__N_CONTROL + AFD__SLOTS_PER_LANE * link->lanes;
	geometry->control_bytes = AFD__CONTROL_BYTES;
	geometry->slot_bytes = (bytes + 63) / 64 * 64;
}

void afd__link_joined(struct afd__link *link, uint64_t now)
{
	link->phase = AFD__LINK_JOINED;
	link->control_free = (1u << AFD__N_CONTROL) - 1;
	link->heard_ns = link->spoke_ns = link->quiet_ns = now;
	for (uint32_t i = 0; i < AFD__N_ROW_SLOTS; i++) {
		link->in[i].link = link;
		link->in[i].slot = AFD__N_CONTROL + i;
	}
	link->net->n_joined++;
	link->ended = AFD__LINK_IDLE;
	afd__peers_joined(link);
	if (link->kind == AFD__LINK_TO_FFN)
		afd__shards_joined(link);
}

/* ---- the end ---- */

int afd__link_error(const struct afd__link *link)
{
	return afd__error(link->error, "%s", link->error_text);
}

static void end_link(struct afd__link *link, enum afd__link_phase phase)
{
	bool joined = link->phase == AFD__LINK_JOINED;
	afd_transport *net = link->net;

	link->phase = link->ended = phase;
	link->retry_ns = afd__now_ns() + (joined ? AFD__RETURN_MS : AFD__REFUSED_MS) * MS;
	if (link->open)
		link->wire.ops->shut(&link->wire);
	if (!joined)
		return;
	net->n_joined--;
	afd__peers_gone(link);
	if (link->kind == AFD__LINK_IN_GROUP)
		afd__group_lost(link);
	else if (net->attention)
		afd__frames_lost(link);
	else
		afd__parts_lost(link);
}

/* A rank that leaves in order may have finished what we are still at: only what needs it fails. */
static void keep_cause(struct afd__link *link, int rc, bool in_order)
{
	afd_transport *net = link->net;

	link->error = rc;
	afd__error_save(link->error_text, sizeof(link->error_text));
	if (net->attention && !net->error && !(in_order && link->kind == AFD__LINK_IN_GROUP) &&
		!afd__shards_spare(link) && (net->complete || !afd__connect_returns(link))) {
		net->error_passes = net->complete && link->kind == AFD__LINK_TO_FFN;
		net->uncovered_ns = afd__now_ns();
		net->error = rc;
		memcpy(net->error_text, link->error_text, sizeof(net->error_text));
	}
}

/* FFN side: with the step that it was at. */
static void tell_lost(const struct afd__link *link)
{
	char id[AFD__TRACE_TEXT];

	if (link->kind == AFD__LINK_FROM_ATTENTION && link->step)
		afd__log(link->net->ctx, AFD_LOG_WARN, "peer lost: %s; its step %llu, trace id %s",
			link->error_text, (unsigned long long)link->step,
			afd__trace_text(id, link->trace_id));
	else
		afd__log(link->net->ctx, AFD_LOG_WARN, "peer lost: %s", link->error_text);
}

void afd__link_fail(struct afd__link *link, int rc)
{
	afd_transport *net = link->net;

	assert(rc < 0);
	if (link->error)
		return;
	keep_cause(link, afd__error_prefix(rc, "link %s", link->name), false);
	if (link->phase == AFD__LINK_JOINED) {
		tell_lost(link);
		afd__metric_count(net->lost_metric, 1);
	} else if (net->complete) {
		afd__log(net->ctx, AFD_LOG_WARN, "peer not taken: %s", link->error_text);
	}
	end_link(link, AFD__LINK_LOST);
}

void afd__link_leave(struct afd__link *link, const char *text)
{
	if (link->error)
		return;
	keep_cause(link,
		afd__error(-ECONNRESET, "link %s: %s has left%s%s", link->name, link->who,
			text[0] ? ": " : "", text),
		link->phase == AFD__LINK_JOINED);
	afd__log(link->net->ctx, AFD_LOG_INFO, "peer left: %s", link->name);
	end_link(link, AFD__LINK_LEFT);
}

/* One that drains leaves, whatever it still owes. One that was told that we drain is asked to go,
 * and may hang up without a word of its own; it is lost only with what it still waits for. */
static bool has_parted(const struct afd__link *link)
{
	return link->leaving || (link->kind == AFD__LINK_FROM_ATTENTION && link->goodbye_said &&
					!link->n_owed);
}

void afd__link_hung_up(struct afd__link *link)
{
	if (has_parted(link))
		afd__link_leave(link, "");
	else
		afd__link_fail(link, afd__error(-ECONNRESET, "%s is gone", link->who));
}

/* ---- what goes out ---- */

int afd__link_post(struct afd__link *link, uint32_t slot, struct afd__header *h, size_t bytes)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	int rc;

	h->header_bytes = AFD__HEADER_BYTES;
	h->sequence = link->sequence_out + 1;
	h->stamp_ns = afd__now_ns();
	afd__wire_encode(ops->send_slot(&link->wire, slot), h);
	rc = afd__link_post_slot(link, slot, h, bytes);
	if (rc == -EAGAIN)
		return 0;
	if (rc < 0) {
		afd__link_fail(link, rc);
		return rc;
	}
	link->sequence_out++;
	link->spoke_ns = h->stamp_ns;
	return 1;
}

/* ---- control frames ---- */

int afd__link_control(struct afd__link *link, uint32_t type, const void *payload, size_t bytes)
{
	struct afd__header h = { .kind = AFD__FRAME_CONTROL,
		.type = (uint8_t)type,
		.step = (uint32_t)link->net->step };
	uint8_t *memory;
	uint32_t slot;
	int rc;

	assert(bytes <= AFD__CONTROL_BYTES - AFD__HEADER_BYTES);
	if (!link->control_free)
		return 0;
	slot = (uint32_t)__builtin_ctz(link->control_free);
	memory = link->wire.ops->send_slot(&link->wire, slot);
	if (bytes)
		memcpy(memory + AFD__HEADER_BYTES, payload, bytes);
	rc = afd__link_post(link, slot, &h, bytes);
	if (rc == 1)
		link->control_free &= ~(1u << slot);
	return rc;
}

int afd__link_goodbye(struct afd__link *link, uint32_t reason, const char *text)
{
	uint8_t payload[AFD__GOODBYE_BYTES + AFD__TEXT_MAX];
	size_t bytes;
	int rc;

	if (link->goodbye_said && reason == AFD__GOODBYE_DRAIN)
		return 1;
	bytes = afd__wire_encode_goodbye(payload, reason, text);
	rc = afd__link_control(link, AFD__GOODBYE, payload, bytes);
	link->goodbye_said |= rc == 1;
	return rc;
}

/* Attention side: replies that a drain still lets through, those that have come and are not read
 * yet included. */
static bool owes_or_has_replied(const struct afd__link *link)
{
	if (link->n_owed)
		return true;
	for (uint32_t i = 0; i < AFD__N_ROW_SLOTS; i++) {
		if (link->out[i].state == AFD__SLOT_ARRIVED ||
			link->out[i].state == AFD__SLOT_DRAINING)
			return true;
	}
	return false;
}

/* An FFN peer that takes no new frames still answers those that it has. */
static int take_goodbye(struct afd__link *link, const void *payload, size_t bytes)
{
	char text[AFD__TEXT_MAX];
	uint32_t reason;
	int rc = afd__wire_decode_goodbye(&reason, text, payload, bytes);

	if (rc)
		return rc;
	if (reason == AFD__GOODBYE_DRAIN && link->kind == AFD__LINK_TO_FFN &&
		owes_or_has_replied(link))
		link->leaving = true;
	if (link->leaving)
		afd__shards_left(link);
	else
		afd__link_leave(link, text);
	return 0;
}

static int take_control(struct afd__link *link, uint32_t slot, const struct afd__header *h,
	size_t bytes, uint64_t now)
{
	uint8_t payload[AFD__CONTROL_BYTES];
	size_t payload_bytes = bytes - h->header_bytes;
	int rc;

	if (slot >= AFD__N_CONTROL)
		return afd__error(
			-EPROTO, "a control frame came in slot %u, which is for rows", slot);
	if (payload_bytes > sizeof(payload))
		return afd__error(-EPROTO, "control frame: %zu bytes of payload, limit %zu",
			payload_bytes, sizeof(payload));
	memcpy(payload,
		(const uint8_t *)link->wire.ops->receive_slot(&link->wire, slot) + h->header_bytes,
		payload_bytes);
	rc = link->wire.ops->post_receive(&link->wire, slot);
	if (rc)
		return rc;
	switch (h->type) {
	case AFD__BEAT:
		return 0;
	case AFD__GOODBYE:
		return take_goodbye(link, payload, payload_bytes);
	default:
		if (link->kind == AFD__LINK_IN_GROUP)
			return afd__group_control(link, h, payload, payload_bytes);
		if (link->net->attention)
			return afd__error(-EPROTO,
				"control frame: type %u is not for the attention side", h->type);
		return afd__parts_control(link, h, payload, payload_bytes, now);
	}
}

/* ---- what came ---- */

/* Requests and control frames count up by one; a reply says which request it answers instead
 * (frames.c checks it). */
static int check_sequence(struct afd__link *link, const struct afd__header *h)
{
	if (h->kind == AFD__FRAME_ROWS && h->type == AFD__ROWS_Y)
		return 0;
	if (h->sequence != link->sequence_in + 1)
		return afd__error(-EPROTO,
			"frame: sequence is %llu, must be %llu: a frame was lost or came twice",
			(unsigned long long)h->sequence,
			(unsigned long long)(link->sequence_in + 1));
	link->sequence_in++;
	return 0;
}

static int take_frame(struct afd__link *link, uint32_t slot, uint32_t bytes, uint64_t now)
{
	uint8_t copy[AFD__HEADER_BYTES];
	struct afd__header h;
	int rc;

	/* The peer may still write there: what is checked is what is used. */
	memcpy(copy, link->wire.ops->receive_slot(&link->wire, slot),
		bytes < sizeof(copy) ? bytes : sizeof(copy));
	rc = afd__wire_decode(&h, copy, bytes);
	if (!rc)
		rc = check_sequence(link, &h);
	if (rc)
		return rc;
	link->heard_ns = link->quiet_ns = now;
	link->noticed_ns = 0;
	if (h.kind == AFD__FRAME_CONTROL)
		return take_control(link, slot, &h, bytes, now);
	if (slot < AFD__N_CONTROL)
		return afd__error(
			-EPROTO, "a frame of rows came in slot %u, which is for control", slot);
	if (link->kind == AFD__LINK_IN_GROUP)
		return afd__group_take(link, slot, &h, bytes, now);
	if (h.kind != AFD__FRAME_ROWS)
		return afd__error(-EPROTO, "frame: kind %u is of an attention group", h.kind);
	return link->net->attention ? afd__frames_take(link, slot, &h, bytes)
				    : afd__parts_take(link, slot, &h, bytes, now);
}

static int complete(struct afd__link *link, const struct afd__completion *done, uint64_t now)
{
	if (done->kind == AFD__RECEIVED)
		return take_frame(link, done->slot, done->bytes, now);
	if (done->slot < AFD__N_CONTROL)
		link->control_free |= 1u << done->slot;
	else
		link->out[done->slot - AFD__N_CONTROL].unsent = false;
	return 0;
}

int afd__link_poll(struct afd__link *link, uint64_t now)
{
	struct afd__completion done[COMPLETIONS];
	int n, rc, moved = 0;

	do {
		n = link->wire.ops->poll(&link->wire, done, COMPLETIONS);
		if (n == -ECONNRESET)
			afd__link_hung_up(link);
		else if (n < 0)
			afd__link_fail(link, n);
		for (int i = 0; i < n && link->phase == AFD__LINK_JOINED; i++) {
			rc = complete(link, &done[i], now);
			if (rc < 0)
				afd__link_fail(link, rc);
		}
		moved |= n != 0;
	} while (n == COMPLETIONS && link->phase == AFD__LINK_JOINED);
	return moved;
}

/* ---- time ---- */

static uint64_t deadline_of(const struct afd__link *link)
{
	if (link->noticed_ns)
		return link->noticed_ns + AFD__GRACE_MS * MS;
	return link->quiet_ns + link->net->params.deadline_ms * MS;
}

/* The part that has waited longest, for the text. */
static const struct afd__slot_out *oldest_owed(const struct afd__link *link)
{
	const struct afd__slot_out *oldest = NULL;

	for (uint32_t i = 0; i < AFD__N_ROW_SLOTS; i++) {
		if (link->out[i].state == AFD__SLOT_POSTED &&
			(!oldest || link->out[i].sequence < oldest->sequence))
			oldest = &link->out[i];
	}
	return oldest;
}

static int silence(struct afd__link *link, uint64_t now)
{
	const struct afd__slot_out *out = oldest_owed(link);

	if (link->kind == AFD__LINK_IN_GROUP)
		return afd__group_silence(link, now);
	assert(out);
	return afd__error(-ETIMEDOUT,
		"attention waited for the FFN peer: silent for %llu ms, limit %u, layer %u, lane "
		"%u, part %u of %u; "
		"last heard of %llu ms ago",
		(unsigned long long)((now - link->quiet_ns) / MS), link->net->params.deadline_ms,
		out->layer, out->lane, out->part + 1, out->n_parts,
		(unsigned long long)((now - link->heard_ns) / MS));
}

static int send_due(struct afd__link *link)
{
	uint8_t payload[AFD__STEP_CLOSE_BYTES + AFD__TEXT_MAX];
	int moved = 0;

	if (link->close_due) {
		size_t bytes = afd__wire_encode_close(payload, &link->step_close);

		if (afd__link_control(link, AFD__STEP_CLOSE, payload, bytes) != 1)
			return 0;
		link->close_due = false;
		moved = 1;
	}
	if (link->open_due) {
		afd__wire_encode_open(payload, &link->step_open);
		if (afd__link_control(link, AFD__STEP_OPEN, payload, AFD__STEP_OPEN_BYTES) != 1)
			return moved;
		link->open_due = false;
		moved = 1;
	}
	return moved;
}

bool afd__link_is_beat_due(const struct afd__link *link, uint64_t now)
{
	bool owes = link->kind == AFD__LINK_IN_GROUP ? afd__group_owes(link) : link->n_owed;

	return owes && now >= link->spoke_ns + AFD__BEAT_MS * MS;
}

/* A peer that reads none of its beats has enough of them. The last slot is for the goodbye; the
 * return of another one is an event. */
static bool has_slot_to_beat(const struct afd__link *link)
{
	return link->control_free & (link->control_free - 1);
}

static bool is_waited_for(const struct afd__link *link)
{
	return link->kind != AFD__LINK_FROM_ATTENTION && link->n_owed;
}

int afd__link_timers(struct afd__link *link, uint64_t now)
{
	if (link->leaving && !owes_or_has_replied(link)) {
		afd__link_leave(link, "");
		return 1;
	}
	if (is_waited_for(link) && now >= deadline_of(link)) {
		if (link->noticed_ns)
			afd__link_fail(link, silence(link, now));
		link->noticed_ns = now;
		return 1;
	}
	if (link->kind != AFD__LINK_TO_FFN && afd__link_is_beat_due(link, now) &&
		has_slot_to_beat(link) && afd__link_control(link, AFD__BEAT, NULL, 0) == 1)
		return 1;
	return link->net->attention && link->phase == AFD__LINK_JOINED ? send_due(link) : 0;
}

uint64_t afd__link_next_timer(const struct afd__link *link)
{
	uint64_t beat = has_slot_to_beat(link) ? link->spoke_ns + AFD__BEAT_MS * MS : UINT64_MAX;
	uint64_t deadline;

	if (link->kind == AFD__LINK_FROM_ATTENTION)
		return link->n_owed ? beat : UINT64_MAX;
	deadline = is_waited_for(link) ? deadline_of(link) : UINT64_MAX;
	if (link->kind == AFD__LINK_IN_GROUP && afd__group_owes(link) && beat < deadline)
		return beat;
	return deadline;
}
