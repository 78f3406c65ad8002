/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `roofline`: HFU of the FFN side as the network allows it, over the number of FFN
 * nodes, and what imbalance costs. A device or a model is a preset, a checkpoint, or numbers;
 * numbers given beside a preset replace its own.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "hardware.h"
#include "plan.h"

enum { SWEEP = 64 };

struct roofline {
	struct plan_output output;
	struct afd_plan_roofline_params p;
	const char *model, *device, *attention_device;
	const char *model_source, *device_source;
	double imbalance;
};

static const char *region_name(int32_t region)
{
	static const char *const names[] = { "?", "scale_up", "stable_intensity", "scale_out",
		"max_intensity" };

	return names[region >= 1 && region <= 4 ? region : 0];
}

/* ---- presets ---- */

static void fill_u32(uint32_t *field, uint32_t value)
{
	*field = *field ? *field : value;
}

static void fill_real(double *field, double value)
{
	*field = *field > 0 ? *field : value;
}

static int use_model(struct roofline *r)
{
	struct afd_plan_model m = { .size = sizeof m };
	int status = r->model ? plan_find_model(r->model, &m, NULL) : TOOL_DONE;

	if (status || !r->model)
		return status;
	r->model_source = m.source;
	fill_u32(&r->p.hidden_size, m.hidden_size);
	fill_u32(&r->p.expert_size, m.expert_size ? m.expert_size : m.intermediate_size);
	fill_u32(&r->p.n_experts, m.n_experts ? m.n_experts : 1);
	fill_u32(&r->p.top_k, m.top_k ? m.top_k : 1);
	fill_u32(&r->p.n_layers, m.n_layers);
	return TOOL_DONE;
}

static int use_device(struct roofline *r)
{
	struct afd_plan_device d = { .size = sizeof d }, a = { .size = sizeof a };

	if (r->device && afd_plan_find_device(r->device, &d))
		return plan_fail();
	if (r->attention_device && afd_plan_find_device(r->attention_device, &a))
		return plan_fail();
	r->device_source = d.source;
	fill_real(&r->p.flops, d.flops);
	fill_real(&r->p.hbm_bytes_per_s, d.hbm_bytes_per_s);
	fill_real(&r->p.scale_up_bytes_per_s, d.scale_up_bytes_per_s);
	fill_real(&r->p.scale_out_bytes_per_s, d.scale_out_bytes_per_s);
	fill_u32(&r->p.devices_per_node, d.devices_per_node);
	if (r->attention_device) {
		r->p.attention_scale_out_bytes_per_s = a.scale_out_bytes_per_s;
		r->p.attention_devices_per_node = a.devices_per_node;
	}
	return TOOL_DONE;
}

static int check_given(const struct roofline *r)
{
	const struct {
		const char *flag;
		int given;
	} needed[] = { { "model (or --hidden)", r->p.hidden_size > 0 },
		{ "model (or --moe-intermediate)", r->p.expert_size > 0 },
		{ "model (or --experts)", r->p.n_experts > 0 },
		{ "model (or --top-k)", r->p.top_k > 0 },
		{ "model (or --layers)", r->p.n_layers > 0 },
		{ "device (or --flops)", r->p.flops > 0 },
		{ "device (or --hbm)", r->p.hbm_bytes_per_s > 0 },
		{ "device (or --scale-up)", r->p.scale_up_bytes_per_s > 0 },
		{ "device (or --scale-out)", r->p.scale_out_bytes_per_s > 0 },
		{ "ffn-nodes", r->p.ffn_nodes > 0 } };

	for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++) {
		if (!needed[i].given)
			return tool_fail(TOOL_USAGE, "--%s is missing", needed[i].flag);
	}
	return TOOL_DONE;
}

/* ---- the result ---- */

