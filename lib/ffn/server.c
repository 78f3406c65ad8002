/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes and ends the server of an FFN stage: room for every part that can be out at once, and the
 * descriptors that wake it. There are two sets: own_fd has what the stage itself waits for (a stop,
 * a completed pass, the end of a gather, the queue), fd has that and the transport, for a host's
 * event loop. What is still held at the end is answered with an error, so that no peer finds out by
 * a deadline. Called by stage.c.
 */
#include "stage.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

static int watch(int epoll_fd, int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static int open_descriptors(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	bool fail;

	server->fd = epoll_create1(EPOLL_CLOEXEC);
	server->own_fd = epoll_create1(EPOLL_CLOEXEC);
	server->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	server->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	fail = server->fd < 0 || server->own_fd < 0 || server->wake_fd < 0 || server->timer_fd < 0;
	if (!fail)
		fail = watch(server->own_fd, server->wake_fd) ||
		       watch(server->own_fd, server->timer_fd) ||
		       (ffn->queue.fd >= 0 && watch(server->own_fd, ffn->queue.fd)) ||
		       watch(server->fd, server->own_fd) ||
		       watch(server->fd, afd_transport_fd(ffn->net));
	return fail ? afd__error(-EIO, "ffn: descriptors of the server: %s", strerror(errno)) : 0;
}

static void beat(void *user)
{
	struct afd_ffn *ffn = user;

	afd__transport_beat(ffn->net);
}

int afd__ffn_server_create(struct afd_ffn *ffn, uint32_t gather_us)
{
	struct afd__ffn_server *server = &ffn->server;
	struct afd__exchange_info net;
	int rc;

	afd__transport_info(ffn->net, &net);
	server->fd = server->own_fd = server->wake_fd = server->timer_fd = -1;
	server->until_ns = UINT64_MAX;
	server->cap_ns = gather_us == UINT32_MAX ? 0
			 : gather_us             ? gather_us * UINT64_C(1000)
						 : UINT64_MAX;
	server->max_sources = net.max_peers * AFD_MAX_LANES;
	server->max_parts = 2 * server->max_sources;
	server->held = afd__alloc(ffn->ctx, server->max_parts, sizeof(*server->held));
	server->run.parts = afd__alloc(ffn->ctx, server->max_parts, sizeof(*server->run.parts));
	server->run.gather_ns =
		afd__alloc(ffn->ctx, server->max_parts, sizeof(*server->run.gather_ns));
	server->joined = afd__alloc(ffn->ctx, server->max_sources, sizeof(*server->joined));
	server->sources = afd__alloc(
		ffn->ctx, server->max_sources + server->max_parts, sizeof(*server->sources));
	if (!server->held || !server->run.parts || !server->run.gather_ns || !server->joined ||
		!server->sources)
		return -ENOMEM;
	rc = afd__arrivals_create(
		&server->arrivals, ffn->ctx, net.max_peers, ffn->first_layer, ffn->n_layers);
	if (rc)
		return rc;
	ffn->queue.on_tile = beat;
	ffn->queue.on_tile_user = ffn;
	return open_descriptors(ffn);
}

/* Peers whose parts are still here are told, so that they need not find out by a deadline. */
static void give_back(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;
	uint32_t i;

	for (i = 0; i < server->run.n_parts; i++)
		afd__ffn_refuse(ffn, &server->run.parts[i],
			afd__error(-ECANCELED, "ffn: the stage has ended"));
	for (i = 0; i < server->n_held; i++)
		afd__ffn_refuse(ffn, &server->held[i].part,
			afd__error(-ECANCELED, "ffn: the stage has ended"));
}

static void close_descriptor(int fd)
{
	if (fd >= 0)
		(void)close(fd);
}

void afd__ffn_server_destroy(struct afd_ffn *ffn)
{
	struct afd__ffn_server *server = &ffn->server;

	/* The first allocation of _create; without it there is nothing. */
	if (!server->max_parts)
		return;
	if (server->held && server->run.parts && ffn->ctx->pid == getpid())
		give_back(ffn);
	close_descriptor(server->fd);
	close_descriptor(server->own_fd);
	close_descriptor(server->wake_fd);
	close_descriptor(server->timer_fd);
	afd__arrivals_destroy(&server->arrivals);
	afd__free(server->sources);
	afd__free(server->joined);
	afd__free(server->run.gather_ns);
	afd__free(server->run.parts);
	afd__free(server->held);
}
