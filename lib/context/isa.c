/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Which variant of the CPU kernels a context uses: the widest that CPUID offers, unless AFD_ISA
 * names one. The choice is made once, when a context is created, because two variants may differ in
 * the last bits of a product.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>

static const char *const isa_names[] = { [AFD__ISA_C] = "c",
					 [AFD__ISA_AVX2] = "avx2",
					 [AFD__ISA_AVX512] = "avx512" };

#if defined(__x86_64__)
#include <cpuid.h>

static bool cpu_has_f16c(void)
{
	unsigned eax, ebx, ecx, edx;

	return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

/* __builtin_cpu_supports also asks XGETBV, so a kernel that does not save the wide registers counts
 * as a CPU without. */
static int widest_isa(void)
{
	__builtin_cpu_init();
	if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !cpu_has_f16c())
		return AFD__ISA_C;
	if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
	    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
		return AFD__ISA_AVX512;
	return AFD__ISA_AVX2;
}
#else
static int widest_isa(void)
{
	return AFD__ISA_C;
}
#endif

const char *afd__isa_name(int isa)
{
	return isa >= AFD__ISA_C && isa <= AFD__ISA_AVX512 ? isa_names[isa] : "?";
}

int afd__isa_choose(void)
{
	const char *forced = getenv("AFD_ISA");
	int widest = widest_isa(), isa;

	if (!forced || !forced[0])
		return widest;
	for (isa = AFD__ISA_C; isa <= AFD__ISA_AVX512; isa++) {
		if (strcmp(forced, isa_names[isa]))
			continue;
		if (isa > widest)
			return afd__error(-ENODEV, "AFD_ISA: %s is forced, this CPU has %s", forced,
					  isa_names[widest]);
		return isa;
	}
	return afd__error(-EINVAL, "AFD_ISA: \"%.32s\" is none of c, avx2, avx512", forced);
}
