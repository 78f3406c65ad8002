/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products of a queue through cuBLASLt: which it takes, in passes of rows whose operands fit into the
 * workspace, each by a plan, which is what the library answered for that shape. Plans are kept in a
 * table of fixed size that was made with the queue.
 *
 * Invariant: a pass that the library does not take is done by our kernels, so a product that has
 * begun here ends here. Called by operations.c.
 */
#include <string.h>

#include "blaslt.h"

enum { PLAN_SETS = 64, PLAN_WAYS = 4, PASS_ROWS = 128, SCALE_ROWS = 4 };

/* All that the library's answer depends on; no gaps, since it is compared as bytes. */
struct plan_key {
	uint64_t w_stride, x_stride, y_stride;
	uint32_t n, k, n_rows, w_alignment, x_alignment, y_alignment, bias_alignment;
	int32_t dtype;
};

struct plan {
	struct plan_key key;
	cublasLtMatmulAlgo_t algo;
	bool made, refused;
};

struct blaslt_queue {
	struct blaslt_words words;
	struct plan plans[PLAN_SETS][PLAN_WAYS];
	uint8_t oldest[PLAN_SETS];
	bool told_refused;
	void *workspace; /* BLASLT_WORKSPACE_BYTES, behind that of our kernels */
};

/* One product of an operation: rows of x, or of silu(gate) * up. */
struct work {
	const struct afd__matrix *w;
	const float *bias;
	struct afd_gpu_operands x;
	float *y; /* [n_rows][y_stride] */
	size_t y_stride;
};

/* ---- the queue's part ---- */

size_t blaslt_workspace_bytes(const struct cuda_queue *d)
{
	const struct cuda *c = d->q->dev->state;

	return c->blaslt && !d->q->options.deterministic ? BLASLT_WORKSPACE_BYTES : 0;
}

int blaslt_queue_open(struct cuda_queue *d)
{
	struct afd__device *dev = d->q->dev;
	const struct blaslt *lib = ((const struct cuda *)dev->state)->blaslt;
	cublasStatus_t status;

	if (!blaslt_workspace_bytes(d))
		return 0;
	d->blaslt = dev->host->alloc(dev->ctx, 1, sizeof(*d->blaslt));
	if (!d->blaslt)
		return -ENOMEM;
	d->blaslt->workspace = (char *)d->gpu.workspace + d->gpu.workspace_bytes;
	status = blaslt_words_open(lib, &d->blaslt->words);
	return status ? dev->host->error(-EIO, "device %s: cuBLASLt cannot describe a product: %s",
				dev->name, lib->GetStatusName(status))
		      : 0;
}

void blaslt_queue_close(struct cuda_queue *d)
{
	const struct cuda *c = d->q->dev->state;

	if (d->blaslt && !cuda_forked(c))
		blaslt_words_close(c->blaslt, &d->blaslt->words);
	d->q->dev->host->free(d->blaslt);
	d->blaslt = NULL;
}

/* ---- plans ---- */

static struct plan_key key_of(const struct blaslt_matmul *m)
{
	return (struct plan_key){ .w_stride = m->w_stride,
		.x_stride = m->x_stride,
		.y_stride = m->y_stride,
		.n = m->n,
		.k = m->k,
		.n_rows = m->n_rows,
		.w_alignment = blaslt_alignment(m->w),
		.x_alignment = blaslt_alignment(m->x),
		.y_alignment = blaslt_alignment(m->y),
		.bias_alignment = m->bias ? blaslt_alignment(m->bias) : 0,
		.dtype = m->dtype };
}

static uint32_t set_of(const struct plan_key *key)
{
	uint64_t hash = key->n * 0x9e3779b97f4a7c15ull;

	hash = (hash ^ key->k) * 0x9e3779b97f4a7c15ull;
	hash = (hash ^ key->n_rows) * 0x9e3779b97f4a7c15ull;
	return (uint32_t)(hash >> 32) % PLAN_SETS;
}

/* The plan for what was described last; the library is asked when it was not asked before. */
static struct plan *plan_for(struct cuda_queue *d, const struct blaslt_matmul *m)
{
	const struct blaslt *lib = ((const struct cuda *)d->q->dev->state)->blaslt;
	struct blaslt_queue *b = d->blaslt;
	const struct plan_key key = key_of(m);
	uint32_t set = set_of(&key);
	cublasLtMatmulHeuristicResult_t best;
	struct plan *plan;

	for (int i = 0; i < PLAN_WAYS; i++) {
		plan = &b->plans[set][i];
		if (plan->made && !memcmp(&plan->key, &key, sizeof(key)))
			return plan;
	}
	plan = &b->plans[set][b->oldest[set]++ % PLAN_WAYS];
	plan->key = key;
	plan->made = true;
	plan->refused = blaslt_ask(lib, &b->words, m, &best) != CUBLAS_STATUS_SUCCESS ||
			best.workspaceSize > BLASLT_WORKSPACE_BYTES;
	if (!plan->refused)
		plan->algo = best.algo;
	return plan;
}

