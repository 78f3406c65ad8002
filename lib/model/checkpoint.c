/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tensors of a checkpoint by name. The list of names comes from the one file's header, from the index, or from the
 * host; what a tensor is (dtype, shape, place) is known once the header of its file was read, which happens when the first
 * tensor of that file is asked for. So a role never opens a file that holds nothing of it. One mutex guards the state of
 * files; what was found once never moves. Called by model.c.
 */
#include "checkpoint.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "file.h"
#include "json.h"
#include "safetensors.h"

#define ONE_FILE "model.safetensors"
#define INDEX_FILE "model.safetensors.index.json"

enum { MAX_TENSORS = 1 << 24, MAX_FILES = 1024, INDEX_MAX_BYTES = 64 << 20, ALIGNMENT = 4 };

struct stored {
	const char *name;
	struct file *file; /* NULL: lent */
	bool known;        /* the fields below are */
	int32_t dtype;     /* enum afd_dtype; 0: none that we compute with */
	char dtype_name[16];
	uint32_t n_dims;
	uint64_t shape[AFD__SAFETENSORS_MAX_DIMS]; /* [n_dims] */
	uint64_t offset, bytes;
	const void *lent;
	void *aligned; /* a copy, when the file has it at an odd place */
};

struct file {
	const char *name;
	int fd;       /* -1: not opened, or mapped already */
	bool known;   /* its header was read */
	uint64_t bytes;
	char *mapped; /* the whole file; NULL: not yet */
};

struct afd__checkpoint {
	struct afd_context *ctx;
	char *source; /* for errors: the directory */
	int dir_fd;   /* -1: lent tensors */
	pthread_mutex_t lock;
	struct stored *stored; /* [n_stored], sorted by name */
	struct file *files;    /* [n_files] */
	char *names;           /* of tensors and files */
	uint32_t n_stored, n_files;
};

/* ---- names ---- */

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct stored *)a)->name, ((const struct stored *)b)->name);
}

static struct stored *find(const struct afd__checkpoint *cp, const char *name)
{
	struct stored key = { .name = name };

	if (!cp->n_stored)
		return NULL;
	return bsearch(&key, cp->stored, cp->n_stored, sizeof(key), by_name);
}

bool afd__checkpoint_has(const struct afd__checkpoint *cp, const char *name)
{
	return find(cp, name) != NULL;
}

/* ---- one file ---- */

static int read_header(struct afd__checkpoint *cp, struct file *file, struct afd__safetensors *header)
{
	unsigned char prefix[8];
	uint64_t header_bytes;
	char *text = NULL;
	int rc;

	rc = afd__file_open(&file->fd, &file->bytes, cp->dir_fd, file->name);
	if (rc)
		return rc;
	if (file->bytes >= sizeof(prefix)) {
		rc = afd__file_read_at(file->fd, prefix, sizeof(prefix), 0, file->name);
		if (rc)
			goto fail;
	}
	rc = afd__safetensors_header_bytes(&header_bytes, prefix, file->bytes, file->name);
	if (rc)
		goto fail;
	text = afd__alloc(cp->ctx, header_bytes + 1, 1);
	rc = text ? afd__file_read_at(file->fd, text, header_bytes, sizeof(prefix), file->name) : -ENOMEM;
	if (!rc)
		rc = afd__safetensors_parse(header, cp->ctx, text, header_bytes, file->bytes, file->name);
	if (rc)
		goto fail;
	afd__free(text);
	return 0;
fail:
	afd__free(text);
	close(file->fd);
	file->fd = -1;
	return rc;
}

static void set_stored(struct stored *s, const struct afd__safetensor *t)
{
	s->known = true;
	s->dtype = t->dtype;
	memcpy(s->dtype_name, t->dtype_name, sizeof(s->dtype_name));
	s->n_dims = t->n_dims;
	memcpy(s->shape, t->shape, sizeof(s->shape));
	s->offset = t->offset;
	s->bytes = t->bytes;
}

/* Fills in what the index could only name. Tensors that the index does not name do not exist. */
static int apply_header(struct afd__checkpoint *cp, struct file *file, const struct afd__safetensors *header)
{
	uint32_t i;

	for (i = 0; i < header->n_tensors; i++) {
		struct stored *s = find(cp, header->tensors[i].name);

		if (s && s->file != file)
			return afd__error(-EBADMSG, "%s: tensor %.200s stands in it, and in %s as the index says", file->name,
					  s->name, s->file->name);
	}
	for (i = 0; i < header->n_tensors; i++) {
		struct stored *s = find(cp, header->tensors[i].name);

		if (s)
			set_stored(s, &header->tensors[i]);
	}
	file->known = true;
	return 0;
}

