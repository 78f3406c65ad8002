/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The math of a layer, whatever its kind: operations behind each other on a queue. Nothing here
 * waits, and nothing here depends on which rows share the call. Called by pass.c (parts of peers),
 * forward.c (a host's rows) and by a local attention stage through afd__ffn_enqueue.
 */
#include "stage.h"

#include <assert.h>

int afd__ffn_layer(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_call *call)
{
	const struct afd__ffn_layer *layer = &ffn->weights.layers[call->layer - ffn->first_layer];

	assert(afd__ffn_holds(ffn, call->layer) && call->n_rows <= ffn->max_rows);
	if (layer->arch->ffn_kind == AFD_FFN_MOE)
		return afd__ffn_routed(ffn, q, call);
	return afd__ffn_mlp(ffn, q, &layer->mlp, call);
}

struct afd__inputs afd__ffn_inputs(const afd_ffn *ffn, int32_t layer)
{
	const struct afd__ffn_layer *l;

	if (!afd__ffn_holds(ffn, layer) || !ffn->weights.layers)
		return (struct afd__inputs){ 0 };
	l = &ffn->weights.layers[(uint32_t)layer - ffn->first_layer];
	if (l->arch->ffn_kind == AFD_FFN_MOE || l->mlp.up.data)
		return (struct afd__inputs){ 0 };
	return afd__matrix_inputs(ffn->device, &l->mlp.gate, ffn->quantizes);
}

int afd__ffn_enqueue(afd_ffn *ffn, struct afd__queue *q, int32_t layer, uint32_t n_rows,
	const float *x, const void *inputs, float *y)
{
	size_t input_bytes = inputs ? afd__ffn_inputs(ffn, layer).row_bytes : 0;
	uint64_t started_ns = afd__now_ns();
	uint32_t row0;
	int rc = 0;

	if (!afd__ffn_holds(ffn, layer))
		return afd__error(-EINVAL, "ffn: layer %d is not held, it holds %u .. %u", layer,
			ffn->first_layer, ffn->first_layer + ffn->n_layers - 1);
	for (row0 = 0; row0 < n_rows && !rc;) {
		uint32_t left = n_rows - row0;
		struct afd__ffn_call call = {
			.layer = (uint32_t)layer,
			.n_rows = left < ffn->max_rows ? left : ffn->max_rows,
			.x = x + (size_t)row0 * ffn->hidden,
			.inputs = inputs ? (const char *)inputs + row0 * input_bytes : NULL,
			.y = y + (size_t)row0 * ffn->hidden,
		};

		rc = afd__ffn_layer(ffn, q, &call);
		if (!rc)
			afd__ffn_count_pass(ffn, call.layer, call.n_rows,
				q->fd < 0 ? afd__now_ns() - started_ns : 0);
		started_ns = afd__now_ns();
		row0 += call.n_rows;
	}
	return rc;
}

void afd__ffn_count_replayed(afd_ffn *ffn, uint32_t n_rows)
{
	uint32_t i, row0, n;

	for (i = 0; i < ffn->n_layers; i++) {
		for (row0 = 0; row0 < n_rows; row0 += n) {
			n = n_rows - row0 < ffn->max_rows ? n_rows - row0 : ffn->max_rows;
			afd__ffn_count_pass(ffn, ffn->first_layer + i, n, 0);
		}
	}
}
