/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a host can see of an attention stage: its stats, and the series that it reports to the
 * context's metrics. Counted when a step ends, never on the path of a row. Stages of one context
 * share the series.
 */
#include "attn.h"

static const double SECONDS[] = { 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5,
	5, 10 };

static const struct afd__metric_family STEPS = {
	.name = "afd_attn_steps_total", .help = "Steps that have succeeded.", .kind = AFD__COUNTER
};
static const struct afd__metric_family ROWS = { .name = "afd_attn_rows_total",
	.help = "Rows of steps that have succeeded.",
	.kind = AFD__COUNTER };
static const struct afd__metric_family STEP_SECONDS = { .name = "afd_attn_step_seconds",
	.help = "Time from the begin of a step to its end.",
	.kind = AFD__HISTOGRAM,
	.bounds = SECONDS,
	.n_bounds = sizeof(SECONDS) / sizeof(*SECONDS) };
static const struct afd__metric_family PAGES_FREE = { .name = "afd_attn_kv_pages_free",
	.help = "Free pages of the KV pool that changed last.",
	.kind = AFD__GAUGE };
static const struct afd__metric_family WINDOW_PAGES_FREE = {
	.name = "afd_attn_kv_window_pages_free",
	.help = "Free pages of layers with a window, of the KV pool that changed last.",
	.kind = AFD__GAUGE
};
static const struct afd__metric_family SEQUENCES = { .name = "afd_attn_sequences",
	.help = "Sequences of the stage that changed last.",
	.kind = AFD__GAUGE };

int afd__attn_metrics_create(struct afd_attn *attn)
{
	attn->metric_steps = afd__metric_add(attn->ctx, &STEPS, "");
	attn->metric_rows = afd__metric_add(attn->ctx, &ROWS, "");
	attn->metric_seconds = afd__metric_add(attn->ctx, &STEP_SECONDS, "");
	attn->metric_pages = afd__metric_add(attn->ctx, &PAGES_FREE, "");
	attn->metric_window_pages = afd__metric_add(attn->ctx, &WINDOW_PAGES_FREE, "");
	attn->metric_sequences = afd__metric_add(attn->ctx, &SEQUENCES, "");
	if (!attn->metric_steps || !attn->metric_rows || !attn->metric_seconds ||
		!attn->metric_pages || !attn->metric_window_pages || !attn->metric_sequences)
		return -ENOMEM;
	afd__attn_count_sequences(attn);
	return 0;
}

void afd__attn_metrics_destroy(struct afd_attn *attn)
{
	afd__metric_remove(attn->ctx, attn->metric_steps);
	afd__metric_remove(attn->ctx, attn->metric_rows);
	afd__metric_remove(attn->ctx, attn->metric_seconds);
	afd__metric_remove(attn->ctx, attn->metric_pages);
	afd__metric_remove(attn->ctx, attn->metric_window_pages);
	afd__metric_remove(attn->ctx, attn->metric_sequences);
}

void afd__attn_count_sequences(struct afd_attn *attn)
{
	attn->pages_free = afd__kv_free(&attn->kv);
	attn->window_pages_free = afd__kv_free_windowed(&attn->kv);
	attn->n_sequences = attn->sequences.n;
	afd__metric_set(attn->metric_pages, attn->pages_free);
	afd__metric_set(attn->metric_window_pages, attn->window_pages_free);
	afd__metric_set(attn->metric_sequences, attn->n_sequences);
}

void afd__attn_count_step(struct afd_attn *attn)
{
	attn->n_steps++;
	attn->n_rows += attn->batch.n_rows;
	afd__metric_count(attn->metric_steps, 1);
	afd__metric_count(attn->metric_rows, attn->batch.n_rows);
	afd__metric_observe(
		attn->metric_seconds, (double)(afd__now_ns() - attn->step.start_ns) * 1e-9);
	afd__attn_count_sequences(attn);
}

int afd_attn_stats(const afd_attn *attn, struct afd_attn_stats *stats)
{
	struct afd_attn_stats now;
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (rc)
		return rc;
	now = (struct afd_attn_stats){
		.size = sizeof(now),
		.n_steps = attn->n_steps,
		.n_rows = attn->n_rows,
		.attention_ns = attn->attention_ns,
		.ffn_ns = attn->ffn_ns,
		.wait_ns = attn->wait_ns,
		.weight_bytes = afd__attn_weights_bytes(&attn->weights),
		.pages_free = attn->pages_free,
		.n_sequences = attn->n_sequences,
		.stored_bytes = attn->weights.stored_bytes,
		.window_pages_free = attn->window_pages_free,
	};
	return afd__params_give(stats, &now, sizeof(now), "attn stats");
}
