/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A SwiGLU with both its products, in as few launches as there can be: where gate and up are one
 * slice (tile.h) and down is bf16, the first product ends in the inputs of the second; else those are
 * made of gate and up. Weights that tensor cores do not take go through the operations one by one.
 *
 * Invariant: which way is decided by the matrices and the GPU, so a row's bits depend on no other.
 */
#include "tile.h"

int afd_gpu_mlp_down(const struct afd_gpu *gpu, const struct afd__mlp_args *a)
{
	struct afd__product_args down = { .x = a->activated, .inputs = NULL, .w = a->down,
		.bias = NULL, .y = a->y, .x_stride = a->down.k, .y_stride = a->down.n,
		.n_rows = a->n_rows, .quantized = a->quantize };
	struct afd__activation_args activation = {
		.gate_up = a->gate_up_rows, .out = a->activated, .n_rows = a->n_rows, .width = a->down.k
	};
	struct afd__quantize_args quantize = { .x = a->activated, .n_rows = a->n_rows,
		.width = a->down.k, .column_offset = a->down.column_offset };
	int rc = afd_gpu_activation(gpu, &activation);

	if (!rc && a->quantize)
		rc = afd_gpu_quantize(gpu, &quantize);
	return rc ? rc : afd_gpu_product(gpu, &down);
}

static int run_one_by_one(const struct afd_gpu *gpu, const struct afd__mlp_args *a)
{
	struct afd__product_args up = { .x = a->x, .inputs = a->inputs, .w = a->gate_up, .bias = NULL,
		.y = a->gate_up_rows, .x_stride = a->gate_up.k, .y_stride = a->gate_up.n,
		.n_rows = a->n_rows, .quantized = a->quantized };
	int rc = afd_gpu_product(gpu, &up);

	return rc ? rc : afd_gpu_mlp_down(gpu, a);
}

/* One product's work over the rows of a pass, with inputs and parts where the caller says. */
static struct tile_work work_of(const struct afd_gpu *gpu, const struct afd__matrix *w, float *y)
{
	struct tile_work t = {};

	t.p = product_of(w);
	t.p.y = y;
	t.p.y_stride = w->n;
	t.x = tile_shape(w);
	t.lead = w->column_offset % TILE_K;
	t.n_slices = tile_slices(gpu, &t.p, t.x.row_numbers);
	return t;
}

static size_t parts_bytes(const struct tile_work *t, uint32_t n_rows)
{
	return t->n_slices > 1 ? (size_t)n_rows * t->n_slices * t->p.n * sizeof(float) : 0;
}

static void use_memory(struct tile_work *t, void *inputs, void *parts, uint32_t n_rows)
{
	t->p.n_rows = n_rows;
	t->rows = tile_rows(n_rows);
	t->x = tile_x_at(t->x, inputs);
	t->parts = (float *)parts;
}

/* The inputs of the first product, of the second, then the parts of either. */
static int run_pass(const struct afd_gpu *gpu, const struct afd__mlp_args *a, struct tile_work up,
	struct tile_work down, uint32_t n_rows)
{
	char *memory = (char *)gpu->workspace, *activated = memory + n_rows * up.x.row_bytes,
	     *parts = activated + n_rows * down.x.row_bytes;
	tile_source x = { a->x, NULL, a->gate_up.k, n_rows, NULL, 0 };
	tile_source from = { up.p.y, up.p.y + a->down.k, a->gate_up.n, n_rows, NULL, a->quantize };
	int rc;

	use_memory(&up, a->inputs ? (void *)a->inputs : memory, parts, n_rows);
	use_memory(&down, activated, parts, n_rows);
	if (up.n_slices == 1 && !a->quantize && a->down.dtype == AFD_DTYPE_BF16) {
		up.half = a->down.k;
		up.activated = down.x;
		up.activated_lead = down.lead;
	}
	rc = a->inputs ? 0 : tile_inputs(gpu, &a->gate_up, &x, &up.x);
	if (!rc)
		rc = tile_product(gpu, &up);
	if (!rc && !up.half)
		rc = tile_inputs(gpu, &a->down, &from, &down.x);
	return rc ? rc : tile_product(gpu, &down);
}

static uint32_t rows_of_pass(const struct afd_gpu *gpu, const struct tile_work *up,
	const struct tile_work *down, uint32_t n_rows)
{
	size_t parts = parts_bytes(up, 1) > parts_bytes(down, 1) ? parts_bytes(up, 1)
								 : parts_bytes(down, 1);
	size_t most = gpu->workspace_bytes /
		      (up->x.row_bytes + down->x.row_bytes + parts);

	return most > n_rows ? n_rows : most > 65535 ? 65535 : (uint32_t)most;
}

int afd_gpu_mlp(const struct afd_gpu *gpu, const struct afd__mlp_args *a)
{
	struct tile_work up = work_of(gpu, &a->gate_up, a->gate_up_rows),
			 down = work_of(gpu, &a->down, a->y);
	struct afd__mlp_args part = *a;
	uint32_t pass = rows_of_pass(gpu, &up, &down, a->n_rows);
	int rc = 0;

	if (!tile_fits(&a->gate_up) || !tile_fits(&a->down) || !pass ||
		(a->quantize && a->down.dtype != AFD_DTYPE_FP8))
		return run_one_by_one(gpu, a);
	for (uint32_t left = a->n_rows, n; !rc && left; left -= n) {
		n = least(left, pass);
		rc = run_pass(gpu, &part, up, down, n);
		if (part.inputs)
			part.inputs = (const char *)part.inputs + n * up.x.row_bytes;
		else
			part.x += (size_t)n * a->gate_up.k;
		down.p.y += (size_t)n * a->down.n;
	}
	return rc;
}