/* ---- a pass ---- */

static struct blaslt_matmul matmul_of(const struct work *work)
{
	const struct afd__matrix *w = work->w;
	const struct afd_gpu_operands *x = &work->x;
	const bool f32 = w->dtype == AFD_DTYPE_F32;

	return (struct blaslt_matmul){ .w = w->data,
		.x = f32 ? (const void *)x->x : x->numbers,
		.y = work->y,
		.bias = x->ends ? NULL : work->bias,
		.w_scales = x->w_scales,
		.x_scales = x->x_scales,
		.w_stride = x->w_numbers,
		.x_stride = f32 ? x->x_stride : x->row_numbers,
		.y_stride = work->y_stride,
		.n = w->n,
		.k = w->k,
		.n_rows = x->n_rows,
		.dtype = w->dtype };
}

static bool is_refusal(cublasStatus_t status)
{
	return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
	       status == CUBLAS_STATUS_ARCH_MISMATCH;
}

/* What the library offered and then would not do; it has begun nothing. */
static int give_up(struct cuda_queue *d, struct plan *plan, cublasStatus_t status)
{
	const struct afd__device *dev = d->q->dev;
	const struct blaslt *lib = ((const struct cuda *)dev->state)->blaslt;

	if (!is_refusal(status))
		return dev->host->error(-EIO, "device %s: cublasLtMatmul: %s", dev->name,
			lib->GetStatusName(status));
	plan->refused = true;
	if (!d->blaslt->told_refused)
		dev->host->log(dev->ctx, AFD_LOG_WARN,
			"device %s: cublasLtMatmul of %u rows by %u x %u: %s; our own kernels do it",
			dev->name, plan->key.n_rows, plan->key.n, plan->key.k,
			lib->GetStatusName(status));
	d->blaslt->told_refused = true;
	return 0;
}

/* 1: enqueued, 0: not taken. */
static int run_pass(struct cuda_queue *d, const struct work *work)
{
	const struct blaslt *lib = ((const struct cuda *)d->q->dev->state)->blaslt;
	const struct blaslt_words *words = &d->blaslt->words;
	const struct blaslt_matmul m = matmul_of(work);
	const float one = 1, zero = 0;
	cublasStatus_t status = blaslt_describe(lib, words, &m);
	struct plan *plan;
	int rc;

	if (status)
		return d->q->dev->host->error(-EIO, "device %s: cuBLASLt cannot describe a product: %s",
			d->q->dev->name, lib->GetStatusName(status));
	plan = plan_for(d, &m);
	if (plan->refused)
		return 0;
	rc = afd_gpu_operands(&d->gpu, work->w, &work->x);
	if (rc)
		return cuda_error(d->q->dev, rc, "operands");
	status = lib->Matmul(lib->handle, words->product[blaslt_kind_of(m.dtype)], &one, m.w, words->w,
		m.x, words->x, &zero, m.y, words->y, m.y, words->y, &plan->algo,
		d->blaslt->workspace, BLASLT_WORKSPACE_BYTES, d->gpu.stream);
	if (status)
		return give_up(d, plan, status);
	rc = afd_gpu_operands_finish(
		&d->gpu, work->w, &work->x, work->bias, work->y, work->y_stride);
	return rc ? cuda_error(d->q->dev, rc, "operands") : 1;
}

/* Puts the operands of up to n_rows into the workspace. Returns the rows that fit, about as many as
 * in the passes behind it, in whole tiles. */
static uint32_t take_memory(const struct cuda_queue *d, struct work *work, uint32_t n_rows)
{
	struct afd_gpu_operands *x = &work->x;
	size_t most = x->row_bytes ? (d->gpu.workspace_bytes - x->fixed_bytes) / x->row_bytes : n_rows;
	uint32_t n_passes, n;

	most = most > PASS_ROWS ? most / PASS_ROWS * PASS_ROWS : most;
	if (!most || x->fixed_bytes >= d->gpu.workspace_bytes)
		return 0;
	n_passes = (uint32_t)((n_rows + most - 1) / most);
	n = (n_rows + n_passes - 1) / n_passes;
	n = n_passes > 1 ? (n + PASS_ROWS - 1) / PASS_ROWS * PASS_ROWS : n;
	n = n < most ? n : (uint32_t)most;
	if (work->w->dtype == AFD_DTYPE_FP8 && n >= SCALE_ROWS)
		n -= n % SCALE_ROWS; /* the last ones are a pass of their own */
	x->n_rows = n;
	afd_gpu_operands_place(work->w, x, d->gpu.workspace);
	return n;
}

/* ---- products ---- */

