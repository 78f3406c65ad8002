/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The router's choice and the output gate against references in double. What a router can get wrong
 * has a test of its own: the order of ties, a bias that reaches the weights, a norm or a scale that
 * is dropped, groups, and logits that are no numbers.
 */
#include "rig.h"

#include <afd/model.h>
#include <math.h>
#include <string.h>

enum { MAX_ROWS = 33, MAX_EXPERTS = 300, MAX_TOP = 16 };

struct route_case {
	const char *name;
	uint32_t n_experts, top_k, n_groups, top_groups;
	int32_t score;
	bool bias, normalize;
	float epsilon, scale;
};

static const struct route_case cases[] = {
	{ "8 of 128, softmax, normalised", 128, 8, 1, 1, AFD_ROUTER_SOFTMAX, false, true, 0, 1 },
	{ "8 of 128, softmax as it is", 128, 8, 1, 1, AFD_ROUTER_SOFTMAX, false, false, 0, 1 },
	{ "8 of 128, sigmoid with bias and scale", 128, 8, 1, 1, AFD_ROUTER_SIGMOID, true, true,
		1e-20f, 2.826f },
	{ "4 of 257, sigmoid, not normalised", 257, 4, 1, 1, AFD_ROUTER_SIGMOID, true, false, 0,
		2.5f },
	{ "softmax with bias", 37, 5, 1, 1, AFD_ROUTER_SOFTMAX, true, true, 0, 1 },
	{ "a large epsilon", 16, 2, 1, 1, AFD_ROUTER_SIGMOID, false, true, 0.5f, 1 },
	{ "one of one", 1, 1, 1, 1, AFD_ROUTER_SOFTMAX, false, true, 0, 1 },
	{ "all of 7", 7, 7, 1, 1, AFD_ROUTER_SOFTMAX, false, false, 0, 0.5f },
	{ "4 of 8 groups, as DeepSeek", 256, 8, 8, 4, AFD_ROUTER_SIGMOID, true, true, 1e-20f,
		2.5f },
	{ "all groups of one expert", 12, 3, 12, 5, AFD_ROUTER_SIGMOID, true, true, 0, 1 },
	{ "one group of 3, all of it", 9, 3, 3, 1, AFD_ROUTER_SOFTMAX, false, true, 0, 1 },
};
#define N_CASES (sizeof(cases) / sizeof(cases[0]))

struct chosen {
	int32_t ids[MAX_ROWS * MAX_TOP];
	float weights[MAX_ROWS * MAX_TOP];
};

static void route(const struct route_case *c, const float *logits, const float *bias,
	uint32_t n_rows, uint32_t n_threads, struct chosen *out)
{
	struct rig *r = rig_make(n_threads);
	size_t n = n_rows * c->top_k;
	struct afd__route_args a = { .logits = rig_input(r, logits, n_rows * c->n_experts * 4),
		.bias = c->bias ? rig_input(r, bias, c->n_experts * 4) : NULL,
		.ids = rig_output(r, n * 4),
		.weights = rig_output(r, n * 4),
		.n_rows = n_rows,
		.n_experts = c->n_experts,
		.top_k = c->top_k,
		.n_groups = c->n_groups,
		.top_groups = c->top_groups,
		.score = c->score,
		.normalize = c->normalize,
		.epsilon = c->epsilon,
		.scale = c->scale };

	if (afd__route(&r->q, &a))
		fail_msg("%s: %s", c->name, afd_last_error());
	rig_fetch(r, out->ids, a.ids, n * 4);
	rig_fetch(r, out->weights, a.weights, n * 4);
	rig_end(r);
}

/* The index of the largest key that is not taken, the lowest among equals. */
static uint32_t take_best(const double *keys, bool *taken, uint32_t n)
{
	uint32_t best = UINT32_MAX;

	for (uint32_t i = 0; i < n; i++) {
		if (!taken[i] && (best == UINT32_MAX || keys[i] > keys[best]))
			best = i;
	}
	taken[best] = true;
	return best;
}

