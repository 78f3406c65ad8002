/* SPDX-License-Identifier: Apache-2.0 */
/*
 * loop: both ends in one context. The name is an entry of the context's registry; the ends meet by
 * a socket pair, and the slots are plain memory of the context, freed by the end that leaves last.
 * Each end may be driven by its own thread.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pair.h"

enum { BACKLOG = 64, NAME_BYTES = 96 };

struct loop_pipe {
	_Atomic unsigned n_users;
	void *memory; /* the segment, from bind of the accepting end on */
	size_t bytes;
};

struct waiting { /* a connection that was not accepted yet */
	int socket, our_bell, peer_bell;
	struct loop_pipe *pipe;
};

struct loop_endpoint {
	struct loop_endpoint *next;
	char name[NAME_BYTES];
	int bell; /* eventfd: somebody waits */
	unsigned n_waiting;
	struct waiting waiting[BACKLOG];
};

static int loop_probe(struct afd_context *ctx)
{
	return 0;
}

static void release_pipe(struct afd_context *ctx, struct loop_pipe *pipe)
{
	if (!pipe || atomic_fetch_sub(&pipe->n_users, 1) > 1)
		return;
	afd__large_free(ctx, pipe->memory, pipe->bytes);
	afd__free(pipe);
}

static void drop_waiting(struct afd_context *ctx, struct waiting *waiting)
{
	close(waiting->socket);
	close(waiting->our_bell);
	close(waiting->peer_bell);
	release_pipe(ctx, waiting->pipe);
}

/* ---- the listener ---- */

static struct loop_endpoint *find_endpoint(struct afd__local *local, const char *name)
{
	struct loop_endpoint *endpoint = local->endpoints;

	while (endpoint && strcmp(endpoint->name, name))
		endpoint = endpoint->next;
	return endpoint;
}

static int publish(
	struct afd_context *ctx, struct afd__local *local, struct loop_endpoint *endpoint)
{
	int rc = 0;

	afd__local_lock(ctx, local);
	if (find_endpoint(local, endpoint->name)) {
		rc = afd__error(-EADDRINUSE, "loop:%s: somebody listens there in this context",
			endpoint->name);
	} else {
		endpoint->next = local->endpoints;
		local->endpoints = endpoint;
	}
	afd__local_unlock(ctx, local);
	return rc;
}

static int loop_listen(struct afd__listener *ln, const char *name)
{
	struct afd__local *local = afd__local_take(ln->ctx);
	struct loop_endpoint *endpoint = local ? afd__alloc(ln->ctx, 1, sizeof(*endpoint)) : NULL;
	int rc;

	if (!endpoint)
		return -ENOMEM;
	strncpy(endpoint->name, name, NAME_BYTES - 1);
	rc = afd__pair_bell(&endpoint->bell);
	if (rc)
		goto fail;
	rc = afd__socket_watch(ln->epoll_fd, endpoint->bell, EPOLLIN | EPOLLET, &ln->tag, 0);
	if (!rc)
		rc = publish(ln->ctx, local, endpoint);
	if (rc)
		goto fail_bell;
	ln->state = endpoint;
	return 0;
fail_bell:
	afd__socket_forget(ln->ctx, ln->epoll_fd, &endpoint->bell);
fail:
	afd__free(endpoint);
	return rc;
}

static void loop_unlisten(struct afd__listener *ln)
{
	struct afd__local *local = atomic_load(&ln->ctx->local);
	struct loop_endpoint *endpoint = ln->state, **link;

	afd__local_lock(ln->ctx, local);
	for (link = &local->endpoints; *link != endpoint;)
		link = &(*link)->next;
	*link = endpoint->next;
	afd__local_unlock(ln->ctx, local);
	for (unsigned i = 0; i < endpoint->n_waiting; i++)
		drop_waiting(ln->ctx, &endpoint->waiting[i]);
	afd__socket_forget(ln->ctx, ln->epoll_fd, &endpoint->bell);
	afd__free(endpoint);
	ln->state = NULL;
}

static int loop_accept(struct afd__listener *ln, struct afd__wire *wire)
{
	struct afd__local *local = atomic_load(&ln->ctx->local);
	struct loop_endpoint *endpoint = ln->state;
	struct waiting first = { .socket = -1 };
	struct pair *pair;
	int rc;

	afd__local_lock(ln->ctx, local);
	if (endpoint->n_waiting) {
		first = endpoint->waiting[0];
		memmove(endpoint->waiting, endpoint->waiting + 1,
			--endpoint->n_waiting * sizeof(first));
	}
	afd__local_unlock(ln->ctx, local);
	if (first.socket < 0)
		return 0;
	rc = afd__pair_open(wire, first.socket);
	if (rc) {
		close(first.our_bell);
		close(first.peer_bell);
		release_pipe(ln->ctx, first.pipe);
		return rc;
	}
	pair = pair_of(wire);
	pair->our_bell = first.our_bell;
	pair->peer_bell = first.peer_bell;
	pair->pipe = first.pipe;
	return 1;
}

/* ---- the connection ---- */