static json_t *sweep_json(const struct afd_plan_roofline_params *params)
{
	uint32_t most = params->ffn_nodes > SWEEP ? params->ffn_nodes : SWEEP;
	json_t *sweep = json_array();

	for (uint32_t n = 1; n <= most; n += n < SWEEP ? 1 : n / 8) {
		struct afd_plan_roofline_params p = *params;
		struct afd_plan_roofline at = { .size = sizeof at };

		p.ffn_nodes = n;
		if (afd_plan_roofline(&p, &at))
			continue;
		json_array_append_new(
			sweep, json_pack("{s:I, s:b, s:f, s:I, s:f, s:f, s:f, s:f, s:s}",
				       "ffn_nodes", (json_int_t)n, "feasible", (int)at.feasible,
				       "rank_batch", at.rank_batch, "experts_per_rank",
				       (json_int_t)at.experts_per_rank, "intensity", at.intensity,
				       "ofu", at.ofu, "temporal_sparsity", at.temporal_sparsity,
				       "hfu", at.hfu, "region", region_name(at.region)));
	}
	return sweep;
}

static json_t *imbalance_json(const struct afd_plan_imbalance *b)
{
	return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "ep", b->ep, "afd", b->afd,
		"afd_continuous", b->afd_continuous, "afd_floor", b->afd_floor, "afd_ceil",
		b->afd_ceil, "dp_ep", b->dp_ep, "dp_afd", b->dp_afd);
}

/* What Step-3 asks of a network, with two thirds of a third of the token's time. */
static double least_sparsity(const struct afd_plan_roofline_params *p)
{
	double s = NAN, stage_s = (p->slo_ms * p->accept - p->overhead_ms) / 3 * 1e-3;

	afd_plan_sparsity(p->hidden_size, p->n_layers, p->flops, p->hbm_bytes_per_s,
		p->scale_out_bytes_per_s * (p->devices_per_node ? p->devices_per_node : 8), stage_s,
		&s);
	return s;
}

static int show(const struct roofline *r, const struct afd_plan_imbalance *b)
{
	struct afd_plan_roofline at = { .size = sizeof at };
	const double *n = at.breakpoints;
	json_t *result;

	if (afd_plan_roofline(&r->p, &at))
		return plan_fail();
	result = json_pack("{s:b, s:f, s:I, s:f, s:f, s:f, s:f, s:s, s:[fff], s:o, s:f, s:f, s:f, "
			   "s:f, s:o, s:f}",
		"feasible", (int)at.feasible, "rank_batch", at.rank_batch, "experts_per_rank",
		(json_int_t)at.experts_per_rank, "intensity", at.intensity, "ofu", at.ofu,
		"temporal_sparsity", at.temporal_sparsity, "hfu", at.hfu, "region",
		region_name(at.region), "breakpoints", n[0], n[1], n[2], "dead_zone_from",
		at.dead_zone_from > 0 ? json_real(at.dead_zone_from) : json_null(), "ceiling",
		at.ceiling, "floor", at.floor, "ep_hfu", at.ep_hfu, "t_b_ms", at.t_b_ms,
		"least_sparsity", plan_number(least_sparsity(&r->p)), "sparsity",
		(double)r->p.top_k / r->p.n_experts);
	json_object_set_new(result, "sources",
		json_pack("{s:s, s:s}", "model", r->model_source ? r->model_source : "given",
			"device", r->device_source ? r->device_source : "given"));
	json_object_set_new(result, "sweep", sweep_json(&r->p));
	if (b)
		json_object_set_new(result, "imbalance", imbalance_json(b));
	return plan_output_show(&r->output, result, "sweep", "roofline");
}

static int run(struct roofline *r)
{
	struct afd_plan_imbalance b = { .size = sizeof b };
	uint32_t n_attention = r->p.attention_nodes ? r->p.attention_nodes : 3 * r->p.ffn_nodes;
	int alone = r->imbalance > 0 && !r->model && !r->p.hidden_size && !r->device;
	int status = plan_output_check(&r->output);

	if (!status && r->imbalance > 0 && (!r->p.ffn_nodes || (alone && !r->p.attention_nodes)))
		status = tool_fail(TOOL_USAGE, "--%s is missing",
			r->p.ffn_nodes ? "attention-nodes" : "ffn-nodes");
	if (!status && r->imbalance > 0 &&
		afd_plan_balance(r->imbalance, n_attention, r->p.ffn_nodes, r->p.lambda, &b))
		status = plan_fail();
	if (status)
		return status;
	if (alone)
		return plan_output_show(&r->output,
			json_pack("{s:o}", "imbalance", imbalance_json(&b)), NULL, "roofline");
	status = use_model(r);
	status = status ? status : use_device(r);
	status = status ? status : check_given(r);
	return status ? status : show(r, r->imbalance > 0 ? &b : NULL);
}

