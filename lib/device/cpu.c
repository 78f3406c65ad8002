/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPU backend: operations run when they are called, spread over the context's compute threads.
 *
 * An operation is a range of units (rows, tasks or panels of weights) that stand alone, so it may
 * be cut anywhere: into tasks for the threads, and, when somebody must beat meanwhile, into rounds
 * of about 10 ms, between which the calling thread calls on_tile. How much fits a round is
 * measured, per kind of operation; bits do not depend on it.
 */
#include <afd/attn.h>
#include <math.h>
#include <string.h>

#include "../../kernels/cpu/product.h"
#include "cpu.h"

#define ROUND_NS         10e6
#define FIRST_RATE       0.05 /* cost per ns that no machine is slower than, until it is measured */
#define TASKS_PER_THREAD 4
#define SERIAL_COST      32768 /* cheaper than waking a thread */

struct cpu_queue {
	double rate[AFD__N_OPERATIONS]; /* cost per ns, of all threads together */
	uint64_t last_tile_ns;
};

static void run_task(void *arg, uint32_t i)
{
	const struct afd__job *job = arg;
	uint64_t from = (uint64_t)job->round_units * i / job->n_tasks;
	uint64_t to = (uint64_t)job->round_units * (i + 1) / job->n_tasks;

	if (from < to)
		job->run(job, job->round_from + (uint32_t)from, job->round_from + (uint32_t)to);
}

static void run_round(
	struct afd_context *ctx, struct afd__job *job, uint32_t from, uint32_t n_units, double cost)
{
	uint64_t n_tasks = (uint64_t)ctx->executor.n_threads * TASKS_PER_THREAD;

	if (ctx->executor.n_threads < 2 || cost < SERIAL_COST || n_units < 2) {
		job->run(job, from, from + n_units);
		return;
	}
	job->round_from = from;
	job->round_units = n_units;
	job->n_tasks = n_tasks < n_units ? (uint32_t)n_tasks : n_units;
	afd__parallel(ctx, job->n_tasks, run_task, job);
}

/* How many of `left` units take about ROUND_NS, in rounds of equal size. */
static uint32_t units_of_round(const struct afd__job *job, double rate, uint32_t left)
{
	double n_rounds = job->cost * ((double)left / job->n_units) / (rate * ROUND_NS);

	if (n_rounds <= 1)
		return left;
	return n_rounds >= left ? 1 : (uint32_t)(left / n_rounds) + 1;
}

static void beat(struct afd__queue *q, struct cpu_queue *s, uint64_t now)
{
	if (now - s->last_tile_ns < (uint64_t)ROUND_NS)
		return;
	s->last_tile_ns = now;
	q->on_tile(q->on_tile_user);
}

void afd__job_run(struct afd__queue *q, struct afd__job *job)
{
	struct cpu_queue *s = q->state;
	uint32_t from = 0, n;

	job->kernels = q->dev->state;
	if (!q->on_tile) {
		run_round(q->dev->ctx, job, 0, job->n_units, job->cost);
		return;
	}
	while (from < job->n_units) {
		uint64_t start = afd__now_ns(), now;
		double cost; /* of this round */

		n = units_of_round(job, s->rate[job->kind], job->n_units - from);
		cost = job->cost * n / job->n_units;
		run_round(q->dev->ctx, job, from, n, cost);
		from += n;
		now = afd__now_ns();
		/* A short round says more about the clock than about the machine. */
		if (now - start > 50000)
			s->rate[job->kind] = cost / (double)(now - start);
		beat(q, s, now);
	}
}

/* ---- operations ---- */

#define RUN(op) \
	static void run_##op(const struct afd__job *job, uint32_t from, uint32_t to) \
	{ \
		job->kernels->op(job->args, from, to); \
	}
RUN(embed)
RUN(norm)
RUN(angles)
RUN(rope)
RUN(attend)
RUN(activation)
RUN(convert)
RUN(argmax)
RUN(gate)
RUN(quantize)
RUN(route)

/* An operation whose units are rows; `width` is the cost of one. */
#define ROWS(op, width) \
	static int cpu_##op(struct afd__queue *q, const struct afd__##op##_args *a) \
	{ \
		struct afd__job job = { .args = a, \
			.run = run_##op, \
			.n_units = a->n_rows, \
			.kind = AFD__OPERATION_##op, \
			.cost = (double)a->n_rows * (width) }; \
		afd__job_run(q, &job); \
		return 0; \
	}
