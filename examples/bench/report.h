/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What afd-bench prints. A result is what was run, the times of its runs, and the limit that the
 * machine's ceilings set at the same moment; on a terminal it is one line of a table, with --json
 * one object of `results`.
 */
#ifndef BENCH_REPORT_H
#define BENCH_REPORT_H

#include <stdint.h>

#include <jansson.h>

#define BENCH_SAMPLES 4096

struct bench_samples {
	double values[BENCH_SAMPLES];
	uint32_t n; /* beyond BENCH_SAMPLES none is kept */
};

void bench_samples_add(struct bench_samples *samples, double value);
/* p in 0 .. 1; 0.0 of none. Sorts. */
double bench_samples_at(struct bench_samples *samples, double p);

struct bench_report {
	json_t *machine; /* filled by whoever measures it */
	json_t *results; /* NULL: a table on stdout */
	int n_lines;
};

/* Takes over `what`, an object: op, shape, rows, dtype and the like; NULL is no memory. limit names
 * what sets it: "dram", "fma", "read", "mma", "copy", "h2d", "floor" or "none". TOOL_DONE or
 * TOOL_FAILED. */
int bench_report_add(struct bench_report *report, json_t *what, struct bench_samples *us,
	double limit_us, const char *limit);
/* Prints `machine`, and with --json the whole. Gives everything up: machine is NULL behind it.
 * `status` as it came, or worse. */
int bench_report_end(struct bench_report *report, int status);

#endif
