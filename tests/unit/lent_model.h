/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Models from memory for tests, tensor by tensor: a test lends what it wants under the names it wants. Every number says which
 * matrix it is of and where it stands in it, so that a slice of a fused tensor can be compared with the matrix itself.
 */
#ifndef AFD_TEST_LENT_MODEL_H
#define AFD_TEST_LENT_MODEL_H

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <afd/model.h>

enum { LENT_MAX = 400 };

struct lent_model {
	struct afd_tensor tensors[LENT_MAX];
	char names[LENT_MAX][128];
	uint64_t shapes[LENT_MAX][4];
	unsigned n;
};

static inline size_t lent_number_bytes(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 ? 4 : dtype == AFD_DTYPE_FP8 ? 1 : 2;
}

/* A tensor of zeros; its data, for the test to fill. Dimensions of 0 end the shape. */
static inline void *lend(struct lent_model *m, int32_t dtype, uint64_t a, uint64_t b, uint64_t c, const char *format, ...)
{
	struct afd_tensor *t = &m->tensors[m->n];
	uint64_t *shape = m->shapes[m->n], n = a * (b ? b : 1) * (c ? c : 1);
	va_list args;
	void *data;

	if (m->n == LENT_MAX)
		abort();
	va_start(args, format);
	vsnprintf(m->names[m->n], sizeof(m->names[0]), format, args);
	va_end(args);
	shape[0] = a;
	shape[1] = b;
	shape[2] = c;
	data = aligned_alloc(64, (n * lent_number_bytes(dtype) + 63) / 64 * 64);
	if (!data)
		abort();
	memset(data, 0, n * lent_number_bytes(dtype));
	*t = (struct afd_tensor){ .name = m->names[m->n], .shape = shape, .data = data, .dtype = dtype };
	t->n_dims = c ? 3 : b ? 2 : 1;
	m->n++;
	return data;
}

/* A number of matrix `which` in a dtype, as its bytes: they count up from a start of its own. */
static inline void put_number(void *data, uint64_t at, int32_t dtype, unsigned which, uint64_t index)
{
	uint32_t value = which * 977 + (uint32_t)index * 31;
	float number = (float)(value % 65536);

	if (dtype == AFD_DTYPE_F32)
		((float *)data)[at] = number;
	else if (dtype == AFD_DTYPE_FP8)
		((uint8_t *)data)[at] = (uint8_t)(value & 0x77);
	else
		((uint16_t *)data)[at] = (uint16_t)(value & 0x3fff);
}

/* Rows row0 .. of [rows][columns] at data, as matrix `which`. */
static inline void put_matrix(void *data, int32_t dtype, unsigned which, uint64_t rows, uint64_t columns)
{
	uint64_t i;

	for (i = 0; i < rows * columns; i++)
		put_number(data, i, dtype, which, i);
}

static inline int open_lent(afd_model **model, afd_context *ctx, const struct lent_model *m, const char *config)
{
	struct afd_model_params p = { .size = sizeof(p), .config_json = config, .tensors = m->tensors, .n_tensors = m->n,
				      .tensor_bytes = sizeof(m->tensors[0]) };

	return afd_model_open(model, ctx, NULL, &p);
}

static inline void free_lent(struct lent_model *m)
{
	while (m->n)
		free((void *)m->tensors[--m->n].data);
}

#endif
