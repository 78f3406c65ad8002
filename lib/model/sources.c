/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the tensors of a checkpoint come from: one safetensors file, an index and the files that it
 * names, or the host's memory. Each makes the sorted list of names; for the index nothing but the
 * index is read, so files that it names may be missing until one of their tensors is asked for.
 * Called by model.c.
 */
#include "checkpoint_state.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "file.h"
#include "json.h"

#define ONE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"

enum { MAX_FILES = 1024, MAX_LENT = 1 << 24, INDEX_MAX_BYTES = 64 << 20 };

/* ---- the one file ---- */

static int open_one(struct afd__checkpoint *cp)
{
	struct afd__safetensors header = { 0 };
	struct afd__file file = { .name = ONE_FILE, .fd = -1 };
	uint32_t i;
	int rc;

	rc = afd__checkpoint_read_header(cp, &file, &header);
	if (rc)
		return rc;
	rc = afd__checkpoint_alloc(cp, header.n_tensors, 1, 1);
	if (rc)
		goto fail;
	cp->n_files = 1;
	cp->files[0] = file;
	cp->n_stored = header.n_tensors;
	for (i = 0; i < header.n_tensors; i++) {
		cp->stored[i].name = header.tensors[i].name;
		cp->stored[i].file = &cp->files[0];
	}
	afd__checkpoint_sort(cp);
	rc = afd__checkpoint_apply_header(cp, &cp->files[0], &header);
	/* The names outlive the header. */
	afd__free(cp->names);
	cp->names = header.names;
	header.names = NULL;
	afd__safetensors_free(&header);
	return rc;
fail:
	close(file.fd);
	afd__safetensors_free(&header);
	return rc;
}

/* ---- the index ---- */

/* A checkpoint must not reach out of its directory. */
static bool is_plain_name(const char *name)
{
	return name[0] && strcmp(name, ".") && strcmp(name, "..") && !strchr(name, '/') &&
	       strlen(name) <= 255;
}

static int check_entry(const char *tensor, const json_t *file)
{
	if (!json_is_string(file))
		return afd__error(-EBADMSG, INDEX_FILE ": the file of tensor %.200s must be a "
				  "string", tensor);
	if (!is_plain_name(json_string_value(file)))
		return afd__error(-EBADMSG,
				  INDEX_FILE ": tensor %.200s: \"%.100s\" is not the name "
					     "of a file in the directory",
				  tensor, json_string_value(file));
	return 0;
}

static int measure_index(const json_t *map, size_t *name_bytes)
{
	const char *tensor;
	json_t *file;
	int rc = 0;

	*name_bytes = 1;
	json_object_foreach((json_t *)map, tensor, file) {
		rc = check_entry(tensor, file);
		if (rc)
			return rc;
		*name_bytes += strlen(tensor) + 1 + strlen(json_string_value(file)) + 1;
	}
	return 0;
}

static char *push_name(char **end, const char *name)
{
	char *start = *end;

	*end = stpcpy(start, name) + 1;
	return start;
}

/* NULL beyond MAX_FILES. Neighbours mostly share a file, so the search from the end is short. */
static struct afd__file *intern_file(struct afd__checkpoint *cp, char **end, const char *name)
{
	uint32_t i;

	for (i = cp->n_files; i > 0; i--) {
		if (!strcmp(cp->files[i - 1].name, name))
			return &cp->files[i - 1];
	}
	if (cp->n_files == MAX_FILES)
		return NULL;
	cp->files[cp->n_files] = (struct afd__file){ .name = push_name(end, name), .fd = -1 };
	return &cp->files[cp->n_files++];
}

static int read_map(struct afd__checkpoint *cp, const json_t *map)
{
	const char *tensor;
	size_t name_bytes;
	json_t *file;
	char *end;
	int rc;

	rc = measure_index(map, &name_bytes);
	if (!rc)
		rc = afd__checkpoint_alloc(cp, json_object_size(map), MAX_FILES, name_bytes);
	if (rc)
		return rc;
	end = cp->names;
	json_object_foreach((json_t *)map, tensor, file) {
		struct afd__stored *s = &cp->stored[cp->n_stored++];

		s->name = push_name(&end, tensor);
		s->file = intern_file(cp, &end, json_string_value(file));
		if (!s->file)
			return afd__error(-EBADMSG, INDEX_FILE ": more than %d files", MAX_FILES);
	}
	afd__checkpoint_sort(cp);
	return 0;
}

static int open_index(struct afd__checkpoint *cp)
{
	struct afd__json j = { .where = INDEX_FILE };
	const json_t *map;
	size_t n_bytes;
	json_t *root;
	char *text;
	int rc;

	rc = afd__file_read(&text, &n_bytes, cp->ctx, cp->dir_fd, INDEX_FILE, INDEX_MAX_BYTES);
	if (rc)
		return rc;
	root = afd__json_parse(text, n_bytes, INDEX_FILE, &rc);
	afd__free(text);
	if (!root)
		return rc;
	j.object = root;
	map = afd__json_object(&j, "weight_map");
	if (!map)
		afd__json_refuse(&j, -EBADMSG, "weight_map", NULL, "");
	rc = j.error ? j.error : read_map(cp, map);
	json_decref(root);
	return rc;
}

