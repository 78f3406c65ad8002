/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-inspect: what is in a checkpoint, and what each shard of each role of it will hold. Reads
 * config.json and the headers of the tensor files only; no weight is touched.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include <afd/afd.h>

#include "tool/json.h"
#include "tool/stage.h"

struct layout {
	uint32_t attention_tp, ffn_tp, ffn_ep;
	int32_t gate; /* enum afd_gate, in the order of --gate */
};

/* Called for each shard of each role, in order. 0, or a status that ends the walk. */
typedef int visit(
	void *into, const char *role, const char *shard, const struct afd_role_info *info);

static int visit_shard(const afd_model *model, struct afd_shard_params *p, visit *visit, void *into)
{
	struct afd_role_info info = { .size = sizeof info };
	const struct afd_shard *s = &p->shard;
	char name[64];

	if (afd_model_shard(model, p, &info))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	if (s->n_ep > 1)
		snprintf(name, sizeof name, "tp%" PRIu32 "/%" PRIu32 ",ep%" PRIu32 "/%" PRIu32, s->tp,
			s->n_tp, s->ep, s->n_ep);
	else
		snprintf(name, sizeof name, "%s%" PRIu32 "/%" PRIu32, s->n_tp > 1 ? "tp" : "", s->tp,
			s->n_tp);
	return visit(into, p->role == AFD_ROLE_FFN ? "ffn" : "attention", name, &info);
}

static int visit_shards(const afd_model *model, const struct afd_model_info *info,
	const struct layout *layout, visit *visit, void *into)
{
	struct afd_shard_params p = { .size = sizeof p, .gate = layout->gate };
	int status = TOOL_DONE;

	p.role = AFD_ROLE_ATTENTION;
	p.shard.n_tp = layout->attention_tp;
	p.shard.n_ep = 1;
	for (; !status && !info->ffn_only && p.shard.tp < p.shard.n_tp; p.shard.tp++)
		status = visit_shard(model, &p, visit, into);
	p.role = AFD_ROLE_FFN;
	p.shard.n_tp = layout->ffn_tp;
	p.shard.n_ep = layout->ffn_ep;
	for (p.shard.ep = 0; p.shard.ep < p.shard.n_ep; p.shard.ep++) {
		for (p.shard.tp = 0; !status && p.shard.tp < p.shard.n_tp; p.shard.tp++)
			status = visit_shard(model, &p, visit, into);
	}
	return status;
}

/* ---- text ---- */

static void print_layers(const struct afd_model_info *info)
{
	printf("layers              %" PRIu32 ": ", info->n_layers);
	if (!info->ffn_only)
		printf("attention %" PRIu32 " full, %" PRIu32 " sliding", info->n_full_layers,
			info->n_sliding_layers);
	if (info->n_sliding_layers)
		printf(" (window %" PRIu32 ")", info->sliding_window);
	printf("%sffn %" PRIu32 " dense, %" PRIu32 " moe\n", info->ffn_only ? "" : "; ",
		info->n_dense_layers, info->n_moe_layers);
}

static void print_ffn(const struct afd_model_info *info)
{
	if (info->n_dense_layers)
		printf("intermediate size   %" PRIu32 "\n", info->intermediate_size);
	if (!info->n_moe_layers)
		return;
	printf("experts             %" PRIu32 " of %" PRIu32 " wide, %" PRIu32 " per row by %s",
		info->n_experts, info->expert_size, info->top_k,
		info->router == AFD_ROUTER_SOFTMAX ? "softmax" : "sigmoid");
	if (info->shared_size)
		printf("; shared %" PRIu32 " wide", info->shared_size);
	printf("\n");
}

static int print_row(
	void *into, const char *role, const char *shard, const struct afd_role_info *info)
{
	fprintf(into, "%-10s %-14s %8" PRIu64 " %16" PRIu64 "\n", role, shard, info->n_tensors,
		info->bytes);
	return TOOL_DONE;
}

static void print_info(const struct afd_model_info *info)
{
	printf("architecture        %s%s\n", info->architecture,
		info->ffn_only ? " (only its FFN is computed)" : "");
	print_layers(info);
	printf("hidden size         %" PRIu32 "\n", info->hidden_size);
	if (!info->ffn_only)
		printf("heads               %" PRIu32 " query, %" PRIu32 " key-value, of %" PRIu32 "\n",
			info->n_heads, info->n_kv_heads, info->head_dim);
	print_ffn(info);
	printf("vocabulary          %" PRIu32 ", head %s\n", info->vocab_size,
		info->tied_head ? "tied" : "of its own");
	printf("dtype               %s\n", afd_dtype_name(info->dtype));
	if (!info->ffn_only)
		printf("kv bytes per token  %" PRIu64 "\n", info->kv_bytes_per_token);
}

