/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Carries gathered parts through the stage: slots → rows in f32 (and their experts, where the
 * attention side has routed) → one pass (or several, when there
 * are more rows than max_rows) → the replies' slots → replies. A part is answered once, when the
 * pass of its last row is done.
 *
 * On a device everything of a pass is enqueued at once and looked for by a ticket; with a compute
 * function the host's memory takes the device's place, and the rows go back when the function has
 * completed. Called by serve.c.
 */
#include "stage.h"

#include <assert.h>
#include <string.h>

/* ---- rows in and out ---- */

/* The rows of a part that are in the pass under way: its rows from .. from + n_rows - 1 are the
 * pass's from `to` on. */
struct piece {
	const struct afd__part *part;
	uint32_t from, to, n_rows;
};

static bool piece_of(const struct afd__ffn_run *run, uint64_t part_row0,
	const struct afd__part *part, struct piece *piece)
{
	uint64_t begin = part_row0 > run->row0 ? part_row0 : run->row0;
	uint64_t end = part_row0 + part->n_rows, pass_end = run->row0 + run->n_pass_rows;

	if (end > pass_end)
		end = pass_end;
	if (begin >= end)
		return false;
	*piece = (struct piece){
		.part = part,
		.from = (uint32_t)(begin - part_row0),
		.to = (uint32_t)(begin - run->row0),
		.n_rows = (uint32_t)(end - begin),
	};
	return true;
}

/* Rows of a slot to those of the pass. Of AFD_DTYPE_F32 no bit changes, so ids may be called that,
 * too. */
static int bring(struct afd_ffn *ffn, const struct piece *piece, const void *slot, int32_t dtype,
	uint32_t width, void *to)
{
	size_t slot_row_bytes = afd__row_bytes(width, dtype), row_bytes = width * sizeof(float);
	struct afd__convert_args args = {
		.src = (const char *)slot + piece->from * slot_row_bytes,
		.src_stride = slot_row_bytes,
		.src_dtype = dtype,
		.dst = (char *)to + piece->to * row_bytes,
		.dst_stride = row_bytes,
		.dst_dtype = AFD_DTYPE_F32,
		.n_rows = piece->n_rows,
		.width = width,
	};

	return afd__convert(&ffn->queue, &args);
}

/* A compute function reads and writes the slots themselves where one part is the whole pass and its
 * rows are f32 already. Ids are copied in any case: the peer may still write there. */
static bool is_in_place(const struct afd_ffn *ffn)
{
	const struct afd__ffn_run *run = &ffn->server.run;

	return ffn->host.compute && run->n_parts == 1 && run->n_rows == run->n_pass_rows &&
	       run->parts[0].x_dtype == AFD_DTYPE_F32 && run->parts[0].y_dtype == AFD_DTYPE_F32;
}

static int bring_in(struct afd_ffn *ffn, const struct piece *piece)
{
	const struct afd__part *part = piece->part;
	uint32_t top_k = part->top_k;
	int rc = 0;

	if (!is_in_place(ffn))
		rc = bring(ffn, piece, part->x, part->x_dtype, ffn->hidden, ffn->x);

	if (rc || !part->ids)
		return rc;
	assert(top_k == afd__ffn_top_k(ffn));
	rc = bring(ffn, piece, part->ids, AFD_DTYPE_F32, top_k, ffn->ids);
	return rc ? rc
		  : bring(ffn, piece, part->weights, AFD_DTYPE_F32, top_k, ffn->expert_weights);
}

static int convert_out(struct afd_ffn *ffn, const struct piece *piece)
{
	const struct afd__part *part = piece->part;
	size_t slot_row_bytes = afd__row_bytes(ffn->hidden, part->y_dtype);
	struct afd__convert_args args = {
		.src = ffn->y + (size_t)piece->to * ffn->hidden,
		.src_stride = ffn->hidden * sizeof(float),
		.src_dtype = AFD_DTYPE_F32,
		.dst = (char *)part->y + piece->from * slot_row_bytes,
		.dst_stride = slot_row_bytes,
		.dst_dtype = part->y_dtype,
		.n_rows = piece->n_rows,
		.width = ffn->hidden,
	};

	return afd__convert(&ffn->queue, &args);
}

