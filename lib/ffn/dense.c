/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A SwiGLU: y = down(silu(gate x) * up x), one operation on a queue, or several where gate and up are
 * two matrices. Of a shard the width is a part, and y a partial result. Nothing here waits, and nothing here depends
 * on which rows share the call. Called by layer.c for dense layers and by routed.c for shared
 * experts.
 */
#include "stage.h"

static bool quantizes(const struct afd_ffn *ffn, const struct afd__matrix *w)
{
	return ffn->quantizes && w->dtype == AFD_DTYPE_FP8;
}

/* What enters a product with w: x, or what it is in e4m3, when the host asked for that and w is. */
static const float *input_of(const struct afd_ffn *ffn, const struct afd__matrix *w, const float *x)
{
	return quantizes(ffn, w) ? ffn->quantized : x;
}

static int enqueue_quantized(
	struct afd_ffn *ffn, struct afd__queue *q, uint32_t n_rows, const float *x)
{
	struct afd__copy_args copy = {
		.dst = ffn->quantized,
		.src = x,
		.bytes = (size_t)n_rows * ffn->hidden * sizeof(float),
	};
	struct afd__quantize_args quantize = {
		.x = ffn->quantized,
		.n_rows = n_rows,
		.width = ffn->hidden,
	};
	int rc = afd__copy(q, &copy);

	return rc ? rc : afd__quantize(q, &quantize);
}

/* x as the product with gate wants it, and up where that is another matrix. */
static int enqueue_input(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_mlp *mlp,
	const struct afd__ffn_call *call)
{
	if (call->inputs || (input_of(ffn, &mlp->gate, call->x) == call->x &&
				    (!mlp->up.data || input_of(ffn, &mlp->up, call->x) == call->x)))
		return 0;
	return enqueue_quantized(ffn, q, call->n_rows, call->x);
}

/* Gate and up lie in one matrix: one operation. */
static int enqueue_whole(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_mlp *mlp,
	const struct afd__ffn_call *call)
{
	const struct afd__mlp_args args = {
		.x = input_of(ffn, &mlp->gate, call->x),
		.inputs = call->inputs,
		.gate_up = mlp->gate,
		.down = mlp->down,
		.y = call->y,
		.gate_up_rows = ffn->gate_up,
		.activated = ffn->activated,
		.n_rows = call->n_rows,
		.quantize = quantizes(ffn, &mlp->down),
		.quantized = quantizes(ffn, &mlp->gate),
	};

	return afd__mlp(q, &args);
}

/* gate_up [n_rows][2 * width]: gate, then up, as the activation wants them. */
static int enqueue_gate_up(struct afd_ffn *ffn, struct afd__queue *q,
	const struct afd__ffn_mlp *mlp, uint32_t n_rows, const float *x)
{
	struct afd__product_args product = {
		.x = input_of(ffn, &mlp->gate, x),
		.x_stride = ffn->hidden,
		.w = mlp->gate,
		.y = ffn->gate_up,
		.y_stride = 2 * (size_t)mlp->width,
		.n_rows = n_rows,
		.quantized = quantizes(ffn, &mlp->gate),
	};
	int rc = afd__product(q, &product);

	if (rc)
		return rc;
	product.x = input_of(ffn, &mlp->up, x);
	product.quantized = quantizes(ffn, &mlp->up);
	product.w = mlp->up;
	product.y = ffn->gate_up + mlp->width;
	return afd__product(q, &product);
}

static int enqueue_activation(
	struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_mlp *mlp, uint32_t n_rows)
{
	struct afd__activation_args activation = {
		.gate_up = ffn->gate_up,
		.out = ffn->activated,
		.n_rows = n_rows,
		.width = mlp->width,
	};
	struct afd__quantize_args quantize = {
		.x = ffn->activated,
		.n_rows = n_rows,
		.width = mlp->width,
		.column_offset = mlp->width_offset,
	};
	int rc = afd__activation(q, &activation);

	if (!rc && quantizes(ffn, &mlp->down))
		rc = afd__quantize(q, &quantize);
	return rc;
}

int afd__ffn_mlp(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_mlp *mlp,
	const struct afd__ffn_call *call)
{
	struct afd__product_args down = {
		.x = ffn->activated,
		.x_stride = mlp->width,
		.w = mlp->down,
		.y = call->y,
		.y_stride = ffn->hidden,
		.n_rows = call->n_rows,
		.quantized = quantizes(ffn, &mlp->down),
	};
	int rc = enqueue_input(ffn, q, mlp, call);

	if (!rc && !mlp->up.data)
		return enqueue_whole(ffn, q, mlp, call);
	if (!rc)
		rc = enqueue_gate_up(ffn, q, mlp, call->n_rows, call->x);
	if (!rc)
		rc = enqueue_activation(ffn, q, mlp, call->n_rows);
	return rc ? rc : afd__product(q, &down);
}
