/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `ops`: single operations through the device seam, as a stage runs them, on the shapes
 * of known models. Weights, keys and values are cold: each run takes the next part of 1 GiB. What a
 * run must move and compute at least is counted from the shapes; ceilings.h turns it into the
 * limit.
 */
#include "ops.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct bench_model models[] = {
	{ "qwen3-0.6b", 1024, 16, 8, 128, 3072 },
	{ "qwen3-4b", 2560, 32, 8, 128, 9728 },
	{ "qwen3-8b", 4096, 32, 8, 128, 12288 },
	{ "qwen3-32b", 5120, 64, 8, 128, 25600, .large = 1 },
	{ "30b-a3b-moe", 2048, 32, 4, 128, 768, .n_experts = 128, .top_k = 8 },
};
#define N_MODELS (sizeof models / sizeof models[0])

static const struct bench_op *const all_ops[] = { &bench_product, &bench_attend, &bench_norm,
	&bench_rope, &bench_activation, &bench_mlp, &bench_sample, &bench_moe };
#define N_OPS (sizeof all_ops / sizeof all_ops[0])

struct ops_options {
	struct bench_options common;
	const char *shapes, *ops;
	struct bench_matrices matrices;
	struct bench_list rows, contexts;
	uint32_t cold_gib;
	int32_t dtype;
	enum bench_routing routing;
};

/* ---- memory ---- */

int bench_upload(struct bench_ops *o, size_t bytes, const void *host, void **out)
{
	int rc;

	assert(o->n_owned < BENCH_UPLOADS);
	rc = afd__device_alloc(o->dev, bytes, "bench rows", out);
	if (rc)
		return rc;
	o->owned[o->n_owned].data = *out;
	o->owned[o->n_owned++].bytes = bytes;
	return host ? afd__queue_upload(&o->queue, *out, host, bytes) : 0;
}

void bench_free_uploads(struct bench_ops *o)
{
	while (o->n_owned) {
		o->n_owned--;
		afd__device_free(o->dev, o->owned[o->n_owned].data, o->owned[o->n_owned].bytes);
	}
}

char *bench_cold(struct bench_ops *o, size_t bytes)
{
	size_t rounded = (bytes + 63) / 64 * 64;

	if (o->position + rounded > o->cold_bytes)
		o->position = 0;
	o->position += rounded;
	return o->cold + o->position - rounded;
}

struct afd__matrix bench_packed(const struct bench_ops *o, uint32_t n, uint32_t k)
{
	const struct afd__matrix_shape shape = { .n = n, .k = k, .dtype = o->dtype };
	struct afd__matrix m = { .n = n,
		.k = k,
		.dtype = o->dtype,
		.layout = AFD__LAYOUT_PACKED,
		.bytes = o->dev->ops->matrix_bytes(o->dev, n, k, o->dtype) };

	if (o->dtype == AFD_DTYPE_FP8)
		m.scales_bytes = afd__matrix_shape_bytes(o->dev, &shape) - m.bytes;
	return m;
}

void bench_take_cold(struct bench_ops *o, struct afd__matrix *m)
{
	m->data = bench_cold(o, m->bytes);
	/* One scale for 32 rows and 128 columns: they are 1/1024 of what is read. */
	if (m->dtype == AFD_DTYPE_FP8)
		m->scales = (float *)bench_cold(o, m->scales_bytes);
}

int bench_upload_numbers(struct bench_ops *o, const char *op, size_t n_numbers, void **out)
{
	float *host = malloc(n_numbers * sizeof *host);
	int rc;

	if (!host)
		return afd__error(-ENOMEM, "%s: no memory for %zu numbers", op, n_numbers);
	for (size_t i = 0; i < n_numbers; i++)
		host[i] = (float)(i % 31) / 32 - 0.45f;
	rc = bench_upload(o, n_numbers * sizeof *host, host, out);
	free(host);
	return rc;
}

