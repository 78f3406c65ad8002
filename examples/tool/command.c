/* SPDX-License-Identifier: Apache-2.0 */
/* The first word of a tool, and --help from the same rows; see command.h. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <afd/afd.h>

#include "command.h"

static int print_help(const struct tool_command *commands, const char *more)
{
	printf("usage: %s COMMAND [FLAGS]\n\n", program_invocation_short_name);
	for (const struct tool_command *c = commands; c->name; c++)
		printf("  %-12s %s\n", c->name, c->help);
	printf("\n%s COMMAND --help shows the command's flags%s\n", program_invocation_short_name,
		more);
	printf("\nexit status: 0 done, 1 failed, 2 wrong usage\n");
	return tool_flush();
}

int tool_command_run(const struct tool_command *commands, const char *more, int argc, char **argv)
{
	if (argc < 2)
		return tool_fail(TOOL_USAGE, "a command is missing, see --help");
	if (!strcmp(argv[1], "--help"))
		return print_help(commands, more);
	if (!strcmp(argv[1], "--version")) {
		printf("%s %s\n", program_invocation_short_name, afd_version());
		return tool_flush();
	}
	for (const struct tool_command *c = commands; c->name; c++) {
		if (strcmp(argv[1], c->name))
			continue;
		if (!c->run)
			return tool_fail(TOOL_USAGE, "%s: not in this version", argv[1]);
		return c->run(argc - 1, argv + 1);
	}
	return tool_fail(TOOL_USAGE, "%s: no such command, see --help", argv[1]);
}
