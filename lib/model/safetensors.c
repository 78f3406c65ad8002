/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header of a safetensors file: 8 bytes of length, JSON, then the data. Everything that the
 * header says is checked before anybody relies on it: types, products that overflow, ends beyond
 * the file, overlaps and holes. The reader keeps to the format's own rule that the tensors cover
 * the data exactly, so a header that passes cannot lie about a byte. Called by checkpoint.c.
 */
#include "safetensors.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "../context/core.h"
#include "json.h"

static const struct dtype {
	const char *name;
	unsigned bits;
	int32_t dtype;
} dtypes[] = {
	{ "F32", 32, AFD_DTYPE_F32 },
	{ "BF16", 16, AFD_DTYPE_BF16 },
	{ "F16", 16, AFD_DTYPE_F16 },
	{ "F8_E4M3", 8, AFD_DTYPE_FP8 },
	{ "F8_E5M2", 8, 0 },
	{ "F8_E8M0", 8, 0 },
	{ "F4", 4, 0 },
	{ "F6_E2M3", 6, 0 },
	{ "F6_E3M2", 6, 0 },
	{ "F64", 64, 0 },
	{ "C64", 64, 0 },
	{ "BOOL", 8, 0 },
	{ "U8", 8, 0 },
	{ "I8", 8, 0 },
	{ "U16", 16, 0 },
	{ "I16", 16, 0 },
	{ "U32", 32, 0 },
	{ "I32", 32, 0 },
	{ "U64", 64, 0 },
	{ "I64", 64, 0 },
};

int afd__safetensors_header_bytes(uint64_t *header_bytes, const unsigned char prefix[8],
				  uint64_t file_bytes, const char *file)
{
	uint64_t n = 0;
	int i;

	if (file_bytes < 8)
		return afd__error(-EBADMSG,
				  "%s: %" PRIu64 " bytes, too short for a safetensors file", file,
				  file_bytes);
	for (i = 7; i >= 0; i--)
		n = n << 8 | prefix[i];
	if (n > AFD__SAFETENSORS_MAX_HEADER)
		return afd__error(-EBADMSG, "%s: header of %" PRIu64 " bytes, limit %d", file, n,
				  AFD__SAFETENSORS_MAX_HEADER);
	if (n > file_bytes - 8)
		return afd__error(-EBADMSG,
				  "%s: header of %" PRIu64 " bytes, the file has %" PRIu64, file, n,
				  file_bytes);
	*header_bytes = n;
	return 0;
}

/* ---- one tensor ---- */

struct parser {
	const char *file;
	uint64_t header_bytes, data_bytes;
};

static int bad_tensor(const struct parser *p, const char *name, const char *why)
{
	return afd__error(-EBADMSG, "%s: tensor %.200s: %s", p->file, name, why);
}

/* Multiplies n_numbers by the shape. */
static int read_shape(struct afd__safetensor *t, const struct parser *p, const json_t *shape,
		      uint64_t *n_numbers)
{
	size_t i;

	if (!json_is_array(shape))
		return bad_tensor(p, t->name, "shape must be a list");
	if (json_array_size(shape) > AFD__SAFETENSORS_MAX_DIMS)
		return bad_tensor(p, t->name, "shape has more than 8 dimensions");
	t->n_dims = (uint32_t)json_array_size(shape);
	for (i = 0; i < t->n_dims; i++) {
		const json_t *dim = json_array_get(shape, i);

		if (!json_is_integer(dim) || json_integer_value(dim) < 0)
			return bad_tensor(p, t->name, "shape must hold integers from 0 on");
		t->shape[i] = (uint64_t)json_integer_value(dim);
		if (__builtin_mul_overflow(*n_numbers, t->shape[i], n_numbers))
			return bad_tensor(p, t->name, "the product of its shape overflows");
	}
	return 0;
}

static int read_offsets(struct afd__safetensor *t, const struct parser *p, const json_t *offsets)
{
	const json_t *begin = json_array_get(offsets, 0), *end = json_array_get(offsets, 1);
	uint64_t first, last;

	if (json_array_size(offsets) != 2 || !json_is_integer(begin) || !json_is_integer(end))
		return bad_tensor(p, t->name, "data_offsets must be two integers");
	if (json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin))
		return bad_tensor(p, t->name, "data_offsets must rise from 0 on");
	first = (uint64_t)json_integer_value(begin);
	last = (uint64_t)json_integer_value(end);
	if (last > p->data_bytes)
		return afd__error(-EBADMSG,
				  "%s: tensor %.200s: data ends at %" PRIu64
				  ", the file has %" PRIu64 " bytes of data",
				  p->file, t->name, last, p->data_bytes);
	t->offset = 8 + p->header_bytes + first;
	t->bytes = last - first;
	return 0;
}

static const struct dtype *find_dtype(const char *name)
{
	size_t i;

	for (i = 0; i < sizeof(dtypes) / sizeof(dtypes[0]); i++) {
		if (!strcmp(dtypes[i].name, name))
			return &dtypes[i];
	}
	return NULL;
}

