/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the time of a part went, from its sending to the moment its reply was found. One process
 * measures the whole by its own clock, the other states durations by its own; no clock is compared
 * with another. What is left is the wire, and what neither can know: how long a part lay there
 * while its reader computed and did not look.
 *
 * Invariant: the five times add up to the round trip, whatever a peer states. Called by frames.c.
 */
#ifndef AFD_LIB_TRANSPORT_TIMES_H
#define AFD_LIB_TRANSPORT_TIMES_H

#include <stdbool.h>

#include "../context/core.h"
#include "wire.h"

struct afd__times {
	uint64_t round_trip_ns;
	uint64_t wire_ns, queue_ns, gather_ns, compute_ns; /* wire: both ways */
	uint64_t unread_ns; /* the reply was there, and this side computed */
	bool estimated;     /* wire, queue and unread were told apart by what is usual */
};

/*
 * Splits a round trip by what the reply states. The reply may have been here for unseen_ns before
 * it was found, 0 means that it was found at once. usual_wire_ns: of parts before; 0: not known.
 */
void afd__times_split(struct afd__times *out, const struct afd__header *reply,
	uint64_t round_trip_ns, uint64_t unseen_ns, uint64_t usual_wire_ns);
/* What is usual after this part. */
uint64_t afd__times_usual(uint64_t usual_wire_ns, const struct afd__times *times);

/* Histograms by layer, and at most so many series of a kind in a transport: with more layers and
 * peers several layers share one. */
enum { AFD__TIMES_SERIES_MAX = 512, AFD__TIMES_KINDS = 4 };
struct afd__times_of_link {
	struct afd__metric **by_layer; /* [AFD__TIMES_KINDS][n_groups] */
	uint32_t n_groups, group_layers;
	struct afd__metric *round_trip, *unread;
	uint64_t usual_wire_ns;
};
/* How many layers share a series. */
uint32_t afd__times_group(uint32_t n_layers, uint32_t n_peers);

#endif
