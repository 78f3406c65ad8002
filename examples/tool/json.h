/* SPDX-License-Identifier: Apache-2.0 */
/*
 * JSON in and out of the tools, over jansson. Reading is strict: a value of another type or out of
 * its range is refused with its place in the file; repeated keys too. Printing gives one object on
 * one line, nothing else.
 */
#ifndef TOOL_JSON_H
#define TOOL_JSON_H

#include <stdint.h>

#include <jansson.h>

/* The document in path, or NULL after a line on stderr. */
json_t *tool_json_read(const char *path);

/* An integer within min .. max. 0, or -1 after a line on stderr that begins with `where`. */
int tool_json_integer(
	const json_t *value, const char *where, int64_t min, int64_t max, int64_t *out);

/* Prints the object on stdout with a newline and gives it up. TOOL_DONE or TOOL_FAILED. */
int tool_json_print(json_t *object);

#endif
