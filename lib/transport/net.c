/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Progress and waiting. A round polls every link, moves handshakes and frames on, and looks at the
 * clock; rounds repeat until one moves nothing. Only then the transport is armed and its epoll set
 * emptied, so that its descriptor is readable exactly when a poll would find something.
 *
 * A wait is a bounded spin over the rings, then a sleep on the descriptor: what ends it is a
 * doorbell, a socket or a pidfd, all in one set. Every sleep is bounded by the next deadline.
 */
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>

#include "net.h"

enum { ROUNDS_MAX = 32, EVENTS = 32, SPINS_PER_LOOK = 32, LOOKS_PER_PEEK = 4 };
enum { INSIDE_LOOK_NS = 2000000 }; /* how often events are looked at while nobody sleeps */

static const uint64_t MS = 1000000;

int afd__net_check(const afd_transport *net)
{
	return net ? afd__context_check(net->ctx, "transport")
		   : afd__error(-EINVAL, "transport: the handle is NULL");
}

/* ---- rounds ---- */

static int round_of(afd_transport *net)
{
	uint64_t now = afd__now_ns();
	int moved = 0;

	net->round_ns = now;
	for (uint32_t i = 0; i < net->n_used_links; i++) {
		if (afd__link_is_joined(net->links[i]))
			moved |= afd__link_poll(net->links[i], now);
	}
	if (net->harvested)
		net->busy_ns = 0;
	net->harvested = false;
	moved |= afd__handshake_round(net, now);
	for (uint32_t i = 0; i < net->n_used_links; i++) {
		if (afd__link_is_joined(net->links[i]))
			moved |= afd__link_timers(net->links[i], now);
	}
	if (net->attention)
		moved |= afd__frames_round(net);
	if (net->params.group_size > 1)
		moved |= afd__group_round(net);
	return moved;
}

/* FFN side: frees links that have ended and of which the stage holds nothing. Not while events may
 * still name them. */
static void reap(afd_transport *net)
{
	for (uint32_t i = 0; !net->attention && i < net->n_used_links; i++) {
		struct afd__link *link = net->links[i];

		if (!link || link->phase <= AFD__LINK_JOINED || link->n_taken)
			continue;
		net->links[i] = NULL;
		afd__link_destroy(link);
	}
}

static bool is_polled(const afd_transport *net, const struct afd__link *link)
{
	return afd__link_is_joined(link) || (afd__link_is_echoing(link) && !afd__echo_rests(net));
}

/* links: [n], some of them NULL. */
static int arm_links(const afd_transport *net, struct afd__link *const *links, uint32_t n)
{
	int came = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (is_polled(net, links[i]))
			came |= links[i]->wire.ops->arm(&links[i]->wire);
	}
	return came;
}

/* 1 when something came meanwhile. */
static int arm(afd_transport *net)
{
	int came = arm_links(net, net->links, net->n_used_links);

	return net->n_echoing ? came | arm_links(net, net->pending, net->n_pending) : came;
}

static void take_event(afd_transport *net, const struct epoll_event *event)
{
	unsigned which = (uintptr_t)event->data.ptr & 7;
	struct afd__tag *tag = (struct afd__tag *)((char *)event->data.ptr - which);
	struct afd__link *link = (struct afd__link *)tag;
	int rc;

	if (tag->kind == AFD__TAG_LISTENER) {
		net->listeners_stirred = true;
		return;
	}
	if (tag->kind == AFD__TAG_SHARED) {
		net->shared->event(net->shared, which, event->events);
		return;
	}
	link->stirred = true;
	if (link->phase != AFD__LINK_JOINED && link->phase != AFD__LINK_ECHOING)
		return;
	rc = link->wire.ops->event(&link->wire, which, event->events);
	link->gone |= rc < 0;
	if (rc >= 0 || link->phase == AFD__LINK_ECHOING)
		return;
	/* The peer is gone, but what it said last counts: a goodbye, or the last reply. */
	afd__link_poll(link, afd__now_ns());
	if (link->phase == AFD__LINK_JOINED)
		afd__link_hung_up(link);
}

