/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The math of a dense layer: y = down(silu(gate x) * up x), as three operations behind each other
 * on a queue. Nothing here waits, and nothing here depends on which rows share the call. Called by
 * pass.c (parts of peers), forward.c (a host's rows) and by a local attention stage through
 * afd__ffn_enqueue.
 */
#include "stage.h"

#include <assert.h>

/* gate_up [n_rows][2 * width]: gate, then up, as the activation wants them. */
static int enqueue_gate_up(struct afd_ffn *ffn, struct afd__queue *q,
	const struct afd__ffn_layer *layer, uint32_t n_rows, const float *x)
{
	struct afd__product_args product = {
		.x = x,
		.x_stride = ffn->hidden,
		.w = layer->gate,
		.y = ffn->gate_up,
		.y_stride = 2 * (size_t)layer->width,
		.n_rows = n_rows,
	};
	int rc = afd__product(q, &product);

	if (rc || !layer->up.data)
		return rc;
	product.w = layer->up;
	product.y = ffn->gate_up + layer->width;
	return afd__product(q, &product);
}

int afd__ffn_dense(struct afd_ffn *ffn, struct afd__queue *q, uint32_t layer, uint32_t n_rows,
	const float *x, float *y)
{
	const struct afd__ffn_layer *weights = &ffn->weights.layers[layer - ffn->first_layer];
	struct afd__activation_args activation = {
		.gate_up = ffn->gate_up,
		.out = ffn->activated,
		.n_rows = n_rows,
		.width = weights->width,
	};
	struct afd__product_args down = {
		.x = ffn->activated,
		.x_stride = weights->width,
		.w = weights->down,
		.y = y,
		.y_stride = ffn->hidden,
		.n_rows = n_rows,
	};
	int rc;

	assert(afd__ffn_holds(ffn, layer) && n_rows <= ffn->max_rows);
	rc = enqueue_gate_up(ffn, q, weights, n_rows, x);
	if (!rc)
		rc = afd__activation(q, &activation);
	if (!rc)
		rc = afd__product(q, &down);
	return rc;
}

int afd__ffn_enqueue(afd_ffn *ffn, struct afd__queue *q, int32_t layer, uint32_t n_rows,
	const float *x, float *y)
{
	uint64_t started_ns = afd__now_ns();
	uint32_t row0, n;
	int rc = 0;

	if (!afd__ffn_holds(ffn, layer))
		return afd__error(-EINVAL, "ffn: layer %d is not held, it holds %u .. %u", layer,
			ffn->first_layer, ffn->first_layer + ffn->n_layers - 1);
	for (row0 = 0; row0 < n_rows && !rc; row0 += n) {
		n = n_rows - row0 < ffn->max_rows ? n_rows - row0 : ffn->max_rows;
		rc = afd__ffn_dense(ffn, q, (uint32_t)layer, n, x + (size_t)row0 * ffn->hidden,
			y + (size_t)row0 * ffn->hidden);
		if (!rc)
			afd__ffn_count_pass(ffn, n, q->fd < 0 ? afd__now_ns() - started_ns : 0);
		started_ns = afd__now_ns();
	}
	return rc;
}
