/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What crosses a tcp: connection. Messages of the handshake carry their size in their prefix and
 * are read no further than their end; after bind only records come.
 *
 * Invariant: `readable` is false only after the kernel said that it has nothing, so the next byte
 * makes an edge on the epoll descriptor, and after the end, behind which nothing comes. The return
 * of a row slot rides in front of the next record, because its sender waits for a reply anyway;
 * that of a control slot goes out by itself.
 */
#include <assert.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "secret.h"
#include "slots.h"
#include "socket.h"
#include "tcp.h"
#include "wire.h"

enum { RECORD_SLOT = 1, RECORD_RETURN = 2, PARTS_MAX = 6, PREFIX_BYTES = 12 };

/* ---- the kernel ---- */

/* What an errno of send or receive means: 0 not now, -ECONNRESET the peer is gone. */
static int stream_error(const char *what)
{
	switch (errno) {
	case EAGAIN:
	case EINTR:
	case ENOBUFS:
		return 0;
	case EPIPE:
	case ECONNRESET:
	case ENOTCONN:
	case ECONNABORTED:
		return afd__error(-ECONNRESET, "the peer is gone");
	case ETIMEDOUT:
	case EHOSTUNREACH:
	case ENETUNREACH:
	case ENETDOWN:
	case EHOSTDOWN:
		return afd__error(-ECONNRESET, "the peer cannot be reached: %s", strerror(errno));
	default:
		return afd__error(-EIO, "%s: %s", what, strerror(errno));
	}
}

static ssize_t tls_error(ssize_t rc, const char *text)
{
	return rc == -ECONNRESET ? afd__error(-ECONNRESET, "the peer is gone")
				 : afd__error((int)rc, "tls: %s", text);
}

/* As stream_write; each part by itself, until one is not taken whole. */
static ssize_t tls_write(
	const struct afd__wire *wire, const struct iovec *parts, int n_parts)
{
	char text[AFD__SECRET_TEXT] = "";
	ssize_t n, all = 0;

	for (int i = 0; i < n_parts; i++) {
		for (size_t at = 0; at < parts[i].iov_len; at += (size_t)n) {
			n = wire->secret->ops->tls_write(tcp_of(wire)->tls,
				(uint8_t *)parts[i].iov_base + at, parts[i].iov_len - at, text);
			if (n < 0 && !all)
				return tls_error(n, text);
			if (n <= 0)
				return all;
			all += n;
		}
	}
	return all;
}

