/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Traces as text: CSV with a header line, or one JSON object per line. Columns are found by name,
 * so that the published Azure LLM trace is read as it is; a value that is not a whole number within
 * its limit is refused with its line and column. Requests that yielded no token kept no slot and
 * are left out. Called by hosts and by afd-plan; the text comes from anywhere.
 */
#include <inttypes.h>
#include <string.h>

#include "../model/json.h"
#include "plan.h"

enum { NAMES = 2, PROMPT = 0, OUTPUT = 1, SHOWN = 40 };

static const char *const COLUMNS[2][NAMES] = {
	{ "prompt_tokens", "ContextTokens" },
	{ "output_tokens", "GeneratedTokens" },
};

struct piece {
	const char *at;
	size_t n_bytes;
};

struct reader {
	struct piece rest;
	size_t line;
	int column[2]; /* CSV: which one; by prompt and output */
	struct afd_plan_request *rows;
	size_t room, n_rows;
};

/* ---- pieces of text ---- */

static struct piece trim(struct piece p)
{
	while (p.n_bytes && strchr(" \t\r\"", p.at[p.n_bytes - 1]) && p.at[p.n_bytes - 1])
		p.n_bytes--;
	while (p.n_bytes && strchr(" \t\"", *p.at) && *p.at)
		p.at++, p.n_bytes--;
	return p;
}

/* Takes what stands before the next `end`, and the end too. */
static struct piece cut(struct piece *rest, char end)
{
	const char *stop = memchr(rest->at, end, rest->n_bytes);
	struct piece piece = { rest->at, stop ? (size_t)(stop - rest->at) : rest->n_bytes };
	size_t used = piece.n_bytes + (stop ? 1 : 0);

	rest->at += used;
	rest->n_bytes -= used;
	return piece;
}

static bool is(struct piece p, const char *name)
{
	return strlen(name) == p.n_bytes && !memcmp(p.at, name, p.n_bytes);
}

static int keep(struct reader *r, uint64_t prompt, uint64_t output)
{
	if (!output)
		return 0;
	if (r->n_rows < r->room)
		r->rows[r->n_rows] =
			(struct afd_plan_request){ (uint32_t)prompt, (uint32_t)output };
	r->n_rows++;
	return 0;
}

/* ---- CSV ---- */

static int read_header(struct reader *r, struct piece line)
{
	r->column[PROMPT] = r->column[OUTPUT] = -1;
	for (int i = 0; line.n_bytes; i++) {
		struct piece name = trim(cut(&line, ','));

		for (int c = 0; c < 2; c++) {
			if (!is(name, COLUMNS[c][0]) && !is(name, COLUMNS[c][1]))
				continue;
			if (r->column[c] >= 0)
				return afd__error(-EBADMSG,
					"trace: line %zu: column %s stands twice", r->line,
					COLUMNS[c][0]);
			r->column[c] = i;
		}
	}
	for (int c = 0; c < 2; c++) {
		if (r->column[c] < 0)
			return afd__error(-EBADMSG, "trace: line %zu: no column %s or %s", r->line,
				COLUMNS[c][0], COLUMNS[c][1]);
	}
	return 0;
}

static int read_number(const struct reader *r, struct piece text, int c, uint64_t *out)
{
	*out = 0;
	for (size_t i = 0; i < text.n_bytes && text.at[i] >= '0' && text.at[i] <= '9' && i < 12;
		i++)
		*out = *out * 10 + (uint64_t)(text.at[i] - '0');
	for (size_t i = 0; i < text.n_bytes || !text.n_bytes; i++) {
		if (!text.n_bytes || text.at[i] < '0' || text.at[i] > '9' ||
			*out > AFD__PLAN_MAX_TOKENS || text.n_bytes > 12)
			return afd__error(-EBADMSG, "trace: line %zu: %s is '%.*s', limit 0 .. %u",
				r->line, COLUMNS[c][0],
				(int)(text.n_bytes < SHOWN ? text.n_bytes : SHOWN), text.at,
				AFD__PLAN_MAX_TOKENS);
	}
	return 0;
}

static int read_csv_line(struct reader *r, struct piece line)
{
	uint64_t values[2] = { 0 };
	bool found[2] = { false };

	for (int i = 0; line.n_bytes; i++) {
		struct piece field = trim(cut(&line, ','));

		for (int c = 0; c < 2; c++) {
			int rc = i == r->column[c] ? read_number(r, field, c, &values[c]) : 0;

			if (rc)
				return rc;
			found[c] |= i == r->column[c];
		}
	}
	for (int c = 0; c < 2; c++) {
		if (!found[c])
			return afd__error(
				-EBADMSG, "trace: line %zu: %s is missing", r->line, COLUMNS[c][0]);
	}
	return keep(r, values[PROMPT], values[OUTPUT]);
}

/* ---- JSONL ---- */

static int read_json_line(struct reader *r, struct piece line)
{
	char where[40];
	struct afd__json j = { .where = where };
	int64_t values[2] = { 0 };
	int error = 0;
	json_t *root;

	snprintf(where, sizeof(where), "trace: line %zu", r->line);
	root = afd__json_parse(line.at, line.n_bytes, where, &error);
	if (!root)
		return error;
	j.object = root;
	if (!json_is_object(root))
		j.error = afd__error(-EBADMSG, "%s: not an object", where);
	for (int c = 0; c < 2 && !j.error; c++) {
		const char *const keys[] = { COLUMNS[c][0], COLUMNS[c][1], NULL };

		values[c] = afd__json_integer(&j, afd__json_spelling(&j, keys), 0,
			AFD__PLAN_MAX_TOKENS, AFD__JSON_REQUIRED);
	}
	json_decref(root);
	return j.error ? j.error : keep(r, (uint64_t)values[PROMPT], (uint64_t)values[OUTPUT]);
}

/* ---- the whole ---- */

static int read_lines(struct reader *r)
{
	bool json = false, header = false;
	int rc = 0;

	while (r->rest.n_bytes && !rc) {
		struct piece line = cut(&r->rest, '\n');

		r->line++;
		if (!trim(line).n_bytes)
			continue;
		if (!header)
			json = *trim(line).at == '{';
		if (json)
			rc = read_json_line(r, line);
		else
			rc = header ? read_csv_line(r, line) : read_header(r, line);
		header = true;
	}
	return rc;
}

int afd_plan_parse_trace(const char *text, size_t n_bytes, struct afd_plan_request *rows,
	size_t room, size_t *n_rows)
{
	struct reader r = { .rest = { text, n_bytes }, .rows = rows, .room = rows ? room : 0 };
	int rc;

	if (!text || !n_rows)
		return afd__error(-EINVAL, "trace: text or n_rows is NULL");
	if (n_bytes >= 3 && !memcmp(text, "\xef\xbb\xbf", 3))
		r.rest = (struct piece){ text + 3, n_bytes - 3 };
	rc = read_lines(&r);
	if (rc)
		return rc;
	if (!r.n_rows)
		return afd__error(-EBADMSG, "trace: it has no request with output tokens");
	if (r.n_rows > AFD__PLAN_MAX_TOKENS)
		return afd__error(
			-EBADMSG, "trace: %zu rows, limit %u", r.n_rows, AFD__PLAN_MAX_TOKENS);
	*n_rows = r.n_rows;
	if (r.n_rows > r.room)
		return afd__error(-ENOSPC, "trace: %zu rows, room for %zu", r.n_rows, r.room);
	return (int)r.n_rows;
}
