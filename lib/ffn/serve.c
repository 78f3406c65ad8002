/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The server: takes parts from the transport, lets the gather choose which go next, and answers
 * them when their pass is done. afd_ffn_poll is one turn that never blocks; afd_ffn_serve sleeps
 * between turns on the descriptors of the transport, of the queue, and of its own (stop, completed
 * passes, the end of a gather).
 *
 * One pass is on its way at a time; parts that come meanwhile wait and are gathered into the next.
 * What the server holds it answers, whatever happens to others: an error of one part, or the loss
 * of a peer, is nobody else's. Called by hosts.
 */
#include "stage.h"

#include <assert.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

enum {
	DEFAULT_GATHER_NS = 2000000,
	DEFAULT_GATHER_PASSES = 4,
	DEFAULT_STEP_GATHER_NS = 20000000,
	BEAT_MS = 50, /* how often to look while a peer waits for us */
};

/* ---- gather ---- */

/* How long rows may wait: what the host said; else some passes' time, or more where that gains a
 * whole step. */
static struct afd__gather_rule gather_rule(const struct afd_ffn *ffn)
{
	const struct afd__ffn_server *server = &ffn->server;
	uint64_t measured_ns = DEFAULT_GATHER_PASSES * server->mean_pass_ns;
	struct afd__gather_rule rule = {
		.pass_ns = server->mean_pass_ns,
		.n_layers = ffn->n_layers,
		.full_rows = ffn->max_rows,
		.cap_ns = server->cap_ns,
		.step_cap_ns = server->cap_ns,
	};

	if (server->stopped_ns) {
		rule.cap_ns = rule.step_cap_ns = 0;
	} else if (server->cap_ns == UINT64_MAX) {
		rule.cap_ns = measured_ns > DEFAULT_GATHER_NS ? measured_ns : DEFAULT_GATHER_NS;
		rule.step_cap_ns =
			rule.cap_ns > DEFAULT_STEP_GATHER_NS ? rule.cap_ns : DEFAULT_STEP_GATHER_NS;
	}
	return rule;
}

/* A part of no rows needs no pass. */
static bool is_answered_now(struct afd_ffn *ffn, const struct afd__part *part)
{
	if (part->n_rows)
		return false;
	(void)afd__exchange_reply(ffn->net, part, 0, 0, 0);
	afd__arrivals_answered(&ffn->server.arrivals, part, afd__now_ns());
	return true;
}

static void take_parts(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	struct afd__gather_rule rule = gather_rule(ffn);

	while (server->n_held < server->max_parts) {
		struct afd__held *held = &server->held[server->n_held];

		if (afd__exchange_take(ffn->net, &held->part) <= 0)
			return;
		server->progressed = true;
		assert(afd__ffn_holds(ffn, held->part.layer));
		held->turn_ns = 0;
		if (is_answered_now(ffn, &held->part))
			continue;
		afd__arrivals_came(&server->arrivals, &held->part, &rule);
		server->n_held++;
	}
}

static uint64_t computed_ns(const struct afd_ffn *ffn)
{
	return atomic_load_explicit(&ffn->compute_ns, memory_order_relaxed);
}

/* Passes of other layers that ran meanwhile are no wait for others. */
static uint64_t gathered_ns(
	const struct afd_ffn *ffn, const struct afd__held *held, uint64_t now_ns)
{
	uint64_t all_ns = now_ns - held->turn_ns;
	uint64_t passes_ns = computed_ns(ffn) - held->computed_ns;

	return all_ns > passes_ns ? all_ns - passes_ns : 0;
}

static void choose(struct afd_ffn *ffn, struct afd__gather_choice *choice)
{
	struct afd__ffn_server *server = &ffn->server;
	struct afd__gather_rule rule = gather_rule(ffn);
	uint64_t now_ns = afd__now_ns();
	uint32_t i, n_joined, n_sources;

	for (i = 0; i < server->n_held; i++) {
		if (server->held[i].turn_ns)
			continue;
		server->held[i].turn_ns = now_ns;
		server->held[i].computed_ns = computed_ns(ffn);
	}
	n_joined = afd__exchange_sources(ffn->net, server->joined, server->max_sources);
	n_sources = afd__arrivals_sources(&server->arrivals, server->joined, n_joined, server->held,
		server->n_held, &rule, server->sources);
	afd__gather_choose(&rule, server->sources, n_sources, now_ns, choice);
}

