/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The dimensions of a model, and operations that are run at them on two devices. Each run makes its
 * inputs of the same random numbers twice and compares what comes out.
 */
#ifndef AFD_TESTS_GPU_DIMS_H
#define AFD_TESTS_GPU_DIMS_H

#include "../conformance/rig.h"

struct dims {
	const char *name;
	uint32_t hidden, n_heads, n_kv_heads, intermediate; /* 0: no dense layer */
	uint32_t vocab;
	uint32_t width, n_experts, top_k; /* 0: no experts */
	uint32_t window;
	int sigmoid; /* 1: of the router, with a bias; and attention has a gate */
};

struct dims_op {
	const char *name;
	void (*run)(const struct dims *m);
	int (*applies)(const struct dims *m); /* NULL: to all */
};
enum { DIMS_OPS_MAX = 16, DIMS_HEAD = 128 };
extern const struct dims_op dims_ops[]; /* ends with an entry without a name */

/* ---- dims_fused.c ---- */
void dims_mlp(const struct dims *m);
void dims_sample(const struct dims *m);

/* ---- dims_pair.c: the two devices ---- */

/* Runs body on the CPU and on the device under test, each with the same random numbers; `numbers`
 * of out agree within allowed times the largest. */
typedef void (*dims_body)(struct rig *r, const struct dims *m, const void *how, float *out);
void dims_compare(
	const struct dims *m, dims_body body, const void *how, size_t numbers, double allowed);

/* Enqueues and fetches; again as often as AFD_DIMS_REPEAT says, and once from a graph where the
 * device has these, for the same bits. */
void dims_run(struct rig *r, int (*enqueue)(struct rig *r, const void *args), const void *args,
	float *host, const void *out, size_t numbers);

/* n numbers, rounded to bf16, which products on all devices take as they are. */
const float *dims_rows(struct rig *r, size_t n);
/* A packed matrix or stack with numbers around 1/sqrt(k), FP8 with scales in blocks. */
void dims_weights(struct rig *r, struct afd__matrix *out, const struct afd__matrix_shape *shape);
/* What sums over k may differ by: the order of float32 additions, and tensor cores that cut where
 * the CPU rounds, a unit in the last place each 16 columns. */
double dims_allowed(uint32_t k);

#endif
