/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.json of every family gives the layers that its authors' code would make of it: which layers route, how rows are
 * weighed, where norms and rotation stand. A key that means something and is missing, or is not supported, is refused by name.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "../../lib/model/model.h"

#define SIZES "\"hidden_size\":48,\"num_hidden_layers\":4,\"vocab_size\":150,\"moe_intermediate_size\":24,\"num_experts_per_tok\":2"
#define HEADS "\"num_attention_heads\":6,\"num_key_value_heads\":2,\"head_dim\":16"

static const char moe[] = "{\"model_type\":\"qwen3_moe\"," SIZES "," HEADS ",\"intermediate_size\":70,\"num_experts\":8}";
static const char afmoe[] = "{\"model_type\":\"afmoe\"," SIZES "," HEADS ",\"intermediate_size\":70,\"num_experts\":8,"
	"\"num_dense_layers\":2,\"num_shared_experts\":2,\"route_scale\":2.826,\"mup_enabled\":true,\"rms_norm_eps\":1e-5,"
	"\"sliding_window\":8}";
static const char deepseek[] = "{\"model_type\":\"deepseek_v3\"," SIZES ",\"intermediate_size\":70,\"n_routed_experts\":16,"
	"\"n_shared_experts\":1,\"first_k_dense_replace\":1,\"routed_scaling_factor\":2.5,\"scoring_func\":\"sigmoid\","
	"\"topk_method\":\"noaux_tc\",\"n_group\":4,\"topk_group\":2,\"norm_topk_prob\":true,\"hidden_act\":\"silu\","
	"\"partial_rotary_factor\":0.5,\"rope_scaling\":{\"type\":\"unknown\"}}";
static const char minimax[] = "{\"model_type\":\"minimax\",\"architectures\":[\"MiniMaxM2ForCausalLM\"],\"hidden_size\":48,"
	"\"num_hidden_layers\":4,\"vocab_size\":150,\"intermediate_size\":24,\"num_experts_per_tok\":2,\"num_local_experts\":8,"
	"\"scoring_func\":\"sigmoid\",\"use_routing_bias\":true,\"shared_intermediate_size\":0,\"rotary_dim\":64}";

static afd_context *ctx;
static struct afd__arch arch;

static int make_context(void **state)
{
	return afd_context_create(&ctx, NULL);
}

static int end_context(void **state)
{
	afd_context_destroy(ctx);
	return 0;
}

static int end(void **state)
{
	afd__arch_free(&arch);
	return 0;
}

/* The base with the keys of patch put over it; a key with the value "-" is removed. */
static int read_patched(const char *base, const char *patch)
{
	json_t *root = json_loads(base, 0, NULL), *over = json_loads(patch, 0, NULL), *value;
	const char *key;
	char *text;
	int rc;

	assert_non_null(root);
	assert_non_null(over);
	json_object_foreach(over, key, value) {
		if (json_is_string(value) && !strcmp(json_string_value(value), "-"))
			json_object_del(root, key);
		else
			json_object_set(root, key, value);
	}
	text = json_dumps(root, 0);
	json_decref(root);
	json_decref(over);
	rc = afd__arch_read(&arch, ctx, text, strlen(text));
	free(text);
	return rc;
}

static void accept(const char *base, const char *patch)
{
	if (read_patched(base, patch))
		fail_msg("%s: %s", patch, afd_last_error());
}

/* ---- which layers route, and which slide ---- */

