/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which tensors each role needs, by their Hugging Face names: one table of what a layer may have,
 * and the architecture says which rows of it apply. A tensor in no slot is nobody's and is never
 * looked at. Called by model.c.
 */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "checkpoint.h"
#include "model.h"

/* What a dimension is; the names are for errors, in the words of config.json. */
enum size { NONE, HIDDEN, VOCAB, Q_WIDTH, KV_WIDTH, HEAD_DIM, WIDTH };
static const char *const size_names[] = {
	[HIDDEN] = "hidden_size",
	[VOCAB] = "vocab_size",
	[Q_WIDTH] = "num_attention_heads * head_dim",
	[KV_WIDTH] = "num_key_value_heads * head_dim",
	[HEAD_DIM] = "head_dim",
	[WIDTH] = "intermediate_size",
};

struct row {
	int32_t kind;
	int32_t role;
	const char *name; /* in a layer: behind "model.layers.N." */
	enum size rows, columns; /* columns NONE: a vector */
};

static const struct row first_rows[] = {
	{ AFD__TENSOR_EMBED, AFD_ROLE_ATTENTION, "model.embed_tokens.weight", VOCAB, HIDDEN },
};

static const struct row layer_rows[] = {
	{ AFD__TENSOR_INPUT_NORM, AFD_ROLE_ATTENTION, "input_layernorm.weight", HIDDEN, NONE },
	{ AFD__TENSOR_Q, AFD_ROLE_ATTENTION, "self_attn.q_proj.weight", Q_WIDTH, HIDDEN },
	{ AFD__TENSOR_K, AFD_ROLE_ATTENTION, "self_attn.k_proj.weight", KV_WIDTH, HIDDEN },
	{ AFD__TENSOR_V, AFD_ROLE_ATTENTION, "self_attn.v_proj.weight", KV_WIDTH, HIDDEN },
	{ AFD__TENSOR_Q_BIAS, AFD_ROLE_ATTENTION, "self_attn.q_proj.bias", Q_WIDTH, NONE },
	{ AFD__TENSOR_K_BIAS, AFD_ROLE_ATTENTION, "self_attn.k_proj.bias", KV_WIDTH, NONE },
	{ AFD__TENSOR_V_BIAS, AFD_ROLE_ATTENTION, "self_attn.v_proj.bias", KV_WIDTH, NONE },
	{ AFD__TENSOR_Q_NORM, AFD_ROLE_ATTENTION, "self_attn.q_norm.weight", HEAD_DIM, NONE },
	{ AFD__TENSOR_K_NORM, AFD_ROLE_ATTENTION, "self_attn.k_norm.weight", HEAD_DIM, NONE },
	{ AFD__TENSOR_O, AFD_ROLE_ATTENTION, "self_attn.o_proj.weight", HIDDEN, Q_WIDTH },
	{ AFD__TENSOR_O_BIAS, AFD_ROLE_ATTENTION, "self_attn.o_proj.bias", HIDDEN, NONE },
	{ AFD__TENSOR_FFN_NORM, AFD_ROLE_ATTENTION, "post_attention_layernorm.weight", HIDDEN,
	  NONE },
	{ AFD__TENSOR_GATE, AFD_ROLE_FFN, "mlp.gate_proj.weight", WIDTH, HIDDEN },
	{ AFD__TENSOR_UP, AFD_ROLE_FFN, "mlp.up_proj.weight", WIDTH, HIDDEN },
	{ AFD__TENSOR_DOWN, AFD_ROLE_FFN, "mlp.down_proj.weight", HIDDEN, WIDTH },
};

static const struct row last_rows[] = {
	{ AFD__TENSOR_FINAL_NORM, AFD_ROLE_ATTENTION, "model.norm.weight", HIDDEN, NONE },
	{ AFD__TENSOR_HEAD, AFD_ROLE_ATTENTION, "lm_head.weight", VOCAB, HIDDEN },
};

#define N_ROWS(rows) (sizeof(rows) / sizeof((rows)[0]))

static bool applies(const struct afd__layer *layer, int32_t kind)
{
	switch (kind) {
	case AFD__TENSOR_Q_BIAS:
	case AFD__TENSOR_K_BIAS:
	case AFD__TENSOR_V_BIAS:
	case AFD__TENSOR_O_BIAS:
		return layer->attention_bias;
	case AFD__TENSOR_Q_NORM:
	case AFD__TENSOR_K_NORM:
		return layer->qk_norm == AFD__QK_NORM_PER_HEAD;
	case AFD__TENSOR_INPUT_NORM:
		return layer->norms & AFD__NORM_BEFORE_ATTENTION;
	case AFD__TENSOR_FFN_NORM:
		return layer->norms & AFD__NORM_BEFORE_FFN;
	case AFD__TENSOR_GATE:
	case AFD__TENSOR_UP:
	case AFD__TENSOR_DOWN:
		return layer->ffn_kind == AFD_FFN_DENSE;
	default:
		return true;
	}
}

static uint64_t size_of(const struct afd__arch *arch, const struct afd__layer *layer,
			enum size size)
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
	default:
		return 0;
	}
}

