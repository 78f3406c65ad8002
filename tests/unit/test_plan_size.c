/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sizing of bundles: the numbers of arXiv 2601.21351 (base case, Theorem 4.4, the finite horizon of
 * Definition 4.2), the barrier's integral against the known means of the largest of r normal
 * variables, and limits, lanes and pieces, which are derived here. Golden values without a mention
 * of the paper were computed by two other programs from the formulas of docs/planning.md.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <string.h>

#include <afd/afd.h>

#include "../support/near.h"

/* The paper's table 2, in cycles, and its base case. */
static const struct afd_plan_params paper = { .size = sizeof(paper),
	.alpha_a = 0.00165,
	.beta_a = 50,
	.alpha_f = 0.083,
	.beta_f = 100,
	.alpha_c = 0.022,
	.beta_c = 20,
	.batch = 256 };
static const struct afd_plan_load base = { .size = sizeof(base), .theta = 600, .nu2 = 250500 };

static struct afd_plan_point at(
	const struct afd_plan_params *p, const struct afd_plan_load *load, double r)
{
	struct afd_plan_point point = { .size = sizeof(point) };

	assert_int_equal(afd_plan_evaluate(p, load, r, &point), 0);
	return point;
}

static struct afd_plan_sizing size_of(
	const struct afd_plan_params *p, const struct afd_plan_load *load)
{
	struct afd_plan_sizing sizing = { .size = sizeof(sizing) };

	assert_int_equal(afd_plan_size(p, load, &sizing), 0);
	return sizing;
}

static void the_mean_of_the_largest_of_r_normals_is_known(void **state)
{
	static const struct {
		int r;
		double kappa;
	} known[] = { { 2, .56419 }, { 3, .84628 }, { 4, 1.02938 }, { 5, 1.16296 }, { 6, 1.26721 },
		{ 8, 1.42360 }, { 9, 1.48501 }, { 10, 1.53875 }, { 12, 1.62923 }, { 16, 1.76599 },
		{ 20, 1.86748 }, { 24, 1.94767 }, { 32, 2.06967 }, { 64, 2.34373 } };
	struct afd_plan_params p = { .size = sizeof(p), .alpha_a = 1, .batch = 1 };
	struct afd_plan_load load = { .size = sizeof(load), .theta = 100, .nu2 = 1 };

	for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
		near(at(&p, &load, known[i].r).tau_gaussian - 100, known[i].kappa, 5e-6);
}

static void the_base_case_has_the_golden_times_and_throughputs(void **state)
{
	static const struct {
		double r, t_f, tau, thr, tau_g, thr_g;
	} golden[] = {
		{ 1, 121.248, 303.440, .42183, 303.440, .42183 },
		{ 8, 269.984, 303.440, .74992, 322.250, .70615 },
		{ 9, 291.232, 303.440, .75929, 323.062, .71318 },
		{ 10, 312.480, 312.480, .74477, 323.925, .71846 },
		{ 11, 333.728, 333.728, .70317, 334.257, .70205 },
		{ 16, 439.968, 439.968, .54763, 439.968, .54763 },
	};

	for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
		struct afd_plan_point point = at(&paper, &base, golden[i].r);

		near(point.t_a, 303.44, 5e-4);
		near(point.t_f, golden[i].t_f, 5e-4);
		near(point.tau_mean_field, golden[i].tau, 5e-4);
		near(point.tau_gaussian, golden[i].tau_g, 5e-4);
		near(point.throughput_mean_field, golden[i].thr, 5e-6);
		near(point.throughput_gaussian, golden[i].thr_g, 5e-6);
	}
}

static void the_base_case_has_the_papers_optimum_and_terms(void **state)
{
	struct afd_plan_params bundle = paper;
	struct afd_plan_sizing s = size_of(&paper, &base);

	near(s.r_continuous, 9.574548, 5e-7);
	near(s.r_attention, 9.574548, 5e-7);
	near(s.r_peak, 2.169407, 5e-7);
	near(s.r_communication, -3.5, 0.05);
	near(s.throughput_continuous, 0.7638773, 5e-8);
	assert_int_equal(s.r, 9);
	assert_int_equal(s.r_gaussian, 10);
	assert_int_equal(s.bound, AFD_PLAN_ATTENTION);
	assert_int_equal(s.constraint, AFD_PLAN_FREE);
	bundle.comm_scope = AFD_PLAN_BUNDLE;
	near(size_of(&bundle, &base).r_communication, 50.3267, 5e-5);
}

/* Definition 4.2: over K = N / (B p) steps from an empty start the load is theta's mean field with
 * mu_D (1 - (1 - (1-p)^K) / (p K)) in place of mu_D. */
