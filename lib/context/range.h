/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How N things are divided among n: part i has floor(i N / n) .. floor((i+1) N / n). Weights, heads
 * and experts are divided so, and the rows of an attention group; whoever divides anything asks
 * here, since stages and transport must agree.
 */
#ifndef AFD_LIB_RANGE_H
#define AFD_LIB_RANGE_H

#include <stdint.h>

struct afd__range { uint32_t begin, end; };

static inline struct afd__range afd__shard_range(uint32_t total, uint32_t index, uint32_t n)
{
	return (struct afd__range){ (uint32_t)((uint64_t)index * total / n),
				    (uint32_t)((uint64_t)(index + 1) * total / n) };
}

static inline uint32_t afd__range_size(struct afd__range r) { return r.end - r.begin; }

#endif
