/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows from one dtype to another, gathered or scattered by an index if there is one, or added to
 * float rows.
 * Rounding is to nearest even; NaN stays NaN, what is too large for f16 becomes infinite, denormals
 * are kept. This is where rows cross the wire, so every variant gives the same bits.
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

static void add_row(const char *src, char *dst, size_t width, int src_dtype)
{
	if (src_dtype == AFD_DTYPE_F32)
		convert_row(src, dst, width, AFD_DTYPE_F32, AFD_DTYPE_F32, 1);
	else if (src_dtype == AFD_DTYPE_BF16)
		convert_row(src, dst, width, AFD_DTYPE_BF16, AFD_DTYPE_F32, 1);
	else
		convert_row(src, dst, width, AFD_DTYPE_F16, AFD_DTYPE_F32, 1);
}

static void write_row(const char *src, char *dst, size_t width, int src_dtype, int dst_dtype)
{
	if (src_dtype == dst_dtype)
		memmove(dst, src, width * dtype_bytes(src_dtype));
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
