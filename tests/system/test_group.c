/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention groups: ranks that hold the heads of one model agree with a process that holds all of
 * them, have the same bits among each other, and give bits that depend on nothing but the shards.
 * What a rank holds is what was foretold, and an FFN sees each row once.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../support/batches.h"
#include "../support/ranks.h"

static const double LIMIT = 1e-10;

struct logits {
	float *of[RANKS_MAX]; /* [n] */
	size_t n;
};

static struct logits new_logits(uint32_t n_ranks, size_t n)
{
	struct logits l = { .n = n };
	uint32_t i;

	for (i = 0; i < n_ranks; i++) {
		l.of[i] = calloc(n, sizeof(float));
		assert_non_null(l.of[i]);
	}
	return l;
}

static void free_logits(struct logits *l)
{
	uint32_t i;

	for (i = 0; i < RANKS_MAX; i++)
		free(l->of[i]);
}

static void expect_same_bits(const float *a, const float *b, size_t n, const char *what)
{
	if (memcmp(a, b, n * sizeof(*a)))
		fail_msg("%s: other bits", what);
}

/* Rank 0's, after a look at the others'; to be freed. */
static float *take_first(struct logits *l, uint32_t n_ranks)
{
	float *first = l->of[0];
	uint32_t i;

	for (i = 1; i < n_ranks; i++)
		expect_same_bits(l->of[i], first, l->n, "a rank and rank 0");
	l->of[0] = NULL;
	free_logits(l);
	return first;
}

static float *decode(const struct golden *golden, struct ranks_params p, uint32_t chunk)
{
	struct logits l = new_logits(p.n_ranks, (size_t)golden->n_positions * golden->vocab);
	struct ranks ranks;

	p.checkpoint = golden->checkpoint;
	p.attn.max_outputs = 2048;
	ranks_open(&ranks, &p);
	ranks_decode(&ranks, golden, chunk, l.of);
	ranks_close(&ranks);
	return take_first(&l, p.n_ranks);
}

static float *decode_alone(const struct golden *golden)
{
	const struct rig_params p = { .attn.max_outputs = 2048 };

	return rig_run(golden, &p, 0);
}

/* ---- the same numbers as one process ---- */

struct agreement {
	const char *name, *golden;
	uint32_t n_ranks;
	int32_t gate;
};

static const struct agreement AGREEMENTS[] = {
	{ "two ranks", "f32-tied", 2, 0 },
	{ "more ranks than KV heads, of which one has two ranks", "f32-tied", 3, 0 },
	{ "biases", "bias-f32", 2, 0 },
	{ "biases, unequal ranks", "bias-f32", 4, 0 },
	{ "one KV head, copied", "kv-heads-one", 2, 0 },
	{ "one KV head, copied unequally", "kv-heads-one", 4, 0 },
	{ "no groups of heads, unequal ranks", "kv-heads-all", 4, 0 },
	{ "output gate", "afmoe-f32", 2, 0 },
	{ "output gate, a head each", "afmoe-f32", 4, 0 },
	{ "output gate and routing here", "afmoe-f32", 2, AFD_GATE_ATTENTION },
	{ "output gate and biases", "afmoe-attention-bias", 4, 0 },
	{ "e4m3 weights", "fp8-f32", 2, 0 },
	{ "e4m3 weights, a head each", "fp8-f32", 4, 0 },
	{ "e4m3 weights, heads across blocks", "fp8-ragged", 2, 0 },
	{ "e4m3 weights, unequal ranks across blocks", "fp8-ragged", 4, 0 },
	{ "experts", "moe-f32", 2, 0 },
	{ "experts, a head each", "moe-f32", 4, 0 },
	{ "experts, routing here", "moe-f32", 2, AFD_GATE_ATTENTION },
};

