/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the operations of `afd-bench ops` share: a device, a queue, 1 GiB of cold memory on the
 * device, and what was uploaded for the model at hand. An operation measures one model's shapes,
 * one cell per shape and number of rows.
 */
#ifndef BENCH_OPS_H
#define BENCH_OPS_H

#include "../../lib/device/device.h"
#include "bench.h"

struct bench_model {
	const char *name;
	uint32_t hidden, n_heads, n_kv_heads, head_dim, intermediate;
	uint32_t n_experts, top_k; /* routed: intermediate is the width of one expert. 0: dense */
	int large;                 /* 1: only when it is named */
};

#define BENCH_UPLOADS  8
#define BENCH_LIST_MAX 24
#define BENCH_ROWS_MAX 8192

struct bench_list {
	uint32_t at[BENCH_LIST_MAX], n;
};

struct bench_matrices {
	struct {
		uint32_t n, k;
	} at[BENCH_LIST_MAX];
	uint32_t n;
};

/* Where rows go: each draws experts of its own; all experts in turn; or the r-th in the order of a
 * layer has weight r^-1.2. */
enum bench_routing { BENCH_UNIFORM, BENCH_BALANCED, BENCH_POWER_LAW };

struct bench_ops {
	struct bench *b;
	struct afd__device *dev;
	struct afd__queue queue;
	char *cold;       /* dev [cold_bytes] */
	char *cold_owned; /* NULL when it is the memory of the ceilings */
	size_t cold_bytes, position;
	struct {
		void *data;
		size_t bytes;
	} owned[BENCH_UPLOADS];
	uint32_t n_owned;
	struct bench_list rows; /* of each cell; empty: the operation's own */
	struct bench_list contexts;
	uint32_t context; /* the one at hand */
	int32_t dtype;    /* enum afd_dtype: of weights, keys and values */
	enum bench_routing routing;
	double seconds; /* for one cell */
};

struct bench_op {
	const char *name;
	uint32_t n_shapes; /* of one model */
	uint32_t rows[8];  /* unless --rows says others; ends with 0, or is full */
	int routed;        /* 1: for routed models only, 0: for dense ones, -1: for all */
	int (*measure)(struct bench_ops *o,
		const struct bench_model *model); /* TOOL_DONE or TOOL_FAILED */
};
extern const struct bench_op bench_product, bench_attend, bench_norm, bench_rope, bench_activation,
	bench_mlp, bench_sample, bench_moe;

/* The rows of the cells of an operation, ascending or not, and how many at most. */
struct bench_list bench_rows_of(const struct bench_ops *o, const struct bench_op *op);
uint32_t bench_list_max(const struct bench_list *list);

/* Products with matrices of these sizes. TOOL_DONE or TOOL_FAILED. */
int bench_measure_matrices(struct bench_ops *o, const struct bench_matrices *matrices);

/* Device memory that lives until the model's cells are done, from host memory or undefined. 0 or a
 * negative errno. */
int bench_upload(struct bench_ops *o, size_t bytes, const void *host, void **out);
void bench_free_uploads(struct bench_ops *o);
/* The next part of the cold memory: ordinary numbers, which may be overwritten with others. */
char *bench_cold(struct bench_ops *o, size_t bytes);
/* A packed matrix of the dtype at hand, without memory; and it in the next of the cold memory. */
struct afd__matrix bench_packed(const struct bench_ops *o, uint32_t n, uint32_t k);
void bench_take_cold(struct bench_ops *o, struct afd__matrix *m);
/* Uploads ordinary numbers, which `op` reads. 0 or a negative errno. */
int bench_upload_numbers(struct bench_ops *o, const char *op, size_t n_numbers, void **out);
/* Waits for what was enqueued, where runs are timed one by one. */
int bench_finish(struct bench_ops *o);

#endif
