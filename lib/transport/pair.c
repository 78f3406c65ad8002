/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Death is told twice: by the socket, whose end is seen at once, and by the peer's pidfd, because a
 * child that the peer forked may hold the socket open. The doorbell is watched edge-triggered and
 * never read: each ring is an event of its own, and a read could block if the peer changed the
 * flags that both share.
 */
#include "pair.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { WHICH_SOCKET, WHICH_BELL, WHICH_PIDFD };

int afd__pair_open(struct afd__wire *wire, int socket)
{
	struct pair *pair = afd__alloc(wire->ctx, 1, sizeof(*pair));
	int rc = -ENOMEM;

	if (!pair)
		goto fail;
	pair->socket = socket;
	pair->our_bell = pair->peer_bell = pair->pidfd = -1;
	rc = afd__socket_watch(
		wire->epoll_fd, socket, EPOLLIN | EPOLLRDHUP, wire->tag, WHICH_SOCKET);
	if (rc)
		goto fail;
	wire->state = pair;
	return 0;
fail:
	afd__free(pair);
	close(socket);
	return rc;
}

int afd__pair_bell(int *out)
{
	*out = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return *out < 0 ? afd__error(-EIO, "eventfd: %s", strerror(errno)) : 0;
}

int afd__pair_watch(struct afd__wire *wire, pid_t peer_pid)
{
	struct pair *pair = pair_of(wire);
	int rc = afd__socket_watch(
		wire->epoll_fd, pair->our_bell, EPOLLIN | EPOLLET, wire->tag, WHICH_BELL);

	if (rc || peer_pid <= 0 || peer_pid == getpid())
		return rc;
#ifdef SYS_pidfd_open
	pair->pidfd = (int)syscall(SYS_pidfd_open, peer_pid, 0);
#endif
	if (pair->pidfd < 0)
		return errno == ESRCH ? afd__error(-ECONNRESET, "the peer is gone") : 0;
	return afd__socket_watch(wire->epoll_fd, pair->pidfd, EPOLLIN, wire->tag, WHICH_PIDFD);
}

void afd__pair_shut(struct afd__wire *wire)
{
	struct pair *pair = pair_of(wire);

	afd__socket_forget(wire->ctx, wire->epoll_fd, &pair->pidfd);
	afd__socket_forget(wire->ctx, wire->epoll_fd, &pair->our_bell);
	/* The peer's bell is in no set. */
	if (pair->peer_bell >= 0)
		close(pair->peer_bell);
	pair->peer_bell = -1;
	/* A child that holds the socket would hide its end from the peer; shutdown does not ask who
	 * holds it. */
	if (pair->socket >= 0 && !afd__forked(wire->ctx))
		shutdown(pair->socket, SHUT_RDWR);
	afd__socket_forget(wire->ctx, wire->epoll_fd, &pair->socket);
	if (!wire->error)
		wire->error = -ECONNRESET;
}

void afd__pair_free(struct afd__wire *wire)
{
	afd__pair_shut(wire);
	afd__free(wire->state);
	wire->state = NULL;
}

int afd__pair_hello_send(struct afd__wire *wire, const void *message, size_t bytes)
{
	if (wire->error)
		return afd__wire_failed(wire);
	return afd__wire_fail(wire, afd__socket_send(pair_of(wire)->socket, message, bytes));
}

int afd__pair_hello_receive(struct afd__wire *wire, void *message, size_t capacity, size_t *bytes)
{
	if (wire->error)
		return afd__wire_failed(wire);
	return afd__wire_fail(wire, afd__socket_receive(pair_of(wire)->socket, message, capacity, bytes));
}

void *afd__pair_send_slot(struct afd__wire *wire, uint32_t slot)
{
	return afd__segment_send_slot(&pair_of(wire)->end, slot);
}

const void *afd__pair_receive_slot(struct afd__wire *wire, uint32_t slot)
{
	return afd__segment_receive_slot(&pair_of(wire)->end, slot);
}

int afd__pair_post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes)
{
	return wire->error ? afd__wire_failed(wire)
			   : afd__segment_post_send(&pair_of(wire)->end, slot, bytes);
}

int afd__pair_post_receive(struct afd__wire *wire, uint32_t slot)
{
	return wire->error ? afd__wire_failed(wire) : afd__segment_post_receive(&pair_of(wire)->end, slot);
}

int afd__pair_poll(struct afd__wire *wire, struct afd__completion *out, int max)
{
	return wire->error ? afd__wire_failed(wire)
			   : afd__wire_fail(wire, afd__segment_poll(&pair_of(wire)->end, out, max));
}

int afd__pair_ready(struct afd__wire *wire)
{
	return wire->error || afd__segment_ready(&pair_of(wire)->end);
}

int afd__pair_arm(struct afd__wire *wire)
{
	return wire->error || afd__segment_arm(&pair_of(wire)->end);
}

int afd__pair_event(struct afd__wire *wire, unsigned which, uint32_t events)
{
	/* Not made sticky here: what the peer had sent before it died is still to be polled. */
	switch (which) {
	case WHICH_SOCKET:
		return afd__socket_event(pair_of(wire)->socket);
	case WHICH_PIDFD:
		return afd__error(-ECONNRESET, "the peer's process is dead");
	default:
		return 0;
	}
}
