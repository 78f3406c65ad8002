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

struct afd__device;
struct afd__queue;
struct afd__module_host;

enum afd__layout {
	AFD__LAYOUT_PACKED = 1, /* as the device likes it best; dev memory owned by the matrix */
	AFD__LAYOUT_IN_PLACE,   /* [n][k] row-major where the checkpoint or the host has it; lent */
};

/*
 * A weight matrix [n][k] of the checkpoint, for y = x * w^T, or a stack of n_stack of one shape:
 * afd__matrix_create makes it, afd__matrix_load fills it.
 *
 * AFD_DTYPE_FP8 is e4m3 (finite; NaN is 0x7f and 0xff): value = number * scale of its block. Blocks
 * are 128 x 128 in the coordinates of the whole tensor, of which a shard is a part. A row of scales
 * for 32 rows of a panel, or, with mixed_panels, one for each row: [n / 32][blocks of k][1 or 32].
 */
struct afd__matrix {
	void *data; /* dev (packed) or host memory that the device can read (in place) */
	size_t bytes;
	uint32_t n, k;
	int32_t dtype;  /* AFD_DTYPE_F32, _BF16, _F16 or _FP8: the checkpoint's */
	int32_t layout; /* enum afd__layout */
	uint32_t n_stack;
	int32_t mixed_panels;
	float *scales; /* dev, owned by the matrix; NULL: not FP8 */
	size_t scales_bytes;
	uint32_t column_offset; /* 0 .. 127: of column 0 in its block of scales */
	size_t data_stride, scales_stride; /* in bytes, from matrix to matrix of a stack */
};

enum { AFD__SCALE_ROWS = 128 }; /* and columns, of a block */

/* Blocks of scales that the columns of a matrix fall into; column_offset 0 .. 127. */
static inline uint32_t afd__scale_columns(uint32_t column_offset, uint32_t k)
{
	return (uint32_t)(((uint64_t)column_offset + k + AFD__SCALE_ROWS - 1) / AFD__SCALE_ROWS);
}

struct afd__matrix_shape {
	uint32_t n, k;
	uint32_t n_stack; /* 0: one matrix, no stack */
	int32_t dtype;
	/* of AFD_DTYPE_FP8 */
	uint32_t column_offset; /* of column 0 in the tensor that the scales belong to */
	/* 1: rows 32 i .. 32 i + 31 may have several scales, as they do when a part (all, gate, up)
	 * begins at a row, here or in its tensor, that is no multiple of 32 */
	int32_t mixed_panels;
};

/* Scales of a tensor, as the checkpoint has them. */
struct afd__scale_blocks {
	const void *data; /* host [n_rows][n_columns], in any alignment */
	uint32_t n_rows, n_columns;
	int32_t dtype; /* AFD_DTYPE_F32, _BF16 or _F16 */
	uint64_t row_offset, column_offset; /* where the part begins that they are given for */
};

/* K and V of one layer: pages of page_size positions. Strides in bytes; a position of a head is
 * head_dim numbers. */
struct afd__kv_view {
	void *data;         /* dev: the layer's first page */
	size_t page_stride; /* from page to page */
	size_t v_offset;    /* from K to V of one page */
	size_t head_stride; /* from head to head in a page */
	size_t position_stride;
	uint32_t page_size; /* positions in a page */
	uint32_t n_kv_heads, head_dim;
	int32_t dtype;
	/* Of AFD_DTYPE_FP8, e4m3: value = number * scale, both positive. What is larger than 448 scales
	 * is stored as 448. */
	float k_scale, v_scale;
};

/* ---- arguments of the operations; floats in dev memory are f32 unless a dtype says so ---- */

/* out[i] = row ids[i] of table, times scale */
struct afd__embed_args {
	struct afd__matrix table; /* [vocab][hidden] */
	const int32_t *ids;       /* dev [n_rows]; each in 0 .. vocab-1 (checked by the stage) */
	float *out;               /* dev [n_rows][hidden] */
	uint32_t n_rows;
	float scale;
};

/* h += add; out = h / rms(h) * weight */
struct afd__norm_args {
	float *h;            /* dev [n_rows][width]; written when add is given */
	const float *add;    /* dev [n_rows][width], or NULL */
	const float *weight; /* dev [width] */
	float *out;          /* dev [n_rows][width], or NULL: only the addition */
	uint32_t n_rows, width;
	float eps;
};

/* y = x * w^T + bias */
struct afd__product_args {
	const float *x;            /* dev [n_rows][x_stride >= k] */
	struct afd__matrix w;      /* [n][k], no stack */
	const float *bias;         /* dev [n], or NULL */
	float *y;                  /* dev [n_rows][y_stride >= n] */
	size_t x_stride, y_stride; /* in floats */
	uint32_t n_rows;
};

