/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as config.json: refused with a text, or an architecture whose every size is inside its
 * limit and whose rotation is finite. Built for libFuzzer, or with replay.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/model/config.h"
#include "../../lib/model/model.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check_attention(const struct afd__layer *l)
{
	if (!l->n_kv_heads || l->n_heads % l->n_kv_heads || l->n_heads > AFD__MAX_HEADS)
		abort();
	if (l->head_dim < 2 || l->head_dim % 2 || l->head_dim > AFD__MAX_HEAD_DIM)
		abort();
	if ((l->window != 0) != (l->attention == AFD__ATTENTION_SLIDING))
		abort();
}

static void check_router(const struct afd__layer *l)
{
	const struct afd__router *r = &l->router;

	if (l->n_experts > AFD__MAX_EXPERTS || !l->top_k || l->top_k > l->n_experts || l->top_k > AFD__MAX_TOP_K)
		abort();
	if (!l->expert_size || l->expert_size > AFD__MAX_INTERMEDIATE || l->shared_size > AFD__MAX_INTERMEDIATE)
		abort();
	if (!r->n_groups || !r->top_groups || r->top_groups > r->n_groups || l->n_experts % r->n_groups)
		abort();
	if (l->n_experts / r->n_groups * r->top_groups < l->top_k)
		abort();
	if (r->score != AFD_ROUTER_SOFTMAX && r->score != AFD_ROUTER_SIGMOID)
		abort();
	if (!(r->scale > 0) || !isfinite(r->scale))
		abort();
}

static void check_layer(const struct afd__layer *l, bool ffn_only)
{
	if (!ffn_only)
		check_attention(l);
	if (l->ffn_kind == AFD_FFN_MOE)
		check_router(l);
	else if (!l->intermediate_size || l->intermediate_size > AFD__MAX_INTERMEDIATE || l->n_experts)
		abort();
}

static void check_slots(const struct afd__arch *arch)
{
	struct afd_model model = { .arch = *arch };
	uint32_t i;

	if (!afd__slots_create(&model)) {
		for (i = 0; i < model.n_slots; i++) {
			if (!model.slots[i].shape[0] || strlen(model.slots[i].name) > 60)
				abort();
		}
		if (model.n_listed != model.n_slots)
			abort();
	}
	afd__slots_free(&model);
}

static void check(const struct afd__arch *arch)
{
	uint32_t i;

	if (!arch->n_layers || arch->n_layers > AFD__MAX_LAYERS || arch->hidden_size > AFD__MAX_HIDDEN || !arch->hidden_size)
		abort();
	for (i = 0; i < arch->n_layers; i++)
		check_layer(&arch->layers[i], arch->ffn_only);
	check_slots(arch);
	if (arch->ffn_only)
		return;
	for (i = 0; i < arch->rope.head_dim / 2; i++) {
		if (!isfinite(arch->rope.inv_freq[i]))
			abort();
	}
	if (!(arch->rope.scale > 0) || !isfinite(arch->rope.scale) || !(arch->rms_norm_eps > 0) || !(arch->embedding_scale >= 1))
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	struct afd__arch arch;

	if (!afd__arch_read(&arch, NULL, (const char *)data, n_bytes)) {
		check(&arch);
		afd__arch_free(&arch);
	} else if (!afd_last_error()[0]) {
		abort();
	}
	return 0;
}
