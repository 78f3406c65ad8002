/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate on the attention side: rows go only to the ranks that hold an expert of theirs, and the
 * bits are those of a gate on the FFN side, for any shards, lanes, wire dtypes and parts, with
 * weights packed or in place.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../lib/model/model.h"
#include "../support/batches.h"
#include "ffn_model.h"

enum { MAX_OUTPUTS = 64, MAX_RANKS = 4, POLLS = 60 };

static const struct sharding {
	uint32_t n_tp, n_ep;
} SHARDINGS[] = { { 1, 1 }, { 1, 2 }, { 2, 1 }, { 2, 2 } };
enum { N_SHARDINGS = 4 };

static size_t logits_bytes(const struct golden *golden)
{
	return (size_t)BATCHES_ROWS * golden->vocab * sizeof(float);
}

/* ---- bits ---- */

static void expect_same_bits(const struct golden *golden, struct rig_params params)
{
	struct rig_params whole = {
		.wire_dtype = params.wire_dtype, .y_dtype = params.y_dtype, .weights = params.weights,
		.attn = params.attn
	};
	bool alone = params.n_tp * params.n_ep == 1;
	float *a, *f, *w = batches_run(golden, &whole, true);
	size_t bytes = logits_bytes(golden);

	params.gate = AFD_GATE_ATTENTION;
	a = batches_run(golden, &params, true);
	params.gate = AFD_GATE_FFN;
	f = batches_run(golden, &params, true);
	if (memcmp(a, f, bytes) || (alone && memcmp(a, w, bytes)))
		fail_msg("tp%u ep%u, %u lanes, %s: other bits than %s", params.n_tp, params.n_ep,
			params.lanes, afd_dtype_name(params.wire_dtype),
			memcmp(a, f, bytes) ? "with the gate on the FFN side" : "in one process");
	/* Other shards sum in another order, and rounding on a wire makes more of that. */
	if (params.wire_dtype == AFD_DTYPE_F32)
		assert_true(nmse(a, w, bytes / sizeof(float)) <= 1e-10);
	free(a);
	free(f);
	free(w);
}

static void both_gate_sides_give_the_same_bits(void **state)
{
	struct golden golden;
	char shm[40];
	uint32_t i, lanes;

	snprintf(shm, sizeof(shm), "shm:gate-%d", (int)getpid());
	golden_open(&golden, *state);
	for (i = 0; i < N_SHARDINGS; i++) {
		for (lanes = 1; lanes <= AFD_MAX_LANES; lanes++) {
			struct rig_params params = { .address = lanes % 2 ? "loop:gate" : shm,
				.lanes = lanes,
				.n_tp = SHARDINGS[i].n_tp,
				.n_ep = SHARDINGS[i].n_ep,
				.max_part_rows = lanes < 3 ? 0 : 3,
				.weights = lanes == 2 ? AFD_WEIGHTS_IN_PLACE : 0,
				.attn.max_outputs = MAX_OUTPUTS };

			params.wire_dtype = AFD_DTYPE_F32;
			expect_same_bits(&golden, params);
			params.wire_dtype = lanes % 2 ? AFD_DTYPE_BF16 : AFD_DTYPE_F16;
			expect_same_bits(&golden, params);
			params.wire_dtype = AFD_DTYPE_FP8;
			params.y_dtype = lanes % 2 ? 0 : AFD_DTYPE_BF16;
			expect_same_bits(&golden, params);
			params.y_dtype = 0;
		}
	}
	golden_close(&golden);
}

/* ---- who gets which rows ---- */

/* An FFN of one rank that also counts who would get its rows, by a plain router. */
struct counter {
	afd_ffn *whole;
	const struct afd_model *model;
	uint64_t rows[MAX_RANKS];
	uint32_t n_tp, n_ep;
};

static void score(const struct counter *c, uint32_t layer, const float *x, double *scores)
{
	struct afd__tensor t;
	uint64_t e, i;

	rig_check(afd__model_tensor(c->model, (int32_t)layer, AFD__TENSOR_ROUTER, &t), "router");
	for (e = 0; e < t.shape[0]; e++) {
		scores[e] = 0;
		for (i = 0; i < t.shape[1]; i++)
			scores[e] += (double)x[i] * number_at(t.data, e * t.shape[1] + i, t.dtype);
	}
}

