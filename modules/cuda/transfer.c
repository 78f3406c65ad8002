/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes between host and device. Host memory of any kind goes through rings of pinned memory, since
 * CUDA would wait for pageable memory; registered memory goes directly. Rows of slots that a kernel
 * cannot reach bounce: through the workspace, and from or to there as any other bytes.
 *
 * Invariant: an upload has read its source when the call returns, or, of registered memory, when a
 * later ticket is reached; a download writes its target in the look that finds its ticket reached,
 * in the thread that looks.
 */
#include <string.h>

#include "cuda.h"

#define DIRECT_BYTES ((size_t)64 << 10)

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

static int upload(struct cuda_queue *d, void *dst, const void *host, size_t bytes)
{
	const char *from = host;
	char *to = dst, *staging;
	int rc = 0;

	/* The copy of a few bytes costs less than to ask where they lie. */
	if (bytes >= DIRECT_BYTES && is_pinned(host))
		return cuda_error(d->q->dev,
			cudaMemcpyAsync(dst, host, bytes, cudaMemcpyHostToDevice, d->gpu.stream),
			"an upload");
	for (size_t part; !rc && bytes; bytes -= part, from += part, to += part) {
		part = bytes;
		rc = take(d, &d->up, &part, &staging);
		if (rc)
			break;
		memcpy(staging, from, part);
		rc = cuda_error(d->q->dev,
			cudaMemcpyAsync(to, staging, part, cudaMemcpyHostToDevice, d->gpu.stream),
			"an upload");
	}
	return rc;
}

int cuda_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes)
{
	void *before;
	int rc = cuda_enter_uncaptured(q->state, "an upload", &before);

	if (rc)
		return rc;
	rc = upload(q->state, dst, host, bytes);
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

static int download(struct cuda_queue *d, void *host, const void *src, size_t bytes)
{
	const char *from = src;
	char *to = host;
	int rc = 0;

	if (is_pinned(host))
		return cuda_error(d->q->dev,
			cudaMemcpyAsync(host, src, bytes, cudaMemcpyDeviceToHost, d->gpu.stream),
			"a download");
	for (size_t part; !rc && bytes; bytes -= part, from += part, to += part) {
		part = bytes;
		rc = download_part(d, to, from, &part);
	}
	return rc;
}

int cuda_download(struct afd__queue *q, void *host, const void *src, size_t bytes)
{
	void *before;
	int rc = cuda_enter_uncaptured(q->state, "a download", &before);

	if (rc)
		return rc;
	rc = download(q->state, host, src, bytes);
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

/* ---- rows of slots that are out of reach ---- */

/* Rows between the workspace, where they lie row behind row, and a slot. */
static int move_rows(struct cuda_queue *d, char *slot, size_t stride, size_t row_bytes,
	uint32_t n_rows, bool up)
{
	char *memory = d->gpu.workspace;
	uint32_t together = stride == row_bytes ? n_rows : 1;
	int rc = 0;

	for (uint32_t row = 0; !rc && row < n_rows; row += together) {
		char *at = slot + row * stride, *dev = memory + row * row_bytes;

		rc = up ? upload(d, dev, at, together * row_bytes)
			: download(d, at, dev, together * row_bytes);
	}
	return rc;
}

static int bounce_part(struct cuda_queue *d, const struct afd__convert_args *a, bool up)
{
	struct afd__convert_args part = *a;
	int32_t dtype = up ? a->src_dtype : a->dst_dtype;
	size_t row_bytes = afd__row_bytes(a->width, dtype);
	int rc = 0;

	if (up) {
		rc = move_rows(d, (char *)a->src, a->src_stride, row_bytes, a->n_rows, true);
		part.src = d->gpu.workspace;
		part.src_stride = row_bytes;
	} else {
		part.dst = d->gpu.workspace;
		part.dst_stride = row_bytes;
	}
	if (!rc)
		rc = cuda_error(d->q->dev, afd_gpu_convert(&d->gpu, &part), "convert");
	if (!rc && !up)
		rc = move_rows(d, a->dst, a->dst_stride, row_bytes, a->n_rows, false);
	return rc;
}

int cuda_bounce(struct cuda_queue *d, const struct afd__convert_args *a, bool up)
{
	size_t row_bytes = afd__row_bytes(a->width, up ? a->src_dtype : a->dst_dtype),
	       most = d->gpu.workspace_bytes / row_bytes;
	struct afd__convert_args part = *a;
	int rc = 0;

	if (!most || !cuda_reaches(d->q->dev->state, up ? a->dst : a->src) ||
		(up ? a->index && !a->scatter : a->scatter || a->accumulate))
		return d->q->dev->host->error(-ENOTSUP,
			"device %s: convert: the slot at %p is host memory that this GPU cannot "
			"read, and its rows go no other way",
			d->q->dev->name, up ? a->src : a->dst);
	for (uint32_t row = 0; !rc && row < a->n_rows; row += part.n_rows) {
		part.n_rows = a->n_rows - row < most ? a->n_rows - row : (uint32_t)most;
		part.index = a->index ? a->index + row : NULL;
		part.src = (const char *)a->src + (up || !a->index ? row * a->src_stride : 0);
		part.dst = (char *)a->dst + (a->scatter ? 0 : row * a->dst_stride);
		rc = bounce_part(d, &part, up);
	}
	return rc;
}
