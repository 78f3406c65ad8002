/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cosines and sines for rope. The angle is the float32 product position * inv_freq, as transformers
 * has it; the cosine of that float is taken in double and rounded once, so that no choice of libm's
 * float routines (which differ between CPUs of one variant) shows, and large angles are reduced
 * exactly.
 */
#include <math.h>

#include "variants.h"
#include "vec.h"

void AFD_K(angles)(const struct afd__angles_args *a, uint32_t row0, uint32_t row1)
{
	uint32_t half = a->head_dim / 2;

	for (size_t row = row0; row < row1; row++) {
		float *cosines = a->out + row * a->head_dim,
		      *sines = cosines + half; /* [half] each */

		for (uint32_t i = 0; i < half; i++) {
			float angle = (float)a->positions[row] * a->inv_freq[i];

			cosines[i] = (float)cos(angle) * a->scale;
			sines[i] = (float)sin(angle) * a->scale;
		}
	}
}
