/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Metrics as Prometheus text, format 0.0.4. The registry (families, and the series of each) is
 * guarded by one mutex and touched only when handles come and go or a text is rendered; values are
 * atomics, so a stage counts without a lock. Objects that report the same labels share one series.
 * Families render in the order in which they first appeared.
 */
#include "metrics.h"

#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct family;

struct afd__metric {
	struct family *family;
	struct afd__metric *next;
	unsigned n_users; /* objects that added this series */
	_Atomic uint64_t count;
	_Atomic double value;       /* a gauge's value, a histogram's sum */
	_Atomic uint64_t *buckets;  /* [n_bounds + 1], not cumulative; the last is +Inf */
	char labels[];
};

struct family {
	struct afd__metric_family about;
	struct family *next;
	struct afd__metric *series;
};

struct afd__metrics {
	pthread_mutex_t lock;
	struct family *families;
};

/* ---- registry ---- */

struct afd__metrics *afd__metrics_create(void)
{
	struct afd__metrics *metrics = afd__alloc(NULL, 1, sizeof(*metrics));

	if (metrics)
		pthread_mutex_init(&metrics->lock, NULL);
	return metrics;
}

static void destroy_series(struct afd__metric *metric)
{
	afd__free(metric->buckets);
	afd__free(metric);
}

void afd__metrics_destroy(struct afd__metrics *metrics)
{
	struct family *family;
	struct afd__metric *metric;

	if (!metrics)
		return;
	while ((family = metrics->families)) {
		metrics->families = family->next;
		while ((metric = family->series)) {
			family->series = metric->next;
			destroy_series(metric);
		}
		afd__free(family);
	}
	pthread_mutex_destroy(&metrics->lock);
	afd__free(metrics);
}

static struct family *find_or_add_family(struct afd_context *ctx,
					 const struct afd__metric_family *about)
{
	struct family **link = &ctx->metrics->families;

	while (*link && strcmp((*link)->about.name, about->name))
		link = &(*link)->next;
	if (!*link) {
		*link = afd__alloc(ctx, 1, sizeof(**link));
		if (*link)
			(*link)->about = *about;
	}
	return *link;
}

static struct afd__metric *create_series(struct afd_context *ctx, struct family *family,
					 const char *labels)
{
	size_t label_bytes = strlen(labels) + 1;
	struct afd__metric *metric = afd__alloc(ctx, 1, sizeof(*metric) + label_bytes);

	if (!metric)
		return NULL;
	metric->family = family;
	memcpy(metric->labels, labels, label_bytes);
	if (family->about.kind != AFD__HISTOGRAM)
		return metric;
	metric->buckets = afd__alloc(ctx, family->about.n_bounds + 1, sizeof(*metric->buckets));
	if (!metric->buckets) {
		afd__free(metric);
		return NULL;
	}
	return metric;
}

struct afd__metric *afd__metric_add(struct afd_context *ctx, const struct afd__metric_family *about,
				    const char *labels)
{
	struct afd__metric **link, *metric = NULL;
	struct family *family;

	pthread_mutex_lock(&ctx->metrics->lock);
	family = find_or_add_family(ctx, about);
	if (!family)
		goto out;
	link = &family->series;
	while (*link && strcmp((*link)->labels, labels))
		link = &(*link)->next;
	if (!*link)
		*link = create_series(ctx, family, labels);
	metric = *link;
	if (metric)
		metric->n_users++;
out:
	pthread_mutex_unlock(&ctx->metrics->lock);
	return metric;
}

void afd__metric_remove(struct afd_context *ctx, struct afd__metric *metric)
{
	struct afd__metric **link;

	if (!metric)
		return;
	pthread_mutex_lock(&ctx->metrics->lock);
	if (!--metric->n_users) {
		link = &metric->family->series;
		while (*link != metric)
			link = &(*link)->next;
		*link = metric->next;
		destroy_series(metric);
	}
	pthread_mutex_unlock(&ctx->metrics->lock);
}

/* ---- values ---- */

void afd__metric_count(struct afd__metric *metric, uint64_t n)
{
	if (metric)
		atomic_fetch_add_explicit(&metric->count, n, memory_order_relaxed);
}

void afd__metric_set(struct afd__metric *metric, double value)
{
	if (metric)
		atomic_store_explicit(&metric->value, value, memory_order_relaxed);
}

void afd__metric_observe(struct afd__metric *metric, double value)
{
	const struct afd__metric_family *about;
	double sum;
	unsigned i;

	if (!metric)
		return;
	about = &metric->family->about;
	for (i = 0; i < about->n_bounds && value > about->bounds[i]; i++)
		;
	atomic_fetch_add_explicit(&metric->buckets[i], 1, memory_order_relaxed);
	sum = atomic_load_explicit(&metric->value, memory_order_relaxed);
	while (!atomic_compare_exchange_weak_explicit(&metric->value, &sum, sum + value,
						      memory_order_relaxed, memory_order_relaxed))
		;
}

/* ---- text ---- */

struct text {
	char *buffer;
	size_t capacity, used; /* used counts what the whole text needs, also beyond capacity */
};

static void put_bytes(struct text *text, const char *bytes, size_t n)
{
	size_t room = text->used < text->capacity ? text->capacity - text->used : 0;

	if (room)
		memcpy(text->buffer + text->used, bytes, n < room ? n : room);
	text->used += n;
}

