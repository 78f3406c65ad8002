/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The seam to transports. A backend moves slots between two peers. It knows no layer, never
 * retries, and never blocks. The front door (link.c and its neighbours) has credits, order,
 * deadlines, the handshake and the check of headers, once.
 *
 * Promises, held against each backend by the conformance suite:
 *   - slots posted to send arrive whole, once, and in order; or the link fails;
 *   - a slot that was posted to send belongs to the backend until poll reports AFD__SENT for it;
 * one that poll reported as AFD__RECEIVED belongs to the front door until it is posted to receive
 * again. A slot whose return the peer has shown in another way (it asks in it again) may be posted
 * before that report, which is then left out;
 *   - after the first error every call on the wire returns that error, until close;
 *   - slots stay mapped until close, also after an error and after shut;
 *   - close is allowed at any time after a successful listen, accept or connect, and frees
 * everything. In a child of fork it closes descriptors and memory without a word to the peer.
 *
 * A wire is made in two steps: first it carries small messages (the handshake) by hello_send and
 * hello_receive; when both sides agree, bind makes the slots of that geometry on both sides, and
 * only slots cross from then on.
 */
#ifndef AFD_LIB_TRANSPORT_OPS_H
#define AFD_LIB_TRANSPORT_OPS_H

#include "../context/core.h"

/* Bytes of one handshake message. Each begins with "AFDH" and says its bytes at 8. */
#define AFD__HELLO_MAX 4096
#define AFD__SEAL_BYTES 36 /* what a key's proof adds to one */
#define AFD__SLOTS_MAX 256  /* slots of a wire, each way */

struct afd__wire_slots {                  /* the geometry, the same on both sides */
	uint32_t n_slots;                 /* each way */
	uint32_t n_control;               /* of these, the first: small ones of control_bytes */
	uint32_t eager;                   /* 1: the return of any slot wakes its sender; 0: of
					     control slots only */
	size_t control_bytes, slot_bytes; /* multiples of 64 */
};

enum afd__completion_kind { AFD__RECEIVED = 1, AFD__SENT };
struct afd__completion {
	int32_t kind;
	uint32_t slot;
	uint32_t bytes;
};

struct afd__transport_ops;
struct afd__secret;
struct afd__device;

/*
 * What an event on a descriptor is for. The backend adds its descriptors to epoll_fd with the
 * address of its `tag` plus 0 .. 7 as data.ptr, and gets the event back by `event` with that
 * number.
 */
struct afd__tag {
	_Alignas(8) int32_t kind;
};
enum afd__tag_kind { AFD__TAG_WIRE = 1, AFD__TAG_LISTENER, AFD__TAG_SHARED };

/* What all wires of a transport share, when a backend has such a thing: made by the first of them,
 * ended by the transport after the last. Its descriptors wake the transport, which then polls all
 * wires. */
struct afd__shared {
	struct afd__tag tag;
	void (*event)(struct afd__shared *shared, unsigned which, uint32_t events);
	void (*end)(struct afd__shared *shared);
};

/* The key's proof of a message that a backend itself sends between the welcome and READY: in the
 * handshake's chain, as the front door's own (prove.c). Without a key both leave all as it is. */
struct afd__wire_proof {
	/* Appends it, in the message's prefix too; there is room for AFD__SEAL_BYTES. Once for each
	 * message. */
	int (*seal)(void *user, uint8_t *message, size_t *bytes);
	/* -EACCES: do not look at it. Takes the proof off *bytes. */
	int (*check)(void *user, const uint8_t *message, size_t *bytes);
	void *user;
};

struct afd__wire { /* one end of a connection; the backend's part of a link */
	const struct afd__transport_ops *ops;
	struct afd_context *ctx;
	void *state;
	int epoll_fd; /* the transport's */
	struct afd__tag *tag;
	struct afd__wire_slots geometry;
	int error;
	const struct afd__secret *secret; /* links that leave the host are encrypted with it; NULL:
					     they are not */
	struct afd__wire_proof proof;     /* set before bind */
	struct afd__device *device; /* set before bind: the stage's, whose memory rows may lie in; or
				       NULL */
	struct afd__shared **shared;      /* the transport's; NULL in it until a backend makes one */
	char peer[64]; /* where it came from, for the log; "" when the address says it all */
	uint64_t source; /* whose connections count together: an IPv4 address, the /64 of an IPv6 one;
			    0 where all come from this host */
};
struct afd__listener {
	struct afd__tag tag;
	const struct afd__transport_ops *ops;
	struct afd_context *ctx;
	void *state;
	int epoll_fd;
	char address[128]; /* the real one, after listen */
};

