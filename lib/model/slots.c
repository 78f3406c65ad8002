/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which tensors each role needs, by their Hugging Face names: one table of what a layer may have,
 * and the architecture says which rows of it apply. Where families spell a name differently the row
 * has all spellings, the canonical one first. A tensor in no slot is nobody's and is never looked
 * at. Called by model.c.
 */
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"
#include "model.h"

enum { MAX_SPELLINGS = 5, NAME_BYTES = 128 };

/* What a dimension is; the names are for errors, in the words of config.json. */
enum size {
	NONE, HIDDEN, VOCAB, Q_WIDTH, KV_WIDTH, HEAD_DIM, WIDTH, EXPERTS, EXPERT_WIDTH,
	SHARED_WIDTH, ONE,
};
static const char *const size_names[] = {
	[NONE] = "",
	[HIDDEN] = "hidden_size",
	[VOCAB] = "vocab_size",
	[Q_WIDTH] = "num_attention_heads * head_dim",
	[KV_WIDTH] = "num_key_value_heads * head_dim",
	[HEAD_DIM] = "head_dim",
	[WIDTH] = "intermediate_size",
	[EXPERTS] = "num_experts",
	[EXPERT_WIDTH] = "moe_intermediate_size",
	[SHARED_WIDTH] = "num_shared_experts * moe_intermediate_size",
	[ONE] = "one number",
};

struct row {
	int32_t kind;
	uint8_t role;
	uint8_t rows, columns; /* enum size; columns NONE: a vector */
	const char *names[MAX_SPELLINGS]; /* in a layer: behind "model.layers.N." */
	uint32_t with, without; /* enum afd__norm_slot: only in layers that have them, or not */
};

#define A AFD_ROLE_ATTENTION
#define F AFD_ROLE_FFN

static const struct row first_rows[] = {
	{ AFD__TENSOR_EMBED, A, VOCAB, HIDDEN, { "model.embed_tokens.weight" } },
};

