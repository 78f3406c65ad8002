/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random requests. The generator is private and seeded by the caller: one stream per worker and
 * lane, so that a worker lives through the same requests at any ratio (common random numbers).
 * A stationary start needs requests with probability proportional to their lifetime: for laws by
 * their own biased form and a rejection that is exact, for traces by their summed lifetimes.
 */
#include <math.h>

#include "plan.h"

/* ---- numbers ---- */

void afd__plan_random_seed(struct afd__plan_random *random, uint64_t seed, uint64_t stream)
{
	random->state = 0;
	random->stream = stream << 1 | 1;
	afd__plan_random_bits(random);
	random->state += seed;
	afd__plan_random_bits(random);
}

uint32_t afd__plan_random_bits(struct afd__plan_random *random)
{
	uint64_t old = random->state;
	uint32_t mixed = (uint32_t)((old >> 18 ^ old) >> 27), turn = old >> 59;

	random->state = old * 6364136223846793005u + random->stream;
	return mixed >> turn | mixed << (-turn & 31);
}

double afd__plan_random_real(struct afd__plan_random *random)
{
	return (afd__plan_random_bits(random) + 0.5) * 0x1p-32;
}

uint32_t afd__plan_random_below(struct afd__plan_random *random, uint32_t n)
{
	return (uint32_t)((uint64_t)afd__plan_random_bits(random) * n >> 32);
}

static double normal(struct afd__plan_random *random)
{
	double radius = sqrt(-2 * log(afd__plan_random_real(random)));

	return radius * cos(2 * M_PI * afd__plan_random_real(random));
}

/* ---- laws ---- */

static double draw_uniform(const struct afd_plan_law *law, struct afd__plan_random *random)
{
	return law->shape + 2 * (law->mean - law->shape) * afd__plan_random_real(random);
}

/* A draw of the continuous law. */
static double draw_law(const struct afd_plan_law *law, struct afd__plan_random *random)
{
	double mu, sigma, u;

	switch (law->kind) {
	case AFD_PLAN_CONSTANT:
		return law->mean;
	case AFD_PLAN_GEOMETRIC:
		u = afd__plan_random_real(random);
		return law->mean <= 1 ? 1 : log(u) / log1p(-1 / law->mean);
	case AFD_PLAN_EXPONENTIAL:
		return -law->mean * log(afd__plan_random_real(random));
	case AFD_PLAN_LOGNORMAL:
		afd__plan_lognormal(law, &mu, &sigma);
		return exp(mu + sigma * normal(random));
	case AFD_PLAN_PARETO:
		u = afd__plan_random_real(random);
		return law->mean * (law->shape - 1) / law->shape * pow(u, -1 / law->shape);
	default:
		return draw_uniform(law, random);
	}
}

/* The mean of the continuous law. */
static double mean_of(const struct afd_plan_law *law)
{
	return law->kind == AFD_PLAN_GEOMETRIC && law->mean > 1 ? -1 / log1p(-1 / law->mean)
								: law->mean;
}

/* A draw with probability proportional to its value: each law has such a form of its own. */
static double draw_law_biased(const struct afd_plan_law *law, struct afd__plan_random *random)
{
	double mu, sigma, least, x;

	switch (law->kind) {
	case AFD_PLAN_CONSTANT:
		return law->mean;
	case AFD_PLAN_GEOMETRIC: /* exponential underneath, biased: the sum of two */
	case AFD_PLAN_EXPONENTIAL:
		return draw_law(law, random) + (law->mean <= 1 && law->kind == AFD_PLAN_GEOMETRIC
							       ? 0
							       : draw_law(law, random));
	case AFD_PLAN_LOGNORMAL:
		afd__plan_lognormal(law, &mu, &sigma);
		return exp(mu + sigma * sigma + sigma * normal(random));
	case AFD_PLAN_PARETO:
		least = law->mean * (law->shape - 1) / law->shape;
		return least * pow(afd__plan_random_real(random), -1 / (law->shape - 1));
	default:
		do {
			x = draw_uniform(law, random);
		} while (afd__plan_random_real(random) * (2 * law->mean - law->shape) > x);
		return x;
	}
}

