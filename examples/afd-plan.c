/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-plan: how many attention workers per FFN, what the network allows, and when not to split.
 * Each command reads its own flags and says with --help what they mean; the numbers come from
 * plan.h.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <afd/afd.h>

#include "plan/plan.h"

static const struct {
	const char *name;
	int (*run)(int argc, char **argv);
	const char *help;
} commands[] = {
	{ "size", plan_size, "the best ratio of attention workers to FFNs, from linear times" },
	{ "simulate", plan_simulate, "every slot of every worker, for a range of ratios" },
	{ "roofline", plan_roofline, "what the network lets an FFN compute; imbalance" },
	{ "report", plan_report, "a model, a device and a layout against colocation, per device" },
	{ "calibrate", plan_calibrate,
		"measures this machine's stages, and fits the coefficients" },
};
#define N_COMMANDS (sizeof commands / sizeof commands[0])

static int print_help(void)
{
	printf("usage: %s COMMAND [FLAGS]\n\n", program_invocation_short_name);
	for (size_t i = 0; i < N_COMMANDS; i++)
		printf("  %-12s %s\n", commands[i].name, commands[i].help);
	printf("\n%s COMMAND --help shows the command's flags; docs/planning.md is a tutorial\n",
		program_invocation_short_name);
	printf("\nexit status: 0 done, 1 failed, 2 wrong usage\n");
	return TOOL_DONE;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return tool_fail(TOOL_USAGE, "a command is missing, see --help");
	if (!strcmp(argv[1], "--help"))
		return print_help();
	if (!strcmp(argv[1], "--version")) {
		printf("%s %s\n", program_invocation_short_name, afd_version());
		return TOOL_DONE;
	}
	for (size_t i = 0; i < N_COMMANDS; i++) {
		if (!strcmp(argv[1], commands[i].name))
			return commands[i].run(argc - 1, argv + 1);
	}
	return tool_fail(TOOL_USAGE, "%s: no such command, see --help", argv[1]);
}