static void ranks_agree_with_one_process(void **state)
{
	const struct agreement *a = *state;
	struct ranks_params p = { .n_ranks = a->n_ranks, .gate = a->gate };
	struct golden golden;
	float *alone;

	golden_open(&golden, a->golden);
	alone = decode_alone(&golden);
	for (p.n_shards = 0; p.n_shards <= RANKS_SHARDS_MAX; p.n_shards++) {
		float *logits = decode(&golden, p, 0);
		double error = nmse(logits, alone, (uint64_t)golden.n_positions * golden.vocab);

		if (!(error <= LIMIT))
			fail_msg("%s, %u shards of the FFN: NMSE %g, limit %g", a->name, p.n_shards,
				error, LIMIT);
		free(logits);
	}
	free(alone);
	golden_close(&golden);
}

/* ---- bits depend on the shards alone ---- */

static const char *const CASES[] = { "f32-tied", "afmoe-f32", "fp8-ragged", "odd-bf16" };
enum { N_CASES = sizeof(CASES) / sizeof(*CASES) };

/* bf16 on the wire and in the cache, where rounding would show what was used before it. */
static struct ranks_params narrow(struct ranks_params p)
{
	p.wire_dtype = AFD_DTYPE_BF16;
	p.attn.kv_dtype = AFD_DTYPE_BF16;
	return p;
}

/* A group decodes each case under `a` and under `b`. */
static void compare(struct ranks_params a, struct ranks_params b, uint32_t chunk)
{
	uint32_t i;

	for (i = 0; i < N_CASES; i++) {
		struct golden golden;
		float *one, *other;

		golden_open(&golden, CASES[i]);
		one = decode(&golden, narrow(a), 0);
		other = decode(&golden, narrow(b), chunk);
		expect_same_bits(
			one, other, (size_t)golden.n_positions * golden.vocab, CASES[i]);
		free(one);
		free(other);
		golden_close(&golden);
	}
}

static void chunks_parts_and_pages_do_not_change_bits_of_a_group(void **state)
{
	const struct ranks_params a = { .n_ranks = 2, .n_shards = 1 };
	struct ranks_params b = a;

	compare(a, b, 5);
	b.max_part_rows = 3;
	compare(a, b, 0);
	b.attn.page_size = 3;
	compare(a, b, 1);
}

static void transports_do_not_change_bits_of_a_group(void **state)
{
	const struct ranks_params loop = { .n_ranks = 2, .n_shards = 1 };
	struct ranks_params shm = loop;

	shm.scheme = "shm";
	compare(loop, shm, 0);
}

static void devices_do_not_change_bits_of_a_group(void **state)
{
	const struct ranks_params cpu = { .n_ranks = 2, .n_shards = 1, .device = "cpu" };
	struct ranks_params other = cpu;

	other.device = rig_device();
	if (!strcmp(other.device, cpu.device)) {
		print_message("skipped: this run's device is the cpu\n");
		skip();
	}
	compare(cpu, other, 0);
}

static void weights_in_place_agree_with_packed_ones(void **state)
{
	const struct ranks_params p = { .n_ranks = 2, .weights = AFD_WEIGHTS_IN_PLACE };
	struct golden golden;
	float *alone, *logits;

	golden_open(&golden, "bias-f32");
	alone = decode_alone(&golden);
	logits = decode(&golden, p, 0);
	assert_true(nmse(logits, alone, (uint64_t)golden.n_positions * golden.vocab) <= LIMIT);
	free(alone);
	free(logits);
	golden_close(&golden);
}

static void an_ffn_of_the_same_process_gives_the_bits_of_a_peer(void **state)
{
	const struct ranks_params peer = { .n_ranks = 2, .n_shards = 1 }, own = { .n_ranks = 2 };

	compare(peer, own, 0);
}

