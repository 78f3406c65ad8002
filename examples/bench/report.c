/* SPDX-License-Identifier: Apache-2.0 */
/* Percentiles, the table and the JSON object of afd-bench; report.h says what a result is. */
#include <stdio.h>
#include <stdlib.h>

#include "../tool/json.h"
#include "../tool/options.h"
#include "report.h"

void bench_samples_add(struct bench_samples *samples, double value)
{
	if (samples->n < BENCH_SAMPLES)
		samples->values[samples->n++] = value;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

double bench_samples_at(struct bench_samples *samples, double p)
{
	if (!samples->n)
		return 0;
	qsort(samples->values, samples->n, sizeof samples->values[0], compare);
	return samples->values[(uint32_t)(p * (samples->n - 1) + 0.5)];
}

static const char *text_of(const json_t *what, const char *key)
{
	const char *text = json_string_value(json_object_get(what, key));

	return text ? text : "";
}

static void print_line(struct bench_report *report, const json_t *what, double us, double p10,
	double p90, double limit_us, const char *limit)
{
	const json_t *rows = json_object_get(what, "rows");
	char n_rows[24] = "";

	if (rows)
		snprintf(n_rows, sizeof n_rows, "%lld", (long long)json_integer_value(rows));
	if (!report->n_lines++)
		printf("%-10s %-26s %5s %-5s %10s %10s %10s %10s %-5s %6s\n", "op", "shape", "rows",
			"dtype", "us", "p10", "p90", "limit us", "limit", "ratio");
	printf("%-10s %-26s %5s %-5s %10.1f %10.1f %10.1f %10.1f %-5s %6.2f", text_of(what, "op"),
		text_of(what, "shape"), n_rows, text_of(what, "dtype"), us, p10, p90, limit_us,
		limit, us > 0 ? limit_us / us : 0);
	if (json_object_get(what, "tokens_per_second"))
		printf("  %.1f tokens/s",
			json_real_value(json_object_get(what, "tokens_per_second")));
	if (json_object_get(what, "rows_per_second"))
		printf("  %.0f rows/s, %.1f experts",
			json_real_value(json_object_get(what, "rows_per_second")),
			json_real_value(json_object_get(what, "active_experts")));
	printf("\n");
	fflush(stdout);
}

int bench_report_add(struct bench_report *report, json_t *what, struct bench_samples *us,
	double limit_us, const char *limit)
{
	double median = bench_samples_at(us, 0.5), p10 = bench_samples_at(us, 0.1);
	double p90 = bench_samples_at(us, 0.9);
	json_int_t batch = json_integer_value(json_object_get(what, "batch"));
	json_int_t n_rows = json_integer_value(json_object_get(what, "rows"));
	json_t *numbers;

	if (json_object_get(what, "active_experts") && median > 0)
		json_object_set_new(what, "rows_per_second", json_real(n_rows * 1e6 / median));
	/* One token per sequence and step. */
	if (batch && median > 0)
		json_object_set_new(what, "tokens_per_second", json_real(batch * 1e6 / median));
	if (!report->results) {
		print_line(report, what, median, p10, p90, limit_us, limit);
		json_decref(what);
		return TOOL_DONE;
	}
	numbers = json_pack("{s:f, s:f, s:f, s:f, s:f, s:s, s:I}", "us", median, "us_p10", p10,
		"us_p90", p90, "limit_us", limit_us, "ratio", median > 0 ? limit_us / median : 0,
		"limit", limit, "runs", (json_int_t)us->n);
	if (!what || !numbers || json_object_update(what, numbers) ||
		json_array_append(report->results, what)) {
		json_decref(what);
		json_decref(numbers);
		return tool_fail(TOOL_FAILED, "report: no memory");
	}
	json_decref(what);
	json_decref(numbers);
	return TOOL_DONE;
}

static void print_machine(const json_t *machine)
{
	const char *key;
	json_t *value;

	printf("\n");
	json_object_foreach((json_t *)machine, key, value)
	{
		if (json_is_string(value))
			printf("%-22s %s\n", key, json_string_value(value));
		else if (json_is_number(value))
			printf("%-22s %.6g\n", key, json_number_value(value));
	}
}

int bench_report_end(struct bench_report *report, int status)
{
	if (status == TOOL_DONE && report->results) {
		status = tool_json_print(json_pack(
			"{s:O, s:O}", "machine", report->machine, "results", report->results));
	} else if (status == TOOL_DONE) {
		print_machine(report->machine);
	}
	json_decref(report->machine);
	json_decref(report->results);
	report->machine = report->results = NULL;
	return status;
}
