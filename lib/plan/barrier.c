/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The barrier: all r workers of a bundle wait for the slowest. With loads that are normal, the mean
 * of any cycle that grows with the slowest is a sum of one integral, the excess of the maximum over
 * a point. The integral form is derived here from E[max{...}] of arXiv 2601.21351; pure A-bound it
 * is the mean of the maximum of r normal variables, whose values are known.
 */
#include <math.h>

#include "plan.h"

enum { PANELS = 400 };          /* of Simpson's rule on each side of 0: an error below 1.1e-8 */
static const double REACH = 12; /* beyond, the integrand is 1 or 0 to all digits */

static double integrand(double x, double r)
{
	return -expm1(r * log(0.5 * erfc(-x / M_SQRT2)));
}

static double simpson(double from, double to, double r)
{
	double h = (to - from) / (2 * PANELS), sum = integrand(from, r) + integrand(to, r);

	if (to <= from)
		return 0;
	for (int i = 1; i < 2 * PANELS; i++)
		sum += integrand(from + i * h, r) * (i % 2 ? 4 : 2);
	return sum * h / 3;
}

double afd__plan_excess(double z, double r)
{
	double sum = 0;

	if (z >= REACH)
		return 0;
	if (z < -REACH) {
		sum = -REACH - z;
		z = -REACH;
	}
	return sum + simpson(z, 0, r) + simpson(fmax(z, 0), REACH, r);
}

double afd__plan_cycle_at(const struct afd__plan_cycle *cycle, double w)
{
	double tau = fmax(cycle->floor, w);

	return cycle->lanes > 0 ? fmax(tau, (w + cycle->rest) / cycle->lanes) : tau;
}

/* A convex function of w: flat, then of slope 1 / lanes, then of slope 1. */
double afd__plan_cycle_mean(
	const struct afd__plan_cycle *cycle, double mean, double sigma, double r)
{
	double m = cycle->lanes, leaves = cycle->floor, turns = leaves;

	if (!(sigma > 0))
		return afd__plan_cycle_at(cycle, mean);
	if (m == 1) {
		leaves = turns = cycle->floor - cycle->rest;
	} else if (m > 1 && cycle->rest / (m - 1) > cycle->floor) {
		leaves = m * cycle->floor - cycle->rest;
		turns = cycle->rest / (m - 1);
	}
	leaves = (leaves - mean) / sigma;
	turns = (turns - mean) / sigma;
	if (leaves >= turns)
		return cycle->floor + sigma * afd__plan_excess(turns, r);
	return cycle->floor +
	       sigma * ((afd__plan_excess(leaves, r) - afd__plan_excess(turns, r)) / m +
			       afd__plan_excess(turns, r));
}
