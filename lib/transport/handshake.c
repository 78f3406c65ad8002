/* SPDX-License-Identifier: Apache-2.0 */
/*
 * From a connection to a joined link. The attention side states what it is and wants (hello); the
 * FFN side answers with what it is and what the link will be (welcome), or with a refusal that
 * names the field and both values; both bind the slots; the attention side says that it has them
 * (ready). With a key a nonce of each goes first, and every message proves the key (prove.c). What
 * each side accepts stands in judge.c and shards.c. Ranks of an attention group meet in the same
 * way: the one that connects acts as the attention side here, the other as the FFN side.
 *
 * A stranger costs little: at most AFD__PENDING_MAX handshakes are under way, each for at most
 * AFD__HANDSHAKE_MS; when there are more, one that has said nothing goes (find_victim).
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "net.h"

enum { WARNINGS_PER_SECOND = 10, ACCEPT_AGAIN_MS = 100 };
/* What a flood may cost those who are served; the rest waits in the kernel. */
enum { ACCEPT_WINDOW_MS = 10, ACCEPTS_PER_WINDOW = 16 };

static const uint64_t MS = 1000000;

/* ---- words ---- */

/* At the end of a second in which more was refused than is logged. */
static void begin_second(afd_transport *net, uint64_t now)
{
	if (net->n_unwarned)
		afd__log(net->ctx, AFD_LOG_WARN, "%u more refusals were not logged",
			net->n_unwarned);
	net->warned_ns = now;
	net->n_warned = net->n_unwarned = 0;
}

__attribute__((format(printf, 2, 3))) static void warn(afd_transport *net, const char *format, ...)
{
	uint64_t now = afd__now_ns();
	char text[768];
	va_list args;

	afd__metric_count(net->refused_metric, 1);
	if (now - net->warned_ns > 1000 * MS)
		begin_second(net, now);
	if (net->n_warned == WARNINGS_PER_SECOND) {
		net->n_unwarned++;
		return;
	}
	net->n_warned++;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	afd__log(net->ctx, AFD_LOG_WARN, "%s", text);
}

/* With a key the message ends in a proof. */
int afd__shake_say(struct afd__link *link, const struct afd__hello *hello, enum afd__link_phase phase)
{
	link->message_bytes =
		afd__hello_encode(link->message, AFD__HELLO_MAX - AFD__SEAL_BYTES, hello);
	link->phase = phase;
	return afd__prove_seal(link);
}

/* 1: the message has gone. */
int afd__shake_send_message(struct afd__link *link)
{
	return link->wire.ops->hello_send(&link->wire, link->message, link->message_bytes);
}

/* 1: link->said is the peer's next message. A peer of another wire version has said only that. */
int afd__shake_receive_message(struct afd__link *link)
{
	uint8_t message[AFD__HELLO_MAX];
	size_t bytes;
	int rc = link->wire.ops->hello_receive(&link->wire, message, sizeof(message), &bytes);

	if (rc != 1)
		return rc;
	rc = afd__prove_check(link, message, bytes);
	if (!rc)
		rc = afd__hello_decode(link->said, message, bytes);
	return rc ? rc : 1;
}

/* With a key, before all else. 1: link->said is a nonce, and was taken; or it is another message,
 * of which only the prefix was looked at. */
int afd__shake_receive_nonce(struct afd__link *link)
{
	uint8_t message[AFD__HELLO_MAX];
	size_t bytes;
	int rc = link->wire.ops->hello_receive(&link->wire, message, sizeof(message), &bytes);

	if (rc != 1)
		return rc;
	rc = afd__hello_decode_prefix(link->said, message, bytes);
	if (!rc && link->said->kind == AFD__NONCE && link->said->wire_version == AFD__WIRE_VERSION)
		rc = afd__prove_nonce(link, message, bytes);
	return rc ? rc : 1;
}

void afd__shake_keep_said(struct afd__link *link)
{
	const struct afd__hello *said = link->said;

	memcpy(link->device, said->device, sizeof(link->device));
	memcpy(link->version, said->version, sizeof(link->version));
	memcpy(link->weights, said->weights, sizeof(link->weights));
	link->weights_epoch = said->weights_epoch;
	link->lanes = said->lanes;
	link->max_rows = said->max_rows;
	link->to_ffn_dtype = (int32_t)said->to_ffn_dtype;
	link->to_attention_dtype = (int32_t)said->to_attention_dtype;
	link->gate = (int32_t)said->gate;
}