static uint32_t round_draw(const struct afd_plan_law *law, double x, bool up, uint32_t least)
{
	double whole = up ? ceil(x) : floor(x + 0.5);

	return whole < least ? least : whole > law->max ? law->max : (uint32_t)whole;
}

static uint32_t prompt_of(const struct afd_plan_law *law, double x)
{
	return round_draw(law, x, law->kind == AFD_PLAN_GEOMETRIC, 0);
}

/* ---- requests ---- */

static struct afd_plan_request draw_trace(
	struct afd__plan_source *source, struct afd__plan_random *random)
{
	const struct afd_plan_workload *w = source->workload;
	size_t i;

	if (!source->ordered)
		return *afd__plan_request_at(
			w, afd__plan_random_below(random, (uint32_t)w->n_requests));
	i = source->in_order;
	source->in_order = i + 1 < w->n_requests ? i + 1 : 0;
	return *afd__plan_request_at(w, i);
}

struct afd_plan_request afd__plan_draw(
	struct afd__plan_source *source, struct afd__plan_random *random)
{
	const struct afd_plan_workload *w = source->workload;
	struct afd_plan_request request;

	if (w->requests)
		return draw_trace(source, random);
	request.prompt_tokens = prompt_of(&w->prompt, draw_law(&w->prompt, random));
	if (w->output.kind == AFD_PLAN_PROPORTIONAL)
		request.output_tokens = afd__plan_proportional(&w->output, request.prompt_tokens);
	else
		request.output_tokens =
			round_draw(&w->output, draw_law(&w->output, random), true, 1);
	return request;
}

static struct afd_plan_request draw_trace_biased(
	struct afd__plan_source *source, struct afd__plan_random *random)
{
	size_t low = 0, high = source->workload->n_requests - 1;
	double at = afd__plan_random_real(random) + afd__plan_random_bits(random) * 0x1p-64;

	at *= source->until[high];
	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (source->until[middle] > at)
			high = middle;
		else
			low = middle + 1;
	}
	return *afd__plan_request_at(source->workload, low);
}

/* The draw x of a law with weight `lifetime`, which is at most slope x + start: proposed from the
 * mix of the biased and the plain law, and taken with what the weight is of that bound. */
static double propose(
	const struct afd_plan_law *law, double slope, double start, struct afd__plan_random *random)
{
	double share = slope * mean_of(law) / (slope * mean_of(law) + start);

	return afd__plan_random_real(random) < share ? draw_law_biased(law, random)
						     : draw_law(law, random);
}

static struct afd_plan_request draw_laws_biased(
	const struct afd_plan_workload *w, struct afd__plan_random *random)
{
	struct afd_plan_request request = { 0 };
	bool joint = w->output.kind == AFD_PLAN_PROPORTIONAL;
	const struct afd_plan_law *law = joint ? &w->prompt : &w->output;
	double slope = joint ? w->output.mean : 1, start = joint ? slope + 1 : 1, x;

	do {
		x = propose(law, slope, start, random);
		if (joint) {
			request.prompt_tokens = prompt_of(law, x);
			request.output_tokens =
				afd__plan_proportional(&w->output, request.prompt_tokens);
		} else {
			request.output_tokens = round_draw(law, x, true, 1);
		}
	} while (afd__plan_random_real(random) * (slope * x + start) > request.output_tokens);
	if (!joint)
		request.prompt_tokens = prompt_of(&w->prompt, draw_law(&w->prompt, random));
	return request;
}

struct afd_plan_request afd__plan_draw_biased(
	struct afd__plan_source *source, struct afd__plan_random *random)
{
	return source->until ? draw_trace_biased(source, random)
			     : draw_laws_biased(source->workload, random);
}
