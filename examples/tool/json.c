/* SPDX-License-Identifier: Apache-2.0 */
/* Strict reading and one-line printing; see json.h. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/model/json_feed.h"
#include "file.h"
#include "json.h"
#include "options.h"

json_t *tool_json_read(const char *path)
{
	size_t n_bytes;
	char *text = tool_file_read(path, &n_bytes);
	json_t *document = NULL;
	json_error_t why;
	int error;

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
