/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The report: what a layout yields per device, against the best colocation on the same devices.
 * Both sides keep the same memory share and SLO and may choose their batch, so that AFD is never
 * compared with a colocation that was kept small. Derived here; docs/planning.md has the formulas.
 */
#include <math.h>

#include "plan.h"

enum { MAX_DEVICES = 4096, MAX_SLOTS = 65536, MAX_LANES = 4, RATIOS = 64 };

struct report {
	struct afd_plan_report_params p;
	struct afd_plan_model model;
	struct afd_plan_device attention, ffn;
	struct afd__plan_hardware h;
};

/* One choice of slots and lanes, in seconds of a step. */
struct choice {
	double slots, tokens, tau, t_a, t_a_weights, t_f, up, down;
	uint32_t lanes;
	int32_t constraint;
};

/* ---- params ---- */

static int read_model(struct afd_plan_model *m)
{
	int rc = afd__plan_whole("model hidden_size", m->hidden_size, 1, 65536);

	rc = rc ? rc : afd__plan_whole("model n_layers", m->n_layers, 1, 1024);
	rc = rc ? rc : afd__plan_whole("model n_moe_layers", m->n_moe_layers, 0, m->n_layers);
	rc = rc ? rc
		: afd__plan_whole("model intermediate_size", m->intermediate_size,
			  m->n_moe_layers < m->n_layers, 1 << 20);
	rc = rc ? rc : afd__plan_real("model attention_params", m->attention_params, 1, 1e15);
	rc = rc ? rc
		: afd__plan_real("model kv_numbers_per_token", m->kv_numbers_per_token, 0, 1e12);
	rc = rc ? rc
		: afd__plan_real("model attention_flops_per_position",
			  m->attention_flops_per_position, 0, 1e15);
	rc = rc ? rc : afd__plan_real("model sliding_kv_numbers", m->sliding_kv_numbers, 0, 1e12);
	rc = rc ? rc : afd__plan_real("model sliding_flops", m->sliding_flops, 0, 1e15);
	rc = rc ? rc : afd__plan_whole("model vocab_size", m->vocab_size, 0, 1 << 24);
	if (rc || !m->n_moe_layers)
		return rc;
	rc = afd__plan_whole("model n_experts", m->n_experts, 1, 1 << 20);
	rc = rc ? rc : afd__plan_whole("model top_k", m->top_k, 1, m->n_experts);
	return rc ? rc : afd__plan_whole("model expert_size", m->expert_size, 1, 1 << 20);
}

static int read_device(
	struct afd_plan_device *out, const struct afd_plan_device *in, const char *what)
{
	int rc = in ? afd__params_copy(out, sizeof(*out), in, what)
		    : afd__error(-EINVAL, "plan: %s is NULL", what);

	rc = rc ? rc : afd__plan_real("device flops", out->flops, 1, 1e20);
	rc = rc ? rc : afd__plan_real("device hbm_bytes_per_s", out->hbm_bytes_per_s, 1, 1e18);
	rc = rc ? rc : afd__plan_real("device memory_bytes", out->memory_bytes, 1, 1e18);
	rc = rc ? rc
		: afd__plan_real("device scale_up_bytes_per_s", out->scale_up_bytes_per_s, 1, 1e18);
	rc = rc ? rc
		: afd__plan_real(
			  "device scale_out_bytes_per_s", out->scale_out_bytes_per_s, 1, 1e18);
	return rc ? rc
		  : afd__plan_whole_or(
			    "device devices_per_node", &out->devices_per_node, 8, 1, 1024);
}

static int read_times(const struct afd_plan_report_params *p)
{
	int rc = 0;

	if (!p->n_times)
		return 0;
	if (!p->times)
		return afd__error(-EINVAL, "plan: times is NULL, n_times is %zu", p->n_times);
	rc = afd__plan_whole("n_times", p->n_times, 1, 10000000);
	rc = rc ? rc
		: afd__plan_whole("time_bytes", p->time_bytes, sizeof(struct afd_plan_time), 4096);
	for (size_t i = 0; i < p->n_times && !rc; i++) {
		const struct afd_plan_time *t = afd__plan_time_at(p, i);

		rc = afd__plan_real("times rows", t->rows, 1e-9, 1e9);
		rc = rc ? rc : afd__plan_real("times context", t->context, 0, 1e9);
		rc = rc ? rc : afd__plan_real("times us", t->us, 0, 1e12);
	}
	return rc;
}

