/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Spans in memory, then an array of events: names of processes and tracks ("M"), complete events
 * ("X"), and for each part an arrow from its lane to the peer and back ("s", "t", "f"). See
 * trace.h.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../tool/file.h"
#include "../tool/options.h"
#include "trace.h"

/* Numbers of processes, and of the tracks of attention; those of lanes follow each other. */
enum { PID_ATTENTION = 1, PID_PEERS = 2 };
enum { TID_STEP = 1, TID_ATTENTION = 2, TID_FFN = 6, TID_HEAD = 10, TID_WAIT = 11 };

/* ---- keeping ---- */

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
	int32_t peer = find_peer(trace, span->peer);
	struct trace_span *kept = &trace->spans[trace->n_spans];

	if (trace->n_spans == trace->capacity || (span->id && peer < 0)) {
		trace->n_dropped++;
		return;
	}
	*kept = (struct trace_span){ .span = *span, .peer = peer, .index = trace->n_spans++ };
	if (!span->id)
		return;
	/* Spans of a part are told one behind the other. */
	if (kept->index == 0 || trace->spans[trace->first].span.id != span->id)
		trace->first = kept->index;
	trace->spans[trace->first].end_ns = span->start_ns + span->duration_ns;
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

/* ---- tracks ---- */

static int earlier(const void *a, const void *b)
{
	const struct trace_span *x = a, *y = b;

	if (x->span.start_ns != y->span.start_ns)
		return x->span.start_ns < y->span.start_ns ? -1 : 1;
	return x->index < y->index ? -1 : x->index > y->index;
}

/* Two parts of a lane may be out at once: then the second one gets a track of its own. */
static int track_of_part(struct trace *trace, const struct trace_span *s)
{
	struct trace_track *tracks = trace->tracks[s->peer][s->span.lane];
	int best = 0;

	for (int i = 0; i < TRACE_TRACKS; i++) {
		if (tracks[i].used && tracks[i].id == s->span.id)
			return i;
		if (tracks[i].end_ns <= s->span.start_ns && tracks[best].end_ns > s->span.start_ns)
			best = i;
	}
	tracks[best] = (struct trace_track){ s->span.id, s->end_ns, 1 };
	return best;
}

static int track_of(const struct afd_span *span)
{
	if (!strcmp(span->name, "wait"))
		return TID_WAIT;
	if (span->lane < 0)
		return strcmp(span->name, "step") ? TID_HEAD : TID_STEP;
	return (strcmp(span->name, "ffn") ? TID_ATTENTION : TID_FFN) + span->lane;
}

/* ---- writing ---- */

static void write_text(FILE *file, const char *text)
{
	fputc('"', file);
	for (; *text; text++) {
		if (*text == '"' || *text == '\\')
			fputc('\\', file);
		fputc((unsigned char)*text < ' ' ? '?' : *text, file);
	}
	fputc('"', file);
}

/* Microseconds with all digits of nanoseconds, so that ends and begins meet in the file too. */
static void write_us(FILE *file, const char *key, uint64_t ns)
{
	fprintf(file, ", \"%s\": %" PRIu64 ".%03u", key, ns / 1000, (unsigned)(ns % 1000));
}

static void write_name(FILE *file, const char *what, int pid, int tid, const char *name)
{
	fprintf(file, ",\n{\"name\": \"%s\", \"ph\": \"M\", \"pid\": %d, \"tid\": %d, \"args\": {\"name\": ",
		what, pid, tid);
	write_text(file, name);
	fputs("}}", file);
}

static void write_names(const struct trace *trace, FILE *file)
{
	char name[160];

	fprintf(file,
		"{\"name\": \"process_name\", \"ph\": \"M\", \"pid\": %d, \"tid\": 0, \"args\": "
		"{\"name\": \"attention\"}}",
		PID_ATTENTION);
	write_name(file, "thread_name", PID_ATTENTION, TID_STEP, "step");
	write_name(file, "thread_name", PID_ATTENTION, TID_HEAD, "head");
	write_name(file, "thread_name", PID_ATTENTION, TID_WAIT, "wait");
	for (int lane = 0; lane < AFD_MAX_LANES; lane++) {
		snprintf(name, sizeof name, "attention, lane %d", lane);
		write_name(file, "thread_name", PID_ATTENTION, TID_ATTENTION + lane, name);
		snprintf(name, sizeof name, "FFN, lane %d", lane);
		write_name(file, "thread_name", PID_ATTENTION, TID_FFN + lane, name);
	}
	for (uint32_t i = 0; i < trace->n_peers; i++) {
		snprintf(name, sizeof name, "FFN %s", trace->peers[i]);
		write_name(file, "process_name", PID_PEERS + i, 0, name);
		for (int tid = 0; tid < AFD_MAX_LANES * TRACE_TRACKS; tid++) {
			snprintf(name, sizeof name, "lane %d%s", tid / TRACE_TRACKS,
				tid % TRACE_TRACKS ? ", second part" : "");
			write_name(file, "thread_name", PID_PEERS + i, tid, name);
		}
	}
}

