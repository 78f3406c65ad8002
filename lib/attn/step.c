/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step as a resumable object. Begin plans it; each poll moves it a little further and never waits: it looks at the lanes
 * that are at the FFN, then runs the attention of one lane that is not. So while one lane is at the FFN another computes, and
 * a host's loop gets its turn after each layer.
 *
 * Invariant: until the step has succeeded the sequences are as before it; every way out but success restores them.
 */
#include <assert.h>
#include <poll.h>
#include <string.h>

#include "attn.h"

/* A device that answers nothing for so long is lost. */
enum { DEVICE_TIMEOUT_MS = 60000 };

/* ---- begin ---- */

static void warn_of_position(struct afd_attn *attn)
{
	uint32_t limit = attn->arch->max_position_embeddings, last = attn->batch.last_position;

	if (!limit || attn->warned_position || !attn->batch.n_rows || last < limit)
		return;
	attn->warned_position = 1;
	afd__log(attn->ctx, AFD_LOG_WARN, "attn: position %u is computed, max_position_embeddings is %u", last, limit);
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
		return afd__error(-EBUSY, "attn: step %llu is under way", (unsigned long long)step->number);
	rc = afd__params_copy(&wanted, sizeof(wanted), batch, "batch");
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
	};
	step->moved_ns = step->start_ns;
	memcpy(step->trace_id, wanted.trace_id, sizeof(step->trace_id));
	begin_lanes(attn);
	warn_of_position(attn);
	return 0;
}

/* ---- the end ---- */

/* One of the few places that wait: the device may still write to slots, pages and the host's outputs. */
static void settle_device(struct afd_attn *attn)
{
	uint64_t ticket;

	if (afd__queue_ticket(&attn->queue, &ticket) == 0)
		afd__queue_wait(&attn->queue, ticket, DEVICE_TIMEOUT_MS, "the operations of a step that ends");
}

void afd__attn_step_abandon(struct afd_attn *attn)
{
	settle_device(attn);
	if (attn->step.opened)
		afd_transport_cancel(attn->net);
	afd__batch_restore(&attn->batch);
	attn->step.state = AFD__STEP_NONE;
}

/* The cause outlives what is done because of it. */
static int fail(struct afd_attn *attn, int rc)
{
	char text[512];

	afd__error_save(text, sizeof(text));
	afd__attn_step_abandon(attn);
	return afd__error(rc, "%s", text);
}

static int succeed(struct afd_attn *attn)
{
	int rc = afd__attn_check_outputs(attn);

	if (rc)
		return rc;
	if (attn->step.greedy_ids && attn->batch.n_outputs)
		memcpy(attn->step.greedy_ids, attn->greedy, attn->batch.n_outputs * sizeof(*attn->greedy));
	afd__batch_commit(&attn->batch);
	afd__attn_count_step(attn);
	attn->step.state = AFD__STEP_NONE;
	return 1;
}

int afd_attn_cancel(afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (!rc && attn->step.state != AFD__STEP_NONE)
		afd__attn_step_abandon(attn);
	return rc;
}

/* ---- spans ---- */

static void report(const struct afd_attn *attn, const char *name, uint64_t start_ns, uint64_t end_ns, int32_t lane)
{
	const struct afd__lane *l = lane < 0 ? NULL : &attn->step.lanes[lane];
	const struct afd_span span = {
		.name = name,
		.start_ns = start_ns,
		.duration_ns = end_ns - start_ns,
		.step = attn->step.number,
		.layer = l ? (int32_t)l->layer : -1,
		.lane = lane,
		.n_rows = l ? l->n_rows : attn->step.head_rows,
	};

	afd__span(attn->ctx, &span);
}

/* ---- lanes ---- */

static int look_at_attention(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc;

	if (lane->computed_ns)
		return 1;
	rc = afd__queue_reached(&attn->queue, lane->attention_ticket);
	if (rc <= 0)
		return rc;
	lane->computed_ns = afd__now_ns();
	attn->attention_ns += lane->computed_ns - lane->start_ns;
	report(attn, "attention", lane->start_ns, lane->computed_ns, (int32_t)index);
	return 1;
}

