/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The goldens feel what implementations have got wrong. Each case takes one thing away from a
 * checkpoint, or alters it, and the logits must leave the golden by far more than its limit: so
 * code that skipped it could not pass. With them stand the pitfalls that a config alone can show.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>

#include "../support/rig.h"

static const double LIMIT = 1e-9, FELT = 1e-6;

static const struct felt {
	const char *name, *golden;
	struct golden_change change;
} cases[] = {
	/* routing */
	{ "route_scale_1", "afmoe-f32", { .find = "2.826", .replace = "1.0" } },
	{ "no_expert_bias", "afmoe-f32", { .tensor = "model.layers.1.mlp.expert_bias" } },
	{ "expert_bias_of_one_expert", "afmoe-f32",
		{ .tensor = "model.layers.2.mlp.expert_bias", .index = 1, .n_numbers = 1, .value = 2 } },
	{ "scores_are_not_normalised", "afmoe-f32",
		{ .find = "\"route_norm\": true", .replace = "\"route_norm\": false" } },
	{ "scores_are_softmax", "afmoe-f32",
		{ .find = "\"score_func\": \"sigmoid\"", .replace = "\"score_func\": \"softmax\"" } },
	{ "norm_topk_prob_off", "moe-f32",
		{ .find = "\"norm_topk_prob\": true", .replace = "\"norm_topk_prob\": false" } },
	{ "norm_topk_prob_on", "moe-norm-off",
		{ .find = "\"norm_topk_prob\": false", .replace = "\"norm_topk_prob\": true" } },
	{ "norm_topk_prob_on_when_absent", "moe-norm-absent",
		{ .find = "\"num_experts\"", .replace = "\"norm_topk_prob\": true, \"num_experts\"" } },
	{ "one_expert_less", "moe-f32",
		{ .find = "\"num_experts_per_tok\": 2", .replace = "\"num_experts_per_tok\": 1" } },
	/* the attention branch */
	{ "no_output_gate", "afmoe-f32",
		{ .tensor = "model.layers.1.self_attn.gate_proj.weight" } },
	{ "output_gate_of_one_head", "afmoe-f32",
		{ .tensor = "model.layers.1.self_attn.gate_proj.weight", .index = 10 * 30,
			.n_numbers = 10 * 30 } },
	{ "no_q_norm_weight", "f32-tied",
		{ .tensor = "model.layers.0.self_attn.q_norm.weight", .value = 1 } },
	{ "no_k_norm_weight", "f32-tied",
		{ .tensor = "model.layers.1.self_attn.k_norm.weight", .value = 1 } },
	{ "no_k_bias", "bias-f32", { .tensor = "model.layers.0.self_attn.k_proj.bias" } },
	{ "no_o_bias", "bias-f32", { .tensor = "model.layers.0.self_attn.o_proj.bias" } },
	/* norms of both branches */
	{ "no_norm_after_attention", "afmoe-f32",
		{ .tensor = "model.layers.3.post_attention_layernorm.weight", .value = 1 } },
	{ "no_norm_before_the_ffn", "afmoe-f32",
		{ .tensor = "model.layers.2.pre_mlp_layernorm.weight", .value = 1 } },
	{ "no_norm_after_the_ffn", "afmoe-f32",
		{ .tensor = "model.layers.1.post_mlp_layernorm.weight", .value = 1 } },
	{ "no_norm_after_a_dense_ffn", "afmoe-f32",
		{ .tensor = "model.layers.0.post_mlp_layernorm.weight", .value = 1 } },
	{ "no_shared_expert", "afmoe-f32",
		{ .tensor = "model.layers.1.mlp.shared_experts.down_proj.weight" } },
	{ "another_eps", "large-eps", { .find = "0.05", .replace = "0.049" } },
	/* the embedding, rope and windows */
	{ "no_mup", "afmoe-f32",
		{ .find = "\"mup_enabled\": true", .replace = "\"mup_enabled\": false" } },
	{ "mup", "afmoe-no-mup",
		{ .find = "\"mup_enabled\": false", .replace = "\"mup_enabled\": true" } },
	{ "each_third_layer_full", "afmoe-every-fourth",
		{ .find = "\"num_dense_layers\"",
			.replace = "\"global_attn_every_n_layers\": 3, \"num_dense_layers\"" } },
	{ "a_window_of_7", "afmoe-f32",
		{ .find = "\"sliding_window\": 8", .replace = "\"sliding_window\": 7" } },
	{ "a_window_of_9", "afmoe-f32",
		{ .find = "\"sliding_window\": 8", .replace = "\"sliding_window\": 9" } },
	{ "a_window_of_7_of_qwen3", "window-v4",
		{ .find = "\"sliding_window\": 8", .replace = "\"sliding_window\": 7" } },
	{ "a_window_of_9_of_qwen3_moe", "moe-window",
		{ .find = "\"sliding_window\": 8", .replace = "\"sliding_window\": 9" } },
	{ "a_window_that_is_used", "window-off",
		{ .find = "\"use_sliding_window\": false", .replace = "\"use_sliding_window\": true" } },
	{ "yarn_of_the_ratio_of_positions", "yarn-v4",
		{ .find = "\"factor\": 4.0", .replace = "\"factor\": 1.6666666666666667" } },
	{ "another_theta", "f32-tied", { .find = "10000.0", .replace = "1000000.0" } },
	/* FP8 */
	{ "one_scale_of_the_gate", "fp8-f32",
		{ .tensor = "model.layers.0.mlp.gate_proj.weight_scale_inv", .index = 1, .n_numbers = 1,
			.value = 0.002f } },
	{ "one_scale_of_down", "fp8-f32",
		{ .tensor = "model.layers.0.mlp.down_proj.weight_scale_inv", .index = 3, .n_numbers = 1,
			.value = 0.002f } },
	{ "one_scale_of_o", "fp8-f32",
		{ .tensor = "model.layers.0.self_attn.o_proj.weight_scale_inv", .index = 1, .n_numbers = 1,
			.value = 0.002f } },
};

