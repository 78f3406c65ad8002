/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Three steps of five sequences of unequal length, which mix prompt chunks and decode tokens: what
 * laws of sameness are held with.
 */
#ifndef AFD_TEST_BATCHES_H
#define AFD_TEST_BATCHES_H

#include <stdbool.h>

#include "rig.h"

enum { BATCHES_SEQUENCES = 5, BATCHES_STEPS = 3, BATCHES_ROWS = 34 };

/* The entries [end - from] of sequences `from` .. `end`-1 in one step, all outputs; returns how many
 * ids they have together. */
uint32_t batches_entries(const struct golden *golden, uint32_t step, uint32_t from, uint32_t end,
	struct afd_entry *entries);

/* One step as one batch over the sequences `from` .. `end`-1, all outputs; returns how many there
 * were. 0: the step's error is in *rc. */
uint32_t batches_step(struct rig *rig, const struct golden *golden, uint32_t step, uint32_t from,
	uint32_t end, float *logits, int *rc);

/* Logits [BATCHES_ROWS][vocab] of all steps in the order of steps, sequences and ids; all sequences
 * together, or each in a step of its own. To be freed. */
float *batches_run(const struct golden *golden, const struct rig_params *params, bool together);
/* The same on a rig that is open and has no sequences. */
void batches_run_on(struct rig *rig, const struct golden *golden, bool together, float *logits);

#endif
