/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Small messages over SOCK_SEQPACKET sockets of one host, and the descriptors that may come with
 * them. Used by loop: and shm: for the handshake, and as what tells a peer's death. Nothing blocks,
 * nothing raises SIGPIPE.
 */
#ifndef AFD_LIB_TRANSPORT_SOCKET_H
#define AFD_LIB_TRANSPORT_SOCKET_H

#include "ops.h"

#define SOCKET_FDS_MAX 3

/* 1 done, 0 not now, -ECONNRESET the peer is gone, -EIO. */
int afd__socket_send(int fd, const void *message, size_t bytes);
/* 1: *bytes came. A message longer than capacity is -EPROTO. */
int afd__socket_receive(int fd, void *message, size_t capacity, size_t *bytes);

int afd__socket_send_fds(int fd, const void *message, size_t bytes, const int *fds, int n_fds);
/* 1: exactly n_fds descriptors came, close-on-exec, and are the caller's. On an error none is left
 * open. */
int afd__socket_receive_fds(
	int fd, void *message, size_t capacity, size_t *bytes, int *fds, int n_fds);

/* What an event on the socket of a bound link means: nothing is sent on it any more, so it can only
 * be the end. */
int afd__socket_event(int fd);

int afd__socket_watch(int epoll_fd, int fd, uint32_t events, struct afd__tag *tag, unsigned which);
/* Removes and closes, -1 is fine. In a child of fork the epoll set is the parent's too, so it only
 * closes. */
void afd__socket_forget(const struct afd_context *ctx, int epoll_fd, int *fd);

#endif