struct afd__transport_ops {
	const char *scheme; /* "shm" in "shm:name" */
	bool in_clear;      /* rows leave the host, and cannot be encrypted */

	/* -EINVAL and text when what follows the colon of `text` is no name; NULL: 1 to 80 of
	 * [A-Za-z0-9._-]. */
	int (*check_name)(const char *text, const char *name, bool to_listen);
	/* Where rank i of a group listens when rank 0 does at name; NULL: at "name.i". -EINVAL:
	 * there is no such place. */
	int (*rank_name)(char *out, size_t capacity, const char *name, uint32_t rank);
	/* 0, or why this machine cannot: -ENODEV, -ENOSYS, with text. */
	int (*probe)(struct afd_context *ctx);
	int (*listen)(struct afd__listener *ln, const char *name);
	void (*unlisten)(struct afd__listener *ln);
	/* 1: *wire has a new connection; 0: none waits; -EACCES: one came and was refused, there
	 * may be more. */
	int (*accept)(struct afd__listener *ln, struct afd__wire *wire);
	/* Begins; 1 when connected, 0 while it is under way (called again; may be closed),
	 * -ECONNREFUSED: nobody listens (may be tried again). After an error there is nothing to
	 * close. */
	int (*connect)(struct afd__wire *wire, const char *name);

	/* 1: sent or received (*bytes set) whole; 0: not now. A peer that went away: -ECONNRESET.
	 */
	int (*hello_send)(struct afd__wire *wire, const void *message, size_t bytes);
	int (*hello_receive)(struct afd__wire *wire, void *message, size_t capacity, size_t *bytes);

	/* Makes the slots. `accepting` is 1 on the side that accepted. 1 when bound, 0 while the
	 * other side has to act. */
	int (*bind)(struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting);
	/* The memory of a slot: where the sender writes, and where the receiver reads. Fixed after
	 * bind. 64-byte aligned. */
	void *(*send_slot)(struct afd__wire *wire, uint32_t slot);
	const void *(*receive_slot)(struct afd__wire *wire, uint32_t slot);
	/* The piece of memory that all slots lie in, mapped until close; NULL, or no such function:
	 * they lie apart. */
	void *(*memory)(struct afd__wire *wire, size_t *bytes);

	/* NULL: rows lie in their slot, behind the header. Else where the slot's rows lie: there, or
	 * in memory of wire->device. Fixed from bind to leave_device, after which nothing of that
	 * device is touched. */
	void *(*rows)(struct afd__wire *wire, uint32_t slot, bool to_send);
	void (*leave_device)(struct afd__wire *wire);

	/* -EAGAIN: the peer has not posted that slot to receive; nothing happened. */
	int (*post_send)(struct afd__wire *wire, uint32_t slot, uint32_t bytes);
	/* The same, where there is `rows`: of the bytes so many behind the header are rows. */
	int (*post_rows)(
		struct afd__wire *wire, uint32_t slot, uint32_t bytes, uint32_t rows_bytes);
	int (*post_receive)(
		struct afd__wire *wire, uint32_t slot); /* all slots are posted after bind */
	/* Up to max completions, in order; 0: none; negative: the wire failed (the completions
	 * before it were reported). */
	int (*poll)(struct afd__wire *wire, struct afd__completion *out, int max);
	/* 1: poll has something to report. As cheap as it can be: a spinning wait asks it. Ends
	 * arm, as poll does. */
	int (*ready)(struct afd__wire *wire);
	/* Before sleeping on the epoll descriptor: from now on a completion makes it readable. 1:
	 * something came meanwhile, poll first. */
	int (*arm)(struct afd__wire *wire);
	/* An event on descriptor number `which` of the tag. 0, or negative: the peer is gone. What
	 * it had sent before is still to be polled. */
	int (*event)(struct afd__wire *wire, unsigned which, uint32_t events);

	/* Ends the connection and its descriptors; the peer notices. Slots stay mapped until close.
	 * Twice is fine. */
	void (*shut)(struct afd__wire *wire);
	void (*close)(struct afd__wire *wire); /* shut, and frees */
};

/* For backends, of the third promise. fail: keeps the first rc that is an error, and returns rc;
 * failed: the error of every later call (socket.c). */
int afd__wire_fail(struct afd__wire *wire, int rc);
int afd__wire_failed(const struct afd__wire *wire);

extern const struct afd__transport_ops afd__transport_loop, afd__transport_shm,
	afd__transport_tcp, afd__transport_verbs, afd__transport_auto;

#endif
