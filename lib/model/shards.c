/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a shard of a role holds: of every slot its part, in numbers as they are stored, with the
 * scales of all blocks that the part touches. Stages cut in the same way, so this predicts what
 * they hold. Called by hosts and by afd-inspect, and by the stages to check a shard.
 */
#include "shard.h"

#include <afd/transport.h>

#include "checkpoint.h"

/* ---- which shards there can be ---- */

static int check_index(uint32_t index, uint32_t n, const char *name, const char *what)
{
	if (index < n)
		return 0;
	return afd__error(-EINVAL, "%s: %s index is %u of %u, limit %u", what, name, index, n,
			  n - 1);
}

static int check_count(uint64_t n, uint32_t limit, const char *ranks, const char *of,
		       const char *what)
{
	if (n <= limit)
		return 0;
	return afd__error(-EINVAL, "%s: %llu %s, limit %u: the model's %s", what,
			  (unsigned long long)n, ranks, limit, of);
}

static int check_layer(const struct afd__layer *l, struct afd__ffn_shard s, int32_t role,
		       const char *what)
{
	uint64_t n_ranks = (uint64_t)s.n_tp * s.n_ep;
	int rc;

	if (role == AFD_ROLE_ATTENTION)
		return check_count(s.n_tp, l->n_heads, "tensor-parallel ranks", "query heads",
				   what);
	if (l->ffn_kind == AFD_FFN_DENSE)
		return check_count(n_ranks, l->intermediate_size, "ranks", "intermediate_size",
				   what);
	rc = check_count(s.n_ep, l->n_experts, "expert-parallel ranks", "experts", what);
	if (!rc)
		rc = check_count(s.n_tp, l->expert_size, "tensor-parallel ranks", "expert width",
				 what);
	if (!rc && l->shared_size)
		rc = check_count(n_ranks, l->shared_size, "ranks", "width of shared experts", what);
	return rc;
}

int afd__shard_read(struct afd__ffn_shard *out, const struct afd_shard *in, int32_t role,
		    const struct afd__arch *arch, const char *what)
{
	struct afd__ffn_shard s = { in->tp, in->n_tp ? in->n_tp : 1, in->ep,
				    in->n_ep ? in->n_ep : 1 };
	uint32_t i;
	int rc = check_index(s.tp, s.n_tp, "tensor-parallel", what);

	if (!rc)
		rc = check_index(s.ep, s.n_ep, "expert-parallel", what);
	if (!rc && role == AFD_ROLE_ATTENTION && s.n_ep > 1)
		rc = afd__error(-EINVAL,
				"%s: %u expert-parallel ranks, but attention has no experts", what,
				s.n_ep);
	for (i = 0; !rc && arch && i < arch->n_layers; i++)
		rc = check_layer(&arch->layers[i], s, role, what);
	if (!rc)
		*out = s;
	return rc;
}

/* ---- the part of a slot ---- */

static struct afd__cut whole(const uint64_t *shape, uint32_t n_dims)
{
	return (struct afd__cut){ { 0, (uint32_t)shape[0] },
				   { 0, n_dims > 1 ? (uint32_t)shape[1] : 1 } };
}

static struct afd__range scaled(struct afd__range r, uint32_t by)
{
	return (struct afd__range){ r.begin * by, r.end * by };
}

struct afd__cut afd__shard_attention(const struct afd__layer *l, int32_t kind,
				      const uint64_t *shape, uint32_t n_dims, uint32_t index,
				      uint32_t n)
{
	struct afd__cut part = whole(shape, n_dims);
	struct afd__heads heads;

	if (!l)
		return part;
	heads = afd__shard_heads(l->n_heads, l->n_kv_heads, index, n);
	switch (kind) {
	case AFD__TENSOR_Q:
	case AFD__TENSOR_Q_BIAS:
	case AFD__TENSOR_OUTPUT_GATE:
		part.rows = scaled(heads.q, l->head_dim);
		break;
	case AFD__TENSOR_K:
	case AFD__TENSOR_V:
	case AFD__TENSOR_K_BIAS:
	case AFD__TENSOR_V_BIAS:
		part.rows = scaled(heads.kv, l->head_dim);
		break;
	case AFD__TENSOR_O:
		part.columns = scaled(heads.q, l->head_dim);
		break;
	default:
		break;
	}
	return part;
}

static bool cut_ffn(struct afd__cut *part, const struct afd__slot *slot, struct afd__ffn_shard s,
		    const struct afd__layer *l)
{
	struct afd__range experts = afd__shard_range(l->n_experts, s.ep, s.n_ep);
	uint32_t rank = afd__ffn_shard_rank(s), n = afd__ffn_shard_count(s);

	switch (slot->kind) {
	case AFD__TENSOR_GATE:
	case AFD__TENSOR_UP:
	case AFD__TENSOR_SHARED_GATE:
	case AFD__TENSOR_SHARED_UP:
		part->rows = afd__shard_range((uint32_t)slot->shape[0], rank, n);
		return true;
	case AFD__TENSOR_DOWN:
	case AFD__TENSOR_SHARED_DOWN:
		part->columns = afd__shard_range((uint32_t)slot->shape[1], rank, n);
		return true;
	case AFD__TENSOR_EXPERT_GATE:
	case AFD__TENSOR_EXPERT_UP:
		part->rows = afd__shard_range(l->expert_size, s.tp, s.n_tp);
		return (uint32_t)slot->expert >= experts.begin &&
		       (uint32_t)slot->expert < experts.end;
	case AFD__TENSOR_EXPERT_DOWN:
		part->columns = afd__shard_range(l->expert_size, s.tp, s.n_tp);
		return (uint32_t)slot->expert >= experts.begin &&
		       (uint32_t)slot->expert < experts.end;
	default:
		return true;
	}
}

