/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The times of the stages and of the cycle at one ratio. The paper's max form (arXiv 2601.21351,
 * equations 15 to 19) is that of lanes 0; with few lanes the sum of all latencies over the lanes is
 * one more term, as in equation 3 of MegaScale-Infer. Called by size.c, and by hosts for a curve.
 */
#include <math.h>

#include "plan.h"

static const double MOST = 1e15; /* of a time or a coefficient */

/* ---- params ---- */

const struct afd_plan_knot *afd__plan_knot_at(const struct afd_plan_params *p, uint32_t i)
{
	return (const void *)((const char *)p->ffn_knots + (size_t)i * p->knot_bytes);
}

static int read_knots(const struct afd_plan_params *p)
{
	double before = 0;
	int rc = 0;

	if (!p->n_ffn_knots)
		return 0;
	if (!p->ffn_knots)
		return afd__error(
			-EINVAL, "plan: ffn_knots is NULL, n_ffn_knots is %u", p->n_ffn_knots);
	rc = afd__plan_whole("n_ffn_knots", p->n_ffn_knots, 2, 4096);
	rc = rc ? rc
		: afd__plan_whole("knot_bytes", p->knot_bytes, sizeof(struct afd_plan_knot), 4096);
	for (uint32_t i = 0; i < p->n_ffn_knots && !rc; i++) {
		const struct afd_plan_knot *knot = afd__plan_knot_at(p, i);

		rc = afd__plan_real("ffn_knots rows", knot->rows, before * (1 + 1e-12), MOST);
		rc = rc ? rc : afd__plan_real("ffn_knots time", knot->time, 0, MOST);
		before = knot->rows;
	}
	return rc;
}

static int read_times(const struct afd_plan_params *p)
{
	const struct {
		const char *field;
		double value;
	} fields[] = {
		{ "alpha_a", p->alpha_a },
		{ "beta_a", p->beta_a },
		{ "alpha_f", p->alpha_f },
		{ "beta_f", p->beta_f },
		{ "alpha_c", p->alpha_c },
		{ "beta_c", p->beta_c },
		{ "ffn_floor", p->ffn_floor },
		{ "tpot_limit", p->tpot_limit },
		{ "kv_bytes_per_token", p->kv_bytes_per_token },
		{ "attention_weight_bytes", p->attention_weight_bytes },
		{ "attention_memory_bytes", p->attention_memory_bytes },
		{ "ffn_row_bytes", p->ffn_row_bytes },
		{ "ffn_weight_bytes", p->ffn_weight_bytes },
		{ "ffn_memory_bytes", p->ffn_memory_bytes },
	};
	int rc = 0;

	for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]) && !rc; i++)
		rc = afd__plan_real(fields[i].field, fields[i].value, 0, MOST);
	return rc ? rc : read_knots(p);
}

static int read_counts(struct afd_plan_params *p)
{
	uint32_t scope = p->comm_scope < 0 ? UINT32_MAX : (uint32_t)p->comm_scope;
	int rc = afd__plan_real("batch", p->batch, 1e-9, 1e7);

	rc = rc ? rc
		: afd__plan_whole_or(
			  "comm_scope", &scope, AFD_PLAN_WORKER, AFD_PLAN_WORKER, AFD_PLAN_BUNDLE);
	rc = rc ? rc : afd__plan_whole("half_duplex", p->half_duplex, 0, 1);
	rc = rc ? rc : afd__plan_whole("lanes", p->lanes, 0, 64);
	rc = rc ? rc : afd__plan_whole_or("layers", &p->layers, 1, 1, 1024);
	rc = rc ? rc : afd__plan_real_or("cost_a", &p->cost_a, 1, 1e-9, 1e9);
	rc = rc ? rc : afd__plan_real_or("cost_f", &p->cost_f, 1, 1e-9, 1e9);
	rc = rc ? rc : afd__plan_whole_or("r_min", &p->r_min, 1, 1, 65536);
	rc = rc ? rc
		: afd__plan_whole_or(
			  "r_max", &p->r_max, p->r_min > 64 ? p->r_min : 64, p->r_min, 65536);
	rc = rc ? rc : afd__plan_whole_or("y_max", &p->y_max, 8, 1, 64);
	rc = rc ? rc : afd__plan_whole("devices", p->devices, 0, 65536);
	rc = rc ? rc : afd__plan_real_or("accept", &p->accept, 1, 1, 64);
	p->comm_scope = (int32_t)scope;
	return rc;
}

int afd__plan_params_read(struct afd_plan_params *out, const struct afd_plan_params *in)
{
	int rc = afd__params_copy(out, sizeof(*out), in, "plan params");

	rc = rc ? rc : read_times(out);
	return rc ? rc : read_counts(out);
}

/* ---- times ---- */

double afd__plan_t_a(const struct afd_plan_params *p, double theta)
{
	return p->alpha_a * p->batch * theta + p->beta_a;
}

static double knots_at(const struct afd_plan_params *p, double rows)
{
	const struct afd_plan_knot *a = afd__plan_knot_at(p, 0), *b;
	uint32_t i = 1;

	if (rows <= a->rows)
		return a->time;
	while (i + 1 < p->n_ffn_knots && rows > afd__plan_knot_at(p, i)->rows)
		i++;
	a = afd__plan_knot_at(p, i - 1);
	b = afd__plan_knot_at(p, i);
	return fmax(0, a->time + (b->time - a->time) * (rows - a->rows) / (b->rows - a->rows));
}

