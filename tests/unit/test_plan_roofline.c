/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The communication roofline (arXiv 2602.09721): the paper's anchors for DeepSeek-V3 on H800 and
 * GB200, a sweep and a table of ceilings that were computed by another program from our derivation
 * of it, imbalance, and the conditions of MegaScale-Infer (2504.02263, equations 1 to 5) and Step-3
 * (2507.19427, table 7).
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

/* The paper's budget: SLO 50 ms, 1.7 tokens a step, 15 ms outside the layers, 3 lanes. */
static struct afd_plan_roofline_params params_of(
	const char *model, const char *device, uint32_t nodes)
{
	struct afd_plan_device d = { .size = sizeof(d) };
	struct afd_plan_model m = { .size = sizeof(m) };

	assert_int_equal(afd_plan_find_device(device, &d), 0);
	assert_int_equal(afd_plan_find_model(model, &m), 0);
	return (struct afd_plan_roofline_params){ .size = sizeof(struct afd_plan_roofline_params),
		.hidden_size = m.hidden_size,
		.expert_size = m.expert_size,
		.n_experts = m.n_experts,
		.top_k = m.top_k,
		.n_layers = m.n_layers,
		.ffn_nodes = nodes,
		.flops = d.flops,
		.hbm_bytes_per_s = d.hbm_bytes_per_s,
		.scale_up_bytes_per_s = d.scale_up_bytes_per_s,
		.scale_out_bytes_per_s = d.scale_out_bytes_per_s,
		.slo_ms = 50,
		.accept = 1.7,
		.overhead_ms = 15 };
}

static struct afd_plan_roofline roofline(const struct afd_plan_roofline_params *p)
{
	struct afd_plan_roofline r = { .size = sizeof(r) };

	if (afd_plan_roofline(p, &r))
		fail_msg("%s", afd_last_error());
	return r;
}

static void deepseek_on_h800_has_the_papers_anchors(void **state)
{
	struct afd_plan_roofline_params p = params_of("DeepSeek-V3", "H800", 4);
	struct afd_plan_roofline r = roofline(&p);

	near(r.t_b_ms, 0.3825, 5e-5);
	near(r.breakpoints[0], 2.5, 1e-12);
	near(r.breakpoints[1], 8, 1e-12);
	near(r.breakpoints[2], 32, 1e-12);
	near(r.ceiling, .331, 5e-4);
	near(r.floor, .1035, 5e-5);
	near(r.dead_zone_from, 2.5, 1e-12);
	p = params_of("DeepSeek-V3", "GB200", 4);
	near(roofline(&p).ceiling, .655, 5e-4);
	near(roofline(&p).dead_zone_from, 0, 0);
	p = params_of("DeepSeek-V3", "B200", 1);
	near(roofline(&p).hfu, .364, 5e-4);
}

static void the_sweep_over_ffn_nodes_is_the_golden_one(void **state)
{
	static const struct {
		uint32_t nodes;
		double batch, experts, intensity, ofu, sparsity, hfu;
		int32_t region;
	} golden[] = {
		{ 2, 2846, 16, 355.8, .602, .550, .331, AFD_PLAN_SCALE_UP },
		{ 3, 2372, 11, 431.2, .730, .378, .276, AFD_PLAN_STABLE_INTENSITY },
		{ 4, 1779, 8, 444.7, .753, .275, .207, AFD_PLAN_STABLE_INTENSITY },
		{ 8, 889, 4, 444.7, .753, .137, .1035, AFD_PLAN_SCALE_OUT },
		{ 12, 889, 3, 592.9, 1, .103, .1035, AFD_PLAN_SCALE_OUT },
		{ 32, 889, 1, 1778.8, 1, .103, .1035, AFD_PLAN_MAX_INTENSITY },
	};

	for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
		struct afd_plan_roofline_params p =
			params_of("DeepSeek-V3", "H800", golden[i].nodes);
		struct afd_plan_roofline r = roofline(&p);

		near(r.rank_batch, golden[i].batch, 0.5);
		near(r.experts_per_rank, golden[i].experts, 0);
		near(r.intensity, golden[i].intensity, 0.06);
		near(r.ofu, golden[i].ofu, 5.1e-4);
		near(r.temporal_sparsity, golden[i].sparsity, 5.1e-4);
		near(r.hfu, golden[i].hfu, golden[i].hfu < .2 ? 5.1e-5 : 5.1e-4);
		assert_int_equal(r.region, golden[i].region);
		assert_int_equal(r.feasible, 1);
	}
}

