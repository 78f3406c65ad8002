/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The seam to devices. A device holds memory and runs the operations of a stage on queues.
 *
 * The seam is asynchronous: an operation is enqueued and may run later, in the order of the calls
 * on its queue. Device memory (`dev` in the comments) is never touched by host code: bytes cross by
 * upload, download and convert. Completion is looked for with a ticket: afd__queue_ticket() after
 * the last operation of interest, afd__queue_reached() to look.
 *
 * The front door (device.c) checks every argument once. So a backend may rely on this and checks
 * nothing:
 *   - pointers are non-NULL where the comment does not say "or NULL", aligned to 4 bytes (rows of
 *     convert and weights in place: to a number of their dtype), sizes > 0 and fit the tensors; a
 *     call with no rows ends at the front door;
 *   - args are copied by an asynchronous backend at the call; what they point to is dev memory that
 *     outlives the operation, or host memory registered with the device (slots, weights in place),
 *     where the comment says "dev or slot".
 *
 * An operation returns 0 or a negative errno, and has then changed nothing but its outputs. A
 * failure that comes later is sticky: every later call on the queue returns it.
 *
 * The CPU table is the meaning: one row, one order of operations, whatever n_rows, threads or
 * chunk.
 */
#ifndef AFD_LIB_DEVICE_H
#define AFD_LIB_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "../context/core.h"
#include "args.h"

struct afd__device;
struct afd__queue;
struct afd__graph; /* a recording of operations, the backend's own */
struct afd__module_host;
struct afd_transport;

/* clang-format off */
#define AFD__DEVICE_OPERATIONS(X) \
	X(embed) X(norm) X(product) X(angles) X(rope) X(attend) X(activation) X(convert) X(argmax) \
	X(copy) X(gate) X(quantize) X(route) X(experts) X(mlp) X(sample)
/* clang-format on */

struct afd__device_ops {
	const char *name; /* "cpu"; what users write in front of ":" */
	int streams;      /* 1: a host may give its stream */

	/* `index` is N of "name:N", -1 when none was given. Sets dev->state. */
	int (*open)(struct afd__device *dev, int index);
	void (*close)(struct afd__device *dev);

	/* dev memory, 64-byte aligned, contents undefined (poisoned in debug builds). `what` is for
	 * the error. */
	int (*alloc)(struct afd__device *dev, size_t bytes, const char *what, void **out);
	void (*free)(struct afd__device *dev, void *memory, size_t bytes);

	/* Bytes that a packed [n][k] takes; and rows row0 .. row0+n_rows-1 from host memory
	 * [n_rows][k] into it. matrix_load has read them when it returns, they have arrived before
	 * any operation, and it may use the context's compute threads: it runs at creation only. */
	size_t (*matrix_bytes)(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype);
	int (*matrix_load)(struct afd__device *dev, struct afd__matrix *m, const void *rows,
		uint32_t row0, uint32_t n_rows);
	/* The same for the scales of these rows; blocks->column_offset is m's. */
	int (*scales_load)(struct afd__device *dev, struct afd__matrix *m,
		const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows);
	/* Bytes of a row of x in the form that products with w take (struct afd__inputs); 0: they take
	 * float32. NULL: none has a form. */
	size_t (*input_row_bytes)(struct afd__device *dev, const struct afd__matrix *w);
	/* What `experts` wants for all n_rows at once, and what it needs at least. */
	size_t (*experts_scratch_bytes)(
		struct afd__device *dev, const struct afd__experts_args *a, bool least);

	/* NULL in a device that reads all host memory: makes a piece of it accessible to operations
	 * and to transfers that do not pass through memory of the device's own. 1: it was already,
	 * by somebody else's hand, and is not to be unregistered. */
	int (*host_register)(struct afd__device *dev, void *memory, size_t bytes);
	void (*host_unregister)(struct afd__device *dev, void *memory);

	/* Both NULL in a device whose memory no adapter on the bus may write and read. dmabuf: a
	 * descriptor for so many bytes of dev memory, a page's multiple, which begin at *offset of
	 * it; the caller closes it. peer_address: the address by which the kernel's drivers know
	 * the memory. -ENOTSUP with text: not by this device, driver or machine. */
	int (*dmabuf)(struct afd__device *dev, void *memory, size_t bytes, int *fd,
		uint64_t *offset);
	int (*peer_address)(
		struct afd__device *dev, void *memory, size_t bytes, void **address);