int afd__checkpoint_open(struct afd__checkpoint **out, struct afd_context *ctx, int dir_fd,
			 const char *dir)
{
	struct afd__checkpoint *cp = NULL;
	int rc;

	rc = afd__checkpoint_create(&cp, ctx, dir_fd, dir);
	if (rc)
		goto fail;
	/* Where both exist, the one file is the checkpoint, as for other readers of the format. */
	rc = open_one(cp);
	if (rc == -ENOENT)
		rc = open_index(cp);
	if (rc == -ENOENT)
		afd__error(rc, "%s: neither " ONE_FILE " nor " INDEX_FILE " is in it", dir);
	if (rc)
		goto fail;
	*out = cp;
	return 0;
fail:
	afd__checkpoint_close(cp);
	return rc;
}

/* ---- lent ---- */

static int check_lent(const struct afd_tensor *t, uint32_t index, uint64_t *bytes)
{
	uint32_t i;

	if (!t->name || !t->name[0])
		return afd__error(-EINVAL, "tensors[%u]: it has no name", index);
	*bytes = afd_dtype_bytes(t->dtype);
	if (!*bytes)
		return afd__error(-EINVAL, "tensor %.200s: dtype is %d, no enum afd_dtype", t->name,
				  t->dtype);
	if (!t->n_dims || t->n_dims > 4 || !t->shape)
		return afd__error(-EINVAL, "tensor %.200s: n_dims is %u, limit 1 .. 4 with a shape",
				  t->name, t->n_dims);
	for (i = 0; i < t->n_dims; i++) {
		if (__builtin_mul_overflow(*bytes, t->shape[i], bytes))
			return afd__error(-EINVAL,
					  "tensor %.200s: the product of its shape overflows",
					  t->name);
	}
	if (!t->data || (uintptr_t)t->data % AFD__TENSOR_ALIGNMENT)
		return afd__error(-EINVAL, "tensor %.200s: data is %p, must be aligned to %d bytes",
				  t->name, t->data, AFD__TENSOR_ALIGNMENT);
	return 0;
}

static const struct afd_tensor *entry(const struct afd_model_params *params, uint32_t i)
{
	return (const struct afd_tensor *)((const char *)params->tensors +
					   i * params->tensor_bytes);
}

static int check_stride(const struct afd_model_params *params)
{
	const unsigned char *tail;
	uint32_t i;
	size_t b;

	if (!params->n_tensors || !params->tensors || params->n_tensors > MAX_LENT)
		return afd__error(-EINVAL, "model params: %u tensors, limit 1 .. %d",
				  params->n_tensors, MAX_LENT);
	if (params->tensor_bytes < sizeof(struct afd_tensor) || params->tensor_bytes > 4096)
		return afd__error(-EINVAL, "model params: tensor_bytes is %zu, must be "
				  "sizeof(struct afd_tensor)", params->tensor_bytes);
	for (i = 0; i < params->n_tensors; i++) {
		tail = (const unsigned char *)entry(params, i);
		for (b = sizeof(struct afd_tensor); b < params->tensor_bytes; b++) {
			if (tail[b])
				return afd__error(-E2BIG,
						  "tensors[%u]: byte %zu is set, this "
						  "version knows %zu",
						  i, b, sizeof(struct afd_tensor));
		}
	}
	return 0;
}

static int lend_all(struct afd__checkpoint *cp, const struct afd_model_params *params)
{
	size_t name_bytes = 1;
	uint64_t bytes = 0;
	char *end;
	uint32_t i;
	int rc;

	for (i = 0; i < params->n_tensors; i++) {
		rc = check_lent(entry(params, i), i, &bytes);
		if (rc)
			return rc;
		name_bytes += strlen(entry(params, i)->name) + 1;
	}
	rc = afd__checkpoint_alloc(cp, params->n_tensors, 0, name_bytes);
	if (rc)
		return rc;
	end = cp->names;
	for (i = 0; i < params->n_tensors; i++) {
		const struct afd_tensor *t = entry(params, i);
		struct afd__stored *s = &cp->stored[i];

		check_lent(t, i, &s->bytes);
		s->name = push_name(&end, t->name);
		s->known = true;
		s->dtype = t->dtype;
		s->n_dims = t->n_dims;
		memcpy(s->shape, t->shape, t->n_dims * sizeof(s->shape[0]));
		s->lent = t->data;
	}
	cp->n_stored = params->n_tensors;
	afd__checkpoint_sort(cp);
	for (i = 1; i < cp->n_stored; i++) {
		if (!strcmp(cp->stored[i - 1].name, cp->stored[i].name))
			return afd__error(-EINVAL, "tensor %.200s: it is lent twice",
					  cp->stored[i].name);
	}
	return 0;
}

int afd__checkpoint_lend(struct afd__checkpoint **out, struct afd_context *ctx,
			 const struct afd_model_params *params)
{
	struct afd__checkpoint *cp = NULL;
	int rc;

	rc = check_stride(params);
	if (rc)
		return rc;
	rc = afd__checkpoint_create(&cp, ctx, -1, "the host's tensors");
	if (!rc)
		rc = lend_all(cp, params);
	if (rc) {
		afd__checkpoint_close(cp);
		return rc;
	}
	*out = cp;
	return 0;
}
