/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Measured times of stages: read from CSV or JSON, and looked up between the points that there are.
 * Between points a time is linear in rows and in context; outside them it goes on as the last two
 * do, and below the smallest it is constant. Also the reader of a calibration, whose coefficients
 * are such times condensed. Called by report.c, by hosts and by afd-plan.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "../model/json.h"
#include "plan.h"

enum { FIELDS = 6, FIELD_CHARS = 64, MAX_TIMES = 10000000 };

static const char *const NAMES[FIELDS] = { "stage", "device", "dtype", "rows", "context", "us" };
static const char *const STAGES[] = { "attention", "ffn", "exchange", "head" };

/* ---- reading ---- */

struct target {
	struct afd_plan_time *times;
	size_t room, n;
};

static int check_time(const struct afd_plan_time *t, const char *where)
{
	for (size_t i = 0; i < sizeof(STAGES) / sizeof(STAGES[0]); i++) {
		if (!strcmp(t->stage, STAGES[i]))
			return 0;
	}
	return afd__error(-EBADMSG, "%s: stage is '%s', limit attention, ffn, exchange, head",
		where, t->stage);
}

static int keep(struct target *to, const struct afd_plan_time *t, const char *where)
{
	int rc = check_time(t, where);

	if (!rc && to->n >= MAX_TIMES)
		rc = afd__error(-EBADMSG, "%s: more than %d times", where, MAX_TIMES);
	if (rc)
		return rc;
	if (to->n < to->room)
		to->times[to->n] = *t;
	to->n++;
	return 0;
}

static int set_text(char *out, size_t room, const char *text, const char *where, const char *field)
{
	if (!text || strlen(text) >= room)
		return afd__error(-EBADMSG, "%s: %s is '%.40s', limit 1 .. %zu characters", where,
			field, text ? text : "", room - 1);
	snprintf(out, room, "%s", text);
	return 0;
}

static int set_number(
	double *out, const char *text, const char *where, const char *field, double min, double max)
{
	char *end = NULL;

	*out = strtod(text, &end);
	if (end == text || *end || !(*out >= min && *out <= max))
		return afd__error(-EBADMSG, "%s: %s is '%.40s', limit %g .. %g", where, field, text,
			min, max);
	return 0;
}

/* The line's fields into a table of strings, cut at FIELD_CHARS - 1; returns how many. */
static int split(const char *line, size_t n_bytes, char fields[][FIELD_CHARS], int room)
{
	int n = 0;
	size_t used = 0;

	for (size_t i = 0; i <= n_bytes && n < room; i++) {
		char c = i < n_bytes ? line[i] : ',';

		if (c == ',') {
			while (used && strchr(" \t\r", fields[n][used - 1]))
				used--;
			fields[n++][used] = '\0';
			used = 0;
		} else if (used + 1 < FIELD_CHARS && c && !(used == 0 && (c == ' ' || c == '\t'))) {
			fields[n][used++] = c;
		}
	}
	return n;
}

static int read_csv_row(
	struct target *to, char fields[][FIELD_CHARS], const int column[FIELDS], const char *where)
{
	struct afd_plan_time t = { .stage = "" };
	int rc = set_text(t.stage, sizeof(t.stage), fields[column[0]], where, NAMES[0]);

	rc = rc ? rc : set_text(t.device, sizeof(t.device), fields[column[1]], where, NAMES[1]);
	rc = rc ? rc : set_text(t.dtype, sizeof(t.dtype), fields[column[2]], where, NAMES[2]);
	rc = rc ? rc : set_number(&t.rows, fields[column[3]], where, NAMES[3], 1e-9, 1e9);
	rc = rc ? rc : set_number(&t.context, fields[column[4]], where, NAMES[4], 0, 1e9);
	rc = rc ? rc : set_number(&t.us, fields[column[5]], where, NAMES[5], 0, 1e12);
	return rc ? rc : keep(to, &t, where);
}

static int find_columns(char names[][FIELD_CHARS], int n, int column[FIELDS])
{
	for (int f = 0; f < FIELDS; f++) {
		column[f] = -1;
		for (int i = 0; i < n; i++)
			column[f] = strcmp(names[i], NAMES[f]) ? column[f] : i;
		if (column[f] < 0)
			return afd__error(-EBADMSG, "times: line 1: no column %s", NAMES[f]);
	}
	return 0;
}

