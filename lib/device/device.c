/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The front door to devices: names to backends, memory and its account, and the one place that waits
 * for a queue. What a backend is given was checked here, in matrix.c or in operations.c, once; what
 * it reports as broken stays broken.
 *
 * Called by the stages, which know no backend.
 */
#include "device.h"

#include <assert.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "backends.h"

#define DEFAULT_WAIT_MS 30000
#define SPIN_NS         20000
#define NAP_MS          20 /* how long a wait sleeps between two beats */

/* ---- opening ---- */

static const struct {
	const char *name;
	const struct afd__device_ops *ops; /* NULL: a module */
} backends[] = {
	{ "cpu", &afd__cpu_device_ops },
	{ "deferred", NULL },
	{ "cuda", NULL },
};

/* "name" or "name:N"; fills dev->name and *index. Returns the backend's place in the table. */
static int parse_name(struct afd__device *dev, const char *name, int *index)
{
	const char *colon = strchr(name, ':');
	size_t bytes = colon ? (size_t)(colon - name) : strlen(name);
	char *end = NULL;
	long n;

	*index = -1;
	if (colon) {
		n = colon[1] >= '0' && colon[1] <= '9' ? strtol(colon + 1, &end, 10) : -1;
		if (n < 0 || n > 1023 || *end)
			return afd__error(-EINVAL,
				"device \"%.64s\": what follows \":\" is no number from 0 to 1023",
				name);
		*index = (int)n;
	}
	for (size_t i = 0; i < sizeof(backends) / sizeof(backends[0]); i++) {
		if (strlen(backends[i].name) == bytes && !memcmp(name, backends[i].name, bytes)) {
			strncpy(dev->name, name, sizeof(dev->name) - 1);
			return (int)i;
		}
	}
	return afd__error(-EINVAL, "device \"%.64s\": is none of cpu, deferred, cuda:N", name);
}

int afd__device_open(struct afd__device **out, struct afd_context *ctx, const char *name)
{
	struct afd__device *dev = afd__alloc(ctx, 1, sizeof(*dev));
	int index, rc;

	if (!dev)
		return -ENOMEM;
	rc = parse_name(dev, name, &index);
	if (rc < 0)
		goto fail;
	dev->ctx = ctx;
	dev->host = &afd__module_host;
	dev->ops = backends[rc].ops;
	if (!dev->ops) {
		rc = afd__module_load(backends[rc].name, &dev->module, &dev->ops);
		if (rc)
			goto fail;
	}
	rc = dev->ops->open(dev, index);
	if (rc)
		goto fail;
	*out = dev;
	return 0;
fail:
	afd__module_unload(dev->module);
	afd__free(dev);
	return rc;
}

void afd__device_close(struct afd__device *dev)
{
	if (!dev)
		return;
	dev->ops->close(dev);
	afd__module_unload(dev->module);
	afd__free(dev);
}

/* ---- memory ---- */

int afd__device_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out)
{
	int rc;

	if (!bytes || bytes > SIZE_MAX / 2)
		return afd__error(-EINVAL, "%s: %zu bytes on device %s, limit 1 to %zu", what,
			bytes, dev->name, SIZE_MAX / 2);
	rc = dev->ops->alloc(dev, bytes, what, out);
	if (!rc)
		atomic_fetch_add_explicit(&dev->bytes_held, bytes, memory_order_relaxed);
	return rc;
}

void afd__device_free(struct afd__device *dev, void *memory, size_t bytes)
{
	if (!memory)
		return;
	dev->ops->free(dev, memory, bytes);
	atomic_fetch_sub_explicit(&dev->bytes_held, bytes, memory_order_relaxed);
}

/* ---- queues ---- */

static int check_options(const struct afd__device *dev, const struct afd__queue_options *options)
{
	if (options->stream && !dev->ops->streams)
		return afd__error(-EINVAL, "device %s: a stream is given, but it has none", dev->name);
	if (options->deterministic < 0 || options->deterministic > 1)
		return afd__error(-EINVAL, "device %s: deterministic is %d, limit 1", dev->name,
			options->deterministic);
	return 0;
}

int afd__queue_open_with(
	struct afd__queue *q, struct afd__device *dev, const struct afd__queue_options *options)
{
	int rc = check_options(dev, options);

	memset(q, 0, sizeof(*q));
	q->fd = -1;
	if (rc)
		return rc;
	q->dev = dev;
	q->options = *options;
	rc = dev->ops->queue_open(q);
	if (rc)
		q->dev = NULL;
	return rc;
}

int afd__queue_open(struct afd__queue *q, struct afd__device *dev)
{
	const struct afd__queue_options none = { 0 };

	return afd__queue_open_with(q, dev, &none);
}

void afd__queue_close(struct afd__queue *q)
{
	if (q->dev)
		q->dev->ops->queue_close(q);
	memset(q, 0, sizeof(*q));
	q->fd = -1;
}

int afd__queue_error(const struct afd__queue *q)
{
	return q->error ? afd__error(q->error, "%s", q->error_text) : 0;
}