ROWS(embed, 4.0 * a->table.k)
ROWS(norm, 2.0 * a->width)
ROWS(angles, 32.0 * a->head_dim)
ROWS(rope, 4.0 * (a->n_heads + 2.0 * a->kv.n_kv_heads) * a->kv.head_dim)
ROWS(activation, 4.0 * a->width)
ROWS(convert, (a->dst_dtype == AFD_DTYPE_FP8 ? 4.0 : 1.0) * a->width)
ROWS(argmax, a->width)
ROWS(gate, 4.0 * a->width)
ROWS(quantize, 2.0 * a->width)
ROWS(route, 8.0 * a->n_experts)

static int cpu_attend(struct afd__queue *q, const struct afd__attend_args *a)
{
	struct afd__job job = { .args = a,
		.run = run_attend,
		.n_units = a->n_rows * a->kv.n_kv_heads,
		.kind = AFD__OPERATION_attend };

	for (uint32_t i = 0; i < a->n_rows; i++) {
		uint32_t n = (uint32_t)a->positions[i] + 1;

		job.cost += 2.0 * (a->window && a->window < n ? a->window : n) * a->n_heads *
			    a->kv.head_dim;
	}
	afd__job_run(q, &job);
	return 0;
}

void afd__product_run(const struct afd__job *job, const struct afd__product_args *a,
	uint32_t panel0, uint32_t panel1)
{
	uint64_t n0 = (uint64_t)panel0 * AFD_K_PANEL, n1 = (uint64_t)panel1 * AFD_K_PANEL;

	if (n1 > a->w.n)
		n1 = a->w.n;
	if (a->w.layout == AFD__LAYOUT_PACKED)
		job->kernels->product(a, (uint32_t)n0, (uint32_t)n1);
	else
		job->kernels->product_in_place(a, (uint32_t)n0, (uint32_t)n1);
}

static void run_product(const struct afd__job *job, uint32_t from, uint32_t to)
{
	afd__product_run(job, job->args, from, to);
}

#define WEIGHT_COST 4.0 /* a weight costs as much to read as so many multiply-adds */

/* Rows of a product that one panel can take in a round: all of them, unless the machine is slow or
 * the rows are many. */
static uint32_t rows_of_round(const struct afd__queue *q, const struct afd__product_args *a)
{
	const struct cpu_queue *s = q->state;
	double n_rows = s->rate[AFD__OPERATION_product] * ROUND_NS / ((double)a->w.k * AFD_K_PANEL) -
			WEIGHT_COST;

	if (!q->on_tile || n_rows >= a->n_rows)
		return a->n_rows;
	return n_rows < 1 ? 1 : (uint32_t)n_rows;
}

static int cpu_product(struct afd__queue *q, const struct afd__product_args *a)
{
	struct afd__product_args part = *a;
	uint32_t left = a->n_rows;

	while (left) {
		struct afd__job job = { .args = &part,
			.run = run_product,
			.n_units = afd__product_panels(&a->w),
			.kind = AFD__OPERATION_product };

		part.n_rows = left;
		part.n_rows = rows_of_round(q, &part);
		job.cost = (double)a->w.n * a->w.k * (part.n_rows + WEIGHT_COST);
		afd__job_run(q, &job);
		part.x += part.n_rows * part.x_stride;
		part.y += part.n_rows * part.y_stride;
		left -= part.n_rows;
	}
	return 0;
}

static int cpu_mlp(struct afd__queue *q, const struct afd__mlp_args *a)
{
	const struct afd__product_args gate_up = { .x = a->x,
		.w = a->gate_up,
		.y = a->gate_up_rows,
		.x_stride = a->gate_up.k,
		.y_stride = a->gate_up.n,
		.n_rows = a->n_rows };
	const struct afd__activation_args activation = {
		.gate_up = a->gate_up_rows, .out = a->activated, .n_rows = a->n_rows, .width = a->down.k
	};
	const struct afd__quantize_args quantize = { .x = a->activated,
		.n_rows = a->n_rows,
		.width = a->down.k,
		.column_offset = a->down.column_offset };
	const struct afd__product_args down = { .x = a->activated,
		.w = a->down,
		.y = a->y,
		.x_stride = a->down.k,
		.y_stride = a->down.n,
		.n_rows = a->n_rows };

	cpu_product(q, &gate_up);
	cpu_activation(q, &activation);
	if (a->quantize)
		cpu_quantize(q, &quantize);
	return cpu_product(q, &down);
}

static void run_sample(const struct afd__job *job, uint32_t from, uint32_t to)
{
	const struct afd__sample_args *a = job->args;

	for (uint32_t i = from; i < to; i++) {
		const struct afd__sample_row *row = &a->rows[i];
		const float *x = a->logits + (size_t)i * a->width;
		const struct afd_sample_params params = { .size = sizeof(params),
			.temperature = row->temperature,
			.top_p = row->top_p,
			.top_k = row->top_k,
			.seed = row->seed };
		int32_t at = 0;

		while ((uint32_t)at < a->width && isfinite(x[at]))
			at++;
		a->ids[i] = (uint32_t)at < a->width
				    ? -1 - at
				    : afd_sample(x, a->width, row->position, &params, NULL);
	}
}

