/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The seam to devices. A device holds memory and runs the operations of a stage on queues.
 *
 * The seam is asynchronous: an operation is enqueued and may run later, in the order of the calls on its queue. Device
 * memory (`dev` in the comments) is never touched by host code: bytes cross by upload, download and convert. Completion
 * is looked for with a ticket: afd__queue_ticket() after the last operation of interest, afd__queue_reached() to look.
 *
 * The front door (device.c) checks every argument once. So a backend may rely on this and checks nothing:
 *   - pointers are non-NULL where the comment does not say "or NULL", aligned to 4 bytes (rows of convert and weights in
 *     place: to a number of their dtype), sizes > 0 and fit the tensors; a call with no rows ends at the front door;
 *   - args are copied by an asynchronous backend at the call; what they point to is dev memory that outlives the operation,
 *     or host memory registered with the device (slots, weights in place), where the comment says "dev or slot".
 * An operation returns 0 or a negative errno, and has then changed nothing but its outputs. A failure that comes later is
 * sticky: every later call on the queue returns it.
 *
 * The CPU table is the meaning: one row, one order of operations, whatever n_rows, threads or chunk.
 */
#ifndef AFD_LIB_DEVICE_H
#define AFD_LIB_DEVICE_H

#include <stdint.h>

#include "../context/core.h"

struct afd__device;
struct afd__queue;
struct afd__module_host;

/* A weight matrix [n][k] of the checkpoint, for y = x * w^T. Made by afd__matrix_create, filled by _load. */
enum afd__layout {
	AFD__LAYOUT_PACKED = 1, /* as the device likes it best; dev memory owned by the matrix */
	AFD__LAYOUT_IN_PLACE,   /* [n][k] row-major where the checkpoint or the host has it; lent */
};
struct afd__matrix {
	void *data; /* dev (packed) or host memory that the device can read (in place) */
	size_t bytes;
	uint32_t n, k;
	int32_t dtype;  /* AFD_DTYPE_F32, _BF16 or _F16: the checkpoint's */
	int32_t layout; /* enum afd__layout */
	/* Of AFD_DTYPE_FP8: dev, the scales as the device likes them, made of 128x128 blocks in the coordinates of the whole
	 * tensor, of which this matrix begins at (row_offset, column_offset). NULL otherwise. */
	float *scales;
	uint32_t row_offset, column_offset;
	/* A stack of matrices of one shape, for experts: this is the first. 0: not a stack. */
	size_t data_stride, scales_stride; /* in bytes */
	uint32_t n_stack;
};

/* K and V of one layer: pages of page_size positions. Strides in bytes; a position of a head is head_dim numbers. */
struct afd__kv_view {
	void *data;           /* dev: the layer's first page */
	size_t page_stride;   /* from page to page */
	size_t v_offset;      /* from K to V of one page */
	size_t head_stride;   /* from head to head in a page */
	size_t position_stride;
	uint32_t page_size;   /* positions in a page */
	uint32_t n_kv_heads, head_dim;
	int32_t dtype;
	float k_scale, v_scale; /* of AFD_DTYPE_FP8: value = number * scale; saturating */
};

/* ---- arguments of the operations; all floats in dev memory are f32 unless a dtype says otherwise ---- */

