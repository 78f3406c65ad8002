/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Brings the experts of a layer onto the device, those of the shard and of each its part of the
 * width. Experts that follow each other and have the same dtypes make a stack; there is one, unless
 * a checkpoint mixes dtypes among experts. Used in place they must lie one behind the other, as
 * those of a fused tensor do; else they are packed. Called by load.c at creation.
 */
#include "load.h"

struct expert {
	struct afd__slice gate, up, down;
};

/* Where a layer's experts are looked for. */
struct source {
	struct afd__ffn_loader *ld;
	uint32_t layer; /* the contract's number */
	struct afd__range experts, width;
};

static int find_slice(
	const struct source *src, uint32_t e, int32_t kind, struct afd__slice *slice)
{
	int rc = afd__model_expert(src->ld->to.model, (int32_t)src->layer, e, kind, &slice->tensor);

	if (rc)
		return rc;
	*slice = afd__slice_whole(&slice->tensor);
	if (kind == AFD__TENSOR_EXPERT_DOWN)
		slice->columns = src->width;
	else
		slice->rows = src->width;
	return 0;
}

static int find_expert(const struct source *src, uint32_t e, struct expert *out)
{
	int rc = find_slice(src, e, AFD__TENSOR_EXPERT_GATE, &out->gate);

	if (!rc)
		rc = find_slice(src, e, AFD__TENSOR_EXPERT_UP, &out->up);
	if (!rc)
		rc = find_slice(src, e, AFD__TENSOR_EXPERT_DOWN, &out->down);
	if (!rc && out->gate.tensor.dtype != out->up.tensor.dtype)
		rc = afd__error(-ENOTSUP, "%s: dtype %s, that of gate_proj is %s: supported is one",
			out->up.tensor.name, afd_dtype_name(out->up.tensor.dtype),
			afd_dtype_name(out->gate.tensor.dtype));
	return rc;
}

/* ---- one stack ---- */

/* Experts first .. end - 1 can be one stack, and how it is made. */
struct run {
	uint32_t first, end;
	int32_t dtype, down_dtype;
	bool mixed_panels;
	const char *gate_up, *down; /* where they lie for use in place; NULL: they do not */
	const char *name;
};

static size_t slice_bytes(const struct afd__slice *slice)
{
	return (size_t)afd__range_size(slice->rows) * afd__range_size(slice->columns) *
	       afd_dtype_bytes(slice->tensor.dtype);
}

/* The next expert lies where it would in a stack. */
static void follow(struct run *run, uint32_t e, const struct expert *x)
{
	size_t gate_bytes = slice_bytes(&x->gate);
	const char *gate = afd__slice_rows(&x->gate), *up = afd__slice_rows(&x->up);

	if (run->gate_up && (gate != run->gate_up + (e - run->first) * 2 * gate_bytes ||
				    up != gate + gate_bytes))
		run->gate_up = NULL;
	if (run->down && afd__slice_rows(&x->down) !=
				 run->down + (e - run->first) * slice_bytes(&x->down))
		run->down = NULL;
}

static int find_run(const struct source *src, uint32_t first, struct run *run)
{
	struct expert x;
	uint32_t e;
	int rc = 0;

	*run = (struct run){ .first = first };
	for (e = first; e < src->experts.end; e++) {
		rc = find_expert(src, e, &x);
		if (rc)
			return rc;
		if (e == first) {
			run->dtype = x.gate.tensor.dtype;
			run->down_dtype = x.down.tensor.dtype;
			run->gate_up = src->ld->to.in_place ? afd__slice_rows(&x.gate) : NULL;
			run->down = src->ld->to.in_place ? afd__slice_rows(&x.down) : NULL;
			run->name = x.gate.tensor.name;
		}
		if (x.gate.tensor.dtype != run->dtype || x.down.tensor.dtype != run->down_dtype)
			break;
		follow(run, e, &x);
		run->mixed_panels |= afd__slice_mixes(&x.gate, 0) ||
				     afd__slice_mixes(&x.up, afd__range_size(src->width));
		run->end = e + 1;
	}
	return 0;
}

