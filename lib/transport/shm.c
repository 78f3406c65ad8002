/* SPDX-License-Identifier: Apache-2.0 */
/*
 * shm: between processes of one user on one host. The ends meet at an abstract socket (no file; the
 * name is free the moment its last descriptor is gone); the accepting end makes the memory and
 * hands it over with two doorbells. The memory is a memfd, so nothing is left behind however a
 * process ends, and sealed, so that no peer can shrink it under us.
 */
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "pair.h"

enum { BACKLOG = 128, SEALS = F_SEAL_SHRINK | F_SEAL_GROW };

struct attach { /* goes with the descriptors: memory, the connecting end's bell, the accepting end's
		   bell */
	char magic[8];
	uint64_t bytes;
};
static const char attach_magic[8] = "AFDSHM1";

static int shm_probe(struct afd_context *ctx)
{
	int fd = memfd_create("afd-probe", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		return afd__error(
			errno == ENOSYS ? -ENODEV : -EIO, "shm: memfd_create: %s", strerror(errno));
	close(fd);
	return 0;
}

/* The name holds the user, so that users do not collide; that the peer is this user is checked by
 * its credentials. */
static socklen_t socket_name(struct sockaddr_un *sun, const char *name)
{
	int bytes;

	memset(sun, 0, sizeof(*sun));
	sun->sun_family = AF_UNIX;
	bytes = snprintf(sun->sun_path + 1, sizeof(sun->sun_path) - 1, "afd-%u-%s",
		(unsigned)geteuid(), name);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)bytes);
}

static int open_socket(int *out)
{
	*out = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	return *out < 0 ? afd__error(-EIO, "shm: socket: %s", strerror(errno)) : 0;
}

static int check_user(int fd, pid_t *pid)
{
	struct ucred peer;
	socklen_t bytes = sizeof(peer);

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes))
		return afd__error(-EIO, "shm: SO_PEERCRED: %s", strerror(errno));
	if (peer.uid != geteuid())
		return afd__error(-EACCES, "the peer is of user %u, we are of user %u",
			(unsigned)peer.uid, (unsigned)geteuid());
	*pid = peer.pid;
	return 0;
}

/* ---- the listener ---- */

static int shm_listen(struct afd__listener *ln, const char *name)
{
	struct sockaddr_un sun;
	socklen_t sun_bytes = socket_name(&sun, name);
	int *fd = afd__alloc(ln->ctx, 1, sizeof(*fd));
	int rc;

	if (!fd)
		return -ENOMEM;
	rc = open_socket(fd);
	if (rc)
		goto fail;
	if (bind(*fd, (struct sockaddr *)&sun, sun_bytes) || listen(*fd, BACKLOG)) {
		rc = errno == EADDRINUSE
			     ? afd__error(-EADDRINUSE, "shm:%s: somebody listens there", name)
			     : afd__error(-EIO, "shm:%s: bind: %s", name, strerror(errno));
		goto fail_socket;
	}
	rc = afd__socket_watch(ln->epoll_fd, *fd, EPOLLIN | EPOLLET, &ln->tag, 0);
	if (rc)
		goto fail_socket;
	ln->state = fd;
	return 0;
fail_socket:
	close(*fd);
fail:
	afd__free(fd);
	return rc;
}

static void shm_unlisten(struct afd__listener *ln)
{
	afd__socket_forget(ln->ctx, ln->epoll_fd, ln->state);
	afd__free(ln->state);
	ln->state = NULL;
}

static int shm_accept(struct afd__listener *ln, struct afd__wire *wire)
{
	int fd = accept4(*(int *)ln->state, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), rc;
	pid_t pid;

	if (fd < 0) {
		if (errno == EAGAIN || errno == EINTR)
			return 0;
		if (errno == ECONNABORTED)
			return afd__error(-EACCES, "a peer left before it was accepted");
		return afd__error(-EIO, "accept: %s", strerror(errno));
	}
	rc = check_user(fd, &pid);
	if (rc) {
		close(fd);
		return rc;
	}
	rc = afd__pair_open(wire, fd);
	return rc ? rc : 1;
}

/* ---- the connection ---- */

static int shm_connect(struct afd__wire *wire, const char *name)
{
	struct sockaddr_un sun;
	socklen_t sun_bytes = socket_name(&sun, name);
	pid_t pid;
	int fd, rc;

	rc = open_socket(&fd);
	if (rc)
		return rc;
	if (connect(fd, (struct sockaddr *)&sun, sun_bytes)) {
		/* EAGAIN: so many wait there that no more may; like nobody, it is tried again. */
		rc = errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR
			     ? afd__error(-ECONNREFUSED, "shm:%s: %s", name,
				       errno == ECONNREFUSED ? "nobody listens there"
							     : "it is busy")
			     : afd__error(-EIO, "shm:%s: connect: %s", name, strerror(errno));
		goto fail;
	}
	rc = check_user(fd, &pid);
	if (rc)
		goto fail;
	rc = afd__pair_open(wire, fd);
	return rc ? rc : 1;
fail:
	close(fd);
	return rc;
}