static const struct row layer_rows[] = {
	{ AFD__TENSOR_INPUT_NORM, A, HIDDEN, NONE, { "input_layernorm.weight" },
	  .with = AFD__NORM_BEFORE_ATTENTION },
	{ AFD__TENSOR_Q, A, Q_WIDTH, HIDDEN, { "self_attn.q_proj.weight" } },
	{ AFD__TENSOR_K, A, KV_WIDTH, HIDDEN, { "self_attn.k_proj.weight" } },
	{ AFD__TENSOR_V, A, KV_WIDTH, HIDDEN, { "self_attn.v_proj.weight" } },
	{ AFD__TENSOR_OUTPUT_GATE, A, Q_WIDTH, HIDDEN, { "self_attn.gate_proj.weight" } },
	{ AFD__TENSOR_Q_BIAS, A, Q_WIDTH, NONE, { "self_attn.q_proj.bias" } },
	{ AFD__TENSOR_K_BIAS, A, KV_WIDTH, NONE, { "self_attn.k_proj.bias" } },
	{ AFD__TENSOR_V_BIAS, A, KV_WIDTH, NONE, { "self_attn.v_proj.bias" } },
	{ AFD__TENSOR_Q_NORM, A, HEAD_DIM, NONE, { "self_attn.q_norm.weight" } },
	{ AFD__TENSOR_K_NORM, A, HEAD_DIM, NONE, { "self_attn.k_norm.weight" } },
	{ AFD__TENSOR_K_SCALE, A, ONE, NONE,
	  { "self_attn.k_proj.k_scale", "self_attn.k_scale", "self_attn.attn.k_scale" } },
	{ AFD__TENSOR_V_SCALE, A, ONE, NONE,
	  { "self_attn.v_proj.v_scale", "self_attn.v_scale", "self_attn.attn.v_scale" } },
	{ AFD__TENSOR_O, A, HIDDEN, Q_WIDTH, { "self_attn.o_proj.weight" } },
	{ AFD__TENSOR_O_BIAS, A, HIDDEN, NONE, { "self_attn.o_proj.bias" } },
	/* The same name is the norm before the FFN, or that of the attention's output where a layer
	 * has one: then another name is the norm before the FFN. */
	{ AFD__TENSOR_AFTER_ATTENTION_NORM, A, HIDDEN, NONE, { "post_attention_layernorm.weight" },
	  .with = AFD__NORM_AFTER_ATTENTION },
	{ AFD__TENSOR_FFN_NORM, A, HIDDEN, NONE, { "post_attention_layernorm.weight" },
	  .with = AFD__NORM_BEFORE_FFN, .without = AFD__NORM_AFTER_ATTENTION },
	{ AFD__TENSOR_FFN_NORM, A, HIDDEN, NONE, { "pre_mlp_layernorm.weight" },
	  .with = AFD__NORM_BEFORE_FFN | AFD__NORM_AFTER_ATTENTION },
	{ AFD__TENSOR_AFTER_FFN_NORM, A, HIDDEN, NONE, { "post_mlp_layernorm.weight" },
	  .with = AFD__NORM_AFTER_FFN },
	{ AFD__TENSOR_GATE, F, WIDTH, HIDDEN, { "mlp.gate_proj.weight" } },
	{ AFD__TENSOR_UP, F, WIDTH, HIDDEN, { "mlp.up_proj.weight" } },
	{ AFD__TENSOR_DOWN, F, HIDDEN, WIDTH, { "mlp.down_proj.weight" } },
	{ AFD__TENSOR_ROUTER, AFD__ROLE_BOTH, EXPERTS, HIDDEN,
	  { "mlp.gate.weight", "mlp.router.gate.weight", "block_sparse_moe.gate.weight",
	    "moe.gate.weight" } },
	{ AFD__TENSOR_ROUTER_BIAS, AFD__ROLE_BOTH, EXPERTS, NONE,
	  { "mlp.expert_bias", "mlp.gate.e_score_correction_bias",
	    "block_sparse_moe.e_score_correction_bias", "mlp.e_score_correction_bias" } },
	{ AFD__TENSOR_SHARED_GATE, F, SHARED_WIDTH, HIDDEN,
	  { "mlp.shared_experts.gate_proj.weight", "mlp.shared_expert.gate_proj.weight",
	    "share_expert.gate_proj.weight" } },
	{ AFD__TENSOR_SHARED_UP, F, SHARED_WIDTH, HIDDEN,
	  { "mlp.shared_experts.up_proj.weight", "mlp.shared_expert.up_proj.weight",
	    "share_expert.up_proj.weight" } },
	{ AFD__TENSOR_SHARED_DOWN, F, HIDDEN, SHARED_WIDTH,
	  { "mlp.shared_experts.down_proj.weight", "mlp.shared_expert.down_proj.weight",
	    "share_expert.down_proj.weight" } },
};

static const struct row last_rows[] = {
	{ AFD__TENSOR_FINAL_NORM, A, HIDDEN, NONE, { "model.norm.weight" } },
	{ AFD__TENSOR_HEAD, A, VOCAB, HIDDEN, { "lm_head.weight" } },
};

/* Experts, behind "model.layers.N.": one by one, or all of a layer in one tensor. */
struct expert_row {
	uint8_t rows, columns;
	struct {
		const char *before, *after; /* of the number; after NULL: no number */
		uint8_t form;
	} names[MAX_SPELLINGS];
};
static const struct expert_row expert_rows[3] = {
	{ EXPERT_WIDTH, HIDDEN,
	  { { "mlp.experts.", ".gate_proj.weight", AFD__FORM_APART },
	    { "mlp.experts.gate_up_proj", NULL, AFD__FORM_GATE_UP },
	    { "mlp.experts.gate_proj.weight", NULL, AFD__FORM_STACK },
	    { "block_sparse_moe.experts.", ".w1.weight", AFD__FORM_APART },
	    { "mlp.experts.", ".w1.weight", AFD__FORM_APART } } },
	{ EXPERT_WIDTH, HIDDEN,
	  { { "mlp.experts.", ".up_proj.weight", AFD__FORM_APART },
	    { "mlp.experts.gate_up_proj", NULL, AFD__FORM_GATE_UP },
	    { "mlp.experts.up_proj.weight", NULL, AFD__FORM_STACK },
	    { "block_sparse_moe.experts.", ".w3.weight", AFD__FORM_APART },
	    { "mlp.experts.", ".w3.weight", AFD__FORM_APART } } },
	{ HIDDEN, EXPERT_WIDTH,
	  { { "mlp.experts.", ".down_proj.weight", AFD__FORM_APART },
	    { "mlp.experts.down_proj", NULL, AFD__FORM_STACK },
	    { "mlp.experts.down_proj.weight", NULL, AFD__FORM_STACK },
	    { "block_sparse_moe.experts.", ".w2.weight", AFD__FORM_APART },
	    { "mlp.experts.", ".w2.weight", AFD__FORM_APART } } },
};

