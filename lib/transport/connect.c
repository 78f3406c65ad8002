/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handshake of the side that connects (handshake.c tells the whole): hello, welcome, ready. A
 * server that is not up, or goes away before we have joined, is tried again; so is an FFN peer that
 * was lost, once nothing of its old link is in use, for as long as the transport lives.
 */
#include <string.h>

#include "net.h"

static const uint64_t MS = 1000000;

static int say_hello(struct afd__link *link)
{
	struct afd__hello hello;
	int rc;

	if (afd__survey_runs(link))
		return afd__survey_ask(link);
	afd__hello_state_ours(link, &hello, AFD__HELLO);
	rc = afd__shake_say(link, &hello, AFD__LINK_HELLO);
	return rc ? rc : 1;
}

static int connect_link(struct afd__link *link, uint64_t now)
{
	int rc;

	if (link->phase == AFD__LINK_IDLE && now < link->retry_ns)
		return 0;
	if (link->phase == AFD__LINK_IDLE)
		link->since_ns = now;
	rc = link->wire.ops->connect(&link->wire, link->via->name);
	link->open = rc >= 0;
	if (rc == 0)
		link->phase = AFD__LINK_CONNECTING;
	if (rc != 1)
		return rc;
	if (!link->net->secret)
		return say_hello(link);
	link->phase = AFD__LINK_NONCE;
	rc = afd__prove_begin(link);
	return rc ? rc : 1;
}

static int take_nonce(struct afd__link *link)
{
	int rc = afd__shake_receive_nonce(link);

	if (rc != 1)
		return rc;
	if (!link->sealed)
		return afd__error(-EACCES, "%s proves no key; ours is required", link->who);
	return say_hello(link);
}

int afd__connect_refused(const struct afd__link *link)
{
	const struct afd__hello *said = link->said;

	return afd__error(strcmp(said->field, "key") ? -EPROTO : -EACCES,
		"refused by %s: %s is %s there, %s here%s%s", link->who, said->field,
		said->refuser_value, said->refused_value, said->text[0] ? ": " : "", said->text);
}

static int take_welcome(struct afd__link *link)
{
	const struct afd__hello *said = link->said;
	struct afd__hello refusal;
	int rc = afd__shake_receive_message(link);

	if (rc != 1)
		return rc;
	if (said->kind == AFD__REFUSAL && said->wire_version == AFD__WIRE_VERSION)
		return afd__connect_refused(link);
	if (afd__welcome_judge(link, said, &refusal)) {
		rc = afd__error(-EPROTO, "%s disagrees: %s is %s there, %s here", link->who,
			refusal.field, refusal.refused_value, refusal.refuser_value);
	} else {
		afd__shake_keep_said(link);
		rc = link->kind == AFD__LINK_TO_FFN ? afd__shards_place(link, &refusal) : 0;
	}
	if (rc) {
		char text[sizeof(link->error_text)];

		afd__error_save(text, sizeof(text));
		if (!afd__shake_say(link, &refusal, AFD__LINK_REFUSING))
			afd__shake_send_message(link);
		return afd__error(rc, "%s", text);
	}
	link->phase = AFD__LINK_BINDING;
	return 1;
}

static int advance_connecting(struct afd__link *link, uint64_t now)
{
	struct afd__hello ready = { .kind = AFD__READY, .wire_version = AFD__WIRE_VERSION };
	int rc;

	switch (link->phase) {
	case AFD__LINK_IDLE:
	case AFD__LINK_CONNECTING:
		return connect_link(link, now);
	case AFD__LINK_NONCE:
		rc = afd__shake_send_message(link);
		if (rc == 1)
			link->phase = AFD__LINK_ANSWER;
		return rc;
	case AFD__LINK_ANSWER:
		return take_nonce(link);
	case AFD__LINK_HELLO:
		rc = afd__shake_send_message(link);
		if (rc == 1)
			link->phase = AFD__LINK_WELCOME;
		return rc;
	case AFD__LINK_WELCOME:
		return afd__survey_runs(link) ? afd__survey_take_offer(link) : take_welcome(link);
	case AFD__LINK_BINDING:
		rc = afd__shake_bind_slots(link, 0);
		if (rc == 1 && afd__shake_say(link, &ready, AFD__LINK_READY))
			rc = -EIO;
		return rc;
	case AFD__LINK_READY:
		rc = afd__shake_send_message(link);
		if (rc == 1 && afd__survey_runs(link))
			afd__echo_begin(link);
		else if (rc == 1)
			afd__link_joined(link, now);
		return rc;
	case AFD__LINK_ECHOING:
		return afd__survey_exchange(link);
	default:
		return 0;
	}
}

