/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loading, for the files that do it: load.c goes through the layers, experts.c through the experts
 * of one, slices.c brings a slice of a tensor to where it is used. What a slice is, is decided by
 * the shard alone; every byte of it is read once.
 */
#ifndef AFD_LIB_FFN_LOAD_H
#define AFD_LIB_FFN_LOAD_H

#include "stage.h"

#include "../model/fingerprint.h"

struct afd__ffn_loader {
	struct afd_ffn *ffn;
	const struct afd_model *model;
	struct afd__fingerprint *fingerprint; /* NULL: the host has stated it */
	afd_progress progress;
	void *progress_user;
	uint64_t done_bytes, total_bytes;
	bool in_place; /* asked for */
	void *columns; /* [columns_bytes]: rows of a slice that are no whole rows of their tensor */
	size_t columns_bytes;
};

/* A part of a tensor, and the whole of it where that is all. */
struct afd__ffn_slice {
	struct afd__tensor tensor;
	struct afd__range rows, columns;
};

static inline uint32_t afd__range_size(struct afd__range r)
{
	return r.end - r.begin;
}

static inline struct afd__ffn_slice afd__ffn_whole(const struct afd__tensor *t)
{
	return (struct afd__ffn_slice){ *t, { 0, (uint32_t)t->shape[0] },
		{ 0, (uint32_t)t->shape[1] } };
}

/* slices.c: where the slice lies row behind row, for use in place; NULL: it does not. */
const void *afd__ffn_slice_rows(const struct afd__ffn_slice *slice);
/* Reads the slice once: into rows row0 .. of the matrix, which takes the numbers only when it is
 * packed, and into the fingerprint. */
int afd__ffn_load_slice(struct afd__ffn_loader *ld, const struct afd__ffn_slice *slice,
	struct afd__matrix *matrix, uint32_t row0);
/* Makes a matrix of one slice. */
int afd__ffn_make_matrix(struct afd__ffn_loader *ld, const struct afd__ffn_slice *slice,
	bool in_place, struct afd__matrix *matrix);
/* True when rows from `row0` of a matrix on may mix scales in a panel, as up's do behind gate. */
bool afd__ffn_mixes(const struct afd__ffn_slice *slice, uint32_t row0);
void afd__ffn_report(struct afd__ffn_loader *ld, uint64_t bytes);

/* experts.c: the stacks of a routed layer. */
int afd__ffn_load_experts(struct afd__ffn_loader *ld, uint32_t index, struct afd__ffn_layer *layer);

#endif
