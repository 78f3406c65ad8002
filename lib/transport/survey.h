/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A survey: what can carry the rows to one address, found out by trying it. A trial is a
 * connection of its own on which slots of bytes cross, come back and are compared; only what has
 * passed that is proved. An auto: link makes a survey each time before it connects, and takes the
 * best; afd_transport_probe makes one, measures every trial, and connects to nothing.
 */
#ifndef AFD_LIB_TRANSPORT_SURVEY_H
#define AFD_LIB_TRANSPORT_SURVEY_H

#include "address.h"

enum {
	AFD__TRIALS_MAX = 3, /* the address that was given, shm:, verbs: */
	AFD__SMALL_ROUNDS = 32,
	AFD__LARGE_ROUNDS = 8,
	AFD__SMALL_BYTES = 64,
};

struct afd__trial {
	struct afd__address address;
	int error; /* 0: it was proved */
	bool tried;
	char text[256]; /* of the error */
	double round_trip_us, bytes_per_second; /* medians, when it was measured */
};

struct afd__survey {
	struct afd__trial trials[AFD__TRIALS_MAX]; /* [n_trials]; the first is the address given */
	uint32_t n_trials;
	uint32_t at;    /* the trial under way, then the one that was chosen */
	bool runs;
	bool measures;  /* every trial, and nothing joins after it */
	bool done;      /* with measures: there is no more to be done */
	uint64_t until_ns; /* the trial's deadline */
	uint64_t busy_ns;  /* since when the listener has no place for a probe; 0: it has */
	uint32_t round; /* of slots that go there and back, */
	uint32_t n_rounds;  /* of this size so far, */
	uint64_t began_ns;  /* since then */
	bool large;     /* the second size */
	bool out;       /* one is under way, */
	uint64_t sent_ns; /* since then */
	double us[AFD__SMALL_ROUNDS]; /* of rounds of one size */
	uint32_t n_us;
};

#endif