static int keep_error(struct afd__queue *q, int rc)
{
	if (rc < 0 && !q->error) {
		q->error = rc;
		afd__error_save(q->error_text, sizeof(q->error_text));
	}
	return rc;
}

/* What waits, or depends on the host, is no part of a recording. */
static int check_recording(const struct afd__queue *q, const char *what)
{
	if (q->error)
		return afd__queue_error(q);
	return q->recording ? afd__error(-ENOTSUP, "device %s: %s cannot be recorded", q->dev->name,
				      what)
			    : 0;
}

int afd__queue_ticket(struct afd__queue *q, uint64_t *ticket)
{
	int rc = check_recording(q, "a ticket");

	return rc ? rc : q->dev->ops->ticket(q, ticket);
}

int afd__queue_reached(struct afd__queue *q, uint64_t ticket)
{
	return q->error ? afd__queue_error(q) : keep_error(q, q->dev->ops->reached(q, ticket));
}

static void nap(const struct afd__queue *q, uint64_t left_ns)
{
	uint64_t ms = left_ns / 1000000 + 1;
	struct pollfd watch = { .fd = q->fd, .events = POLLIN };

	/* Without a descriptor poll() only sleeps: short then. */
	if (q->fd < 0)
		ms = 1;
	poll(&watch, q->fd >= 0, ms < NAP_MS ? (int)ms : NAP_MS);
}

int afd__queue_wait(struct afd__queue *q, uint64_t ticket, int timeout_ms, const char *what)
{
	uint64_t start = afd__now_ns(), now = start, limit;
	int rc = afd__queue_reached(q, ticket);

	if (timeout_ms < 0 && !rc)
		return afd__error(-EAGAIN, "device %s: %s is not done", q->dev->name, what);
	limit = (uint64_t)(timeout_ms ? timeout_ms : DEFAULT_WAIT_MS) * 1000000;
	while (!rc) {
		if (now - start >= limit)
			return afd__error(-ETIMEDOUT, "device %s: %s is not done after %llu ms",
				q->dev->name, what, (unsigned long long)(now - start) / 1000000);
		if (now - start > SPIN_NS) {
			if (q->on_tile)
				q->on_tile(q->on_tile_user);
			nap(q, limit - (now - start));
		}
		now = afd__now_ns();
		rc = afd__queue_reached(q, ticket);
	}
	return rc < 0 ? rc : 0;
}

static int check_transfer(const struct afd__queue *q, const char *what, const void *device,
	const void *host, size_t bytes)
{
	int rc = check_recording(q, what);

	if (rc)
		return rc;
	if (!device || !host || (uintptr_t)device % 4)
		return afd__error(-EINVAL,
			"%s: device memory %p must be aligned to 4 bytes, host memory %p given",
			what, device, host);
	if (bytes > AFD__UPLOAD_MAX)
		return afd__error(
			-EINVAL, "%s: %zu bytes, limit %zu", what, bytes, AFD__UPLOAD_MAX);
	return 0;
}

int afd__queue_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes)
{
	int rc = check_transfer(q, "upload", dst, host, bytes);

	return rc || !bytes ? rc : q->dev->ops->upload(q, dst, host, bytes);
}

int afd__queue_probe(struct afd__queue *q, const struct afd__probe_args *a, double *work)
{
	if (!q->dev->ops->probe)
		return afd__error(-ENOTSUP, "device %s: no probes", q->dev->name);
	if (a->kind < AFD__PROBE_READ || a->kind > AFD__PROBE_STAMP || a->way >= AFD__PROBE_WAYS)
		return afd__error(-EINVAL, "probe: kind %d, way %u, limits 1 to %d, 0 to %d", a->kind,
			a->way, AFD__PROBE_STAMP, AFD__PROBE_WAYS - 1);
	return q->dev->ops->probe(q, a, work);
}

int afd__queue_download(struct afd__queue *q, void *host, const void *src, size_t bytes)
{
	int rc = check_transfer(q, "download", src, host, bytes);

	return rc || !bytes ? rc : q->dev->ops->download(q, host, src, bytes);
}

/* ---- graphs ---- */

bool afd__device_has_graphs(const struct afd__device *dev)
{
	return dev->ops->record_begin != NULL;
}

int afd__queue_record(struct afd__queue *q)
{
	int rc;

	if (q->error)
		return afd__queue_error(q);
	if (!afd__device_has_graphs(q->dev))
		return afd__error(-ENOTSUP, "device %s: has no graphs", q->dev->name);
	assert(!q->recording);
	rc = q->dev->ops->record_begin(q);
	q->recording = !rc;
	return rc;
}

int afd__queue_recorded(struct afd__queue *q, struct afd__graph **out)
{
	*out = NULL;
	assert(q->recording);
	q->recording = 0;
	return q->dev->ops->record_end(q, out);
}

int afd__queue_replay(struct afd__queue *q, struct afd__graph *graph)
{
	return q->error ? afd__queue_error(q) : q->dev->ops->replay(q, graph);
}

void afd__graph_free(struct afd__device *dev, struct afd__graph *graph)
{
	if (graph)
		dev->ops->graph_free(dev, graph);
}
