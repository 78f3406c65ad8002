/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulator against closed forms where they are exact, against itself, and against the closed
 * form of the bracket on the workloads of docs/planning.md. Coefficients are those of arXiv
 * 2601.21351, table 2; the bounds on ratio and regret are ours.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <afd/afd.h>

#include "../support/near.h"

static const struct afd_plan_params paper = { .size = sizeof(paper),
	.alpha_a = 0.00165,
	.beta_a = 50,
	.alpha_f = 0.083,
	.beta_f = 100,
	.alpha_c = 0.022,
	.beta_c = 20,
	.batch = 256,
	.lanes = 3 };
static const struct afd_plan_workload geometric = { .size = sizeof(geometric),
	.prompt = { AFD_PLAN_CONSTANT, 0, 100, 0 },
	.output = { AFD_PLAN_GEOMETRIC, 0, 501, 0 } };

static struct afd_plan_simulation simulate(const struct afd_plan_params *p,
	const struct afd_plan_workload *w, struct afd_plan_simulate_params s)
{
	struct afd_plan_simulation out = { .size = sizeof(out) };

	s.size = sizeof(s);
	s.scratch_bytes = afd_plan_simulate_bytes(p, w, &s);
	if (!s.scratch_bytes)
		fail_msg("%s", afd_last_error());
	s.scratch = aligned_alloc(64, s.scratch_bytes);
	assert_non_null(s.scratch);
	if (afd_plan_simulate(p, w, &s, &out))
		fail_msg("%s", afd_last_error());
	free(s.scratch);
	return out;
}

/* ---- where the closed form is exact ---- */

static void equal_slots_give_the_closed_cycle_for_any_number_of_lanes(void **state)
{
	/* One step per request: the load never moves. */
	struct afd_plan_workload still = { .size = sizeof(still),
		.prompt = { AFD_PLAN_CONSTANT, 0, 600, 0 },
		.output = { AFD_PLAN_CONSTANT, 0, 1, 0 } };
	struct afd_plan_load load = { .size = sizeof(load), .theta = 600 };

	for (uint32_t lanes = 1; lanes <= 5; lanes++) {
		for (uint32_t r = 1; r <= 16; r += 3) {
			struct afd_plan_params p = paper;
			struct afd_plan_point point = { .size = sizeof(point) };

			p.lanes = lanes;
			p.comm_scope = r % 2 ? AFD_PLAN_WORKER : AFD_PLAN_BUNDLE;
			assert_int_equal(afd_plan_evaluate(&p, &load, r, &point), 0);
			near(simulate(&p, &still,
				     (struct afd_plan_simulate_params){
					     .r = r, .n_seeds = 1, .n_requests = 200000 })
					.tau,
				point.tau_mean_field, 0.002 * point.tau_mean_field);
		}
	}
}

static void a_slow_link_is_a_stage_of_its_own(void **state)
{
	struct afd_plan_workload still = { .size = sizeof(still),
		.prompt = { AFD_PLAN_CONSTANT, 0, 600, 0 },
		.output = { AFD_PLAN_CONSTANT, 0, 1, 0 } };
	struct afd_plan_params p = paper;

	p.beta_c = 400;
	p.alpha_c = 0;
	p.lanes = 8;
	near(simulate(&p, &still,
		     (struct afd_plan_simulate_params){
			     .r = 4, .n_seeds = 1, .n_requests = 100000 })
			.tau,
		400, 4);
}

