/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device `deferred`: the CPU behind a seam as asynchronous as that of a GPU. Operations run
 * later, on a thread of the queue's own, and the memory that a stage is given cannot be touched by
 * it. What passes here forgets no wait and reads no device pointer. It is a device for tests, of
 * this library and of hosts.
 *
 * Results have the CPU's bits: the operations are those of the CPU backend, with pointers into the
 * arena exchanged for those of its accessible mapping. The library finds this file by
 * afd_module_entry.
 */
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "lib/device/build_id.h"
#include "queue.h"

struct deferred {
	struct arena arena;
	struct afd__device cpu; /* a device of its own, so that the backend finds its kernels */
};

/* ---- device ---- */

static int deferred_open(struct afd__device *dev, int index)
{
	struct deferred *s;
	int rc;

	if (index >= 0)
		return dev->host->error(-EINVAL,
			"device %s: deferred is one device and takes no number", dev->name);
	s = dev->host->alloc(dev->ctx, 1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->cpu.ctx = dev->ctx;
	s->cpu.host = dev->host;
	s->cpu.ops = dev->host->cpu;
	strcpy(s->cpu.name, "cpu");
	rc = s->cpu.ops->open(&s->cpu, -1);
	if (!rc)
		rc = arena_open(&s->arena, dev);
	if (rc) {
		dev->host->free(s);
		return rc;
	}
	dev->state = s;
	return 0;
}

static void deferred_close(struct afd__device *dev)
{
	struct deferred *s = dev->state;

	arena_close(&s->arena, dev);
	s->cpu.ops->close(&s->cpu);
	dev->host->free(s);
}

static int deferred_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out)
{
	struct deferred *s = dev->state;

	return arena_alloc(&s->arena, dev, bytes, what, out);
}

static void deferred_free(struct afd__device *dev, void *memory, size_t bytes)
{
	struct deferred *s = dev->state;

	arena_free(&s->arena, dev, memory);
}

static int deferred_dmabuf(
	struct afd__device *dev, void *memory, size_t bytes, int *fd, uint64_t *offset)
{
	struct deferred *s = dev->state;

	return arena_descriptor(&s->arena, dev, memory, fd, offset);
}

/* Where drivers find it: the mapping that has access. */
static int deferred_peer_address(
	struct afd__device *dev, void *memory, size_t bytes, void **address)
{
	const struct deferred *s = dev->state;

	*address = arena_real(&s->arena, memory);
	return 0;
}

static size_t deferred_matrix_bytes(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype)
{
	struct deferred *s = dev->state;

	return s->cpu.ops->matrix_bytes(&s->cpu, n, k, dtype);
}

static int deferred_matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows,
	uint32_t row0, uint32_t n_rows)
{
	struct deferred *s = dev->state;
	struct afd__matrix real = *m;

	real.data = arena_real(&s->arena, m->data);
	return s->cpu.ops->matrix_load(&s->cpu, &real, rows, row0, n_rows);
}

static int deferred_scales_load(struct afd__device *dev, struct afd__matrix *m,
	const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows)
{
	struct deferred *s = dev->state;
	struct afd__matrix real = *m;

	real.scales = arena_real(&s->arena, m->scales);
	return s->cpu.ops->scales_load(&s->cpu, &real, blocks, row0, n_rows);
}

static size_t deferred_experts_scratch_bytes(
	struct afd__device *dev, const struct afd__experts_args *a, bool least)
{
	struct deferred *s = dev->state;

	return s->cpu.ops->experts_scratch_bytes(&s->cpu, a, least);
}

/* ---- queue ---- */

static void free_queue(struct deferred_queue *d)
{
	const struct afd__module_host *host = d->q->dev->host;

	if (d->cpu.state)
		d->cpu.dev->ops->queue_close(&d->cpu);
	if (d->q->fd >= 0)
		close(d->q->fd);
	host->free(d->records);
	host->free(d->staging);
	host->free(d);
}

