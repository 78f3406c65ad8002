/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A tool of several commands, as one table: the first word is a command's name, and --help of the
 * tool lists them all. A command reads its own flags (options.h). Commands of later versions stand
 * in the table too, and refuse by name.
 */
#ifndef TOOL_COMMAND_H
#define TOOL_COMMAND_H

#include "options.h"

struct tool_command {
	const char *name;
	int (*run)(int argc, char **argv); /* argv[0] is the command's name; NULL: later work */
	const char *help;
};

/* Runs what argv names. `commands` ends with a row without a name; `more` follows the last line of
 * --help. The command's exit status, or TOOL_USAGE after a line on stderr. */
int tool_command_run(
	const struct tool_command *commands, const char *more, int argc, char **argv);

#endif
