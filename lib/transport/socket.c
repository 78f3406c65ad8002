/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One message is one packet, so nothing is ever cut or joined. Descriptors that were not asked for
 * are closed by the kernel (no control buffer) or here (the wrong number of them).
 */
#include "socket.h"

#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int socket_error(const char *what)
{
	switch (errno) {
	case EAGAIN:
	case EINTR:
		return 0;
	case EPIPE:
	case ECONNRESET:
	case ENOTCONN:
		return afd__error(-ECONNRESET, "the peer is gone");
	default:
		return afd__error(-EIO, "%s: %s", what, strerror(errno));
	}
}

int afd__socket_send_fds(int fd, const void *message, size_t bytes, const int *fds, int n_fds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(SOCKET_FDS_MAX * sizeof(int))];
	} control = { .bytes = { 0 } };
	struct iovec part = { .iov_base = (void *)message, .iov_len = bytes };
	struct msghdr msg = { .msg_iov = &part, .msg_iovlen = 1 };
	struct cmsghdr *head;

	if (n_fds) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE((size_t)n_fds * sizeof(int));
		head = CMSG_FIRSTHDR(&msg);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN((size_t)n_fds * sizeof(int));
		memcpy(CMSG_DATA(head), fds, (size_t)n_fds * sizeof(int));
	}
	return sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? socket_error("send") : 1;
}

int afd__socket_send(int fd, const void *message, size_t bytes)
{
	return afd__socket_send_fds(fd, message, bytes, NULL, 0);
}

static int receive(int fd, struct msghdr *msg, size_t capacity, size_t *bytes)
{
	ssize_t n = recvmsg(fd, msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	/* A peer that closed with our messages unread is told of before what it had sent, once. */
	if (n < 0 && errno == ECONNRESET)
		n = recvmsg(fd, msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (n < 0)
		return socket_error("receive");
	if (!n)
		return afd__error(-ECONNRESET, "the peer is gone");
	*bytes = (size_t)n;
	return 1;
}

int afd__socket_receive(int fd, void *message, size_t capacity, size_t *bytes)
{
	struct iovec part = { .iov_base = message, .iov_len = capacity };
	struct msghdr msg = { .msg_iov = &part, .msg_iovlen = 1 };
	int rc = receive(fd, &msg, capacity, bytes);

	if (rc == 1 && (msg.msg_flags & MSG_TRUNC))
		return afd__error(-EPROTO, "a message of more than %zu bytes came", capacity);
	return rc;
}

/* Takes all descriptors out of the message; those beyond max are closed. Returns how many came. */
static int take_fds(struct msghdr *msg, int *fds, int max)
{
	int n = 0, fd;

	for (struct cmsghdr *head = CMSG_FIRSTHDR(msg); head; head = CMSG_NXTHDR(msg, head)) {
		if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < (head->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++) {
			memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
			if (n < max)
				fds[n] = fd;
			else
				close(fd);
			n++;
		}
	}
	return n;
}

int afd__socket_receive_fds(
	int fd, void *message, size_t capacity, size_t *bytes, int *fds, int n_fds)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(SOCKET_FDS_MAX * sizeof(int))];
	} control;
	struct iovec part = { .iov_base = message, .iov_len = capacity };
	struct msghdr msg = { .msg_iov = &part,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes) };
	int rc = receive(fd, &msg, capacity, bytes), came;

	if (rc != 1)
		return rc;
	came = take_fds(&msg, fds, n_fds);
	if (came == n_fds && !(msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return 1;
	for (int i = 0; i < came && i < n_fds; i++)
		close(fds[i]);
	/* The peer did send more: the kernel found no place for them here. */
	if (came < n_fds && msg.msg_flags & MSG_CTRUNC)
		return afd__error(-EIO,
			"%d of %d descriptors of the peer came: too many open files here", came,
			n_fds);
	return afd__error(-EPROTO, "a message of %zu bytes with %d descriptors came, must have %d",
		*bytes, came, n_fds);
}

int afd__socket_event(int fd)
{
	char byte;
	ssize_t n = recv(fd, &byte, 1, MSG_DONTWAIT);

	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	if (n > 0)
		return afd__error(
			-EPROTO, "the peer sent a message of the handshake after its end");
	return afd__error(-ECONNRESET, "the peer is gone");
}

int afd__socket_watch(int epoll_fd, int fd, uint32_t events, struct afd__tag *tag, unsigned which)
{
	struct epoll_event event = { .events = events, .data.ptr = (char *)tag + which };

	if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event))
		return afd__error(
			-EIO, "epoll: descriptor %d cannot be added: %s", fd, strerror(errno));
	return 0;
}

void afd__socket_forget(const struct afd_context *ctx, int epoll_fd, int *fd)
{
	if (*fd < 0)
		return;
	/* Closing is not enough: a child of fork may hold the descriptor, and its events would
	 * still come to us. */
	if (!afd__forked(ctx))
		epoll_ctl(epoll_fd, EPOLL_CTL_DEL, *fd, NULL);
	close(*fd);
	*fd = -1;
}

int afd__wire_fail(struct afd__wire *wire, int rc)
{
	if (rc < 0 && rc != -EAGAIN && !wire->error)
		wire->error = rc;
	return rc;
}

int afd__wire_failed(const struct afd__wire *wire)
{
	return afd__error(wire->error, "the link has failed before");
}
