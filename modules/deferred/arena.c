/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two mappings and the first-fit list of blocks (arena.h).
 */
#include "arena.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LARGEST_ARENA  ((size_t)64 << 30) /* address space only: pages come with their first use */
#define SMALLEST_ARENA ((size_t)64 << 20)
#define PAGE           ((size_t)65536) /* a multiple of every page size in use */

static int map_twice(struct arena *arena, size_t bytes)
{
	void *seen, *real;

	if (ftruncate(arena->fd, (off_t)bytes))
		return -errno;
	seen = mmap(NULL, bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, arena->fd, 0);
	if (seen == MAP_FAILED)
		return -errno;
	real = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, arena->fd, 0);
	if (real == MAP_FAILED) {
		munmap(seen, bytes);
		return -ENOMEM;
	}
	arena->seen = seen;
	arena->real = real;
	arena->bytes = bytes;
	return 0;
}

int arena_open(struct arena *arena, const struct afd__device *dev)
{
	int rc = -ENOMEM;

	arena->fd = memfd_create("afd-deferred", MFD_CLOEXEC);
	if (arena->fd < 0)
		return dev->host->error(
			-EIO, "device %s: memfd_create: %s", dev->name, strerror(errno));
	/* Under a limit of the address space a smaller arena may do. */
	for (size_t bytes = LARGEST_ARENA; rc && bytes >= SMALLEST_ARENA; bytes /= 2)
		rc = map_twice(arena, bytes);
	if (rc) {
		close(arena->fd);
		return dev->host->error(-ENOMEM,
			"device %s: no address space for 2 x %zu bytes: %s", dev->name,
			SMALLEST_ARENA, strerror(-rc));
	}
	pthread_mutex_init(&arena->lock, NULL);
	return 0;
}

void arena_close(struct arena *arena, const struct afd__device *dev)
{
	while (arena->blocks) {
		struct block *next = arena->blocks->next;

		dev->host->free(arena->blocks);
		arena->blocks = next;
	}
	munmap(arena->seen, arena->bytes);
	munmap(arena->real, arena->bytes);
	close(arena->fd);
	pthread_mutex_destroy(&arena->lock);
}

/* Puts the block into the first gap that holds it. */
static int place(struct arena *arena, struct block *block)
{
	struct block **at = &arena->blocks;
	size_t offset = 0;

	for (; *at; at = &(*at)->next) {
		if ((*at)->offset - offset >= block->bytes)
			break;
		offset = (*at)->offset + (*at)->bytes;
	}
	if (arena->bytes - offset < block->bytes)
		return -ENOMEM;
	block->offset = offset;
	block->next = *at;
	*at = block;
	return 0;
}

int arena_alloc(struct arena *arena, const struct afd__device *dev, size_t bytes, const char *what,
	void **seen)
{
	struct block *block;
	int rc = -ENOMEM;

	block = dev->host->alloc(dev->ctx, 1, sizeof(*block));
	if (!block)
		return -ENOMEM;
	if (bytes <= arena->bytes) {
		block->bytes = (bytes + PAGE - 1) / PAGE * PAGE;
		pthread_mutex_lock(&arena->lock);
		rc = place(arena, block);
		pthread_mutex_unlock(&arena->lock);
	}
	if (rc) {
		dev->host->free(block);
		return dev->host->error(-ENOMEM,
			"%s: no %zu bytes on device %s, whose arena has %zu", what, bytes,
			dev->name, arena->bytes);
	}
	memset(arena->real + block->offset, 0xff, bytes);
	*seen = arena->seen + block->offset;
	return 0;
}

void arena_free(struct arena *arena, const struct afd__device *dev, void *seen)
{
	size_t offset = (size_t)((char *)seen - arena->seen);
	struct block **at, *block;

	pthread_mutex_lock(&arena->lock);
	for (at = &arena->blocks; *at && (*at)->offset != offset; at = &(*at)->next)
		;
	block = *at;
	if (block) {
		*at = block->next;
		/* Gives the pages back; where the kernel cannot, they stay until the close. */
		if (fallocate(arena->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
			    (off_t)block->bytes))
			memset(arena->real + offset, 0xff, block->bytes);
	}
	pthread_mutex_unlock(&arena->lock);
	dev->host->free(block);
}

int arena_descriptor(struct arena *arena, const struct afd__device *dev, const void *seen, int *fd,
	uint64_t *offset)
{
	*fd = fcntl(arena->fd, F_DUPFD_CLOEXEC, 0);
	if (*fd < 0)
		return dev->host->error(-EIO, "device %s: no descriptor: %s", dev->name,
			strerror(errno));
	*offset = (uint64_t)((const char *)seen - arena->seen);
	return 0;
}
