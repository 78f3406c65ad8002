/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ids that a step draws on the device: they are those that afd_sample draws from the step's logits,
 * whatever shares the batch, in any layout; what is not asked for is not put out; and bad values
 * change nothing.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../support/batches.h"
#include "../support/ranks.h"

enum { N_DECODED = 5 };

/* How sequence s is sampled; 2 has none: it is greedy. */
static const struct afd_sample_params samples[BATCHES_SEQUENCES] = {
	{ .size = sizeof(samples[0]), .temperature = 1, .seed = 11 },
	{ .size = sizeof(samples[0]), .temperature = 0.7f, .top_k = 5, .seed = 12 },
	{ .size = sizeof(samples[0]) },
	{ .size = sizeof(samples[0]), .temperature = 1.5f, .top_p = 0.8f, .seed = 13 },
	{ .size = sizeof(samples[0]), .temperature = 2, .top_k = 20, .top_p = 0.9f, .seed = 14 },
};

/* Ids of all outputs [BATCHES_ROWS], and their logits where they are wanted. */
struct drawn {
	int32_t ids[BATCHES_ROWS];
	uint64_t positions[BATCHES_ROWS]; /* where each id would stand */
	uint32_t sequences[BATCHES_ROWS];
	float *logits; /* [BATCHES_ROWS][vocab], or NULL */
	uint32_t n;
};

static void note_outputs(struct drawn *d, const struct rig *rig, const struct afd_entry *entries)
{
	uint32_t n = d->n;

	for (uint32_t s = 0; s < BATCHES_SEQUENCES; s++) {
		uint64_t end = (uint64_t)afd_attn_length(rig->attn, s);

		for (uint32_t i = 0; i < entries[s].n_ids; i++) {
			d->sequences[n] = s;
			d->positions[n++] = end - entries[s].n_ids + i + 1;
		}
	}
}

static void draw_step(struct drawn *d, struct rig *rig, const struct golden *golden, uint32_t step)
{
	struct afd_entry entries[BATCHES_SEQUENCES] = { 0 };
	const uint32_t n = batches_entries(golden, step, 0, BATCHES_SEQUENCES, entries);
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = BATCHES_SEQUENCES,
		.entry_bytes = sizeof(*entries),
		.logits = d->logits ? d->logits + (size_t)d->n * rig->vocab : NULL,
		.logits_rows = n,
		.sampled_ids = d->ids + d->n,
		.sampled_rows = n };

	for (uint32_t s = 0; s < BATCHES_SEQUENCES; s++)
		entries[s].sample = s == 2 ? NULL : &samples[s];
	rig_check(rig_step(rig, &batch), "step");
	note_outputs(d, rig, entries);
	d->n += n;
}

static void draw_all(struct drawn *d, const struct golden *golden, struct rig_params params)
{
	struct rig rig;

	params.checkpoint = golden->checkpoint;
	params.attn.max_outputs = BATCHES_ROWS;
	rig_open(&rig, &params);
	for (uint64_t s = 0; s < BATCHES_SEQUENCES; s++)
		assert_int_equal(afd_attn_add(rig.attn, s), 0);
	for (uint32_t step = 0; step < BATCHES_STEPS; step++)
		draw_step(d, &rig, golden, step);
	assert_int_equal(d->n, BATCHES_ROWS);
	rig_close(&rig);
}

static void a_step_draws_what_afd_sample_draws_from_its_logits(void **state)
{
	struct drawn with = { 0 }, without = { 0 };
	struct golden golden;
	uint32_t i, n_greedy = 0;

	golden_open(&golden, "bf16-tied");
	with.logits = calloc((size_t)BATCHES_ROWS * golden.vocab, sizeof(float));
	assert_non_null(with.logits);
	draw_all(&with, &golden, (struct rig_params){ 0 });
	draw_all(&without, &golden, (struct rig_params){ 0 });
	for (i = 0; i < BATCHES_ROWS; i++) {
		const float *row = with.logits + (size_t)i * golden.vocab;

		assert_int_equal(with.ids[i], afd_sample(row, golden.vocab, with.positions[i],
						      &samples[with.sequences[i]], NULL));
		n_greedy += with.ids[i] == afd_sample(row, golden.vocab, 0, NULL, NULL);
	}
	assert_true(n_greedy < BATCHES_ROWS / 2);
	assert_memory_equal(with.ids, without.ids, sizeof(with.ids));
	free(with.logits);
	golden_close(&golden);
}

