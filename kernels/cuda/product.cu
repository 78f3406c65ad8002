/* SPDX-License-Identifier: Apache-2.0 */
/*
 * y = x w^T + bias: on tensor cores (tile.h), or, for weights in float32 and rows that do not lie at
 * multiples of 16 bytes, the plain product here, a warp per column, in float32. There a lane takes
 * every 32nd number of k, FP8 by blocks of scales.
 *
 * Invariant: the order of the additions of a (row, column) is decided by k and column_offset.
 */
#include "tile.h"

enum { WARPS = 4, ROWS = AFD_GPU_PLAIN_ROWS };

/* sum[r] += x[r][k] w[k] for the lane's k of from .. end-1 */
template <class T>
GPU_FN void add_products(float (&sum)[ROWS], const float *x, size_t x_stride, unsigned n_rows,
	const T *w, unsigned from, unsigned end)
{
	for (unsigned k = from + lane_id(); k < end; k += 32) {
		float weight = to_float(w[k]);

		GPU_UNROLL
		for (unsigned r = 0; r < ROWS; r++) {
			if (r < n_rows)
				sum[r] = fmaf(x[r * x_stride + k], weight, sum[r]);
		}
	}
}

template <class T> GPU_KERNEL(WARPS * 32) product_plain_kernel(struct product p)
{
	unsigned n = block_x() * WARPS + warp_id(), row0 = block_y() * ROWS;
	unsigned n_rows = least(ROWS, p.n_rows - row0);
	const T *w = (const T *)(p.w + n * p.w_row_bytes);
	const float *x = p.x + row0 * p.x_stride;
	float sum[ROWS] = {};

	if (n >= p.n) /* the whole warp */
		return;
	if (sizeof(T) > 1)
		add_products(sum, x, p.x_stride, n_rows, w, 0, p.k);
	for (unsigned from = 0, end; sizeof(T) == 1 && from < p.k; from = end) {
		unsigned block = (p.column_offset + from) / GPU_BLOCK;
		float part[ROWS] = {}, scale = *scale_at(p, n, block);

		end = least((block + 1) * GPU_BLOCK - p.column_offset, p.k);
		add_products(part, x, p.x_stride, n_rows, w, from, end);
		GPU_UNROLL
		for (unsigned r = 0; r < ROWS; r++)
			sum[r] = fmaf(part[r], scale, sum[r]);
	}
	GPU_UNROLL
	for (unsigned r = 0; r < ROWS; r++) {
		float total = warp_sum(sum[r]);

		if (lane_id() == 0 && r < n_rows)
			p.y[(row0 + r) * p.y_stride + n] = p.bias ? total + p.bias[n] : total;
	}
}

static int product_plain(const struct afd_gpu *gpu, struct product p)
{
	/* As many rows as a grid can count. */
	for (uint32_t left = p.n_rows; left; left -= p.n_rows) {
		p.n_rows = least(left, 65535u * ROWS);
		int rc = with_dtype(p.dtype, [&](auto t) {
			return gpu_launch(gpu, "product_plain", product_plain_kernel<decltype(t)>,
				{ (unsigned)divide_up(p.n, WARPS),
					(unsigned)divide_up(p.n_rows, ROWS), 1 },
				WARPS * 32, 0, p);
		});
		if (rc)
			return rc;
		p.x += p.n_rows * p.x_stride;
		p.y += p.n_rows * p.y_stride;
	}
	return 0;
}

/* Rows of one pass: inputs and parts must fit into the workspace. */
static uint32_t rows_of_pass(const struct afd_gpu *gpu, const struct product *p,
	const struct tile_work *t)
{
	size_t row_bytes = t->x.row_bytes +
			   (t->n_slices > 1 ? t->n_slices * (size_t)p->n * sizeof(float) : 0);
	size_t most = gpu->workspace_bytes / row_bytes;

	return most > p->n_rows ? p->n_rows : most > 65535 ? 65535 : (uint32_t)most;
}

/* inputs: of all rows, or NULL: they are made here. */
static int product_tiles(const struct afd_gpu *gpu, struct product p, const struct afd__matrix *w,
	const char *inputs)
{
	struct tile_work t = {};
	uint32_t left = p.n_rows, pass;
	int rc = 0;

	t.x = tile_shape(w);
	t.lead = w->column_offset % TILE_K;
	t.n_slices = tile_slices(gpu, &p, t.x.row_numbers);
	pass = rows_of_pass(gpu, &p, &t);
	if (!pass)
		return product_plain(gpu, p);
	for (; !rc && left; left -= t.p.n_rows) {
		t.p = p;
		t.p.n_rows = least(left, pass);
		t.rows = tile_rows(t.p.n_rows);
		t.x = tile_x_at(t.x, inputs ? (void *)inputs : gpu->workspace);
		t.parts = (float *)((char *)gpu->workspace + t.p.n_rows * t.x.row_bytes);
		tile_source from = { p.x, NULL, p.x_stride, t.p.n_rows, NULL, 0 };
		rc = inputs ? 0 : tile_inputs(gpu, w, &from, &t.x);
		if (!rc)
			rc = tile_product(gpu, &t);
		if (inputs)
			inputs += t.p.n_rows * t.x.row_bytes;
		else
			p.x += t.p.n_rows * p.x_stride;
		p.y += t.p.n_rows * p.y_stride;
	}
	return rc;
}

int afd_gpu_product(const struct afd_gpu *gpu, const struct afd__product_args *a)
{
	struct product p = product_of(&a->w);

	p.x = a->x;
	p.bias = a->bias;
	p.y = a->y;
	p.x_stride = a->x_stride;
	p.y_stride = a->y_stride;
	p.n_rows = a->n_rows;
	return tile_fits(&a->w) ? product_tiles(gpu, p, &a->w, (const char *)a->inputs)
				: product_plain(gpu, p);
}