static int cpu_sample(struct afd__queue *q, const struct afd__sample_args *a)
{
	struct afd__job job = { .args = a,
		.run = run_sample,
		.n_units = a->n_rows,
		.kind = AFD__OPERATION_sample,
		.cost = 64.0 * a->n_rows * a->width };

	afd__job_run(q, &job);
	return 0;
}

static int cpu_copy(struct afd__queue *q, const struct afd__copy_args *a)
{
	memcpy(a->dst, a->src, a->bytes);
	return 0;
}

static int cpu_experts(struct afd__queue *q, const struct afd__experts_args *a)
{
	return afd__cpu_experts(q, a);
}

static int cpu_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes)
{
	memcpy(dst, host, bytes);
	return 0;
}

static int cpu_download(struct afd__queue *q, void *host, const void *src, size_t bytes)
{
	memcpy(host, src, bytes);
	return 0;
}

/* ---- memory, matrices, queues ---- */

static int cpu_open(struct afd__device *dev, int index)
{
	if (index >= 0)
		return afd__error(
			-EINVAL, "device %s: the CPU is one device and takes no number", dev->name);
	dev->state = (void *)afd__cpu_kernels(dev->ctx->isa);
	return 0;
}

static void cpu_close(struct afd__device *dev)
{
	dev->state = NULL;
}

static int cpu_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out)
{
	void *memory = afd__large_alloc(dev->ctx, bytes, 64, what);

	if (!memory)
		return -ENOMEM;
#ifndef NDEBUG
	/* NaN in every dtype, and no id or position. */
	memset(memory, 0xff, bytes);
#endif
	*out = memory;
	return 0;
}

static void cpu_free(struct afd__device *dev, void *memory, size_t bytes)
{
	afd__large_free(dev->ctx, memory, bytes);
}

static size_t cpu_matrix_bytes(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype)
{
	return afd_k_packed_bytes(n, k, dtype);
}

struct load {
	const struct afd__matrix *m;
	const void *rows;
	uint32_t row0, n_rows;
};

static void run_load(const struct afd__job *job, uint32_t from, uint32_t to)
{
	const struct load *l = job->args;
	uint32_t p0 = l->row0 / AFD_K_PANEL;

	job->kernels->pack(l->m, l->rows, l->row0, l->n_rows, p0 + from, p0 + to);
}

static int cpu_matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows,
	uint32_t row0, uint32_t n_rows)
{
	struct load l = { .m = m, .rows = rows, .row0 = row0, .n_rows = n_rows };
	uint32_t n_units = (row0 + n_rows - 1) / AFD_K_PANEL - row0 / AFD_K_PANEL + 1;
	struct afd__job job = { .kernels = dev->state, .args = &l, .run = run_load, .n_units = n_units };

	run_round(dev->ctx, &job, 0, n_units, (double)n_rows * m->k);
	return 0;
}

static int cpu_scales_load(struct afd__device *dev, struct afd__matrix *m,
	const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows)
{
	afd_k_load_scales(m, blocks, row0, n_rows);
	return 0;
}

static int cpu_queue_open(struct afd__queue *q)
{
	struct cpu_queue *s = afd__alloc(q->dev->ctx, 1, sizeof(*s));

	if (!s)
		return -ENOMEM;
	for (int i = 0; i < AFD__N_OPERATIONS; i++)
		s->rate[i] = FIRST_RATE;
	q->state = s;
	return 0;
}

static void cpu_queue_close(struct afd__queue *q)
{
	afd__free(q->state);
}

static int cpu_reached(struct afd__queue *q, uint64_t ticket)
{
	return 1;
}

static int cpu_ticket(struct afd__queue *q, uint64_t *ticket)
{
	*ticket = 0;
	return 0;
}

const struct afd__device_ops afd__cpu_device_ops = { .name = "cpu",
	.open = cpu_open,
	.close = cpu_close,
	.alloc = cpu_alloc,
	.free = cpu_free,
	.matrix_bytes = cpu_matrix_bytes,
	.matrix_load = cpu_matrix_load,
	.scales_load = cpu_scales_load,
	.experts_scratch_bytes = afd__cpu_experts_scratch_bytes,
	.queue_open = cpu_queue_open,
	.queue_close = cpu_queue_close,
	.reached = cpu_reached,
	.ticket = cpu_ticket,
	.upload = cpu_upload,
	.download = cpu_download,
#define ENTRY(op) .op = cpu_##op,
	AFD__DEVICE_OPERATIONS(ENTRY)
#undef ENTRY
};
