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
};

#define BENCH_UPLOADS 8

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
	uint32_t context;
	int32_t dtype;  /* enum afd_dtype: of weights, keys and values */
	double seconds; /* for one cell */
};

struct bench_op {
	const char *name;
	uint32_t n_cells; /* of one model */
	int routed;       /* 1: for routed models only, else for dense ones */
	int (*measure)(struct bench_ops *o,
		const struct bench_model *model); /* TOOL_DONE or TOOL_FAILED */
};
extern const struct bench_op bench_product, bench_attend, bench_norm, bench_rope, bench_activation,
	bench_moe;

/* Device memory that lives until the model's cells are done, from host memory or undefined. 0 or a
 * negative errno. */
int bench_upload(struct bench_ops *o, size_t bytes, const void *host, void **out);
void bench_free_uploads(struct bench_ops *o);
/* The next part of the cold memory: ordinary numbers, which may be overwritten with others. */
char *bench_cold(struct bench_ops *o, size_t bytes);
/* Waits for what was enqueued. */
int bench_finish(struct bench_ops *o);

#endif
