/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop of afd-generate: one step after the other over all sequences that have not ended. A step
 * takes one id of each sequence that decodes, and as many prompt rows as the budget allows, of the
 * first sequences that still have some. What a sequence generates depends on its ids, seed and
 * positions only, not on this schedule.
 */
#ifndef GENERATE_RUN_H
#define GENERATE_RUN_H

#include <afd/afd.h>

#include "../tool/npy.h"
#include "input.h"

struct run {
	afd_attn *attn;
	struct input *input;
	const int32_t *eos_ids; /* [n_eos] */
	uint32_t n_eos;
	uint32_t vocab_size;
	uint32_t prompt_rows;            /* of one step, at most */
	uint32_t max_outputs;            /* of one step, at most */
	struct afd_sample_params sample; /* temperature 0: greedy; seed is the sequence's */
	struct tool_npy *logits_file;    /* NULL: none is asked for */

	struct afd_entry *entries; /* [n_sequences] */
	struct afd_sample_params *samples; /* [n_sequences], of the entries */
	float *logits;             /* [max_outputs][vocab_size], or NULL when ids are enough */
	int32_t *sampled_ids;      /* [max_outputs] */
	uint8_t trace_id[16];      /* of the run and, in its last 8 bytes, of the step */
	uint64_t n_generated;
	double seconds; /* of all steps */
};

/* Rows and outputs of the largest step, from prompt_rows as --prefill-chunk says it (0: whole
 * prompts). Sets both limits of the run and returns the rows; 0 when there are more than max_rows.
 */
uint32_t run_plan(struct run *run, uint32_t prefill_chunk, uint32_t max_rows);

/* Steps until all sequences have ended. TOOL_DONE, or TOOL_FAILED after a line on stderr. Stops
 * early when *interrupted. */
int run_steps(struct run *run, const volatile int *interrupted);

#endif