static void weights_that_take_longer_than_the_budget_are_infeasible(void **state)
{
	struct afd_plan_roofline_params p = params_of("DeepSeek-V3", "H800", 1);

	assert_int_equal(roofline(&p).feasible, 0);
	near(roofline(&p).hfu, 0, 0);
	near(roofline(&p).temporal_sparsity * .3825, .42, .005);
}

static void the_ceilings_of_models_on_devices_are_the_golden_ones(void **state)
{
	static const struct {
		const char *model;
		double h800[2], h200[2], b200[2], gb200, best;
		uint32_t best_at;
	} golden[] = {
		{ "DeepSeek-V3", { .331, .103 }, { .745, .103 }, { .655, .046 }, .655, .331, 2 },
		{ "Kimi-K2", { .331, .103 }, { .745, .103 }, { .655, .046 }, .655, .331, 2 },
		{ "Qwen3-235B-A22B", { .248, .078 }, { .559, .078 }, { .492, .034 }, .492, .248,
			1 },
		{ "Qwen3-Coder-480B-A35B", { .414, .129 }, { .931, .129 }, { .819, .057 }, .819,
			.414, 1 },
		{ "ERNIE-4.5-300B-A47B", { .580, .181 }, { 1, .181 }, { 1, .080 }, 1, .580, 1 },
		{ "GLM-4.5", { .248, .078 }, { .559, .078 }, { .492, .034 }, .492, .248, 1 },
		{ "Step-3", { .828, .259 }, { 1, .259 }, { 1, .114 }, 1, .776, 1 },
	};

	for (size_t i = 0; i < sizeof(golden) / sizeof(golden[0]); i++) {
		const char *const devices[] = { "H800", "H200", "B200" };
		const double *const wanted[] = { golden[i].h800, golden[i].h200, golden[i].b200 };
		struct afd_plan_roofline_params p;

		for (int d = 0; d < 3; d++) {
			p = params_of(golden[i].model, devices[d], 1);
			near(roofline(&p).ceiling, wanted[d][0], 6e-4);
			near(roofline(&p).floor, wanted[d][1], 6e-4);
		}
		p = params_of(golden[i].model, "GB200", 1);
		near(roofline(&p).ceiling, golden[i].gb200, 6e-4);
		p = params_of(golden[i].model, "H800", golden[i].best_at);
		near(roofline(&p).hfu, golden[i].best, 6e-4);
	}
}

/* ---- properties ---- */

static double hfu_at(struct afd_plan_roofline_params p, uint32_t nodes)
{
	p.ffn_nodes = nodes;
	return roofline(&p).hfu;
}

/* By brute force: the last N_F with the highest hfu, below which none is higher and behind which it
 * falls. */
static void the_dead_zone_begins_where_more_nodes_stop_raising_hfu(void **state)
{
	struct afd_plan_model m = { .size = sizeof(m) };
	struct afd_plan_device d = { .size = sizeof(d) };
	uint32_t n_zones = 0;

	for (uint32_t i = 0; !afd_plan_model_at(i, &m); i++) {
		for (uint32_t j = 0; m.n_experts && !afd_plan_device_at(j, &d); j++) {
			struct afd_plan_roofline_params p = params_of(m.name, d.name, 1);
			double from = roofline(&p).dead_zone_from, best = 0;
			uint32_t last = 0;

			for (uint32_t n = 1; n <= 64; n++) {
				if (hfu_at(p, n) >= best * (1 - 1e-12)) {
					best = hfu_at(p, n);
					last = n;
				}
			}
			if (best > 0 && from > 0 && from < 64) {
				assert_int_equal(last, (uint32_t)(from + 1e-9));
				n_zones++;
			} else if (best > 0 && from == 0) {
				near(hfu_at(p, 64), best, 1e-12);
			}
		}
	}
	assert_true(n_zones >= 30);
}