static int read_numbers(struct afd_plan_report_params *p)
{
	int rc = afd__plan_whole("n_attention", p->n_attention, 1, MAX_DEVICES);

	rc = rc ? rc : afd__plan_whole("n_ffn", p->n_ffn, 1, MAX_DEVICES);
	rc = rc ? rc : afd__plan_whole("lanes", p->lanes, 0, MAX_LANES);
	rc = rc ? rc : afd__plan_whole("slots", p->slots, 0, MAX_SLOTS);
	rc = rc ? rc
		: afd__plan_whole_or(
			  "slots_max", &p->slots_max, p->slots ? p->slots : 256, 1, MAX_SLOTS);
	rc = rc ? rc : afd__plan_real("context", p->context, 1, 1e9);
	rc = rc ? rc : afd__plan_real("nu2", p->nu2, 0, 1e18);
	rc = rc ? rc : afd__plan_real("slo_ms", p->slo_ms, 0, 1e9);
	rc = rc ? rc : afd__plan_real_or("accept", &p->accept, 1, 1, 64);
	rc = rc ? rc : afd__plan_real_or("weight_bytes", &p->weight_bytes, 1, 0.1, 8);
	rc = rc ? rc : afd__plan_real_or("kv_bytes", &p->kv_bytes, 2, 0.1, 8);
	rc = rc ? rc : afd__plan_real_or("row_bytes_up", &p->row_bytes_up, 1, 0.1, 8);
	rc = rc ? rc : afd__plan_real_or("row_bytes_down", &p->row_bytes_down, 2, 0.1, 8);
	rc = rc ? rc : afd__plan_real_or("memory_share", &p->memory_share, 0.9, 0.01, 1);
	rc = rc ? rc : afd__plan_real("latency_us", p->latency_us, 0, 1e9);
	rc = rc ? rc : afd__plan_whole("group_max", p->group_max, 0, MAX_DEVICES);
	return rc ? rc : read_times(p);
}

static int read_all(struct report *r, const struct afd_plan_report_params *params)
{
	int rc = afd__params_copy(&r->p, sizeof(r->p), params, "plan report params");

	if (!rc && !r->p.model)
		rc = afd__error(-EINVAL, "plan: model is NULL");
	rc = rc ? rc : afd__params_copy(&r->model, sizeof(r->model), r->p.model, "plan model");
	rc = rc ? rc : read_model(&r->model);
	rc = rc ? rc : read_device(&r->attention, r->p.attention_device, "attention_device");
	if (!r->p.ffn_device)
		r->ffn = r->attention;
	else
		rc = rc ? rc : read_device(&r->ffn, r->p.ffn_device, "ffn_device");
	rc = rc ? rc : read_numbers(&r->p);
	if (rc)
		return rc;
	r->p.model = &r->model;
	afd__plan_hardware_open(&r->h, &r->p);
	return 0;
}

/* ---- memory ---- */

/* Sequences whose KV fits beside weights, with three standard deviations of their sum. */
static double slots_that_fit(
	const struct report *r, const struct afd_plan_device *d, double weights)
{
	double bytes = r->p.memory_share * d->memory_bytes - weights;
	double each = afd__plan_kv_bytes(&r->h, r->p.context);
	double spread = 3 * sqrt(r->p.nu2) * each / r->p.context, root;

	if (bytes <= 0)
		return 0;
	if (!(each > 0))
		return r->p.slots_max;
	root = (sqrt(spread * spread + 4 * each * bytes) - spread) / (2 * each);
	return floor(root * root * (1 + 1e-12));
}

static bool is_one_node(const struct afd_plan_device *d, uint32_t n)
{
	return n <= d->devices_per_node;
}