/* A server that is not up, or that went away before we had joined, is tried again until the time is
 * over. */
static bool is_tried_again(int rc)
{
	return rc == -ECONNREFUSED || rc == -ECONNRESET;
}

static void go_idle(struct afd__link *link)
{
	afd__link_close_wire(link);
	afd__survey_forget(link);
	link->placed = false;
	link->wire.error = 0;
	link->phase = AFD__LINK_IDLE;
}

static void retry(struct afd__link *link, uint64_t now)
{
	afd__error_save(link->error_text, sizeof(link->error_text));
	go_idle(link);
	link->retry_ns = now + (link->net->complete ? AFD__RETURN_MS : AFD__RETRY_MS) * MS;
}

/* Before all were there, one that went away after it had joined; one that refused stays refused. */
bool afd__connect_returns(const struct afd__link *link)
{
	return link->kind == AFD__LINK_TO_FFN &&
	       (link->net->complete || (is_tried_again(link->error) && !link->net->error));
}

/* An FFN peer that is gone is looked for again, once nothing of the old link is in use. */
static bool revive(struct afd__link *link, uint64_t now)
{
	if (!afd__connect_returns(link) || now < link->retry_ns || !afd__frames_untouched(link))
		return false;
	go_idle(link);
	link->leaving = link->goodbye_said = link->open_due = link->close_due = false;
	link->error = 0;
	link->sequence_out = link->sequence_in = link->noticed_ns = 0;
	link->n_owed = 0;
	memset(link->out, 0, sizeof(link->out));
	memset(link->turn, 0, sizeof(link->turn));
	memset(&link->step_open, 0, sizeof(link->step_open));
	return true;
}

static int look_at_time(struct afd__link *link, uint64_t now)
{
	const afd_transport *net = link->net;

	if (!net->complete && now - net->created_ns > net->params.connect_timeout_ms * MS)
		return afd__error(-ETIMEDOUT, "no %s joined within %u ms%s%s",
			link->kind == AFD__LINK_TO_FFN ? "FFN peer" : link->who,
			net->params.connect_timeout_ms, link->error_text[0] ? ": " : "",
			link->error_text);
	if (net->complete && link->phase > AFD__LINK_IDLE &&
		now - link->since_ns > AFD__HANDSHAKE_MS * MS)
		return afd__error(
			-ECONNRESET, "the handshake was not done in %d ms", AFD__HANDSHAKE_MS);
	return 0;
}

/* Of a probe: it has seen what it was to see. */
static bool is_done(const struct afd__link *link)
{
	return link->survey && link->survey->done;
}

/* An auto: link begins with one each time; a probe does once. */
static void begin_survey(struct afd__link *link, uint64_t now)
{
	if (link->survey && link->phase == AFD__LINK_IDLE && now >= link->retry_ns &&
		link->via == link->address)
		afd__survey_begin(link);
}

/* 1 when it moved; a trial that fails leads to the next. */
static int advance(struct afd__link *link, uint64_t now)
{
	int rc = advance_connecting(link, now);

	if (!afd__survey_runs(link))
		return rc;
	if (!rc && now > link->survey->until_ns)
		rc = afd__error(-ETIMEDOUT, "%s: it was not proved in time", link->via->text);
	return rc < 0 && afd__survey_end_trial(link, rc) ? 1 : rc;
}

int afd__connect_move(struct afd__link *link, uint64_t now)
{
	int rc, moved = 0;

	if (!link->address || link->phase == AFD__LINK_JOINED || is_done(link))
		return 0;
	if (link->phase > AFD__LINK_JOINED && !revive(link, now))
		return 0;
	begin_survey(link, now);
	do {
		rc = advance(link, now);
		moved |= rc == 1;
	} while (rc == 1 && link->phase != AFD__LINK_JOINED && !is_done(link));
	if (link->phase == AFD__LINK_JOINED || is_done(link))
		return 1;
	if (!rc)
		rc = look_at_time(link, now);
	if (is_tried_again(rc)) {
		retry(link, now);
		rc = look_at_time(link, now);
	}
	if (rc < 0) {
		afd__link_fail(link, rc);
		moved = 1;
	}
	return moved;
}
