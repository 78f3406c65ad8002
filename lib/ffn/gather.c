/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gather decision: a pure function of the sources and the time. serve.c asks it whenever no
 * pass runs.
 *
 * The layers stand on a circle, since a peer begins the next step at the first one again. The
 * sources fill an arc of it; its front is the leader, before the widest gap. Rows at a layer may
 * wait for sources that are behind them on the arc and would be here in time, never for those
 * ahead. So the rearmost rows wait only for frames that are on their way, and the decision always
 * ends: when those have come, or are overdue, or when the wait has used up what the rows may lose.
 */
#include "gather.h"

#include <assert.h>
#include <string.h>

enum {
	PATIENCE_CYCLES = 3,
	PATIENCE_MIN_NS = 500000,
};

/* ---- places on the circle ---- */

struct arc {
	uint32_t n_layers;
	uint32_t leader;
	uint64_t occupied[AFD__GATHER_LAYERS / 64];
};

/* What the decision needs of the rows that wait at one layer. */
struct waiting {
	uint32_t layer, n_rows;
	uint64_t turn_ns;  /* the first */
	uint64_t cycle_ns; /* of the source with the shortest; 0: none is known */
};

static bool counts(const struct afd__gather_source *source, uint64_t now_ns)
{
	return source->n_rows || source->due_ns > now_ns;
}

static bool occupied(const struct arc *arc, uint32_t layer)
{
	return arc->occupied[layer / 64] >> (layer % 64) & 1;
}

/* The occupied layer before the widest gap; among equal gaps the last, so that a step that has
 * begun later is behind. */
static uint32_t leader_of(const struct arc *arc, uint32_t first)
{
	uint32_t leader = first, widest = 0, last = first, layer;

	for (layer = first + 1; layer < arc->n_layers; layer++) {
		if (!occupied(arc, layer))
			continue;
		if (layer - last >= widest) {
			widest = layer - last;
			leader = last;
		}
		last = layer;
	}
	return arc->n_layers - last + first >= widest ? last : leader;
}

/* Returns false when nothing waits. */
static bool place(struct arc *arc, const struct afd__gather_rule *rule,
	const struct afd__gather_source *sources, uint32_t n_sources, uint64_t now_ns)
{
	uint32_t i, first = UINT32_MAX;
	bool any = false;

	memset(arc, 0, sizeof(*arc));
	arc->n_layers = rule->n_layers;
	for (i = 0; i < n_sources; i++) {
		assert(sources[i].layer < rule->n_layers);
		if (!counts(&sources[i], now_ns))
			continue;
		arc->occupied[sources[i].layer / 64] |= UINT64_C(1) << (sources[i].layer % 64);
		if (sources[i].layer < first)
			first = sources[i].layer;
		any |= sources[i].n_rows > 0;
	}
	if (any)
		arc->leader = leader_of(arc, first);
	return any;
}

static uint32_t behind_leader(const struct arc *arc, uint32_t layer)
{
	return layer <= arc->leader ? arc->leader - layer : arc->leader + arc->n_layers - layer;
}

/* ---- who waits ---- */

/* The waiting layer whose oldest rows came first, among those not in `seen`; false when there is
 * none. */
static bool next_waiting(const uint64_t *seen, const struct afd__gather_source *sources,
	uint32_t n_sources, struct waiting *out)
{
	const struct afd__gather_source *oldest = NULL;
	uint32_t i;

	for (i = 0; i < n_sources; i++) {
		const struct afd__gather_source *s = &sources[i];

		if (!s->n_rows || seen[s->layer / 64] >> (s->layer % 64) & 1)
			continue;
		if (!oldest || s->at_ns < oldest->at_ns ||
			(s->at_ns == oldest->at_ns && s->layer < oldest->layer))
			oldest = s;
	}
	if (!oldest)
		return false;
	*out = (struct waiting){ .layer = oldest->layer, .turn_ns = oldest->turn_ns };
	for (i = 0; i < n_sources; i++) {
		uint64_t cycle_ns = out->layer ? sources[i].cycle_ns : sources[i].step_ns;

		if (!sources[i].n_rows || sources[i].layer != out->layer)
			continue;
		out->n_rows += sources[i].n_rows;
		if (sources[i].turn_ns < out->turn_ns)
			out->turn_ns = sources[i].turn_ns;
		if (cycle_ns && (!out->cycle_ns || cycle_ns < out->cycle_ns))
			out->cycle_ns = cycle_ns;
	}
	return true;
}

/*
 * Until when these rows may wait: no longer than the cap, and not so long that a quick peer walks
 * at a slow one's pace. The first rows of a step may lose half of what their own peer takes between
 * steps, since then a whole step is gained.
 */
