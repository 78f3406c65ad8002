/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The queue of the deferred device: records go in at the call, and a thread of the queue's own runs
 * them later, one by one. Ring and staging memory are made with the queue; neither side takes a
 * lock.
 *
 * Invariant: records [done, head) belong to the worker, all others to the caller; each counter has
 * one writer.
 */
#ifndef AFD_MODULES_DEFERRED_QUEUE_H
#define AFD_MODULES_DEFERRED_QUEUE_H

#include "arena.h"

enum kind {
#define KIND(op) KIND_##op,
	AFD__DEVICE_OPERATIONS(KIND)
#undef KIND
	KIND_upload,
	KIND_download,
	KIND_ticket,
};

struct transfer {
	void *dst;
	const void *src;
	size_t bytes;
	uint64_t staging_end; /* of an upload: staging memory is free up to here after it */
};

/* Pointers into the arena are already those of the device. */
struct record {
	enum kind kind;
	union {
#define ARGS(op) struct afd__##op##_args op;
		AFD__DEVICE_OPERATIONS(ARGS)
#undef ARGS
		struct transfer transfer;
	} args;
};

#define N_RECORDS     1024u
#define STAGING_BYTES ((size_t)4 << 20)
#define UPLOAD_PART   ((size_t)1 << 20) /* a longer upload goes in parts, which find room sooner */

struct deferred_queue {
	struct afd__queue *q;
	struct afd__queue cpu; /* runs the operations, in the worker */
	pthread_t worker;
	pid_t pid;
	struct record *records;    /* [N_RECORDS] */
	char *staging;             /* [STAGING_BYTES] */
	uint64_t staging_head;     /* the caller's */
	uint32_t delay_us, random; /* the worker's */
	uint64_t fail_at, n_operations;
	char _pad0[64];        /* what one side writes shares no cache line with the other's */
	_Atomic uint64_t head; /* records given */
	char _pad1[64];
	_Atomic uint64_t done; /* records run */
	_Atomic uint64_t staging_done;
	char _pad2[64];
	_Atomic uint32_t sleeping; /* 1: the worker sleeps on this word */
	_Atomic int stop;
	_Atomic int error; /* sticky; error_text was written before it */
	char error_text[256];
};

/* Pushes a record; waits for room, calling on_tile, until a deadline without progress. */
int queue_push(struct deferred_queue *d, const struct record *record);
/* Host memory that an upload may fill now: at most UPLOAD_PART bytes. *end is for its record. */
int queue_staging(struct deferred_queue *d, size_t bytes, char **memory, uint64_t *end);
int queue_error(const struct deferred_queue *d);

/* worker.c */
int worker_start(struct deferred_queue *d);
void worker_stop(struct deferred_queue *d); /* runs what was given, then ends */
void worker_wake(struct deferred_queue *d);

#endif
