/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The emulated GPU from a host's side: what it counts, and the part of the CUDA runtime by which a
 * host has streams, memory and graphs of its own. Taken from the module that the library has loaded,
 * after a device was opened.
 */
#ifndef AFD_TEST_EMULATOR_H
#define AFD_TEST_EMULATOR_H

#include <stddef.h>

struct emulator {
	void *(*context)(void); /* of this thread */
	void (*set_context)(int device);
	int (*device_of)(const void *memory); /* -1: none */
	unsigned (*n_allocations)(void);
	unsigned (*n_registered)(void); /* pieces of host memory, now */
	unsigned (*n_launches)(void);
	unsigned (*n_replays)(void);

	int (*stream_create)(void **stream, unsigned flags);
	int (*stream_destroy)(void *stream);
	int (*stream_synchronize)(void *stream);
	int (*begin_capture)(void *stream, int mode);
	int (*end_capture)(void *stream, void **graph);
	int (*instantiate)(void **exec, void *graph, unsigned long long flags);
	int (*graph_launch)(void *exec, void *stream);
	int (*graph_destroy)(void *graph);
	int (*exec_destroy)(void *exec);
	int (*alloc)(void **memory, size_t bytes);
	int (*free)(void *memory);
	int (*copy)(void *dst, const void *src, size_t bytes, int kind, void *stream);
};

enum { EMULATOR_COPY = 4 }; /* cudaMemcpyDefault */

/* Fails the test when the module is not the emulator's. */
void emulator_open(struct emulator *e);

#endif
