/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One batch, planned: what the host asked for, checked, its pages reserved, its rows split into
 * lanes, and everything that the device needs to know of it laid out for one upload.
 *
 * Invariant: rows stand in the order of entries and ids; a lane is a run of whole entries, because
 * rows of one sequence need each other's K and V in the same layer. Called by step alone.
 */
#ifndef AFD_LIB_ATTN_BATCH_H
#define AFD_LIB_ATTN_BATCH_H

#include <afd/attn.h>

#include "kv.h"
#include "sequences.h"

struct afd__batch_limits {
	uint32_t max_rows, max_entries, max_outputs, vocab, n_lanes;
	bool steady_tables; /* page tables have few lengths, so that batches are alike for long */
};

struct afd__batch_entry {
	uint64_t id, user_id;
	const int32_t *ids; /* the host's; read by _plan only */
	uint32_t sequence;  /* index in the books */
	uint32_t row0, n_rows, position0;
	uint32_t n_outputs; /* of its last rows */
	struct afd_sample_params sample;
};

/* Which ids of its outputs a batch wants from the device; one of them at least. */
enum afd__batch_ids {
	AFD__IDS_GREEDY = 1,
	AFD__IDS_SAMPLED = 2, /* some are drawn with a temperature */
};

struct afd__batch_lane {
	uint32_t entry0, n_entries;
	uint32_t row0, n_rows;
};

struct afd__batch {
	struct afd__batch_limits limits;
	struct afd__kv *kv;
	const struct afd__sequences *sequences;
	struct afd__batch_entry *entries; /* [max_entries] */
	uint32_t *marks;                  /* [max_sequences]: the last batch that each stood in */
	uint32_t mark;

	/* of the batch that was planned last */
	uint32_t n_entries, n_rows, n_outputs, table_stride;
	uint32_t ids; /* enum afd__batch_ids, both possible */
	struct afd__batch_lane lanes[AFD_MAX_LANES];
	uint32_t last_position; /* the largest */

	/* What is uploaded, in words: ids [n_rows], positions [n_rows], table rows [n_rows], rows
	 * of outputs [n_outputs], where some are sampled how [n_outputs] (struct afd__sample_row, at
	 * 8 bytes), then of each group slots [n_rows] and page table [n_entries][table_stride]. */
	int32_t *words;
	size_t capacity_words, n_words;
	size_t positions_at, table_rows_at, outputs_at, samples_at, groups_at, group_words;
};

int afd__batch_create(struct afd__batch *batch, struct afd_context *ctx,
	const struct afd__batch_limits *limits, struct afd__kv *kv,
	const struct afd__sequences *sequences);
void afd__batch_destroy(struct afd__batch *batch); /* also of a zeroed one */

/* Checks, reserves and lays out. On an error nothing has changed. */
int afd__batch_plan(struct afd__batch *batch, const struct afd_batch *wanted);
/* Ends what _plan began: the sequences have grown, or are as before. */
void afd__batch_commit(struct afd__batch *batch);
void afd__batch_restore(struct afd__batch *batch);

/* Spreads whole entries over lanes in their order, no lane empty while entries last, the rows of
 * lanes as equal as runs can be. */
void afd__batch_split(const struct afd__batch_entry *entries, uint32_t n_entries,
	struct afd__batch_lane *lanes, uint32_t n_lanes);

static inline size_t afd__batch_slots_at(const struct afd__batch *batch, uint32_t group)
{
	return batch->groups_at + group * batch->group_words;
}

static inline size_t afd__batch_table_at(const struct afd__batch *batch, uint32_t group)
{
	return afd__batch_slots_at(batch, group) + batch->n_rows;
}

/* -EINVAL, with the value that is wrong. (sample.c) */
int afd__sample_check(const struct afd_sample_params *params);

/* The entry that a row belongs to. */
const struct afd__batch_entry *afd__batch_entry_of(const struct afd__batch *batch, uint32_t row);

#endif