/* out[i] = cos | sin of positions[i] * inv_freq, times scale */
struct afd__angles_args {
	const int32_t *positions; /* dev [n_rows] */
	const float *inv_freq;    /* dev [head_dim / 2] */
	float *out;               /* dev [n_rows][head_dim]: half cosines, then half sines */
	uint32_t n_rows, head_dim;
	float scale;
};

/* Norm per head of q and k, rotation, append of k and v to the cache in its dtype. Of a row of qkv,
 * [(n_heads + 2 n_kv_heads) * head_dim], q is changed in place, k and v may be. */
struct afd__rope_args {
	float *qkv;           /* dev [n_rows][(n_heads + 2 n_kv_heads) * head_dim] */
	const float *q_norm;  /* dev [head_dim], or NULL: no norm */
	const float *k_norm;  /* dev [head_dim], or NULL */
	const float *angles;  /* dev [n_rows][head_dim] as afd__angles_args, or NULL: no rotation */
	const int32_t *slots; /* dev [n_rows]: page id * page_size + offset of the row's k and v */
	struct afd__kv_view kv;
	uint32_t n_rows, n_heads;
	float eps;
};

/* softmax(q k^T * scale) v over what a row sees: positions max(0, pos-window+1) .. pos */
struct afd__attend_args {
	const float *qkv;          /* dev, as in afd__rope_args and after it; only q is read */
	const int32_t *positions;  /* dev [n_rows] */
	const int32_t *sequences;  /* dev [n_rows]: row of page_table */
	const int32_t *page_table; /* dev [n_sequences][table_stride]: page ids by position */
	float *out;                /* dev [n_rows][n_heads * head_dim] */
	struct afd__kv_view kv;
	uint32_t n_rows, n_heads, table_stride;
	uint32_t window; /* 0: all */
	float scale;
};

/* out = silu(gate) * up */
struct afd__activation_args {
	const float *gate_up; /* dev [n_rows][2 * width]: gate, then up */
	float *out;           /* dev [n_rows][width] */
	uint32_t n_rows, width;
};

/* dst[i] = src[index[i]] in another dtype, rounded to nearest even; or dst[i] +=. With scatter
 * dst[index[i]] = src[i], or +=, and no number stands twice in index. */
struct afd__convert_args {
	const void *src;      /* dev or slot [..][width], rows src_stride bytes apart */
	void *dst;            /* dev or slot [..][width], rows dst_stride bytes apart */
	const int32_t *index; /* dev [n_rows], or NULL: i itself */
	size_t src_stride, dst_stride;
	uint32_t n_rows, width;
	int32_t src_dtype, dst_dtype; /* equal, or one of them f32 */
	int32_t accumulate;           /* 1: dst must be f32 and the row is added to it */
	int32_t scatter;              /* 1: index, which must be given, says where rows go */
};

/* ids[i] = index of the largest of row i, the lowest among equals; -1 - index of the first number
 * that is not finite when there is one */
struct afd__argmax_args {
	const float *x; /* dev [n_rows][width] */
	int32_t *ids;   /* dev [n_rows] */
	uint32_t n_rows, width;
};

/* x = x * sigmoid(gate) */
struct afd__gate_args {
	float *x;           /* dev [n_rows][width] */
	const float *gate;  /* dev [n_rows][gate_stride >= width] */
	size_t gate_stride; /* in floats */
	uint32_t n_rows, width;
};

/* x as it is after e4m3 with a float32 scale per row and group of 128: the largest magnitude / 448,
 * at least 1e-10 / 448. Groups lie at multiples of 128 of the whole row, of which this is the part
 * from column_offset on; a group cut by the part counts what lies in the part. */
struct afd__quantize_args {
	float *x; /* dev [n_rows][width], in place */
	uint32_t n_rows, width;
	uint32_t column_offset;
};

/* The top_k experts of each row and their weights, best first; equal scores take the lower id. With
 * groups of n_experts / n_groups experts each, only those of the top_groups best count: a group
 * scores the sum of its two best, bias included. */
struct afd__route_args {
	const float *logits; /* dev [n_rows][n_experts] */
	const float *bias;   /* dev [n_experts], added for the selection only; or NULL */
	int32_t *ids;        /* dev [n_rows][top_k] */
	float *weights;      /* dev [n_rows][top_k] */
	uint32_t n_rows, n_experts, top_k;
	uint32_t n_groups, top_groups; /* 1, 1: no groups */
	int32_t score;                 /* AFD_ROUTER_SOFTMAX (over all experts) or _SIGMOID */
	int32_t normalize;             /* 1: weights are divided by their sum + epsilon */
	float epsilon, scale;          /* scale multiplies last */
};

/* y = (accumulate ? y : +0) + the sum over slots, ascending, of weight * down(silu(gate x) * up x).
 * A slot is skipped whose id is not in first_expert .. first_expert + n_stack - 1 (so -1 says none)
 * or stands in a slot of the row before. Experts that no row needs are not read. */
