/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the device does for a step, up to the FFN's input: ids become rows, and each layer adds what
 * came before to the residual stream, attends, and leaves the normed rows for the FFN. Nothing here
 * waits; all of it is enqueued in order.
 *
 * Lanes use the same qkv and mixed memory, because the queue runs one after the other. Called by
 * step.
 */
#include "attn.h"

enum { CHUNK_ROWS = 16 }; /* from so many rows on an entry is a chunk */

/* ---- the start of a step ---- */

static int copy_page(struct afd_attn *attn, uint32_t group, int32_t from, int32_t to)
{
	const struct afd_kv_layout *l = &attn->layout;
	uint32_t layer;
	int rc = 0;

	for (layer = 0; !rc && layer < l->n_layers; layer++) {
		char *pages = (char *)l->memory + attn->layer_at[layer];
		const struct afd__copy_args copy = { pages + (size_t)to * l->page_bytes,
			pages + (size_t)from * l->page_bytes, l->page_bytes };

		if (attn->groups[layer] == group)
			rc = afd__copy(&attn->queue, &copy);
	}
	return rc;
}

static int copy_shared_pages(struct afd_attn *attn)
{
	uint32_t entry, group;
	int32_t from, to;
	int rc = 0;

	for (entry = 0; entry < attn->batch.n_entries; entry++) {
		for (group = 0; !rc && group < attn->kv.shape.n_groups; group++) {
			if (afd__kv_copy(&attn->kv, attn->batch.entries[entry].sequence, group,
				    &from, &to))
				rc = copy_page(attn, group, from, to);
		}
	}
	return rc;
}

static float *angles_of(const struct afd_attn *attn, uint32_t rope, uint32_t row)
{
	uint32_t head_dim = attn->layout.head_dim;

	return attn->memory.angles + ((size_t)rope * attn->params.max_rows + row) * head_dim;
}

static int enqueue_angles(struct afd_attn *attn)
{
	uint32_t i;
	int rc = 0;

	for (i = 0; !rc && i < attn->weights.n_ropes; i++) {
		const struct afd__attn_rope *rope = &attn->weights.ropes[i];
		const struct afd__angles_args angles = {
			.positions = attn->memory.words + attn->batch.positions_at,
			.inv_freq = rope->inv_freq,
			.out = angles_of(attn, i, 0),
			.n_rows = attn->batch.n_rows,
			.head_dim = rope->arch->head_dim,
			.scale = rope->arch->scale,
		};

		rc = afd__angles(&attn->queue, &angles);
	}
	return rc;
}

int afd__attn_enqueue_inputs(struct afd_attn *attn)
{
	int rc = afd__queue_upload(&attn->queue, attn->memory.words, attn->batch.words,
		attn->batch.n_words * sizeof(int32_t));

	return rc ? rc : copy_shared_pages(attn);
}

int afd__attn_enqueue_embedding(struct afd_attn *attn)
{
	const struct afd__embed_args embed = {
		.table = attn->weights.embed,
		.ids = attn->memory.words,
		.out = attn->memory.h,
		.n_rows = attn->batch.n_rows,
		.scale = attn->arch->embedding_scale,
	};
	int rc = enqueue_angles(attn);

	return rc ? rc : afd__embed(&attn->queue, &embed);
}

/* ---- one layer of one lane ---- */

/* h += add, and x = norm(h), in the form that all its products take where there is one. */
static int enqueue_norm(struct afd_attn *attn, const struct afd__lane *lane,
	struct afd__norm_args norm, const struct afd__inputs *form)
{
	norm.h = afd__attn_rows(attn, attn->memory.h, lane->row0);
	norm.n_rows = lane->n_rows;
	norm.width = attn->arch->hidden_size;
	norm.eps = attn->arch->rms_norm_eps;
	if (form->row_bytes)
		norm.inputs = afd__attn_inputs(attn, form, lane->row0, lane->row0);
	else
		norm.out = afd__attn_rows(attn, attn->memory.x, lane->row0);
	return afd__norm(&attn->queue, &norm);
}

/* What a block adds to the residual stream: its y, or the norm of it where the family has one. */
static int enqueue_after(struct afd_attn *attn, const struct afd__lane *lane, const float *weight,
	const float **block)
{
	float *y = afd__attn_rows(attn, attn->memory.y, lane->row0);
	const struct afd__norm_args norm = {
		.h = y,
		.weight = weight,
		.out = attn->memory.post,
		.n_rows = lane->n_rows,
		.width = attn->arch->hidden_size,
		.eps = attn->arch->rms_norm_eps,
	};

	*block = weight ? attn->memory.post : y;
	return weight ? afd__norm(&attn->queue, &norm) : 0;
}

