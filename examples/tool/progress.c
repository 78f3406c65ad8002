/* SPDX-License-Identifier: Apache-2.0 */
/* The bar of progress.h: 40 cells, per cent, and MiB. */
#include <stdio.h>
#include <unistd.h>

#include "progress.h"

#define CELLS 40

void tool_progress_show(void *user, uint64_t done_bytes, uint64_t total_bytes)
{
	static const char full[CELLS + 1] = "########################################";
	struct tool_progress *progress = user;
	int percent = total_bytes ? (int)((double)done_bytes / total_bytes * 100) : 100;

	if (!isatty(STDERR_FILENO) || progress->shown == percent + 1)
		return;
	progress->shown = percent + 1;
	fprintf(stderr, "\r%s [%-*.*s] %3d %% of %.1f MiB", progress->what, CELLS,
		percent * CELLS / 100, full, percent, total_bytes / 1048576.0);
	if (done_bytes >= total_bytes)
		fprintf(stderr, "\r\033[K");
	fflush(stderr);
}
