/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cuts a packed product into tiles (product_drive.h). Whatever the cut, an accumulator sees k in ascending order: a
 * block of k starts from what the block before left in y. Columns beyond n exist in panels only; a tile that would
 * write them goes through a buffer.
 */
#include "product_drive.h"

#include <string.h>

struct range {
	const struct afd__product_args *a;
	const struct afd_k_tiles *tiles;
	size_t k_bytes;     /* one k of a panel */
	size_t panel_bytes;
	uint32_t n0, n1;
};

static const char *panel_at(const struct range *r, uint32_t n, uint32_t k)
{
	return (const char *)r->a->w.data + n / AFD_K_PANEL * r->panel_bytes + k * r->k_bytes;
}

/* The last panel when n is no multiple of it: through a buffer. */
static void run_cut_tile(afd_k_tile_fn tile, struct afd_k_tile *t, uint32_t n_rows, uint32_t n_columns)
{
	float y[AFD_K_TILE_ROWS * AFD_K_PANEL], bias[AFD_K_PANEL] = { 0 };
	float *y_out = t->y;

	if (t->bias)
		memcpy(bias, t->bias, n_columns * sizeof(float));
	memset(y, 0, sizeof(y));
	if (t->resume) {
		for (uint32_t i = 0; i < n_rows; i++)
			memcpy(&y[i * AFD_K_PANEL], &y_out[i * t->y_stride], n_columns * sizeof(float));
	}
	struct afd_k_tile cut = *t;
	cut.y = y;
	cut.y_stride = AFD_K_PANEL;
	cut.bias = t->bias ? bias : NULL;
	tile(&cut);
	for (uint32_t i = 0; i < n_rows; i++)
		memcpy(&y_out[i * t->y_stride], &y[i * AFD_K_PANEL], n_columns * sizeof(float));
}

static void run_tile(const struct range *r, afd_k_tile_fn tile, struct afd_k_tile *t, uint32_t n, uint32_t n_rows)
{
	if (n + AFD_K_PANEL > r->n1)
		run_cut_tile(tile, t, n_rows, r->n1 - n);
	else
		tile(t);
}

static void drive_direct(const struct range *r)
{
	const struct afd__product_args *a = r->a;
	afd_k_tile_fn wide = r->tiles->direct[a->w.dtype][a->n_rows];
	afd_k_tile_fn one = r->tiles->direct_one[a->w.dtype][a->n_rows];
	uint32_t wide_columns = r->tiles->direct_panels * AFD_K_PANEL;
	struct afd_k_tile t = { .x = a->x, .x_stride = a->x_stride, .y_stride = a->y_stride, .n_k = a->w.k,
				.w_stride = r->panel_bytes };
	uint32_t n = r->n0;

	while (n < r->n1) {
		t.w = panel_at(r, n, 0);
		t.y = a->y + n;
		t.bias = a->bias ? a->bias + n : NULL;
		if (r->n1 - n >= wide_columns) {
			wide(&t);
			n += wide_columns;
		} else {
			run_tile(r, one, &t, n, a->n_rows);
			n += AFD_K_PANEL;
		}
	}
}

/* Rows of a group in tiles of nearly equal height. */
struct cut {
	uint32_t n_tiles, n_rows;
};

static uint32_t cut_at(const struct cut *c, uint32_t i)
{
	return (uint32_t)((uint64_t)c->n_rows * i / c->n_tiles);
}

static void drive_block(const struct range *r, const struct cut *c, uint32_t row0, uint32_t k0, uint32_t n_k)
{
	const struct afd__product_args *a = r->a;
	bool last = k0 + n_k == a->w.k;
	float x[AFD_K_GROUP_ROWS][AFD_K_X_STRIDE];

	for (uint32_t i = 0; i < c->n_rows; i++)
		memcpy(x[i], a->x + (row0 + i) * a->x_stride + k0, n_k * sizeof(float));
	for (uint32_t n = r->n0; n < r->n1; n += AFD_K_PANEL) {
		struct afd_k_tile t = { .w = panel_at(r, n, k0), .w_stride = r->panel_bytes, .n_k = n_k, .resume = k0 > 0,
					.y_stride = a->y_stride, .bias = last && a->bias ? a->bias + n : NULL };

		/* The first tile of a panel fetches the next one; at the end of a block that is the first of the next. */
		t.prefetch = n + AFD_K_PANEL < r->n1 ? panel_at(r, n + AFD_K_PANEL, k0) :
			     last ? t.w : panel_at(r, r->n0, k0 + n_k);
		for (uint32_t i = 0; i < c->n_tiles; i++) {
			uint32_t row = cut_at(c, i), height = cut_at(c, i + 1) - row;

			t.x = x[row];
			t.y = a->y + (row0 + row) * a->y_stride + n;
			run_tile(r, r->tiles->blocked[a->w.dtype][height], &t, n, height);
			t.prefetch = t.w;
		}
	}
}

static void drive_blocked(const struct range *r)
{
	const struct afd__product_args *a = r->a;

	for (uint32_t row = 0; row < a->n_rows; row += AFD_K_GROUP_ROWS) {
		struct cut c = { .n_rows = a->n_rows - row };

		if (c.n_rows > AFD_K_GROUP_ROWS)
			c.n_rows = AFD_K_GROUP_ROWS;
		c.n_tiles = (c.n_rows + r->tiles->blocked_rows - 1) / r->tiles->blocked_rows;
		for (uint32_t k = 0; k < a->w.k; k += AFD_K_BLOCK)
			drive_block(r, &c, row, k, a->w.k - k < AFD_K_BLOCK ? a->w.k - k : AFD_K_BLOCK);
	}
}

void afd_k_product_drive(const struct afd_k_tiles *tiles, const struct afd__product_args *a, uint32_t n0, uint32_t n1)
{
	size_t k_bytes = AFD_K_PANEL * (a->w.dtype == AFD_DTYPE_F32 ? 4 : 2);
	struct range r = { .a = a, .tiles = tiles, .k_bytes = k_bytes, .panel_bytes = a->w.k * k_bytes, .n0 = n0, .n1 = n1 };

	if (a->n_rows <= tiles->direct_rows)
		drive_direct(&r);
	else
		drive_blocked(&r);
}
