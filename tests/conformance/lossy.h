/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A transport that misbehaves as told: "lossy:NAME" is "loop:NAME" whose sent slots are counted,
 * and dropped, sent twice, garbled, delayed or cut off at a place that a test chooses. The plan is
 * one, for both ends; one test runs at a time.
 */
#ifndef AFD_TEST_LOSSY_H
#define AFD_TEST_LOSSY_H

#include "../../lib/transport/ops.h"

enum lossy_side {
	LOSSY_ATTENTION = 1,
	LOSSY_FFN = 2
}; /* who sends: the end that connected, or that accepted */

struct lossy_plan {
	int side;             /* enum lossy_side */
	unsigned drop;        /* the number of the slot that is dropped, from 1; 0: none */
	unsigned garble;      /* the number of the slot in whose header one byte changes */
	unsigned garble_at;   /* which */
	unsigned cut;         /* the number of the slot before which the connection is cut */
	unsigned delay_ms;    /* every slot is that late; their order stays */
	unsigned silent_from; /* from this slot on everything is dropped: the peer is alive and says
				 nothing */
	_Atomic unsigned n_sent[3]; /* [side] */
};

extern struct lossy_plan lossy_plan;
extern const struct afd__transport_ops lossy_transport;

/* A context that knows the scheme. */
void lossy_add(struct afd_context *ctx);

#endif
