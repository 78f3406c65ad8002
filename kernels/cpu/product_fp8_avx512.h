/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tiles of the FP8 product with AVX-512, for CPUs without VBMI and with it. They give the same
 * bits; product_avx512.c takes the faster one, and a test compares them.
 */
#ifndef AFD_KERNELS_PRODUCT_FP8_AVX512_H
#define AFD_KERNELS_PRODUCT_FP8_AVX512_H

#include "product_drive.h"

extern const struct afd_k_tiles afd_k_fp8_tiles_avx512, afd_k_fp8_tiles_vbmi;

#endif