/* A row goes to the ranks whose experts have one of the top_k scores. */
static void count_row(struct counter *c, uint32_t layer, const float *x)
{
	const struct afd__layer *l = &c->model->arch.layers[layer];
	double scores[64];
	uint32_t e, other, rank, ep, better;
	bool chosen[64];

	assert_true(l->n_experts <= 64 && !l->router.bias);
	if (l->ffn_kind == AFD_FFN_MOE && !l->shared_size)
		score(c, layer, x, scores);
	for (e = 0; e < l->n_experts; e++) {
		for (better = other = 0; other < l->n_experts; other++)
			better += scores[other] > scores[e];
		chosen[e] = better < l->top_k;
	}
	for (rank = 0; rank < c->n_tp * c->n_ep; rank++) {
		bool wants = l->ffn_kind != AFD_FFN_MOE || l->shared_size;

		ep = rank / c->n_tp;
		for (e = ep * l->n_experts / c->n_ep; e < (ep + 1) * l->n_experts / c->n_ep; e++)
			wants |= chosen[e];
		c->rows[rank] += wants;
	}
}

static int count_pass(void *user, const struct afd_ffn_pass *pass)
{
	struct counter *c = user;
	uint32_t i;
	const struct afd_ffn_rows rows = { .size = sizeof(rows),
		.layer = pass->layer,
		.n_rows = pass->n_rows,
		.x = pass->x,
		.y = pass->y };

	for (i = 0; i < pass->n_rows; i++)
		count_row(c, (uint32_t)pass->layer,
			pass->x + (size_t)i * c->model->arch.hidden_size);
	return afd_ffn_forward(c->whole, &rows);
}

static void count_rows(const struct golden *golden, struct counter *c)
{
	const struct afd_ffn_params ffn = { .size = sizeof(ffn) };
	const struct rig_params params = { .checkpoint = golden->checkpoint,
		.address = "loop:count",
		.gate = AFD_GATE_FFN,
		.compute = count_pass,
		.compute_user = c,
		.attn.max_outputs = MAX_OUTPUTS };
	float *logits = malloc(logits_bytes(golden));
	struct rig rig;

	rig_open(&rig, &params);
	c->model = rig.model;
	rig_check(afd_ffn_create(&c->whole, rig.model, NULL, &ffn), "ffn");
	batches_run_on(&rig, golden, true, logits);
	afd_ffn_destroy(c->whole);
	rig_close(&rig);
	free(logits);
}

static uint64_t rows_sent(const struct rig *rig, uint32_t rank)
{
	struct afd_peer_info peer = { .size = sizeof(peer) };

	/* The rig connects in the order of ranks. */
	assert_int_equal(afd_transport_peer(rig->attn_net, rank, &peer), 0);
	assert_int_equal(peer.rank, rank);
	return peer.n_rows;
}

static void expect_metric(const struct rig *rig, uint32_t rank, uint64_t rows)
{
	static char text[1 << 18];
	char line[120], suffix[4] = "";

	if (rank)
		snprintf(suffix, sizeof(suffix), "-%u", rank);
	snprintf(line, sizeof(line), "\nafd_transport_rows_total{peer=\"loop:rows%s\"} %llu\n", suffix,
		(unsigned long long)rows);
	assert_true(afd_context_metrics(rig->ctx, text, sizeof(text)) < (int)sizeof(text));
	if (!strstr(text, line))
		fail_msg("no line %s", line);
}

static void expect_counted_rows(const struct golden *golden, uint32_t n_tp, uint32_t n_ep)
{
	struct counter counter = { .n_tp = n_tp, .n_ep = n_ep };
	const struct rig_params params = { .checkpoint = golden->checkpoint,
		.address = "loop:rows",
		.n_tp = n_tp,
		.n_ep = n_ep,
		.lanes = 2,
		.max_part_rows = 4,
		.attn.max_outputs = MAX_OUTPUTS };
	float *logits = malloc(logits_bytes(golden));
	struct rig rig;
	uint32_t rank;

	count_rows(golden, &counter);
	rig_open(&rig, &params);
	batches_run_on(&rig, golden, true, logits);
	for (rank = 0; rank < n_tp * n_ep; rank++) {
		struct afd_ffn_stats stats = { .size = sizeof(stats) };

		assert_int_equal(rows_sent(&rig, rank), counter.rows[rank]);
		expect_metric(&rig, rank, counter.rows[rank]);
		rig_check(afd_ffn_stats(rank ? rig.others[rank - 1].ffn : rig.ffn, &stats),
			"stats");
		assert_int_equal(stats.n_rows, counter.rows[rank]);
	}
	rig_close(&rig);
	free(logits);
}

static void rows_of_each_rank_are_those_that_a_plain_router_counts(void **state)
{
	static const char *const cases[] = { "moe-f32", "moe-top-one", "moe-sparse-step" };
	struct golden golden;
	uint32_t i;

	for (i = 0; i < 3; i++) {
		golden_open(&golden, cases[i]);
		expect_counted_rows(&golden, 1, 2);
		expect_counted_rows(&golden, 1, 4);
		expect_counted_rows(&golden, 2, 1);
		expect_counted_rows(&golden, 2, 2);
		golden_close(&golden);
	}
}

