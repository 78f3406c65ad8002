/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulation: every slot of every worker and lane, and the pipeline between them. A frame needs
 * no queue of events: lanes take turns, so the end of every stage is a maximum of ends before it
 * plus its own time, and the recursion is exact. Each direction of the link is a stage of its own,
 * which carries one frame at a time. Derived here; docs/planning.md has the recursion. All memory
 * is the caller's scratch.
 */
#include <math.h>
#include <string.h>

#include "plan.h"

enum { ALIGNMENT = 64, MAX_SEEDS = 4096 };
static const double MOST_UPDATES = 1e14;

struct simulation {
	struct afd_plan_params p;
	struct afd_plan_workload w;
	struct afd_plan_simulate_params s;
	struct afd_plan_load load;
	uint32_t lanes, batch;
	uint64_t n_steps;              /* of each lane */
	struct afd__plan_slots *slots; /* [r][lanes] */
	double *attention_end;         /* [r] */
	double *link_end;              /* [r] of the way to the FFN */
	double *arrived;               /* [lanes] when a lane's rows are back */
	double *until;                 /* [n_requests] */
	struct afd__plan_bins bins;
	/* of one seed */
	struct afd__plan_source source;
	double ffn_end, up_end, down_end; /* up_end: the one link of a bundle */
	double busy_a, busy_f, busy_c, load_sum;
	uint64_t n_finished;
};

/* ---- params ---- */

static int read_enum(const char *field, int32_t *value, uint32_t max)
{
	uint32_t whole = *value < 0 ? UINT32_MAX : (uint32_t)*value;
	int rc = afd__plan_whole_or(field, &whole, 1, 1, max);

	*value = (int32_t)whole;
	return rc;
}

static int read_simulate(struct afd_plan_simulate_params *s)
{
	int rc = afd__plan_whole("r", s->r, 1, 65536);

	rc = rc ? rc : afd__plan_whole_or("n_seeds", &s->n_seeds, 8, 1, MAX_SEEDS);
	if (s->n_requests == 0)
		s->n_requests = 3000;
	rc = rc ? rc : afd__plan_whole("n_requests", s->n_requests, 1, 1000000000);
	rc = rc ? rc : read_enum("start", &s->start, AFD_PLAN_EMPTY);
	rc = rc ? rc : read_enum("flow", &s->flow, AFD_PLAN_LOCK_STEP);
	rc = rc ? rc : read_enum("replay", &s->replay, AFD_PLAN_IN_ORDER);
	if (!rc && s->spans && s->span_bytes != sizeof(struct afd_plan_span))
		rc = afd__error(-EINVAL, "plan: span_bytes is %u, limit %zu", s->span_bytes,
			sizeof(struct afd_plan_span));
	return rc;
}

/* Steps of a lane in which a worker's slots end n_requests on average. */
static int count_steps(struct simulation *sim)
{
	double slots = (double)sim->batch * sim->lanes;
	double steps = ceil((double)sim->s.n_requests * sim->load.mean_output / slots);

	steps = fmax(steps, 64);
	if (steps * slots * sim->s.r * sim->s.n_seeds > MOST_UPDATES)
		return afd__error(-EINVAL,
			"plan: %g slot updates in all, limit %g (n_requests %llu, "
			"r %u, n_seeds %u)",
			steps * slots * sim->s.r * sim->s.n_seeds, MOST_UPDATES,
			(unsigned long long)sim->s.n_requests, sim->s.r, sim->s.n_seeds);
	sim->n_steps = (uint64_t)steps;
	return 0;
}

static int read_all(struct simulation *sim, const struct afd_plan_params *params,
	const struct afd_plan_workload *workload, const struct afd_plan_simulate_params *simulate)
{
	int rc = afd__plan_params_read(&sim->p, params);

	rc = rc ? rc : afd__plan_workload_read(&sim->w, workload);
	rc = rc ? rc : afd__params_copy(&sim->s, sizeof(sim->s), simulate, "plan simulate params");
	rc = rc ? rc : read_simulate(&sim->s);
	if (rc)
		return rc;
	if (!sim->w.requests && !sim->w.prompt.kind)
		return afd__error(-EINVAL,
			"plan: theta alone cannot be simulated, laws or requests "
			"are needed");
	if (sim->p.devices)
		return afd__error(
			-ENOTSUP, "plan: devices is %u, a simulation takes 0", sim->p.devices);
	if (sim->p.half_duplex)
		return afd__error(-ENOTSUP, "plan: half_duplex is 1, a simulation takes 0");
	if (sim->p.batch != floor(sim->p.batch))
		return afd__error(-EINVAL, "plan: batch is %g, a simulation needs a whole number",
			sim->p.batch);
	sim->load.size = sizeof(sim->load);
	rc = afd_plan_average(workload, &sim->load);
	if (rc)
		return rc;
	if (!(afd__plan_tau(&sim->p, &sim->load, sim->s.r) > 0))
		return afd__error(-EINVAL, "plan: all times are 0, at least one must not be");
	sim->batch = (uint32_t)sim->p.batch;
	sim->lanes = sim->p.lanes;
	if (!sim->lanes)
		sim->lanes = afd__plan_hiding_lanes(afd__plan_t_a(&sim->p, sim->load.theta),
			afd__plan_t_f(&sim->p, sim->s.r * sim->p.batch),
			afd__plan_t_c(&sim->p, sim->s.r));
	return count_steps(sim);
}