int afd__shake_bind_slots(struct afd__link *link, int accepting)
{
	struct afd__wire_slots geometry;
	int rc;

	if (link->probing)
		afd__echo_geometry(link, &geometry);
	else
		afd__link_geometry(link, link->net->contract.hidden_size, &geometry);
	link->wire.proof = afd__prove_wire(link);
	link->wire.device = link->net->watch.device;
	rc = link->wire.ops->bind(&link->wire, &geometry, accepting);
	link->bound = rc == 1;
	afd__link_slots_added(link);
	return rc;
}

/* ---- the side that listens ---- */

static void drop_pending(struct afd__link *link)
{
	afd_transport *net = link->net;
	uint32_t i = 0;

	while (i < net->n_pending && net->pending[i] != link)
		i++;
	memmove(&net->pending[i], &net->pending[i + 1],
		(net->n_pending - i - 1) * sizeof(net->pending[0]));
	net->n_pending--;
}

void afd__shake_end_pending(struct afd__link *link)
{
	drop_pending(link);
	if (link->index != UINT32_MAX)
		link->net->links[link->index] = NULL;
	afd__link_destroy(link);
}

void afd__shake_refuse(struct afd__link *link, const struct afd__hello *refusal)
{
	warn(link->net, "peer %s%s%s refused: %s is %s there, %s here%s%s", link->name,
		link->wire.peer[0] ? " from " : "", link->wire.peer, refusal->field,
		refusal->refused_value, refusal->refuser_value, refusal->text[0] ? ": " : "",
		refusal->text);
	/* A proof that cannot be made leaves it a refusal all the same. */
	(void)afd__shake_say(link, refusal, AFD__LINK_REFUSING);
}

/* Before a proof, and without one of ours: only that there is a key can be told by it. */
static int refuse_key(struct afd__link *link, const char *theirs)
{
	struct afd__hello refusal;

	link->sealed = false;
	afd__hello_refuse(&refusal, "key", "required", "%s", theirs);
	afd__shake_refuse(link, &refusal);
	return 1;
}

static int answer_nonce(struct afd__link *link)
{
	int rc = afd__shake_receive_nonce(link);
	struct afd__hello refusal;

	if (rc != 1)
		return rc;
	if (link->said->wire_version != AFD__WIRE_VERSION) {
		afd__hello_judge(link, link->said, &refusal);
		afd__shake_refuse(link, &refusal);
		return 1;
	}
	if (link->said->kind != AFD__NONCE)
		return refuse_key(link, "none");
	link->phase = AFD__LINK_ANSWER;
	return 1;
}

/* A place among the joined; 0 when all are taken. */
static int reserve_index(struct afd__link *link)
{
	afd_transport *net = link->net;
	uint32_t index;

	if (link->kind == AFD__LINK_IN_GROUP) {
		index = afd__group_link_index(net, link->said->group_index);
		if (net->links[index])
			return 0;
		net->links[index] = link;
		link->index = index;
		link->rank = link->said->group_index;
		snprintf(link->who, sizeof(link->who), "rank %u of the group", link->rank);
		return 1;
	}
	for (uint32_t i = 0; i < net->max_links; i++) {
		if (net->links[i])
			continue;
		net->links[i] = link;
		link->index = i;
		if (net->n_used_links <= i)
			net->n_used_links = i + 1;
		return 1;
	}
	return 0;
}

static void refuse_place(struct afd__link *link, struct afd__hello *reply)
{
	afd_transport *net = link->net;

	if (link->kind == AFD__LINK_IN_GROUP) {
		afd__hello_refuse(reply, "group_index", "taken", "%u", link->said->group_index);
	} else {
		afd__hello_refuse(
			reply, net->draining ? "state" : "max_peers", "", "%s", "one more");
		snprintf(reply->refuser_value, sizeof(reply->refuser_value),
			net->draining ? "draining" : "%u", net->max_links);
	}
	afd__shake_refuse(link, reply);
}

static int answer_hello(struct afd__link *link)
{
	afd_transport *net = link->net;
	struct afd__hello reply;
	int rc = afd__shake_receive_message(link);

	if (rc == -EACCES)
		return refuse_key(link, "another");
	if (rc != 1)
		return rc;
	if (link->said->kind == AFD__PROBE && link->said->wire_version == AFD__WIRE_VERSION)
		return afd__echo_answer(link);
	if (afd__hello_judge(link, link->said, &reply)) {
		afd__shake_refuse(link, &reply);
		return 1;
	}
	if (net->draining || !reserve_index(link)) {
		refuse_place(link, &reply);
		return 1;
	}
	afd__hello_state_ours(link, &reply, AFD__WELCOME);
	reply.lanes = link->said->lanes;
	reply.to_ffn_dtype = link->said->to_ffn_dtype;
	reply.to_attention_dtype = link->said->to_attention_dtype;
	reply.gate = link->said->gate;
	if (reply.max_rows > link->said->max_rows)
		reply.max_rows = link->said->max_rows;
	link->said->max_rows = reply.max_rows;
	afd__shake_keep_said(link);
	rc = afd__shake_say(link, &reply, AFD__LINK_WELCOME);
	return rc ? rc : 1;
}

