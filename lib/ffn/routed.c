/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The math of a layer with experts: y = shared(x) + the sum over the row's experts, in the order of
 * its slots, of weight * expert(x), from +0.0 on. A shard adds what it holds and leaves out the
 * rest, so that a row with nothing here is +0.0 exactly.
 *
 * Ids and weights are the peer's, or are found here; both have the same bits, since the router
 * reads x as it crossed the wire, by the same operations (choice.c). Called by layer.c.
 */
#include "choice.h"
#include "stage.h"

static int choose(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_call *call)
{
	const struct afd__ffn_layer *layer = &ffn->weights.layers[call->layer - ffn->first_layer];
	const struct afd__choice choice = {
		.arch = layer->arch,
		.router = layer->router,
		.bias = layer->router_bias,
		.x = call->x,
		.logits = ffn->logits,
		.ids = ffn->ids,
		.weights = ffn->expert_weights,
		.n_rows = call->n_rows,
	};

	return afd__choose_experts(q, &choice);
}

static int enqueue_experts(struct afd_ffn *ffn, struct afd__queue *q,
	const struct afd__ffn_layer *layer, const struct afd__ffn_call *call)
{
	struct afd__experts_args experts = {
		.x = call->x,
		.ids = call->ids,
		.weights = call->weights,
		.y = call->y,
		.scratch = ffn->scratch,
		.scratch_bytes = ffn->scratch_bytes,
		.n_rows = call->n_rows,
		.top_k = layer->arch->top_k,
		.accumulate = layer->mlp.width != 0,
		.width_offset = layer->width_offset,
	};
	uint32_t i;
	int rc = 0;

	for (i = 0; i < layer->n_stacks && !rc; i++) {
		const struct afd__ffn_experts *stack = &layer->stacks[i];

		experts.gate_up = stack->gate_up;
		experts.down = stack->down;
		experts.first_expert = (int32_t)stack->first;
		experts.quantize = ffn->quantizes && stack->down.dtype == AFD_DTYPE_FP8;
		rc = afd__experts(q, &experts);
		experts.accumulate = 1;
	}
	return rc;
}

/* y is written before x was read for the last time. */
static bool overlaps(const struct afd__ffn_layer *layer, const struct afd__ffn_call *call)
{
	return call->x == call->y && (layer->mlp.width || layer->n_stacks > 1);
}

int afd__ffn_routed(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_call *call)
{
	const struct afd__ffn_layer *layer = &ffn->weights.layers[call->layer - ffn->first_layer];
	struct afd__ffn_call c = *call;
	struct afd__copy_args copy = {
		.dst = ffn->x,
		.src = call->x,
		.bytes = (size_t)call->n_rows * ffn->hidden * sizeof(float),
	};
	int rc = 0;

	if (!c.ids) {
		rc = choose(ffn, q, call);
		c.ids = ffn->ids;
		c.weights = ffn->expert_weights;
	}
	if (!rc && overlaps(layer, call)) {
		rc = afd__copy(q, &copy);
		c.x = ffn->x;
	}
	if (!rc && layer->mlp.width)
		rc = afd__ffn_mlp(ffn, q, &layer->mlp, &c);
	return rc ? rc : enqueue_experts(ffn, q, layer, &c);
}
