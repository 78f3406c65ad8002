/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps whose rows cross to FFN peers, on the emulated GPU: what lies between two crossings is
 * recorded and replayed on both sides, with the bits of plain launches, whatever rows come and go;
 * a steady state allocates nothing; and what cannot be recorded runs all the same.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/context/core.h"
#include "../support/emulator.h"
#include "../support/ranks.h"

enum { N_SEQUENCES = 4, N_STEPS = 8 };

/* Logits of all outputs [n][vocab]. */
struct outputs {
	float *logits;
	uint32_t n;
};

struct layout {
	const char *name, *checkpoint;
	struct rig_params params;
};

/* ids [N_SEQUENCES] for sequences from .. end - 1 of a step with this number. */
static uint32_t fill(struct afd_entry *entries, int32_t *ids, uint64_t from, uint64_t end,
	uint32_t number, uint32_t vocab)
{
	for (uint64_t s = from; s < end; s++) {
		ids[s - from] = (int32_t)((7 * number + 3 * s) % vocab);
		entries[s - from] = (struct afd_entry){ .sequence = s,
			.ids = &ids[s - from],
			.n_ids = 1 };
	}
	return (uint32_t)(end - from);
}

static void step(struct rig *rig, struct outputs *out, uint64_t from, uint64_t end, uint32_t number)
{
	struct afd_entry entries[N_SEQUENCES] = { 0 };
	int32_t ids[N_SEQUENCES];
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.entry_bytes = sizeof(*entries),
		.logits = out->logits + (size_t)out->n * rig->vocab,
		.logits_rows = N_SEQUENCES };

	batch.n_entries = fill(entries, ids, from, end, number, rig->vocab);
	if (rig_step(rig, &batch))
		fail_msg("step %u: %s", number, afd_last_error());
	out->n += batch.n_entries;
}

static struct outputs new_outputs(uint32_t vocab)
{
	struct outputs out = { calloc(256 * (size_t)vocab, sizeof(float)), 0 };

	assert_non_null(out.logits);
	return out;
}

/* Prompts of unequal length, then steps whose rows come and go. */
static void decode(struct rig *rig, const struct golden *golden, struct outputs *out)
{
	for (uint64_t s = 0; s < N_SEQUENCES; s++) {
		assert_int_equal(afd_attn_add(rig->attn, s), 0);
		rig_append(rig, s, golden->ids, 1 + 2 * (uint32_t)s, NULL);
	}
	for (uint32_t i = 0; i < N_STEPS; i++)
		step(rig, out, 0, i % 3 == 2 ? 2 : N_SEQUENCES, i);
	assert_int_equal(afd_attn_drop(rig->attn, 0), 0);
	for (uint32_t i = 0; i < N_STEPS; i++)
		step(rig, out, 1, N_SEQUENCES - i % 2, i + 40);
}

static struct outputs run(const struct layout *layout, uint32_t graphs)
{
	struct rig_params params = layout->params;
	struct golden golden;
	struct outputs out;
	struct rig rig;

	golden_open(&golden, layout->checkpoint);
	params.checkpoint = golden.checkpoint;
	params.attn.graphs = graphs;
	params.attn.page_size = 4;
	rig_open(&rig, &params);
	out = new_outputs(rig.vocab);
	decode(&rig, &golden, &out);
	out.logits = realloc(out.logits, (size_t)out.n * rig.vocab * sizeof(float));
	out.n *= rig.vocab;
	rig_close(&rig);
	golden_close(&golden);
	return out;
}

static void compare(const struct layout *layout, uint32_t graphs, unsigned least_replays)
{
	struct outputs plain = run(layout, UINT32_MAX), replayed;
	struct emulator e;
	unsigned n_replays;

	emulator_open(&e);
	n_replays = e.n_replays();
	replayed = run(layout, graphs);
	if (e.n_replays() - n_replays < least_replays)
		fail_msg("%s: %u replays, expected %u", layout->name, e.n_replays() - n_replays,
			least_replays);
	assert_int_equal(plain.n, replayed.n);
	if (memcmp(plain.logits, replayed.logits, plain.n * sizeof(float)))
		fail_msg("%s: replays have other bits", layout->name);
	free(plain.logits);
	free(replayed.logits);
}