/* ---- scratch ---- */

struct cursor {
	char *base; /* NULL: only counted */
	size_t at;
	bool too_large;
};

static void *take(struct cursor *c, size_t n, size_t bytes)
{
	size_t all, end;
	void *memory = c->base ? c->base + c->at : NULL;

	if (__builtin_mul_overflow(n, bytes, &all) ||
		__builtin_add_overflow(
			c->at, all + (ALIGNMENT - all % ALIGNMENT) % ALIGNMENT, &end))
		c->too_large = true;
	else
		c->at = end;
	return memory;
}

static void lay_out(struct simulation *sim, struct cursor *c)
{
	size_t n_groups = (size_t)sim->s.r * sim->lanes;

	sim->slots = take(c, n_groups, sizeof(*sim->slots));
	sim->attention_end = take(c, sim->s.r, sizeof(double));
	sim->link_end = take(c, sim->s.r, sizeof(double));
	sim->arrived = take(c, sim->lanes, sizeof(double));
	sim->until = take(c, sim->w.n_requests, sizeof(double));
	sim->bins.counts = take(c, AFD__PLAN_BINS, sizeof(uint64_t));
	for (size_t i = 0; i < n_groups; i++) {
		struct afd__plan_slots group = { .n_slots = sim->batch };

		group.left = take(c, sim->batch, sizeof(uint32_t));
		group.prompt = take(c, sim->batch, sizeof(uint32_t));
		group.lifetime = take(c, sim->batch, sizeof(uint32_t));
		group.since = take(c, sim->batch, sizeof(double));
		if (c->base)
			sim->slots[i] = group;
	}
}

size_t afd_plan_simulate_bytes(const struct afd_plan_params *params,
	const struct afd_plan_workload *workload, const struct afd_plan_simulate_params *simulate)
{
	struct simulation sim = { 0 };
	struct cursor c = { 0 };

	if (read_all(&sim, params, workload, simulate))
		return 0;
	lay_out(&sim, &c);
	if (c.too_large) {
		afd__error(-EINVAL, "plan: r %u, lanes %u, batch %u: too large for memory", sim.s.r,
			sim.lanes, sim.batch);
		return 0;
	}
	return c.at;
}

static int use_scratch(struct simulation *sim)
{
	struct cursor c = { 0 };

	lay_out(sim, &c);
	if (!sim->s.scratch || (uintptr_t)sim->s.scratch % ALIGNMENT)
		return afd__error(-EINVAL, "plan: scratch is %p, must be aligned to %d",
			sim->s.scratch, ALIGNMENT);
	if (c.too_large || sim->s.scratch_bytes < c.at)
		return afd__error(-EINVAL, "plan: scratch_bytes is %zu, limit %zu ..",
			sim->s.scratch_bytes, c.at);
	c = (struct cursor){ .base = sim->s.scratch };
	lay_out(sim, &c);
	return 0;
}

/* ---- one seed ---- */

static void begin_seed(struct simulation *sim, uint64_t seed)
{
	bool stationary = sim->s.start == AFD_PLAN_STATIONARY;

	sim->source.in_order = 0;
	sim->ffn_end = sim->up_end = sim->down_end = 0;
	sim->busy_a = sim->busy_f = sim->busy_c = sim->load_sum = 0;
	memset(sim->attention_end, 0, sim->s.r * sizeof(double));
	memset(sim->link_end, 0, sim->s.r * sizeof(double));
	memset(sim->arrived, 0, sim->lanes * sizeof(double));
	for (uint32_t j = 0; j < sim->s.r; j++) {
		for (uint32_t k = 0; k < sim->lanes; k++) {
			struct afd__plan_slots *slots = &sim->slots[(size_t)j * sim->lanes + k];

			/* lanes are at most 64: streams of different ratios are the same ones */
			afd__plan_random_seed(&slots->random, seed, (uint64_t)j * 64 + k);
			afd__plan_slots_fill(slots, &sim->source, stationary);
		}
	}
}

