/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.json: each spelling gives the architecture that transformers would make of it, and what is
 * not supported, absurd or of the wrong type is refused by the name of its key. Every case is a
 * patch of one small config.
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

static const char base[] = "{\"model_type\":\"qwen3\",\"hidden_size\":48,\"intermediate_size\":70,\"num_hidden_layers\":4,"
	"\"num_attention_heads\":6,\"num_key_value_heads\":2,\"head_dim\":16,\"vocab_size\":150,"
	"\"max_position_embeddings\":128,\"rope_theta\":1000000.0,\"attention_dropout\":0,\"unknown\":[1,{}]}";

static afd_context *ctx;

static int make_context(void **state)
{
	return afd_context_create(&ctx, NULL);
}

static int end_context(void **state)
{
	afd_context_destroy(ctx);
	return 0;
}

/* The base with the keys of patch put over it; a key with the value "-" is removed. */
static char *patched(const char *patch)
{
	json_t *root = json_loads(base, 0, NULL), *over = json_loads(patch, 0, NULL), *value;
	const char *key;
	char *text;

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
	return text;
}

static int read_patched(struct afd__arch *arch, const char *patch)
{
	char *text = patched(patch);
	int rc = afd__arch_read(arch, ctx, text, strlen(text));

	free(text);
	return rc;
}

static void accept_patched(struct afd__arch *arch, const char *patch)
{
	int rc = read_patched(arch, patch);

	if (rc)
		fail_msg("%s: %s", patch, afd_last_error());
}

/* ---- what is accepted ---- */

struct spelling {
	const char *name, *patch;
	double inv_freq_1; /* of the second pair: theta^(-1/8) when nothing is scaled */
	double scale;
};

/* With theta 1e6 and head_dim 16 frequency 1 is 0.17782794 unscaled. YaRN's numbers are those of
 * transformers 5. */
static const struct spelling spellings[] = {
	{ "rope_theta_stands_at_the_top", "{}", 0.17782794, 1 },
	{ "rope_theta_may_be_an_integer", "{\"rope_theta\":1000000}", 0.17782794, 1 },
	{ "rope_theta_may_have_an_exponent", "{\"rope_theta\":1e6}", 0.17782794, 1 },
	{ "rope_theta_is_10000_when_missing", "{\"rope_theta\":\"-\"}", 0.31622777, 1 },
	{ "rope_theta_null_is_missing", "{\"rope_theta\":null}", 0.31622777, 1 },
	{ "rope_scaling_null_is_none", "{\"rope_scaling\":null}", 0.17782794, 1 },
	{ "rope_parameters_hold_theta",
	  "{\"rope_theta\":\"-\",\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000}}", 0.31622777, 1 },
	{ "theta_in_rope_parameters_wins", "{\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":10000}}", 0.31622777,
	  1 },
	{ "rope_scaling_wins_over_rope_parameters",
	  "{\"rope_parameters\":{\"rope_theta\":5},\"rope_scaling\":{\"type\":\"default\",\"rope_theta\":10000}}", 0.31622777, 1 },
	{ "partial_rotary_factor_1_is_none", "{\"partial_rotary_factor\":1.0}", 0.17782794, 1 },
	{ "yarn_in_the_old_spelling_scales",
	  "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,"
	  "\"original_max_position_embeddings\":32}}",
	  0.04445698485, 1.1386294 },
	{ "yarn_in_the_new_spelling_scales",
	  "{\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":4.0,"
	  "\"original_max_position_embeddings\":32}}",
	  0.04445698485, 1.1386294 },
	{ "yarn_factor_null_is_the_ratio_of_positions",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":null,"
	  "\"original_max_position_embeddings\":32}}",
	  0.04445698485, 1.1386294 },
	{ "yarn_takes_attention_factor",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"attention_factor\":0.5,"
	  "\"original_max_position_embeddings\":32}}",
	  0.04445698485, 0.5 },
	{ "yarn_takes_both_mscales",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":1,"
	  "\"mscale_all_dim\":0.5,\"original_max_position_embeddings\":32}}",
	  0.04445698485, 1.0648216 },
	{ "yarn_ignores_one_mscale_alone",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":0.5,"
	  "\"original_max_position_embeddings\":32}}",
	  0.04445698485, 1.1386294 },
	{ "yarn_beta_zero_is_the_default",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"beta_fast\":0,"
	  "\"beta_slow\":null,\"original_max_position_embeddings\":32}}",
	  0.04445698485, 1.1386294 },
	{ "yarn_without_truncate_keeps_fractions_of_dimensions",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,"
	  "\"truncate\":false,\"original_max_position_embeddings\":512}}",
	  0.1473408937, 1.1386294 },
	{ "yarn_truncates_its_ramp_to_whole_dimensions",
	  "{\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,"
	  "\"original_max_position_embeddings\":512}}",
	  0.1333709508, 1.1386294 },
};

