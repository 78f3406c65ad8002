/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.json as numbers. Unknown keys are ignored; a known key with a value that this library does
 * not compute is refused by name, because ignoring it would give fluent nonsense. Sizes are bounded
 * here, so that later products cannot overflow. Called by arch.c.
 */
#include "config.h"

#include <stdio.h>
#include <string.h>

#include "../context/core.h"

static uint32_t read_size(struct afd__json *j, const char *key, int64_t min, int64_t max,
			  int64_t fallback)
{
	return (uint32_t)afd__json_integer(j, key, min, max, fallback);
}

/* ---- keys that must have one value ---- */

static void refuse_unsupported(struct afd__json *j)
{
	const char *act = afd__json_string(j, "hidden_act", "silu");

	if (strcmp(act, "silu"))
		afd__json_refuse_key(j, -ENOTSUP, "hidden_act", "supported: \"silu\"");
	afd__quantization_check(j);
}

struct name {
	const char *name;
	int32_t dtype;
};

/* What the file says of its tensors; only a fallback, since the tensors themselves say it. */
static int32_t read_dtype(struct afd__json *j)
{
	static const struct name names[] = {
		{ "float32", AFD_DTYPE_F32 },
		{ "bfloat16", AFD_DTYPE_BF16 },
		{ "float16", AFD_DTYPE_F16 },
	};
	const char *name = afd__json_string(j, "dtype", afd__json_string(j, "torch_dtype", ""));
	size_t i;

	for (i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
		if (!strcmp(name, names[i].name))
			return names[i].dtype;
	}
	return 0;
}

/* ---- heads ---- */

static void read_heads(struct afd__config *c, struct afd__json *j)
{
	char why[120];

	c->n_heads = read_size(j, "num_attention_heads", 1, AFD__MAX_HEADS, AFD__JSON_REQUIRED);
	c->n_kv_heads = read_size(j, "num_key_value_heads", 1, AFD__MAX_HEADS, c->n_heads);
	if (c->n_heads % c->n_kv_heads || c->n_heads / c->n_kv_heads > AFD__MAX_HEADS_PER_KV_HEAD) {
		snprintf(why, sizeof(why),
			 "num_attention_heads is %u: must be a multiple, at most %d times as many",
			 c->n_heads, AFD__MAX_HEADS_PER_KV_HEAD);
		afd__json_refuse_key(j, -EBADMSG, "num_key_value_heads", why);
	}
	if (!afd__json_member(j, "head_dim") && c->hidden_size % c->n_heads) {
		snprintf(why, sizeof(why),
			 "head_dim is missing and num_attention_heads %u does not divide it",
			 c->n_heads);
		afd__json_refuse_key(j, -EBADMSG, "hidden_size", why);
	}
	c->head_dim = read_size(j, "head_dim", 2, AFD__MAX_HEAD_DIM, c->hidden_size / c->n_heads);
	if (c->head_dim % 2 || c->head_dim < 2 || c->head_dim > AFD__MAX_HEAD_DIM) {
		snprintf(why, sizeof(why), "head_dim is %u: must be even, limit 2 .. %d",
			 c->head_dim, AFD__MAX_HEAD_DIM);
		afd__json_refuse_key(j, -EBADMSG, "num_attention_heads", why);
	}
}

/* ---- sliding window ---- */

static bool is_sliding(const json_t *type)
{
	return json_is_string(type) && !strcmp(json_string_value(type), "sliding_attention");
}

bool afd__config_slides(const struct afd__config *c, uint32_t layer)
{
	const struct afd__window_config *w = &c->window;

	if (w->layer_types)
		return is_sliding(json_array_get(w->layer_types, layer));
	return w->sliding_window && layer >= w->first_sliding &&
	       !(w->full_every && (layer + 1) % w->full_every == 0);
}