/* One letter a layer: s sliding, f full; upper case where it routes. */
static const struct layers {
	const char *name, *base, *patch, *kinds;
} layers[] = {
	{ "qwen3_moe_routes_everywhere", moe, "{}", "FFFF" },
	{ "every_second_layer_routes_with_a_sparse_step_of_2", moe, "{\"decoder_sparse_step\":2}", "fFfF" },
	{ "mlp_only_layers_do_not_route", moe, "{\"mlp_only_layers\":[0,3,99]}", "fFFf" },
	{ "sparse_step_and_mlp_only_layers_hold_together", moe, "{\"decoder_sparse_step\":2,\"mlp_only_layers\":[3]}", "fFff" },
	{ "without_experts_no_layer_routes", moe, "{\"num_experts\":0}", "ffff" },
	{ "a_window_of_qwen3_moe_is_for_all_layers", moe,
	  "{\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":2}", "SSSS" },
	{ "a_window_of_qwen3_moe_that_is_not_used_is_none", moe, "{\"sliding_window\":8}", "FFFF" },
	{ "the_first_layers_of_afmoe_are_dense_and_each_fourth_is_full", afmoe, "{}", "ssSF" },
	{ "global_attn_every_n_layers_says_which_are_full", afmoe, "{\"global_attn_every_n_layers\":3}", "ssFS" },
	{ "layer_types_win_over_global_attn_every_n_layers", afmoe,
	  "{\"layer_types\":[\"full_attention\",\"sliding_attention\",\"sliding_attention\",\"full_attention\"]}", "fsSF" },
	{ "afmoe_without_sliding_layers_needs_no_window", afmoe,
	  "{\"sliding_window\":null,\"global_attn_every_n_layers\":1}", "ffFF" },
	{ "afmoe_may_have_no_dense_layers", afmoe, "{\"num_dense_layers\":0}", "SSSF" },
	{ "afmoe_may_have_dense_layers_only", afmoe, "{\"num_dense_layers\":4}", "sssf" },
	{ "first_k_dense_replace_layers_are_dense", deepseek, "{}", "-MMM" },
	{ "mlp_layer_types_say_which_layers_route", deepseek,
	  "{\"mlp_layer_types\":[\"sparse\",\"dense\",\"sparse\",\"sparse\"]}", "M-MM" },
	{ "minimax_routes_everywhere", minimax, "{}", "MMMM" },
};

static char kind_of(const struct afd__layer *l)
{
	bool routes = l->ffn_kind == AFD_FFN_MOE;

	if (!l->attention)
		return routes ? 'M' : '-';
	assert_true((l->window != 0) == (l->attention == AFD__ATTENTION_SLIDING));
	if (l->window)
		return routes ? 'S' : 's';
	return routes ? 'F' : 'f';
}

static void check_layers(void **state)
{
	const struct layers *c = *state;
	char kinds[5] = "";
	uint32_t i;

	accept(c->base, c->patch);
	for (i = 0; i < 4; i++) {
		kinds[i] = kind_of(&arch.layers[i]);
		assert_int_equal(arch.ffn_kinds[i], arch.layers[i].ffn_kind);
	}
	assert_string_equal(kinds, c->kinds);
}

/* ---- how rows are weighed ---- */

