/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The host's sequence ids and the index that each has in the KV books. A hash table of fixed
 * capacity, open addressing; a removed id closes its gap, so that looking up never passes over
 * graves.
 *
 * Invariant: an index belongs to one id, or lies on the stack of free ones. Called by attn and
 * batch.
 */
#ifndef AFD_LIB_ATTN_SEQUENCES_H
#define AFD_LIB_ATTN_SEQUENCES_H

#include "../context/core.h"

struct afd__sequences {
	uint32_t capacity, n;
	uint32_t mask;    /* buckets - 1; a power of two of buckets, at least twice the capacity */
	int32_t *buckets; /* [mask + 1] index, or -1 */
	uint64_t *ids;    /* [capacity] by index */
	uint32_t *free;   /* [capacity]: the first capacity - n */
};

int afd__sequences_create(struct afd__sequences *table, struct afd_context *ctx, uint32_t capacity);
void afd__sequences_destroy(struct afd__sequences *table); /* also of a zeroed one */

/* The index of an id, or -ENOENT with the text. */
int afd__sequences_find(const struct afd__sequences *table, uint64_t id);
/* Gives a new id an index; -EEXIST, -ENOSPC. */
int afd__sequences_add(struct afd__sequences *table, uint64_t id);
void afd__sequences_remove(struct afd__sequences *table, uint32_t index);

#endif