	/* Sets q->state; q->fd stays -1 when operations are done on return. With q->stream, which
	 * only a device with streams is given, the work goes there. */
	int (*queue_open)(struct afd__queue *q);
	void (*queue_close)(struct afd__queue *q); /* after all operations have run */
	/* How far the queue is: 1 when everything before the ticket is done, 0 not yet, negative
	 * the sticky error. */
	int (*reached)(struct afd__queue *q, uint64_t ticket);
	int (*ticket)(struct afd__queue *q, uint64_t *ticket);

	/* NULL in a device without graphs. Between _begin and _end operations are recorded and
	 * not run; uploads, downloads and tickets are refused with -ENOTSUP. *out is what _replay
	 * runs, any number of times, with the same arguments; an error of _end leaves none, and the
	 * recording is over in any case. */
	int (*record_begin)(struct afd__queue *q);
	int (*record_end)(struct afd__queue *q, struct afd__graph **out);
	int (*replay)(struct afd__queue *q, struct afd__graph *graph);
	void (*graph_free)(struct afd__device *dev, struct afd__graph *graph);
	/* A name for what is enqueued from here on, for profilers; NULL: there are none. */
	void (*range_push)(const char *name);
	void (*range_pop)(void);

	/* Host memory is read before the call returns, that which is registered before a later
	 * ticket is reached; at most AFD__UPLOAD_MAX bytes. */
	int (*upload)(struct afd__queue *q, void *dst, const void *host, size_t bytes);
	/* Host memory is written when a later ticket is reached. */
	int (*download)(struct afd__queue *q, void *host, const void *src, size_t bytes);

	/* NULL in a device that has none. *work: bytes or floating-point operations that it does. */
	int (*probe)(struct afd__queue *q, const struct afd__probe_args *a, double *work);

#define AFD__OPERATION(op) int (*op)(struct afd__queue *q, const struct afd__##op##_args *a);
	AFD__DEVICE_OPERATIONS(AFD__OPERATION)
#undef AFD__OPERATION
};

#define AFD__UPLOAD_MAX ((size_t)1 << 30)

struct afd__device {
	struct afd_context *ctx;
	const struct afd__device_ops *ops;
	void *state;
	void *module;                        /* dlopen handle of a device that is a module */
	const struct afd__module_host *host; /* what a module asks of the library (module.h) */
	char name[32];
	_Atomic uint64_t bytes_held; /* dev memory, for accounting */
	_Atomic uint32_t told_unregistered; /* it was logged that memory cannot be registered */
};

/* What a host may ask of a queue. */
struct afd__queue_options {
	void *stream;          /* the host's, of this device: NULL: one of the queue's own */
	int32_t deterministic; /* 1: a row's bits depend on that row alone, whatever is faster */
};

struct afd__queue {
	struct afd__device *dev;
	void *state;
	int fd;    /* readable when the queue may have advanced; -1: operations end with the call */
	struct afd__queue_options options;
	int recording; /* between afd__queue_record and _recorded */
	int error; /* sticky, with its text */
	char error_text[256];
	/* Called in the thread that enqueues, between operations and between tiles of long ones and
	 * while it waits, about every 10 ms and at least every 50 ms, so that a stage can beat. Set
	 * after afd__queue_open. NULL: never. */
	void (*on_tile)(void *user);
	void *on_tile_user;
};

/* ---- the front door (device.c) ---- */

/* "cpu", "deferred", "cuda:0". -EINVAL unknown name, -ENOSYS not in this build (says which module),
 * -EPROTO the module is of another build, -ENODEV the machine cannot. Modules lie in afd/ beside
 * libafd.so, or where AFD_MODULE_DIR says. */
int afd__device_open(struct afd__device **out, struct afd_context *ctx, const char *name);
void afd__device_close(struct afd__device *dev);

int afd__device_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out);
void afd__device_free(struct afd__device *dev, void *memory, size_t bytes);

/* Host memory that operations (as slots) and transfers are to use: as often registered as it is
 * unregistered, by any device of the context, so that both ends of a link may. Returns 0 when the
 * device reads it; negative when it cannot: then transfers pass through memory of the device's own,
 * as convert does with slots, and that is logged once. */
int afd__device_register(
	struct afd__device *dev, void *memory, size_t bytes, const char *what);
void afd__device_unregister(struct afd__device *dev, void *memory, size_t bytes);

/* Dev memory for an adapter that writes and reads it (reach.c): see the table. _copy moves bytes
 * between it and host memory by the device's own hand and waits for them; at creation of links. */
bool afd__device_can_be_reached(const struct afd__device *dev);
int afd__device_dmabuf(
	struct afd__device *dev, void *memory, size_t bytes, int *fd, uint64_t *offset);
int afd__device_peer_address(
	struct afd__device *dev, void *memory, size_t bytes, void **address);
int afd__device_copy(struct afd__device *dev, void *memory, void *host, size_t bytes, bool up);

