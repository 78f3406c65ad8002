/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A server in a thread and clients that are plain hosts, over the backend that the first argument
 * names: "loop", "shm" (each side has a context of its own), "shm-one" (both in one context, so
 * with one mapping), "tcp" (IPv4), "tcp6", "tcp-tiny" (sockets that hold next to nothing), "lossy".
 * "auto" takes shm, which is the best between two processes of one host. "verbs" and "verbs-two"
 * (two devices) need RDMA, see tests/verbs. "verbs-key", "shm-key", "auto-key", "tcp-tls",
 * "tcp-tls-tiny" and "auto-tls" are the same with a key, and with TLS.
 * The server answers y = x + layer + 1; what it does besides is told in its fields, which may
 * change while it runs.
 */
#ifndef AFD_TEST_TRANSPORT_RIG_H
#define AFD_TEST_TRANSPORT_RIG_H

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/transport/exchange.h"
#include "../../lib/transport/ops.h"
#include "../support/skip.h"

struct afd__hello;

enum { HIDDEN = 24, LAYERS = 3, MANY = 64 };

struct server {
	struct server *next; /* the rig's */
	afd_context *ctx;
	afd_transport *net;
	pthread_t thread;
	bool runs;
	char address[96];
	_Atomic int stop;
	_Atomic int hold;   /* parts are taken and not answered, with beats */
	_Atomic int silent; /* it does not even poll */
	_Atomic int status; /* the answer is this error, with the text "on purpose" */
	_Atomic uint64_t gather_ns, compute_ns; /* what it states of every part */
	_Atomic int n_held, n_joined, n_answered, parked;
	struct afd__part held[MANY];
};

/* Of the server's context and of the clients'; the same where the backend wants it. */
extern afd_context *server_ctx, *client_ctx;
extern struct afd_contract rig_contract;
extern uint64_t rig_weights[2], rig_weights_epoch; /* that servers state; 0, 0: none */

/* Runs the group with the arguments of main: the backend's name. */
int rig_run(
	int argc, char **argv, const char *name, const struct CMUnitTest *tests, size_t n_tests);
#define RIG_RUN(argc, argv, tests) \
	rig_run(argc, argv, __FILE__, tests, sizeof(tests) / sizeof((tests)[0]))
/* Setup and teardown of every test. */
int rig_begin(void **state);
int rig_end(void **state);
#define RIG_TEST(f) cmocka_unit_test_setup_teardown(f, rig_begin, rig_end)

const char *rig_scheme(void);           /* "shm" also for "shm-one", "tcp" for all of tcp */
void rig_address(char address[96]);     /* a fresh one */
const struct afd__transport_ops *rig_ops(void); /* of the backend; lossy: loop's */
/* A stranger: a bare wire of the clients' context, which says and hears messages of the handshake. */
void rig_connect(struct afd__wire *wire, int epoll_fd, const char *address);
void rig_say(struct afd__wire *wire, const struct afd__hello *hello);
int rig_hear(struct afd__wire *wire, struct afd__hello *hello); /* 0, or a negative errno */
void rig_bind(struct afd__wire *wire, const struct afd__wire_slots *slots);
bool rig_logged(const char *text);      /* by either side since rig_begin */
void rig_wait_logged(const char *text); /* fails the test after 2 s */

/* In a virtual machine without hardware's help: a test of processor time ends here. */
void rig_skip_when_emulated(void);

/* The key of a backend that has one, unless params have their own. */
void rig_secret(struct afd_transport_params *params);

/* NULL params: the defaults. The address is filled in when listen is not set. */
afd_transport *make_server(const char *address, const struct afd_transport_params *params);
void server_start(struct server *server, const struct afd_transport_params *params);
void server_start_at(
	struct server *server, const char *address, const struct afd_transport_params *params);
void server_stop(struct server *server); /* also of one that has not started */

afd_transport *make_client(const char *address, const struct afd_transport_params *params);
/* A joined one; fails the test when it does not join. */
afd_transport *join(const struct server *server, const struct afd_transport_params *params);
void expect_error(int rc, int code, const char *text);

int begin_step(afd_transport *net, uint32_t n_rows); /* the same of each lane */
struct afd_frame frame_of(int32_t layer, int32_t lane, uint32_t n_rows, const float *x, float *y);
void fill_rows(float *x, uint32_t n_rows,
	int seed); /* whole numbers that every wire dtype holds exactly */
float number(const void *rows, size_t i, int32_t dtype);
void put_number(void *rows, size_t i, int32_t dtype, float value);
/* Rows to a dtype and back, by the plain kernel; without effect on what fill_rows fills, but for fp8. */
void round_rows(float *x, uint32_t n_rows, int32_t dtype);
void expect_rows(const float *x, const float *y, uint32_t n_rows, int32_t layer);
/* A step of one frame for each layer, checked. */
void run_step(afd_transport *net, uint32_t n_rows, int seed);
/* Collects until it is not 0; fails the test after timeout_ms. */
int collect_within(afd_transport *net, int32_t lane, int timeout_ms);
/* The same; fails the test unless the frame is complete. */
void expect_done(afd_transport *net, int32_t lane);
/* Polls until n of the server's counter are reached; fails the test after 2 s. */
void wait_for(const _Atomic int *counter, int n);
/* Which of two replicas has rows that it holds; fails the test after 2 s. */
int rig_holder(const struct server servers[2]);
/* The server's thread stops touching its transport, until silent is 0 again. */
void park(struct server *server);
void sleep_ms(int ms);
uint64_t now_ms(void);
struct afd_peer_info peer_of(const afd_transport *net, uint32_t index);
int count_descriptors(void);
/* The other side of a link, or of a probe, closes its descriptors a little later: waits until their
 * number stays; until it is n, which it must become. */
int settled_descriptors(void);
void expect_descriptors(int n);

#endif
