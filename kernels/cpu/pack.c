/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packing: rows of a checkpoint's [n][k] to panels [ceil(n/32)][k][32]. Column j of a panel stands
 * at place j; in bf16 column c stands beside c + 16, so that one shift and one mask make floats of
 * a cache line. Two panels never share a byte: callers spread panels over threads. Rows in a file
 * need not be aligned. Scales of FP8 stand beside: by panel, block of k and, where a panel mixes
 * them, column.
 */
#include "product.h"

#include <stdbool.h>
#include <string.h>

#include "number.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* k of one pass over a panel: what is written stays in L1 until its lines are full. */
#define STRIP 128

size_t afd_k_packed_bytes(uint32_t n, uint32_t k, int32_t dtype)
{
	size_t n_padded = ((size_t)n + AFD_K_PANEL - 1) / AFD_K_PANEL * AFD_K_PANEL;
	size_t bytes;

	/* Both factors come from a file: an overflow must not look small. */
	if (__builtin_mul_overflow(n_padded, (size_t)k, &bytes) ||
		__builtin_mul_overflow(bytes, afd_dtype_bytes(dtype), &bytes))
		return SIZE_MAX;
	return bytes;
}

/* Which column stands at a place of a panel's line. */
static uint32_t column_at(uint32_t place, int32_t dtype)
{
	return dtype != AFD_DTYPE_BF16 ? place : place / 2 + place % 2 * (AFD_K_PANEL / 2);
}

/* k0 .. k1-1 of one row to one place, number by number; row NULL: zeros. */
static void pack_run(const char *row, size_t k0, size_t k1, size_t bytes, char *place)
{
	for (size_t k = k0; k < k1; k++) {
		if (row)
			memcpy(place + k * AFD_K_PANEL * bytes, row + k * bytes, bytes);
		else
			memset(place + k * AFD_K_PANEL * bytes, 0, bytes);
	}
}

