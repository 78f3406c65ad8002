/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-bench: the machine's ceilings, and how near the library comes to them. Each command reads its
 * own flags and says with --help what it measures.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <afd/afd.h>

#include "bench/bench.h"

static const struct {
	const char *name;
	int (*run)(int argc, char **argv); /* NULL: not in this version */
	const char *help;
} commands[] = {
	{ "ceilings", bench_ceilings,
		"what the machine can do: reading memory, multiply-adds, copying" },
	{ "ops", bench_ops, "operations on cold weights against these limits" },
	{ "decode", bench_decode, "whole steps of a checkpoint, in one process and in two" },
	{ "exchange", NULL, "rows between two processes; not in this version" },
	{ "probe", NULL, "what a transport can do; not in this version" },
	{ "prefill", NULL, "prompt processing; not in this version" },
};
#define N_COMMANDS (sizeof commands / sizeof commands[0])

static int print_help(void)
{
	printf("usage: %s COMMAND [FLAGS]\n\n", program_invocation_short_name);
	for (size_t i = 0; i < N_COMMANDS; i++)
		printf("  %-12s %s\n", commands[i].name, commands[i].help);
	printf("\n%s COMMAND --help shows the command's flags\n", program_invocation_short_name);
	printf("\nexit status: 0 done, 1 failed, 2 wrong usage\n");
	return TOOL_DONE;
}

/* The library's objects are in this program, so modules are not beside libafd.so: say where they
 * are installed. */
static void find_modules(void)
{
	char path[4096];
	ssize_t n_chars = readlink("/proc/self/exe", path, sizeof path - 1);
	char *slash;

	if (n_chars <= 0)
		return;
	path[n_chars] = '\0';
	slash = strrchr(path, '/');
	if (!slash || (size_t)(path + sizeof path - slash) < sizeof BENCH_MODULES + 1)
		return;
	strcpy(slash + 1, BENCH_MODULES);
	if (!access(path, X_OK))
		setenv("AFD_MODULE_DIR", path, 0);
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
	find_modules();
	for (size_t i = 0; i < N_COMMANDS; i++) {
		if (strcmp(argv[1], commands[i].name))
			continue;
		if (!commands[i].run)
			return tool_fail(TOOL_USAGE, "%s: not in this version", argv[1]);
		return commands[i].run(argc - 1, argv + 1);
	}
	return tool_fail(TOOL_USAGE, "%s: no such command, see --help", argv[1]);
}