static int know_file(struct afd__checkpoint *cp, struct file *file)
{
	struct afd__safetensors header;
	int rc;

	if (file->known)
		return 0;
	rc = read_header(cp, file, &header);
	if (rc)
		return rc;
	rc = apply_header(cp, file, &header);
	if (rc) {
		close(file->fd);
		file->fd = -1;
	}
	afd__safetensors_free(&header);
	return rc;
}

static int map_file(struct afd__checkpoint *cp, struct file *file)
{
	void *mapped;

	if (file->mapped)
		return 0;
	mapped = mmap(NULL, file->bytes, PROT_READ, MAP_PRIVATE, file->fd, 0);
	if (mapped == MAP_FAILED)
		return afd__error(-ENOMEM, "%s: cannot map its %" PRIu64 " bytes", file->name, file->bytes);
	file->mapped = mapped;
	close(file->fd);
	file->fd = -1;
	return 0;
}

/* ---- one tensor ---- */

/* The format does not promise alignment; kernels and compilers want it, so a tensor at an odd place is copied once. */
static int align_data(struct afd__checkpoint *cp, struct stored *s, const void **data)
{
	if ((uintptr_t)*data % ALIGNMENT == 0)
		return 0;
	if (!s->aligned) {
		s->aligned = afd__large_alloc(cp->ctx, s->bytes, 64, s->name);
		if (!s->aligned)
			return -ENOMEM;
		memcpy(s->aligned, *data, s->bytes);
	}
	*data = s->aligned;
	return 0;
}

static int check_usable(const struct afd__checkpoint *cp, const struct stored *s)
{
	if (!s->known)
		return afd__error(-EBADMSG, "%s: tensor %.200s is not in it, as the index says", s->file->name, s->name);
	if (s->dtype != AFD_DTYPE_F32 && s->dtype != AFD_DTYPE_F16 && s->dtype != AFD_DTYPE_BF16)
		return afd__error(-ENOTSUP, "tensor %.200s: dtype %s is not supported, only F32, F16 and BF16", s->name,
				  s->dtype_name);
	if (s->n_dims > 4)
		return afd__error(-EBADMSG, "tensor %.200s: %u dimensions, limit 4", s->name, s->n_dims);
	return 0;
}

static int look_up(struct afd__checkpoint *cp, struct stored *s, bool with_data, struct afd__tensor *out)
{
	const void *data = s->lent;
	int rc;

	rc = s->file ? know_file(cp, s->file) : 0;
	if (rc)
		return afd__error_prefix(rc, "tensor %.200s", s->name);
	rc = check_usable(cp, s);
	if (rc)
		return rc;
	if (s->file && with_data) {
		rc = map_file(cp, s->file);
		if (rc)
			return rc;
		data = s->file->mapped + s->offset;
		rc = align_data(cp, s, &data);
		if (rc)
			return rc;
	}
	*out = (struct afd__tensor){
		.name = s->name, .file = s->file ? s->file->name : NULL, .data = data,
		.bytes = s->bytes, .n_dims = s->n_dims, .dtype = s->dtype,
		.mapped = data && s->file && data != s->aligned,
	};
	memcpy(out->shape, s->shape, sizeof(out->shape));
	return 0;
}

int afd__checkpoint_tensor(struct afd__checkpoint *cp, const char *name, bool with_data, struct afd__tensor *out)
{
	struct stored *s = find(cp, name);
	int rc;

	if (!s)
		return afd__error(-ENOENT, "tensor %s: not in %s", name, cp->source);
	pthread_mutex_lock(&cp->lock);
	rc = look_up(cp, s, with_data, out);
	pthread_mutex_unlock(&cp->lock);
	return rc;
}

/* ---- life ---- */

static int create(struct afd__checkpoint **out, struct afd_context *ctx, int dir_fd, const char *source)
{
	struct afd__checkpoint *cp = afd__alloc(ctx, 1, sizeof(*cp));

	if (!cp) {
		if (dir_fd >= 0)
			close(dir_fd);
		return -ENOMEM;
	}
	cp->ctx = ctx;
	cp->dir_fd = dir_fd;
	pthread_mutex_init(&cp->lock, NULL);
	*out = cp;
	cp->source = afd__strdup(ctx, source);
	return cp->source ? 0 : -ENOMEM;
}