static void replayed_pieces_have_the_bits_of_plain_launches(void **state)
{
	static const struct layout layouts[] = {
		{ "two lanes", "bf16-tied", { .address = "loop:pieces", .lanes = 2 } },
		{ "routed by attention", "moe-bf16",
			{ .address = "loop:pieces", .gate = AFD_GATE_ATTENTION } },
		{ "routed by two FFN shards", "tiny-afmoe",
			{ .address = "shm:pieces", .gate = AFD_GATE_FFN, .n_ep = 2, .lanes = 2 } },
		{ "windows, parts of two rows", "window-layer-types",
			{ .address = "shm:pieces", .max_part_rows = 2 } },
	};

	for (size_t i = 0; i < sizeof(layouts) / sizeof(*layouts); i++)
		compare(&layouts[i], 0, 4 * N_STEPS);
}

static void more_pieces_than_are_kept_take_turns(void **state)
{
	const struct layout layout = { "one shape", "bf16-tied",
		{ .address = "loop:pieces", .lanes = 2 } };

	compare(&layout, 1, 2);
}

static float *decode_in_group(const struct golden *golden, uint32_t graphs)
{
	struct ranks_params params = { .n_ranks = 2, .n_shards = 1, .gate = AFD_GATE_ATTENTION,
		.checkpoint = golden->checkpoint,
		.attn = { .graphs = graphs, .max_outputs = 2048, .deterministic = 1 } };
	size_t n = (size_t)golden->n_positions * golden->vocab;
	float *logits[2] = { calloc(n, sizeof(float)), calloc(n, sizeof(float)) };
	struct ranks ranks;

	ranks_open(&ranks, &params);
	ranks_decode(&ranks, golden, 0, logits);
	ranks_close(&ranks);
	assert_memory_equal(logits[0], logits[1], n * sizeof(float));
	free(logits[1]);
	return logits[0];
}

static void ranks_of_a_group_replay_with_the_same_bits(void **state)
{
	struct golden golden;
	struct emulator e;
	unsigned n_replays;
	float *plain, *replayed;

	golden_open(&golden, "moe-f32");
	plain = decode_in_group(&golden, UINT32_MAX);
	emulator_open(&e);
	n_replays = e.n_replays();
	replayed = decode_in_group(&golden, 0);
	assert_true(e.n_replays() - n_replays >= 4 * (golden.n_generated - 4));
	assert_memory_equal(plain, replayed,
		(size_t)golden.n_positions * golden.vocab * sizeof(float));
	free(plain);
	free(replayed);
	golden_close(&golden);
}

static void open_pair(struct rig *rig, struct golden *golden, uint32_t lanes, struct afd_log log)
{
	struct rig_params params = { .address = "loop:pieces", .lanes = lanes, .log = log };

	golden_open(golden, "bf16-tied");
	params.checkpoint = golden->checkpoint;
	rig_open(rig, &params);
	for (uint64_t s = 0; s < N_SEQUENCES; s++)
		assert_int_equal(afd_attn_add(rig->attn, s), 0);
}

static void a_steady_state_replays_each_piece_and_allocates_nothing(void **state)
{
	struct emulator e;
	struct golden golden;
	struct outputs out;
	struct rig rig;
	unsigned n_module, n_replays;
	uint64_t n_library;

	open_pair(&rig, &golden, 1, (struct afd_log){ 0 });
	out = new_outputs(rig.vocab);
	emulator_open(&e);
	for (uint32_t i = 0; i < 3; i++)
		step(&rig, &out, 0, N_SEQUENCES, i);
	n_module = e.n_allocations();
	n_library = atomic_load(&rig.ctx->n_allocations);
	n_replays = e.n_replays();
	for (uint32_t i = 0; i < 10; i++)
		step(&rig, &out, 0, N_SEQUENCES, i);
	assert_int_equal(e.n_allocations(), n_module);
	assert_int_equal(atomic_load(&rig.ctx->n_allocations), n_library);
	/* Embedding and head; of each layer attention, and the FFN's pass. */
	assert_int_equal(e.n_replays() - n_replays, 10 * (2 + 2 * rig.n_layers));
	free(out.logits);
	rig_close(&rig);
	golden_close(&golden);
}

