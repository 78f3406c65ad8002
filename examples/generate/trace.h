/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The steps as a trace that chrome://tracing and Perfetto open: one process for attention and one
 * for each FFN peer, with a track for each lane; spans of one track never overlap. Spans are kept
 * in memory and written at the end, so that tracing does not disturb what it shows; beyond
 * TRACE_MAX_SPANS they are only counted, and the count is told.
 */
#ifndef GENERATE_TRACE_H
#define GENERATE_TRACE_H

#include <afd/afd.h>

#define TRACE_MAX_SPANS 1048576
#define TRACE_MAX_PEERS 64
#define TRACE_TRACKS	2 /* of a lane of a peer: as many parts are out at once */

struct trace_span {
	struct afd_span span; /* its peer is the one below */
	int32_t peer;	      /* index in peers, or -1 */
	uint32_t index;	      /* in the order in which they were told */
	uint64_t end_ns;      /* of the first span of a part: when the part ends; else 0 */
};

struct trace {
	const char *path;
	struct trace_span *spans; /* [capacity] */
	uint32_t n_spans, capacity;
	uint32_t first; /* span of the part that was told last */
	uint64_t n_dropped;
	char peers[TRACE_MAX_PEERS][128];
	uint32_t n_peers;
	struct trace_track {
		uint64_t id, end_ns; /* of the last part in it */
		int32_t used;
	} tracks[TRACE_MAX_PEERS][AFD_MAX_LANES][TRACE_TRACKS];
};

/* 0 or -ENOMEM. The tracer holds a pointer to trace. */
int trace_create(struct trace *trace, const char *path, struct afd_tracer *tracer);
/* Writes the file: TOOL_DONE, or TOOL_FAILED after a line on stderr. Without a path it does
 * nothing. */
int trace_write(struct trace *trace);
void trace_free(struct trace *trace);

#endif
