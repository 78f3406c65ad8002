/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How a host waits for a step: in its own event loop, by a descriptor and a timeout, or here.
 * Nothing here moves a step but by afd_attn_poll, so both ways do the same.
 */
#include <poll.h>

#include "attn.h"

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
		if (attn->queue.fd < 0 && afd__attn_waits_for_device(attn))
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
	static const char *const peers[] = {
		[AFD__LANE_REDUCING] = "the attention group at",
		[AFD__LANE_AT_FFN] = "the FFN of",
		[AFD__LANE_GATHERING] = "the attention group at",
	};
	uint32_t i;

	for (i = 0; i < attn->n_lanes; i++) {
		const struct afd__lane *lane = &attn->step.lanes[i];

		if (attn->step.state == AFD__STEP_LAYERS && peers[lane->state])
			return afd__error(-ETIMEDOUT,
				"attn: step %llu not done in %d ms, lane %u waits for %s layer %u",
				(unsigned long long)attn->step.number, timeout_ms, i,
				peers[lane->state], lane->layer);
	}
	if (attn->step.state == AFD__STEP_NONE || attn->step.state == AFD__STEP_JOINING)
		return afd__error(
			-ETIMEDOUT, "attn: the peers have not joined in %d ms", timeout_ms);
	return afd__error(-ETIMEDOUT, "attn: step %llu not done in %d ms, it waits for device %s",
		(unsigned long long)attn->step.number, timeout_ms, attn->device->name);
}

static int wait_until_done(afd_attn *attn, int32_t timeout_ms)
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

int afd_attn_wait(afd_attn *attn, int32_t timeout_ms)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (rc)
		return rc;
	if (attn->net)
		afd__transport_wait_inside(attn->net, true);
	rc = wait_until_done(attn, timeout_ms);
	if (attn->net)
		afd__transport_wait_inside(attn->net, false);
	return rc;
}

int afd_attn_step(afd_attn *attn, const struct afd_batch *batch, int32_t timeout_ms)
{
	char text[512];
	int rc = afd_attn_begin(attn, batch);

	rc = rc ? rc : afd_attn_wait(attn, timeout_ms);
	if (rc < 0 && attn && afd_attn_busy(attn) > 0) {
		afd__error_save(text, sizeof(text));
		afd__attn_step_abandon(attn, text);
		return afd__error(rc, "%s", text);
	}
	return rc;
}
