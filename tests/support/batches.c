/* SPDX-License-Identifier: Apache-2.0 */
/* The batches of batches.h; sequence s reads the case's ids from s on. */
#include "batches.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>

/* Sequence s appends COUNTS[step][s] ids in each step. */
static const uint32_t COUNTS[BATCHES_STEPS][BATCHES_SEQUENCES] = {
	{ 7, 1, 3, 5, 2 },
	{ 1, 1, 4, 1, 1 },
	{ 1, 2, 1, 1, 3 },
};

static uint32_t count_before(uint32_t step, uint32_t s)
{
	uint32_t n = 0, i;

	for (i = 0; i < step; i++)
		n += COUNTS[i][s];
	return n;
}

uint32_t batches_entries(const struct golden *golden, uint32_t step, uint32_t from, uint32_t end,
	struct afd_entry *entries)
{
	uint32_t s, n = 0;

	for (s = from; s < end; s++) {
		entries[s - from] = (struct afd_entry){ .sequence = s,
			.n_ids = COUNTS[step][s],
			.ids = golden->ids + s + count_before(step, s),
			.outputs = AFD_OUTPUT_ALL };
		n += COUNTS[step][s];
	}
	return n;
}

uint32_t batches_step(struct rig *rig, const struct golden *golden, uint32_t step, uint32_t from,
	uint32_t end, float *logits, int *rc)
{
	struct afd_entry entries[BATCHES_SEQUENCES] = { 0 };
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = end - from,
		.entry_bytes = sizeof(*entries),
		.logits = logits };

	batch.logits_rows = batches_entries(golden, step, from, end, entries);
	*rc = rig_step(rig, &batch);
	return *rc ? 0 : batch.logits_rows;
}

void batches_run_on(struct rig *rig, const struct golden *golden, bool together, float *logits)
{
	uint32_t step, s, n = 0, width = together ? BATCHES_SEQUENCES : 1;
	int rc;

	for (s = 0; s < BATCHES_SEQUENCES; s++)
		assert_int_equal(afd_attn_add(rig->attn, s), 0);
	for (step = 0; step < BATCHES_STEPS; step++) {
		for (s = 0; s < BATCHES_SEQUENCES; s += width) {
			n += batches_step(rig, golden, step, s, s + width,
				logits + (size_t)n * golden->vocab, &rc);
			if (rc)
				fail_msg("step: %d, %s", rc, afd_last_error());
		}
	}
	assert_int_equal(n, BATCHES_ROWS);
}

float *batches_run(const struct golden *golden, const struct rig_params *params, bool together)
{
	float *logits = calloc((size_t)BATCHES_ROWS * golden->vocab, sizeof(*logits));
	struct rig_params p = *params;
	struct rig rig;

	assert_non_null(logits);
	p.checkpoint = golden->checkpoint;
	rig_open(&rig, &p);
	batches_run_on(&rig, golden, together, logits);
	rig_close(&rig);
	return logits;
}
