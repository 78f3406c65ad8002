/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The split of a round trip, its histograms by peer and layer, and its spans. Series are made with
 * the link and live as long as the transport, so that those of a lost peer can still be read; to
 * count takes no lock and no memory. See times.h.
 */
#include "times.h"

#include <stdio.h>
#include <string.h>

#include "net.h"
#include "socket.h"

/* ---- the split ---- */

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Takes at most `ns` from what is left. */
static uint64_t take(uint64_t *left_ns, uint64_t ns)
{
	ns = least(*left_ns, ns);
	*left_ns -= ns;
	return ns;
}

/* A field that is full means that or more: it gets what nothing else explains. */
static void take_full(struct afd__times *t, const struct afd__header *reply, uint64_t *left_ns)
{
	if (reply->compute_ns == UINT32_MAX)
		t->compute_ns += take(left_ns, UINT64_MAX);
	else if (reply->gather_ns == UINT32_MAX)
		t->gather_ns += take(left_ns, UINT64_MAX);
	else if (reply->queue_ns == UINT32_MAX)
		t->queue_ns += take(left_ns, UINT64_MAX);
}

void afd__times_split(struct afd__times *t, const struct afd__header *reply,
	uint64_t round_trip_ns, uint64_t unseen_ns, uint64_t usual_wire_ns)
{
	bool longest = reply->flags & AFD__FLAG_QUEUE_LONGEST;
	uint64_t left_ns = round_trip_ns;

	*t = (struct afd__times){ .round_trip_ns = round_trip_ns,
		.estimated = longest || unseen_ns };
	t->compute_ns = take(&left_ns, reply->compute_ns);
	t->gather_ns = take(&left_ns, reply->gather_ns);
	if (!longest)
		t->queue_ns = take(&left_ns, reply->queue_ns);
	/* The wire comes first among those that nobody could measure. */
	t->wire_ns = take(&left_ns, usual_wire_ns);
	take_full(t, reply, &left_ns);
	if (longest)
		t->queue_ns += take(&left_ns, reply->queue_ns);
	t->unread_ns = take(&left_ns, unseen_ns);
	t->wire_ns += left_ns;
}

uint64_t afd__times_usual(uint64_t usual_wire_ns, const struct afd__times *t)
{
	/* What was told apart by the usual says nothing new. */
	if (t->estimated && t->wire_ns == usual_wire_ns)
		return usual_wire_ns;
	/* Low at once and high slowly: a wait for a processor is not the wire. */
	if (!usual_wire_ns || t->wire_ns < usual_wire_ns)
		return t->wire_ns;
	return usual_wire_ns + (t->wire_ns - usual_wire_ns) / 16;
}

uint64_t afd__times_since(const struct afd__link *link, uint64_t now)
{
	uint64_t since = link->net->busy_ns;

	if (!since)
		return now;
	if (since < link->looked_ns)
		since = link->looked_ns;
	return least(since, now);
}

const char *afd__trace_text(char text[AFD__TRACE_TEXT], const uint8_t trace_id[16])
{
	static const uint8_t none[16];

	if (!memcmp(trace_id, none, sizeof(none)))
		return "none";
	for (int i = 0; i < 16; i++)
		snprintf(text + 2 * i, 3, "%02x", trace_id[i]);
	return text;
}

void afd__exchange_computes(afd_transport *net, uint64_t now_ns)
{
	if (!net->busy_ns)
		net->busy_ns = now_ns;
}

/* ---- metrics ---- */

static const double seconds[] = { 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1 };

#define HISTOGRAM .kind = AFD__HISTOGRAM, .bounds = seconds, \
	.n_bounds = sizeof(seconds) / sizeof(seconds[0])

static const struct afd__metric_family by_layer[AFD__TIMES_KINDS] = {
	{ .name = "afd_transport_wire_seconds",
		HISTOGRAM,
		.help = "Of the round trip of a part, what its ways there and back took." },
	{ .name = "afd_transport_queue_seconds",
		HISTOGRAM,
		.help = "Of the round trip, what it waited in the FFN process for its turn." },
	{ .name = "afd_transport_gather_seconds",
		HISTOGRAM,
		.help = "Of the round trip, what it waited there for rows of other peers." },
	{ .name = "afd_transport_compute_seconds",
		HISTOGRAM,
		.help = "Of the round trip, what its passes took." },
};
static const struct afd__metric_family round_trip = { .name = "afd_transport_round_trip_seconds",
	HISTOGRAM,
	.help = "From sending a part to finding its reply, attention side." };
static const struct afd__metric_family unread = { .name = "afd_transport_unread_seconds",
	HISTOGRAM,
	.help = "Of the round trip, what the reply lay here while this side computed." };

uint32_t afd__times_group(uint32_t n_layers, uint32_t n_peers)
{
	uint32_t per_peer = AFD__TIMES_SERIES_MAX / (n_peers ? n_peers : 1);

	if (!per_peer)
		per_peer = 1;
	return (n_layers - 1) / per_peer + 1;
}

static int add_group(struct afd__link *link, uint32_t group)
{
	struct afd__times_of_link *times = &link->times;
	uint32_t first = group * times->group_layers, last = first + times->group_layers - 1;
	uint32_t n_layers = link->net->contract.n_layers;
	char labels[192] = "", layers[24];

	if (last >= n_layers)
		last = n_layers - 1;
	snprintf(layers, sizeof(layers), first == last ? "%u" : "%u-%u", first, last);
	if (afd__metric_label(labels, sizeof(labels), "peer", link->name) ||
		afd__metric_label(labels, sizeof(labels), "layer", layers))
		return -ENOMEM;
	for (uint32_t kind = 0; kind < AFD__TIMES_KINDS; kind++) {
		struct afd__metric **at = &times->by_layer[kind * times->n_groups + group];

		*at = afd__metric_add(link->net->ctx, &by_layer[kind], labels);
		if (!*at)
			return -ENOMEM;
	}
	return 0;
}

