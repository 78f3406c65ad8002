/* SPDX-License-Identifier: Apache-2.0 */
/* Running stages by themselves, and rows to a process that does nothing with them; see measure.h.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "measure.h"

enum { SAMPLES = 4096, RUNS_MIN = 5, PROMPT_ROWS = 512, JOIN_MS = 60000 };

static double fail(void)
{
	return -tool_fail(TOOL_FAILED, "%s", afd_last_error());
}

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec * 1e-3;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

/* Runs until the time is used up, at least a few times; negative after an error. */
static double median_of(double seconds, double (*run)(void *arg), void *arg)
{
	double values[SAMPLES], until, us = run(arg);
	int n = 0;

	until = now_us() + seconds * 1e6;
	while (us >= 0 && n < SAMPLES && (n < RUNS_MIN || now_us() < until)) {
		us = run(arg);
		values[n++] = us;
	}
	if (us < 0)
		return us;
	qsort(values, (size_t)n, sizeof values[0], compare);
	return values[n / 2];
}

/* ---- the server ---- */

static int answer(void *user, const struct afd_ffn_pass *pass)
{
	(void)user;
	(void)pass;
	return 0;
}

/* The exchange alone: rows without experts. */
static int exchange_contract(const struct measure *m, struct afd_contract *contract)
{
	afd_context *ctx = NULL;
	afd_model *model = NULL;
	struct afd_contract whole = { .size = sizeof whole };
	int rc = afd_context_create(&ctx, NULL);

	rc = rc ? rc : afd_model_open(&model, ctx, m->stage.model, NULL);
	rc = rc ? rc : afd_model_contract(model, &whole);
	*contract = (struct afd_contract){ .size = sizeof *contract,
		.hidden_size = whole.hidden_size,
		.n_layers = whole.n_layers,
		.dtype = whole.dtype };
	afd_model_close(model);
	afd_context_destroy(ctx);
	return rc;
}

static void serve(const struct measure *m)
{
	const char *address = m->address;
	struct afd_contract contract;
	struct afd_transport_params net_params = {
		.size = sizeof net_params, .listen = &address, .n_listen = 1
	};
	struct afd_ffn_params params = {
		.size = sizeof params, .compute = answer, .weights = { 1, 1 }
	};
	afd_context *ctx = NULL;
	afd_transport *net = NULL;
	afd_ffn *ffn = NULL;
	int rc;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	rc = exchange_contract(m, &contract);
	rc = rc ? rc : afd_context_create(&ctx, NULL);
	rc = rc ? rc : afd_transport_create(&net, ctx, &contract, &net_params);
	rc = rc ? rc : afd_ffn_create(&ffn, NULL, net, &params);
	rc = rc ? rc : afd_ffn_serve(ffn);
	_exit(rc ? TOOL_FAILED : TOOL_DONE);
}

/* ---- life ---- */

int measure_open(struct measure *m)
{
	struct afd_ffn_params params = { .size = sizeof params, .device = m->stage.device };
	int rc;

	snprintf(m->address, sizeof m->address, "shm:afd-plan-%d", (int)getpid());
	m->server = fork();
	if (!m->server)
		serve(m);
	if (m->server < 0)
		return tool_fail(TOOL_FAILED, "fork: %s", strerror(errno));
	if (tool_context_create(&m->ctx, &m->stage, NULL))
		return TOOL_FAILED;
	m->info.size = sizeof m->info;
	rc = afd_model_open(&m->model, m->ctx, m->stage.model, NULL);
	rc = rc ? rc : afd_model_info(m->model, &m->info);
	rc = rc ? rc : afd_ffn_create(&m->ffn, m->model, NULL, &params);
	return rc ? (int)-fail() : TOOL_DONE;
}

void measure_close(struct measure *m)
{
	afd_ffn_destroy(m->ffn);
	afd_model_close(m->model);
	afd_context_destroy(m->ctx);
	if (m->server > 0) {
		kill((pid_t)m->server, SIGKILL);
		waitpid((pid_t)m->server, NULL, 0);
	}
}

/* ---- the FFN ---- */

struct ffn_run {
	struct measure *m;
	struct afd_ffn_rows rows;
};

static double run_ffn(void *arg)
{
	struct ffn_run *run = arg;
	double start = now_us();

	for (uint32_t layer = 0; layer < run->m->info.n_layers; layer++) {
		run->rows.layer = (int32_t)layer;
		if (afd_ffn_forward(run->m->ffn, &run->rows))
			return fail();
	}
	return now_us() - start;
}

/* Small numbers of either sign, in float32: routers spread over experts as they like. */
static float *make_rows(const struct measure *m, uint32_t n_rows)
{
	size_t n = (size_t)n_rows * m->info.hidden_size;
	float *rows = malloc(n * sizeof *rows);
	uint32_t state = 1;

	for (size_t i = 0; rows && i < n; i++) {
		state = state * 1664525u + 1013904223u;
		rows[i] = (float)(int32_t)state * 0x1p-31f;
	}
	return rows;
}