static void note(struct simulation *sim, size_t *n_spans, struct afd_plan_span span)
{
	if (sim->s.spans && *n_spans < sim->s.span_room)
		sim->s.spans[(*n_spans)++] = span;
}

/* Attention of all workers and the way to the FFN; returns when the last rows are there. */
static double run_attention(struct simulation *sim, uint32_t k, uint32_t step, size_t *n_spans)
{
	bool one_link = sim->p.comm_scope == AFD_PLAN_BUNDLE;
	double t_c = afd__plan_t_c(&sim->p, sim->s.r), last = 0;

	for (uint32_t j = 0; j < sim->s.r; j++) {
		double load = sim->slots[(size_t)j * sim->lanes + k].load;
		double t_a = sim->p.alpha_a * load + sim->p.beta_a;
		double start = fmax(sim->attention_end[j], sim->arrived[k]), sent;

		sim->attention_end[j] = start + t_a;
		sim->busy_a += t_a;
		sim->load_sum += load;
		sent = one_link ? sim->attention_end[j]
				: fmax(sim->attention_end[j], sim->link_end[j]) + t_c;
		sim->link_end[j] = sent;
		last = fmax(last, sent);
		note(sim, n_spans,
			(struct afd_plan_span){
				start, start + t_a, AFD_PLAN_ATTENTION, j, k, step });
	}
	if (!one_link)
		return last;
	sim->up_end = fmax(sim->up_end, last) + t_c;
	return sim->up_end;
}

/* One frame of lane k; returns when its rows are back. */
static double run_frame(struct simulation *sim, uint32_t k, uint32_t step, size_t *n_spans)
{
	double ready = run_attention(sim, k, step, n_spans), t_c = afd__plan_t_c(&sim->p, sim->s.r);
	double t_f = afd__plan_t_f(&sim->p, (double)sim->s.r * sim->batch);
	double start = fmax(sim->ffn_end, ready), back;

	sim->ffn_end = start + t_f;
	back = fmax(sim->ffn_end, sim->down_end);
	sim->busy_f += t_f;
	sim->busy_c += t_c;
	sim->down_end = back + t_c;
	sim->arrived[k] = sim->down_end;
	note(sim, n_spans,
		(struct afd_plan_span){ ready - t_c, ready, AFD_PLAN_COMMUNICATION, 0, k, step });
	note(sim, n_spans, (struct afd_plan_span){ start, start + t_f, AFD_PLAN_FFN, 0, k, step });
	note(sim, n_spans,
		(struct afd_plan_span){ back, back + t_c, AFD_PLAN_COMMUNICATION, 1, k, step });
	return sim->arrived[k];
}

/* Where everything moves in step: the frame takes the longest of its terms. */
static double run_lock_step(struct simulation *sim, uint32_t k, double now)
{
	double t_f = afd__plan_t_f(&sim->p, (double)sim->s.r * sim->batch);
	double t_c = afd__plan_t_c(&sim->p, sim->s.r), slowest = 0;
	struct afd__plan_cycle cycle = {
		.floor = fmax(t_f, t_c), .rest = t_f + 2 * t_c, .lanes = sim->p.lanes
	};

	for (uint32_t j = 0; j < sim->s.r; j++) {
		double load = sim->slots[(size_t)j * sim->lanes + k].load;
		double t_a = sim->p.alpha_a * load + sim->p.beta_a;

		sim->busy_a += t_a;
		sim->load_sum += load;
		slowest = fmax(slowest, t_a);
	}
	sim->busy_f += t_f;
	sim->busy_c += t_c;
	return now + afd__plan_cycle_at(&cycle, slowest);
}

/* What one seed gave, over its window. */
struct window {
	double time, tau, busy_a, busy_f, busy_c, load;
};

/* The first frames fill the pipeline and are not counted, but of an empty start, which is the whole
 * story that it tells. */
static struct window run_seed(struct simulation *sim, uint64_t seed, size_t *n_spans)
{
	uint64_t skipped = sim->s.start == AFD_PLAN_EMPTY ? 0 : 8, n_frames = 0;
	double now = 0, from = 0;
	struct window window;

