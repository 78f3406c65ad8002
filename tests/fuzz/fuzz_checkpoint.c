/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as the tensor file of a small model of fused and of e4m3 experts: every tensor that a role needs is refused with a
 * text, or it and its scales lie inside the file and are as large as the model says, and what a shard holds adds up. Built for
 * libFuzzer, or with replay.c.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../lib/model/checkpoint_state.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static const char config[] = "{\"model_type\":\"qwen3_moe\",\"hidden_size\":3,\"num_hidden_layers\":1,\"vocab_size\":2,"
	"\"num_attention_heads\":1,\"head_dim\":2,\"num_experts\":2,\"num_experts_per_tok\":1,\"moe_intermediate_size\":3}";

static char dir[] = "/tmp/afd-fuzz-XXXXXX";
static afd_context *ctx;

static void write_file(const char *name, const void *bytes, size_t n_bytes)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || write(fd, bytes, n_bytes) != (ssize_t)n_bytes)
		abort();
	close(fd);
}

static void clean_up(void)
{
	char path[64];

	snprintf(path, sizeof(path), "%s/config.json", dir);
	unlink(path);
	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	unlink(path);
	rmdir(dir);
	afd_context_destroy(ctx);
}

static void set_up(void)
{
	if (ctx)
		return;
	if (!mkdtemp(dir) || afd_context_create(&ctx, NULL))
		abort();
	write_file("config.json", config, sizeof(config) - 1);
	atexit(clean_up);
}

static void check_inside(const struct afd_model *model, const void *data, uint64_t bytes)
{
	const struct afd__checkpoint *cp = model->checkpoint;
	uintptr_t at = (uintptr_t)data, first = (uintptr_t)cp->files[0].mapped;
	uint32_t i;

	if (at >= first && at - first <= cp->files[0].bytes && bytes <= cp->files[0].bytes - (at - first))
		return;
	for (i = 0; i < cp->n_stored; i++) {
		first = (uintptr_t)cp->stored[i].aligned;
		if (first && at >= first && at - first <= cp->stored[i].bytes && bytes <= cp->stored[i].bytes - (at - first))
			return;
	}
	abort();
}

static uint64_t numbers(const struct afd__slot *slot)
{
	return slot->shape[0] * (slot->n_dims > 1 ? slot->shape[1] : 1);
}

/* The bytes of the slot, 0 when it is refused. */
static uint64_t check_slot(const struct afd_model *model, const struct afd__slot *slot)
{
	struct afd__tensor t;

	if (afd__slot_tensor(model, slot, true, &t)) {
		if (!afd_last_error()[0])
			abort();
		return 0;
	}
	if (t.bytes != numbers(slot) * afd_dtype_bytes(t.dtype))
		abort();
	check_inside(model, t.data, t.bytes);
	if ((t.dtype == AFD_DTYPE_FP8) != (t.scales.rows != 0))
		abort();
	if (t.scales.rows)
		check_inside(model, t.scales.data, t.scales.bytes);
	return t.bytes + t.scales.bytes;
}

static void check_role(const struct afd_model *model, int32_t role)
{
	struct afd_shard_params p = { .size = sizeof(p), .role = role };
	struct afd_role_info info = { .size = sizeof(info) };
	uint64_t bytes = 0, one;
	uint32_t i;

	for (i = 0; i < model->n_slots; i++) {
		one = check_slot(model, &model->slots[i]);
		if (model->slots[i].role & role) {
			bytes += one;
			if (!one && !afd_model_shard(model, &p, &info))
				abort();
		}
	}
	if (!afd_model_shard(model, &p, &info) && info.bytes != bytes)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	afd_model *model = NULL;

	set_up();
	write_file("model.safetensors", data, n_bytes);
	if (afd_model_open(&model, ctx, dir, NULL)) {
		if (model || !afd_last_error()[0])
			abort();
		return 0;
	}
	check_role(model, AFD_ROLE_ATTENTION);
	check_role(model, AFD_ROLE_FFN);
	afd_model_close(model);
	return 0;
}