static bool fits(const struct afd_ffn *ffn, const struct afd__part *part)
{
	const struct afd__ffn_run *run = &ffn->server.run;

	if (!run->n_parts)
		return true;
	return run->n_rows + part->n_rows <= ffn->max_rows && run->routed == (part->ids != NULL);
}

/* Moves the layer's parts to the run, oldest first, until the pass is full; a part that is larger
 * than a pass goes alone or first. Rows that attention has routed and rows that have to be make
 * passes of their own. The rest keep their order. */
static void gather(struct afd_ffn *ffn, uint32_t layer)
{
	struct afd__ffn_server *server = &ffn->server;
	struct afd__ffn_run *run = &server->run;
	uint64_t now_ns = afd__now_ns();
	uint32_t i, n_kept = 0;

	run->n_parts = 0;
	run->n_rows = 0;
	run->layer = layer;
	for (i = 0; i < server->n_held; i++) {
		const struct afd__part *part = &server->held[i].part;

		if (part->layer == layer && fits(ffn, part)) {
			run->routed = part->ids != NULL;
			run->n_rows += part->n_rows;
			run->gather_ns[run->n_parts] = gathered_ns(ffn, &server->held[i], now_ns);
			run->parts[run->n_parts++] = *part;
		} else {
			server->held[n_kept++] = server->held[i];
		}
	}
	server->n_held = n_kept;
}

/* The clock of the gather: a descriptor, since its waits are shorter than the milliseconds of a
 * host's event loop. */