static void put(struct text *text, const char *string)
{
	put_bytes(text, string, strlen(string));
}

static void put_count(struct text *text, uint64_t n)
{
	char number[24];

	snprintf(number, sizeof(number), "%llu", (unsigned long long)n);
	put(text, number);
}

static void put_number(struct text *text, double value)
{
	const char *point = localeconv()->decimal_point;
	char number[40], *found;

	if (isnan(value) || isinf(value)) {
		put(text, isnan(value) ? "NaN" : value > 0 ? "+Inf" : "-Inf");
		return;
	}
	snprintf(number, sizeof(number), "%.15g", value);
	/* The format wants a point whatever the host's locale prints. */
	found = strstr(number, point);
	if (!found) {
		put(text, number);
		return;
	}
	put_bytes(text, number, (size_t)(found - number));
	put(text, ".");
	put(text, found + strlen(point));
}

static void put_escaped(struct text *text, const char *string, bool quotes)
{
	for (; *string; string++) {
		if (*string == '\n')
			put(text, "\\n");
		else if (*string == '\\')
			put(text, "\\\\");
		else if (*string == '"' && quotes)
			put(text, "\\\"");
		else
			put_bytes(text, string, 1);
	}
}

int afd__metric_label(char *labels, size_t capacity, const char *key, const char *value)
{
	struct text text = { .buffer = labels, .capacity = capacity };
	size_t used = strnlen(labels, capacity);

	text.used = used;
	if (used)
		put(&text, ",");
	put(&text, key);
	put(&text, "=\"");
	put_escaped(&text, value, true);
	put(&text, "\"");
	if (text.used >= capacity) {
		/* Half a label would make the whole text unreadable. */
		labels[used] = '\0';
		return afd__error(-ENOSPC, "metric label %s: needs %zu bytes, limit %zu", key,
				  text.used + 1, capacity);
	}
	labels[text.used] = '\0';
	return 0;
}

/* name_suffix{labels,le="bound"}; either part of the labels may be missing. */
static void put_name(struct text *text, const struct afd__metric *metric, const char *suffix,
		     const double *bound)
{
	put(text, metric->family->about.name);
	put(text, suffix);
	if (metric->labels[0] || bound)
		put(text, "{");
	put(text, metric->labels);
	if (bound) {
		put(text, metric->labels[0] ? ",le=\"" : "le=\"");
		put_number(text, *bound);
		put(text, "\"");
	}
	put(text, metric->labels[0] || bound ? "} " : " ");
}

static void put_histogram(struct text *text, const struct afd__metric *metric)
{
	const struct afd__metric_family *about = &metric->family->about;
	uint64_t total = 0;
	unsigned i;

	for (i = 0; i <= about->n_bounds; i++) {
		double bound = i < about->n_bounds ? about->bounds[i] : HUGE_VAL;

		total += atomic_load_explicit(&metric->buckets[i], memory_order_relaxed);
		put_name(text, metric, "_bucket", &bound);
		put_count(text, total);
		put(text, "\n");
	}
	put_name(text, metric, "_sum", NULL);
	put_number(text, atomic_load_explicit(&metric->value, memory_order_relaxed));
	put(text, "\n");
	/* The sum of the buckets just read, so that _count equals the +Inf bucket also while others
	 * observe. */
	put_name(text, metric, "_count", NULL);
	put_count(text, total);
	put(text, "\n");
}

static void put_series(struct text *text, const struct afd__metric *metric)
{
	if (metric->family->about.kind == AFD__HISTOGRAM) {
		put_histogram(text, metric);
		return;
	}
	put_name(text, metric, "", NULL);
	if (metric->family->about.kind == AFD__COUNTER)
		put_count(text, atomic_load_explicit(&metric->count, memory_order_relaxed));
	else
		put_number(text, atomic_load_explicit(&metric->value, memory_order_relaxed));
	put(text, "\n");
}

static void put_family(struct text *text, const struct family *family)
{
	static const char *const types[] = {
		[AFD__COUNTER] = "counter", [AFD__GAUGE] = "gauge", [AFD__HISTOGRAM] = "histogram",
	};
	const struct afd__metric *metric;

	put(text, "# HELP ");
	put(text, family->about.name);
	put(text, " ");
	put_escaped(text, family->about.help, false);
	put(text, "\n# TYPE ");
	put(text, family->about.name);
	put(text, " ");
	put(text, types[family->about.kind]);
	put(text, "\n");
	for (metric = family->series; metric; metric = metric->next)
		put_series(text, metric);
}

int afd_context_metrics(const afd_context *ctx, char *buffer, size_t capacity)
{
	struct text text = { .buffer = buffer, .capacity = capacity ? capacity - 1 : 0 };
	const struct family *family;
	int rc = afd__context_check(ctx, "context");

	if (rc)
		return rc;
	if (!buffer && capacity)
		return afd__error(-EINVAL, "metrics: buffer is NULL, capacity %zu", capacity);
	pthread_mutex_lock(&ctx->metrics->lock);
	for (family = ctx->metrics->families; family; family = family->next)
		put_family(&text, family);
	pthread_mutex_unlock(&ctx->metrics->lock);
	if (capacity)
		buffer[text.used < text.capacity ? text.used : text.capacity] = '\0';
	return (int)text.used;
}