int bench_finish(struct bench_ops *o)
{
	uint64_t ticket;
	int rc;

	if (o->b->gpu || o->queue.fd < 0)
		return 0;
	rc = afd__queue_ticket(&o->queue, &ticket);
	if (rc)
		return rc;
	return afd__queue_wait(&o->queue, ticket, 60000, "bench");
}

/* Memory of the device cpu is plain memory: what the ceilings are taken from serves both. Others
 * get their numbers once, and then from themselves. */
static int make_cold(struct bench_ops *o, uint32_t cold_gib)
{
	const struct bench_ceilings *c = &o->b->ceilings;
	const size_t step = (size_t)16 << 20, first = (size_t)128 << 20;
	void *cold = NULL;
	int rc;

	o->cold_bytes = c->bytes;
	o->cold = c->memory;
	if (!strcmp(o->b->options->stage.device, "cpu"))
		return 0;
	o->cold_bytes = (size_t)cold_gib << 30;
	rc = afd__device_alloc(o->dev, o->cold_bytes, "bench memory", &cold);
	o->cold = o->cold_owned = cold;
	for (size_t at = 0; !rc && at < first; at += step)
		rc = afd__queue_upload(&o->queue, o->cold + at, c->memory + at, step);
	for (size_t at = first; !rc && at < o->cold_bytes; at += first) {
		struct afd__copy_args copy = {
			.dst = o->cold + at, .src = o->cold, .bytes = first
		};

		rc = afd__copy(&o->queue, &copy);
	}
	return rc;
}

/* ---- what is asked for ---- */

/* Whether the comma-separated list holds the name; a NULL list is `absent`. */
static int listed(const char *list, const char *name, int absent)
{
	size_t n_chars = strlen(name);

	if (!list)
		return absent;
	for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
		if (strcspn(at, ",") == n_chars && !memcmp(at, name, n_chars))
			return 1;
	}
	return 0;
}

/* Every item of the list must be one of the names, given by `name_at` until NULL. */
static int check_list(const char *flag, const char *list, const char *(*name_at)(size_t))
{
	for (const char *at = list; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
		size_t n_chars = strcspn(at, ","), i = 0;

		while (name_at(i) &&
			(strlen(name_at(i)) != n_chars || memcmp(at, name_at(i), n_chars)))
			i++;
		if (!name_at(i))
			return tool_fail(TOOL_USAGE, "--%s: value '%.*s', limit: see --help", flag,
				(int)n_chars, at);
	}
	return TOOL_DONE;
}

static const char *model_name_at(size_t i)
{
	return i < N_MODELS ? models[i].name : NULL;
}

static const char *op_name_at(size_t i)
{
	return i < N_OPS ? all_ops[i]->name : NULL;
}

/* ---- running ---- */

struct bench_list bench_rows_of(const struct bench_ops *o, const struct bench_op *op)
{
	struct bench_list list = o->rows;

	if (list.n)
		return list;
	while (list.n < sizeof op->rows / sizeof op->rows[0] && op->rows[list.n]) {
		list.at[list.n] = op->rows[list.n];
		list.n++;
	}
	return list;
}

uint32_t bench_list_max(const struct bench_list *list)
{
	uint32_t most = 0;

	for (uint32_t i = 0; i < list->n; i++)
		most = list->at[i] > most ? list->at[i] : most;
	return most;
}

/* Only attention looks at contexts. */
static int measure_contexts(
	struct bench_ops *o, const struct bench_op *op, const struct bench_model *model)
{
	int status = TOOL_DONE;
	uint32_t n = op == &bench_attend ? o->contexts.n : 1;

	for (uint32_t i = 0; i < n && status == TOOL_DONE; i++) {
		o->context = o->contexts.at[i];
		status = op->measure(o, model);
		bench_free_uploads(o);
	}
	return status;
}

/* With run 0 only counts cells. */
static int for_cells(
	struct bench_ops *o, const struct ops_options *options, int run, uint32_t *n_cells)
{
	int status = TOOL_DONE;