#define N_ROWS(rows) (sizeof(rows) / sizeof((rows)[0]))

/* ---- what applies ---- */

static bool applies(const struct afd__layer *layer, const struct row *row)
{
	if ((layer->norms & row->with) != row->with || layer->norms & row->without)
		return false;
	switch (row->kind) {
	case AFD__TENSOR_Q_BIAS:
	case AFD__TENSOR_K_BIAS:
	case AFD__TENSOR_V_BIAS:
	case AFD__TENSOR_O_BIAS:
		return layer->attention_bias;
	case AFD__TENSOR_Q_NORM:
	case AFD__TENSOR_K_NORM:
		return layer->qk_norm == AFD__QK_NORM_PER_HEAD;
	case AFD__TENSOR_OUTPUT_GATE:
		return layer->output_gate == AFD__OUTPUT_GATE_ELEMENTWISE;
	case AFD__TENSOR_GATE:
	case AFD__TENSOR_UP:
	case AFD__TENSOR_DOWN:
		return layer->ffn_kind == AFD_FFN_DENSE;
	case AFD__TENSOR_ROUTER:
		return layer->ffn_kind == AFD_FFN_MOE;
	case AFD__TENSOR_ROUTER_BIAS:
		return layer->ffn_kind == AFD_FFN_MOE && layer->router.bias;
	case AFD__TENSOR_SHARED_GATE:
	case AFD__TENSOR_SHARED_UP:
	case AFD__TENSOR_SHARED_DOWN:
		return layer->ffn_kind == AFD_FFN_MOE && layer->shared_size;
	default:
		return true;
	}
}

static bool is_optional(int32_t kind)
{
	return kind == AFD__TENSOR_K_SCALE || kind == AFD__TENSOR_V_SCALE;
}

static uint64_t size_of(const struct afd__arch *arch, const struct afd__layer *layer, uint8_t size)
{
	switch (size) {
	case HIDDEN:
		return arch->hidden_size;
	case VOCAB:
		return arch->vocab_size;
	case Q_WIDTH:
		return (uint64_t)layer->n_heads * layer->head_dim;
	case KV_WIDTH:
		return (uint64_t)layer->n_kv_heads * layer->head_dim;
	case HEAD_DIM:
		return layer->head_dim;
	case WIDTH:
		return layer->intermediate_size;
	case EXPERTS:
		return layer->n_experts;
	case EXPERT_WIDTH:
		return layer->expert_size;
	case SHARED_WIDTH:
		return layer->shared_size;
	case ONE:
		return 1;
	default:
		return 0;
	}
}

const char *afd__size_name(uint8_t size)
{
	return size_names[size];
}

/* ---- names ---- */

static void spell(char *text, size_t capacity, int32_t layer, const char *name)
{
	if (layer < 0)
		snprintf(text, capacity, "%s", name);
	else
		snprintf(text, capacity, "model.layers.%d.%s", layer, name);
}

static void spell_expert(char *text, size_t capacity, int32_t layer, int32_t expert,
			 const char *before, const char *after)
{
	if (after)
		snprintf(text, capacity, "model.layers.%d.%s%d%s", layer, before, expert, after);
	else
		snprintf(text, capacity, "model.layers.%d.%s", layer, before);
}

static void find_scales(struct afd__slot *slot, const struct afd__checkpoint *cp)
{
	static const char *const suffixes[] = { "_scale_inv", "_scale" };
	char text[NAME_BYTES + 16];
	size_t i;

	for (i = 0; slot->stored && slot->n_dims == 2 && !slot->scales && i < 2; i++) {
		snprintf(text, sizeof(text), "%.*s%s", NAME_BYTES, slot->stored, suffixes[i]);
		slot->scales = afd__checkpoint_name(cp, text);
	}
}