static void more_bandwidth_never_lowers_hfu(void **state)
{
	const struct afd_plan_roofline_params start = params_of("DeepSeek-V3", "H800", 1);

	for (uint32_t nodes = 1; nodes <= 40; nodes++) {
		struct afd_plan_roofline_params p = start;
		double before = hfu_at(p, nodes);

		for (int i = 0; i < 24; i++) {
			double after;

			*(i % 2 ? &p.scale_out_bytes_per_s : &p.scale_up_bytes_per_s) *= 1.5;
			after = hfu_at(p, nodes);
			assert_true(after >= before * (1 - 1e-12));
			before = after;
		}
	}
}

static void units_do_not_matter(void **state)
{
	struct afd_plan_roofline_params p = params_of("Kimi-K2", "H20", 3), q = p;
	struct afd_plan_roofline a = roofline(&p), b;

	q.flops *= 8; /* eight times faster in everything is an eighth of the time */
	q.hbm_bytes_per_s *= 8;
	q.scale_up_bytes_per_s *= 8;
	q.scale_out_bytes_per_s *= 8;
	q.slo_ms /= 8;
	q.overhead_ms /= 8;
	b = roofline(&q);
	near(b.hfu, a.hfu, 1e-12);
	near(b.rank_batch, a.rank_batch, 1e-6);
	near(b.ofu, a.ofu, 1e-12);
}

static void few_or_slow_attention_devices_bound_the_ffn_of_other_devices(void **state)
{
	struct afd_plan_roofline_params p = params_of("DeepSeek-V3", "H800", 16);
	double free = roofline(&p).hfu;

	p.attention_nodes = 16;
	near(roofline(&p).hfu, free, 1e-12);
	p.attention_nodes = 4;
	near(roofline(&p).hfu, free / 4, 1e-12);
	p.attention_scale_out_bytes_per_s = 200e9;
	near(roofline(&p).hfu, free, 1e-12);
}

/* ---- imbalance and the conditions of others ---- */

static void imbalance_costs_what_the_golden_examples_say(void **state)
{
	struct afd_plan_imbalance b = { .size = sizeof(b) };

	assert_int_equal(afd_plan_balance(.9, 6, 2, 0, &b), 0);
	near(b.ep, .973, 5e-4);
	near(b.afd_continuous, .973, 5e-4);
	near(b.afd_floor, .952, 5e-4);
	near(b.afd_ceil, .900, 5e-4);
	near(b.afd, .952, 5e-4);
	near(b.dp_ep, .923, 5e-4);
	near(b.dp_afd, .900, 1e-12);
	assert_int_equal(afd_plan_balance(.8, 6, 2, 0, &b), 0);
	near(b.ep, .941, 5e-4);
	near(b.afd_floor, .889, 5e-4);
	near(b.afd_ceil, .914, 5e-4);
	near(b.afd, .914, 5e-4);
	assert_int_equal(afd_plan_balance(.8, 5, 1, 0, &b), 0);
	near(b.afd, .960, 5e-4);
	assert_int_equal(afd_plan_balance(1, 7, 3, 0, &b), 0);
	near(b.afd, 1, 1e-12);
	near(b.ep, 1, 1e-12);
	assert_int_equal(afd_plan_balance(.3, 1, 3, 0, &b), 0);
	near(b.afd_floor, 0, 0);
}

