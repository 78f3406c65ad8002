/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Matrices of the front door: their shapes checked, their memory, and what is loaded into them.
 *
 * Invariant: a matrix either borrows its weights (in place) or owns them (packed); scales are always
 * its own, and there exactly when the dtype is FP8. A stack is one piece of memory for all its
 * matrices, so that it costs one allocation however many experts there are.
 *
 * Called by the stages when they are made.
 */
#include <assert.h>
#include <string.h>

#include "../../kernels/cpu/kernels.h"
#include "backends.h"

#define ALIGNMENT 64

/* Not SIZE_MAX, and aligned. */
static size_t align_up(size_t bytes)
{
	return bytes > SIZE_MAX - ALIGNMENT ? SIZE_MAX : (bytes + ALIGNMENT - 1) & -(size_t)ALIGNMENT;
}

static size_t times(size_t a, size_t b)
{
	size_t product;

	return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

static uint32_t stack_of(const struct afd__matrix_shape *shape)
{
	return shape->n_stack ? shape->n_stack : 1;
}

/* Of one matrix. */
static size_t packed_bytes(struct afd__device *dev, const struct afd__matrix_shape *shape)
{
	size_t bytes = dev->ops->matrix_bytes(dev, shape->n, shape->k, shape->dtype);

	return shape->n_stack ? align_up(bytes) : bytes;
}

static size_t scale_bytes(const struct afd__matrix_shape *shape)
{
	size_t n_panels = ((size_t)shape->n + AFD_K_PANEL - 1) / AFD_K_PANEL;
	uint32_t offset = shape->column_offset % AFD__SCALE_ROWS;

	if (shape->dtype != AFD_DTYPE_FP8)
		return 0;
	return times(n_panels * (shape->mixed_panels ? AFD_K_PANEL : 1) * sizeof(float),
		afd__scale_columns(offset, shape->k));
}

size_t afd__matrix_shape_bytes(struct afd__device *dev, const struct afd__matrix_shape *shape)
{
	size_t data = times(packed_bytes(dev, shape), stack_of(shape)),
	       scales = times(scale_bytes(shape), stack_of(shape));

	return data > SIZE_MAX - scales ? SIZE_MAX : data + scales;
}

static int check_shape(const struct afd__matrix_shape *shape, const void *rows)
{
	size_t number_bytes = afd_dtype_bytes(shape->dtype);

	if (!shape->n || !shape->k)
		return afd__error(-EINVAL, "matrix: %u x %u, no dimension may be 0", shape->n,
			shape->k);
	if (shape->dtype < AFD_DTYPE_F32 || shape->dtype > AFD_DTYPE_FP8)
		return afd__error(-EINVAL, "matrix: dtype %d is none of f32, bf16, f16, fp8",
			shape->dtype);
	if (shape->mixed_panels < 0 || shape->mixed_panels > 1)
		return afd__error(
			-EINVAL, "matrix: mixed_panels %d, limit 0 to 1", shape->mixed_panels);
	if (shape->whole_blocks < 0 || shape->whole_blocks > 1)
		return afd__error(
			-EINVAL, "matrix: whole_blocks %d, limit 0 to 1", shape->whole_blocks);
	if ((uintptr_t)rows % number_bytes)
		return afd__error(-EINVAL, "matrix: rows in place at %p, not aligned to %zu bytes",
			rows, number_bytes);
	return 0;
}

static int alloc_memory(struct afd__device *dev, struct afd__matrix *m)
{
	int rc = 0;

	if (m->layout == AFD__LAYOUT_PACKED)
		rc = afd__device_alloc(dev, m->bytes, "packed weights", &m->data);
	if (rc || !m->scales_bytes)
		return rc;
	rc = afd__device_alloc(dev, m->scales_bytes, "scales of weights", (void **)&m->scales);
	if (rc && m->layout == AFD__LAYOUT_PACKED)
		afd__device_free(dev, m->data, m->bytes);
	return rc;
}

int afd__matrix_create_stack(struct afd__device *dev, struct afd__matrix *out,
	const struct afd__matrix_shape *shape, const void *rows)
{
	struct afd__matrix m = { .n = shape->n,
		.k = shape->k,
		.dtype = shape->dtype,
		.n_stack = shape->n_stack,
		.data = (void *)rows,
		.layout = rows ? AFD__LAYOUT_IN_PLACE : AFD__LAYOUT_PACKED };
	int rc = check_shape(shape, rows);

	if (rc)
		return rc;
	m.data_stride = rows ? times((size_t)m.n * m.k, afd_dtype_bytes(m.dtype))
			     : packed_bytes(dev, shape);
	m.bytes = times(m.data_stride, stack_of(shape));
	if (m.dtype == AFD_DTYPE_FP8) {
		m.mixed_panels = shape->mixed_panels;
		m.whole_blocks = shape->whole_blocks;
		m.column_offset = shape->column_offset % AFD__SCALE_ROWS;
		m.scales_stride = scale_bytes(shape);
		m.scales_bytes = times(m.scales_stride, stack_of(shape));
	}
	if (m.bytes > SIZE_MAX / 2 || m.scales_bytes > SIZE_MAX / 2)
		return afd__error(-EINVAL, "matrix: %u of %u x %u overflow", stack_of(shape), m.n,
			m.k);
	rc = alloc_memory(dev, &m);
	if (!rc)
		*out = m;
	return rc;
}

int afd__matrix_create(struct afd__device *dev, struct afd__matrix *out, uint32_t n, uint32_t k,
	int32_t dtype, const void *rows)
{
	struct afd__matrix_shape shape = { .n = n, .k = k, .dtype = dtype };

	return afd__matrix_create_stack(dev, out, &shape, rows);
}

struct afd__matrix afd__matrix_at(const struct afd__matrix *stack, uint32_t i)
{
	struct afd__matrix m = *stack;

	assert(i < (stack->n_stack ? stack->n_stack : 1));
	m.data = (char *)m.data + i * m.data_stride;
	if (m.scales)
		m.scales = (float *)((char *)m.scales + i * m.scales_stride);
	m.n_stack = 0;
	return m;
}

void afd__matrix_destroy(struct afd__device *dev, struct afd__matrix *m)
{
	if (m->layout == AFD__LAYOUT_PACKED)
		afd__device_free(dev, m->data, m->bytes);
	afd__device_free(dev, m->scales, m->scales_bytes);
	memset(m, 0, sizeof(*m));
}

struct afd__inputs afd__matrix_inputs(
	struct afd__device *dev, const struct afd__matrix *m, bool quantize)
{
	return (struct afd__inputs){
		.row_bytes = dev->ops->input_row_bytes ? dev->ops->input_row_bytes(dev, m) : 0,
		.dtype = m->dtype,
		.column_offset = m->column_offset,
		.quantize = quantize && m->dtype == AFD_DTYPE_FP8,
	};
}

/* ---- loading ---- */

static int check_rows(
	const struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows)
{
	if (m->n_stack)
		return afd__error(-EINVAL, "matrix: one of the stack's %u is loaded, not all",
			m->n_stack);
	if (!rows || (uint64_t)row0 + n_rows > m->n)
		return afd__error(-EINVAL, "matrix: rows %u .. %llu at %p, it has %u", row0,
			(unsigned long long)row0 + n_rows, rows, m->n);
	return 0;
}

int afd__matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows,
	uint32_t row0, uint32_t n_rows)
{
	int rc;

	if (!m->data || m->layout != AFD__LAYOUT_PACKED)
		return afd__error(
			-EINVAL, "matrix: only packed ones are loaded, layout is %d", m->layout);
	rc = check_rows(m, rows, row0, n_rows);
	return rc || !n_rows ? rc : dev->ops->matrix_load(dev, m, rows, row0, n_rows);
}

