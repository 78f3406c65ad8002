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

enum {
	SHOWN_BYTES = 80, /* of a value in an error text */
	MAX_TOKEN_BYTES = 16 << 20,
};

/* ---- parsing ---- */

/*
 * Jansson (2.14) does not look whether its token buffer could grow: when memory runs out there,
 * bytes of the token are lost, and a string that lost its closing quote is read far beyond its end.
 * So the document is fed to it inside a list, behind a number as long as the longest token. The
 * number grows the buffer once and for all, and can lose digits without harm.
 */
struct feed {
	const char *text;
	size_t n_bytes, padding; /* zeros of the number */
	size_t at; /* bytes given so far, of before + zeros + between + text + after */
};

struct part {
	const char *bytes; /* NULL: zeros */
	size_t n_bytes;
};

static const char before[] = "[0.", between[] = ",\n", after[] = "]";

static size_t give(char *out, size_t room, size_t skip, const char *bytes, size_t n_bytes)
{
	size_t n = skip < n_bytes ? n_bytes - skip : 0;

	n = n < room ? n : room;
	if (bytes)
		memcpy(out, bytes + skip, n);
	else
		memset(out, '0', n);
	return n;
}

static size_t feed_bytes(void *out, size_t room, void *arg)
{
	struct feed *feed = arg;
	const struct part parts[] = {
		{ before, sizeof(before) - 1 },
		{ NULL, feed->padding },
		{ between, sizeof(between) - 1 },
		{ feed->text, feed->n_bytes },
		{ after, sizeof(after) - 1 },
	};
	size_t skip = feed->at, given, i;

	for (i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
		if (skip < parts[i].n_bytes) {
			given = give(out, room, skip, parts[i].bytes, parts[i].n_bytes);
			feed->at += given;
			return given;
		}
		skip -= parts[i].n_bytes;
	}
	return 0;
}

/* At least as long as the longest string or number; an escaped quote may only make it longer. */
static size_t longest_token(const char *text, size_t n_bytes)
{
	size_t longest = 0, start = 0, i;

	for (i = 0; i < n_bytes; i++) {
		bool ends = text[i] == '"' ? i == 0 || text[i - 1] != '\\' : false;

		if (!ends)
			continue;
		longest = i - start > longest ? i - start : longest;
		start = i;
	}
	return n_bytes - start > longest ? n_bytes - start : longest;
}

static json_t *unwrap(json_t *list)
{
	json_t *root = json_array_size(list) == 2 ? json_incref(json_array_get(list, 1)) : NULL;

	json_decref(list);
	return root;
}

json_t *afd__json_parse(const char *text, size_t n_bytes, const char *where, int *error)
{
	struct feed feed = { .text = text, .n_bytes = n_bytes };
	json_error_t why;
	json_t *list, *root;

	feed.padding = longest_token(text, n_bytes) + 16;
	if (feed.padding > MAX_TOKEN_BYTES) {
		*error = afd__error(-EBADMSG, "%s: a token of %zu bytes, limit %d", where,
				    feed.padding, MAX_TOKEN_BYTES);
		return NULL;
	}
	/* Jansson takes some failed allocations for bad syntax; errno tells them apart. */
	errno = 0;
	list = json_load_callback(feed_bytes, &feed, JSON_REJECT_DUPLICATES, &why);
	root = list ? unwrap(list) : NULL;
	if (root)
		return root;
	if (list)
		*error = afd__error(-EBADMSG, "%s: not JSON: more than one value", where);
	else if (errno == ENOMEM || !why.text[0])
		*error = afd__error(-ENOMEM, "%s: no memory for %zu bytes of JSON", where, n_bytes);
	else
		*error = afd__error(-EBADMSG, "%s: not JSON at line %d, column %d: %s", where,
				    why.line - 1, why.column, why.text);
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
