/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The context: log, memory, compute threads, trace and metrics of one host. Every other handle is
 * made with one.
 *
 * Rules that hold for the whole library, told once:
 *
 *   Results     int functions return 0 or a count, or one of the negative errnos below;
 *               afd_last_error() then says what happened. Out-parameters are written only on
 *               success, unless their function says otherwise.
 *   Params      a parameter struct begins with its size (`.size = sizeof params`) and is read
 *               during the call only; strings in it are copied. Zero in a field means the default.
 *               NULL params mean all defaults. A struct of a newer header that sets a field unknown
 *               to this library is refused with -E2BIG. A struct that is filled in begins with
 *               its size as well, which the caller sets before the call; fields unknown to this
 *               library become 0.
 *   Enums       value 0 means the default; real values start at 1. They stand in structs as
 *               int32_t.
 *   Timeouts    milliseconds; 0 means the default, -1 means only look, do not wait.
 *   Ownership   who creates a handle destroys it, children before parents. Destroying NULL is fine.
 *               The library never frees memory that it was lent.
 *   Threads     functions that take a const handle may run concurrently; all others one thread at a
 *               time per handle. Different handles are independent. The library starts no thread
 *               that was not asked for here.
 *   fork        in a child every inherited handle gives -EINVAL, except to _close and _destroy.
 *
 * Error codes, a closed list:
 *   -EINVAL a value is out of range or the call is out of order · -E2BIG a field is set that this
 *           version does not know
 *   -ENOENT no such file, tensor, sequence or peer · -EEXIST it exists already · -ENOSPC a capacity
 *           fixed at creation is used up
 *   -ENOMEM no memory · -EBADMSG a file or frame contradicts itself · -ENOTSUP understood, but not
 *           supported
 *   -ENOSYS not part of this build; the text says which package helps · -ENODEV the machine cannot
 *   -EAGAIN nothing is wrong, poll first · -EBUSY one of these is under way already · -EINPROGRESS
 *           begun, not done · -EALREADY that is under way · -ECANCELED cancelled
 *   -ETIMEDOUT a deadline passed; the text says who waited for whom · -ECONNREFUSED nobody listens
 *              there
 *   -ECONNRESET the peer died or left · -EPROTO the peer disagrees; the text says in which field ·
 *               -EADDRINUSE address taken
 *   -EACCES not permitted · -EDOM numbers that are not finite · -EIO the system failed
 */
#ifndef AFD_CONTEXT_H
#define AFD_CONTEXT_H

#include <stddef.h>
#include <stdint.h>

#include "version.h"

#if defined(__GNUC__)
#define AFD_API __attribute__((visibility("default")))
#else
#define AFD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct afd_context afd_context;

/* The type of stored numbers. */
enum afd_dtype {
	AFD_DTYPE_F32 = 1,
	AFD_DTYPE_BF16 = 2,
	AFD_DTYPE_F16 = 3,
	AFD_DTYPE_FP8 = 4, /* e4m3 with scales: of weights, of the KV cache, and on the wire */
};

enum afd_log_level {
	AFD_LOG_ERROR = 1, /* something that was asked for did not happen */
	AFD_LOG_WARN = 2,  /* it happened, but not as one would expect */
	AFD_LOG_INFO = 3,  /* peers join and leave, models open */
	AFD_LOG_DEBUG = 4, /* for those who look for a fault */
};

/* Where log lines go. `write` gets one line without a newline; it may be called from any thread of
 * the host that uses a handle of this context, and must not call the library. */
struct afd_log {
	void (*write)(void *user, int32_t level, const char *text);
	void *user;
	int32_t max_level; /* enum afd_log_level; 0 means AFD_LOG_WARN */
};

/* Memory for what is large: weights, KV pages, activations, slots that need no sharing. `alignment`
 * is a power of two, at most 2 MiB. Both functions are set, or neither. Small objects come from
 * malloc. */
struct afd_allocator {
	void *(*alloc)(void *user, size_t bytes, size_t alignment); /* NULL when there is none */
	void (*free)(void *user, void *memory, size_t bytes);
	void *user;
};

/* Runs task(arg, i) for every i in 0 .. n_tasks-1, in any order, on any threads, and returns when
 * all are done. The calling thread should take part. The result of the library's math does not
 * depend on how tasks are spread. */
