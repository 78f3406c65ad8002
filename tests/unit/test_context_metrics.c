/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Metrics: the text is what a Prometheus scraper reads, whatever the labels, the locale and the
 * threads.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "../../lib/context/core.h"

static const double bounds[] = { 1, 2.5 };
static const struct afd__metric_family rows = { "afd_rows_total", "Rows.", AFD__COUNTER, NULL, 0 };
static const struct afd__metric_family peers = { "afd_peers", "Peers that\njoined \\ now.",
	AFD__GAUGE, NULL, 0 };
static const struct afd__metric_family passes = { "afd_rows_per_pass", "Rows in a pass.",
	AFD__HISTOGRAM, bounds, 2 };

static afd_context *ctx;
static char text[4096];

static int begin(void **state)
{
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_context_destroy(ctx);
	return 0;
}

static void expect(const char *wanted)
{
	int n_bytes = afd_context_metrics(ctx, text, sizeof(text));

	assert_int_equal(n_bytes, strlen(text));
	assert_string_equal(text, wanted);
}

static void a_family_has_one_help_and_type_for_all_its_series(void **state)
{
	struct afd__metric *a = afd__metric_add(ctx, &rows,
						"peer=\"shm:a\""), *b = afd__metric_add(ctx, &rows,
											"peer=\"shm:b\"");

	afd__metric_add(ctx, &peers, "");
	afd__metric_count(a, 3);
	afd__metric_count(b, 1);
	afd__metric_count(a, 4);
	expect("# HELP afd_rows_total Rows.\n# TYPE afd_rows_total counter\nafd_rows_total{peer=\"shm:a\"} 7\n"
	       "afd_rows_total{peer=\"shm:b\"} 1\n"
	       "# HELP afd_peers Peers that\\njoined \\\\ now.\n# TYPE afd_peers gauge\nafd_peers 0\n");
}

static void a_histogram_has_cumulative_buckets_sum_and_count(void **state)
{
	struct afd__metric *m = afd__metric_add(ctx, &passes, "peer=\"a\"");

	afd__metric_observe(m, 1);
	afd__metric_observe(m, 2);
	afd__metric_observe(m, 4.25);
	expect("# HELP afd_rows_per_pass Rows in a pass.\n# TYPE afd_rows_per_pass histogram\n"
	       "afd_rows_per_pass_bucket{peer=\"a\",le=\"1\"} 1\nafd_rows_per_pass_bucket{peer=\"a\",le=\"2.5\"} 2\n"
	       "afd_rows_per_pass_bucket{peer=\"a\",le=\"+Inf\"} 3\nafd_rows_per_pass_sum{peer=\"a\"} 7.25\n"
	       "afd_rows_per_pass_count{peer=\"a\"} 3\n");
}

static void objects_with_the_same_labels_share_a_series(void **state)
{
	struct afd__metric *a = afd__metric_add(ctx, &rows, ""), *b = afd__metric_add(ctx, &rows,
										      "");

	afd__metric_count(a, 1);
	afd__metric_count(b, 1);
	afd__metric_remove(ctx, a);
	expect("# HELP afd_rows_total Rows.\n# TYPE afd_rows_total counter\nafd_rows_total 2\n");
	afd__metric_remove(ctx, b);
	expect("# HELP afd_rows_total Rows.\n# TYPE afd_rows_total counter\n");
}

static void labels_are_escaped(void **state)
{
	char labels[80] = "";

	assert_int_equal(afd__metric_label(labels, sizeof(labels), "peer", "a\"b\\c\nd"), 0);
	assert_int_equal(afd__metric_label(labels, sizeof(labels), "lane", "0"), 0);
	assert_string_equal(labels, "peer=\"a\\\"b\\\\c\\nd\",lane=\"0\"");
}

