/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The best ratio. Throughput per cost is r B / ((r cost_a + cost_f) tau(r)), and tau is a maximum
 * of functions that are affine in r between the kinks of the FFN. So the optimum lies at an end, at
 * a kink, where two of them cross, or at the peak of one, sqrt(b cost_f / (a cost_a)): all are
 * tried. For one line per stage this is Theorem 4.4 of arXiv 2601.21351 (r = max{r_A, r_C,
 * r_peak}); limits, lanes and pieces are ours.
 */
#include <math.h>

#include "plan.h"

enum { TERMS = 5 };

struct affine {
	double slope, start; /* slope r + start */
};

struct search {
	const struct afd_plan_params *p;
	const struct afd_plan_load *load;
	double low, high; /* ratios that may be tried */
	double r, value;  /* the best so far; of equal ones the smaller ratio */
	bool gaussian;
};

static double value_at(const struct search *s, double r)
{
	struct afd_plan_point point;

	if (!s->gaussian)
		return afd__plan_throughput(s->p, r, afd__plan_tau(s->p, s->load, r));
	afd__plan_fill(s->p, s->load, r, &point);
	return point.throughput_gaussian;
}

static void try_ratio(struct search *s, double r)
{
	double value;

	if (!(r >= s->low && r <= s->high))
		return;
	value = value_at(s, r);
	if (value > s->value * (1 + 1e-12) || (value >= s->value * (1 - 1e-12) && r < s->r)) {
		s->value = fmax(value, s->value);
		s->r = r;
	}
}

/* ---- the continuous optimum ---- */

/* The FFN's time between two of its kinks. */
static struct affine ffn_between(const struct search *s, double from, double to)
{
	double a = afd__plan_t_f(s->p, from * s->p->batch),
	       b = afd__plan_t_f(s->p, to * s->p->batch);
	double slope = (b - a) / (to - from);

	return (struct affine){ slope, a - slope * from };
}

static void try_between(struct search *s, double from, double to)
{
	const struct afd_plan_params *p = s->p;
	struct affine f = ffn_between(s, from, to);
	struct affine c = { p->comm_scope == AFD_PLAN_BUNDLE ? p->alpha_c * p->batch : 0,
		p->comm_scope == AFD_PLAN_BUNDLE ? p->beta_c : afd__plan_t_c(p, 1) };
	double t_a = afd__plan_t_a(p, s->load->theta), m = p->lanes ? p->lanes : 1;
	double d = p->devices ? p->devices : 1, link = p->half_duplex ? 2 : 1;
	struct affine terms[TERMS] = {
		{ 0, t_a },
		f,
		{ link * c.slope, link * c.start },
		{ p->lanes ? (f.slope + 2 * c.slope) / m : 0,
			p->lanes ? (t_a + f.start + 2 * c.start) / m : 0 },
		{ p->devices ? (t_a + f.slope) / d : 0, p->devices ? f.start / d : 0 },
	};

	try_ratio(s, from);
	try_ratio(s, to);
	for (int i = 0; i < TERMS; i++) {
		double peak = sqrt(terms[i].start * p->cost_f / (terms[i].slope * p->cost_a));

		if (terms[i].slope > 0 && terms[i].start > 0 && peak > from && peak < to)
			try_ratio(s, peak);
		for (int j = 0; j < i; j++) {
			double r = (terms[j].start - terms[i].start) /
				   (terms[i].slope - terms[j].slope);

			if (terms[i].slope != terms[j].slope && r > from && r < to)
				try_ratio(s, r);
		}
	}
}

/* The kinks of the FFN as ratios, in order; i beyond the last gives infinity. */
static double kink(const struct afd_plan_params *p, uint32_t i)
{
	if (p->n_ffn_knots)
		return i < p->n_ffn_knots ? afd__plan_knot_at(p, i)->rows / p->batch : INFINITY;
	if (i || !(p->ffn_floor > 0) || !(p->alpha_f > 0))
		return INFINITY;
	return p->ffn_floor / (p->alpha_f * p->batch);
}