/* Five sequences in three steps; to be freed. */
static float *run_batches(const struct golden *golden, struct ranks_params p)
{
	struct logits l = new_logits(p.n_ranks, (size_t)BATCHES_ROWS * golden->vocab);
	struct ranks ranks;
	uint32_t step, s, i, n, done = 0;

	p.checkpoint = golden->checkpoint;
	ranks_open(&ranks, &p);
	for (s = 0; s < BATCHES_SEQUENCES; s++)
		ranks_add(&ranks, s);
	for (step = 0; step < BATCHES_STEPS; step++, done += n) {
		struct afd_entry entries[BATCHES_SEQUENCES];
		struct afd_batch batch = { .size = sizeof(batch),
			.entries = entries,
			.n_entries = BATCHES_SEQUENCES,
			.entry_bytes = sizeof(*entries) };
		float *at[RANKS_MAX];

		n = batch.logits_rows = batches_entries(golden, step, 0, BATCHES_SEQUENCES, entries);
		for (i = 0; i < p.n_ranks; i++)
			at[i] = l.of[i] + (size_t)done * golden->vocab;
		ranks_step(&ranks, &batch, at);
	}
	ranks_close(&ranks);
	return take_first(&l, p.n_ranks);
}

static void lanes_do_not_change_bits_of_a_group(void **state)
{
	uint32_t i;

	for (i = 0; i < N_CASES; i++) {
		struct ranks_params p = narrow((struct ranks_params){
			.n_ranks = 2, .n_shards = 2, .lanes = 1, .attn.max_outputs = 64 });
		struct golden golden;
		float *one;

		golden_open(&golden, CASES[i]);
		one = run_batches(&golden, p);
		for (p.lanes = 2; p.lanes <= AFD_MAX_LANES; p.lanes++) {
			float *several = run_batches(&golden, p);

			expect_same_bits(
				one, several, (size_t)BATCHES_ROWS * golden.vocab, CASES[i]);
			free(several);
		}
		free(one);
		golden_close(&golden);
	}
}

/* Each rank routes its share of the rows. */
static void gate_sides_do_not_change_bits_of_a_group(void **state)
{
	static const char *const cases[] = { "moe-f32", "moe-top-one", "afmoe-f32" };
	uint32_t i;

	for (i = 0; i < 12; i++) {
		struct ranks_params p = narrow((struct ranks_params){ .n_ranks = 2 + i / 6,
			.n_shards = 2,
			.by_experts = i / 3 % 2,
			.lanes = 1 + i % 4,
			.max_part_rows = 5,
			.attn.max_outputs = 64 });
		struct golden golden;
		float *here, *there;

		golden_open(&golden, cases[i % 3]);
		p.gate = AFD_GATE_ATTENTION;
		here = run_batches(&golden, p);
		p.gate = AFD_GATE_FFN;
		there = run_batches(&golden, p);
		expect_same_bits(
			here, there, (size_t)BATCHES_ROWS * golden.vocab, cases[i % 3]);
		free(here);
		free(there);
		golden_close(&golden);
	}
}

/* ---- what a rank holds, and sends ---- */

static void check_held(const struct ranks *ranks, uint32_t rank, int32_t gate)
{
	const struct afd_shard_params params = { .size = sizeof(params),
		.role = AFD_ROLE_ATTENTION,
		.gate = gate,
		.shard = { .tp = rank, .n_tp = ranks->n_ranks } };
	struct afd_attn_stats stats = { .size = sizeof(stats) };
	struct afd_role_info info = { .size = sizeof(info) };

	assert_int_equal(afd_model_shard(ranks->model, &params, &info), 0);
	assert_int_equal(afd_attn_stats(ranks->attns[rank], &stats), 0);
	assert_int_equal(stats.stored_bytes, info.bytes);
	assert_true(stats.weight_bytes >= info.bytes);
}

static void a_rank_loads_what_was_foretold(void **state)
{
	uint32_t i, rank;

	for (i = 0; i < sizeof(AGREEMENTS) / sizeof(*AGREEMENTS); i++) {
		struct ranks_params p = { .n_ranks = AGREEMENTS[i].n_ranks,
			.n_shards = 1,
			.gate = AGREEMENTS[i].gate };
		struct golden golden;
		struct ranks ranks;

		golden_open(&golden, AGREEMENTS[i].golden);
		p.checkpoint = golden.checkpoint;
		ranks_open(&ranks, &p);
		for (rank = 0; rank < p.n_ranks; rank++)
			check_held(&ranks, rank, p.gate ? p.gate : AFD_GATE_FFN);
		ranks_close(&ranks);
		golden_close(&golden);
	}
}

