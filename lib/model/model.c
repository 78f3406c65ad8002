/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model handle: config.json becomes the architecture, the architecture says which tensors there
 * must be, the checkpoint says where they are. Opening reads config.json and the list of names and
 * nothing else; after it a model only answers questions, so that several stages share one.
 */
#include "model.h"

#include <assert.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "checkpoint.h"
#include "file.h"

enum { CONFIG_MAX_BYTES = 16 << 20 };

/* ---- life ---- */

static int check_params(const char *dir, const struct afd_model_params *params)
{
	if (params->weights < 0 || params->weights > AFD_WEIGHTS_IN_PLACE)
		return afd__error(-EINVAL, "model params: weights is %d, limit %d", params->weights,
				  AFD_WEIGHTS_IN_PLACE);
	if (!dir != !!params->config_json)
		return afd__error(-EINVAL,
				  "model: %s of a directory and config_json are given, must be one",
				  dir ? "both" : "none");
	if (dir && (params->tensors || params->n_tensors))
		return afd__error(-EINVAL,
				  "model: a directory and %u tensors are given, must be one",
				  params->n_tensors);
	return 0;
}

static int open_dir(struct afd_model *model, const char *dir)
{
	size_t n_bytes;
	char *text;
	int fd, rc;

	rc = afd__dir_open(&fd, dir);
	if (rc)
		return rc;
	rc = afd__file_read(&text, &n_bytes, model->ctx, fd, "config.json", CONFIG_MAX_BYTES);
	if (rc) {
		close(fd);
		return rc;
	}
	rc = afd__arch_read(&model->arch, model->ctx, text, n_bytes);
	afd__free(text);
	if (rc) {
		close(fd);
		return rc;
	}
	return afd__checkpoint_open(&model->checkpoint, model->ctx, fd, dir);
}

static int open_lent(struct afd_model *model, const struct afd_model_params *params)
{
	int rc = afd__arch_read(&model->arch, model->ctx, params->config_json,
				strlen(params->config_json));

	return rc ? rc : afd__checkpoint_lend(&model->checkpoint, model->ctx, params);
}

int afd_model_open(afd_model **out, afd_context *ctx, const char *dir,
		   const struct afd_model_params *params)
{
	struct afd_model_params p;
	struct afd_model *model;
	int rc = afd__context_check(ctx, "context");

	if (!rc)
		rc = afd__params_copy(&p, sizeof(p), params, "model params");
	if (!rc && !out)
		rc = afd__error(-EINVAL, "model: out is NULL");
	if (!rc)
		rc = check_params(dir, &p);
	if (rc)
		return rc;
	model = afd__alloc(ctx, 1, sizeof(*model));
	if (!model)
		return -ENOMEM;
	model->ctx = ctx;
	model->weights = p.weights ? p.weights : AFD_WEIGHTS_PACKED;
	rc = dir ? open_dir(model, dir) : open_lent(model, &p);
	if (!rc)
		rc = afd__slots_create(&model->slots, &model->n_slots, ctx, &model->arch);
	if (rc && dir)
		afd__error_prefix(rc, "model %s", dir);
	if (rc)
		goto fail;
	afd__log(ctx, AFD_LOG_INFO, "model opened: architecture=%s layers=%u from=%s",
		 model->arch.name, model->arch.n_layers, dir ? dir : "host");
	*out = model;
	return 0;
fail:
	afd_model_close(model);
	return rc;
}

void afd_model_close(afd_model *model)
{
	if (!model)
		return;
	afd__checkpoint_close(model->checkpoint);
	afd__arch_free(&model->arch);
	afd__free(model->slots);
	afd__free(model);
}

int afd__model_check(const struct afd_model *model)
{
	return model ? afd__context_check(model->ctx, "model")
		     : afd__error(-EINVAL, "model: the handle is NULL");
}

/* ---- for the stages ---- */

int afd__model_tensor(const struct afd_model *model, int32_t layer, int32_t kind,
		      struct afd__tensor *out)
{
	const struct afd__slot *slot = afd__slot_find(model, layer, kind);

	assert(slot);
	return afd__slot_tensor(model, slot, true, out);
}

void afd__model_release(const struct afd__tensor *tensor)
{
	uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
	uintptr_t first = ((uintptr_t)tensor->data + page - 1) / page * page;
	uintptr_t end = ((uintptr_t)tensor->data + tensor->bytes) / page * page;

	/* Only mapped files: the pages of the host's memory, and of copies at aligned places, would
	 * be lost. */
	if (tensor->mapped && end > first)
		madvise((void *)first, end - first, MADV_DONTNEED);
}