static uint64_t n_blocks(struct afd__range r, uint32_t offset)
{
	return (offset + (uint64_t)r.end + AFD__SCALE_BLOCK - 1) / AFD__SCALE_BLOCK -
	       (offset + r.begin) / AFD__SCALE_BLOCK;
}

static uint64_t part_bytes(const struct afd__tensor *t, const struct afd__cut *part)
{
	uint64_t n_rows = part->rows.end - part->rows.begin;
	uint64_t n_columns = part->columns.end - part->columns.begin;
	uint64_t bytes = n_rows * n_columns * afd_dtype_bytes(t->dtype);

	if (t->scales.rows)
		bytes += n_blocks(part->rows, t->scales.row_offset) * n_blocks(part->columns, 0) *
			 afd_dtype_bytes(t->scales.dtype);
	return bytes;
}

/* ---- all of them ---- */

static bool in_layers(const struct afd__slot *slot, const struct afd_shard_params *p)
{
	uint32_t end = p->n_layers ? p->first_layer + p->n_layers : UINT32_MAX;

	return slot->layer < 0 ||
	       ((uint32_t)slot->layer >= p->first_layer && (uint32_t)slot->layer < end);
}

static bool has_slot(const struct afd__slot *slot, const struct afd_shard_params *p)
{
	if (!(slot->role & p->role))
		return false;
	return slot->role != AFD__ROLE_BOTH || p->role == AFD_ROLE_FFN || p->gate != AFD_GATE_FFN;
}

static int add_slot(struct afd_role_info *sum, const struct afd_model *model,
		    const struct afd__slot *slot, const struct afd_shard_params *p,
		    struct afd__ffn_shard s)
{
	const struct afd__layer *l = slot->layer < 0 ? NULL : &model->arch.layers[slot->layer];
	struct afd__cut part = whole(slot->shape, slot->n_dims);
	struct afd__range experts = { 0, 0 };
	struct afd__tensor t;
	int rc;

	if (p->role == AFD_ROLE_ATTENTION)
		part = afd__shard_attention(l, slot->kind, slot->shape, slot->n_dims, s.tp,
					    s.n_tp);
	if (p->role == AFD_ROLE_FFN && !cut_ffn(&part, slot, s, l))
		return 0;
	rc = afd__slot_tensor(model, slot, false, &t);
	if (rc)
		return rc;
	sum->bytes += part_bytes(&t, &part);
	/* A fused tensor counts once, with the first expert that is held. */
	if (slot->form != AFD__FORM_APART)
		experts = afd__shard_range(l->n_experts, s.ep, s.n_ep);
	if (slot->form == AFD__FORM_APART ||
	    ((uint32_t)slot->expert == experts.begin &&
	     (slot->form == AFD__FORM_STACK || slot->kind == AFD__TENSOR_EXPERT_GATE)))
		sum->n_tensors += 1 + (t.scales.rows != 0);
	return 0;
}

int afd_model_shard(const afd_model *model, const struct afd_shard_params *params,
		    struct afd_role_info *info)
{
	struct afd_role_info sum = { 0 };
	struct afd_shard_params p;
	struct afd__ffn_shard s = { 0, 1, 0, 1 };
	uint32_t i;
	int rc = afd__model_check(model);

	if (!rc)
		rc = afd__params_copy(&p, sizeof(p), params, "shard params");
	if (!rc)
		rc = afd__model_check_role(model, p.role);
	if (!rc && (p.gate < 0 || p.gate > AFD_GATE_FFN))
		rc = afd__error(-EINVAL, "shard params: gate is %d, limit %d", p.gate,
				AFD_GATE_FFN);
	if (!rc && (p.first_layer > model->arch.n_layers ||
		    p.n_layers > model->arch.n_layers - p.first_layer))
		rc = afd__error(-EINVAL, "shard params: %u layers from %u on, the model has %u",
				p.n_layers, p.first_layer, model->arch.n_layers);
	if (!rc)
		rc = afd__shard_read(&s, &p.shard, p.role, &model->arch, "shard params");
	for (i = 0; !rc && i < model->n_slots; i++) {
		const struct afd__slot *slot = &model->slots[i];

		if (has_slot(slot, &p) && in_layers(slot, &p) && !afd__slot_is_shared(model, slot))
			rc = add_slot(&sum, model, slot, &p, s);
	}
	return rc ? rc : afd__params_give(info, &sum, sizeof(sum), "role info");
}
