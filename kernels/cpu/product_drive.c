/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cuts a packed product into tiles (product_drive.h). Whatever the cut, an accumulator sees k in
 * ascending order: a block of k starts from what the block before left in y. Columns beyond n exist
 * in panels only; a tile that would write them goes through a buffer.
 */
#include "product_drive.h"

#include <string.h>

/* Floats between copied rows: an odd number of lines, so that neighbours fall into different
 * sets. */
#define X_PAD    16
#define X_FLOATS (AFD_K_GROUP_ROWS * (AFD_K_BLOCK + X_PAD))
_Static_assert(AFD_K_TILE_ROWS * (4 * AFD_K_BLOCK + X_PAD) <= X_FLOATS,
	"one tile of long blocks fits the same buffer");

struct range {
	const struct afd__product_args *a;
	const struct afd_k_tiles *tiles;
	const afd_k_tile_fn *run; /* [rows] */
	size_t k_bytes;           /* one k of a panel */
	uint32_t n0, n1;
	bool fp8, decode;
};

static const char *panel_at(const struct range *r, uint32_t n, uint32_t k)
{
	return (const char *)r->a->w.data +
	       ((size_t)(n / AFD_K_PANEL) * r->a->w.k + k) * r->k_bytes;
}

/* The last panel when n is no multiple of it: through a buffer. */
static void run_cut_tile(
	afd_k_tile_fn run, const struct afd_k_tile *t, uint32_t n_rows, uint32_t n_columns)
{
	float y[AFD_K_TILE_ROWS][AFD_K_PANEL], bias[AFD_K_PANEL] = { 0 };
	struct afd_k_tile cut = *t;

	cut.y = y[0];
	cut.y_stride = AFD_K_PANEL;
	if (t->bias) {
		memcpy(bias, t->bias, n_columns * sizeof(float));
		cut.bias = bias;
	}
	memset(y, 0, sizeof(y));
	for (uint32_t i = 0; t->resume && i < n_rows; i++)
		memcpy(y[i], t->y + i * t->y_stride, n_columns * sizeof(float));
	run(&cut);
	for (uint32_t i = 0; i < n_rows; i++)
		memcpy(t->y + i * t->y_stride, y[i], n_columns * sizeof(float));
}

/* Columns n .. n+31, or what the range has of them. */
static void run_tile(const struct range *r, const struct afd_k_tile *t, uint32_t n, uint32_t n_rows)
{
	if (r->n1 - n < AFD_K_PANEL)
		run_cut_tile(r->run[n_rows], t, n_rows, r->n1 - n);
	else
		r->run[n_rows](t);
}

/* Where the scales of k .. of the panel of column n stand. */
static void find_scales(const struct range *r, struct afd_k_tile *t, uint32_t n, uint32_t k)
{
	const struct afd__matrix *w = &r->a->w;
	uint32_t at = w->column_offset + k, n_blocks = afd__scale_columns(w->column_offset, w->k);

	if (!r->fp8)
		return;
	t->scale_stride = w->mixed_panels ? AFD_K_PANEL : 1;
	t->scales = w->scales +
		    ((size_t)(n / AFD_K_PANEL) * n_blocks + at / AFD__SCALE_ROWS) * t->scale_stride;
	t->first_k = AFD__SCALE_ROWS - at % AFD__SCALE_ROWS;
}

/* The end of a block of at most n_k from k on; of FP8 also the end of a block of scales. */
static uint32_t block_end(const struct range *r, uint32_t k, uint32_t n_k)
{
	uint64_t end = (uint64_t)k + n_k;

	if (r->fp8)
		end -= (r->a->w.column_offset + end) % AFD__SCALE_ROWS;
	return end < r->a->w.k ? (uint32_t)end : r->a->w.k;
}

static void drive_direct(const struct range *r)
{
	const struct afd__product_args *a = r->a;
	struct afd_k_tile t = {
		.x = a->x, .x_stride = a->x_stride, .y_stride = a->y_stride, .n_k = a->w.k
	};

	for (uint32_t n = r->n0; n < r->n1; n += AFD_K_PANEL) {
		t.w = panel_at(r, n, 0);
		t.prefetch = t.w + AFD_K_PREFETCH_BYTES;
		t.y = a->y + n;
		t.bias = a->bias ? a->bias + n : NULL;
		find_scales(r, &t, n, 0);
		run_tile(r, &t, n, a->n_rows);
	}
}

/* Rows and k of one block; rows in tiles of nearly equal height. */
struct block {
	uint32_t row0, n_rows, n_tiles;
	uint32_t k0, n_k;
};

static uint32_t tile_at(const struct block *b, uint32_t i)
{
	return b->n_rows * i / b->n_tiles;
}