static int refused(const struct afd__link *link)
{
	const struct afd__hello *said = link->said;

	return afd__error(-EPROTO, "%s refuses: %s is %s there, %s here%s%s", link->who, said->field,
		said->refuser_value, said->refused_value, said->text[0] ? ": " : "", said->text);
}

/* A peer that does not like our welcome says so and hangs up, perhaps before we have bound. */
static int bind_accepted(struct afd__link *link)
{
	int rc = afd__shake_bind_slots(link, 1);

	if (rc != -ECONNRESET)
		return rc;
	if (afd__shake_receive_message(link) == 1 && link->said->kind == AFD__REFUSAL)
		return refused(link);
	return afd__error(-ECONNRESET, "%s is gone", link->who);
}

static int take_ready(struct afd__link *link, uint64_t now)
{
	int rc = afd__shake_receive_message(link);

	if (rc != 1)
		return rc;
	if (link->said->kind == AFD__REFUSAL)
		return refused(link);
	if (link->said->kind != AFD__READY)
		return afd__error(-EPROTO, "handshake: message kind is %u, must be %d",
			link->said->kind, AFD__READY);
	if (link->probing) {
		afd__echo_begin(link);
		return 1;
	}
	drop_pending(link);
	afd__link_joined(link, now);
	return 1;
}

/* 1: moved on; 0: not now; negative: over. */
static int advance_accepted(struct afd__link *link, uint64_t now)
{
	int rc;

	switch (link->phase) {
	case AFD__LINK_NONCE:
		return answer_nonce(link);
	case AFD__LINK_ANSWER:
		rc = afd__shake_send_message(link);
		if (rc == 1)
			link->phase = AFD__LINK_HELLO;
		return rc;
	case AFD__LINK_HELLO:
		return answer_hello(link);
	case AFD__LINK_WELCOME:
		rc = afd__shake_send_message(link);
		if (rc == 1)
			link->phase = AFD__LINK_BINDING;
		return rc;
	case AFD__LINK_BINDING:
		rc = bind_accepted(link);
		if (rc == 1)
			link->phase = AFD__LINK_READY;
		return rc;
	case AFD__LINK_READY:
		return take_ready(link, now);
	case AFD__LINK_REFUSING:
		rc = afd__shake_send_message(link);
		/* Told and done; the warning has been written when it was refused. */
		return rc == 1 ? -ECANCELED : rc;
	default:
		return 0;
	}
}

static bool is_under_way(const struct afd__link *link)
{
	return link->phase != AFD__LINK_JOINED && link->phase != AFD__LINK_ECHOING;
}

/* One that says nothing costs nothing: no system call until its socket has an event. */
static int advance_stirred(struct afd__link *link, uint64_t now, int *moved)
{
	int rc = 1;

	while (link->stirred && is_under_way(link) && rc == 1) {
		rc = advance_accepted(link, now);
		*moved |= rc == 1;
	}
	link->stirred = false;
	if (rc >= 0 && link->phase == AFD__LINK_ECHOING) {
		rc = afd__echo_round(link, now);
		*moved |= rc == 1;
	}
	return rc;
}

/* A probe ends when it has seen enough; what was refused has been told. */
static bool ends_in_order(const struct afd__link *link, int rc)
{
	return link->phase == AFD__LINK_REFUSING ||
	       (link->phase == AFD__LINK_ECHOING && rc == -ECONNRESET);
}

/* 1 when it moved; the link may be gone then. */
static int move_pending(struct afd__link *link, uint64_t now)
{
	int moved = 0, rc = advance_stirred(link, now, &moved);

	if (link->phase == AFD__LINK_JOINED)
		return 1;
	if (rc >= 0 && now - link->since_ns > AFD__HANDSHAKE_MS * MS)
		rc = afd__error(
			-ETIMEDOUT, "the handshake was not done in %d ms", AFD__HANDSHAKE_MS);
	if (rc >= 0)
		return moved;
	if (!ends_in_order(link, rc))
		warn(link->net, "peer %s%s%s did not join: %s", link->name,
			link->wire.peer[0] ? " from " : "", link->wire.peer, afd_last_error());
	afd__shake_end_pending(link);
	return 1;
}