#if defined(__SSE2__)
/* out[i] of 16 x 16 bytes = column i of in: four rounds of pairs. */
static void transpose8(__m128i v[16])
{
	__m128i a[16], b[16];

	for (int i = 0; i < 8; i++) {
		a[2 * i] = _mm_unpacklo_epi8(v[i], v[i + 8]);
		a[2 * i + 1] = _mm_unpackhi_epi8(v[i], v[i + 8]);
	}
	for (int i = 0; i < 8; i++) {
		b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
		b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
	}
	for (int i = 0; i < 8; i++) {
		a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
		a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
	}
	for (int i = 0; i < 8; i++) {
		v[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
		v[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
	}
}

/* out[i] of 8 x 8 numbers of 16 bits = column i of in: three rounds of pairs. */
static void transpose16(__m128i v[8])
{
	__m128i a[8], b[8];

	for (int i = 0; i < 4; i++) {
		a[2 * i] = _mm_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
		a[2 * i + 1] = _mm_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
	}
	for (int i = 0; i < 2; i++) {
		b[4 * i] = _mm_unpacklo_epi32(a[4 * i], a[4 * i + 2]);
		b[4 * i + 1] = _mm_unpackhi_epi32(a[4 * i], a[4 * i + 2]);
		b[4 * i + 2] = _mm_unpacklo_epi32(a[4 * i + 1], a[4 * i + 3]);
		b[4 * i + 3] = _mm_unpackhi_epi32(a[4 * i + 1], a[4 * i + 3]);
	}
	for (int i = 0; i < 4; i++) {
		v[2 * i] = _mm_unpacklo_epi64(b[i], b[i + 4]);
		v[2 * i + 1] = _mm_unpackhi_epi64(b[i], b[i + 4]);
	}
}

static void transpose32(__m128i v[4])
{
	__m128i a[4];

	for (int i = 0; i < 2; i++) {
		a[2 * i] = _mm_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
		a[2 * i + 1] = _mm_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
	}
	for (int i = 0; i < 2; i++) {
		v[2 * i] = _mm_unpacklo_epi64(a[i], a[i + 2]);
		v[2 * i + 1] = _mm_unpackhi_epi64(a[i], a[i + 2]);
	}
}

/* As many k as whole registers hold, for the places of one register; returns where it stopped. */
static inline size_t pack_registers(
	const char *const *rows, size_t k0, size_t k1, const size_t bytes, char *places)
{
	const size_t n = sizeof(__m128i) / bytes;
	__m128i v[16];

	for (; k0 + n <= k1; k0 += n) {
		for (size_t i = 0; i < n; i++)
			v[i] = _mm_loadu_si128((const __m128i *)(rows[i] + k0 * bytes));
		if (bytes == 1)
			transpose8(v);
		else if (bytes == 2)
			transpose16(v);
		else
			transpose32(v);
		for (size_t i = 0; i < n; i++)
			_mm_storeu_si128(
				(__m128i *)(places + (k0 + i) * AFD_K_PANEL * bytes), v[i]);
	}
	return k0;
}
#else
static inline size_t pack_registers(
	const char *const *rows, size_t k0, size_t k1, const size_t bytes, char *places)
{
	return k0;
}
#endif

/* All 32 columns of a panel from 32 rows. */
static void pack_panel(const char *rows, uint32_t n_k, int32_t dtype, char *panel)
{
	const size_t bytes = afd_dtype_bytes(dtype), n = 16 / bytes;
	const char *group[16]; /* [n]: rows of n places side by side */

	for (size_t k0 = 0; k0 < n_k; k0 += STRIP) {
		size_t k1 = k0 + STRIP < n_k ? k0 + STRIP : n_k, k;

		for (uint32_t place = 0; place < AFD_K_PANEL; place += n) {
			char *places = panel + place * bytes;

			for (uint32_t i = 0; i < n; i++)
				group[i] = rows + column_at(place + i, dtype) * (n_k * bytes);
			if (bytes == 1)
				k = pack_registers(group, k0, k1, 1, places);
			else if (bytes == 2)
				k = pack_registers(group, k0, k1, 2, places);
			else
				k = pack_registers(group, k0, k1, 4, places);
			for (uint32_t i = 0; i < n; i++)
				pack_run(group[i], k, k1, bytes, places + i * bytes);
		}
	}
}

/* Columns n0 .. n0+31 as far as they are given; zeros beyond the matrix with the last of them. */
static void pack_part(const struct afd__matrix *m, const char *rows, uint64_t row0, uint64_t end,
	uint64_t n0, char *panel)
{
	size_t bytes = afd_dtype_bytes(m->dtype);

	for (uint32_t place = 0; place < AFD_K_PANEL; place++) {
		uint64_t n = n0 + column_at(place, m->dtype);
		bool given = n >= row0 && n < end;

		if (given || (n >= m->n && end == m->n))
			pack_run(given ? rows + (n - row0) * m->k * bytes : NULL, 0, m->k, bytes,
				panel + place * bytes);
	}
}

void afd_k_pack_c(const struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows,
	uint32_t p0, uint32_t p1)
{
	size_t bytes = afd_dtype_bytes(m->dtype), panel_bytes = AFD_K_PANEL * bytes * m->k;
	uint64_t end = (uint64_t)row0 + n_rows;

	for (uint64_t p = p0; p < p1; p++) {
		uint64_t n0 = p * AFD_K_PANEL;
		char *panel = (char *)m->data + p * panel_bytes;

		if (n0 >= row0 && n0 + AFD_K_PANEL <= end)
			pack_panel((const char *)rows + (n0 - row0) * m->k * bytes, m->k, m->dtype,
				panel);
		else
			pack_part(m, rows, row0, end, n0, panel);
	}
}

void afd_k_load_scales(const struct afd__matrix *m, const struct afd__scale_blocks *blocks,
	uint32_t row0, uint32_t n_rows)
{
	uint32_t n_columns = afd__scale_columns(m->column_offset, m->k),
		 per_panel = m->mixed_panels ? AFD_K_PANEL : 1,
		 step = m->mixed_panels ? 1 : AFD_K_PANEL;
	uint64_t column0 = blocks->column_offset / AFD__SCALE_ROWS, end = (uint64_t)row0 + n_rows;

	/* The columns of the last panel beyond n count as rows of its last block. */
	if (end == m->n)
		end = (end + AFD_K_PANEL - 1) / AFD_K_PANEL * AFD_K_PANEL;
	for (uint64_t row = row0; row < end; row += step) {
		uint64_t given = row < m->n ? row : m->n - 1,
			 block = (blocks->row_offset + given - row0) / AFD__SCALE_ROWS;
		float *to = m->scales + row / AFD_K_PANEL * n_columns * per_panel +
			    (per_panel > 1 ? row % AFD_K_PANEL : 0);

		for (uint32_t c = 0; c < n_columns; c++)
			to[(size_t)c * per_panel] = afd_k_float_at(blocks->data,
				block * blocks->n_columns + column0 + c, blocks->dtype);
	}
}