static int make_memory(size_t bytes, int *out)
{
	int fd = memfd_create("afd-slots", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		return afd__error(-EIO, "shm: memfd_create: %s", strerror(errno));
	if (ftruncate(fd, (off_t)bytes) || fcntl(fd, F_ADD_SEALS, SEALS | F_SEAL_SEAL)) {
		int rc = afd__error(-ENOMEM, "shm: %zu bytes of slots: %s", bytes, strerror(errno));

		close(fd);
		return rc;
	}
	*out = fd;
	return 0;
}

/* Memory that can shrink would let the peer raise our SIGBUS; memory that is too small would too.
 */
static int check_memory(int fd, size_t bytes)
{
	struct stat st;
	int seals = fcntl(fd, F_GET_SEALS);

	if (seals < 0 || (seals & SEALS) != SEALS)
		return afd__error(-EPROTO, "shm: the peer's memory has seals 0x%x, must have 0x%x",
			(unsigned)seals, SEALS);
	if (fstat(fd, &st) || st.st_size < 0 || (size_t)st.st_size != bytes)
		return afd__error(-EPROTO, "shm: the peer's memory has %lld bytes, must have %zu",
			(long long)st.st_size, bytes);
	return 0;
}

static int attach_segment(
	struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting)
{
	struct pair *pair = pair_of(wire);
	pid_t pid = 0;
	int rc = check_user(pair->socket, &pid);

	if (!rc)
		rc = afd__pair_watch(wire, pid);
	if (rc)
		return rc;
	wire->geometry = *geometry;
	afd__segment_attach(
		&pair->end, pair->mapping->memory, geometry, accepting, pair->peer_bell);
	return 1;
}

static int bind_accepting(
	struct afd__wire *wire, const struct afd__wire_slots *geometry, size_t bytes)
{
	struct attach attach = { .bytes = bytes };
	struct pair *pair = pair_of(wire);
	int memory = -1, fds[SOCKET_FDS_MAX], rc;

	rc = make_memory(bytes, &memory);
	if (rc)
		return rc;
	rc = afd__local_map(wire->ctx, memory, bytes, &pair->mapping);
	if (!rc)
		rc = afd__pair_bell(&pair->our_bell);
	if (!rc)
		rc = afd__pair_bell(&pair->peer_bell);
	if (!rc) {
		memcpy(attach.magic, attach_magic, sizeof(attach.magic));
		fds[0] = memory;
		fds[1] = pair->peer_bell;
		fds[2] = pair->our_bell;
		rc = afd__socket_send_fds(
			pair->socket, &attach, sizeof(attach), fds, SOCKET_FDS_MAX);
		/* The handshake's messages are few and small: a full socket is a peer that does not
		 * read. */
		if (!rc)
			rc = afd__error(-EPROTO, "shm: the peer does not read its socket");
	}
	close(memory);
	return rc < 0 ? rc : attach_segment(wire, geometry, 1);
}

static int bind_connecting(
	struct afd__wire *wire, const struct afd__wire_slots *geometry, size_t bytes)
{
	struct pair *pair = pair_of(wire);
	int fds[SOCKET_FDS_MAX], rc;
	struct attach attach;
	size_t came;

	rc = afd__socket_receive_fds(
		pair->socket, &attach, sizeof(attach), &came, fds, SOCKET_FDS_MAX);
	if (rc != 1)
		return rc;
	pair->our_bell = fds[1];
	pair->peer_bell = fds[2];
	if (came != sizeof(attach) || memcmp(attach.magic, attach_magic, sizeof(attach.magic)) ||
		attach.bytes != bytes)
		rc = afd__error(-EPROTO, "shm: the peer attaches %llu bytes of slots, must be %zu",
			(unsigned long long)(came == sizeof(attach) ? attach.bytes : 0), bytes);
	else
		rc = check_memory(fds[0], bytes);
	if (!rc)
		rc = afd__local_map(wire->ctx, fds[0], bytes, &pair->mapping);
	close(fds[0]);
	return rc < 0 ? rc : attach_segment(wire, geometry, 0);
}

static int shm_bind(struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting)
{
	size_t bytes;
	int rc = afd__segment_bytes(geometry, &bytes);

	if (rc)
		return rc;
	return accepting ? bind_accepting(wire, geometry, bytes)
			 : bind_connecting(wire, geometry, bytes);
}

static void shm_close(struct afd__wire *wire)
{
	struct local_mapping *mapping = pair_of(wire)->mapping;

	afd__pair_free(wire);
	afd__local_unmap(wire->ctx, mapping);
}

static void *shm_memory(struct afd__wire *wire, size_t *bytes)
{
	*bytes = pair_of(wire)->mapping->bytes;
	return pair_of(wire)->mapping->memory;
}

const struct afd__transport_ops afd__transport_shm = {
	.scheme = "shm",
	.probe = shm_probe,
	.listen = shm_listen,
	.unlisten = shm_unlisten,
	.accept = shm_accept,
	.connect = shm_connect,
	.hello_send = afd__pair_hello_send,
	.hello_receive = afd__pair_hello_receive,
	.bind = shm_bind,
	.send_slot = afd__pair_send_slot,
	.receive_slot = afd__pair_receive_slot,
	.memory = shm_memory,
	.post_send = afd__pair_post_send,
	.post_receive = afd__pair_post_receive,
	.poll = afd__pair_poll,
	.ready = afd__pair_ready,
	.arm = afd__pair_arm,
	.event = afd__pair_event,
	.shut = afd__pair_shut,
	.close = shm_close,
};
