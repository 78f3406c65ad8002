/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step as a resumable object. Begin plans it; each poll moves it a little further and never
 * waits: it looks at the lanes that are at the FFN, then runs the attention of one lane that is
 * not. So while one lane is at the FFN another computes, and a host's loop gets its turn after each
 * layer. Where this side routes, a lane leaves for the FFN when the choice of experts has come. In
 * an attention group a lane waits for the other ranks twice in a layer: for the sum over their
 * heads, and for y of their rows.
 *
 * Invariant: until the step has succeeded the sequences are as before it; every way out but success
 * restores them.
 */
#include <string.h>

#include "attn.h"

enum {
	DEVICE_TIMEOUT_MS = 60000, /* a device that does nothing for so long is lost */
	SETTLE_TIMEOUT_MS = 5000,  /* for what is enqueued when a step ends early */
};

/* ---- begin ---- */

static void warn_of_position(struct afd_attn *attn)
{
	uint32_t limit = attn->arch->max_position_embeddings, last = attn->batch.last_position;

	if (!limit || attn->warned_position || !attn->batch.n_rows || last < limit)
		return;
	attn->warned_position = 1;
	afd__log(attn->ctx, AFD_LOG_WARN,
		"attn: position %u is computed, max_position_embeddings is %u", last, limit);
}

static void begin_lanes(struct afd_attn *attn)
{
	uint32_t i;

	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__batch_lane *planned = &attn->batch.lanes[i];

		attn->step.lanes[i] = (struct afd__lane){
			.state = planned->n_rows ? AFD__LANE_READY : AFD__LANE_IDLE,
			.row0 = planned->row0,
			.n_rows = planned->n_rows,
		};
		afd__attn_group_share(attn, &attn->step.lanes[i]);
	}
}

int afd_attn_begin(afd_attn *attn, const struct afd_batch *batch)
{
	struct afd__step *step;
	struct afd_batch wanted;
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (rc)
		return rc;
	step = &attn->step;
	if (step->state != AFD__STEP_NONE)
		return afd__error(
			-EBUSY, "attn: step %llu is under way", (unsigned long long)step->number);
	rc = afd__params_copy(&wanted, sizeof(wanted), batch, "batch");
	if (!rc && wanted._pad)
		rc = afd__error(-EINVAL, "batch: _pad is %u, must be 0", wanted._pad);
	rc = rc ? rc : afd__batch_plan(&attn->batch, &wanted);
	if (rc)
		return rc;
	*step = (struct afd__step){
		.state = AFD__STEP_JOINING,
		.moved = 1,
		.number = step->number + 1,
		.start_ns = afd__now_ns(),
		.logits = wanted.logits,
		.greedy_ids = wanted.greedy_ids,
		.sampled_ids = wanted.sampled_ids,
	};
	step->moved_ns = step->start_ns;
	memcpy(step->trace_id, wanted.trace_id, sizeof(step->trace_id));
	begin_lanes(attn);
	warn_of_position(attn);
	return 0;
}

/* ---- spans ---- */

static void report(const struct afd_attn *attn, const char *name, uint64_t start_ns,
	uint64_t end_ns, int32_t lane, bool at_peer)
{
	const struct afd__lane *l = lane < 0 ? NULL : &attn->step.lanes[lane];
	struct afd_span span = {
		.name = name,
		.start_ns = start_ns,
		.duration_ns = end_ns - start_ns,
		.step = attn->net ? afd__exchange_step(attn->net) : attn->step.number,
		.layer = l ? (int32_t)l->layer : -1,
		.lane = lane,
		.n_rows = l ? l->n_rows : attn->step.head_rows ? attn->step.head_rows : attn->batch.n_rows,
		.peer = at_peer && attn->peer[0] ? attn->peer : NULL,
	};

	memcpy(span.trace_id, attn->step.trace_id, sizeof(span.trace_id));
	afd__span(attn->ctx, &span);
}

/* ---- the end ---- */

/* One of the few places that wait: the device may still write to slots, pages and the host's
 * outputs. */
static void settle_device(struct afd_attn *attn)
{
	uint64_t ticket;

	if (afd__queue_ticket(&attn->queue, &ticket) == 0)
		afd__queue_wait(&attn->queue, ticket, SETTLE_TIMEOUT_MS,
			"the operations of a step that ends");
}

void afd__attn_step_abandon(struct afd_attn *attn, const char *cause)
{
	settle_device(attn);
	if (attn->step.opened)
		afd__exchange_cancel(attn->net, cause);
	afd__batch_restore(&attn->batch);
	attn->step.state = AFD__STEP_NONE;
}

