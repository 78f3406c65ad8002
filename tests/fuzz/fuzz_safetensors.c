/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any bytes as a safetensors file: the header is refused, or every tensor lies inside the file
 * behind the one before it and is as large as its shape says. Built for libFuzzer, or with
 * replay.c.
 */
#include <stdlib.h>
#include <string.h>

#include "../../lib/context/core.h"
#include "../../lib/model/safetensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void check(const struct afd__safetensors *header, uint64_t data_at, uint64_t file_bytes)
{
	uint64_t at = data_at, numbers;
	uint32_t i, d;

	for (i = 0; i < header->n_tensors; i++) {
		const struct afd__safetensor *t = &header->tensors[i];

		if (t->offset != at || t->bytes > file_bytes - at || t->n_dims > AFD__SAFETENSORS_MAX_DIMS)
			abort();
		at += t->bytes;
		for (numbers = 1, d = 0; d < t->n_dims; d++)
			numbers *= t->shape[d];
		if (t->dtype && numbers * afd_dtype_bytes(t->dtype) != t->bytes)
			abort();
		if (memchr(t->dtype_name, 0,
		    sizeof(t->dtype_name)) == NULL || strlen(t->name) > file_bytes)
			abort();
	}
	if (at != file_bytes)
		abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	unsigned char prefix[8] = { 0 };
	struct afd__safetensors header;
	uint64_t header_bytes;
	char *text;

	memcpy(prefix, data, n_bytes < 8 ? n_bytes : 8);
	if (afd__safetensors_header_bytes(&header_bytes, prefix, n_bytes, "fuzz"))
		return 0;
	/* A copy of its own size, so that a read beyond it is seen. */
	text = malloc(header_bytes ? header_bytes : 1);
	if (!text)
		return 0;
	memcpy(text, data + 8, header_bytes);
	if (!afd__safetensors_parse(&header, NULL, text, header_bytes, n_bytes, "fuzz")) {
		check(&header, 8 + header_bytes, n_bytes);
		afd__safetensors_free(&header);
	}
	free(text);
	return 0;
}