/* Bytes written; 0: not now; negative. */
static ssize_t stream_write(const struct afd__wire *wire, const struct iovec *parts, int n_parts)
{
	struct tcp *t = tcp_of(wire);
	struct msghdr msg = { .msg_iov = (struct iovec *)parts, .msg_iovlen = (size_t)n_parts };
	ssize_t n;

	if (t->tls)
		return tls_write(wire, parts, n_parts);
	n = sendmsg(t->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
	return n < 0 ? stream_error("send") : n;
}

/* The end is kept, with the thread's text, until all that came before it is used. */
static int note_end(struct tcp *t, int rc)
{
	t->readable = false;
	t->ended = true;
	t->end_error = rc;
	afd__error_save(t->end_text, sizeof(t->end_text));
	return rc;
}

static int ended(const struct tcp *t)
{
	return afd__error(t->end_error, "%s", t->end_text);
}

/* As stream_read. TLS may hold what the kernel has given already, so only "not now" ends it. */
static ssize_t tls_read(const struct afd__wire *wire, const struct iovec *part)
{
	struct tcp *t = tcp_of(wire);
	char text[AFD__SECRET_TEXT] = "";
	ssize_t n = wire->secret->ops->tls_read(t->tls, part->iov_base, part->iov_len, text);

	if (n < 0)
		return note_end(t, (int)tls_error(n, text));
	t->readable = n > 0;
	return n;
}

/* Bytes read; 0: none are here; negative: the end. */
static ssize_t stream_read(const struct afd__wire *wire, const struct iovec *parts, int n_parts)
{
	struct tcp *t = tcp_of(wire);
	struct msghdr msg = { .msg_iov = (struct iovec *)parts, .msg_iovlen = (size_t)n_parts };
	size_t wanted = 0;
	ssize_t n;

	if (t->ended)
		return ended(t);
	if (t->tls)
		return tls_read(wire, parts);
	n = recvmsg(t->fd, &msg, MSG_DONTWAIT);
	if (!n)
		return note_end(t, afd__error(-ECONNRESET, "the peer is gone"));
	if (n < 0) {
		int rc = stream_error("receive");

		if (!rc && errno == EAGAIN)
			t->readable = t->to_the_end = false;
		return rc ? note_end(t, rc) : 0;
	}
	for (int i = 0; i < n_parts; i++)
		wanted += parts[i].iov_len;
	/* Less than there was room for: that was all, and what comes later makes an edge. An end that
	 * came with these bytes does not: its edge was theirs. */
	t->readable = (size_t)n == wanted || t->to_the_end;
	return n;
}

/* ---- the handshake ---- */

int afd__stream_hello_send(struct afd__wire *wire, const void *message, size_t bytes)
{
	struct tcp *t = tcp_of(wire);
	struct iovec rest = { (uint8_t *)message + t->hello_sent, bytes - t->hello_sent };
	ssize_t n;

	if (wire->error)
		return afd__wire_failed(wire);
	n = stream_write(wire, &rest, 1);
	if (n < 0)
		return afd__wire_fail(wire, (int)n);
	t->hello_sent += (size_t)n;
	if (t->hello_sent < bytes)
		return 0;
	t->hello_sent = 0;
	return 1;
}

/* Bytes that the message has, as far as can be told: its prefix first. */
static int message_bytes(const struct tcp *t, size_t capacity, size_t *bytes)
{
	static const uint8_t magic[4] = { 'A', 'F', 'D', 'H' };

	*bytes = PREFIX_BYTES;
	/* At the first byte: who speaks another protocol may wait for us to speak. */
	if (memcmp(t->stage, magic, t->staged < 4 ? t->staged : 4))
		return afd__error(-EPROTO, "handshake: begins with %02x %02x %02x %02x, not with AFDH",
			t->stage[0], t->stage[1], t->stage[2], t->stage[3]);
	if (t->staged < PREFIX_BYTES)
		return 0;
	*bytes = afd__take32(t->stage + 8);
	if (*bytes < PREFIX_BYTES || *bytes > capacity)
		return afd__error(-EPROTO, "handshake: a message says %zu bytes, must have %d .. %zu",
			*bytes, PREFIX_BYTES, capacity);
	return 0;
}

static int receive_message(
	const struct afd__wire *wire, void *message, size_t capacity, size_t *bytes)
{
	struct tcp *t = tcp_of(wire);
	size_t wanted;
	int rc;

	for (;;) {
		struct iovec rest;
		ssize_t n;

		rc = message_bytes(t, capacity, &wanted);
		if (rc)
			return rc;
		if (t->staged >= PREFIX_BYTES && t->staged == wanted)
			break;
		rest = (struct iovec){ t->stage + t->staged, wanted - t->staged };
		n = stream_read(wire, &rest, 1);
		if (n <= 0)
			return (int)n;
		t->staged += (size_t)n;
	}
	memcpy(message, t->stage, wanted);
	*bytes = wanted;
	t->staged = 0;
	/* Nobody looks at edges before the handshake is over. */
	t->to_the_end = true;
	return 1;
}

int afd__stream_hello_receive(
	struct afd__wire *wire, void *message, size_t capacity, size_t *bytes)
{
	if (capacity > TCP_STAGE_BYTES)
		capacity = TCP_STAGE_BYTES;
	return wire->error ? afd__wire_failed(wire)
			   : afd__wire_fail(wire, receive_message(wire, message, capacity, bytes));
}

/* ---- slots ---- */

static int direction_bytes(const struct afd__wire_slots *g, size_t *bytes)
{
	size_t rows;

	if (!g->n_slots || g->n_slots > AFD__SLOTS_MAX || g->n_control > g->n_slots ||
		!g->control_bytes || g->control_bytes > UINT16_MAX || !g->slot_bytes ||
		g->slot_bytes > UINT32_MAX - TCP_HEADROOM)
		return afd__error(-EINVAL,
			"slots: %u of %zu bytes and %u of %zu bytes are out of range",
			g->n_slots - g->n_control, g->slot_bytes, g->n_control, g->control_bytes);
	if (__builtin_mul_overflow(
		    g->n_slots - g->n_control, TCP_HEADROOM + g->slot_bytes, &rows) ||
		__builtin_add_overflow(
			rows, g->n_control * (TCP_HEADROOM + g->control_bytes), bytes) ||
		*bytes > SIZE_MAX / 2)
		return afd__error(
			-EINVAL, "slots: %u of %zu bytes overflow", g->n_slots, g->slot_bytes);
	return 0;
}

int afd__stream_bind(struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting)
{
	struct tcp *t = tcp_of(wire);
	size_t bytes = 0;
	int rc;

	if (wire->error)
		return afd__wire_failed(wire);
	rc = direction_bytes(geometry, &bytes);
	if (rc)
		return rc;
	t->memory = afd__large_alloc(wire->ctx, 2 * bytes, 4096, "slots of a tcp: link");
	if (!t->memory)
		return -ENOMEM;
	t->memory_bytes = 2 * bytes;
	t->receive_offset = bytes;
	wire->geometry = *geometry;
	for (uint32_t slot = 0; slot < geometry->n_slots; slot++)
		t->ours[slot] = true;
	return 1;
}

static uint8_t *send_memory(const struct afd__wire *wire, uint32_t slot)
{
	return tcp_of(wire)->memory + afd__slot_offset(&wire->geometry, slot, TCP_HEADROOM);
}

static uint8_t *receive_memory(const struct afd__wire *wire, uint32_t slot)
{
	const struct tcp *t = tcp_of(wire);

	return t->memory + t->receive_offset + afd__slot_offset(&wire->geometry, slot, TCP_HEADROOM);
}

void *afd__stream_send_slot(struct afd__wire *wire, uint32_t slot)
{
	return send_memory(wire, slot);
}

const void *afd__stream_receive_slot(struct afd__wire *wire, uint32_t slot)
{
	return receive_memory(wire, slot);
}

/* ---- out ---- */

static void put_record(uint8_t *at, uint16_t kind, uint32_t slot, uint32_t bytes)
{
	afd__put16(at, kind);
	afd__put16(at + 2, (uint16_t)slot);
	afd__put32(at + 4, bytes);
}

static struct iovec queued(const struct afd__wire *wire, uint32_t i, size_t done)
{
	const struct tcp *t = tcp_of(wire);
	uint16_t slot = t->queue[(t->queue_head + i) % AFD__SLOTS_MAX];

	return (struct iovec){ send_memory(wire, slot) - TCP_RECORD_BYTES + done,
		t->queue_bytes[slot] - done };
}

/* A record that has begun is finished first; then returns, then the other records. */
static int gather_parts(const struct afd__wire *wire, struct iovec parts[PARTS_MAX])
{
	const struct tcp *t = tcp_of(wire);
	uint32_t i = 0;
	int n = 0;

	if (t->queue_done || t->begun)
		parts[n++] = queued(wire, i++, t->queue_done);
	if (t->returns_done < t->returns_bytes)
		parts[n++] = (struct iovec){ (uint8_t *)t->returns + t->returns_done,
			t->returns_bytes - t->returns_done };
	while (n < PARTS_MAX && i < t->n_queued)
		parts[n++] = queued(wire, i++, 0);
	return n;
}

static size_t take_returns(struct tcp *t, size_t bytes)
{
	size_t rest = t->returns_bytes - t->returns_done, n = bytes < rest ? bytes : rest;

	t->returns_done += n;
	if (t->returns_done == t->returns_bytes) {
		t->returns_done = t->returns_bytes = 0;
		t->returns_urgent = false;
	}
	return n;
}

static size_t take_queued(const struct afd__wire *wire, size_t bytes)
{
	struct tcp *t = tcp_of(wire);
	size_t rest = queued(wire, 0, t->queue_done).iov_len, n = bytes < rest ? bytes : rest;

	t->begun = false;
	t->queue_done += n;
	if (n < rest)
		return n;
	t->queue_done = 0;
	t->queue_head = (t->queue_head + 1) % AFD__SLOTS_MAX;
	t->n_queued--;
	return n;
}

/* In the order of gather_parts. */
static void take_written(const struct afd__wire *wire, size_t bytes)
{
	struct tcp *t = tcp_of(wire);

	if (t->queue_done || t->begun)
		bytes -= take_queued(wire, bytes);
	bytes -= take_returns(t, bytes);
	while (bytes)
		bytes -= take_queued(wire, bytes);
}

/* What had come before is read first; then this is the end, if reading finds no other. */
static void note_broken(struct tcp *t, int rc)
{
	t->broken = true;
	if (t->ended)
		return;
	t->readable = true;
	t->end_error = rc;
	afd__error_save(t->end_text, sizeof(t->end_text));
}

/* An end that is found here is told when all that came before it is read: the reader finds it too. */
static void flush(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);
	struct iovec parts[PARTS_MAX];
	ssize_t n;

	/* Until the kernel has refused: only then its room makes an edge. */
	while (!t->broken && (t->n_queued || t->returns_done < t->returns_bytes)) {
		/* What was offered first and not taken stays first, whatever comes to wait behind it. */
		t->begun |= t->tls && t->returns_done == t->returns_bytes;
		n = stream_write(wire, parts, gather_parts(wire, parts));
		if (n < 0)
			note_broken(t, (int)n);
		if (n <= 0)
			return;
		take_written(wire, (size_t)n);
	}
}