static const struct router {
	const char *name, *base, *patch;
	int32_t score;
	int bias, normalize;
	double epsilon, scale;
	uint32_t n_groups, top_groups;
} routers[] = {
	{ "norm_topk_prob_is_false_when_missing", moe, "{}", AFD_ROUTER_SOFTMAX, 0, 0, 0, 1, 1, 1 },
	{ "norm_topk_prob_divides_by_the_sum_alone", moe, "{\"norm_topk_prob\":true}", AFD_ROUTER_SOFTMAX, 0, 1, 0, 1, 1, 1 },
	{ "afmoe_is_normalised_and_scaled", afmoe, "{}", AFD_ROUTER_SIGMOID, 1, 1, 1e-20, 2.826, 1, 1 },
	{ "route_norm_false_keeps_the_scores", afmoe, "{\"route_norm\":false}", AFD_ROUTER_SIGMOID, 1, 0, 1e-20, 2.826, 1, 1 },
	{ "norm_topk_prob_is_route_norm", afmoe, "{\"norm_topk_prob\":false}", AFD_ROUTER_SIGMOID, 1, 0, 1e-20, 2.826, 1, 1 },
	{ "softmax_of_afmoe_is_never_normalised", afmoe, "{\"score_func\":\"softmax\",\"route_norm\":true}", AFD_ROUTER_SOFTMAX, 1,
	  0, 1e-20, 2.826, 1, 1 },
	{ "scoring_func_is_score_func", afmoe, "{\"scoring_func\":\"softmax\"}", AFD_ROUTER_SOFTMAX, 1, 0, 1e-20, 2.826, 1, 1 },
	{ "groups_of_one_are_none", afmoe, "{\"n_group\":1,\"topk_group\":1,\"num_expert_groups\":1,\"num_limited_groups\":1}",
	  AFD_ROUTER_SIGMOID, 1, 1, 1e-20, 2.826, 1, 1 },
	{ "deepseek_selects_groups_first", deepseek, "{}", AFD_ROUTER_SIGMOID, 1, 1, 1e-20, 2.5, 4, 2 },
	{ "kimi_has_no_groups", deepseek, "{\"model_type\":\"kimi_k2\",\"n_group\":1,\"topk_group\":1}", AFD_ROUTER_SIGMOID, 1, 1,
	  1e-20, 2.5, 1, 1 },
	{ "glm_leaves_its_scoring_unsaid", deepseek,
	  "{\"model_type\":\"glm4_moe\",\"scoring_func\":\"-\",\"topk_method\":\"-\","
	  "\"norm_topk_prob\":false}",
	  AFD_ROUTER_SIGMOID, 1, 0, 1e-20, 2.5, 4, 2 },
	{ "minimax_divides_by_the_sum_alone", minimax, "{}", AFD_ROUTER_SIGMOID, 1, 1, 0, 1, 1, 1 },
};

static void check_router(void **state)
{
	const struct router *c = *state;
	const struct afd__router *r;

	accept(c->base, c->patch);
	r = &arch.layers[3].router;
	assert_int_equal(r->score, c->score);
	assert_int_equal(r->bias, c->bias);
	assert_int_equal(r->normalize, c->normalize);
	assert_true(r->epsilon == (float)c->epsilon);
	assert_true(r->scale == (float)c->scale);
	assert_int_equal(r->n_groups, c->n_groups);
	assert_int_equal(r->top_groups, c->top_groups);
}

/* ---- the rest of a layer ---- */

static void both_spellings_of_the_expert_count_are_read(void **state)
{
	accept(moe, "{\"num_experts\":\"-\",\"num_local_experts\":6}");
	assert_int_equal(arch.layers[0].n_experts, 6);
	assert_int_equal(arch.layers[0].top_k, 2);
	assert_int_equal(arch.layers[0].expert_size, 24);
	assert_int_equal(arch.layers[0].shared_size, 0);
}

static void both_spellings_may_stand_side_by_side_when_they_agree(void **state)
{
	accept(moe, "{\"num_local_experts\":8}");
	assert_int_equal(arch.layers[0].n_experts, 8);
}

static void intermediate_size_is_needed_only_for_dense_layers(void **state)
{
	accept(moe, "{\"intermediate_size\":\"-\"}");
	assert_int_equal(arch.layers[0].intermediate_size, 0);
	afd__arch_free(&arch);
	assert_int_equal(read_patched(moe, "{\"intermediate_size\":\"-\",\"mlp_only_layers\":[1]}"), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "intermediate_size is missing"));
}

static void a_dense_layer_takes_intermediate_size_and_a_routed_one_the_width_of_experts(void **state)
{
	accept(afmoe, "{}");
	assert_int_equal(arch.layers[1].intermediate_size, 70);
	assert_int_equal(arch.layers[1].n_experts, 0);
	assert_int_equal(arch.layers[1].shared_size, 0);
	assert_int_equal(arch.layers[2].intermediate_size, 0);
	assert_int_equal(arch.layers[2].expert_size, 24);
	assert_int_equal(arch.layers[2].shared_size, 48);
}