struct afd__embed_args { /* out[i] = row ids[i] of table, times scale */
	struct afd__matrix table; /* [vocab][hidden] */
	const int32_t *ids;       /* dev [n_rows]; each in 0 .. vocab-1 (checked by the stage) */
	float *out;               /* dev [n_rows][hidden] */
	uint32_t n_rows;
	float scale;
};
struct afd__norm_args { /* h += add; out = h / rms(h) * weight */
	float *h;            /* dev [n_rows][width]; written when add is given */
	const float *add;    /* dev [n_rows][width], or NULL */
	const float *weight; /* dev [width] */
	float *out;          /* dev [n_rows][width], or NULL: only the addition */
	uint32_t n_rows, width;
	float eps;
};
struct afd__product_args { /* y = x * w^T + bias */
	const float *x;      /* dev [n_rows][x_stride >= k] */
	struct afd__matrix w; /* [n][k] */
	const float *bias;   /* dev [n], or NULL */
	float *y;            /* dev [n_rows][y_stride >= n] */
	size_t x_stride, y_stride; /* in floats */
	uint32_t n_rows;
};
struct afd__angles_args { /* out[i] = cos | sin of positions[i] * inv_freq, times scale */
	const int32_t *positions; /* dev [n_rows] */
	const float *inv_freq;    /* dev [head_dim / 2] */
	float *out;               /* dev [n_rows][head_dim]: head_dim/2 cosines, then head_dim/2 sines */
	uint32_t n_rows, head_dim;
	float scale;
};
struct afd__rope_args { /* per head norm of q and k, rotation, append of k and v to the cache in its dtype */
	float *qkv;            /* dev [n_rows][(n_heads + 2 n_kv_heads) * head_dim]; q is changed in place, k and v may be */
	const float *q_norm;   /* dev [head_dim], or NULL: no norm */
	const float *k_norm;   /* dev [head_dim], or NULL */
	const float *angles;   /* dev [n_rows][head_dim] as afd__angles_args, or NULL: no rotation */
	const int32_t *slots;  /* dev [n_rows]: page id * page_size + offset, where k and v of the row go */
	struct afd__kv_view kv;
	uint32_t n_rows, n_heads;
	float eps;
};
struct afd__attend_args { /* softmax(q k^T * scale) v over the positions that a row sees: max(0, pos-window+1) .. pos */
	const float *qkv;          /* dev [n_rows][(n_heads + 2 n_kv_heads) * head_dim], after rope; only q is read */
	const int32_t *positions;  /* dev [n_rows] */
	const int32_t *sequences;  /* dev [n_rows]: row of page_table */
	const int32_t *page_table; /* dev [n_sequences][table_stride]: page ids in order of position */
	float *out;                /* dev [n_rows][n_heads * head_dim] */
	struct afd__kv_view kv;
	uint32_t n_rows, n_heads, table_stride;
	uint32_t window; /* 0: all */
	float scale;
};
struct afd__activation_args { /* out = silu(gate) * up */
	const float *gate_up; /* dev [n_rows][2 * width]: gate, then up */
	float *out;           /* dev [n_rows][width] */
	uint32_t n_rows, width;
};
struct afd__convert_args { /* dst[i] = src[index[i]] in another dtype, rounded to nearest even; or dst[i] += */
	const void *src;      /* dev or slot [..][width], rows src_stride bytes apart */
	void *dst;            /* dev or slot [n_rows][width], rows dst_stride bytes apart */
	const int32_t *index; /* dev [n_rows], or NULL: i itself */
	size_t src_stride, dst_stride;
	uint32_t n_rows, width;
	int32_t src_dtype, dst_dtype;
	int32_t accumulate;   /* 1: dst must be f32 and the row is added to it */
};
struct afd__argmax_args { /* ids[i] = index of the largest of row i, the lowest among equals; -1 - index of the first
			     number that is not finite when there is one */
	const float *x; /* dev [n_rows][width] */
	int32_t *ids;   /* dev [n_rows] */
	uint32_t n_rows, width;
};
struct afd__gate_args { /* x = x * sigmoid(gate) */
	float *x;           /* dev [n_rows][width] */
	const float *gate;  /* dev [n_rows][gate_stride >= width] */
	size_t gate_stride; /* in floats */
	uint32_t n_rows, width;
};
struct afd__quantize_args { /* x as it is after e4m3 with a float32 scale (max / 448, at least 1e-10 / 448) per row and group of 128 */
	float *x;            /* dev [n_rows][width], in place */
	uint32_t n_rows, width;
	uint32_t column_offset; /* of x in the whole row: groups lie at multiples of 128 there */
};
struct afd__route_args { /* the top_k experts of each row and their weights, best first; equal scores take the lower id */
	const float *logits; /* dev [n_rows][n_experts] */
	const float *bias;   /* dev [n_experts], added for the selection only, or NULL */
	int32_t *ids;        /* dev [n_rows][top_k] */
	float *weights;      /* dev [n_rows][top_k] */
	uint32_t n_rows, n_experts, top_k;
	uint32_t n_groups, top_groups; /* 1, 1: no groups */
	int32_t score;       /* AFD_ROUTER_SOFTMAX (over all experts) or AFD_ROUTER_SIGMOID */
	int32_t normalize;   /* weights divided by their sum + epsilon */
	float epsilon, scale; /* scale multiplies last */
};
struct afd__experts_args { /* y = (accumulate ? y : +0) + sum over slots, ascending, of weight * down(silu(gate x) * up x) */
	const float *x;        /* dev [n_rows][hidden] */
	const int32_t *ids;    /* dev [n_rows][top_k]; experts outside first_expert .. +gate_up.n_stack-1 are skipped */
	const float *weights;  /* dev [n_rows][top_k] */
	struct afd__matrix gate_up; /* stack of [2 * width][hidden]: gate, then up */
	struct afd__matrix down;    /* stack of [hidden][width] */
	float *y;              /* dev [n_rows][hidden] */
	void *scratch;         /* dev, afd__experts_scratch_bytes() */
	uint32_t n_rows, top_k, first_expert;
	int32_t accumulate;
	int32_t quantize;      /* activations of both products are quantised as by quantize */
	uint32_t width_offset; /* of this shard's width in the expert's, for the groups of quantize */
};
struct afd__copy_args { void *dst; const void *src; size_t bytes; }; /* dev to dev, no overlap */

#define AFD__DEVICE_OPERATIONS(X) \
	X(embed) X(norm) X(product) X(angles) X(rope) X(attend) X(activation) X(convert) X(argmax) X(copy) \
	X(gate) X(quantize) X(route) X(experts)

