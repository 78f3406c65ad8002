/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whole files of the tools. One that is written appears under its name when it is whole, never
 * before: it is written beside it, as NAME.part, and renamed. What is no regular file (a device, a
 * pipe, a link) is written where it is, since a rename would put a file in its place.
 */
#ifndef TOOL_FILE_H
#define TOOL_FILE_H

#include <stddef.h>
#include <stdio.h>

struct tool_file {
	FILE *file; /* NULL: not open */
	const char *path;
	char *part_path; /* NULL: written in place */
};

/* 0, or a negative errno. The path is borrowed. */
int tool_file_open(struct tool_file *out, const char *path);
/* Completes the file, or with keep 0 removes what was written beside it. 0, or a negative errno. One
 * that was not opened is fine. */
int tool_file_close(struct tool_file *out, int keep);

/* All of a file, which may be a pipe, with a NUL behind it; NULL after a line on stderr. */
char *tool_file_read(const char *path, size_t *n_bytes);

#endif
