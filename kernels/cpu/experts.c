/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The steps of `experts` between its products (experts.h): rows to where their expert reads them,
 * SwiGLU in place, and the weighted sum in the order of the slots.
 */
#include "experts.h"

#include "variants.h"
#include "vec.h"

static void quantize(const struct afd_k_experts *e, float *x, uint32_t width, uint32_t offset)
{
	struct afd__quantize_args row = {
		.x = x, .n_rows = 1, .width = width, .column_offset = offset
	};

	if (e->a->quantize)
		AFD_K(quantize)(&row, 0, 1);
}

void AFD_K(experts_gather)(const struct afd_k_experts *e, uint32_t entry0, uint32_t entry1)
{
	for (size_t entry = entry0; entry < entry1; entry++) {
		size_t row = e->row0 + e->rows[entry];
		float *x = e->x + entry * e->x_stride; /* [hidden] */

		memcpy(x, e->a->x + row * e->hidden, e->hidden * sizeof(float));
		quantize(e, x, e->hidden, 0);
	}
}

void AFD_K(experts_activate)(const struct afd_k_experts *e, uint32_t entry0, uint32_t entry1)
{
	for (size_t entry = entry0; entry < entry1; entry++) {
		float *gate_up = e->gate_up + entry * e->gate_up_stride; /* [2 * width] */
		struct afd__activation_args row = {
			.gate_up = gate_up, .out = gate_up, .n_rows = 1, .width = e->width
		};

		AFD_K(activation)(&row, 0, 1);
		quantize(e, gate_up, e->width, e->a->width_offset);
	}
}

void AFD_K(experts_combine)(const struct afd_k_experts *e, uint32_t row0, uint32_t row1)
{
	const uint32_t top_k = e->a->top_k;

	for (size_t row = row0; row < row1; row++) {
		const int32_t *entries = e->entries + row * top_k;
		const float *weights = e->a->weights + (e->row0 + row) * top_k;
		float *y = e->a->y + (e->row0 + row) * e->hidden; /* [hidden] */

		for (size_t i = 0; i < e->hidden; i += LANES) {
			vec sum = { 0 };

			if (e->a->accumulate)
				sum = vec_load_some(y + i, AFD_DTYPE_F32, e->hidden - i);
			for (uint32_t slot = 0; slot < top_k; slot++) {
				if (entries[slot] < 0)
					continue;
				sum = vec_fma(vec_splat(weights[slot]),
					vec_load_some(e->x + entries[slot] * e->x_stride + i,
						AFD_DTYPE_F32, e->hidden - i),
					sum);
			}
			vec_store_some(y + i, sum, AFD_DTYPE_F32, e->hidden - i);
		}
	}
}
