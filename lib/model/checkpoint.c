/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tensors of a checkpoint by name. What a tensor is (dtype, shape, place) is known once the
 * header of its file was read, which happens when the first tensor of that file is asked for. So a
 * role never opens a file that holds nothing of it. One mutex guards the state of files; what was
 * found once never moves. Called by model.c and roles.c.
 */
#include "checkpoint_state.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "file.h"

enum { MAX_TENSORS = 1 << 24 };

/* ---- names ---- */

static int by_name(const void *a, const void *b)
{
	return strcmp(((const struct afd__stored *)a)->name, ((const struct afd__stored *)b)->name);
}

static struct afd__stored *find(const struct afd__checkpoint *cp, const char *name)
{
	struct afd__stored key = { .name = name };

	if (!cp->n_stored)
		return NULL;
	return bsearch(&key, cp->stored, cp->n_stored, sizeof(key), by_name);
}

void afd__checkpoint_sort(struct afd__checkpoint *cp)
{
	if (cp->n_stored)
		qsort(cp->stored, cp->n_stored, sizeof(*cp->stored), by_name);
}

const char *afd__checkpoint_name(const struct afd__checkpoint *cp, const char *name)
{
	const struct afd__stored *s = cp ? find(cp, name) : NULL;

	return s ? s->name : NULL;
}

/* ---- one file ---- */

int afd__checkpoint_read_header(struct afd__checkpoint *cp, struct afd__file *file,
				struct afd__safetensors *header)
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
	rc = text ? afd__file_read_at(file->fd, text, header_bytes, sizeof(prefix), file->name)
		  : -ENOMEM;
	if (!rc)
		rc = afd__safetensors_parse(header, cp->ctx, text, header_bytes, file->bytes,
					    file->name);
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

static void set_stored(struct afd__stored *s, const struct afd__safetensor *t)
{
	s->known = true;
	s->dtype = t->dtype;
	memcpy(s->dtype_name, t->dtype_name, sizeof(s->dtype_name));
	s->n_dims = t->n_dims;
	memcpy(s->shape, t->shape, sizeof(s->shape));
	s->offset = t->offset;
	s->bytes = t->bytes;
}

int afd__checkpoint_apply_header(struct afd__checkpoint *cp, struct afd__file *file,
				 const struct afd__safetensors *header)
{
	uint32_t i;

	for (i = 0; i < header->n_tensors; i++) {
		struct afd__stored *s = find(cp, header->tensors[i].name);

		if (s && s->file != file)
			return afd__error(-EBADMSG, "%s: tensor %.200s stands in it, and in %s as "
					  "the index says", file->name, s->name, s->file->name);
	}
	for (i = 0; i < header->n_tensors; i++) {
		struct afd__stored *s = find(cp, header->tensors[i].name);

		if (s)
			set_stored(s, &header->tensors[i]);
	}
	file->known = true;
	return 0;
}

static int know_file(struct afd__checkpoint *cp, struct afd__file *file)
{
	struct afd__safetensors header;
	int rc;

	if (file->known)
		return 0;
	rc = afd__checkpoint_read_header(cp, file, &header);
	if (rc)
		return rc;
	rc = afd__checkpoint_apply_header(cp, file, &header);
	if (rc) {
		close(file->fd);
		file->fd = -1;
	}
	afd__safetensors_free(&header);
	return rc;
}

static int map_file(struct afd__checkpoint *cp, struct afd__file *file)
{
	void *mapped;

	if (file->mapped)
		return 0;
	mapped = mmap(NULL, file->bytes, PROT_READ, MAP_PRIVATE, file->fd, 0);
	if (mapped == MAP_FAILED)
		return afd__error(-ENOMEM, "%s: cannot map its %" PRIu64 " bytes", file->name,
				  file->bytes);
	file->mapped = mapped;
	close(file->fd);
	file->fd = -1;
	return 0;
}

/* ---- one tensor ---- */

/* The format does not promise alignment; kernels and compilers want it, so a tensor at an odd place
 * is copied once. */
static int align_data(struct afd__checkpoint *cp, struct afd__stored *s, const void **data)
{
	if ((uintptr_t)*data % AFD__TENSOR_ALIGNMENT == 0)
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

static int check_usable(const struct afd__checkpoint *cp, const struct afd__stored *s)
{
	if (!s->known)
		return afd__error(-EBADMSG, "%s: tensor %.200s is not in it, as the index says",
				  s->file->name, s->name);
	if (!s->dtype)
		return afd__error(-ENOTSUP, "tensor %.200s: dtype %s is not supported, only F32, "
				  "F16, BF16 and F8_E4M3", s->name, s->dtype_name);
	if (s->n_dims > 4)
		return afd__error(-EBADMSG, "tensor %.200s: %u dimensions, limit 4", s->name,
				  s->n_dims);
	return 0;
}

static int look_up(struct afd__checkpoint *cp, struct afd__stored *s, bool with_data,
		   struct afd__tensor *out)
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

int afd__checkpoint_tensor(struct afd__checkpoint *cp, const char *name, bool with_data,
			   struct afd__tensor *out)
{
	struct afd__stored *s = find(cp, name);
	int rc;

	if (!s)
		return afd__checkpoint_missing(cp, name);
	pthread_mutex_lock(&cp->lock);
	rc = look_up(cp, s, with_data, out);
	pthread_mutex_unlock(&cp->lock);
	return rc;
}

int afd__checkpoint_missing(const struct afd__checkpoint *cp, const char *names)
{
	return afd__error(-ENOENT, "tensor %s: not in %s", names, cp->source);
}

/* ---- life ---- */

int afd__checkpoint_create(struct afd__checkpoint **out, struct afd_context *ctx, int dir_fd,
			   const char *source)
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

void afd__checkpoint_release(struct afd__checkpoint *cp)
{
	uint32_t i;

	pthread_mutex_lock(&cp->lock);
	for (i = 0; i < cp->n_files; i++) {
		if (cp->files[i].mapped)
			madvise(cp->files[i].mapped, cp->files[i].bytes, MADV_DONTNEED);
	}
	pthread_mutex_unlock(&cp->lock);
}

static void close_file(struct afd__file *file)
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

int afd__checkpoint_alloc(struct afd__checkpoint *cp, size_t n_stored, size_t n_files,
			  size_t name_bytes)
{
	if (n_stored > MAX_TENSORS)
		return afd__error(-EBADMSG, "%s: %zu tensors, limit %d", cp->source, n_stored,
				  MAX_TENSORS);
	cp->stored = afd__alloc(cp->ctx, n_stored, sizeof(*cp->stored));
	cp->files = cp->stored ? afd__alloc(cp->ctx, n_files, sizeof(*cp->files)) : NULL;
	cp->names = cp->files ? afd__alloc(cp->ctx, name_bytes, 1) : NULL;
	return cp->names ? 0 : -ENOMEM;
}