static void close_groups(const struct route_case *c, const double *keys, bool *taken)
{
	uint32_t size = c->n_experts / c->n_groups;
	double group[MAX_EXPERTS];
	bool open[MAX_EXPERTS] = { false };

	for (uint32_t g = 0; g < c->n_groups; g++) {
		bool seen[MAX_EXPERTS] = { false };
		uint32_t first = take_best(keys + g * size, seen, size);

		group[g] = keys[g * size + first];
		if (size > 1)
			group[g] += keys[g * size + take_best(keys + g * size, seen, size)];
	}
	for (uint32_t i = 0; i < c->top_groups; i++)
		take_best(group, open, c->n_groups);
	for (uint32_t e = 0; e < c->n_experts; e++)
		taken[e] = !open[e / size];
}

static void check_row(const struct route_case *c, const float *logits, const float *bias,
	const int32_t *ids, const float *weights)
{
	double scores[MAX_EXPERTS], keys[MAX_EXPERTS], largest = -INFINITY, total = 0, sum = 0;
	bool taken[MAX_EXPERTS];

	for (uint32_t e = 0; e < c->n_experts; e++)
		largest = fmax(largest, logits[e]);
	for (uint32_t e = 0; e < c->n_experts; e++)
		total += exp(logits[e] - largest);
	for (uint32_t e = 0; e < c->n_experts; e++) {
		scores[e] = c->score == AFD_ROUTER_SOFTMAX ? exp(logits[e] - largest) / total
							   : 1 / (1 + exp(-(double)logits[e]));
		keys[e] = scores[e] + (c->bias ? bias[e] : 0);
	}
	close_groups(c, keys, taken);
	for (uint32_t i = 0; i < c->top_k; i++) {
		uint32_t want = take_best(keys, taken, c->n_experts);

		if (ids[i] != (int32_t)want)
			fail_msg("%s: slot %u is expert %d, should be %u", c->name, i, ids[i], want);
		sum += scores[want];
	}
	for (uint32_t i = 0; i < c->top_k; i++)
		rig_near(weights[i],
			scores[ids[i]] / (c->normalize ? sum + c->epsilon : 1) * c->scale, 3e-6,
			1e-37, c->name, i);
}

static void choices_and_weights_agree_with_double_in_every_case_and_kind(void **state)
{
	static float logits[MAX_ROWS * MAX_EXPERTS], bias[MAX_EXPERTS];
	static struct chosen got;

	for (size_t i = 0; i < N_CASES * RIG_N_KINDS; i++) {
		const struct route_case *c = &cases[i / RIG_N_KINDS];
		struct rig source = { .random = 31 + i };

		rig_fill(&source, logits, MAX_ROWS * c->n_experts,
			2 * rig_kinds[i % RIG_N_KINDS].scale);
		rig_fill(&source, bias, c->n_experts, 0.3f);
		route(c, logits, bias, MAX_ROWS, 2, &got);
		for (uint32_t row = 0; row < MAX_ROWS; row++)
			check_row(c, logits + row * c->n_experts, bias, got.ids + row * c->top_k,
				got.weights + row * c->top_k);
	}
}

static void neither_neighbours_nor_threads_show(void **state)
{
	static float logits[MAX_ROWS * MAX_EXPERTS], bias[MAX_EXPERTS];
	static struct chosen all, part;
	struct rig source = { .random = 7 };

	rig_fill(&source, bias, MAX_EXPERTS, 0.3f);
	for (size_t i = 0; i < N_CASES; i++) {
		const struct route_case *c = &cases[i];
		uint32_t row = 12 - (uint32_t)i, n = 1 + (uint32_t)i * 2;

		rig_fill(&source, logits, MAX_ROWS * c->n_experts, 1);
		route(c, logits, bias, MAX_ROWS, 2, &all);
		route(c, logits + row * c->n_experts, bias, n, 3, &part);
		assert_memory_equal(part.ids, all.ids + row * c->top_k, n * c->top_k * 4);
		assert_memory_equal(part.weights, all.weights + row * c->top_k, n * c->top_k * 4);
	}
}

static const struct route_case plain = {
	"3 of 8", 8, 3, 1, 1, AFD_ROUTER_SIGMOID, false, false, 0, 1
};