int32_t afd__model_dtype(const struct afd_model *model)
{
	struct afd__tensor embed;

	if (afd__slot_tensor(model, &model->slots[0], false, &embed))
		return model->arch.config_dtype;
	return embed.dtype;
}

/* ---- for the host ---- */

int afd_model_contract(const afd_model *model, struct afd_contract *contract)
{
	struct afd_contract c = { 0 };
	int rc = afd__model_check(model);

	if (rc)
		return rc;
	c.hidden_size = model->arch.hidden_size;
	c.n_layers = model->arch.n_layers;
	c.ffn_kinds = model->arch.ffn_kinds;
	c.router = AFD_ROUTER_NONE;
	c.activation = AFD_ACTIVATION_SILU;
	c.dtype = afd__model_dtype(model);
	return afd__params_give(contract, &c, sizeof(c), "contract");
}

static void count_layers(const struct afd__arch *arch, struct afd_model_info *info)
{
	size_t number_bytes = info->dtype ? afd_dtype_bytes(info->dtype) : 2;
	uint32_t i;

	for (i = 0; i < arch->n_layers; i++) {
		const struct afd__layer *l = &arch->layers[i];

		if (l->attention == AFD__ATTENTION_SLIDING) {
			info->n_sliding_layers++;
			info->sliding_window = l->window;
		} else {
			info->n_full_layers++;
		}
		if (l->ffn_kind == AFD_FFN_DENSE)
			info->n_dense_layers++;
		else
			info->n_moe_layers++;
		info->kv_bytes_per_token += 2 * (uint64_t)l->n_kv_heads * l->head_dim *
					    number_bytes;
	}
}

/* The head comes last; a shared one is listed once, as the embedding. */
static uint32_t n_listed(const struct afd_model *model)
{
	return model->n_slots - afd__slot_is_shared(model, &model->slots[model->n_slots - 1]);
}

int afd_model_info(const afd_model *model, struct afd_model_info *info)
{
	struct afd_model_info i = { 0 };
	const struct afd__arch *arch;
	int rc = afd__model_check(model);

	if (rc)
		return rc;
	arch = &model->arch;
	i.architecture = arch->name;
	i.n_layers = arch->n_layers;
	i.hidden_size = arch->hidden_size;
	i.n_heads = arch->layers[0].n_heads;
	i.n_kv_heads = arch->layers[0].n_kv_heads;
	i.head_dim = arch->layers[0].head_dim;
	i.intermediate_size = arch->layers[0].intermediate_size;
	i.vocab_size = arch->vocab_size;
	i.max_position_embeddings = arch->max_position_embeddings;
	i.dtype = afd__model_dtype(model);
	i.tied_head = arch->tied_head;
	i.n_tensors = n_listed(model);
	count_layers(arch, &i);
	return afd__params_give(info, &i, sizeof(i), "model info");
}

int afd_model_role(const afd_model *model, int32_t role, struct afd_role_info *info)
{
	struct afd_role_info sum = { 0 };
	struct afd__tensor t;
	uint32_t i;
	int rc = afd__model_check(model);

	if (rc)
		return rc;
	if (role != AFD_ROLE_ATTENTION && role != AFD_ROLE_FFN)
		return afd__error(-EINVAL, "model: role is %d, no enum afd_role", role);
	for (i = 0; i < model->n_slots; i++) {
		if (model->slots[i].role != role || afd__slot_is_shared(model, &model->slots[i]))
			continue;
		rc = afd__slot_tensor(model, &model->slots[i], false, &t);
		if (rc)
			return rc;
		sum.n_tensors++;
		sum.bytes += t.bytes;
	}
	return afd__params_give(info, &sum, sizeof(sum), "role info");
}

int afd_model_tensor(const afd_model *model, uint32_t index, struct afd_tensor_info *info)
{
	struct afd_tensor_info i = { 0 };
	struct afd__tensor t;
	int rc = afd__model_check(model);

	if (!rc && index >= n_listed(model))
		rc = afd__error(-EINVAL, "model: tensor index is %u, limit %u", index,
				n_listed(model) - 1);
	if (!rc)
		rc = afd__slot_tensor(model, &model->slots[index], false, &t);
	if (rc)
		return rc;
	i.name = t.name;
	i.file = t.file;
	i.role = model->slots[index].role;
	i.layer = model->slots[index].layer;
	i.dtype = t.dtype;
	i.n_dims = t.n_dims;
	memcpy(i.shape, t.shape, sizeof(i.shape));
	i.bytes = t.bytes;
	return afd__params_give(info, &i, sizeof(i), "tensor info");
}
