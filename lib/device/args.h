/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the operations of the device seam take: matrices, the view of a KV cache, and one struct of
 * arguments per operation. device.h says what a backend may rely on.
 *
 * Invariant: plain data, so that kernels in C++ (kernels/cuda) read the very structs that the
 * stages fill. "dev" in a comment is memory of the device, "dev or slot" also host memory that is
 * registered with it.
 */
#ifndef AFD_LIB_DEVICE_ARGS_H
#define AFD_LIB_DEVICE_ARGS_H

#include <stddef.h>
#include <stdint.h>

#include <afd/context.h>

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
	int32_t mixed_panels, whole_blocks;
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

/*
 * A row of AFD_DTYPE_FP8 outside of matrices, as it crosses a wire: `width` numbers of e4m3, then
 * at a multiple of 16 one f32 scale for each group of 128 numbers, the last of which may be
 * shorter; value = number * scale of its group. What fills up to multiples of 16 is 0.
 */
static inline size_t afd__row_scales_at(uint32_t width)
{
	return ((size_t)width + 15) / 16 * 16;
}

static inline uint32_t afd__row_groups(uint32_t width)
{
	return afd__scale_columns(0, width);
}

/* Bytes of a row of any dtype without what may lie between rows; 0 for an unknown dtype. */
static inline size_t afd__row_bytes(uint32_t width, int32_t dtype)
{
	size_t scales = afd__row_groups(width) * sizeof(float);

	switch (dtype) {
	case AFD_DTYPE_F32:
		return (size_t)width * 4;
	case AFD_DTYPE_BF16:
	case AFD_DTYPE_F16:
		return (size_t)width * 2;
	case AFD_DTYPE_FP8:
		return afd__row_scales_at(width) + (scales + 15) / 16 * 16;
	default:
		return 0;
	}
}

/* What a writer makes of a group: its scale is the largest finite magnitude / 448, of which the low
 * AFD__SCALE_SPARE bits are cleared, and at least AFD__SCALE_LEAST. So number * scale is exact, and
 * a row that has crossed once does not change when it crosses again. */
enum { AFD__SCALE_SPARE = 4 };
#define AFD__SCALE_LEAST 0x1p-100f