/* Also that types ask for sliding only where there is a window; `why` says what else would be. */
void afd__config_check_window(struct afd__config *c, struct afd__json *j, const char *why)
{
	const json_t *types = c->window.layer_types;
	char key[40], text[80];
	size_t i;

	if (!types || j->error)
		return;
	if (json_array_size(types) != c->n_layers) {
		snprintf(text, sizeof(text), "has %zu entries, num_hidden_layers is %u",
			 json_array_size(types), c->n_layers);
		afd__json_refuse(j, -EBADMSG, "layer_types", types, text);
		return;
	}
	for (i = 0; i < c->n_layers; i++) {
		const json_t *type = json_array_get(types, i);

		snprintf(key, sizeof(key), "layer_types[%zu]", i);
		if (!json_is_string(type))
			afd__json_refuse(j, -EBADMSG, key, type, "must be a string");
		else if (!is_sliding(type) && strcmp(json_string_value(type), "full_attention"))
			afd__json_refuse(j, -ENOTSUP, key, type,
					 "supported: \"full_attention\", \"sliding_attention\"");
		else if (is_sliding(type) && !c->window.sliding_window)
			afd__json_refuse(j, -EBADMSG, key, type, why);
	}
}

/* A window counts only under use_sliding_window, in either Qwen3 class. */
void afd__config_read_window(struct afd__config *c, struct afd__json *j)
{
	bool used = afd__json_bool(j, "use_sliding_window", false);
	const json_t *window = json_object_get(j->object, "sliding_window");

	if (used && !json_is_null(window))
		c->window.sliding_window = read_size(j, "sliding_window", 1, INT32_MAX, 4096);
	c->window.layer_types = afd__json_array(j, "layer_types");
	afd__config_check_window(c, j, "but use_sliding_window is false or sliding_window is null");
}

/* ---- all of it ---- */

static void check_required(const struct afd__family *family, struct afd__json *j)
{
	const char *const *key;

	for (key = family->required; key && *key; key++) {
		if (!afd__json_member(j, *key))
			afd__json_refuse(j, -EBADMSG, *key, NULL, "");
	}
}

static void read_attention(struct afd__config *c, struct afd__json *j)
{
	if (afd__json_number(j, "partial_rotary_factor", 0, 1, 1) != 1)
		afd__json_refuse_key(j, -ENOTSUP, "partial_rotary_factor", "supported: 1");
	c->attention_bias = afd__json_bool(j, "attention_bias", false);
	read_heads(c, j);
	afd__rope_config_read(&c->rope, j, c->max_positions);
}

bool afd__config_routes(const struct afd__config *c, uint32_t layer)
{
	const struct afd__experts_config *e = &c->experts;
	size_t i;

	if (!e->n_experts)
		return false;
	if (e->types)
		return !strcmp(json_string_value(json_array_get(e->types, layer)), "sparse");
	for (i = 0; i < json_array_size(e->dense_layers); i++) {
		if (json_integer_value(json_array_get(e->dense_layers, i)) == layer)
			return false;
	}
	return layer >= e->n_dense_layers && (layer + 1) % e->sparse_step == 0;
}

/* The width of dense layers; where there are none the key may be missing, and means nothing. */
static void read_dense_size(struct afd__config *c, struct afd__json *j)
{
	bool needed = false;
	uint32_t i;

	for (i = 0; i < c->n_layers && !needed && !j->error; i++)
		needed = !afd__config_routes(c, i);
	c->intermediate_size = read_size(j, "intermediate_size", 1, AFD__MAX_INTERMEDIATE,
					 needed ? AFD__JSON_REQUIRED : 0);
}

void afd__config_read(struct afd__config *c, const struct afd__family *family, struct afd__json *j)
{
	memset(c, 0, sizeof(*c));
	refuse_unsupported(j);
	check_required(family, j);
	c->hidden_size = read_size(j, "hidden_size", 1, AFD__MAX_HIDDEN, AFD__JSON_REQUIRED);
	c->n_layers = read_size(j, "num_hidden_layers", 1, AFD__MAX_LAYERS, AFD__JSON_REQUIRED);
	c->vocab_size = read_size(j, "vocab_size", 1, AFD__MAX_VOCAB, AFD__JSON_REQUIRED);
	c->max_positions = read_size(j, "max_position_embeddings", 1, INT32_MAX, 32768);
	c->rms_norm_eps = afd__json_number(j, "rms_norm_eps", 1e-30, 1, 1e-6);
	c->tied_head = afd__json_bool(j, "tie_word_embeddings", false);
	c->dtype = read_dtype(j);
	c->embedding_scale = 1;
	c->experts.sparse_step = 1;
	if (!family->ffn_only)
		read_attention(c, j);
	family->read(c, j);
	read_dense_size(c, j);
}