struct afd__device_ops {
	const char *name; /* "cpu"; what users write in front of ":" */

	/* `index` is N of "name:N", -1 when none was given. Sets dev->state. */
	int (*open)(struct afd__device *dev, int index);
	void (*close)(struct afd__device *dev);

	/* dev memory, 64-byte aligned, contents undefined (poisoned in debug builds). `what` is for the error. */
	int (*alloc)(struct afd__device *dev, size_t bytes, const char *what, void **out);
	void (*free)(struct afd__device *dev, void *memory, size_t bytes);

	/* Bytes that a packed [n][k] takes; and rows row0 .. row0+n_rows-1 from host memory [n_rows][k] into it.
	 * matrix_load is synchronous and may use the context's compute threads: it runs at creation only. */
	size_t (*matrix_bytes)(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype);
	int (*matrix_load)(struct afd__device *dev, struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows);

	int (*queue_open)(struct afd__queue *q); /* sets q->state; q->fd stays -1 when operations are done on return */
	void (*queue_close)(struct afd__queue *q); /* after all operations have run */
	/* How far the queue is: 1 when everything before the ticket is done, 0 not yet, negative the sticky error. */
	int (*reached)(struct afd__queue *q, uint64_t ticket);
	int (*ticket)(struct afd__queue *q, uint64_t *ticket);

	/* Host memory is read before the call returns; at most AFD__UPLOAD_MAX bytes. */
	int (*upload)(struct afd__queue *q, void *dst, const void *host, size_t bytes);
	/* Host memory is written when a later ticket is reached. */
	int (*download)(struct afd__queue *q, void *host, const void *src, size_t bytes);

#define AFD__OPERATION(op) int (*op)(struct afd__queue *q, const struct afd__##op##_args *a);
	AFD__DEVICE_OPERATIONS(AFD__OPERATION)
#undef AFD__OPERATION
};

#define AFD__UPLOAD_MAX ((size_t)1 << 30)

struct afd__device {
	struct afd_context *ctx;
	const struct afd__device_ops *ops;
	void *state;
	void *module; /* dlopen handle of a device that is a module */
	const struct afd__module_host *host; /* what a module asks of the library (module.h) */
	char name[32];
	_Atomic uint64_t bytes_held; /* dev memory, for accounting */
};

struct afd__queue {
	struct afd__device *dev;
	void *state;
	int fd;      /* readable when the queue may have advanced; -1: operations are done when their call returns */
	int error;   /* sticky, with its text */
	char error_text[256];
	/* Called in the thread that enqueues, between operations and between tiles of long ones and while it waits, about
	 * every 10 ms and at least every 50 ms, so that a stage can beat. Set after afd__queue_open. NULL: never. */
	void (*on_tile)(void *user);
	void *on_tile_user;
};

/* ---- the front door (device.c) ---- */

/* "cpu", "deferred", "cuda:0". -EINVAL unknown name, -ENOSYS not in this build (says which module), -EPROTO the module is of
 * another build, -ENODEV the machine cannot. Modules lie in afd/ beside libafd.so, or where AFD_MODULE_DIR says. */
int afd__device_open(struct afd__device **out, struct afd_context *ctx, const char *name);
void afd__device_close(struct afd__device *dev);

int afd__device_alloc(struct afd__device *dev, size_t bytes, const char *what, void **out);
void afd__device_free(struct afd__device *dev, void *memory, size_t bytes);

/* Makes an empty packed matrix, or one that borrows rows in place (rows != NULL; host memory, aligned to a number). */
int afd__matrix_create(struct afd__device *dev, struct afd__matrix *out, uint32_t n, uint32_t k, int32_t dtype, const void *rows);
int afd__matrix_load(struct afd__device *dev, struct afd__matrix *m, const void *rows, uint32_t row0, uint32_t n_rows);
void afd__matrix_destroy(struct afd__device *dev, struct afd__matrix *m); /* also of a zeroed one */

int afd__queue_open(struct afd__queue *q, struct afd__device *dev); /* overwrites all of q, which must not move */
void afd__queue_close(struct afd__queue *q); /* waits for what runs; also of a zeroed one */
int afd__queue_ticket(struct afd__queue *q, uint64_t *ticket);
int afd__queue_reached(struct afd__queue *q, uint64_t ticket);
/* One of the named places that wait: polls until reached or the deadline (then -ETIMEDOUT, naming `what`). Calls on_tile
 * meanwhile. timeout_ms 0 means 30 s; -1 only looks: -EAGAIN when not reached. */
int afd__queue_wait(struct afd__queue *q, uint64_t ticket, int timeout_ms, const char *what);
int afd__queue_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes);
int afd__queue_download(struct afd__queue *q, void *host, const void *src, size_t bytes);

#define AFD__OPERATION(op) int afd__##op(struct afd__queue *q, const struct afd__##op##_args *a);
AFD__DEVICE_OPERATIONS(AFD__OPERATION)
#undef AFD__OPERATION

#endif
