/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product with FP8 weights as the checkpoint has them: a dot of 16 lanes per (row, column) and
 * block of scales, one source for AVX2 and AVX-512. The lanes and the tree that adds them are those
 * of the other dtypes; a lane counts from the beginning of its block.
 */
#include "product.h"
#include "vec.h"

#define SUMS    16
#define N_VECS  (SUMS / LANES)
#define ROWS    2 /* of x in a tile */
#define COLUMNS 4 /* of y in a tile: as many streams of weights */

struct tile {
	const struct afd__product_args *a;
	uint32_t row, n;
};

/* The sums of one block of n_k. */
INLINE void add_block(vec sum[][COLUMNS][N_VECS], const float *x, size_t x_stride,
	const uint8_t *w, size_t w_stride, uint32_t n_k, const int n_rows, const int n_columns)
{
	for (uint32_t k = 0; k < n_k; k += SUMS) {
		for (int i = 0; i < N_VECS; i++) {
			uint32_t at = k + i * LANES, left = at < n_k ? n_k - at : 0;
			vec x16[ROWS];

			for (int r = 0; r < n_rows; r++)
				x16[r] = vec_load_some(
					x + r * x_stride + at, AFD_DTYPE_F32, left);
			for (int c = 0; c < n_columns; c++) {
				vec w16 = vec_load_some(
					w + c * w_stride + at, AFD_DTYPE_FP8, left);

				for (int r = 0; r < n_rows; r++)
					sum[r][c][i] = vec_fma(x16[r], w16, sum[r][c][i]);
			}
		}
	}
}

/* Halves onto each other: 8, 4, 2, 1. */
INLINE float add_lanes(const vec *v)
{
	float lane[SUMS];

	memcpy(lane, v, sizeof(lane));
	for (int half = SUMS / 2; half; half /= 2) {
		for (int i = 0; i < half; i++)
			lane[i] += lane[i + half];
	}
	return lane[0];
}

INLINE void run_tile(const struct tile *t, const int n_rows, const int n_columns)
{
	const struct afd__product_args *a = t->a;
	const struct afd__matrix *w = &a->w;
	const uint32_t n_blocks = afd__scale_columns(w->column_offset, w->k),
		       width = w->mixed_panels ? AFD_K_PANEL : 1;
	const uint8_t *rows = (const uint8_t *)w->data + (size_t)t->n * w->k;
	vec acc[ROWS][COLUMNS][N_VECS] = { 0 };
	uint32_t k = 0;

	for (uint32_t b = 0; b < n_blocks; b++) {
		uint64_t end = (uint64_t)(b + 1) * AFD__SCALE_ROWS - w->column_offset;
		uint32_t n_k = (end < w->k ? (uint32_t)end : w->k) - k;
		vec sum[ROWS][COLUMNS][N_VECS] = { 0 };

		add_block(sum, a->x + t->row * a->x_stride + k, a->x_stride, rows + k, w->k, n_k,
			n_rows, n_columns);
		for (int c = 0; c < n_columns; c++) {
			uint32_t n = t->n + c;
			vec scale = vec_splat(
				w->scales[((size_t)(n / AFD_K_PANEL) * n_blocks + b) * width +
					  n % width]);

			for (int r = 0; r < n_rows; r++) {
				for (int i = 0; i < N_VECS; i++)
					acc[r][c][i] = vec_fma(sum[r][c][i], scale, acc[r][c][i]);
			}
		}
		k += n_k;
	}
	for (int r = 0; r < n_rows; r++) {
		for (int c = 0; c < n_columns; c++) {
			float y = add_lanes(acc[r][c]);

			a->y[(t->row + r) * a->y_stride + t->n + c] =
				a->bias ? y + a->bias[t->n + c] : y;
		}
	}
}

INLINE void run_rows(const struct afd__product_args *a, uint32_t n, const int n_columns)
{
	struct tile t = { .a = a, .n = n };

	for (; a->n_rows - t.row >= ROWS; t.row += ROWS)
		run_tile(&t, ROWS, n_columns);
	if (t.row < a->n_rows)
		run_tile(&t, 1, n_columns);
}

void AFD_K(product_in_place_fp8)(const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	for (; n1 - n0 >= COLUMNS; n0 += COLUMNS)
		run_rows(a, n0, COLUMNS);
	for (; n0 < n1; n0++)
		run_rows(a, n0, 1);
}
