/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Conditions that others have published: how many lanes hide communication and how long an
 * iteration takes (MegaScale-Infer, arXiv 2504.02263, equations 1 to 5), the bubbles of three lanes
 * and the price of imbalance (arXiv 2602.09721), and how sparse a model may be for a network
 * (Step-3, arXiv 2507.19427, section 5, table 7).
 */
#include <math.h>

#include "plan.h"

/* ---- MegaScale-Infer ---- */

static int read_pipeline(
	struct afd_plan_pipeline_params *p, const struct afd_plan_pipeline_params *in)
{
	int rc = afd__params_copy(p, sizeof(*p), in, "plan pipeline params");

	rc = rc ? rc : afd__plan_real("t_a", p->t_a, 0, 1e15);
	rc = rc ? rc : afd__plan_real("t_f", p->t_f, 0, 1e15);
	rc = rc ? rc : afd__plan_real("t_c", p->t_c, 0, 1e15);
	rc = rc ? rc : afd__plan_whole("lanes", p->lanes, 1, 64);
	rc = rc ? rc : afd__plan_whole("n_layers", p->n_layers, 1, 1024);
	rc = rc ? rc : afd__plan_real("k1", p->k1, 0, 1e15);
	rc = rc ? rc : afd__plan_real("k3", p->k3, p->k1 > 0 ? 1e-300 : 0, 1e15);
	if (!rc && p->k1 > 0) {
		rc = afd__plan_whole("n_experts", p->n_experts, 1, 1 << 20);
		rc = rc ? rc : afd__plan_whole("top_k", p->top_k, 1, p->n_experts);
	}
	if (!rc && !(p->t_a + p->t_f > 0))
		rc = afd__error(-EINVAL, "plan: t_a and t_f are 0, at least one must not be");
	return rc;
}

int afd_plan_pipeline(const struct afd_plan_pipeline_params *params, struct afd_plan_pipeline *out)
{
	struct afd_plan_pipeline result = { .size = sizeof(result) };
	struct afd_plan_pipeline_params p;
	int rc = read_pipeline(&p, params);
	double longest;

	if (rc)
		return rc;
	longest = fmax(p.t_a, p.t_f);
	result.min_lanes = (uint32_t)fmin(UINT32_MAX, ceil(2 * (1 + p.t_c / longest) - 1e-9));
	result.hidden = p.t_c < longest && p.lanes >= result.min_lanes;
	result.iteration = p.t_a + p.t_f + 2 * p.t_c + longest * ((double)p.lanes * p.n_layers - 1);
	if (p.k1 > 0)
		result.attention_nodes = p.k1 * p.n_experts / (p.k3 * p.top_k);
	result.no_bubbles =
		p.t_c <= longest && 2 * p.t_a >= p.t_f + p.t_c && 2 * p.t_f >= p.t_a + p.t_c;
	return afd__params_give(out, &result, sizeof(result), "plan pipeline");
}

/* ---- Step-3 ---- */

int afd_plan_sparsity(double hidden_size, double n_layers, double flops, double hbm_bytes_per_s,
	double net_bytes_per_s, double stage_s, double *out)
{
	int rc = afd__plan_real("hidden_size", hidden_size, 1, 65536);

	rc = rc ? rc : afd__plan_real("n_layers", n_layers, 1, 1024);
	rc = rc ? rc : afd__plan_real("flops", flops, 1, 1e20);
	rc = rc ? rc : afd__plan_real("hbm_bytes_per_s", hbm_bytes_per_s, 1, 1e18);
	rc = rc ? rc : afd__plan_real("net_bytes_per_s", net_bytes_per_s, 1, 1e18);
	rc = rc ? rc : afd__plan_real("stage_s", stage_s, 1e-9, 1e6);
	if (!rc && !out)
		rc = afd__error(-EINVAL, "plan: out is NULL");
	if (rc)
		return rc;
	/* 3 H bytes a row, 2 B rows to fill the operators: 3/2 of the stage is their product. */
	*out = hidden_size * flops * n_layers /
	       (net_bytes_per_s * hbm_bytes_per_s * (stage_s * 2 / 3));
	return 0;
}

/* ---- imbalance ---- */

/* What n of N_A attention nodes leave of the throughput per node, against all of them. */
static double shrunk(double kept, double n, double n_a, double n_f)
{
	return n > 0 ? kept * (n_a + n_f) / (n + n_f) : 0;
}

int afd_plan_balance(double sigma, uint32_t attention_nodes, uint32_t ffn_nodes, double lambda,
	struct afd_plan_imbalance *out)
{
	struct afd_plan_imbalance result = { .size = sizeof(result) };
	double n_a = attention_nodes, n_f = ffn_nodes, n, ratio;
	int rc = afd__plan_real("sigma", sigma, 1e-6, 1);

	rc = rc ? rc : afd__plan_whole("attention_nodes", attention_nodes, 1, 1 << 20);
	rc = rc ? rc : afd__plan_whole("ffn_nodes", ffn_nodes, 1, 1 << 20);
	rc = rc ? rc : afd__plan_real("lambda", lambda, 0, 1e9);
	if (rc)
		return rc;
	ratio = n_a / n_f;
	lambda = lambda > 0 ? lambda : ratio;
	result.ep = (lambda + 1) / (lambda + 1 / sigma);
	result.afd_continuous = (ratio + 1) / (ratio + 1 / sigma);
	n = floor(sigma * n_a + 1e-12);
	result.afd_floor = shrunk(n / n_a, n, n_a, n_f);
	n = ceil(sigma * n_a - 1e-12);
	result.afd_ceil = shrunk(sigma, n, n_a, n_f);
	result.afd = fmax(result.afd_floor, result.afd_ceil);
	result.dp_afd = sigma;
	result.dp_ep = (lambda + 1) / (lambda / sigma + 1);
	return afd__params_give(out, &result, sizeof(result), "plan imbalance");
}