static double finite_theta(double prompt, double decode, double batch)
{
	double p = 1 / (decode + 1), steps = 10000 / (batch * p);

	return prompt + decode * (1 - (1 - pow(1 - p, steps)) / (p * steps));
}

static void the_papers_ratios_are_met_within_a_percent_over_its_finite_horizon(void **state)
{
	static const struct {
		double batch, prompt, decode, r;
	} cases[] = { { 128, 100, 500, 7.08 }, { 256, 100, 500, 9.34 }, { 512, 100, 500, 10.31 },
		{ 256, 100, 100, 2.17 }, { 256, 500, 500, 17.25 } };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_plan_params p = paper;
		struct afd_plan_load load = { .size = sizeof(load),
			.theta = finite_theta(cases[i].prompt, cases[i].decode, cases[i].batch) };

		p.batch = cases[i].batch;
		near(size_of(&p, &load).r_continuous, cases[i].r, 0.01 * cases[i].r);
	}
}

static void few_lanes_want_fewer_workers(void **state)
{
	struct afd_plan_params p = paper;

	p.lanes = 3;
	assert_int_equal(size_of(&p, &base).r, 9);
	p.lanes = 2;
	assert_int_equal(size_of(&p, &base).r, 7);
	p.lanes = 1;
	assert_int_equal(size_of(&p, &base).r, 5);
	assert_int_equal(size_of(&p, &base).bound, AFD_PLAN_LATENCY);
}

/* ---- workloads ---- */

static struct afd_plan_load average(struct afd_plan_workload w)
{
	struct afd_plan_load load = { .size = sizeof(load) };

	w.size = sizeof(w);
	if (afd_plan_average(&w, &load))
		fail_msg("%s", afd_last_error());
	return load;
}

static void a_trace_has_the_mean_and_variance_of_its_slot_history(void **state)
{
	static const struct afd_plan_request rows[] = { { 10, 2 }, { 40, 8 }, { 10, 1 },
		{ 30, 12 } };
	struct afd_plan_load load = average((struct afd_plan_workload){
		.requests = rows, .n_requests = 4, .request_bytes = sizeof(rows[0]) });

	near(load.theta, 35.0, 1e-12);
	near(load.nu2, 112.695652, 5e-7);
	near(load.mean_prompt + load.mean_output, 28.25, 1e-12);
}

static void independent_laws_have_their_closed_moments(void **state)
{
	struct afd_plan_law constant = { .kind = AFD_PLAN_CONSTANT, .mean = 100 };
	struct afd_plan_law geometric = { .kind = AFD_PLAN_GEOMETRIC, .mean = 501 };
	struct afd_plan_load load =
		average((struct afd_plan_workload){ .prompt = constant, .output = geometric });

	near(load.theta, 600, 1e-6);
	near(load.nu2, 250500, 1e-2);
	constant.mean = 1000;
	load = average((struct afd_plan_workload){
		.prompt = { AFD_PLAN_CONSTANT, 0, 100, 0 }, .output = constant });
	near(load.theta, 100 + 999 / 2.0, 1e-9);
}

/* D = P: theta is 3/2 E[P^2] / E[P], and E[P^2] = 2 E[P]^2 at cv 1. */
static void a_joint_law_sees_what_the_means_do_not(void **state)
{
	struct afd_plan_load load =
		average((struct afd_plan_workload){ .prompt = { AFD_PLAN_LOGNORMAL, 0, 400, 1 },
			.output = { AFD_PLAN_PROPORTIONAL, 0, 1, 0 } });

	near(load.mean_prompt + load.mean_output, 800, 1);
	near(load.theta, 1200, 2);
}

/* Every row of a trace that is drawn from a law, as the law says. */
static void a_trace_of_a_law_has_the_moments_of_the_law(void **state)
{
	static struct afd_plan_request rows[20000];
	struct afd_plan_law uniform = { .kind = AFD_PLAN_UNIFORM, .mean = 100, .shape = 50 };
	struct afd_plan_load law = average((struct afd_plan_workload){
		.prompt = uniform, .output = { AFD_PLAN_EXPONENTIAL, 100000, 300, 0 } });
	struct afd_plan_load trace;

	for (size_t i = 0; i < 20000; i++) {
		double u = (i + 0.5) / 20000, v = fmod((i + 0.5) * 0.6180339887498949, 1);

		rows[i].prompt_tokens = (uint32_t)(50 + 100 * v + 0.5);
		rows[i].output_tokens = (uint32_t)ceil(-300 * log(1 - u));
	}
	trace = average((struct afd_plan_workload){
		.requests = rows, .n_requests = 20000, .request_bytes = sizeof(rows[0]) });
	near(trace.theta, law.theta, 0.005 * law.theta);
	near(trace.nu2, law.nu2, 0.01 * law.nu2);
}

