/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model handle: config.json becomes the architecture, the architecture says which tensors there
 * must be, the checkpoint says where they are. Opening reads config.json and the list of names and
 * nothing else; after it a model only answers questions, so that several stages share one.
 */
#include "model.h"

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
		rc = afd__slots_create(model);
	if (rc && dir)
		/* A long one must leave room for the cause. */
		afd__error_prefix(rc, "model %.300s", dir);
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
	afd__slots_free(model);
	afd__free(model);
}

int afd__model_check(const struct afd_model *model)
{
	return model ? afd__context_check(model->ctx, "model")
		     : afd__error(-EINVAL, "model: the handle is NULL");
}

/* ---- for the stages ---- */

int afd__model_check_role(const struct afd_model *model, int32_t role)
{
	if (role != AFD_ROLE_ATTENTION && role != AFD_ROLE_FFN)
		return afd__error(-EINVAL, "model: role is %d, no enum afd_role", role);
	if (role == AFD_ROLE_ATTENTION && model->arch.ffn_only)
		return afd__error(-ENOTSUP,
				  "model: the attention of model_type \"%s\" is not supported, "
				  "only its FFN",
				  model->arch.model_type);
	return 0;
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
	const char *name = afd__checkpoint_name(model->checkpoint, "model.embed_tokens.weight");
	struct afd__tensor embed;

	if (!name || afd__checkpoint_tensor(model->checkpoint, name, false, &embed))
		return model->arch.config_dtype;
	return embed.dtype;
}

/* ---- for the host ---- */

/* The first layer of a kind; NULL when there is none. */
static const struct afd__layer *first_layer(const struct afd__arch *arch, int32_t ffn_kind)
{
	uint32_t i;

	for (i = 0; i < arch->n_layers; i++) {
		if (arch->layers[i].ffn_kind == ffn_kind)
			return &arch->layers[i];
	}
	return NULL;
}

int afd_model_contract(const afd_model *model, struct afd_contract *contract)
{
	const struct afd__layer *routed;
	struct afd_contract c = { 0 };
	int rc = afd__model_check(model);

	if (rc)
		return rc;
	c.hidden_size = model->arch.hidden_size;
	c.n_layers = model->arch.n_layers;
	c.ffn_kinds = model->arch.ffn_kinds;
	c.router = AFD_ROUTER_NONE;
	routed = first_layer(&model->arch, AFD_FFN_MOE);
	if (routed) {
		c.n_experts = routed->n_experts;
		c.top_k = routed->top_k;
		c.router = routed->router.score;
		c.shared_experts = routed->shared_size != 0;
	}
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

static void describe_ffn(const struct afd__arch *arch, struct afd_model_info *info)
{
	const struct afd__layer *dense = first_layer(arch, AFD_FFN_DENSE);
	const struct afd__layer *routed = first_layer(arch, AFD_FFN_MOE);

	info->intermediate_size = dense ? dense->intermediate_size : 0;
	info->router = routed ? routed->router.score : AFD_ROUTER_NONE;
	if (!routed)
		return;
	info->n_experts = routed->n_experts;
	info->top_k = routed->top_k;
	info->expert_size = routed->expert_size;
	info->shared_size = routed->shared_size;
}

/* The head comes last; a shared one is listed once, as the embedding. */
static uint32_t n_listed(const struct afd_model *model)
{
	return model->n_listed - afd__slot_is_shared(model, &model->slots[model->n_slots - 1]);
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
	i.vocab_size = arch->vocab_size;
	i.max_position_embeddings = arch->max_position_embeddings;
	i.dtype = afd__model_dtype(model);
	i.tied_head = arch->tied_head;
	i.n_tensors = n_listed(model);
	i.ffn_only = arch->ffn_only;
	describe_ffn(arch, &i);
	count_layers(arch, &i);
	return afd__params_give(info, &i, sizeof(i), "model info");
}

/* The tensor of an entry of the list: a slot's whole one, or its scales. */
static int listed_tensor(const struct afd_model *model, const struct afd__listed *entry,
			 struct afd__tensor *out)
{
	const struct afd__slot *slot = &model->slots[entry->slot];
	int rc = afd__slot_stored(model, slot, false, out);

	if (rc || !entry->scales)
		return rc;
	return afd__checkpoint_tensor(model->checkpoint, slot->scales, false, out);
}

int afd_model_role(const afd_model *model, int32_t role, struct afd_role_info *info)
{
	struct afd_role_info sum = { 0 };
	struct afd__tensor t;
	uint32_t i, n;
	int rc = afd__model_check(model);

	if (!rc)
		rc = afd__model_check_role(model, role);
	if (rc)
		return rc;
	n = n_listed(model);
	for (i = 0; i < n; i++) {
		int32_t roles = model->slots[model->listed[i].slot].role;

		if (role == AFD_ROLE_FFN ? !(roles & role) : roles != role)
			continue;
		rc = listed_tensor(model, &model->listed[i], &t);
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
	const struct afd__slot *slot;
	struct afd__tensor t;
	int rc = afd__model_check(model);

	if (!rc && index >= n_listed(model))
		rc = afd__error(-EINVAL, "model: tensor index is %u, limit %u", index,
				n_listed(model) - 1);
	if (!rc)
		rc = listed_tensor(model, &model->listed[index], &t);
	if (rc)
		return rc;
	slot = &model->slots[model->listed[index].slot];
	i.name = t.name;
	i.file = t.file;
	i.role = slot->role == AFD__ROLE_BOTH ? AFD_ROLE_FFN : slot->role;
	i.layer = slot->layer;
	i.dtype = t.dtype;
	i.n_dims = t.n_dims;
	memcpy(i.shape, t.shape, sizeof(i.shape));
	i.bytes = t.bytes;
	return afd__params_give(info, &i, sizeof(i), "tensor info");
}
