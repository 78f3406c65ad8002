/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The names of the operations in each variant; product.h has those of the products. A name is
 * declared whether or not this CPU's build has the variant: table.c decides which exist.
 */
#ifndef AFD_KERNELS_VARIANTS_H
#define AFD_KERNELS_VARIANTS_H

#include "kernels.h"

#define AFD_K_DECLARE(variant) \
	void afd_k_embed_##variant(const struct afd__embed_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_norm_##variant(const struct afd__norm_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_angles_##variant( \
		const struct afd__angles_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_rope_##variant(const struct afd__rope_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_attend_##variant( \
		const struct afd__attend_args *a, uint32_t task0, uint32_t task1); \
	void afd_k_activation_##variant( \
		const struct afd__activation_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_convert_##variant( \
		const struct afd__convert_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_argmax_##variant(const struct afd__argmax_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_gate_##variant(const struct afd__gate_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_quantize_##variant( \
		const struct afd__quantize_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_route_##variant(const struct afd__route_args *a, uint32_t row0, uint32_t row1); \
	void afd_k_experts_gather_##variant( \
		const struct afd_k_experts *e, uint32_t entry0, uint32_t entry1); \
	void afd_k_experts_activate_##variant( \
		const struct afd_k_experts *e, uint32_t entry0, uint32_t entry1); \
	void afd_k_experts_combine_##variant( \
		const struct afd_k_experts *e, uint32_t row0, uint32_t row1);

AFD_K_DECLARE(c)
AFD_K_DECLARE(avx2)
AFD_K_DECLARE(avx512)

#endif