	*n_cells = 0;
	for (size_t i = 0; i < N_OPS; i++) {
		if (!listed(options->ops, all_ops[i]->name, i == 0))
			continue;
		for (size_t m = 0; m < N_MODELS; m++) {
			if (!listed(options->shapes, models[m].name, !models[m].large) ||
				all_ops[i]->routed == !models[m].n_experts)
				continue;
			*n_cells += all_ops[i]->n_shapes * bench_rows_of(o, all_ops[i]).n *
				    (all_ops[i] == &bench_attend ? o->contexts.n : 1);
			if (run && status == TOOL_DONE)
				status = measure_contexts(o, all_ops[i], &models[m]);
		}
	}
	return status;
}

static int measure_cells(struct bench_ops *o, const struct ops_options *options)
{
	uint32_t n_cells = 0, n_more = options->matrices.n * bench_rows_of(o, &bench_product).n;
	int status = TOOL_DONE;

	if (options->ops || !n_more)
		for_cells(o, options, 0, &n_cells);
	if (!n_cells && !n_more)
		return tool_fail(TOOL_USAGE,
			"ops: none of --ops %s runs on --shapes %s: moe takes 30b-a3b-moe, the "
			"others the rest, attend all",
			options->ops ? options->ops : "product",
			options->shapes ? options->shapes : "all of them");
	o->seconds = options->common.seconds / (n_cells + n_more);
	if (n_more)
		status = bench_measure_matrices(o, &options->matrices);
	if (status == TOOL_DONE && n_cells)
		status = for_cells(o, options, 1, &n_cells);
	return status;
}

static void add_ceilings(struct bench *b, struct bench_gpu *g)
{
	json_object_set_new(b->report.machine, "device_read_gb_per_s",
		json_real(bench_samples_at(&g->read, 0.5)));
	json_object_set_new(b->report.machine, "device_read_gb_per_s_best",
		json_real(bench_samples_at(&g->read, 1)));
	json_object_set_new(b->report.machine, "device_mma_tflop_per_s",
		json_real(bench_samples_at(&g->multiply, 0.5) * 1e-3));
	json_object_set_new(b->report.machine, "device_mma_tflop_per_s_best",
		json_real(bench_samples_at(&g->multiply, 1) * 1e-3));
}

static int measure_all(struct bench *b, const struct ops_options *options)
{
	static struct bench_gpu gpu;
	struct bench_ops o = { .b = b,
		.rows = options->rows,
		.contexts = options->contexts,
		.dtype = options->dtype,
		.routing = options->routing };
	int rc, status;

	rc = afd__device_open(&o.dev, b->ctx, options->common.stage.device);
	if (rc)
		return bench_fail();
	rc = afd__queue_open(&o.queue, o.dev);
	if (!rc)
		rc = make_cold(&o, options->cold_gib);
	if (!rc && o.dev->ops->probe) {
		rc = bench_gpu_open(&gpu, &o.queue, o.cold, o.cold_bytes);
		b->gpu = rc ? NULL : &gpu;
	}
	status = rc ? bench_fail() : measure_cells(&o, options);
	if (b->gpu) {
		add_ceilings(b, b->gpu);
		bench_gpu_close(b->gpu);
	}
	afd__device_free(o.dev, o.cold_owned, o.cold_bytes);
	afd__queue_close(&o.queue);
	afd__device_close(o.dev);
	return status;
}

/* ---- flags ---- */

/* "1,8,64": min .. max each. */
static int set_list(const struct tool_option *option, const char *value)
{
	struct bench_list *list = option->into;

	list->n = 0;
	for (const char *at = value; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
		char *end;
		double number = strtod(at, &end);

		if (end == at || (*end && *end != ',') || !(number >= option->min) ||
			!(number <= option->max) || number != (uint32_t)number ||
			list->n == BENCH_LIST_MAX)
			return tool_fail(TOOL_USAGE,
				"--%s: value '%s', limit %.0f to %.0f, at most %d of them",
				option->name, value, option->min, option->max, BENCH_LIST_MAX);
		list->at[list->n++] = (uint32_t)number;
	}
	return TOOL_DONE;
}

