/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The slots of a link in memory that both ends see: layout, rings and doorbells. loop: and shm:
 * differ only in where this memory comes from and how the ends meet (loop.c, shm.c).
 *
 * Each end keeps its own account of who holds which slot, outside the shared memory; an entry of
 * the peer's that contradicts it ends the link, and cannot lead anywhere else.
 */
#ifndef AFD_LIB_TRANSPORT_SEGMENT_H
#define AFD_LIB_TRANSPORT_SEGMENT_H

#include "ops.h"
#include "ring.h"

struct segment_end {
	struct afd__wire_slots geometry;
	uint8_t *memory; /* NULL before bind */
	int accepting;
	int peer_bell;                      /* eventfd that wakes the peer */
	bool armed;                         /* the peer rings for the next entry */
	size_t send_offset, receive_offset; /* of slot 0 */
	struct ring sent,
		freed; /* we write: slots sent to the peer; slots of the peer's that we give back */
	struct ring received, returned; /* the peer writes */
	_Atomic uint32_t *our_flag, *peer_flag;
	bool ours[AFD__SLOTS_MAX];     /* [n_slots] a send slot that the peer has given back */
	uint16_t back[AFD__SLOTS_MAX]; /* [n_back] of these, those that poll has not reported yet */
	uint32_t n_back;
	bool held[AFD__SLOTS_MAX]; /* [n_slots] a receive slot that was reported and is not posted
				      again */
};

/* Bytes of the memory; -EINVAL when the geometry is out of range or overflows. */
int afd__segment_bytes(const struct afd__wire_slots *geometry, size_t *bytes);
/* Takes a segment's memory, zeroed where the rings lie (SEGMENT_HEAD of it by the accepting end,
 * before the other attaches). */
void afd__segment_attach(struct segment_end *end, void *memory,
	const struct afd__wire_slots *geometry, int accepting, int peer_bell);
/* Bytes from the start that must be zero before either end attaches. */
size_t afd__segment_head_bytes(void);

void *afd__segment_send_slot(struct segment_end *end, uint32_t slot);
const void *afd__segment_receive_slot(struct segment_end *end, uint32_t slot);
int afd__segment_post_send(struct segment_end *end, uint32_t slot, uint32_t bytes);
int afd__segment_post_receive(struct segment_end *end, uint32_t slot);
/* Completions, or -EPROTO when the peer's rings contradict our account. */
int afd__segment_poll(struct segment_end *end, struct afd__completion *out, int max);
int afd__segment_ready(struct segment_end *end); /* ends arm */
int afd__segment_arm(struct segment_end *end);

#endif
