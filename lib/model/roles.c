/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a slot to its tensor: found, its shape and dtype checked, its scales beside it, and cut out
 * of a fused one. What a slot gives is the same however the checkpoint stores it. Called by model.c
 * and shards.c.
 */
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "../../kernels/cpu/number.h"
#include "checkpoint.h"
#include "model.h"

enum { MAX_DIMS = 3 };

/* ---- shapes ---- */

/* What the stored tensor must be, from the slot's own shape. */
struct expected {
	uint32_t n_dims;
	uint64_t shape[MAX_DIMS]; /* [n_dims] */
	char names[160];          /* the keys of config.json that say so */
};

static void expect(struct expected *e, const struct afd_model *model, const struct afd__slot *slot)
{
	const char *rows = afd__size_name(slot->size_names[0]);
	const char *columns = afd__size_name(slot->size_names[1]);
	bool fused = slot->form != AFD__FORM_APART, gate_up = slot->form == AFD__FORM_GATE_UP;
	uint64_t *shape = e->shape;

	if (fused)
		*shape++ = model->arch.layers[slot->layer].n_experts;
	shape[0] = slot->shape[0] * (gate_up ? 2 : 1);
	shape[1] = slot->shape[1];
	e->n_dims = slot->n_dims + fused;
	snprintf(e->names, sizeof(e->names), "%s%s%s%s%s", fused ? "num_experts, " : "",
		 gate_up ? "2 * " : "", rows, slot->n_dims > 1 ? ", " : "", columns);
}

static uint64_t in_blocks(uint64_t n)
{
	return (n + AFD__SCALE_BLOCK - 1) / AFD__SCALE_BLOCK;
}

static void expect_scales(struct expected *e)
{
	uint32_t i;

	for (i = e->n_dims - 2; i < e->n_dims; i++)
		e->shape[i] = in_blocks(e->shape[i]);
	snprintf(e->names, sizeof(e->names), "blocks of %d x %d", AFD__SCALE_BLOCK,
		 AFD__SCALE_BLOCK);
}

static void print_shape(char *text, size_t capacity, const uint64_t *shape, uint32_t n_dims)
{
	size_t used = 0;
	uint32_t i;

	for (i = 0; i < n_dims; i++)
		used += (size_t)snprintf(text + used, capacity - used, "%s%" PRIu64, i ? ", " : "",
					 shape[i]);
}

static int check_shape(const struct expected *e, const struct afd__tensor *t, const char *whose)
{
	char has[100] = "", wants[80] = "";
	uint32_t i;

	for (i = 0; i < e->n_dims && t->n_dims == e->n_dims && t->shape[i] == e->shape[i]; i++)
		;
	if (i == e->n_dims)
		return 0;
	print_shape(has, sizeof(has), t->shape, t->n_dims);
	print_shape(wants, sizeof(wants), e->shape, e->n_dims);
	return afd__error(-EBADMSG, "tensor %.200s: shape is [%s], %s [%s] (%s)", t->name, has,
			  whose, wants, e->names);
}

/* ---- scales ---- */

static bool may_be_fp8(const struct afd__slot *slot)
{
	switch (slot->kind) {
	case AFD__TENSOR_EMBED:
	case AFD__TENSOR_HEAD:
	case AFD__TENSOR_ROUTER:
		return false;
	default:
		return slot->n_dims == 2;
	}
}

static int find_scales(const struct afd_model *model, const struct afd__slot *slot,
		       struct expected *e, bool with_data, struct afd__tensor *out)
{
	struct afd__tensor t;
	int rc;

	if (!slot->scales)
		return afd__error(-ENOENT,
				  "tensor %.200s: dtype is F8_E4M3, but its scales "
				  "%.200s_scale_inv (or _scale) are not there",
				  out->name, out->name);
	rc = afd__checkpoint_tensor(model->checkpoint, slot->scales, with_data, &t);
	if (rc)
		return rc;
	if (t.dtype == AFD_DTYPE_FP8)
		return afd__error(-ENOTSUP,
				  "tensor %.200s: dtype F8_E4M3 is not supported for scales, "
				  "only F32, F16 and BF16",
				  slot->scales);
	expect_scales(e);
	rc = check_shape(e, &t, "its matrix needs");
	if (rc)
		return rc;
	out->scales = (struct afd__scales){
		.name = t.name,
		.data = t.data,
		.bytes = t.bytes,
		.dtype = t.dtype,
		.rows = (uint32_t)e->shape[e->n_dims - 2],
		.columns = (uint32_t)e->shape[e->n_dims - 1],
	};
	return 0;
}

static int check_scales(const struct afd_model *model, const struct afd__slot *slot,
			struct expected *e, bool with_data, struct afd__tensor *out)
{
	if (out->dtype != AFD_DTYPE_FP8) {
		if (!slot->scales)
			return 0;
		return afd__error(-EBADMSG, "tensor %.200s: dtype is %s, but it has scales: %.200s",
				  out->name, afd_dtype_name(out->dtype), slot->scales);
	}
	if (!may_be_fp8(slot))
		return afd__error(-ENOTSUP,
				  "tensor %.200s: dtype F8_E4M3 is supported only for the "
				  "projections of a layer",
				  out->name);
	return find_scales(model, slot, e, with_data, out);
}

