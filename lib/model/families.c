/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The families: a table of what a config.json of theirs leaves unsaid, and for each the keys that
 * it alone has. What they share is read in config.c; after arch.c nobody asks for the family again.
 * Where a default of a class describes no published model, the key is required. Called by arch.c.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../context/core.h"
#include "config.h"

#define KEYS(...) ((const char *const[]){ __VA_ARGS__, NULL })

/* ---- experts ---- */

static uint32_t read_one_of(struct afd__json *j, const char *const *keys, int64_t min, int64_t max,
			    int64_t fallback)
{
	return (uint32_t)afd__json_integer(j, afd__json_spelling(j, keys), min, max, fallback);
}

static void read_experts(struct afd__config *c, struct afd__json *j, uint32_t least,
			 const char *width_key)
{
	struct afd__experts_config *e = &c->experts;
	char why[80];

	e->n_experts = read_one_of(j, KEYS("num_experts", "num_local_experts", "n_routed_experts"),
				   least, AFD__MAX_EXPERTS, AFD__JSON_REQUIRED);
	if (!e->n_experts || j->error)
		return;
	e->top_k =
		read_one_of(j, KEYS("num_experts_per_tok"), 1, AFD__MAX_TOP_K, AFD__JSON_REQUIRED);
	e->expert_size =
		read_one_of(j, KEYS(width_key), 1, AFD__MAX_INTERMEDIATE, AFD__JSON_REQUIRED);
	if (e->top_k > e->n_experts) {
		snprintf(why, sizeof(why), "the number of experts is %u", e->n_experts);
		afd__json_refuse_key(j, -EBADMSG, "num_experts_per_tok", why);
	}
	if ((uint64_t)e->n_experts * c->n_layers > AFD__MAX_ALL_EXPERTS) {
		snprintf(why, sizeof(why), "%u layers have %llu experts, limit %d", c->n_layers,
			 (unsigned long long)e->n_experts * c->n_layers, AFD__MAX_ALL_EXPERTS);
		afd__json_refuse_key(j, -EBADMSG, "num_hidden_layers", why);
	}
	e->router = (struct afd__router){ .scale = 1, .n_groups = 1, .top_groups = 1 };
}

/* One MLP, however many experts it was. */
static void read_shared(struct afd__config *c, struct afd__json *j, const char *key)
{
	uint64_t n = (uint64_t)afd__json_integer(j, key, 0, 1024, AFD__JSON_REQUIRED);
	char why[80];

	if (n * c->experts.expert_size > AFD__MAX_INTERMEDIATE) {
		snprintf(why, sizeof(why), "its width is %llu, limit %d",
			 (unsigned long long)n * c->experts.expert_size, AFD__MAX_INTERMEDIATE);
		afd__json_refuse_key(j, -EBADMSG, key, why);
	}
	c->experts.shared_size = (uint32_t)(n * c->experts.expert_size);
}

static void read_scale(struct afd__router *r, struct afd__json *j, const char *key)
{
	r->scale = (float)afd__json_number(j, key, 1e-6, 1e6, 1);
}

static void read_score(struct afd__router *r, struct afd__json *j, const char *key, bool softmax)
{
	const char *score = afd__json_string(j, key, "sigmoid");

	r->score = strcmp(score, "softmax") ? AFD_ROUTER_SIGMOID : AFD_ROUTER_SOFTMAX;
	if (strcmp(score, "sigmoid") && (!softmax || r->score != AFD_ROUTER_SOFTMAX))
		afd__json_refuse_key(j, -ENOTSUP, key,
				     softmax ? "supported: \"sigmoid\", \"softmax\""
					     : "supported: \"sigmoid\"");
}

static void must_be_1(struct afd__json *j, const char *key)
{
	if (afd__json_integer(j, key, 0, INT32_MAX, 1) != 1)
		afd__json_refuse_key(j, -ENOTSUP, key, "supported: 1");
}

/* ---- Qwen3 ---- */

static void read_qwen3(struct afd__config *c, struct afd__json *j)
{
	c->window.first_sliding =
		(uint32_t)afd__json_integer(j, "max_window_layers", 0, INT32_MAX, 28);
	afd__config_read_window(c, j);
}

static void check_dense_layers(struct afd__json *j, const json_t *layers)
{
	char key[48];
	size_t i;

	for (i = 0; i < json_array_size(layers); i++) {
		const json_t *layer = json_array_get(layers, i);

		snprintf(key, sizeof(key), "mlp_only_layers[%zu]", i);
		if (!json_is_integer(layer))
			afd__json_refuse(j, -EBADMSG, key, layer, "must be an integer");
	}
}

/* The class has one window for all layers; a list that says otherwise is of nobody's making. */
static void check_one_window(struct afd__config *c, struct afd__json *j)
{
	char key[40];
	uint32_t i;

	for (i = 0; c->window.layer_types && i < c->n_layers && !j->error; i++) {
		snprintf(key, sizeof(key), "layer_types[%u]", i);
		if (c->window.sliding_window && !afd__config_slides(c, i))
			afd__json_refuse(j, -ENOTSUP, key, json_array_get(c->window.layer_types, i),
					 "supported: one window for all layers of this family");
	}
}