static int read_csv(struct target *to, const char *text, size_t n_bytes)
{
	enum { ROOM = 32 };
	char fields[ROOM][FIELD_CHARS], where[40];
	int column[FIELDS] = { 0 }, n_columns = 0, rc = 0;
	size_t line = 0;

	while (n_bytes && !rc) {
		const char *stop = memchr(text, '\n', n_bytes);
		size_t n = stop ? (size_t)(stop - text) : n_bytes;
		int found = split(text, n, fields, ROOM);

		snprintf(where, sizeof(where), "times: line %zu", ++line);
		if (line == 1) {
			n_columns = found;
			rc = find_columns(fields, found, column);
		} else if (found > 1 || fields[0][0]) {
			rc = found == n_columns ? read_csv_row(to, fields, column, where)
						: afd__error(-EBADMSG, "%s: %d fields, limit %d",
							  where, found, n_columns);
		}
		text += n + (stop ? 1 : 0);
		n_bytes -= n + (stop ? 1 : 0);
	}
	return rc;
}

static int read_json_time(struct target *to, const json_t *value, size_t i)
{
	struct afd_plan_time t = { .stage = "" };
	char where[40];
	struct afd__json j = { .object = value, .where = where };
	int rc;

	snprintf(where, sizeof(where), "times: entry %zu", i);
	if (!json_is_object(value))
		return afd__error(-EBADMSG, "%s: not an object", where);
	t.rows = afd__json_number(&j, "rows", 1e-9, 1e9, -1);
	t.context = afd__json_number(&j, "context", 0, 1e9, 0);
	t.us = afd__json_number(&j, "us", 0, 1e12, -1);
	if (!j.error && (t.rows < 0 || t.us < 0))
		afd__json_refuse(&j, -EBADMSG, t.rows < 0 ? "rows" : "us", NULL, "");
	rc = j.error;
	rc = rc ? rc
		: set_text(t.stage, sizeof(t.stage), afd__json_string(&j, "stage", NULL), where,
			  "stage");
	rc = rc ? rc
		: set_text(t.device, sizeof(t.device), afd__json_string(&j, "device", ""), where,
			  "device");
	rc = rc ? rc
		: set_text(t.dtype, sizeof(t.dtype), afd__json_string(&j, "dtype", ""), where,
			  "dtype");
	rc = rc ? rc : j.error;
	return rc ? rc : keep(to, &t, where);
}

static int read_json(struct target *to, const char *text, size_t n_bytes)
{
	int rc = 0;
	json_t *root = afd__json_parse(text, n_bytes, "times", &rc);
	const json_t *list = json_is_object(root) ? json_object_get(root, "times") : root;

	if (!root)
		return rc;
	if (!json_is_array(list))
		rc = afd__error(
			-EBADMSG, "times: neither a list nor an object with a list 'times'");
	for (size_t i = 0; i < json_array_size(list) && !rc; i++)
		rc = read_json_time(to, json_array_get(list, i), i);
	json_decref(root);
	return rc;
}

int afd_plan_parse_times(
	const char *text, size_t n_bytes, struct afd_plan_time *times, size_t room, size_t *n_times)
{
	struct target to = { .times = times, .room = times ? room : 0 };
	size_t at = 0;
	int rc;

	if (!text || !n_times)
		return afd__error(-EINVAL, "times: text or n_times is NULL");
	while (at < n_bytes && text[at] && strchr(" \t\r\n", text[at]))
		at++;
	if (at < n_bytes && (text[at] == '{' || text[at] == '['))
		rc = read_json(&to, text, n_bytes);
	else
		rc = read_csv(&to, text, n_bytes);
	if (rc)
		return rc;
	if (!to.n)
		return afd__error(-EBADMSG, "times: there is none");
	*n_times = to.n;
	if (to.n > to.room)
		return afd__error(-ENOSPC, "times: %zu, room for %zu", to.n, to.room);
	return (int)to.n;
}

/* ---- a calibration ---- */