static void close_file(struct file *file)
{
	if (file->mapped)
		munmap(file->mapped, file->bytes);
	if (file->fd >= 0)
		close(file->fd);
}

void afd__checkpoint_close(struct afd__checkpoint *cp)
{
	uint32_t i;

	if (!cp)
		return;
	for (i = 0; i < cp->n_stored; i++)
		afd__large_free(cp->ctx, cp->stored[i].aligned, cp->stored[i].bytes);
	for (i = 0; i < cp->n_files; i++)
		close_file(&cp->files[i]);
	if (cp->dir_fd >= 0)
		close(cp->dir_fd);
	pthread_mutex_destroy(&cp->lock);
	afd__free(cp->stored);
	afd__free(cp->files);
	afd__free(cp->names);
	afd__free(cp->source);
	afd__free(cp);
}

static int alloc_tables(struct afd__checkpoint *cp, size_t n_stored, size_t n_files, size_t name_bytes)
{
	if (n_stored > MAX_TENSORS)
		return afd__error(-EBADMSG, "%s: %zu tensors, limit %d", cp->source, n_stored, MAX_TENSORS);
	cp->stored = afd__alloc(cp->ctx, n_stored, sizeof(*cp->stored));
	cp->files = cp->stored ? afd__alloc(cp->ctx, n_files, sizeof(*cp->files)) : NULL;
	cp->names = cp->files ? afd__alloc(cp->ctx, name_bytes, 1) : NULL;
	return cp->names ? 0 : -ENOMEM;
}

/* ---- the one file ---- */

static int open_one(struct afd__checkpoint *cp)
{
	struct afd__safetensors header = { 0 };
	struct file file = { .name = ONE_FILE, .fd = -1 };
	uint32_t i;
	int rc;

	rc = read_header(cp, &file, &header);
	if (rc)
		return rc;
	rc = alloc_tables(cp, header.n_tensors, 1, 1);
	if (rc)
		goto fail;
	cp->n_files = 1;
	cp->files[0] = file;
	cp->n_stored = header.n_tensors;
	for (i = 0; i < header.n_tensors; i++) {
		cp->stored[i].name = header.tensors[i].name;
		cp->stored[i].file = &cp->files[0];
	}
	qsort(cp->stored, cp->n_stored, sizeof(*cp->stored), by_name);
	rc = apply_header(cp, &cp->files[0], &header);
	/* The names outlive the header. */
	afd__free(cp->names);
	cp->names = header.names;
	header.names = NULL;
	afd__safetensors_free(&header);
	return rc;
fail:
	close_file(&file);
	afd__safetensors_free(&header);
	return rc;
}

/* ---- the index ---- */

/* A checkpoint must not reach out of its directory. */
static bool is_plain_name(const char *name)
{
	return name[0] && strcmp(name, ".") && strcmp(name, "..") && !strchr(name, '/') && strlen(name) <= 255;
}

