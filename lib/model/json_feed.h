/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parsing JSON so that a failed allocation inside Jansson is an error and nothing worse. It needs
 * nothing of the library, because the tools read their JSON with it, too. Called by json.c and by
 * examples/tool/json.c.
 */
#ifndef AFD_LIB_JSON_FEED_H
#define AFD_LIB_JSON_FEED_H

#include <jansson.h>
#include <stddef.h>

enum { AFD__JSON_TOKEN_BYTES = 16 << 20 }; /* the longest string or number */

/* The document, or NULL and in *error -ENOMEM, or -EBADMSG with the place and the reason in `why`,
 * where line 0 means that there is no place. Repeated keys, NaN, NUL and bad UTF-8 are refused. */
json_t *afd__json_load(const char *text, size_t n_bytes, json_error_t *why, int *error);

#endif