/* The cause outlives what is done because of it. */
static int fail(struct afd_attn *attn, int rc)
{
	char text[512];

	afd__error_save(text, sizeof(text));
	afd__attn_step_abandon(attn, text);
	return afd__error(rc, "%s", text);
}

static int succeed(struct afd_attn *attn)
{
	int rc = afd__attn_check_outputs(attn);

	if (rc)
		return rc;
	if (attn->batch.n_rows)
		report(attn, "step", attn->step.start_ns, afd__now_ns(), -1, false);
	afd__attn_give_ids(attn);
	afd__batch_commit(&attn->batch);
	afd__attn_count_step(attn);
	attn->step.state = AFD__STEP_NONE;
	return 1;
}

int afd_attn_cancel(afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (!rc && attn->step.state != AFD__STEP_NONE)
		afd__attn_step_abandon(attn, NULL);
	return rc;
}

/* ---- lanes ---- */

/* Attention of its layer was enqueued, and the layer is not over. */
static bool is_under_way(const struct afd__lane *lane)
{
	return lane->state != AFD__LANE_IDLE && lane->state != AFD__LANE_READY;
}

/* The lane whose attention was enqueued first and is not known to be done; -1: none. */
static int32_t oldest_attention(const struct afd_attn *attn)
{
	int32_t oldest = -1;
	uint32_t i;

	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (is_under_way(lane) && !lane->computed_ns &&
			(oldest < 0 ||
				lane->attention_ticket < attn->step.lanes[oldest].attention_ticket))
			oldest = (int32_t)i;
	}
	return oldest;
}

/* In the order of the queue, which runs one lane after the other: none has begun before the last
 * one was done. */
static int look_at_attention(struct afd_attn *attn)
{
	int32_t index;
	int rc;

	while ((index = oldest_attention(attn)) >= 0) {
		struct afd__lane *lane = &attn->step.lanes[index];

		rc = afd__queue_reached(&attn->queue, lane->attention_ticket);
		if (rc <= 0)
			return rc;
		lane->computed_ns = afd__now_ns();
		if (lane->start_ns < attn->step.free_ns)
			lane->start_ns = attn->step.free_ns;
		attn->step.free_ns = lane->computed_ns;
		attn->attention_ns += lane->computed_ns - lane->start_ns;
		report(attn, "attention", lane->start_ns, lane->computed_ns, index, false);
	}
	return 0;
}

/* Peers have brought what the lane waited for. */
static void end_wait(struct afd_attn *attn, uint32_t index)
{
	struct afd__step *step = &attn->step;
	uint64_t now = afd__now_ns();

	step->moved = 1;
	if (!step->wait_ns)
		return;
	report(attn, "wait", step->wait_ns, now, (int32_t)index, true);
	attn->wait_ns += now - step->wait_ns;
	step->wait_ns = 0;
}

/* Rows of the next layer may begin; the last layer's y stays for the head. */
static void return_lane(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];

	lane->layer++;
	lane->state = lane->layer < attn->arch->n_layers ? AFD__LANE_READY : AFD__LANE_IDLE;
}

static int gather(struct afd_attn *attn, uint32_t index)
{
	attn->step.lanes[index].state = AFD__LANE_GATHERING;
	return afd__attn_group_gather(attn, index);
}

static int leave_ffn(struct afd_attn *attn, uint32_t index)
{
	const struct afd__lane *lane = &attn->step.lanes[index];
	uint64_t now = afd__now_ns();

	report(attn, "ffn", lane->computed_ns, now, (int32_t)index, !attn->ffn);
	if (attn->ffn)
		attn->ffn_ns += now - lane->computed_ns;
	if (afd__attn_in_group(attn))
		return gather(attn, index);
	return_lane(attn, index);
	return 0;
}

static void begin_attention(struct afd_attn *attn, struct afd__lane *lane)
{
	lane->start_ns = afd__now_ns();
	lane->computed_ns = 0;
	lane->moving = 0;
	if (attn->net)
		afd__exchange_computes(attn->net, lane->start_ns);
}

/* On the cpu device it is done by now, and what comes next would count as attention. */
static int end_attention(struct afd_attn *attn, struct afd__lane *lane, int32_t state)
{
	int rc = afd__queue_ticket(&attn->queue, &lane->attention_ticket);

	if (rc)
		return rc;
	lane->state = state;
	rc = look_at_attention(attn);
	return rc < 0 ? rc : 0;
}

