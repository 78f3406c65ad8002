/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tcp: between hosts. How the ends meet: "HOST:PORT", where HOST is a name, an IPv4 address or an
 * IPv6 address in brackets, and PORT 0 takes a free one. One connection is one link.
 *
 * Numbers and names of /etc/hosts are found at once; a name that has to be asked for may take as
 * long as the system's resolver does, when the transport is created (listen) or polled (connect).
 */
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <arpa/inet.h>

#include "socket.h"
#include "secret.h"
#include "tcp.h"

enum { BACKLOG = 1024, HOST_MAX = 64, PORT_MAX = 65535 };
/* A peer whose machine is gone says nothing for ever; after about two minutes the kernel does. */
enum { KEEPALIVE_IDLE_S = 60, KEEPALIVE_EVERY_S = 10, KEEPALIVE_COUNT = 6, UNACKED_MS = 120000 };

struct place {
	char host[HOST_MAX + 1];
	char port[6];
	bool bracketed;
};

/* ---- names ---- */

static int bad_name(const char *text, const char *why)
{
	return afd__error(-EINVAL, "address \"%.100s\": %s", text, why);
}

/* HOST:PORT or [HOST]:PORT. */
static int split_name(struct place *place, const char *text, const char *name)
{
	const char *host = name, *end, *port;
	char *rest;
	unsigned long number;

	place->bracketed = *name == '[';
	host += place->bracketed;
	end = place->bracketed ? strchr(host, ']') : strchr(host, ':');
	if (!end || end == host || (place->bracketed && end[1] != ':'))
		return bad_name(text, "must be tcp:HOST:PORT or tcp:[IPV6]:PORT");
	if (end - host > HOST_MAX)
		return afd__error(-EINVAL,
			"address \"%.100s\": the host has %zu characters, limit %d", text,
			(size_t)(end - host), HOST_MAX);
	port = end + 1 + place->bracketed;
	if (!place->bracketed && strchr(port, ':'))
		return bad_name(text, "an IPv6 address stands in brackets");
	errno = 0;
	number = strtoul(port, &rest, 10);
	if (*port < '0' || *port > '9' || *rest || errno || number > PORT_MAX)
		return afd__error(-EINVAL, "address \"%.100s\": port \"%.10s\", limit 0 to %d",
			text, port, PORT_MAX);
	snprintf(place->host, sizeof(place->host), "%.*s", (int)(end - host), host);
	snprintf(place->port, sizeof(place->port), "%lu", number);
	return 0;
}

static int tcp_check_name(const char *text, const char *name, bool to_listen)
{
	struct place place;
	size_t at = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
				 ":[]%");

	if (name[at])
		return afd__error(-EINVAL,
			"address \"%.100s\": character %zu of the name is none of "
			"[A-Za-z0-9._:%%-] and brackets",
			text, at + 1);
	if (split_name(&place, text, name))
		return -EINVAL;
	return to_listen || strcmp(place.port, "0")
		       ? 0
		       : bad_name(text, "port 0 is a free one, for listening only");
}

/* Rank i of a group on one host: the i-th port after that of rank 0. */
static int tcp_rank_name(char *out, size_t capacity, const char *name, uint32_t rank)
{
	struct place place;
	unsigned port;
	int rc = split_name(&place, name, name);

	if (rc)
		return rc;
	port = (unsigned)atoi(place.port);
	if (!port || port + rank > PORT_MAX)
		return afd__error(-EINVAL, "group tcp:%.80s: rank %u needs port %u, limit 1 to %d",
			name, rank, port + rank, PORT_MAX);
	snprintf(out, capacity, "%s%s%s:%u", place.bracketed ? "[" : "", place.host,
		place.bracketed ? "]" : "", port + rank);
	return 0;
}

/* Fills addresses[0 .. *n_addresses-1]. -EAGAIN: the resolver cannot say now. */
static int resolve(struct tcp_address *addresses, uint32_t *n_addresses, const char *name,
	bool to_listen)
{
	struct addrinfo hints = { .ai_family = AF_UNSPEC,
		.ai_socktype = SOCK_STREAM,
		.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | (to_listen ? AI_PASSIVE : 0) };
	struct addrinfo *found = NULL;
	struct place place;
	uint32_t n = 0;
	int rc = split_name(&place, name, name);

	if (rc)
		return rc;
	rc = getaddrinfo(place.host, place.port, &hints, &found);
	if (rc == EAI_NONAME) {
		hints.ai_flags &= ~AI_NUMERICHOST;
		rc = getaddrinfo(place.host, place.port, &hints, &found);
	}
	if (rc)
		return afd__error(rc == EAI_AGAIN ? -EAGAIN : rc == EAI_MEMORY ? -ENOMEM : -EINVAL,
			"tcp:%.80s: host %s: %s", name, place.host, gai_strerror(rc));
	for (struct addrinfo *at = found; at && n < TCP_ADDRESSES_MAX; at = at->ai_next) {
		memcpy(&addresses[n].storage, at->ai_addr, at->ai_addrlen);
		addresses[n++].bytes = at->ai_addrlen;
	}
	freeaddrinfo(found);
	*n_addresses = n;
	return 0;
}