static void read_qwen3_moe(struct afd__config *c, struct afd__json *j)
{
	struct afd__experts_config *e = &c->experts;

	afd__config_read_window(c, j);
	check_one_window(c, j);
	read_experts(c, j, 0, "moe_intermediate_size");
	e->sparse_step = (uint32_t)afd__json_integer(j, "decoder_sparse_step", 1, INT32_MAX, 1);
	e->dense_layers = afd__json_array(j, "mlp_only_layers");
	check_dense_layers(j, e->dense_layers);
	e->router.score = AFD_ROUTER_SOFTMAX;
	e->router.normalize = afd__json_bool(j, "norm_topk_prob", false);
}

/* ---- AFMoE ---- */

static const char *const afmoe_required[] = {
	"head_dim", "rms_norm_eps", "mup_enabled",
	"num_dense_layers", "num_shared_experts", "route_scale", NULL,
};

static void read_afmoe_window(struct afd__config *c, struct afd__json *j)
{
	uint32_t i;

	c->window.layer_types = afd__json_array(j, "layer_types");
	c->window.full_every = (uint32_t)afd__json_integer(j, "global_attn_every_n_layers", 1,
							   INT32_MAX, 4);
	c->window.sliding_window = read_one_of(j, KEYS("sliding_window"), 1, INT32_MAX, 0);
	afd__config_check_window(c, j, "but sliding_window is missing");
	for (i = 0; i < c->n_layers && !j->error && !c->window.layer_types; i++) {
		if (!c->window.sliding_window && (i + 1) % c->window.full_every)
			afd__json_refuse(j, -EBADMSG, "sliding_window", NULL, "");
	}
}

static void read_afmoe(struct afd__config *c, struct afd__json *j)
{
	struct afd__router *r = &c->experts.router;
	const char *norm_key;

	read_afmoe_window(c, j);
	if (afd__json_bool(j, "mup_enabled", false))
		c->embedding_scale = sqrt(c->hidden_size);
	read_experts(c, j, 1, "moe_intermediate_size");
	read_shared(c, j, "num_shared_experts");
	c->experts.n_dense_layers = (uint32_t)afd__json_integer(j, "num_dense_layers", 0,
								AFD__MAX_LAYERS, 0);
	must_be_1(j, afd__json_spelling(j, KEYS("n_group", "num_expert_groups")));
	must_be_1(j, afd__json_spelling(j, KEYS("topk_group", "num_limited_groups")));
	read_score(r, j, afd__json_spelling(j, KEYS("score_func", "scoring_func")), true);
	r->bias = true;
	/* Shares of all experts are never divided by the sum of the chosen. */
	norm_key = afd__json_spelling(j, KEYS("route_norm", "norm_topk_prob"));
	r->normalize = afd__json_bool(j, norm_key, true) && r->score == AFD_ROUTER_SIGMOID;
	r->epsilon = 1e-20f;
	read_scale(r, j, "route_scale");
}

/* ---- the DeepSeek-V3 family: FFN only ---- */

static const char *const deepseek_required[] = {
	"first_k_dense_replace", "n_shared_experts",
	"routed_scaling_factor", "norm_topk_prob", NULL,
};

static void read_groups(struct afd__config *c, struct afd__json *j)
{
	struct afd__router *r = &c->experts.router;
	uint32_t n = c->experts.n_experts;
	char why[120];

	r->n_groups = read_one_of(j, KEYS("n_group"), 1, AFD__MAX_EXPERTS, AFD__JSON_REQUIRED);
	r->top_groups = read_one_of(j, KEYS("topk_group"), 1, r->n_groups, AFD__JSON_REQUIRED);
	if (r->n_groups == 1 || j->error)
		return;
	/* A group is judged by its two best. */
	snprintf(why, sizeof(why), "must divide the %u experts into groups of 2 or more", n);
	if (n % r->n_groups || n / r->n_groups < 2)
		afd__json_refuse_key(j, -EBADMSG, "n_group", why);
	snprintf(why, sizeof(why), "%u groups of %u hold fewer than the %u experts of a row",
		 r->top_groups, n / r->n_groups, c->experts.top_k);
	if ((uint64_t)r->top_groups * (n / r->n_groups) < c->experts.top_k)
		afd__json_refuse_key(j, -EBADMSG, "topk_group", why);
}

static void read_types(struct afd__config *c, struct afd__json *j)
{
	const json_t *types = afd__json_array(j, "mlp_layer_types");
	char key[40];
	uint32_t i;

	if (types && json_array_size(types) != c->n_layers)
		afd__json_refuse(j, -EBADMSG, "mlp_layer_types", types,
				 "must have num_hidden_layers entries");
	for (i = 0; types && i < c->n_layers && !j->error; i++) {
		const char *type = json_string_value(json_array_get(types, i));

		snprintf(key, sizeof(key), "mlp_layer_types[%u]", i);
		if (!type || (strcmp(type, "dense") && strcmp(type, "sparse")))
			afd__json_refuse(j, -ENOTSUP, key, json_array_get(types, i),
					 "supported: \"dense\", \"sparse\"");
	}
	c->experts.types = types;
}

