/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A survey on the side that connects (survey.h tells what it is for). It goes by the link's own
 * wire and the steps of connect.c, but says PROBE where a peer would say HELLO, and after READY
 * sends slots that have to come back as they went.
 *
 * The first trial is the address that was given. Of an auto: address it is its tcp: place, which
 * tells what else there is. Invariant: whatever fails, tcp: is left, and says why by itself.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "net.h"

/* SIZE_MS: about as long as a size is measured. */
enum { TRIAL_MS = 3000, SIZE_MS = 400, BUSY_MS = 1000, COMPLETIONS = 4 };

static const uint64_t MS = 1000000;

int afd__survey_create(struct afd__link *link)
{
	link->survey = afd__alloc(link->net->ctx, 1, sizeof(*link->survey));
	return link->survey ? 0 : -ENOMEM;
}

static bool is_auto(const struct afd__link *link)
{
	return link->address->ops == &afd__transport_auto;
}

/* ---- one trial after the other ---- */

/* The link's next connection is one by the trial that it is at. */
static void go_by_trial(struct afd__link *link, bool probing)
{
	struct afd__survey *s = link->survey;

	link->via = &s->trials[s->at].address;
	link->wire.ops = link->via->ops;
	link->wire.error = 0;
	link->probing = probing;
	link->phase = AFD__LINK_IDLE;
	link->retry_ns = 0;
}

static void start_trial(struct afd__link *link)
{
	struct afd__survey *s = link->survey;

	s->until_ns = afd__now_ns() + TRIAL_MS * MS;
	s->round = s->n_us = s->n_rounds = 0;
	s->out = s->large = false;
	go_by_trial(link, true);
}

void afd__survey_begin(struct afd__link *link)
{
	struct afd__survey *s = link->survey;
	struct afd__trial *first = &s->trials[0];

	memset(s->trials, 0, sizeof(s->trials));
	s->n_trials = 1;
	s->at = 0;
	s->busy_ns = 0;
	s->runs = true;
	first->address = *link->address;
	/* The copy's own text. */
	first->address.name = first->address.text + (link->address->name - link->address->text);
	if (is_auto(link)) {
		first->address.ops = &afd__transport_tcp;
		snprintf(first->address.text, sizeof(first->address.text), "tcp:%.*s",
			(int)strcspn(link->address->name, "?"), link->address->name);
		first->address.name = first->address.text + strlen("tcp:");
	}
	start_trial(link);
}

void afd__survey_forget(struct afd__link *link)
{
	link->via = link->address;
	link->probing = false;
	if (link->survey)
		link->survey->runs = false;
}

/* A better place that the other side has told. What this machine cannot carry is not tried. */
static void add_trial(struct afd__link *link, const char *text)
{
	struct afd__survey *s = link->survey;
	struct afd__trial *t = &s->trials[s->n_trials++];

	t->error = afd__address_parse(&t->address, link->net->ctx, text, false);
	if (!t->error)
		return;
	t->tried = true;
	afd__error_save(t->text, sizeof(t->text));
	snprintf(t->address.text, sizeof(t->address.text), "%s", text);
}

static void take_places(struct afd__link *link)
{
	const struct afd__hello *said = link->said;
	char text[sizeof(link->address->text)];

	if (said->shm_name[0]) {
		snprintf(text, sizeof(text), "shm:%s", said->shm_name);
		add_trial(link, text);
	}
	/* Rows that leave the host are encrypted, or go by tcp:. */
	if (said->verbs_port && !link->net->params.tls &&
		afd__auto_write_verbs(text, sizeof(text), link->address->name, said->verbs_port) <
			(int)sizeof(text))
		add_trial(link, text);
}

static void tell_choice(const struct afd__link *link)
{
	const struct afd__survey *s = link->survey;

	for (uint32_t i = 0; i < s->n_trials; i++) {
		if (i != s->at && s->trials[i].error)
			afd__log(link->net->ctx, AFD_LOG_INFO, "%s: %s is not used: %s",
				link->address->text, s->trials[i].address.text, s->trials[i].text);
	}
	afd__log(link->net->ctx, AFD_LOG_INFO, "%s: %s is used", link->address->text,
		link->via->text);
}

