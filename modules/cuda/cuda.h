/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the CUDA module share. device.c finds and opens a GPU, memory.c loads weights,
 * reach.c lends memory to adapters, queue.c orders work on a stream and tells how far it is, transfer.c
 * moves bytes, operations.c launches kernels, graph.c records them; products.c and blaslt*.c
 * (blaslt.h) take large products to cuBLASLt.
 *
 * Invariant: every entry makes the device's context current and leaves the caller's behind
 * (cuda_enter, cuda_leave); no entry but open, close and the loads waits for the device, unless a
 * ring is full.
 */
#ifndef AFD_MODULES_CUDA_H
#define AFD_MODULES_CUDA_H

#include <cuda_runtime_api.h>
#include <sys/types.h>

#include "../../kernels/cuda/kernels.h"
#include "../../lib/device/module.h"

/* ---- device ---- */

enum cuda_products { CUDA_PRODUCTS_AUTO, CUDA_PRODUCTS_OWN, CUDA_PRODUCTS_CUBLASLT };

struct cuda {
	int ordinal;
	uint32_t n_sms;
	bool pageable; /* kernels can read any host memory */
	bool one_address; /* and find what is registered where the host has it */
	pid_t pid;
	void *context; /* CUcontext, the device's primary one */
	int (*context_get)(void **context);
	int (*context_set)(void *context);
	struct loader *loader; /* made by the first load */
	bool arriving;         /* weights may be on their way */
	enum cuda_products products;
	struct blaslt *blaslt; /* NULL: our own kernels only */
};

/* Makes the device's context current; *before is for cuda_leave. */
int cuda_enter(const struct afd__device *dev, void **before);
/* The same without waiting for weights that are on their way. */
int cuda_enter_loading(const struct afd__device *dev, void **before);
int cuda_arrive(const struct afd__device *dev);
void cuda_leave(const struct afd__device *dev, void *before);

/* Sets the text "device cuda:0: what: cudaError… (…)" and returns the errno of a cudaError_t; 0 for
 * cudaSuccess. */
int cuda_error(const struct afd__device *dev, int error, const char *what);
/* True in a child of fork: CUDA does not live there. */
bool cuda_forked(const struct cuda *c);

/* memory.c */
int cuda_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out);
void cuda_free(struct afd__device *dev, void *memory, size_t bytes);
size_t cuda_matrix_bytes(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype);
int cuda_matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows,
	uint32_t row0, uint32_t n_rows);
int cuda_scales_load(struct afd__device *dev, struct afd__matrix *m,
	const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows);
void loader_close(struct afd__device *dev);
int cuda_host_register(struct afd__device *dev, void *memory, size_t bytes);
void cuda_host_unregister(struct afd__device *dev, void *memory);
/* reach.c */
int cuda_dmabuf(struct afd__device *dev, void *memory, size_t bytes, int *fd, uint64_t *offset);
int cuda_peer_address(struct afd__device *dev, void *memory, size_t bytes, void **address);
/* memory.c: kernels and transfers reach this memory as it is. */
bool cuda_reaches(const struct cuda *c, const void *memory);
bool cuda_on_device(const void *memory);

/* products.c: whose they are, by AFD_CUDA_PRODUCTS; the context is current in _open. */
int products_open(const struct afd__device *dev, struct cuda *c);
void products_close(struct afd__device *dev);

/* ---- queue ---- */

/* Pinned memory in segments that are filled one after the other; a segment is filled again when
 * the ticket is reached before which its bytes were moved. */
enum { RING_SEGMENTS = 4, RING_PENDING = 256 };
struct ring {
	char *memory;         /* [RING_SEGMENTS][segment_bytes] */
	size_t segment_bytes, used; /* of the current segment */
	unsigned current;
	uint64_t free_at[RING_SEGMENTS];
};

/* A download that waits in its ring for the host to look. */
struct pending {
	void *host;
	const char *from;
	size_t bytes;
	uint64_t ticket;
};

struct cuda_queue {
	struct afd__queue *q;
	struct afd_gpu gpu;
	bool owns_stream; /* else the host's */
	struct blaslt_queue *blaslt; /* NULL: our own kernels only */
	uint64_t *counter;     /* dev */
	uint64_t *word;        /* host, written by the device: the last ticket reached */
	uint64_t issued;       /* the last ticket given */
	uint64_t waited_for;   /* the ticket that a look did not find, and since when */
	uint64_t waiting_since;
	struct ring up, down;
	struct pending pending[RING_PENDING]; /* [first_pending, end_pending) modulo */
	unsigned first_pending, end_pending;
};

int cuda_queue_open(struct afd__queue *q);
void cuda_queue_close(struct afd__queue *q);
int cuda_ticket(struct afd__queue *q, uint64_t *ticket);
int cuda_reached(struct afd__queue *q, uint64_t ticket);
/* Waits for a ticket that may not have been given yet, up to a deadline, and beats. */
int cuda_wait(struct cuda_queue *d, uint64_t ticket, const char *what);

/* cuda_enter, but -ENOTSUP while the host records its stream: `what` depends on the host or waits. */
int cuda_enter_uncaptured(const struct cuda_queue *d, const char *what, void **before);

/* graph.c */
int cuda_record_begin(struct afd__queue *q);
int cuda_record_end(struct afd__queue *q, struct afd__graph **out);
int cuda_replay(struct afd__queue *q, struct afd__graph *graph);
void cuda_graph_free(struct afd__device *dev, struct afd__graph *graph);

/* ranges.c, where the toolkit has NVTX */
#if defined(__has_include) && __has_include(<nvtx3/nvToolsExt.h>)
void cuda_range_push(const char *name);
void cuda_range_pop(void);
#define CUDA_RANGE_PUSH cuda_range_push
#define CUDA_RANGE_POP  cuda_range_pop
#else
#define CUDA_RANGE_PUSH NULL
#define CUDA_RANGE_POP  NULL
#endif

/* transfer.c */
int ring_open(struct afd__device *dev, struct ring *ring, size_t segment_bytes);
void ring_close(struct afd__device *dev, struct ring *ring);
int cuda_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes);
int cuda_download(struct afd__queue *q, void *host, const void *src, size_t bytes);
/* convert whose src (up) or dst the GPU does not reach; the context is current. */
int cuda_bounce(struct cuda_queue *d, const struct afd__convert_args *a, bool up);
/* Hands out what has arrived up to this ticket. */
void deliver(struct cuda_queue *d, uint64_t ticket);

/* ---- operations ---- */
#define DECLARE(op) int cuda_##op(struct afd__queue *q, const struct afd__##op##_args *a);
AFD__DEVICE_OPERATIONS(DECLARE)
#undef DECLARE
int cuda_probe(struct afd__queue *q, const struct afd__probe_args *a, double *work);
size_t cuda_input_row_bytes(struct afd__device *dev, const struct afd__matrix *w);
size_t cuda_experts_scratch_bytes(
	struct afd__device *dev, const struct afd__experts_args *a, bool least);

#endif
