/* SPDX-License-Identifier: Apache-2.0 */
/*
 * SwiGLU: out = silu(gate) * up, silu(x) = x / (1 + e^-x). Each number stands alone, so any range
 * gives the same bits.
 */
#include "variants.h"
#include "vec.h"

void AFD_K(activation)(const struct afd__activation_args *a, uint32_t row0, uint32_t row1)
{
	for (size_t row = row0; row < row1; row++) {
		const float *gate = a->gate_up + row * 2 * a->width,
			    *up = gate + a->width; /* [width] each */
		float *out = a->out + row * a->width;

		for (size_t i = 0; i < a->width; i += LANES) {
			vec g = vec_load_some(gate + i, AFD_DTYPE_F32, a->width - i);
			vec u = vec_load_some(up + i, AFD_DTYPE_F32, a->width - i);

			vec_store_some(
				out + i, g / (1.0f + vec_exp(-g)) * u, AFD_DTYPE_F32, a->width - i);
		}
	}
}