static void check_spelling(void **state)
{
	const struct spelling *c = *state;
	struct afd__arch arch;

	accept_patched(&arch, c->patch);
	assert_true(fabs(arch.rope.inv_freq[1] - c->inv_freq_1) < 1e-7 * c->inv_freq_1);
	assert_true(fabs(arch.rope.scale - c->scale) < 1e-6);
	afd__arch_free(&arch);
}

static void missing_head_dim_is_hidden_size_over_heads(void **state)
{
	struct afd__arch arch;

	accept_patched(&arch, "{\"head_dim\":null}");
	assert_int_equal(arch.layers[0].head_dim, 8);
	assert_int_equal(arch.rope.head_dim, 8);
	afd__arch_free(&arch);
}

static void missing_kv_heads_are_as_many_as_heads(void **state)
{
	struct afd__arch arch;

	accept_patched(&arch, "{\"num_key_value_heads\":null}");
	assert_int_equal(arch.layers[3].n_kv_heads, 6);
	afd__arch_free(&arch);
}

static void both_spellings_of_the_dtype_are_read(void **state)
{
	struct afd__arch arch;

	accept_patched(&arch, "{\"torch_dtype\":\"float16\"}");
	assert_int_equal(arch.config_dtype, AFD_DTYPE_F16);
	afd__arch_free(&arch);
	accept_patched(&arch, "{\"dtype\":\"bfloat16\"}");
	assert_int_equal(arch.config_dtype, AFD_DTYPE_BF16);
	afd__arch_free(&arch);
}

static void an_architecture_alone_names_the_family(void **state)
{
	struct afd__arch arch;

	accept_patched(&arch, "{\"model_type\":\"-\",\"architectures\":[\"Qwen3ForCausalLM\"]}");
	assert_string_equal(arch.name, "Qwen3ForCausalLM");
	afd__arch_free(&arch);
}

/* ---- sliding windows ---- */

struct window {
	const char *name, *patch;
	uint32_t windows[4];
};

static const struct window windows[] = {
	{ "a_window_that_is_not_used_is_none", "{\"sliding_window\":8}", { 0, 0, 0, 0 } },
	{ "a_window_starts_at_max_window_layers",
		"{\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":2}",
	  { 0, 0, 8, 8 } },
	{ "max_window_layers_is_28_when_missing",
		"{\"use_sliding_window\":true,\"sliding_window\":8}", { 0, 0, 0, 0 } },
	{ "a_window_of_null_is_none",
		"{\"use_sliding_window\":true,\"sliding_window\":null,\"max_window_layers\":0}",
	  { 0, 0, 0, 0 } },
	{ "layer_types_win_over_max_window_layers",
	  "{\"use_sliding_window\":true,\"sliding_window\":8,\"max_window_layers\":0,\"layer_types\":[\"full_attention\","
	  "\"sliding_attention\",\"full_attention\",\"sliding_attention\"]}", { 0, 8, 0, 8 } },
};

static void check_window(void **state)
{
	const struct window *c = *state;
	struct afd__arch arch;
	uint32_t i;

	accept_patched(&arch, c->patch);
	for (i = 0; i < 4; i++) {
		assert_int_equal(arch.layers[i].window, c->windows[i]);
		assert_int_equal(arch.layers[i].attention,
				 c->windows[i] ? AFD__ATTENTION_SLIDING : AFD__ATTENTION_FULL);
	}
	afd__arch_free(&arch);
}

/* ---- what is refused ---- */

struct refusal {
	const char *name, *patch;
	int code;
	const char *text; /* a part of the error */
};