static void find_stored(struct afd__slot *slot, const struct afd__checkpoint *cp,
			const struct row *row)
{
	char text[NAME_BYTES];
	size_t i;

	for (i = 0; i < MAX_SPELLINGS && row->names[i] && !slot->stored; i++) {
		spell(text, sizeof(text), slot->layer, row->names[i]);
		slot->stored = afd__checkpoint_name(cp, text);
	}
	find_scales(slot, cp);
}

static void find_stored_expert(struct afd__slot *slot, const struct afd__checkpoint *cp,
			       const struct expert_row *row)
{
	char text[NAME_BYTES];
	size_t i;

	slot->form = AFD__FORM_APART;
	for (i = 0; i < MAX_SPELLINGS && !slot->stored; i++) {
		spell_expert(text, sizeof(text), slot->layer, slot->expert, row->names[i].before,
			     row->names[i].after);
		slot->stored = afd__checkpoint_name(cp, text);
		if (slot->stored)
			slot->form = row->names[i].form;
	}
	find_scales(slot, cp);
}

static void append(char *text, size_t capacity, const char *name)
{
	size_t used = strlen(text);

	if (used + strlen(name) + 3 < capacity)
		snprintf(text + used, capacity - used, "%s%s", used ? ", " : "", name);
}

static void spellings_of(const struct afd__slot *slot, const struct row *row, char *text,
			 size_t capacity)
{
	char name[NAME_BYTES];
	size_t i;

	for (i = 0; i < MAX_SPELLINGS && row->names[i]; i++) {
		spell(name, sizeof(name), slot->layer, row->names[i]);
		append(text, capacity, name);
	}
}

void afd__slot_spellings(const struct afd__slot *slot, char *text, size_t capacity)
{
	char name[NAME_BYTES];
	size_t i;

	text[0] = '\0';
	for (i = 0; slot->expert < 0 && i < N_ROWS(layer_rows); i++) {
		spell(name, sizeof(name), slot->layer, layer_rows[i].names[0]);
		if (layer_rows[i].kind == slot->kind && !strcmp(name, slot->name))
			spellings_of(slot, &layer_rows[i], text, capacity);
	}
	for (i = 0; slot->expert >= 0 && i < MAX_SPELLINGS; i++) {
		const struct expert_row *row = &expert_rows[slot->kind - AFD__TENSOR_EXPERT_GATE];

		spell_expert(name, sizeof(name), slot->layer, slot->expert, row->names[i].before,
			     row->names[i].after);
		append(text, capacity, name);
	}
	if (!text[0])
		append(text, capacity, slot->name);
}

/* ---- the list ---- */

static struct afd__slot *push_slot(struct afd_model *model, int32_t layer, int32_t kind,
				   uint8_t role, uint8_t rows, uint8_t columns)
{
	const struct afd__layer *l = layer < 0 ? NULL : &model->arch.layers[layer];
	struct afd__slot *slot = &model->slots[model->n_slots++];

	*slot = (struct afd__slot){
		.kind = kind, .layer = layer, .expert = -1, .role = role, .form = AFD__FORM_APART,
		.n_dims = columns == NONE ? 1 : 2, .size_names = { rows, columns },
		.shape = { size_of(&model->arch, l, rows), size_of(&model->arch, l, columns) },
	};
	return slot;
}

static void push_row(struct afd_model *model, int32_t layer, const struct row *row)
{
	struct afd__slot *slot;

	if (model->arch.ffn_only && !(row->role & F))
		return;
	slot = push_slot(model, layer, row->kind, row->role, row->rows, row->columns);
	spell(slot->name, sizeof(slot->name), layer, row->names[0]);
	find_stored(slot, model->checkpoint, row);
	if (is_optional(row->kind) && !slot->stored)
		model->n_slots--;
}

static void push_experts(struct afd_model *model, int32_t layer)
{
	uint32_t n = model->arch.layers[layer].n_experts, expert, part;

	for (expert = 0; expert < n; expert++) {
		for (part = 0; part < 3; part++) {
			const struct expert_row *row = &expert_rows[part];
			struct afd__slot *slot =
				push_slot(model, layer, AFD__TENSOR_EXPERT_GATE + (int32_t)part, F,
					  row->rows, row->columns);

			slot->expert = (int32_t)expert;
			spell_expert(slot->name, sizeof(slot->name), layer, slot->expert,
				     row->names[0].before, row->names[0].after);
			find_stored_expert(slot, model->checkpoint, row);
		}
	}
}