static void megascale_wants_three_lanes_or_four(void **state)
{
	struct afd_plan_pipeline_params p = { .size = sizeof(p),
		.t_a = 1,
		.t_f = 1,
		.t_c = 0.4,
		.lanes = 3,
		.n_layers = 10,
		.k1 = 3,
		.k3 = 2,
		.n_experts = 64,
		.top_k = 4 };
	struct afd_plan_pipeline out = { .size = sizeof(out) };

	assert_int_equal(afd_plan_pipeline(&p, &out), 0);
	assert_int_equal(out.min_lanes, 3);
	assert_int_equal(out.hidden, 1);
	near(out.iteration, 2.8 + 1 * (3 * 10 - 1), 1e-12);
	near(out.attention_nodes, 3.0 * 64 / (2 * 4), 1e-12);
	assert_int_equal(out.no_bubbles, 1);
	p.t_c = 0.6;
	assert_int_equal(afd_plan_pipeline(&p, &out), 0);
	assert_int_equal(out.min_lanes, 4);
	assert_int_equal(out.hidden, 0);
	p.t_a = 0.5;
	assert_int_equal(afd_plan_pipeline(&p, &out), 0);
	assert_int_equal(out.no_bubbles, 0);
}

static void the_least_sparsity_is_that_of_table_7(void **state)
{
	static const struct {
		double flops, hbm, net, printed, precise;
	} table[] = { { 1980e12, 3.35e12, 400e9, .058, .0582 },
		{ 296e12, 4.0e12, 400e9, .007, .0073 }, { 312e12, 2.0e12, 200e9, .031, .0307 },
		{ 280e12, 1.6e12, 200e9, .034, .0345 } };

	for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
		double s = 0;

		assert_int_equal(afd_plan_sparsity(7168, 61, table[i].flops, table[i].hbm,
					 table[i].net, 16.65e-3, &s),
			0);
		near(s, table[i].precise, 6e-5);
		near(s, table[i].printed, 6e-4);
	}
}

/* ---- refusals ---- */

static void bad_fields_and_names_are_refused(void **state)
{
	const struct afd_plan_roofline_params good = params_of("DeepSeek-V3", "H800", 2);
	struct afd_plan_roofline_params p = good;
	struct afd_plan_roofline out = { .size = sizeof(out) };
	struct afd_plan_imbalance b = { .size = sizeof(b) };
	struct afd_plan_device d = { .size = sizeof(d) };
	double s;

	p.flops = NAN;
	assert_int_equal(afd_plan_roofline(&p, &out), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "flops is nan"));
	p = good;
	p.top_k = 257;
	assert_int_equal(afd_plan_roofline(&p, &out), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "top_k is 257, limit 1 .. 256"));
	p = good;
	p.overhead_ms = 90;
	assert_int_equal(afd_plan_roofline(&p, &out), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "overhead_ms"));
	assert_int_equal(afd_plan_balance(1.1, 1, 1, 0, &b), -EINVAL);
	assert_int_equal(afd_plan_balance(.5, 0, 1, 0, &b), -EINVAL);
	assert_int_equal(afd_plan_sparsity(7168, 61, -1, 1, 1, 1, &s), -EINVAL);
	assert_int_equal(afd_plan_find_device("H900", &d), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "H900"));
	assert_non_null(strstr(afd_last_error(), "H800"));
	assert_int_equal(afd_plan_find_device("h800", &d), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(deepseek_on_h800_has_the_papers_anchors),
		cmocka_unit_test(the_sweep_over_ffn_nodes_is_the_golden_one),
		cmocka_unit_test(weights_that_take_longer_than_the_budget_are_infeasible),
		cmocka_unit_test(the_ceilings_of_models_on_devices_are_the_golden_ones),
		cmocka_unit_test(the_dead_zone_begins_where_more_nodes_stop_raising_hfu),
		cmocka_unit_test(more_bandwidth_never_lowers_hfu),
		cmocka_unit_test(units_do_not_matter),
		cmocka_unit_test(few_or_slow_attention_devices_bound_the_ffn_of_other_devices),
		cmocka_unit_test(imbalance_costs_what_the_golden_examples_say),
		cmocka_unit_test(megascale_wants_three_lanes_or_four),
		cmocka_unit_test(the_least_sparsity_is_that_of_table_7),
		cmocka_unit_test(bad_fields_and_names_are_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