int afd_plan_parse_calibration(const char *text, size_t n_bytes, struct afd_plan_params *params)
{
	struct afd__json j = { .where = "calibration" };
	struct afd_plan_params p;
	int rc = afd__params_copy(&p, sizeof(p), params, "plan params");
	json_t *root;

	if (!rc && (!text || !params))
		rc = afd__error(-EINVAL, "calibration: text or params is NULL");
	if (rc)
		return rc;
	root = afd__json_parse(text, n_bytes, "calibration", &rc);
	if (!root)
		return rc;
	j.object = root;
	if (!json_is_object(root))
		j.error = afd__error(-EBADMSG, "calibration: not an object");
	if (!j.error && !json_object_get(root, "alpha_a"))
		afd__json_refuse(&j, -EBADMSG, "alpha_a", NULL, "");
	p.alpha_a = afd__json_number(&j, "alpha_a", 0, 1e15, p.alpha_a);
	p.beta_a = afd__json_number(&j, "beta_a", 0, 1e15, p.beta_a);
	p.alpha_f = afd__json_number(&j, "alpha_f", 0, 1e15, p.alpha_f);
	p.beta_f = afd__json_number(&j, "beta_f", 0, 1e15, p.beta_f);
	p.alpha_c = afd__json_number(&j, "alpha_c", 0, 1e15, p.alpha_c);
	p.beta_c = afd__json_number(&j, "beta_c", 0, 1e15, p.beta_c);
	p.ffn_floor = afd__json_number(&j, "ffn_floor", 0, 1e15, p.ffn_floor);
	p.batch = afd__json_number(&j, "batch", 1e-9, 1e7, p.batch);
	p.lanes = (uint32_t)afd__json_integer(&j, "lanes", 0, 64, p.lanes);
	p.layers = (uint32_t)afd__json_integer(&j, "layers", 1, 1024, p.layers);
	p.devices = (uint32_t)afd__json_integer(&j, "devices", 0, 65536, p.devices);
	json_decref(root);
	return j.error ? j.error : afd__params_give(params, &p, sizeof(p), "plan params");
}

/* ---- looking up ---- */

const struct afd_plan_time *afd__plan_time_at(const struct afd_plan_report_params *p, size_t i)
{
	return (const void *)((const char *)p->times + i * p->time_bytes);
}

static bool matches(const struct afd_plan_time *t, const char *stage, const char *device)
{
	return !strcmp(t->stage, stage) &&
	       (!device || !t->device[0] || !strcasecmp(t->device, device));
}

/* Two neighbours of x among the points of one stage; NAN where there is none. */
struct around {
	double low, high;     /* the nearest at or below x, and above it */
	double lower, higher; /* and the next ones beyond them */
};

static void see(struct around *a, double x, double value)
{
	if (value <= x) {
		if (isnan(a->low) || value > a->low) {
			a->lower = a->low;
			a->low = value;
		} else if (value < a->low && (isnan(a->lower) || value > a->lower)) {
			a->lower = value;
		}
	} else if (isnan(a->high) || value < a->high) {
		a->higher = a->high;
		a->high = value;
	}
}

/* The time at one context that was measured, linear in rows. -1: no point. */
static double at_context(const struct afd_plan_report_params *p, const char *stage,
	const char *device, double rows, double context)
{
	struct around a = { NAN, NAN, NAN, NAN };
	double t[2] = { -1, -1 }, x[2];

	for (size_t i = 0; i < p->n_times; i++) {
		const struct afd_plan_time *time = afd__plan_time_at(p, i);

		if (matches(time, stage, device) && time->context == context)
			see(&a, rows, time->rows);
	}
	x[0] = isnan(a.low) ? a.high : isnan(a.high) && !isnan(a.lower) ? a.lower : a.low;
	x[1] = isnan(a.low) || isnan(a.high) ? (isnan(a.low) ? a.high : a.low) : a.high;
	for (size_t i = 0; i < p->n_times; i++) {
		const struct afd_plan_time *time = afd__plan_time_at(p, i);

		if (!matches(time, stage, device) || time->context != context)
			continue;
		t[0] = time->rows == x[0] ? time->us : t[0];
		t[1] = time->rows == x[1] ? time->us : t[1];
	}
	if (t[0] < 0 || x[0] == x[1])
		return t[0];
	return fmax(0, t[0] + (t[1] - t[0]) * (rows - x[0]) / (x[1] - x[0]));
}

double afd__plan_timed(const struct afd_plan_report_params *p, const char *stage,
	const char *device, double rows, double context)
{
	struct around a = { NAN, NAN, NAN, NAN };
	double from, to, t_from, t_to;

	for (size_t i = 0; i < p->n_times; i++) {
		const struct afd_plan_time *time = afd__plan_time_at(p, i);

		if (matches(time, stage, device))
			see(&a, context, time->context);
	}
	if (isnan(a.low) && isnan(a.high))
		return -1;
	from = isnan(a.low) ? a.high : isnan(a.high) && !isnan(a.lower) ? a.lower : a.low;
	to = isnan(a.high) ? a.low : a.high;
	t_from = at_context(p, stage, device, rows, from);
	t_to = at_context(p, stage, device, rows, to);
	if (from == to)
		return t_from;
	return fmax(0, t_from + (t_to - t_from) * (context - from) / (to - from));
}