static void afmoe_rotates_on_sliding_layers_only(void **state)
{
	accept(afmoe, "{}");
	assert_ptr_equal(arch.layers[0].rope, &arch.rope);
	assert_null(arch.layers[3].rope);
	assert_int_equal(arch.layers[3].qk_norm, AFD__QK_NORM_PER_HEAD);
}

static void qwen3_moe_rotates_everywhere_and_has_two_norms_and_no_gate(void **state)
{
	accept(moe, "{}");
	assert_ptr_equal(arch.layers[3].rope, &arch.rope);
	assert_int_equal(arch.layers[3].norms, AFD__NORM_BEFORE_ATTENTION | AFD__NORM_BEFORE_FFN);
	assert_int_equal(arch.layers[3].output_gate, AFD__OUTPUT_GATE_NONE);
	assert_true(arch.embedding_scale == 1);
}

static void afmoe_has_four_norms_and_a_gate_of_every_output(void **state)
{
	accept(afmoe, "{}");
	assert_int_equal(arch.layers[0].norms, AFD__NORM_BEFORE_ATTENTION | AFD__NORM_AFTER_ATTENTION | AFD__NORM_BEFORE_FFN |
						 AFD__NORM_AFTER_FFN);
	assert_int_equal(arch.layers[0].output_gate, AFD__OUTPUT_GATE_ELEMENTWISE);
	assert_false(arch.layers[0].attention_bias);
}

static void mup_scales_the_embedding_by_the_root_of_its_width(void **state)
{
	accept(afmoe, "{}");
	assert_true(arch.embedding_scale == (float)sqrt(48));
	afd__arch_free(&arch);
	accept(afmoe, "{\"mup_enabled\":false}");
	assert_true(arch.embedding_scale == 1);
}

static void the_window_of_a_layer_is_the_configs(void **state)
{
	accept(afmoe, "{}");
	assert_int_equal(arch.layers[0].window, 8);
	assert_int_equal(arch.layers[3].window, 0);
}

static void nothing_of_attention_is_read_for_an_ffn_only_family(void **state)
{
	accept(deepseek, "{}");
	assert_true(arch.ffn_only);
	assert_int_equal(arch.layers[0].n_heads, 0);
	assert_int_equal(arch.layers[1].shared_size, 24);
	assert_string_equal(arch.model_type, "deepseek_v3");
}

static void an_architecture_alone_names_each_family(void **state)
{
	accept(moe, "{\"model_type\":\"-\",\"architectures\":[\"Qwen3MoeForCausalLM\"]}");
	assert_string_equal(arch.model_type, "qwen3_moe");
	afd__arch_free(&arch);
	accept(afmoe, "{\"model_type\":\"-\",\"architectures\":[\"AfmoeForCausalLM\"]}");
	assert_string_equal(arch.model_type, "afmoe");
}

/* ---- block FP8 ---- */

#define FP8(rest) "{\"quantization_config\":{\"quant_method\":\"fp8\"" rest "}}"
#define BLOCK ",\"weight_block_size\":[128,128]"
#define GROUP(weights, activations) \
	"{\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\"," \
	"\"kv_cache_scheme\":null,\"ignore\":[\"lm_head\"],\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"]," \
	"\"weights\":{" weights "},\"input_activations\":" activations "}}}}"
#define WEIGHTS "\"num_bits\":8,\"type\":\"float\",\"strategy\":\"block\",\"block_structure\":[128,128],\"symmetric\":true"
#define DYNAMIC "{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"group\",\"group_size\":128,\"dynamic\":true}"

static const struct patch {
	const char *name, *patch;
} quantized[] = {
	{ "fp8_as_qwen_writes_it_is_read", FP8(BLOCK ",\"activation_scheme\":\"dynamic\",\"fmt\":\"e4m3\"") },
	{ "fp8_as_minimax_writes_it_is_read", FP8(BLOCK ",\"activation_scheme\":\"dynamic\",\"fmt\":\"float8_e4m3fn\"") },
	{ "lists_of_exclusions_do_not_matter", FP8(BLOCK ",\"modules_to_not_convert\":[\"lm_head\"]") },
	{ "fp8_as_compressed_tensors_writes_it_is_read", GROUP(WEIGHTS, DYNAMIC) },
	{ "compressed_tensors_may_leave_activations_alone", GROUP(WEIGHTS, "null") },
	{ "quantization_config_null_is_none", "{\"quantization_config\":null}" },
};

