/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the commands of afd-bench share: the flags, the machine they run on, and the way a cell of
 * the table is measured: probes of the ceilings and runs of the operation take turns until the
 * cell's time is used up.
 *
 * This tool looks inside the library (it is linked with its objects), so that it can run one
 * operation alone.
 */
#ifndef BENCH_BENCH_H
#define BENCH_BENCH_H

#include "../tool/stage.h"
#include "ceilings.h"
#include "gpu.h"
#include "report.h"

struct bench_options {
	struct tool_stage stage; /* device, threads, log */
	double seconds;          /* for all cells together */
	int json;
};

/* Rows for a command's table; seconds_text is the default, "3 s". */
#define BENCH_OPTIONS(b, seconds_text) \
	{ "device", "cpu|cuda:N|deferred", "cpu", "where the operations run", tool_set_device, \
		&(b).stage.device, 0, 0 }, \
		{ "threads", "N", "cores", "compute threads, 1 to 1024", tool_set_u32, \
			&(b).stage.threads, 1, 1024 }, \
		{ "seconds", "S", seconds_text, \
			"time for all measurements together, 0.1 to 3600 s", tool_set_real, \
			&(b).seconds, 0.1, 3600 }, \
		{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &(b).json, 0, \
			0 }, \
		TOOL_OPTION_LOG((b).stage)

struct bench {
	const struct bench_options *options;
	struct afd_context *ctx;
	struct bench_ceilings ceilings;
	struct bench_gpu *gpu; /* NULL: operations run on the CPU, or a device without probes */
	struct bench_report report;
};

/* TOOL_DONE, or TOOL_FAILED after a line on stderr; bench_close in both cases. */
int bench_open(struct bench *b, const struct bench_options *options);
/* The same without the ceilings of memory and multiply-adds. */
int bench_machine_open(struct bench *b, const struct bench_options *options);
/* Prints the machine and its ceilings; returns `status`, or worse. */
int bench_close(struct bench *b, int status);

/* One run of an operation, or a few; 0 or a negative errno with the library's error text. */
typedef int (*bench_run)(void *arg);

/* What one run must at least move and compute. */
struct bench_work {
	double dram_bytes, flops;
};

/* Measures for about `seconds` and reports; takes over `what`. TOOL_DONE or TOOL_FAILED. */
int bench_measure(struct bench *b, double seconds, json_t *what, const struct bench_work *work,
	bench_run run, void *arg);

/* TOOL_FAILED, behind the library's last error as a line on stderr. */
int bench_fail(void);

/* The commands: argv[0] is the command's name. Exit statuses of the tool. */
int bench_ceilings(int argc, char **argv);
int bench_ops(int argc, char **argv);
int bench_load(int argc, char **argv);
int bench_decode(int argc, char **argv);
int bench_exchange(int argc, char **argv);
int bench_probe(int argc, char **argv);

#endif
