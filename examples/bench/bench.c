/* SPDX-License-Identifier: Apache-2.0 */
/* Opening, closing and measuring; and the command `ceilings`, which is nothing else. */
#include "bench.h"

#include <stdio.h>
#include <string.h>

#define TURN_NS    15e6 /* runs between two probes */
#define PROBES_MIN 3
#define SLOW_NS    1e9 /* a run that takes longer is not repeated: plain C, many rows */

/* "model name" of /proc/cpuinfo; "unknown" where that says nothing. */
static void read_cpu_name(char *name, size_t capacity)
{
	FILE *file = fopen("/proc/cpuinfo", "r");
	char line[256];

	snprintf(name, capacity, "unknown");
	while (file && fgets(line, sizeof line, file)) {
		const char *colon = strchr(line, ':');

		if (strncmp(line, "model name", 10) || !colon)
			continue;
		snprintf(name, capacity, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
		break;
	}
	if (file)
		fclose(file);
}

int bench_fail(void)
{
	return tool_fail(TOOL_FAILED, "%s", afd_last_error());
}

int bench_machine_open(struct bench *b, const struct bench_options *options)
{
	char cpu[128];
	int status;

	memset(b, 0, sizeof *b);
	b->options = options;
	status = tool_context_create(&b->ctx, &options->stage, NULL);
	if (status)
		return status;
	read_cpu_name(cpu, sizeof cpu);
	b->report.machine = json_pack("{s:s, s:s, s:s, s:I}", "cpu", cpu, "isa",
		afd_context_isa(b->ctx), "device", options->stage.device, "threads",
		(json_int_t)b->ctx->executor.n_threads);
	b->report.results = options->json ? json_array() : NULL;
	if (!b->report.machine || (options->json && !b->report.results))
		return tool_fail(TOOL_FAILED, "report: no memory");
	return TOOL_DONE;
}

int bench_open(struct bench *b, const struct bench_options *options)
{
	int status = bench_machine_open(b, options);

	if (status != TOOL_DONE)
		return status;
	json_object_set_new(
		b->report.machine, "cold_bytes", json_integer((json_int_t)BENCH_COLD_BYTES));
	return bench_ceilings_open(&b->ceilings, b->ctx);
}

int bench_close(struct bench *b, int status)
{
	struct bench_ceilings *c = &b->ceilings;

	if (status == TOOL_DONE && c->memory && !b->gpu) {
		json_object_set_new(b->report.machine, "dram_read_gb_per_s",
			json_real(bench_samples_at(&c->dram, 0.5)));
		json_object_set_new(b->report.machine, "fma_gflop_per_s",
			json_real(bench_samples_at(&c->fma, 0.5)));
		/* The best moment: on a machine that others use too, the median tells of them. */
		json_object_set_new(b->report.machine, "dram_read_gb_per_s_best",
			json_real(bench_samples_at(&c->dram, 1)));
		json_object_set_new(b->report.machine, "fma_gflop_per_s_best",
			json_real(bench_samples_at(&c->fma, 1)));
		if (c->copy.n)
			json_object_set_new(b->report.machine, "copy_gb_per_s",
				json_real(bench_samples_at(&c->copy, 0.5)));
	}
	if (b->report.machine)
		status = bench_report_end(&b->report, status);
	bench_ceilings_close(c);
	afd_context_destroy(b->ctx);
	return status;
}

/* Runs until the turn is over, at least once. */
static int take_turn(struct bench_samples *us, bench_run run, void *arg)
{
	uint64_t start = afd__now_ns(), before = start, now;

	do {
		int rc = run(arg);

		if (rc < 0)
			return rc;
		now = afd__now_ns();
		bench_samples_add(us, (now - before) * 1e-3);
		before = now;
	} while (now - start < TURN_NS);
	return 0;
}

/* The same on a device with probes, between its own ceilings before and after. */
static int measure_on_gpu(struct bench *b, double seconds, json_t *what,
	const struct bench_work *work, bench_run run, void *arg)
{
	static struct bench_samples us;
	double read[2], multiply[2], read_us, multiply_us, median;
	int rc;

	us.n = 0;
	rc = bench_gpu_read(b->gpu, &read[0]);
	if (!rc)
		rc = bench_gpu_multiply(b->gpu, &multiply[0]);
	if (!rc)
		rc = bench_gpu_time(b->gpu, seconds, &us, run, arg);
	if (!rc)
		rc = bench_gpu_read(b->gpu, &read[1]);
	if (!rc)
		rc = bench_gpu_multiply(b->gpu, &multiply[1]);
	if (rc) {
		json_decref(what);
		return bench_fail();
	}
	median = bench_samples_at(&us, 0.5);
	read_us = work->dram_bytes / ((read[0] + read[1]) / 2) * 1e-3;
	multiply_us = work->flops / ((multiply[0] + multiply[1]) / 2) * 1e-3;
	if (what) {
		json_object_set_new(what, "bytes", json_real(work->dram_bytes));
		json_object_set_new(what, "flops", json_real(work->flops));
		json_object_set_new(what, "gb_per_s", json_real(work->dram_bytes / median * 1e-3));
		json_object_set_new(what, "tflop_per_s", json_real(work->flops / median * 1e-6));
		json_object_set_new(what, "read_gb_per_s", json_real((read[0] + read[1]) / 2));
		json_object_set_new(what, "multiply_tflop_per_s",
			json_real((multiply[0] + multiply[1]) / 2 * 1e-3));
	}
	return bench_report_add(&b->report, what, &us,
		read_us > multiply_us ? read_us : multiply_us,
		read_us > multiply_us ? "read" : "mma");
}

int bench_measure(struct bench *b, double seconds, json_t *what, const struct bench_work *work,
	bench_run run, void *arg)
{
	static struct bench_samples us, dram, fma;
	uint64_t until = afd__now_ns() + (uint64_t)(seconds * 1e9);
	double dram_rate, fma_rate, dram_us, fma_us;
	uint64_t start;
	bool slow;
	int rc;

	if (b->gpu)
		return measure_on_gpu(b, seconds, what, work, run, arg);
	us.n = dram.n = fma.n = 0;
	start = afd__now_ns();
	rc = run(arg); /* touches what is touched for the first time */
	slow = afd__now_ns() - start > SLOW_NS;
	if (slow)
		bench_samples_add(&us, (afd__now_ns() - start) * 1e-3);
	while (rc >= 0 && (afd__now_ns() < until || dram.n < PROBES_MIN)) {
		bench_samples_add(&dram, bench_probe_dram(&b->ceilings));
		bench_samples_add(&fma, bench_probe_fma(&b->ceilings));
		if (!slow)
			rc = take_turn(&us, run, arg);
	}
	if (rc < 0) {
		json_decref(what);
		return bench_fail();
	}
	dram_rate = bench_samples_at(&dram, 0.5);
	fma_rate = bench_samples_at(&fma, 0.5);
	dram_us = work->dram_bytes / dram_rate * 1e-3;
	fma_us = work->flops / fma_rate * 1e-3;
	if (what) {
		json_object_set_new(what, "dram_gb_per_s", json_real(dram_rate));
		json_object_set_new(what, "fma_gflop_per_s", json_real(fma_rate));
	}
	return bench_report_add(&b->report, what, &us, dram_us > fma_us ? dram_us : fma_us,
		dram_us > fma_us ? "dram" : "fma");
}

/* ---- the command `ceilings` ---- */

#define PASS_BYTES (64 << 20) /* what a line of the table speaks of */

/* A ceiling is its own limit: the ratio compares a pattern with the best one. */
static int report_patterns(struct bench *b, struct bench_samples *rates, double best)
{
	static struct bench_samples us;
	int status = TOOL_DONE;

	for (int i = 0; i < BENCH_PATTERNS && status == TOOL_DONE; i++) {
		const struct bench_pattern *p = &bench_patterns[i];
		char shape[64];

		snprintf(shape, sizeof shape, "%d stream%s, %zu B ahead", p->n_streams,
			p->n_streams > 1 ? "s" : "", p->prefetch_bytes);
		us.n = 0;
		for (uint32_t j = 0; j < rates[i].n; j++)
			bench_samples_add(&us, PASS_BYTES / rates[i].values[j] * 1e-3);
		status = bench_report_add(&b->report,
			json_pack("{s:s, s:s, s:i, s:f}", "op", "read", "shape", shape, "bytes",
				PASS_BYTES, "gb_per_s", bench_samples_at(&rates[i], 0.5)),
			&us, PASS_BYTES / best * 1e-3, "dram");
	}
	return status;
}

static int report_rate(struct bench *b, const char *op, const char *shape, const char *unit,
	struct bench_samples *rates, double work, const char *limit)
{
	static struct bench_samples us;
	double median = bench_samples_at(rates, 0.5);

	us.n = 0;
	for (uint32_t i = 0; i < rates->n; i++)
		bench_samples_add(&us, work / rates->values[i] * 1e-3);
	return bench_report_add(&b->report,
		json_pack("{s:s, s:s, s:f}", "op", op, "shape", shape, unit, median), &us,
		work / median * 1e-3, limit);
}

static int measure_ceilings(struct bench *b)
{
	static struct bench_samples rates[BENCH_PATTERNS];
	uint64_t until = afd__now_ns() + (uint64_t)(b->options->seconds * 1e9);
	double best = 0;
	int status;

	do {
		for (int i = 0; i < BENCH_PATTERNS; i++)
			bench_samples_add(&rates[i], bench_probe_pattern(&b->ceilings, i));
		bench_probe_dram(&b->ceilings);
		bench_probe_fma(&b->ceilings);
		bench_probe_copy(&b->ceilings);
	} while (afd__now_ns() < until);
	for (int i = 0; i < BENCH_PATTERNS; i++) {
		double rate = bench_samples_at(&rates[i], 0.5);

		best = rate > best ? rate : best;
	}
	status = report_patterns(b, rates, best);
	if (status == TOOL_DONE)
		status = report_rate(b, "fma", afd_context_isa(b->ctx), "gflop_per_s",
			&b->ceilings.fma, 1e9, "fma");
	if (status == TOOL_DONE)
		status = report_rate(
			b, "copy", "memcpy", "gb_per_s", &b->ceilings.copy, PASS_BYTES, "copy");
	return status;
}

int bench_ceilings(int argc, char **argv)
{
	struct bench_options o = { .stage = { .device = "cpu" }, .seconds = 3 };
	const struct tool_option options[] = { BENCH_OPTIONS(o, "3 s"), { 0 } };
	struct bench b;
	int status = tool_options_read(options,
		"ceilings [--threads N] [--seconds S] [--json]\n\n"
		"How fast this machine reads memory, multiplies and adds, and copies: the limits\n"
		"of everything else. Weights are cold: it rotates over 1 GiB.",
		argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	status = bench_open(&b, &o);
	if (status == TOOL_DONE)
		status = measure_ceilings(&b);
	return bench_close(&b, status);
}