/* Rows of the next layer may begin; the last layer's y stays for the head. */
static void return_lane(struct afd_attn *attn, uint32_t index)
{
	struct afd__step *step = &attn->step;
	struct afd__lane *lane = &step->lanes[index];
	uint64_t now = afd__now_ns();

	report(attn, "ffn", lane->computed_ns, now, (int32_t)index);
	if (attn->ffn)
		attn->ffn_ns += now - lane->computed_ns;
	if (step->wait_ns) {
		report(attn, "wait", step->wait_ns, now, (int32_t)index);
		attn->wait_ns += now - step->wait_ns;
		step->wait_ns = 0;
	}
	lane->layer++;
	lane->state = lane->layer < attn->arch->n_layers ? AFD__LANE_READY : AFD__LANE_IDLE;
	step->moved = 1;
}

static int look_at_lanes(struct afd_attn *attn)
{
	uint32_t i;
	int rc = 0;

	if (attn->net) {
		rc = afd__exchange_progress(attn->net);
		if (rc < 0)
			return rc;
		attn->step.moved |= rc;
	}
	for (i = 0; i < attn->n_lanes; i++) {
		if (attn->step.lanes[i].state != AFD__LANE_AT_FFN)
			continue;
		rc = look_at_attention(attn, i);
		if (rc > 0)
			rc = attn->net ? afd__attn_remote_done(attn, i) : afd__attn_local_done(attn, i);
		if (rc < 0)
			return rc;
		if (rc)
			return_lane(attn, i);
	}
	return 0;
}

/* The lane that is behind goes first; -1 when none can go. */
static int32_t next_lane(const struct afd_attn *attn)
{
	int32_t best = -1;
	uint32_t i;

	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (lane->state == AFD__LANE_READY && (best < 0 || lane->layer < attn->step.lanes[best].layer))
			best = (int32_t)i;
	}
	return best;
}

static int run_lane(struct afd_attn *attn, uint32_t index)
{
	struct afd__lane *lane = &attn->step.lanes[index];
	int rc;

	lane->start_ns = afd__now_ns();
	lane->computed_ns = 0;
	lane->moving = 0;
	rc = afd__attn_enqueue_layer(attn, lane);
	rc = rc ? rc : afd__queue_ticket(&attn->queue, &lane->attention_ticket);
	if (rc)
		return rc;
	lane->state = AFD__LANE_AT_FFN;
	/* On the cpu device it is done by now, and the FFN of this process would count as attention. */
	rc = look_at_attention(attn, index);
	if (rc < 0)
		return rc;
	rc = attn->net ? afd__attn_remote_send(attn, index) : afd__attn_local_send(attn, index);
	/* The rows leave before another lane computes. */
	if (!rc && attn->net)
		rc = afd__exchange_progress(attn->net);
	return rc < 0 ? rc : 0;
}

/* ---- waiting ---- */

/* The device owes us something. */
static bool waits_for_device(const struct afd_attn *attn)
{
	uint32_t i;

	if (attn->step.state == AFD__STEP_HEAD)
		return true;
	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (lane->state == AFD__LANE_AT_FFN && (attn->ffn || !lane->computed_ns || lane->moving))
			return true;
	}
	return false;
}

static int look_at_time(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	uint64_t now = afd__now_ns();

	if (step->moved || !waits_for_device(attn)) {
		step->moved_ns = now;
		if (!step->moved && !step->wait_ns)
			step->wait_ns = now;
		return 0;
	}
	if (now - step->moved_ns < DEVICE_TIMEOUT_MS * 1000000ull)
		return 0;
	return afd__error(-ETIMEDOUT, "attn: step %llu waited for device %s, which did nothing for %d ms",
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
	attn->step.state = AFD__STEP_LAYERS;
	attn->step.moved = 1;
	return afd__attn_enqueue_start(attn);
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
		report(attn, "head", step->head_ns, now, -1);
		step->head_row += step->head_rows;
		step->head_rows = 0;
		step->moved = 1;
	}
	if (step->head_row == n_outputs)
		return 1;
	step->head_rows = n_outputs - step->head_row < AFD__HEAD_ROWS ? n_outputs - step->head_row : AFD__HEAD_ROWS;
	step->head_ns = afd__now_ns();
	step->moved = 1;
	rc = afd__attn_enqueue_head(attn, step->head_row, step->head_rows);
	return rc ? rc : afd__queue_ticket(&attn->queue, &step->head_ticket);
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
	default:
		rc = poll_head(attn);
	}
	return rc ? rc : look_at_time(attn);
}