static int enqueue(struct afd_context *ctx, const char *name, const struct waiting *waiting)
{
	struct afd__local *local = atomic_load(&ctx->local);
	struct loop_endpoint *endpoint;
	int rc = 0;

	afd__local_lock(ctx, local);
	endpoint = find_endpoint(local, name);
	if (!endpoint)
		rc = afd__error(
			-ECONNREFUSED, "loop:%s: nobody listens there in this context", name);
	else if (endpoint->n_waiting == BACKLOG)
		rc = afd__error(
			-ECONNREFUSED, "loop:%s: %d connections wait there already", name, BACKLOG);
	if (!rc) {
		endpoint->waiting[endpoint->n_waiting++] = *waiting;
		eventfd_write(endpoint->bell, 1);
	}
	afd__local_unlock(ctx, local);
	return rc;
}

/* The other end's descriptors: its own copies, so that each end closes what it has. */
static int open_far_end(struct pair *pair, struct waiting *far)
{
	far->our_bell = fcntl(pair->peer_bell, F_DUPFD_CLOEXEC, 0);
	far->peer_bell = fcntl(pair->our_bell, F_DUPFD_CLOEXEC, 0);
	if (far->our_bell < 0 || far->peer_bell < 0)
		return afd__error(-EIO, "loop: descriptors: %s", strerror(errno));
	return 0;
}

static int connect_far_end(struct afd__wire *wire, const char *name, int far_socket)
{
	struct pair *pair = pair_of(wire);
	struct waiting far = { .socket = far_socket, .our_bell = -1, .peer_bell = -1 };
	int rc;

	rc = afd__pair_bell(&pair->our_bell);
	if (!rc)
		rc = afd__pair_bell(&pair->peer_bell);
	if (!rc)
		rc = open_far_end(pair, &far);
	if (rc)
		goto fail;
	rc = -ENOMEM;
	far.pipe = pair->pipe = afd__alloc(wire->ctx, 1, sizeof(*far.pipe));
	if (!far.pipe)
		goto fail;
	atomic_init(&far.pipe->n_users, 2);
	rc = enqueue(wire->ctx, name, &far);
	if (!rc)
		return 1;
	release_pipe(wire->ctx, far.pipe);
fail:
	if (far.our_bell >= 0)
		close(far.our_bell);
	if (far.peer_bell >= 0)
		close(far.peer_bell);
	close(far_socket);
	return rc;
}

static void loop_close(struct afd__wire *wire)
{
	struct loop_pipe *pipe = pair_of(wire)->pipe;

	afd__pair_free(wire);
	release_pipe(wire->ctx, pipe);
}

static int loop_connect(struct afd__wire *wire, const char *name)
{
	int sockets[2], rc;

	if (!afd__local_take(wire->ctx))
		return -ENOMEM;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sockets))
		return afd__error(-EIO, "loop:%s: socketpair: %s", name, strerror(errno));
	rc = afd__pair_open(wire, sockets[0]);
	if (rc) {
		close(sockets[1]);
		return rc;
	}
	rc = connect_far_end(wire, name, sockets[1]);
	if (rc < 0)
		loop_close(wire);
	return rc;
}

static int bind_accepting(struct afd__wire *wire, const struct afd__wire_slots *geometry)
{
	struct pair *pair = pair_of(wire);
	size_t bytes;
	int rc = afd__segment_bytes(geometry, &bytes);

	if (rc)
		return rc;
	pair->pipe->memory = afd__large_alloc(wire->ctx, bytes, 4096, "slots of a loop: link");
	if (!pair->pipe->memory)
		return -ENOMEM;
	pair->pipe->bytes = bytes;
	memset(pair->pipe->memory, 0, afd__segment_head_bytes());
	/* Also orders the memory before what the other end does with it. */
	rc = afd__socket_send(pair->socket, "bound", 5);
	return rc ? rc : afd__error(-EPROTO, "loop: the peer does not read its socket");
}

static int loop_bind(struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting)
{
	struct pair *pair = pair_of(wire);
	char message[8];
	size_t bytes;
	int rc;

	rc = accepting ? bind_accepting(wire, geometry)
		       : afd__socket_receive(pair->socket, message, sizeof(message), &bytes);
	if (rc != 1)
		return rc;
	rc = afd__pair_watch(wire, 0);
	if (rc)
		return rc;
	wire->geometry = *geometry;
	afd__segment_attach(&pair->end, pair->pipe->memory, geometry, accepting, pair->peer_bell);
	return 1;
}

static void *loop_memory(struct afd__wire *wire, size_t *bytes)
{
	*bytes = pair_of(wire)->pipe->bytes;
	return pair_of(wire)->pipe->memory;
}

const struct afd__transport_ops afd__transport_loop = {
	.scheme = "loop",
	.probe = loop_probe,
	.listen = loop_listen,
	.unlisten = loop_unlisten,
	.accept = loop_accept,
	.connect = loop_connect,
	.hello_send = afd__pair_hello_send,
	.hello_receive = afd__pair_hello_receive,
	.bind = loop_bind,
	.send_slot = afd__pair_send_slot,
	.receive_slot = afd__pair_receive_slot,
	.memory = loop_memory,
	.post_send = afd__pair_post_send,
	.post_receive = afd__pair_post_receive,
	.poll = afd__pair_poll,
	.ready = afd__pair_ready,
	.arm = afd__pair_arm,
	.event = afd__pair_event,
	.shut = afd__pair_shut,
	.close = loop_close,
};
