/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows in the form that the device's products take (struct afd__inputs): which norm may leave them
 * so, because all products that read it agree, and where they stand. On a device without a form no
 * norm does, and everything is float32.
 *
 * Invariant: decided by the weights when the stage is made, so never by a batch. One piece of memory
 * serves all norms, since what reads the rows of one is enqueued before the next norm of those rows.
 * Called by memory (when it is made), layer, local and head.
 */
#include "attn.h"

static bool agrees(const struct afd__inputs *a, const struct afd__inputs *b)
{
	return a->row_bytes == b->row_bytes && a->dtype == b->dtype &&
	       a->column_offset == b->column_offset && a->quantize == b->quantize;
}

static struct afd__inputs form_of(const struct afd_attn *attn, const struct afd__matrix *m)
{
	return afd__matrix_inputs(attn->device, m, attn->params.quantize_activations);
}

/* What q, k, v and the gate take; nothing when they differ. */
static struct afd__inputs attention_form(
	const struct afd_attn *attn, const struct afd__attn_layer *w)
{
	struct afd__inputs first = form_of(attn, &w->qkv[0]), other;
	uint32_t part, n = w->n_qkv + (w->arch->output_gate != AFD__OUTPUT_GATE_NONE);

	for (part = 1; part < n; part++) {
		other = form_of(attn, part < w->n_qkv ? &w->qkv[part] : &w->gate);
		if (!agrees(&first, &other))
			return (struct afd__inputs){ 0 };
	}
	return first;
}

/* Rows of e4m3 are rounded by groups, behind the norm. */
static struct afd__inputs ffn_form(const struct afd_attn *attn, uint32_t layer)
{
	if (!attn->ffn || attn->params.to_ffn_dtype == AFD_DTYPE_FP8)
		return (struct afd__inputs){ 0 };
	return afd__ffn_inputs(attn->ffn, (int32_t)layer);
}

static size_t larger(size_t bytes, const struct afd__inputs *form)
{
	return form->row_bytes > bytes ? form->row_bytes : bytes;
}

void afd__attn_inputs_plan(struct afd_attn *attn)
{
	struct afd__attn_weights *weights = &attn->weights;
	uint32_t i;

	/* The head's activations are never quantised. */
	weights->head_inputs = afd__matrix_inputs(attn->device, &weights->head, false);
	attn->input_row_bytes = larger(0, &weights->head_inputs);
	for (i = 0; i < weights->n_layers; i++) {
		struct afd__attn_layer *w = &weights->layers[i];

		w->attention_inputs = attention_form(attn, w);
		w->ffn_inputs = ffn_form(attn, i);
		attn->input_row_bytes = larger(attn->input_row_bytes, &w->attention_inputs);
		attn->input_row_bytes = larger(attn->input_row_bytes, &w->ffn_inputs);
	}
}

struct afd__inputs afd__attn_inputs(
	const struct afd_attn *attn, const struct afd__inputs *form, uint32_t row0, uint32_t row)
{
	struct afd__inputs inputs = *form;

	/* Lanes keep apart whatever form each has; the rows of a lane follow each other. */
	if (form->row_bytes)
		inputs.rows = (char *)attn->memory.inputs + row0 * attn->input_row_bytes +
			      (row - row0) * form->row_bytes;
	return inputs;
}