static void a_draw_is_the_same_in_any_layout(void **state)
{
	const struct rig_params layouts[] = {
		{ .lanes = 3, .n_threads = 3 },
		{ .attn = { .page_size = 3, .graphs = UINT32_MAX } },
		{ .address = "loop:sample", .lanes = 2, .max_part_rows = 4 },
		{ .address = "shm:sample", .lanes = 4 },
	};
	struct drawn first = { 0 };
	struct golden golden;

	golden_open(&golden, "tiny-qwen3-moe");
	draw_all(&first, &golden, (struct rig_params){ 0 });
	for (size_t i = 0; i < sizeof(layouts) / sizeof(*layouts); i++) {
		struct drawn other = { 0 };

		draw_all(&other, &golden, layouts[i]);
		if (memcmp(first.ids, other.ids, sizeof(first.ids)))
			fail_msg("layout %zu draws other ids", i);
	}
	golden_close(&golden);
}

static void ranks_of_a_group_draw_the_same_ids(void **state)
{
	struct ranks_params params = { .n_ranks = 3, .n_shards = 1 };
	int32_t ids[6] = { 0 };
	float *logits[3];
	struct ranks ranks;
	struct golden golden;
	struct afd_entry entry = { .sequence = 1, .n_ids = 6, .outputs = AFD_OUTPUT_ALL,
		.sample = &samples[0] };
	const struct afd_batch batch = { .size = sizeof(batch), .entries = &entry, .n_entries = 1,
		.entry_bytes = sizeof(entry), .logits_rows = 6,
		.sampled_ids = ids, .sampled_rows = 6 };

	golden_open(&golden, "f32-tied");
	params.checkpoint = golden.checkpoint;
	entry.ids = golden.ids;
	for (int i = 0; i < 3; i++)
		logits[i] = calloc(6 * (size_t)golden.vocab, sizeof(float));
	ranks_open(&ranks, &params);
	ranks_add(&ranks, 1);
	ranks_step(&ranks, &batch, logits);
	for (int i = 0; i < 18; i++)
		assert_int_equal(ids[i % 6],
			afd_sample(logits[i / 6] + (size_t)(i % 6) * golden.vocab, golden.vocab,
				(uint64_t)(i % 6) + 1, &samples[0], NULL));
	ranks_close(&ranks);
	for (int i = 0; i < 3; i++)
		free(logits[i]);
	golden_close(&golden);
}

/* Decodes two sequences from their own draws; so recorded steps are replayed where there are
 * graphs. The seed of the second changes at step N_DECODED / 2. */
static void decode(struct rig *rig, const struct golden *golden, int32_t ids[2 * N_DECODED])
{
	struct afd_sample_params sample[2] = { samples[0], samples[3] };
	struct afd_entry entries[2] = { { .sequence = 0, .n_ids = 1, .sample = &sample[0] },
		{ .sequence = 1, .n_ids = 1, .sample = &sample[1] } };
	struct afd_batch batch = { .size = sizeof(batch), .entries = entries, .n_entries = 2,
		.entry_bytes = sizeof(*entries), .sampled_rows = 2 };

	for (uint64_t s = 0; s < 2; s++)
		assert_int_equal(afd_attn_add(rig->attn, s), 0);
	for (int i = 0; i < N_DECODED; i++) {
		for (int s = 0; s < 2; s++)
			entries[s].ids = i ? &ids[2 * (i - 1) + s] : &golden->ids[s];
		sample[1].seed += i == N_DECODED / 2;
		batch.sampled_ids = ids + 2 * i;
		rig_check(rig_step(rig, &batch), "step");
	}
}

static void replayed_steps_draw_as_those_that_go_layer_by_layer(void **state)
{
	const uint32_t graphs[2] = { 0, UINT32_MAX };
	int32_t ids[2][2 * N_DECODED];
	struct golden golden;

	golden_open(&golden, "bf16-tied");
	for (int i = 0; i < 2; i++) {
		const struct rig_params params = { .checkpoint = golden.checkpoint,
			.attn = { .graphs = graphs[i] } };
		struct rig rig;

		rig_open(&rig, &params);
		decode(&rig, &golden, ids[i]);
		rig_close(&rig);
	}
	assert_memory_equal(ids[0], ids[1], sizeof(ids[0]));
	golden_close(&golden);
}

struct bad {
	struct afd_sample_params sample;
	const char *text;
	int rc;
};

static const struct bad BAD[] = {
	{ { .temperature = -0.5f }, "sequence 7: sample: temperature is -0.5", -EINVAL },
	{ { .temperature = NAN }, "temperature is nan", -EINVAL },
	{ { .temperature = INFINITY }, "temperature is inf", -EINVAL },
	{ { .temperature = 1, .top_p = 1.5f }, "top_p is 1.5, limits 0 and 1", -EINVAL },
	{ { .temperature = 1, .top_p = -1 }, "top_p is -1", -EINVAL },
	{ { .top_p = NAN }, "top_p is nan", -EINVAL },
	{ { .temperature = 1, .top_k = 1u << 30 }, "top_k is 1073741824, the vocabulary has",
		-EINVAL },
	{ { ._pad = 3 }, "_pad is 3", -EINVAL },
};

