/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the flags of a system and a workload name: laws as text, traces, calibrations, measured
 * times. Parsing of files is the library's, so that it is fuzzed and hosts have it too.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "plan.h"

static const char *const NAMES[PLAN_COEFFICIENTS] = { "alpha-a", "beta-a", "alpha-f", "beta-f",
	"alpha-c", "beta-c" };

/* ---- files ---- */

static int fail_in(const char *path)
{
	return tool_fail(TOOL_FAILED, "%s: %s", path, afd_last_error());
}

struct afd_plan_time *plan_read_times(const char *path, size_t *n_times)
{
	size_t n_bytes = 0;
	char *text = tool_file_read(path, &n_bytes);
	struct afd_plan_time *times = NULL;
	int rc = text ? afd_plan_parse_times(text, n_bytes, NULL, 0, n_times) : -1;

	if (text && rc == -ENOSPC)
		times = calloc(*n_times, sizeof *times);
	if (times)
		rc = afd_plan_parse_times(text, n_bytes, times, *n_times, n_times);
	if (text && rc < 0) {
		fail_in(path);
		free(times);
		times = NULL;
	}
	free(text);
	return times;
}

/* ---- laws ---- */

static int read_law(const char *flag, const char *text, struct afd_plan_law *law)
{
	static const char *const kinds[] = { "constant", "geometric", "exponential", "lognormal",
		"pareto", "uniform", "prompt" };
	static const int least[] = { 1, 1, 1, 2, 2, 2, 1 }, most[] = { 1, 1, 1, 2, 3, 2, 1 };
	double numbers[3] = { 0 };
	size_t n_chars = strcspn(text, ":");
	const char *at = text + n_chars;
	int kind = 0, n = 0;

	while (kind < 7 && (strlen(kinds[kind]) != n_chars || strncmp(text, kinds[kind], n_chars)))
		kind++;
	for (; *at == ':' && n < 3; n++) {
		char *end;

		numbers[n] = strtod(at + 1, &end);
		if (end == at + 1 || !isfinite(numbers[n]))
			break;
		at = end;
	}
	if (kind == 7 || *at || n < least[kind] || n > most[kind] || numbers[2] < 0 ||
		numbers[2] > 1e8)
		return tool_fail(TOOL_USAGE,
			"--%s %s: not a law, limit constant:N, geometric:MEAN, "
			"exponential:MEAN, lognormal:MEAN:CV, pareto:MEAN:INDEX[:MAX], "
			"uniform:LOW:HIGH%s",
			flag, text, flag[0] == 'o' ? ", prompt:FACTOR" : "");
	*law = (struct afd_plan_law){ .kind = AFD_PLAN_CONSTANT + kind,
		.mean = numbers[0],
		.shape = numbers[1],
		.max = (uint32_t)numbers[2] };
	if (law->kind == AFD_PLAN_UNIFORM) {
		law->mean = (numbers[0] + numbers[1]) / 2;
		law->shape = numbers[0];
	}
	return TOOL_DONE;
}

static int read_trace(struct plan_system *s)
{
	size_t n_bytes = 0, n_rows = 0;
	char *text = tool_file_read(s->trace, &n_bytes);
	int rc;

	if (!text)
		return TOOL_FAILED;
	rc = afd_plan_parse_trace(text, n_bytes, NULL, 0, &n_rows);
	if (rc == -ENOSPC) {
		s->requests = calloc(n_rows, sizeof *s->requests);
		rc = s->requests ? afd_plan_parse_trace(text, n_bytes, s->requests, n_rows, &n_rows)
				 : -ENOMEM;
	}
	free(text);
	if (rc == -ENOMEM)
		return tool_fail(TOOL_FAILED, "%s: no memory for %zu rows", s->trace, n_rows);
	if (rc < 0)
		return fail_in(s->trace);
	s->workload.requests = s->requests;
	s->workload.n_requests = n_rows;
	s->workload.request_bytes = sizeof *s->requests;
	return TOOL_DONE;
}

int plan_workload_read(struct plan_system *s)
{
	int n_ways = (s->theta > 0) + (s->prompt || s->output) + (s->trace != NULL);
	int status;

	if (n_ways != 1)
		return tool_fail(TOOL_USAGE,
			"%s of --theta, --prompt with --output, and --trace %s given, "
			"must be one",
			n_ways ? "several" : "none", n_ways ? "are" : "is");
	if (s->nu2 > 0 && !(s->theta > 0))
		return tool_fail(TOOL_USAGE, "--nu2: only with --theta");
	s->workload.theta = s->theta;
	s->workload.nu2 = s->nu2;
	if (s->trace)
		return read_trace(s);
	if (s->theta > 0)
		return TOOL_DONE;
	if (!s->prompt || !s->output)
		return tool_fail(TOOL_USAGE, "--%s is missing", s->prompt ? "output" : "prompt");
	status = read_law("prompt", s->prompt, &s->workload.prompt);
	return status ? status : read_law("output", s->output, &s->workload.output);
}