static int convert_all(
	struct afd_ffn *ffn, int (*convert)(struct afd_ffn *ffn, const struct piece *piece))
{
	const struct afd__ffn_run *run = &ffn->server.run;
	uint64_t part_row0 = 0;
	struct piece piece;
	uint32_t i;
	int rc = 0;

	for (i = 0; i < run->n_parts && !rc; i++) {
		if (piece_of(run, part_row0, &run->parts[i], &piece))
			rc = convert(ffn, &piece);
		part_row0 += run->parts[i].n_rows;
	}
	return rc;
}

/* ---- replies ---- */

void afd__ffn_refuse(struct afd_ffn *ffn, const struct afd__part *part, int status)
{
	afd__metric_count(ffn->metrics.errors, 1);
	/* A link that cannot carry the reply fails on its own, and its peer learns it that way. */
	(void)afd__exchange_reply(ffn->net, part, status, 0, 0);
}

static void tell_failed(const struct afd_ffn *ffn, const char *text)
{
	const struct afd__part *first = &ffn->server.run.parts[0];
	char id[AFD__TRACE_TEXT];

	afd__log(ffn->ctx, AFD_LOG_WARN,
		"ffn: a pass of layer %u with %u parts has failed: %s; the first is of step %llu, "
		"trace id %s",
		ffn->server.run.layer, ffn->server.run.n_parts, text,
		(unsigned long long)first->step, afd__trace_text(id, first->trace_id));
}

/* Answers every part: with y, or with the error whose text the thread holds. */
static void answer(struct afd_ffn *ffn, int status)
{
	struct afd__ffn_run *run = &ffn->server.run;
	uint64_t now_ns = afd__now_ns();
	char text[512];
	uint32_t i;

	if (status) {
		afd__error_save(text, sizeof(text));
		tell_failed(ffn, text);
	}
	for (i = 0; i < run->n_parts; i++) {
		const struct afd__part *part = &run->parts[i];
		uint64_t gather_ns = run->gather_ns[i];

		if (status) {
			afd__ffn_refuse(ffn, part, afd__error(status, "%s", text));
			continue;
		}
		afd__ffn_count_part(ffn, run->begun_ns - part->arrived_ns, gather_ns);
		(void)afd__exchange_reply(ffn->net, part, 0, gather_ns, run->compute_ns);
		afd__arrivals_answered(&ffn->server.arrivals, part, now_ns);
	}
	run->n_parts = 0;
	run->under_way = false;
	if (status)
		afd__error(status, "%s", text);
}

/* ---- one pass ---- */

/* A pass was enqueued in part: what stands in the queue may still write slots that an error is
 * about to give back. */
static int settle(struct afd_ffn *ffn, int error)
{
	char text[512];
	uint64_t ticket;

	afd__error_save(text, sizeof(text));
	if (!afd__queue_ticket(&ffn->queue, &ticket))
		(void)afd__queue_wait(
			&ffn->queue, ticket, AFD__FFN_WAIT_MS, "a pass of the ffn stage");
	return afd__error(error, "%s", text);
}

/* The layer between slots: what it depends on is no address that changes. */
struct layer {
	struct afd_ffn *ffn;
	struct afd__ffn_call call;
};

static int enqueue_layer(void *user)
{
	struct layer *layer = user;

	return afd__ffn_layer(layer->ffn, &layer->ffn->queue, &layer->call);
}

static int run_layer(struct afd_ffn *ffn, const struct afd__ffn_call *call)
{
	struct layer layer = { ffn, *call };
	const struct afd__recording_key key = { { call->layer, call->n_rows, call->ids != NULL } };
	int rc = afd__recordings_run(&ffn->graphs, &ffn->queue, &key, enqueue_layer, &layer);

	return rc < 0 ? rc : 0;
}

