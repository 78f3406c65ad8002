/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernels of products share: the product as numbers and pointers, and where the scale of a
 * block stands.
 */
#ifndef AFD_KERNELS_CUDA_PRODUCT_H
#define AFD_KERNELS_CUDA_PRODUCT_H

#include "dispatch.h"

enum { GPU_BLOCK = AFD__SCALE_ROWS, GPU_PANEL = 32 }; /* rows that share a row of scales */

struct product {
	const float *x;    /* [n_rows][x_stride] */
	const char *w;     /* [n][k], rows w_row_bytes apart */
	const float *bias; /* [n], or NULL */
	float *y;          /* [n_rows][y_stride] */
	size_t x_stride, y_stride, w_row_bytes;
	uint32_t n_rows, n, k;
	int32_t dtype;
	/* of FP8 */
	const float *scales; /* [n / 32][n_blocks][1, or 32 when mixed] */
	uint32_t column_offset, n_blocks, mixed;
};

static inline struct product product_of(const struct afd__matrix *w)
{
	struct product p = {};

	p.w = (const char *)w->data;
	p.w_row_bytes = matrix_row_bytes(w);
	p.n = w->n;
	p.k = w->k;
	p.dtype = w->dtype;
	p.scales = w->scales;
	p.column_offset = w->column_offset;
	p.n_blocks = afd__scale_columns(w->column_offset, w->k);
	p.mixed = (uint32_t)w->mixed_panels;
	return p;
}

/* Of row n of w and a block of columns. */
GPU_FN const float *scale_at(const struct product &p, unsigned n, unsigned block)
{
	size_t at = (size_t)(n / GPU_PANEL) * p.n_blocks + block;

	return p.scales + (p.mixed ? at * GPU_PANEL + n % GPU_PANEL : at);
}

#endif