/* ---- one rig for the rest ---- */

struct bench {
	struct golden golden;
	struct rig rig;
};

static int open_bench(void **state, const char *name, const struct rig_params *params)
{
	struct bench *b = calloc(1, sizeof(*b));
	struct rig_params p = *params;

	assert_non_null(b);
	golden_open(&b->golden, name);
	p.checkpoint = b->golden.checkpoint;
	p.attn.max_outputs = MAX_OUTPUTS;
	rig_open(&b->rig, &p);
	*state = b;
	return 0;
}

static int two_ranks(void **state)
{
	const struct rig_params params = {
		.address = "loop:ranks", .n_ep = 2, .lanes = 2, .gate = AFD_GATE_ATTENTION
	};

	return open_bench(state, "moe-f32", &params);
}

static int two_ranks_one_expert(void **state)
{
	const struct rig_params params = { .address = "loop:ranks", .n_ep = 2 };

	return open_bench(state, "moe-top-one", &params);
}

static int tear_down(void **state)
{
	struct bench *b = *state;

	rig_close(&b->rig);
	golden_close(&b->golden);
	free(b);
	return 0;
}

static void a_rank_that_no_row_wants_gets_no_part(void **state)
{
	struct bench *b = *state;
	struct afd_peer_info peers[2] = { { .size = sizeof(*peers) }, { .size = sizeof(*peers) } };
	uint32_t n, i;

	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	for (n = 1; n <= 12; n++) {
		rig_append(&b->rig, 1, b->golden.ids + n, 1, NULL);
		for (i = 0; i < 2; i++)
			assert_int_equal(afd_transport_peer(b->rig.attn_net, i, &peers[i]), 0);
		assert_int_equal(peers[0].n_parts + peers[1].n_parts, n * b->rig.n_layers);
	}
	assert_true(peers[0].n_parts && peers[1].n_parts);
}

/* ---- a step that ends early ---- */

