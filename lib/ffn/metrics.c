/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an FFN stage reports: passes, their rows, the time they took, how long rows waited for those
 * of other peers. Counting is lock-free and allocates nothing; the stages of one context share the
 * series. docs/operations.md lists them.
 */
#include <stdio.h>

#include "stage.h"

enum { LAYER_SERIES = 128 };

static const double rows_bounds[] = { 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512,
	1024, 2048 };
static const double seconds_bounds[] = { 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2,
	2e-2, 5e-2, 0.1, 0.5, 1, 5 };

#define N_BOUNDS(array) (sizeof(array) / sizeof((array)[0]))

static const struct afd__metric_family
	rows_per_pass = { "afd_ffn_rows_per_pass",
		"Rows that one pass of the FFN stage computes together", AFD__HISTOGRAM,
		rows_bounds, N_BOUNDS(rows_bounds) },
	queue_seconds = { "afd_ffn_queue_seconds",
		"How long a part waits at the server for the stage, from when it is found",
		AFD__HISTOGRAM, seconds_bounds, N_BOUNDS(seconds_bounds) },
	gather_seconds = { "afd_ffn_gather_seconds",
		"How long a part waits for rows of other peers while the stage is free",
		AFD__HISTOGRAM, seconds_bounds, N_BOUNDS(seconds_bounds) },
	layer_seconds = { "afd_ffn_layer_seconds", "How long a pass takes, by layer",
		AFD__HISTOGRAM, seconds_bounds, N_BOUNDS(seconds_bounds) },
	compute_seconds = { "afd_ffn_compute_seconds", "How long a pass of the FFN stage takes",
		AFD__HISTOGRAM, seconds_bounds, N_BOUNDS(seconds_bounds) },
	passes = { "afd_ffn_passes_total", "Passes of the FFN stage", AFD__COUNTER },
	rows = { "afd_ffn_rows_total", "Rows that the FFN stage has computed", AFD__COUNTER },
	errors = { "afd_ffn_errors_total", "Parts that were answered with an error", AFD__COUNTER },
	peers = { "afd_ffn_peers", "Attention peers that are joined", AFD__GAUGE },
	weight_bytes = { "afd_ffn_weight_bytes", "Device memory that weights hold", AFD__GAUGE },
	stored_bytes = { "afd_ffn_stored_bytes",
		"Weights that were loaded, as the checkpoint stores them", AFD__GAUGE };

static bool add(
	struct afd_ffn *ffn, struct afd__metric **metric, const struct afd__metric_family *family)
{
	*metric = afd__metric_add(ffn->ctx, family, "");
	return *metric != NULL;
}

/* At most LAYER_SERIES of them: of a deeper model several layers share one. */
static int add_layers(struct afd_ffn *ffn)
{
	struct afd__ffn_metrics *m = &ffn->metrics;

	m->group_layers = (ffn->n_layers - 1) / LAYER_SERIES + 1;
	m->n_groups = (ffn->n_layers - 1) / m->group_layers + 1;
	m->by_layer = afd__alloc(ffn->ctx, m->n_groups, sizeof(*m->by_layer));
	for (uint32_t i = 0; m->by_layer && i < m->n_groups; i++) {
		uint32_t first = ffn->first_layer + i * m->group_layers;
		uint32_t last = first + m->group_layers - 1, end = ffn->first_layer + ffn->n_layers;
		char labels[40] = "", layers[24];

		last = last < end ? last : end - 1;
		snprintf(layers, sizeof(layers), first == last ? "%u" : "%u-%u", first, last);
		if (!afd__metric_label(labels, sizeof(labels), "layer", layers))
			m->by_layer[i] = afd__metric_add(ffn->ctx, &layer_seconds, labels);
		if (!m->by_layer[i])
			return -ENOMEM;
	}
	return m->by_layer ? 0 : -ENOMEM;
}

int afd__ffn_metrics_create(struct afd_ffn *ffn)
{
	struct afd__ffn_metrics *m = &ffn->metrics;
	bool all = add(ffn, &m->rows_per_pass, &rows_per_pass) &&
		   add(ffn, &m->compute_seconds, &compute_seconds) &&
		   add(ffn, &m->passes, &passes) && add(ffn, &m->rows, &rows) &&
		   add(ffn, &m->weight_bytes, &weight_bytes) &&
		   add(ffn, &m->stored_bytes, &stored_bytes) && !add_layers(ffn);

	if (all && ffn->net)
		all = add(ffn, &m->queue_seconds, &queue_seconds) &&
		      add(ffn, &m->gather_seconds, &gather_seconds) &&
		      add(ffn, &m->errors, &errors) && add(ffn, &m->peers, &peers);
	afd__metric_set(m->weight_bytes, (double)ffn->weights.bytes);
	afd__metric_set(m->stored_bytes, (double)ffn->weights.stored_bytes);
	return all ? 0 : -ENOMEM;
}

void afd__ffn_metrics_destroy(struct afd_ffn *ffn)
{
	struct afd__ffn_metrics *m = &ffn->metrics;

	afd__metric_remove(ffn->ctx, m->rows_per_pass);
	afd__metric_remove(ffn->ctx, m->queue_seconds);
	afd__metric_remove(ffn->ctx, m->gather_seconds);
	for (uint32_t i = 0; m->by_layer && i < m->n_groups; i++)
		afd__metric_remove(ffn->ctx, m->by_layer[i]);
	afd__free(m->by_layer);
	m->by_layer = NULL;
	afd__metric_remove(ffn->ctx, m->compute_seconds);
	afd__metric_remove(ffn->ctx, m->passes);
	afd__metric_remove(ffn->ctx, m->rows);
	afd__metric_remove(ffn->ctx, m->errors);
	afd__metric_remove(ffn->ctx, m->peers);
	afd__metric_remove(ffn->ctx, m->weight_bytes);
	afd__metric_remove(ffn->ctx, m->stored_bytes);
}

void afd__ffn_count_part(struct afd_ffn *ffn, uint64_t before_ns, uint64_t gather_ns)
{
	uint64_t queue_ns = before_ns > gather_ns ? before_ns - gather_ns : 0;

	afd__metric_observe(ffn->metrics.queue_seconds, (double)queue_ns * 1e-9);
	afd__metric_observe(ffn->metrics.gather_seconds, (double)gather_ns * 1e-9);
}

void afd__ffn_count_pass(
	struct afd_ffn *ffn, uint32_t layer, uint32_t n_rows, uint64_t compute_ns)
{
	struct afd__ffn_metrics *m = &ffn->metrics;

	atomic_fetch_add_explicit(&ffn->n_passes, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&ffn->n_rows, n_rows, memory_order_relaxed);
	atomic_fetch_add_explicit(&ffn->compute_ns, compute_ns, memory_order_relaxed);
	afd__metric_count(m->passes, 1);
	afd__metric_count(m->rows, n_rows);
	afd__metric_observe(m->rows_per_pass, n_rows);
	afd__metric_observe(m->compute_seconds, (double)compute_ns * 1e-9);
	afd__metric_observe(m->by_layer[(layer - ffn->first_layer) / m->group_layers],
		(double)compute_ns * 1e-9);
}
