/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mean load of a slot and its variance, theta and nu2, seen at a random step: renewal-reward
 * over the life of a slot (arXiv 2601.21351, later versions). The request that a random step meets
 * is a long one more often than requests are, so prompt and lifetime enter by their joint moments.
 */
#include <math.h>
#include <string.h>

#include "plan.h"

const struct afd_plan_request *afd__plan_request_at(const struct afd_plan_workload *w, size_t i)
{
	return (const void *)((const char *)w->requests + i * w->request_bytes);
}

uint32_t afd__plan_proportional(const struct afd_plan_law *output, double prompt)
{
	double steps = ceil(output->mean * prompt);

	return steps < 1 ? 1 : steps > output->max ? output->max : (uint32_t)steps;
}

/* ---- checks ---- */

static int read_requests(const struct afd_plan_workload *w)
{
	if (!w->requests)
		return afd__error(
			-EINVAL, "plan: requests is NULL, n_requests is %zu", w->n_requests);
	if (w->request_bytes < sizeof(struct afd_plan_request) || w->request_bytes > 4096)
		return afd__error(-EINVAL, "plan: request_bytes is %u, limit %zu .. 4096",
			w->request_bytes, sizeof(struct afd_plan_request));
	if (w->n_requests > AFD__PLAN_MAX_TOKENS)
		return afd__error(-EINVAL, "plan: n_requests is %zu, limit %u", w->n_requests,
			AFD__PLAN_MAX_TOKENS);
	for (size_t i = 0; i < w->n_requests; i++) {
		const struct afd_plan_request *q = afd__plan_request_at(w, i);

		if (q->prompt_tokens > AFD__PLAN_MAX_TOKENS)
			return afd__error(-EINVAL,
				"plan: request %zu: prompt_tokens is %u, limit %u", i,
				q->prompt_tokens, AFD__PLAN_MAX_TOKENS);
		if (!q->output_tokens || q->output_tokens > AFD__PLAN_MAX_TOKENS)
			return afd__error(-EINVAL,
				"plan: request %zu: output_tokens is %u, limit 1 .. %u", i,
				q->output_tokens, AFD__PLAN_MAX_TOKENS);
	}
	return 0;
}

static int read_laws(struct afd_plan_workload *w)
{
	int rc = afd__plan_law_read(&w->prompt, "prompt");

	if (!rc && w->prompt.kind == AFD_PLAN_PROPORTIONAL)
		rc = afd__error(-EINVAL, "plan: prompt kind is proportional, which is for outputs");
	return rc ? rc : afd__plan_law_read(&w->output, "output");
}

int afd__plan_workload_read(struct afd_plan_workload *out, const struct afd_plan_workload *in)
{
	bool moments, laws, trace;
	int rc = afd__params_copy(out, sizeof(*out), in, "plan workload");

	if (rc)
		return rc;
	moments = out->theta != 0 || out->nu2 != 0;
	laws = out->prompt.kind || out->output.kind;
	trace = out->requests || out->n_requests;
	if (moments + laws + trace > 1)
		return afd__error(-EINVAL,
			"plan: workload: %d of theta, laws and requests are "
			"given, must be one",
			moments + laws + trace);
	if (trace)
		return out->n_requests ? read_requests(out)
				       : afd__error(-EINVAL, "plan: n_requests is 0, limit 1 .. %u",
						 AFD__PLAN_MAX_TOKENS);
	if (laws)
		return read_laws(out);
	rc = afd__plan_real("theta", out->theta, 1e-9, 1e12);
	return rc ? rc : afd__plan_real("nu2", out->nu2, 0, 1e24);
}

int afd__plan_load_read(struct afd_plan_load *out, const struct afd_plan_load *in)
{
	int rc = afd__params_copy(out, sizeof(*out), in, "plan load");

	rc = rc ? rc : afd__plan_real("theta", out->theta, 0, 1e12);
	return rc ? rc : afd__plan_real("nu2", out->nu2, 0, 1e24);
}

/* ---- sums over requests or laws, each with a weight ---- */

struct sums {
	double weight, prompt, output, load, square, biased;
};

/* The same for every law of prompts: p1 and p2 are the prompt's moments at this lifetime. */
static void add(struct sums *s, double weight, double p1, double p2, double d)
{
	double ages = d * (d - 1);

	s->weight += weight;
	s->prompt += weight * p1;
	s->output += weight * d;
	s->load += weight * (d * p1 + ages / 2);
	s->square += weight * (d * p2 + p1 * ages + ages * (2 * d - 1) / 6);
	s->biased += weight * d * d;
}

static void add_trace(struct sums *s, const struct afd_plan_workload *w)
{
	for (size_t i = 0; i < w->n_requests; i++) {
		const struct afd_plan_request *q = afd__plan_request_at(w, i);
		double p = q->prompt_tokens;

		add(s, 1, p, p * p, q->output_tokens);
	}
}

static void add_independent(struct sums *s, const struct afd_plan_workload *w)
{
	struct afd__plan_moments p, d;
	double ages;

	afd__plan_law_moments(&w->prompt, false, &p);
	afd__plan_law_moments(&w->output, true, &d);
	ages = d.m2 - d.m1;
	s->weight = 1;
	s->prompt = p.m1;
	s->output = d.m1;
	s->biased = d.m2;
	s->load = d.m1 * p.m1 + ages / 2;
	s->square = d.m1 * p.m2 + p.m1 * ages + (2 * d.m3 - 3 * d.m2 + d.m1) / 6;
}

/* The lifetime follows from the prompt: a sum over prompts. */
static void add_proportional(struct sums *s, const struct afd_plan_workload *w)
{
	bool up = w->prompt.kind == AFD_PLAN_GEOMETRIC;
	double above = 1;

	for (uint32_t k = 0; k <= w->prompt.max && above > 1e-30; k++) {
		double at = up ? k : k + 0.5, p = k;
		double next = k == w->prompt.max ? 0 : afd__plan_law_above(&w->prompt, at);

		if (above > next)
			add(s, above - next, p, p * p, afd__plan_proportional(&w->output, p));
		above = next;
	}
}

int afd_plan_average(const struct afd_plan_workload *workload, struct afd_plan_load *out)
{
	struct afd_plan_load load = { .size = sizeof(load) };
	struct afd_plan_workload w;
	struct sums s = { 0 };
	int rc = afd__plan_workload_read(&w, workload);

	if (rc)
		return rc;
	if (!w.requests && !w.prompt.kind) {
		load.theta = w.theta;
		load.nu2 = w.nu2;
		return afd__params_give(out, &load, sizeof(load), "plan load");
	}
	if (w.requests)
		add_trace(&s, &w);
	else if (w.output.kind == AFD_PLAN_PROPORTIONAL)
		add_proportional(&s, &w);
	else
		add_independent(&s, &w);
	load.theta = s.load / s.output;
	load.nu2 = fmax(0, s.square / s.output - load.theta * load.theta);
	load.mean_prompt = s.prompt / s.weight;
	load.mean_output = s.output / s.weight;
	load.biased_output = s.biased / s.output;
	return afd__params_give(out, &load, sizeof(load), "plan load");
}
