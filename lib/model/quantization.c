/* SPDX-License-Identifier: Apache-2.0 */
/*
 * quantization_config: block FP8 is let through, in the two dialects that are published, and
 * everything else is refused by the name of its key. Nothing is taken from here: which tensors are
 * FP8 stands in the headers of their files, so lists of exclusions do not matter. Called by
 * config.c.
 */
#include <stdio.h>
#include <string.h>

#include "../context/core.h"
#include "config.h"

enum { BLOCK = 128, MAX_GROUPS = 64 };

static void must_be(struct afd__json *j, const char *key, const char *const *values,
		    const char *supported)
{
	const char *value = afd__json_string(j, key, NULL);

	for (; value && *values; values++) {
		if (!strcmp(value, *values))
			return;
	}
	if (value)
		afd__json_refuse_key(j, -ENOTSUP, key, supported);
}

/* Two numbers of 128 under key; missing means that scales are per tensor or row. */
static void check_block(struct afd__json *j, const char *key)
{
	const json_t *block = afd__json_member(j, key);
	size_t i;

	if (!block)
		afd__json_refuse(j, -ENOTSUP, key, json_null(), "supported: [128, 128]");
	for (i = 0; i < 2; i++) {
		const json_t *size = json_array_get(block, i);

		if (json_array_size(block) != 2 || !json_is_integer(size) ||
		    json_integer_value(size) != BLOCK)
			afd__json_refuse(j, -ENOTSUP, key, block, "supported: [128, 128]");
	}
}

/* As Qwen, DeepSeek and MiniMax publish it. */
static void check_fp8(struct afd__json *q)
{
	static const char *const formats[] = { "e4m3", "float8_e4m3fn", NULL };
	static const char *const schemes[] = { "dynamic", NULL };

	must_be(q, "fmt", formats, "supported: \"e4m3\"");
	must_be(q, "activation_scheme", schemes, "supported: \"dynamic\"");
	check_block(q, "weight_block_size");
}

/* ---- compressed-tensors ---- */

static bool enter(struct afd__json *inner, const struct afd__json *outer, const char *key,
		  char *where, size_t capacity)
{
	snprintf(where, capacity, "%s.%s", outer->where, key);
	inner->object = afd__json_member(outer, key);
	inner->where = where;
	inner->error = 0;
	return json_is_object(inner->object);
}

static void check_float8(struct afd__json *j)
{
	static const char *const types[] = { "float", NULL };

	if (afd__json_integer(j, "num_bits", 1, 64, 8) != 8)
		afd__json_refuse_key(j, -ENOTSUP, "num_bits", "supported: 8");
	must_be(j, "type", types, "supported: \"float\"");
}

static void check_weights(struct afd__json *w)
{
	static const char *const strategies[] = { "block", NULL };

	check_float8(w);
	if (!afd__json_member(w, "strategy"))
		afd__json_refuse(w, -ENOTSUP, "strategy", json_null(), "supported: \"block\"");
	must_be(w, "strategy", strategies, "supported: \"block\"");
	check_block(w, "block_structure");
	if (!afd__json_bool(w, "symmetric", true))
		afd__json_refuse_key(w, -ENOTSUP, "symmetric", "supported: true");
}

static void check_activations(struct afd__json *a)
{
	check_float8(a);
	if (!afd__json_bool(a, "dynamic", true))
		afd__json_refuse_key(a, -ENOTSUP, "dynamic", "supported: true");
	if (afd__json_integer(a, "group_size", -1, INT32_MAX, BLOCK) != BLOCK)
		afd__json_refuse_key(a, -ENOTSUP, "group_size", "supported: 128");
}

static void check_group(struct afd__json *group)
{
	struct afd__json part;
	char where[160];

	if (enter(&part, group, "weights", where, sizeof(where)))
		check_weights(&part);
	else
		afd__json_refuse(group, -ENOTSUP, "weights", json_null(), "supported: block FP8");
	if (part.error && !group->error)
		group->error = part.error;
	if (group->error || !enter(&part, group, "input_activations", where, sizeof(where)))
		return;
	check_activations(&part);
	group->error = part.error;
}

static void check_compressed(struct afd__json *q)
{
	static const char *const formats[] = { "float-quantized", "naive-quantized", NULL };
	const json_t *groups = afd__json_object(q, "config_groups");
	struct afd__json all = { .object = groups, .where = "config.json: quantization_config" };
	struct afd__json group, kv;
	char where[120];
	const char *name;
	json_t *value;

	must_be(q, "format", formats, "supported: \"float-quantized\"");
	if (!json_object_size(groups) || json_object_size(groups) > MAX_GROUPS)
		afd__json_refuse(q, -ENOTSUP, "config_groups", groups ? groups : json_null(),
				 "supported: groups of block FP8");
	json_object_foreach((json_t *)groups, name, value) {
		if (q->error)
			return;
		if (!enter(&group, &all, name, where, sizeof(where)))
			afd__json_refuse(q, -EBADMSG, name, value, "must be an object");
		else
			check_group(&group);
		q->error = q->error ? q->error : group.error;
	}
	if (!q->error && enter(&kv, q, "kv_cache_scheme", where, sizeof(where))) {
		check_float8(&kv);
		q->error = kv.error;
	}
}

void afd__quantization_check(struct afd__json *j)
{
	struct afd__json q = { .object = afd__json_object(j, "quantization_config"),
			       .where = "config.json: quantization_config" };
	const json_t *given;
	const char *method;

	if (!q.object || j->error)
		return;
	given = afd__json_member(&q, "quant_method");
	method = afd__json_string(&q, "quant_method", "");
	if (!strcmp(method, "fp8"))
		check_fp8(&q);
	else if (!strcmp(method, "compressed-tensors"))
		check_compressed(&q);
	else
		afd__json_refuse(&q, -ENOTSUP, "quant_method", given ? given : json_null(),
				 "supported: \"fp8\", \"compressed-tensors\"");
	j->error = q.error;
}