	begin_seed(sim, seed);
	for (uint64_t step = 0; step < sim->n_steps; step++) {
		if (step == skipped) {
			from = now;
			sim->busy_a = sim->busy_f = sim->busy_c = sim->load_sum = 0;
			n_frames = 0;
		}
		for (uint32_t k = 0; k < sim->lanes; k++, n_frames++) {
			now = sim->s.flow == AFD_PLAN_LOCK_STEP
				      ? run_lock_step(sim, k, now)
				      : run_frame(sim, k, (uint32_t)step, n_spans);
			for (uint32_t j = 0; j < sim->s.r; j++)
				sim->n_finished += afd__plan_slots_step(
					&sim->slots[(size_t)j * sim->lanes + k], &sim->source, now,
					&sim->bins);
		}
	}
	window.time = now - from;
	window.tau = window.time / (double)n_frames;
	window.busy_a = sim->busy_a / (sim->s.r * window.time);
	window.busy_f = sim->busy_f / window.time;
	window.busy_c = sim->busy_c / window.time;
	window.load = sim->load_sum / ((double)n_frames * sim->s.r * sim->batch);
	return window;
}

/* ---- all seeds ---- */

/* The 97.5 % quantile of Student's t with n degrees of freedom; beyond 30 a series that is good to
 * three digits. */
static double student(uint32_t n)
{
	static const double table[] = { 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306,
		2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
		2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042 };

	return n <= 30 ? table[n - 1] : 1.95996 + 2.3723 / n;
}

static void run_seeds(struct simulation *sim, struct afd_plan_simulation *out)
{
	double n = sim->s.n_seeds, square = 0;
	size_t n_spans = 0;

	for (uint32_t i = 0; i < sim->s.n_seeds; i++) {
		struct window window = run_seed(sim, sim->s.seed + i, &n_spans);
		double throughput = afd__plan_throughput(&sim->p, sim->s.r, window.tau);
		double before = throughput - out->throughput;

		out->throughput += before / (i + 1);
		square += before * (throughput - out->throughput);
		out->tau += window.tau / n;
		out->theta += window.load / n;
		out->idle_a += fmax(0, 1 - window.busy_a) / n;
		out->idle_f += fmax(0, 1 - window.busy_f) / n;
		out->idle_c += fmax(0, 1 - window.busy_c) / n;
		if (!i)
			out->n_spans = n_spans;
		sim->s.spans = NULL; /* the first seed's only */
	}
	out->ci95 = n > 1 ? student(sim->s.n_seeds - 1) * sqrt(square / (n - 1) / n) : 0;
	out->tpot_p50 = afd__plan_bins_at(&sim->bins, 0.50) * sim->p.layers / sim->p.accept;
	out->tpot_p99 = afd__plan_bins_at(&sim->bins, 0.99) * sim->p.layers / sim->p.accept;
	out->n_slot_updates = sim->n_steps * sim->lanes * sim->batch * sim->s.r * sim->s.n_seeds;
	out->n_finished = sim->n_finished;
}

static void sum_trace(struct simulation *sim)
{
	double sum = 0;

	sim->source = (struct afd__plan_source){ .workload = &sim->w,
		.ordered = sim->s.replay == AFD_PLAN_IN_ORDER };
	if (!sim->w.requests)
		return;
	for (size_t i = 0; i < sim->w.n_requests; i++) {
		sum += afd__plan_request_at(&sim->w, i)->output_tokens;
		sim->until[i] = sum;
	}
	sim->source.until = sim->until;
}

int afd_plan_simulate(const struct afd_plan_params *params,
	const struct afd_plan_workload *workload, const struct afd_plan_simulate_params *simulate,
	struct afd_plan_simulation *out)
{
	struct afd_plan_simulation result = { .size = sizeof(result) };
	struct simulation sim = { 0 };
	int rc = read_all(&sim, params, workload, simulate);

	rc = rc ? rc : use_scratch(&sim);
	if (rc)
		return rc;
	memset(sim.bins.counts, 0, AFD__PLAN_BINS * sizeof(uint64_t));
	sim.bins.low = afd__plan_tau(&sim.p, &sim.load, sim.s.r) * sim.lanes / 64;
	sum_trace(&sim);
	run_seeds(&sim, &result);
	/* Ten times the mean life of what a random step meets, for an error of some per cent. */
	result.short_run =
		sim.s.start == AFD_PLAN_EMPTY && sim.n_steps < 10 * sim.load.biased_output;
	return afd__params_give(out, &result, sizeof(result), "plan simulation");
}
