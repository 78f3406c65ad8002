/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fingerprint of a stage's weights; fingerprint.h defines it. One tensor at a time, bytes in
 * order, nothing kept but a sum. Called by the stages while they load.
 */
#include "fingerprint.h"

#if AFD_HAVE_XXHASH

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <string.h>

struct afd__fingerprint {
	XXH3_state_t *state;
	uint64_t low, high, n_tensors;
};

static void put_u64(unsigned char *out, uint64_t value)
{
	int i;

	for (i = 0; i < 8; i++)
		out[i] = (unsigned char)(value >> 8 * i);
}

static const char *stored_name(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 ? "F32" : dtype == AFD_DTYPE_F16 ? "F16" : "BF16";
}

struct afd__fingerprint *afd__fingerprint_create(struct afd_context *ctx)
{
	struct afd__fingerprint *fp = afd__alloc(ctx, 1, sizeof(*fp));

	if (!fp)
		return NULL;
	fp->state = XXH3_createState();
	if (!fp->state) {
		afd__error(-ENOMEM, "fingerprint: no memory");
		afd__free(fp);
		return NULL;
	}
	return fp;
}

void afd__fingerprint_destroy(struct afd__fingerprint *fp)
{
	if (!fp)
		return;
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

void afd__fingerprint_end(struct afd__fingerprint *fp)
{
	XXH128_hash_t digest = XXH3_128bits_digest(fp->state);

	fp->low += digest.low64;
	fp->high += digest.high64 + (fp->low < digest.low64);
	fp->n_tensors++;
}

void afd__fingerprint_value(const struct afd__fingerprint *fp, uint64_t value[2])
{
	unsigned char bytes[24];
	XXH128_hash_t digest;

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

void afd__fingerprint_value(const struct afd__fingerprint *fp, uint64_t value[2])
{
	value[0] = value[1] = 0;
}

#endif

void afd__fingerprint_tensor(struct afd__fingerprint *fp, const struct afd__tensor *t)
{
	afd__fingerprint_begin(fp, t, NULL, NULL);
	afd__fingerprint_add(fp, t->data, t->bytes);
	afd__fingerprint_end(fp);
}
