/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `simulate`: the curve of throughput by simulation, with its intervals, beside the
 * closed form's choice and what that choice would lose. Flags say when the closed form is outside
 * of what it holds for.
 */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "plan.h"

struct simulate {
	struct plan_system system;
	struct plan_output output;
	struct afd_plan_simulate_params params;
	uint32_t timeline, seeds;
	uint64_t requests;
	struct afd_plan_load load;
	struct afd_plan_sizing sizing;
	/* the run */
	double best, at_closed, seconds;
	uint32_t r;
	uint64_t n_updates;
	int is_short;
	json_t *spans;
};

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void show_progress(uint32_t done, uint32_t all)
{
	if (!isatty(STDERR_FILENO))
		return;
	fprintf(stderr, "\rsimulating [%-40.*s] %u of %u", (int)(40 * done / all),
		"########################################", done, all);
	if (done == all)
		fprintf(stderr, "\r\033[K");
	fflush(stderr);
}

/* ---- one ratio ---- */

static json_t *spans_json(const struct afd_plan_span *spans, size_t n)
{
	json_t *list = json_array();

	for (size_t i = 0; i < n; i++)
		json_array_append_new(
			list, json_pack("{s:s, s:I, s:I, s:I, s:f, s:f}", "stage",
				      plan_bound_name((int32_t)spans[i].stage), "worker",
				      (json_int_t)spans[i].worker, "lane",
				      (json_int_t)spans[i].lane, "step", (json_int_t)spans[i].step,
				      "start", spans[i].start, "end", spans[i].end));
	return list;
}

static int run_ratio(struct simulate *s, uint32_t r, struct afd_plan_simulation *out,
	struct afd_plan_span *spans)
{
	double start = now();
	int rc;

	*out = (struct afd_plan_simulation){ .size = sizeof *out };
	s->params.r = r;
	s->params.spans = spans;
	s->params.span_room = spans ? s->timeline : 0;
	s->params.span_bytes = sizeof *spans;
	s->params.scratch_bytes =
		afd_plan_simulate_bytes(&s->system.params, &s->system.workload, &s->params);
	if (!s->params.scratch_bytes)
		return plan_fail();
	s->params.scratch = aligned_alloc(64, s->params.scratch_bytes);
	if (!s->params.scratch)
		return tool_fail(
			TOOL_FAILED, "r %u: no memory for %zu bytes", r, s->params.scratch_bytes);
	rc = afd_plan_simulate(&s->system.params, &s->system.workload, &s->params, out);
	free(s->params.scratch);
	s->seconds += now() - start;
	s->n_updates += out->n_slot_updates;
	return rc ? plan_fail() : TOOL_DONE;
}

static int add_ratio(struct simulate *s, uint32_t r, json_t *curve)
{
	struct afd_plan_simulation sim;
	struct afd_plan_point point = { .size = sizeof point };
	int status = run_ratio(s, r, &sim, NULL);

	if (!status && afd_plan_evaluate(&s->system.params, &s->load, r, &point))
		status = plan_fail();
	if (status)
		return status;
	if (sim.throughput > s->best) {
		s->best = sim.throughput;
		s->r = r;
	}
	if (r == s->sizing.r)
		s->at_closed = sim.throughput;
	s->is_short |= (int)sim.short_run;
	json_array_append_new(curve,
		json_pack("{s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "r", (json_int_t)r,
			"throughput", sim.throughput, "ci95", sim.ci95, "tpot_p50", sim.tpot_p50,
			"tpot_p99", sim.tpot_p99, "idle_a", sim.idle_a, "idle_f", sim.idle_f,
			"theta", sim.theta, "throughput_mean_field", point.throughput_mean_field,
			"throughput_gaussian", point.throughput_gaussian));
	return TOOL_DONE;
}

static int add_timeline(struct simulate *s)
{
	struct afd_plan_span *spans = s->timeline ? calloc(s->timeline, sizeof *spans) : NULL;
	struct afd_plan_simulation sim;
	uint64_t requests = s->params.n_requests;
	int status;

	if (!s->timeline)
		return TOOL_DONE;
	if (!spans)
		return tool_fail(TOOL_FAILED, "--timeline: no memory for %u spans", s->timeline);
	s->params.n_requests = 1;
	status = run_ratio(s, s->r, &sim, spans);
	s->params.n_requests = requests;
	if (!status)
		s->spans = spans_json(spans, sim.n_spans);
	free(spans);
	return status;
}

/* ---- the result ---- */

