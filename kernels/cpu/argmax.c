/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The index of the largest number of a row, the lowest among equals; or -1 - index of the first
 * number that is not finite. One pass finds the largest and whether all are finite, a second one
 * finds where.
 */
#include "variants.h"
#include "vec.h"

#define EXPONENT 0x7f800000

static int32_t first_not_finite(const float *x, uint32_t width)
{
	for (uint32_t i = 0; i < width; i++) {
		uint32_t bits;

		memcpy(&bits, x + i, sizeof(bits));
		if ((bits & EXPONENT) == EXPONENT)
			return -1 - (int32_t)i;
	}
	return 0;
}

/* The largest; *not_finite is set when some number is not. */
static float largest_of(const float *x, uint32_t width, int *not_finite)
{
	vec best = vec_splat(x[0]);
	vec_int bad = { 0 };
	float largest;
	uint32_t i = 0;

	for (; i + LANES <= width; i += LANES) {
		vec v = vec_load(x + i);

		best = vec_max(v, best);
		bad |= ((vec_int)v & EXPONENT) == EXPONENT;
	}
	largest = vec_largest(best);
	for (int lane = 0; lane < LANES; lane++)
		*not_finite |= bad[lane];
	for (; i < width; i++) {
		*not_finite |= !__builtin_isfinite(x[i]);
		largest = x[i] > largest ? x[i] : largest;
	}
	return largest;
}

void AFD_K(argmax)(const struct afd__argmax_args *a, uint32_t row0, uint32_t row1)
{
	for (size_t row = row0; row < row1; row++) {
		const float *x = a->x + row * a->width; /* [width] */
		int not_finite = 0;
		float largest = largest_of(x, a->width, &not_finite);
		uint32_t i = 0;

		if (not_finite) {
			a->ids[row] = first_not_finite(x, a->width);
			continue;
		}
		while (x[i] != largest)
			i++;
		a->ids[row] = (int32_t)i;
	}
}
