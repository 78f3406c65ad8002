/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-plan: how many attention workers per FFN, what the network allows, and when not to split.
 * Each command reads its own flags and says with --help what they mean; the numbers come from
 * plan.h.
 */
#include "plan/plan.h"
#include "tool/command.h"

static const struct tool_command commands[] = {
	{ "size", plan_size, "the best ratio of attention workers to FFNs, from linear times" },
	{ "simulate", plan_simulate, "every slot of every worker, for a range of ratios" },
	{ "roofline", plan_roofline, "what the network lets an FFN compute; imbalance" },
	{ "report", plan_report, "a model, a device and a layout against colocation, per device" },
	{ "calibrate", plan_calibrate,
		"measures this machine's stages, and fits the coefficients" },
	{ 0 },
};

int main(int argc, char **argv)
{
	return tool_command_run(commands, "; docs/planning.md is a tutorial", argc, argv);
}