static void write_args(const struct trace *trace, const struct trace_span *s, FILE *file)
{
	const struct afd_span *span = &s->span;

	fprintf(file,
		", \"args\": {\"step\": %" PRIu64 ", \"layer\": %d, \"lane\": %d, \"rows\": %" PRIu32,
		span->step, span->layer, span->lane, span->n_rows);
	if (span->id)
		fprintf(file, ", \"part\": %" PRIu32 ", \"parts\": %" PRIu32, span->part,
			span->n_parts);
	if (span->flags & AFD_SPAN_ESTIMATED)
		fputs(", \"estimated\": true", file);
	if (s->peer >= 0) {
		fputs(", \"peer\": ", file);
		write_text(file, trace->peers[s->peer]);
	}
	fputs(", \"trace_id\": \"", file);
	for (size_t i = 0; i < sizeof span->trace_id; i++)
		fprintf(file, "%02x", span->trace_id[i]);
	fputs("\"}}", file);
}

/* An arrow's point; it belongs to the span that is there at that time. */
static void write_flow(FILE *file, char phase, uint64_t id, int pid, int tid, uint64_t ns)
{
	fprintf(file,
		",\n{\"name\": \"part\", \"cat\": \"part\", \"ph\": \"%c\", %s\"id\": %" PRIu64
		", \"pid\": %d, \"tid\": %d",
		phase, phase == 'f' ? "\"bp\": \"e\", " : "", id, pid, tid);
	write_us(file, "ts", ns);
	fputs("}", file);
}

static void write_span(struct trace *trace, const struct trace_span *s, uint64_t zero_ns, FILE *file)
{
	const struct afd_span *span = &s->span;
	int pid = span->id ? PID_PEERS + s->peer : PID_ATTENTION;
	int tid = span->id ? span->lane * TRACE_TRACKS + track_of_part(trace, s) : track_of(span);
	int lane_tid = TID_FFN + span->lane;

	fputs(",\n{\"name\": ", file);
	write_text(file, span->name);
	fprintf(file, ", \"cat\": \"afd\", \"ph\": \"X\", \"pid\": %d, \"tid\": %d", pid, tid);
	write_us(file, "ts", span->start_ns - zero_ns);
	write_us(file, "dur", span->duration_ns);
	write_args(trace, s, file);
	if (!span->id)
		return;
	if (!strcmp(span->name, "wire out")) {
		write_flow(file, 's', span->id, PID_ATTENTION, lane_tid, span->start_ns - zero_ns);
		write_flow(file, 'f', span->id, PID_ATTENTION, lane_tid, s->end_ns - zero_ns);
	} else if (!strcmp(span->name, "compute")) {
		write_flow(file, 't', span->id, pid, tid, span->start_ns - zero_ns);
	}
}

int trace_write(struct trace *trace)
{
	struct tool_file out;
	int rc;

	if (!trace->path)
		return TOOL_DONE;
	rc = tool_file_open(&out, trace->path);
	if (rc)
		return tool_fail(TOOL_FAILED, "--trace %s: %s", trace->path, strerror(-rc));
	qsort(trace->spans, trace->n_spans, sizeof *trace->spans, earlier);
	fputs("[\n", out.file);
	write_names(trace, out.file);
	for (uint32_t i = 0; i < trace->n_spans; i++)
		write_span(trace, &trace->spans[i], trace->spans[0].span.start_ns, out.file);
	fputs("\n]\n", out.file);
	rc = tool_file_close(&out, 1);
	if (rc)
		return tool_fail(TOOL_FAILED, "--trace %s: %s", trace->path, strerror(-rc));
	if (trace->n_dropped)
		tool_fail(0, "warn: --trace: %" PRIu64 " spans were left out, limit %d",
			trace->n_dropped, TRACE_MAX_SPANS);
	return TOOL_DONE;
}

void trace_free(struct trace *trace)
{
	free(trace->spans);
}