static void set_timer(struct afd__ffn_server *server, uint64_t until_ns)
{
	struct itimerspec when = { 0 };

	if (until_ns == server->until_ns)
		return;
	server->until_ns = until_ns;
	if (until_ns != UINT64_MAX) {
		when.it_value.tv_sec = (time_t)(until_ns / 1000000000);
		when.it_value.tv_nsec = (long)(until_ns % 1000000000);
	}
	(void)timerfd_settime(server->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* Runs what can be run; returns when a pass is under way, when the rest waits for others, or when
 * nothing is left. */
static int run_passes(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	struct afd__gather_choice choice;
	bool was_under_way = server->run.under_way;
	int rc = afd__ffn_run_poll(ffn);

	if (rc <= 0)
		return rc;
	server->progressed |= was_under_way;
	if (!server->n_held) {
		set_timer(server, UINT64_MAX);
		return 0;
	}
	choose(ffn, &choice);
	set_timer(server, choice.layer < 0 ? choice.until_ns : UINT64_MAX);
	if (choice.layer < 0)
		return 0;
	server->progressed = true;
	gather(ffn, ffn->first_layer + (uint32_t)choice.layer);
	rc = afd__ffn_run_begin(ffn);
	if (!rc)
		rc = afd__ffn_run_poll(ffn);
	return rc < 0 ? rc : 0;
}

/* ---- one turn ---- */

/* Empties what woke us, if anything did; the state behind it is looked at anyway. */
static void clear_wake(struct afd__ffn_server *server)
{
	uint64_t count;

	if (atomic_exchange_explicit(&server->woken, 0, memory_order_acquire)) {
		while (read(server->wake_fd, &count, sizeof(count)) > 0)
			;
	}
	if (server->until_ns != UINT64_MAX && afd__now_ns() >= server->until_ns &&
		read(server->timer_fd, &count, sizeof(count)) > 0)
		server->until_ns = UINT64_MAX;
}

static void look_at_peers(struct afd_ffn *ffn)
{
	uint32_t n_peers = afd__exchange_n_joined(ffn->net);

	if (n_peers == atomic_load_explicit(&ffn->server.n_peers, memory_order_relaxed))
		return;
	atomic_store_explicit(&ffn->server.n_peers, n_peers, memory_order_relaxed);
	afd__metric_set(ffn->metrics.peers, n_peers);
}

/* After a stop: 0 while replies are owed, -ECANCELED when none is, or -ETIMEDOUT. */
static int drain(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	int rc;

	if (!server->stopped_ns)
		server->stopped_ns = afd__now_ns();
	rc = afd__exchange_drain(ffn->net);
	if (rc < 0)
		return rc;
	server->drained = rc && !server->n_held && !server->run.under_way;
	if (server->drained)
		return afd__error(-ECANCELED, "ffn: stopped");
	if (afd__now_ns() - server->stopped_ns > AFD__FFN_WAIT_MS * UINT64_C(1000000))
		return afd__error(-ETIMEDOUT,
			"ffn: stopped, but after %d ms %s of layer %u is not done: the server "
			"waits for %s",
			AFD__FFN_WAIT_MS, server->run.under_way ? "a pass" : "a reply",
			server->run.layer, ffn->host.compute ? "afd_ffn_complete" : "its device");
	return 0;
}

static int turn(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	int rc;

	clear_wake(server);
	rc = afd_transport_poll(ffn->net);
	if (rc < 0)
		return rc;
	look_at_peers(ffn);
	take_parts(ffn);
	rc = run_passes(ffn);
	if (rc < 0)
		return rc;
	afd__transport_beat(ffn->net);
	if (atomic_load_explicit(&server->stop, memory_order_relaxed))
		return drain(ffn);
	return 0;
}

static int check_server(const struct afd_ffn *ffn)
{
	int rc = afd__ffn_check(ffn);

	if (!rc && !ffn->net)
		rc = afd__error(
			-EINVAL, "ffn: made without a transport, there is nothing to serve");
	return rc;
}

/* Keeps the cause, and tells the peers that wait: they need not find out by a deadline. */
static void fail(struct afd_ffn *ffn, int error)
{
	struct afd__ffn_server *server = &ffn->server;
	uint32_t i;

	server->failed = error;
	afd__error_save(server->failed_text, sizeof(server->failed_text));
	for (i = 0; i < server->n_held; i++)
		afd__ffn_refuse(
			ffn, &server->held[i].part, afd__error(error, "%s", server->failed_text));
	server->n_held = 0;
	afd__error(error, "%s", server->failed_text);
}

int afd_ffn_poll(afd_ffn *ffn)
{
	struct afd__ffn_server *server;
	int rc = check_server(ffn);

	if (rc)
		return rc;
	server = &ffn->server;
	if (server->failed)
		return afd__error(server->failed, "%s", server->failed_text);
	if (server->drained)
		return afd__error(-ECANCELED, "ffn: stopped");
	server->progressed = false;
	rc = turn(ffn);
	if (rc < 0 && rc != -ECANCELED)
		fail(ffn, rc);
	return rc < 0 ? rc : server->progressed;
}

int afd_ffn_serve(afd_ffn *ffn)
{
	int rc = check_server(ffn);

	if (rc)
		return rc;
	afd__transport_wait_inside(ffn->net, true);
	while (rc >= 0) {
		rc = afd_ffn_poll(ffn);
		if (!rc)
			rc = afd__transport_sleep(
				ffn->net, ffn->server.own_fd, afd_ffn_timeout_ms(ffn));
	}
	afd__transport_wait_inside(ffn->net, false);
	return rc == -ECANCELED ? 0 : rc;
}

/* ---- for those who wait ---- */

int afd_ffn_fd(const afd_ffn *ffn)
{
	int rc = check_server(ffn);

	return rc ? rc : ffn->server.fd;
}

int32_t afd_ffn_timeout_ms(const afd_ffn *ffn)
{
	const struct afd__ffn_server *server;
	int32_t timeout_ms;

	if (check_server(ffn))
		return -1;
	server = &ffn->server;
	if (server->progressed)
		return 0;
	timeout_ms = afd_transport_timeout_ms(ffn->net);
	if ((server->run.under_way || server->n_held || server->stopped_ns) &&
		(timeout_ms < 0 || timeout_ms > BEAT_MS))
		timeout_ms = BEAT_MS;
	return timeout_ms;
}

void afd_ffn_stop(afd_ffn *ffn)
{
	int saved_errno = errno;
	uint64_t one = 1;

	/* A child of fork shares the descriptor: it must not wake the parent. */
	if (!ffn || !ffn->net || ffn->ctx->pid != getpid())
		return;
	atomic_store_explicit(&ffn->server.stop, 1, memory_order_relaxed);
	/* It fails only when it is full, and then the server has been woken. */
	if (write(ffn->server.wake_fd, &one, sizeof(one)) < 0)
		errno = saved_errno;
	/* Afterwards: who sees it finds what was written, and who does not is woken again. */
	atomic_store_explicit(&ffn->server.woken, 1, memory_order_release);
}
