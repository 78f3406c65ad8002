/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `report`: what a layout yields per device against colocation on the same devices, and
 * plainly when not to split. With --as-published: the speed-up tables that went with
 * ai-dynamo/dynamo#6570 beside the corrected figures.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hardware.h"
#include "plan.h"

struct report {
	struct plan_output output;
	struct plan_system workload;
	struct afd_plan_report_params p;
	struct afd_plan_model model;
	struct afd_plan_device device, ffn_device;
	const char *model_name, *device_name, *ffn_device_name, *times_path;
	struct afd_plan_time *times;
	double flops, hbm, memory, scale_up, scale_out, weight_bytes, kv_bytes;
	int as_published;
};

/* ---- as published ---- */

static int show_published(const struct report *r)
{
	struct afd_plan_claim claim = { .size = sizeof claim };
	json_t *list = json_array();

	for (uint32_t i = 0; !afd_plan_claim_at(i, &claim); i++)
		json_array_append_new(
			list, json_pack("{s:s, s:o, s:f, s:f, s:s, s:s}", "name", claim.name,
				      "printed", plan_number(claim.printed), "reproduced",
				      claim.reproduced, "corrected", claim.corrected, "unit",
				      claim.unit, "reason", claim.reason));
	return plan_output_show(&r->output,
		json_pack("{s:s, s:o}", "source",
			"the speed-up tables for Qwen3-32B-FP8 on H20-3e that went "
			"with ai-dynamo/dynamo#6570",
			"published", list),
		"published", "published");
}

/* ---- input ---- */

static void replace(double *field, double value)
{
	*field = value > 0 ? value : *field;
}

static int read_devices(struct report *r)
{
	if (r->device_name && afd_plan_find_device(r->device_name, &r->device))
		return plan_fail();
	if (r->ffn_device_name && afd_plan_find_device(r->ffn_device_name, &r->ffn_device))
		return plan_fail();
	replace(&r->device.flops, r->flops);
	replace(&r->device.hbm_bytes_per_s, r->hbm);
	replace(&r->device.memory_bytes, r->memory);
	replace(&r->device.scale_up_bytes_per_s, r->scale_up);
	replace(&r->device.scale_out_bytes_per_s, r->scale_out);
	if (!r->device_name && !(r->flops > 0 && r->hbm > 0 && r->memory > 0 && r->scale_out > 0))
		return tool_fail(TOOL_USAGE,
			"--device is missing (or --flops, --hbm, --memory, --scale-out)");
	replace(&r->device.scale_up_bytes_per_s,
		r->device.scale_up_bytes_per_s > 0 ? 0 : r->device.scale_out_bytes_per_s);
	r->device.name =
		r->device.name ? r->device.name : "this machine"; /* as calibrate names it */
	return TOOL_DONE;
}

/* --context C alone: ages from 0 to 2 C, evenly, so a variance of C^2 / 3. */
static int read_context(struct report *r)
{
	struct plan_system *w = &r->workload;
	struct afd_plan_load load = { .size = sizeof load };
	int status;

	if (r->p.context > 0) {
		if (w->prompt || w->output || w->trace || w->theta > 0)
			return tool_fail(TOOL_USAGE, "--context: not beside another workload");
		r->p.nu2 = w->nu2 > 0 ? w->nu2 : r->p.context * r->p.context / 3;
		return TOOL_DONE;
	}
	if (!w->prompt && !w->output && !w->trace && !(w->theta > 0))
		return tool_fail(
			TOOL_USAGE, "--context is missing (or --prompt and --output, or --trace)");
	status = plan_workload_read(w);
	if (!status && afd_plan_average(&w->workload, &load))
		status = plan_fail();
	r->p.context = load.theta;
	r->p.nu2 = load.nu2;
	return status;
}

static int read_input(struct report *r)
{
	struct plan_precision precision = { 0 };
	int status = TOOL_DONE;

	if (!r->model_name)
		return tool_fail(TOOL_USAGE, "--model is missing");
	if (!r->p.n_attention || !r->p.n_ffn)
		return tool_fail(
			TOOL_USAGE, "--%s is missing", r->p.n_attention ? "ffn" : "attention");
	status = read_devices(r);
	status = status ? status : read_context(r);
	status = status ? status : plan_find_model(r->model_name, &r->model, &precision);
	if (status)
		return status;
	r->p.weight_bytes = r->weight_bytes > 0 ? r->weight_bytes : precision.weight_bytes;
	r->p.kv_bytes = r->kv_bytes > 0 ? r->kv_bytes : precision.kv_bytes;
	r->p.model = &r->model;
	r->p.attention_device = &r->device;
	r->p.ffn_device = r->ffn_device_name ? &r->ffn_device : NULL;
	if (!r->times_path)
		return TOOL_DONE;
	r->times = plan_read_times(r->times_path, &r->p.n_times);
	r->p.times = r->times;
	r->p.time_bytes = sizeof *r->times;
	return r->times ? TOOL_DONE : TOOL_FAILED;
}