/* "4096x12288,5120x8192": n x k. */
static int set_matrices(const struct tool_option *option, const char *value)
{
	struct bench_matrices *list = option->into;

	for (const char *at = value; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
		unsigned n, k;
		int n_chars = 0;

		if (sscanf(at, "%7ux%7u%n", &n, &k, &n_chars) != 2 ||
			(at[n_chars] && at[n_chars] != ',') || n < option->min || k < option->min ||
			n > option->max || k > option->max || list->n == BENCH_LIST_MAX)
			return tool_fail(TOOL_USAGE,
				"--%s: value '%s', limit NxK, each %.0f to %.0f, at most %d of "
				"them",
				option->name, value, option->min, option->max, BENCH_LIST_MAX);
		list->at[list->n].n = n;
		list->at[list->n++].k = k;
	}
	return TOOL_DONE;
}

static int set_routing(const struct tool_option *option, const char *value)
{
	static const char *const names[] = { "uniform", "balanced", "power-law" };

	for (int i = 0; i < 3; i++) {
		if (strcmp(value, names[i]))
			continue;
		*(enum bench_routing *)option->into = (enum bench_routing)i;
		return TOOL_DONE;
	}
	return tool_fail(TOOL_USAGE, "--%s: value '%s', limit uniform, balanced or power-law",
		option->name, value);
}

int bench_ops(int argc, char **argv)
{
	struct ops_options o = { .common = { .stage = { .device = "cpu" }, .seconds = 35 },
		.contexts = { .at = { 1024 }, .n = 1 },
		.cold_gib = 1,
		.dtype = AFD_DTYPE_BF16 };
	const struct tool_option options[] = {
		{ "shapes", "NAME,...", "all but qwen3-32b",
			"qwen3-0.6b, qwen3-4b, qwen3-8b, qwen3-32b; of moe and attend 30b-a3b-moe",
			tool_set_text, &o.shapes, 0, 0 },
		{ "ops", "NAME,...", "product", "product, attend, norm, rope, activation, mlp, sample, moe",
			tool_set_text, &o.ops, 0, 0 },
		{ "matrices", "NxK,...", "none", "products with these instead, 16 to 1048576",
			set_matrices, &o.matrices, 16, 1048576 },
		{ "rows", "N,...", "some of 1 to 128", "rows of each call, 1 to 8192", set_list,
			&o.rows, 1, BENCH_ROWS_MAX },
		{ "context", "C,...", "1024", "positions that attend looks at, 16 to 32768",
			set_list, &o.contexts, 16, 32768 },
		{ "dtype", "f32|bf16|f16|fp8", "bf16", "of weights, keys and values",
			tool_set_dtype, &o.dtype, 0, 0 },
		{ "routing", "HOW", "uniform", "of moe: uniform, balanced or power-law",
			set_routing, &o.routing, 0, 0 },
		{ "cold-gib", "N", "1", "memory to rotate over on a device, 1 to 64", tool_set_u32,
			&o.cold_gib, 1, 64 },
		BENCH_OPTIONS(o.common, "35 s"),
		{ 0 },
	};
	struct bench b;
	int status = tool_options_read(options,
		"ops [--shapes NAME,...] [--ops NAME,...] [--json]\n\n"
		"Operations on cold weights, each against the larger of two limits: its bytes at "
		"the\n"
		"rate of DRAM, its multiply-adds at the rate of float32 FMA. On cuda:N the limits "
		"are "
		"the\n"
		"GPU's: reading its memory, bf16 on tensor cores; times are by the GPU's own "
		"clock.",
		argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	if (check_list("shapes", o.shapes, model_name_at) || check_list("ops", o.ops, op_name_at))
		return TOOL_USAGE;
	if (!o.dtype)
		o.dtype = AFD_DTYPE_BF16;
	status = bench_open(&b, &o.common);
	if (status == TOOL_DONE)
		status = measure_all(&b, &o);
	return bench_close(&b, status);
}
