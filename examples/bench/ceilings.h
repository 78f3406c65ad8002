/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What this machine can do at most: reading DRAM, fused multiply-adds in float32 with the vectors
 * that the library uses, copying. Taken by the same threads as the operations and in between them,
 * because the machine may be shared: a ratio is only worth something against a ceiling of the same
 * moment.
 */
#ifndef BENCH_CEILINGS_H
#define BENCH_CEILINGS_H

#include <stddef.h>

#include "../../lib/context/core.h"
#include "report.h"

#define BENCH_COLD_BYTES ((size_t)1 << 30) /* more than any cache */

/* A way to read memory: so many streams side by side, fetched so far ahead (0: left to the CPU). */
struct bench_pattern {
	int n_streams;
	size_t prefetch_bytes;
};
#define BENCH_PATTERNS 8
extern const struct bench_pattern bench_patterns[BENCH_PATTERNS];

struct bench_ceilings {
	struct afd_context *ctx;
	char *memory; /* [bytes], read only after opening */
	size_t bytes, position;
	int best[3];                          /* patterns, the best first */
	struct bench_samples dram, fma, copy; /* all probes; bytes or flops per ns */
};

/* Allocates at least BENCH_COLD_BYTES and looks for the best patterns: about a second.
 * TOOL_DONE or TOOL_FAILED after a line on stderr. */
int bench_ceilings_open(struct bench_ceilings *c, struct afd_context *ctx);
void bench_ceilings_close(struct bench_ceilings *c);

/* Each takes a few milliseconds, and keeps its result in the samples too. */
double bench_probe_pattern(struct bench_ceilings *c, int pattern); /* bytes per ns; not kept */
double bench_probe_dram(struct bench_ceilings *c); /* bytes per ns, the best of the best patterns */
double bench_probe_fma(struct bench_ceilings *c);  /* flops per ns */
double bench_probe_copy(struct bench_ceilings *c); /* bytes copied per ns */

#endif
