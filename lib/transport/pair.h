/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One end of a link on one host: a socket that carries the handshake and tells the peer's death, a
 * segment that carries the slots, and two doorbells. All that loop: and shm: have in common; they
 * add how the ends meet and where the memory comes from.
 */
#ifndef AFD_LIB_TRANSPORT_PAIR_H
#define AFD_LIB_TRANSPORT_PAIR_H

#include "local.h"
#include "segment.h"
#include "socket.h"

struct pair {
	struct segment_end end;
	int socket;
	int our_bell, peer_bell; /* eventfds; -1 before bind, in shm: */
	int pidfd; /* of the peer; -1: this kernel has none, or the peer is this process */
	struct local_mapping *mapping; /* shm: the segment */
	struct loop_pipe *pipe;        /* loop: the segment, and who uses it */
};

static inline struct pair *pair_of(const struct afd__wire *wire)
{
	return wire->state;
}

/* Makes wire->state for a connected socket and watches it. On failure nothing is left, and the
 * socket is closed. */
int afd__pair_open(struct afd__wire *wire, int socket);
/* Watches our bell, and the peer's process when peer_pid is not 0 nor our own. */
int afd__pair_watch(struct afd__wire *wire, pid_t peer_pid);
/* Shuts and frees the state; the backend has released the segment. */
void afd__pair_free(struct afd__wire *wire);
int afd__pair_bell(int *out);

/* Operations of the table that are the same for both. */
int afd__pair_hello_send(struct afd__wire *wire, const void *message, size_t bytes);
int afd__pair_hello_receive(struct afd__wire *wire, void *message, size_t capacity, size_t *bytes);
void *afd__pair_send_slot(struct afd__wire *wire, uint32_t slot);
const void *afd__pair_receive_slot(struct afd__wire *wire, uint32_t slot);
int afd__pair_post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes);
int afd__pair_post_receive(struct afd__wire *wire, uint32_t slot);
int afd__pair_poll(struct afd__wire *wire, struct afd__completion *out, int max);
int afd__pair_ready(struct afd__wire *wire);
int afd__pair_arm(struct afd__wire *wire);
int afd__pair_event(struct afd__wire *wire, unsigned which, uint32_t events);
void afd__pair_shut(struct afd__wire *wire);

#endif
