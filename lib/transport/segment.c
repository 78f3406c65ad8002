/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Layout: two flags, one for each end, a cache line apart; four rings (posted and returned, each
 * way); then the slots, those of the accepting end first. Row slots have pages of their own, so that
 * a device can map them one by one, and begin a line before a page: rows that stand on pages are
 * copied up to twice as fast as those that begin behind a header there.
 *
 * A slot that was read is returned without waking the sender, unless it is a control slot or the
 * geometry is eager: the sender of rows waits for the reply, and finds the slot returned when that
 * comes.
 */
#include "segment.h"

#include <assert.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "slots.h"

enum { LINE = 64, PAGE = 4096, RING_ENTRIES = AFD__SLOTS_MAX };

struct flag {
	_Alignas(LINE) _Atomic uint32_t sleeps;
};

/* Everything is indexed by the end that writes it, but for flags: by the end that sleeps. 0: the
 * accepting end. */
struct head {
	struct flag flags[2];
	_Alignas(LINE) struct ring_entry posted[2][RING_ENTRIES];
	_Alignas(LINE) struct ring_entry returned[2][RING_ENTRIES];
};

static size_t round_up(size_t bytes, size_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

size_t afd__segment_head_bytes(void)
{
	return round_up(sizeof(struct head), PAGE);
}

static size_t control_span(const struct afd__wire_slots *g)
{
	return round_up(g->n_control * g->control_bytes, PAGE);
}

static size_t slot_span(const struct afd__wire_slots *g)
{
	return PAGE + round_up(g->slot_bytes - LINE, PAGE);
}

static size_t direction_bytes(const struct afd__wire_slots *g)
{
	return control_span(g) + (g->n_slots - g->n_control) * slot_span(g);
}

int afd__segment_bytes(const struct afd__wire_slots *g, size_t *bytes)
{
	size_t data, total;

	if (!g->n_slots || g->n_slots > AFD__SLOTS_MAX || g->n_control > g->n_slots ||
		!g->control_bytes || g->control_bytes > PAGE || g->slot_bytes < LINE ||
		g->slot_bytes > UINT32_MAX - PAGE)
		return afd__error(-EINVAL,
			"slots: %u of %zu bytes and %u of %zu bytes are out of range",
			g->n_slots - g->n_control, g->slot_bytes, g->n_control, g->control_bytes);
	if (__builtin_mul_overflow((size_t)(g->n_slots - g->n_control), slot_span(g), &data) ||
		__builtin_add_overflow(data, control_span(g), &data) ||
		__builtin_mul_overflow(data, (size_t)2, &total) ||
		__builtin_add_overflow(total, afd__segment_head_bytes(), bytes))
		return afd__error(
			-EINVAL, "slots: %u of %zu bytes overflow", g->n_slots, g->slot_bytes);
	return 0;
}

static struct ring ring_at(struct ring_entry *entries)
{
	return (struct ring){ .entries = entries, .mask = RING_ENTRIES - 1 };
}

void afd__segment_attach(struct segment_end *end, void *memory,
	const struct afd__wire_slots *geometry, int accepting, int peer_bell)
{
	struct head *head = memory;
	int us = !accepting, peer = !us;

	end->geometry = *geometry;
	end->memory = memory;
	end->accepting = accepting;
	end->peer_bell = peer_bell;
	end->sent = ring_at(head->posted[us]);
	end->freed = ring_at(head->returned[us]);
	end->received = ring_at(head->posted[peer]);
	end->returned = ring_at(head->returned[peer]);
	end->our_flag = &head->flags[us].sleeps;
	end->peer_flag = &head->flags[peer].sleeps;
	end->send_offset = afd__segment_head_bytes() + (us ? direction_bytes(geometry) : 0);
	end->receive_offset = afd__segment_head_bytes() + (us ? 0 : direction_bytes(geometry));
	for (uint32_t slot = 0; slot < geometry->n_slots; slot++) {
		end->ours[slot] = true;
		end->held[slot] = false;
	}
}

static size_t slot_offset(const struct afd__wire_slots *g, uint32_t slot)
{
	assert(slot < g->n_slots);
	if (slot < g->n_control)
		return slot * g->control_bytes;
	return control_span(g) + (slot - g->n_control) * slot_span(g) + PAGE - LINE;
}

void *afd__segment_send_slot(struct segment_end *end, uint32_t slot)
{
	return end->memory + end->send_offset + slot_offset(&end->geometry, slot);
}

const void *afd__segment_receive_slot(struct segment_end *end, uint32_t slot)
{
	return end->memory + end->receive_offset + slot_offset(&end->geometry, slot);
}

static void ring_doorbell(struct segment_end *end)
{
	/* An eventfd that is full has rung already, so a failure changes nothing. */
	if (ring_wake(end->peer_flag))
		eventfd_write(end->peer_bell, 1);
}

int afd__segment_post_receive(struct segment_end *end, uint32_t slot)
{
	assert(end->held[slot]);
	end->held[slot] = false;
	if (slot >= end->geometry.n_control && !end->geometry.eager) {
		ring_write_quiet(&end->freed, (uint16_t)slot, 0);
		return 0;
	}
	ring_write(&end->freed, (uint16_t)slot, 0);
	ring_doorbell(end);
	return 0;
}

/* Takes what the peer gave back. -EPROTO: an entry contradicts our account; it stays unread, so the
 * failure repeats. */
static int take_returned(struct segment_end *end)
{
	uint64_t bytes;
	uint16_t slot;

	while (ring_read(&end->returned, &slot, &bytes)) {
		if (slot >= end->geometry.n_slots || end->ours[slot]) {
			end->returned.next--;
			return afd__error(
				-EPROTO, "the peer gave back slot %u, which it did not hold", slot);
		}
		end->ours[slot] = true;
		end->back[end->n_back++] = slot;
	}
	return 0;
}

/* A slot may be sent again before poll has reported it, so n_back is bounded by taking it out of
 * the list then. */
static void forget_back(struct segment_end *end, uint32_t slot)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < end->n_back; i++) {
		if (end->back[i] != slot)
			end->back[n++] = end->back[i];
	}
	end->n_back = n;
}

