/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Values out of JSON, with type and range checked once, here. Jansson gives 180.5 where an integer
 * is asked for, so no value is read without a look at its type. Called by config.c, rope.c,
 * safetensors.c and checkpoint.c.
 */
#include "json.h"

#include <stdio.h>
#include <string.h>

#include "../context/core.h"
#include "json_feed.h"

enum { SHOWN_BYTES = 80 }; /* of a value in an error text */

json_t *afd__json_parse(const char *text, size_t n_bytes, const char *where, int *error)
{
	json_error_t why;
	json_t *root = afd__json_load(text, n_bytes, &why, error);

	if (root)
		return root;
	if (*error == -ENOMEM)
		afd__error(-ENOMEM, "%s: no memory for %zu bytes of JSON", where, n_bytes);
	else if (!why.line)
		afd__error(-EBADMSG, "%s: %s", where, why.text);
	else
		afd__error(-EBADMSG, "%s: not JSON at line %d, column %d: %s", where, why.line,
			   why.column, why.text);
	return NULL;
}

/* ---- values ---- */

const json_t *afd__json_member(const struct afd__json *j, const char *key)
{
	const json_t *value = json_object_get(j->object, key);

	return json_is_null(value) ? NULL : value;
}

void afd__json_refuse(struct afd__json *j, int code, const char *key, const json_t *value,
		      const char *why)
{
	char shown[SHOWN_BYTES + 1] = ""; /* jansson leaves a hole where a piece did not fit */
	size_t used;

	if (j->error)
		return;
	if (!value) {
		j->error = afd__error(code, "%s: %s is missing", j->where, key);
		return;
	}
	used = json_dumpb(value, shown, SHOWN_BYTES,
			  JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(10));
	shown[used < SHOWN_BYTES ? used : SHOWN_BYTES] = '\0';
	j->error = afd__error(code, "%s: %s is %s%s, %s", j->where, key, shown,
			      used > SHOWN_BYTES ? "..." : "", why);
}

void afd__json_refuse_key(struct afd__json *j, int code, const char *key, const char *why)
{
	afd__json_refuse(j, code, key, afd__json_member(j, key), why);
}

int64_t afd__json_integer(struct afd__json *j, const char *key, int64_t min, int64_t max,
			  int64_t fallback)
{
	const json_t *value = afd__json_member(j, key);
	int64_t number;
	char why[80];

	if (!value && fallback != AFD__JSON_REQUIRED)
		return fallback;
	if (!json_is_integer(value)) {
		afd__json_refuse(j, -EBADMSG, key, value, "must be an integer");
		return min;
	}
	number = json_integer_value(value);
	if (number >= min && number <= max)
		return number;
	snprintf(why, sizeof(why), "limit %lld .. %lld", (long long)min, (long long)max);
	afd__json_refuse(j, -EBADMSG, key, value, why);
	return min;
}

double afd__json_number(struct afd__json *j, const char *key, double min, double max,
			double fallback)
{
	const json_t *value = afd__json_member(j, key);
	double number;
	char why[80];

	if (!value)
		return fallback;
	if (!json_is_number(value)) {
		afd__json_refuse(j, -EBADMSG, key, value, "must be a number");
		return min;
	}
	number = json_number_value(value);
	if (number >= min && number <= max)
		return number;
	snprintf(why, sizeof(why), "limit %g .. %g", min, max);
	afd__json_refuse(j, -EBADMSG, key, value, why);
	return min;
}

bool afd__json_bool(struct afd__json *j, const char *key, bool fallback)
{
	const json_t *value = afd__json_member(j, key);

	if (!value)
		return fallback;
	if (!json_is_boolean(value))
		afd__json_refuse(j, -EBADMSG, key, value, "must be true or false");
	return json_is_true(value);
}

const char *afd__json_string(struct afd__json *j, const char *key, const char *fallback)
{
	const json_t *value = afd__json_member(j, key);

	if (!value)
		return fallback;
	if (json_is_string(value))
		return json_string_value(value);
	afd__json_refuse(j, -EBADMSG, key, value, "must be a string");
	return fallback;
}

const json_t *afd__json_object(struct afd__json *j, const char *key)
{
	const json_t *value = afd__json_member(j, key);

	if (value && !json_is_object(value)) {
		afd__json_refuse(j, -EBADMSG, key, value, "must be an object");
		return NULL;
	}
	return value;
}

const json_t *afd__json_array(struct afd__json *j, const char *key)
{
	const json_t *value = afd__json_member(j, key);

	if (value && !json_is_array(value)) {
		afd__json_refuse(j, -EBADMSG, key, value, "must be a list");
		return NULL;
	}
	return value;
}

const char *afd__json_spelling(struct afd__json *j, const char *const *keys)
{
	const char *const *key, *found = NULL;
	char why[120];

	for (key = keys; *key; key++) {
		const json_t *value = afd__json_member(j, *key);

		if (value && !found) {
			found = *key;
		} else if (value && !json_equal(value, afd__json_member(j, found))) {
			snprintf(why, sizeof(why), "but %s, which means the same, differs", found);
			afd__json_refuse(j, -EBADMSG, *key, value, why);
		}
	}
	return found ? found : keys[0];
}