double afd__plan_t_f(const struct afd_plan_params *p, double rows)
{
	if (p->n_ffn_knots)
		return knots_at(p, rows) + p->beta_f;
	return fmax(p->ffn_floor, p->alpha_f * rows) + p->beta_f;
}

double afd__plan_t_c(const struct afd_plan_params *p, double r)
{
	double rows = p->comm_scope == AFD_PLAN_BUNDLE ? r * p->batch : p->batch;

	return p->alpha_c * rows + p->beta_c;
}

/* What does not depend on the slowest worker. */
static struct afd__plan_cycle cycle_of(
	const struct afd_plan_params *p, double t_a, double t_f, double t_c, double r)
{
	struct afd__plan_cycle cycle = { .lanes = p->lanes, .rest = t_f + 2 * t_c };

	cycle.floor = fmax(t_f, p->half_duplex ? 2 * t_c : t_c);
	if (p->devices)
		cycle.floor = fmax(cycle.floor, (r * t_a + t_f) / p->devices);
	return cycle;
}

double afd__plan_tau(const struct afd_plan_params *p, const struct afd_plan_load *load, double r)
{
	double t_a = afd__plan_t_a(p, load->theta), t_f = afd__plan_t_f(p, r * p->batch);
	struct afd__plan_cycle cycle = cycle_of(p, t_a, t_f, afd__plan_t_c(p, r), r);

	return afd__plan_cycle_at(&cycle, t_a);
}

double afd__plan_throughput(const struct afd_plan_params *p, double r, double tau)
{
	return r * p->batch / ((r * p->cost_a + p->cost_f) * tau);
}

uint32_t afd__plan_hiding_lanes(double t_a, double t_f, double t_c)
{
	double longest = fmax(fmax(t_a, t_f), t_c);
	double lanes = longest > 0 ? ceil((t_a + t_f + 2 * t_c) / longest - 1e-9) : 1;

	return lanes < 1 ? 1 : lanes > 4 ? 4 : (uint32_t)lanes;
}

/* Of equal terms the first one is named. */
static int32_t bound_of(const struct afd_plan_params *p, const struct afd_plan_point *at)
{
	double link = p->half_duplex ? 2 * at->t_c : at->t_c;
	const struct {
		double time;
		int32_t bound;
	} terms[] = {
		{ at->t_a, AFD_PLAN_ATTENTION },
		{ at->t_f, AFD_PLAN_FFN },
		{ link, AFD_PLAN_COMMUNICATION },
		{ p->lanes ? (at->t_a + at->t_f + 2 * at->t_c) / p->lanes : 0, AFD_PLAN_LATENCY },
		{ p->devices ? (at->r * at->t_a + at->t_f) / p->devices : 0, AFD_PLAN_DEVICES },
	};
	int best = 0;

	for (int i = 1; i < 5; i++)
		best = terms[i].time > terms[best].time ? i : best;
	return terms[best].bound;
}

void afd__plan_fill(const struct afd_plan_params *p, const struct afd_plan_load *load, double r,
	struct afd_plan_point *point)
{
	struct afd_plan_point at = { .size = sizeof(at), .r = r };
	double sigma = p->alpha_a * sqrt(p->batch * load->nu2);
	struct afd__plan_cycle cycle;

	at.t_a = afd__plan_t_a(p, load->theta);
	at.t_f = afd__plan_t_f(p, r * p->batch);
	at.t_c = afd__plan_t_c(p, r);
	cycle = cycle_of(p, at.t_a, at.t_f, at.t_c, r);
	at.tau_mean_field = afd__plan_cycle_at(&cycle, at.t_a);
	at.tau_gaussian =
		fmax(at.tau_mean_field, afd__plan_cycle_mean(&cycle, at.t_a, sigma, fmax(1, r)));
	at.throughput_mean_field = afd__plan_throughput(p, r, at.tau_mean_field);
	at.throughput_gaussian = afd__plan_throughput(p, r, at.tau_gaussian);
	at.idle_a = fmax(0, 1 - at.t_a / at.tau_mean_field);
	at.idle_f = fmax(0, 1 - at.t_f / at.tau_mean_field);
	at.lanes = p->lanes ? p->lanes : afd__plan_hiding_lanes(at.t_a, at.t_f, at.t_c);
	at.tpot = p->layers * at.lanes * at.tau_mean_field / p->accept;
	at.bound = bound_of(p, &at);
	*point = at;
}

int afd_plan_evaluate(const struct afd_plan_params *params, const struct afd_plan_load *load,
	double r, struct afd_plan_point *out)
{
	struct afd_plan_point point;
	struct afd_plan_params p;
	struct afd_plan_load l;
	int rc = afd__plan_params_read(&p, params);

	rc = rc ? rc : afd__plan_load_read(&l, load);
	rc = rc ? rc : afd__plan_real("r", r, 1e-6, 65536);
	if (rc)
		return rc;
	if (!(afd__plan_tau(&p, &l, r) > 0))
		return afd__error(
			-EINVAL, "plan: all times are 0 at r %g, at least one must not be", r);
	afd__plan_fill(&p, &l, r, &point);
	return afd__params_give(out, &point, sizeof(point), "plan point");
}
