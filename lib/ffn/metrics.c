/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an FFN stage reports: passes, their rows, the time they took, how long rows waited for those
 * of other peers. Counting is lock-free and allocates nothing; the stages of one context share the
 * series. docs/operations.md lists them.
 */
#include "stage.h"

static const double rows_bounds[] = { 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512,
	1024, 2048 };
static const double seconds_bounds[] = { 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2,
	2e-2, 5e-2, 0.1, 0.5, 1, 5 };

#define N_BOUNDS(array) (sizeof(array) / sizeof((array)[0]))

static const struct afd__metric_family
	rows_per_pass = { "afd_ffn_rows_per_pass",
		"Rows that one pass of the FFN stage computes together", AFD__HISTOGRAM,
		rows_bounds, N_BOUNDS(rows_bounds) },
	gather_seconds = { "afd_ffn_gather_seconds",
		"How long a part waits at the server before its pass begins", AFD__HISTOGRAM,
		seconds_bounds, N_BOUNDS(seconds_bounds) },
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

int afd__ffn_metrics_create(struct afd_ffn *ffn)
{
	struct afd__ffn_metrics *m = &ffn->metrics;
	bool all = add(ffn, &m->rows_per_pass, &rows_per_pass) &&
		   add(ffn, &m->compute_seconds, &compute_seconds) &&
		   add(ffn, &m->passes, &passes) && add(ffn, &m->rows, &rows) &&
		   add(ffn, &m->weight_bytes, &weight_bytes) &&
		   add(ffn, &m->stored_bytes, &stored_bytes);

	if (all && ffn->net)
		all = add(ffn, &m->gather_seconds, &gather_seconds) &&
		      add(ffn, &m->errors, &errors) && add(ffn, &m->peers, &peers);
	afd__metric_set(m->weight_bytes, (double)ffn->weights.bytes);
	afd__metric_set(m->stored_bytes, (double)ffn->weights.stored_bytes);
	return all ? 0 : -ENOMEM;
}

void afd__ffn_metrics_destroy(struct afd_ffn *ffn)
{
	struct afd__ffn_metrics *m = &ffn->metrics;

	afd__metric_remove(ffn->ctx, m->rows_per_pass);
	afd__metric_remove(ffn->ctx, m->gather_seconds);
	afd__metric_remove(ffn->ctx, m->compute_seconds);
	afd__metric_remove(ffn->ctx, m->passes);
	afd__metric_remove(ffn->ctx, m->rows);
	afd__metric_remove(ffn->ctx, m->errors);
	afd__metric_remove(ffn->ctx, m->peers);
	afd__metric_remove(ffn->ctx, m->weight_bytes);
	afd__metric_remove(ffn->ctx, m->stored_bytes);
}

void afd__ffn_count_pass(struct afd_ffn *ffn, uint32_t n_rows, uint64_t compute_ns)
{
	struct afd__ffn_metrics *m = &ffn->metrics;

	atomic_fetch_add_explicit(&ffn->n_passes, 1, memory_order_relaxed);
	atomic_fetch_add_explicit(&ffn->n_rows, n_rows, memory_order_relaxed);
	atomic_fetch_add_explicit(&ffn->compute_ns, compute_ns, memory_order_relaxed);
	afd__metric_count(m->passes, 1);
	afd__metric_count(m->rows, n_rows);
	afd__metric_observe(m->rows_per_pass, n_rows);
	afd__metric_observe(m->compute_seconds, (double)compute_ns * 1e-9);
}
