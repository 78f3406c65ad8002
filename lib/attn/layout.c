/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where K and V lie in the pool: layer by layer, page by page; in a page all of K, then all of V,
 * head by head, so that a head reads its positions in one run. The layout is public: a host can
 * export and import KV, or own the memory.
 *
 * Page ids are counted per group of layers that see the same window; each group uses its own
 * layers' part of the pool. Layers with a window have fewer pages where that many can never be in
 * use at once.
 */
#include <assert.h>

#include "attn.h"

static int multiply(size_t *out, size_t a, size_t b)
{
	if (__builtin_mul_overflow(a, b, out))
		return afd__error(-EINVAL, "KV cache: %zu times %zu bytes overflow", a, b);
	return 0;
}

uint32_t afd__attn_layer_pages(
	const struct afd__layer *layer, const struct afd_attn_params *params)
{
	uint64_t most;

	if (!layer->window)
		return params->kv_pages;
	most = afd__kv_most_pages(layer->window, params->page_size, params->max_sequences,
		params->max_rows, params->rollback);
	return most < params->kv_pages ? (uint32_t)most : params->kv_pages;
}

/* layer_bytes stays 0 where layers differ. */
static int add_layers(struct afd_kv_layout *layout, const struct afd__arch *arch,
	const struct afd_attn_params *params)
{
	uint32_t first = afd__attn_layer_pages(&arch->layers[0], params), i;
	bool alike = true;
	size_t bytes;
	int rc = 0;

	for (i = 0; !rc && i < arch->n_layers; i++) {
		uint32_t n_pages = afd__attn_layer_pages(&arch->layers[i], params);

		alike &= n_pages == first;
		rc = multiply(&bytes, layout->page_bytes, n_pages);
		if (!rc && __builtin_add_overflow(
				   layout->memory_bytes, bytes, &layout->memory_bytes))
			rc = afd__error(-EINVAL, "KV cache: %u layers of %zu bytes overflow",
				arch->n_layers, bytes);
	}
	if (!rc && alike)
		layout->layer_bytes = layout->page_bytes * first;
	return rc;
}

int afd__attn_layout_plan(struct afd_kv_layout *layout, const struct afd__arch *arch,
	const struct afd_attn_params *params)
{
	const struct afd__layer *first = &arch->layers[0];
	struct afd__range heads = afd__shard_heads(first->n_heads, first->n_kv_heads,
		params->group_index, params->group_size).kv;
	uint32_t n_kv_heads = afd__range_size(heads), i;
	int rc;

	for (i = 0; i < arch->n_layers; i++)
		assert(arch->layers[i].n_heads == first->n_heads &&
			arch->layers[i].n_kv_heads == first->n_kv_heads &&
			arch->layers[i].head_dim == first->head_dim);
	*layout = (struct afd_kv_layout){
		.size = sizeof(*layout),
		.n_layers = arch->n_layers,
		.n_pages = params->kv_pages,
		.page_size = params->page_size,
		.n_kv_heads = n_kv_heads,
		.head_dim = first->head_dim,
		.dtype = params->kv_dtype,
	};
	layout->position_bytes = first->head_dim * afd_dtype_bytes(params->kv_dtype);
	rc = multiply(&layout->head_bytes, layout->position_bytes, params->page_size);
	rc = rc ? rc : multiply(&layout->kv_bytes, layout->head_bytes, n_kv_heads);
	rc = rc ? rc : multiply(&layout->page_bytes, layout->kv_bytes, 2);
	return rc ? rc : add_layers(layout, arch, params);
}

void afd__attn_kv_view(const struct afd_attn *attn, uint32_t layer, struct afd__kv_view *view)
{
	const struct afd_kv_layout *l = &attn->layout;

	*view = (struct afd__kv_view){
		.data = (char *)l->memory + attn->layer_at[layer],
		.page_stride = l->page_bytes,
		.v_offset = l->kv_bytes,
		.head_stride = l->head_bytes,
		.position_stride = l->position_bytes,
		.page_size = l->page_size,
		.n_kv_heads = l->n_kv_heads,
		.head_dim = l->head_dim,
		.dtype = l->dtype,
		.k_scale = attn->weights.layers[layer].k_scale,
		.v_scale = attn->weights.layers[layer].v_scale,
	};
}

