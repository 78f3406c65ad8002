/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The steps as a trace that chrome://tracing and Perfetto open. Spans are kept in memory and
 * written at the end, so that tracing does not disturb what it shows; beyond TRACE_MAX_SPANS they
 * are only counted, and the count is told.
 */
#ifndef GENERATE_TRACE_H
#define GENERATE_TRACE_H

#include <afd/afd.h>

#define TRACE_MAX_SPANS 1048576
#define TRACE_MAX_PEERS 64

struct trace {
	const char *path;
	struct trace_span *spans; /* [capacity] */
	uint32_t n_spans, capacity;
	uint64_t n_dropped;
	char peers[TRACE_MAX_PEERS][128];
	uint32_t n_peers;
};

/* 0 or -ENOMEM. The tracer holds a pointer to trace. */
int trace_create(struct trace *trace, const char *path, struct afd_tracer *tracer);
/* Writes the file: TOOL_DONE, or TOOL_FAILED after a line on stderr. Without a path it does
 * nothing. */
int trace_write(const struct trace *trace);
void trace_free(struct trace *trace);

#endif
