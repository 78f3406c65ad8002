/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Host memory that devices of a context were told of. Registration is the process's, not a
 * device's: both ends of a link may ask for the same slots, each until it ends, so pieces are
 * counted here, and the last to go unregisters. One lock, taken when links and stages come and go
 * and never on the path of a row.
 *
 * Called by the stages, for slots and for memory that the host lends them.
 */
#include <pthread.h>
#include <unistd.h>

#include "device.h"

struct piece {
	struct piece *next;
	char *memory;
	size_t bytes;
	unsigned n_users;
	int state; /* what the backend said: 0 registered here, 1 by somebody else, or the error */
};

struct afd__host_memory {
	pthread_mutex_t lock;
	struct piece *pieces;
};

/* Published once by compare and swap, so that contexts which never register have none. */
static struct afd__host_memory *take(struct afd_context *ctx)
{
	struct afd__host_memory *all = atomic_load(&ctx->host_memory), *fresh;

	if (all)
		return all;
	fresh = afd__alloc(ctx, 1, sizeof(*fresh));
	if (!fresh)
		return NULL;
	pthread_mutex_init(&fresh->lock, NULL);
	if (atomic_compare_exchange_strong(&ctx->host_memory, &all, fresh))
		return fresh;
	afd__free(fresh);
	return all;
}

static struct piece **find(struct afd__host_memory *all, const char *memory, size_t bytes)
{
	struct piece **link = &all->pieces;

	while (*link && ((*link)->memory != memory || (*link)->bytes != bytes))
		link = &(*link)->next;
	return link;
}

static struct piece *add(struct afd__device *dev, void *memory, size_t bytes)
{
	struct piece *piece = afd__alloc(dev->ctx, 1, sizeof(*piece));

	if (!piece)
		return NULL;
	piece->memory = memory;
	piece->bytes = bytes;
	piece->state = dev->ops->host_register(dev, memory, bytes);
	return piece;
}

static void tell(struct afd__device *dev, const char *what, size_t bytes)
{
	char text[256];

	if (atomic_exchange(&dev->told_unregistered, 1))
		return;
	afd__error_save(text, sizeof(text));
	afd__log(dev->ctx, AFD_LOG_WARN,
		"device %s: %s (%zu bytes) cannot be registered, rows pass through the device's "
		"own memory: %s",
		dev->name, what, bytes, text);
}

int afd__device_register(struct afd__device *dev, void *memory, size_t bytes, const char *what)
{
	struct afd__host_memory *all;
	struct piece **link;
	int rc = -ENOMEM;

	if (!dev->ops->host_register)
		return 0;
	all = take(dev->ctx);
	if (!all)
		return -ENOMEM;
	pthread_mutex_lock(&all->lock);
	link = find(all, memory, bytes);
	if (!*link)
		*link = add(dev, memory, bytes);
	if (*link) {
		(*link)->n_users++;
		rc = (*link)->state;
	}
	pthread_mutex_unlock(&all->lock);
	if (rc < 0)
		tell(dev, what, bytes);
	return rc < 0 ? rc : 0;
}

void afd__device_unregister(struct afd__device *dev, void *memory, size_t bytes)
{
	struct afd__host_memory *all = atomic_load(&dev->ctx->host_memory);
	struct piece **link, *piece;

	/* In a child of fork the lock may be held by a thread that does not exist there, and the
	 * device knows nothing of the child. */
	if (!dev->ops->host_register || !all || dev->ctx->pid != getpid())
		return;
	pthread_mutex_lock(&all->lock);
	link = find(all, memory, bytes);
	piece = *link;
	if (piece && !--piece->n_users) {
		*link = piece->next;
		if (piece->state == 0)
			dev->ops->host_unregister(dev, memory);
		afd__free(piece);
	}
	pthread_mutex_unlock(&all->lock);
}