static int check_entry(const char *tensor, const json_t *file)
{
	if (!json_is_string(file))
		return afd__error(-EBADMSG, INDEX_FILE ": the file of tensor %.200s must be a string", tensor);
	if (!is_plain_name(json_string_value(file)))
		return afd__error(-EBADMSG, INDEX_FILE ": tensor %.200s: \"%.100s\" is not the name of a file in the directory",
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

/* NULL beyond MAX_FILES. Neighbours in the index mostly share a file, so the search from the end is short. */
static struct file *intern_file(struct afd__checkpoint *cp, char **end, const char *name)
{
	uint32_t i;

	for (i = cp->n_files; i > 0; i--) {
		if (!strcmp(cp->files[i - 1].name, name))
			return &cp->files[i - 1];
	}
	if (cp->n_files == MAX_FILES)
		return NULL;
	cp->files[cp->n_files] = (struct file){ .name = push_name(end, name), .fd = -1 };
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
		rc = alloc_tables(cp, json_object_size(map), MAX_FILES, name_bytes);
	if (rc)
		return rc;
	end = cp->names;
	json_object_foreach((json_t *)map, tensor, file) {
		struct stored *s = &cp->stored[cp->n_stored++];

		s->name = push_name(&end, tensor);
		s->file = intern_file(cp, &end, json_string_value(file));
		if (!s->file)
			return afd__error(-EBADMSG, INDEX_FILE ": more than %d files", MAX_FILES);
	}
	qsort(cp->stored, cp->n_stored, sizeof(*cp->stored), by_name);
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

int afd__checkpoint_open(struct afd__checkpoint **out, struct afd_context *ctx, int dir_fd, const char *dir)
{
	struct afd__checkpoint *cp = NULL;
	int rc;

	rc = create(&cp, ctx, dir_fd, dir);
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
	if (t->dtype == AFD_DTYPE_FP8)
		return afd__error(-ENOTSUP, "tensor %.200s: dtype fp8 is not supported in this version", t->name);
	*bytes = afd_dtype_bytes(t->dtype);
	if (!*bytes)
		return afd__error(-EINVAL, "tensor %.200s: dtype is %d, no enum afd_dtype", t->name, t->dtype);
	if (!t->n_dims || t->n_dims > 4 || !t->shape)
		return afd__error(-EINVAL, "tensor %.200s: n_dims is %u, limit 1 .. 4 with a shape", t->name, t->n_dims);
	for (i = 0; i < t->n_dims; i++) {
		if (__builtin_mul_overflow(*bytes, t->shape[i], bytes))
			return afd__error(-EINVAL, "tensor %.200s: the product of its shape overflows", t->name);
	}
	if (!t->data || (uintptr_t)t->data % ALIGNMENT)
		return afd__error(-EINVAL, "tensor %.200s: data is %p, must be aligned to %d bytes", t->name, t->data, ALIGNMENT);
	return 0;
}

static const struct afd_tensor *entry(const struct afd_model_params *params, uint32_t i)
{
	return (const struct afd_tensor *)((const char *)params->tensors + i * params->tensor_bytes);
}

static int check_stride(const struct afd_model_params *params)
{
	const unsigned char *tail;
	uint32_t i;
	size_t b;

	if (!params->n_tensors || !params->tensors || params->n_tensors > MAX_TENSORS)
		return afd__error(-EINVAL, "model params: %u tensors, limit 1 .. %d", params->n_tensors, MAX_TENSORS);
	if (params->tensor_bytes < sizeof(struct afd_tensor) || params->tensor_bytes > 4096)
		return afd__error(-EINVAL, "model params: tensor_bytes is %zu, must be sizeof(struct afd_tensor)",
				  params->tensor_bytes);
	for (i = 0; i < params->n_tensors; i++) {
		tail = (const unsigned char *)entry(params, i);
		for (b = sizeof(struct afd_tensor); b < params->tensor_bytes; b++) {
			if (tail[b])
				return afd__error(-E2BIG, "tensors[%u]: byte %zu is set, this version knows %zu", i, b,
						  sizeof(struct afd_tensor));
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
	rc = alloc_tables(cp, params->n_tensors, 0, name_bytes);
	if (rc)
		return rc;
	end = cp->names;
	for (i = 0; i < params->n_tensors; i++) {
		const struct afd_tensor *t = entry(params, i);
		struct stored *s = &cp->stored[i];

		check_lent(t, i, &s->bytes);
		s->name = push_name(&end, t->name);
		s->known = true;
		s->dtype = t->dtype;
		s->n_dims = t->n_dims;
		memcpy(s->shape, t->shape, t->n_dims * sizeof(s->shape[0]));
		s->lent = t->data;
	}
	cp->n_stored = params->n_tensors;
	qsort(cp->stored, cp->n_stored, sizeof(*cp->stored), by_name);
	for (i = 1; i < cp->n_stored; i++) {
		if (!strcmp(cp->stored[i - 1].name, cp->stored[i].name))
			return afd__error(-EINVAL, "tensor %.200s: it is lent twice", cp->stored[i].name);
	}
	return 0;
}

int afd__checkpoint_lend(struct afd__checkpoint **out, struct afd_context *ctx, const struct afd_model_params *params)
{
	struct afd__checkpoint *cp = NULL;
	int rc;

	rc = check_stride(params);
	if (rc)
		return rc;
	rc = create(&cp, ctx, -1, "the host's tensors");
	if (!rc)
		rc = lend_all(cp, params);
	if (rc) {
		afd__checkpoint_close(cp);
		return rc;
	}
	*out = cp;
	return 0;
}
