/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations between the products: attend over a paged cache, norm, rope and activation. Their
 * rows are cold here, which they are not in a step: the ratio says how far an operation is from
 * being free.
 */
#include <stdio.h>
#include <stdlib.h>

#include "ops.h"

#define PAGE_SIZE 16
#define OWN_ROWS  { 1, 8, 32, 128 }

struct run {
	struct bench_ops *o;
	const struct bench_model *m;
	size_t row_bytes; /* of cold memory */
	int32_t dtype;    /* of what is read most */
	union {
		struct afd__norm_args norm;
		struct afd__rope_args rope;
		struct afd__activation_args activation;
		struct afd__attend_args attend;
	} args;
	const int32_t *sequences; /* dev [2 * n_sequences]: 0 .. n_sequences-1, twice */
	uint32_t n_sequences, next;
};

static int measure_cell(struct run *r, const char *op, uint32_t n_rows,
	const struct bench_work *work, bench_run run)
{
	json_t *what = json_pack("{s:s, s:s, s:I, s:s}", "op", op, "shape", r->m->name, "rows",
		(json_int_t)n_rows, "dtype", afd_dtype_name(r->dtype));

	if (r->n_sequences && what)
		json_object_set_new(what, "context", json_integer(r->o->context));
	return bench_measure(r->o->b, r->o->seconds, what, work, run, r);
}

static size_t divided_up(size_t a, size_t b)
{
	return (a + b - 1) / b;
}

/* n_numbers of 1, 2, 3, .. modulo `modulus`; floats or integers. */
static int upload_count(struct bench_ops *o, uint32_t n, uint32_t modulus, int floats, void **out)
{
	union {
		float f;
		int32_t i;
	} *host = malloc((size_t)n * sizeof *host);
	int rc;

	if (!host)
		return afd__error(-ENOMEM, "bench: no memory for %u numbers", n);
	for (uint32_t i = 0; i < n; i++) {
		if (floats)
			host[i].f = (float)(i % modulus + 1) / (float)modulus;
		else
			host[i].i = (int32_t)(i % modulus);
	}
	rc = bench_upload(o, (size_t)n * sizeof *host, host, out);
	free(host);
	return rc;
}

/* ---- norm ---- */

static int run_norm(void *arg)
{
	struct run *r = arg;
	char *part = bench_cold(r->o, 2 * r->row_bytes * r->args.norm.n_rows);
	int rc;

	r->args.norm.h = (float *)part;
	r->args.norm.out = (float *)(part + r->row_bytes * r->args.norm.n_rows);
	rc = afd__norm(&r->o->queue, &r->args.norm);
	return rc ? rc : bench_finish(r->o);
}

static int measure_norm(struct bench_ops *o, const struct bench_model *m)
{
	const struct bench_list rows = bench_rows_of(o, &bench_norm);
	struct run r = { .o = o,
		.m = m,
		.row_bytes = m->hidden * sizeof(float),
		.dtype = AFD_DTYPE_F32,
		.args.norm = { .width = m->hidden, .eps = 1e-6f } };
	int status = TOOL_DONE;
	void *weight;

	if (upload_count(o, m->hidden, 7, 1, &weight))
		return bench_fail();
	r.args.norm.weight = weight;
	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		struct bench_work work = { .dram_bytes = 2.0 * r.row_bytes * rows.at[i],
			.flops = 4.0 * m->hidden * rows.at[i] };

		r.args.norm.n_rows = rows.at[i];
		status = measure_cell(&r, "norm", rows.at[i], &work, run_norm);
	}
	return status;
}

const struct bench_op bench_norm = { "norm", 1, OWN_ROWS, 0, measure_norm };

/* ---- activation ---- */

static int run_activation(void *arg)
{
	struct run *r = arg;
	char *part = bench_cold(r->o, 3 * r->row_bytes * r->args.activation.n_rows);
	int rc;

	r->args.activation.gate_up = (float *)part;
	r->args.activation.out = (float *)(part + 2 * r->row_bytes * r->args.activation.n_rows);
	rc = afd__activation(&r->o->queue, &r->args.activation);
	return rc ? rc : bench_finish(r->o);
}

static int measure_activation(struct bench_ops *o, const struct bench_model *m)
{
	const struct bench_list rows = bench_rows_of(o, &bench_activation);
	struct run r = { .o = o,
		.m = m,
		.row_bytes = m->intermediate * sizeof(float),
		.dtype = AFD_DTYPE_F32,
		.args.activation = { .width = m->intermediate } };
	int status = TOOL_DONE;

	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		/* About 20 operations for one exponential. */
		struct bench_work work = { .dram_bytes = 3.0 * r.row_bytes * rows.at[i],
			.flops = 24.0 * m->intermediate * rows.at[i] };

		r.args.activation.n_rows = rows.at[i];
		status = measure_cell(&r, "activation", rows.at[i], &work, run_activation);
	}
	return status;
}

const struct bench_op bench_activation = { "activation", 1, OWN_ROWS, 0, measure_activation };

/* ---- the cache: pages [page][K, V][head][position][head_dim] ---- */

static struct afd__kv_view view_of(const struct bench_ops *o, const struct bench_model *m)
{
	size_t position_bytes = m->head_dim * afd_dtype_bytes(o->dtype);
	size_t side_bytes = position_bytes * PAGE_SIZE * m->n_kv_heads;

	return (struct afd__kv_view){ .data = o->cold,
		.page_stride = 2 * side_bytes,
		.v_offset = side_bytes,
		.head_stride = position_bytes * PAGE_SIZE,
		.position_stride = position_bytes,
		.page_size = PAGE_SIZE,
		.n_kv_heads = m->n_kv_heads,
		.head_dim = m->head_dim,
		.dtype = o->dtype,
		.k_scale = 1,
		.v_scale = 1 };
}

