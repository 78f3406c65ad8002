/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jansson (2.14) does not look whether its token buffer could grow: when memory runs out there,
 * bytes of the token are lost, and a string that lost its closing quote is read far beyond its end.
 * So the document is fed to it inside a list, behind a number as long as the longest token. The
 * number grows the buffer once and for all, and can lose digits without harm.
 */
#include "json_feed.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

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

static json_t *refuse(json_error_t *why, int *error, int code)
{
	why->line = 0;
	*error = code;
	return NULL;
}

/* Jansson would name the bracket that stands behind it. */
static bool is_blank(const char *text, size_t n_bytes)
{
	while (n_bytes && memchr(" \t\r\n", text[n_bytes - 1], 4))
		n_bytes--;
	return !n_bytes;
}

json_t *afd__json_load(const char *text, size_t n_bytes, json_error_t *why, int *error)
{
	struct feed feed = { .text = text, .n_bytes = n_bytes };
	json_t *list, *root;

	if (is_blank(text, n_bytes)) {
		snprintf(why->text, sizeof(why->text), "not JSON: it is empty");
		return refuse(why, error, -EBADMSG);
	}
	feed.padding = longest_token(text, n_bytes) + 16;
	if (feed.padding > AFD__JSON_TOKEN_BYTES) {
		snprintf(why->text, sizeof(why->text), "a token of %zu bytes, limit %d",
			feed.padding, AFD__JSON_TOKEN_BYTES);
		return refuse(why, error, -EBADMSG);
	}
	/* Jansson takes some failed allocations for bad syntax; errno tells them apart. */
	errno = 0;
	list = json_load_callback(feed_bytes, &feed, JSON_REJECT_DUPLICATES, why);
	root = list ? unwrap(list) : NULL;
	if (root)
		return root;
	if (list) {
		snprintf(why->text, sizeof(why->text), "not JSON: more than one value");
		return refuse(why, error, -EBADMSG);
	}
	if (errno == ENOMEM || !why->text[0])
		return refuse(why, error, -ENOMEM);
	why->line--; /* that of the number */
	*error = -EBADMSG;
	return NULL;
}