/* What is decided by the matrix: the rest the library is asked. */
static bool suits(const struct cuda_queue *d, const struct afd__matrix *w, int32_t quantized)
{
	const struct cuda *c = d->q->dev->state;

	if (w->n_stack || !afd_gpu_operands_fit(w) ||
		(w->layout == AFD__LAYOUT_IN_PLACE && !cuda_on_device(w->data)))
		return false;
	return w->dtype != AFD_DTYPE_FP8 ||
	       (c->blaslt->has_blocks && quantized && w->whole_blocks && !w->column_offset &&
		       w->n % SCALE_ROWS == 0);
}

/* From where on our kernels read the weights a second time. */
static bool is_large(const struct cuda_queue *d, const struct afd__matrix *w, uint32_t n_rows)
{
	const struct cuda *c = d->q->dev->state;

	return c->products == CUDA_PRODUCTS_CUBLASLT ||
	       n_rows > (w->dtype == AFD_DTYPE_F32 ? AFD_GPU_PLAIN_ROWS : AFD_GPU_TILE_ROWS);
}

/* Runs pass by pass; `own` does the rows that the library does not take. */
static int run_work(struct cuda_queue *d, struct work work, uint32_t n_rows,
	int (*own)(struct cuda_queue *d, const void *args, uint32_t row0, uint32_t n_rows),
	const void *args)
{
	uint32_t row0 = 0;
	int rc = 1;

	afd_gpu_operands_shape(work.w, &work.x);
	for (uint32_t left = n_rows, n; rc > 0 && left; left -= n) {
		n = take_memory(d, &work, left);
		rc = n ? run_pass(d, &work) : 0;
		n = n ? n : left;
		if (!rc) {
			rc = cuda_error(d->q->dev, own(d, args, row0, n), "product");
			rc = rc ? rc : 1;
		}
		row0 += n;
		work.x.x += work.x.x ? n * work.x.x_stride : 0;
		work.x.inputs = work.x.inputs ? (const char *)work.x.inputs + n * work.x.inputs_bytes
					      : NULL;
		work.x.up = work.x.up ? work.x.up + n * work.x.x_stride : NULL;
		work.y += n * work.y_stride;
	}
	return rc;
}

static int own_product(struct cuda_queue *d, const void *args, uint32_t row0, uint32_t n_rows)
{
	struct afd__product_args a = *(const struct afd__product_args *)args;

	if (a.inputs)
		a.inputs = (const char *)a.inputs + row0 * afd_gpu_input_row_bytes(&a.w);
	else
		a.x += row0 * a.x_stride;
	a.y += row0 * a.y_stride;
	a.n_rows = n_rows;
	return afd_gpu_product(&d->gpu, &a);
}

int blaslt_product(struct cuda_queue *d, const struct afd__product_args *a)
{
	const struct work work = { .w = &a->w,
		.bias = a->bias,
		.x = { .x = a->x, .inputs = a->inputs, .x_stride = a->x_stride },
		.y = a->y,
		.y_stride = a->y_stride };

	if (!d->blaslt || !is_large(d, &a->w, a->n_rows) || !suits(d, &a->w, a->quantized))
		return 0;
	return run_work(d, work, a->n_rows, own_product, a);
}

static int own_down(struct cuda_queue *d, const void *args, uint32_t row0, uint32_t n_rows)
{
	struct afd__mlp_args a = *(const struct afd__mlp_args *)args;

	a.gate_up_rows += (size_t)row0 * a.gate_up.n;
	a.y += (size_t)row0 * a.down.n;
	a.n_rows = n_rows;
	return afd_gpu_mlp_down(&d->gpu, &a);
}

/* Weights of down in float32 want rows that are activated in memory: our kernels put them there. */
int blaslt_mlp(struct cuda_queue *d, const struct afd__mlp_args *a)
{
	const struct afd__product_args up = { .x = a->x,
		.inputs = a->inputs,
		.w = a->gate_up,
		.y = a->gate_up_rows,
		.x_stride = a->gate_up.k,
		.y_stride = a->gate_up.n,
		.n_rows = a->n_rows,
		.quantized = a->quantized };
	const struct work first = { .w = &a->gate_up,
		.x = { .x = a->x, .inputs = a->inputs, .x_stride = a->gate_up.k },
		.y = a->gate_up_rows,
		.y_stride = a->gate_up.n };
	const struct work second = { .w = &a->down,
		.x = { .x = a->gate_up_rows,
			.up = a->gate_up_rows + a->down.k,
			.x_stride = a->gate_up.n },
		.y = a->y,
		.y_stride = a->down.n };
	int rc;

	if (!d->blaslt || !is_large(d, &a->gate_up, a->n_rows) || a->down.dtype == AFD_DTYPE_F32 ||
		!suits(d, &a->gate_up, a->quantized) || !suits(d, &a->down, a->quantize) ||
		(a->quantize && a->down.dtype != AFD_DTYPE_FP8))
		return 0;
	rc = run_work(d, first, a->n_rows, own_product, &up);
	return rc < 0 ? rc : run_work(d, second, a->n_rows, own_down, a);
}