int afd_attn_poll(afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (rc)
		return rc;
	if (attn->step.state == AFD__STEP_NONE)
		return attn->net ? afd_transport_poll(attn->net) : 1;
	rc = poll_step(attn);
	if (rc > 0)
		rc = succeed(attn);
	return rc < 0 ? fail(attn, rc) : rc;
}

/* ---- for hosts that wait ---- */

int afd_attn_busy(const afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	return rc ? rc : attn->step.state != AFD__STEP_NONE;
}

int afd_attn_fd(const afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	return rc ? rc : attn->epoll_fd;
}

int32_t afd_attn_timeout_ms(const afd_attn *attn)
{
	const struct afd__step *step;

	if (afd__context_check(attn ? attn->ctx : NULL, "attn"))
		return -1;
	step = &attn->step;
	if (step->state != AFD__STEP_NONE) {
		if (step->moved || (step->state == AFD__STEP_JOINING && !attn->net))
			return 0;
		if (attn->queue.fd < 0 && waits_for_device(attn))
			return 0;
	}
	return attn->net ? afd_transport_timeout_ms(attn->net) : -1;
}

static int32_t sooner(int32_t a, int32_t b)
{
	if (a < 0 || b < 0)
		return a < 0 ? b : a;
	return a < b ? a : b;
}

static int sleep_until_something(struct afd_attn *attn, int32_t timeout_ms)
{
	struct pollfd fd = { .fd = attn->queue.fd, .events = POLLIN };

	if (attn->net)
		return afd__transport_sleep(attn->net, attn->queue.fd, timeout_ms);
	/* A device whose signal gets lost is looked at once a second. */
	poll(&fd, 1, sooner(timeout_ms, 1000));
	return 0;
}

static int tell_timeout(const struct afd_attn *attn, int32_t timeout_ms)
{
	uint32_t i;

	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (attn->step.state == AFD__STEP_LAYERS && lane->state == AFD__LANE_AT_FFN)
			return afd__error(-ETIMEDOUT, "attn: step %llu not done in %d ms, lane %u waits for the FFN of layer %u",
					  (unsigned long long)attn->step.number, timeout_ms, i, lane->layer);
	}
	if (attn->step.state == AFD__STEP_NONE || attn->step.state == AFD__STEP_JOINING)
		return afd__error(-ETIMEDOUT, "attn: the FFN peers have not joined in %d ms", timeout_ms);
	return afd__error(-ETIMEDOUT, "attn: step %llu not done in %d ms, it waits for device %s",
			  (unsigned long long)attn->step.number, timeout_ms, attn->device->name);
}

int afd_attn_wait(afd_attn *attn, int32_t timeout_ms)
{
	uint64_t end_ms = afd__now_ms() + (timeout_ms > 0 ? (uint64_t)timeout_ms : 0);
	int rc;

	for (;;) {
		int32_t sleep_ms, left_ms = -1;
		uint64_t now_ms;

		rc = afd_attn_poll(attn);
		if (rc)
			return rc < 0 ? rc : 0;
		now_ms = afd__now_ms();
		if (timeout_ms && now_ms >= end_ms)
			return tell_timeout(attn, timeout_ms > 0 ? timeout_ms : 0);
		if (timeout_ms)
			left_ms = (int32_t)(end_ms - now_ms);
		sleep_ms = sooner(afd_attn_timeout_ms(attn), left_ms);
		if (!sleep_ms)
			continue;
		rc = sleep_until_something(attn, sleep_ms);
		if (rc < 0)
			return rc;
	}
}

int afd_attn_step(afd_attn *attn, const struct afd_batch *batch, int32_t timeout_ms)
{
	char text[512];
	int rc = afd_attn_begin(attn, batch);

	rc = rc ? rc : afd_attn_wait(attn, timeout_ms);
	if (rc < 0 && attn && afd_attn_busy(attn) > 0) {
		afd__error_save(text, sizeof(text));
		afd__attn_step_abandon(attn);
		return afd__error(rc, "%s", text);
	}
	return rc;
}