/* ---- limits and degenerate inputs ---- */

static void a_flat_ffn_has_no_optimum_but_the_largest_ratio(void **state)
{
	struct afd_plan_params p = paper;

	p.alpha_f = 0;
	p.r_max = 40;
	assert_int_equal(size_of(&p, &base).r, 40);
	assert_int_equal(size_of(&p, &base).constraint, AFD_PLAN_RANGE);
	assert_true(isinf(size_of(&p, &base).r_attention));
}

static void less_than_one_worker_per_ffn_is_said_with_a_bundle(void **state)
{
	struct afd_plan_params p = paper;
	struct afd_plan_sizing s;

	p.alpha_f = 3;
	p.beta_f = 1;
	s = size_of(&p, &base);
	assert_int_equal(s.ffn_limited, 1);
	assert_in_range(s.x, 1, s.y - 1);
	near(s.r_continuous, (double)s.x / s.y, 0.08);
	assert_int_equal(s.bound, AFD_PLAN_FFN);
}

static void the_slo_bounds_the_ratio(void **state)
{
	struct afd_plan_params p = paper;
	struct afd_plan_sizing s;

	p.lanes = 3;
	p.alpha_a = 0.0001;
	p.tpot_limit = 3 * 130;
	s = size_of(&p, &base);
	assert_int_equal(s.constraint, AFD_PLAN_SLO);
	near(s.r_limit, 30 / (0.083 * 256), 1e-6);
	assert_true(at(&p, &base, s.r).tpot <= 390);
	p.tpot_limit = 100;
	s = size_of(&p, &base);
	assert_int_equal(s.r, 0);
	assert_int_equal(s.constraint, AFD_PLAN_SLO);
}

static void kv_memory_bounds_the_batch_and_names_it(void **state)
{
	struct afd_plan_params p = paper;
	struct afd_plan_load still = { .size = sizeof(still), .theta = 600 };

	p.lanes = 2;
	p.kv_bytes_per_token = 1000;
	p.attention_weight_bytes = 1e6;
	p.attention_memory_bytes = 1e6 + 2 * 100 * 600 * 1000.0;
	assert_int_equal(size_of(&p, &still).constraint, AFD_PLAN_KV_MEMORY);
	near(size_of(&p, &still).batch_limit, 100, 1e-6);
	assert_int_equal(size_of(&p, &still).r, 0);
	assert_true(size_of(&p, &base).batch_limit < 100); /* the spread takes room, too */
	p.batch = 60;
	assert_int_not_equal(size_of(&p, &still).r, 0);
}

static void ffn_memory_bounds_the_ratio(void **state)
{
	struct afd_plan_params p = paper;

	p.ffn_row_bytes = 1000;
	p.ffn_weight_bytes = 1e9;
	p.ffn_memory_bytes = 1e9 + 4.5 * 256 * 1000;
	assert_int_equal(size_of(&p, &base).r, 4);
	assert_int_equal(size_of(&p, &base).constraint, AFD_PLAN_FFN_MEMORY);
}

/* A line through a roofline has a peak that is not there. */
static void a_roofline_ffn_is_best_at_its_ridge_or_where_attention_is_met(void **state)
{
	struct afd_plan_params line = paper, roof = paper, knots = paper;
	const struct afd_plan_knot points[] = { { 0, 300 }, { 3000, 300 }, { 6000, 600 } };

	roof.beta_f = 0;
	roof.ffn_floor = 300;
	roof.alpha_f = 0.1;
	knots.beta_f = 0;
	knots.ffn_knots = points;
	knots.n_ffn_knots = 3;
	knots.knot_bytes = sizeof(points[0]);
	near(size_of(&roof, &base).r_continuous, 303.44 / 25.6, 1e-6);
	near(size_of(&knots, &base).r_continuous, 303.44 / 25.6, 1e-6);
	line.beta_f = 300;
	line.alpha_f = 0.05;
	assert_true(size_of(&line, &base).r_continuous < 6);
}