static void search_continuous(struct search *s)
{
	double from = s->low, to;

	for (uint32_t i = 0; from < s->high; i++) {
		to = fmin(kink(s->p, i), s->high);
		if (to <= from)
			continue;
		try_between(s, from, to);
		from = to;
	}
	try_ratio(s, s->high);
}

/* ---- limits ---- */

static bool keeps_slo(const struct afd_plan_params *p, const struct afd_plan_load *load, double r)
{
	double t_a = afd__plan_t_a(p, load->theta), t_f = afd__plan_t_f(p, r * p->batch);
	double lanes = p->lanes ? p->lanes : afd__plan_hiding_lanes(t_a, t_f, afd__plan_t_c(p, r));

	return !(p->tpot_limit > 0) || p->layers * lanes * afd__plan_tau(p, load, r) / p->accept <=
					       p->tpot_limit * (1 + 1e-12);
}

/* The largest ratio up to high that keeps the SLO; 0 when low does not. Times grow with r. */
static double slo_limit(
	const struct afd_plan_params *p, const struct afd_plan_load *load, double low, double high)
{
	if (keeps_slo(p, load, high))
		return high;
	if (!keeps_slo(p, load, low))
		return 0;
	for (int i = 0; i < 200 && high - low > 1e-12 * high; i++) {
		double middle = (low + high) / 2;

		if (keeps_slo(p, load, middle))
			low = middle;
		else
			high = middle;
	}
	return low;
}

static double lanes_held(const struct afd_plan_params *p)
{
	return p->lanes ? p->lanes : 1;
}

static double memory_limit(const struct afd_plan_params *p)
{
	double row_bytes = p->ffn_row_bytes * p->batch;

	if (!(p->ffn_memory_bytes > 0))
		return HUGE_VAL;
	if (p->ffn_weight_bytes > p->ffn_memory_bytes)
		return 0;
	return row_bytes > 0 ? (p->ffn_memory_bytes - p->ffn_weight_bytes) / row_bytes : HUGE_VAL;
}

/* Slots of a worker whose KV fits, with three standard deviations of their sum: n theta + 3 sqrt(n
 * nu2) tokens, a square in sqrt(n). 0: no limit. */
static double batch_limit(const struct afd_plan_params *p, const struct afd_plan_load *load)
{
	double tokens, spread = 3 * sqrt(load->nu2), root;

	if (!(p->attention_memory_bytes > 0) || !(p->kv_bytes_per_token > 0) || !(load->theta > 0))
		return 0;
	tokens = (p->attention_memory_bytes - p->attention_weight_bytes) / p->kv_bytes_per_token;
	if (tokens <= 0)
		return 1e-300;
	root = (sqrt(spread * spread + 4 * load->theta * tokens) - spread) / (2 * load->theta);
	return root * root / lanes_held(p);
}

/* ---- the result ---- */

static void paper_terms(const struct search *s, struct afd_plan_sizing *out)
{
	const struct afd_plan_params *p = s->p;
	double rows = p->alpha_f * p->batch, t_c = afd__plan_t_c(p, 1);

	out->r_attention = out->r_communication = out->r_peak = HUGE_VAL;
	if (!(rows > 0))
		return;
	out->r_attention = (afd__plan_t_a(p, s->load->theta) - p->beta_f) / rows;
	out->r_peak = sqrt(p->beta_f * p->cost_f / (rows * p->cost_a));
	if (p->comm_scope == AFD_PLAN_WORKER)
		out->r_communication = (t_c - p->beta_f) / rows;
	else if (p->alpha_c > 0)
		out->r_communication =
			(afd__plan_t_a(p, s->load->theta) - p->beta_c) / (p->alpha_c * p->batch);
}