/* Rows that are to be routed leave when their choice is here, others at once. */
static int send_lane(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc = 0;

	if (lane->state == AFD__LANE_ROUTING) {
		if (!lane->computed_ns)
			return 0;
		rc = afd__attn_route_plan(attn, index);
		lane->state = AFD__LANE_AT_FFN;
		attn->step.moved = 1;
	}
	if (rc)
		return rc;
	if (!lane->n_own_rows)
		return gather(attn, index);
	return attn->ffn ? afd__attn_local_send(attn, index) : afd__attn_remote_send(attn, index);
}

/* y of attention is complete, and the FFN's input is enqueued. */
static int go_to_ffn(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	bool routes = lane->n_own_rows && afd__attn_routes(attn, lane->layer);
	int rc = routes ? afd__attn_enqueue_choice_down(attn, lane) : 0;

	rc = rc ? rc : end_attention(attn, lane, routes ? AFD__LANE_ROUTING : AFD__LANE_AT_FFN);
	return rc ? rc : send_lane(attn, index);
}

static int is_back(struct afd_attn *attn, uint32_t index)
{
	if (attn->step.lanes[index].state != AFD__LANE_AT_FFN)
		return afd__attn_group_done(attn, index);
	return attn->ffn ? afd__attn_local_done(attn, index) : afd__attn_remote_done(attn, index);
}

/* What the lane waited for may have come. */
static int look_at_lane(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc;

	if (lane->state == AFD__LANE_ROUTING)
		return send_lane(attn, index);
	rc = is_back(attn, index);
	if (rc <= 0)
		return rc;
	end_wait(attn, index);
	switch (lane->state) {
	case AFD__LANE_REDUCING:
		begin_attention(attn, lane);
		rc = afd__attn_run_piece(attn, AFD__PIECE_FFN_SIDE, lane);
		return rc < 0 ? rc : go_to_ffn(attn, index);
	case AFD__LANE_AT_FFN:
		return leave_ffn(attn, index);
	default:
		return_lane(attn, index);
		return 0;
	}
}

static int look_at_lanes(struct afd_attn *attn)
{
	uint32_t i;
	int rc = look_at_attention(attn);

	if (rc >= 0 && attn->net) {
		rc = afd__exchange_progress(attn->net);
		attn->step.moved |= rc > 0;
	}
	for (i = 0; rc >= 0 && i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (is_under_way(lane) && lane->computed_ns)
			rc = look_at_lane(attn, i);
	}
	return rc < 0 ? rc : 0;
}

/* The lane that is behind goes first; -1 when none can go. */
static int32_t next_lane(const struct afd_attn *attn)
{
	int32_t best = -1;
	uint32_t i;

	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		/* Its rows would stand behind the attention of the other on the queue. */
		if (lane->state == AFD__LANE_ROUTING)
			return -1;
		if (lane->state == AFD__LANE_READY &&
			(best < 0 || lane->layer < attn->step.lanes[best].layer))
			best = (int32_t)i;
	}
	return best;
}

static int run_lane(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc;

	begin_attention(attn, lane);
	afd__range_push(&attn->queue, "afd attention");
	rc = afd__attn_run_piece(attn, AFD__PIECE_ATTENTION, lane);
	afd__range_pop(&attn->queue);
	if (rc < 0 || !afd__attn_in_group(attn))
		return rc < 0 ? rc : go_to_ffn(attn, index);
	rc = end_attention(attn, lane, AFD__LANE_REDUCING);
	return rc ? rc : afd__attn_group_reduce(attn, index);
}

/* ---- waiting ---- */

bool afd__attn_waits_for_device(const struct afd_attn *attn)
{
	uint32_t i;

	if (attn->step.state == AFD__STEP_HEAD || attn->step.state == AFD__STEP_WHOLE)
		return true;
	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (is_under_way(lane) && (!lane->computed_ns || lane->moving ||
						  (attn->ffn && lane->state == AFD__LANE_AT_FFN)))
			return true;
	}
	return false;
}

static int look_at_time(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	uint64_t now = afd__now_ns();

	if (step->moved || !afd__attn_waits_for_device(attn)) {
		step->moved_ns = now;
		if (!step->moved && !step->wait_ns)
			step->wait_ns = now;
		return 0;
	}
	if (now - step->moved_ns < DEVICE_TIMEOUT_MS * 1000000ull)
		return 0;
	return afd__error(-ETIMEDOUT,
		"attn: step %llu waited for device %s, which did nothing for %d ms",
		(unsigned long long)step->number, attn->device->name, DEVICE_TIMEOUT_MS);
}

