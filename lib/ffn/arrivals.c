/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long each attention peer takes from our reply to its next frame, lane by lane, as means that
 * follow the last few times; within a step and from step to step apart, since between steps stand
 * the LM head and the host. From this serve.c learns whom the gather may expect and when. A peer
 * that is overdue is not expected again until it has come, so one that stalls or pauses costs the
 * others a single wait. Called by serve.c from the thread that serves.
 */
#include "gather.h"

#include <string.h>

enum {
	WEIGHT = 4, /* a new time moves the mean by a quarter */
	LONGEST_CAPS = 2,
	LATE_DEVIATIONS = 4,
	LATE_SLACK_NS = 100000, /* what waking a process may take */
};

int afd__arrivals_create(struct afd__arrivals *arrivals, struct afd_context *ctx,
	uint32_t max_peers, uint32_t first_layer, uint32_t n_layers)
{
	arrivals->table =
		afd__alloc(ctx, (size_t)max_peers * AFD_MAX_LANES, sizeof(*arrivals->table));
	if (!arrivals->table)
		return -ENOMEM;
	arrivals->max_peers = max_peers;
	arrivals->first_layer = first_layer;
	arrivals->n_layers = n_layers;
	return 0;
}

void afd__arrivals_destroy(struct afd__arrivals *arrivals)
{
	afd__free(arrivals->table);
	arrivals->table = NULL;
}

/* ---- the table ---- */

static struct afd__arrival *entry_of(struct afd__arrivals *arrivals, uint32_t peer, uint32_t lane)
{
	struct afd__arrival *a =
		&arrivals->table[(size_t)(peer % arrivals->max_peers) * AFD_MAX_LANES +
				 lane % AFD_MAX_LANES];

	if (a->owner != (uint64_t)peer + 1) {
		memset(a, 0, sizeof(*a));
		a->owner = (uint64_t)peer + 1;
	}
	return a;
}

static void learn(struct afd__arrival_time *time, uint64_t ns)
{
	uint64_t off_ns = ns > time->mean_ns ? ns - time->mean_ns : time->mean_ns - ns;

	if (!time->mean_ns) {
		time->mean_ns = ns ? ns : 1;
		time->deviation_ns = ns / 2;
		return;
	}
	time->deviation_ns = (time->deviation_ns * (WEIGHT - 1) + off_ns) / WEIGHT;
	time->mean_ns = (time->mean_ns * (WEIGHT - 1) + ns) / WEIGHT;
	if (!time->mean_ns)
		time->mean_ns = 1;
}

void afd__arrivals_came(struct afd__arrivals *arrivals, const struct afd__part *part,
	const struct afd__gather_rule *rule)
{
	struct afd__arrival *a = entry_of(arrivals, part->peer, part->lane);
	bool begins_step = part->layer == arrivals->first_layer;
	uint64_t longest_ns = LONGEST_CAPS * (begins_step ? rule->step_cap_ns : rule->cap_ns), ns;

	if (part->part || !a->answered_ns || part->arrived_ns < a->answered_ns)
		return;
	ns = part->arrived_ns - a->answered_ns;
	learn(begins_step ? &a->between_steps : &a->in_step, ns < longest_ns ? ns : longest_ns);
}

void afd__arrivals_answered(
	struct afd__arrivals *arrivals, const struct afd__part *part, uint64_t now_ns)
{
	entry_of(arrivals, part->peer, part->lane)->answered_ns = now_ns;
}

/* ---- sources ---- */

static void expect(
	struct afd__gather_source *s, uint64_t from_ns, const struct afd__arrival_time *time)
{
	s->at_ns = from_ns + time->mean_ns;
	s->due_ns = s->at_ns + LATE_DEVIATIONS * time->deviation_ns + LATE_SLACK_NS;
}

/* When a source that has nothing here will have. */
static void expect_next(const struct afd__arrival *a, const struct afd__source *j, bool in_step,
	uint64_t cap_ns, struct afd__gather_source *s)
{
	const struct afd__arrival_time *time = s->layer ? &a->in_step : &a->between_steps;

	if (a->answered_ns && time->mean_ns)
		expect(s, a->answered_ns, time);
	/* A step that was opened since then says more than what the host did before it. */
	if (in_step && !s->layer && j->last_ns > s->due_ns && a->in_step.mean_ns)
		expect(s, j->last_ns, &a->in_step);
	if (in_step && !s->due_ns) {
		s->at_ns = j->last_ns;
		s->due_ns = j->last_ns + cap_ns;
	}
}

static void describe(struct afd__arrivals *arrivals, const struct afd__source *j,
	const struct afd__gather_rule *rule, struct afd__arrival *a, struct afd__gather_source *s)
{
	uint32_t end = arrivals->first_layer + arrivals->n_layers;
	bool in_step = j->next_layer >= arrivals->first_layer && j->next_layer < end;

	*s = (struct afd__gather_source){ .peer = j->peer };
	if (a->in_step.mean_ns)
		s->cycle_ns = a->in_step.mean_ns + rule->pass_ns;
	if (a->between_steps.mean_ns)
		s->step_ns = a->between_steps.mean_ns + rule->pass_ns;
	if (in_step)
		s->layer = j->next_layer - arrivals->first_layer;
	expect_next(a, j, in_step, rule->cap_ns, s);
}

static void describe_held(const struct afd__arrivals *arrivals, const struct afd__held *h,
	struct afd__gather_source *s)
{
	if (!s->n_rows || h->part.arrived_ns < s->at_ns)
		s->at_ns = h->part.arrived_ns;
	if (!s->n_rows || h->turn_ns < s->turn_ns)
		s->turn_ns = h->turn_ns;
	s->layer = h->part.layer - arrivals->first_layer;
	s->n_rows += h->part.n_rows;
}

uint32_t afd__arrivals_sources(struct afd__arrivals *arrivals, const struct afd__source *joined,
	uint32_t n_joined, const struct afd__held *held, uint32_t n_held,
	const struct afd__gather_rule *rule, struct afd__gather_source *sources)
{
	uint32_t i, n_sources = n_joined;

	arrivals->mark++;
	for (i = 0; i < n_joined; i++) {
		struct afd__arrival *a = entry_of(arrivals, joined[i].peer, joined[i].lane);

		a->mark = arrivals->mark;
		a->source = i;
		describe(arrivals, &joined[i], rule, a, &sources[i]);
	}
	for (i = 0; i < n_held; i++) {
		struct afd__arrival *a = entry_of(arrivals, held[i].part.peer, held[i].part.lane);

		/* Of a peer that was lost since, or whose step is over: its rows are run all the
		 * same. */
		if (a->mark != arrivals->mark) {
			a->mark = arrivals->mark;
			a->source = n_sources;
			sources[n_sources++] =
				(struct afd__gather_source){ .peer = held[i].part.peer };
		}
		describe_held(arrivals, &held[i], &sources[a->source]);
	}
	return n_sources;
}
