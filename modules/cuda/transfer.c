/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes between host and device. Host memory of any kind goes through rings of pinned memory, since
 * CUDA would wait for pageable memory; pinned memory goes directly.
 *
 * Invariant: an upload has read its source when the call returns; a download writes its target in
 * the look that finds its ticket reached, in the thread that looks.
 */
#include <string.h>

#include "cuda.h"

int ring_open(struct afd__device *dev, struct ring *ring, size_t segment_bytes)
{
	int rc = cudaHostAlloc((void **)&ring->memory, RING_SEGMENTS * segment_bytes, 0);

	ring->segment_bytes = segment_bytes;
	return cuda_error(dev, rc, "pinned memory for transfers");
}

void ring_close(struct afd__device *dev, struct ring *ring)
{
	if (!cuda_forked(dev->state))
		cudaFreeHost(ring->memory);
}

/* Up to *bytes of the ring; *bytes says how many. What is moved there is through when the next
 * ticket is reached. */
static int take(struct cuda_queue *d, struct ring *ring, size_t *bytes, char **memory)
{
	size_t room = ring->segment_bytes - ring->used;
	int rc = 0;

	if (room < *bytes && room < ring->segment_bytes / 2) {
		ring->free_at[ring->current] = d->issued + 1;
		ring->current = (ring->current + 1) % RING_SEGMENTS;
		ring->used = 0;
		room = ring->segment_bytes;
		rc = cuda_wait(d, ring->free_at[ring->current], "a transfer that needs room");
	}
	if (*bytes > room)
		*bytes = room;
	*memory = ring->memory + ring->current * ring->segment_bytes + ring->used;
	ring->used += (*bytes + 15) / 16 * 16;
	return rc;
}

static bool is_pinned(const void *p)
{
	struct cudaPointerAttributes attributes;

	if (cudaPointerGetAttributes(&attributes, p)) {
		cudaGetLastError();
		return false;
	}
	return attributes.type == cudaMemoryTypeHost;
}

int cuda_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes)
{
	struct cuda_queue *d = q->state;
	const char *from = host;
	char *to = dst, *staging;
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	for (size_t part; !rc && bytes; bytes -= part, from += part, to += part) {
		part = bytes;
		rc = take(d, &d->up, &part, &staging);
		if (rc)
			break;
		memcpy(staging, from, part);
		rc = cuda_error(q->dev,
			cudaMemcpyAsync(to, staging, part, cudaMemcpyHostToDevice, d->gpu.stream),
			"an upload");
	}
	cuda_leave(q->dev, before);
	return rc;
}

static int download_part(struct cuda_queue *d, char *to, const char *from, size_t *part)
{
	struct pending *p = &d->pending[d->end_pending % RING_PENDING];
	char *staging;
	int rc = 0;

	if (d->end_pending - d->first_pending == RING_PENDING)
		rc = cuda_wait(d, d->pending[d->first_pending % RING_PENDING].ticket, "a download");
	if (!rc)
		rc = take(d, &d->down, part, &staging);
	if (!rc)
		rc = cuda_error(d->q->dev,
			cudaMemcpyAsync(
				staging, from, *part, cudaMemcpyDeviceToHost, d->gpu.stream),
			"a download");
	if (rc)
		return rc;
	*p = (struct pending){
		.host = to, .from = staging, .bytes = *part, .ticket = d->issued + 1
	};
	d->end_pending++;
	return 0;
}

int cuda_download(struct afd__queue *q, void *host, const void *src, size_t bytes)
{
	struct cuda_queue *d = q->state;
	const char *from = src;
	char *to = host;
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	if (is_pinned(host)) {
		rc = cuda_error(q->dev,
			cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, d->gpu.stream),
			"a download");
		bytes = 0;
	}
	for (size_t part; !rc && bytes; bytes -= part, from += part, to += part) {
		part = bytes;
		rc = download_part(d, to, from, &part);
	}
	cuda_leave(q->dev, before);
	return rc;
}

void deliver(struct cuda_queue *d, uint64_t ticket)
{
	for (; d->first_pending != d->end_pending; d->first_pending++) {
		const struct pending *p = &d->pending[d->first_pending % RING_PENDING];

		if (p->ticket > ticket)
			return;
		memcpy(p->host, p->from, p->bytes);
	}
}