static void slots_start_as_a_random_step_finds_them(void **state)
{
	static const struct afd_plan_workload loads[] = {
		{ .size = sizeof(loads[0]),
			.prompt = { AFD_PLAN_CONSTANT, 0, 100, 0 },
			.output = { AFD_PLAN_GEOMETRIC, 0, 501, 0 } },
		{ .size = sizeof(loads[0]),
			.prompt = { AFD_PLAN_EXPONENTIAL, 0, 100, 0 },
			.output = { AFD_PLAN_CONSTANT, 0, 1000, 0 } },
		{ .size = sizeof(loads[0]),
			.prompt = { AFD_PLAN_UNIFORM, 0, 300, 100 },
			.output = { AFD_PLAN_UNIFORM, 0, 500, 0 } },
		{ .size = sizeof(loads[0]),
			.prompt = { AFD_PLAN_LOGNORMAL, 0, 300, 1.5 },
			.output = { AFD_PLAN_LOGNORMAL, 0, 300, 1 } },
		{ .size = sizeof(loads[0]),
			.prompt = { AFD_PLAN_CONSTANT, 0, 100, 0 },
			.output = { AFD_PLAN_PARETO, 20000, 400, 2.5 } },
		{ .size = sizeof(loads[0]),
			.prompt = { AFD_PLAN_LOGNORMAL, 0, 400, 1 },
			.output = { AFD_PLAN_PROPORTIONAL, 0, 0.5, 0 } },
	};

	for (size_t i = 0; i < sizeof(loads) / sizeof(loads[0]); i++) {
		struct afd_plan_load load = { .size = sizeof(load) };
		struct afd_plan_simulation s;

		assert_int_equal(afd_plan_average(&loads[i], &load), 0);
		/* 64 steps: what the slots hold is what they started with. */
		s = simulate(&paper, &loads[i],
			(struct afd_plan_simulate_params){
				.r = 32, .n_seeds = 16, .n_requests = 1 });
		near(s.theta, load.theta, 0.015 * load.theta);
	}
}

static void an_empty_start_reaches_the_finite_horizons_load(void **state)
{
	/* Definition 4.2 of the paper: 100 + 500 (1 - (1 - q^K) / (p K)), q = 1 - p. */
	double p = 1 / 501.0, steps = 3000 * 501 / (256.0 * 3);
	double theta = 100 + 500 * (1 - (1 - pow(1 - p, steps)) / (p * steps));
	struct afd_plan_simulation s = simulate(&paper, &geometric,
		(struct afd_plan_simulate_params){ .r = 8, .n_seeds = 8, .start = AFD_PLAN_EMPTY });

	near(s.theta, theta, 0.01 * theta);
	assert_int_equal(s.short_run, 1);
}

/* ---- traces ---- */

static void a_trace_is_replayed_with_its_pairs(void **state)
{
	static struct afd_plan_request rows[5000];
	struct afd_plan_workload w = { .size = sizeof(w),
		.requests = rows,
		.n_requests = 5000,
		.request_bytes = sizeof(rows[0]) };
	struct afd_plan_load load = { .size = sizeof(load) };

	for (uint32_t i = 0; i < 5000; i++)
		rows[i] = (struct afd_plan_request){ 1 + i % 1000, 1 + i % 1000 };
	assert_int_equal(afd_plan_average(&w, &load), 0);
	for (int32_t replay = AFD_PLAN_SHUFFLED; replay <= AFD_PLAN_IN_ORDER; replay++) {
		struct afd_plan_simulation s = simulate(&paper, &w,
			(struct afd_plan_simulate_params){
				.r = 8, .n_seeds = 4, .replay = replay });

		near(s.theta, load.theta, 0.01 * load.theta);
		assert_in_range(s.n_finished, 0.9 * 4 * 8 * 3000, 1.1 * 4 * 8 * 3000);
	}
}

/* ---- the bracket and the seeds ---- */

static void the_simulation_lies_in_the_bracket(void **state)
{
	struct afd_plan_load load = { .size = sizeof(load) };

	assert_int_equal(afd_plan_average(&geometric, &load), 0);
	for (uint32_t r = 1; r <= 16; r += 5) {
		struct afd_plan_point point = { .size = sizeof(point) };
		double thr;

		assert_int_equal(afd_plan_evaluate(&paper, &load, r, &point), 0);
		thr = simulate(&paper, &geometric,
			(struct afd_plan_simulate_params){ .r = r, .n_seeds = 4 })
			      .throughput;
		assert_true(thr >= 0.985 * point.throughput_gaussian);
		assert_true(thr <= 1.015 * point.throughput_mean_field);
	}
}

static void workers_in_lock_step_take_the_gaussian_cycle(void **state)
{
	struct afd_plan_load load = { .size = sizeof(load) };

	assert_int_equal(afd_plan_average(&geometric, &load), 0);
	for (uint32_t r = 1; r <= 16; r *= 2) {
		struct afd_plan_point point = { .size = sizeof(point) };

		assert_int_equal(afd_plan_evaluate(&paper, &load, r, &point), 0);
		near(simulate(&paper, &geometric,
			     (struct afd_plan_simulate_params){
				     .r = r, .n_seeds = 4, .flow = AFD_PLAN_LOCK_STEP })
				.tau,
			point.tau_gaussian, 0.012 * point.tau_gaussian);
	}
}