int afd__times_create(struct afd__link *link)
{
	struct afd__times_of_link *times = &link->times;
	const afd_transport *net = link->net;
	char labels[192] = "";

	times->group_layers = afd__times_group(net->contract.n_layers, net->n_addresses);
	times->n_groups = (net->contract.n_layers - 1) / times->group_layers + 1;
	times->by_layer = afd__alloc(net->ctx, (size_t)AFD__TIMES_KINDS * times->n_groups,
		sizeof(*times->by_layer));
	if (!times->by_layer || afd__metric_label(labels, sizeof(labels), "peer", link->name))
		return -ENOMEM;
	times->round_trip = afd__metric_add(net->ctx, &round_trip, labels);
	times->unread = afd__metric_add(net->ctx, &unread, labels);
	if (!times->round_trip || !times->unread)
		return -ENOMEM;
	for (uint32_t group = 0; group < times->n_groups; group++) {
		if (add_group(link, group))
			return -ENOMEM;
	}
	return 0;
}

/* In a child of fork the metrics are the parent's. */
void afd__times_destroy(struct afd__link *link)
{
	struct afd__times_of_link *times = &link->times;
	struct afd_context *ctx = link->net->ctx;

	if (!times->by_layer)
		return;
	if (!afd__forked(ctx)) {
		afd__metric_remove(ctx, times->round_trip);
		afd__metric_remove(ctx, times->unread);
		for (uint32_t i = 0; i < AFD__TIMES_KINDS * times->n_groups; i++)
			afd__metric_remove(ctx, times->by_layer[i]);
	}
	afd__free(times->by_layer);
	times->by_layer = NULL;
}

static void observe(const struct afd__times_of_link *times, uint32_t layer,
	const struct afd__times *t)
{
	const uint64_t ns[AFD__TIMES_KINDS] = { t->wire_ns, t->queue_ns, t->gather_ns,
		t->compute_ns };

	if (!times->by_layer)
		return;
	for (uint32_t kind = 0; kind < AFD__TIMES_KINDS; kind++)
		afd__metric_observe(
			times->by_layer[kind * times->n_groups + layer / times->group_layers],
			(double)ns[kind] * 1e-9);
	afd__metric_observe(times->round_trip, (double)t->round_trip_ns * 1e-9);
	afd__metric_observe(times->unread, (double)t->unread_ns * 1e-9);
}

/* ---- spans ---- */

/* The step in full, and what every span of the part says. */
static struct afd_span span_of(const struct afd__link *link, const struct afd__slot_out *out)
{
	const afd_transport *net = link->net;
	struct afd_span span = {
		.step = net->step - (uint32_t)((uint32_t)net->step - out->step),
		.layer = (int32_t)out->layer,
		.lane = (int32_t)out->lane,
		.n_rows = out->n_rows,
		.peer = link->name,
		.part = out->part,
		.n_parts = out->n_parts,
		.id = ++link->net->n_traced,
	};

	/* A reply may come when the next step is open. */
	if (out->step == (uint32_t)net->step)
		memcpy(span.trace_id, net->trace_id, sizeof(span.trace_id));
	return span;
}

static void trace(const struct afd__link *link, const struct afd__slot_out *out,
	const struct afd__times *t)
{
	const struct {
		const char *name;
		uint64_t ns;
		bool estimated, always;
	} legs[] = {
		/* How the wire's time divides is not known. */
		{ "wire out", t->wire_ns - t->wire_ns / 2, true, true },
		{ "queue", t->queue_ns, t->estimated, false },
		{ "gather", t->gather_ns, false, false },
		{ "compute", t->compute_ns, false, true },
		{ "wire back", t->wire_ns / 2, true, true },
		{ "unread", t->unread_ns, true, false },
	};
	struct afd_span span = span_of(link, out);

	span.start_ns = out->posted_ns;
	for (size_t i = 0; i < sizeof(legs) / sizeof(legs[0]); i++) {
		span.name = legs[i].name;
		span.duration_ns = legs[i].ns;
		span.flags = legs[i].estimated ? AFD_SPAN_ESTIMATED : 0;
		if (legs[i].ns || legs[i].always)
			afd__span(link->net->ctx, &span);
		span.start_ns += legs[i].ns;
	}
}

/* ---- what frames.c calls ---- */

void afd__times_take(struct afd__link *link, const struct afd__slot_out *out,
	const struct afd__header *reply)
{
	/* The round's own time may be older than the reply: whoever looks may lose the processor. */
	uint64_t now = afd__now_ns(), all_ns = now - out->posted_ns;
	uint64_t unseen_ns = now - afd__times_since(link, now);
	struct afd__times t;

	afd__times_split(&t, reply, all_ns, unseen_ns, link->times.usual_wire_ns);
	link->times.usual_wire_ns = afd__times_usual(link->times.usual_wire_ns, &t);
	observe(&link->times, out->layer, &t);
	if (link->net->ctx->tracer.span)
		trace(link, out, &t);
}

void afd__times_lost(struct afd__link *link, const struct afd__slot_out *out)
{
	struct afd_span span;

	if (!link->net->ctx->tracer.span)
		return;
	span = span_of(link, out);
	span.name = "lost";
	span.start_ns = out->posted_ns;
	span.duration_ns = afd__now_ns() - out->posted_ns;
	afd__span(link->net->ctx, &span);
}