static void finish(struct afd__link *link)
{
	struct afd__survey *s = link->survey;

	/* Those that were told after the first are better, and stand in order. */
	for (s->at = 1; s->at < s->n_trials && s->trials[s->at].error; s->at++)
		;
	s->at = s->at < s->n_trials ? s->at : 0;
	s->runs = false;
	go_by_trial(link, false);
	s->done = s->measures;
	if (!s->measures)
		tell_choice(link);
}

static bool is_over(const struct afd__survey *s)
{
	return s->at == s->n_trials || (!s->measures && s->at > 1 && !s->trials[s->at - 1].error);
}

/* Once more in a while; who only wants to connect does not wait for long. */
static bool wait_for_place(struct afd__link *link)
{
	struct afd__survey *s = link->survey;
	uint64_t now = afd__now_ns();

	if (!s->busy_ns)
		s->busy_ns = now;
	if (!s->measures && now - s->busy_ns > BUSY_MS * MS)
		return false;
	start_trial(link);
	link->retry_ns = now + AFD__RETRY_MS * MS;
	return true;
}

bool afd__survey_end_trial(struct afd__link *link, int rc)
{
	struct afd__survey *s = link->survey;
	struct afd__trial *t = &s->trials[s->at];
	bool asked = link->phase > AFD__LINK_HELLO;

	t->error = rc;
	t->tried = true;
	if (rc)
		afd__error_save(t->text, sizeof(t->text));
	afd__link_close_wire(link);
	if (rc == -EBUSY && wait_for_place(link))
		return true;
	if (!s->at && !asked && !s->measures && (rc == -ECONNREFUSED || rc == -ECONNRESET)) {
		afd__survey_forget(link);
		return false;
	}
	do
		s->at++;
	while (!is_over(s) && s->trials[s->at].tried);
	if (is_over(s))
		finish(link);
	else
		start_trial(link);
	return true;
}

/* ---- the steps of one ---- */

/* The first trial of an auto: link only asks: if it is chosen, the handshake itself proves it. */
int afd__survey_ask(struct afd__link *link)
{
	const struct afd__survey *s = link->survey;
	struct afd__hello probe = { .kind = AFD__PROBE, .wire_version = AFD__WIRE_VERSION };
	int rc;

	if (s->measures || s->at)
		probe.probe_bytes = AFD__PROBE_BYTES_MAX;
	snprintf(probe.version, sizeof(probe.version), "%s", afd_version());
	link->probe_bytes = probe.probe_bytes;
	rc = afd__shake_say(link, &probe, AFD__LINK_HELLO);
	return rc ? rc : 1;
}

/* No place for one more probe is no verdict. */
static int refused(const struct afd__link *link)
{
	int rc = afd__connect_refused(link);

	return strcmp(link->said->field, "probes") ? rc : -EBUSY;
}

int afd__survey_judge(struct afd__link *link)
{
	const struct afd__hello *said = link->said;

	if (said->kind == AFD__REFUSAL && said->wire_version == AFD__WIRE_VERSION)
		return refused(link);
	if (said->kind != AFD__OFFER || said->wire_version != AFD__WIRE_VERSION)
		return afd__error(-EPROTO, "message %u of wire version %u came, not an offer",
			said->kind, said->wire_version);
	if (said->probe_bytes > link->probe_bytes || said->probe_bytes % 64 ||
		!said->probe_bytes != !link->probe_bytes)
		return afd__error(-EPROTO, "an offer of %u bytes came, asked were %u",
			said->probe_bytes, link->probe_bytes);
	if (link->probe_bytes &&
		said->probe_slots < 2u + AFD__SMALL_ROUNDS + AFD__LARGE_ROUNDS)
		return afd__error(-EPROTO, "an offer of %u slots came, needed are %d",
			said->probe_slots, 2 + AFD__SMALL_ROUNDS + AFD__LARGE_ROUNDS);
	link->probe_bytes = said->probe_bytes;
	if (!link->survey->at && is_auto(link))
		take_places(link);
	return 0;
}

int afd__survey_take_offer(struct afd__link *link)
{
	int rc = afd__shake_receive_message(link);

	if (rc != 1)
		return rc;
	rc = afd__survey_judge(link);
	if (rc)
		return rc;
	link->phase = AFD__LINK_BINDING;
	return link->probe_bytes || afd__survey_end_trial(link, 0);
}

/* ---- slots there and back ---- */

static uint32_t pattern_of(const struct afd__survey *s, uint32_t i)
{
	return (i + 1) * 2654435761u ^ (s->round + 1) * 40503u ^ (uint32_t)s->until_ns;
}