/* What the first tile of a panel fetches: the next panel, or the first one of the next block. */
static const char *next_of(const struct range *r, const struct block *b, uint32_t n)
{
	if (n + AFD_K_PANEL < r->n1)
		return panel_at(r, n + AFD_K_PANEL, b->k0);
	return panel_at(r, r->n0, b->k0 + b->n_k < r->a->w.k ? b->k0 + b->n_k : 0);
}

/* Makes floats of the tile's block when tiles want them. */
static void decode_block(const struct range *r, struct afd_k_tile *t, float *w)
{
	if (!r->decode)
		return;
	r->tiles->decode(t->w, t->n_k, w);
	t->w = (const char *)w;
}

static void drive_block(const struct range *r, const struct block *b)
{
	const struct afd__product_args *a = r->a;
	bool last = b->k0 + b->n_k == a->w.k;
	size_t x_stride = b->n_k + X_PAD;
	float x[X_FLOATS];
	_Alignas(64) float w[AFD__SCALE_ROWS * AFD_K_PANEL];
	struct afd_k_tile t = {
		.x_stride = x_stride, .y_stride = a->y_stride, .n_k = b->n_k, .resume = b->k0 > 0
	};

	for (uint32_t i = 0; i < b->n_rows; i++)
		memcpy(x + i * x_stride, a->x + (b->row0 + i) * a->x_stride + b->k0,
			b->n_k * sizeof(float));
	for (uint32_t n = r->n0; n < r->n1; n += AFD_K_PANEL) {
		t.w = panel_at(r, n, b->k0);
		t.prefetch = next_of(r, b, n);
		t.bias = last && a->bias ? a->bias + n : NULL;
		find_scales(r, &t, n, b->k0);
		decode_block(r, &t, w);
		for (uint32_t i = 0; i < b->n_tiles; i++) {
			uint32_t row = tile_at(b, i);

			t.x = x + row * x_stride;
			t.y = a->y + (b->row0 + row) * a->y_stride + n;
			run_tile(r, &t, n, tile_at(b, i + 1) - row);
			t.prefetch = t.w;
		}
	}
}

static void drive_blocked(const struct range *r)
{
	const struct afd__product_args *a = r->a;
	uint32_t tile_rows = r->tiles->tile_rows, block_k = AFD_K_BLOCK;
	struct block b = { 0 };

	if (r->decode)
		block_k = AFD__SCALE_ROWS;
	else if (a->n_rows <= tile_rows)
		block_k = r->tiles->single_block;
	for (; b.row0 < a->n_rows; b.row0 += b.n_rows) {
		b.n_rows = a->n_rows - b.row0 < AFD_K_GROUP_ROWS ? a->n_rows - b.row0
								 : AFD_K_GROUP_ROWS;
		b.n_tiles = (b.n_rows + tile_rows - 1) / tile_rows;
		for (b.k0 = 0; b.k0 < a->w.k; b.k0 += b.n_k) {
			b.n_k = block_end(r, b.k0, block_k) - b.k0;
			drive_block(r, &b);
		}
	}
}

/* FP8 for few rows where tiles take floats only: panel by panel, as DRAM likes it. */
static void drive_decoded(const struct range *r)
{
	const struct afd__product_args *a = r->a;
	_Alignas(64) float w[AFD__SCALE_ROWS * AFD_K_PANEL];
	struct afd_k_tile t = { .x_stride = a->x_stride, .y_stride = a->y_stride };

	for (uint32_t n = r->n0; n < r->n1; n += AFD_K_PANEL) {
		t.y = a->y + n;
		for (uint32_t k = 0; k < a->w.k; k += t.n_k) {
			t.n_k = block_end(r, k, AFD__SCALE_ROWS) - k;
			t.x = a->x + k;
			t.w = panel_at(r, n, k);
			t.prefetch = t.w + AFD_K_PREFETCH_BYTES;
			t.bias = a->bias && k + t.n_k == a->w.k ? a->bias + n : NULL;
			t.resume = k > 0;
			find_scales(r, &t, n, k);
			decode_block(r, &t, w);
			run_tile(r, &t, n, a->n_rows);
		}
	}
}

void afd_k_product_drive(const struct afd_k_tiles *tiles, const struct afd__product_args *a,
	uint32_t n0, uint32_t n1)
{
	struct range r = { .a = a,
		.tiles = tiles,
		.run = tiles->run[a->w.dtype],
		.n0 = n0,
		.n1 = n1,
		.k_bytes = AFD_K_PANEL * afd_dtype_bytes(a->w.dtype),
		.fp8 = a->w.dtype == AFD_DTYPE_FP8 };

	r.decode = r.fp8 && a->n_rows >= tiles->decode_rows;
	if (r.decode)
		r.run = tiles->run_decoded;
	if (a->n_rows > tiles->direct_rows)
		drive_blocked(&r);
	else if (r.decode)
		drive_decoded(&r);
	else
		drive_direct(&r);
}