/* Where closed form and simulation may part, and by what one sees it. */
static json_t *flags_json(const struct simulate *s)
{
	double regret = s->best > 0 ? 1 - s->at_closed / s->best : 0;
	double off = s->r > s->sizing.r ? s->r - s->sizing.r : s->sizing.r - s->r;
	json_t *flags = json_array();

	if (s->sizing.heavy_tail)
		json_array_append_new(flags, json_string("heavy_tail"));
	if (s->is_short)
		json_array_append_new(flags, json_string("short_run"));
	if (off > (0.1 * s->r > 1 ? 0.1 * s->r : 1) || regret > 0.03)
		json_array_append_new(flags, json_string("closed_form_differs"));
	return flags;
}

static json_t *result_json(const struct simulate *s, json_t *curve)
{
	json_t *result =
		json_pack("{s:I, s:f, s:f, s:f, s:{s:I, s:I, s:f, s:f}, s:o, s:I, s:I, s:f, s:o}",
			"r", (json_int_t)s->r, "throughput", s->best, "theta", s->load.theta, "nu2",
			s->load.nu2, "closed_form", "r", (json_int_t)s->sizing.r, "r_gaussian",
			(json_int_t)s->sizing.r_gaussian, "r_continuous", s->sizing.r_continuous,
			"regret", s->best > 0 ? 1 - s->at_closed / s->best : 0, "flags",
			flags_json(s), "seeds", (json_int_t)s->params.n_seeds, "slot_updates",
			(json_int_t)s->n_updates, "slot_updates_per_second",
			s->seconds > 0 ? (double)s->n_updates / s->seconds : 0, "curve", curve);

	if (result && s->spans)
		json_object_set(result, "timeline", s->spans);
	return result;
}

static int prepare(struct simulate *s)
{
	int status = plan_output_check(&s->output);

	status = status ? status : plan_system_read(&s->system);
	if (!status && s->system.theta > 0)
		return tool_fail(TOOL_USAGE,
			"--theta: a simulation needs --prompt and --output, or --trace");
	s->params.n_seeds = s->seeds;
	s->params.n_requests = s->requests;
	if (!status && afd_plan_average(&s->system.workload, &s->load))
		status = plan_fail();
	if (!status && afd_plan_size(&s->system.params, &s->load, &s->sizing))
		status = plan_fail();
	return status;
}

static int run(struct simulate *s)
{
	uint32_t low = s->system.params.r_min ? s->system.params.r_min : 1,
		 high = s->system.params.r_max;
	json_t *curve = json_array();
	int status = TOOL_DONE;

	for (uint32_t r = low; r <= high && !status; r++) {
		show_progress(r - low, high - low + 1);
		status = add_ratio(s, r, curve);
	}
	show_progress(1, 1);
	status = status ? status : add_timeline(s);
	if (!status)
		return plan_output_show(&s->output, result_json(s, curve), "curve",
			s->timeline ? "timeline" : "simulate");
	json_decref(curve);
	return status;
}

int plan_simulate(int argc, char **argv)
{
	struct simulate s = { .params = { .size = sizeof s.params },
		.load = { .size = sizeof s.load },
		.sizing = { .size = sizeof s.sizing },
		.seeds = 8,
		.requests = 3000 };
	int status;

	plan_system_begin(&s.system);
	const struct tool_option options[] = {
		PLAN_OPTIONS_SYSTEM(s.system),
		{ "seeds", "N", "8", "independent runs, for the 95 % interval", tool_set_u32,
			&s.seeds, 1, 4096 },
		{ "requests", "N", "3000", "requests that a worker finishes in a run", tool_set_u64,
			&s.requests, 0, 0 },
		{ "seed", "S", "0", "the first seed", tool_set_u64, &s.params.seed, 0, 0 },
		{ "start", "stationary|empty", "stationary", "what slots hold at first",
			tool_set_either, &s.params.start, 0, 0 },
		{ "flow", "pipelined|lock-step", "pipelined",
			"whether a worker waits for the slowest in every frame", tool_set_either,
			&s.params.flow, 0, 0 },
		{ "replay", "shuffled|in-order", "shuffled", "rows of a trace", tool_set_either,
			&s.params.replay, 0, 0 },
		{ "timeline", "N", "0",
			"with the first N spans of the best ratio; --plot draws them", tool_set_u32,
			&s.timeline, 0, 100000 },
		PLAN_OPTIONS_OUTPUT(s.output),
		{ 0 },
	};

	status = tool_options_read(options,
		"simulate --alpha-a T ... --batch B (--prompt LAW --output LAW | --trace FILE)\n\n"
		"Every slot of every worker and lane, for each ratio from --r-min to --r-max.",
		argc, argv);
	if (status)
		return status < 0 ? TOOL_DONE : status;
	status = prepare(&s);
	status = status ? status : run(&s);
	json_decref(s.spans);
	plan_system_end(&s.system);
	return status;
}
