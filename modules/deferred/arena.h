/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory of the deferred device: one sparse memfd, mapped twice. What a stage is given lies in
 * `seen`, which is never accessible; the device reads and writes the same bytes in `real`. Fresh
 * memory is NaN in every dtype.
 *
 * Invariant: blocks are sorted, page-aligned and apart. They are made and freed at creation of a
 * stage only, under a lock.
 */
#ifndef AFD_MODULES_DEFERRED_ARENA_H
#define AFD_MODULES_DEFERRED_ARENA_H

#include <pthread.h>

#include "../../lib/device/module.h"

struct block {
	struct block *next;
	size_t offset, bytes; /* bytes: whole pages */
};

struct arena {
	char *seen, *real; /* the same bytes; seen is PROT_NONE */
	size_t bytes;
	int fd;
	pthread_mutex_t lock; /* of blocks */
	struct block *blocks;
};

int arena_open(struct arena *arena, const struct afd__device *dev);
void arena_close(struct arena *arena, const struct afd__device *dev);
int arena_alloc(struct arena *arena, const struct afd__device *dev, size_t bytes, const char *what,
	void **seen);
void arena_free(struct arena *arena, const struct afd__device *dev, void *seen);

/* The memory as a descriptor: of the memfd, where a GPU gives a dma-buf. An adapter refuses it; tests
 * stand in for one that takes it. */
int arena_descriptor(struct arena *arena, const struct afd__device *dev, const void *seen, int *fd,
	uint64_t *offset);

/* Where the device reads what the stage calls `seen`; a pointer outside the arena (slots, weights
 * in place) stays. */
static inline void *arena_real(const struct arena *arena, const void *seen)
{
	size_t offset = (size_t)((uintptr_t)seen - (uintptr_t)arena->seen);

	return offset < arena->bytes ? arena->real + offset : (void *)seen;
}

#endif