/* The product with m gets its input in e4m3. */
static bool quantizes(const struct afd_attn *attn, const struct afd__matrix *m)
{
	return attn->params.quantize_activations && m->dtype == AFD_DTYPE_FP8;
}

/* What q, k, v and the gate are made of. */
static const float *input_of(
	const struct afd_attn *attn, const struct afd__lane *lane, const struct afd__matrix *m)
{
	return quantizes(attn, m) ? attn->memory.quantized
				  : afd__attn_rows(attn, attn->memory.x, lane->row0);
}

/* The same in the form of the device, where the norm left it so. */
static const void *attention_inputs(
	const struct afd_attn *attn, const struct afd__lane *lane, const struct afd__attn_layer *w)
{
	return afd__attn_inputs(attn, &w->attention_inputs, lane->row0, lane->row0).rows;
}

/* x beside itself in e4m3, where a matrix wants it; others may not. */
static int enqueue_quantized(
	struct afd_attn *attn, const struct afd__lane *lane, const struct afd__attn_layer *w)
{
	const struct afd__copy_args copy = {
		.dst = attn->memory.quantized,
		.src = afd__attn_rows(attn, attn->memory.x, lane->row0),
		.bytes = (size_t)lane->n_rows * attn->arch->hidden_size * sizeof(float),
	};
	const struct afd__quantize_args quantize = {
		.x = attn->memory.quantized,
		.n_rows = lane->n_rows,
		.width = attn->arch->hidden_size,
	};
	bool wanted = quantizes(attn, &w->gate);
	uint32_t part;
	int rc;

	if (w->attention_inputs.row_bytes) /* the norm did */
		return 0;

	for (part = 0; part < w->n_qkv; part++)
		wanted |= quantizes(attn, &w->qkv[part]);
	if (!wanted)
		return 0;
	rc = afd__copy(&attn->queue, &copy);
	return rc ? rc : afd__quantize(&attn->queue, &quantize);
}

/* mixed = mixed * sigmoid(x gate^T); x is still what q was made of. */
static int enqueue_gate(
	struct afd_attn *attn, const struct afd__lane *lane, const struct afd__attn_layer *w)
{
	const struct afd__product_args product = {
		.x = input_of(attn, lane, &w->gate),
		.inputs = attention_inputs(attn, lane, w),
		.w = w->gate,
		.y = attn->memory.gate,
		.x_stride = attn->arch->hidden_size,
		.y_stride = attn->mixed_width,
		.n_rows = lane->n_rows,
		.quantized = quantizes(attn, &w->gate),
	};
	const struct afd__gate_args gate = {
		.x = attn->memory.mixed,
		.gate = attn->memory.gate,
		.gate_stride = attn->mixed_width,
		.n_rows = lane->n_rows,
		.width = attn->mixed_width,
	};
	int rc;

	if (w->arch->output_gate == AFD__OUTPUT_GATE_NONE)
		return 0;
	rc = afd__product(&attn->queue, &product);
	return rc ? rc : afd__gate(&attn->queue, &gate);
}

static int enqueue_qkv(
	struct afd_attn *attn, const struct afd__lane *lane, const struct afd__attn_layer *w)
{
	uint32_t part, column = 0;
	int rc = 0;

	for (part = 0; !rc && part < w->n_qkv; part++) {
		const struct afd__product_args product = {
			.x = input_of(attn, lane, &w->qkv[part]),
			.inputs = attention_inputs(attn, lane, w),
			.w = w->qkv[part],
			.bias = w->qkv_bias ? w->qkv_bias + column : NULL,
			.y = attn->memory.qkv + column,
			.x_stride = attn->arch->hidden_size,
			.y_stride = attn->qkv_width,
			.n_rows = lane->n_rows,
			.quantized = quantizes(attn, &w->qkv[part]),
		};

		rc = afd__product(&attn->queue, &product);
		column += w->qkv[part].n;
	}
	return rc;
}

static int enqueue_rope(
	struct afd_attn *attn, const struct afd__lane *lane, const struct afd__attn_layer *w)
{
	struct afd__rope_args rope = {
		.qkv = attn->memory.qkv,
		.q_norm = w->q_norm,
		.k_norm = w->k_norm,
		.angles = w->rope < 0 ? NULL : angles_of(attn, (uint32_t)w->rope, lane->row0),
		.slots = attn->memory.words +
			 afd__batch_slots_at(&attn->batch, attn->groups[lane->layer]) + lane->row0,
		.n_rows = lane->n_rows,
		.n_heads = w->n_heads,
		.eps = attn->arch->rms_norm_eps,
	};

	afd__attn_kv_view(attn, lane->layer, &rope.kv);
	return afd__rope(&attn->queue, &rope);
}