static int deferred_queue_open(struct afd__queue *q)
{
	const struct afd__module_host *host = q->dev->host;
	struct deferred *s = q->dev->state;
	struct deferred_queue *d = host->alloc(q->dev->ctx, 1, sizeof(*d));
	int rc = -ENOMEM;

	if (!d)
		return -ENOMEM;
	d->q = q;
	d->cpu.dev = &s->cpu;
	d->records = host->alloc(q->dev->ctx, N_RECORDS, sizeof(*d->records));
	d->staging = host->alloc(q->dev->ctx, STAGING_BYTES, 1);
	if (!d->records || !d->staging)
		goto fail;
	rc = s->cpu.ops->queue_open(&d->cpu);
	if (rc)
		goto fail;
	q->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (q->fd < 0) {
		rc = host->error(-EIO, "device %s: eventfd: %s", q->dev->name, strerror(errno));
		goto fail;
	}
	rc = worker_start(d);
	if (rc)
		goto fail;
	q->state = d;
	return 0;
fail:
	free_queue(d);
	q->fd = -1;
	return rc;
}

static void deferred_queue_close(struct afd__queue *q)
{
	worker_stop(q->state);
	free_queue(q->state);
}

/* The descriptor is emptied before the look, so that what happens after the look makes it readable
 * again. */
static int deferred_reached(struct afd__queue *q, uint64_t ticket)
{
	struct deferred_queue *d = q->state;
	uint64_t n;
	int rc;

	if (read(q->fd, &n, sizeof(n)) < 0 && errno != EAGAIN)
		return q->dev->host->error(
			-EIO, "device %s: eventfd: %s", q->dev->name, strerror(errno));
	rc = queue_error(d);
	return rc ? rc : atomic_load(&d->done) >= ticket;
}

static int deferred_ticket(struct afd__queue *q, uint64_t *ticket)
{
	struct deferred_queue *d = q->state;
	int rc = queue_push(d, &(struct record){ .kind = KIND_ticket });

	if (!rc)
		*ticket = atomic_load(&d->head);
	return rc;
}

static int deferred_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes)
{
	struct deferred_queue *d = q->state;
	struct deferred *s = q->dev->state;
	const char *from = host;
	char *to = arena_real(&s->arena, dst), *staging;
	int rc = 0;

	for (size_t part; !rc && bytes; bytes -= part, from += part, to += part) {
		struct record r = { .kind = KIND_upload };

		part = bytes < UPLOAD_PART ? bytes : UPLOAD_PART;
		rc = queue_staging(d, part, &staging, &r.args.transfer.staging_end);
		if (rc)
			break;
		memcpy(staging, from, part);
		r.args.transfer.dst = to;
		r.args.transfer.src = staging;
		r.args.transfer.bytes = part;
		rc = queue_push(d, &r);
	}
	return rc;
}

static int deferred_download(struct afd__queue *q, void *host, const void *src, size_t bytes)
{
	struct deferred *s = q->dev->state;
	struct record r = { .kind = KIND_download };

	r.args.transfer.dst = host;
	r.args.transfer.src = arena_real(&s->arena, src);
	r.args.transfer.bytes = bytes;
	return queue_push(q->state, &r);
}

/* ---- operations: copied with their pointers exchanged ---- */

#define MAX_POINTERS  9
#define AT(op, field) offsetof(struct afd__##op##_args, field)

struct layout {
	size_t n;
	size_t at[MAX_POINTERS]; /* where the pointers of the arguments stand */
};