/* Nothing is printed before everything is known, so that a failure leaves stdout empty. */
static int print_text(
	const afd_model *model, const struct afd_model_info *info, const struct layout *layout)
{
	char *rows = NULL;
	size_t n_bytes;
	FILE *into = open_memstream(&rows, &n_bytes);
	int status;

	if (!into)
		return tool_fail(TOOL_FAILED, "out of memory");
	status = visit_shards(model, info, layout, print_row, into);
	if (fclose(into) && !status)
		status = tool_fail(TOOL_FAILED, "out of memory");
	if (!status) {
		print_info(info);
		printf("\n%-10s %-14s %8s %16s\n%s", "role", "shard", "tensors", "bytes", rows);
		status = tool_flush();
	}
	free(rows);
	return status;
}

/* ---- JSON ---- */

static int append_entry(
	void *into, const char *role, const char *shard, const struct afd_role_info *info)
{
	json_t *entry = json_pack("{s:s, s:s, s:I, s:I}", "role", role, "shard", shard, "tensors",
		(json_int_t)info->n_tensors, "bytes", (json_int_t)info->bytes);

	if (json_array_append_new(into, entry))
		return tool_fail(TOOL_FAILED, "out of memory");
	return TOOL_DONE;
}

static void add(json_t *object, const char *key, uint64_t value)
{
	json_object_set_new(object, key, json_integer((json_int_t)value));
}

static json_t *pack_info(const struct afd_model_info *info, json_t *roles)
{
	json_t *o = json_pack("{s:s, s:s, s:o, s:b, s:b, s:{s:I, s:I, s:I, s:I}}", "architecture",
		info->architecture, "dtype", afd_dtype_name(info->dtype), "roles", roles, "tied_head",
		info->tied_head, "ffn_only", info->ffn_only, "layer_kinds", "full_attention",
		(json_int_t)info->n_full_layers, "sliding_attention", (json_int_t)info->n_sliding_layers,
		"dense_ffn", (json_int_t)info->n_dense_layers, "moe_ffn", (json_int_t)info->n_moe_layers);

	add(o, "layers", info->n_layers);
	add(o, "hidden_size", info->hidden_size);
	add(o, "vocab_size", info->vocab_size);
	add(o, "kv_bytes_per_token", info->kv_bytes_per_token);
	add(o, "heads", info->n_heads);
	add(o, "kv_heads", info->n_kv_heads);
	add(o, "head_dim", info->head_dim);
	add(o, "sliding_window", info->sliding_window);
	add(o, "intermediate_size", info->intermediate_size);
	add(o, "experts", info->n_experts);
	add(o, "experts_per_row", info->top_k);
	add(o, "expert_size", info->expert_size);
	add(o, "shared_size", info->shared_size);
	return o;
}

static int print_json(
	const afd_model *model, const struct afd_model_info *info, const struct layout *layout)
{
	json_t *roles = json_array();
	int status = visit_shards(model, info, layout, append_entry, roles);

	if (!status)
		return tool_json_print(pack_info(info, roles));
	json_decref(roles);
	return status;
}

/* ---- the tool ---- */

static int inspect(const struct tool_stage *stage, const struct layout *layout, int json)
{
	struct afd_model_info info = { .size = sizeof info };
	afd_context *ctx = NULL;
	afd_model *model = NULL;
	int status = tool_context_create(&ctx, stage, NULL);

	if (status)
		return status;
	if (afd_model_open(&model, ctx, stage->model, NULL) || afd_model_info(model, &info))
		status = tool_fail(TOOL_FAILED, "%s", afd_last_error());
	else
		status = (json ? print_json : print_text)(model, &info, layout);
	afd_model_close(model);
	afd_context_destroy(ctx);
	return status;
}

int main(int argc, char **argv)
{
	struct tool_stage stage = { .threads = 1 };
	struct layout layout = { 1, 1, 1, AFD_GATE_ATTENTION };
	int json = 0;
	const struct tool_option options[] = {
		TOOL_OPTION_MODEL(stage),
		{ "attention-tp", "n", "1", "attention ranks to show, 1 to 1024", tool_set_u32,
			&layout.attention_tp, 1, 1024 },
		{ "ffn-tp", "n", "1", "FFN tensor-parallel ranks to show, 1 to 1024", tool_set_u32,
			&layout.ffn_tp, 1, 1024 },
		{ "ffn-ep", "n", "1", "FFN expert-parallel ranks to show, 1 to 1024", tool_set_u32,
			&layout.ffn_ep, 1, 1024 },
		{ "gate", "attention|ffn", "attention",
			"which side routes rows to experts: attention then holds the routers, too",
			tool_set_either, &layout.gate, 0, 0 },
		{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &json, 0, 0 },
		TOOL_OPTION_LOG(stage),
		{ 0 },
	};
	int status = tool_options_read(options, "--model DIR [--json]", argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	if (!stage.model)
		return tool_fail(TOOL_USAGE, "--model: required");
	return inspect(&stage, &layout, json);
}