int afd__stream_post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes)
{
	struct tcp *t = tcp_of(wire);

	assert(bytes && bytes <= afd__slot_capacity(&wire->geometry, slot));
	if (wire->error)
		return afd__wire_failed(wire);
	if (!t->ours[slot])
		return -EAGAIN;
	t->ours[slot] = false;
	put_record(send_memory(wire, slot) - TCP_RECORD_BYTES, RECORD_SLOT, slot, bytes);
	t->queue_bytes[slot] = TCP_RECORD_BYTES + bytes;
	t->queue[(t->queue_head + t->n_queued++) % AFD__SLOTS_MAX] = (uint16_t)slot;
	flush(wire);
	return 0;
}

int afd__stream_post_receive(struct afd__wire *wire, uint32_t slot)
{
	struct tcp *t = tcp_of(wire);

	if (wire->error)
		return afd__wire_failed(wire);
	assert(t->held[slot]);
	t->held[slot] = false;
	if (t->returns_done) {
		t->returns_bytes -= t->returns_done;
		memmove(t->returns, t->returns + t->returns_done, t->returns_bytes);
		t->returns_done = 0;
	}
	put_record(t->returns + t->returns_bytes, RECORD_RETURN, slot, 0);
	t->returns_bytes += TCP_RECORD_BYTES;
	if (slot < wire->geometry.n_control || wire->geometry.eager)
		t->returns_urgent = true;
	return 0;
}

