/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the commands of afd-plan share: the flags of a system and its workload, files as text, and
 * the output. A command makes one JSON object; a table, --json, --csv and --plot are four ways to
 * see it, so that they cannot disagree.
 */
#ifndef PLAN_PLAN_H
#define PLAN_PLAN_H

#include <afd/afd.h>
#include <jansson.h>

#include "../tool/file.h"
#include "../tool/options.h"

/* ---- output ---- */

struct plan_output {
	int json, csv;
	const char *plot;
};

#define PLAN_OPTIONS_OUTPUT(o) \
	{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &(o).json, 0, 0 }, \
		{ "csv", NULL, NULL, "the table as CSV on stdout", tool_set_flag, &(o).csv, 0, \
			0 }, \
		{ "plot", "FILE", NULL, "a picture, .svg or .png; needs python3 with matplotlib", \
			tool_set_text, &(o).plot, 0, 0 }

/* Before anything is computed: TOOL_DONE, or TOOL_USAGE after a line on stderr. */
int plan_output_check(const struct plan_output *o);
/*
 * Shows result, whose member `list` (NULL: it has none) is a list of objects with equal keys: as a
 * table under the other members, as CSV, or as JSON. Takes result over. With a plot the picture of
 * `kind` is drawn too. TOOL_DONE or TOOL_FAILED.
 */
int plan_output_show(
	const struct plan_output *o, json_t *result, const char *list, const char *kind);

/* A finite number, or null. */
json_t *plan_number(double value);
const char *plan_bound_name(int32_t bound);
const char *plan_constraint_name(int32_t constraint);
/* One line on stderr with the library's text. */
int plan_fail(void);

/* ---- input ---- */

enum { PLAN_COEFFICIENTS = 6 };

struct plan_system {
	struct afd_plan_params params;
	double coefficients[PLAN_COEFFICIENTS]; /* NAN: not given */
	const char *calibration;
	uint32_t lanes, devices;     /* devices UINT32_MAX: not given */
	struct afd_plan_knot *knots; /* of a calibration */
	/* the workload */
	double theta, nu2;
	const char *prompt, *output, *trace;
	struct afd_plan_workload workload;
	struct afd_plan_request *requests;
};