int afd__segment_post_send(struct segment_end *end, uint32_t slot, uint32_t bytes)
{
	assert(bytes && bytes <= afd__slot_capacity(&end->geometry, slot));
	/* The peer gives a slot back before it asks in it, so that its return may lie behind a
	 * request that was polled. */
	if (!end->ours[slot])
		(void)take_returned(end);
	if (!end->ours[slot])
		return -EAGAIN;
	forget_back(end, slot);
	end->ours[slot] = false;
	ring_write(&end->sent, (uint16_t)slot, bytes);
	ring_doorbell(end);
	return 0;
}

static int poll_returned(struct segment_end *end, struct afd__completion *out, int max)
{
	int rc = take_returned(end), n = 0;

	while (n < max && (uint32_t)n < end->n_back) {
		out[n] = (struct afd__completion){ .kind = AFD__SENT, .slot = end->back[n] };
		n++;
	}
	end->n_back -= (uint32_t)n;
	for (uint32_t i = 0; i < end->n_back; i++)
		end->back[i] = end->back[i + (uint32_t)n];
	return n ? n : rc;
}

static int received_error(const struct segment_end *end, uint32_t slot, uint64_t bytes)
{
	if (slot >= end->geometry.n_slots || end->held[slot])
		return afd__error(-EPROTO, "the peer sent slot %u, which it did not have", slot);
	return afd__error(-EPROTO, "the peer sent %llu bytes in slot %u, limit %zu",
		(unsigned long long)bytes, slot, afd__slot_capacity(&end->geometry, slot));
}

static int poll_received(struct segment_end *end, struct afd__completion *out, int max)
{
	uint64_t bytes;
	uint16_t slot;
	int n = 0;

	while (n < max && ring_read(&end->received, &slot, &bytes)) {
		if (slot >= end->geometry.n_slots || end->held[slot] || !bytes ||
			bytes > afd__slot_capacity(&end->geometry, slot)) {
			/* The entry stays unread, so that the failure repeats after what came
			 * before it is reported. */
			end->received.next--;
			return n ? n : received_error(end, slot, bytes);
		}
		end->held[slot] = true;
		out[n++] = (struct afd__completion){
			.kind = AFD__RECEIVED, .slot = slot, .bytes = (uint32_t)bytes
		};
	}
	return n;
}

static void disarm(struct segment_end *end)
{
	if (!end->armed)
		return;
	end->armed = false;
	ring_awake(end->our_flag);
}

static bool has_entry(const struct segment_end *end)
{
	return end->n_back || ring_ready(&end->received) || ring_ready(&end->returned);
}

int afd__segment_poll(struct segment_end *end, struct afd__completion *out, int max)
{
	int n, m;

	disarm(end);
	n = poll_returned(end, out, max);
	if (n < 0 || n == max)
		return n;
	m = poll_received(end, out + n, max - n);
	return m < 0 && n ? n : n + m;
}

int afd__segment_ready(struct segment_end *end)
{
	disarm(end);
	return has_entry(end);
}

int afd__segment_arm(struct segment_end *end)
{
	end->armed = true;
	ring_sleep(end->our_flag);
	if (!has_entry(end))
		return 0;
	disarm(end);
	return 1;
}
