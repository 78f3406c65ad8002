/* SPDX-License-Identifier: Apache-2.0 */
/* The planner's model out of a preset or a config.json; see hardware.h. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "../tool/stage.h"
#include "hardware.h"
#include "plan.h"

/* A checkpoint in FP8 says so in quantization_config, else dtype holds. */
static void read_precision(const char *text, size_t n_bytes, const struct afd_model_info *info,
	struct plan_precision *precision)
{
	json_error_t error;
	json_t *root = json_loadb(text, n_bytes, 0, &error);
	double plain = info->dtype ? (double)afd_dtype_bytes(info->dtype) : 2;

	precision->kv_bytes = plain;
	precision->weight_bytes =
		json_is_object(json_object_get(root, "quantization_config")) ? 1 : plain;
	json_decref(root);
}

static void fill(struct afd_plan_model *m, const struct afd_model_info *i)
{
	double heads = i->n_heads, kv = i->n_kv_heads, dim = i->head_dim;

	m->name = i->architecture;
	m->source = "config.json";
	m->hidden_size = i->hidden_size;
	m->n_layers = i->n_layers;
	m->n_moe_layers = i->n_moe_layers;
	m->intermediate_size = i->intermediate_size;
	m->expert_size = i->expert_size;
	m->shared_size = i->shared_size;
	m->n_experts = i->n_experts;
	m->top_k = i->top_k;
	m->vocab_size = i->vocab_size;
	m->tied_head = (uint32_t)i->tied_head;
	m->attention_params = (double)i->n_layers * i->hidden_size * dim * (2 * heads + 2 * kv);
	m->kv_numbers_per_token = 2.0 * i->n_full_layers * kv * dim;
	m->attention_flops_per_position = 4.0 * i->n_full_layers * heads * dim;
	m->sliding_kv_numbers = 2.0 * i->n_sliding_layers * kv * dim;
	m->sliding_flops = 4.0 * i->n_sliding_layers * heads * dim;
	m->sliding_window = i->sliding_window;
}

static int open_text(const char *path, const char *text, size_t n_bytes, struct afd_plan_model *out,
	struct plan_precision *precision)
{
	/* A model is opened from a text only with tensors beside it; no role is asked for here, so
	 * that one of no meaning will do. */
	static const float nothing[1];
	static const uint64_t one = 1;
	static const struct afd_tensor tensor = { .name = "planner",
		.shape = &one,
		.data = nothing,
		.n_dims = 1,
		.dtype = AFD_DTYPE_F32 };
	struct afd_model_params params = { .size = sizeof params,
		.config_json = text,
		.tensors = &tensor,
		.n_tensors = 1,
		.tensor_bytes = sizeof tensor };
	struct afd_model_info info = { .size = sizeof info };
	static char name[64];
	afd_context *ctx = NULL;
	afd_model *model = NULL;
	int rc = afd_context_create(&ctx, NULL);

	rc = rc ? rc : afd_model_open(&model, ctx, NULL, &params);
	rc = rc ? rc : afd_model_info(model, &info);
	if (!rc) {
		fill(out, &info);
		snprintf(name, sizeof name, "%s", info.architecture);
		out->name = name;
		if (precision)
			read_precision(text, n_bytes, &info, precision);
	}
	if (rc)
		tool_fail(TOOL_FAILED, "%s: %s", path, afd_last_error());
	afd_model_close(model);
	afd_context_destroy(ctx);
	return rc ? TOOL_FAILED : TOOL_DONE;
}

int plan_find_model(const char *name, struct afd_plan_model *out, struct plan_precision *precision)
{
	struct stat entry;
	size_t n_bytes = 0;
	char *path = NULL, *text;
	int status;

	if (stat(name, &entry) || !S_ISDIR(entry.st_mode))
		return afd_plan_find_model(name, out) ? plan_fail() : TOOL_DONE;
	if (asprintf(&path, "%s/config.json", name) < 0)
		return tool_fail(TOOL_FAILED, "--model: no memory");
	text = tool_file_read(path, &n_bytes);
	status = text ? open_text(path, text, n_bytes, out, precision) : TOOL_FAILED;
	free(text);
	free(path);
	return status;
}
