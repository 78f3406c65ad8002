/* SPDX-License-Identifier: Apache-2.0 */
/* The products of a layer: qkv, output, gate and up, down; packed, at 1 to 128 rows. */
#include <stdio.h>

#include "../../kernels/cpu/kernels.h"
#include "ops.h"

#define N_SHAPES 4

struct run {
	struct bench_ops *o;
	struct afd__product_args args;
};

static int run_product(void *arg)
{
	struct run *r = arg;
	int rc;

	bench_take_cold(r->o, &r->args.w);
	rc = afd__product(&r->o->queue, &r->args);
	return rc ? rc : bench_finish(r->o);
}

static int measure_cell(struct bench_ops *o, struct run *r, const char *model, const char *name)
{
	const struct afd__product_args *a = &r->args;
	struct bench_work work = { .dram_bytes = (double)a->w.bytes + (double)a->w.scales_bytes,
		.flops = 2.0 * a->n_rows * a->w.n * a->w.k };
	char shape[64];

	snprintf(shape, sizeof shape, "%s %s", model, name);
	return bench_measure(o->b, o->seconds,
		json_pack("{s:s, s:s, s:I, s:s, s:I, s:I, s:s}", "op", "product", "shape", shape,
			"rows", (json_int_t)a->n_rows, "dtype", afd_dtype_name(a->w.dtype), "n",
			(json_int_t)a->w.n, "k", (json_int_t)a->w.k, "layout", "packed"),
		&work, run_product, r);
}

/* x [n_rows][k] and y [n_rows][n], which stay warm as they do in a step. */
static int make_rows(struct bench_ops *o, struct afd__product_args *a, uint32_t n_rows)
{
	void *x, *y;
	int rc = bench_upload_numbers(o, "product", (size_t)n_rows * a->w.k, &x);

	if (!rc)
		rc = bench_upload(o, (size_t)n_rows * a->w.n * sizeof(float), NULL, &y);
	if (rc)
		return rc;
	a->x = x;
	a->y = y;
	return 0;
}

/* One matrix at all numbers of rows. */
static int measure_matrix(
	struct bench_ops *o, const char *model, const char *name, uint32_t n, uint32_t k)
{
	const struct bench_list rows = bench_rows_of(o, &bench_product);
	struct run r = { .o = o, .args = { .x_stride = k, .y_stride = n } };
	int status = TOOL_DONE;

	r.args.w = bench_packed(o, n, k);
	/* As in a stage that quantises, so that a library may take them. */
	r.args.quantized = r.args.w.whole_blocks = o->dtype == AFD_DTYPE_FP8;
	if (r.args.w.bytes + r.args.w.scales_bytes > o->cold_bytes)
		return tool_fail(TOOL_FAILED,
			"product: %zu bytes of weights, limit %zu: see --cold-gib",
			r.args.w.bytes + r.args.w.scales_bytes, o->cold_bytes);
	if (make_rows(o, &r.args, bench_list_max(&rows)))
		return bench_fail();
	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		r.args.n_rows = rows.at[i];
		status = measure_cell(o, &r, model, name);
	}
	return status;
}

int bench_measure_matrices(struct bench_ops *o, const struct bench_matrices *matrices)
{
	int status = TOOL_DONE;

	for (uint32_t i = 0; i < matrices->n && status == TOOL_DONE; i++) {
		char name[32];

		snprintf(name, sizeof name, "%ux%u", matrices->at[i].n, matrices->at[i].k);
		status = measure_matrix(o, "matrix", name, matrices->at[i].n, matrices->at[i].k);
		bench_free_uploads(o);
	}
	return status;
}

static int measure(struct bench_ops *o, const struct bench_model *m)
{
	const struct {
		const char *name;
		uint32_t n, k;
	} shapes[N_SHAPES] = {
		{ "qkv", (m->n_heads + 2 * m->n_kv_heads) * m->head_dim, m->hidden },
		{ "output", m->hidden, m->n_heads * m->head_dim },
		{ "gate_up", 2 * m->intermediate, m->hidden },
		{ "down", m->hidden, m->intermediate },
	};
	int status = TOOL_DONE;

	for (int i = 0; i < N_SHAPES && status == TOOL_DONE; i++) {
		status = measure_matrix(o, m->name, shapes[i].name, shapes[i].n, shapes[i].k);
		bench_free_uploads(o);
	}
	return status;
}

const struct bench_op bench_product = { "product", N_SHAPES, { 1, 2, 4, 8, 16, 32, 64, 128 }, 0,
	measure };