/* ---- the result ---- */

static json_t *stage_json(const char *name, double ms, double share, int measured)
{
	return json_pack("{s:s, s:f, s:f, s:s}", "stage", name, "ms", ms, "share_of_cycle", share,
		"from", measured ? "measured" : "data sheet");
}

static json_t *stages_json(const struct afd_plan_report *a)
{
	json_t *stages = json_array();
	double tau = a->tau_ms > 0 ? a->tau_ms : 1;

	json_array_append_new(
		stages, stage_json("attention", a->t_a_ms, a->t_a_ms / tau, a->measured & 1));
	json_array_append_new(stages, stage_json("attention: weights, head", a->t_a_weights_ms,
					      a->t_a_weights_ms / tau, 0));
	json_array_append_new(stages,
		stage_json("attention: kv", a->t_a_kv_ms, a->t_a_kv_ms / tau, a->measured & 1));
	json_array_append_new(
		stages, stage_json("ffn", a->t_f_ms, a->t_f_ms / tau, a->measured & 2));
	json_array_append_new(stages,
		stage_json("exchange, one direction", a->t_c_ms, a->t_c_ms / tau, a->measured & 4));
	return stages;
}

static void advise(json_t *list, const char *what, double speedup, double now)
{
	char text[160];

	snprintf(text, sizeof text, "%s: %.2fx per device%s", what, speedup,
		speedup > 1 && now <= 1 ? ", which would win"
		: speedup > 1           ? ""
					: ", still no gain");
	json_array_append_new(list, json_string(text));
}

static json_t *changes_json(const struct report *r, const struct afd_plan_report *a)
{
	json_t *list = json_array();
	char text[80];

	snprintf(text, sizeof text, "%u attention devices for %u of the FFN", a->best_attention,
		r->p.n_ffn);
	if (a->best_attention)
		advise(list, text, a->best_speedup, a->speedup_per_device);
	advise(list, "twice the network, at the best ratio", a->speedup_network, a->best_speedup);
	advise(list, "twice the memory for attention, at the best ratio", a->speedup_memory,
		a->best_speedup);
	advise(list, "four times the context, at the best ratio", a->speedup_context,
		a->best_speedup);
	return list;
}

static json_t *result_json(const struct report *r, const struct afd_plan_report *a)
{
	json_t *result = json_pack("{s:s, s:s, s:b, s:f, s:f, s:f, s:f, s:[ff]}", "verdict",
		a->use ? "use" : "do not use", "model", r->model.name, "feasible", (int)a->feasible,
		"tokens_per_second", a->tokens_per_second, "tokens_per_second_per_device",
		a->tokens_per_second_per_device, "speedup_per_device", a->speedup_per_device,
		"tpot_ms", a->tpot_ms, "bracket", a->low, a->high);
	json_t *more = json_pack(
		"{s:s, s:f, s:f, s:I, s:I, s:f, s:f, s:[s], s:{s:f, s:f, s:I, s:I}, s:o, s:o}",
		"bottleneck",
		a->feasible ? plan_bound_name(a->bound) : plan_constraint_name(a->constraint),
		"idle_a", a->idle_a, "idle_f", a->idle_f, "slots", (json_int_t)a->slots, "lanes",
		(json_int_t)a->lanes, "context", r->p.context, "cycle_ms", a->tau_ms, "constraints",
		plan_constraint_name(a->constraint), "colocated", "tokens_per_second_per_device",
		a->colocated_per_device, "tpot_ms", a->colocated_step_ms, "slots",
		(json_int_t)a->colocated_slots, "devices_of_a_group",
		(json_int_t)a->colocated_group, "what_would_have_to_change", changes_json(r, a),
		"stages", stages_json(a));

	json_object_set_new(result, "sources",
		json_pack("{s:s, s:s}", "model", r->model.source ? r->model.source : "given",
			"device", r->device.source ? r->device.source : "given"));
	json_object_update(result, more);
	json_decref(more);
	return result;
}

static int run(struct report *r)
{
	struct afd_plan_report answer = { .size = sizeof answer };
	int status = plan_output_check(&r->output);

	if (!status && r->as_published)
		return show_published(r);
	status = status ? status : read_input(r);
	if (!status && afd_plan_report(&r->p, &answer))
		status = plan_fail();
	if (status)
		return status;
	if (!r->output.json && !r->output.csv && !answer.use)
		printf("do not use AFD here: %s\n\n",
			!answer.feasible ? "the layout does not fit"
					 : "colocation on the same devices yields more");
	return plan_output_show(&r->output, result_json(r, &answer), "stages", "report");
}