static void bad_fields_are_named_with_value_and_limit(void **state)
{
	const struct {
		struct afd_plan_params p;
		double theta;
		const char *words[2];
	} cases[] = {
		{ { .alpha_a = NAN, .batch = 1 }, 1, { "alpha_a", "nan" } },
		{ { .beta_f = -1, .batch = 1 }, 1, { "beta_f", "-1" } },
		{ { .beta_c = INFINITY, .batch = 1 }, 1, { "beta_c", "inf" } },
		{ { .beta_a = 1 }, 1, { "batch", "0" } },
		{ { .beta_a = 1, .batch = 1, .lanes = 65 }, 1, { "lanes", "65" } },
		{ { .beta_a = 1, .batch = 1, .comm_scope = 3 }, 1, { "comm_scope", "3" } },
		{ { .beta_a = 1, .batch = 1, .comm_scope = -1 }, 1,
			{ "comm_scope", "limit 1 .. 2" } },
		{ { .beta_a = 1, .batch = 1, .r_max = 70000 }, 1, { "r_max", "65536" } },
		{ { .beta_a = 1, .batch = 1, .r_min = 9, .r_max = 8 }, 1, { "r_max", "9" } },
		{ { .beta_a = 1, .batch = 1, .n_ffn_knots = 2 }, 1, { "ffn_knots", "NULL" } },
		{ { .beta_a = 1, .batch = 1, .cost_a = -2 }, 1, { "cost_a", "-2" } },
		{ { .batch = 1 }, 1, { "all times are 0", "" } },
		{ { .beta_a = 1, .batch = 1 }, NAN, { "theta", "nan" } },
	};
	struct afd_plan_sizing out = { .size = sizeof(out), .r = 77 };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_plan_params p = cases[i].p;
		struct afd_plan_load load = { .size = sizeof(load), .theta = cases[i].theta };

		p.size = sizeof(p);
		assert_int_equal(afd_plan_size(&p, &load, &out), -EINVAL);
		assert_non_null(strstr(afd_last_error(), cases[i].words[0]));
		assert_non_null(strstr(afd_last_error(), cases[i].words[1]));
		assert_int_equal(out.r, 77);
	}
}

static void bad_workloads_are_named(void **state)
{
	static const struct afd_plan_request endless = { 5, 0 };
	const struct {
		struct afd_plan_workload w;
		const char *word;
	} cases[] = {
		{ { .theta = 0 }, "theta" },
		{ { .theta = 5, .prompt = { AFD_PLAN_CONSTANT, 0, 1, 0 } }, "must be one" },
		{ { .prompt = { AFD_PLAN_CONSTANT, 0, 1, 0 } }, "output kind is 0" },
		{ { .prompt = { 9, 0, 1, 0 }, .output = { 1, 0, 1, 0 } }, "prompt kind is 9" },
		{ { .prompt = { 1, 0, NAN, 0 }, .output = { 1, 0, 1, 0 } }, "prompt mean" },
		{ { .prompt = { 7, 0, 1, 0 }, .output = { 1, 0, 1, 0 } }, "proportional" },
		{ { .prompt = { 1, 0, 1, 0 }, .output = { 5, 0, 9, 1 } }, "output shape" },
		{ { .prompt = { 1, 0, 1, 0 }, .output = { 2, 8, 9, 0 } }, "output mean" },
		{ { .n_requests = 3 }, "requests is NULL" },
		{ { .requests = &endless }, "n_requests is 0" },
		{ { .requests = &endless, .n_requests = 1, .request_bytes = 8 },
			"output_tokens is 0" },
		{ { .requests = &endless, .n_requests = 1, .request_bytes = 4 }, "request_bytes" },
	};
	struct afd_plan_load out = { .size = sizeof(out) };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_plan_workload w = cases[i].w;

		w.size = sizeof(w);
		assert_int_equal(afd_plan_average(&w, &out), -EINVAL);
		if (!strstr(afd_last_error(), cases[i].word))
			fail_msg("case %zu: '%s' lacks '%s'", i, afd_last_error(), cases[i].word);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_mean_of_the_largest_of_r_normals_is_known),
		cmocka_unit_test(the_base_case_has_the_golden_times_and_throughputs),
		cmocka_unit_test(the_base_case_has_the_papers_optimum_and_terms),
		cmocka_unit_test(
			the_papers_ratios_are_met_within_a_percent_over_its_finite_horizon),
		cmocka_unit_test(few_lanes_want_fewer_workers),
		cmocka_unit_test(a_trace_has_the_mean_and_variance_of_its_slot_history),
		cmocka_unit_test(independent_laws_have_their_closed_moments),
		cmocka_unit_test(a_joint_law_sees_what_the_means_do_not),
		cmocka_unit_test(a_trace_of_a_law_has_the_moments_of_the_law),
		cmocka_unit_test(a_flat_ffn_has_no_optimum_but_the_largest_ratio),
		cmocka_unit_test(less_than_one_worker_per_ffn_is_said_with_a_bundle),
		cmocka_unit_test(the_slo_bounds_the_ratio),
		cmocka_unit_test(kv_memory_bounds_the_batch_and_names_it),
		cmocka_unit_test(ffn_memory_bounds_the_ratio),
		cmocka_unit_test(a_roofline_ffn_is_best_at_its_ridge_or_where_attention_is_met),
		cmocka_unit_test(bad_fields_are_named_with_value_and_limit),
		cmocka_unit_test(bad_workloads_are_named),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
