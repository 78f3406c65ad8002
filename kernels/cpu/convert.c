/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows from one dtype to another, gathered or scattered by an index if there is one, or added to
 * float rows.
 * Rounding is to nearest even; NaN stays NaN, what is too large for f16 becomes infinite, denormals
 * are kept. Rows of e4m3 have a scale per group (lib/device/args.h). This is where rows cross the
 * wire, so every variant gives the same bits.
 */
#include "variants.h"
#include "vec.h"

INLINE void convert_row(const char *src, char *dst, size_t width, const int src_dtype,
	const int dst_dtype, const int accumulate)
{
	for (size_t i = 0; i < width; i += LANES) {
		vec v = vec_load_some(src + i * dtype_bytes(src_dtype), src_dtype, width - i);
		char *to = dst + i * dtype_bytes(dst_dtype);

		if (accumulate)
			v += vec_load_some(to, AFD_DTYPE_F32, width - i);
		vec_store_some(to, v, dst_dtype, width - i);
	}
}

/* ---- e4m3 ---- */

enum { GROUP = AFD__SCALE_ROWS };

INLINE vec_int is_finite(vec v)
{
	return ((vec_bits)v & 0x7fffffff) < 0x7f800000;
}

static float scale_of_group(const char *src, size_t n)
{
	vec largest = { 0 };
	uint32_t bits;
	float scale;

	for (size_t i = 0; i < n; i += LANES) {
		vec v = vec_load_some(src + i * sizeof(float), AFD_DTYPE_F32, n - i);
		vec size = (vec)((vec_bits)v & 0x7fffffff);

		largest = vec_max(vec_select(is_finite(v), size, (vec){ 0 }), largest);
	}
	scale = vec_largest(largest) / 448.0f;
	memcpy(&bits, &scale, sizeof(bits));
	scale = afd_k_float_of_bits(bits >> AFD__SCALE_SPARE << AFD__SCALE_SPARE);
	return scale > AFD__SCALE_LEAST ? scale : AFD__SCALE_LEAST;
}

/* The sign of NaN is kept by hand: CPUs differ in what a division makes of it. */
static void write_group(const char *src, char *dst, size_t n, float scale)
{
	for (size_t i = 0; i < n; i += LANES) {
		vec v = vec_load_some(src + i * sizeof(float), AFD_DTYPE_F32, n - i);
		vec nan = (vec)((vec_bits)v | 0x7fc00000), scaled = v / scale;

		vec_store_some(dst + i, vec_select(is_finite(v), scaled, nan), AFD_DTYPE_FP8, n - i);
	}
}

static void write_fp8_row(const char *src, char *dst, uint32_t width)
{
	size_t at = afd__row_scales_at(width), end = afd__row_bytes(width, AFD_DTYPE_FP8);
	float *scales = (float *)(dst + at); /* [afd__row_groups(width)] */
	uint32_t n_groups = afd__row_groups(width);

	for (uint32_t g = 0; g < n_groups; g++) {
		size_t first = (size_t)g * GROUP, n = width - first < GROUP ? width - first : GROUP;

		scales[g] = scale_of_group(src + first * sizeof(float), n);
		write_group(src + first * sizeof(float), dst + first, n, scales[g]);
	}
	memset(dst + width, 0, at - width);
	memset(&scales[n_groups], 0, end - at - n_groups * sizeof(float));
}

static void read_fp8_row(const char *src, char *dst, uint32_t width, const int accumulate)
{
	const float *scales = (const float *)(src + afd__row_scales_at(width));

	for (size_t first = 0; first < width; first += GROUP) {
		size_t n = width - first < GROUP ? width - first : GROUP;

		for (size_t i = first; i < first + n; i += LANES) {
			vec v = vec_load_some(src + i, AFD_DTYPE_FP8, first + n - i);
			char *to = dst + i * sizeof(float);

			v *= scales[first / GROUP];
			if (accumulate)
				v += vec_load_some(to, AFD_DTYPE_F32, first + n - i);
			vec_store_some(to, v, AFD_DTYPE_F32, first + n - i);
		}
	}
}

/* ---- rows ---- */

static void add_row(const char *src, char *dst, uint32_t width, int src_dtype)
{
	if (src_dtype == AFD_DTYPE_FP8)
		read_fp8_row(src, dst, width, 1);
	else if (src_dtype == AFD_DTYPE_F32)
		convert_row(src, dst, width, AFD_DTYPE_F32, AFD_DTYPE_F32, 1);
	else if (src_dtype == AFD_DTYPE_BF16)
		convert_row(src, dst, width, AFD_DTYPE_BF16, AFD_DTYPE_F32, 1);
	else
		convert_row(src, dst, width, AFD_DTYPE_F16, AFD_DTYPE_F32, 1);
}

static void write_row(const char *src, char *dst, uint32_t width, int src_dtype, int dst_dtype)
{
	if (src_dtype == dst_dtype)
		memmove(dst, src, width * dtype_bytes(src_dtype));
	else if (src_dtype == AFD_DTYPE_FP8)
		read_fp8_row(src, dst, width, 0);
	else if (dst_dtype == AFD_DTYPE_FP8)
		write_fp8_row(src, dst, width);
	else if (src_dtype == AFD_DTYPE_BF16)
		convert_row(src, dst, width, AFD_DTYPE_BF16, AFD_DTYPE_F32, 0);
	else if (src_dtype == AFD_DTYPE_F16)
		convert_row(src, dst, width, AFD_DTYPE_F16, AFD_DTYPE_F32, 0);
	else if (dst_dtype == AFD_DTYPE_BF16)
		convert_row(src, dst, width, AFD_DTYPE_F32, AFD_DTYPE_BF16, 0);
	else
		convert_row(src, dst, width, AFD_DTYPE_F32, AFD_DTYPE_F16, 0);
}

void AFD_K(convert)(const struct afd__convert_args *a, uint32_t row0, uint32_t row1)
{
	for (size_t row = row0; row < row1; row++) {
		size_t other = a->index ? (size_t)a->index[row] : row;
		const char *src = (const char *)a->src + (a->scatter ? row : other) * a->src_stride;
		char *dst = (char *)a->dst + (a->scatter ? other : row) * a->dst_stride;

		if (a->accumulate)
			add_row(src, dst, a->width, a->src_dtype);
		else
			write_row(src, dst, a->width, a->src_dtype, a->dst_dtype);
	}
}