double measure_ffn(struct measure *m, uint32_t n_rows)
{
	float *x = make_rows(m, n_rows), *y = make_rows(m, n_rows);
	struct ffn_run run = { m, { .size = sizeof run.rows, .n_rows = n_rows, .x = x, .y = y } };
	double us = x && y ? median_of(m->seconds, run_ffn, &run)
			   : -tool_fail(TOOL_FAILED, "ffn: no memory for %u rows", n_rows);

	free(x);
	free(y);
	return us;
}

/* ---- attention ---- */

struct attention_run {
	afd_attn *attn;
	struct afd_batch batch;
	uint32_t context;
};

static double run_attention(void *arg)
{
	struct attention_run *run = arg;
	struct afd_attn_stats before = { .size = sizeof before }, after = { .size = sizeof after };
	double start;
	int rc = afd_attn_stats(run->attn, &before);

	start = now_us();
	rc = rc ? rc : afd_attn_step(run->attn, &run->batch, 0);
	start = now_us() - start;
	for (uint32_t s = 0; s < run->batch.n_entries && !rc; s++)
		rc = afd_attn_truncate(run->attn, s, run->context);
	rc = rc ? rc : afd_attn_stats(run->attn, &after);
	return rc ? fail() : start - (double)(after.ffn_ns - before.ffn_ns) * 1e-3;
}

static int fill_context(struct attention_run *run, struct afd_entry *entries, const int32_t *ids)
{
	int rc = 0;

	for (uint32_t s = 0; s < run->batch.n_entries && rc >= 0; s++) {
		rc = afd_attn_add(run->attn, s);
		for (uint32_t at = 0; at < run->context && rc >= 0; at += PROMPT_ROWS) {
			uint32_t left = run->context - at;
			struct afd_entry entry = { .sequence = s,
				.ids = ids,
				.n_ids = left < PROMPT_ROWS ? left : PROMPT_ROWS,
				.outputs = AFD_OUTPUT_NONE };
			struct afd_batch batch = { .size = sizeof batch,
				.entries = &entry,
				.n_entries = 1,
				.entry_bytes = sizeof entry };

			rc = afd_attn_step(run->attn, &batch, 0);
		}
		entries[s] = (struct afd_entry){ .sequence = s, .ids = ids, .n_ids = 1 };
	}
	return rc;
}

double measure_attention(struct measure *m, uint32_t batch, uint32_t context)
{
	uint32_t pages = context / 16 + 2, rows = batch > PROMPT_ROWS ? batch : PROMPT_ROWS;
	struct afd_entry *entries = calloc(batch, sizeof *entries);
	int32_t *greedy = calloc(batch, sizeof *greedy), ids[PROMPT_ROWS];
	struct afd_attn_params params = { .size = sizeof params,
		.device = m->stage.device,
		.ffn = m->ffn,
		.max_sequences = batch,
		.max_rows = rows,
		.page_size = 16,
		.kv_pages = pages * batch,
		.max_positions = context + 1 };
	struct attention_run run = { .context = context,
		.batch = { .size = sizeof run.batch,
			.entries = entries,
			.n_entries = batch,
			.entry_bytes = sizeof *entries,
			.greedy_ids = greedy,
			.greedy_rows = batch } };
	double us = -1;
	int rc = entries && greedy ? afd_attn_create(&run.attn, m->model, NULL, &params) : -ENOMEM;

	for (int i = 0; i < PROMPT_ROWS; i++)
		ids[i] = i % 97 % (int32_t)m->info.vocab_size;
	rc = rc ? rc : fill_context(&run, entries, ids);
	us = rc < 0 ? fail() : median_of(m->seconds, run_attention, &run);
	afd_attn_destroy(run.attn);
	free(entries);
	free(greedy);
	return us;
}

/* ---- the exchange ---- */

struct exchange_run {
	struct measure *m;
	afd_transport *net;
	struct afd_frame frame;
};

static double run_exchange(void *arg)
{
	struct exchange_run *run = arg;
	struct afd_step_params step = { .size = sizeof step, .n_rows = { run->frame.n_rows } };
	double start = now_us();
	int rc = afd_transport_begin(run->net, &step);

	for (uint32_t layer = 0; layer < run->m->info.n_layers && !rc; layer++) {
		run->frame.layer = (int32_t)layer;
		rc = afd_transport_exchange(run->net, &run->frame);
	}
	return rc ? fail() : (now_us() - start) / 2;
}

double measure_exchange(struct measure *m, uint32_t n_rows)
{
	const char *address = m->address;
	struct afd_contract contract;
	struct afd_transport_params params = { .size = sizeof params,
		.connect = &address,
		.n_connect = 1,
		.connect_timeout_ms = JOIN_MS };
	float *x = make_rows(m, n_rows), *y = make_rows(m, n_rows);
	struct exchange_run run = { .m = m,
		.frame = { .size = sizeof run.frame, .n_rows = n_rows, .x = x, .y = y } };
	int rc = x && y ? exchange_contract(m, &contract) : -ENOMEM;
	double us;

	rc = rc ? rc : afd_transport_create(&run.net, m->ctx, &contract, &params);
	rc = rc ? rc : afd_transport_wait(run.net, 0);
	us = rc < 0 ? fail() : median_of(m->seconds, run_exchange, &run);
	afd_transport_destroy(run.net);
	free(x);
	free(y);
	return us;
}