/* For times.c: what comes from now on is found at once; what is here, after the next round. */
static int looked(afd_transport *net, int came)
{
	if (came)
		net->harvested = true;
	else
		net->busy_ns = 0;
	return came;
}

/* Empties the epoll set. 1 when there was something, -EIO. */
static int harvest(afd_transport *net)
{
	struct epoll_event events[EVENTS];
	int n = epoll_wait(net->epoll_fd, events, EVENTS, 0);

	net->harvested_ns = net->round_ns;
	if (n < 0)
		return errno == EINTR
			       ? 1
			       : afd__error(-EIO, "transport: epoll_wait: %s", strerror(errno));
	for (int i = 0; i < n; i++)
		take_event(net, &events[i]);
	return looked(net, n > 0);
}

/* A round that moved nothing is followed by arming; 1 when there is something after all. Who waits
 * inside spins first, which finds rows without a system call, and is armed when it goes to sleep. */
static int rest(afd_transport *net)
{
	int rc;

	reap(net);
	if (net->waits_inside && net->round_ns < net->harvested_ns + INSIDE_LOOK_NS)
		return 0;
	rc = arm(net);
	return rc ? looked(net, rc) : harvest(net);
}

int afd__net_move(afd_transport *net)
{
	int moved = round_of(net), rc;

	net->undone = moved;
	if (moved)
		return 1;
	rc = rest(net);
	if (rc != 1)
		return rc;
	net->undone = true;
	return round_of(net) | 1;
}

int afd__net_settle(afd_transport *net)
{
	int moved = 0, rc;

	for (int i = 0; i < ROUNDS_MAX; i++) {
		net->undone = true;
		rc = round_of(net);
		if (!rc)
			rc = rest(net);
		if (rc < 0)
			return rc;
		if (!rc) {
			net->undone = false;
			return moved;
		}
		moved = 1;
	}
	return moved;
}

/* ---- what hosts call ---- */

static int state_of(const afd_transport *net)
{
	int rc = afd__shards_error(net);

	if (rc)
		return rc;
	/* A rank that has left. */
	for (uint32_t i = net->n_addresses; net->attention && i < net->max_links; i++) {
		if (net->links[i] && net->links[i]->error)
			return afd__link_error(net->links[i]);
	}
	return !net->attention || (net->complete && !net->error);
}

int afd_transport_poll(afd_transport *net)
{
	int rc = afd__net_check(net);

	if (!rc)
		rc = afd__net_settle(net);
	return rc < 0 ? rc : state_of(net);
}

int afd_transport_wait(afd_transport *net, int32_t timeout_ms)
{
	uint64_t until;
	char missing[384];
	int rc = afd__net_check(net);

	if (rc)
		return rc;
	if (!timeout_ms)
		timeout_ms = net->params.connect_timeout_ms > INT32_MAX
				     ? INT32_MAX
				     : (int32_t)net->params.connect_timeout_ms;
	until = afd__now_ns() + (timeout_ms < 0 ? 0 : (uint64_t)timeout_ms * MS);
	while (!(rc = afd_transport_poll(net))) {
		uint64_t now = afd__now_ns();

		if (now >= until) {
			afd__handshake_missing(net, missing, sizeof(missing));
			return afd__error(-ETIMEDOUT, "transport: waited %d ms, missing: %s",
				timeout_ms < 0 ? 0 : timeout_ms, missing);
		}
		rc = afd__transport_sleep(net, -1, (int32_t)((until - now + MS - 1) / MS));
		if (rc < 0)
			return rc;
	}
	return rc;
}

int afd_transport_fd(const afd_transport *net)
{
	int rc = afd__net_check(net);

	return rc ? rc : net->epoll_fd;
}

