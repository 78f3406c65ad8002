/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sampling: a helper for hosts, on logits that they hold. Candidates stand in one order, the larger
 * logit first and among equals the lower id, whatever the params; the draw walks along it. A heap
 * gives as much of that order as is needed.
 *
 * Invariant: the same logits, seed and position give the same id, because the random number is a
 * hash of seed and position and every sum is taken in one order. Pure functions.
 */
#include <math.h>
#include <string.h>

#include "../context/core.h"

#include <afd/attn.h>

struct candidate {
	float logit;
	int32_t id;
};

/* A heap in items[0 .. n-1]; those taken from it gather behind, the first of them last. */
struct order {
	struct candidate *items; /* [vocab] */
	uint32_t n, vocab;
	float largest;
	double temperature;
};

static bool before(struct candidate a, struct candidate b)
{
	return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static void sift(struct candidate *items, uint32_t n, uint32_t at)
{
	struct candidate item = items[at];

	for (;;) {
		uint32_t child = 2 * at + 1;

		if (child >= n)
			break;
		if (child + 1 < n && before(items[child + 1], items[child]))
			child++;
		if (!before(items[child], item))
			break;
		items[at] = items[child];
		at = child;
	}
	items[at] = item;
}

static void build(struct order *order, const float *logits)
{
	uint32_t i;

	for (i = 0; i < order->vocab; i++)
		order->items[i] = (struct candidate){ logits[i], (int32_t)i };
	for (i = order->vocab / 2; i-- > 0;)
		sift(order->items, order->vocab, i);
}

/* The i-th candidate; called for 0, 1, 2 … */
static struct candidate at(struct order *order, uint32_t i)
{
	if (order->vocab - order->n <= i) {
		struct candidate first = order->items[0];

		order->n--;
		order->items[0] = order->items[order->n];
		sift(order->items, order->n, 0);
		order->items[order->n] = first;
	}
	return order->items[order->vocab - 1 - i];
}

static double weight(const struct order *order, float logit)
{
	return exp(((double)logit - order->largest) / order->temperature);
}

/* The finaliser of splitmix64. */
static uint64_t mix(uint64_t x)
{
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
	x = (x ^ x >> 27) * 0x94d049bb133111ebu;
	return x ^ x >> 31;
}

/* In [0, 1), from seed and position alone. */
static double uniform(uint64_t seed, uint64_t position)
{
	const uint64_t golden = 0x9e3779b97f4a7c15u;
	uint64_t x = mix(mix(seed + golden) + (position + 1) * golden);

	return (double)(x >> 11) * 0x1p-53;
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

static int check(
	const struct afd_sample_params *p, const float *logits, uint32_t vocab, const void *scratch)
{
	if (!logits || !vocab || vocab > INT32_MAX)
		return afd__error(-EINVAL, "sample: %s, vocab is %u",
			logits ? "logits are given" : "logits is NULL", vocab);
	if (!(p->temperature >= 0) || !isfinite(p->temperature))
		return afd__error(-EINVAL,
			"sample: temperature is %g, must be finite and not below 0",
			p->temperature);
	if (!(p->top_p >= 0 && p->top_p <= 1))
		return afd__error(-EINVAL, "sample: top_p is %g, limits 0 and 1", p->top_p);
	if (p->_pad)
		return afd__error(-EINVAL, "sample: _pad is %u, must be 0", p->_pad);
	if (p->temperature > 0 && !scratch)
		return afd__error(-EINVAL, "sample: scratch is NULL");
	return 0;
}

/* Sum of the weights of the first n candidates; of all of them by id, so that none has to be
 * ordered. */
static double sum_first(struct order *order, const float *logits, uint32_t n)
{
	double sum = 0;
	uint32_t i;

	for (i = 0; i < n; i++)
		sum += weight(order, n == order->vocab ? logits[i] : at(order, i).logit);
	return sum;
}

/* How many of the first *n reach the share of *sum; the sum becomes theirs. */
static void cut(struct order *order, double share, uint32_t *n, double *sum)
{
	double limit = share * *sum, reached = 0;
	uint32_t i;

	for (i = 0; i < *n && reached < limit; i++)
		reached += weight(order, at(order, i).logit);
	*n = i;
	*sum = reached;
}

int32_t afd_sample(const float *logits, uint32_t vocab, uint64_t position,
	const struct afd_sample_params *params, void *scratch)
{
	struct afd_sample_params p;
	struct order order;
	double sum, target;
	uint32_t n, i;
	int rc;

	rc = afd__params_copy(&p, sizeof(p), params, "sample params");
	rc = rc ? rc : check(&p, logits, vocab, scratch);
	if (rc)
		return rc;
	rc = find_largest(logits, vocab);
	if (rc < 0 || p.temperature == 0)
		return rc;
	order = (struct order){ scratch, vocab, vocab, logits[rc], p.temperature };
	build(&order, logits);
	n = p.top_k && p.top_k < vocab ? p.top_k : vocab;
	sum = sum_first(&order, logits, n);
	if (p.top_p > 0 && p.top_p < 1)
		cut(&order, p.top_p, &n, &sum);
	target = uniform(p.seed, position) * sum;
	sum = 0;
	for (i = 0; i + 1 < n; i++) {
		sum += weight(&order, at(&order, i).logit);
		if (sum > target)
			break;
	}
	return at(&order, i).id;
}

size_t afd_sample_scratch_bytes(uint32_t vocab)
{
	return (size_t)vocab * sizeof(struct candidate);
}