static int begin_on_device(struct afd_ffn *ffn)
{
	struct afd__ffn_run *run = &ffn->server.run;
	struct afd__ffn_call call = {
		.layer = run->layer,
		.n_rows = run->n_pass_rows,
		.x = ffn->x,
		.y = ffn->y,
		.ids = run->routed ? ffn->ids : NULL,
		.weights = run->routed ? ffn->expert_weights : NULL,
	};
	int rc = convert_all(ffn, bring_in);

	afd__range_push(&ffn->queue, "afd ffn");
	if (!rc)
		rc = run_layer(ffn, &call);
	afd__range_pop(&ffn->queue);
	if (!rc)
		rc = convert_all(ffn, convert_out);
	if (!rc)
		rc = afd__queue_ticket(&ffn->queue, &run->ticket);
	return rc ? settle(ffn, rc) : 0;
}

/* 0, also when the pass is done already: _reached tells. */
static int begin_pass(struct afd_ffn *ffn)
{
	struct afd__ffn_run *run = &ffn->server.run;
	uint64_t left = run->n_rows - run->row0;
	int rc;

	run->n_pass_rows = left < ffn->max_rows ? (uint32_t)left : ffn->max_rows;
	run->started_ns = afd__now_ns();
	run->under_way = true;
	afd__exchange_computes(ffn->net, run->started_ns);
	if (!ffn->host.compute)
		return begin_on_device(ffn);
	rc = convert_all(ffn, bring_in);
	if (!rc && is_in_place(ffn))
		rc = afd__ffn_host_begin(ffn, run->parts[0].x, run->parts[0].y);
	else if (!rc)
		rc = afd__ffn_host_begin(ffn, ffn->x, ffn->y);
	run->ticket = rc > 0;
	return rc < 0 ? rc : 0;
}

static int reached(struct afd_ffn *ffn)
{
	struct afd__ffn_run *run = &ffn->server.run;
	int rc;

	if (!ffn->host.compute)
		return afd__queue_reached(&ffn->queue, run->ticket);
	rc = run->ticket ? 1 : afd__ffn_host_reached(ffn);
	if (rc <= 0)
		return rc;
	rc = is_in_place(ffn) ? 0 : convert_all(ffn, convert_out);
	return rc ? rc : 1;
}

static void account(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	struct afd__ffn_run *run = &server->run;
	uint64_t ns = afd__now_ns() - run->started_ns;
	struct afd_span span = {
		.name = "ffn",
		.start_ns = run->started_ns,
		.duration_ns = ns,
		.step = run->parts[0].step,
		.layer = (int32_t)run->layer,
		.lane = run->n_parts == 1 ? (int32_t)run->parts[0].lane : -1,
		.n_rows = run->n_pass_rows,
	};

	memcpy(span.trace_id, run->parts[0].trace_id, sizeof(span.trace_id));
	run->compute_ns += ns;
	server->mean_pass_ns = server->mean_pass_ns ? (server->mean_pass_ns * 7 + ns) / 8 : ns;
	afd__ffn_count_pass(ffn, run->layer, run->n_pass_rows, ns);
	afd__span(ffn->ctx, &span);
}

/* ---- all passes of the gathered parts ---- */

int afd__ffn_run_begin(struct afd_ffn *ffn)
{
	struct afd__ffn_run *run = &ffn->server.run;
	int rc;

	assert(run->n_parts && run->n_rows && !run->under_way);
	run->row0 = 0;
	run->compute_ns = 0;
	run->begun_ns = afd__now_ns();
	rc = begin_pass(ffn);
	if (rc)
		answer(ffn, rc);
	return ffn->queue.error ? rc : 0;
}

int afd__ffn_run_poll(struct afd_ffn *ffn)
{
	struct afd__ffn_run *run = &ffn->server.run;
	int rc;

	while (run->under_way) {
		rc = reached(ffn);
		if (!rc)
			return 0;
		if (rc > 0) {
			account(ffn);
			run->row0 += run->n_pass_rows;
			rc = run->row0 < run->n_rows ? begin_pass(ffn) : 1;
		}
		if (rc)
			answer(ffn, rc < 0 ? rc : 0);
		if (rc < 0 && ffn->queue.error)
			return rc;
	}
	return 1;
}
