/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The launchers of the CUDA kernels: one per operation of the device seam, with the seam's own
 * arguments, which the front door has checked. Each puts its kernels on the stream and returns 0 or
 * a cudaError_t; nothing is allocated and nothing waited for.
 *
 * Called by modules/cuda; the same prototypes stand for the kernels under emulation.
 */
#ifndef AFD_KERNELS_CUDA_KERNELS_H
#define AFD_KERNELS_CUDA_KERNELS_H

#include <stdint.h>
#include <string.h>

#include "../../lib/device/args.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { AFD_GPU_COUNTERS = 4096 };

/* Where kernels run, and what they may use meanwhile. One stream uses a workspace. */
struct afd_gpu {
	void *stream;
	void *workspace; /* dev */
	size_t workspace_bytes;
	uint32_t *counters; /* dev [AFD_GPU_COUNTERS], 0 before and after each operation */
	uint32_t n_sms;
	/* 1: what a row becomes may depend on that row alone: fixed tiles, splits and orders of
	 * addition whatever n_rows is, no atomics in sums */
	uint32_t deterministic;
};

/* Bytes from row to row of a packed matrix: whole pieces of 16 bytes. Rows are those of the
 * checkpoint, which suits ldmatrix as they lie. */
static inline size_t afd_gpu_packed_row_bytes(uint32_t k, int32_t dtype)
{
	size_t number = dtype == AFD_DTYPE_F32 ? 4 : dtype == AFD_DTYPE_FP8 ? 1 : 2;

	return (k * number + 15) / 16 * 16;
}

/* *word = ++*counter, when everything before it on the stream is done; the host looks at the word.
 */
int afd_gpu_mark(const struct afd_gpu *gpu, uint64_t *counter, uint64_t *word);

int afd_gpu_embed(const struct afd_gpu *gpu, const struct afd__embed_args *a);
int afd_gpu_norm(const struct afd_gpu *gpu, const struct afd__norm_args *a);
int afd_gpu_product(const struct afd_gpu *gpu, const struct afd__product_args *a);
int afd_gpu_angles(const struct afd_gpu *gpu, const struct afd__angles_args *a);
int afd_gpu_rope(const struct afd_gpu *gpu, const struct afd__rope_args *a);
int afd_gpu_attend(const struct afd_gpu *gpu, const struct afd__attend_args *a);
int afd_gpu_activation(const struct afd_gpu *gpu, const struct afd__activation_args *a);
int afd_gpu_convert(const struct afd_gpu *gpu, const struct afd__convert_args *a);
int afd_gpu_argmax(const struct afd_gpu *gpu, const struct afd__argmax_args *a);
int afd_gpu_gate(const struct afd_gpu *gpu, const struct afd__gate_args *a);
int afd_gpu_quantize(const struct afd_gpu *gpu, const struct afd__quantize_args *a);
int afd_gpu_route(const struct afd_gpu *gpu, const struct afd__route_args *a);
int afd_gpu_experts(const struct afd_gpu *gpu, const struct afd__experts_args *a);
int afd_gpu_mlp(const struct afd_gpu *gpu, const struct afd__mlp_args *a);
/* Its second half, operation by operation, from the numbers in gate_up_rows. */
int afd_gpu_mlp_down(const struct afd_gpu *gpu, const struct afd__mlp_args *a);

/* What a library's product takes instead of float32 (operands.cu): rows of x in the dtype of the
 * weights, and scales as it has them. */
struct afd_gpu_operands {
	const float *x, *up; /* [n_rows][x_stride]; with up, which may be NULL: silu(x) * up */
	const void *inputs;  /* of x in the form of our own products (struct afd__inputs), or NULL */
	size_t x_stride;
	uint32_t n_rows;
	/* by the matrix, from _shape: */
	size_t fixed_bytes, row_bytes; /* of memory; 0: rows are taken where they are */
	size_t inputs_bytes;           /* from row to row of `inputs` */
	size_t w_numbers, row_numbers; /* from row to row of the weights, and of `numbers` */
	int32_t ends;                  /* 1: _finish adds the bias, the library shall not */
	/* from _place: */
	void *numbers;   /* [n_rows][row_numbers], zeros behind k; in f16 a row's scale behind them */
	float *x_scales; /* FP8: [groups of 128][n_rows] */
	float *w_scales; /* FP8: [blocks of n][blocks of k, a multiple of 4] */
};
int afd_gpu_operands_fit(const struct afd__matrix *w);
void afd_gpu_operands_shape(const struct afd__matrix *w, struct afd_gpu_operands *o);
void afd_gpu_operands_place(const struct afd__matrix *w, struct afd_gpu_operands *o, void *memory);
int afd_gpu_operands(
	const struct afd_gpu *gpu, const struct afd__matrix *w, const struct afd_gpu_operands *o);
/* What the library leaves to do: scales of rows of f16, and the bias where it has none. */
int afd_gpu_operands_finish(const struct afd_gpu *gpu, const struct afd__matrix *w,
	const struct afd_gpu_operands *o, const float *bias, float *y, size_t y_stride);
/* Rows for which our products read the weights once: in float32, on tensor cores. */
enum { AFD_GPU_PLAIN_ROWS = 4, AFD_GPU_TILE_ROWS = 64 };

/* *work: the bytes or floating-point operations that it does. */
int afd_gpu_probe(const struct afd_gpu *gpu, const struct afd__probe_args *a, double *work);
int afd_gpu_sample(const struct afd_gpu *gpu, const struct afd__sample_args *a);
/* Bytes of a row as products with w take it (struct afd__inputs); 0: they take float32. Longer rows
 * would leave no room for parts in a workspace. */
#define GPU_INPUT_ROW_MAX ((size_t)4 << 20)
size_t afd_gpu_input_row_bytes(const struct afd__matrix *w);
size_t afd_gpu_experts_scratch_bytes(const struct afd__experts_args *a, int least);

#ifdef __cplusplus
}
#endif

#endif