/* ---- in ---- */

static void complete(struct tcp *t, int kind, uint32_t slot, uint32_t bytes)
{
	assert(t->n_done < 2 * AFD__SLOTS_MAX);
	t->done[(t->done_head + t->n_done++) % (2 * AFD__SLOTS_MAX)] =
		(struct afd__completion){ .kind = kind, .slot = slot, .bytes = bytes };
}

static int begin_slot(struct afd__wire *wire, uint32_t slot, uint32_t bytes)
{
	struct tcp *t = tcp_of(wire);

	if (slot >= wire->geometry.n_slots || t->held[slot])
		return afd__error(-EPROTO, "the peer sent slot %u, which it did not have", slot);
	if (!bytes || bytes > afd__slot_capacity(&wire->geometry, slot))
		return afd__error(-EPROTO, "the peer sent %u bytes in slot %u, limit %zu", bytes,
			slot, afd__slot_capacity(&wire->geometry, slot));
	t->in_slot = true;
	t->slot = (uint16_t)slot;
	t->slot_bytes = bytes;
	t->slot_have = 0;
	return 0;
}

static int take_return(struct afd__wire *wire, uint32_t slot)
{
	struct tcp *t = tcp_of(wire);

	/* One that waits to be written cannot have been read. */
	for (uint32_t i = 0; i < t->n_queued; i++) {
		if (t->queue[(t->queue_head + i) % AFD__SLOTS_MAX] == slot)
			return afd__error(-EPROTO,
				"the peer gave back slot %u, which is not sent yet", slot);
	}
	if (slot >= wire->geometry.n_slots || t->ours[slot])
		return afd__error(
			-EPROTO, "the peer gave back slot %u, which it did not hold", slot);
	t->ours[slot] = true;
	complete(t, AFD__SENT, slot, 0);
	return 0;
}

