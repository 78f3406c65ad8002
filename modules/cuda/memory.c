/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Device memory, and the way of weights into it: from mapped files through pieces of pinned staging
 * in turn. The context's compute threads fill a piece together, while those before it are on their
 * way, also those of the matrix before.
 *
 * Invariant: a load has read its source when it returns, and has arrived before whatever is entered
 * next but other loads (cuda_enter). It runs at creation only.
 */
#include <string.h>

#include "cuda.h"

#define STAGING_BYTES ((size_t)8 << 20) /* of each piece */
#define SHARE_BYTES   ((size_t)256 << 10) /* what is worth a thread */

enum { PIECES = 4 };

struct loader {
	cudaStream_t streams[PIECES]; /* one for each, so that a wait is for that piece */
	char *staging[PIECES];
	unsigned turn;
};

int cuda_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out)
{
	void *before, *memory;
	int rc = cuda_enter_loading(dev, &before);

	if (rc)
		return rc;
	rc = cudaMalloc(&memory, bytes);
	cudaGetLastError();
	cuda_leave(dev, before);
	if (rc)
		return dev->host->error(rc == cudaErrorMemoryAllocation ? -ENOMEM : -EIO,
			"%s: %zu bytes on device %s: %s", what, bytes, dev->name,
			cudaGetErrorName((cudaError_t)rc));
	*out = memory;
	return 0;
}

void cuda_free(struct afd__device *dev, void *memory, size_t bytes)
{
	void *before;

	if (cuda_forked(dev->state) || cuda_enter(dev, &before))
		return;
	cudaFree(memory);
	cuda_leave(dev, before);
}

/* ---- host memory ---- */

static enum cudaMemoryType type_of(const void *memory)
{
	struct cudaPointerAttributes attributes;

	if (cudaPointerGetAttributes(&attributes, memory)) {
		cudaGetLastError();
		return cudaMemoryTypeUnregistered;
	}
	return attributes.type;
}

bool cuda_reaches(const struct cuda *c, const void *memory)
{
	return c->pageable || type_of(memory) != cudaMemoryTypeUnregistered;
}

bool cuda_on_device(const void *memory)
{
	return type_of(memory) == cudaMemoryTypeDevice;
}