static void seeds_decide_alone_and_their_interval_shrinks_with_more(void **state)
{
	struct afd_plan_simulate_params s = { .r = 9, .n_seeds = 4, .seed = 11, .n_requests = 500 };
	struct afd_plan_simulation a = simulate(&paper, &geometric, s),
				   b = simulate(&paper, &geometric, s);

	assert_memory_equal(&a, &b, sizeof(a));
	s.seed = 12;
	b = simulate(&paper, &geometric, s);
	assert_true(a.throughput != b.throughput);
	assert_true(fabs(a.throughput - b.throughput) < a.ci95 + b.ci95);
	s.n_seeds = 32;
	assert_true(simulate(&paper, &geometric, s).ci95 < a.ci95);
}

static void percentiles_of_tpot_hold_the_cycle_times_the_lanes(void **state)
{
	struct afd_plan_simulation s = simulate(
		&paper, &geometric, (struct afd_plan_simulate_params){ .r = 4, .n_seeds = 4 });

	near(s.tpot_p50, 3 * s.tau, 0.02 * 3 * s.tau);
	assert_true(s.tpot_p99 >= s.tpot_p50);
	assert_true(s.tpot_p99 < 1.3 * s.tpot_p50);
}

static void the_timeline_has_no_stage_twice_at_once(void **state)
{
	struct afd_plan_span spans[200];
	double ffn_end = 0, attention_end[4] = { 0 };
	struct afd_plan_simulation s = simulate(&paper, &geometric,
		(struct afd_plan_simulate_params){ .r = 4,
			.n_seeds = 1,
			.n_requests = 1,
			.spans = spans,
			.span_room = 200,
			.span_bytes = sizeof(spans[0]) });

	assert_int_equal(s.n_spans, 200);
	for (size_t i = 0; i < 200; i++) {
		double *end = spans[i].stage == AFD_PLAN_FFN ? &ffn_end
			      : spans[i].stage == AFD_PLAN_ATTENTION
				      ? &attention_end[spans[i].worker]
				      : NULL;

		assert_true(spans[i].end > spans[i].start);
		if (!end)
			continue;
		assert_true(spans[i].start >= *end);
		*end = spans[i].end;
	}
}

/* ---- refusals ---- */

static void what_cannot_be_simulated_is_refused(void **state)
{
	struct afd_plan_workload moments = { .size = sizeof(moments), .theta = 600 };
	struct afd_plan_simulate_params s = { .size = sizeof(s), .r = 1 };
	struct afd_plan_simulation out = { .size = sizeof(out) };
	struct afd_plan_params p = paper;

	assert_int_equal(afd_plan_simulate_bytes(&paper, &moments, &s), 0);
	assert_non_null(strstr(afd_last_error(), "theta alone"));
	assert_int_equal(afd_plan_simulate(&paper, &geometric, &s, &out), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "scratch"));
	p.batch = 2.5;
	assert_int_equal(afd_plan_simulate_bytes(&p, &geometric, &s), 0);
	assert_non_null(strstr(afd_last_error(), "batch is 2.5"));
	p.batch = 1e7;
	s.r = 65536;
	s.n_requests = 1000000000;
	assert_int_equal(afd_plan_simulate_bytes(&p, &geometric, &s), 0);
	assert_non_null(strstr(afd_last_error(), "slot updates"));
	s.r = 0;
	assert_int_equal(afd_plan_simulate_bytes(&paper, &geometric, &s), 0);
	assert_non_null(strstr(afd_last_error(), "r is 0"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(equal_slots_give_the_closed_cycle_for_any_number_of_lanes),
		cmocka_unit_test(a_slow_link_is_a_stage_of_its_own),
		cmocka_unit_test(slots_start_as_a_random_step_finds_them),
		cmocka_unit_test(an_empty_start_reaches_the_finite_horizons_load),
		cmocka_unit_test(a_trace_is_replayed_with_its_pairs),
		cmocka_unit_test(the_simulation_lies_in_the_bracket),
		cmocka_unit_test(workers_in_lock_step_take_the_gaussian_cycle),
		cmocka_unit_test(seeds_decide_alone_and_their_interval_shrinks_with_more),
		cmocka_unit_test(percentiles_of_tpot_hold_the_cycle_times_the_lanes),
		cmocka_unit_test(the_timeline_has_no_stage_twice_at_once),
		cmocka_unit_test(what_cannot_be_simulated_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
