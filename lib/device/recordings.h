/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pieces of work that a stage enqueues again and again, kept as graphs: what comes for the first
 * time runs as it is, what comes again is recorded, and replayed from then on.
 *
 * Invariant: a key says all that the piece's operations and arguments depend on, so that a replay
 * does what enqueueing it again would have done. At most `capacity` graphs are kept; that which was
 * not used for longest goes. On a device without graphs everything runs as it is.
 */
#ifndef AFD_LIB_DEVICE_RECORDINGS_H
#define AFD_LIB_DEVICE_RECORDINGS_H

#include "device.h"

enum { AFD__DEFAULT_GRAPHS = 32, AFD__MAX_GRAPHS = 1024 };

struct afd__recording_key {
	uint32_t words[11]; /* the stage's own meaning; what is not used is 0 */
};

struct afd__recording; /* one that is kept */

struct afd__recordings {
	struct afd__device *device;
	const char *stage;          /* for what is logged */
	struct afd__recording *kept; /* [capacity] */
	int32_t *chains;            /* [n_chains]: the first of each in kept; -1: none */
	uint64_t *seen;             /* [n_chains]: hashes of what came lately */
	uint32_t capacity, n_kept;  /* capacity 0: nothing is recorded */
	uint32_t n_chains;          /* a power of two */
	uint64_t n_used;
	int32_t told; /* it was logged that something cannot be recorded */
};

/* `graphs` as params have it: 0 is the default, UINT32_MAX none. Kept are so many times `pieces`.
 * -EINVAL beyond AFD__MAX_GRAPHS. `device` outlives it; `stage` is a literal. */
int afd__recordings_create(struct afd__recordings *r, struct afd__device *device,
	const char *stage, uint32_t graphs, uint32_t pieces);
void afd__recordings_destroy(struct afd__recordings *r); /* also of a zeroed one */

/* Puts the piece on the queue: enqueue(user) does that, or is recorded, or has been. 1: it was
 * replayed, and enqueue was not called; 0; or its error. */
int afd__recordings_run(struct afd__recordings *r, struct afd__queue *q,
	const struct afd__recording_key *key, int (*enqueue)(void *user), void *user);

#endif