static int take_record(struct afd__wire *wire, const uint8_t *at)
{
	uint32_t kind = afd__take16(at), slot = afd__take16(at + 2), bytes = afd__take32(at + 4);

	if (kind == RECORD_SLOT)
		return begin_slot(wire, slot, bytes);
	if (kind == RECORD_RETURN && !bytes)
		return take_return(wire, slot);
	return afd__error(-EPROTO, "the peer sent a record of kind %u with %u bytes", kind, bytes);
}

static void end_slot(struct tcp *t)
{
	if (t->slot_have < t->slot_bytes)
		return;
	t->in_slot = false;
	t->held[t->slot] = true;
	complete(t, AFD__RECEIVED, t->slot, t->slot_bytes);
}

/* Uses what is staged; less than a record's header may be left. */
static int use_stage(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);
	int rc = 0;

	while (!rc && t->taken < t->staged) {
		size_t n = t->staged - t->taken;

		if (t->in_slot) {
			if (n > t->slot_bytes - t->slot_have)
				n = t->slot_bytes - t->slot_have;
			memcpy(receive_memory(wire, t->slot) + t->slot_have, t->stage + t->taken, n);
			t->slot_have += (uint32_t)n;
			t->taken += n;
			end_slot(t);
			continue;
		}
		if (n < TCP_RECORD_BYTES)
			break;
		rc = take_record(wire, t->stage + t->taken);
		t->taken += TCP_RECORD_BYTES;
	}
	memmove(t->stage, t->stage + t->taken, t->staged - t->taken);
	t->staged -= t->taken;
	t->taken = 0;
	return rc;
}

/* One look at the kernel. 1: something came; 0: nothing; negative. */
static int read_some(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);
	struct iovec parts[2];
	size_t rest = 0;
	int n_parts = 0;
	ssize_t n;

	if (t->in_slot) {
		rest = t->slot_bytes - t->slot_have;
		parts[n_parts++] =
			(struct iovec){ receive_memory(wire, t->slot) + t->slot_have, rest };
	}
	parts[n_parts++] =
		(struct iovec){ t->stage + t->staged, TCP_STAGE_BYTES - t->staged };
	n = stream_read(wire, parts, n_parts);
	if (n <= 0)
		return (int)n;
	if (rest) {
		size_t direct = (size_t)n < rest ? (size_t)n : rest;

		t->slot_have += (uint32_t)direct;
		n -= (ssize_t)direct;
		end_slot(t);
	}
	t->staged += (size_t)n;
	n = use_stage(wire);
	return n < 0 ? note_end(t, (int)n) : 1;
}

int afd__stream_poll(struct afd__wire *wire, struct afd__completion *out, int max)
{
	struct tcp *t = tcp_of(wire);
	int n = 0;

	if (wire->error)
		return afd__wire_failed(wire);
	while (t->readable && t->n_done < (uint32_t)max)
		read_some(wire);
	if (t->broken && !t->readable && !t->ended)
		note_end(t, ended(t));
	if (t->returns_urgent)
		flush(wire);
	while (n < max && t->n_done) {
		out[n++] = t->done[t->done_head];
		t->done_head = (t->done_head + 1) % (2 * AFD__SLOTS_MAX);
		t->n_done--;
	}
	return n || !t->ended ? n : afd__wire_fail(wire, ended(t));
}

int afd__stream_ready(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);

	if (wire->error || t->n_done || t->ended)
		return 1;
	/* Who spins does not hear that the kernel has room again. */
	if (t->n_queued)
		flush(wire);
	/* Reads rather than asks: what is here is then in its slot already. */
	return read_some(wire) < 0 || t->n_done || t->broken;
}

int afd__stream_arm(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);

	if (t->returns_urgent && !wire->error)
		flush(wire);
	return wire->error || t->n_done || t->readable || t->ended || t->broken;
}

int afd__stream_event(struct afd__wire *wire, unsigned which, uint32_t events)
{
	struct tcp *t = tcp_of(wire);

	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
		t->readable = !t->ended;
	t->to_the_end |= events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR);
	if ((events & EPOLLOUT) && t->memory && !wire->error)
		flush(wire);
	return 0;
}