static int create_stacks(
	const struct source *src, const struct run *run, struct afd__ffn_experts *stack)
{
	struct afd__matrix_shape shape = {
		.n = 2 * afd__range_size(src->width),
		.k = src->ld->ffn->hidden,
		.n_stack = run->end - run->first,
		.dtype = run->dtype,
		.mixed_panels = run->mixed_panels,
	};
	int rc = afd__matrix_create_stack(
		src->ld->ffn->device, &stack->gate_up, &shape, run->gate_up);

	shape.n = src->ld->ffn->hidden;
	shape.k = afd__range_size(src->width);
	shape.dtype = run->down_dtype;
	shape.column_offset = src->width.begin;
	shape.mixed_panels = 0;
	if (!rc)
		rc = afd__matrix_create_stack(
			src->ld->ffn->device, &stack->down, &shape, run->down);
	return rc ? afd__error_prefix(rc, "%s", run->name) : 0;
}

static int load_expert(const struct source *src, struct afd__ffn_experts *stack, uint32_t e)
{
	struct afd__matrix gate_up = afd__matrix_at(&stack->gate_up, e - stack->first);
	struct afd__matrix down = afd__matrix_at(&stack->down, e - stack->first);
	struct expert x;
	int rc = find_expert(src, e, &x);

	if (!rc)
		rc = afd__slice_load(&src->ld->to, &x.gate, &gate_up, 0);
	if (!rc)
		rc = afd__slice_load(&src->ld->to, &x.up, &gate_up, afd__range_size(src->width));
	return rc ? rc : afd__slice_load(&src->ld->to, &x.down, &down, 0);
}

static int load_stack(
	const struct source *src, const struct run *run, struct afd__ffn_experts *stack)
{
	uint32_t e;
	int rc;

	stack->first = run->first;
	if (src->ld->ffn->quantizes &&
		(run->dtype == AFD_DTYPE_FP8) != (run->down_dtype == AFD_DTYPE_FP8))
		return afd__error(-ENOTSUP,
			"%s: dtype %s, that of down_proj is %s: activations of experts are "
			"quantised when both are fp8",
			run->name, afd_dtype_name(run->dtype), afd_dtype_name(run->down_dtype));
	rc = create_stacks(src, run, stack);
	for (e = run->first; e < run->end && !rc; e++)
		rc = load_expert(src, stack, e);
	return rc;
}

/* ---- a layer ---- */

static int count_stacks(const struct source *src, uint32_t *n_stacks)
{
	struct run run = { .end = src->experts.begin };
	int rc = 0;

	for (*n_stacks = 0; run.end < src->experts.end && !rc; (*n_stacks)++)
		rc = find_run(src, run.end, &run);
	return rc;
}

int afd__ffn_load_experts(struct afd__ffn_loader *ld, uint32_t index, struct afd__ffn_layer *layer)
{
	const struct afd__ffn_shard *shard = &ld->ffn->shard;
	const struct afd__layer *arch = layer->arch;
	struct source src = {
		.ld = ld,
		.layer = ld->ffn->first_layer + index,
		.experts = afd__shard_range(arch->n_experts, shard->ep, shard->n_ep),
		.width = afd__shard_range(arch->expert_size, shard->tp, shard->n_tp),
	};
	struct run run = { .end = src.experts.begin };
	uint32_t i;
	int rc;

	if (afd__range_size(src.width) > UINT32_MAX / 2)
		return afd__error(-ENOTSUP, "layer %u: experts of width %u, limit %u", src.layer,
			afd__range_size(src.width), UINT32_MAX / 2);
	rc = count_stacks(&src, &layer->n_stacks);
	if (rc) {
		layer->n_stacks = 0;
		return rc;
	}
	layer->width_offset = src.width.begin;
	layer->stacks = afd__alloc(ld->ffn->ctx, layer->n_stacks, sizeof(*layer->stacks));
	if (!layer->stacks)
		return -ENOMEM;
	for (i = 0; i < layer->n_stacks && !rc; i++) {
		rc = find_run(&src, run.end, &run);
		if (!rc)
			rc = load_stack(&src, &run, &layer->stacks[i]);
	}
	return rc;
}