static void bad_values_are_refused_by_name_and_change_nothing(void **state)
{
	struct afd_entry entry = { .sequence = 7, .n_ids = 1 };
	int32_t id = -7;
	struct afd_batch batch = { .size = sizeof(batch), .entries = &entry, .n_entries = 1,
		.entry_bytes = sizeof(entry), .sampled_ids = &id, .sampled_rows = 1 };
	struct golden golden;
	struct rig rig;

	golden_open(&golden, "bf16-tied");
	rig_open(&rig, &(struct rig_params){ .checkpoint = golden.checkpoint });
	assert_int_equal(afd_attn_add(rig.attn, 7), 0);
	entry.ids = golden.ids;
	for (size_t i = 0; i < sizeof(BAD) / sizeof(*BAD); i++) {
		struct afd_sample_params sample = BAD[i].sample;

		sample.size = sizeof(sample);
		entry.sample = &sample;
		assert_int_equal(afd_attn_begin(rig.attn, &batch), BAD[i].rc);
		if (!strstr(afd_last_error(), BAD[i].text))
			fail_msg("case %zu: %s", i, afd_last_error());
	}
	entry.sample = NULL;
	batch.sampled_rows = 0;
	assert_int_equal(afd_attn_begin(rig.attn, &batch), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "1 outputs, sampled_rows is 0"));
	assert_int_equal(afd_attn_length(rig.attn, 7), 0);
	assert_int_equal(id, -7);
	batch.sampled_rows = 1;
	assert_int_equal(rig_step(&rig, &batch), 0);
	assert_true(id >= 0);
	rig_close(&rig);
	golden_close(&golden);
}

/* What was compiled before entries had `sample`, and batches sampled_ids. */
static void an_older_hosts_batch_is_read_as_before(void **state)
{
	unsigned char entries[2 * offsetof(struct afd_entry, sample)];
	const size_t bytes = sizeof(entries) / 2;
	int32_t ids[2] = { -7, -7 };
	struct afd_batch batch = { .size = offsetof(struct afd_batch, sampled_ids),
		.entries = (const struct afd_entry *)entries, .n_entries = 2,
		.entry_bytes = (uint32_t)bytes, .greedy_ids = ids, .greedy_rows = 2 };
	struct golden golden;
	struct rig rig;

	golden_open(&golden, "bf16-tied");
	rig_open(&rig, &(struct rig_params){ .checkpoint = golden.checkpoint });
	for (uint64_t s = 0; s < 2; s++) {
		const struct afd_entry entry = { .sequence = s, .ids = golden.ids, .n_ids = 1 };

		memcpy(entries + s * bytes, &entry, bytes);
		assert_int_equal(afd_attn_add(rig.attn, s), 0);
	}
	assert_int_equal(rig_step(&rig, &batch), 0);
	assert_true(ids[0] >= 0);
	assert_int_equal(ids[0], ids[1]);
	batch.entry_bytes = (uint32_t)bytes - 1;
	assert_int_equal(afd_attn_begin(rig.attn, &batch), -EINVAL);
	rig_close(&rig);
	golden_close(&golden);
}

static void a_logit_that_is_not_finite_fails_a_step_that_draws(void **state)
{
	struct afd_entry entry = { .sequence = 7, .n_ids = 6, .outputs = AFD_OUTPUT_ALL,
		.sample = &samples[1] };
	int32_t ids[6];
	const struct afd_batch batch = { .size = sizeof(batch), .entries = &entry, .n_entries = 1,
		.entry_bytes = sizeof(entry), .sampled_ids = ids, .sampled_rows = 6 };
	struct golden golden;
	char directory[64];
	struct rig rig;

	golden_open(&golden, "f32-untied");
	golden_patch(&golden, "model.embed_tokens.weight", (uint64_t)golden.ids[4] * 48 + 3, NAN,
		directory);
	rig_open(&rig, &(struct rig_params){ .checkpoint = directory });
	entry.ids = golden.ids;
	assert_int_equal(afd_attn_add(rig.attn, 7), 0);
	assert_int_equal(rig_step(&rig, &batch), -EDOM);
	assert_non_null(strstr(afd_last_error(), "sequence 7, position 4: logit"));
	assert_int_equal(afd_attn_length(rig.attn, 7), 0);
	rig_close(&rig);
	golden_patch_remove(directory);
	golden_close(&golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_step_draws_what_afd_sample_draws_from_its_logits),
		cmocka_unit_test(a_draw_is_the_same_in_any_layout),
		cmocka_unit_test(ranks_of_a_group_draw_the_same_ids),
		cmocka_unit_test(replayed_steps_draw_as_those_that_go_layer_by_layer),
		cmocka_unit_test(bad_values_are_refused_by_name_and_change_nothing),
		cmocka_unit_test(an_older_hosts_batch_is_read_as_before),
		cmocka_unit_test(a_logit_that_is_not_finite_fails_a_step_that_draws),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