static void a_step_cancelled_while_it_routes_can_be_repeated_with_the_same_bits(void **state)
{
	struct bench *b = *state;
	const struct rig_params params = { .address = "loop:twin",
		.n_ep = 2,
		.gate = AFD_GATE_FFN,
		.attn.max_outputs = MAX_OUTPUTS };
	float *reference = batches_run(&b->golden, &params, true);
	float *repeated = malloc(logits_bytes(&b->golden));
	const struct afd_entry entry = { .sequence = 99, .ids = b->golden.ids, .n_ids = 5 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	uint32_t polls, i;

	assert_int_equal(afd_attn_add(b->rig.attn, 99), 0);
	for (polls = 0; polls < POLLS; polls++) {
		int rc = 0;

		assert_int_equal(afd_attn_begin(b->rig.attn, &batch), 0);
		for (i = 0; i < polls && !rc; i++)
			rig_check(rc = rig_turn(&b->rig), "turn");
		assert_int_equal(afd_attn_cancel(b->rig.attn), 0);
		assert_int_equal(afd_attn_truncate(b->rig.attn, 99, 0), 0);
	}
	batches_run_on(&b->rig, &b->golden, true, repeated);
	assert_memory_equal(repeated, reference, logits_bytes(&b->golden));
	free(reference);
	free(repeated);
}

static void lose_rank_one(struct rig *rig)
{
	afd_ffn_destroy(rig->others[0].ffn);
	afd_transport_destroy(rig->others[0].net);
	rig->others[0] = (struct rig_shard){ 0 };
}

/* Twelve rows of eight experts: both ranks are wanted at every layer. */
static void a_rank_that_is_lost_ends_the_step_and_leaves_sequences_intact(void **state)
{
	struct bench *b = *state;
	const struct afd_entry entry = { .sequence = 1, .ids = b->golden.ids, .n_ids = 12 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	time_t end = time(NULL) + 10;
	int i, rc;

	assert_int_equal(afd_attn_add(b->rig.attn, 1), 0);
	rig_append(&b->rig, 1, b->golden.ids, 5, NULL);
	assert_int_equal(afd_attn_begin(b->rig.attn, &batch), 0);
	for (i = 0; i < 3; i++)
		assert_int_equal(afd_attn_poll(b->rig.attn), 0);
	lose_rank_one(&b->rig);
	while (!(rc = rig_turn(&b->rig)))
		assert_true(time(NULL) < end);
	assert_int_equal(rc, -ECONNRESET);
	assert_non_null(strstr(afd_last_error(), "loop:ranks-1"));
	assert_int_equal(afd_attn_busy(b->rig.attn), 0);
	assert_int_equal(afd_attn_length(b->rig.attn, 1), 5);
}

/* ---- waiting ---- */

static void an_event_loop_needs_only_descriptors_while_rows_are_routed(void **state)
{
	struct bench *b = *state;

	rig_loop(&b->rig, b->golden.ids);
}

/* ---- at creation ---- */

static void read_bytes(const char *name, int32_t gate, uint64_t *foretold, uint64_t *stored)
{
	const struct rig_params params = { .address = "loop:held", .gate = gate };
	struct afd_attn_stats stats = { .size = sizeof(stats) };
	struct afd_role_info info = { .size = sizeof(info) };
	const struct afd_shard_params shard = {
		.size = sizeof(shard), .role = AFD_ROLE_ATTENTION, .gate = gate
	};
	struct bench *b;

	open_bench((void **)&b, name, &params);
	rig_check(afd_model_shard(b->rig.model, &shard, &info), "shard");
	rig_check(afd_attn_stats(b->rig.attn, &stats), "stats");
	*foretold = info.bytes;
	*stored = stats.stored_bytes;
	tear_down((void **)&b);
}

static void attention_holds_routers_only_when_it_routes(void **state)
{
	static const struct {
		const char *name;
		uint64_t bytes; /* of routers and their biases */
	} cases[] = { { "moe-f32", 2 * 8 * 32 * 4 }, { "afmoe-f32", 3 * (6 * 30 + 6) * 4 },
		{ "f32-untied", 0 } };
	uint64_t foretold[2], stored[2];
	int i;

	for (i = 0; i < 3; i++) {
		read_bytes(cases[i].name, AFD_GATE_ATTENTION, &foretold[0], &stored[0]);
		read_bytes(cases[i].name, AFD_GATE_FFN, &foretold[1], &stored[1]);
		assert_int_equal(stored[0], foretold[0]);
		assert_int_equal(stored[1], foretold[1]);
		assert_int_equal(stored[0] - stored[1], cases[i].bytes);
	}
}

static void refuse_contract(const struct rig *rig, const struct afd_contract *contract, const char *text)
{
	const char *address = "loop:nobody";
	const struct afd_transport_params params = {
		.size = sizeof(params), .connect = &address, .n_connect = 1
	};
	const struct afd_attn_params attn = { .size = sizeof(attn) };
	afd_transport *net;
	afd_attn *stage = NULL;

	rig_check(afd_transport_create(&net, rig->ctx, contract, &params), "transport");
	assert_int_equal(afd_attn_create(&stage, rig->model, net, &attn), -EINVAL);
	assert_null(stage);
	if (!strstr(afd_last_error(), text))
		fail_msg("'%s' is not in '%s'", text, afd_last_error());
	afd_transport_destroy(net);
}

static void a_transport_with_other_experts_than_the_model_is_refused(void **state)
{
	struct bench *b = *state;
	struct afd_contract contract = { .size = sizeof(contract) }, other;
	uint8_t kinds[2] = { AFD_FFN_MOE, AFD_FFN_DENSE };

	rig_check(afd_model_contract(b->rig.model, &contract), "contract");
	other = contract;
	other.top_k = 3;
	refuse_contract(&b->rig, &other, "the 3 best of 8 experts, layer 0 of the model 2 of 8");
	other = contract;
	other.n_experts = 16;
	refuse_contract(&b->rig, &other, "the 2 best of 16 experts");
	other = contract;
	other.shared_experts = 1;
	refuse_contract(&b->rig, &other, "shared experts");
	other = contract;
	other.ffn_kinds = kinds;
	refuse_contract(&b->rig, &other, "layer 1 has no experts in the transport, some in the model");
}

#define SAME_BITS(name) \
	{ "both_gate_sides_give_the_same_bits: " name, both_gate_sides_give_the_same_bits, NULL, \
		NULL, name }
#define WITH(set_up, test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		SAME_BITS("moe-f32"),
		SAME_BITS("moe-bf16"),
		SAME_BITS("moe-top-one"),
		SAME_BITS("moe-sparse-step"),
		SAME_BITS("afmoe-f32"),
		SAME_BITS("fp8-moe"),
		cmocka_unit_test(rows_of_each_rank_are_those_that_a_plain_router_counts),
		WITH(two_ranks_one_expert, a_rank_that_no_row_wants_gets_no_part),
		WITH(two_ranks, a_step_cancelled_while_it_routes_can_be_repeated_with_the_same_bits),
		WITH(two_ranks, a_rank_that_is_lost_ends_the_step_and_leaves_sequences_intact),
		WITH(two_ranks, an_event_loop_needs_only_descriptors_while_rows_are_routed),
		cmocka_unit_test(attention_holds_routers_only_when_it_routes),
		WITH(two_ranks, a_transport_with_other_experts_than_the_model_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
