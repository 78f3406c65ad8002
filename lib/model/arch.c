/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From config.json to the one description that the stages read: a record per layer, filled in the
 * same way for every family. After this nobody asks for the model's type again. Called by model.c.
 */
#include <math.h>
#include <string.h>

#include "config.h"

static int alloc_layers(struct afd__arch *arch, struct afd_context *ctx,
			const struct afd__config *c)
{
	arch->layers = afd__alloc(ctx, c->n_layers, sizeof(*arch->layers));
	arch->ffn_kinds = arch->layers ? afd__alloc(ctx, c->n_layers, 1) : NULL;
	/* A table of at least one pair, also where nothing rotates. */
	arch->rope.inv_freq = arch->ffn_kinds ? afd__alloc(ctx, c->head_dim / 2 + 1, sizeof(float))
					      : NULL;
	return arch->rope.inv_freq ? 0 : -ENOMEM;
}

static void fill_attention(struct afd__layer *l, const struct afd__arch *arch,
			   const struct afd__config *c, const struct afd__family *f, bool slides)
{
	l->attention = slides ? AFD__ATTENTION_SLIDING : AFD__ATTENTION_FULL;
	l->window = slides ? c->window.sliding_window : 0;
	l->n_heads = c->n_heads;
	l->n_kv_heads = c->n_kv_heads;
	l->head_dim = c->head_dim;
	l->softmax_scale = (float)(1 / sqrt(c->head_dim));
	l->rope = slides || f->rope_on_full ? &arch->rope : NULL;
	l->qk_norm = AFD__QK_NORM_PER_HEAD;
	l->output_gate = f->output_gate;
	l->attention_bias = c->attention_bias;
	l->norms = f->norms;
}

static void fill_ffn(struct afd__layer *l, const struct afd__config *c, bool routes)
{
	l->ffn_kind = routes ? AFD_FFN_MOE : AFD_FFN_DENSE;
	l->activation = AFD_ACTIVATION_SILU;
	if (!routes) {
		l->intermediate_size = c->intermediate_size;
		return;
	}
	l->n_experts = c->experts.n_experts;
	l->top_k = c->experts.top_k;
	l->expert_size = c->experts.expert_size;
	l->shared_size = c->experts.shared_size;
	l->router = c->experts.router;
}

static int fill(struct afd__arch *arch, struct afd_context *ctx, const struct afd__config *c,
		const struct afd__family *f)
{
	uint32_t i;
	int rc = alloc_layers(arch, ctx, c);

	if (rc)
		return rc;
	arch->name = f->architecture;
	arch->model_type = f->model_type;
	arch->ffn_only = f->ffn_only;
	arch->hidden_size = c->hidden_size;
	arch->n_layers = c->n_layers;
	arch->vocab_size = c->vocab_size;
	arch->max_position_embeddings = c->max_positions;
	arch->rms_norm_eps = (float)c->rms_norm_eps;
	arch->embedding_scale = (float)c->embedding_scale;
	arch->tied_head = c->tied_head;
	arch->config_dtype = c->dtype;
	for (i = 0; i < c->n_layers; i++) {
		fill_ffn(&arch->layers[i], c, afd__config_routes(c, i));
		arch->ffn_kinds[i] = (uint8_t)arch->layers[i].ffn_kind;
		if (!f->ffn_only)
			fill_attention(&arch->layers[i], arch, c, f, afd__config_slides(c, i));
	}
	if (f->ffn_only)
		return 0;
	arch->rope.head_dim = c->head_dim;
	return afd__rope_compute(arch->rope.inv_freq, &arch->rope.scale, &c->rope, c->head_dim);
}

int afd__arch_read(struct afd__arch *arch, struct afd_context *ctx, const char *text,
		   size_t n_bytes)
{
	struct afd__json j = { .where = "config.json" };
	const struct afd__family *family;
	struct afd__config config;
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
	family = afd__family_find(&j);
	if (family && !j.error)
		afd__config_read(&config, family, &j);
	rc = j.error ? j.error : fill(arch, ctx, &config, family);
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
