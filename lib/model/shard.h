/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards: which part of the weights a rank holds. Shard i of n owns range i of n (range.h) of
 * the experts or columns, for any n up to their number. Routed experts are split over ep, and
 * the width of each over tp; what every row needs (dense FFN, shared experts) is split by width
 * over all tp * ep ranks, rank = ep_index * n_tp + tp_index. Attention is split by heads, so
 * that each rank has whole groups of query heads, or a part of one group. docs/models.md says it
 * for users.
 */
#ifndef AFD_LIB_SHARD_H
#define AFD_LIB_SHARD_H

#include <stdint.h>

#include "../context/range.h"
#include "model.h"

/* Of an FFN stage; { 0, 1, 0, 1 } is all of it. */
struct afd__ffn_shard { uint32_t tp, n_tp, ep, n_ep; };

static inline uint32_t afd__ffn_shard_rank(struct afd__ffn_shard s) { return s.ep * s.n_tp + s.tp; }
static inline uint32_t afd__ffn_shard_count(struct afd__ffn_shard s) { return s.n_tp * s.n_ep; }

/*
 * From a host's parameters: counts of 0 become 1. -EINVAL when an index is not below its count,
 * when attention has ep, or, with an architecture (NULL: only the numbers themselves), when a shard
 * would be left with nothing. `what` begins the error.
 */
int afd__shard_read(struct afd__ffn_shard *out, const struct afd_shard *in, int32_t role,
		    const struct afd__arch *arch, const char *what);

/*
 * The heads of attention rank i of n. With no more ranks than KV heads, KV heads are dealt out with
 * all their query heads. With more, each KV head has several ranks, that share its query heads and
 * hold a copy of it. So a rank's query heads are always spread evenly over its KV heads, and begin
 * with the first of them.
 */
struct afd__heads { struct afd__range q, kv; };

static inline struct afd__heads afd__shard_heads(uint32_t n_heads, uint32_t n_kv_heads,
						 uint32_t index, uint32_t n)
{
	uint32_t group = n_heads / n_kv_heads, head, first, last;
	struct afd__range kv = afd__shard_range(n_kv_heads, index, n), q;

	if (n <= n_kv_heads)
		return (struct afd__heads){ { kv.begin * group, kv.end * group }, kv };
	/* KV head h has the ranks ceil(h n / n_kv_heads) .. ceil((h + 1) n / n_kv_heads). */
	head = kv.begin;
	first = (uint32_t)(((uint64_t)head * n + n_kv_heads - 1) / n_kv_heads);
	last = (uint32_t)(((uint64_t)(head + 1) * n + n_kv_heads - 1) / n_kv_heads);
	q = afd__shard_range(group, index - first, last - first);
	return (struct afd__heads){ { head * group + q.begin, head * group + q.end },
				    { head, head + 1 } };
}

/* Of a tensor [rows][columns]; of a vector rows alone, columns 0 .. 1. */
struct afd__cut { struct afd__range rows, columns; };

/* What attention rank i of n holds of a tensor of a layer, or (layer NULL) of none: its heads, and
 * all of what has none. */
struct afd__cut afd__shard_attention(const struct afd__layer *layer, int32_t kind,
				      const uint64_t *shape /* [n_dims] */, uint32_t n_dims,
				      uint32_t index, uint32_t n);

#endif