/* ---- the system ---- */

void plan_system_begin(struct plan_system *s)
{
	*s = (struct plan_system){ .params.size = sizeof s->params,
		.params.r_max = 32,
		.workload.size = sizeof s->workload,
		.devices = UINT32_MAX };
	for (int i = 0; i < PLAN_COEFFICIENTS; i++)
		s->coefficients[i] = NAN;
}

void plan_system_end(struct plan_system *s)
{
	free(s->requests);
	free(s->knots);
}

/* The measured FFN of a calibration: what a line would smooth away is there. */
static int use_knots(
	struct plan_system *s, const struct afd_plan_time *times, size_t n_times, double layers)
{
	uint32_t n = 0;

	s->knots = calloc(n_times, sizeof *s->knots);
	if (!s->knots)
		return tool_fail(TOOL_FAILED, "%s: no memory", s->calibration);
	for (size_t i = 0; i < n_times; i++) {
		if (strcmp(times[i].stage, "ffn") || (n && times[i].rows <= s->knots[n - 1].rows))
			continue;
		s->knots[n++] = (struct afd_plan_knot){ times[i].rows, times[i].us * layers };
	}
	if (n >= 2) {
		s->params.ffn_knots = s->knots;
		s->params.n_ffn_knots = n;
		s->params.knot_bytes = sizeof *s->knots;
	}
	return TOOL_DONE;
}

/* Times of a calibration are in microseconds of a step: its own "layers" says how many layers they
 * are of. */
static int read_calibration(struct plan_system *s)
{
	json_error_t error;
	size_t n_bytes = 0, n_times = 0;
	char *text = tool_file_read(s->calibration, &n_bytes);
	struct afd_plan_params *p = &s->params;
	double batch = p->batch;
	json_t *root;
	int status = TOOL_DONE;

	if (!text)
		return TOOL_FAILED;
	if (afd_plan_parse_calibration(text, n_bytes, p)) {
		free(text);
		return fail_in(s->calibration);
	}
	root = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &error);
	p->batch = batch > 0 ? batch : p->batch;
	if (json_is_array(json_object_get(root, "times"))) {
		struct afd_plan_time *times = plan_read_times(s->calibration, &n_times);
		double layers = json_number_value(json_object_get(root, "model_layers"));

		status =
			times ? use_knots(s, times, n_times, layers > 0 ? layers : 1) : TOOL_FAILED;
		free(times);
		p->beta_f = p->n_ffn_knots ? 0 : p->beta_f;
	}
	json_decref(root);
	free(text);
	return status;
}

static int apply_flags(struct plan_system *s)
{
	double *const fields[] = { &s->params.alpha_a, &s->params.beta_a, &s->params.alpha_f,
		&s->params.beta_f, &s->params.alpha_c, &s->params.beta_c };

	for (int i = 0; i < PLAN_COEFFICIENTS; i++) {
		if (isnan(s->coefficients[i]) && !s->calibration && i < 4)
			return tool_fail(
				TOOL_USAGE, "--%s is missing (or --calibration)", NAMES[i]);
		if (!isnan(s->coefficients[i]))
			*fields[i] = s->coefficients[i];
	}
	if (!isnan(s->coefficients[2]) || !isnan(s->coefficients[3]))
		s->params.n_ffn_knots = 0;
	s->params.lanes = s->lanes;
	if (!(s->params.batch > 0))
		return tool_fail(TOOL_USAGE, "--batch is missing");
	if (s->params.r_min > s->params.r_max)
		return tool_fail(TOOL_USAGE, "--r-min: value '%u', limit 1 to %u (--r-max)",
			s->params.r_min, s->params.r_max);
	return TOOL_DONE;
}

int plan_system_read(struct plan_system *s)
{
	struct afd_plan_params flags = s->params;
	int status = s->calibration ? read_calibration(s) : TOOL_DONE;

	if (s->devices != UINT32_MAX)
		s->params.devices = s->devices;
	if (flags.layers)
		s->params.layers = flags.layers;
	status = status ? status : apply_flags(s);
	return status ? status : plan_workload_read(s);
}
