/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From config.json to the one description that the stages read. A family is an entry of a table:
 * how its config is read and how its layers are filled. After this nobody asks for the model's type
 * again. Called by model.c.
 */
#include <math.h>
#include <string.h>

#include "config.h"
#include "model.h"

struct family {
	const char *model_type;
	const char *architecture;
	int (*fill)(struct afd__arch *arch, struct afd_context *ctx, struct afd__json *j);
};

static int alloc_layers(struct afd__arch *arch, struct afd_context *ctx,
			const struct afd__config *c)
{
	arch->layers = afd__alloc(ctx, c->n_layers, sizeof(*arch->layers));
	arch->ffn_kinds = arch->layers ? afd__alloc(ctx, c->n_layers, 1) : NULL;
	arch->rope.inv_freq = arch->ffn_kinds ? afd__alloc(ctx, c->head_dim / 2, sizeof(float))
					      : NULL;
	return arch->rope.inv_freq ? 0 : -ENOMEM;
}

static bool slides(const struct afd__config *c, uint32_t layer)
{
	const json_t *type = json_array_get(c->layer_types, layer);

	if (c->layer_types)
		return !strcmp(json_string_value(type), "sliding_attention");
	return c->sliding_window && layer >= c->max_window_layers;
}

static int fill_qwen3(struct afd__arch *arch, struct afd_context *ctx, struct afd__json *j)
{
	struct afd__config c;
	uint32_t i;
	int rc;

	afd__config_read_qwen3(&c, j);
	if (j->error)
		return j->error;
	rc = alloc_layers(arch, ctx, &c);
	if (rc)
		return rc;
	arch->hidden_size = c.hidden_size;
	arch->n_layers = c.n_layers;
	arch->vocab_size = c.vocab_size;
	arch->max_position_embeddings = c.max_positions;
	arch->rms_norm_eps = (float)c.rms_norm_eps;
	arch->embedding_scale = 1;
	arch->tied_head = c.tied_head;
	arch->config_dtype = c.dtype;
	arch->rope.head_dim = c.head_dim;
	for (i = 0; i < c.n_layers; i++) {
		arch->ffn_kinds[i] = AFD_FFN_DENSE;
		arch->layers[i] = (struct afd__layer){
			.attention = slides(&c, i) ? AFD__ATTENTION_SLIDING : AFD__ATTENTION_FULL,
			.window = slides(&c, i) ? c.sliding_window : 0,
			.n_heads = c.n_heads, .n_kv_heads = c.n_kv_heads, .head_dim = c.head_dim,
			.softmax_scale = (float)(1 / sqrt(c.head_dim)),
			.rope = &arch->rope,
			.qk_norm = AFD__QK_NORM_PER_HEAD,
			.output_gate = AFD__OUTPUT_GATE_NONE,
			.attention_bias = c.attention_bias,
			.norms = AFD__NORM_BEFORE_ATTENTION | AFD__NORM_BEFORE_FFN,
			.ffn_kind = AFD_FFN_DENSE,
			.activation = AFD_ACTIVATION_SILU,
			.intermediate_size = c.intermediate_size,
		};
	}
	return afd__rope_compute(arch->rope.inv_freq, &arch->rope.scale, &c.rope, c.head_dim);
}

static const struct family families[] = {
	{ "qwen3", "Qwen3ForCausalLM", fill_qwen3 },
};
#define SUPPORTED "supported: \"qwen3\""

static const struct family *find_family(struct afd__json *j)
{
	const json_t *first = json_array_get(afd__json_array(j, "architectures"), 0);
	const char *type = afd__json_string(j, "model_type", NULL);
	size_t i;

	for (i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
		if (type && !strcmp(type, families[i].model_type))
			return &families[i];
		if (!type && json_is_string(first) &&
		    !strcmp(json_string_value(first), families[i].architecture))
			return &families[i];
	}
	if (type)
		afd__json_refuse_key(j, -ENOTSUP, "model_type", SUPPORTED);
	else if (first)
		afd__json_refuse(j, -ENOTSUP, "architectures[0]", first,
				 "supported: \"Qwen3ForCausalLM\"");
	else
		afd__json_refuse(j, -EBADMSG, "model_type", NULL, "");
	return NULL;
}

int afd__arch_read(struct afd__arch *arch, struct afd_context *ctx, const char *text,
		   size_t n_bytes)
{
	struct afd__json j = { .where = "config.json" };
	const struct family *family;
	json_t *root;
	int rc;

	memset(arch, 0, sizeof(*arch));
	root = afd__json_parse(text, n_bytes, j.where, &rc);
	if (!root)
		return rc;
	j.object = root;
	if (!json_is_object(root)) {
		rc = afd__error(-EBADMSG, "config.json: must be an object");
		goto out;
	}
	family = find_family(&j);
	rc = j.error;
	if (rc || !family)
		goto out;
	arch->name = family->architecture;
	rc = family->fill(arch, ctx, &j);
out:
	json_decref(root);
	if (rc)
		afd__arch_free(arch);
	return rc;
}

void afd__arch_free(struct afd__arch *arch)
{
	afd__free(arch->layers);
	afd__free(arch->ffn_kinds);
	afd__free(arch->rope.inv_freq);
	memset(arch, 0, sizeof(*arch));
}
