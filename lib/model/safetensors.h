/* SPDX-License-Identifier: Apache-2.0 */
/* The header of a safetensors file: which tensors lie where. Knows nothing of models, touches no
 * data. */
#ifndef AFD_LIB_SAFETENSORS_H
#define AFD_LIB_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

struct afd_context;

enum { AFD__SAFETENSORS_MAX_DIMS = 8 };

struct afd__safetensor {
	const char *name;     /* in the header's names */
	char dtype_name[16];  /* as the file spells it, cut */
	int32_t dtype;        /* enum afd_dtype; 0: one that the library does not compute with */
	uint32_t n_dims;
	uint64_t shape[AFD__SAFETENSORS_MAX_DIMS]; /* [n_dims] */
	uint64_t offset;      /* from the beginning of the file */
	uint64_t bytes;
};

struct afd__safetensors {
	struct afd__safetensor *tensors; /* [n_tensors], in the order of their data */
	char *names;
	uint32_t n_tensors;
};

#define AFD__SAFETENSORS_MAX_HEADER 100000000 /* the format's own limit */

/* How long the header is, from the first 8 bytes. -EBADMSG when the file cannot hold it. */
int afd__safetensors_header_bytes(uint64_t *header_bytes, const unsigned char prefix[8],
				  uint64_t file_bytes, const char *file);

/*
 * Parses the header's JSON and checks that it covers the file's data exactly: no overlap, no hole,
 * no end beyond the file. -EBADMSG naming file and tensor, -ENOMEM. On success the caller ends it
 * with _free.
 */
int afd__safetensors_parse(struct afd__safetensors *out, struct afd_context *ctx,
			   const char *header, uint64_t header_bytes,
			   uint64_t file_bytes, const char *file);
void afd__safetensors_free(struct afd__safetensors *header); /* also of a zeroed one */

#endif