struct afd__matrix_shape {
	uint32_t n, k;
	uint32_t n_stack; /* 0: one matrix, no stack */
	int32_t dtype;
	/* of AFD_DTYPE_FP8 */
	uint32_t column_offset; /* of column 0 in the tensor that the scales belong to */
	/* 1: rows 32 i .. 32 i + 31 may have several scales, as they do when a part (all, gate, up)
	 * begins at a row, here or in its tensor, that is no multiple of 32 */
	int32_t mixed_panels;
	/* 1: blocks of scales begin at rows 0, 128, 256 .. of the matrix, so that a device may keep one
	 * for 128 rows; loads that say otherwise are refused. 0: not known */
	int32_t whole_blocks;
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

/*
 * Rows of x in a form of the device's own, as its products take them (its kernels round x to 16 bits,
 * with or without scales): made once by what writes the rows, where else each product makes them.
 * The bits of y are the same. afd__matrix_inputs says what a matrix wants; matrices for which dtype,
 * column_offset, k and quantize agree take the same rows.
 */
struct afd__inputs {
	void *rows;       /* dev [n_rows][row_bytes], at 16 bytes; NULL: none */
	size_t row_bytes; /* a multiple of 16; 0: the device has no form for this matrix */
	int32_t dtype;    /* of the matrix */
	uint32_t column_offset;
	int32_t quantize; /* 1, for FP8: of x as it is after quantize with this column_offset */
};

/* h += add; out = h / rms(h) * weight, and inputs is out as products take it */
struct afd__norm_args {
	float *h;            /* dev [n_rows][width]; written when add is given */
	const float *add;    /* dev [n_rows][width], or NULL */
	const float *weight; /* dev [width] */
	float *out;          /* dev [n_rows][width], or NULL; without inputs too: only the addition */
	uint32_t n_rows, width;
	float eps;
	/* What crosses a wire on the way, in AFD_DTYPE_F32, _BF16 or _F16; 0: nothing does. add is then
	 * rounded to it and added to +0.0 before it is added to h, out and inputs are rounded. */
	int32_t add_wire, out_wire;
	struct afd__inputs inputs;
};

/* y = x * w^T + bias */
struct afd__product_args {
	const float *x;            /* dev [n_rows][x_stride >= k]; NULL with inputs */
	const void *inputs;        /* dev: of x for w (struct afd__inputs), or NULL */
	struct afd__matrix w;      /* [n][k], no stack */
	const float *bias;         /* dev [n], or NULL */
	float *y;                  /* dev [n_rows][y_stride >= n] */
	size_t x_stride, y_stride; /* in floats */
	uint32_t n_rows;
	int32_t quantized; /* 1: x went through quantize with w's column_offset */
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
	/* A hint, which changes no bit: at least so many rows at a time follow each other in one
	 * sequence; 0: nothing is known. */
	uint32_t run_rows;
};

/* out = silu(gate) * up */
struct afd__activation_args {
	const float *gate_up; /* dev [n_rows][2 * width]: gate, then up */
	float *out;           /* dev [n_rows][width] */
	uint32_t n_rows, width;
};

/* dst[i] = src[index[i]] in another dtype, rounded to nearest even; or dst[i] +=. With scatter
 * dst[index[i]] = src[i], or +=, and no number stands twice in index. Rows of AFD_DTYPE_FP8 have
 * their scales in them, and the other side is f32; what is not finite becomes NaN in them. */
struct afd__convert_args {
	const void *src;      /* dev or slot [..][width], rows src_stride bytes apart */
	void *dst;            /* dev or slot [..][width], rows dst_stride bytes apart */
	const int32_t *index; /* dev [n_rows], or NULL: i itself */
	size_t src_stride, dst_stride;
	uint32_t n_rows, width;
	int32_t src_dtype, dst_dtype; /* equal (not FP8), or one of them f32 */
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

/* y = down(silu(gate x) * up x): product, activation, quantize when asked, product */
struct afd__mlp_args {
	const float *x;             /* dev [n_rows][hidden]; NULL with inputs */
	const void *inputs;         /* dev: of x for gate_up (struct afd__inputs), or NULL */
	struct afd__matrix gate_up; /* [2 * width][hidden]: gate, then up; no stack */
	struct afd__matrix down;    /* [hidden][width] */
	float *y;                   /* dev [n_rows][hidden] */
	float *gate_up_rows;        /* dev [n_rows][2 * width], for the device's use */
	float *activated;           /* dev [n_rows][width], likewise */
	uint32_t n_rows;
	int32_t quantize;  /* 1: what enters down, with the column_offset of down */
	int32_t quantized; /* 1: x went through quantize with gate_up's column_offset */
};

/* How one row is sampled: afd_sample_params (afd/attn.h), and the position. The caller has checked
 * temperature and top_p. */
struct afd__sample_row {
	uint64_t seed, position;
	float temperature, top_p;
	uint32_t top_k, _pad;
};

/* ids[i] = what afd_sample draws from row i; -1 - index of the first number that is not finite when
 * there is one. The same numbers give the same id on every device (kernels/draw.h). */
struct afd__sample_args {
	const float *logits;                /* dev [n_rows][width] */
	const struct afd__sample_row *rows; /* dev [n_rows], aligned to 8 bytes */
	int32_t *ids;                       /* dev [n_rows] */
	uint32_t n_rows, width;
};

/* dev to dev, no overlap */
struct afd__copy_args {
	void *dst;
	const void *src;
	size_t bytes;
};

/* What a bench asks of a device beside its operations: how fast it reads and multiplies at all, and
 * what the time is there. */
enum afd__probe_kind {
	AFD__PROBE_READ = 1, /* of memory */
	AFD__PROBE_MULTIPLY, /* bf16 on tensor cores, from registers */
	AFD__PROBE_DELAY,    /* the queue stands still, so that the host gets ahead of it */
	AFD__PROBE_STAMP,    /* the device's clock, in ns */
};
enum { AFD__PROBE_WAYS = 6 }; /* the best of them is the ceiling */

struct afd__probe_args {
	int32_t kind; /* enum afd__probe_kind */
	uint32_t way; /* 0 .. AFD__PROBE_WAYS - 1, of _READ and _MULTIPLY */
	const void *memory; /* dev, 16-byte aligned; of _READ */
	void *out;          /* dev [16 bytes]; of _STAMP, which writes a uint64_t, _READ and _MULTIPLY */
	uint64_t amount;    /* bytes to read; rounds of multiplication; ns to stand still */
};

#endif
