/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An attention group for tests: n ranks of one checkpoint that share FFN shards, or have an FFN
 * each, all in one context and driven from one thread, turn by turn. What rig.h says of devices and
 * errors holds here, too.
 */
#ifndef AFD_TEST_RANKS_H
#define AFD_TEST_RANKS_H

#include "rig.h"

enum { RANKS_MAX = 4, RANKS_SHARDS_MAX = 2 };

struct ranks_params {
	const char *checkpoint; /* a directory */
	const char *device;     /* NULL: the one under test */
	const char *scheme;     /* "loop", "shm"; NULL: loop */
	uint32_t n_ranks;
	uint32_t n_shards;      /* of the FFN, split by width; 0: each rank has one of its own */
	bool by_experts;        /* instead: what is routed is split by experts */
	uint32_t lanes, max_part_rows;
	int32_t wire_dtype;     /* both ways; 0: f32 */
	int32_t gate;           /* enum afd_gate; 0: AFD_GATE_FFN */
	int32_t weights;        /* enum afd_weights */
	struct afd_attn_params attn; /* kv_dtype 0: f32; quantize_activations and graphs: of the FFN, too */
	struct afd_tracer tracer;
};

struct ranks {
	afd_context *ctx;
	afd_model *model;
	uint32_t n_ranks, n_shards, vocab, n_layers;
	const char *device;
	afd_transport *ffn_nets[RANKS_SHARDS_MAX];
	afd_ffn *ffns[RANKS_MAX]; /* [n_shards], or one of each rank */
	afd_transport *nets[RANKS_MAX];
	afd_attn *attns[RANKS_MAX];
};

void ranks_open(struct ranks *ranks, const struct ranks_params *params);
void ranks_close(struct ranks *ranks);
void ranks_add(struct ranks *ranks, uint64_t sequence);

/* The same step on all ranks, each with logits of its own (logits [n_ranks], or NULL), to its end on
 * each: rc [n_ranks]. Fails the test after 60 s. */
void ranks_try(struct ranks *ranks, const struct afd_batch *batch, float *const *logits, int *rc);
/* The same, which must succeed. */
void ranks_step(struct ranks *ranks, const struct afd_batch *batch, float *const *logits);

/* Decodes a case as rig_decode does. logits [n_ranks] of [n_positions][vocab]. */
void ranks_decode(
	struct ranks *ranks, const struct golden *golden, uint32_t chunk, float *const *logits);

#endif
