/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The slots of one worker and lane: each holds a request for its lifetime and is refilled at once.
 * A step adds one position to every slot, so the load is kept as one number, and what remains to be
 * done per slot is a count down to its end; only ends cost more. Invariant: load is the sum of
 * prompt + lifetime - left over all slots.
 */
#include <math.h>

#include "plan.h"

enum { BLOCK = 64 }; /* slots that are counted down before anyone looks for an end */
static const double RATIO = 1.002;

/* ---- bins ---- */

void afd__plan_bins_add(struct afd__plan_bins *bins, double value)
{
	double at = value > bins->low ? log(value / bins->low) / log(RATIO) : 0;

	bins->counts[at < AFD__PLAN_BINS - 1 ? (uint32_t)at : AFD__PLAN_BINS - 1]++;
	bins->n++;
}

/* The middle of the bin that holds the value at p. */
double afd__plan_bins_at(const struct afd__plan_bins *bins, double p)
{
	uint64_t seen = 0, wanted = (uint64_t)(p * (double)bins->n);

	for (uint32_t i = 0; i < AFD__PLAN_BINS; i++) {
		seen += bins->counts[i];
		if (seen > wanted)
			return bins->low * pow(RATIO, i + 0.5);
	}
	return 0;
}

/* ---- slots ---- */

static void put(struct afd__plan_slots *slots, uint32_t i, struct afd_plan_request request,
	uint32_t age, double since)
{
	slots->prompt[i] = request.prompt_tokens;
	slots->lifetime[i] = request.output_tokens;
	slots->left[i] = request.output_tokens - age;
	slots->since[i] = since;
	slots->load += (double)request.prompt_tokens + age;
}

void afd__plan_slots_fill(
	struct afd__plan_slots *slots, struct afd__plan_source *source, bool stationary)
{
	struct afd__plan_random *random = &slots->random;

	slots->load = 0;
	for (uint32_t i = 0; i < slots->n_slots; i++) {
		struct afd_plan_request request = stationary ? afd__plan_draw_biased(source, random)
							     : afd__plan_draw(source, random);
		uint32_t age =
			stationary ? afd__plan_random_below(random, request.output_tokens) : 0;

		put(slots, i, request, age, stationary ? -1 : 0);
	}
}

static uint32_t count_down(uint32_t *left, uint32_t n)
{
	uint32_t ended = 0;

	for (uint32_t i = 0; i < n; i++) {
		left[i]--;
		ended |= left[i] == 0;
	}
	return ended;
}

static uint32_t renew(struct afd__plan_slots *slots, struct afd__plan_source *source, uint32_t from,
	uint32_t to, double now, struct afd__plan_bins *bins)
{
	uint32_t n_ended = 0;

	for (uint32_t i = from; i < to; i++) {
		if (slots->left[i])
			continue;
		if (bins && slots->since[i] >= 0)
			afd__plan_bins_add(bins, (now - slots->since[i]) / slots->lifetime[i]);
		slots->load -= (double)slots->prompt[i] + slots->lifetime[i];
		put(slots, i, afd__plan_draw(source, &slots->random), 0, now);
		n_ended++;
	}
	return n_ended;
}

uint32_t afd__plan_slots_step(struct afd__plan_slots *slots, struct afd__plan_source *source,
	double now, struct afd__plan_bins *bins)
{
	uint32_t n_ended = 0;

	slots->load += slots->n_slots;
	for (uint32_t from = 0; from < slots->n_slots; from += BLOCK) {
		uint32_t n = slots->n_slots - from < BLOCK ? slots->n_slots - from : BLOCK;

		if (count_down(slots->left + from, n))
			n_ended += renew(slots, source, from, from + n, now, bins);
	}
	return n_ended;
}