static uint64_t patience_ends(const struct afd__gather_rule *rule, const struct waiting *w)
{
	uint64_t cap_ns = rule->cap_ns, patience_ns;

	if (w->n_rows >= rule->full_rows)
		return w->turn_ns;
	if (!w->layer && w->cycle_ns / 2 > cap_ns)
		cap_ns = w->cycle_ns / 2 < rule->step_cap_ns ? w->cycle_ns / 2 : rule->step_cap_ns;
	patience_ns = w->cycle_ns && w->cycle_ns < cap_ns / PATIENCE_CYCLES
			      ? PATIENCE_CYCLES * w->cycle_ns
			      : cap_ns;
	if (patience_ns < PATIENCE_MIN_NS)
		patience_ns = PATIENCE_MIN_NS;
	return w->turn_ns + (patience_ns < cap_ns ? patience_ns : cap_ns);
}

/* ---- whom they wait for ---- */

/* When the source could have rows at the layer, which is n_hops further on the arc. */
static uint64_t comes_at(const struct afd__gather_rule *rule,
	const struct afd__gather_source *source, uint32_t n_hops, bool through_step,
	uint64_t now_ns)
{
	uint64_t at_ns = source->n_rows || source->at_ns < now_ns ? now_ns : source->at_ns;
	uint64_t hop_ns = source->cycle_ns ? source->cycle_ns : rule->pass_ns;

	at_ns += n_hops * hop_ns;
	if (through_step && source->step_ns > hop_ns)
		at_ns += source->step_ns - hop_ns;
	return at_ns;
}

/* Until when the rows wait for this source; 0: not for it. */
static uint64_t waits_for(const struct afd__gather_rule *rule, const struct arc *arc,
	const struct waiting *w, uint64_t patience_ns, const struct afd__gather_source *source,
	uint64_t now_ns)
{
	uint32_t source_behind = behind_leader(arc, source->layer),
		 rows_behind = behind_leader(arc, w->layer);

	if (!counts(source, now_ns) || source_behind < rows_behind)
		return 0;
	if (comes_at(rule, source, source_behind - rows_behind, source->layer > w->layer, now_ns) >
		patience_ns)
		return 0;
	if (!source->n_rows && source_behind == rows_behind && source->due_ns < patience_ns)
		return source->due_ns;
	return patience_ns;
}

/*
 * Until when the rows at a layer wait; 0: they do not. Of one peer they wait for one frame only:
 * its lanes are meant to overlap, and would walk in step if they waited for each other.
 */
static uint64_t wait_ends(const struct afd__gather_rule *rule, const struct arc *arc,
	const struct waiting *w, const struct afd__gather_source *sources, uint32_t n_sources,
	uint64_t now_ns)
{
	uint64_t patience_ns = patience_ends(rule, w), ends_ns = 0;
	uint32_t first, end, i;

	if (now_ns >= patience_ns)
		return 0;
	for (first = 0; first < n_sources; first = end) {
		uint64_t soonest_ns = 0;
		bool is_here = false;

		for (end = first; end < n_sources && sources[end].peer == sources[first].peer;
			end++)
			is_here |= sources[end].n_rows && sources[end].layer == w->layer;
		for (i = first; i < end && !is_here; i++) {
			uint64_t ns = waits_for(rule, arc, w, patience_ns, &sources[i], now_ns);

			if (ns && (!soonest_ns || ns < soonest_ns))
				soonest_ns = ns;
		}
		if (soonest_ns > ends_ns)
			ends_ns = soonest_ns;
	}
	return ends_ns;
}

void afd__gather_choose(const struct afd__gather_rule *rule,
	const struct afd__gather_source *sources, uint32_t n_sources, uint64_t now_ns,
	struct afd__gather_choice *choice)
{
	uint64_t seen[AFD__GATHER_LAYERS / 64] = { 0 };
	struct waiting w;
	struct arc arc;

	assert(rule->n_layers >= 1 && rule->n_layers <= AFD__GATHER_LAYERS);
	choice->layer = -1;
	choice->until_ns = UINT64_MAX;
	if (!place(&arc, rule, sources, n_sources, now_ns))
		return;
	while (next_waiting(seen, sources, n_sources, &w)) {
		uint64_t ends_ns = wait_ends(rule, &arc, &w, sources, n_sources, now_ns);

		if (!ends_ns) {
			choice->layer = (int32_t)w.layer;
			return;
		}
		if (ends_ns < choice->until_ns)
			choice->until_ns = ends_ns;
		seen[w.layer / 64] |= UINT64_C(1) << (w.layer % 64);
	}
}
