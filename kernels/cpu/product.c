/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product in plain C: the reference. One accumulator per (row, column), k ascending, fused
 * multiply-add; in place 16 lanes. It shares no code with the variants, so that an agreement of
 * bits says something.
 */
#include "product.h"

#include <math.h>

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

void afd_k_product_c(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	size_t panel_bytes = afd_k_packed_bytes(AFD_K_PANEL, a->w.k, a->w.dtype);

	for (uint32_t row = 0; row < a->n_rows; row++) {
		const float *x = a->x + row * a->x_stride;
		float *y = a->y + row * a->y_stride;

		for (uint32_t n = n0; n < n1; n += AFD_K_PANEL) {
			uint32_t n_columns = n1 - n < AFD_K_PANEL ? n1 - n : AFD_K_PANEL;

			product_panel(x, (const char *)a->w.data + n / AFD_K_PANEL * panel_bytes,
				a->w.k, a->w.dtype, y + n, n_columns);
			for (uint32_t j = 0; a->bias && j < n_columns; j++)
				y[n + j] += a->bias[n + j];
		}
	}
}

/* Numbers beyond k count as 0 in both factors. */
static float dot_lanes(const float *x, const void *w, size_t w0, uint32_t n_k, int32_t dtype)
{
	float lane[LANES] = { 0 };

	for (uint32_t k = 0; k < n_k; k += LANES) {
		for (uint32_t i = 0; i < LANES; i++)
			lane[i] = k + i < n_k ? fmaf(x[k + i], afd_k_float_at(w, w0 + k + i, dtype),
							lane[i])
					      : fmaf(0, 0, lane[i]);
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
			float sum = dot_lanes(a->x + row * a->x_stride, a->w.data,
				(size_t)n * a->w.k, a->w.k, a->w.dtype);

			a->y[row * a->y_stride + n] = a->bias ? sum + a->bias[n] : sum;
		}
	}
}
