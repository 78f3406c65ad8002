/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `size`: the best ratio by closed form, and the curve around it with its bracket.
 * Every number is the library's; the command only names them.
 */
#include <stdio.h>

#include "plan.h"

static json_t *point_json(const struct afd_plan_point *p, const struct afd_plan_params *params)
{
	return json_pack("{s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s}", "r",
		(json_int_t)p->r, "tau_mean_field", plan_number(p->tau_mean_field), "tau_gaussian",
		plan_number(p->tau_gaussian), "throughput_mean_field",
		plan_number(p->throughput_mean_field), "throughput_gaussian",
		plan_number(p->throughput_gaussian), "idle_a", plan_number(p->idle_a), "idle_f",
		plan_number(p->idle_f), "tpot", plan_number(p->tpot), "t_a", plan_number(p->t_a),
		"t_f", plan_number(p->t_f), "tokens_per_time",
		plan_number(p->throughput_mean_field * (p->r * params->cost_a + params->cost_f)),
		"bound", plan_bound_name(p->bound));
}

static json_t *curve_json(const struct plan_system *s, const struct afd_plan_load *load)
{
	struct afd_plan_params p = s->params;
	json_t *curve = json_array();

	p.cost_a = p.cost_a > 0 ? p.cost_a : 1;
	p.cost_f = p.cost_f > 0 ? p.cost_f : 1;
	for (uint32_t r = p.r_min ? p.r_min : 1; r <= p.r_max; r++) {
		struct afd_plan_point point = { .size = sizeof point };

		if (afd_plan_evaluate(&s->params, load, r, &point)) {
			json_decref(curve);
			return NULL;
		}
		json_array_append_new(curve, point_json(&point, &p));
	}
	return curve;
}

/* MegaScale-Infer's condition at the ratio that was chosen; null where a stage takes no time. */
static json_t *min_lanes_json(
	const struct plan_system *s, const struct afd_plan_load *load, uint32_t r)
{
	struct afd_plan_point at = { .size = sizeof at };
	struct afd_plan_pipeline_params p = { .size = sizeof p, .lanes = 1, .n_layers = 1 };
	struct afd_plan_pipeline out = { .size = sizeof out };

	if (!r || afd_plan_evaluate(&s->params, load, r, &at))
		return json_null();
	p.t_a = at.t_a;
	p.t_f = at.t_f;
	p.t_c = at.t_c;
	return afd_plan_pipeline(&p, &out) ? json_null() : json_integer(out.min_lanes);
}

static json_t *result_json(const struct plan_system *s, const struct afd_plan_load *load,
	const struct afd_plan_sizing *z)
{
	char layout[32];

	snprintf(layout, sizeof layout, "%uA:%uF", z->x, z->y);
	return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s, s:s, s:o, s:o, s:o, s:o, s:b, "
			 "s:b, s:o, s:o}",
		"theta", plan_number(load->theta), "nu2", plan_number(load->nu2), "r",
		z->r ? json_integer(z->r) : json_null(), "r_gaussian",
		z->r_gaussian ? json_integer(z->r_gaussian) : json_null(), "r_continuous",
		plan_number(z->r_continuous), "layout", z->x ? json_string(layout) : json_null(),
		"batch", plan_number(s->params.batch), "regime", plan_bound_name(z->bound),
		"constraint", plan_constraint_name(z->constraint), "r_limit",
		plan_number(z->r_limit), "batch_limit",
		z->batch_limit > 0 ? plan_number(z->batch_limit) : json_null(), "r_attention",
		plan_number(z->r_attention), "r_peak", plan_number(z->r_peak), "ffn_limited",
		(int)z->ffn_limited, "heavy_tail", (int)z->heavy_tail, "min_lanes",
		min_lanes_json(s, load, z->r), "curve", curve_json(s, load));
}

int plan_size(int argc, char **argv)
{
	struct plan_system s;
	struct plan_output o = { 0 };
	struct afd_plan_load load = { .size = sizeof load };
	struct afd_plan_sizing sizing = { .size = sizeof sizing };
	int status;

	plan_system_begin(&s);
	const struct tool_option options[] = { PLAN_OPTIONS_SYSTEM(s), PLAN_OPTIONS_OUTPUT(o),
		{ 0 } };

	status = tool_options_read(options,
		"size --alpha-a T ... --batch B (--theta N | --prompt LAW --output LAW | --trace "
		"FILE)\n\n"
		"The ratio of attention workers to one FFN that yields most per cost.\n"
		"attention time = alpha-a B theta + beta-a; FFN time = alpha-f r B + beta-f;\n"
		"communication = alpha-c B (or r B) + beta-c.",
		argc, argv);
	if (status)
		return status < 0 ? TOOL_DONE : status;
	status = plan_output_check(&o);
	status = status ? status : plan_system_read(&s);
	if (!status && afd_plan_average(&s.workload, &load))
		status = plan_fail();
	if (!status && afd_plan_size(&s.params, &load, &sizing))
		status = plan_fail();
	if (!status)
		status = plan_output_show(&o, result_json(&s, &load, &sizing), "curve", "size");
	plan_system_end(&s);
	return status;
}