static const struct refusal refusals[] = {
	{ "another_model_type_is_refused_with_what_is_supported", "{\"model_type\":\"llama\"}",
		-ENOTSUP,
	  "model_type is \"llama\", supported: \"qwen3\"" },
	{ "another_architecture_is_refused", "{\"model_type\":null,\"architectures\":[\"LlamaForCausalLM\"]}", -ENOTSUP,
	  "architectures[0] is \"LlamaForCausalLM\"" },
	{ "no_model_type_is_refused", "{\"model_type\":\"-\"}", -EBADMSG, "model_type is missing" },
	{ "fp8_without_blocks_is_refused", "{\"quantization_config\":{\"quant_method\":\"fp8\"}}", -ENOTSUP,
	  "quantization_config: weight_block_size is null, supported: [128, 128]" },
	{ "another_activation_is_refused", "{\"hidden_act\":\"gelu\"}", -ENOTSUP, "hidden_act is \"gelu\", supported: \"silu\"" },
	{ "another_rope_type_is_refused", "{\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}}", -ENOTSUP,
	  "rope_scaling: rope_type is \"llama3\", supported: \"default\", \"yarn\"" },
	{ "another_rope_type_is_refused_in_the_old_key",
		"{\"rope_scaling\":{\"type\":\"linear\",\"factor\":8}}", -ENOTSUP,
	  "rope_scaling: type is \"linear\"" },
	{ "another_rope_type_is_refused_in_the_new_spelling",
		"{\"rope_parameters\":{\"rope_type\":\"dynamic\"}}", -ENOTSUP,
	  "rope_parameters: rope_type is \"dynamic\"" },
	{ "rope_by_layer_type_is_refused",
		"{\"rope_parameters\":{\"full_attention\":{\"rope_theta\":5}}}", -ENOTSUP,
	  "full_attention is" },
	{ "partial_rotation_is_refused", "{\"partial_rotary_factor\":0.5}", -ENOTSUP,
		"partial_rotary_factor is 0.5" },
	{ "partial_rotation_is_refused_in_rope_parameters",
		"{\"rope_parameters\":{\"partial_rotary_factor\":0.25}}", -ENOTSUP,
	  "rope_parameters: partial_rotary_factor is 0.25" },
	{ "yarn_factor_below_1_is_refused", "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":0.5}}",
		-EBADMSG, "factor is 0.5" },
	{ "yarn_mscales_that_give_no_factor_are_refused",
	  "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"mscale\":-100,\"mscale_all_dim\":1}}", -ENOTSUP, "mscale -100" },
	{ "an_attention_factor_of_0_is_refused",
		"{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"attention_factor\":0}}",
	  -EBADMSG, "attention_factor is 0" },
	{ "a_fraction_for_a_size_is_refused", "{\"hidden_size\":180.5}", -EBADMSG,
		"hidden_size is 180.5, must be an integer" },
	{ "a_string_for_a_size_is_refused", "{\"vocab_size\":\"150\"}", -EBADMSG,
		"vocab_size is \"150\", must be an integer" },
	{ "a_boolean_for_a_size_is_refused", "{\"head_dim\":true}", -EBADMSG,
		"head_dim is true, must be an integer" },
	{ "a_number_for_a_boolean_is_refused", "{\"tie_word_embeddings\":1}", -EBADMSG,
		"tie_word_embeddings is 1" },
	{ "a_string_for_theta_is_refused", "{\"rope_theta\":\"1e6\"}", -EBADMSG,
		"rope_theta is \"1e6\", must be a number" },
	{ "a_list_for_rope_scaling_is_refused", "{\"rope_scaling\":[1]}", -EBADMSG,
		"rope_scaling is [1], must be an object" },
	{ "a_missing_size_is_refused", "{\"hidden_size\":\"-\"}", -EBADMSG,
		"hidden_size is missing" },
	{ "a_size_of_null_is_refused", "{\"num_hidden_layers\":null}", -EBADMSG,
		"num_hidden_layers is missing" },
	{ "too_many_layers_are_refused", "{\"num_hidden_layers\":1025}", -EBADMSG,
		"num_hidden_layers is 1025, limit 1 .. 1024" },
	{ "absurd_layers_are_refused", "{\"num_hidden_layers\":9223372036854775807}", -EBADMSG,
		"limit 1 .. 1024" },
	{ "no_layers_are_refused", "{\"num_hidden_layers\":0}", -EBADMSG,
		"num_hidden_layers is 0" },
	{ "negative_sizes_are_refused", "{\"hidden_size\":-4}", -EBADMSG,
		"hidden_size is -4, limit 1 .. 65536" },
	{ "absurd_hidden_sizes_are_refused", "{\"hidden_size\":65537}", -EBADMSG,
		"limit 1 .. 65536" },
	{ "absurd_widths_are_refused", "{\"intermediate_size\":2000000}", -EBADMSG,
		"intermediate_size is 2000000" },
	{ "absurd_vocabularies_are_refused", "{\"vocab_size\":16777217}", -EBADMSG,
		"limit 1 .. 16777216" },
	{ "absurd_heads_are_refused", "{\"num_attention_heads\":1025}", -EBADMSG,
		"num_attention_heads is 1025" },
	{ "odd_head_dims_are_refused", "{\"head_dim\":15}", -EBADMSG,
		"head_dim is 15: must be even" },
	{ "absurd_head_dims_are_refused", "{\"head_dim\":514}", -EBADMSG,
		"head_dim is 514, limit 2 .. 512" },
	{ "heads_that_do_not_divide_are_refused", "{\"num_key_value_heads\":4}", -EBADMSG,
		"num_key_value_heads is 4" },
	{ "too_many_heads_per_kv_head_are_refused",
		"{\"num_attention_heads\":128,\"num_key_value_heads\":1}", -EBADMSG,
	  "at most 64 times" },
	{ "a_missing_head_dim_that_does_not_divide_is_refused",
		"{\"head_dim\":null,\"num_attention_heads\":10}", -EBADMSG,
	  "num_attention_heads 10 does not divide it" },
	{ "an_absurd_window_is_refused", "{\"use_sliding_window\":true,\"sliding_window\":0}",
		-EBADMSG, "sliding_window is 0" },
	{ "unknown_layer_types_are_refused",
		"{\"layer_types\":[\"full_attention\",\"linear_attention\",\"full_attention\","
	  "\"full_attention\"]}", -ENOTSUP, "layer_types[1] is \"linear_attention\"" },
	{ "too_few_layer_types_are_refused", "{\"layer_types\":[\"full_attention\"]}", -EBADMSG,
	  "has 1 entries, num_hidden_layers is 4" },
	{ "layer_types_of_another_type_are_refused", "{\"layer_types\":[1,2,3,4]}", -EBADMSG,
		"layer_types[0] is 1" },
	{ "sliding_layers_without_a_window_are_refused",
		"{\"layer_types\":[\"full_attention\",\"sliding_attention\","
	  "\"full_attention\",\"full_attention\"]}", -EBADMSG, "use_sliding_window is false" },
	{ "an_absurd_eps_is_refused", "{\"rms_norm_eps\":-1e-6}", -EBADMSG, "rms_norm_eps is -1" },
	{ "a_theta_of_1_is_refused", "{\"rope_theta\":1}", -EBADMSG, "rope_theta is 1" },
};

