/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fingerprint of a stage's weights; fingerprint.h defines it. Of a tensor bytes in order, nothing
 * kept but a sum; tensors in any order, so several at a time. Called by the stages while they load.
 */
#include "fingerprint.h"

#include <stdio.h>
#include <string.h>

#if AFD_HAVE_XXHASH

#define XXH_INLINE_ALL
#include <xxhash.h>

/* A slice that waits to be hashed, into a sum of its own. */
struct waiting {
	struct afd__fingerprint *sum;
	struct afd__tensor tensor;
	uint64_t begin[2], end[2];
	bool release;
};

struct afd__fingerprint {
	struct afd_context *ctx;
	XXH3_state_t *state;
	uint64_t low, high, n_tensors;
	struct waiting *waiting; /* [capacity] */
	uint32_t capacity, n_waiting; /* capacity 0: none waits */
};

enum { MOST_WAITING = 128, WAITING_PER_THREAD = 2 };

static void put_u64(unsigned char *out, uint64_t value)
{
	int i;

	for (i = 0; i < 8; i++)
		out[i] = (unsigned char)(value >> 8 * i);
}

static const char *stored_name(int32_t dtype)
{
	switch (dtype) {
	case AFD_DTYPE_F32:
		return "F32";
	case AFD_DTYPE_F16:
		return "F16";
	case AFD_DTYPE_BF16:
		return "BF16";
	default:
		return "F8_E4M3";
	}
}

static struct afd__fingerprint *create_sum(struct afd_context *ctx)
{
	struct afd__fingerprint *fp = afd__alloc(ctx, 1, sizeof(*fp));

	if (!fp)
		return NULL;
	fp->ctx = ctx;
	fp->state = XXH3_createState();
	if (!fp->state) {
		afd__error(-ENOMEM, "fingerprint: no memory");
		afd__free(fp);
		return NULL;
	}
	return fp;
}

static int create_waiting(struct afd__fingerprint *fp, uint32_t n_threads)
{
	uint32_t n = n_threads < MOST_WAITING / WAITING_PER_THREAD ? n_threads * WAITING_PER_THREAD
								   : MOST_WAITING;

	fp->waiting = afd__alloc(fp->ctx, n, sizeof(*fp->waiting));
	if (!fp->waiting)
		return -ENOMEM;
	for (; fp->capacity < n; fp->capacity++) {
		fp->waiting[fp->capacity].sum = create_sum(fp->ctx);
		if (!fp->waiting[fp->capacity].sum)
			return -ENOMEM;
	}
	return 0;
}

struct afd__fingerprint *afd__fingerprint_create(struct afd_context *ctx)
{
	struct afd__fingerprint *fp = create_sum(ctx);

	if (fp && ctx && ctx->executor.n_threads > 1 &&
		create_waiting(fp, ctx->executor.n_threads)) {
		afd__fingerprint_destroy(fp);
		return NULL;
	}
	return fp;
}

void afd__fingerprint_destroy(struct afd__fingerprint *fp)
{
	uint32_t i;

	if (!fp)
		return;
	for (i = 0; i < fp->capacity; i++)
		afd__fingerprint_destroy(fp->waiting[i].sum);
	afd__free(fp->waiting);
	XXH3_freeState(fp->state);
	afd__free(fp);
}

void afd__fingerprint_begin(struct afd__fingerprint *fp, const struct afd__tensor *t,
			    const uint64_t *begin, const uint64_t *end)
{
	const char *dtype = stored_name(t->dtype);
	unsigned char dims[4 + 4 * 24] = { (unsigned char)t->n_dims };
	uint32_t i;

	XXH3_128bits_reset(fp->state);
	XXH3_128bits_update(fp->state, t->name, strlen(t->name) + 1);
	XXH3_128bits_update(fp->state, dtype, strlen(dtype) + 1);
	for (i = 0; i < t->n_dims; i++) {
		put_u64(dims + 4 + 24 * i, t->shape[i]);
		put_u64(dims + 4 + 24 * i + 8, begin ? begin[i] : 0);
		put_u64(dims + 4 + 24 * i + 16, end ? end[i] : t->shape[i]);
	}
	XXH3_128bits_update(fp->state, dims, 4 + 24 * (size_t)t->n_dims);
}

void afd__fingerprint_add(struct afd__fingerprint *fp, const void *bytes, size_t n_bytes)
{
	XXH3_128bits_update(fp->state, bytes, n_bytes);
}

static void add_sum(struct afd__fingerprint *fp, uint64_t low, uint64_t high, uint64_t n_tensors)
{
	fp->low += low;
	fp->high += high + (fp->low < low);
	fp->n_tensors += n_tensors;
}

void afd__fingerprint_end(struct afd__fingerprint *fp)
{
	XXH128_hash_t digest = XXH3_128bits_digest(fp->state);

	add_sum(fp, digest.low64, digest.high64, 1);
}

static void hash_waiting(void *arg, uint32_t index)
{
	struct waiting *w = &((struct waiting *)arg)[index];

	w->sum->low = w->sum->high = w->sum->n_tensors = 0;
	afd__fingerprint_slice(w->sum, &w->tensor, w->begin, w->end);
	if (w->release)
		afd__model_release(&w->tensor);
}