static void read_deepseek(struct afd__config *c, struct afd__json *j)
{
	struct afd__router *r = &c->experts.router;
	const char *method = afd__json_string(j, "topk_method", "noaux_tc");

	read_experts(c, j, 1, "moe_intermediate_size");
	read_shared(c, j, "n_shared_experts");
	c->experts.n_dense_layers = (uint32_t)afd__json_integer(j, "first_k_dense_replace", 0,
								AFD__MAX_LAYERS, 0);
	read_types(c, j);
	must_be_1(j, "moe_layer_freq");
	if (strcmp(method, "noaux_tc"))
		afd__json_refuse_key(j, -ENOTSUP, "topk_method", "supported: \"noaux_tc\"");
	read_score(r, j, "scoring_func", false);
	read_groups(c, j);
	r->bias = true;
	r->normalize = afd__json_bool(j, "norm_topk_prob", true);
	r->epsilon = 1e-20f;
	read_scale(r, j, "routed_scaling_factor");
}

static void read_minimax(struct afd__config *c, struct afd__json *j)
{
	struct afd__router *r = &c->experts.router;

	read_experts(c, j, 1, "intermediate_size");
	if (afd__json_integer(j, "shared_intermediate_size", 0, INT32_MAX, 0))
		afd__json_refuse_key(j, -ENOTSUP, "shared_intermediate_size", "supported: 0");
	if (!afd__json_bool(j, "use_routing_bias", true))
		afd__json_refuse_key(j, -ENOTSUP, "use_routing_bias", "supported: true");
	read_score(r, j, "scoring_func", false);
	r->bias = true;
	r->normalize = true;
}

/* ---- the table ---- */

#define PRE_NORMS (AFD__NORM_BEFORE_ATTENTION | AFD__NORM_BEFORE_FFN)
#define ALL_NORMS (PRE_NORMS | AFD__NORM_AFTER_ATTENTION | AFD__NORM_AFTER_FFN)
#define DEEPSEEK(type, name) \
	{ type, name, .ffn_only = true, .required = deepseek_required, .read = read_deepseek }

static const struct afd__family families[] = {
	{ "qwen3", "Qwen3ForCausalLM", .rope_on_full = true, .output_gate = AFD__OUTPUT_GATE_NONE,
	  .norms = PRE_NORMS, .read = read_qwen3 },
	{ "qwen3_moe", "Qwen3MoeForCausalLM", .rope_on_full = true,
	  .output_gate = AFD__OUTPUT_GATE_NONE, .norms = PRE_NORMS, .read = read_qwen3_moe },
	{ "afmoe", "AfmoeForCausalLM", .output_gate = AFD__OUTPUT_GATE_ELEMENTWISE,
	  .norms = ALL_NORMS, .required = afmoe_required, .read = read_afmoe },
	DEEPSEEK("deepseek_v3", "DeepseekV3ForCausalLM"),
	DEEPSEEK("deepseek_v32", "DeepseekV32ForCausalLM"),
	DEEPSEEK("kimi_k2", "DeepseekV3ForCausalLM"),
	DEEPSEEK("glm4_moe", "Glm4MoeForCausalLM"),
	DEEPSEEK("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
	{ "minimax_m2", "MiniMaxM2ForCausalLM", .ffn_only = true, .read = read_minimax },
	/* as published; an older model of another architecture has the same type */
	{ "minimax", "MiniMaxM2ForCausalLM", .check_architecture = true, .ffn_only = true,
	  .read = read_minimax },
};
#define N_FAMILIES (sizeof(families) / sizeof(families[0]))

static bool is_family(const struct afd__family *f, const char *type, const char *architecture)
{
	bool same = architecture && !strcmp(architecture, f->architecture);

	return type ? !strcmp(type, f->model_type) && (same || !f->check_architecture) : same;
}

const struct afd__family *afd__family_find(struct afd__json *j)
{
	const json_t *first = json_array_get(afd__json_array(j, "architectures"), 0);
	const char *type = afd__json_string(j, "model_type", NULL);
	char why[400] = "supported:";
	size_t i, used;

	for (i = 0; i < N_FAMILIES; i++) {
		if (is_family(&families[i], type, json_string_value(first)))
			return &families[i];
	}
	for (i = 0; i < N_FAMILIES; i++) {
		used = strlen(why);
		snprintf(why + used, sizeof(why) - used, "%s \"%s\"%s", i ? "," : "",
			 type ? families[i].model_type : families[i].architecture,
			 families[i].ffn_only ? " (FFN)" : "");
	}
	if (type)
		afd__json_refuse_key(j, -ENOTSUP, "model_type", why);
	else if (first)
		afd__json_refuse(j, -ENOTSUP, "architectures[0]", first, why);
	else
		afd__json_refuse(j, -EBADMSG, "model_type", NULL, "");
	return NULL;
}
