/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps in one piece on the emulated GPU: recorded and replayed they have the bits of steps that go
 * layer by layer, whatever rows come and go; a steady state launches one graph a step and allocates
 * nothing; and what cannot be recorded runs all the same.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/context/core.h"
#include "../support/emulator.h"
#include "../support/rig.h"

enum { N_SEQUENCES = 4, N_STEPS = 14, NO_GRAPHS = -1 };

struct run {
	struct golden golden;
	struct rig rig;
	float *logits; /* [n_outputs][vocab], of all steps */
	uint32_t n_outputs;
};

static void open_run(struct run *run, const char *name, int graphs)
{
	struct rig_params params = { .wire_dtype = AFD_DTYPE_BF16,
		.attn = { .graphs = (uint32_t)graphs, .page_size = 4, .max_outputs = 200 } };

	golden_open(&run->golden, name);
	params.checkpoint = run->golden.checkpoint;
	rig_open(&run->rig, &params);
	run->logits = calloc(1024 * (size_t)run->rig.vocab, sizeof(float));
	run->n_outputs = 0;
	assert_non_null(run->logits);
}

static void close_run(struct run *run)
{
	rig_close(&run->rig);
	golden_close(&run->golden);
}

/* One id for each of sequences from .. end - 1. */
static void step(struct run *run, uint64_t from, uint64_t end, uint32_t number)
{
	struct afd_entry entries[N_SEQUENCES] = { 0 };
	int32_t ids[N_SEQUENCES];
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = (uint32_t)(end - from),
		.entry_bytes = sizeof(*entries),
		.logits = run->logits + (size_t)run->n_outputs * run->rig.vocab,
		.logits_rows = N_SEQUENCES };

	for (uint64_t s = from; s < end; s++) {
		ids[s - from] = (int32_t)((7 * number + 3 * s) % run->rig.vocab);
		entries[s - from] = (struct afd_entry){ .sequence = s,
			.ids = &ids[s - from],
			.n_ids = 1 };
	}
	if (rig_step(&run->rig, &batch))
		fail_msg("step %u: %s", number, afd_last_error());
	run->n_outputs += batch.n_entries;
}

/* Sequences of unequal length, one of them a fork that shares a page; rows come and go. */
static void decode(struct run *run)
{
	uint32_t i;

	for (uint64_t s = 0; s + 1 < N_SEQUENCES; s++) {
		assert_int_equal(afd_attn_add(run->rig.attn, s), 0);
		rig_append(&run->rig, s, run->golden.ids, 1 + 2 * (uint32_t)s, NULL);
	}
	assert_int_equal(afd_attn_fork(run->rig.attn, 2, 3, 3), 0);
	for (i = 0; i < N_STEPS; i++)
		step(run, 0, i % 5 == 4 ? 2 : N_SEQUENCES, i);
	assert_int_equal(afd_attn_drop(run->rig.attn, 0), 0);
	for (i = 0; i < N_STEPS; i++)
		step(run, 1, N_SEQUENCES - i % 2, i + 40);
}

static void expect_same(const struct run *a, const struct run *b, const char *name)
{
	assert_int_equal(a->n_outputs, b->n_outputs);
	for (uint32_t i = 0; i < a->n_outputs; i++) {
		size_t at = (size_t)i * a->rig.vocab;

		if (memcmp(a->logits + at, b->logits + at, a->rig.vocab * sizeof(float)))
			fail_msg("%s: output %u has other bits", name, i);
	}
}

static void compare(const char *name, int graphs, unsigned least_replays)
{
	struct run eager, graph;
	struct emulator e;
	unsigned n_replays;

	open_run(&eager, name, NO_GRAPHS);
	emulator_open(&e);
	n_replays = e.n_replays();
	decode(&eager);
	assert_int_equal(e.n_replays(), n_replays);
	open_run(&graph, name, graphs);
	decode(&graph);
	assert_true(e.n_replays() - n_replays >= least_replays);
	expect_same(&eager, &graph, name);
	free(eager.logits);
	free(graph.logits);
	close_run(&eager);
	close_run(&graph);
}

static void replayed_steps_have_the_bits_of_those_that_go_layer_by_layer(void **state)
{
	static const char *const names[] = { "bf16-tied", "window-layer-types", "moe-bf16",
		"tiny-afmoe", "fp8-bf16" };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		compare(names[i], 0, N_STEPS);
}

static void more_shapes_than_are_kept_take_turns(void **state)
{
	compare("bf16-tied", 1, 3);
}

/* More outputs than the head takes at once: its chunks follow the layers. */
static void many_outputs_of_a_step_follow_its_layers(void **state)
{
	enum { N = 70 };
	struct run runs[2];
	int32_t ids[N];

	for (int i = 0; i < N; i++)
		ids[i] = i % 11;
	for (int k = 0; k < 2; k++) {
		open_run(&runs[k], "bf16-tied", k ? 0 : NO_GRAPHS);
		for (uint64_t s = 0; s < 3; s++) {
			assert_int_equal(afd_attn_add(runs[k].rig.attn, s), 0);
			rig_append(&runs[k].rig, s, ids, N,
				runs[k].logits + s * N * runs[k].rig.vocab);
		}
		runs[k].n_outputs = 3 * N;
	}
	expect_same(&runs[0], &runs[1], "bf16-tied");
	for (int k = 0; k < 2; k++) {
		free(runs[k].logits);
		close_run(&runs[k]);
	}
}

