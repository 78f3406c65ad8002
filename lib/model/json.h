/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading JSON of others: every value is taken with its type and its range, null counts as absent,
 * and the first thing that is wrong stays in `error`, so that a reader of twenty keys checks once
 * at its end.
 */
#ifndef AFD_LIB_JSON_H
#define AFD_LIB_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

struct afd__json {
	const json_t *object;
	const char *where; /* for errors: "config.json", "config.json: rope_parameters" */
	int error;         /* the first one; its text is the thread's */
};

#define AFD__JSON_REQUIRED INT64_MIN

/* NULL on an error: -EBADMSG with line and column, or -ENOMEM. Duplicate keys, NaN, NUL and bad
 * UTF-8 are refused. The caller ends it with json_decref. */
json_t *afd__json_parse(const char *text, size_t n_bytes, const char *where, int *error);

/* NULL when the key is absent or null. */
const json_t *afd__json_member(const struct afd__json *j, const char *key);

/* An integer in min .. max; the fallback (not checked against the range) when absent. */
int64_t afd__json_integer(struct afd__json *j, const char *key, int64_t min, int64_t max,
			  int64_t fallback);
/* A number, integer or not, in min .. max. */
double afd__json_number(struct afd__json *j, const char *key, double min, double max,
			double fallback);
bool afd__json_bool(struct afd__json *j, const char *key, bool fallback);
/* Lives as long as the object. */
const char *afd__json_string(struct afd__json *j, const char *key, const char *fallback);
const json_t *afd__json_object(struct afd__json *j, const char *key);
const json_t *afd__json_array(struct afd__json *j, const char *key);
/* Which of several spellings of one key is there: the first of them, also when none is. Two that
 * differ are an error. */
const char *afd__json_spelling(struct afd__json *j, const char *const *keys);

/* Sets the error "where: key is VALUE, why" unless there is one already. */
void afd__json_refuse(struct afd__json *j, int code, const char *key, const json_t *value,
		      const char *why);

/* The same for the object's own value of key. */
void afd__json_refuse_key(struct afd__json *j, int code, const char *key, const char *why);

#endif
