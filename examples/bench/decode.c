/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `decode`: whole decode steps of a checkpoint, in one process and as one attention and
 * one FFN process over shm:, against the bytes of weights and KV cache that a step must read. The
 * context stays as long as asked: what a step appends is truncated before the next. Only the public
 * API runs here; the ceilings are the bench's.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

struct decode_options {
	struct bench_options common;
	uint32_t batch, context;
};

struct decode {
	struct bench *b;
	const struct decode_options *options;
	afd_model *model;
	afd_transport *net;
	afd_ffn *ffn;
	afd_attn *attn;
	struct afd_model_info info;
	struct afd_entry *entries; /* [batch] */
	int32_t *ids;              /* [context]: a prompt, then the tokens of a step */
	int32_t *greedy;           /* [batch] */
};

enum { PROMPT_ROWS = 512, JOIN_MS = 120000 };

/* ---- the FFN process ---- */

/* Lives as long as its parent, which it answers at `address`. */
static void serve(const struct tool_stage *stage, const char *address)
{
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params params = {
		.size = sizeof params, .listen = &address, .n_listen = 1
	};
	struct afd_ffn_params stage_params = { .size = sizeof stage_params,
		.device = stage->device };
	afd_context *ctx = NULL;
	afd_model *model = NULL;
	afd_transport *net = NULL;
	afd_ffn *ffn = NULL;
	int rc;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (tool_context_create(&ctx, stage, NULL))
		_exit(TOOL_FAILED);
	rc = afd_model_open(&model, ctx, stage->model, NULL);
	rc = rc ? rc : afd_model_contract(model, &contract);
	rc = rc ? rc : afd_transport_create(&net, ctx, &contract, &params);
	rc = rc ? rc : afd_ffn_create(&ffn, model, net, &stage_params);
	rc = rc ? rc : afd_ffn_serve(ffn);
	_exit(rc ? bench_fail() : TOOL_DONE);
}

/* Before the bench has threads. */
static pid_t start_server(const struct tool_stage *stage, const char *address)
{
	pid_t pid = fork();

	if (!pid)
		serve(stage, address);
	return pid;
}

static void end_server(pid_t pid)
{
	if (pid <= 0)
		return;
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

/* ---- the attention process ---- */

static int connect_ffn(struct decode *d, const char *address)
{
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params params = {
		.size = sizeof params,
		.connect = &address,
		.n_connect = 1,
		.connect_timeout_ms = JOIN_MS,
	};
	int rc = afd_model_contract(d->model, &contract);

	rc = rc ? rc : afd_transport_create(&d->net, d->b->ctx, &contract, &params);
	return rc ? rc : afd_transport_wait(d->net, 0);
}

/* Sequences of `context` positions, whose next token is in `entries`. */
static int fill_context(struct decode *d)
{
	const struct decode_options *o = d->options;
	int rc = 0;

	for (uint32_t s = 0; s < o->batch && rc >= 0; s++) {
		rc = afd_attn_add(d->attn, s);
		for (uint32_t at = 0; at < o->context && rc >= 0; at += PROMPT_ROWS) {
			uint32_t n_ids =
				o->context - at < PROMPT_ROWS ? o->context - at : PROMPT_ROWS;
			struct afd_entry entry = { .sequence = s,
				.ids = d->ids + at,
				.n_ids = n_ids,
				.outputs = AFD_OUTPUT_NONE };
			struct afd_batch batch = { .size = sizeof batch,
				.entries = &entry,
				.n_entries = 1,
				.entry_bytes = sizeof entry };

			rc = afd_attn_step(d->attn, &batch, 0);
		}
		d->entries[s] = (struct afd_entry){ .sequence = s, .ids = d->ids, .n_ids = 1 };
	}
	return rc < 0 ? rc : 0;
}

static int make_stages(struct decode *d, const char *address)
{
	const struct decode_options *o = d->options;
	const uint32_t page_size = 16, pages = (o->context + page_size) / page_size;
	struct afd_ffn_params ffn = { .size = sizeof ffn, .device = o->common.stage.device };
	struct afd_attn_params attn = {
		.size = sizeof attn,
		.device = o->common.stage.device,
		.max_sequences = o->batch,
		.max_rows = o->batch > PROMPT_ROWS ? o->batch : PROMPT_ROWS,
		.page_size = page_size,
		.kv_pages = pages * o->batch,
		.max_positions = o->context + 1,
	};
	int rc = afd_model_open(&d->model, d->b->ctx, o->common.stage.model, NULL);

	rc = rc ? rc : afd_model_info(d->model, &d->info);
	if (!rc)
		rc = address ? connect_ffn(d, address)
			     : afd_ffn_create(&d->ffn, d->model, NULL, &ffn);
	attn.ffn = d->ffn;
	rc = rc < 0 ? rc : afd_attn_create(&d->attn, d->model, d->net, &attn);
	return rc ? rc : fill_context(d);
}

static void end_stages(struct decode *d)
{
	afd_attn_destroy(d->attn);
	afd_ffn_destroy(d->ffn);
	afd_transport_destroy(d->net);
	afd_model_close(d->model);
	d->attn = NULL;
	d->ffn = NULL;
	d->net = NULL;
	d->model = NULL;
}

static int run_step(void *arg)
{
	struct decode *d = arg;
	struct afd_batch batch = {
		.size = sizeof batch,
		.entries = d->entries,
		.n_entries = d->options->batch,
		.entry_bytes = sizeof *d->entries,
		.greedy_ids = d->greedy,
		.greedy_rows = d->options->batch,
	};
	int rc = afd_attn_step(d->attn, &batch, 0);

	for (uint32_t s = 0; s < d->options->batch && rc >= 0; s++)
		rc = afd_attn_truncate(d->attn, s, d->options->context);
	return rc;
}

/* ---- the table ---- */

/* Every weight once, but of an embedding that is not the head too only the rows of the batch; K and
 * V of every position. */
static int count_work(const struct decode *d, struct bench_work *work)
{
	struct afd_role_info attention = { .size = sizeof attention }, ffn = { .size = sizeof ffn };
	const struct afd_model_info *m = &d->info;
	uint64_t embed_bytes = (uint64_t)m->vocab_size * m->hidden_size * afd_dtype_bytes(m->dtype);
	uint32_t batch = d->options->batch, context = d->options->context;
	int rc = afd_model_role(d->model, AFD_ROLE_ATTENTION, &attention);
	uint64_t weight_bytes;

	rc = rc ? rc : afd_model_role(d->model, AFD_ROLE_FFN, &ffn);
	if (rc)
		return rc;
	weight_bytes = attention.bytes + ffn.bytes - (m->tied_head ? 0 : embed_bytes);
	work->dram_bytes = (double)weight_bytes + (double)m->kv_bytes_per_token * batch * context;
	/* A weight is one multiply-add per row; scores and values are two per query head and
	 * position. */
	work->flops = 2.0 * weight_bytes / afd_dtype_bytes(m->dtype) * batch +
		      4.0 * m->n_layers * m->n_heads * m->head_dim * context * batch;
	return 0;
}

static int measure_layout(struct decode *d, const char *layout, const char *address)
{
	const struct decode_options *o = d->options;
	struct bench_work work;
	char shape[64];
	int status, rc = make_stages(d, address);

	rc = rc ? rc : count_work(d, &work);
	if (rc < 0) {
		status = bench_fail();
	} else {
		snprintf(shape, sizeof shape, "%s, context %u", layout, o->context);
		status = bench_measure(d->b, o->common.seconds / 2,
			json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:s, s:f}", "op", "decode",
				"shape", shape, "layout", layout, "rows", (json_int_t)o->batch,
				"batch", (json_int_t)o->batch, "context", (json_int_t)o->context,
				"dtype", afd_dtype_name(d->info.dtype), "bytes", work.dram_bytes),
			&work, run_step, d);
	}
	end_stages(d);
	return status;
}

