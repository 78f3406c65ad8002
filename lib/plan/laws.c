/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Laws of whole numbers and their first three moments. A law is continuous; a draw is rounded and
 * cut, and the moments here are those of the rounded draw, summed from P(N > k): so the closed
 * forms and the simulator mean the same law.
 */
#include <math.h>
#include <stdio.h>

#include "plan.h"

void afd__plan_lognormal(const struct afd_plan_law *law, double *mu, double *sigma)
{
	*sigma = sqrt(log1p(law->shape * law->shape));
	*mu = log(law->mean) - *sigma * *sigma / 2;
}

/* Of the kind alone: what its mean and shape may be. */
static int read_shape(const struct afd_plan_law *law, const char *what, double least_mean)
{
	char field[64];

	snprintf(field, sizeof(field), "%s shape", what);
	switch (law->kind) {
	case AFD_PLAN_LOGNORMAL:
		return afd__plan_real(field, law->shape, 1e-6, 100);
	case AFD_PLAN_PARETO:
		return afd__plan_real(field, law->shape, 1.00001, 1000);
	case AFD_PLAN_UNIFORM:
		return afd__plan_real(field, law->shape, least_mean, law->mean);
	default:
		return law->shape == 0 ? 0 : afd__plan_real(field, law->shape, 0, 0);
	}
}

int afd__plan_law_read(struct afd_plan_law *law, const char *what)
{
	double least = law->kind == AFD_PLAN_GEOMETRIC ? 1 : 0;
	char field[64];
	int rc;

	if (law->kind < AFD_PLAN_CONSTANT || law->kind > AFD_PLAN_PROPORTIONAL)
		return afd__error(-EINVAL, "plan: %s kind is %d, limit %d .. %d", what, law->kind,
			AFD_PLAN_CONSTANT, AFD_PLAN_PROPORTIONAL);
	snprintf(field, sizeof(field), "%s mean", what);
	if (law->kind != AFD_PLAN_CONSTANT && law->kind != AFD_PLAN_GEOMETRIC)
		least = 1e-9;
	rc = afd__plan_real(field, law->mean, least, AFD__PLAN_MAX_TOKENS);
	if (!rc)
		rc = read_shape(law, what, 0);
	snprintf(field, sizeof(field), "%s max", what);
	if (!rc)
		rc = afd__plan_whole_or(
			field, &law->max, AFD__PLAN_MAX_DRAW, 1, AFD__PLAN_MAX_TOKENS);
	if (!rc && law->mean > law->max)
		rc = afd__error(-EINVAL, "plan: %s mean is %g, limit 0 .. %u (its max)", what,
			law->mean, law->max);
	return rc;
}

static double lognormal_above(const struct afd_plan_law *law, double x)
{
	double mu, sigma;

	if (x <= 0)
		return 1;
	afd__plan_lognormal(law, &mu, &sigma);
	return 0.5 * erfc((log(x) - mu) / (sigma * M_SQRT2));
}

static double pareto_above(const struct afd_plan_law *law, double x)
{
	double least = law->mean * (law->shape - 1) / law->shape;

	return x <= least ? 1 : pow(least / x, law->shape);
}

static double uniform_above(const struct afd_plan_law *law, double x)
{
	double width = 2 * (law->mean - law->shape);

	if (x < law->shape)
		return 1;
	if (x >= law->shape + width)
		return 0;
	return 1 - (x - law->shape) / width;
}

double afd__plan_law_above(const struct afd_plan_law *law, double x)
{
	switch (law->kind) {
	case AFD_PLAN_CONSTANT:
		return x < law->mean ? 1 : 0;
	case AFD_PLAN_GEOMETRIC: /* the continuous law whose rounding up is geometric */
		return x <= 0 ? 1 : law->mean <= 1 ? x < 1 : exp(x * log1p(-1 / law->mean));
	case AFD_PLAN_EXPONENTIAL:
		return x <= 0 ? 1 : exp(-x / law->mean);
	case AFD_PLAN_LOGNORMAL:
		return lognormal_above(law, x);
	case AFD_PLAN_PARETO:
		return pareto_above(law, x);
	default:
		return uniform_above(law, x);
	}
}

/* Geometric prompts are whole already: they are rounded up like outputs. */
void afd__plan_law_moments(
	const struct afd_plan_law *law, bool is_output, struct afd__plan_moments *out)
{
	bool up = is_output || law->kind == AFD_PLAN_GEOMETRIC;
	double above;

	*out = (struct afd__plan_moments){ 0 };
	for (uint32_t k = 0; k < law->max; k++) {
		double n = k;

		above = is_output && k == 0 ? 1 : afd__plan_law_above(law, up ? n : n + 0.5);
		if (above < 1e-30)
			break;
		out->m1 += above;
		out->m2 += above * (2 * n + 1);
		out->m3 += above * (3 * n * n + 3 * n + 1);
	}
}
