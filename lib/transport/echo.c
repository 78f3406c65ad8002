/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The answer to a probe: what else this end listens at, then, if that is asked for, slots that go
 * back as they came. A probe is a stranger until its end: it is never a peer, knows no contract,
 * takes no place, and has the handshake's time. Where there is a key it has proved it before.
 *
 * Those who are served come first: few probes are answered at a time, each a few slots, and of all
 * together no more bytes are echoed than ECHO_WINDOW_BYTES in ECHO_WINDOW_MS. One that stays goes when
 * another comes, so that nobody keeps the others from auto:.
 */
#include <stdio.h>
#include <string.h>

#include "net.h"

enum { STAY_MS = 500 };
enum { COMPLETIONS = 4, ECHO_WINDOW_MS = 10, ECHO_WINDOW_BYTES = 4 << 20 };

static const uint64_t MS = 1000000;

static int refuse_probe(struct afd__link *link, const char *field, const char *ours)
{
	struct afd__hello refusal;

	afd__hello_refuse(&refusal, field, ours, "%s", "one more probe");
	afd__shake_refuse(link, &refusal);
	return 1;
}

/* The oldest of the probes that are answered, when it has had its time; NULL: they have not. */
static struct afd__link *find_stayed(const afd_transport *net, uint64_t now)
{
	for (uint32_t i = 0; i < net->n_pending; i++) {
		struct afd__link *link = net->pending[i];

		if (link->probing)
			return now - link->since_ns > STAY_MS * MS ? link : NULL;
	}
	return NULL;
}

/* True when there is a place for one more. */
static bool make_place(afd_transport *net)
{
	struct afd__link *stayed = NULL;

	if (net->n_probes == AFD__PROBES_MAX)
		stayed = find_stayed(net, afd__now_ns());
	if (stayed)
		afd__shake_end_pending(stayed);
	return net->n_probes < AFD__PROBES_MAX;
}

int afd__echo_answer(struct afd__link *link)
{
	afd_transport *net = link->net;
	struct afd__hello offer = { .kind = AFD__OFFER,
		.wire_version = AFD__WIRE_VERSION,
		.probe_slots = AFD__PROBE_SLOTS,
		.verbs_port = net->verbs_port };
	uint32_t asked = link->said->probe_bytes;
	char limit[16];
	int rc;

	if (net->draining)
		return refuse_probe(link, "state", "draining");
	if (!make_place(net)) {
		snprintf(limit, sizeof(limit), "%d", AFD__PROBES_MAX);
		return refuse_probe(link, "probes", limit);
	}
	link->probing = true;
	net->n_probes++;
	asked = asked < AFD__PROBE_BYTES_MAX ? asked : AFD__PROBE_BYTES_MAX;
	link->probe_bytes = offer.probe_bytes = (asked + 63) / 64 * 64;
	snprintf(offer.shm_name, sizeof(offer.shm_name), "%s", net->shm_name);
	snprintf(offer.version, sizeof(offer.version), "%s", afd_version());
	rc = afd__shake_say(link, &offer, asked ? AFD__LINK_WELCOME : AFD__LINK_REFUSING);
	return rc ? rc : 1;
}

void afd__echo_geometry(const struct afd__link *link, struct afd__wire_slots *geometry)
{
	*geometry = (struct afd__wire_slots){ .n_slots = 2,
		.n_control = 1,
		.eager = 1,
		.control_bytes = AFD__CONTROL_BYTES,
		.slot_bytes = link->probe_bytes };
}

void afd__echo_begin(struct afd__link *link)
{
	link->phase = AFD__LINK_ECHOING;
	link->gone = false;
	link->n_echoed = 0;
	link->net->n_echoing++;
}

bool afd__echo_rests(const afd_transport *net)
{
	return net->echo_bytes >= ECHO_WINDOW_BYTES;
}

uint64_t afd__echo_timer(const afd_transport *net)
{
	return net->n_echoing && afd__echo_rests(net) ? net->echo_window_ns + ECHO_WINDOW_MS * MS
						      : UINT64_MAX;
}

static int echo_slot(struct afd__link *link, uint32_t slot, uint32_t bytes)
{
	const struct afd__transport_ops *ops = link->wire.ops;
	int rc;

	if (link->n_echoed++ == AFD__PROBE_SLOTS)
		return afd__error(-EPROTO, "the probe sent more than %d slots", AFD__PROBE_SLOTS);
	memcpy(ops->send_slot(&link->wire, slot), ops->receive_slot(&link->wire, slot), bytes);
	link->net->echo_bytes += bytes;
	rc = ops->post_receive(&link->wire, slot);
	if (!rc)
		rc = ops->post_send(&link->wire, slot, bytes);
	return rc == -EAGAIN ? afd__error(-EPROTO,
				       "the probe sent slot %u again and had not given it back", slot)
			     : rc;
}

int afd__echo_round(struct afd__link *link, uint64_t now)
{
	struct afd__completion done[COMPLETIONS];
	afd_transport *net = link->net;
	int n, rc = 0;

	if (now - net->echo_window_ns >= ECHO_WINDOW_MS * MS) {
		net->echo_window_ns = now;
		net->echo_bytes = 0;
	}
	if (afd__echo_rests(net))
		return 0;
	n = link->wire.ops->poll(&link->wire, done, COMPLETIONS);
	for (int i = 0; i < n && !rc; i++) {
		if (done[i].kind == AFD__RECEIVED)
			rc = echo_slot(link, done[i].slot, done[i].bytes);
	}
	if (!n && link->gone)
		return afd__error(-ECONNRESET, "the probe is over");
	return rc ? rc : n < 0 ? n : n > 0;
}
