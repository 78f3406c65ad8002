/* SPDX-License-Identifier: Apache-2.0 */
/* Strict reading and one-line printing; see json.h. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/model/json_feed.h"
#include "json.h"
#include "options.h"

/* The rest of the file, which may be a pipe; NULL after a line on stderr. */
static char *read_all(const char *path, FILE *file, size_t *n_bytes)
{
	size_t capacity = 0;
	char *text = NULL;

	for (*n_bytes = 0; !ferror(file) && !feof(file);) {
		if (*n_bytes == capacity) {
			char *more = realloc(text, capacity = 2 * capacity + 4096);

			if (!more) {
				free(text);
				tool_fail(TOOL_FAILED, "%s: no memory for %zu bytes", path, capacity);
				return NULL;
			}
			text = more;
		}
		*n_bytes += fread(text + *n_bytes, 1, capacity - *n_bytes, file);
	}
	if (!ferror(file))
		return text;
	tool_fail(TOOL_FAILED, "%s: %s", path, strerror(errno));
	free(text);
	return NULL;
}

json_t *tool_json_read(const char *path)
{
	FILE *file = fopen(path, "rb");
	size_t n_bytes;
	char *text = file ? read_all(path, file, &n_bytes) : NULL;
	json_t *document = NULL;
	json_error_t why;
	int error;

	if (!file)
		tool_fail(TOOL_FAILED, "%s: %s", path, strerror(errno));
	else
		fclose(file);
	if (!text)
		return NULL;
	document = afd__json_load(text, n_bytes, &why, &error);
	free(text);
	if (!document && error == -ENOMEM)
		tool_fail(TOOL_FAILED, "%s: no memory for %zu bytes of JSON", path, n_bytes);
	else if (!document && why.line)
		tool_fail(TOOL_FAILED, "%s: line %d: %s", path, why.line, why.text);
	else if (!document)
		tool_fail(TOOL_FAILED, "%s: %s", path, why.text);
	return document;
}

int tool_json_integer(
	const json_t *value, const char *where, int64_t min, int64_t max, int64_t *out)
{
	if (!json_is_integer(value)) {
		tool_fail(TOOL_FAILED, "%s: not an integer", where);
		return -1;
	}
	*out = json_integer_value(value);
	if (*out < min || *out > max) {
		tool_fail(TOOL_FAILED, "%s: value %" PRId64 ", limit %" PRId64 " to %" PRId64,
			where, *out, min, max);
		return -1;
	}
	return 0;
}

int tool_json_print(json_t *object)
{
	int rc = object ? json_dumpf(object, stdout, JSON_REAL_PRECISION(9)) : -1;

	json_decref(object);
	if (rc || putchar('\n') == EOF || fflush(stdout))
		return tool_fail(TOOL_FAILED, "stdout: cannot write the JSON object");
	return TOOL_DONE;
}
