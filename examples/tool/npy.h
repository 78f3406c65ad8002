/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writes float32 [rows][columns] as .npy, row by row, for a number of rows that is known only at
 * the end. The file appears under its name when it is whole (file.h).
 */
#ifndef TOOL_NPY_H
#define TOOL_NPY_H

#include <stdint.h>

#include "file.h"

struct tool_npy {
	struct tool_file out;
	uint64_t n_rows;
	uint32_t n_columns;
};

/* 0, or a negative errno. */
int tool_npy_open(struct tool_npy *npy, const char *path, uint32_t n_columns);
int tool_npy_append(
	struct tool_npy *npy, const float *rows, uint64_t n_rows); /* rows: [n_rows][n_columns] */
/* Completes the file, or with keep 0 removes it. An npy that was not opened is fine. */
int tool_npy_close(struct tool_npy *npy, int keep);

#endif