static void write_address(char *out, size_t capacity, const struct sockaddr_storage *address)
{
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)address;
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;
	char host[INET6_ADDRSTRLEN] = "?";

	if (address->ss_family == AF_INET6) {
		inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof(host));
		snprintf(out, capacity, "[%s]:%u", host, ntohs(v6->sin6_port));
	} else {
		inet_ntop(AF_INET, &v4->sin_addr, host, sizeof(host));
		snprintf(out, capacity, "%s:%u", host, ntohs(v4->sin_port));
	}
}

/* Who has one IPv6 address has its /64, but for those of a link, which share it. */
static uint64_t source_of(const struct sockaddr_storage *address)
{
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)address;
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)address;
	uint64_t source = v4->sin_addr.s_addr;

	if (address->ss_family == AF_INET6)
		memcpy(&source, &v6->sin6_addr.s6_addr[IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr) ? 8 : 0],
			sizeof(source));
	return source;
}

/* ---- sockets ---- */

static int tcp_probe(struct afd_context *ctx)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 && errno == EAFNOSUPPORT)
		fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return afd__error(errno == EAFNOSUPPORT ? -ENODEV : -EIO, "tcp: socket: %s",
			strerror(errno));
	close(fd);
	return 0;
}

static void set(int fd, int level, int option, int value)
{
	/* What an old kernel does not know only makes it slower to notice. */
	(void)setsockopt(fd, level, option, &value, sizeof(value));
}

static void set_up(const struct afd_context *ctx, int fd)
{
	set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	/* After a short cut of the line the next try comes soon. */
	set(fd, IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1);
	set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
	set(fd, IPPROTO_TCP, TCP_KEEPIDLE, KEEPALIVE_IDLE_S);
	set(fd, IPPROTO_TCP, TCP_KEEPINTVL, KEEPALIVE_EVERY_S);
	set(fd, IPPROTO_TCP, TCP_KEEPCNT, KEEPALIVE_COUNT);
	set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, UNACKED_MS);
	if (ctx->test_socket_bytes) {
		set(fd, SOL_SOCKET, SO_SNDBUF, ctx->test_socket_bytes);
		set(fd, SOL_SOCKET, SO_RCVBUF, ctx->test_socket_bytes);
	}
}

/* ---- the listener ---- */

static int listen_at(struct afd__listener *ln, const struct tcp_address *address, int *out)
{
	int fd = socket(address->storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int rc;

	if (fd < 0)
		return afd__error(-EIO, "%s: socket: %s", ln->address, strerror(errno));
	set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
	/* Listens at what it was told, and no more. */
	if (address->storage.ss_family == AF_INET6)
		set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	if (bind(fd, (const struct sockaddr *)&address->storage, address->bytes) ||
		listen(fd, BACKLOG)) {
		rc = errno == EADDRINUSE
			     ? afd__error(-EADDRINUSE, "%s: somebody listens there", ln->address)
		     : errno == EACCES
			     ? afd__error(-EACCES, "%s: bind: %s", ln->address, strerror(errno))
			     : afd__error(errno == EADDRNOTAVAIL ? -EINVAL : -EIO, "%s: bind: %s",
				       ln->address, strerror(errno));
		goto fail;
	}
	rc = afd__socket_watch(ln->epoll_fd, fd, EPOLLIN | EPOLLET, &ln->tag, 0);
	if (rc)
		goto fail;
	*out = fd;
	return 0;
fail:
	close(fd);
	return rc;
}

/* The port that 0 became; the host stays as it was given. */
static void state_port(struct afd__listener *ln, int fd, const char *name)
{
	struct sockaddr_storage real;
	socklen_t bytes = sizeof(real);
	struct place place;

	if (split_name(&place, name, name) || strcmp(place.port, "0") ||
		getsockname(fd, (struct sockaddr *)&real, &bytes))
		return;
	snprintf(ln->address, sizeof(ln->address), "tcp:%s%s%s:%u", place.bracketed ? "[" : "",
		place.host, place.bracketed ? "]" : "",
		ntohs(real.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&real)->sin6_port
						 : ((struct sockaddr_in *)&real)->sin_port));
}

