/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The routed experts of a layer, at 1 to 128 rows. Routing is explicit, uniform, of each row on its
 * own and new in each run, so how many experts are active is known: their bytes are the limit at
 * few rows. The layers together hold at least 1 GiB and take turns, so weights are cold.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "ops.h"

#define N_ROUTINGS 24
#define LAYERS_MIN 2 /* no expert is read in two runs on end */
#define LAYERS_MAX 16

struct run {
	struct bench_ops *o;
	struct afd__experts_args args;
	uint32_t rows_max;
	const int32_t *ids; /* dev [N_ROUTINGS][rows_max][top_k] */
	struct {
		struct afd__matrix gate_up, down;
	} layers[LAYERS_MAX];
	uint32_t n_layers, n_runs;
	double n_active; /* experts of a routing, on average */
};

static int run_moe(void *arg)
{
	struct run *r = arg;
	uint32_t i = r->n_runs++;
	int rc;

	r->args.gate_up = r->layers[i % r->n_layers].gate_up;
	r->args.down = r->layers[i % r->n_layers].down;
	r->args.ids = r->ids + (size_t)(i % N_ROUTINGS) * r->rows_max * r->args.top_k;
	rc = afd__experts(&r->o->queue, &r->args);
	return rc ? rc : bench_finish(r->o);
}

/* ---- what is measured on ---- */

static uint32_t next_random(void)
{
	static uint64_t random = 88172645463325252u;

	random ^= random << 13;
	random ^= random >> 7;
	random ^= random << 17;
	return (uint32_t)(random >> 32);
}

/* By rank with weight (rank + 1)^-1.2; the ranks' order turns from routing to routing. */
static uint32_t draw(const double *sums, uint32_t n_experts, uint32_t turn)
{
	double at = next_random() * 0x1p-32 * sums[n_experts - 1];
	uint32_t rank = 0;

	while (rank + 1 < n_experts && sums[rank] <= at)
		rank++;
	return (rank * 37 + turn * 11) % n_experts;
}

/* Distinct experts of row i of a routing. */
static void choose(const struct bench_ops *o, int32_t *ids, uint32_t i, uint32_t turn,
	const struct bench_model *m)
{
	double sums[1024], sum = 0;

	for (uint32_t e = 0; o->routing == BENCH_POWER_LAW && e < m->n_experts; e++)
		sums[e] = sum += pow(e + 1, -1.2);
	for (uint32_t slot = 0; slot < m->top_k; slot++) {
		uint32_t before = 0, all = i * m->top_k + slot;

		if (o->routing == BENCH_BALANCED)
			ids[slot] = (int32_t)((all * 5 + turn) % m->n_experts);
		else if (o->routing == BENCH_POWER_LAW)
			ids[slot] = (int32_t)draw(sums, m->n_experts, turn);
		else
			ids[slot] = (int32_t)(next_random() % m->n_experts);
		while (before < slot && ids[before] != ids[slot])
			before++;
		slot -= before < slot; /* again */
	}
}

static double count_active(const int32_t *ids, uint32_t n, uint32_t n_experts)
{
	uint32_t n_active = 0;

	for (uint32_t expert = 0; expert < n_experts; expert++) {
		for (uint32_t i = 0; i < n; i++) {
			if (ids[i] == (int32_t)expert) {
				n_active++;
				break;
			}
		}
	}
	return n_active;
}

static int fill(struct bench_ops *o, struct afd__matrix *stack, const void *rows)
{
	static const float ones[64 * 64] = { 1 };
	struct afd__scale_blocks blocks = {
		.data = ones, .n_rows = 64, .n_columns = 64, .dtype = AFD_DTYPE_F32
	};
	int rc = 0;

	for (uint32_t e = 0; !rc && e < stack->n_stack; e++) {
		struct afd__matrix m = afd__matrix_at(stack, e);

		rc = afd__matrix_load(o->dev, &m, rows, 0, m.n);
		if (!rc && m.scales)
			rc = afd__matrix_load_scales(o->dev, &m, &blocks, 0, m.n);
	}
	return rc;
}

static int make_layers(struct run *r, const struct bench_model *m)
{
	const struct afd__matrix_shape gate_up = { .n = 2 * m->intermediate,
		.k = m->hidden,
		.n_stack = m->n_experts,
		.dtype = r->o->dtype };
	const struct afd__matrix_shape down = {
		.n = m->hidden, .k = m->intermediate, .n_stack = m->n_experts, .dtype = r->o->dtype
	};
	const char *rows = r->o->b->ceilings.memory; /* ordinary numbers */
	size_t bytes = 0;
	int rc = 0;

	while (!rc && (bytes < BENCH_COLD_BYTES || r->n_layers < LAYERS_MIN) &&
		r->n_layers < LAYERS_MAX) {
		struct afd__matrix *first = &r->layers[r->n_layers].gate_up,
				   *second = &r->layers[r->n_layers].down;

		r->n_layers++;
		rc = afd__matrix_create_stack(r->o->dev, first, &gate_up, NULL);
		if (!rc)
			rc = afd__matrix_create_stack(r->o->dev, second, &down, NULL);
		if (!rc)
			rc = fill(r->o, first, rows);
		if (!rc)
			rc = fill(r->o, second, rows);
		bytes += first->bytes + second->bytes;
	}
	return rc;
}

