/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Brings a slice of a tensor to where it is used: packed onto the device, or left where it lies.
 * The fingerprint is taken in the same pass with one compute thread, block by block, while the block
 * is in the cache; with more, of several slices side by side, since one hash cannot keep up with a
 * device. Called by the loaders of both stages at creation.
 */
#include "slice.h"

#include <string.h>

#include "checkpoint.h"

enum {
	BLOCK_BYTES = 4 << 20,
	BLOCK_ROWS = 32, /* a multiple of them: packing likes whole panels */
};

void afd__loader_report(struct afd__loader *ld, uint64_t bytes)
{
	ld->done_bytes += bytes;
	if (ld->progress)
		ld->progress(ld->progress_user, ld->done_bytes, ld->total_bytes);
}

void afd__loader_end(struct afd__loader *ld)
{
	afd__free(ld->columns);
	ld->columns = NULL;
	ld->columns_bytes = 0;
	/* A fault maps its neighbourhood, too, and so brought back pages of tensors that were done. */
	if (!ld->in_place)
		afd__checkpoint_release(ld->model->checkpoint);
}

static bool has_all_columns(const struct afd__slice *slice)
{
	return afd__range_size(slice->columns) == slice->tensor.shape[1];
}

/* Row `row` of the slice, from its first column on. */
static const char *row_at(const struct afd__slice *slice, uint32_t row)
{
	size_t at =
		(size_t)(slice->rows.begin + row) * slice->tensor.shape[1] + slice->columns.begin;

	return (const char *)slice->tensor.data + at * afd_dtype_bytes(slice->tensor.dtype);
}

const void *afd__slice_rows(const struct afd__slice *slice)
{
	return has_all_columns(slice) ? row_at(slice, 0) : NULL;
}

/* ---- scales ---- */

/* Blocks of 128 that numbers from begin to end fall into. */
static uint64_t n_blocks(uint64_t begin, uint64_t end)
{
	return (end + AFD__SCALE_BLOCK - 1) / AFD__SCALE_BLOCK - begin / AFD__SCALE_BLOCK;
}

static uint64_t scale_bytes(const struct afd__slice *slice)
{
	const struct afd__scales *s = &slice->tensor.scales;
	uint64_t offset = s->row_offset;

	if (!s->rows)
		return 0;
	return n_blocks(offset + slice->rows.begin, offset + slice->rows.end) *
	       n_blocks(slice->columns.begin, slice->columns.end) * afd_dtype_bytes(s->dtype);
}

bool afd__slice_mixes(const struct afd__slice *slice, uint32_t row0)
{
	uint64_t row = (uint64_t)slice->tensor.scales.row_offset + slice->rows.begin;

	return slice->tensor.dtype == AFD_DTYPE_FP8 && (row0 % BLOCK_ROWS || row % BLOCK_ROWS);
}

bool afd__slice_keeps_blocks(const struct afd__slice *slice, uint32_t row0)
{
	uint64_t row = (uint64_t)slice->tensor.scales.row_offset + slice->rows.begin;

	return slice->tensor.dtype == AFD_DTYPE_FP8 && row0 % AFD__SCALE_ROWS == 0 &&
	       row % AFD__SCALE_ROWS == 0;
}

static int load_scales(struct afd__loader *ld, const struct afd__slice *slice,
	struct afd__matrix *matrix, uint32_t row0)
{
	const struct afd__scales *s = &slice->tensor.scales;
	const struct afd__scale_blocks blocks = {
		.data = s->data,
		.n_rows = s->rows,
		.n_columns = s->columns,
		.dtype = s->dtype,
		.row_offset = (uint64_t)s->row_offset + slice->rows.begin,
		.column_offset = slice->columns.begin,
	};

	if (!s->rows)
		return 0;
	return afd__matrix_load_scales(
		ld->device, matrix, &blocks, row0, afd__range_size(slice->rows));
}

/* ---- numbers ---- */

/* Room for the rows of a block whose columns are a part. */
static int make_room(struct afd__loader *ld, size_t bytes)
{
	if (bytes <= ld->columns_bytes)
		return 0;
	afd__free(ld->columns);
	ld->columns_bytes = 0;
	ld->columns = afd__alloc(ld->ctx, 1, bytes);
	if (!ld->columns)
		return -ENOMEM;
	ld->columns_bytes = bytes;
	return 0;
}

