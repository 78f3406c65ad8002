/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A table of graphs by their keys, in chains of a hash. Nothing is allocated but by the driver when
 * a piece is recorded, which is the second time that it comes: so nothing is recorded for prompts
 * whose like never comes again, and every kernel has run before it is recorded, which may load it.
 */
#include "recordings.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

struct afd__recording {
	struct afd__recording_key key;
	int32_t next;             /* of its chain; -1: none */
	struct afd__graph *graph; /* NULL: it cannot be recorded */
	uint64_t used;            /* n_used, when it was last */
};

/* ---- life ---- */

int afd__recordings_create(struct afd__recordings *r, struct afd__device *device,
	const char *stage, uint32_t graphs, uint32_t pieces)
{
	struct afd_context *ctx = device->ctx;
	uint32_t n_chains = 64;

	memset(r, 0, sizeof(*r));
	if (graphs != UINT32_MAX && graphs > AFD__MAX_GRAPHS)
		return afd__error(-EINVAL, "%s: graphs is %u, limit %d, or UINT32_MAX for none",
			stage, graphs, AFD__MAX_GRAPHS);
	if (graphs == UINT32_MAX || !pieces || !afd__device_has_graphs(device))
		return 0;
	graphs = graphs ? graphs : AFD__DEFAULT_GRAPHS;
	if (pieces > (1u << 24) / graphs)
		pieces = (1u << 24) / graphs;
	while (n_chains < graphs * pieces)
		n_chains *= 2;
	r->kept = afd__alloc(ctx, graphs * pieces, sizeof(*r->kept));
	r->chains = afd__alloc(ctx, n_chains, sizeof(*r->chains));
	r->seen = afd__alloc(ctx, n_chains, sizeof(*r->seen));
	r->device = device;
	if (!r->kept || !r->chains || !r->seen) {
		afd__recordings_destroy(r);
		return -ENOMEM;
	}
	memset(r->chains, 0xff, n_chains * sizeof(*r->chains));
	r->n_chains = n_chains;
	r->capacity = graphs * pieces;
	r->stage = stage;
	return 0;
}

void afd__recordings_destroy(struct afd__recordings *r)
{
	uint32_t i;

	for (i = 0; i < r->n_kept; i++)
		afd__graph_free(r->device, r->kept[i].graph);
	afd__free(r->kept);
	afd__free(r->chains);
	afd__free(r->seen);
	memset(r, 0, sizeof(*r));
}

/* ---- the table ---- */

/* Never 0. */
static uint64_t hash_of(const struct afd__recording_key *key)
{
	return XXH3_64bits(key, sizeof(*key)) | 1;
}

static int32_t *chain_of(struct afd__recordings *r, uint64_t hash)
{
	return &r->chains[hash >> 1 & (r->n_chains - 1)];
}

static struct afd__recording *find(
	struct afd__recordings *r, const struct afd__recording_key *key, uint64_t hash)
{
	int32_t i;

	for (i = *chain_of(r, hash); i >= 0; i = r->kept[i].next) {
		if (!memcmp(&r->kept[i].key, key, sizeof(*key)))
			return &r->kept[i];
	}
	return NULL;
}

static bool was_seen(struct afd__recordings *r, uint64_t hash)
{
	uint64_t *place = &r->seen[hash >> 1 & (r->n_chains - 1)];
	bool seen = *place == hash;

	*place = hash;
	return seen;
}

static void unchain(struct afd__recordings *r, const struct afd__recording *kept)
{
	int32_t *link = chain_of(r, hash_of(&kept->key)), index = (int32_t)(kept - r->kept);

	while (*link != index)
		link = &r->kept[*link].next;
	*link = kept->next;
}

/* The place for one more: that which was not used for longest, when all are taken. It is of no step
 * or pass that is under way, since there are places for all pieces of one. */
static struct afd__recording *make_room(struct afd__recordings *r)
{
	struct afd__recording *oldest = r->kept;
	uint32_t i;

	if (r->n_kept < r->capacity)
		return &r->kept[r->n_kept++];
	for (i = 1; i < r->n_kept; i++) {
		if (r->kept[i].used < oldest->used)
			oldest = &r->kept[i];
	}
	unchain(r, oldest);
	afd__graph_free(r->device, oldest->graph);
	return oldest;
}

static struct afd__recording *add(
	struct afd__recordings *r, const struct afd__recording_key *key, uint64_t hash)
{
	struct afd__recording *kept = make_room(r);
	int32_t *chain = chain_of(r, hash);

	*kept = (struct afd__recording){ .key = *key, .next = *chain };
	*chain = (int32_t)(kept - r->kept);
	return kept;
}

/* ---- recording ---- */

static void tell(struct afd__recordings *r)
{
	char text[256];

	if (r->told)
		return;
	r->told = 1;
	afd__error_save(text, sizeof(text));
	afd__log(r->device->ctx, AFD_LOG_WARN,
		"%s: what comes again cannot be recorded and runs without a graph: %s", r->stage,
		text);
}

/* What is enqueued meanwhile does not run. */
static void record(struct afd__recordings *r, struct afd__queue *q, struct afd__recording *kept,
	int (*enqueue)(void *user), void *user)
{
	int rc = afd__queue_record(q), ended;

	if (!rc) {
		rc = enqueue(user);
		if (rc)
			tell(r);
		ended = afd__queue_recorded(q, &kept->graph);
		if (rc && !ended) {
			afd__graph_free(r->device, kept->graph);
			kept->graph = NULL;
		}
		rc = rc ? rc : ended;
	}
	if (rc)
		tell(r);
}

int afd__recordings_run(struct afd__recordings *r, struct afd__queue *q,
	const struct afd__recording_key *key, int (*enqueue)(void *user), void *user)
{
	struct afd__recording *kept;
	bool replayed;
	uint64_t hash;
	int rc;

	if (!r->capacity)
		return enqueue(user);
	hash = hash_of(key);
	kept = find(r, key, hash);
	replayed = kept && kept->graph;
	if (!kept && was_seen(r, hash)) {
		kept = add(r, key, hash);
		record(r, q, kept, enqueue, user);
	}
	if (kept)
		kept->used = ++r->n_used;
	if (!kept || !kept->graph)
		return enqueue(user);
	rc = afd__queue_replay(q, kept->graph);
	return rc ? rc : replayed;
}
