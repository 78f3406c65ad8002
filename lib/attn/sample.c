/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sampling: a helper for hosts, on logits that they hold, and the cpu device's operation. Candidates
 * stand in one order, the larger logit first and among equals the lower id, whatever the params; the
 * draw walks along it. Nothing is sorted: a place in the order is found digit by digit of the logit,
 * in histograms of what stands before it, as kernels/cuda/sample.cu does.
 *
 * Invariant: the same logits, seed and position give the same id on every device, because weights
 * are integers (kernels/draw.h). Pure functions; called by hosts, cpu.c and batch.c.
 */
#include <math.h>

#include "../../kernels/draw.h"
#include "../context/core.h"
#include "batch.h"

/* A row, and the candidates that are left: those before `key`, and of those with it up to last_id.
 */
struct row {
	const float *x; /* [width] */
	uint32_t width, key;
	int32_t last_id;
	struct afd__draw draw;
};

/* A place in the order: the candidate that holds it, and how far inside it the place is. */
struct place {
	int32_t id;
	uint32_t key;
	uint64_t rest;
};

static bool is_candidate(const struct row *r, uint32_t i)
{
	uint32_t key = afd__draw_key(r->x[i]);

	return key < r->key || (key == r->key && (int32_t)i <= r->last_id);
}

/* One digit of the key that holds the place, counted in candidates or in weight. */
static uint32_t take_digit(const struct row *r, uint32_t prefix, unsigned shift, unsigned bits,
	bool by_weight, uint64_t *rest)
{
	uint64_t histogram[2048] = { 0 };
	uint32_t i, digit = 0;

	for (i = 0; i < r->width; i++) {
		uint32_t key = afd__draw_key(r->x[i]);

		if ((uint64_t)key >> (shift + bits) == (uint64_t)prefix >> (shift + bits) &&
			is_candidate(r, i))
			histogram[key >> shift & ((1u << bits) - 1)] +=
				by_weight ? afd__draw_weight(&r->draw, r->x[i]) : 1;
	}
	while (*rest >= histogram[digit])
		*rest -= histogram[digit++];
	return digit << shift;
}

/* `at` is below the sum of what is counted. */
static struct place find_place(const struct row *r, bool by_weight, uint64_t at)
{
	struct place p = { .rest = at };
	uint64_t each, which;

	p.key |= take_digit(r, p.key, 21, 11, by_weight, &p.rest);
	p.key |= take_digit(r, p.key, 10, 11, by_weight, &p.rest);
	p.key |= take_digit(r, p.key, 0, 10, by_weight, &p.rest);
	each = by_weight ? afd__draw_weight(&r->draw, afd__draw_logit(p.key)) : 1;
	which = p.rest / each;
	p.rest %= each;
	for (;; p.id++) {
		if (afd__draw_key(r->x[p.id]) == p.key && !which--)
			return p;
	}
}

static uint64_t sum_weights(const struct row *r)
{
	uint64_t sum = 0;
	uint32_t i;

	for (i = 0; i < r->width; i++)
		sum += is_candidate(r, i) ? afd__draw_weight(&r->draw, r->x[i]) : 0;
	return sum;
}

/* What stands behind the candidate at the place is none any more. */
static void cut(struct row *r, const struct place *last)
{
	r->key = last->key;
	r->last_id = last->id;
}

static int32_t draw(struct row *r, const struct afd_sample_params *p, uint64_t position)
{
	struct place place;
	uint64_t sum, at;

	if (p->top_k && p->top_k < r->width) {
		place = find_place(r, false, p->top_k - 1);
		cut(r, &place);
	}
	sum = sum_weights(r);
	if (p->top_p > 0 && p->top_p < 1) {
		at = afd__draw_last_place(p->top_p, sum);
		place = find_place(r, true, at);
		cut(r, &place);
		sum = at - place.rest + afd__draw_weight(&r->draw, afd__draw_logit(place.key));
	}
	return find_place(r, true, afd__draw_place(afd__draw_uniform(p->seed, position), sum)).id;
}

static int32_t find_largest(const float *logits, uint32_t vocab)
{
	int32_t best = 0;
	uint32_t i;

	for (i = 0; i < vocab; i++) {
		if (!isfinite(logits[i]))
			return afd__error(-EDOM, "sample: logit %u of %u is not finite", i, vocab);
		if (logits[i] > logits[best])
			best = (int32_t)i;
	}
	return best;
}

int afd__sample_check(const struct afd_sample_params *p)
{
	if (!(p->temperature >= 0) || !isfinite(p->temperature))
		return afd__error(-EINVAL,
			"sample: temperature is %g, must be finite and not below 0",
			p->temperature);
	if (!(p->top_p >= 0 && p->top_p <= 1))
		return afd__error(-EINVAL, "sample: top_p is %g, limits 0 and 1", p->top_p);
	if (p->_pad)
		return afd__error(-EINVAL, "sample: _pad is %u, must be 0", p->_pad);
	return 0;
}

int32_t afd_sample(const float *logits, uint32_t vocab, uint64_t position,
	const struct afd_sample_params *params, void *scratch)
{
	struct afd_sample_params p;
	struct row row = { logits, vocab, UINT32_MAX, INT32_MAX, { 0 } };
	int32_t best;
	int rc;

	if (!logits || !vocab || vocab > INT32_MAX)
		return afd__error(-EINVAL, "sample: %s, vocab is %u",
			logits ? "logits are given" : "logits is NULL", vocab);
	rc = afd__params_copy(&p, sizeof(p), params, "sample params");
	rc = rc ? rc : afd__sample_check(&p);
	if (rc)
		return rc;
	best = find_largest(logits, vocab);
	if (best < 0 || p.temperature == 0)
		return best;
	row.draw = afd__draw_of(logits[best], p.temperature, vocab);
	return draw(&row, &p, position);
}

size_t afd_sample_scratch_bytes(uint32_t vocab)
{
	return 0;
}
