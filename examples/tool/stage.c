/* SPDX-License-Identifier: Apache-2.0 */
/* The context that the common flags ask for; stage.h says what the flags are. */
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include "stage.h"

uint32_t tool_cores(void)
{
	cpu_set_t set;
	long n;

	if (!sched_getaffinity(0, sizeof set, &set))
		return CPU_COUNT(&set);
	n = sysconf(_SC_NPROCESSORS_ONLN);
	return n > 0 ? n : 1;
}

static void write_log(void *user, int32_t level, const char *text)
{
	static const char *const names[] = { "", "error", "warn", "info", "debug" };

	(void)user;
	tool_fail(0, "%s: %s",
		level >= AFD_LOG_ERROR && level <= AFD_LOG_DEBUG ? names[level] : "log", text);
}

int tool_context_create(
	afd_context **out, const struct tool_stage *stage, const struct afd_tracer *tracer)
{
	struct afd_context_params params = {
		.size = sizeof params,
		.log = { .write = write_log, .max_level = stage->log },
		.n_threads = stage->threads ? stage->threads : tool_cores(),
	};

	if (tracer)
		params.tracer = *tracer;
	return afd_context_create(out, &params) ? tool_fail(TOOL_FAILED, "%s", afd_last_error())
						: TOOL_DONE;
}