static int register_memory(struct afd__device *dev, char *memory, size_t bytes)
{
	const struct cuda *c = dev->state;
	int rc;

	if (type_of(memory) != cudaMemoryTypeUnregistered &&
		type_of(memory + bytes - 1) != cudaMemoryTypeUnregistered)
		return 1;
	if (!c->one_address && c->pageable)
		return 1;
	if (!c->one_address)
		return dev->host->error(-ENOTSUP,
			"device %s: has addresses of its own for registered memory", dev->name);
	rc = cudaHostRegister(memory, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
	rc = cuda_error(dev, rc, "host memory cannot be registered");
	return rc && c->pageable ? 1 : rc;
}

int cuda_host_register(struct afd__device *dev, void *memory, size_t bytes)
{
	void *before;
	int rc = cuda_enter(dev, &before);

	if (rc)
		return rc;
	rc = register_memory(dev, memory, bytes);
	cuda_leave(dev, before);
	return rc;
}

void cuda_host_unregister(struct afd__device *dev, void *memory)
{
	void *before;

	if (cuda_forked(dev->state) || cuda_enter(dev, &before))
		return;
	cudaHostUnregister(memory);
	cudaGetLastError();
	cuda_leave(dev, before);
}

/* ---- loading ---- */

static void free_loader(struct loader *l)
{
	for (int i = 0; i < PIECES; i++) {
		if (l->streams[i])
			cudaStreamDestroy(l->streams[i]);
		cudaFreeHost(l->staging[i]);
	}
}

void loader_close(struct afd__device *dev)
{
	struct cuda *c = dev->state;
	void *before;

	if (c->loader && !cuda_forked(c) && !cuda_enter(dev, &before)) {
		free_loader(c->loader);
		cuda_leave(dev, before);
	}
	dev->host->free(c->loader);
	c->loader = NULL;
}

static int need_loader(struct afd__device *dev)
{
	struct cuda *c = dev->state;
	struct loader *l;
	int rc = 0;

	if (c->loader)
		return 0;
	l = dev->host->alloc(dev->ctx, 1, sizeof(*l));
	if (!l)
		return -ENOMEM;
	for (int i = 0; !rc && i < PIECES; i++) {
		rc = cudaStreamCreateWithFlags(&l->streams[i], cudaStreamNonBlocking);
		if (!rc)
			rc = cudaHostAlloc((void **)&l->staging[i], STAGING_BYTES, 0);
	}
	if (rc) {
		free_loader(l);
		dev->host->free(l);
		return cuda_error(dev, rc, "staging memory for weights");
	}
	c->loader = l;
	return 0;
}

struct filling {
	char *to;
	const char *from;
	size_t bytes, share;
};

static void fill_share(void *arg, uint32_t index)
{
	const struct filling *f = arg;
	size_t at = index * f->share, left = f->bytes - at;

	memcpy(f->to + at, f->from + at, left < f->share ? left : f->share);
}

static void fill(struct afd__device *dev, char *to, const char *from, size_t bytes)
{
	const struct afd_executor *threads = &dev->ctx->executor;
	struct filling f = { to, from, bytes, bytes / threads->n_threads + 1 };

	f.share = f.share < SHARE_BYTES ? SHARE_BYTES : f.share;
	threads->run(threads->user, (uint32_t)((bytes + f.share - 1) / f.share), fill_share, &f);
}

/* Rows of `width` bytes, dst_stride apart on the device and close together on the host. */
static int load_rows(struct afd__device *dev, char *dst, size_t dst_stride, const char *host,
	size_t width, size_t n_rows)
{
	struct loader *l = ((struct cuda *)dev->state)->loader;
	size_t most = STAGING_BYTES / width;
	int rc = 0;

	for (size_t n; !rc && n_rows; n_rows -= n) {
		unsigned turn = l->turn++ % PIECES;

		n = n_rows < most ? n_rows : most;
		rc = cudaStreamSynchronize(l->streams[turn]); /* its staging is free */
		if (rc)
			break;
		fill(dev, l->staging[turn], host, n * width);
		rc = cudaMemcpy2DAsync(dst, dst_stride, l->staging[turn], width, width, n,
			cudaMemcpyHostToDevice, l->streams[turn]);
		dst += n * dst_stride;
		host += n * width;
	}
	return rc;
}

/* A row that is longer than the staging goes in pieces. */
static int load_long_rows(struct afd__device *dev, char *dst, size_t dst_stride, const char *host,
	size_t width, size_t n_rows)
{
	int rc = 0;

	for (size_t i = 0; !rc && i < n_rows; i++) {
		for (size_t at = 0, n; !rc && at < width; at += n) {
			n = width - at < STAGING_BYTES ? width - at : STAGING_BYTES;
			rc = load_rows(
				dev, dst + i * dst_stride + at, n, host + i * width + at, n, 1);
		}
	}
	return rc;
}

int cuda_arrive(const struct afd__device *dev)
{
	struct cuda *c = dev->state;
	int rc = 0;

	c->arriving = false;
	for (int i = 0; i < PIECES; i++) {
		int one = cudaStreamSynchronize(c->loader->streams[i]);

		rc = rc ? rc : one;
	}
	return cuda_error(dev, rc, "weights cannot be loaded");
}

static int load(struct afd__device *dev, char *dst, size_t dst_stride, const char *host,
	size_t width, size_t n_rows)
{
	struct cuda *c = dev->state;
	void *before;
	int rc = cuda_enter_loading(dev, &before);

	if (rc)
		return rc;
	rc = need_loader(dev);
	if (!rc) {
		c->arriving = true;
		rc = width > STAGING_BYTES
			     ? load_long_rows(dev, dst, dst_stride, host, width, n_rows)
			     : load_rows(dev, dst, dst_stride, host, width, n_rows);
		rc = cuda_error(dev, rc, "weights cannot be loaded");
	}
	cuda_leave(dev, before);
	return rc;
}

static size_t number_bytes(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 ? 4 : dtype == AFD_DTYPE_FP8 ? 1 : 2;
}

size_t cuda_matrix_bytes(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype)
{
	size_t bytes;

	return __builtin_mul_overflow(afd_gpu_packed_row_bytes(k, dtype), (size_t)n, &bytes)
		       ? SIZE_MAX
		       : bytes;
}

int cuda_matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows,
	uint32_t row0, uint32_t n_rows)
{
	size_t stride = afd_gpu_packed_row_bytes(m->k, m->dtype);

	return load(dev, (char *)m->data + row0 * stride, stride, rows,
		m->k * number_bytes(m->dtype), n_rows);
}

/* The CPU's layout of scales, laid out by the CPU: all scales come, these rows change, all go back.
 * They are few. */
int cuda_scales_load(struct afd__device *dev, struct afd__matrix *m,
	const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows)
{
	const struct afd__module_host *host = dev->host;
	struct afd__device cpu = { .ctx = dev->ctx, .ops = host->cpu, .host = host, .name = "cpu" };
	struct afd__matrix here = *m;
	void *before;
	int rc;

	here.scales = host->alloc(dev->ctx, 1, m->scales_stride);
	if (!here.scales)
		return -ENOMEM;
	rc = cuda_enter(dev, &before);
	if (!rc) {
		rc = need_loader(dev);
		if (!rc) {
			struct loader *l = ((struct cuda *)dev->state)->loader;

			rc = cudaMemcpyAsync(here.scales, m->scales, m->scales_stride,
				cudaMemcpyDeviceToHost, l->streams[0]);
			if (!rc)
				rc = cudaStreamSynchronize(l->streams[0]);
			rc = cuda_error(dev, rc, "scales cannot be read");
		}
		cuda_leave(dev, before);
	}
	if (!rc)
		rc = host->cpu->scales_load(&cpu, &here, blocks, row0, n_rows);
	if (!rc)
		rc = load(dev, (char *)m->scales, m->scales_stride, (char *)here.scales,
			m->scales_stride, 1);
	host->free(here.scales);
	return rc;
}