/* Of a model whose shapes packing does not pad much. */
static void a_rank_holds_a_hundredth_more_or_less_than_foretold(void **state)
{
	struct ranks_params p = { .n_ranks = 2 };
	struct afd_role_info info = { .size = sizeof(info) };
	struct afd_attn_stats stats = { .size = sizeof(stats) };
	struct ranks ranks;
	char path[512];
	uint32_t i;

	snprintf(path, sizeof(path), "%s/../models/tiny-qwen3", getenv("AFD_TEST_SOURCE"));
	p.checkpoint = path;
	ranks_open(&ranks, &p);
	for (i = 0; i < 2; i++) {
		const struct afd_shard_params shard = { .size = sizeof(shard),
			.role = AFD_ROLE_ATTENTION,
			.shard = { .tp = i, .n_tp = 2 } };

		assert_int_equal(afd_model_shard(ranks.model, &shard, &info), 0);
		assert_int_equal(afd_attn_stats(ranks.attns[i], &stats), 0);
		assert_in_range(stats.weight_bytes, info.bytes * 99 / 100, info.bytes * 101 / 100);
	}
	ranks_close(&ranks);
}

static void a_rank_caches_its_own_heads(void **state)
{
	static const uint32_t wanted[] = { 1, 2, 1, 2 }; /* of six, by four ranks */
	struct ranks_params p = { .n_ranks = 4 };
	struct afd_kv_layout layout = { .size = sizeof(layout) };
	struct golden golden;
	struct ranks ranks;
	uint32_t i;

	golden_open(&golden, "kv-heads-all");
	p.checkpoint = golden.checkpoint;
	ranks_open(&ranks, &p);
	for (i = 0; i < 4; i++) {
		struct afd_attn_params own = { .size = sizeof(own),
			.kv_dtype = AFD_DTYPE_F32,
			.group_index = i,
			.group_size = 4 };

		assert_int_equal(afd_attn_kv_layout(ranks.attns[i], &layout), 0);
		assert_int_equal(layout.n_kv_heads, wanted[i]);
		assert_int_equal(layout.memory_bytes, afd_attn_kv_bytes(ranks.model, &own));
	}
	ranks_close(&ranks);
	golden_close(&golden);
}

static void an_ffn_sees_each_row_once(void **state)
{
	struct ranks_params p = { .n_ranks = 2, .n_shards = 1 };
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	struct logits l;
	struct golden golden;
	struct ranks ranks;

	golden_open(&golden, "f32-tied");
	p.checkpoint = golden.checkpoint;
	l = new_logits(2, (size_t)golden.n_positions * golden.vocab);
	p.attn.max_outputs = 2048;
	ranks_open(&ranks, &p);
	ranks_decode(&ranks, &golden, 0, l.of);
	assert_int_equal(afd_ffn_stats(ranks.ffns[0], &stats), 0);
	assert_int_equal(stats.n_rows, (uint64_t)golden.n_positions * ranks.n_layers);
	ranks_close(&ranks);
	free_logits(&l);
	golden_close(&golden);
}

/* ---- waiting ---- */

/* A handle is polled when its descriptor or its timeout says so, and not else. Returns how many
 * waited in vain. */
static uint32_t turn_of_loop(struct ranks *ranks, int rc[RANKS_MAX])
{
	struct pollfd fds[RANKS_MAX + RANKS_SHARDS_MAX];
	int32_t timeouts[RANKS_MAX + RANKS_SHARDS_MAX], soonest_ms = 10000;
	uint32_t i, n = ranks->n_ranks + ranks->n_shards, k;
	int n_ready;

	for (i = 0; i < n; i++) {
		k = i - ranks->n_ranks;
		fds[i] = (struct pollfd){ i < ranks->n_ranks ? afd_attn_fd(ranks->attns[i])
							     : afd_ffn_fd(ranks->ffns[k]),
			POLLIN, 0 };
		timeouts[i] = i < ranks->n_ranks ? afd_attn_timeout_ms(ranks->attns[i])
						 : afd_ffn_timeout_ms(ranks->ffns[k]);
		if (timeouts[i] >= 0 && timeouts[i] < soonest_ms)
			soonest_ms = timeouts[i];
	}
	n_ready = poll(fds, n, soonest_ms);
	for (i = 0; i < n; i++) {
		if (!fds[i].revents && timeouts[i] != soonest_ms)
			continue;
		if (i >= ranks->n_ranks)
			assert_true(afd_ffn_poll(ranks->ffns[i - ranks->n_ranks]) >= 0);
		else if (afd_attn_busy(ranks->attns[i]))
			rc[i] = afd_attn_poll(ranks->attns[i]);
		else
			assert_true(afd_attn_poll(ranks->attns[i]) >= 0);
	}
	return !n_ready && soonest_ms;
}