/* Of two runs, which end here. */
static void same_bits(struct outputs out[2], uint32_t vocab)
{
	assert_int_equal(out[0].n, out[1].n);
	assert_memory_equal(
		out[0].logits, out[1].logits, (size_t)out[0].n * vocab * sizeof(float));
	free(out[0].logits);
	free(out[1].logits);
}

static void count_lines(void *user, int32_t level, const char *text)
{
	*(int *)user += strstr(text, "runs without a graph") != NULL;
}

static void pieces_that_cannot_be_recorded_run_as_they_are(void **state)
{
	struct golden golden;
	struct outputs out[2];
	struct rig rig;
	int n_told = 0;

	for (int k = 0; k < 2; k++) {
		if (k)
			setenv("AFD_EMU_FAULT", "capture:3", 1);
		open_pair(&rig, &golden, 1, (struct afd_log){ .write = count_lines, .user = &n_told });
		out[k] = new_outputs(rig.vocab);
		for (uint32_t i = 0; i < 5; i++)
			step(&rig, &out[k], 0, N_SEQUENCES, i);
		unsetenv("AFD_EMU_FAULT");
		assert_int_equal(n_told, k);
		rig_close(&rig);
		golden_close(&golden);
	}
	same_bits(out, golden.vocab);
}

/* Begins step 4 again and again, and gives it up after ever more turns. */
static void begin_and_cancel(struct rig *rig, float *logits)
{
	struct afd_entry entries[N_SEQUENCES] = { 0 };
	int32_t ids[N_SEQUENCES];
	struct afd_batch batch = { .size = sizeof(batch), .entries = entries,
		.entry_bytes = sizeof(*entries), .logits = logits, .logits_rows = N_SEQUENCES };

	batch.n_entries = fill(entries, ids, 0, N_SEQUENCES, 4, rig->vocab);
	for (int n_turns = 1; n_turns < 8; n_turns++) {
		assert_int_equal(afd_attn_begin(rig->attn, &batch), 0);
		for (int i = 0; i < n_turns; i++)
			assert_int_equal(rig_turn(rig), 0);
		assert_int_equal(afd_attn_cancel(rig->attn), 0);
		assert_int_equal(afd_attn_length(rig->attn, 0), 4);
	}
}

static void a_step_cancelled_between_replays_leaves_no_trace(void **state)
{
	struct outputs out[2];
	struct golden golden;
	struct rig rig;

	for (int k = 0; k < 2; k++) {
		open_pair(&rig, &golden, 2, (struct afd_log){ 0 });
		out[k] = new_outputs(rig.vocab);
		for (uint32_t i = 0; i < 5; i++) {
			if (k && i == 4)
				begin_and_cancel(&rig, out[k].logits + out[k].n * rig.vocab);
			step(&rig, &out[k], 0, N_SEQUENCES, i);
		}
		rig_close(&rig);
		golden_close(&golden);
	}
	same_bits(out, golden.vocab);
}

static void a_number_of_graphs_out_of_range_is_refused_by_name(void **state)
{
	struct afd_ffn_params params = { .size = sizeof(params), .graphs = 1025 };
	struct golden golden;
	struct rig rig;
	afd_ffn *ffn = NULL;

	open_pair(&rig, &golden, 1, (struct afd_log){ 0 });
	assert_int_equal(afd_ffn_create(&ffn, rig.model, NULL, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "ffn: graphs is 1025, limit 1024"));
	params.graphs = 0;
	params._pad = 1;
	assert_int_equal(afd_ffn_create(&ffn, rig.model, NULL, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "_pad is 1"));
	assert_null(ffn);
	rig_close(&rig);
	golden_close(&golden);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(replayed_pieces_have_the_bits_of_plain_launches),
		cmocka_unit_test(more_pieces_than_are_kept_take_turns),
		cmocka_unit_test(ranks_of_a_group_replay_with_the_same_bits),
		cmocka_unit_test(a_steady_state_replays_each_piece_and_allocates_nothing),
		cmocka_unit_test(pieces_that_cannot_be_recorded_run_as_they_are),
		cmocka_unit_test(a_step_cancelled_between_replays_leaves_no_trace),
		cmocka_unit_test(a_number_of_graphs_out_of_range_is_refused_by_name),
	};

	if (getenv("AFD_TEST_ONLY")) /* a name, with * and ? */
		cmocka_set_test_filter(getenv("AFD_TEST_ONLY"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
