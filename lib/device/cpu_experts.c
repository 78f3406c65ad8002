/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Routed experts on the CPU (kernels/cpu/experts.h): chunk by chunk, step by step, each step a job
 * over all threads.
 *
 * Invariant: the two products cover the panels of the experts that some row needs, each once per
 * group, and nothing else of the weights is read. They are cut by cost, so a part may be a piece of
 * one expert or several small ones.
 */
#include "../../kernels/cpu/experts.h"
#include "cpu.h"

#define STEP(name) \
	static void run_##name(const struct afd__job *job, uint32_t from, uint32_t to) \
	{ \
		job->kernels->name(job->args, from, to); \
	}
STEP(experts_gather)
STEP(experts_activate)
STEP(experts_combine)

/* Panels panel0 .. panel1-1 of one group. */
static void run_group(const struct afd__job *job, const struct afd_k_expert_group *group,
	bool down, uint32_t panel0, uint32_t panel1)
{
	const struct afd_k_experts *e = job->args;
	float *x = e->x + group->first * e->x_stride,
	      *gate_up = e->gate_up + group->first * e->gate_up_stride;
	struct afd__product_args product = {
		.w = afd__matrix_at(down ? &e->a->down : &e->a->gate_up, group->expert),
		.x = down ? gate_up : x,
		.y = down ? x : gate_up,
		.x_stride = down ? e->gate_up_stride : e->x_stride,
		.y_stride = down ? e->x_stride : e->gate_up_stride,
		.n_rows = group->n_entries };

	afd__product_run(job, &product, panel0, panel1);
}

static void run_products(const struct afd__job *job, bool down, uint32_t from, uint32_t to)
{
	const struct afd_k_experts *e = job->args;
	uint32_t n_panels = afd__product_panels(down ? &e->a->down : &e->a->gate_up);
	struct afd_k_experts_place at = afd_k_experts_cut(e, n_panels, from, job->n_units),
				   end = afd_k_experts_cut(e, n_panels, to, job->n_units);

	for (; at.group < end.group; at.group++, at.panel = 0)
		run_group(job, &e->groups[at.group], down, at.panel, n_panels);
	if (at.panel < end.panel)
		run_group(job, &e->groups[at.group], down, at.panel, end.panel);
}

static void run_gate_up(const struct afd__job *job, uint32_t from, uint32_t to)
{
	run_products(job, false, from, to);
}

static void run_down(const struct afd__job *job, uint32_t from, uint32_t to)
{
	run_products(job, true, from, to);
}

static void products(struct afd__queue *q, const struct afd_k_experts *e,
	const struct afd__matrix *w, void (*run)(const struct afd__job *, uint32_t, uint32_t))
{
	double weights = (double)w->n * w->k;
	struct afd__job job = { .args = e,
		.run = run,
		.n_units = e->n_groups * afd__product_panels(w),
		.kind = AFD__OPERATION_product,
		.cost = weights *
			(e->n_entries + (double)e->n_groups * AFD_K_EXPERTS_WEIGHT) };

	afd__job_run(q, &job);
}

static void run_chunk(struct afd__queue *q, const struct afd_k_experts *e)
{
	struct afd__job gather = { .args = e,
		.run = run_experts_gather,
		.n_units = e->n_entries,
		.kind = AFD__OPERATION_convert,
		.cost = (double)e->n_entries * e->hidden };
	struct afd__job activate = { .args = e,
		.run = run_experts_activate,
		.n_units = e->n_entries,
		.kind = AFD__OPERATION_activation,
		.cost = 4.0 * e->n_entries * e->width };
	struct afd__job combine = { .args = e,
		.run = run_experts_combine,
		.n_units = e->n_rows,
		.kind = AFD__OPERATION_convert,
		.cost = (double)(e->n_entries + e->n_rows) * e->hidden };

	if (e->n_entries) {
		afd__job_run(q, &gather);
		products(q, e, &e->a->gate_up, run_gate_up);
		afd__job_run(q, &activate);
		products(q, e, &e->a->down, run_down);
	}
	afd__job_run(q, &combine);
}

int afd__cpu_experts(struct afd__queue *q, const struct afd__experts_args *a)
{
	uint32_t chunk = afd_k_experts_chunk(a), n;
	struct afd_k_experts e;

	for (uint32_t row = 0; row < a->n_rows; row += n) {
		n = a->n_rows - row < chunk ? a->n_rows - row : chunk;
		afd_k_experts_plan(&e, a, row, n);
		run_chunk(q, &e);
	}
	return 0;
}

size_t afd__cpu_experts_scratch_bytes(
	struct afd__device *dev, const struct afd__experts_args *a, bool least)
{
	uint32_t most = a->top_k < AFD_K_EXPERTS_ENTRIES ? AFD_K_EXPERTS_ENTRIES / a->top_k : 1;

	if (least)
		return afd_k_experts_bytes(a, 1);
	return afd_k_experts_bytes(a, a->n_rows < most ? a->n_rows : most);
}
