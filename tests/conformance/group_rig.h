/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention groups for tests of the transport: the ranks, a stage for each that keeps its rows in
 * plain memory, and numbers whose sum depends on the order. All ranks live in one thread and are
 * moved on in turn, so that the order is the test's.
 */
#ifndef AFD_TEST_GROUP_RIG_H
#define AFD_TEST_GROUP_RIG_H

#include "transport_rig.h"

#include "../../lib/transport/net.h"

enum { RANKS_MAX = 4, ROWS_MAX = 21, LANES = 2 };
/* Sockets that hold next to nothing wait for timers of the kernel, often. */
enum { PATIENCE_MS = 20000 };

/* What the stage of one rank has in one lane. */
struct work {
	struct rank *rank;
	float own[ROWS_MAX * HIDDEN], all[ROWS_MAX * HIDDEN];
	int delay, filling, draining; /* polls until a fill or drain is done; 0: at once */
};

struct rank {
	afd_transport *net;
	uint32_t index;
	struct work lanes[LANES];
};

extern struct rank ranks[RANKS_MAX];
extern char group[96]; /* where they meet */

/* AFD__REDUCE or AFD__GATHER. */
int start(struct rank *rank, uint8_t type, uint32_t lane, uint32_t layer, uint32_t n_rows);
struct afd_transport_params params_of(uint32_t index, uint32_t n);
void make_rank(uint32_t index, const struct afd_transport_params *params);
void join_all(uint32_t n);
/* n ranks that have joined; deadline_ms 0: the default. */
void make_group(uint32_t n, uint32_t deadline_ms);
void end_group(uint32_t n);
int begin(struct rank *rank, uint32_t rows0, uint32_t rows1);
void begin_all(uint32_t n, uint32_t n_rows);
/* Until it is done or has failed; only this rank is moved. */
int finish(struct rank *rank, uint32_t lane, int timeout_ms);
/* All ranks in turn, the first given first, until all are done. */
void finish_all(uint32_t n, uint32_t lane, uint32_t first);
void fill_partials(uint32_t n, uint32_t lane, uint32_t salt);
void expect_sums(uint32_t n, uint32_t lane, uint32_t n_rows, uint32_t salt);

#endif
