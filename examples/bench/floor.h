/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor of an exchange: what a medium takes when nothing but bytes cross it. Two processes
 * bounce a message; the other end answers with bench_floor_answer of all bytes, the cheapest
 * compute that rewrites everything, so that both directions carry fresh data each time. Neither
 * sleeps while it waits.
 *
 * A medium is a row of bench_floors; the other end is a process that sleeps in a read until it is
 * told how many messages of which size come next.
 */
#ifndef BENCH_FLOOR_H
#define BENCH_FLOOR_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct bench_floor;

struct bench_floor_medium {
	const char *scheme; /* of the addresses that it is the floor of */
	const char *what;
	/* Before the fork; 0 or an errno. */
	int (*open)(struct bench_floor *f);
	int (*enter)(struct bench_floor *f); /* the other end, once */
	int (*meet)(struct bench_floor *f);  /* ours, once */
	/* Our end: sends x, and has the answer in y. 0 or an errno. */
	int (*round)(struct bench_floor *f, const void *x, void *y, size_t n_bytes);
	/* The other end: waits for one message, and answers it. 0 or an errno. */
	int (*answer)(struct bench_floor *f, size_t n_bytes);
	void (*close)(struct bench_floor *f);
};

struct bench_floor {
	const struct bench_floor_medium *medium;
	size_t max_bytes;
	int control; /* to the other end; there: from us */
	pid_t other;
	void *memory;       /* what both map */
	size_t memory_bytes;
	uint64_t n_messages;
	int listener, socket;
	uint8_t *x, *y; /* [max_bytes] of the other end */
	void *own;      /* a medium's own state, of each end for itself */
};

/* The medium of an address; NULL: it has no floor. */
const struct bench_floor_medium *bench_floor_medium(const char *address);

/* Starts the other end on CPU `cpu` (-1: any); before this process has threads. TOOL_DONE, or
 * TOOL_FAILED after a line on stderr. */
int bench_floor_open(struct bench_floor *f, const struct bench_floor_medium *medium,
	size_t max_bytes, int cpu);
void bench_floor_close(struct bench_floor *f); /* also of a zeroed one */

/* Wakes the other end for n_rounds rounds of n_bytes. */
int bench_floor_begin(struct bench_floor *f, size_t n_bytes, uint64_t n_rounds);

/* What both floor and FFN side compute: y is x with every bit turned around. */
void bench_floor_answer(void *y, const void *x, size_t n_bytes);

/* Binds this process to a CPU; -1: does nothing. */
void bench_pin(int cpu);

#endif