uint64_t afd__net_next_timer(const afd_transport *net)
{
	uint64_t next = afd__handshake_timer(net), at;

	if (afd__shards_waits(net)) {
		at = net->uncovered_ns + net->params.reconnect_ms * MS;
		next = at < next ? at : next;
	}

	for (uint32_t i = 0; i < net->n_used_links; i++) {
		if (!afd__link_is_joined(net->links[i]))
			continue;
		at = afd__link_next_timer(net->links[i]);
		if (at < next)
			next = at;
	}
	return next;
}

int32_t afd_transport_timeout_ms(const afd_transport *net)
{
	uint64_t next, now;

	if (afd__net_check(net))
		return -1;
	if (net->undone)
		return 0;
	next = afd__net_next_timer(net);
	if (next == UINT64_MAX)
		return -1;
	now = afd__now_ns();
	if (next <= now)
		return 0;
	next = (next - now + MS - 1) / MS;
	return next > INT32_MAX ? INT32_MAX : (int32_t)next;
}

/* ---- sleeping ---- */

void afd__transport_wait_inside(afd_transport *net, bool inside)
{
	net->waits_inside = inside;
	/* The descriptor says nothing before the next poll. */
	net->undone |= !inside;
}

static void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

static bool any_ready(const afd_transport *net, struct afd__link *const *links, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (is_polled(net, links[i]) && links[i]->wire.ops->ready(&links[i]->wire))
			return true;
	}
	return false;
}

static bool anything_ready(const afd_transport *net)
{
	return any_ready(net, net->links, net->n_used_links) ||
	       (net->n_echoing && any_ready(net, net->pending, net->n_pending));
}

static bool is_readable(int fd)
{
	struct pollfd one = { .fd = fd, .events = POLLIN };

	return fd >= 0 && poll(&one, 1, 0) > 0;
}

/* True when something came within spin_us, or until the timeout if that is sooner. */
static bool spin(afd_transport *net, int fd, int32_t timeout_ms)
{
	uint64_t now = afd__now_ns(), until = now + net->params.spin_us * UINT64_C(1000);

	if (net->params.spin_us == UINT32_MAX || !(net->n_joined + net->n_echoing))
		return false;
	if (timeout_ms >= 0 && until > now + (uint64_t)timeout_ms * MS)
		until = now + (uint64_t)timeout_ms * MS;
	for (unsigned looks = 1; now < until; looks++, now = afd__now_ns()) {
		for (int i = 0; i < SPINS_PER_LOOK; i++) {
			if (looked(net, anything_ready(net)))
				return true;
			relax();
		}
		if (looks % LOOKS_PER_PEEK == 0 && is_readable(fd))
			return true;
	}
	return false;
}

int afd__transport_sleep(afd_transport *net, int fd, int32_t timeout_ms)
{
	struct pollfd both[2] = { { .fd = net->epoll_fd, .events = POLLIN },
		{ .fd = fd, .events = POLLIN } };
	int32_t timer_ms = afd_transport_timeout_ms(net);
	int n, rc;

	if (timer_ms >= 0 && (timeout_ms < 0 || timer_ms < timeout_ms))
		timeout_ms = timer_ms;
	if (!timeout_ms)
		return 0;
	if (spin(net, fd, timeout_ms) || arm(net))
		return 1;
	/* What came in between is taken now: while it waits inside no round would. Places that have
	 * become free are, before somebody new asks for one. */
	reap(net);
	net->round_ns = afd__now_ns();
	rc = harvest(net);
	if (rc)
		return rc;
	n = poll(both, 2, timeout_ms);
	if (n < 0 && errno != EINTR)
		return afd__error(-EIO, "transport: poll: %s", strerror(errno));
	if (n <= 0 || !both[0].revents)
		return n != 0;
	net->round_ns = afd__now_ns();
	rc = harvest(net);
	return rc < 0 ? rc : 1;
}