void afd__attn_layout_scales(struct afd_attn *attn)
{
	const struct afd__attn_layer *first = &attn->weights.layers[0];
	struct afd_kv_layout *l = &attn->layout;
	uint32_t i;

	l->k_scale = first->k_scale;
	l->v_scale = first->v_scale;
	for (i = 1; i < l->n_layers; i++) {
		l->k_scale = first[i].k_scale == l->k_scale ? l->k_scale : 0;
		l->v_scale = first[i].v_scale == l->v_scale ? l->v_scale : 0;
	}
}

int afd__attn_groups_create(struct afd_attn *attn, uint32_t *n_groups)
{
	uint32_t n_layers = attn->arch->n_layers, n = 0, layer, g;
	size_t at = 0;

	attn->groups = afd__alloc(attn->ctx, n_layers, sizeof(*attn->groups));
	attn->windows = afd__alloc(attn->ctx, n_layers, sizeof(*attn->windows));
	attn->group_pages = afd__alloc(attn->ctx, n_layers, sizeof(*attn->group_pages));
	attn->layer_at = afd__alloc(attn->ctx, n_layers, sizeof(*attn->layer_at));
	if (!attn->groups || !attn->windows || !attn->group_pages || !attn->layer_at)
		return -ENOMEM;
	for (layer = 0; layer < n_layers; layer++) {
		const struct afd__layer *l = &attn->arch->layers[layer];

		for (g = 0; g < n && attn->windows[g] != l->window;)
			g++;
		attn->windows[g] = l->window;
		attn->group_pages[g] = afd__attn_layer_pages(l, &attn->params);
		attn->groups[layer] = g;
		attn->layer_at[layer] = at;
		at += attn->layout.page_bytes * attn->group_pages[g];
		n = g == n ? n + 1 : n;
	}
	*n_groups = n;
	return 0;
}

int afd_attn_kv_layout(const afd_attn *attn, struct afd_kv_layout *layout)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	return rc ? rc : afd__params_give(layout, &attn->layout, sizeof(attn->layout), "KV layout");
}

static int check_layer(const struct afd_attn *attn, uint32_t layer)
{
	if (layer >= attn->arch->n_layers)
		return afd__error(
			-EINVAL, "attn: layer %u, the model has %u", layer, attn->arch->n_layers);
	return 0;
}

int afd_attn_kv_layer(const afd_attn *attn, uint32_t layer, struct afd_kv_layer *out)
{
	struct afd_kv_layer of_layer = { .size = sizeof(of_layer) };
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	rc = rc ? rc : check_layer(attn, layer);
	if (rc)
		return rc;
	of_layer.offset = attn->layer_at[layer];
	of_layer.n_pages = attn->group_pages[attn->groups[layer]];
	of_layer.window = attn->arch->layers[layer].window;
	of_layer.k_scale = attn->weights.layers[layer].k_scale;
	of_layer.v_scale = attn->weights.layers[layer].v_scale;
	return afd__params_give(out, &of_layer, sizeof(of_layer), "KV layer");
}

int afd_attn_pages(
	const afd_attn *attn, uint64_t sequence, uint32_t layer, int32_t *ids, uint32_t capacity)
{
	uint32_t n, i;
	int rc = afd__attn_check_idle(attn), index;

	rc = rc ? rc : check_layer(attn, layer);
	if (rc)
		return rc;
	index = afd__sequences_find(&attn->sequences, sequence);
	if (index < 0)
		return index;
	n = afd__kv_pages(&attn->kv, attn->kv.sequences[index].length);
	if (n > capacity)
		return afd__error(-ENOSPC, "sequence %llu: %u pages, capacity is %u",
			(unsigned long long)sequence, n, capacity);
	if (n && !ids)
		return afd__error(
			-EINVAL, "sequence %llu: ids is NULL", (unsigned long long)sequence);
	for (i = 0; i < n; i++)
		ids[i] = afd__kv_list(&attn->kv, (uint32_t)index, attn->groups[layer])[i];
	return (int)n;
}