static int measure_both(struct bench *b, const struct decode_options *o, const char *address)
{
	struct decode d = { .b = b, .options = o, .info = { .size = sizeof d.info } };
	int status;

	d.entries = calloc(o->batch, sizeof *d.entries);
	d.ids = calloc(o->context, sizeof *d.ids);
	d.greedy = calloc(o->batch, sizeof *d.greedy);
	if (!d.entries || !d.ids || !d.greedy) {
		status = tool_fail(TOOL_FAILED,
			"decode: no memory for %u sequences of %u positions", o->batch, o->context);
	} else {
		for (uint32_t i = 0; i < o->context; i++)
			d.ids[i] = (int32_t)(i % 97);
		status = measure_layout(&d, "one process", NULL);
		if (status == TOOL_DONE)
			status = measure_layout(&d, "1A:1F shm", address);
	}
	free(d.entries);
	free(d.ids);
	free(d.greedy);
	return status;
}

int bench_decode(int argc, char **argv)
{
	struct decode_options o = { .common = { .stage = { .device = "cpu" }, .seconds = 20 },
		.batch = 1,
		.context = 128 };
	const struct tool_option options[] = {
		TOOL_OPTION_MODEL(o.common.stage),
		{ "batch", "B", "1", "sequences, one row each, 1 to 4096", tool_set_u32, &o.batch,
			1, 4096 },
		{ "context", "C", "128", "positions in the KV cache of each, 1 to 1048576",
			tool_set_u32, &o.context, 1, 1048576 },
		BENCH_OPTIONS(o.common, "20 s"),
		{ 0 },
	};
	char address[64];
	struct bench b;
	pid_t server;
	int status = tool_options_read(options,
		"decode --model DIR [--batch B] [--context C] [--json]\n\n"
		"Decode steps in one process, and as 1A:1F over shm:, each against the bytes that "
		"a step\n"
		"must read at the rate of DRAM. Both processes of 1A:1F have the same number of "
		"threads.",
		argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	if (!o.common.stage.model)
		return tool_fail(TOOL_USAGE, "--model is missing");
	snprintf(address, sizeof address, "shm:afd-bench-%d", (int)getpid());
	server = start_server(&o.common.stage, address);
	if (server < 0)
		return tool_fail(TOOL_FAILED, "fork: %s", strerror(errno));
	status = bench_open(&b, &o.common);
	if (status == TOOL_DONE)
		status = measure_both(&b, &o, address);
	status = bench_close(&b, status);
	end_server(server);
	return status;
}