/* The integers beside the optimum are not enough where pieces make several hills: all are tried. */
static uint32_t best_whole(struct search s, uint32_t r_min, double limit)
{
	s.value = -1;
	s.r = 0;
	s.low = r_min;
	s.high = limit;
	for (uint32_t r = r_min; r <= limit; r++)
		try_ratio(&s, r);
	return (uint32_t)s.r;
}

/* One more FFN must earn half a per cent: a bundle is harder to run than its share of a ratio. */
static void best_bundle(struct search s, double limit, struct afd_plan_sizing *out)
{
	double best = -1;

	for (uint32_t y = 1; y <= s.p->y_max; y++) {
		for (double x = 1; x <= floor(limit * y * (1 + 1e-12)); x++) {
			double value = value_at(&s, x / y);

			if (x > 1 && x > out->r_continuous * y + 2)
				break;
			if (value <= best * 1.005)
				continue;
			best = value;
			out->x = (uint32_t)x;
			out->y = y;
		}
	}
}

static int32_t constraint_of(
	const struct search *s, const struct afd_plan_sizing *out, double memory)
{
	const struct afd_plan_params *p = s->p;

	if (out->batch_limit > 0 && out->batch_limit < p->batch)
		return AFD_PLAN_KV_MEMORY;
	if (out->r_limit < p->r_max && (out->r_continuous >= out->r_limit * (1 - 1e-9) || !out->r))
		return memory <= out->r_limit * (1 + 1e-9) ? AFD_PLAN_FFN_MEMORY : AFD_PLAN_SLO;
	if (out->r_continuous >= p->r_max * (1 - 1e-12) || out->r_continuous < p->r_min)
		return AFD_PLAN_RANGE;
	return AFD_PLAN_FREE;
}

static void find(struct search *s, struct afd_plan_sizing *out)
{
	const struct afd_plan_params *p = s->p;
	double memory = memory_limit(p), lowest = 1.0 / p->y_max;
	struct search mean = *s, gaussian = *s;

	out->batch_limit = batch_limit(p, s->load);
	out->r_limit = fmin(memory, slo_limit(p, s->load, lowest, p->r_max));
	out->r_limit = out->r_limit < lowest ? 0 : fmin(out->r_limit, p->r_max);
	mean.low = lowest;
	mean.high = out->r_limit;
	mean.value = -1;
	if (out->r_limit > 0 && !(out->batch_limit > 0 && out->batch_limit < p->batch)) {
		search_continuous(&mean);
		out->r_continuous = mean.r;
		out->throughput_continuous = mean.value;
		out->r = best_whole(mean, p->r_min, out->r_limit);
		gaussian.gaussian = true;
		out->r_gaussian = best_whole(gaussian, p->r_min, out->r_limit);
		best_bundle(mean, out->r_limit, out);
	}
	out->ffn_limited = out->r_continuous > 0 && out->r_continuous < 1;
	out->constraint = constraint_of(s, out, memory);
}

int afd_plan_size(const struct afd_plan_params *params, const struct afd_plan_load *load,
	struct afd_plan_sizing *out)
{
	struct afd_plan_sizing sizing = { .size = sizeof(sizing) };
	struct afd_plan_point point;
	struct afd_plan_params p;
	struct afd_plan_load l;
	struct search s = { .p = &p, .load = &l };
	int rc = afd__plan_params_read(&p, params);

	rc = rc ? rc : afd__plan_load_read(&l, load);
	if (rc)
		return rc;
	if (!(afd__plan_tau(&p, &l, p.r_max) > 0))
		return afd__error(-EINVAL, "plan: all times are 0, at least one must not be");
	find(&s, &sizing);
	paper_terms(&s, &sizing);
	afd__plan_fill(
		&p, &l, sizing.r ? sizing.r : fmax(sizing.r_continuous, 1.0 / p.y_max), &point);
	sizing.bound = point.bound;
	sizing.heavy_tail = l.nu2 > 4 * l.theta * l.theta && p.batch * lanes_held(&p) < 500;
	return afd__params_give(out, &sizing, sizeof(sizing), "plan sizing");
}