static int read_tensor(struct afd__safetensor *t, const struct parser *p, const json_t *entry)
{
	const json_t *dtype = json_object_get(entry, "dtype");
	const struct dtype *known;
	uint64_t n_numbers = 1, bits;
	int rc;

	if (!json_is_object(entry))
		return bad_tensor(p, t->name, "must be an object");
	if (!json_is_string(dtype))
		return bad_tensor(p, t->name, "dtype must be a string");
	strncpy(t->dtype_name, json_string_value(dtype), sizeof(t->dtype_name) - 1);
	rc = read_shape(t, p, json_object_get(entry, "shape"), &n_numbers);
	if (!rc)
		rc = read_offsets(t, p, json_object_get(entry, "data_offsets"));
	if (rc)
		return rc;
	/* A dtype of a newer format may stand in the file; its tensor is refused only when it is
	 * needed. */
	known = find_dtype(json_string_value(dtype));
	if (!known)
		return 0;
	t->dtype = known->dtype;
	if (__builtin_mul_overflow(n_numbers, (uint64_t)known->bits, &bits) || bits % 8 ||
	    bits / 8 != t->bytes)
		return afd__error(-EBADMSG,
				  "%s: tensor %.200s: %" PRIu64
				  " numbers of %s do not fill its %" PRIu64 " bytes",
				  p->file, t->name, n_numbers, known->name, t->bytes);
	return 0;
}

/* ---- all of them ---- */

static int by_offset(const void *a, const void *b)
{
	const struct afd__safetensor *x = a, *y = b;

	if (x->offset != y->offset)
		return x->offset < y->offset ? -1 : 1;
	return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int check_cover(const struct afd__safetensors *out, const struct parser *p,
		       uint64_t file_bytes)
{
	uint64_t end = 8 + p->header_bytes;
	uint32_t i;

	for (i = 0; i < out->n_tensors; i++) {
		const struct afd__safetensor *t = &out->tensors[i];

		if (t->offset < end)
			return afd__error(-EBADMSG, "%s: tensors %.150s and %.150s overlap",
					  p->file, t[-1].name, t->name);
		if (t->offset > end)
			return afd__error(-EBADMSG,
					  "%s: %" PRIu64
					  " bytes before tensor %.200s belong to no tensor",
					  p->file, t->offset - end, t->name);
		end = t->offset + t->bytes;
	}
	if (end != file_bytes)
		return afd__error(-EBADMSG, "%s: %" PRIu64 " bytes at its end belong to no tensor",
				  p->file, file_bytes - end);
	return 0;
}

static int alloc_tensors(struct afd__safetensors *out, struct afd_context *ctx, json_t *root)
{
	size_t name_bytes = 1;
	const char *key;
	json_t *entry;

	json_object_foreach(root, key, entry)
		name_bytes += strlen(key) + 1;
	out->names = afd__alloc(ctx, name_bytes, 1);
	out->tensors = out->names
			       ? afd__alloc(ctx, json_object_size(root) + 1, sizeof(*out->tensors))
			       : NULL;
	return out->tensors ? 0 : -ENOMEM;
}

static int read_all(struct afd__safetensors *out, const struct parser *p, json_t *root)
{
	char *name = out->names;
	const char *key;
	json_t *entry;
	int rc;

	json_object_foreach(root, key, entry) {
		struct afd__safetensor *t = &out->tensors[out->n_tensors];

		if (!strcmp(key, "__metadata__")) {
			if (!json_is_object(entry))
				return afd__error(-EBADMSG, "%s: __metadata__ must be an object",
						  p->file);
			continue;
		}
		t->name = strcpy(name, key);
		name += strlen(key) + 1;
		rc = read_tensor(t, p, entry);
		if (rc)
			return rc;
		out->n_tensors++;
	}
	return 0;
}

int afd__safetensors_parse(struct afd__safetensors *out, struct afd_context *ctx,
			   const char *header, uint64_t header_bytes, uint64_t file_bytes,
			   const char *file)
{
	struct parser p = { .file = file,
			    .header_bytes = header_bytes,
			    .data_bytes = file_bytes - 8 - header_bytes };
	json_t *root;
	int rc;

	memset(out, 0, sizeof(*out));
	root = afd__json_parse(header, header_bytes, file, &rc);
	if (!root)
		return rc;
	rc = json_is_object(root) ? 0
				  : afd__error(-EBADMSG, "%s: the header must be an object", file);
	if (!rc)
		rc = alloc_tensors(out, ctx, root);
	if (!rc)
		rc = read_all(out, &p, root);
	json_decref(root);
	if (!rc) {
		qsort(out->tensors, out->n_tensors, sizeof(*out->tensors), by_offset);
		rc = check_cover(out, &p, file_bytes);
	}
	if (rc)
		afd__safetensors_free(out);
	return rc;
}

void afd__safetensors_free(struct afd__safetensors *header)
{
	afd__free(header->tensors);
	afd__free(header->names);
	memset(header, 0, sizeof(*header));
}
