/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Slices: the part of a tensor that a shard holds, on its way from the checkpoint to a matrix of a
 * device. The loaders of both stages decide which part of what; how it is brought there, its
 * scales, the fingerprint and the host's progress are here, once.
 *
 * Every byte of a slice is read once from its file, and scales keep the block offsets of the whole
 * tensor.
 */
#ifndef AFD_LIB_SLICE_H
#define AFD_LIB_SLICE_H

#include <afd/ffn.h>

#include "../device/device.h"
#include "fingerprint.h"
#include "shard.h"

/* What is the same for all slices that a stage loads. */
struct afd__loader {
	struct afd_context *ctx;
	struct afd__device *device;
	const struct afd_model *model;
	struct afd__fingerprint *fingerprint; /* NULL: nobody asks for it */
	afd_progress progress;
	void *progress_user;
	uint64_t done_bytes, total_bytes;
	bool in_place; /* asked for */
	void *columns; /* [columns_bytes]: rows of a slice that are no whole rows of their tensor */
	size_t columns_bytes;
};

/* A part of a matrix, and the whole of it where that is all. */
struct afd__slice {
	struct afd__tensor tensor;
	struct afd__range rows, columns;
};

static inline struct afd__slice afd__slice_whole(const struct afd__tensor *t)
{
	return (struct afd__slice){ *t, { 0, (uint32_t)t->shape[0] },
				    { 0, (uint32_t)t->shape[1] } };
}

void afd__loader_report(struct afd__loader *ld, uint64_t bytes);
/* Frees what it needed on the way, and gives mapped pages back when weights were packed. */
void afd__loader_end(struct afd__loader *ld);

/* Where the slice lies row behind row, for use in place; NULL: it does not. */
const void *afd__slice_rows(const struct afd__slice *slice);
/* True when rows from `row0` of a matrix on may mix scales in a panel, as up's do behind gate. */
bool afd__slice_mixes(const struct afd__slice *slice, uint32_t row0);
/* As rows row0 .. of a matrix the slice's blocks of scales begin at multiples of 128 rows. */
bool afd__slice_keeps_blocks(const struct afd__slice *slice, uint32_t row0);
/* Into rows row0 .. of the matrix, which takes the numbers only when it is packed, and into the
 * fingerprint: the slice's data stays until its value was taken. */
int afd__slice_load(struct afd__loader *ld, const struct afd__slice *slice,
		    struct afd__matrix *matrix, uint32_t row0);
/* Makes a matrix of one slice and loads it. */
int afd__slice_matrix(struct afd__loader *ld, const struct afd__slice *slice, bool in_place,
		      struct afd__matrix *matrix);

#endif