struct afd__experts_args {
	const float *x;             /* dev [n_rows][hidden] */
	const int32_t *ids;         /* dev [n_rows][top_k] */
	const float *weights;       /* dev [n_rows][top_k] */
	struct afd__matrix gate_up; /* a stack of [2 * width][hidden]: gate, then up */
	struct afd__matrix down;    /* a stack of as many [hidden][width] */
	float *y;                   /* dev [n_rows][hidden]; may be x */
	void *scratch;              /* dev */
	size_t scratch_bytes;       /* afd__experts_scratch_bytes(); less means more passes */
	uint32_t n_rows, top_k;
	int32_t first_expert;
	int32_t accumulate;
	int32_t quantize;      /* 1: the inputs of both products are quantised as by quantize */
	uint32_t width_offset; /* column_offset of the second */
};

/* dev to dev, no overlap */
struct afd__copy_args {
	void *dst;
	const void *src;
	size_t bytes;
};

/* clang-format off */
#define AFD__DEVICE_OPERATIONS(X) \
	X(embed) X(norm) X(product) X(angles) X(rope) X(attend) X(activation) X(convert) X(argmax) \
	X(copy) X(gate) X(quantize) X(route) X(experts)
/* clang-format on */

struct afd__device_ops {
	const char *name; /* "cpu"; what users write in front of ":" */

	/* `index` is N of "name:N", -1 when none was given. Sets dev->state. */
	int (*open)(struct afd__device *dev, int index);
	void (*close)(struct afd__device *dev);

	/* dev memory, 64-byte aligned, contents undefined (poisoned in debug builds). `what` is for
	 * the error. */
	int (*alloc)(struct afd__device *dev, size_t bytes, const char *what, void **out);
	void (*free)(struct afd__device *dev, void *memory, size_t bytes);

	/* Bytes that a packed [n][k] takes; and rows row0 .. row0+n_rows-1 from host memory
	 * [n_rows][k] into it. matrix_load is synchronous and may use the context's compute
	 * threads: it runs at creation only. */
	size_t (*matrix_bytes)(struct afd__device *dev, uint32_t n, uint32_t k, int32_t dtype);
	int (*matrix_load)(struct afd__device *dev, struct afd__matrix *m, const void *rows,
		uint32_t row0, uint32_t n_rows);
	/* The same for the scales of these rows; blocks->column_offset is m's. */
	int (*scales_load)(struct afd__device *dev, struct afd__matrix *m,
		const struct afd__scale_blocks *blocks, uint32_t row0, uint32_t n_rows);
	/* What `experts` wants for all n_rows at once, and what it needs at least. */
	size_t (*experts_scratch_bytes)(
		struct afd__device *dev, const struct afd__experts_args *a, bool least);

	/* Sets q->state; q->fd stays -1 when operations are done on return. */
	int (*queue_open)(struct afd__queue *q);
	void (*queue_close)(struct afd__queue *q); /* after all operations have run */
	/* How far the queue is: 1 when everything before the ticket is done, 0 not yet, negative
	 * the sticky error. */
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
	void *module;                        /* dlopen handle of a device that is a module */
	const struct afd__module_host *host; /* what a module asks of the library (module.h) */
	char name[32];
	_Atomic uint64_t bytes_held; /* dev memory, for accounting */
};

struct afd__queue {
	struct afd__device *dev;
	void *state;
	int fd;    /* readable when the queue may have advanced; -1: operations end with the call */
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

/* Scratch for a call like `a`, of which n_rows (the most there will be), top_k and the shapes of
 * the two stacks count. It stops growing at some number of rows. */
size_t afd__experts_scratch_bytes(struct afd__device *dev, const struct afd__experts_args *a);

/* Overwrites all of q, which must not move while it is open. */
int afd__queue_open(struct afd__queue *q, struct afd__device *dev);
void afd__queue_close(struct afd__queue *q); /* waits for what runs; also of a zeroed one */
int afd__queue_ticket(struct afd__queue *q, uint64_t *ticket);
int afd__queue_reached(struct afd__queue *q, uint64_t ticket);
/* One of the named places that wait: polls until reached or the deadline (then -ETIMEDOUT, naming
 * `what`). Calls on_tile meanwhile. timeout_ms 0 means 30 s; -1 only looks: -EAGAIN when not
 * reached. */
int afd__queue_wait(struct afd__queue *q, uint64_t ticket, int timeout_ms, const char *what);
int afd__queue_upload(struct afd__queue *q, void *dst, const void *host, size_t bytes);
int afd__queue_download(struct afd__queue *q, void *host, const void *src, size_t bytes);

#define AFD__OPERATION(op) int afd__##op(struct afd__queue *q, const struct afd__##op##_args *a);
AFD__DEVICE_OPERATIONS(AFD__OPERATION)
#undef AFD__OPERATION

#endif
