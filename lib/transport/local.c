/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The registry is published once by compare and swap, so that contexts which never use a transport
 * have none. In a child of fork the lock may be held by a thread that does not exist there; the
 * child is alone, and goes without it.
 */
#include "local.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "socket.h"

struct afd__local *afd__local_take(struct afd_context *ctx)
{
	struct afd__local *local = atomic_load(&ctx->local), *fresh;

	if (local)
		return local;
	fresh = afd__alloc(ctx, 1, sizeof(*fresh));
	if (!fresh)
		return NULL;
	pthread_mutex_init(&fresh->lock, NULL);
	if (atomic_compare_exchange_strong(&ctx->local, &local, fresh))
		return fresh;
	afd__free(fresh);
	return local;
}

void afd__local_lock(const struct afd_context *ctx, struct afd__local *local)
{
	if (!afd__forked(ctx))
		pthread_mutex_lock(&local->lock);
}

void afd__local_unlock(const struct afd_context *ctx, struct afd__local *local)
{
	if (!afd__forked(ctx))
		pthread_mutex_unlock(&local->lock);
}

static struct local_mapping *find_mapping(struct afd__local *local, const struct stat *st)
{
	struct local_mapping *mapping = local->mappings;

	while (mapping && (mapping->device != st->st_dev || mapping->inode != st->st_ino))
		mapping = mapping->next;
	return mapping;
}

static int map_fresh(struct afd_context *ctx, int fd, size_t bytes, const struct stat *st,
	struct local_mapping **out)
{
	struct local_mapping *mapping = afd__alloc(ctx, 1, sizeof(*mapping));

	if (!mapping)
		return -ENOMEM;
	mapping->memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (mapping->memory == MAP_FAILED) {
		afd__free(mapping);
		return afd__error(-ENOMEM, "slots: no %zu bytes of shared memory: %s", bytes,
			strerror(errno));
	}
	mapping->bytes = bytes;
	mapping->device = st->st_dev;
	mapping->inode = st->st_ino;
	*out = mapping;
	return 0;
}

int afd__local_map(struct afd_context *ctx, int fd, size_t bytes, struct local_mapping **out)
{
	struct afd__local *local = afd__local_take(ctx);
	struct local_mapping *mapping;
	struct stat st;
	int rc = 0;

	if (!local)
		return -ENOMEM;
	if (fstat(fd, &st))
		return afd__error(-EIO, "slots: fstat: %s", strerror(errno));
	afd__local_lock(ctx, local);
	mapping = find_mapping(local, &st);
	if (!mapping) {
		rc = map_fresh(ctx, fd, bytes, &st, &mapping);
		if (!rc) {
			mapping->next = local->mappings;
			local->mappings = mapping;
		}
	}
	if (!rc)
		mapping->n_users++;
	afd__local_unlock(ctx, local);
	if (!rc)
		*out = mapping;
	return rc;
}

void afd__local_unmap(struct afd_context *ctx, struct local_mapping *mapping)
{
	struct afd__local *local = atomic_load(&ctx->local);
	struct local_mapping **link;

	if (!mapping)
		return;
	afd__local_lock(ctx, local);
	if (!--mapping->n_users) {
		for (link = &local->mappings; *link != mapping;)
			link = &(*link)->next;
		*link = mapping->next;
		munmap(mapping->memory, mapping->bytes);
		afd__free(mapping);
	}
	afd__local_unlock(ctx, local);
}