/* ---- the states ---- */

static int poll_joining(struct afd_attn *attn)
{
	struct afd_step_params params = { .size = sizeof(params) };
	uint32_t i;
	int rc;

	if (!attn->batch.n_rows)
		return 1;
	if (attn->net) {
		rc = afd_transport_poll(attn->net);
		if (rc <= 0)
			return rc;
		for (i = 0; i < attn->n_lanes; i++)
			params.n_rows[i] = attn->step.lanes[i].n_rows;
		memcpy(params.trace_id, attn->step.trace_id, sizeof(params.trace_id));
		rc = afd__exchange_begin(attn->net, &params);
		if (rc < 0)
			return rc;
		attn->step.opened = 1;
	}
	attn->step.moved = 1;
	if (attn->whole)
		return afd__attn_whole_begin(attn);
	attn->step.state = AFD__STEP_LAYERS;
	rc = afd__attn_enqueue_inputs(attn);
	rc = rc ? rc : afd__attn_run_piece(attn, AFD__PIECE_EMBEDDING, NULL);
	return rc < 0 ? rc : 0;
}

static int poll_layers(struct afd_attn *attn)
{
	int32_t next;
	uint32_t i;
	int rc = look_at_lanes(attn);

	if (rc < 0)
		return rc;
	next = next_lane(attn);
	if (next >= 0) {
		attn->step.moved = 1;
		return run_lane(attn, (uint32_t)next);
	}
	for (i = 0; i < attn->n_lanes; i++) {
		if (attn->step.lanes[i].state != AFD__LANE_IDLE)
			return 0;
	}
	attn->step.state = AFD__STEP_HEAD;
	attn->step.moved = 1;
	return 0;
}

/* A chunk of outputs; the only one is recorded. */
static int enqueue_head(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	int rc;

	if (step->head_rows == attn->batch.n_outputs)
		rc = afd__attn_run_piece(attn, AFD__PIECE_HEAD, NULL);
	else
		rc = afd__attn_enqueue_head(attn, step->head_row, step->head_rows);
	rc = rc < 0 ? rc : afd__attn_enqueue_outputs(attn, step->head_row, step->head_rows);
	return rc ? rc : afd__queue_ticket(&attn->queue, &step->head_ticket);
}

static int poll_head(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	uint32_t n_outputs = attn->batch.n_outputs;
	int rc;

	if (step->head_rows) {
		uint64_t now;

		rc = afd__queue_reached(&attn->queue, step->head_ticket);
		if (rc <= 0)
			return rc;
		now = afd__now_ns();
		attn->attention_ns += now - step->head_ns;
		report(attn, "head", step->head_ns, now, -1, false);
		step->head_row += step->head_rows;
		step->head_rows = 0;
		step->moved = 1;
	}
	if (step->head_row == n_outputs)
		return 1;
	step->head_rows = n_outputs - step->head_row < AFD__HEAD_ROWS ? n_outputs - step->head_row
								      : AFD__HEAD_ROWS;
	step->head_ns = afd__now_ns();
	step->moved = 1;
	return enqueue_head(attn);
}

static int poll_step(struct afd_attn *attn)
{
	int rc;

	attn->step.moved = 0;
	switch (attn->step.state) {
	case AFD__STEP_JOINING:
		rc = poll_joining(attn);
		return rc;
	case AFD__STEP_LAYERS:
		rc = poll_layers(attn);
		break;
	case AFD__STEP_WHOLE:
		rc = afd__attn_whole_poll(attn);
		break;
	default:
		rc = poll_head(attn);
	}
	return rc ? rc : look_at_time(attn);
}

/* A signal may come after the operation that it tells of was seen to be done: without a look here,
 * nobody would ever take it and the host's loop would not sleep again. Tickets are looked at behind
 * it. */
static int take_signal(struct afd_attn *attn)
{
	int rc = attn->queue.fd < 0 ? 0 : afd__queue_reached(&attn->queue, 0);

	return rc < 0 ? rc : 0;
}

static int poll_idle(struct afd_attn *attn)
{
	return attn->net ? afd_transport_poll(attn->net) : 1;
}

int afd_attn_poll(afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (rc)
		return rc;
	rc = take_signal(attn);
	if (attn->step.state == AFD__STEP_NONE)
		return rc ? rc : poll_idle(attn);
	rc = rc ? rc : poll_step(attn);
	if (rc > 0)
		rc = succeed(attn);
	return rc < 0 ? fail(attn, rc) : rc;
}
