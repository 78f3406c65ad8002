/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tools' JSON is read with the same care as the library's: every allocation of Jansson fails
 * once, and each time there is a document that is whole or an error, never a read beyond it.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../examples/tool/json.h"

enum { LONG_TEXT = 3000 }; /* makes the buffer of a token grow several times */

static int n_calls, fail_at;

static void *failing_malloc(size_t bytes)
{
	return n_calls++ == fail_at ? NULL : malloc(bytes);
}

static char path[] = "/tmp/afd-tool-json-XXXXXX";

static void write_document(const char *document)
{
	FILE *file = fopen(path, "wb");

	assert_non_null(file);
	assert_int_equal(fwrite(document, 1, strlen(document), file), strlen(document));
	assert_int_equal(fclose(file), 0);
}

static int set_up(void **state)
{
	int fd = mkstemp(path);

	json_set_alloc_funcs(failing_malloc, free);
	return fd < 0 ? -1 : close(fd);
}

static int tear_down(void **state)
{
	json_set_alloc_funcs(malloc, free);
	return unlink(path);
}

/* One entry, whose note is a string of LONG_TEXT letters. */
static void write_batch(void)
{
	char document[LONG_TEXT + 100], letters[LONG_TEXT + 1];

	memset(letters, 'x', LONG_TEXT);
	letters[LONG_TEXT] = '\0';
	snprintf(document, sizeof(document), "[{\"note\": \"%s\", \"ids\": [1, 2, 30000]}]", letters);
	write_document(document);
}

static void each_failed_allocation_is_an_error_or_leaves_a_whole_document(void **state)
{
	int n_errors = 0;

	write_batch();
	for (fail_at = 0;; fail_at++) {
		json_t *document, *entry;

		n_calls = 0;
		document = tool_json_read(path);
		n_errors += !document;
		if (document) {
			entry = json_array_get(document, 0);
			assert_int_equal(
				json_string_length(json_object_get(entry, "note")), LONG_TEXT);
			assert_int_equal(json_array_size(json_object_get(entry, "ids")), 3);
		}
		json_decref(document);
		if (n_calls <= fail_at)
			break;
	}
	assert_true(n_errors > 10);
}

static void what_is_no_document_is_refused(void **state)
{
	static const char *const documents[] = { "", "[", "[1] [2]", "[1], [2]", "{\"a\": 1, \"a\": 2}",
		"[\"", "[NaN]", "], [1" };

	fail_at = -1;
	for (size_t i = 0; i < sizeof(documents) / sizeof(documents[0]); i++) {
		write_document(documents[i]);
		assert_null(tool_json_read(path));
	}
	assert_null(tool_json_read("/nowhere/batch.json"));
	assert_null(tool_json_read("/"));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(each_failed_allocation_is_an_error_or_leaves_a_whole_document),
		cmocka_unit_test(what_is_no_document_is_refused),
	};

	return cmocka_run_group_tests(tests, set_up, tear_down);
}