static double error_of(const char *name, const struct golden_change *change)
{
	struct rig_params params = { .attn.max_outputs = 64 };
	char directory[64];
	struct golden golden;
	struct rig rig;
	uint64_t n;
	float *logits;
	double error;

	golden_open(&golden, name);
	golden_change(&golden, change, directory);
	params.checkpoint = directory;
	rig_open(&rig, &params);
	n = (uint64_t)golden.n_positions * golden.vocab;
	logits = calloc(n, sizeof(*logits));
	assert_non_null(logits);
	rig_decode(&rig, &golden, 0, logits);
	error = nmse(logits, golden.logits, n);
	free(logits);
	rig_close(&rig);
	golden_patch_remove(directory);
	golden_close(&golden);
	return error;
}

static void a_change_is_felt(void **state)
{
	const struct felt *c = *state;
	double error = error_of(c->golden, &c->change);

	if (!(error > FELT))
		fail_msg("%s of %s: NMSE %g, should be above %g", c->name, c->golden, error, FELT);
	/* And it is the change: a copy without one is the golden. */
	error = error_of(c->golden, &(struct golden_change){ .tensor = NULL });
	if (!(error <= LIMIT))
		fail_msg("%s, unchanged: NMSE %g, limit %g", c->golden, error, LIMIT);
}

int main(void)
{
	enum { N = sizeof(cases) / sizeof(*cases) };
	static char titles[N][128];
	static struct CMUnitTest tests[N];
	int i;

	for (i = 0; i < N; i++) {
		snprintf(titles[i], sizeof(titles[i]), "a_change_is_felt: %s", cases[i].name);
		tests[i] = (struct CMUnitTest){
			.name = titles[i], .test_func = a_change_is_felt, .initial_state = (void *)&cases[i]
		};
	}
	return _cmocka_run_group_tests("felt", tests, N, NULL, NULL);
}