static void a_steady_state_replays_one_graph_a_step_and_allocates_nothing(void **state)
{
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	struct emulator e;
	struct run run;
	unsigned n_module, n_replays, n_launches;
	uint64_t n_library, n_passes;

	open_run(&run, "bf16-tied", 0);
	emulator_open(&e);
	for (uint64_t s = 0; s < N_SEQUENCES; s++)
		assert_int_equal(afd_attn_add(run.rig.attn, s), 0);
	for (uint32_t i = 0; i < 3; i++)
		step(&run, 0, N_SEQUENCES, i);
	n_module = e.n_allocations();
	n_library = atomic_load(&run.rig.ctx->n_allocations);
	n_replays = e.n_replays();
	n_launches = e.n_launches();
	assert_int_equal(afd_ffn_stats(run.rig.ffn, &stats), 0);
	n_passes = stats.n_passes;
	for (uint32_t i = 0; i < 20; i++)
		step(&run, 0, N_SEQUENCES, i);
	assert_int_equal(e.n_allocations(), n_module);
	assert_int_equal(atomic_load(&run.rig.ctx->n_allocations), n_library);
	assert_int_equal(e.n_replays(), n_replays + 20);
	/* The ticket's mark alone. */
	assert_int_equal(e.n_launches(), n_launches + 20);
	assert_int_equal(afd_ffn_stats(run.rig.ffn, &stats), 0);
	assert_int_equal(stats.n_passes - n_passes, 20 * run.rig.n_layers);
	free(run.logits);
	close_run(&run);
}

static void count_lines(void *user, int32_t level, const char *text)
{
	*(int *)user += strstr(text, "runs without a graph") != NULL;
}

static void decode_with_fault(const char *fault, struct run *run, int *n_told)
{
	struct rig_params params = { .wire_dtype = AFD_DTYPE_BF16,
		.log = { .write = count_lines, .user = n_told },
		.attn = { .page_size = 4, .max_outputs = 200 } };

	setenv("AFD_EMU_FAULT", fault, 1);
	golden_open(&run->golden, "bf16-tied");
	params.checkpoint = run->golden.checkpoint;
	rig_open(&run->rig, &params);
	run->logits = calloc(1024 * (size_t)run->rig.vocab, sizeof(float));
	run->n_outputs = 0;
	decode(run);
	unsetenv("AFD_EMU_FAULT");
}

static void a_shape_that_cannot_be_recorded_runs_as_it_is_and_that_is_told_once(void **state)
{
	static const char *const faults[] = { "capture:1", "graph:1" };
	struct run eager, faulty;

	open_run(&eager, "bf16-tied", NO_GRAPHS);
	decode(&eager);
	for (size_t i = 0; i < 2; i++) {
		int n_told = 0;

		decode_with_fault(faults[i], &faulty, &n_told);
		assert_int_equal(n_told, 1);
		expect_same(&eager, &faulty, faults[i]);
		free(faulty.logits);
		close_run(&faulty);
	}
	free(eager.logits);
	close_run(&eager);
}

static void a_cancelled_replay_leaves_no_trace(void **state)
{
	struct afd_entry entry = { .sequence = 0, .ids = &(int32_t){ 5 }, .n_ids = 1 };
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry),
		.logits_rows = 1 };
	struct run run;

	open_run(&run, "bf16-tied", 0);
	assert_int_equal(afd_attn_add(run.rig.attn, 0), 0);
	for (uint32_t i = 0; i < 4; i++)
		step(&run, 0, 1, i);
	batch.logits = run.logits + 900 * (size_t)run.rig.vocab;
	assert_int_equal(afd_attn_begin(run.rig.attn, &batch), 0);
	assert_int_equal(afd_attn_poll(run.rig.attn), 0);
	assert_int_equal(afd_attn_cancel(run.rig.attn), 0);
	assert_int_equal(afd_attn_length(run.rig.attn, 0), 4);
	assert_int_equal(rig_step(&run.rig, &batch), 0);
	assert_int_equal(afd_attn_length(run.rig.attn, 0), 5);
	free(run.logits);
	close_run(&run);
}

/* As docs/cuda.md has it. Those of the step itself are angles, embedding; two gathers, norm, product,
 * argmax; the ticket. */
static void a_step_launches_what_its_layers_need_and_no_conversions(void **state)
{
	static const struct {
		const char *name;
		unsigned n_layers, each;
	} models[] = {
		{ "bf16-tied", 2, 9 },
		{ "fp8-bf16", 1, 10 },
		{ "moe-bf16", 2, 15 },
	};
	enum { STEP = 8 };

	for (size_t i = 0; i < sizeof(models) / sizeof(models[0]); i++) {
		struct emulator e;
		struct run run;
		unsigned n_launches;

		open_run(&run, models[i].name, 0);
		emulator_open(&e);
		for (uint64_t s = 0; s < N_SEQUENCES; s++)
			assert_int_equal(afd_attn_add(run.rig.attn, s), 0);
		n_launches = e.n_launches();
		step(&run, 0, N_SEQUENCES, 0);
		n_launches = e.n_launches() - n_launches;
		if (n_launches != STEP + models[i].n_layers * models[i].each)
			fail_msg("%s: %u launches", models[i].name, n_launches);
		free(run.logits);
		close_run(&run);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_step_launches_what_its_layers_need_and_no_conversions),
		cmocka_unit_test(replayed_steps_have_the_bits_of_those_that_go_layer_by_layer),
		cmocka_unit_test(more_shapes_than_are_kept_take_turns),
		cmocka_unit_test(many_outputs_of_a_step_follow_its_layers),
		cmocka_unit_test(a_steady_state_replays_one_graph_a_step_and_allocates_nothing),
		cmocka_unit_test(
			a_shape_that_cannot_be_recorded_runs_as_it_is_and_that_is_told_once),
		cmocka_unit_test(a_cancelled_replay_leaves_no_trace),
	};

	if (getenv("AFD_TEST_ONLY")) /* a name, with * and ? */
		cmocka_set_test_filter(getenv("AFD_TEST_ONLY"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