static void fill_slot(struct afd__slot *slot, const struct afd__arch *arch, int32_t layer,
		      const struct row *row)
{
	const struct afd__layer *l = layer < 0 ? NULL : &arch->layers[layer];

	slot->kind = row->kind;
	slot->layer = layer;
	slot->role = row->role;
	slot->n_dims = row->columns == NONE ? 1 : 2;
	slot->shape[0] = size_of(arch, l, row->rows);
	slot->shape[1] = size_of(arch, l, row->columns);
	slot->shape_names[0] = size_names[row->rows];
	slot->shape_names[1] = size_names[row->columns];
	if (layer < 0)
		snprintf(slot->name, sizeof(slot->name), "%s", row->name);
	else
		snprintf(slot->name, sizeof(slot->name), "model.layers.%d.%s", layer, row->name);
}

static uint32_t fill_all(struct afd__slot *slots, const struct afd__arch *arch)
{
	uint32_t n = 0, layer;
	size_t i;

	for (i = 0; i < N_ROWS(first_rows); i++)
		fill_slot(&slots[n++], arch, -1, &first_rows[i]);
	for (layer = 0; layer < arch->n_layers; layer++) {
		for (i = 0; i < N_ROWS(layer_rows); i++) {
			if (applies(&arch->layers[layer], layer_rows[i].kind))
				fill_slot(&slots[n++], arch, (int32_t)layer, &layer_rows[i]);
		}
	}
	for (i = 0; i < N_ROWS(last_rows); i++)
		fill_slot(&slots[n++], arch, -1, &last_rows[i]);
	return n;
}

int afd__slots_create(struct afd__slot **slots, uint32_t *n_slots, struct afd_context *ctx,
		      const struct afd__arch *arch)
{
	size_t most = N_ROWS(first_rows) + arch->n_layers * N_ROWS(layer_rows) + N_ROWS(last_rows);

	*slots = afd__alloc(ctx, most, sizeof(**slots));
	if (!*slots)
		return -ENOMEM;
	*n_slots = fill_all(*slots, arch);
	return 0;
}

const struct afd__slot *afd__slot_find(const struct afd_model *model, int32_t layer, int32_t kind)
{
	uint32_t i;

	for (i = 0; i < model->n_slots; i++) {
		if (model->slots[i].layer == layer && model->slots[i].kind == kind)
			return &model->slots[i];
	}
	return NULL;
}

/* ---- from slot to tensor ---- */

static void print_shape(char *text, size_t capacity, const uint64_t *shape, uint32_t n_dims)
{
	size_t used = 0;
	uint32_t i;

	for (i = 0; i < n_dims; i++)
		used += (size_t)snprintf(text + used, capacity - used, "%s%llu", i ? ", " : "",
					 (unsigned long long)shape[i]);
}

static int check_shape(const struct afd__slot *slot, const struct afd__tensor *t)
{
	char has[100] = "", wants[50] = "";
	uint32_t i;

	for (i = 0; i < slot->n_dims && t->n_dims == slot->n_dims && t->shape[i] == slot->shape[i];
	     i++)
		;
	if (i == slot->n_dims)
		return 0;
	print_shape(has, sizeof(has), t->shape, t->n_dims);
	print_shape(wants, sizeof(wants), slot->shape, slot->n_dims);
	return afd__error(-EBADMSG, "tensor %s: shape is [%s], config.json says [%s] (%s%s%s)",
			  slot->name, has, wants, slot->shape_names[0],
			  slot->n_dims > 1 ? ", " : "",
			  slot->n_dims > 1 ? slot->shape_names[1] : "");
}

static int plain_tensor(const struct afd_model *model, const struct afd__slot *slot, bool with_data,
			struct afd__tensor *out)
{
	int rc = afd__checkpoint_tensor(model->checkpoint, slot->name, with_data, out);

	return rc ? rc : check_shape(slot, out);
}

/*
 * A tied head that the checkpoint ships as well is nearly always the same numbers twice. Then one
 * matrix serves both, as if it had not been shipped; the bits are the same. Unknown when a file is
 * missing.
 */
static int compare_head(const struct afd_model *model, const struct afd__slot *slot)
{
	struct afd__tensor head, embed;

	if (!afd__checkpoint_has(model->checkpoint, slot->name))
		return AFD__HEAD_SHARED;
	if (plain_tensor(model, slot, true, &head) ||
	    plain_tensor(model, &model->slots[0], true, &embed))
		return AFD__HEAD_UNKNOWN;
	if (head.dtype != embed.dtype || memcmp(head.data, embed.data, head.bytes))
		return AFD__HEAD_OWN;
	afd__model_release(&head);
	return AFD__HEAD_SHARED;
}

bool afd__slot_is_shared(const struct afd_model *model, const struct afd__slot *slot)
{
	int head;

	if (slot->kind != AFD__TENSOR_HEAD || !model->arch.tied_head)
		return false;
	head = atomic_load(&model->head);
	if (head == AFD__HEAD_UNKNOWN) {
		head = compare_head(model, slot);
		/* Threads that look at the same time find the same. */
		atomic_store(&((struct afd_model *)model)->head, head);
	}
	return head == AFD__HEAD_SHARED;
}

int afd__slot_tensor(const struct afd_model *model, const struct afd__slot *slot, bool with_data,
		     struct afd__tensor *out)
{
	assert(model->slots[0].kind == AFD__TENSOR_EMBED);
	if (afd__slot_is_shared(model, slot))
		slot = &model->slots[0];
	return plain_tensor(model, slot, with_data, out);
}
