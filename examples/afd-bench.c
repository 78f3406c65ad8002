/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-bench: the machine's ceilings, and how near the library comes to them. Each command reads its
 * own flags and says with --help what it measures.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/bench.h"
#include "tool/command.h"

static const struct tool_command commands[] = {
	{ "ceilings", bench_ceilings,
		"what the machine can do: reading memory, multiply-adds, copying" },
	{ "ops", bench_ops, "operations on cold weights against these limits" },
	{ "load", bench_load, "weights onto a device, beside direct uploads" },
	{ "decode", bench_decode, "whole steps of a checkpoint, in one process and in two" },
	{ "exchange", bench_exchange,
		"frames there and back, beside the floor of the same medium" },
	{ "probe", bench_probe, "what can carry rows to an address, and how fast" },
	{ "prefill", NULL, "prompt processing; not in this version" },
	{ 0 },
};

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
	find_modules();
	return tool_command_run(commands, "", argc, argv);
}
