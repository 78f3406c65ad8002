/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The communication roofline: what the network lets an FFN device compute (arXiv 2602.09721). A
 * routed (row, expert) pair moves 3 H bytes (FP8 out, BF16 back) and costs 6 H M operations, so the
 * share of the peak that the network can feed is 2 M bandwidth / flops, whatever H and the budget.
 * The derivation that reproduces the paper's figures, and the dead zone, are ours.
 */
#include <math.h>

#include "plan.h"

static int read_counts(struct afd_plan_roofline_params *p)
{
	int rc = afd__plan_whole("hidden_size", p->hidden_size, 1, 65536);

	rc = rc ? rc : afd__plan_whole("expert_size", p->expert_size, 1, 1 << 20);
	rc = rc ? rc : afd__plan_whole("n_experts", p->n_experts, 1, 1 << 20);
	rc = rc ? rc : afd__plan_whole("top_k", p->top_k, 1, p->n_experts);
	rc = rc ? rc : afd__plan_whole("n_layers", p->n_layers, 1, 1024);
	rc = rc ? rc : afd__plan_whole("ffn_nodes", p->ffn_nodes, 1, 65536);
	rc = rc ? rc : afd__plan_whole("attention_nodes", p->attention_nodes, 0, 65536);
	rc = rc ? rc : afd__plan_whole_or("devices_per_node", &p->devices_per_node, 8, 1, 1024);
	rc = rc ? rc
		: afd__plan_whole_or("attention_devices_per_node", &p->attention_devices_per_node,
			  p->devices_per_node, 1, 1024);
	return rc ? rc : afd__plan_whole_or("lanes", &p->lanes, 3, 1, 64);
}

static int read_params(
	struct afd_plan_roofline_params *p, const struct afd_plan_roofline_params *in)
{
	int rc = afd__params_copy(p, sizeof(*p), in, "plan roofline params");

	rc = rc ? rc : read_counts(p);
	rc = rc ? rc : afd__plan_real("flops", p->flops, 1, 1e20);
	rc = rc ? rc : afd__plan_real("hbm_bytes_per_s", p->hbm_bytes_per_s, 1, 1e18);
	rc = rc ? rc : afd__plan_real("scale_up_bytes_per_s", p->scale_up_bytes_per_s, 1, 1e18);
	rc = rc ? rc : afd__plan_real("scale_out_bytes_per_s", p->scale_out_bytes_per_s, 1, 1e18);
	rc = rc ? rc
		: afd__plan_real_or("attention_scale_out_bytes_per_s",
			  &p->attention_scale_out_bytes_per_s, p->scale_out_bytes_per_s, 1, 1e18);
	rc = rc ? rc : afd__plan_real("slo_ms", p->slo_ms, 1e-6, 1e9);
	rc = rc ? rc : afd__plan_real_or("accept", &p->accept, 1, 1, 64);
	rc = rc ? rc : afd__plan_real("overhead_ms", p->overhead_ms, 0, 1e9);
	rc = rc ? rc : afd__plan_real_or("lambda", &p->lambda, 3, 1e-3, 1e3);
	if (!rc && p->slo_ms * p->accept <= p->overhead_ms)
		rc = afd__error(-EINVAL,
			"plan: overhead_ms is %g, limit below slo_ms * accept = %g", p->overhead_ms,
			p->slo_ms * p->accept);
	return rc;
}

/* What reaches an FFN device from other nodes: no more than all attention devices send to it. */
static double scale_out(const struct afd_plan_roofline_params *p)
{
	double senders = (double)p->attention_nodes * p->attention_devices_per_node;
	double receivers = (double)p->ffn_nodes * p->devices_per_node;

	if (!p->attention_nodes)
		return p->scale_out_bytes_per_s;
	return fmin(
		p->scale_out_bytes_per_s, p->attention_scale_out_bytes_per_s * senders / receivers);
}

static int32_t region_of(const double breakpoints[3], double nodes)
{
	for (int i = 0; i < 3; i++) {
		if (nodes < breakpoints[i])
			return AFD_PLAN_SCALE_UP + i;
	}
	return AFD_PLAN_MAX_INTENSITY;
}

/* The first N_F at which a device reads its experts within the budget; HUGE_VAL: none. */
static double first_feasible(const struct afd_plan_roofline_params *p, double t_b)
{
	double expert_bytes = 3.0 * p->hidden_size * p->expert_size;
	double held = floor(t_b * p->hbm_bytes_per_s / expert_bytes);

	return held < 1 ? HUGE_VAL : ceil(p->n_experts / (held * p->devices_per_node));
}

static void find_bounds(const struct afd_plan_roofline_params *p, double out, double up,
	struct afd_plan_roofline *r)
{
	double per_byte = 2.0 * p->expert_size / p->flops;
	double falls = per_byte * out * p->top_k / fmin(1, per_byte * up);

	r->breakpoints[0] = p->top_k * out / up;
	r->breakpoints[1] = p->top_k;
	r->breakpoints[2] = (double)p->n_experts / p->devices_per_node;
	/* Beyond top_k nodes a row meets one expert of a node at most: scale-out binds earlier. */
	if (out >= up)
		r->breakpoints[0] = r->breakpoints[1];
	r->region = region_of(r->breakpoints, p->ffn_nodes);
	r->ceiling = fmin(1, per_byte * up);
	r->floor = fmin(1, per_byte * fmin(out, up));
	falls = fmax(falls, first_feasible(p, r->t_b_ms * 1e-3));
	if (out < up && per_byte * out < 1 && isfinite(falls))
		r->dead_zone_from = fmax(1, falls);
	r->ep_hfu = fmin(1, (p->lambda + 1) * per_byte * out);
}

/* The batch that fills the network, cut to what the operators finish within the budget. */
static void find_use(const struct afd_plan_roofline_params *p, double out, double up,
	struct afd_plan_roofline *r)
{
	double h = p->hidden_size, m = p->expert_size, t_b = r->t_b_ms * 1e-3;
	double fan_out = fmax(1, (double)p->top_k / p->ffn_nodes);
	double pairs = t_b / (3 * h) * fmin(out * fan_out, up), t_compute, t_memory, t_g;

	r->experts_per_rank =
		(uint32_t)ceil((double)p->n_experts / ((double)p->ffn_nodes * p->devices_per_node));
	t_memory = r->experts_per_rank * 3 * h * m / p->hbm_bytes_per_s;
	r->feasible = t_memory <= t_b;
	pairs = fmin(pairs, t_b * p->flops / (6 * h * m));
	t_compute = 6 * h * m * pairs / p->flops;
	t_g = fmax(t_compute, t_memory);
	r->rank_batch = pairs;
	r->intensity = 2 * pairs / r->experts_per_rank;
	r->ofu = t_compute / t_g;
	r->temporal_sparsity = t_g / t_b;
	r->hfu = r->feasible ? t_compute / t_b : 0;
}

int afd_plan_roofline(const struct afd_plan_roofline_params *params, struct afd_plan_roofline *out)
{
	struct afd_plan_roofline result = { .size = sizeof(result) };
	struct afd_plan_roofline_params p;
	int rc = read_params(&p, params);

	if (rc)
		return rc;
	result.t_b_ms = (p.slo_ms * p.accept - p.overhead_ms) / ((double)p.n_layers * p.lanes);
	find_bounds(&p, scale_out(&p), p.scale_up_bytes_per_s, &result);
	find_use(&p, scale_out(&p), p.scale_up_bytes_per_s, &result);
	return afd__params_give(out, &result, sizeof(result), "plan roofline");
}
