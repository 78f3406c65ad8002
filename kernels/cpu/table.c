/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The tables of the CPU variants. Which one runs is the context's choice (lib/context/isa.c); here
 * they are only named.
 */
#include "kernels.h"
#include "product.h"
#include "variants.h"

#define TABLE(variant) \
	static const struct afd_cpu_kernels variant##_kernels = { \
		.name = #variant, \
		.product = afd_k_product_##variant, \
		.product_in_place = afd_k_product_in_place_##variant, \
		.pack = afd_k_pack_c, \
		.embed = afd_k_embed_##variant, \
		.norm = afd_k_norm_##variant, \
		.angles = afd_k_angles_##variant, \
		.rope = afd_k_rope_##variant, \
		.attend = afd_k_attend_##variant, \
		.activation = afd_k_activation_##variant, \
		.convert = afd_k_convert_##variant, \
		.argmax = afd_k_argmax_##variant, \
		.gate = afd_k_gate_##variant, \
		.quantize = afd_k_quantize_##variant, \
		.route = afd_k_route_##variant, \
		.experts_gather = afd_k_experts_gather_##variant, \
		.experts_activate = afd_k_experts_activate_##variant, \
		.experts_combine = afd_k_experts_combine_##variant, \
	}

TABLE(c);
#if defined(__x86_64__)
TABLE(avx2);
TABLE(avx512);
#endif

const struct afd_cpu_kernels *afd__cpu_kernels(int isa)
{
#if defined(__x86_64__)
	if (isa == AFD__ISA_AVX512)
		return &avx512_kernels;
	if (isa == AFD__ISA_AVX2)
		return &avx2_kernels;
#endif
	return &c_kernels;
}