static void hash_all(struct afd__fingerprint *fp)
{
	uint32_t i;

	if (fp->n_waiting)
		afd__parallel(fp->ctx, fp->n_waiting, hash_waiting, fp->waiting);
	for (i = 0; i < fp->n_waiting; i++) {
		const struct afd__fingerprint *sum = fp->waiting[i].sum;

		add_sum(fp, sum->low, sum->high, sum->n_tensors);
	}
	fp->n_waiting = 0;
}

bool afd__fingerprint_later(struct afd__fingerprint *fp, const struct afd__tensor *t,
			    const uint64_t begin[2], const uint64_t end[2], bool release)
{
	struct waiting *w;

	if (!fp->capacity)
		return false;
	if (fp->n_waiting == fp->capacity)
		hash_all(fp);
	w = &fp->waiting[fp->n_waiting++];
	w->tensor = *t;
	memcpy(w->begin, begin, sizeof(w->begin));
	memcpy(w->end, end, sizeof(w->end));
	w->release = release;
	return true;
}

void afd__fingerprint_value(struct afd__fingerprint *fp, uint64_t value[2])
{
	unsigned char bytes[24];
	XXH128_hash_t digest;

	hash_all(fp);
	put_u64(bytes, fp->low);
	put_u64(bytes + 8, fp->high);
	put_u64(bytes + 16, fp->n_tensors);
	digest = XXH3_128bits(bytes, sizeof(bytes));
	value[0] = digest.low64;
	value[1] = digest.high64;
}

#else

struct afd__fingerprint {
	int unused;
};

struct afd__fingerprint *afd__fingerprint_create(struct afd_context *ctx)
{
	return afd__alloc(ctx, 1, sizeof(struct afd__fingerprint));
}

void afd__fingerprint_destroy(struct afd__fingerprint *fp)
{
	afd__free(fp);
}

void afd__fingerprint_begin(struct afd__fingerprint *fp, const struct afd__tensor *t,
			    const uint64_t *begin, const uint64_t *end)
{
}

void afd__fingerprint_add(struct afd__fingerprint *fp, const void *bytes, size_t n_bytes)
{
}

void afd__fingerprint_end(struct afd__fingerprint *fp)
{
}

bool afd__fingerprint_later(struct afd__fingerprint *fp, const struct afd__tensor *t,
			    const uint64_t begin[2], const uint64_t end[2], bool release)
{
	return false;
}

void afd__fingerprint_value(struct afd__fingerprint *fp, uint64_t value[2])
{
	value[0] = value[1] = 0;
}

#endif

/* Rows begin[0] .. end[0] of [..][n_columns], of each the columns begin[1] .. end[1]. */
static void add_slice(struct afd__fingerprint *fp, const void *data, uint64_t n_columns,
		      size_t number_bytes, const uint64_t begin[2], const uint64_t end[2])
{
	size_t row_bytes = (size_t)n_columns * number_bytes;
	const char *row = (const char *)data + begin[0] * row_bytes + begin[1] * number_bytes;
	uint64_t i;

	for (i = begin[0]; i < end[0]; i++, row += row_bytes)
		afd__fingerprint_add(fp, row, (size_t)(end[1] - begin[1]) * number_bytes);
}

void afd__fingerprint_slice(struct afd__fingerprint *fp, const struct afd__tensor *t,
			    const uint64_t begin[2], const uint64_t end[2])
{
	afd__fingerprint_begin(fp, t, begin, end);
	add_slice(fp, t->data, t->shape[1], afd_dtype_bytes(t->dtype), begin, end);
	afd__fingerprint_end(fp);
	afd__fingerprint_scales(fp, t, begin, end);
}

void afd__fingerprint_scales(struct afd__fingerprint *fp, const struct afd__tensor *t,
			     const uint64_t *begin, const uint64_t *end)
{
	const struct afd__scales *s = &t->scales;
	struct afd__tensor blocks = { .n_dims = 2, .dtype = s->dtype };
	uint64_t first[2] = { 0, 0 }, last[2] = { s->rows, s->columns };
	char name[128];
	int i;

	if (!s->rows)
		return;
	snprintf(name, sizeof(name), "%.110s_scale_inv", t->name);
	blocks.name = name;
	memcpy(blocks.shape, last, sizeof(last));
	for (i = 0; begin && i < 2; i++) {
		uint64_t offset = i == 0 ? s->row_offset : 0;

		first[i] = (offset + begin[i]) / AFD__SCALE_BLOCK;
		last[i] = (offset + end[i] + AFD__SCALE_BLOCK - 1) / AFD__SCALE_BLOCK;
	}
	afd__fingerprint_begin(fp, &blocks, first, last);
	add_slice(fp, s->data, s->columns, afd_dtype_bytes(s->dtype), first, last);
	afd__fingerprint_end(fp);
}

void afd__fingerprint_tensor(struct afd__fingerprint *fp, const struct afd__tensor *t)
{
	afd__fingerprint_begin(fp, t, NULL, NULL);
	afd__fingerprint_add(fp, t->data, t->bytes);
	afd__fingerprint_end(fp);
	afd__fingerprint_scales(fp, t, NULL, NULL);
}
