/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a dtype to a type, in launchers: f(T{}) for the T of a dtype. And where a row of a matrix
 * lies, whichever its layout. Included by the kernels of this folder.
 */
#ifndef AFD_KERNELS_CUDA_DISPATCH_H
#define AFD_KERNELS_CUDA_DISPATCH_H

#include "gpu.h"

enum { GPU_INVALID = 1 }; /* cudaErrorInvalidValue */

template <class F> static inline int with_dtype(int32_t dtype, F &&f)
{
	switch (dtype) {
	case AFD_DTYPE_F32:
		return f(float{});
	case AFD_DTYPE_BF16:
		return f(bf16{});
	case AFD_DTYPE_F16:
		return f(f16{});
	case AFD_DTYPE_FP8:
		return f(fp8{});
	default:
		return GPU_INVALID;
	}
}

template <class F> static inline int with_wide_dtype(int32_t dtype, F &&f)
{
	return dtype == AFD_DTYPE_F32    ? f(float{})
	       : dtype == AFD_DTYPE_BF16 ? f(bf16{})
	       : dtype == AFD_DTYPE_F16  ? f(f16{})
					 : (int)GPU_INVALID;
}

static inline size_t number_bytes(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 ? 4 : dtype == AFD_DTYPE_FP8 ? 1 : 2;
}

static inline size_t matrix_row_bytes(const struct afd__matrix *m)
{
	return m->layout == AFD__LAYOUT_PACKED ? afd_gpu_packed_row_bytes(m->k, m->dtype)
					       : m->k * number_bytes(m->dtype);
}

#endif