static void equal_scores_take_the_lower_id_first(void **state)
{
	const float logits[4][8] = { { 0, 0, 0, 0, 0, 0, 0, 0 }, { 1, 2, 1, 2, 1, 2, 1, 2 },
		{ 0, 5, 0, 0, 5, 0, 0, 9 }, { 3, 0, 0, 0, 0, 0, 3, 3 } };
	const int32_t want[4][3] = { { 0, 1, 2 }, { 1, 3, 5 }, { 7, 1, 4 }, { 0, 6, 7 } };
	struct route_case softmax = plain;
	struct chosen got;

	softmax.score = AFD_ROUTER_SOFTMAX;
	route(&plain, logits[0], NULL, 4, 1, &got);
	assert_memory_equal(got.ids, want, sizeof(want));
	route(&softmax, logits[0], NULL, 4, 1, &got);
	assert_memory_equal(got.ids, want, sizeof(want));
}

static void a_bias_chooses_and_does_not_weigh(void **state)
{
	const float logits[8] = { 2, 1, 0, 0, 0, 0, 0, -1 }, bias[8] = { -9, 0, 0, 0, 0, 0, 0, 9 };
	const int32_t want[3] = { 7, 1, 2 };
	struct route_case c = plain;
	struct chosen got;

	c.bias = true;
	route(&c, logits, bias, 1, 1, &got);
	assert_memory_equal(got.ids, want, sizeof(want));
	rig_near(got.weights[0], 1 / (1 + exp(1)), 1e-6, 0, "weight of a biased expert", 0);
	rig_near(got.weights[1], 1 / (1 + exp(-1)), 1e-6, 0, "weight of a plain expert", 1);
}

static void logits_that_are_no_numbers_still_give_distinct_experts(void **state)
{
	const float nan = NAN, inf = INFINITY;
	const float logits[5][8] = { { nan, nan, nan, nan, nan, nan, nan, nan },
		{ 1, nan, 2, 3, nan, 4, 5, 6 }, { inf, inf, 0, -inf, 1, 2, inf, 3 },
		{ -inf, -inf, -inf, -inf, -inf, -inf, -inf, -inf },
		{ nan, 1, 2, 3, 4, 5, 6, 7 } };
	struct route_case c = plain;
	struct chosen got;

	for (int i = 0; i < 4; i++) {
		c.score = i % 2 ? AFD_ROUTER_SOFTMAX : AFD_ROUTER_SIGMOID;
		c.n_groups = i / 2 ? 4 : 1;
		c.top_groups = i / 2 ? 2 : 1;
		route(&c, logits[0], NULL, 5, 1, &got);
		for (int j = 0; j < 15; j++) {
			assert_in_range(got.ids[j], 0, 7);
			for (int k = j / 3 * 3; k < j; k++)
				assert_int_not_equal(got.ids[k], got.ids[j]);
		}
	}
}

static void the_gate_agrees_with_double_in_every_width_and_kind(void **state)
{
	const uint32_t widths[] = { 1, 3, 15, 16, 17, 33, 256 };
	float x[5 * 256], gate[5 * 260], got[5 * 256];

	for (size_t i = 0; i < 7 * RIG_N_KINDS; i++) {
		uint32_t width = widths[i / RIG_N_KINDS], stride = width + 4;
		struct rig *r = rig_make(2);

		rig_fill(r, x, 5 * width, rig_kinds[i % RIG_N_KINDS].scale);
		rig_fill(r, gate, 5 * stride, 3 * rig_kinds[i % RIG_N_KINDS].scale);
		struct afd__gate_args a = { .x = rig_input(r, x, 5 * width * 4),
			.gate = rig_input(r, gate, 5 * stride * 4),
			.gate_stride = stride,
			.n_rows = 5,
			.width = width };
		RIG_OK(afd__gate(&r->q, &a));
		rig_fetch(r, got, a.x, 5 * width * 4);
		for (uint32_t j = 0; j < 5 * width; j++)
			rig_near(got[j],
				x[j] / (1 + exp(-(double)gate[j / width * stride + j % width])),
				1e-6, 1e-37, "gate", j);
		rig_end(r);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(choices_and_weights_agree_with_double_in_every_case_and_kind),
		cmocka_unit_test(neither_neighbours_nor_threads_show),
		cmocka_unit_test(equal_scores_take_the_lower_id_first),
		cmocka_unit_test(a_bias_chooses_and_does_not_weigh),
		cmocka_unit_test(logits_that_are_no_numbers_still_give_distinct_experts),
		cmocka_unit_test(the_gate_agrees_with_double_in_every_width_and_kind),
	};

	return RIG_RUN(tests);
}