static bool is_silent(const struct afd__link *link)
{
	return link->phase <= AFD__LINK_HELLO;
}

static uint32_t count_silent(const afd_transport *net, uint64_t source)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < net->n_pending; i++)
		n += is_silent(net->pending[i]) && net->pending[i]->wire.source == source;
	return n;
}

/* The oldest silent one of the source that has most of them, so that no source crowds out others;
 * the oldest of all when none is silent. */
static struct afd__link *find_victim(const afd_transport *net)
{
	struct afd__link *victim = net->pending[0];
	uint32_t most = 0;

	for (uint32_t i = 0; i < net->n_pending; i++) {
		struct afd__link *link = net->pending[i];
		uint32_t n = is_silent(link) ? count_silent(net, link->wire.source) : 0;

		if (n > most) {
			victim = link;
			most = n;
		}
	}
	return victim;
}

static void evict(afd_transport *net)
{
	struct afd__link *victim = find_victim(net);

	warn(net,
		"peer %s%s%s refused: %d handshakes are under way, and it is the oldest that is "
		"silent of the source that has most",
		victim->name, victim->wire.peer[0] ? " from " : "", victim->wire.peer,
		AFD__PENDING_MAX);
	afd__shake_end_pending(victim);
}

static int accept_one(afd_transport *net, struct afd__listener *ln, uint64_t now)
{
	struct afd__link *link = afd__link_create(net, NULL);
	int rc;

	if (!link)
		return -ENOMEM;
	link->wire.ops = ln->ops;
	rc = ln->ops->accept(ln, &link->wire);
	if (rc != 1) {
		afd__link_destroy(link);
		return rc;
	}
	link->open = true;
	rc = net->secret ? afd__prove_begin(link) : 0;
	if (rc) {
		afd__link_destroy(link);
		return rc;
	}
	link->kind = net->attention ? AFD__LINK_IN_GROUP : AFD__LINK_FROM_ATTENTION;
	snprintf(link->who, sizeof(link->who), "the attention peer");
	link->number = ++net->n_accepted;
	link->phase = net->secret ? AFD__LINK_NONCE : AFD__LINK_HELLO;
	link->since_ns = now;
	link->stirred = true;
	snprintf(link->name, sizeof(link->name), "%.100s#%llu", ln->address,
		(unsigned long long)link->number);
	if (net->n_pending == AFD__PENDING_MAX)
		evict(net);
	net->pending[net->n_pending++] = link;
	return 1;
}

/* 0: as many as may be have been accepted in this window; the rest comes after it. */
static uint32_t accepts_left(afd_transport *net, uint64_t now)
{
	if (now - net->accept_window_ns >= ACCEPT_WINDOW_MS * MS) {
		net->accept_window_ns = now;
		net->n_accepts = 0;
	}
	if (net->n_accepts == ACCEPTS_PER_WINDOW)
		net->accept_again_ns = net->accept_window_ns + ACCEPT_WINDOW_MS * MS;
	return ACCEPTS_PER_WINDOW - net->n_accepts;
}

static int accept_all(afd_transport *net, uint64_t now)
{
	int rc, moved = 0;
	uint32_t first;

	if ((!net->listeners_stirred && (!net->accept_again_ns || now < net->accept_again_ns)) ||
		!accepts_left(net, now))
		return 0;
	net->listeners_stirred = false;
	net->accept_again_ns = 0;
	first = net->first_listener++;
	for (uint32_t i = 0; i < net->n_listeners; i++) {
		/* Another one is the first each time, so that none is left out. */
		struct afd__listener *ln = &net->listeners[(i + first) % net->n_listeners];

		rc = 1;
		while (rc == 1 && net->n_accepts < ACCEPTS_PER_WINDOW) {
			rc = accept_one(net, ln, now);
			net->n_accepts += rc != 0;
			moved |= rc == 1;
		}
		if (rc == 1 || rc == -EACCES)
			net->listeners_stirred = true;
		if (rc < 0)
			warn(net, "%s: %s", ln->address, afd_last_error());
		/* Out of descriptors or memory: looking again at once would only spin. */
		if (rc < 0 && rc != -EACCES)
			net->accept_again_ns = now + ACCEPT_AGAIN_MS * MS;
	}
	return moved | net->listeners_stirred;
}

/* ---- both ---- */

static bool has_come(const afd_transport *net, uint32_t rank)
{
	const struct afd__link *link = net->links[afd__group_link_index(net, rank)];

	return link && link->phase >= AFD__LINK_JOINED;
}

