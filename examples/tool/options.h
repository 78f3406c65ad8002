/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flags of a tool, as one table: the parser and --help read the same rows, so neither knows a flag
 * that the other does not. A row says how its value is set; a value that does not fit is told in
 * one line on stderr (flag, value, limit) and gives the exit status 2. Flags of later versions
 * stand in the table too, and refuse by name.
 */
#ifndef TOOL_OPTIONS_H
#define TOOL_OPTIONS_H

#include <stddef.h>
#include <stdint.h>

enum { TOOL_DONE = 0, TOOL_FAILED = 1, TOOL_USAGE = 2 };

struct tool_option {
	const char *name;    /* without dashes */
	const char *value;   /* as --help shows it: "N", "DIR"; NULL: the flag has none */
	const char *initial; /* the default, with its unit; NULL: none */
	const char *text;
	int (*set)(const struct tool_option *option, const char *value);
	void *into;
	double min, max; /* of numbers */
};

struct tool_list {
	const char **items; /* [n_items] */
	uint32_t n_items;
};

/* Sets what the flags say. TOOL_DONE, TOOL_USAGE after a line on stderr, or -1 when --help or
 * --version was all. */
int tool_options_read(const struct tool_option *options, const char *usage, int argc, char **argv);

/* How a value is set. */
int tool_set_flag(const struct tool_option *option, const char *value); /* int: 1 */
int tool_set_text(const struct tool_option *option, const char *value); /* const char * */
int tool_set_list(
	const struct tool_option *option, const char *value); /* struct tool_list: appends */
int tool_set_u32(
	const struct tool_option *option, const char *value); /* uint32_t within min .. max */
int tool_set_u64(const struct tool_option *option, const char *value); /* uint64_t */
int tool_set_real(
	const struct tool_option *option, const char *value); /* double within min .. max */
int tool_set_log(
	const struct tool_option *option, const char *value); /* int32_t, enum afd_log_level */
int tool_set_either(const struct tool_option *option,
	const char *value); /* int32_t: 1 or 2, which of the row's "first|second" it is */
int tool_set_dtype(const struct tool_option *option,
	const char *value); /* int32_t, enum afd_dtype; "auto": 0 */
int tool_set_dtypes(
	const struct tool_option *option, const char *value); /* int32_t [2]: X, or X:Y */
int tool_set_device(const struct tool_option *option, const char *value); /* const char * */
int tool_set_shard(
	const struct tool_option *option, const char *value); /* uint32_t [2]: i/n, i below n */
int tool_set_one(
	const struct tool_option *option, const char *value); /* takes "1" only: more is later work */
int tool_set_zero(
	const struct tool_option *option, const char *value); /* takes "0" only, likewise */
int tool_set_later(const struct tool_option *option, const char *value); /* takes nothing */

/* What was printed is on stdout: TOOL_DONE, or TOOL_FAILED after a line on stderr. */
int tool_flush(void);

/* One line on stderr, "afd-generate: text"; returns status. */
__attribute__((format(printf, 2, 3))) int tool_fail(int status, const char *format, ...);

#endif