/* Rows row0 .. row0+n_rows-1 of the batch, of entries of at least run_rows rows. */
static int enqueue_attend_rows(struct afd_attn *attn, const struct afd__lane *lane, uint32_t row0,
	uint32_t n_rows, uint32_t run_rows)
{
	const struct afd__attn_layer *w = &attn->weights.layers[lane->layer];
	const int32_t *words = attn->memory.words;
	size_t at = row0 - lane->row0;
	struct afd__attend_args attend = {
		.qkv = attn->memory.qkv + at * attn->qkv_width,
		.positions = words + attn->batch.positions_at + row0,
		.sequences = words + attn->batch.table_rows_at + row0,
		.page_table = words + afd__batch_table_at(&attn->batch, attn->groups[lane->layer]),
		.out = attn->memory.mixed + at * attn->mixed_width,
		.n_rows = n_rows,
		.n_heads = w->n_heads,
		.table_stride = attn->batch.table_stride,
		.window = w->arch->window,
		.scale = w->arch->softmax_scale,
		.run_rows = run_rows,
	};

	afd__attn_kv_view(attn, lane->layer, &attend.kv);
	return afd__attend(&attn->queue, &attend);
}

/* Rows of chunks and rows that decode go apart: devices have another way for each. */
static int enqueue_attend(struct afd_attn *attn, const struct afd__lane *lane)
{
	const struct afd__batch_entry *entry = afd__batch_entry_of(&attn->batch, lane->row0);
	uint32_t row = lane->row0, end = row + lane->n_rows;
	int rc = 0;

	while (!rc && row < end) {
		uint32_t row0 = row, run_rows = entry->n_rows;
		bool is_chunk = run_rows >= CHUNK_ROWS;

		for (; row < end && (entry->n_rows >= CHUNK_ROWS) == is_chunk; entry++) {
			run_rows = entry->n_rows < run_rows ? entry->n_rows : run_rows;
			row += entry->n_rows;
		}
		rc = enqueue_attend_rows(attn, lane, row0, row - row0, run_rows);
	}
	return rc;
}

/* In a group a rank's heads give a part of the sum, which is no row to be normed yet: it stands in
 * x, of which nothing is needed any more. The bias is added once, in the part of rank 0. */
static int enqueue_o(
	struct afd_attn *attn, const struct afd__lane *lane, const struct afd__attn_layer *w)
{
	float *y = afd__attn_in_group(attn) ? attn->memory.x : attn->memory.y;
	const struct afd__product_args product = {
		.x = attn->memory.mixed,
		.w = w->o,
		.bias = attn->params.group_index ? NULL : w->o_bias,
		.y = afd__attn_rows(attn, y, lane->row0),
		.x_stride = attn->mixed_width,
		.y_stride = attn->arch->hidden_size,
		.n_rows = lane->n_rows,
		.quantized = quantizes(attn, &w->o),
	};
	const struct afd__quantize_args quantize = {
		.x = attn->memory.mixed,
		.n_rows = lane->n_rows,
		.width = attn->mixed_width,
		.column_offset = w->o.column_offset,
	};
	int rc = quantizes(attn, &w->o) ? afd__quantize(&attn->queue, &quantize) : 0;

	return rc ? rc : afd__product(&attn->queue, &product);
}

int afd__attn_enqueue_attention(struct afd_attn *attn, const struct afd__lane *lane)
{
	const struct afd__attn_layer *w = &attn->weights.layers[lane->layer];
	struct afd__norm_args norm = { .weight = w->input_norm };
	int rc = 0;

	/* y is the FFN's of the layer before; the first layer has none. */
	if (lane->layer) {
		norm.add_wire = afd__attn_y_wire(attn, lane->layer - 1);
		rc = enqueue_after(attn, lane, w[-1].after_ffn_norm, &norm.add);
	}
	rc = rc ? rc : enqueue_norm(attn, lane, norm, &w->attention_inputs);
	rc = rc ? rc : enqueue_quantized(attn, lane, w);
	rc = rc ? rc : enqueue_qkv(attn, lane, w);
	rc = rc ? rc : enqueue_rope(attn, lane, w);
	rc = rc ? rc : enqueue_attend(attn, lane);
	rc = rc ? rc : enqueue_gate(attn, lane, w);
	return rc ? rc : enqueue_o(attn, lane, w);
}

int afd__attn_enqueue_ffn_input(struct afd_attn *attn, const struct afd__lane *lane)
{
	const struct afd__attn_layer *w = &attn->weights.layers[lane->layer];
	int32_t wire = attn->params.to_ffn_dtype;
	/* Rounded here, rows need no pass of their own for it; they cross as they are. */
	struct afd__norm_args norm = { .weight = w->ffn_norm,
		.out_wire = wire == AFD_DTYPE_FP8 ? 0 : wire };
	int rc = enqueue_after(attn, lane, w->after_attention_norm, &norm.add);

	return rc ? rc : enqueue_norm(attn, lane, norm, &w->ffn_inputs);
}