int plan_roofline(int argc, char **argv)
{
	struct roofline r = { .p = { .size = sizeof r.p, .slo_ms = 50, .accept = 1 } };
	const struct tool_option options[] = {
		{ "model", "NAME|DIR", NULL,
			"a preset (a wrong name lists them), or a checkpoint directory",
			tool_set_text, &r.model, 0, 0 },
		{ "hidden", "N", NULL, "hidden size, instead of the model's", tool_set_u32,
			&r.p.hidden_size, 1, 65536 },
		{ "moe-intermediate", "N", NULL, "width of an expert", tool_set_u32,
			&r.p.expert_size, 1, 1 << 20 },
		{ "experts", "N", NULL, "routed experts of a layer", tool_set_u32, &r.p.n_experts,
			1, 1 << 20 },
		{ "top-k", "N", NULL, "experts of a row", tool_set_u32, &r.p.top_k, 1, 1 << 20 },
		{ "layers", "N", NULL, "layers", tool_set_u32, &r.p.n_layers, 1, 1024 },
		{ "device", "NAME", NULL, "a preset for the FFN side", tool_set_text, &r.device, 0,
			0 },
		{ "attention-device", "NAME", "the FFN's", "a preset for the other side",
			tool_set_text, &r.attention_device, 0, 0 },
		{ "flops", "N", NULL, "operations per second of a device", tool_set_real,
			&r.p.flops, 1, 1e20 },
		{ "hbm", "N", NULL, "bytes per second of its memory", tool_set_real,
			&r.p.hbm_bytes_per_s, 1, 1e18 },
		{ "scale-up", "N", NULL, "bytes per second inside a node, one direction",
			tool_set_real, &r.p.scale_up_bytes_per_s, 1, 1e18 },
		{ "scale-out", "N", NULL, "bytes per second between nodes, per device",
			tool_set_real, &r.p.scale_out_bytes_per_s, 1, 1e18 },
		{ "ffn-nodes", "N", NULL, "nodes of the FFN side; required", tool_set_u32,
			&r.p.ffn_nodes, 1, 65536 },
		{ "attention-nodes", "N", "as many as needed", "nodes of the attention side",
			tool_set_u32, &r.p.attention_nodes, 1, 65536 },
		{ "gpus-per-node", "N", "8, or the device's", "devices of a node", tool_set_u32,
			&r.p.devices_per_node, 1, 1024 },
		{ "lanes", "M", "3", "micro-batches", tool_set_u32, &r.p.lanes, 1, 64 },
		{ "slo-ms", "T", "50 ms", "time per output token", tool_set_real, &r.p.slo_ms, 1e-6,
			1e9 },
		{ "accept", "N", "1", "tokens that a step yields", tool_set_real, &r.p.accept, 1,
			64 },
		{ "overhead-ms", "T", "0 ms", "of a step, outside the layers", tool_set_real,
			&r.p.overhead_ms, 0, 1e9 },
		{ "lambda", "X", "3",
			"attention time over FFN time of large-scale EP, to compare with",
			tool_set_real, &r.p.lambda, 1e-3, 1e3 },
		{ "imbalance", "S", "none",
			"mean over maximal load, 0 to 1; with --attention-nodes and --ffn-nodes it "
			"needs no "
			"model",
			tool_set_real, &r.imbalance, 1e-6, 1 },
		PLAN_OPTIONS_OUTPUT(r.output),
		{ 0 },
	};
	int status = tool_options_read(options,
		"roofline --model NAME --device NAME --ffn-nodes N\n\n"
		"How much of an FFN device the network can feed, and what more nodes would change.",
		argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	return run(&r);
}
