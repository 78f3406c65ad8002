/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One end of a tcp: link. tcp.c is how the ends meet; stream.c is what crosses: first the messages
 * of the handshake, then records, of which each is a slot or says that slots were given back.
 *
 * A record is read straight into its slot and written straight out of it, its header lying in front
 * of the slot; only what was read beyond a record's end waits in `stage`. Nothing blocks: what the
 * kernel does not take now goes out when epoll says so. The peer is anybody: every record is held
 * against our own account of who has which slot.
 */
#ifndef AFD_LIB_TRANSPORT_TCP_H
#define AFD_LIB_TRANSPORT_TCP_H

#include <netinet/in.h>
#include <sys/uio.h>

#include "ops.h"

enum {
	TCP_RECORD_BYTES = 8, /* kind, slot, bytes of the slot that follow */
	TCP_HEADROOM = 64,    /* before each slot, so that slots stay aligned */
	TCP_ADDRESSES_MAX = 8,
	/* A small frame comes in one read; copying it is faster than a second one. */
	TCP_STAGE_BYTES = 4 * AFD__HELLO_MAX,
};

struct tcp_address {
	struct sockaddr_storage storage;
	socklen_t bytes;
};

struct tcp {
	int fd;
	bool connecting;
	void *tls; /* a session of the secret's; NULL: in clear */
	struct tcp_address addresses[TCP_ADDRESSES_MAX]; /* [n_addresses] still to be tried */
	uint32_t n_addresses, next_address;

	bool readable;   /* the kernel may have something; false after it said that it has not */
	bool to_the_end; /* an end may lie behind the next bytes, without an edge of its own */
	bool ended;      /* nothing more will come */
	bool broken;     /* nothing more can be sent; what had come before is still to be read */
	int end_error;   /* why */
	char end_text[128];

	/* What was read and is not used yet: stage[taken .. staged-1]. */
	uint8_t stage[TCP_STAGE_BYTES];
	size_t staged, taken;
	size_t hello_sent; /* bytes of the message that goes out */

	/* Slots, after bind. */
	uint8_t *memory; /* the send slots, then the receive slots, each behind its headroom */
	size_t memory_bytes, receive_offset;
	bool ours[AFD__SLOTS_MAX]; /* [n_slots] a send slot that is not with the peer */
	bool held[AFD__SLOTS_MAX]; /* [n_slots] a receive slot that is not posted */

	/* out */
	uint16_t queue[AFD__SLOTS_MAX]; /* ring: slots to be written, oldest first */
	uint32_t queue_head, n_queued;
	uint32_t queue_bytes[AFD__SLOTS_MAX]; /* by slot, record header included */
	size_t queue_done;                    /* of the oldest */
	bool begun; /* the oldest was offered to TLS, which wants the same bytes again */
	uint8_t returns[AFD__SLOTS_MAX * TCP_RECORD_BYTES];
	size_t returns_bytes, returns_done;
	bool returns_urgent; /* somebody waits for one of them alone */

	/* in */
	bool in_slot; /* a slot's bytes come */
	uint16_t slot;
	uint32_t slot_bytes, slot_have;
	struct afd__completion done[2 * AFD__SLOTS_MAX]; /* ring: not polled yet */
	uint32_t done_head, n_done;
};

static inline struct tcp *tcp_of(const struct afd__wire *wire)
{
	return wire->state;
}

/* ---- stream.c: operations of the table ---- */
int afd__stream_hello_send(struct afd__wire *wire, const void *message, size_t bytes);
int afd__stream_hello_receive(
	struct afd__wire *wire, void *message, size_t capacity, size_t *bytes);
int afd__stream_bind(
	struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting);
void *afd__stream_send_slot(struct afd__wire *wire, uint32_t slot);
const void *afd__stream_receive_slot(struct afd__wire *wire, uint32_t slot);
int afd__stream_post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes);
int afd__stream_post_receive(struct afd__wire *wire, uint32_t slot);
int afd__stream_poll(struct afd__wire *wire, struct afd__completion *out, int max);
int afd__stream_ready(struct afd__wire *wire);
int afd__stream_arm(struct afd__wire *wire);
int afd__stream_event(struct afd__wire *wire, unsigned which, uint32_t events);

#endif