static void check_quantized(void **state)
{
	accept(moe, ((const struct patch *)*state)->patch);
}

/* ---- what is refused ---- */

static const struct refusal {
	const char *name, *base, *patch;
	int code;
	const char *text;
} refusals[] = {
	{ "two_spellings_that_differ_are_refused", moe, "{\"num_local_experts\":6}", -EBADMSG,
	  "num_local_experts is 6, but num_experts, which means the same, differs" },
	{ "a_missing_expert_count_is_refused", moe, "{\"num_experts\":null}", -EBADMSG, "num_experts is missing" },
	{ "a_missing_top_k_is_refused", moe, "{\"num_experts_per_tok\":\"-\"}", -EBADMSG, "num_experts_per_tok is missing" },
	{ "a_missing_expert_width_is_refused", moe, "{\"moe_intermediate_size\":\"-\"}", -EBADMSG,
	  "moe_intermediate_size is missing" },
	{ "more_experts_per_row_than_there_are_are_refused", moe, "{\"num_experts_per_tok\":9}", -EBADMSG,
	  "num_experts_per_tok is 9, the number of experts is 8" },
	{ "absurd_expert_counts_are_refused", moe, "{\"num_experts\":4097}", -EBADMSG, "num_experts is 4097, limit 0 .. 4096" },
	{ "absurd_experts_of_all_layers_are_refused", moe, "{\"num_experts\":4000,\"num_hidden_layers\":1000}", -EBADMSG,
	  "1000 layers have 4000000 experts, limit 131072" },
	{ "a_sparse_step_of_0_is_refused", moe, "{\"decoder_sparse_step\":0}", -EBADMSG, "decoder_sparse_step is 0" },
	{ "mlp_only_layers_of_another_type_are_refused", moe, "{\"mlp_only_layers\":[1,\"2\"]}", -EBADMSG,
	  "mlp_only_layers[1] is \"2\", must be an integer" },
	{ "layer_types_that_qwen3_moe_cannot_have_are_refused", moe,
	  "{\"use_sliding_window\":true,\"sliding_window\":8,"
	  "\"layer_types\":[\"sliding_attention\",\"full_attention\",\"sliding_attention\",\"sliding_attention\"]}",
	  -ENOTSUP, "layer_types[1] is \"full_attention\", supported: one window for all layers" },
	{ "afmoe_without_head_dim_is_refused", afmoe, "{\"head_dim\":\"-\"}", -EBADMSG, "head_dim is missing" },
	{ "afmoe_without_rms_norm_eps_is_refused", afmoe, "{\"rms_norm_eps\":\"-\"}", -EBADMSG, "rms_norm_eps is missing" },
	{ "afmoe_without_mup_enabled_is_refused", afmoe, "{\"mup_enabled\":\"-\"}", -EBADMSG, "mup_enabled is missing" },
	{ "afmoe_without_num_dense_layers_is_refused", afmoe, "{\"num_dense_layers\":\"-\"}", -EBADMSG,
	  "num_dense_layers is missing" },
	{ "afmoe_without_num_shared_experts_is_refused", afmoe, "{\"num_shared_experts\":\"-\"}", -EBADMSG,
	  "num_shared_experts is missing" },
	{ "afmoe_without_route_scale_is_refused", afmoe, "{\"route_scale\":\"-\"}", -EBADMSG, "route_scale is missing" },
	{ "afmoe_without_a_window_is_refused", afmoe, "{\"sliding_window\":\"-\"}", -EBADMSG, "sliding_window is missing" },
	{ "afmoe_of_sliding_types_without_a_window_is_refused", afmoe,
	  "{\"sliding_window\":null,\"layer_types\":[\"full_attention\","
	  "\"full_attention\",\"full_attention\",\"sliding_attention\"]}",
	  -EBADMSG, "layer_types[3] is \"sliding_attention\"" },
	{ "another_score_is_refused", afmoe, "{\"score_func\":\"relu\"}", -ENOTSUP,
	  "score_func is \"relu\", supported: \"sigmoid\", \"softmax\"" },
	{ "groups_of_afmoe_are_refused", afmoe, "{\"n_group\":2}", -ENOTSUP, "n_group is 2, supported: 1" },
	{ "limited_groups_of_afmoe_are_refused", afmoe, "{\"num_limited_groups\":2}", -ENOTSUP, "num_limited_groups is 2" },
	{ "a_route_scale_of_0_is_refused", afmoe, "{\"route_scale\":0}", -EBADMSG, "route_scale is 0" },
	{ "shared_experts_of_an_absurd_width_are_refused", afmoe, "{\"num_shared_experts\":1024,\"moe_intermediate_size\":2048}",
	  -EBADMSG, "its width is 2097152" },
	{ "softmax_of_deepseek_is_refused", deepseek, "{\"scoring_func\":\"softmax\"}", -ENOTSUP, "supported: \"sigmoid\"" },
	{ "another_selection_is_refused", deepseek, "{\"topk_method\":\"greedy\"}", -ENOTSUP,
	  "topk_method is \"greedy\", supported: \"noaux_tc\"" },
	{ "routing_every_second_layer_is_refused", deepseek, "{\"moe_layer_freq\":2}", -ENOTSUP, "moe_layer_freq is 2" },
	{ "groups_that_do_not_divide_are_refused", deepseek, "{\"n_group\":3}", -EBADMSG,
	  "n_group is 3, must divide the 16 experts" },
	{ "groups_of_single_experts_are_refused", deepseek, "{\"n_group\":16}", -EBADMSG, "groups of 2 or more" },
	{ "groups_too_small_for_a_row_are_refused", deepseek, "{\"n_group\":8,\"topk_group\":1,\"num_experts_per_tok\":3}",
	  -EBADMSG, "hold fewer than the 3 experts of a row" },
	{ "deepseek_without_its_scale_is_refused", deepseek, "{\"routed_scaling_factor\":\"-\"}", -EBADMSG,
	  "routed_scaling_factor is missing" },
	{ "deepseek_without_groups_is_refused", deepseek, "{\"n_group\":\"-\"}", -EBADMSG, "n_group is missing" },
	{ "unknown_mlp_layer_types_are_refused", deepseek, "{\"mlp_layer_types\":[\"dense\",\"dense\",1,\"sparse\"]}", -ENOTSUP,
	  "mlp_layer_types[2] is 1" },
	{ "minimax_without_a_routing_bias_is_refused", minimax, "{\"use_routing_bias\":false}", -ENOTSUP,
	  "use_routing_bias is false" },
	{ "minimax_with_a_shared_expert_is_refused", minimax, "{\"shared_intermediate_size\":8}", -ENOTSUP,
	  "shared_intermediate_size is 8" },
	{ "the_older_minimax_is_refused", minimax, "{\"architectures\":[\"MiniMaxText01ForCausalLM\"]}", -ENOTSUP,
	  "model_type is \"minimax\"" },
	{ "what_is_supported_is_told", moe, "{\"model_type\":\"mixtral\"}", -ENOTSUP,
	  "supported: \"qwen3\", \"qwen3_moe\", \"afmoe\", \"deepseek_v3\" (FFN)" },
	{ "another_block_size_is_refused", moe, FP8(",\"weight_block_size\":[64,128]"), -ENOTSUP,
	  "weight_block_size is [64,128], supported: [128, 128]" },
	{ "another_format_is_refused", moe, FP8(BLOCK ",\"fmt\":\"e5m2\""), -ENOTSUP, "fmt is \"e5m2\"" },
	{ "static_activations_are_refused", moe, FP8(BLOCK ",\"activation_scheme\":\"static\""), -ENOTSUP,
	  "activation_scheme is \"static\", supported: \"dynamic\"" },
	{ "another_method_is_refused", moe, "{\"quantization_config\":{\"quant_method\":\"modelopt\"}}", -ENOTSUP,
	  "quantization_config: quant_method is \"modelopt\", supported: \"fp8\", \"compressed-tensors\"" },
	{ "no_method_is_refused", moe, "{\"quantization_config\":{\"bits\":4}}", -ENOTSUP, "quant_method is null" },
	{ "compressed_integers_are_refused", moe, GROUP("\"num_bits\":8,\"type\":\"int\",\"strategy\":\"block\"", "null"), -ENOTSUP,
	  "config.json: quantization_config.group_0.weights: type is \"int\"" },
	{ "compressed_4_bits_are_refused", moe, GROUP("\"num_bits\":4,\"type\":\"float\",\"strategy\":\"block\"", "null"), -ENOTSUP,
	  "num_bits is 4" },
	{ "compressed_channels_are_refused", moe, GROUP("\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\"", "null"),
	  -ENOTSUP, "strategy is \"channel\", supported: \"block\"" },
	{ "compressed_blocks_of_another_size_are_refused", moe,
	  GROUP("\"num_bits\":8,\"type\":\"float\",\"strategy\":\"block\","
		"\"block_structure\":[128,64]",
		"null"),
	  -ENOTSUP, "block_structure is [128,64]" },
	{ "compressed_static_activations_are_refused", moe, GROUP(WEIGHTS, "{\"num_bits\":8,\"type\":\"float\",\"dynamic\":false}"),
	  -ENOTSUP, "group_0.input_activations: dynamic is false" },
};

