/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The speed-up tables for Qwen3-32B-FP8 on H20-3e that went with ai-dynamo/dynamo#6570: their own
 * formula, found by fitting what they print, and beside each number what the report of this library
 * says for the same model and device. They compare r + 1 devices with one, and charge the FFN of a
 * decode step for all positions of the prompt. Kept because readers still meet these numbers.
 */
#include <math.h>
#include <stdio.h>

#include "plan.h"

enum { SPEEDUP, ATTENTION, FFN, TRANSFER, KINDS };

static const struct {
	uint32_t positions;
	double printed; /* the speed-up; NAN: not printed */
} LENGTHS[] = { { 128, NAN }, { 512, 8.01 }, { 2048, 8.01 }, { 4096, 16.00 }, { 8192, 31.96 } };
enum { N_LENGTHS = sizeof(LENGTHS) / sizeof(LENGTHS[0]) };

static const char *const NAMES[KINDS] = { "speed-up", "attention time", "FFN time",
	"transfer time" };
static const char *const REASONS[KINDS] = {
	"r+1 devices are compared with one, the FFN is charged for a prefill, and its time is "
	"divided "
	"by r where r times the rows arrive; corrected: per device, each side with its best batch",
	"MHA is assumed (GQA has a fifth of the K and V), and the projections are left out",
	"the FFN is charged for all positions of the prompt; a decode step computes one row, and "
	"at "
	"batch 1 reads the weights",
	"the prompt is sent once; a decode step sends one row per layer both ways, with its "
	"latencies "
	"(10 us a message)",
};

/* The tables' own formula. Sizes are those of the model, rates the tables' (in ms). */
struct theirs {
	double attention, ffn, transfer, speedup;
};

static struct theirs compute_theirs(double s)
{
	struct theirs t;
	double r = fmax(8, s / 256);

	t.attention = 2 * s * 5120 * 2 * 64 / 3.6e12 * 1e3;
	t.ffn = 6.0 * 5120 * 25600 * 64 * s / 250e12 * 1e3;
	t.transfer = s * 5120 * 2 / 80e9 * 0.15 * 1e3;
	t.speedup = (t.attention + t.ffn) / (fmax(t.attention, t.ffn / r) + t.transfer);
	return t;
}

/* The head's time is left out, as in the tables; its memory is not: embedding and head are 1.556 GB
 * that the model of this report does not have. All devices are behind the 50 GB/s network. */
static int correct(double s, struct afd_plan_report *out)
{
	struct afd_plan_device device = { .size = sizeof(device) };
	struct afd_plan_model model = { .size = sizeof(model) };
	struct afd_plan_report_params p = { .size = sizeof(p),
		.model = &model,
		.attention_device = &device,
		.n_attention = 1,
		.n_ffn = 1,
		.context = s,
		.group_max = 1 };
	int rc = afd_plan_find_device("H20-3e", &device);

	rc = rc ? rc : afd_plan_find_model("Qwen3-32B", &model);
	if (rc)
		return rc;
	device.memory_bytes -= 2.0 * model.vocab_size * model.hidden_size / 0.9;
	device.scale_up_bytes_per_s = device.scale_out_bytes_per_s;
	model.vocab_size = 0;
	return afd_plan_report(&p, out);
}

/* Of one sequence: what its stages take. */
static double corrected_time(int kind, double s)
{
	double hbm = 4.8e12, rows = 3.0 * 5120 * 64 / 50e9 * 1e3;

	if (kind == ATTENTION)
		return (94371840.0 * 64 + s * 262144) / hbm * 1e3;
	if (kind == FFN)
		return 3.0 * 5120 * 25600 * 64 / hbm * 1e3;
	return rows + 2 * 64 * 0.010;
}

int afd_plan_claim_at(uint32_t index, struct afd_plan_claim *out)
{
	struct afd_plan_report report = { .size = sizeof(report) };
	struct afd_plan_claim claim = { .size = sizeof(claim), .printed = NAN };
	uint32_t kind = index / N_LENGTHS, at = index % N_LENGTHS;
	struct theirs theirs;
	double s;
	int rc;

	if (kind >= KINDS)
		return afd__error(
			-ENOENT, "plan: claim %u, limit 0 .. %d", index, KINDS * N_LENGTHS - 1);
	s = LENGTHS[at].positions;
	theirs = compute_theirs(s);
	snprintf(claim.name, sizeof(claim.name), "%s, %.0f positions", NAMES[kind], s);
	claim.unit = kind == SPEEDUP ? "x" : "ms";
	claim.reason = REASONS[kind];
	claim.reproduced = kind == SPEEDUP     ? theirs.speedup
			   : kind == ATTENTION ? theirs.attention
			   : kind == FFN       ? theirs.ffn
					       : theirs.transfer;
	claim.corrected = kind == SPEEDUP ? 0 : corrected_time((int)kind, s);
	if (kind == SPEEDUP) {
		claim.printed = LENGTHS[at].printed;
		rc = correct(s, &report);
		if (rc)
			return rc;
		claim.corrected = report.best_speedup;
	}
	return afd__params_give(out, &claim, sizeof(claim), "plan claim");
}