static void write_pattern(const struct afd__survey *s, uint32_t *words, uint32_t bytes)
{
	for (uint32_t i = 0; i < bytes / 4; i++)
		words[i] = pattern_of(s, i);
}

static int check_pattern(const struct afd__survey *s, const uint32_t *words, uint32_t bytes)
{
	uint32_t wrong = 0;

	for (uint32_t i = 0; i < bytes / 4; i++)
		wrong |= words[i] ^ pattern_of(s, i);
	return wrong ? afd__error(-EBADMSG, "%u bytes did not come back as they went", bytes) : 0;
}

static uint32_t bytes_of(const struct afd__link *link)
{
	return link->survey->large ? link->probe_bytes : AFD__SMALL_BYTES;
}

static int send_round(struct afd__link *link)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	struct afd__survey *s = link->survey;
	uint32_t slot = s->large, bytes = bytes_of(link);
	int rc;

	write_pattern(s, ops->send_slot(&link->wire, slot), bytes);
	s->sent_ns = afd__now_ns();
	if (!s->n_rounds)
		s->began_ns = s->sent_ns;
	rc = ops->post_send(&link->wire, slot, bytes);
	if (rc)
		return rc == -EAGAIN ? 0 : rc;
	s->out = true;
	return 1;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return x < y ? -1 : x > y;
}

static double median(struct afd__survey *s)
{
	qsort(s->us, s->n_us, sizeof(s->us[0]), compare);
	return s->n_us ? s->us[s->n_us / 2] : 0;
}

/* The first round of a size is for the caches, unless the line is so slow that it does not matter. */
static void keep_time(struct afd__survey *s, uint64_t now)
{
	if (s->n_us < AFD__SMALL_ROUNDS && (s->n_rounds || now - s->sent_ns > SIZE_MS * MS))
		s->us[s->n_us++] = (double)(now - s->sent_ns) * 1e-3;
	s->n_rounds++;
}

/* One of a size proves it. To be measured there are more, as far as there is time. */
static bool is_enough(const struct afd__survey *s, uint64_t now)
{
	uint32_t most = 1 + (s->large ? AFD__LARGE_ROUNDS : AFD__SMALL_ROUNDS);

	return !s->measures || s->n_rounds == most ||
	       (s->n_us && now - s->began_ns > SIZE_MS * MS);
}

/* True when the trial is over. */
static bool end_size(struct afd__link *link, uint64_t now)
{
	struct afd__survey *s = link->survey;
	struct afd__trial *t = &s->trials[s->at];

	if (!is_enough(s, now))
		return false;
	if (!s->large)
		t->round_trip_us = median(s);
	else if (s->n_us)
		t->bytes_per_second = 2e6 * link->probe_bytes / median(s);
	s->n_us = s->n_rounds = 0;
	s->large = !s->large;
	return !s->large;
}

static int take_round(struct afd__link *link, const struct afd__completion *done)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	struct afd__survey *s = link->survey;
	uint32_t slot = s->large, bytes = bytes_of(link);
	int rc;

	if (!s->out || done->slot != slot || done->bytes != bytes)
		return afd__error(-EPROTO, "%u bytes came back in slot %u, not %u in slot %u",
			done->bytes, done->slot, bytes, slot);
	keep_time(s, afd__now_ns());
	rc = check_pattern(s, ops->receive_slot(&link->wire, slot), bytes);
	if (!rc)
		rc = ops->post_receive(&link->wire, slot);
	s->out = false;
	s->round++;
	return rc;
}

int afd__survey_exchange(struct afd__link *link)
{
	struct afd__completion done[COMPLETIONS];
	struct afd__survey *s = link->survey;
	bool was_out = s->out;
	int n, rc = s->out ? 0 : send_round(link);

	if (rc)
		return rc;
	/* Also when nothing could be sent: the slot's return may be what comes. */
	n = link->wire.ops->poll(&link->wire, done, COMPLETIONS);
	for (int i = 0; i < n && !rc; i++) {
		if (done[i].kind == AFD__RECEIVED)
			rc = take_round(link, &done[i]);
	}
	if (!rc && n <= 0)
		return n < 0 ? n : link->gone ? afd__error(-ECONNRESET, "%s is gone", link->who) : 0;
	if (!rc && was_out && !s->out && end_size(link, afd__now_ns()))
		return afd__survey_end_trial(link, 0);
	return rc ? rc : 1;
}