/* Rows `first` .. of the slice one behind the other. */
static const void *block_at(struct afd__loader *ld, const struct afd__slice *slice,
	uint32_t first, uint32_t n_rows, size_t row_bytes)
{
	uint32_t i;

	if (has_all_columns(slice))
		return row_at(slice, first);
	for (i = 0; i < n_rows; i++)
		memcpy((char *)ld->columns + i * row_bytes, row_at(slice, first + i), row_bytes);
	return ld->columns;
}

/* fp: takes the numbers in the same pass; NULL: nobody does. */
static int load_numbers(struct afd__loader *ld, const struct afd__slice *slice,
	struct afd__matrix *matrix, uint32_t row0, struct afd__fingerprint *fp)
{
	bool packed = matrix->layout == AFD__LAYOUT_PACKED;
	uint32_t n_rows = afd__range_size(slice->rows), first, n;
	size_t row_bytes = afd__range_size(slice->columns) * afd_dtype_bytes(slice->tensor.dtype);
	uint32_t block_rows = (uint32_t)(BLOCK_BYTES / row_bytes / BLOCK_ROWS + 1) * BLOCK_ROWS;
	int rc = 0;

	if (block_rows > n_rows)
		block_rows = n_rows;
	if (!has_all_columns(slice))
		rc = make_room(ld, block_rows * row_bytes);
	for (first = 0; first < n_rows && !rc; first += n) {
		const void *rows = NULL;

		n = n_rows - first < block_rows ? n_rows - first : block_rows;
		if (packed || fp)
			rows = block_at(ld, slice, first, n, row_bytes);
		if (fp)
			afd__fingerprint_add(fp, rows, n * row_bytes);
		if (packed)
			rc = afd__matrix_load(ld->device, matrix, rows, row0 + first, n);
		afd__loader_report(ld, n * row_bytes);
	}
	return rc;
}

int afd__slice_load(struct afd__loader *ld, const struct afd__slice *slice,
	struct afd__matrix *matrix, uint32_t row0)
{
	const uint64_t begin[2] = { slice->rows.begin, slice->columns.begin };
	const uint64_t end[2] = { slice->rows.end, slice->columns.end };
	bool packed = matrix->layout == AFD__LAYOUT_PACKED;
	bool later = ld->fingerprint && afd__fingerprint_later(ld->fingerprint, &slice->tensor,
						begin, end, packed);
	struct afd__fingerprint *fp = later ? NULL : ld->fingerprint;
	int rc;

	if (fp)
		afd__fingerprint_begin(fp, &slice->tensor, begin, end);
	rc = load_numbers(ld, slice, matrix, row0, fp);
	if (fp) {
		afd__fingerprint_end(fp);
		afd__fingerprint_scales(fp, &slice->tensor, begin, end);
	}
	if (!rc)
		rc = load_scales(ld, slice, matrix, row0);
	if (rc)
		return afd__error_prefix(rc, "%s", slice->tensor.name);
	if (slice->tensor.scales.rows)
		afd__loader_report(ld, scale_bytes(slice));
	if (packed && !later)
		afd__model_release(&slice->tensor);
	return 0;
}

int afd__slice_matrix(struct afd__loader *ld, const struct afd__slice *slice,
	bool in_place, struct afd__matrix *matrix)
{
	const struct afd__matrix_shape shape = {
		.n = afd__range_size(slice->rows),
		.k = afd__range_size(slice->columns),
		.dtype = slice->tensor.dtype,
		.column_offset = slice->columns.begin,
		.mixed_panels = afd__slice_mixes(slice, 0),
		.whole_blocks = afd__slice_keeps_blocks(slice, 0),
	};
	int rc = afd__matrix_create_stack(
		ld->device, matrix, &shape, in_place ? afd__slice_rows(slice) : NULL);

	if (rc)
		return afd__error_prefix(rc, "%s", slice->tensor.name);
	return afd__slice_load(ld, slice, matrix, 0);
}