/* Registers the slots of the transport's links, as they come, until afd__transport_watch_slots is
 * told NULL; the device outlives that. (slots.c) */
void afd__device_watch_slots(struct afd__device *dev, struct afd_transport *net);

/* Makes an empty packed matrix, or one that borrows rows in place (rows != NULL; host memory,
 * aligned to a number). */
int afd__matrix_create(struct afd__device *dev, struct afd__matrix *out, uint32_t n, uint32_t k,
	int32_t dtype, const void *rows);
/* The same for a stack and for FP8, whose scales are still to be loaded. In place the matrices of a
 * stack lie one after the other. */
int afd__matrix_create_stack(struct afd__device *dev, struct afd__matrix *out,
	const struct afd__matrix_shape *shape, const void *rows);
/* Dev memory that such a packed matrix takes, scales included: its bytes + scales_bytes. SIZE_MAX
 * when it overflows. */
size_t afd__matrix_shape_bytes(struct afd__device *dev, const struct afd__matrix_shape *shape);
/* Rows row0 .. row0+n_rows-1 of the weights; packed ones only. Of a stack: of afd__matrix_at(). */
int afd__matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows,
	uint32_t row0, uint32_t n_rows);
/* The scales of rows row0 .. row0+n_rows-1, in place too; every row's once, in any order. The
 * blocks must cover these rows and all columns. Unless the shape says mixed_panels, row0, the
 * blocks' row_offset and, but for the last, n_rows are multiples of 32. */
int afd__matrix_load_scales(struct afd__device *dev, struct afd__matrix *m,
	const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows);
/* Matrix i of a stack, lent: for loads and products, not to be destroyed. */
struct afd__matrix afd__matrix_at(const struct afd__matrix *stack, uint32_t i);
void afd__matrix_destroy(struct afd__device *dev, struct afd__matrix *m); /* of a zeroed one too */
/* What products with m take, without rows; row_bytes 0: float32. quantize counts for FP8 only. */
struct afd__inputs afd__matrix_inputs(
	struct afd__device *dev, const struct afd__matrix *m, bool quantize);

/* Scratch for a call like `a`, of which n_rows (the most there will be), top_k and the shapes of
 * the two stacks count. It stops growing at some number of rows. */
size_t afd__experts_scratch_bytes(struct afd__device *dev, const struct afd__experts_args *a);

/* Overwrites all of q, which must not move while it is open. */
int afd__queue_open(struct afd__queue *q, struct afd__device *dev);
/* -EINVAL: a stream for a device that has none, or another device's; deterministic beyond 1. */
int afd__queue_open_with(
	struct afd__queue *q, struct afd__device *dev, const struct afd__queue_options *options);
void afd__queue_close(struct afd__queue *q); /* waits for what runs; also of a zeroed one */
int afd__queue_ticket(struct afd__queue *q, uint64_t *ticket);
int afd__queue_reached(struct afd__queue *q, uint64_t ticket);
/* One of the named places that wait: polls until reached or the deadline (then -ETIMEDOUT, naming
 * `what`). Calls on_tile meanwhile. timeout_ms 0 means 30 s; -1 only looks: -EAGAIN when not
 * reached. */
int afd__queue_wait(struct afd__queue *q, uint64_t ticket, int timeout_ms, const char *what);
int afd__queue_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes);
int afd__queue_download(struct afd__queue *q, void *host, const void *src, size_t bytes);

/* Graphs: see the table. _record is -ENOTSUP where a device has none; an operation that fails
 * between does not break the queue, and ends with _recorded all the same. */
bool afd__device_has_graphs(const struct afd__device *dev);
int afd__queue_record(struct afd__queue *q);
int afd__queue_recorded(struct afd__queue *q, struct afd__graph **out);
int afd__queue_replay(struct afd__queue *q, struct afd__graph *graph);
void afd__graph_free(struct afd__device *dev, struct afd__graph *graph); /* NULL is fine */

/* Around what is enqueued; a branch where there is no profiler. */
static inline void afd__range_push(const struct afd__queue *q, const char *name)
{
	if (q->dev->ops->range_push)
		q->dev->ops->range_push(name);
}
static inline void afd__range_pop(const struct afd__queue *q)
{
	if (q->dev->ops->range_pop)
		q->dev->ops->range_pop();
}

#define AFD__OPERATION(op) int afd__##op(struct afd__queue *q, const struct afd__##op##_args *a);
AFD__DEVICE_OPERATIONS(AFD__OPERATION)
#undef AFD__OPERATION

/* Only for benches; -ENOTSUP where the device has no probes. */
int afd__queue_probe(struct afd__queue *q, const struct afd__probe_args *a, double *work);

#endif