static void a_label_that_does_not_fit_changes_nothing(void **state)
{
	char labels[16] = "";

	assert_int_equal(afd__metric_label(labels, sizeof(labels), "lane", "0"), 0);
	assert_int_equal(afd__metric_label(labels, sizeof(labels), "peer", "abc"), -ENOSPC);
	assert_string_equal(labels, "lane=\"0\"");
}

static void numbers_that_are_not_finite_have_their_names(void **state)
{
	struct afd__metric *m = afd__metric_add(ctx, &peers, "");

	afd__metric_set(m, -INFINITY);
	afd_context_metrics(ctx, text, sizeof(text));
	assert_non_null(strstr(text, "afd_peers -Inf\n"));
	afd__metric_set(m, NAN);
	afd_context_metrics(ctx, text, sizeof(text));
	assert_non_null(strstr(text, "afd_peers NaN\n"));
}

static void a_short_buffer_is_cut_and_the_whole_is_told(void **state)
{
	char small[8];
	int whole;

	afd__metric_add(ctx, &rows, "");
	whole = afd_context_metrics(ctx, NULL, 0);
	memset(small, 'x', sizeof(small));
	assert_int_equal(afd_context_metrics(ctx, small, sizeof(small)), whole);
	assert_string_equal(small, "# HELP ");
	assert_int_equal(afd_context_metrics(ctx, NULL, 1), -EINVAL);
}

/* Needs a locale with a decimal comma; a machine that has none cannot show it. */
static void numbers_have_a_point_in_every_locale(void **state)
{
	static const char *const names[] = { "de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "de_DE" };
	struct afd__metric *m = afd__metric_add(ctx, &peers, "");
	unsigned i;

	for (i = 0; i < 4 && !setlocale(LC_NUMERIC, names[i]); i++)
		;
	if (i == 4) {
		print_message("no locale with a decimal comma is installed\n");
		skip();
	}
	afd__metric_set(m, 0.5);
	afd_context_metrics(ctx, text, sizeof(text));
	setlocale(LC_NUMERIC, "C");
	assert_non_null(strstr(text, "afd_peers 0.5\n"));
}

static void a_missing_metric_is_fine(void **state)
{
	afd__metric_count(NULL, 1);
	afd__metric_set(NULL, 1);
	afd__metric_observe(NULL, 1);
	afd__metric_remove(ctx, NULL);
	expect("");
}

enum { N_THREADS = 4, N_COUNTS = 20000 };

static void *count_many(void *metric)
{
	int i;

	for (i = 0; i < N_COUNTS; i++)
		afd__metric_observe(metric, 2);
	return NULL;
}

static void counts_of_several_threads_add_up_while_a_text_is_rendered(void **state)
{
	struct afd__metric *m = afd__metric_add(ctx, &passes, "");
	pthread_t threads[N_THREADS];
	char wanted[80];
	int i;

	for (i = 0; i < N_THREADS; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, count_many, m), 0);
	for (i = 0; i < 50; i++)
		afd_context_metrics(ctx, text, sizeof(text));
	for (i = 0; i < N_THREADS; i++)
		pthread_join(threads[i], NULL);
	afd_context_metrics(ctx, text, sizeof(text));
	snprintf(wanted, sizeof(wanted), "afd_rows_per_pass_sum %d\nafd_rows_per_pass_count %d\n",
		 2 * N_THREADS * N_COUNTS,
		 N_THREADS * N_COUNTS);
	assert_non_null(strstr(text, wanted));
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)
	const struct CMUnitTest tests[] = {
		T(a_family_has_one_help_and_type_for_all_its_series),
		T(a_histogram_has_cumulative_buckets_sum_and_count),
		T(objects_with_the_same_labels_share_a_series),
		T(labels_are_escaped),
		T(a_label_that_does_not_fit_changes_nothing),
		T(numbers_that_are_not_finite_have_their_names),
		T(a_short_buffer_is_cut_and_the_whole_is_told),
		T(numbers_have_a_point_in_every_locale),
		T(a_missing_metric_is_fine),
		T(counts_of_several_threads_add_up_while_a_text_is_rendered),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
