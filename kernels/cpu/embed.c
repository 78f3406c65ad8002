/* SPDX-License-Identifier: Apache-2.0 */
/*
 * out[i] = row ids[i] of the embedding table, times scale. The table may be packed for the product
 * (a tied head): then a row is one column of a panel, read across it.
 */
#include "variants.h"
#include "vec.h"

static void embed_packed(const struct afd__embed_args *a, uint32_t id, float *out)
{
	const struct afd__matrix *m = &a->table;
	size_t panel_bytes = (size_t)m->k * AFD_K_PANEL * dtype_bytes(m->dtype);
	const char *panel = (const char *)m->data + id / AFD_K_PANEL * panel_bytes;
	uint32_t column = id % AFD_K_PANEL;

	/* In bf16 column c stands beside c + 16. */
	if (m->dtype == AFD_DTYPE_BF16)
		column = column < 16 ? 2 * column : 2 * (column - 16) + 1;
	for (size_t k = 0; k < m->k; k++)
		out[k] = afd_k_float_at(panel, k * AFD_K_PANEL + column, m->dtype) * a->scale;
}

void AFD_K(embed)(const struct afd__embed_args *a, uint32_t row0, uint32_t row1)
{
	size_t width = a->table.k, number = dtype_bytes(a->table.dtype);

	for (size_t row = row0; row < row1; row++) {
		uint32_t id = (uint32_t)a->ids[row];
		float *out = a->out + row * width; /* [width] */
		const char *from = (const char *)a->table.data + id * width * number;

		if (a->table.layout == AFD__LAYOUT_PACKED) {
			embed_packed(a, id, out);
			continue;
		}
		for (size_t i = 0; i < width; i += LANES) {
			vec v = vec_load_some(from + i * number, a->table.dtype, width - i);

			vec_store_some(out + i, v * a->scale, AFD_DTYPE_F32, width - i);
		}
	}
}
