/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every part of the library asks of the context: checked params, log lines, large memory,
 * compute threads, spans, metrics, time. Nothing here knows what a model or a link is.
 */
#ifndef AFD_LIB_CORE_H
#define AFD_LIB_CORE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include <afd/context.h>

#include "error.h"

struct afd__pool; /* the library's own compute threads (executor.c) */
struct afd__metric;
struct afd__metrics;
struct afd__local;
struct afd__host_memory;
struct afd__transport_ops;

struct afd_context {
	struct afd_log log;
	struct afd_allocator allocator;
	struct afd_executor executor; /* always callable: ours, the host's, or the caller alone */
	struct afd_tracer tracer;
	struct afd__pool *pool;       /* NULL when the executor is the host's */
	int isa;                      /* enum afd__isa */
	pid_t pid;                    /* to refuse calls after fork */
	/* A page that the kernel clears in a child of fork, so that asking costs no system call: 1
	 * here, 0 there. NULL: the kernel cannot. */
	_Atomic uint32_t *alive;
	struct afd__metrics *metrics;
	struct afd__local *_Atomic local; /* what ends of links in this context share
	                                     (transport/local.c); it has its own lock */
	struct afd__host_memory *_Atomic host_memory; /* what is registered with devices
	                                     (device/host_memory.c); it has its own lock */
	const struct afd__transport_ops *test_transport; /* one more backend: tests only */
	int test_socket_bytes; /* of a socket's buffers; 0: the kernel's choice. Tests only */
	_Atomic uint64_t n_allocations; /* large and small ones of the library after creation of a
	                                   stage: the tests count */
};

/* ---- params ---- */

/*
 * Copies a params struct of any version: reads min(size, known) bytes of src into dst (of `known`
 * bytes), zero-fills the rest. NULL src means all zero. -E2BIG when a byte beyond `known` is set,
 * -EINVAL when size < sizeof(size_t) or absurd (> 64 KiB).
 */
int afd__params_copy(void *dst, size_t known, const void *src, const char *what);
/* The other way, for out-structs: *dst says in its size how much room it has; its size is kept. */
int afd__params_give(void *dst, const void *src, size_t known, const char *what);

/* -EINVAL in a child of fork (`what` names the handle's type), else 0. Every public function that
 * takes a handle begins with it. */
int afd__context_check(const struct afd_context *ctx, const char *what);
/* This is a child of the context's process. */
bool afd__forked(const struct afd_context *ctx);

/* ---- log ---- */
__attribute__((format(printf, 3, 4))) void afd__log(const struct afd_context *ctx, int level,
						    const char *format, ...);

/* ---- memory ---- */

/* Small objects: zeroed; NULL when there is none (then the error text is set). Sizes are
 * overflow-checked (n * bytes). */
void *afd__alloc(struct afd_context *ctx, size_t n, size_t bytes);
void afd__free(void *memory);
char *afd__strdup(struct afd_context *ctx, const char *text);
/* Large memory through the host's hooks; contents undefined. */
void *afd__large_alloc(struct afd_context *ctx, size_t bytes, size_t alignment, const char *what);
void afd__large_free(struct afd_context *ctx, void *memory, size_t bytes);

/* ---- compute threads ---- */
void afd__parallel(struct afd_context *ctx, uint32_t n_tasks, afd_task task, void *arg);

/* ---- time and spans ---- */
uint64_t afd__now_ns(void);
static inline uint64_t afd__now_ms(void) { return afd__now_ns() / 1000000; }
/* Reports a span when the host traces; costs one branch when it does not. */
void afd__span(const struct afd_context *ctx, const struct afd_span *span);

/* ---- metrics ---- */
enum afd__metric_kind { AFD__COUNTER = 1, AFD__GAUGE, AFD__HISTOGRAM };

/* One family has one HELP and TYPE line, however many objects report to it. */
struct afd__metric_family {
	const char *name; /* "afd_ffn_rows_per_pass" */
	const char *help;
	enum afd__metric_kind kind;
	const double *bounds; /* upper bounds of a histogram, ascending; the +Inf bucket is
	                         implied */
	unsigned n_bounds;
};

/* Adds one series with these labels (`peer="shm:a"`; "" for none). NULL and the error text when
 * there is no memory. */
struct afd__metric *afd__metric_add(struct afd_context *ctx,
				    const struct afd__metric_family *family, const char *labels);
void afd__metric_remove(struct afd_context *ctx, struct afd__metric *metric); /* NULL is fine */
/* Appends key="value" with the value escaped to labels, which holds a string of earlier labels or
 * "". -ENOSPC changes nothing. */
int afd__metric_label(char *labels, size_t capacity, const char *key, const char *value);
/* Lock-free; NULL metric is fine. */
void afd__metric_count(struct afd__metric *metric, uint64_t n);
void afd__metric_set(struct afd__metric *metric, double value);
void afd__metric_observe(struct afd__metric *metric, double value);

/* ---- CPU variants ---- */
enum afd__isa { AFD__ISA_C = 1, AFD__ISA_AVX2, AFD__ISA_AVX512 };
/* What CPUID offers, lowered by AFD_ISA; -EINVAL on an unknown name, -ENODEV when this CPU lacks
 * what was forced. */
int afd__isa_choose(void);
const char *afd__isa_name(int isa);

#endif