static const struct layout layouts[] = {
	[KIND_embed] = { 3, { AT(embed, table.data), AT(embed, ids), AT(embed, out) } },
	[KIND_norm] = { 4, { AT(norm, h), AT(norm, add), AT(norm, weight), AT(norm, out) } },
	[KIND_product] = { 5, { AT(product, x), AT(product, w.data), AT(product, w.scales),
				      AT(product, bias), AT(product, y) } },
	[KIND_angles] = { 3, { AT(angles, positions), AT(angles, inv_freq), AT(angles, out) } },
	[KIND_rope] = { 6, { AT(rope, qkv), AT(rope, q_norm), AT(rope, k_norm), AT(rope, angles),
				   AT(rope, slots), AT(rope, kv.data) } },
	[KIND_attend] = { 6,
		{ AT(attend, qkv), AT(attend, positions), AT(attend, sequences),
			AT(attend, page_table), AT(attend, out), AT(attend, kv.data) } },
	[KIND_activation] = { 2, { AT(activation, gate_up), AT(activation, out) } },
	[KIND_convert] = { 3, { AT(convert, src), AT(convert, dst), AT(convert, index) } },
	[KIND_argmax] = { 2, { AT(argmax, x), AT(argmax, ids) } },
	[KIND_copy] = { 2, { AT(copy, dst), AT(copy, src) } },
	[KIND_gate] = { 2, { AT(gate, x), AT(gate, gate) } },
	[KIND_quantize] = { 1, { AT(quantize, x) } },
	[KIND_route] = { 4,
		{ AT(route, logits), AT(route, bias), AT(route, ids), AT(route, weights) } },
	[KIND_experts] = { 9,
		{ AT(experts, x), AT(experts, ids), AT(experts, weights),
			AT(experts, gate_up.data), AT(experts, gate_up.scales),
			AT(experts, down.data), AT(experts, down.scales), AT(experts, y),
			AT(experts, scratch) } },
	[KIND_sample] = { 3, { AT(sample, logits), AT(sample, rows), AT(sample, ids) } },
	[KIND_mlp] = { 8,
		{ AT(mlp, x), AT(mlp, gate_up.data), AT(mlp, gate_up.scales), AT(mlp, down.data),
			AT(mlp, down.scales), AT(mlp, y), AT(mlp, gate_up_rows),
			AT(mlp, activated) } },
};

static int enqueue(struct afd__queue *q, enum kind kind, const void *args, size_t bytes)
{
	const struct deferred *s = q->dev->state;
	struct record r = { .kind = kind };

	memcpy(&r.args, args, bytes);
	for (size_t i = 0; i < layouts[kind].n; i++) {
		char *at = (char *)&r.args + layouts[kind].at[i];
		void *p;

		memcpy(&p, at, sizeof(p));
		p = arena_real(&s->arena, p);
		memcpy(at, &p, sizeof(p));
	}
	return queue_push(q->state, &r);
}

#define ENQUEUE(op) \
	static int deferred_##op(struct afd__queue *q, const struct afd__##op##_args *a) \
	{ \
		return enqueue(q, KIND_##op, a, sizeof(*a)); \
	}
AFD__DEVICE_OPERATIONS(ENQUEUE)

static const struct afd__device_ops deferred_ops = { .name = "deferred",
	.open = deferred_open,
	.close = deferred_close,
	.alloc = deferred_alloc,
	.free = deferred_free,
	.dmabuf = deferred_dmabuf,
	.peer_address = deferred_peer_address,
	.matrix_bytes = deferred_matrix_bytes,
	.matrix_load = deferred_matrix_load,
	.scales_load = deferred_scales_load,
	.experts_scratch_bytes = deferred_experts_scratch_bytes,
	.queue_open = deferred_queue_open,
	.queue_close = deferred_queue_close,
	.reached = deferred_reached,
	.ticket = deferred_ticket,
	.upload = deferred_upload,
	.download = deferred_download,
#define ENTRY(op) .op = deferred_##op,
	AFD__DEVICE_OPERATIONS(ENTRY)
#undef ENTRY
};

extern const struct afd__module afd_module_entry;
AFD_API const struct afd__module afd_module_entry = { .build = AFD__BUILD_ID,
	.ops = &deferred_ops };
