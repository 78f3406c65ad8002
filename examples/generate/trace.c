/* SPDX-License-Identifier: Apache-2.0 */
/* Spans in memory, then an array of complete events ("ph": "X"), one row of the picture per lane.
 * See trace.h. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../tool/options.h"
#include "trace.h"

struct trace_span {
	const char *name;
	uint64_t start_ns, duration_ns, step;
	int32_t layer, lane;
	uint32_t n_rows;
	int32_t peer; /* index in peers, or -1 */
};

static int32_t find_peer(struct trace *trace, const char *address)
{
	if (!address)
		return -1;
	for (uint32_t i = 0; i < trace->n_peers; i++) {
		if (!strcmp(trace->peers[i], address))
			return i;
	}
	if (trace->n_peers == TRACE_MAX_PEERS)
		return -1;
	snprintf(trace->peers[trace->n_peers], sizeof trace->peers[0], "%s", address);
	return trace->n_peers++;
}

static void keep_span(void *user, const struct afd_span *span)
{
	struct trace *trace = user;

	if (trace->n_spans == trace->capacity) {
		trace->n_dropped++;
		return;
	}
	trace->spans[trace->n_spans++] = (struct trace_span){
		.name = span->name,
		.start_ns = span->start_ns,
		.duration_ns = span->duration_ns,
		.step = span->step,
		.layer = span->layer,
		.lane = span->lane,
		.n_rows = span->n_rows,
		.peer = find_peer(trace, span->peer),
	};
}

int trace_create(struct trace *trace, const char *path, struct afd_tracer *tracer)
{
	*trace = (struct trace){ .path = path, .capacity = TRACE_MAX_SPANS };
	*tracer = (struct afd_tracer){ 0 };
	if (!path)
		return 0;
	trace->spans = malloc(trace->capacity * sizeof *trace->spans); /* pages come as spans do */
	if (!trace->spans)
		return -ENOMEM;
	*tracer = (struct afd_tracer){ .span = keep_span, .user = trace };
	return 0;
}

static void write_span(const struct trace *trace, const struct trace_span *span, FILE *file)
{
	/* Perfetto wants a thread number of 0 or more: what belongs to no lane stands below the
	 * lanes. */
	fprintf(file,
		"{\"name\": \"%s\", \"cat\": \"afd\", \"ph\": \"X\", \"ts\": %.3f, \"dur\": %.3f, "
		"\"pid\": %d, \"tid\": %d, "
		"\"args\": {\"step\": %" PRIu64 ", \"layer\": %d, \"lane\": %d, \"rows\": %" PRIu32,
		span->name, span->start_ns / 1e3, span->duration_ns / 1e3, (int)getpid(),
		span->lane >= 0 ? span->lane : AFD_MAX_LANES, span->step, span->layer, span->lane,
		span->n_rows);
	if (span->peer >= 0)
		fprintf(file, ", \"peer\": \"%s\"",
			trace->peers[span->peer]); /* an address needs no escapes */
	fprintf(file, "}}");
}

int trace_write(const struct trace *trace)
{
	FILE *file;
	int failed;

	if (!trace->path)
		return TOOL_DONE;
	file = fopen(trace->path, "w");
	if (!file)
		return tool_fail(TOOL_FAILED, "--trace %s: %s", trace->path, strerror(errno));
	fputs("[\n", file);
	for (uint32_t i = 0; i < trace->n_spans; i++) {
		if (i)
			fputs(",\n", file);
		write_span(trace, &trace->spans[i], file);
	}
	fputs("\n]\n", file);
	failed = ferror(file);
	if (fclose(file) || failed)
		return tool_fail(TOOL_FAILED, "--trace %s: cannot be written", trace->path);
	if (trace->n_dropped)
		tool_fail(0, "warn: --trace: %" PRIu64 " spans were left out, limit %d",
			trace->n_dropped, TRACE_MAX_SPANS);
	return TOOL_DONE;
}

void trace_free(struct trace *trace)
{
	free(trace->spans);
}
