/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-inspect: what is in a checkpoint, and what each role of it weighs. Reads config.json and the
 * headers of the tensor files only; no weight is touched.
 */
#include <inttypes.h>
#include <stdio.h>

#include <afd/afd.h>

#include "tool/json.h"
#include "tool/stage.h"

static const struct {
	int32_t role;
	const char *name;
} roles[] = {
	{ AFD_ROLE_ATTENTION, "attention" },
	{ AFD_ROLE_FFN, "ffn" },
};
#define N_ROLES 2

static void print_text(const struct afd_model_info *info, const struct afd_role_info *role)
{
	printf("architecture        %s\n", info->architecture);
	printf("layers              %" PRIu32 ": attention %" PRIu32 " full, %" PRIu32 " sliding",
		info->n_layers, info->n_full_layers, info->n_sliding_layers);
	if (info->n_sliding_layers)
		printf(" (window %" PRIu32 ")", info->sliding_window);
	printf("; ffn %" PRIu32 " dense, %" PRIu32 " moe\n", info->n_dense_layers,
		info->n_moe_layers);
	printf("hidden size         %" PRIu32 "\n", info->hidden_size);
	printf("heads               %" PRIu32 " query, %" PRIu32 " key-value, of %" PRIu32 "\n",
		info->n_heads, info->n_kv_heads, info->head_dim);
	printf("intermediate size   %" PRIu32 "\n", info->intermediate_size);
	printf("vocabulary          %" PRIu32 ", head %s\n", info->vocab_size,
		info->tied_head ? "tied" : "of its own");
	printf("dtype               %s\n", afd_dtype_name(info->dtype));
	printf("kv bytes per token  %" PRIu64 "\n\n", info->kv_bytes_per_token);
	printf("%-10s %-6s %8s %16s\n", "role", "shard", "tensors", "bytes");
	for (int i = 0; i < N_ROLES; i++)
		printf("%-10s %-6s %8" PRIu64 " %16" PRIu64 "\n", roles[i].name, "0/1",
			role[i].n_tensors, role[i].bytes);
}

static int print_json(const struct afd_model_info *info, const struct afd_role_info *role)
{
	json_t *list = json_array();

	for (int i = 0; i < N_ROLES; i++)
		json_array_append_new(
			list, json_pack("{s:s, s:s, s:I, s:I}", "role", roles[i].name, "shard",
				      "0/1", "tensors", (json_int_t)role[i].n_tensors, "bytes",
				      (json_int_t)role[i].bytes));
	return tool_json_print(json_pack("{s:s, s:I, s:I, s:I, s:s, s:I, s:o, s:I, s:I, s:I, s:I, "
					 "s:b, s:{s:I, s:I, s:I, s:I}, s:I}",
		"architecture", info->architecture, "layers", (json_int_t)info->n_layers,
		"hidden_size", (json_int_t)info->hidden_size, "vocab_size",
		(json_int_t)info->vocab_size, "dtype", afd_dtype_name(info->dtype),
		"kv_bytes_per_token", (json_int_t)info->kv_bytes_per_token, "roles", list, "heads",
		(json_int_t)info->n_heads, "kv_heads", (json_int_t)info->n_kv_heads, "head_dim",
		(json_int_t)info->head_dim, "intermediate_size",
		(json_int_t)info->intermediate_size, "tied_head", info->tied_head, "layer_kinds",
		"full_attention", (json_int_t)info->n_full_layers, "sliding_attention",
		(json_int_t)info->n_sliding_layers, "dense_ffn", (json_int_t)info->n_dense_layers,
		"moe_ffn", (json_int_t)info->n_moe_layers, "sliding_window",
		(json_int_t)info->sliding_window));
}

static int inspect(const struct tool_stage *stage, int json)
{
	struct afd_model_info info = { .size = sizeof info };
	struct afd_role_info role[N_ROLES] = { { .size = sizeof role[0] },
		{ .size = sizeof role[0] } };
	afd_context *ctx = NULL;
	afd_model *model = NULL;
	int status = tool_context_create(&ctx, stage, NULL);

	if (status)
		return status;
	if (afd_model_open(&model, ctx, stage->model, NULL) || afd_model_info(model, &info))
		status = TOOL_FAILED;
	for (int i = 0; i < N_ROLES && !status; i++)
		status = afd_model_role(model, roles[i].role, &role[i]) ? TOOL_FAILED : TOOL_DONE;
	if (status)
		tool_fail(status, "%s", afd_last_error());
	else if (json)
		status = print_json(&info, role);
	else
		print_text(&info, role);
	afd_model_close(model);
	afd_context_destroy(ctx);
	return status;
}

int main(int argc, char **argv)
{
	struct tool_stage stage = { .threads = 1 };
	int json = 0;
	const struct tool_option options[] = {
		TOOL_OPTION_MODEL(stage),
		{ "attention-tp", "n", "1",
			"attention ranks to show; other values are not in this version",
			tool_set_one, NULL, 0, 0 },
		{ "ffn-tp", "n", "1",
			"FFN tensor-parallel shards to show; other values are not in this version",
			tool_set_one, NULL, 0, 0 },
		{ "ffn-ep", "n", "1",
			"FFN expert-parallel shards to show; other values are not in this version",
			tool_set_one, NULL, 0, 0 },
		{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &json, 0, 0 },
		TOOL_OPTION_LOG(stage),
		{ 0 },
	};
	int status = tool_options_read(options, "--model DIR [--json]", argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	if (!stage.model)
		return tool_fail(TOOL_USAGE, "--model: required");
	return inspect(&stage, json);
}
