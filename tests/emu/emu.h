/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs kernels on the CPU: every thread of a block is a fiber; barriers and warp operations park it
 * until the others have come. kernels/cuda/gpu.h gives the kernels' words their meaning with what
 * is declared here. Test code only.
 *
 * Invariant: only what the kernel says orders its threads. They run in an order that is chosen
 * (AFD_EMU_ORDER: first, last, random:SEED); to the thread sanitizer each is a thread of its own,
 * and only barrier() and warp_sync() order memory. Shared memory begins as NaN and ends where it
 * was asked to end.
 */
#ifndef AFD_TESTS_EMU_H
#define AFD_TESTS_EMU_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <functional>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_THREAD__)
#define EMU_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define EMU_TSAN 1
#endif
#endif

namespace emu {

struct Index {
	unsigned x, y, z;
};

/* What a kernel may ask about itself. One OS thread runs one launch at a time. */
struct Self {
	unsigned thread, lane;
	Index block, grid;
	unsigned n_threads;
};
extern thread_local Self self __attribute__((tls_model("initial-exec")));

/* One cp.async of 16 bytes that is on its way: `bytes` of src, the rest zeros. */
struct Copy {
	void *dst;
	const void *src;
	unsigned bytes;
};

enum { COPIES_MAX = 512, GROUPS_MAX = 16 }; /* of one thread at once */

/* Ends the launch with an error that names the kernel, block and thread; never returns. */
[[noreturn]] void fail(const char *file, int line, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

void barrier(const char *file, int line);
/* The lanes of the mask meet; the last to come calls run() with the arguments of all 32. Memory is
 * ordered among them only when `fence`. */
void meet(unsigned mask, const char *what, void *arg, void (*run)(void **lanes), bool fence,
	const char *file, int line);

void *shared(const void *key, size_t bytes); /* the block's array of this declaration */
unsigned char *dynamic_shared(void);

void copy_push(const Copy &copy, const char *file, int line);
void copy_commit(void);
/* Copies of the oldest group when more than `keep` are committed; 0 when not. */
unsigned copy_take(unsigned keep, Copy *out);

void count_conflicts(unsigned n); /* of ldmatrix: rows that share a bank */

struct Launch {
	const char *name;
	Index grid;
	unsigned n_threads;
	size_t shared_bytes;
	void (*body)(void *arg); /* of one thread */
	void *arg;
};
/* Runs all blocks in this OS thread. 0, or -1 when a thread called fail(). */
int run(const Launch &launch);
void end_thread(void); /* frees what this OS thread's launches left */

/* runtime.cc: puts the launch on a stream. */
int enqueue(cudaStream_t stream, const char *name, Index grid, unsigned n_threads,
	size_t shared_bytes, std::function<void()> body);

/* ---- for the templates of gpu.h ---- */

template <class A>
inline void meet_as(unsigned mask, const char *what, A *arg, void (*run)(A **), bool fence,
	const char *file, int line)
{
	meet(mask, what, arg, (void (*)(void **))run, fence, file, line);
}

inline void need_aligned(const void *p, size_t bytes, const char *what, const char *file, int line)
{
	if ((uintptr_t)p % bytes)
		fail(file, line, "%s %p must be aligned to %zu bytes", what, p, bytes);
}

/* The destination is undefined until the wait, so it is poisoned now and written then; both are
 * accesses of the calling thread that a sanitizer sees. */
inline void copy_async16(void *dst, const void *src, unsigned bytes, const char *file, int line)
{
	uint64_t *to = (uint64_t *)dst;

	need_aligned(dst, 16, "cp.async: shared address", file, line);
	if (bytes)
		need_aligned(src, 16, "cp.async: global address", file, line);
	to[0] = to[1] = ~(uint64_t)0;
	copy_push({ dst, src, bytes }, file, line);
}

inline void copy_wait(unsigned keep)
{
	Copy copies[COPIES_MAX];

	while (unsigned n = copy_take(keep, copies)) {
		/* n is one more than the copies of the group, which may be none. */
		for (unsigned i = 0; i + 1 < n; i++) {
			const Copy &c = copies[i];
			unsigned char numbers[16] = {};

			memcpy(numbers, c.src, c.bytes);
			memcpy(c.dst, numbers, 16);
		}
	}
}

} // namespace emu

#endif
