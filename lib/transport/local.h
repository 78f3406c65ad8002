/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the ends of links within one context share: the names that loop: listens at, and mappings of
 * segments, so that two ends of one shm: link in one context use one mapping. Made at first use,
 * freed by the context; guarded by one lock, which is taken when links come and go and never on the
 * path of a row.
 */
#ifndef AFD_LIB_TRANSPORT_LOCAL_H
#define AFD_LIB_TRANSPORT_LOCAL_H

#include <pthread.h>
#include <sys/types.h>

#include "ops.h"

struct loop_endpoint;

struct local_mapping {
	struct local_mapping *next;
	void *memory;
	size_t bytes;
	unsigned n_users;
	dev_t device; /* of the memory's file, which names it */
	ino_t inode;
};

struct afd__local {
	pthread_mutex_t lock;
	struct loop_endpoint *endpoints;
	struct local_mapping *mappings;
};

/* NULL and the error text when there is no memory. */
struct afd__local *afd__local_take(struct afd_context *ctx);
void afd__local_lock(const struct afd_context *ctx, struct afd__local *local);
void afd__local_unlock(const struct afd_context *ctx, struct afd__local *local);

/* Maps the file, or shares the mapping that another end of this context has. Takes the descriptor's
 * file, not the descriptor. */
int afd__local_map(struct afd_context *ctx, int fd, size_t bytes, struct local_mapping **out);
void afd__local_unmap(struct afd_context *ctx, struct local_mapping *mapping);

#endif
