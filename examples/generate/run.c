/* SPDX-License-Identifier: Apache-2.0 */
/* Batches from sequences, steps, and the choice of the next id. See run.h for the schedule. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "../tool/options.h"
#include "run.h"

#define LOOK_MS 200 /* how often a wait looks whether it was interrupted */

uint32_t run_plan(struct run *run, uint32_t prefill_chunk, uint32_t max_rows)
{
	const struct input *input = run->input;
	uint64_t n_prompt = 0;
	uint32_t rows;

	for (uint32_t i = 0; i < input->n_sequences; i++)
		n_prompt += input->sequences[i].n_prompt;
	if (input->n_sequences >= max_rows)
		return 0;
	run->prompt_rows = prefill_chunk && prefill_chunk < n_prompt ? prefill_chunk
			   : n_prompt < max_rows                     ? n_prompt
								     : max_rows;
	if (run->prompt_rows > max_rows - input->n_sequences)
		run->prompt_rows = max_rows - input->n_sequences;
	/* The last rows of a prompt and the decode rows of the other sequences share a step. */
	rows = run->prompt_rows + input->n_sequences - 1;
	run->max_outputs = run->logits_file ? rows : input->n_sequences;
	return rows;
}

static int create_buffers(struct run *run)
{
	size_t vocab_bytes = run->vocab_size * sizeof *run->logits;

	run->entries = calloc(run->input->n_sequences, sizeof *run->entries);
	run->samples = calloc(run->input->n_sequences, sizeof *run->samples);
	run->sampled_ids = calloc(run->max_outputs, sizeof *run->sampled_ids);
	if (run->logits_file)
		run->logits = calloc(run->max_outputs, vocab_bytes);
	if (!run->entries || !run->samples || !run->sampled_ids ||
		(!run->logits && run->logits_file))
		return tool_fail(TOOL_FAILED, "outputs: no memory for %u rows of %u logits",
			run->max_outputs, run->vocab_size);
	return TOOL_DONE;
}

static void free_buffers(struct run *run)
{
	free(run->entries);
	free(run->samples);
	free(run->sampled_ids);
	free(run->logits);
}

/* The entries of the next step; returns how many there are. */
static uint32_t fill_batch(struct run *run)
{
	uint32_t n_entries = 0, budget = run->prompt_rows;

	for (uint32_t i = 0; i < run->input->n_sequences; i++) {
		const struct sequence *sequence = &run->input->sequences[i];
		uint32_t n_ids = sequence->n_ids - sequence->n_fed;
		int whole;

		if (sequence->ended)
			continue;
		if (sequence->n_fed < sequence->n_prompt) {
			n_ids = n_ids < budget ? n_ids : budget;
			budget -= n_ids;
		}
		if (!n_ids)
			continue;
		whole = sequence->n_fed + n_ids == sequence->n_ids;
		run->samples[n_entries] = run->sample;
		run->samples[n_entries].seed = sequence->seed;
		run->entries[n_entries] = (struct afd_entry){
			.sequence = i,
			.ids = sequence->ids + sequence->n_fed,
			.n_ids = n_ids,
			.user_id = i,
			.outputs = run->logits_file ? AFD_OUTPUT_ALL
				   : whole          ? AFD_OUTPUT_LAST
						    : AFD_OUTPUT_NONE,
			.sample = &run->samples[n_entries],
		};
		n_entries++;
	}
	return n_entries;
}

/* Big-endian, so that the ids of a run stand in the order of its steps. */
static void count_step(uint8_t trace_id[16])
{
	for (int i = 15; i >= 8 && !++trace_id[i]; i--)
		;
}

static int step(struct run *run, uint32_t n_entries, const volatile int *interrupted)
{
	struct afd_batch batch = {
		.size = sizeof batch,
		.entries = run->entries,
		.n_entries = n_entries,
		.entry_bytes = sizeof *run->entries,
		.logits = run->logits,
		.logits_rows = run->logits ? run->max_outputs : 0,
		.sampled_ids = run->sampled_ids,
		.sampled_rows = run->max_outputs,
	};
	int rc;

	count_step(run->trace_id);
	memcpy(batch.trace_id, run->trace_id, sizeof batch.trace_id);
	rc = afd_attn_begin(run->attn, &batch);

	if (rc)
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	do {
		rc = afd_attn_wait(run->attn, LOOK_MS);
		if (*interrupted) {
			afd_attn_cancel(run->attn);
			return tool_fail(TOOL_FAILED, "interrupted by signal %d", *interrupted);
		}
	} while (rc == -ETIMEDOUT && afd_attn_busy(run->attn));
	return rc < 0 ? tool_fail(TOOL_FAILED, "%s", afd_last_error()) : TOOL_DONE;
}

static int is_eos(const struct run *run, int32_t id)
{
	for (uint32_t i = 0; i < run->n_eos; i++) {
		if (run->eos_ids[i] == id)
			return 1;
	}
	return 0;
}

/* The id that follows. */
static void append(struct run *run, struct sequence *sequence, int32_t id)
{
	sequence->ids[sequence->n_ids++] = id;
	run->n_generated++;
	sequence->ended =
		sequence->n_ids == sequence->n_prompt + sequence->max_tokens || is_eos(run, id);
}

/* Takes the outputs of a step, which stand in the order of entries and ids. */
static int take_outputs(struct run *run, uint32_t n_entries)
{
	uint32_t row = 0;
	int status = TOOL_DONE;

	for (uint32_t i = 0; i < n_entries && !status; i++) {
		const struct afd_entry *entry = &run->entries[i];
		struct sequence *sequence = &run->input->sequences[entry->sequence];
		uint32_t n_rows = entry->outputs == AFD_OUTPUT_ALL
					  ? entry->n_ids
					  : entry->outputs == AFD_OUTPUT_LAST;

		sequence->n_fed += entry->n_ids;
		if (run->logits_file &&
			tool_npy_append(run->logits_file,
				run->logits + (size_t)row * run->vocab_size, n_rows))
			return tool_fail(TOOL_FAILED, "--logits %s: cannot be written",
				run->logits_file->out.path);
		row += n_rows;
		if (sequence->n_fed == sequence->n_ids)
			append(run, sequence, run->sampled_ids[row - 1]);
		if (!status && sequence->ended && afd_attn_drop(run->attn, entry->sequence))
			status = tool_fail(TOOL_FAILED, "%s", afd_last_error());
	}
	return status;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

int run_steps(struct run *run, const volatile int *interrupted)
{
	uint32_t n_entries;
	double start;
	int status = create_buffers(run);

	for (uint32_t i = 0; i < run->input->n_sequences && !status; i++) {
		if (afd_attn_add(run->attn, i))
			status = tool_fail(TOOL_FAILED, "%s", afd_last_error());
	}
	/* It only has to differ from that of other runs. */
	if (getrandom(run->trace_id, 8, 0) != 8)
		memset(run->trace_id, 0xff, 8);
	start = now();
	while (!status && (n_entries = fill_batch(run))) {
		status = step(run, n_entries, interrupted);
		if (!status)
			status = take_outputs(run, n_entries);
	}
	run->seconds = now() - start;
	free_buffers(run);
	return status;
}