/* ---- rope ---- */

static int run_rope(void *arg)
{
	struct run *r = arg;
	int rc;

	r->args.rope.qkv = (float *)bench_cold(r->o, r->row_bytes * r->args.rope.n_rows);
	r->args.rope.kv.data = bench_cold(
		r->o, r->args.rope.kv.page_stride * divided_up(r->args.rope.n_rows, PAGE_SIZE));
	rc = afd__rope(&r->o->queue, &r->args.rope);
	return rc ? rc : bench_finish(r->o);
}

static int measure_rope(struct bench_ops *o, const struct bench_model *m)
{
	const struct bench_list rows = bench_rows_of(o, &bench_rope);
	uint32_t kv_width = m->n_kv_heads * m->head_dim,
		 width = m->n_heads * m->head_dim + 2 * kv_width;
	uint32_t most = bench_list_max(&rows);
	struct run r = { .o = o,
		.m = m,
		.row_bytes = width * sizeof(float),
		.dtype = AFD_DTYPE_F32,
		.args.rope = { .kv = view_of(o, m), .n_heads = m->n_heads, .eps = 1e-6f } };
	void *norm, *angles, *slots;
	int status = TOOL_DONE;

	if (upload_count(o, m->head_dim, 7, 1, &norm) ||
		upload_count(o, most * m->head_dim, 64, 1, &angles) ||
		upload_count(o, most, most, 0, &slots))
		return bench_fail();
	r.args.rope.q_norm = r.args.rope.k_norm = norm;
	r.args.rope.angles = angles;
	r.args.rope.slots = slots;
	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		/* qkv is read, q written, k and v appended. */
		double bytes = r.row_bytes + (width - 2.0 * kv_width) * 4 +
			       2.0 * kv_width * afd_dtype_bytes(o->dtype);
		struct bench_work work = { .dram_bytes = bytes * rows.at[i],
			.flops = 10.0 * (width - kv_width) * rows.at[i] };

		r.args.rope.n_rows = rows.at[i];
		status = measure_cell(&r, "rope", rows.at[i], &work, run_rope);
	}
	return status;
}

const struct bench_op bench_rope = { "rope", 1, OWN_ROWS, 0, measure_rope };

/* ---- attend: every row is a sequence of its own, `context` positions long ---- */

static int run_attend(void *arg)
{
	struct run *r = arg;
	int rc;

	r->args.attend.sequences = r->sequences + r->next;
	r->next = (r->next + r->args.attend.n_rows) % r->n_sequences;
	rc = afd__attend(&r->o->queue, &r->args.attend);
	return rc ? rc : bench_finish(r->o);
}

static int prepare_attend(struct run *r, uint32_t n_pages, uint32_t most)
{
	struct bench_ops *o = r->o;
	const struct bench_model *m = r->m;
	struct afd__attend_args *a = &r->args.attend;
	uint32_t width = m->n_heads * m->head_dim,
		 qkv_width = width + 2 * m->n_kv_heads * m->head_dim;
	static int32_t positions[BENCH_ROWS_MAX];
	void *table, *qkv, *out, *sequences, *where;
	int rc;

	for (uint32_t i = 0; i < most; i++)
		positions[i] = (int32_t)o->context - 1;
	rc = upload_count(o, n_pages, n_pages, 0, &table);
	if (!rc)
		rc = upload_count(o, most * qkv_width, 64, 1, &qkv);
	if (!rc)
		rc = upload_count(o, 2 * (r->n_sequences + most), r->n_sequences, 0, &sequences);
	if (!rc)
		rc = bench_upload(o, most * sizeof positions[0], positions, &where);
	if (!rc)
		rc = bench_upload(o, (size_t)most * width * sizeof(float), NULL, &out);
	if (rc)
		return rc;
	a->page_table = table;
	a->qkv = qkv;
	a->positions = where;
	a->out = out;
	r->sequences = sequences;
	return 0;
}

static int measure_attend(struct bench_ops *o, const struct bench_model *m)
{
	const struct bench_list rows = bench_rows_of(o, &bench_attend);
	struct run r = { .o = o,
		.m = m,
		.dtype = o->dtype,
		.args.attend = { .kv = view_of(o, m), .n_heads = m->n_heads } };
	uint32_t pages_each = (o->context + PAGE_SIZE - 1) / PAGE_SIZE;
	double kv_bytes =
		2.0 * o->context * m->n_kv_heads * m->head_dim * afd_dtype_bytes(o->dtype);
	int status = TOOL_DONE;

	r.n_sequences = (uint32_t)(o->cold_bytes / r.args.attend.kv.page_stride / pages_each);
	r.args.attend.table_stride = pages_each;
	r.args.attend.scale = 0.088f;
	if (!r.n_sequences)
		return tool_fail(TOOL_FAILED, "attend: context %u does not fit into %zu bytes",
			o->context, o->cold_bytes);
	if (prepare_attend(&r, r.n_sequences * pages_each, bench_list_max(&rows)))
		return bench_fail();
	for (uint32_t i = 0; i < rows.n && status == TOOL_DONE; i++) {
		struct bench_work work = { .dram_bytes = kv_bytes * rows.at[i],
			.flops = 4.0 * o->context * m->n_heads * m->head_dim * rows.at[i] };

		/* Two rows of one sequence would be read once. */
		if (rows.at[i] > r.n_sequences && o->b->gpu)
			continue;
		r.args.attend.n_rows = rows.at[i];
		status = measure_cell(&r, "attend", rows.at[i], &work, run_attend);
	}
	return status;
}

const struct bench_op bench_attend = { "attend", 1, OWN_ROWS, -1, measure_attend };