static double rate_between(const struct afd_plan_device *d, uint32_t n)
{
	return is_one_node(d, n) ? d->scale_up_bytes_per_s : d->scale_out_bytes_per_s;
}

/* ---- AFD ---- */

static struct afd__plan_cycle cycle_of(const struct choice *c)
{
	return (struct afd__plan_cycle){ .floor = fmax(c->t_f, fmax(c->up, c->down)),
		.rest = c->t_f + c->up + c->down,
		.lanes = c->lanes };
}

static void time_choice(const struct report *r, uint32_t n_attention, struct choice *c)
{
	double batch = c->slots / c->lanes;
	uint32_t n = n_attention + r->p.n_ffn;
	double rate_a = rate_between(&r->attention, n), rate_f = rate_between(&r->ffn, n);
	struct afd__plan_cycle cycle;

	c->t_a = afd__plan_attention_s(&r->h, &r->attention, batch, r->p.context, &c->t_a_weights);
	c->t_f = afd__plan_ffn_s(&r->h, &r->ffn, batch * n_attention, r->p.n_ffn);
	c->up = afd__plan_exchange_s(
		&r->h, batch, n_attention, r->p.n_ffn, r->p.row_bytes_up, rate_a, rate_f);
	c->down = afd__plan_exchange_s(
		&r->h, batch, n_attention, r->p.n_ffn, r->p.row_bytes_down, rate_a, rate_f);
	cycle = cycle_of(c);
	c->tau = afd__plan_cycle_at(&cycle, c->t_a);
	c->tokens = n_attention * batch * r->p.accept / c->tau;
}

static bool keeps_slo(const struct report *r, double step_s)
{
	return !(r->p.slo_ms > 0) || step_s * 1e3 / r->p.accept <= r->p.slo_ms;
}

/* All slots, or coarsely: one in 64, and the most; then within 1.6 % of the best. */
static double next_slots(double slots, double most, bool coarse)
{
	double step = coarse ? 1 + floor(slots / 64) : 1;

	return slots < most && slots + step > most ? most : slots + step;
}

/* The best lanes and slots of n_attention devices; slots 0: none fit. */
static struct choice choose(const struct report *r, uint32_t n_attention, bool coarse)
{
	double fit = slots_that_fit(r, &r->attention, r->h.attention_weights + r->h.embed_weights);
	double most = fmin(fit, r->p.slots ? r->p.slots : r->p.slots_max);
	struct choice best = { .constraint = AFD_PLAN_KV_MEMORY };
	bool missed = false;

	if (r->h.ffn_weights / r->p.n_ffn > r->p.memory_share * r->ffn.memory_bytes) {
		best.constraint = AFD_PLAN_FFN_MEMORY;
		return best;
	}
	if (r->p.slots && fit < r->p.slots)
		return best;
	for (double slots = r->p.slots ? most : 1; slots <= most;
		slots = next_slots(slots, most, coarse)) {
		for (uint32_t lanes = 1; lanes <= MAX_LANES; lanes++) {
			struct choice c = { .slots = slots, .lanes = lanes };

			if ((r->p.lanes && lanes != r->p.lanes) || (slots < lanes && lanes > 1))
				continue;
			time_choice(r, n_attention, &c);
			if (!keeps_slo(r, c.lanes * c.tau))
				missed = true;
			else if (c.tokens > best.tokens * (1 + 1e-9))
				best = c;
		}
	}
	if (missed && best.slots < most)
		best.constraint = AFD_PLAN_SLO;
	else if (most >= (r->p.slots ? r->p.slots : r->p.slots_max))
		best.constraint = AFD_PLAN_FREE;
	else
		best.constraint = AFD_PLAN_KV_MEMORY;
	return best;
}

/* ---- colocation ---- */

struct colocated {
	double per_device, step_s;
	uint32_t slots, group;
};

/* A step of `group` devices with b sequences each: attention each for its own, the FFN together;
 * either one batch, or two halves that hide the exchange. */