#define PLAN_OPTIONS_SYSTEM(s) \
	{ "alpha-a", "T", NULL, \
		"attention time per KV position; any unit of time, the same for all", \
		tool_set_real, &(s).coefficients[0], 0, 1e15 }, \
		{ "beta-a", "T", NULL, "attention time of a lane without positions", \
			tool_set_real, &(s).coefficients[1], 0, 1e15 }, \
		{ "alpha-f", "T", NULL, "FFN time per row", tool_set_real, &(s).coefficients[2], \
			0, 1e15 }, \
		{ "beta-f", "T", NULL, "FFN time without rows", tool_set_real, \
			&(s).coefficients[3], 0, 1e15 }, \
		{ "alpha-c", "T", "0", "communication time per row, one direction", tool_set_real, \
			&(s).coefficients[4], 0, 1e15 }, \
		{ "beta-c", "T", "0", "communication time without rows", tool_set_real, \
			&(s).coefficients[5], 0, 1e15 }, \
		{ "comm-scope", "worker|bundle", "worker", \
			"rows of communication: those of a worker, or of all r", tool_set_either, \
			&(s).params.comm_scope, 0, 0 }, \
		{ "half-duplex", NULL, NULL, "both directions share a link", tool_set_flag, \
			&(s).params.half_duplex, 0, 0 }, \
		{ "calibration", "FILE", NULL, \
			"coefficients of afd-plan calibrate; flags override it", tool_set_text, \
			&(s).calibration, 0, 0 }, \
		{ "ffn-floor", "T", "0", \
			"an FFN that is a roofline: max(floor, alpha-f rows) + beta-f", \
			tool_set_real, &(s).params.ffn_floor, 0, 1e15 }, \
		{ "batch", "B", NULL, "slots per worker and lane; required", tool_set_real, \
			&(s).params.batch, 1e-9, 1e7 }, \
		{ "lanes", "M", "0", "micro-batches in flight; 0: as many as hide all latency", \
			tool_set_u32, &(s).lanes, 0, 64 }, \
		{ "layers", "L", "1", "layers of a token when times are of one layer, for TPOT", \
			tool_set_u32, &(s).params.layers, 1, 1024 }, \
		{ "devices", "N", "0", "devices that all processes share; 0: each has its own", \
			tool_set_u32, &(s).devices, 0, 65536 }, \
		{ "r-min", "N", "1", "the smallest ratio", tool_set_u32, &(s).params.r_min, 1, \
			65536 }, \
		{ "r-max", "N", "32", "the largest ratio", tool_set_u32, &(s).params.r_max, 1, \
			65536 }, \
		{ "cost-a", "C", "1", "cost of an attention worker", tool_set_real, \
			&(s).params.cost_a, 1e-9, 1e9 }, \
		{ "cost-f", "C", "1", "cost of an FFN", tool_set_real, &(s).params.cost_f, 1e-9, \
			1e9 }, \
		{ "tpot-limit", "T", "none", "the longest time per output token", tool_set_real, \
			&(s).params.tpot_limit, 0, 1e15 }, \
		{ "accept", "N", "1", "tokens that a step yields, with speculation", \
			tool_set_real, &(s).params.accept, 1, 64 }, \
		{ "kv-bytes-per-token", "N", "0 bytes", \
			"with --attention-memory: bounds the batch", tool_set_real, \
			&(s).params.kv_bytes_per_token, 0, 1e15 }, \
		{ "attention-weights", "N", "0 bytes", "weights of a worker", tool_set_real, \
			&(s).params.attention_weight_bytes, 0, 1e15 }, \
		{ "attention-memory", "N", "no limit", "bytes of a worker's memory", \
			tool_set_real, &(s).params.attention_memory_bytes, 0, 1e15 }, \
		{ "ffn-row-bytes", "N", "0 bytes", "with --ffn-memory: bounds the ratio", \
			tool_set_real, &(s).params.ffn_row_bytes, 0, 1e15 }, \
		{ "ffn-weights", "N", "0 bytes", "weights of the FFN", tool_set_real, \
			&(s).params.ffn_weight_bytes, 0, 1e15 }, \
		{ "ffn-memory", "N", "no limit", "bytes of the FFN's memory", tool_set_real, \
			&(s).params.ffn_memory_bytes, 0, 1e15 }, \
		PLAN_OPTIONS_WORKLOAD(s)

#define PLAN_OPTIONS_WORKLOAD(s) \
	{ "theta", "N", NULL, \
		"mean KV positions of a slot, with --nu2; instead of laws or a trace", \
		tool_set_real, &(s).theta, 1e-9, 1e12 }, \
		{ "nu2", "N", "0", "their variance", tool_set_real, &(s).nu2, 0, 1e24 }, \
		{ "prompt", "LAW", NULL, \
			"constant:N, geometric:MEAN, exponential:MEAN, lognormal:MEAN:CV, " \
			"pareto:MEAN:INDEX[:MAX], uniform:LOW:HIGH", \
			tool_set_text, &(s).prompt, 0, 0 }, \
		{ "output", "LAW", NULL, "likewise, or prompt:FACTOR, in proportion to it", \
			tool_set_text, &(s).output, 0, 0 }, \
		{ "trace", "FILE", NULL, "CSV or JSONL with prompt_tokens and output_tokens", \
			tool_set_text, &(s).trace, 0, 0 }

void plan_system_begin(struct plan_system *s);
/* Reads what the flags name. TOOL_DONE, TOOL_USAGE or TOOL_FAILED after a line on stderr. */
int plan_system_read(struct plan_system *s);
int plan_workload_read(struct plan_system *s);
void plan_system_end(struct plan_system *s);

/* Measured times of a file; NULL after a line on stderr. */
struct afd_plan_time *plan_read_times(const char *path, size_t *n_times);

/* The commands: argv[0] is the command's name. Exit statuses of the tool. */
int plan_size(int argc, char **argv);
int plan_simulate(int argc, char **argv);
int plan_roofline(int argc, char **argv);
int plan_report(int argc, char **argv);
int plan_calibrate(int argc, char **argv);

#endif
