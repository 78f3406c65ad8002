/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product in plain C: the reference. One accumulator per (row, column), k ascending, fused
 * multiply-add; in place 16 lanes. It shares no code with the variants, so that an agreement of
 * bits says something.
 */
#include "product.h"

#include <math.h>
#include <string.h>

#include "number.h"

#define LANES 16

/* Where column j of a panel stands among the 32 numbers of one k: bf16 pairs column c with c + 16.
 */
static uint32_t place_of(uint32_t j, int32_t dtype)
{
	return dtype != AFD_DTYPE_BF16 ? j : j < 16 ? 2 * j : 2 * (j - 16) + 1;
}

/* Columns n .. n+n_columns-1 of one row; panel is [k][32]. */
static void product_panel(const float *x, const void *panel, uint32_t n_k, int32_t dtype,
	float *acc, uint32_t n_columns)
{
	for (uint32_t j = 0; j < n_columns; j++)
		acc[j] = 0;
	for (size_t k = 0; k < n_k; k++) {
		for (uint32_t j = 0; j < n_columns; j++)
			acc[j] = fmaf(x[k],
				afd_k_float_at(panel, k * AFD_K_PANEL + place_of(j, dtype), dtype),
				acc[j]);
	}
}

/* The scales of the panel of column n at k, and where k's block ends. */
struct scale_at {
	const float *scales; /* of the panel and the block */
	uint32_t stride, end;
};

static struct scale_at find_scale(const struct afd__matrix *w, uint32_t n, uint32_t k)
{
	uint32_t n_blocks = afd__scale_columns(w->column_offset, w->k),
		 block = (w->column_offset + k) / AFD__SCALE_ROWS,
		 width = w->mixed_panels ? AFD_K_PANEL : 1;
	uint64_t end = (uint64_t)(block + 1) * AFD__SCALE_ROWS - w->column_offset;

	return (struct scale_at){
		.scales = w->scales + ((size_t)(n / AFD_K_PANEL) * n_blocks + block) * width,
		.stride = w->mixed_panels,
		.end = end < w->k ? (uint32_t)end : w->k,
	};
}

/* Columns n .. of one row, FP8; panel is [w->k][32]. */
static void product_panel_fp8(const float *x, const struct afd__matrix *w, const char *panel,
	uint32_t n, float *y, uint32_t n_columns)
{
	float sum[AFD_K_PANEL];
	struct scale_at at;

	for (uint32_t j = 0; j < n_columns; j++)
		y[j] = 0;
	for (uint32_t k = 0; k < w->k; k = at.end) {
		at = find_scale(w, n, k);
		product_panel(x + k, panel + (size_t)k * AFD_K_PANEL, at.end - k, w->dtype, sum,
			n_columns);
		for (uint32_t j = 0; j < n_columns; j++)
			y[j] = fmaf(sum[j], at.scales[j * at.stride], y[j]);
	}
}

void afd_k_product_c(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	size_t panel_bytes = afd_k_packed_bytes(AFD_K_PANEL, a->w.k, a->w.dtype);

	for (uint32_t row = 0; row < a->n_rows; row++) {
		const float *x = a->x + row * a->x_stride;
		float *y = a->y + row * a->y_stride;

		for (uint32_t n = n0; n < n1; n += AFD_K_PANEL) {
			uint32_t n_columns = n1 - n < AFD_K_PANEL ? n1 - n : AFD_K_PANEL;

			const char *panel =
				(const char *)a->w.data + n / AFD_K_PANEL * panel_bytes;

			if (a->w.dtype == AFD_DTYPE_FP8)
				product_panel_fp8(x, &a->w, panel, n, y + n, n_columns);
			else
				product_panel(x, panel, a->w.k, a->w.dtype, y + n, n_columns);
			for (uint32_t j = 0; a->bias && j < n_columns; j++)
				y[n + j] += a->bias[n + j];
		}
	}
}

/* lane[i] += the numbers of k = i mod 16; those beyond n_k count as 0 in both factors. */
static void add_lanes(
	float *lane, const float *x, const void *w, size_t w0, uint32_t n_k, int32_t dtype)
{
	for (uint32_t k = 0; k < n_k; k += LANES) {
		for (uint32_t i = 0; i < LANES; i++)
			lane[i] = k + i < n_k ? fmaf(x[k + i], afd_k_float_at(w, w0 + k + i, dtype),
							lane[i])
					      : fmaf(0, 0, lane[i]);
	}
}

static float dot(const float *x, const struct afd__matrix *w, uint32_t n)
{
	float lane[LANES] = { 0 }, sum[LANES];
	size_t w0 = (size_t)n * w->k;
	struct scale_at at;

	if (w->dtype != AFD_DTYPE_FP8)
		add_lanes(lane, x, w->data, w0, w->k, w->dtype);
	for (uint32_t k = 0; w->dtype == AFD_DTYPE_FP8 && k < w->k; k = at.end) {
		at = find_scale(w, n, k);
		memset(sum, 0, sizeof(sum));
		add_lanes(sum, x + k, w->data, w0 + k, at.end - k, w->dtype);
		for (uint32_t i = 0; i < LANES; i++)
			lane[i] = fmaf(sum[i], at.scales[n % AFD_K_PANEL * at.stride], lane[i]);
	}
	for (uint32_t half = LANES / 2; half; half /= 2) {
		for (uint32_t i = 0; i < half; i++)
			lane[i] += lane[i + half];
	}
	return lane[0];
}

void afd_k_product_in_place_c(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	for (uint32_t row = 0; row < a->n_rows; row++) {
		for (uint32_t n = n0; n < n1; n++) {
			float sum = dot(a->x + row * a->x_stride, &a->w, n);

			a->y[row * a->y_stride + n] = a->bias ? sum + a->bias[n] : sum;
		}
	}
}