/* Ranks that have to come to us have the same time as those that we go to. */
static int await_ranks(afd_transport *net, uint64_t now)
{
	uint32_t rank = net->params.group_index + 1;

	if (net->error || now - net->created_ns <= net->params.connect_timeout_ms * MS)
		return 0;
	while (rank < net->params.group_size && has_come(net, rank))
		rank++;
	if (rank >= net->params.group_size)
		return 0;
	net->error = afd__error(-ETIMEDOUT, "rank %u of the group did not join within %u ms", rank,
		net->params.connect_timeout_ms);
	afd__error_save(net->error_text, sizeof(net->error_text));
	return 1;
}

int afd__handshake_round(afd_transport *net, uint64_t now)
{
	int moved = 0;

	for (uint32_t i = 0; net->attention && i < net->max_links; i++) {
		if (net->links[i])
			moved |= afd__connect_move(net->links[i], now);
	}
	if (net->n_listeners)
		moved |= accept_all(net, now);
	if (net->n_unwarned && now - net->warned_ns > 1000 * MS)
		begin_second(net, now);
	for (uint32_t i = 0; i < net->n_pending;) {
		struct afd__link *link = net->pending[i];

		moved |= move_pending(link, now);
		i += i < net->n_pending && net->pending[i] == link;
	}
	if (net->attention && net->params.group_size > 1)
		moved |= await_ranks(net, now);
	if (net->attention && !net->complete)
		moved |= afd__shards_complete(net, now);
	return moved;
}

/* Something will be done for it without an event. */
static bool is_timed(const struct afd__link *link)
{
	const afd_transport *net = link->net;

	if (link->phase == AFD__LINK_JOINED)
		return false;
	if (link->phase > AFD__LINK_JOINED)
		return afd__connect_returns(link) && afd__frames_untouched(link);
	return !net->error || net->error_passes;
}

/* NULL: a rank that has to come to us. */
static uint64_t timer_of(const afd_transport *net, const struct afd__link *link)
{
	uint64_t at = UINT64_MAX;

	if (link && afd__survey_runs(link) && link->phase > AFD__LINK_IDLE)
		at = link->survey->until_ns;
	else if (link && (link->phase == AFD__LINK_IDLE || link->phase > AFD__LINK_JOINED))
		at = link->retry_ns;
	else if (link)
		at = link->since_ns +
		     (net->complete ? AFD__HANDSHAKE_MS : AFD__REFUSED_MS + 1) * MS;
	if (!net->complete && net->created_ns + net->params.connect_timeout_ms * MS < at)
		at = net->created_ns + net->params.connect_timeout_ms * MS;
	/* One that is waited for no longer holds up the others once. */
	return !net->complete && link && link->phase > AFD__LINK_IDLE && at < afd__now_ns()
		       ? UINT64_MAX
		       : at;
}

uint64_t afd__handshake_timer(const afd_transport *net)
{
	uint64_t next = net->accept_again_ns ? net->accept_again_ns : UINT64_MAX, at;

	for (uint32_t i = 0; net->attention && i < net->max_links; i++) {
		const struct afd__link *link = net->links[i];

		if (link ? !is_timed(link) : net->error != 0)
			continue;
		at = timer_of(net, link);
		if (at < next)
			next = at;
	}
	if (net->n_unwarned && net->warned_ns + 1001 * MS < next)
		next = net->warned_ns + 1001 * MS;
	if (afd__echo_timer(net) < next)
		next = afd__echo_timer(net);
	/* The oldest stands first. */
	if (net->n_pending && net->pending[0]->since_ns + AFD__HANDSHAKE_MS * MS < next)
		next = net->pending[0]->since_ns + AFD__HANDSHAKE_MS * MS;
	return next;
}

void afd__handshake_missing(const afd_transport *net, char *text, size_t capacity)
{
	size_t at = 0;

	text[0] = '\0';
	for (uint32_t i = 0; i < net->max_links && at < capacity; i++) {
		const struct afd__link *link = net->links[i];

		if (link && link->phase >= AFD__LINK_JOINED)
			continue;
		if (!link && net->attention)
			at += (size_t)snprintf(text + at, capacity - at, "%srank %u of the group",
				at ? ", " : "", i - net->n_addresses + 1);
		if (!link)
			continue;
		at += (size_t)snprintf(text + at, capacity - at, "%s%s%s%s%s", at ? ", " : "",
			link->name, link->error_text[0] ? " (" : "", link->error_text,
			link->error_text[0] ? ")" : "");
	}
}
