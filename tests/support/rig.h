/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A whole decoder for tests: attention and FFN of one checkpoint, in one process or with a
 * transport between them, and then the FFN in several shards if a test likes. Both ends of a
 * transport are driven from one thread, turn by turn, so that a failure comes again.
 *
 * The device is "cpu", or what AFD_TEST_DEVICE says. Everything fails the test instead of returning
 * an error, but for rig_step, whose result a test may want.
 */
#ifndef AFD_TEST_RIG_H
#define AFD_TEST_RIG_H

#include <afd/afd.h>

#include "golden.h"

enum { RIG_SHARDS = 8 };

struct rig_params {
	const char *checkpoint; /* a directory */
	const char *device;     /* NULL: the one under test */
	const char *ffn_device; /* NULL: the same; with an address */
	const char *address;    /* "loop:x", "shm:x"; NULL: an FFN of this process */
	uint32_t n_threads;
	uint32_t lanes, max_part_rows;
	uint32_t n_tp, n_ep; /* shards of the FFN, with an address; 0: 1 */
	int32_t gate;        /* enum afd_gate */
	int32_t wire_dtype; /* 0: f32 */
	int32_t y_dtype;    /* on the wire; 0: wire_dtype both ways */
	int32_t weights;    /* enum afd_weights */
	int32_t quantize_activations; /* of both stages */
	struct afd_attn_params
		attn; /* ffn, device and what a transport says are filled in; kv_dtype 0: f32;
			 graphs: of both stages */
	afd_ffn_compute compute; /* instead of the checkpoint's FFN; with an address */
	void *compute_user;
	void *stream; /* of both stages */
	struct afd_tracer tracer;
	struct afd_log log;
};

struct rig {
	afd_context *ctx;
	afd_model *model;
	afd_ffn *ffn; /* that of shard 0, which listens at the address */
	afd_transport *attn_net, *ffn_net;
	afd_attn *attn;
	struct rig_shard { /* shard 1 .., at the address with "-1" .. behind it */
		afd_ffn *ffn;
		afd_transport *net;
	} others[RIG_SHARDS - 1];
	uint32_t n_others;
	uint32_t vocab, n_layers;
};

/* Fails the test with the library's text; cmocka would say only that a number differs. */
void rig_check(int rc, const char *what);

const char *rig_device(void);
void rig_open(struct rig *rig, const struct rig_params *params);
void rig_close(struct rig *rig);

/* One turn of attention, and of the FFN when attention has nothing to do. 1: the step is done; 0:
 * not yet; or its error. */
int rig_turn(struct rig *rig);
/* The step, to its end: 0 or its error. Fails the test after 60 s. */
int rig_step(struct rig *rig, const struct afd_batch *batch);

/* Three steps of a new sequence 1, four ids each, by descriptors and timeouts alone, as a host's
 * event loop would make them. Fails the test when it sleeps in vain or spins. */
void rig_loop(struct rig *rig, const int32_t *ids);

/* Appends ids to a sequence. logits [n][vocab]: of every id, or NULL. Fails the test on an error.
 */
void rig_append(struct rig *rig, uint64_t sequence, const int32_t *ids, uint32_t n, float *logits);

/* Decodes a case as sequence 1: the prompt in chunks of at most `chunk` ids (0: at once), then the
 * generated ids one by one. logits [n_positions][vocab]. */
void rig_decode(struct rig *rig, const struct golden *golden, uint32_t chunk, float *logits);

/* The same on a rig of its own, with params but for the checkpoint; to be freed. */
float *rig_run(const struct golden *golden, const struct rig_params *params, uint32_t chunk);

#endif
