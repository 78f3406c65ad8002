/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Registered memory. Registering pins pages and fills the adapter's tables, so it is done for large
 * chunks, once for each device, and links take areas of them. The first chunk stays until the
 * transport ends, so that peers which come and go register nothing; others go when they are empty.
 */
#include <errno.h>
#include <string.h>
#include <sys/resource.h>

#include "verbs.h"

enum { CHUNK_BYTES = 8 << 20, PAGE = 4096 };

static size_t round_up(size_t bytes, size_t unit)
{
	return (bytes + unit - 1) / unit * unit;
}

static int add_chunk(struct hub *hub, size_t bytes, struct chunk **out)
{
	struct chunk *chunk = hub->host->alloc(hub->ctx, 1, sizeof(*chunk)), **at = &hub->chunks;

	if (!chunk)
		return -ENOMEM;
	chunk->bytes = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;
	chunk->memory = hub->host->large_alloc(hub->ctx, chunk->bytes, PAGE, "slots of verbs: links");
	if (!chunk->memory) {
		hub->host->free(chunk);
		return -ENOMEM;
	}
	while (*at)
		at = &(*at)->next;
	*at = chunk;
	*out = chunk;
	return 0;
}

static void free_chunk(struct hub *hub, struct chunk *chunk)
{
	/* In a child of fork registrations are the parent's. */
	for (uint32_t i = 0; i < NICS_MAX && !verbs_forked(hub); i++) {
		if (chunk->payload[i])
			ibv_dereg_mr(chunk->payload[i]);
		if (chunk->header[i])
			ibv_dereg_mr(chunk->header[i]);
	}
	hub->host->large_free(hub->ctx, chunk->memory, chunk->bytes);
	hub->host->free(chunk);
}

/* The first gap that is large enough; *at is where an area there is linked in. */
static bool find_gap(struct chunk *chunk, size_t bytes, size_t *offset, struct area ***at)
{
	*offset = 0;
	for (*at = &chunk->areas; **at; *at = &(**at)->next) {
		if ((**at)->offset - *offset >= bytes)
			return true;
		*offset = (**at)->offset + (**at)->bytes;
	}
	return chunk->bytes - *offset >= bytes;
}

int verbs_area_take(struct hub *hub, size_t bytes, struct area **out)
{
	struct area *area = hub->host->alloc(hub->ctx, 1, sizeof(*area)), **at = NULL;
	struct chunk *chunk = hub->chunks;
	int rc = 0;

	if (!area)
		return -ENOMEM;
	area->bytes = round_up(bytes, PAGE);
	while (chunk && !find_gap(chunk, area->bytes, &area->offset, &at))
		chunk = chunk->next;
	if (!chunk) {
		rc = add_chunk(hub, area->bytes, &chunk);
		if (!rc)
			find_gap(chunk, area->bytes, &area->offset, &at);
	}
	if (rc) {
		hub->host->free(area);
		return rc;
	}
	area->chunk = chunk;
	area->next = *at;
	*at = area;
	*out = area;
	return 0;
}

void verbs_area_give(struct hub *hub, struct area *area)
{
	struct chunk *chunk = area->chunk, **link = &hub->chunks;
	struct area **at = &chunk->areas;

	while (*at != area)
		at = &(*at)->next;
	*at = area->next;
	hub->host->free(area);
	if (chunk->areas || chunk == hub->chunks)
		return;
	while (*link != chunk)
		link = &(*link)->next;
	*link = chunk->next;
	free_chunk(hub, chunk);
}

static int registration_error(struct hub *hub, const struct chunk *chunk, const struct nic *nic)
{
	int error = errno;
	struct rlimit limit = { 0 };

	getrlimit(RLIMIT_MEMLOCK, &limit);
	return hub->host->error(error == ENOMEM ? -ENOMEM : -EIO,
		"verbs: device %s cannot register %zu bytes: %s; RLIMIT_MEMLOCK is %llu", nic->name,
		chunk->bytes, strerror(error), (unsigned long long)limit.rlim_cur);
}

int verbs_area_register(struct hub *hub, struct chunk *chunk, const struct nic *nic)
{
	const int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	size_t i = (size_t)(nic - hub->nics);

	if (!chunk->header[i])
		chunk->header[i] = ibv_reg_mr(nic->pd, chunk->memory, chunk->bytes, access);
	if (chunk->header[i] && !chunk->payload[i])
		chunk->payload[i] = ibv_reg_mr(nic->pd, chunk->memory, chunk->bytes,
			access | IBV_ACCESS_RELAXED_ORDERING);
	return chunk->payload[i] ? 0 : registration_error(hub, chunk, nic);
}

void verbs_arena_free(struct hub *hub)
{
	while (hub->chunks) {
		struct chunk *chunk = hub->chunks;

		hub->chunks = chunk->next;
		free_chunk(hub, chunk);
	}
}