static void check_refusal(void **state)
{
	const struct refusal *c = *state;

	assert_int_equal(read_patched(c->base, c->patch), c->code);
	if (!strstr(afd_last_error(), c->text) || !strstr(afd_last_error(), "config.json"))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), c->text);
	assert_null(arch.layers);
}

/* ---- all cases ---- */

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_teardown(test, end)

static const struct CMUnitTest single[] = {
	T(both_spellings_of_the_expert_count_are_read),
	T(both_spellings_may_stand_side_by_side_when_they_agree),
	T(intermediate_size_is_needed_only_for_dense_layers),
	T(a_dense_layer_takes_intermediate_size_and_a_routed_one_the_width_of_experts),
	T(afmoe_rotates_on_sliding_layers_only),
	T(qwen3_moe_rotates_everywhere_and_has_two_norms_and_no_gate),
	T(afmoe_has_four_norms_and_a_gate_of_every_output),
	T(mup_scales_the_embedding_by_the_root_of_its_width),
	T(the_window_of_a_layer_is_the_configs),
	T(nothing_of_attention_is_read_for_an_ffn_only_family),
	T(an_architecture_alone_names_each_family),
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(layers) + N(routers) + N(quantized) + N(refusals)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(layers); i++)
		tests[n++] = (struct CMUnitTest){ layers[i].name, check_layers, NULL, end, (void *)&layers[i] };
	for (i = 0; i < N(routers); i++)
		tests[n++] = (struct CMUnitTest){ routers[i].name, check_router, NULL, end, (void *)&routers[i] };
	for (i = 0; i < N(quantized); i++)
		tests[n++] = (struct CMUnitTest){ quantized[i].name, check_quantized, NULL, end, (void *)&quantized[i] };
	for (i = 0; i < N(refusals); i++)
		tests[n++] = (struct CMUnitTest){ refusals[i].name, check_refusal, NULL, end, (void *)&refusals[i] };
	return cmocka_run_group_tests(tests, make_context, end_context);
}
