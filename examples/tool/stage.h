/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the tools that run stages share: their common flags, the context that these flags ask for,
 * and the progress bar while weights are loaded. Log lines go to stderr, "afd-serve-ffn: info:
 * text".
 */
#ifndef TOOL_STAGE_H
#define TOOL_STAGE_H

#include <afd/afd.h>

#include "options.h"

struct tool_stage {
	const char *model;
	const char *device;
	uint32_t threads; /* 0: cores */
	uint32_t deadline_ms, max_rows, connect_timeout_ms;
	int32_t log;
	int quantize; /* both stages have the parameter, and one process may hold both */
};

/* Rows for a tool's table. `s` is a struct tool_stage. */
#define TOOL_OPTION_MODEL(s) \
	{ "model", "DIR", NULL, "a checkpoint directory as Hugging Face publishes it; required", \
		tool_set_text, &(s).model, 0, 0 }
#define TOOL_OPTION_LOG(s) \
	{ "log", "LEVEL", "warn", "error, warn, info or debug; lines go to stderr", tool_set_log, \
		&(s).log, 0, 0 }
#define TOOL_OPTIONS_STAGE(s) \
	TOOL_OPTION_MODEL(s), \
	{ "device", "cpu|cuda:N|deferred", "cpu", \
		"where it computes; deferred is the CPU behind an asynchronous queue", \
		tool_set_device, &(s).device, 0, 0 }, \
	{ "threads", "N", "cores", "compute threads of this process, 1 to 1024", \
		tool_set_u32, &(s).threads, 1, 1024 }, \
	{ "deadline-ms", "N", "5000 ms", \
		"the longest silence of a peer in the middle of work, 10 to 3600000 ms", \
		tool_set_u32, &(s).deadline_ms, 10, 3600000 }, \
	{ "max-rows", "N", "512 rows", \
		"rows in one part of a frame, 1 to 65536; the smaller side wins", \
		tool_set_u32, &(s).max_rows, 1, 65536 }, \
	{ "connect-timeout-ms", "N", "10000 ms", \
		"how long a server that is not up yet is waited for, 1 to 3600000 ms", \
		tool_set_u32, &(s).connect_timeout_ms, 1, 3600000 }, \
	TOOL_OPTION_LOG(s), \
	{ "quantize-activations", NULL, NULL, \
		"inputs of products with e4m3 weights in e4m3, as GPUs do it; for all processes or none", \
		tool_set_flag, &(s).quantize, 0, 0 }, \
	{ "key", "FILE", NULL, "a key that both sides prove; not in this version", \
		tool_set_later, NULL, 0, 0 }, \
	{ "tls", NULL, NULL, "encrypted links; not in this version", \
		tool_set_later, NULL, 0, 0 }

/* The CPUs that this process may run on. */
uint32_t tool_cores(void);

/* The context that the flags ask for, with a tracer or NULL. TOOL_DONE, or TOOL_FAILED after a line
 * on stderr. */
int tool_context_create(
	afd_context **out, const struct tool_stage *stage, const struct afd_tracer *tracer);

#endif
