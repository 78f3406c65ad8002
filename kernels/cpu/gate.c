/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gate on the output of attention: x = x * sigmoid(gate), sigmoid(g) = 1 / (1 + e^-g). Each
 * number stands alone, so any range gives the same bits.
 */
#include "variants.h"
#include "vec.h"

void AFD_K(gate)(const struct afd__gate_args *a, uint32_t row0, uint32_t row1)
{
	for (size_t row = row0; row < row1; row++) {
		float *x = a->x + row * a->width;                      /* [width] */
		const float *gate = a->gate + row * a->gate_stride; /* [width] */

		for (size_t i = 0; i < a->width; i += LANES) {
			vec v = vec_load_some(x + i, AFD_DTYPE_F32, a->width - i);
			vec g = vec_load_some(gate + i, AFD_DTYPE_F32, a->width - i);

			vec_store_some(x + i, v * (1.0f / (1.0f + vec_exp(-g))), AFD_DTYPE_F32,
				a->width - i);
		}
	}
}