static int tcp_listen(struct afd__listener *ln, const char *name)
{
	struct tcp_address addresses[TCP_ADDRESSES_MAX];
	uint32_t n_addresses;
	int rc = resolve(addresses, &n_addresses, name, true), *fd;

	if (rc)
		return rc == -EAGAIN ? -EINVAL : rc;
	fd = afd__alloc(ln->ctx, 1, sizeof(*fd));
	if (!fd)
		return -ENOMEM;
	/* A name of several addresses is listened at in the first, which is what connecting tries
	 * first. */
	rc = listen_at(ln, &addresses[0], fd);
	if (rc) {
		afd__free(fd);
		return rc;
	}
	state_port(ln, *fd, name);
	ln->state = fd;
	return 0;
}

static void tcp_unlisten(struct afd__listener *ln)
{
	afd__socket_forget(ln->ctx, ln->epoll_fd, ln->state);
	afd__free(ln->state);
	ln->state = NULL;
}

/* Takes the descriptor in any case. */
static int watch(struct afd__wire *wire, int fd)
{
	struct tcp *t = tcp_of(wire);
	int rc;

	set_up(wire->ctx, fd);
	rc = afd__socket_watch(wire->epoll_fd, fd,
		EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, wire->tag, 0);
	if (rc)
		close(fd);
	else
		t->fd = fd;
	return rc;
}

static int tcp_open(struct afd__wire *wire)
{
	struct tcp *t = afd__alloc(wire->ctx, 1, sizeof(*t));

	if (!t)
		return -ENOMEM;
	t->fd = -1;
	t->readable = true;
	wire->state = t;
	return 0;
}

static void tcp_free(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);

	if (t->tls)
		wire->secret->ops->tls_close(t->tls);
	if (t->memory)
		afd__large_free(wire->ctx, t->memory, t->memory_bytes);
	afd__free(t);
	wire->state = NULL;
}

static void forget_socket(struct afd__wire *wire)
{
	afd__socket_forget(wire->ctx, wire->epoll_fd, &tcp_of(wire)->fd);
}

static int encrypt(struct afd__wire *wire, int accepting)
{
	struct tcp *t = tcp_of(wire);

	if (!wire->secret)
		return 0;
	if (wire->secret->ops->tls_open(
		    &t->tls, wire->secret->tls_config, t->fd, accepting))
		return afd__error(-ENOMEM, "tls: no memory for a session");
	return 0;
}

static int tcp_accept(struct afd__listener *ln, struct afd__wire *wire)
{
	struct sockaddr_storage from;
	socklen_t bytes = sizeof(from);
	int fd = accept4(*(int *)ln->state, (struct sockaddr *)&from, &bytes,
		SOCK_CLOEXEC | SOCK_NONBLOCK), rc;

	if (fd < 0) {
		if (errno == EAGAIN || errno == EINTR)
			return 0;
		if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM)
			return afd__error(-EIO, "accept: %s", strerror(errno));
		return afd__error(-EACCES, "a peer left before it was accepted: %s",
			strerror(errno));
	}
	rc = tcp_open(wire);
	if (rc) {
		close(fd);
		return rc;
	}
	rc = watch(wire, fd);
	if (!rc)
		rc = encrypt(wire, 1);
	if (rc) {
		forget_socket(wire);
		tcp_free(wire);
		return rc;
	}
	write_address(wire->peer, sizeof(wire->peer), &from);
	wire->source = source_of(&from);
	return 1;
}

/* ---- the connection ---- */

