/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products through cuBLASLt, where it is there and best: the library of a device (blaslt.c) and what
 * a queue keeps to use it (blaslt_product.c). products.c decides whether there is one.
 *
 * Invariant: the library is never linked; what it needs on the device comes out of the queue's
 * workspace, and it is asked on the host, so nothing here allocates or waits after creation.
 */
#ifndef AFD_MODULES_CUDA_BLASLT_H
#define AFD_MODULES_CUDA_BLASLT_H

#include "cuda.h"

#define BLASLT_WORKSPACE_BYTES ((size_t)32 << 20) /* what its makers advise for sm_90 */

/* Puts the library that was found into c->blaslt; the context is current. Otherwise it stays NULL, and
 * `reason` says why. */
void blaslt_open(const struct afd__device *dev, struct cuda *c, char *reason, size_t capacity);
void blaslt_close(struct cuda *c); /* the context is current */

#ifdef AFD_CUBLASLT
/* What it wants behind the workspace of our kernels; 0 for a queue that must not use it. */
size_t blaslt_workspace_bytes(const struct cuda_queue *d);
int blaslt_queue_open(struct cuda_queue *d); /* what it has made is for _close, also when it fails */
void blaslt_queue_close(struct cuda_queue *d);
/* 1: enqueued, 0: our own kernels shall do it, or a negative errno. */
int blaslt_product(struct cuda_queue *d, const struct afd__product_args *a);
int blaslt_mlp(struct cuda_queue *d, const struct afd__mlp_args *a);

#include <cublasLt.h>

/* clang-format off */
#define BLASLT_SYMBOLS(X) \
	X(Create) X(Destroy) X(GetVersion) X(GetStatusName) X(Matmul) X(MatmulAlgoGetHeuristic) \
	X(MatmulDescCreate) X(MatmulDescDestroy) X(MatmulDescSetAttribute) X(MatrixLayoutCreate) \
	X(MatrixLayoutDestroy) X(MatrixLayoutSetAttribute) X(MatmulPreferenceCreate) \
	X(MatmulPreferenceDestroy) X(MatmulPreferenceSetAttribute)
/* clang-format on */

struct blaslt {
	cublasLtHandle_t handle;
	size_t version; /* 130100 is 13.1.0 */
	bool has_blocks; /* FP8 with scales of 128 x 128 blocks, asked of this GPU */
#define MEMBER(name) __typeof__(cublasLt##name) *name;
	BLASLT_SYMBOLS(MEMBER)
#undef MEMBER
};

/* Host objects that describe a product; a plan asks with them, and the product runs with them. */
enum blaslt_kind { BLASLT_F32, BLASLT_16, BLASLT_FP8, BLASLT_KINDS };
struct blaslt_words {
	cublasLtMatmulDesc_t product[BLASLT_KINDS];
	cublasLtMatrixLayout_t w, x, y;
	cublasLtMatmulPreference_t preference;
};

/* y [n_rows][n] = x [n_rows][k] w [n][k]^T + bias; strides in numbers. */
struct blaslt_matmul {
	const void *w, *x;
	float *y;
	const float *bias, *w_scales, *x_scales;
	uint64_t w_stride, x_stride, y_stride;
	uint32_t n, k, n_rows;
	int32_t dtype; /* of w and x */
};

cublasStatus_t blaslt_words_open(const struct blaslt *lib, struct blaslt_words *words);
void blaslt_words_close(const struct blaslt *lib, struct blaslt_words *words);
/* Says the product, and asks for the best way to do it. */
cublasStatus_t blaslt_describe(
	const struct blaslt *lib, const struct blaslt_words *words, const struct blaslt_matmul *m);
cublasStatus_t blaslt_ask(const struct blaslt *lib, const struct blaslt_words *words,
	const struct blaslt_matmul *m, cublasLtMatmulHeuristicResult_t *best);
enum blaslt_kind blaslt_kind_of(int32_t dtype);
/* What an address can be relied on to be aligned to, up to 256. */
uint32_t blaslt_alignment(const void *p);

#else
#define blaslt_workspace_bytes(d) ((size_t)0)
#define blaslt_queue_open(d)      0
#define blaslt_queue_close(d)     ((void)(d))
#define blaslt_product(d, a)      0
#define blaslt_mlp(d, a)          0
#endif

#endif
