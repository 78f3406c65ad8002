/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A transport that misbehaves as told: "lossy:NAME" is "loop:NAME" whose sent slots are counted,
 * and dropped, garbled, delayed or cut off at a place that a test chooses. The plan is
 * one, for both ends; one test runs at a time.
 */
#ifndef AFD_TEST_LOSSY_H
#define AFD_TEST_LOSSY_H

#include "../../lib/transport/ops.h"

/* Who sends: the end that connected, or that accepted. */
enum lossy_side { LOSSY_ATTENTION = 1, LOSSY_FFN = 2 };

/* Slots are numbered from 1 in the order in which their side sends them; 0: none. */
struct lossy_plan {
	_Atomic int side;             /* enum lossy_side */
	_Atomic unsigned drop;        /* this slot is dropped */
	_Atomic unsigned garble;      /* in this slot's header one byte changes, */
	_Atomic unsigned garble_at;   /* this one */
	_Atomic unsigned cut;         /* before this slot the connection is cut */
	_Atomic unsigned delay_ms;    /* every slot is that late; their order stays */
	_Atomic unsigned silent_from; /* from this slot on all are dropped: alive, and silent */
	_Atomic unsigned n_sent[3];   /* [side] */
};

extern struct lossy_plan lossy_plan;
extern const struct afd__transport_ops lossy_transport;

/* All as it should be, until the plan says otherwise for what this side sends from now on. */
void lossy_begin(int side);

/* A context that knows the scheme. */
void lossy_add(struct afd_context *ctx);

#endif
