/* SPDX-License-Identifier: Apache-2.0 */
/* The products of a layer: qkv, output, gate and up, down; packed, at 1 to 128 rows. */
#include <stdio.h>
#include <stdlib.h>

#include "../../kernels/cpu/kernels.h"
#include "ops.h"

#define ROWS_MAX 128

static const uint32_t all_rows[] = { 1, 2, 4, 8, 16, 32, 64, ROWS_MAX };
#define N_ROWS   (sizeof all_rows / sizeof all_rows[0])
#define N_SHAPES 4

struct run {
	struct bench_ops *o;
	struct afd__product_args args;
};

static int run_product(void *arg)
{
	struct run *r = arg;
	int rc;

	r->args.w.data = bench_cold(r->o, r->args.w.bytes);
	/* One scale for 32 rows and 128 columns: they are 1/1024 of what is read. */
	if (r->args.w.dtype == AFD_DTYPE_FP8)
		r->args.w.scales = (float *)bench_cold(r->o, r->args.w.scales_bytes);
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

/* x [ROWS_MAX][k] and y [ROWS_MAX][n], which stay warm as they do in a step. */
static int make_rows(struct bench_ops *o, struct afd__product_args *a)
{
	size_t n_floats = (size_t)ROWS_MAX * a->w.k;
	float *host = malloc(n_floats * sizeof *host);
	void *x, *y;
	int rc;

	if (!host)
		return afd__error(-ENOMEM, "product: no memory for %zu numbers", n_floats);
	for (size_t i = 0; i < n_floats; i++)
		host[i] = (float)(i % 31) / 32 - 0.45f;
	rc = bench_upload(o, n_floats * sizeof *host, host, &x);
	if (!rc)
		rc = bench_upload(o, (size_t)ROWS_MAX * a->w.n * sizeof(float), NULL, &y);
	free(host);
	if (rc)
		return rc;
	a->x = x;
	a->y = y;
	return 0;
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
		struct run r = { .o = o,
			.args = { .x_stride = shapes[i].k, .y_stride = shapes[i].n } };

		r.args.w = (struct afd__matrix){ .n = shapes[i].n,
			.k = shapes[i].k,
			.dtype = o->dtype,
			.layout = AFD__LAYOUT_PACKED,
			.bytes = o->dev->ops->matrix_bytes(
				o->dev, shapes[i].n, shapes[i].k, o->dtype) };
		if (o->dtype == AFD_DTYPE_FP8)
			r.args.w.scales_bytes =
				afd__matrix_shape_bytes(o->dev,
					&(struct afd__matrix_shape){ .n = shapes[i].n,
						.k = shapes[i].k,
						.dtype = o->dtype }) -
				r.args.w.bytes;
		if (make_rows(o, &r.args))
			return tool_fail(TOOL_FAILED, "%s", afd_last_error());
		for (size_t j = 0; j < N_ROWS && status == TOOL_DONE; j++) {
			r.args.n_rows = all_rows[j];
			status = measure_cell(o, &r, m->name, shapes[i].name);
		}
	}
	return status;
}

const struct bench_op bench_product = { "product", N_SHAPES * N_ROWS, 0, measure };
