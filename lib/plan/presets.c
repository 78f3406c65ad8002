/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices and models that the planner knows by name. Every row has its source. Rates of scale-up
 * are 0.8 of the vendor's figure for one direction, which is what the anchors of arXiv 2602.09721
 * imply; everything else is the data sheet's. Sizes of models are those of their config.json.
 */
#include <stdio.h>
#include <strings.h>

#include "plan.h"

#define SHEET     "vendor's data sheet; scale-up 0.8 of one direction, as arXiv 2602.09721 implies"
#define STEP3     "Step-3, arXiv 2507.19427, table 4; network: 8-device server, table 7"
#define MEGASCALE "MegaScale-Infer, arXiv 2504.02263, table 3 (BF16 rates, relative price)"

static const struct afd_plan_device DEVICES[] = {
	{ sizeof(DEVICES[0]), "H20", SHEET, 296e12, 4.0e12, 96e9, 360e9, 50e9, 0.80, 8, 0 },
	{ sizeof(DEVICES[0]), "H20-3e",
		"ai-dynamo/dynamo#6570 (141 GB, 4.8 TB/s); public pages confirm the H20 of 96 GB",
		296e12, 4.8e12, 141e9, 360e9, 50e9, 0, 8, 0 },
	{ sizeof(DEVICES[0]), "H800", SHEET, 1979e12, 3.35e12, 80e9, 160e9, 50e9, 2.00, 8, 0 },
	{ sizeof(DEVICES[0]), "H100", SHEET, 1979e12, 3.35e12, 80e9, 360e9, 50e9, 0, 8, 0 },
	{ sizeof(DEVICES[0]), "H200", SHEET, 1979e12, 4.8e12, 141e9, 360e9, 50e9, 0, 8, 0 },
	{ sizeof(DEVICES[0]), "B200", SHEET, 4500e12, 8e12, 180e9, 720e9, 50e9, 0, 8, 0 },
	{ sizeof(DEVICES[0]), "GB200", SHEET "; NVL72: one domain, scale-out is scale-up", 4500e12,
		8e12, 186e9, 720e9, 720e9, 0, 8, 0 },
	{ sizeof(DEVICES[0]), "A800", STEP3, 312e12, 2.0e12, 80e9, 160e9, 25e9, 0.75, 8, 0 },
	{ sizeof(DEVICES[0]), "Ascend-910B", STEP3, 280e12, 1.6e12, 64e9, 157e9, 25e9, 0.67, 8, 0 },
	{ sizeof(DEVICES[0]), "L40S", MEGASCALE, 362e12, 864e9, 48e9, 25.6e9, 25e9, 1.08, 8, 0 },
	{ sizeof(DEVICES[0]), "Groq-3-LPU",
		"NVIDIA developer blog on LPX, March 2026: SRAM, 256 in a rack; for the FFN of "
		"decode",
		1200e12, 150e12, 500e6, 2.5e12, 2.5e12, 0, 256, 0 },
};

#define CONFIG "config.json on Hugging Face"
#define TABLE2 CONFIG "; FFN operations agree with Step-3, arXiv 2507.19427, table 2"

/* Projections, K and V and scores of grouped-query attention, over all layers. */
#define GQA(hidden, layers, heads, kv_heads, dim) \
	.hidden_size = hidden, .n_layers = layers, \
	.attention_params = 1.0 * (layers) * (hidden) * (dim) * (2 * (heads) + 2 * (kv_heads)), \
	.kv_numbers_per_token = 2.0 * (layers) * (kv_heads) * (dim), \
	.attention_flops_per_position = 4.0 * (layers) * (heads) * (dim)
/* Multi-head latent attention, absorbed: one latent of 512 + 64 for all heads. */
#define MLA(hidden, layers, heads, params_of_layer) \
	.hidden_size = hidden, .n_layers = layers, \
	.attention_params = 1.0 * (layers) * (params_of_layer), \
	.kv_numbers_per_token = 576.0 * (layers), \
	.attention_flops_per_position = 2.0 * (layers) * (heads) * (576 + 512)
#define MOE(dense, width, experts, k, shared, moe_layers) \
	.intermediate_size = dense, .expert_size = width, .n_experts = experts, .top_k = k, \
	.shared_size = shared, .n_moe_layers = moe_layers