static double colocated_step(
	const struct report *r, const struct afd_plan_device *d, double b, uint32_t group)
{
	double away = (group - 1.0) / group, rate = rate_between(d, group), weights;
	double whole = 0, half = 0, moved = 0;

	for (int parts = 1; parts <= 2; parts++) {
		double rows = b / parts, up, down, busy;

		up = afd__plan_exchange_s(&r->h, rows, group, group, r->p.row_bytes_up, rate, rate);
		down = afd__plan_exchange_s(
			&r->h, rows, group, group, r->p.row_bytes_down, rate, rate);
		moved = group > 1 ? away * (up + down) : 0;
		busy = afd__plan_attention_s(&r->h, d, rows, r->p.context, &weights) +
		       afd__plan_ffn_s(&r->h, d, rows * group, group);
		if (parts == 1)
			whole = busy + moved;
		else
			half = fmax(2 * busy, fmax(2 * moved, busy + moved));
	}
	return group > 1 ? fmin(whole, half) : whole;
}

static void colocate_group(const struct report *r, const struct afd_plan_device *d, uint32_t group,
	bool coarse, struct colocated *best)
{
	double weights = r->h.attention_weights + r->h.embed_weights + r->h.ffn_weights / group;
	double most = fmin(slots_that_fit(r, d, weights), r->p.slots_max);

	for (double b = 1; b <= most; b = next_slots(b, most, coarse)) {
		double step = colocated_step(r, d, b, group), rate = b * r->p.accept / step;

		if (keeps_slo(r, step) && rate > best->per_device * (1 + 1e-9))
			*best = (struct colocated){ rate, step, (uint32_t)b, group };
	}
}

/* Groups of powers of two, and all devices of that kind together. */
static struct colocated colocate(
	const struct report *r, const struct afd_plan_device *d, uint32_t n, bool coarse)
{
	uint32_t most = r->p.group_max && r->p.group_max < n ? r->p.group_max : n;
	struct colocated best = { 0 };

	for (uint32_t group = 1; group <= most; group *= 2)
		colocate_group(r, d, group, coarse, &best);
	if (most == n && n & (n - 1))
		colocate_group(r, d, n, coarse, &best);
	return best;
}

/* Per device of a mixed fleet: each kind for itself. */
static struct colocated baseline(const struct report *r, uint32_t n_attention, bool coarse)
{
	uint32_t n_ffn = r->p.n_ffn, n = n_attention + n_ffn;
	struct colocated a, f;

	if (!r->p.ffn_device)
		return colocate(r, &r->attention, n, coarse);
	a = colocate(r, &r->attention, n_attention, coarse);
	f = colocate(r, &r->ffn, n_ffn, coarse);
	a.per_device = (a.per_device * n_attention + f.per_device * n_ffn) / n;
	return a;
}

/* ---- the result ---- */

static double speedup_at(const struct report *r, uint32_t n_attention, double colocated)
{
	struct choice c = choose(r, n_attention, true);

	return colocated > 0 ? c.tokens / (n_attention + r->p.n_ffn) / colocated : 0;
}

/* The best number of attention devices for the FFN that was asked for: all up to 8, then in steps
 * of an eighth, which a curve this flat does not notice. */
static double best_ratio(const struct report *r, uint32_t *n_attention)
{
	double best = 0;
	uint32_t n = 1,
		 most = r->p.n_ffn > MAX_DEVICES / RATIOS ? MAX_DEVICES : RATIOS * r->p.n_ffn;

	*n_attention = 0;
	for (; n <= most; n += 1 + n / 8) {
		double speedup = speedup_at(r, n, baseline(r, n, true).per_device);

		if (speedup > best * (1 + 1e-9)) {
			best = speedup;
			*n_attention = n;
		}
	}
	return best;
}

static void what_if(const struct report *r, struct afd_plan_report *out)
{
	struct report changed = *r;
	uint32_t ignored;

	changed.p.model = &changed.model;
	changed.h.p = &changed.p;
	changed.h.m = &changed.model;
	changed.attention.scale_out_bytes_per_s *= 2;
	changed.attention.scale_up_bytes_per_s *= 2;
	changed.ffn.scale_out_bytes_per_s *= 2;
	changed.ffn.scale_up_bytes_per_s *= 2;
	changed.p.latency_us /= 2;
	out->speedup_network = best_ratio(&changed, &ignored);
	changed.attention = r->attention;
	changed.ffn = r->ffn;
	changed.p.latency_us = r->p.latency_us;
	changed.attention.memory_bytes *= 2;
	out->speedup_memory = best_ratio(&changed, &ignored);
	changed.attention = r->attention;
	changed.p.context *= 4;
	changed.p.nu2 *= 16;
	out->speedup_context = best_ratio(&changed, &ignored);
}

