/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards: which part of the weights a rank holds. Shard i of n owns floor(i N / n) .. floor((i+1) N / n) of N heads, experts or
 * columns, for any n <= N. Routed experts are split over ep, and the width of each over tp; what every row needs (dense FFN,
 * shared experts) is split by width over all tp * ep ranks, rank = ep_index * n_tp + tp_index.
 */
#ifndef AFD_LIB_SHARD_H
#define AFD_LIB_SHARD_H

#include <stdint.h>

struct afd__range { uint32_t begin, end; };

static inline struct afd__range afd__shard_range(uint32_t total, uint32_t index, uint32_t n)
{
	return (struct afd__range){ (uint32_t)((uint64_t)index * total / n), (uint32_t)((uint64_t)(index + 1) * total / n) };
}

/* Of an FFN stage; { 0, 1, 0, 1 } is all of it. */
struct afd__ffn_shard { uint32_t tp, n_tp, ep, n_ep; };

static inline uint32_t afd__ffn_shard_rank(struct afd__ffn_shard s) { return s.ep * s.n_tp + s.tp; }
static inline uint32_t afd__ffn_shard_count(struct afd__ffn_shard s) { return s.n_tp * s.n_ep; }

#endif
