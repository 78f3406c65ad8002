/* SPDX-License-Identifier: Apache-2.0 */
/* Sequences from --ids and --batch; every size is checked before memory is asked for. See input.h.
 */
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../tool/json.h"
#include "../tool/options.h"
#include "input.h"

static int sequence_create(
	struct sequence *sequence, uint32_t n_prompt, uint32_t max_tokens, const char *where)
{
	if (!n_prompt || n_prompt > INPUT_MAX_TOKENS || max_tokens > INPUT_MAX_TOKENS - n_prompt)
		return tool_fail(TOOL_FAILED,
			"%s: %" PRIu32 " ids and %" PRIu32
			" tokens to generate, limit 1 id and %d together",
			where, n_prompt, max_tokens, INPUT_MAX_TOKENS);
	sequence->ids = calloc((size_t)n_prompt + max_tokens, sizeof *sequence->ids);
	sequence->n_prompt = sequence->n_ids = n_prompt;
	sequence->max_tokens = max_tokens;
	return sequence->ids ? TOOL_DONE : tool_fail(TOOL_FAILED, "%s: no memory", where);
}

/* The next number of the text, or -1 when it is none. */
static int read_id(const char **text, int32_t *id)
{
	char *end;
	long value;

	errno = 0;
	value = strtol(*text, &end, 10);
	if (end == *text || errno || value < 0 || value > INT32_MAX ||
		(*end && !isspace((unsigned char)*end) && *end != ','))
		return -1;
	*id = value;
	*text = end;
	return 0;
}

static const char *skip_gap(const char *text)
{
	while (isspace((unsigned char)*text) || *text == ',')
		text++;
	return text;
}

int input_from_ids(struct input *input, const char *text, uint32_t max_tokens, uint64_t seed)
{
	uint32_t n_prompt = 0;
	int32_t id;
	int status;

	for (const char *at = skip_gap(text); *at; at = skip_gap(at), n_prompt++) {
		if (read_id(&at, &id))
			return tool_fail(TOOL_USAGE, "--ids: '%.20s' is not a token id", at);
	}
	if (!n_prompt)
		return tool_fail(TOOL_USAGE, "--ids: 0 ids, limit 1");
	input->sequences = calloc(1, sizeof *input->sequences);
	if (!input->sequences)
		return tool_fail(TOOL_FAILED, "--ids: no memory");
	input->n_sequences = 1;
	status = sequence_create(&input->sequences[0], n_prompt, max_tokens, "--ids");
	if (status)
		return status;
	input->sequences[0].seed = seed;
	text = skip_gap(text);
	for (uint32_t i = 0; i < n_prompt; i++, text = skip_gap(text))
		read_id(&text, &input->sequences[0].ids[i]);
	return TOOL_DONE;
}

static int read_optional(const json_t *entry, const char *key, const char *place, int64_t min,
	int64_t max, int64_t *out)
{
	const json_t *value = json_object_get(entry, key);
	char where[512];

	snprintf(where, sizeof where, "%s.%s", place, key);
	return value ? tool_json_integer(value, where, min, max, out) : 0;
}

/* A key that is misspelt would go unheard. */
static int check_keys(json_t *entry, const char *place)
{
	const char *key;
	json_t *value;

	if (!json_is_object(entry))
		return tool_fail(TOOL_FAILED, "%s: not an object", place);
	json_object_foreach(entry, key, value) {
		if (strcmp(key, "ids") && strcmp(key, "max_tokens") && strcmp(key, "seed"))
			return tool_fail(TOOL_FAILED,
				"%s: no key \"%.40s\"; there are ids, max_tokens and seed", place, key);
	}
	return TOOL_DONE;
}

/* {"ids": [...], "max_tokens": n, "seed": s} */
static int read_entry(struct sequence *sequence, json_t *entry, const char *place,
	uint32_t max_tokens, uint64_t seed)
{
	const json_t *ids = json_object_get(entry, "ids");
	int64_t tokens = max_tokens, own_seed = -1, id;
	char where[512];
	int status;

	if (check_keys(entry, place))
		return TOOL_FAILED;
	if (!json_is_array(ids))
		return tool_fail(TOOL_FAILED, "%s.ids: not an array of token ids", place);
	if (read_optional(entry, "max_tokens", place, 1, INPUT_MAX_TOKENS, &tokens) ||
		read_optional(entry, "seed", place, 0, INT64_MAX, &own_seed))
		return TOOL_FAILED;
	if (json_array_size(ids) > INPUT_MAX_TOKENS)
		return tool_fail(TOOL_FAILED, "%s.ids: %zu ids, limit %d", place,
			json_array_size(ids), INPUT_MAX_TOKENS);
	status = sequence_create(sequence, json_array_size(ids), tokens, place);
	for (size_t i = 0; i < json_array_size(ids) && !status; i++) {
		snprintf(where, sizeof where, "%s.ids[%zu]", place, i);
		status = tool_json_integer(json_array_get(ids, i), where, 0, INT32_MAX, &id)
				 ? TOOL_FAILED
				 : TOOL_DONE;
		sequence->ids[i] = status ? 0 : id;
	}
	sequence->seed = own_seed >= 0 ? (uint64_t)own_seed : seed;
	return status;
}

int input_from_batch(struct input *input, const char *path, uint32_t max_tokens, uint64_t seed)
{
	json_t *document = tool_json_read(path);
	size_t n = json_array_size(document);
	char place[400];
	int status = TOOL_DONE;

	if (!document)
		return TOOL_FAILED;
	if (!json_is_array(document) || !n || n > INPUT_MAX_SEQUENCES) {
		status = tool_fail(TOOL_FAILED, "%s: %s of %zu entries, limit an array of 1 to %d",
			path, json_is_array(document) ? "an array" : "not an array", n,
			INPUT_MAX_SEQUENCES);
		goto out;
	}
	input->sequences = calloc(n, sizeof *input->sequences);
	if (!input->sequences) {
		status = tool_fail(TOOL_FAILED, "%s: no memory", path);
		goto out;
	}
	input->n_sequences = n;
	for (size_t i = 0; i < n && !status; i++) {
		snprintf(place, sizeof place, "%.300s: [%zu]", path, i);
		status = read_entry(&input->sequences[i], json_array_get(document, i), place,
			max_tokens, seed + i);
	}
out:
	json_decref(document);
	return status;
}

void input_free(struct input *input)
{
	for (uint32_t i = 0; i < input->n_sequences; i++)
		free(input->sequences[i].ids);
	free(input->sequences);
}
