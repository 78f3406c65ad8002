/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A progress bar on stderr while weights are loaded, drawn only when stderr is a terminal. Each
 * change of a per cent draws one line over the last; the finished bar is wiped, so that a log stays
 * clean.
 */
#ifndef TOOL_PROGRESS_H
#define TOOL_PROGRESS_H

#include <stdint.h>

struct tool_progress {
	const char *what; /* "loading models/tiny-qwen3" */
	int shown;        /* per cent + 1; 0: nothing yet */
};

/* An afd_progress; user is a struct tool_progress. */
void tool_progress_show(void *user, uint64_t done_bytes, uint64_t total_bytes);

#endif