/* 1 connected, 0 under way, -1: not this address; errno says why. */
static int try_address(struct afd__wire *wire, const struct tcp_address *address)
{
	struct tcp *t = tcp_of(wire);
	int fd = socket(address->storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	if (fd < 0 || watch(wire, fd))
		return -1;
	if (!connect(fd, (const struct sockaddr *)&address->storage, address->bytes))
		return 1;
	t->connecting = true;
	return errno == EINPROGRESS || errno == EINTR ? 0 : -1;
}

/* 1 connected, 0 under way, -1: errno says why it failed. */
static int look_at(const struct tcp *t)
{
	struct pollfd one = { .fd = t->fd, .events = POLLOUT };
	socklen_t bytes = sizeof(errno);
	int error = 0;

	if (poll(&one, 1, 0) <= 0)
		return 0;
	if (getsockopt(t->fd, SOL_SOCKET, SO_ERROR, &error, &bytes) || error) {
		errno = error ? error : errno;
		return -1;
	}
	return 1;
}

/* One that connects to itself: nobody listens, and the port was its own by chance. */
static bool is_own_end(int fd)
{
	struct sockaddr_storage ours = { 0 }, theirs = { 0 };
	socklen_t ours_bytes = sizeof(ours), theirs_bytes = sizeof(theirs);

	return !getsockname(fd, (struct sockaddr *)&ours, &ours_bytes) &&
	       !getpeername(fd, (struct sockaddr *)&theirs, &theirs_bytes) &&
	       ours_bytes == theirs_bytes && !memcmp(&ours, &theirs, ours_bytes);
}

static int connect_error(const char *name, int error)
{
	switch (error) {
	case ECONNREFUSED:
		return afd__error(-ECONNREFUSED, "tcp:%s: nobody listens there", name);
	case EACCES:
	case EPERM:
		return afd__error(-EACCES, "tcp:%s: connect: %s", name, strerror(error));
	default:
		/* A route or a machine that is not there yet may come. */
		return afd__error(-ECONNREFUSED, "tcp:%s: connect: %s", name, strerror(error));
	}
}

static int connect_next(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);
	int rc = -1;

	errno = ECONNREFUSED;
	if (t->connecting)
		rc = look_at(t);
	if (rc == 1 && is_own_end(t->fd)) {
		errno = ECONNREFUSED;
		rc = -1;
	}
	while (rc < 0 && t->next_address < t->n_addresses) {
		forget_socket(wire);
		rc = try_address(wire, &t->addresses[t->next_address++]);
	}
	if (rc == 1)
		t->connecting = false;
	return rc;
}

static int tcp_connect(struct afd__wire *wire, const char *name)
{
	int rc = 0;

	if (!wire->state) {
		rc = tcp_open(wire);
		if (rc)
			return rc;
		rc = resolve(tcp_of(wire)->addresses, &tcp_of(wire)->n_addresses, name, false);
	}
	/* The resolver may know it later. */
	if (rc == -EAGAIN)
		rc = -ECONNREFUSED;
	if (!rc) {
		rc = connect_next(wire);
		if (!rc)
			return 0;
		rc = rc == 1 ? encrypt(wire, 0) : connect_error(name, errno);
	}
	if (!rc)
		return 1;
	forget_socket(wire);
	tcp_free(wire);
	return rc;
}

/* What the peer has sent and we have not read would make the kernel forget what we have sent: the
 * goodbye. */
static void drain(int fd)
{
	char bytes[4096];

	for (int i = 0; i < 256 && recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0; i++)
		;
}

static void tcp_shut(struct afd__wire *wire)
{
	struct tcp *t = tcp_of(wire);

	/* A child that holds the socket would hide its end from the peer. */
	if (t->fd >= 0 && !afd__forked(wire->ctx)) {
		shutdown(t->fd, SHUT_WR);
		drain(t->fd);
	}
	forget_socket(wire);
	if (!wire->error)
		wire->error = -ECONNRESET;
}

static void tcp_close(struct afd__wire *wire)
{
	tcp_shut(wire);
	tcp_free(wire);
}

static void *tcp_memory(struct afd__wire *wire, size_t *bytes)
{
	*bytes = tcp_of(wire)->memory_bytes;
	return tcp_of(wire)->memory;
}

const struct afd__transport_ops afd__transport_tcp = {
	.scheme = "tcp",
	.check_name = tcp_check_name,
	.rank_name = tcp_rank_name,
	.probe = tcp_probe,
	.listen = tcp_listen,
	.unlisten = tcp_unlisten,
	.accept = tcp_accept,
	.connect = tcp_connect,
	.hello_send = afd__stream_hello_send,
	.hello_receive = afd__stream_hello_receive,
	.bind = afd__stream_bind,
	.send_slot = afd__stream_send_slot,
	.receive_slot = afd__stream_receive_slot,
	.memory = tcp_memory,
	.post_send = afd__stream_post_send,
	.post_receive = afd__stream_post_receive,
	.poll = afd__stream_poll,
	.ready = afd__stream_ready,
	.arm = afd__stream_arm,
	.event = afd__stream_event,
	.shut = tcp_shut,
	.close = tcp_close,
};
