/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The end of a step: the rows that give an output are gathered, normed, and multiplied with the
 * head; what the batch wants goes down to the host: ids of the largest, ids that the device draws,
 * logits. A chunk of rows at a time, in one piece of device memory.
 *
 * A logit that is not finite is an error of the step, never an output. Called by step.
 */
#include <stdio.h>
#include <string.h>

#include "attn.h"

static int gather(
	struct afd_attn *attn, const float *from, float *to, uint32_t row0, uint32_t n_rows)
{
	const int32_t *outputs = attn->memory.words + attn->batch.outputs_at + row0;

	return afd__attn_convert_rows(
		attn, from, AFD_DTYPE_F32, outputs, to, AFD_DTYPE_F32, n_rows);
}

static int enqueue_logits(struct afd_attn *attn, uint32_t n_rows)
{
	uint32_t last = attn->arch->n_layers - 1;
	const float *after = attn->weights.layers[last].after_ffn_norm;
	const struct afd__inputs inputs =
		afd__attn_inputs(attn, &attn->weights.head_inputs, 0, 0);
	const struct afd__norm_args norm_after = {
		.h = attn->memory.head_y,
		.weight = after,
		.out = attn->memory.post,
		.n_rows = n_rows,
		.width = attn->arch->hidden_size,
		.eps = attn->arch->rms_norm_eps,
	};
	const struct afd__norm_args norm = {
		.h = attn->memory.head_h,
		.add = after ? attn->memory.post : attn->memory.head_y,
		.weight = attn->weights.final_norm,
		.out = inputs.rows ? NULL : attn->memory.head_x,
		.n_rows = n_rows,
		.width = attn->arch->hidden_size,
		.eps = attn->arch->rms_norm_eps,
		.add_wire = afd__attn_y_wire(attn, last),
		.inputs = inputs,
	};
	const struct afd__product_args product = {
		.x = attn->memory.head_x,
		.inputs = inputs.rows,
		.w = attn->weights.head,
		.y = attn->memory.logits,
		.x_stride = attn->arch->hidden_size,
		.y_stride = attn->arch->vocab_size,
		.n_rows = n_rows,
	};
	int rc = after ? afd__norm(&attn->queue, &norm_after) : 0;

	rc = rc ? rc : afd__norm(&attn->queue, &norm);
	return rc ? rc : afd__product(&attn->queue, &product);
}

/* From the logits on the device. What the batch does not want is not computed; each also finds a
 * logit that is not finite. */
static int enqueue_ids(struct afd_attn *attn, uint32_t row0, uint32_t n_rows)
{
	const struct afd__batch *batch = &attn->batch;
	const struct afd__argmax_args argmax = {
		.x = attn->memory.logits,
		.ids = attn->memory.greedy,
		.n_rows = n_rows,
		.width = attn->arch->vocab_size,
	};
	const struct afd__sample_args sample = {
		.logits = attn->memory.logits,
		.rows = (const struct afd__sample_row *)(attn->memory.words + batch->samples_at) +
			row0,
		.ids = attn->memory.sampled,
		.n_rows = n_rows,
		.width = attn->arch->vocab_size,
	};
	int rc = 0;

	if (batch->ids & AFD__IDS_GREEDY)
		rc = afd__argmax(&attn->queue, &argmax);
	if (!rc && batch->ids & AFD__IDS_SAMPLED)
		rc = afd__sample(&attn->queue, &sample);
	return rc;
}

int afd__attn_enqueue_head(struct afd_attn *attn, uint32_t row0, uint32_t n_rows)
{
	int rc;

	afd__range_push(&attn->queue, "afd head");
	rc = gather(attn, attn->memory.h, attn->memory.head_h, row0, n_rows);
	rc = rc ? rc : gather(attn, attn->memory.y, attn->memory.head_y, row0, n_rows);
	rc = rc ? rc : enqueue_logits(attn, n_rows);
	rc = rc ? rc : enqueue_ids(attn, row0, n_rows);
	afd__range_pop(&attn->queue);
	return rc;
}

int afd__attn_enqueue_outputs(struct afd_attn *attn, uint32_t row0, uint32_t n_rows)
{
	size_t vocab = attn->arch->vocab_size, ids_bytes = n_rows * sizeof(int32_t);
	int rc = 0;

	if (attn->batch.ids & AFD__IDS_GREEDY)
		rc = afd__queue_download(
			&attn->queue, attn->greedy + row0, attn->memory.greedy, ids_bytes);
	if (!rc && attn->batch.ids & AFD__IDS_SAMPLED)
		rc = afd__queue_download(
			&attn->queue, attn->sampled + row0, attn->memory.sampled, ids_bytes);
	if (!rc && attn->step.logits)
		rc = afd__queue_download(&attn->queue, attn->step.logits + row0 * vocab,
			attn->memory.logits, n_rows * vocab * sizeof(float));
	return rc;
}

/* "user 5, sequence 7" */
static void name_entry(const struct afd__batch_entry *entry, char *text, size_t capacity)
{
	unsigned long long user = entry->user_id, id = entry->id;

	if (user)
		snprintf(text, capacity, "user %llu, sequence %llu", user, id);
	else
		snprintf(text, capacity, "sequence %llu", id);
}

/* Where nothing is drawn with a temperature, the largest is what would be drawn. */
static const int32_t *find_sampled(const struct afd_attn *attn)
{
	return attn->batch.ids & AFD__IDS_SAMPLED ? attn->sampled : attn->greedy;
}

int afd__attn_check_outputs(const struct afd_attn *attn)
{
	const int32_t *ids = find_sampled(attn); /* [n_outputs] */
	const struct afd__batch *batch = &attn->batch;
	const struct afd__batch_entry *entry;
	char name[80];
	uint32_t row, i;

	for (i = 0; i < batch->n_outputs; i++) {
		if (ids[i] >= 0)
			continue;
		row = (uint32_t)batch->words[batch->outputs_at + i];
		entry = afd__batch_entry_of(batch, row);
		name_entry(entry, name, sizeof(name));
		return afd__error(-EDOM, "%s, position %u: logit %d is not finite", name,
			entry->position0 + (row - entry->row0), -1 - ids[i]);
	}
	return 0;
}

void afd__attn_give_ids(const struct afd_attn *attn)
{
	const struct afd__step *step = &attn->step;
	size_t bytes = attn->batch.n_outputs * sizeof(int32_t);

	if (step->greedy_ids && bytes)
		memcpy(step->greedy_ids, attn->greedy, bytes);
	if (step->sampled_ids && bytes)
		memcpy(step->sampled_ids, find_sampled(attn), bytes);
}