static const struct afd_plan_model MODELS[] = {
	{ .size = sizeof(MODELS[0]),
		.name = "DeepSeek-V3",
		.source = TABLE2,
		MLA(7168, 61, 128, 187105280),
		MOE(18432, 2048, 256, 8, 2048, 58),
		.vocab_size = 129280 },
	{ .size = sizeof(MODELS[0]),
		.name = "Kimi-K2",
		.source = TABLE2,
		MLA(7168, 61, 64, 101122048),
		MOE(18432, 2048, 384, 8, 2048, 60),
		.vocab_size = 163840 },
	{ .size = sizeof(MODELS[0]),
		.name = "Qwen3-235B-A22B",
		.source = TABLE2,
		GQA(4096, 94, 64, 4, 128),
		MOE(0, 1536, 128, 8, 0, 94),
		.vocab_size = 151936 },
	{ .size = sizeof(MODELS[0]),
		.name = "Qwen3-Coder-480B-A35B",
		.source = CONFIG,
		GQA(6144, 62, 96, 8, 128),
		MOE(0, 2560, 160, 8, 0, 62),
		.vocab_size = 151936 },
	{ .size = sizeof(MODELS[0]),
		.name = "Qwen3-30B-A3B",
		.source = CONFIG,
		GQA(2048, 48, 32, 4, 128),
		MOE(0, 768, 128, 8, 0, 48),
		.vocab_size = 151936 },
	{ .size = sizeof(MODELS[0]),
		.name = "ERNIE-4.5-300B-A47B",
		.source = TABLE2,
		GQA(8192, 54, 64, 8, 128),
		MOE(28672, 3584, 64, 8, 0, 51),
		.vocab_size = 103424 },
	{ .size = sizeof(MODELS[0]),
		.name = "GLM-4.5",
		.source = CONFIG,
		GQA(5120, 92, 96, 8, 128),
		MOE(12288, 1536, 160, 8, 1536, 89),
		.vocab_size = 151552 },
	{ .size = sizeof(MODELS[0]),
		.name = "Step-3",
		.source = "Step-3, arXiv 2507.19427: multi-matrix factorised attention, one K and "
			  "V of 256",
		.hidden_size = 7168,
		.n_layers = 61,
		.attention_params = 1.035e10,
		.kv_numbers_per_token = 512.0 * 61,
		.attention_flops_per_position = 4.0 * 61 * 64 * 256,
		MOE(18432, 5120, 48, 3, 5120, 56),
		.vocab_size = 128815 },
	{ .size = sizeof(MODELS[0]),
		.name = "Qwen3-32B",
		.source = CONFIG,
		GQA(5120, 64, 64, 8, 128),
		.intermediate_size = 25600,
		.vocab_size = 151936 },
	{ .size = sizeof(MODELS[0]),
		.name = "Qwen3-8B",
		.source = CONFIG,
		GQA(4096, 36, 32, 8, 128),
		.intermediate_size = 12288,
		.vocab_size = 151936 },
	{ .size = sizeof(MODELS[0]),
		.name = "Qwen3-0.6B",
		.source = CONFIG,
		GQA(1024, 28, 16, 8, 128),
		.intermediate_size = 3072,
		.vocab_size = 151936,
		.tied_head = 1 },
};

enum {
	N_DEVICES = sizeof(DEVICES) / sizeof(DEVICES[0]),
	N_MODELS = sizeof(MODELS) / sizeof(MODELS[0]),
};

static const char *name_at(bool device, uint32_t i)
{
	return device ? DEVICES[i].name : MODELS[i].name;
}

/* The index of a name, or -ENOENT with all names in the text. */
static int find(bool device, const char *name)
{
	uint32_t n = device ? N_DEVICES : N_MODELS, used = 0;
	char names[400] = "";

	for (uint32_t i = 0; i < n; i++) {
		if (name && !strcasecmp(name, name_at(device, i)))
			return (int)i;
		used += (uint32_t)snprintf(names + used, sizeof(names) - used, "%s%s",
			i ? ", " : "", name_at(device, i));
	}
	return afd__error(-ENOENT, "plan: %s '%.60s' is not built in, limit %s",
		device ? "device" : "model", name ? name : "(null)", names);
}

int afd_plan_device_at(uint32_t index, struct afd_plan_device *out)
{
	if (index >= N_DEVICES)
		return afd__error(-ENOENT, "plan: device %u, limit 0 .. %d", index, N_DEVICES - 1);
	return afd__params_give(out, &DEVICES[index], sizeof(DEVICES[index]), "plan device");
}

int afd_plan_model_at(uint32_t index, struct afd_plan_model *out)
{
	if (index >= N_MODELS)
		return afd__error(-ENOENT, "plan: model %u, limit 0 .. %d", index, N_MODELS - 1);
	return afd__params_give(out, &MODELS[index], sizeof(MODELS[index]), "plan model");
}

int afd_plan_find_device(const char *name, struct afd_plan_device *out)
{
	int index = find(true, name);

	return index < 0 ? index : afd_plan_device_at((uint32_t)index, out);
}

int afd_plan_find_model(const char *name, struct afd_plan_model *out)
{
	int index = find(false, name);

	return index < 0 ? index : afd_plan_model_at((uint32_t)index, out);
}