/* ---- from slot to tensor ---- */

static int missing(const struct afd_model *model, const struct afd__slot *slot)
{
	char names[400];

	afd__slot_spellings(slot, names, sizeof(names));
	return afd__checkpoint_missing(model->checkpoint, names);
}

int afd__slot_stored(const struct afd_model *model, const struct afd__slot *slot, bool with_data,
		     struct afd__tensor *out)
{
	struct expected e;
	int rc;

	if (!slot->stored)
		return missing(model, slot);
	rc = afd__checkpoint_tensor(model->checkpoint, slot->stored, with_data, out);
	if (rc)
		return rc;
	expect(&e, model, slot);
	/* One number, as a scalar. */
	if (!out->n_dims && e.n_dims == 1 && e.shape[0] == 1)
		e.n_dims = 0;
	rc = check_shape(&e, out, "config.json says");
	return rc ? rc : check_scales(model, slot, &e, with_data, out);
}

/* Of the blocks of [n_experts][rows], those of one expert, or of one half of it. */
static void cut_scales(struct afd__scales *s, const struct afd__slot *slot)
{
	size_t row_bytes = s->columns * afd_dtype_bytes(s->dtype);
	uint64_t first = (uint64_t)slot->expert * s->rows;

	if (slot->form == AFD__FORM_GATE_UP) {
		uint64_t begin = slot->kind == AFD__TENSOR_EXPERT_UP ? slot->shape[0] : 0;

		first += begin / AFD__SCALE_BLOCK;
		s->row_offset = (uint32_t)(begin % AFD__SCALE_BLOCK);
		s->rows = (uint32_t)in_blocks(s->row_offset + slot->shape[0]);
	}
	s->bytes = s->rows * row_bytes;
	if (s->data)
		s->data = (const char *)s->data + first * row_bytes;
}

static void cut(struct afd__tensor *t, const struct afd__slot *slot)
{
	uint64_t bytes = slot->shape[0] * slot->shape[1] * afd_dtype_bytes(t->dtype);
	uint64_t first = (uint64_t)slot->expert;

	if (slot->form == AFD__FORM_GATE_UP)
		first = 2 * first + (slot->kind == AFD__TENSOR_EXPERT_UP);
	if (t->data)
		t->data = (const char *)t->data + first * bytes;
	t->bytes = bytes;
	t->n_dims = 2;
	memset(t->shape, 0, sizeof(t->shape));
	memcpy(t->shape, slot->shape, sizeof(slot->shape));
	if (t->scales.rows)
		cut_scales(&t->scales, slot);
}

static int own_tensor(const struct afd_model *model, const struct afd__slot *slot, bool with_data,
		      struct afd__tensor *out)
{
	int rc = afd__slot_stored(model, slot, with_data, out);

	if (rc)
		return rc;
	out->name = slot->name;
	if (slot->form != AFD__FORM_APART)
		cut(out, slot);
	return 0;
}

/*
 * A tied head that the checkpoint ships as well is nearly always the same numbers twice. Then one
 * matrix serves both, as if it had not been shipped; the bits are the same. Unknown when a file is
 * missing.
 */
static int compare_head(const struct afd_model *model, const struct afd__slot *slot)
{
	struct afd__tensor head, embed;

	if (!slot->stored)
		return AFD__HEAD_SHARED;
	if (own_tensor(model, slot, true, &head) ||
	    own_tensor(model, afd__slot_find(model, -1, -1, AFD__TENSOR_EMBED), true, &embed))
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
	if (afd__slot_is_shared(model, slot))
		slot = afd__slot_find(model, -1, -1, AFD__TENSOR_EMBED);
	return own_tensor(model, slot, with_data, out);
}

/* ---- for the stages ---- */

int afd__model_tensor(const struct afd_model *model, int32_t layer, int32_t kind,
		      struct afd__tensor *out)
{
	const struct afd__slot *slot = afd__slot_find(model, layer, -1, kind);

	assert(slot);
	return afd__slot_tensor(model, slot, true, out);
}

int afd__model_expert(const struct afd_model *model, int32_t layer, uint32_t expert, int32_t kind,
		      struct afd__tensor *out)
{
	const struct afd__slot *slot = afd__slot_find(model, layer, (int32_t)expert, kind);

	assert(slot);
	return afd__slot_tensor(model, slot, true, out);
}

static int read_scale(const struct afd_model *model, int32_t layer, int32_t kind, float *scale)
{
	const struct afd__slot *slot = afd__slot_find(model, layer, -1, kind);
	struct afd__tensor t;
	int rc;

	*scale = 1;
	if (!slot)
		return 0;
	rc = afd__slot_tensor(model, slot, true, &t);
	if (rc)
		return rc;
	*scale = afd_k_float_at(t.data, 0, t.dtype);
	if (isfinite(*scale) && *scale > 0)
		return 0;
	return afd__error(-EBADMSG, "tensor %s: scale is %g, must be a positive number", t.name,
			  *scale);
}

int afd__model_kv_scales(const struct afd_model *model, int32_t layer, float *k_scale,
			 float *v_scale)
{
	int rc = read_scale(model, layer, AFD__TENSOR_K_SCALE, k_scale);

	return rc ? rc : read_scale(model, layer, AFD__TENSOR_V_SCALE, v_scale);
}
