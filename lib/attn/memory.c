/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device memory that steps write, in one piece, sized for the largest batch when the stage is
 * made. So a step allocates nothing, and a stage that will not fit says so at once.
 */
#include <string.h>

#include "attn.h"

struct plan {
	size_t bytes;
	int overflow;
	char *base; /* NULL: only counting */
};

/* The next n * width numbers of 4 bytes, at 64 bytes. */
static void *part(struct plan *plan, size_t n, size_t width)
{
	size_t at = plan->bytes, bytes;

	if (__builtin_mul_overflow(n, width, &bytes) || __builtin_mul_overflow(bytes, 4, &bytes) ||
		__builtin_add_overflow(bytes, 63, &bytes) ||
		__builtin_add_overflow(plan->bytes, bytes & ~(size_t)63, &plan->bytes))
		plan->overflow = 1;
	return plan->base ? plan->base + at : NULL;
}

/* Numbers of 4 bytes that a row takes in whichever wire dtype; a short one of FP8 is the widest. */
static size_t wire_width(uint32_t hidden)
{
	size_t fp8 = afd__row_bytes(hidden, AFD_DTYPE_FP8) / sizeof(float);

	return fp8 > hidden ? fp8 : hidden;
}

static bool has_gate(const struct afd__arch *arch)
{
	uint32_t i = 0;

	while (i < arch->n_layers && arch->layers[i].output_gate == AFD__OUTPUT_GATE_NONE)
		i++;
	return i < arch->n_layers;
}

static bool has_norms_after(const struct afd__arch *arch)
{
	const uint32_t after = AFD__NORM_AFTER_ATTENTION | AFD__NORM_AFTER_FFN;
	uint32_t i = 0;

	while (i < arch->n_layers && !(arch->layers[i].norms & after))
		i++;
	return i < arch->n_layers;
}

static void lay_out(const struct afd_attn *attn, struct afd__attn_memory *m, struct plan *plan)
{
	size_t rows = attn->params.max_rows, hidden = attn->arch->hidden_size;
	uint32_t head_rows = attn->params.max_outputs < AFD__HEAD_ROWS ? attn->params.max_outputs
								       : AFD__HEAD_ROWS;

	m->h = part(plan, rows, hidden);
	m->x = part(plan, rows, hidden);
	m->y = part(plan, rows, hidden);
	m->qkv = part(plan, rows, attn->qkv_width);
	m->mixed = part(plan, rows, attn->mixed_width);
	m->angles = part(plan, rows * attn->weights.n_ropes, attn->layout.head_dim);
	m->wire = attn->ffn || attn->route.top_k
			  ? part(plan, rows, wire_width(attn->arch->hidden_size))
			  : NULL;
	/* At 64 bytes, and rows of multiples of 16. */
	m->inputs = attn->input_row_bytes
			    ? part(plan, rows > head_rows ? rows : head_rows,
				      attn->input_row_bytes / sizeof(float))
			    : NULL;
	m->zeros = part(plan, 1, rows > hidden ? rows : hidden);
	m->words = part(plan, 1, attn->batch.capacity_words);
	m->gate = has_gate(attn->arch) ? part(plan, rows, attn->mixed_width) : NULL;
	m->quantized = attn->params.quantize_activations ? part(plan, rows, hidden) : NULL;
	m->post = has_norms_after(attn->arch)
			  ? part(plan, rows > head_rows ? rows : head_rows, hidden)
			  : NULL;
	if (attn->route.top_k) {
		m->router_logits = part(plan, rows, attn->route.n_experts);
		m->expert_ids = part(plan, rows, attn->route.top_k);
		m->expert_weights = part(plan, rows, attn->route.top_k);
		m->row_lists = part(plan, rows, attn->route.n_targets);
	}
	m->head_h = part(plan, head_rows, hidden);
	m->head_y = part(plan, head_rows, hidden);
	m->head_x = part(plan, head_rows, hidden);
	m->logits = part(plan, head_rows, attn->arch->vocab_size);
	m->greedy = part(plan, 1, head_rows);
	m->sampled = part(plan, 1, head_rows);
}

/* There is no operation that clears; zeros are sent once. */
static int upload_zeros(struct afd_attn *attn)
{
	size_t n = attn->params.max_rows > attn->arch->hidden_size ? attn->params.max_rows
								   : attn->arch->hidden_size;
	float *zeros = afd__alloc(attn->ctx, n, sizeof(*zeros));
	int rc;

	if (!zeros)
		return -ENOMEM;
	rc = afd__queue_upload(&attn->queue, attn->memory.zeros, zeros, n * sizeof(*zeros));
	afd__free(zeros);
	return rc;
}

int afd__attn_memory_create(struct afd_attn *attn)
{
	struct afd__attn_memory *m = &attn->memory;
	struct plan plan = { 0 };
	int rc;

	afd__attn_inputs_plan(attn);
	lay_out(attn, m, &plan);
	if (plan.overflow)
		return afd__error(-EINVAL, "attn: the activations of max_rows %u overflow",
			attn->params.max_rows);
	rc = afd__device_alloc(attn->device, plan.bytes, "activations", &m->all);
	if (rc)
		return rc;
	m->bytes = plan.bytes;
	plan = (struct plan){ .base = m->all };
	lay_out(attn, m, &plan);
	return upload_zeros(attn);
}

void afd__attn_memory_destroy(struct afd_attn *attn)
{
	if (attn->memory.all)
		afd__device_free(attn->device, attn->memory.all, attn->memory.bytes);
	memset(&attn->memory, 0, sizeof(attn->memory));
}