static void check_refusal(void **state)
{
	const struct refusal *c = *state;
	struct afd__arch arch;

	assert_int_equal(read_patched(&arch, c->patch), c->code);
	if (!strstr(afd_last_error(), c->text) || !strstr(afd_last_error(), "config.json"))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), c->text);
	assert_null(arch.layers);
}

static void check_not_json(void **state)
{
	const char *text = *state;
	struct afd__arch arch;

	assert_int_equal(afd__arch_read(&arch, ctx, text, strlen(text)), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "config.json"));
}

static void a_syntax_error_is_told_with_its_line(void **state)
{
	const char text[] = "{\"model_type\": \"qwen3\",\n \"hidden_size\": }";
	struct afd__arch arch;

	assert_int_equal(afd__arch_read(&arch, ctx, text, strlen(text)), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "config.json: not JSON at line 2, column 17"));
}

/* ---- all cases ---- */

#define N(array) (sizeof(array) / sizeof((array)[0]))

static const struct CMUnitTest single[] = {
	cmocka_unit_test(missing_head_dim_is_hidden_size_over_heads),
	cmocka_unit_test(missing_kv_heads_are_as_many_as_heads),
	cmocka_unit_test(both_spellings_of_the_dtype_are_read),
	cmocka_unit_test(an_architecture_alone_names_the_family),
	cmocka_unit_test(a_syntax_error_is_told_with_its_line),
	{ "text_that_is_no_json_is_refused", check_not_json, NULL, NULL, "{\"hidden_size\": }" },
	{ "duplicate_keys_are_refused", check_not_json, NULL, NULL,
		"{\"model_type\":\"qwen3\",\"model_type\":\"qwen3\"}" },
	{ "two_objects_are_refused", check_not_json, NULL, NULL, "{\"model_type\":\"qwen3\"},{}" },
	{ "a_bracket_behind_the_object_is_refused", check_not_json, NULL, NULL,
		"{\"model_type\":\"qwen3\"}],[{}" },
	{ "an_empty_text_is_refused", check_not_json, NULL, NULL, "" },
	{ "a_list_for_a_config_is_refused", check_not_json, NULL, NULL, "[1]" },
	{ "a_number_beyond_64_bits_is_refused", check_not_json, NULL, NULL,
		"{\"hidden_size\":99999999999999999999}" },
	{ "a_number_beyond_double_is_refused", check_not_json, NULL, NULL,
		"{\"rope_theta\":1e999}" },
	{ "nan_is_refused", check_not_json, NULL, NULL, "{\"rope_theta\":NaN}" },
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(spellings) + N(windows) + N(refusals)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(spellings); i++)
		tests[n++] = (struct CMUnitTest){ spellings[i].name, check_spelling, NULL, NULL,
			(void *)&spellings[i] };
	for (i = 0; i < N(windows); i++)
		tests[n++] = (struct CMUnitTest){ windows[i].name, check_window, NULL, NULL,
			(void *)&windows[i] };
	for (i = 0; i < N(refusals); i++)
		tests[n++] = (struct CMUnitTest){ refusals[i].name, check_refusal, NULL, NULL,
			(void *)&refusals[i] };
	return cmocka_run_group_tests(tests, make_context, end_context);
}
