/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Linear probing over at least twice as many buckets as there can be ids, so that a free bucket
 * ends every search. Removal moves later members of the same run back, as Knuth's algorithm R does
 * (The Art of Computer Programming, 6.4).
 */
#include "sequences.h"

#include <assert.h>
#include <string.h>

/* Hosts number sequences 0, 1, 2 … or by pointers; both must spread. The finaliser of splitmix64.
 */
static uint64_t hash(uint64_t id)
{
	id ^= id >> 30;
	id *= 0xbf58476d1ce4e5b9u;
	id ^= id >> 27;
	id *= 0x94d049bb133111ebu;
	return id ^ id >> 31;
}

int afd__sequences_create(struct afd__sequences *table, struct afd_context *ctx, uint32_t capacity)
{
	size_t n_buckets = 4;
	uint32_t i;

	memset(table, 0, sizeof(*table));
	while (n_buckets < 2 * (size_t)capacity)
		n_buckets *= 2;
	table->capacity = capacity;
	table->mask = (uint32_t)(n_buckets - 1);
	table->buckets = afd__alloc(ctx, n_buckets, sizeof(*table->buckets));
	table->ids = afd__alloc(ctx, capacity, sizeof(*table->ids));
	table->free = afd__alloc(ctx, capacity, sizeof(*table->free));
	if (!table->buckets || !table->ids || !table->free) {
		afd__sequences_destroy(table);
		return -ENOMEM;
	}
	memset(table->buckets, 0xff, n_buckets * sizeof(*table->buckets));
	for (i = 0; i < capacity; i++)
		table->free[i] = capacity - 1 - i;
	return 0;
}

void afd__sequences_destroy(struct afd__sequences *table)
{
	afd__free(table->buckets);
	afd__free(table->ids);
	afd__free(table->free);
	memset(table, 0, sizeof(*table));
}

/* The bucket that holds the id, or the free one where it would stand. */
static uint32_t probe(const struct afd__sequences *table, uint64_t id)
{
	uint32_t bucket = (uint32_t)hash(id) & table->mask;

	while (table->buckets[bucket] >= 0 && table->ids[table->buckets[bucket]] != id)
		bucket = (bucket + 1) & table->mask;
	return bucket;
}

int afd__sequences_find(const struct afd__sequences *table, uint64_t id)
{
	int32_t index = table->buckets[probe(table, id)];

	if (index < 0)
		return afd__error(-ENOENT, "sequence %llu: there is none", (unsigned long long)id);
	return index;
}

int afd__sequences_add(struct afd__sequences *table, uint64_t id)
{
	uint32_t bucket = probe(table, id), index;

	if (table->buckets[bucket] >= 0)
		return afd__error(-EEXIST, "sequence %llu: it exists", (unsigned long long)id);
	if (table->n == table->capacity)
		return afd__error(-ENOSPC, "sequence %llu: %u exist, max_sequences is %u",
			(unsigned long long)id, table->n, table->capacity);
	table->n++;
	index = table->free[table->capacity - table->n];
	table->ids[index] = id;
	table->buckets[bucket] = (int32_t)index;
	return (int)index;
}

void afd__sequences_remove(struct afd__sequences *table, uint32_t index)
{
	uint32_t gap = probe(table, table->ids[index]), next = gap;

	assert(table->buckets[gap] == (int32_t)index);
	for (;;) {
		uint32_t home;

		next = (next + 1) & table->mask;
		if (table->buckets[next] < 0)
			break;
		home = (uint32_t)hash(table->ids[table->buckets[next]]) & table->mask;
		/* It may move when its home does not lie cyclically in (gap, next]. */
		if (((next - home) & table->mask) < ((next - gap) & table->mask))
			continue;
		table->buckets[gap] = table->buckets[next];
		gap = next;
	}
	table->buckets[gap] = -1;
	table->free[table->capacity - table->n] = index;
	table->n--;
}
