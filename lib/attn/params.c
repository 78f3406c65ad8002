/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parameters of an attention stage: every default filled in, every limit checked, before
 * anything is allocated. What the transport says is not said a second time. Called when a stage is
 * made.
 */
#include "attn.h"

enum {
	MAX_SEQUENCES = 1048576,
	MAX_ROWS = 65536,
	MAX_PAGE_SIZE = 65536,
	DEFAULT_SEQUENCES = 64,
	DEFAULT_ROWS = 2048,
	DEFAULT_PAGE_SIZE = 16,
	DEFAULT_POSITIONS = 4096,
	MAX_DEFAULT_POSITIONS = 1 << 20, /* page lists are as long as this */
};

static int fill_count(uint32_t *value, uint32_t fallback, uint32_t limit, const char *name)
{
	if (!*value)
		*value = fallback;
	if (*value > limit)
		return afd__error(-EINVAL, "attn: %s is %u, limit %u", name, *value, limit);
	return 0;
}

static int fill_dtype(int32_t *dtype, int32_t fallback, const char *name)
{
	if (!*dtype)
		*dtype = fallback ? fallback : AFD_DTYPE_F32;
	if (*dtype < AFD_DTYPE_F32 || *dtype > AFD_DTYPE_FP8)
		return afd__error(-EINVAL, "attn: %s is %d, limit %d", name, *dtype, AFD_DTYPE_FP8);
	return 0;
}

/* What the rank holds needs heads for it. */
static int fill_group(struct afd_attn_params *p, const struct afd_model *model)
{
	const struct afd_shard shard = { .tp = p->group_index, .n_tp = p->group_size };
	struct afd__ffn_shard read;

	if (!p->group_size)
		p->group_size = 1;
	return afd__shard_read(&read, &shard, AFD_ROLE_ATTENTION, &model->arch, "attn");
}

/* What the size of the KV pool depends on; afd_attn_kv_bytes looks at no more. */
static int fill_kv(struct afd_attn_params *p, const struct afd_model *model)
{
	uint32_t fallback;
	int rc = fill_group(p, model);

	rc = rc ? rc
		: fill_count(&p->max_sequences, DEFAULT_SEQUENCES, MAX_SEQUENCES,
			  "max_sequences");
	rc = rc ? rc : fill_count(&p->max_rows, DEFAULT_ROWS, MAX_ROWS, "max_rows");
	rc = rc ? rc : fill_count(&p->page_size, DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE, "page_size");
	if (rc)
		return rc;
	fallback = (DEFAULT_POSITIONS + p->page_size - 1) / p->page_size;
	rc = fill_count(&p->kv_pages, fallback, INT32_MAX / p->page_size, "kv_pages");
	return rc ? rc : fill_dtype(&p->kv_dtype, afd__model_dtype(model), "kv_dtype");
}

/* A transport says which rank we are; params may repeat it. */
static int check_group(const struct afd_attn_params *p, const struct afd__exchange_info *net)
{
	uint32_t index = net ? net->group_index : 0, n = net ? net->group_size : 1;

	if ((p->group_size || p->group_index) && (p->group_size != n || p->group_index != index))
		return afd__error(-EINVAL,
			"attn: group_index and group_size are %u of %u, the transport's %u of %u",
			p->group_index, p->group_size, index, n);
	return 0;
}

/* With a transport its own params say these. */
static int fill_wire(struct afd_attn_params *p, const struct afd_model *model,
	const struct afd__exchange_info *net)
{
	int32_t fallback = afd__model_dtype(model);
	int rc;

	if (net && (p->to_ffn_dtype || p->to_attention_dtype || p->lanes))
		return afd__error(-EINVAL,
			"attn: to_ffn_dtype, to_attention_dtype and lanes are %d, %d, %u, "
			"must be 0: the transport says them",
			p->to_ffn_dtype, p->to_attention_dtype, p->lanes);
	if (net) {
		p->to_ffn_dtype = net->to_ffn_dtype;
		p->to_attention_dtype = net->to_attention_dtype;
		p->lanes = net->lanes;
	}
	rc = fill_count(&p->lanes, 1, AFD_MAX_LANES, "lanes");
	rc = rc ? rc : fill_dtype(&p->to_ffn_dtype, fallback, "to_ffn_dtype");
	return rc ? rc : fill_dtype(&p->to_attention_dtype, fallback, "to_attention_dtype");
}

/* Where every layer has a window, a sequence outgrows the pool. */
static int fill_positions(struct afd_attn_params *p, const struct afd__arch *arch)
{
	uint32_t fallback = p->kv_pages * p->page_size, limit = fallback, i = 0;

	while (i < arch->n_layers && arch->layers[i].window)
		i++;
	if (i == arch->n_layers) {
		uint32_t told = arch->max_position_embeddings;

		limit = INT32_MAX;
		told = told < MAX_DEFAULT_POSITIONS ? told : MAX_DEFAULT_POSITIONS;
		fallback = told > fallback ? told : fallback;
	}
	return fill_count(&p->max_positions, fallback, limit, "max_positions");
}

static int fill_capacities(struct afd_attn_params *p, const struct afd__arch *arch)
{
	uint32_t outputs;
	int rc;

	outputs = p->max_sequences < p->max_rows ? p->max_sequences : p->max_rows;
	rc = fill_count(&p->max_outputs, outputs, p->max_rows, "max_outputs");
	return rc ? rc : fill_positions(p, arch);
}

int afd__attn_params_fill(struct afd_attn_params *p, const struct afd_model *model,
	const struct afd__exchange_info *net)
{
	int rc = check_group(p, net);

	p->group_index = net ? net->group_index : 0;
	p->group_size = net ? net->group_size : 1;
	rc = rc ? rc : fill_kv(p, model);
	rc = rc ? rc : fill_wire(p, model, net);
	if (!rc && (p->quantize_activations < 0 || p->quantize_activations > 1))
		return afd__error(-EINVAL, "attn: quantize_activations is %d, limit 1",
			p->quantize_activations);
	return rc ? rc : fill_capacities(p, &model->arch);
}

size_t afd_attn_kv_bytes(const afd_model *model, const struct afd_attn_params *params)
{
	struct afd_kv_layout layout;
	struct afd_attn_params p;

	if (afd__model_check(model) || afd__model_check_role(model, AFD_ROLE_ATTENTION) ||
		afd__params_copy(&p, sizeof(p), params, "attn params") ||
		fill_kv(&p, model) || afd__attn_layout_plan(&layout, &model->arch, &p))
		return 0;
	return layout.memory_bytes;
}

int64_t afd_attn_kv_pages(const afd_model *model, const struct afd_attn_params *params,
	uint32_t n_positions, uint32_t n_rows)
{
	struct afd_attn_params p;
	uint64_t all, n_pages = 0;
	uint32_t i;
	int rc = afd__model_check(model);

	rc = rc ? rc : afd__model_check_role(model, AFD_ROLE_ATTENTION);
	rc = rc ? rc : afd__params_copy(&p, sizeof(p), params, "attn params");
	rc = rc ? rc : fill_kv(&p, model);
	if (rc)
		return rc;
	all = ((uint64_t)n_positions + p.page_size - 1) / p.page_size;
	for (i = 0; i < model->arch.n_layers; i++) {
		uint32_t window = model->arch.layers[i].window;
		uint64_t most = window ? afd__kv_most_pages(
						 window, p.page_size, 1, n_rows, p.rollback)
				       : all;

		n_pages = most > n_pages ? most : n_pages;
	}
	return (int64_t)(n_pages < all ? n_pages : all);
}