static void an_event_loop_needs_only_the_descriptors_of_a_group(void **state)
{
	struct ranks_params p = { .n_ranks = 3, .n_shards = 2, .by_experts = true, .lanes = 2,
		.gate = AFD_GATE_ATTENTION, .max_part_rows = 2 };
	struct afd_entry entries[2] = { { .sequence = 1 }, { .sequence = 2 } };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = 2,
		.entry_bytes = sizeof(*entries) };
	uint32_t step, i, n_vain = 0, n_turns = 0;
	struct golden golden;
	struct ranks ranks;
	int rc[RANKS_MAX];

	golden_open(&golden, "moe-f32");
	p.checkpoint = golden.checkpoint;
	ranks_open(&ranks, &p);
	ranks_add(&ranks, 1);
	ranks_add(&ranks, 2);
	for (step = 0; step < 12; step++) {
		for (i = 0; i < 2; i++) {
			entries[i].ids = golden.ids + i;
			entries[i].n_ids = 1 + (step + i) % 4;
		}
		memset(rc, 0, sizeof(rc));
		for (i = 0; i < 3; i++)
			assert_int_equal(afd_attn_begin(ranks.attns[i], &batch), 0);
		while (!rc[0] || !rc[1] || !rc[2]) {
			n_vain += turn_of_loop(&ranks, rc);
			n_turns++;
		}
		for (i = 0; i < 3; i++)
			assert_int_equal(rc[i], 1);
	}
	/* A signal that got lost makes each of its waits a vain one. */
	assert_true(n_vain * 10 < n_turns);
	ranks_close(&ranks);
	golden_close(&golden);
}

int main(void)
{
	enum { N_AGREEMENTS = sizeof(AGREEMENTS) / sizeof(*AGREEMENTS), N_TESTS = 12 };
	struct CMUnitTest tests[N_AGREEMENTS + N_TESTS] = {
		cmocka_unit_test(chunks_parts_and_pages_do_not_change_bits_of_a_group),
		cmocka_unit_test(transports_do_not_change_bits_of_a_group),
		cmocka_unit_test(devices_do_not_change_bits_of_a_group),
		cmocka_unit_test(weights_in_place_agree_with_packed_ones),
		cmocka_unit_test(an_ffn_of_the_same_process_gives_the_bits_of_a_peer),
		cmocka_unit_test(lanes_do_not_change_bits_of_a_group),
		cmocka_unit_test(gate_sides_do_not_change_bits_of_a_group),
		cmocka_unit_test(a_rank_loads_what_was_foretold),
		cmocka_unit_test(a_rank_holds_a_hundredth_more_or_less_than_foretold),
		cmocka_unit_test(a_rank_caches_its_own_heads),
		cmocka_unit_test(an_ffn_sees_each_row_once),
		cmocka_unit_test(an_event_loop_needs_only_the_descriptors_of_a_group),
	};
	char names[N_AGREEMENTS][128];
	uint32_t i;

	for (i = 0; i < N_AGREEMENTS; i++) {
		snprintf(names[i], sizeof(names[i]), "ranks_agree_with_one_process: %s",
			AGREEMENTS[i].name);
		tests[N_TESTS + i] = (struct CMUnitTest){ .name = names[i],
			.test_func = ranks_agree_with_one_process,
			.initial_state = (void *)&AGREEMENTS[i] };
	}
	return cmocka_run_group_tests(tests, NULL, NULL);
}