/* A device by its numbers, beside or instead of a preset. */
#define OPTIONS_DEVICE(r) \
	{ "flops", "N", NULL, "operations per second, instead of the preset's", tool_set_real, \
		&(r).flops, 1, 1e20 }, \
		{ "hbm", "N", NULL, "bytes per second of its memory", tool_set_real, &(r).hbm, 1, \
			1e18 }, \
		{ "memory", "N", NULL, "bytes of its memory", tool_set_real, &(r).memory, 1, \
			1e18 }, \
		{ "scale-up", "N", NULL, "bytes per second inside a node", tool_set_real, \
			&(r).scale_up, 1, 1e18 }, \
		{ "scale-out", "N", NULL, "bytes per second between nodes, per device", \
			tool_set_real, &(r).scale_out, 1, 1e18 }

/* Of the comparison: sizes of numbers, latency, how colocation may group. */
#define OPTIONS_NUMBERS(r) \
	{ "weight-bytes", "N", "the config's", "bytes of a weight; 1 for presets", tool_set_real, \
		&(r).weight_bytes, 0.1, 8 }, \
		{ "kv-bytes", "N", "the config's", \
			"bytes of a number in the KV cache; 2 for presets", tool_set_real, \
			&(r).kv_bytes, 0.1, 8 }, \
		{ "latency-us", "T", "10 us", "of one message", tool_set_real, &(r).p.latency_us, \
			0, 1e9 }, \
		{ "group-max", "N", "all", \
			"devices that may share an FFN in colocation; 1: data parallel alone", \
			tool_set_u32, &(r).p.group_max, 1, 4096 }

int plan_report(int argc, char **argv)
{
	struct report r = { .p = { .size = sizeof r.p, .latency_us = 10 },
		.model.size = sizeof r.model,
		.device.size = sizeof r.device,
		.ffn_device.size = sizeof r.ffn_device };
	int status;

	plan_system_begin(&r.workload);
	const struct tool_option options[] = {
		{ "model", "DIR|NAME", NULL,
			"a checkpoint directory, of which config.json is read, or a preset",
			tool_set_text, &r.model_name, 0, 0 },
		{ "device", "NAME", NULL, "a preset (a wrong name lists them)", tool_set_text,
			&r.device_name, 0, 0 },
		{ "ffn-device", "NAME", "the same", "a preset for the FFN side", tool_set_text,
			&r.ffn_device_name, 0, 0 },
		OPTIONS_DEVICE(r),
		{ "attention", "N", NULL, "attention devices; required", tool_set_u32,
			&r.p.n_attention, 1, 4096 },
		{ "ffn", "N", NULL, "devices that share the FFN; required", tool_set_u32,
			&r.p.n_ffn, 1, 4096 },
		{ "context", "C", NULL, "mean KV positions of a sequence", tool_set_real,
			&r.p.context, 1, 1e9 },
		{ "lanes", "M", "the best", "micro-batches, 1 to 4", tool_set_u32, &r.p.lanes, 1,
			4 },
		{ "slots", "N", "the best that fit", "sequences of an attention device",
			tool_set_u32, &r.p.slots, 1, 65536 },
		{ "slots-max", "N", "256", "the most that are tried, on both sides", tool_set_u32,
			&r.p.slots_max, 1, 65536 },
		{ "slo-ms", "T", "none", "the longest time per output token", tool_set_real,
			&r.p.slo_ms, 0, 1e9 },
		{ "accept", "N", "1", "tokens that a step yields", tool_set_real, &r.p.accept, 1,
			64 },
		OPTIONS_NUMBERS(r),
		{ "times", "FILE", NULL,
			"measured stage times, CSV or JSON, instead of the data sheet",
			tool_set_text, &r.times_path, 0, 0 },
		{ "as-published", NULL, NULL,
			"the tables of ai-dynamo/dynamo#6570 beside the corrected figures",
			tool_set_flag, &r.as_published, 0, 0 },
		PLAN_OPTIONS_WORKLOAD(r.workload),
		PLAN_OPTIONS_OUTPUT(r.output),
		{ 0 },
	};

	status = tool_options_read(options,
		"report --model DIR --device NAME --attention N --ffn N --context C [--slo-ms T]\n"
		"       afd-plan report --as-published\n\n"
		"Times of the stages, and what the layout yields per device against the best "
		"colocation\n"
		"on the same devices.",
		argc, argv);
	if (!status)
		status = run(&r);
	else
		status = status < 0 ? TOOL_DONE : status;
	free(r.times);
	plan_system_end(&r.workload);
	return status;
}
