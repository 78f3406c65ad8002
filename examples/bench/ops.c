/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `ops`: single operations through the device seam, as a stage runs them, on the shapes
 * of known models. Weights, keys and values are cold: each run takes the next part of 1 GiB. What a
 * run must move and compute at least is counted from the shapes; ceilings.h turns it into the
 * limit.
 */
#include "ops.h"

#include <assert.h>
#include <string.h>

static const struct bench_model models[] = {
	{ "qwen3-0.6b", 1024, 16, 8, 128, 3072 },
	{ "qwen3-4b", 2560, 32, 8, 128, 9728 },
	{ "qwen3-8b", 4096, 32, 8, 128, 12288 },
	{ "30b-a3b-moe", 2048, 32, 4, 128, 768, .n_experts = 128, .top_k = 8 },
};
#define N_MODELS (sizeof models / sizeof models[0])

static const struct bench_op *const all_ops[] = { &bench_product, &bench_attend, &bench_norm,
	&bench_rope, &bench_activation, &bench_moe };
#define N_OPS (sizeof all_ops / sizeof all_ops[0])

struct ops_options {
	struct bench_options common;
	const char *shapes, *ops;
	uint32_t context;
	int32_t dtype;
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

int bench_finish(struct bench_ops *o)
{
	uint64_t ticket;
	int rc = o->queue.fd < 0 ? 0 : afd__queue_ticket(&o->queue, &ticket);

	if (rc || o->queue.fd < 0)
		return rc;
	return afd__queue_wait(&o->queue, ticket, 60000, "bench");
}

/* Memory of the device cpu is plain memory: what the ceilings are taken from serves both. */
static int make_cold(struct bench_ops *o)
{
	const struct bench_ceilings *c = &o->b->ceilings;
	const size_t step = (size_t)16 << 20;
	void *cold = NULL;
	int rc;

	o->cold_bytes = c->bytes;
	o->cold = c->memory;
	if (!strcmp(o->b->options->stage.device, "cpu"))
		return 0;
	rc = afd__device_alloc(o->dev, c->bytes, "bench memory", &cold);
	o->cold = o->cold_owned = cold;
	for (size_t at = 0; !rc && at < c->bytes; at += step)
		rc = afd__queue_upload(&o->queue, o->cold + at, c->memory + at, step);
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
			if (!listed(options->shapes, models[m].name, 1) ||
				all_ops[i]->routed != (models[m].n_experts > 0))
				continue;
			*n_cells += all_ops[i]->n_cells;
			if (run && status == TOOL_DONE)
				status = all_ops[i]->measure(o, &models[m]);
			bench_free_uploads(o);
		}
	}
	return status;
}

static int measure_all(struct bench *b, const struct ops_options *options)
{
	struct bench_ops o = { .b = b, .context = options->context, .dtype = options->dtype };
	uint32_t n_cells;
	int rc, status;

	rc = afd__device_open(&o.dev, b->ctx, options->common.stage.device);
	if (rc)
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	rc = afd__queue_open(&o.queue, o.dev);
	if (!rc)
		rc = make_cold(&o);
	if (rc) {
		status = tool_fail(TOOL_FAILED, "%s", afd_last_error());
	} else {
		for_cells(&o, options, 0, &n_cells);
		o.seconds = options->common.seconds / (n_cells ? n_cells : 1);
		status = for_cells(&o, options, 1, &n_cells);
		if (status == TOOL_DONE && !n_cells)
			status = tool_fail(TOOL_USAGE,
				"ops: none of --ops %s runs on --shapes %s: moe takes 30b-a3b-moe, the "
				"others the rest",
				options->ops ? options->ops : "product",
				options->shapes ? options->shapes : "all of them");
	}
	afd__device_free(o.dev, o.cold_owned, o.cold_bytes);
	afd__queue_close(&o.queue);
	afd__device_close(o.dev);
	return status;
}

int bench_ops(int argc, char **argv)
{
	struct ops_options o = { .common = { .stage = { .device = "cpu" }, .seconds = 35 },
		.context = 1024,
		.dtype = AFD_DTYPE_BF16 };
	const struct tool_option options[] = {
		{ "shapes", "NAME,...", "all of them",
			"qwen3-0.6b, qwen3-4b, qwen3-8b; of moe 30b-a3b-moe", tool_set_text,
			&o.shapes, 0, 0 },
		{ "ops", "NAME,...", "product", "product, attend, norm, rope, activation, moe",
			tool_set_text, &o.ops, 0, 0 },
		{ "context", "C", "1024", "positions that attend looks at, 16 to 32768",
			tool_set_u32, &o.context, 16, 32768 },
		{ "dtype", "f32|bf16|f16|fp8", "bf16", "of weights, keys and values", tool_set_dtype,
			&o.dtype, 0, 0 },
		BENCH_OPTIONS(o.common, "35 s"),
		{ 0 },
	};
	struct bench b;
	int status = tool_options_read(options,
		"ops [--shapes NAME,...] [--ops NAME,...] [--json]\n\n"
		"Operations on cold weights, each against the larger of two limits: its bytes at "
		"the\n"
		"rate of DRAM, its multiply-adds at the rate of float32 FMA.",
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
