/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The caller's side of the deferred queue (queue.h).
 */
#include "queue.h"

#include <string.h>
#include <time.h>

/* How long the worker may stand still before a caller that waits for room gives up. */
#define SILENCE_NS 30000000000ull
#define BEAT_NS 10000000ull

int queue_error(const struct deferred_queue *d)
{
	int code = atomic_load_explicit(&d->error, memory_order_acquire);

	return code ? d->q->dev->host->error(code, "%s", d->error_text) : 0;
}

static bool has_room(const struct deferred_queue *d, size_t staging_bytes)
{
	return atomic_load(&d->head) - atomic_load(&d->done) < N_RECORDS &&
	       d->staging_head + staging_bytes - atomic_load(&d->staging_done) <= STAGING_BYTES;
}

/* Waits until a record and so much staging memory are free. */
static int wait_for_room(struct deferred_queue *d, size_t staging_bytes)
{
	const struct timespec nap = { .tv_nsec = 50000 };
	const struct afd__device *dev = d->q->dev;
	uint64_t seen = atomic_load(&d->done), since, beat;

	if (has_room(d, staging_bytes))
		return 0;
	since = beat = dev->host->now_ns();
	while (!has_room(d, staging_bytes)) {
		uint64_t now = dev->host->now_ns(), done = atomic_load(&d->done);

		if (done != seen) {
			seen = done;
			since = now;
		}
		if (now - since > SILENCE_NS)
			return dev->host->error(-ETIMEDOUT,
				"device %s: a call waits for room, %u records wait for the worker",
				dev->name, N_RECORDS);
		if (d->q->on_tile && now - beat > BEAT_NS) {
			beat = now;
			d->q->on_tile(d->q->on_tile_user);
		}
		nanosleep(&nap, NULL);
	}
	return 0;
}

int queue_staging(struct deferred_queue *d, size_t bytes, char **memory, uint64_t *end)
{
	size_t at = d->staging_head % STAGING_BYTES,
	       skipped = STAGING_BYTES - at < bytes ? STAGING_BYTES - at : 0;
	int rc = wait_for_room(d, bytes + skipped);

	if (rc)
		return rc;
	*memory = d->staging + (at + skipped) % STAGING_BYTES;
	*end = d->staging_head + skipped + bytes;
	return 0;
}

int queue_push(struct deferred_queue *d, const struct record *record)
{
	uint64_t head = atomic_load_explicit(&d->head, memory_order_relaxed);
	int rc = queue_error(d);

	if (!rc)
		rc = wait_for_room(d, 0);
	if (rc)
		return rc;
	d->records[head % N_RECORDS] = *record;
	if (record->kind == KIND_upload)
		d->staging_head = record->args.transfer.staging_end;
	atomic_store(&d->head, head + 1);
	worker_wake(d);
	return 0;
}
