/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A line through measured times: ordinary least squares, with what it does not explain. A negative
 * slope has no meaning for a time: it is refused when it is more than the noise of the points.
 * Called by hosts and by afd-plan calibrate.
 */
#include <math.h>

#include "plan.h"

struct sums {
	double x, y, xx, xy;
};

static int read_points(const double *x, const double *y, size_t n, struct sums *mean)
{
	if (!x || !y || n < 2 || n > 100000000)
		return afd__error(-EINVAL, "plan: a fit of %zu points, limit 2 .. 100000000", n);
	*mean = (struct sums){ 0 };
	for (size_t i = 0; i < n; i++) {
		int rc = afd__plan_real("x", x[i], -1e15, 1e15);

		rc = rc ? rc : afd__plan_real("y", y[i], -1e15, 1e15);
		if (rc)
			return rc;
		mean->x += x[i] / (double)n;
		mean->y += y[i] / (double)n;
	}
	for (size_t i = 0; i < n; i++) {
		mean->xx += (x[i] - mean->x) * (x[i] - mean->x);
		mean->xy += (x[i] - mean->x) * (y[i] - mean->y);
	}
	if (!(mean->xx > 0))
		return afd__error(-EINVAL,
			"plan: a fit of %zu points at one x, %g; at least two differ", n, mean->x);
	return 0;
}

/* The residual that p of n points keep within: the smallest that enough of them do. */
static double residual_at(
	const struct afd_plan_line *line, const double *x, const double *y, size_t n, double p)
{
	double low = 0, high = 0;

	for (size_t i = 0; i < n; i++)
		high = fmax(high, fabs(y[i] - line->alpha * x[i] - line->beta));
	if (p >= 1)
		return high;
	for (int step = 0; step < 60; step++) {
		double middle = (low + high) / 2;
		size_t within = 0;

		for (size_t i = 0; i < n; i++)
			within += fabs(y[i] - line->alpha * x[i] - line->beta) <= middle;
		if ((double)within >= p * (double)n)
			high = middle;
		else
			low = middle;
	}
	return high;
}

static double squares(const struct afd_plan_line *line, const double *x, const double *y, size_t n)
{
	double sum = 0;

	for (size_t i = 0; i < n; i++) {
		double off = y[i] - line->alpha * x[i] - line->beta;

		sum += off * off;
	}
	return sum;
}

/* Twice the standard error of a slope is noise. An intercept below 0 says that the points bend; the
 * line through 0 is then the best that means something, and its residuals tell. */
static int drop_negative(struct afd_plan_line *line, const struct sums *mean, const double *x,
	const double *y, size_t n)
{
	double variance = n > 2 ? squares(line, x, y, n) / (double)(n - 2) : HUGE_VAL;
	double noise = 2 * sqrt(variance / mean->xx), all = 0, product = 0;

	if (line->alpha < -noise)
		return afd__error(-EDOM, "plan: the fitted alpha is %g, limit 0 .. (noise %g)",
			line->alpha, noise);
	if (line->alpha < 0) {
		line->alpha = 0;
		line->beta = mean->y;
	}
	if (line->beta >= 0)
		return 0;
	for (size_t i = 0; i < n; i++) {
		all += x[i] * x[i];
		product += x[i] * y[i];
	}
	line->beta = 0;
	line->alpha = all > 0 ? fmax(0, product / all) : 0;
	return 0;
}

int afd_plan_fit(const double *x, const double *y, size_t n, struct afd_plan_line *out)
{
	struct afd_plan_line line = { .size = sizeof(line) };
	double total = 0;
	struct sums mean = { 0 };
	int rc = read_points(x, y, n, &mean);

	if (rc)
		return rc;
	line.alpha = mean.xy / mean.xx;
	line.beta = mean.y - line.alpha * mean.x;
	rc = drop_negative(&line, &mean, x, y, n);
	if (rc)
		return rc;
	for (size_t i = 0; i < n; i++)
		total += (y[i] - mean.y) * (y[i] - mean.y);
	line.r2 = total > 0 ? 1 - squares(&line, x, y, n) / total : 1;
	line.residual_max = residual_at(&line, x, y, n, 1);
	line.residual_p95 = residual_at(&line, x, y, n, 0.95);
	return afd__params_give(out, &line, sizeof(line), "plan line");
}
