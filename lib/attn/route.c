/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Routing on the attention side: the device chooses experts for the rows of a lane behind its
 * attention, the choice comes to the host, and each target gets the rows that it has an expert of.
 *
 * Invariant: the router reads x as it will have crossed the wire, with the operations of an FFN
 * stage, so the choice has the same bits on either side. A target that a row does not go to would
 * have returned +0.0 for it, which changes no sum that begins with +0.0. Called by step (enqueue,
 * plan) and remote (what goes where).
 */
#include <assert.h>
#include <string.h>

#include "../ffn/choice.h"
#include "attn.h"

bool afd__attn_routes(const struct afd_attn *attn, uint32_t layer)
{
	return attn->net && !attn->ffn && afd__exchange_routed(attn->net, layer);
}

/* ---- life ---- */

/* Ids and weights of another count than the contract's would not fit the slots. */
static int check_layer(
	const struct afd_attn *attn, uint32_t layer, const struct afd_contract *contract)
{
	const struct afd__layer *l = &attn->arch->layers[layer];
	bool routed = afd__attn_routes(attn, layer);

	if (routed != (l->ffn_kind == AFD_FFN_MOE))
		return afd__error(-EINVAL, "attn: layer %u %s experts in the transport, %s in the model",
			layer, routed ? "has" : "has no", routed ? "none" : "some");
	if (!routed)
		return 0;
	if (l->n_experts != contract->n_experts || l->top_k != contract->top_k)
		return afd__error(-EINVAL,
			"attn: the transport has the %u best of %u experts, layer %u of the model "
			"%u of %u",
			contract->top_k, contract->n_experts, layer, l->top_k, l->n_experts);
	if (!l->shared_size != !contract->shared_experts)
		return afd__error(-EINVAL, "attn: the transport has %s shared experts, the model %s",
			contract->shared_experts ? "some" : "no", l->shared_size ? "some" : "none");
	return 0;
}

int afd__attn_route_check(struct afd_attn *attn, const struct afd__exchange_info *info)
{
	uint32_t i;
	int rc = 0;

	attn->route.n_targets = info->n_targets;
	if (info->gate != AFD_GATE_ATTENTION || attn->ffn)
		return 0;
	for (i = 0; !rc && i < attn->arch->n_layers; i++) {
		rc = check_layer(attn, i, &info->contract);
		if (!rc && afd__attn_routes(attn, i)) {
			attn->route.top_k = info->contract.top_k;
			attn->route.n_experts = info->contract.n_experts;
		}
	}
	return rc;
}

int afd__attn_route_create(struct afd_attn *attn)
{
	struct afd__attn_route *r = &attn->route;
	size_t rows = attn->params.max_rows;

	if (!r->top_k)
		return 0;
	r->ids = afd__alloc(attn->ctx, rows * r->top_k, sizeof(*r->ids));
	r->weights = afd__alloc(attn->ctx, rows * r->top_k, sizeof(*r->weights));
	r->lists = afd__alloc(attn->ctx, rows * r->n_targets, sizeof(*r->lists));
	return r->ids && r->weights && r->lists ? 0 : -ENOMEM;
}

void afd__attn_route_destroy(struct afd_attn *attn)
{
	afd__free(attn->route.ids);
	afd__free(attn->route.weights);
	afd__free(attn->route.lists);
	memset(&attn->route, 0, sizeof(attn->route));
}

/* ---- the choice ---- */

static int choose(struct afd_attn *attn, const struct afd__lane *lane)
{
	const struct afd__attn_layer *layer = &attn->weights.layers[lane->layer];
	const struct afd__choice choice = {
		.arch = layer->arch,
		.router = layer->router,
		.bias = layer->router_bias,
		.x = afd__attn_rows(attn, attn->memory.x, lane->own_row0),
		.logits = attn->memory.router_logits,
		.ids = attn->memory.expert_ids,
		.weights = attn->memory.expert_weights,
		.n_rows = lane->n_own_rows,
	};

	return afd__choose_experts(&attn->queue, &choice);
}

int afd__attn_enqueue_choice(struct afd_attn *attn, const struct afd__lane *lane)
{
	int rc = afd__attn_round_rows(attn, lane);

	return rc ? rc : choose(attn, lane);
}

int afd__attn_enqueue_choice_down(struct afd_attn *attn, const struct afd__lane *lane)
{
	struct afd__attn_route *r = &attn->route;
	size_t at = (size_t)lane->own_row0 * r->top_k;
	size_t bytes = (size_t)lane->n_own_rows * r->top_k * sizeof(*r->ids);
	int rc = afd__queue_download(
		&attn->queue, r->ids + at, attn->memory.expert_ids, bytes);

	return rc ? rc
		  : afd__queue_download(&attn->queue, r->weights + at, attn->memory.expert_weights,
			    bytes);
}

/* ---- who gets what ---- */

static int32_t *lists_of(const struct afd_attn *attn, int32_t *lists, const struct afd__lane *lane)
{
	return lists + (size_t)lane->own_row0 * attn->route.n_targets;
}

int afd__attn_route_plan(struct afd_attn *attn, uint32_t index)
{
	struct afd__attn_route *r = &attn->route;
	const struct afd__lane *lane = &attn->step.lanes[index];
	const int32_t *ids = r->ids + (size_t)lane->own_row0 * r->top_k;
	int32_t *list = lists_of(attn, r->lists, lane);
	uint32_t target, row, n = 0;
	bool partial = false;

	for (target = 0; target < r->n_targets; target++) {
		struct afd__attn_share *share = &r->shares[index][target];

		share->first = n;
		for (row = 0; row < lane->n_own_rows; row++) {
			if (afd__exchange_wants(attn->net, target, lane->layer,
				    ids + (size_t)row * r->top_k))
				list[n++] = (int32_t)row;
		}
		share->n_rows = n - share->first;
		partial |= share->n_rows < lane->n_own_rows;
	}
	if (!partial)
		return 0;
	return afd__queue_upload(&attn->queue, lists_of(attn, attn->memory.row_lists, lane), list,
		n * sizeof(*list));
}

uint32_t afd__attn_route_rows(const struct afd_attn *attn, uint32_t index, uint32_t target)
{
	const struct afd__lane *lane = &attn->step.lanes[index];

	return afd__attn_routes(attn, lane->layer) ? attn->route.shares[index][target].n_rows
						   : lane->n_own_rows;
}

const int32_t *afd__attn_route_list(const struct afd_attn *attn, uint32_t index, uint32_t target)
{
	const struct afd__lane *lane = &attn->step.lanes[index];

	if (afd__attn_route_rows(attn, index, target) == lane->n_own_rows)
		return NULL;
	return lists_of(attn, attn->memory.row_lists, lane) +
	       attn->route.shares[index][target].first;
}

void afd__attn_route_fill(const struct afd_attn *attn, uint32_t index, uint32_t target,
	uint32_t row0, uint32_t n_rows, const struct afd__slot_rows *slot)
{
	const struct afd__attn_route *r = &attn->route;
	const struct afd__lane *lane = &attn->step.lanes[index];
	const int32_t *list = lists_of(attn, r->lists, lane) + r->shares[index][target].first + row0;
	size_t bytes = r->top_k * sizeof(*r->ids);
	uint32_t i;

	for (i = 0; i < n_rows; i++) {
		size_t from = ((size_t)lane->own_row0 + (uint32_t)list[i]) * r->top_k;

		memcpy(slot->ids + (size_t)i * r->top_k, r->ids + from, bytes);
		memcpy(slot->weights + (size_t)i * r->top_k, r->weights + from, bytes);
	}
}