typedef void (*afd_task)(void *arg, uint32_t index);
struct afd_executor {
	void (*run)(void *user, uint32_t n_tasks, afd_task task, void *arg);
	void *user;
	uint32_t n_threads; /* how many threads take part, the caller included */
};

enum afd_span_flag {
	AFD_SPAN_ESTIMATED = 1, /* begin and duration are an estimate */
};

/*
 * One span of work, for traces. Times are CLOCK_MONOTONIC nanoseconds, of this process alone.
 *
 * Of the attention stage, by lane: "attention" (with the routing that is done there), "ffn" (from
 * the end of attention to the return of y), "wait" (nothing else could be done); without a lane
 * "head" and, when it has succeeded, "step". Of an FFN server: "ffn", a pass. In one step none
 * overlaps another one of its name and lane.
 *
 * Of a part that was sent to an FFN peer, reported together when its reply is found, one behind the
 * other: "wire out", "queue", "gather", "compute", "wire back", "unread" (y was here, and this side
 * computed); queue, gather and unread only when they are not 0. They end where the reply was found.
 * compute and gather are what the peer has measured, the two ways are half of what is left, each.
 * "lost": a part that has no reply, since its peer was lost.
 */
struct afd_span {
	const char *name; /* static storage */
	uint64_t start_ns;
	uint64_t duration_ns;
	uint64_t step;
	int32_t layer; /* -1: none */
	int32_t lane;  /* -1: none */
	uint32_t n_rows;
	/* Address, valid during the call: of a part its peer, of "ffn" and "wait" the FFN peer if there
	 * is but one; else NULL. */
	const char *peer;
	uint64_t id;            /* of a part: the same in all its spans; else 0 */
	uint32_t part, n_parts; /* of the frame; else 0 of 0 */
	uint8_t trace_id[16];   /* of the step; all zero: none */
	uint32_t flags;         /* enum afd_span_flag */
	uint32_t _pad;          /* 0 */
};

struct afd_tracer {
	void (*span)(void *user, const struct afd_span *span); /* must not call the library */
	void *user;
};

struct afd_context_params {
	size_t size;                   /* sizeof(struct afd_context_params) */
	struct afd_log log;            /* .write NULL: no log */
	struct afd_allocator allocator; /* .alloc NULL: anonymous mmap with huge pages where the
	                                   kernel has them */
	struct afd_executor executor;  /* .run NULL: n_threads of the library's own */
	uint32_t n_threads;            /* compute threads, the caller included; 0 means 1: the
	                                  caller's own */
	uint32_t _pad;                 /* 0 */
	struct afd_tracer tracer;      /* .span NULL: no trace */
};

/*
 * Makes a context. It holds the threads that were asked for; they sleep when there is nothing to
 * compute.
 *
 *   -EINVAL  half of a pair of hooks is set, n_threads > 1024 or beside executor.run, AFD_ISA names
 *            no variant
 *   -ENODEV  AFD_ISA forces a variant that this CPU lacks
 *   -E2BIG, -ENOMEM
 */
AFD_API int afd_context_create(afd_context **out, const struct afd_context_params *params);
AFD_API void afd_context_destroy(afd_context *ctx);

/* The text of the last failure in this thread, at most 511 bytes, until the next failing call.
 * Never NULL. */
AFD_API const char *afd_last_error(void);

/* "0.1.0"; the library's, which may be newer than the header's. */
AFD_API const char *afd_version(void);

/*
 * Renders all metrics of the context as Prometheus text (format 0.0.4) into buffer, NUL-terminated.
 * Returns the bytes that the whole text needs without the NUL; when that is >= capacity the text
 * was cut. buffer may be NULL with capacity 0. May run beside the threads that use the context's
 * handles.
 */
AFD_API int afd_context_metrics(const afd_context *ctx, char *buffer, size_t capacity);

/* "c", "avx2" or "avx512": the CPU variant in use, chosen by CPUID or by the environment variable
 * AFD_ISA; "?" without a context. */
AFD_API const char *afd_context_isa(const afd_context *ctx);

/* Bytes of one number of a dtype; 0 for an unknown one. */
AFD_API size_t afd_dtype_bytes(int32_t dtype);
/* "f32", "bf16", "f16", "fp8"; "?" for an unknown one. */
AFD_API const char *afd_dtype_name(int32_t dtype);

#ifdef __cplusplus
}
#endif

#endif
