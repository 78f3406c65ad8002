/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which waiting rows form the next pass. The weights of a layer are read once for all rows of a
 * pass, so rows of several attention peers should meet in one; but a row that waits for a peer
 * costs its own peer time.
 *
 * The decision is a pure function of what is known now (gather.c). What is known is kept in a table
 * of arrivals, one entry for each peer and lane: how long it takes from our reply to its next frame
 * (arrivals.c). serve.c calls both. Neither changes what a row's result is, only when it is
 * computed.
 */
#ifndef AFD_LIB_FFN_GATHER_H
#define AFD_LIB_FFN_GATHER_H

#include "../transport/exchange.h"

/* ---- the decision ---- */

/* One (peer, lane) that is in the flow: its rows wait here, or are expected. Sources of one peer
 * stand together. */
struct afd__gather_source {
	uint32_t peer;
	uint32_t
		layer; /* of what waits, or of what comes next; counted from the first layer held */
	uint32_t n_rows;   /* that wait here; 0: on their way */
	uint64_t at_ns;    /* when the oldest of them came, or when they are expected */
	uint64_t turn_ns;  /* waiting: since when they could have run. The wait for others counts
			      from here */
	uint64_t due_ns;   /* on their way: not waited for from then on */
	uint64_t cycle_ns; /* from one of its frames to the next in a step, our pass included; 0:
			      not known */
	uint64_t step_ns; /* the same from the last frame of a step to the first of the next; 0: not
			     known */
};

struct afd__gather_rule {
	uint64_t cap_ns;      /* the longest that rows wait for others; 0: they do not */
	uint64_t step_cap_ns; /* the same for the first rows of a step, at least cap_ns: what meets
				 there meets in all layers */
	uint64_t pass_ns;     /* what a pass takes */
	uint32_t n_layers;    /* held, 1 .. AFD__GATHER_LAYERS */
	uint32_t full_rows;   /* as many fill a pass: nothing is gained by waiting */
};

enum { AFD__GATHER_LAYERS = 1024 }; /* the contract's limit */

struct afd__gather_choice {
	int32_t layer; /* run what waits at this layer, counted from the first held; -1: nothing yet
			*/
	uint64_t until_ns; /* with -1: decide again then, or when rows come; UINT64_MAX: nothing
			      waits */
};

void afd__gather_choose(const struct afd__gather_rule *rule,
	const struct afd__gather_source *sources, uint32_t n_sources, uint64_t now_ns,
	struct afd__gather_choice *choice);

/* ---- what is known of arrivals ---- */

/* A part that the server holds and that is in no pass yet. */
struct afd__held {
	struct afd__part part;
	uint64_t turn_ns; /* when the stage was first free while it was here; 0: it was not */
	uint64_t computed_ns; /* what all passes up to then took */
};

struct afd__arrival_time {
	uint64_t mean_ns, deviation_ns;
}; /* mean 0: not known */

struct afd__arrival {   /* of one (peer, lane) */
	uint64_t owner; /* peer + 1; 0: free. Another peer that falls on the entry begins it anew */
	uint64_t mark;  /* the decision that wrote `source` */
	uint32_t source;      /* where it stands among the sources of that decision */
	uint64_t answered_ns; /* when the last reply went; 0: none yet */
	struct afd__arrival_time in_step, between_steps;
};

struct afd__arrivals {
	struct afd__arrival *table; /* [max_peers][AFD_MAX_LANES] */
	uint32_t max_peers;
	uint32_t first_layer, n_layers;
	uint64_t mark;
};

int afd__arrivals_create(struct afd__arrivals *arrivals, struct afd_context *ctx,
	uint32_t max_peers, uint32_t first_layer, uint32_t n_layers);
void afd__arrivals_destroy(struct afd__arrivals *arrivals);

/* A part came in. A time that is longer than what rows would wait counts as twice that: it is no
 * better known. */
void afd__arrivals_came(struct afd__arrivals *arrivals, const struct afd__part *part,
	const struct afd__gather_rule *rule);
void afd__arrivals_answered(
	struct afd__arrivals *arrivals, const struct afd__part *part, uint64_t now_ns);

/*
 * Turns what the transport, the parts that wait and the table say into the sources of a decision;
 * returns their number, at most n_joined + n_held, and `sources` has room for as many.
 */
uint32_t afd__arrivals_sources(struct afd__arrivals *arrivals, const struct afd__source *joined,
	uint32_t n_joined, const struct afd__held *held, uint32_t n_held,
	const struct afd__gather_rule *rule, struct afd__gather_source *sources);

#endif