static void fill(const struct report *r, const struct choice *c, struct afd_plan_report *out)
{
	double n = r->p.n_attention + r->p.n_ffn, batch = c->slots / c->lanes, weights, each, sigma;
	struct afd__plan_cycle cycle = cycle_of(c);

	each = afd__plan_attention_s(&r->h, &r->attention, batch, r->p.context + 1, &weights) -
	       c->t_a;
	sigma = sqrt(r->p.nu2 * batch) * fmax(0, each) / batch;
	out->high = out->tokens_per_second = c->tokens;
	out->low = c->tokens * c->tau /
		   fmax(c->tau, afd__plan_cycle_mean(&cycle, c->t_a, sigma, r->p.n_attention));
	out->tokens_per_second_per_device = c->tokens / n;
	out->tpot_ms = c->lanes * c->tau * 1e3 / r->p.accept;
	out->t_a_ms = c->t_a * 1e3;
	out->t_a_weights_ms = fmin(c->t_a, c->t_a_weights) * 1e3;
	out->t_a_kv_ms = out->t_a_ms - out->t_a_weights_ms;
	out->t_f_ms = c->t_f * 1e3;
	out->t_c_ms = fmax(c->up, c->down) * 1e3;
	out->tau_ms = c->tau * 1e3;
	out->idle_a = fmax(0, 1 - c->t_a / c->tau);
	out->idle_f = fmax(0, 1 - c->t_f / c->tau);
	out->slots = (uint32_t)c->slots;
	out->lanes = c->lanes;
	out->bound = c->t_a >= c->tau * (1 - 1e-9)                 ? AFD_PLAN_ATTENTION
		     : c->t_f >= c->tau * (1 - 1e-9)               ? AFD_PLAN_FFN
		     : fmax(c->up, c->down) >= c->tau * (1 - 1e-9) ? AFD_PLAN_COMMUNICATION
								   : AFD_PLAN_LATENCY;
}

static uint32_t measured_of(const struct report *r)
{
	uint32_t bits = 0;

	bits |= afd__plan_timed(&r->p, "attention", r->attention.name, 1, r->p.context) >= 0 ? 1
											     : 0;
	bits |= afd__plan_timed(&r->p, "ffn", r->ffn.name, 1, 0) >= 0 ? 2 : 0;
	bits |= afd__plan_timed(&r->p, "exchange", NULL, 1, 0) >= 0 ? 4 : 0;
	return bits;
}

int afd_plan_report(const struct afd_plan_report_params *params, struct afd_plan_report *out)
{
	struct afd_plan_report result = { .size = sizeof(result) };
	struct report r = { 0 };
	struct colocated base;
	struct choice c;
	int rc = read_all(&r, params);

	if (rc)
		return rc;
	base = baseline(&r, r.p.n_attention, false);
	c = choose(&r, r.p.n_attention, false);
	result.colocated_per_device = base.per_device;
	result.colocated_step_ms = base.step_s * 1e3;
	result.colocated_slots = base.slots;
	result.colocated_group = base.group;
	result.constraint = c.constraint;
	result.measured = measured_of(&r);
	result.feasible = c.slots > 0;
	if (result.feasible)
		fill(&r, &c, &result);
	if (base.per_device > 0)
		result.speedup_per_device = result.tokens_per_second_per_device / base.per_device;
	/* Where nothing else fits, splitting is the only way to run it at all. */
	result.use =
		result.feasible && result.low / (r.p.n_attention + r.p.n_ffn) > base.per_device;
	result.best_speedup = best_ratio(&r, &result.best_attention);
	what_if(&r, &result);
	return afd__params_give(out, &result, sizeof(result), "plan report");
}