static void push_all(struct afd_model *model)
{
	uint32_t layer;
	size_t i;

	for (i = 0; i < N_ROWS(first_rows); i++)
		push_row(model, -1, &first_rows[i]);
	for (layer = 0; layer < model->arch.n_layers; layer++) {
		model->layer_slots[layer].first = model->n_slots;
		for (i = 0; i < N_ROWS(layer_rows); i++) {
			if (applies(&model->arch.layers[layer], &layer_rows[i]))
				push_row(model, (int32_t)layer, &layer_rows[i]);
		}
		model->layer_slots[layer].experts = model->n_slots;
		push_experts(model, (int32_t)layer);
	}
	model->layer_slots[layer].first = model->n_slots;
	for (i = 0; i < N_ROWS(last_rows); i++)
		push_row(model, -1, &last_rows[i]);
}

/* The slot that stands for its tensor in the list. */
static bool leads(const struct afd__slot *slot)
{
	return slot->form == AFD__FORM_APART ||
	       (slot->expert == 0 &&
		(slot->form == AFD__FORM_STACK || slot->kind == AFD__TENSOR_EXPERT_GATE));
}

static void list_all(struct afd_model *model)
{
	uint32_t i;

	for (i = 0; i < model->n_slots; i++) {
		if (!leads(&model->slots[i]))
			continue;
		model->listed[model->n_listed++] = (struct afd__listed){ i, false };
		if (model->slots[i].scales)
			model->listed[model->n_listed++] = (struct afd__listed){ i, true };
	}
}

int afd__slots_create(struct afd_model *model)
{
	const struct afd__arch *arch = &model->arch;
	size_t most = N_ROWS(first_rows) + N_ROWS(last_rows);
	uint32_t i;

	for (i = 0; i < arch->n_layers; i++)
		most += N_ROWS(layer_rows) + 3 * (size_t)arch->layers[i].n_experts;
	model->slots = afd__alloc(model->ctx, most, sizeof(*model->slots));
	model->listed = afd__alloc(model->ctx, 2 * most, sizeof(*model->listed));
	model->layer_slots =
		afd__alloc(model->ctx, arch->n_layers + 1, sizeof(*model->layer_slots));
	if (!model->slots || !model->listed || !model->layer_slots)
		return -ENOMEM;
	push_all(model);
	list_all(model);
	return 0;
}

void afd__slots_free(struct afd_model *model)
{
	afd__free(model->slots);
	afd__free(model->listed);
	afd__free(model->layer_slots);
}

/* ---- looking up ---- */

static const struct afd__slot *scan(const struct afd_model *model, uint32_t begin, uint32_t end,
				    int32_t layer, int32_t kind)
{
	uint32_t i;

	for (i = begin; i < end; i++) {
		if (model->slots[i].kind == kind && model->slots[i].layer == layer)
			return &model->slots[i];
	}
	return NULL;
}

const struct afd__slot *afd__slot_find(const struct afd_model *model, int32_t layer, int32_t expert,
				       int32_t kind)
{
	const struct afd__layer_slots *at = model->layer_slots;
	const struct afd__slot *slot;

	if (layer < 0) {
		slot = scan(model, 0, at[0].first, layer, kind);
		return slot ? slot
			    : scan(model, at[model->arch.n_layers].first, model->n_slots, layer,
				   kind);
	}
	if ((uint32_t)layer >= model->arch.n_layers)
		return NULL;
	at += layer;
	if (expert < 0)
		return scan(model, at->first, at->experts, layer, kind);
	if ((uint32_t)expert >= model->arch.layers[layer].n_experts ||
	    kind < AFD__TENSOR_EXPERT_GATE || kind > AFD__TENSOR_EXPERT_DOWN)
		return NULL;
	return &model->slots[at->experts + 3 * (uint32_t)expert +
			     (uint32_t)(kind - AFD__TENSOR_EXPERT_GATE)];
}
