/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `calibrate`: measures stages and exchange through the library and fits the
 * coefficients, each with R2 and residuals; or fits those of the FFN and the exchange from
 * snapshots of a running deployment's metrics. The points stand in the file beside the lines, so
 * that whoever reads it may judge them, and so that a plan can use the points themselves.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "measure.h"
#include "plan.h"

enum { MAX_POINTS = 64 };

struct series {
	const char *stage;
	double x[MAX_POINTS], us[MAX_POINTS]; /* what is fitted: tokens or rows, us of a step */
	double rows[MAX_POINTS], context[MAX_POINTS];
	int32_t fitted[MAX_POINTS];
	size_t n;
	struct afd_plan_line line;
};

struct calibrate {
	struct plan_output output;
	struct measure m;
	struct tool_list metrics;
	const char *out;
	double seconds;
	uint32_t batch, context, rows;
	struct series attention, ffn, exchange;
	uint32_t n_done;
};

/* ---- points ---- */

static void add(struct series *s, double x, double rows, double context, double us, int fitted)
{
	if (s->n == MAX_POINTS)
		return;
	s->x[s->n] = x;
	s->rows[s->n] = rows;
	s->context[s->n] = context;
	s->us[s->n] = us;
	s->fitted[s->n++] = fitted;
}

static int fit(struct series *s)
{
	double x[MAX_POINTS], y[MAX_POINTS];
	size_t n = 0;

	for (size_t i = 0; i < s->n; i++) {
		x[n] = s->x[i];
		y[n] = s->us[i];
		n += s->fitted[i] ? 1 : 0;
	}
	s->line.size = sizeof s->line;
	if (afd_plan_fit(x, y, n, &s->line))
		return tool_fail(TOOL_FAILED, "%s: %s", s->stage, afd_last_error());
	return TOOL_DONE;
}

static void show_progress(struct calibrate *c, const char *what, uint32_t all)
{
	if (!isatty(STDERR_FILENO))
		return;
	c->n_done++;
	fprintf(stderr, "\r\033[Kmeasuring %s, %u of about %u", what, c->n_done, all);
	fflush(stderr);
}

/* Of the first batch the line is made; one row more tells what a row costs. */
static int measure_attention_points(struct calibrate *c, uint32_t all)
{
	uint32_t most = c->context;

	for (int pass = 0; pass < 2; pass++) {
		uint32_t batch = pass ? (c->batch > 1 ? 1 : 2) : c->batch;

		for (uint32_t at = most / 8 ? most / 8 : 1; at <= most;
			at += most / 8 ? most / 8 : 1) {
			double us;

			if (pass && at != most && at != most / 8)
				continue;
			show_progress(c, "attention", all);
			us = measure_attention(&c->m, batch, at);
			if (us < 0)
				return TOOL_FAILED;
			add(&c->attention, (double)batch * at, batch, at, us, !pass);
		}
	}
	return TOOL_DONE;
}

/* Rows from 1 on; the line is that of a batch and more, where an FFN of several workers operates.
 */
static int measure_row_points(struct calibrate *c, struct series *s,
	double (*measure)(struct measure *, uint32_t), uint32_t all)
{
	uint32_t most = c->rows;

	for (uint32_t rows = 1; rows <= most; rows = rows == most      ? most + 1
						     : 2 * rows < most ? 2 * rows
								       : most) {
		double us;

		show_progress(c, s->stage, all);
		us = measure(&c->m, rows);
		if (us < 0)
			return TOOL_FAILED;
		add(s, rows, rows, 0, us, rows >= c->batch);
	}
	return TOOL_DONE;
}

static int measure_all(struct calibrate *c)
{
	uint32_t n_rows = (uint32_t)ceil(log2(c->rows)) + 1, all = 10 + 2 * n_rows;
	int status = measure_open(&c->m);

	c->m.seconds = c->seconds / all;
	status = status ? status : measure_attention_points(c, all);
	status = status ? status : measure_row_points(c, &c->ffn, measure_ffn, all);
	status = status ? status : measure_row_points(c, &c->exchange, measure_exchange, all);
	if (isatty(STDERR_FILENO))
		fprintf(stderr, "\r\033[K");
	return status;
}

/* ---- metrics of a running deployment ---- */

/* The sum over all series of a name; NAN when there is none. */
static double metric(const char *text, const char *name)
{
	size_t n = strlen(name);
	double sum = 0;
	int found = 0;

	for (const char *line = text; line;
		line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
		const char *at = line + n;

		if (strncmp(line, name, n) || (*at != ' ' && *at != '{'))
			continue;
		while (*at == '{' || (*at != ' ' && *at && *at != '\n'))
			at++;
		sum += strtod(at, NULL);
		found = 1;
	}
	return found ? sum : NAN;
}