/* The blocks must cover the rows, and agree with the matrix where a panel takes its scale. */
static int check_blocks(const struct afd__matrix *m, const struct afd__scale_blocks *b,
	uint32_t row0, uint32_t n_rows)
{
	uint64_t end = (uint64_t)row0 + n_rows, rows, columns;

	if (b->dtype < AFD_DTYPE_F32 || b->dtype > AFD_DTYPE_F16)
		return afd__error(
			-EINVAL, "scales: dtype %d is none of f32, bf16, f16", b->dtype);
	if (__builtin_add_overflow(b->row_offset, n_rows, &rows) ||
		__builtin_add_overflow(b->column_offset, m->k, &columns) ||
		rows > (uint64_t)b->n_rows * AFD__SCALE_ROWS ||
		columns > (uint64_t)b->n_columns * AFD__SCALE_ROWS)
		return afd__error(-EINVAL,
			"scales: %u x %u blocks of 128 x 128 do not cover %u x %u from (%llu, %llu)",
			b->n_rows, b->n_columns, n_rows, m->k, (unsigned long long)b->row_offset,
			(unsigned long long)b->column_offset);
	if (b->column_offset % AFD__SCALE_ROWS != m->column_offset)
		return afd__error(-EINVAL,
			"scales: column_offset %llu, the matrix begins at column %u of a block",
			(unsigned long long)b->column_offset, m->column_offset);
	if (!m->mixed_panels && (row0 % AFD_K_PANEL || b->row_offset % AFD_K_PANEL ||
					(end % AFD_K_PANEL && end != m->n)))
		return afd__error(-EINVAL,
			"scales: rows %u .. %llu at row_offset %llu mix scales in a panel of %d",
			row0, (unsigned long long)end, (unsigned long long)b->row_offset,
			AFD_K_PANEL);
	if (m->whole_blocks && (row0 % AFD__SCALE_ROWS || b->row_offset % AFD__SCALE_ROWS ||
				       (end % AFD__SCALE_ROWS && end != m->n)))
		return afd__error(-EINVAL,
			"scales: rows %u .. %llu at row_offset %llu are no whole blocks of %d", row0,
			(unsigned long long)end, (unsigned long long)b->row_offset,
			AFD__SCALE_ROWS);
	return 0;
}

int afd__matrix_load_scales(struct afd__device *dev, struct afd__matrix *m,
	const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows)
{
	int rc;

	if (!m->scales)
		return afd__error(-EINVAL, "scales: a matrix of %s has none",
			afd_dtype_name(m->dtype));
	rc = check_rows(m, blocks->data, row0, n_rows);
	if (!rc)
		rc = check_blocks(m, blocks, row0, n_rows);
	return rc || !n_rows ? rc : dev->ops->scales_load(dev, m, blocks, row0, n_rows);
}