static int make_rows(struct run *r, const struct bench_model *m)
{
	size_t n_ids = (size_t)N_ROUTINGS * r->rows_max * m->top_k;
	size_t n_x = (size_t)r->rows_max * m->hidden;
	size_t bytes = (n_ids > n_x ? n_ids : n_x) * 4;
	void *host = malloc(bytes), *x, *y, *ids, *weights;
	int rc;

	if (!host)
		return afd__error(-ENOMEM, "moe: no memory for %zu bytes", bytes);
	for (size_t i = 0; i < n_x; i++)
		((float *)host)[i] = (float)(i % 31) / 32 - 0.45f;
	rc = bench_upload(r->o, n_x * 4, host, &x);
	if (!rc)
		rc = bench_upload(r->o, (size_t)r->rows_max * m->top_k * 4, host, &weights);
	if (!rc)
		rc = bench_upload(r->o, n_x * 4, NULL, &y);
	for (uint32_t i = 0; i < N_ROUTINGS * r->rows_max; i++)
		choose(r->o, (int32_t *)host + (size_t)i * m->top_k, i % r->rows_max,
			i / r->rows_max, m);
	if (!rc)
		rc = bench_upload(r->o, n_ids * 4, host, &ids);
	r->args.n_rows = r->rows_max;
	r->args.scratch_bytes = afd__experts_scratch_bytes(r->o->dev, &r->args);
	if (!rc)
		rc = bench_upload(r->o, r->args.scratch_bytes, NULL, &r->args.scratch);
	free(host);
	if (rc)
		return rc;
	r->args.x = x;
	r->args.y = y;
	r->args.weights = weights;
	r->ids = ids;
	return 0;
}

/* How many experts the first n_rows of a routing need. */
static int average_active(struct run *r, const struct bench_model *m, uint32_t n_rows)
{
	size_t n = (size_t)N_ROUTINGS * r->rows_max * m->top_k;
	int32_t *ids = malloc(n * sizeof *ids);
	uint64_t ticket;
	int rc;

	if (!ids)
		return afd__error(-ENOMEM, "moe: no memory for %zu ids", n);
	rc = afd__queue_download(&r->o->queue, ids, r->ids, n * sizeof *ids);
	if (!rc)
		rc = afd__queue_ticket(&r->o->queue, &ticket);
	if (!rc)
		rc = afd__queue_wait(&r->o->queue, ticket, 0, "the ids of a bench");
	r->n_active = 0;
	for (uint32_t i = 0; !rc && i < N_ROUTINGS; i++)
		r->n_active += count_active(ids + (size_t)i * r->rows_max * m->top_k,
				       n_rows * m->top_k, m->n_experts) /
			       N_ROUTINGS;
	free(ids);
	return rc;
}

/* ---- measuring ---- */

static int measure_cell(struct run *r, const struct bench_model *m)
{
	const struct afd__matrix *gate_up = &r->layers[0].gate_up, *down = &r->layers[0].down;
	static const char *const routings[] = { "uniform", "balanced", "power-law" };
	double expert_bytes = (double)(gate_up->bytes + gate_up->scales_bytes + down->bytes +
				       down->scales_bytes) /
			      m->n_experts;
	struct bench_work work = { .dram_bytes = r->n_active * expert_bytes,
		.flops = 6.0 * r->args.n_rows * m->top_k * m->hidden * m->intermediate };

	return bench_measure(r->o->b, r->o->seconds,
		json_pack("{s:s, s:s, s:s, s:I, s:s, s:I, s:I, s:f, s:f, s:I}", "op", "moe",
			"shape", m->name, "routing", routings[r->o->routing], "rows",
			(json_int_t)r->args.n_rows, "dtype", afd_dtype_name(r->o->dtype), "experts",
			(json_int_t)m->n_experts, "top_k", (json_int_t)m->top_k, "active_experts",
			r->n_active, "active_bytes", work.dram_bytes, "layers",
			(json_int_t)r->n_layers),
		&work, run_moe, r);
}

static int measure(struct bench_ops *o, const struct bench_model *m)
{
	const struct bench_list rows = bench_rows_of(o, &bench_moe);
	struct run r = { .o = o, .args = { .top_k = m->top_k }, .rows_max = bench_list_max(&rows) };
	int status = TOOL_DONE, rc = make_layers(&r, m);

	r.args.gate_up = r.layers[0].gate_up;
	r.args.down = r.layers[0].down;
	if (!rc)
		rc = make_rows(&r, m);
	for (uint32_t i = 0; !rc && i < rows.n && status == TOOL_DONE; i++) {
		rc = average_active(&r, m, rows.at[i]);
		r.args.n_rows = rows.at[i];
		if (!rc)
			status = measure_cell(&r, m);
	}
	if (rc)
		status = bench_fail();
	for (uint32_t i = 0; i < r.n_layers; i++) {
		afd__matrix_destroy(o->dev, &r.layers[i].gate_up);
		afd__matrix_destroy(o->dev, &r.layers[i].down);
	}
	return status;
}

const struct bench_op bench_moe = { "moe", 1, { 1, 8, 32, 128 }, 1, measure };