struct snapshot {
	double rows, passes, seconds; /* of the FFN */
	double wire_rows, wire_parts, wire_seconds;
};

static int read_snapshot(const char *path, struct snapshot *s)
{
	size_t n_bytes = 0;
	char *text = tool_file_read(path, &n_bytes);

	if (!text)
		return TOOL_FAILED;
	*s = (struct snapshot){ metric(text, "afd_ffn_rows_total"),
		metric(text, "afd_ffn_passes_total"), metric(text, "afd_ffn_compute_seconds_sum"),
		metric(text, "afd_transport_rows_total"), metric(text, "afd_transport_parts_total"),
		metric(text, "afd_transport_wire_seconds_sum") };
	free(text);
	if (isnan(s->rows) && isnan(s->wire_seconds))
		return tool_fail(TOOL_FAILED,
			"%s: neither afd_ffn_rows_total nor "
			"afd_transport_wire_seconds stands in it",
			path);
	return TOOL_DONE;
}

/* What happened between two snapshots: the mean pass, and the mean part. */
static int read_metrics(struct calibrate *c)
{
	struct snapshot before, now;
	int status = read_snapshot(c->metrics.items[0], &before);

	for (uint32_t i = 1; i < c->metrics.n_items && !status; i++, before = now) {
		double passes, parts;

		status = read_snapshot(c->metrics.items[i], &now);
		if (status)
			return status;
		passes = now.passes - before.passes;
		parts = now.wire_parts - before.wire_parts;
		if (passes > 0)
			add(&c->ffn, (now.rows - before.rows) / passes,
				(now.rows - before.rows) / passes, 0,
				(now.seconds - before.seconds) / passes * 1e6, 1);
		if (parts > 0 && now.wire_seconds > before.wire_seconds)
			add(&c->exchange, (now.wire_rows - before.wire_rows) / parts,
				(now.wire_rows - before.wire_rows) / parts, 0,
				(now.wire_seconds - before.wire_seconds) / parts * 1e6 / 2, 1);
	}
	if (!status && c->ffn.n < 2 && c->exchange.n < 2)
		return tool_fail(TOOL_FAILED,
			"--metrics: %zu intervals with passes, limit 2; give snapshots "
			"in the order of time",
			c->ffn.n);
	return status;
}

/* ---- the result ---- */

static json_t *times_json(const struct calibrate *c)
{
	const struct series *const all[] = { &c->attention, &c->ffn, &c->exchange };
	double layers = c->m.info.n_layers ? c->m.info.n_layers : 1;
	json_t *times = json_array();

	for (int s = 0; s < 3; s++) {
		for (size_t i = 0; i < all[s]->n; i++) {
			double fitted = all[s]->line.alpha * all[s]->x[i] + all[s]->line.beta;

			json_array_append_new(times,
				json_pack("{s:s, s:s, s:s, s:f, s:f, s:f, s:f, s:b}", "stage",
					all[s]->stage, "device", "this machine", "dtype",
					c->m.info.dtype ? afd_dtype_name(c->m.info.dtype) : "",
					"rows", all[s]->rows[i], "context", all[s]->context[i],
					"us", all[s]->us[i] / layers, "fit_us", fitted / layers,
					"fitted", all[s]->fitted[i]));
		}
	}
	return times;
}

static void set_line(json_t *result, json_t *r2, json_t *residuals, const struct series *s,
	const char *alpha, const char *beta)
{
	if (!s->line.size)
		return;
	json_object_set_new(result, alpha, json_real(s->line.alpha));
	json_object_set_new(result, beta, json_real(s->line.beta));
	json_object_set_new(r2, s->stage, json_real(s->line.r2));
	json_object_set_new(residuals, s->stage,
		json_pack("{s:f, s:f}", "p95", s->line.residual_p95, "max", s->line.residual_max));
}

static json_t *machine_json(const struct calibrate *c)
{
	FILE *file = fopen("/proc/cpuinfo", "r");
	char line[256], name[128] = "unknown", host[64] = "";

	while (file && fgets(line, sizeof line, file)) {
		const char *colon = strchr(line, ':');

		if (!strncmp(line, "model name", 10) && colon) {
			snprintf(name, sizeof name, "%.*s", (int)strcspn(colon + 2, "\n"),
				colon + 2);
			break;
		}
	}
	if (file)
		fclose(file);
	gethostname(host, sizeof host - 1);
	return json_pack("{s:s, s:s, s:I, s:I, s:s, s:s}", "host", host, "cpu", name, "cores",
		(json_int_t)tool_cores(), "threads", (json_int_t)c->m.stage.threads, "isa",
		c->m.ctx ? afd_context_isa(c->m.ctx) : "", "device", c->m.stage.device);
}

