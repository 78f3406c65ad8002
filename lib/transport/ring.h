/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A ring of slot numbers from one writer to one reader, in memory that both sides map, and the flag
 * by which a side says that it sleeps. The only code that knows the order of memory operations.
 *
 * An entry carries its own number, so a reader needs no shared head: it looks at its next entry,
 * and one cache line crosses per message. A zeroed ring is empty, because numbers begin at 1. The
 * writer never laps the reader: a slot is in a ring at most once, and a ring has more entries than
 * there are slots.
 *
 * The other side may be hostile: what was read is a copy, checked by the caller before use.
 */
#ifndef AFD_LIB_TRANSPORT_RING_H
#define AFD_LIB_TRANSPORT_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct ring_entry {
	_Atomic uint64_t word; /* number of the entry << 16 | slot */
	_Atomic uint64_t bytes;
};

struct ring {                       /* one side's view */
	struct ring_entry *entries; /* [mask + 1], shared */
	uint64_t next;              /* entries written or read so far */
	uint64_t mask;
};

/* The slot's bytes, written before, are visible to a reader that sees the entry. Sequentially
 * consistent, so that the entry is ordered before the look at the sleeper's flag; pairs with
 * ring_sleep. */
static inline void ring_write(struct ring *ring, uint16_t slot, uint64_t bytes)
{
	struct ring_entry *entry = &ring->entries[ring->next & ring->mask];

	atomic_store_explicit(&entry->bytes, bytes, memory_order_relaxed);
	atomic_store_explicit(&entry->word, ++ring->next << 16 | slot, memory_order_seq_cst);
}

/* The same for an entry that wakes nobody: the store need not be waited for. */
static inline void ring_write_quiet(struct ring *ring, uint16_t slot, uint64_t bytes)
{
	struct ring_entry *entry = &ring->entries[ring->next & ring->mask];

	atomic_store_explicit(&entry->bytes, bytes, memory_order_relaxed);
	atomic_store_explicit(&entry->word, ++ring->next << 16 | slot, memory_order_release);
}

/* Sequentially consistent, so that it is ordered after the own flag in ring_sleep; on x86 an
 * ordinary load. */
static inline bool ring_ready(const struct ring *ring)
{
	const struct ring_entry *entry = &ring->entries[ring->next & ring->mask];

	return atomic_load_explicit(&entry->word, memory_order_seq_cst) >> 16 ==
	       ((ring->next + 1) & (UINT64_MAX >> 16));
}

/* Pairs with ring_write: the slot's bytes are visible after it. */
static inline bool ring_read(struct ring *ring, uint16_t *slot, uint64_t *bytes)
{
	struct ring_entry *entry = &ring->entries[ring->next & ring->mask];
	uint64_t word = atomic_load_explicit(&entry->word, memory_order_acquire);

	if (word >> 16 != ((ring->next + 1) & (UINT64_MAX >> 16)))
		return false;
	*slot = (uint16_t)word;
	*bytes = atomic_load_explicit(&entry->bytes, memory_order_relaxed);
	ring->next++;
	return true;
}

/* Says that this side goes to sleep; it must look at its rings once more afterwards. Pairs with
 * ring_wake: either the writer sees the flag, or the sleeper sees the entry. */
static inline void ring_sleep(_Atomic uint32_t *flag)
{
	atomic_store_explicit(flag, 1, memory_order_seq_cst);
}

static inline void ring_awake(_Atomic uint32_t *flag)
{
	atomic_store_explicit(flag, 0, memory_order_relaxed);
}

/* After ring_write: true when the other side sleeps and is to be woken; one writer is told so once.
 */
static inline bool ring_wake(_Atomic uint32_t *flag)
{
	return atomic_load_explicit(flag, memory_order_seq_cst) &&
	       atomic_exchange_explicit(flag, 0, memory_order_seq_cst);
}

#endif
