/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packing: rows of a checkpoint's [n][k] to panels [ceil(n/32)][k][32]. Column j of a panel stands
 * at place j; in bf16 column c stands beside c + 16, so that one shift and one mask make floats of
 * a cache line. Two panels never share a byte: callers spread panels over threads. Rows in a file
 * need not be aligned.
 */
#include "product.h"

#include <string.h>

/* k of one pass over a panel: what is written stays in L1 until its lines are full. */
#define STRIP 128

size_t afd_k_packed_bytes(uint32_t n, uint32_t k, int32_t dtype)
{
	size_t n_padded = ((size_t)n + AFD_K_PANEL - 1) / AFD_K_PANEL * AFD_K_PANEL;
	size_t bytes;

	/* Both factors come from a file: an overflow must not look small. */
	if (__builtin_mul_overflow(n_padded, (size_t)k, &bytes) ||
		__builtin_mul_overflow(bytes, (size_t)(dtype == AFD_DTYPE_F32 ? 4 : 2), &bytes))
		return SIZE_MAX;
	return bytes;
}

static uint16_t load16(const char *at)
{
	uint16_t v;

	memcpy(&v, at, sizeof(v));
	return v;
}

/* Two columns of 16 bits as one store: first in the low half. */
static void pack_pair(uint32_t *out, const char *first, const char *second, uint32_t n_k)
{
	for (size_t k = 0; k < n_k; k++)
		out[k * (AFD_K_PANEL / 2)] =
			load16(first + 2 * k) | (uint32_t)load16(second + 2 * k) << 16;
}

/* All 32 columns of a panel from rows row_bytes apart. */
static void pack_panel(
	const char *rows, size_t row_bytes, uint32_t n_k, int32_t dtype, uint32_t *panel)
{
	for (uint32_t k = 0; k < n_k; k += STRIP) {
		uint32_t n = n_k - k < STRIP ? n_k - k : STRIP;

		if (dtype == AFD_DTYPE_F32) {
			for (uint32_t j = 0; j < AFD_K_PANEL; j++) {
				for (size_t i = 0; i < n; i++)
					memcpy(&panel[(k + i) * AFD_K_PANEL + j],
						rows + j * row_bytes + 4 * (k + i), 4);
			}
			continue;
		}
		for (uint32_t c = 0; c < AFD_K_PANEL / 2; c++) {
			size_t first = dtype == AFD_DTYPE_BF16 ? c : 2 * c;
			size_t second = dtype == AFD_DTYPE_BF16 ? c + 16 : 2 * c + 1;

			pack_pair(panel + (size_t)k * (AFD_K_PANEL / 2) + c,
				rows + first * row_bytes + 2 * (size_t)k,
				rows + second * row_bytes + 2 * (size_t)k, n);
		}
	}
}

static uint32_t place_of(uint32_t column, int32_t dtype)
{
	return dtype != AFD_DTYPE_BF16 ? column : column < 16 ? 2 * column : 2 * (column - 16) + 1;
}

/* One column of a panel; row NULL: zeros. */
static void pack_column(const char *row, uint32_t n_k, uint32_t column, int32_t dtype, char *panel)
{
	size_t bytes = dtype == AFD_DTYPE_F32 ? 4 : 2;
	char *out = panel + place_of(column, dtype) * bytes;

	for (size_t k = 0; k < n_k; k++) {
		if (row)
			memcpy(out + k * AFD_K_PANEL * bytes, row + k * bytes, bytes);
		else
			memset(out + k * AFD_K_PANEL * bytes, 0, bytes);
	}
}

void afd_k_pack_c(const struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows,
	uint32_t p0, uint32_t p1)
{
	size_t panel_bytes = afd_k_packed_bytes(AFD_K_PANEL, m->k, m->dtype),
	       row_bytes = panel_bytes / AFD_K_PANEL;
	uint64_t end = (uint64_t)row0 + n_rows;

	for (uint64_t p = p0; p < p1; p++) {
		uint64_t n0 = p * AFD_K_PANEL, from = n0 > row0 ? n0 : row0,
			 to = n0 + AFD_K_PANEL < end ? n0 + AFD_K_PANEL : end;
		char *panel = (char *)m->data + p * panel_bytes;

		if (to == from + AFD_K_PANEL) {
			pack_panel((const char *)rows + (from - row0) * row_bytes, row_bytes, m->k,
				m->dtype, (uint32_t *)panel);
			continue;
		}
		for (uint64_t n = from; n < to; n++)
			pack_column((const char *)rows + (n - row0) * row_bytes, m->k,
				(uint32_t)(n - n0), m->dtype, panel);
		for (uint64_t n = m->n; end == m->n && n < n0 + AFD_K_PANEL; n++)
			pack_column(NULL, m->k, (uint32_t)(n - n0), m->dtype, panel);
	}
}