static json_t *result_json(const struct calibrate *c)
{
	json_t *result = json_object(), *r2 = json_object(), *residuals = json_object();
	uint32_t devices = c->m.stage.threads ? tool_cores() / c->m.stage.threads : 1;

	set_line(result, r2, residuals, &c->attention, "alpha_a", "beta_a");
	set_line(result, r2, residuals, &c->ffn, "alpha_f", "beta_f");
	set_line(result, r2, residuals, &c->exchange, "alpha_c", "beta_c");
	json_object_set_new(result, "unit", json_string("us"));
	json_object_set_new(result, "r2", r2);
	json_object_set_new(result, "residuals", residuals);
	if (c->m.ctx) {
		json_object_set_new(result, "batch", json_integer(c->batch));
		json_object_set_new(result, "layers", json_integer(1));
		json_object_set_new(result, "model_layers", json_integer(c->m.info.n_layers));
		json_object_set_new(result, "devices", json_integer(devices ? devices : 1));
		json_object_set_new(result, "model", json_string(c->m.stage.model));
		json_object_set_new(result, "machine", machine_json(c));
	}
	json_object_set_new(result, "times", times_json(c));
	return result;
}

static int write_file(const struct calibrate *c, const json_t *result)
{
	struct tool_file out;
	int rc = tool_file_open(&out, c->out);

	if (!rc) {
		json_dumpf(result, out.file, JSON_INDENT(1) | JSON_REAL_PRECISION(9));
		rc = tool_file_close(&out, 1);
	}
	return rc ? tool_fail(TOOL_FAILED, "%s: cannot be written: %s", c->out, strerror(-rc))
		  : TOOL_DONE;
}

static int run(struct calibrate *c)
{
	json_t *result;
	int status = plan_output_check(&c->output);

	if (!status && !c->metrics.n_items && !c->m.stage.model)
		status = tool_fail(TOOL_USAGE, "--model is missing (or --metrics)");
	if (!status && c->metrics.n_items == 1)
		status = tool_fail(TOOL_USAGE, "--metrics: 1 snapshot, limit 3 or more");
	status = status ? status : c->metrics.n_items ? read_metrics(c) : measure_all(c);
	if (!status && c->attention.n)
		status = fit(&c->attention);
	if (!status && c->ffn.n > 1)
		status = fit(&c->ffn);
	if (!status && c->exchange.n > 1)
		status = fit(&c->exchange);
	if (status)
		return status;
	result = result_json(c);
	status = c->out ? write_file(c, result) : TOOL_DONE;
	if (status)
		json_decref(result);
	return status ? status : plan_output_show(&c->output, result, "times", "calibrate");
}

int plan_calibrate(int argc, char **argv)
{
	static struct calibrate c;
	int status;

	c = (struct calibrate){ .m.stage = { .device = "cpu", .threads = 1 },
		.seconds = 20,
		.batch = 8,
		.context = 128,
		.attention.stage = "attention",
		.ffn.stage = "ffn",
		.exchange.stage = "exchange" };
	const struct tool_option options[] = {
		TOOL_OPTION_MODEL(c.m.stage),
		{ "out", "FILE", NULL, "the calibration, which size and simulate read",
			tool_set_text, &c.out, 0, 0 },
		{ "batch", "B", "8", "slots per worker and lane that the plan is for", tool_set_u32,
			&c.batch, 1, 4096 },
		{ "context", "C", "128", "the longest context that is measured", tool_set_u32,
			&c.context, 16, 1048576 },
		{ "rows", "N", "16 times the batch", "the most rows of the FFN", tool_set_u32,
			&c.rows, 2, 65536 },
		{ "device", "cpu|deferred", "cpu", "where the stages run", tool_set_device,
			&c.m.stage.device, 0, 0 },
		{ "threads", "N", "1", "compute threads of a stage", tool_set_u32,
			&c.m.stage.threads, 1, 1024 },
		{ "seconds", "S", "20 s", "for all measurements together", tool_set_real,
			&c.seconds, 0.1, 3600 },
		{ "metrics", "FILE", NULL,
			"instead of a model: snapshots of a deployment's metrics, in the "
			"order of time; repeat it",
			tool_set_list, &c.metrics, 0, 0 },
		TOOL_OPTION_LOG(c.m.stage),
		PLAN_OPTIONS_OUTPUT(c.output),
		{ 0 },
	};

	status = tool_options_read(options,
		"calibrate --model DIR [--out FILE]\n"
		"       afd-plan calibrate --metrics FILE --metrics FILE --metrics FILE\n\n"
		"Short measurements of this machine's stages, and the coefficients that fit them, "
		"in\n"
		"microseconds of a step (of metrics: of a pass).",
		argc, argv);
	if (!c.rows)
		c.rows = c.batch > 4096 ? 65536 : 16 * c.batch;
	if (!status)
		status = run(&c);
	else
		status = status < 0 ? TOOL_DONE : status;
	measure_close(&c.m);
	free(c.metrics.items);
	return status;
}
