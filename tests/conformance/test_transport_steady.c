/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a host pays: no allocation in a step, no processor time when idle, no descriptor or place
 * that leaks, a descriptor and a timeout that are all an event loop needs, and a child of fork that
 * speaks to nobody.
 */
#include "transport_rig.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- allocations ---- */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define COUNTS_MALLOC 0
static _Atomic long n_mallocs;
#else
#define COUNTS_MALLOC 1
static _Atomic long n_mallocs;

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

void *malloc(size_t bytes)
{
	n_mallocs++;
	return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
	n_mallocs++;
	return __libc_calloc(n, bytes);
}

void *realloc(void *memory, size_t bytes)
{
	n_mallocs++;
	return __libc_realloc(memory, bytes);
}
#endif

static void step_of_all_lanes(afd_transport *net, uint32_t n_rows)
{
	static float x[4][64 * HIDDEN], y[4][64 * HIDDEN];

	assert_int_equal(begin_step(net, n_rows), 0);
	for (int32_t layer = 0; layer < LAYERS; layer++) {
		for (int32_t lane = 0; lane < 4; lane++) {
			struct afd_frame frame = frame_of(layer, lane, n_rows, x[lane], y[lane]);

			assert_int_equal(afd_transport_dispatch(net, &frame), 0);
		}
		for (int32_t lane = 0; lane < 4; lane++)
			expect_done(net, lane);
	}
}

static void steps_allocate_nothing_on_either_side(void **state)
{
	struct afd_transport_params params = { .lanes = 4, .max_rows = 5 };
	uint64_t before, server_before;
	struct server server;
	afd_transport *net;
	void *volatile probe;
	long mallocs;

	server_start(&server, NULL);
	net = join(&server, &params);
	step_of_all_lanes(net, 64);
	before = client_ctx->n_allocations;
	server_before = server_ctx->n_allocations;
	mallocs = n_mallocs;
	for (int i = 0; i < 50; i++)
		step_of_all_lanes(net, 64);
	assert_int_equal(n_mallocs, mallocs);
	assert_int_equal(client_ctx->n_allocations, before);
	assert_int_equal(server_ctx->n_allocations, server_before);
	probe = malloc(1);
	free(probe);
	assert_int_equal(n_mallocs, mallocs + COUNTS_MALLOC);
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- leaks ---- */

static void peers_that_come_and_go_leave_no_descriptor_behind(void **state)
{
	int before = count_descriptors(), alone;
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	/* What a backend opens for all its links (verbs: a device) stays until the server ends. */
	net = join(&server, NULL);
	run_step(net, 1, 0);
	afd_transport_destroy(net);
	wait_for(&server.n_joined, 0);
	alone = settled_descriptors();
	for (int i = 0; i < 40; i++) {
		net = join(&server, NULL);
		run_step(net, 1 + (uint32_t)i % 3, i);
		if (i % 3 == 0)
			begin_step(net, 4);
		afd_transport_destroy(net);
	}
	expect_descriptors(alone);
	server_stop(&server);
	assert_int_equal(count_descriptors(), before);
}

/* ---- idle ---- */

static double cpu_seconds(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
	       1e-6 * (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

/* Of two seconds; ThreadSanitizer has a thread of its own, which wakes; AddressSanitizer makes each
 * look slower. */
#ifdef __SANITIZE_THREAD__
enum { IDLE_US = 100000 };
#elif defined(__SANITIZE_ADDRESS__)
enum { IDLE_US = 50000 };
#else
enum { IDLE_US = 20000 };
#endif

static long idle_us(void)
{
	double before = cpu_seconds();

	sleep_ms(2000);
	return (long)((cpu_seconds() - before) * 1e6);
}

static void an_idle_server_with_idle_clients_uses_under_one_percent_of_a_core(void **state)
{
	afd_transport *nets[3];
	struct server server;
	long least;

	rig_skip_when_emulated();
	server_start(&server, NULL);
	for (int i = 0; i < 3; i++) {
		nets[i] = join(&server, NULL);
		run_step(nets[i], 2, i);
	}
	sleep_ms(20);
	/* A busy machine charges for being woken late; who polls is charged each time. */
	least = idle_us();
	for (int i = 0; i < 2 && least > IDLE_US; i++)
		least = idle_us();
	assert_in_range(least, 0, IDLE_US);
	for (int i = 0; i < 3; i++)
		afd_transport_destroy(nets[i]);
	server_stop(&server);
}

static void a_client_that_waits_long_sleeps(void **state)
{
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	struct afd_frame frame = frame_of(0, 0, 1, x, y);
	struct server server;
	afd_transport *net;
	uint64_t until;
	double before;

	rig_skip_when_emulated();
	server_start(&server, NULL);
	net = join(&server, NULL);
	server.hold = 1;
	assert_int_equal(begin_step(net, 1), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	wait_for(&server.n_held, 1);
	before = cpu_seconds();
	until = now_ms() + 1000;
	while (now_ms() < until) {
		assert_int_equal(afd_transport_collect(net, 0), 0);
		assert_true(afd__transport_sleep(net, -1, 100) >= 0);
	}
	/* Twenty beats, and a spin of 50 us for each on both sides. */
	assert_in_range((long)((cpu_seconds() - before) * 1e6), 0, 30000);
	server.hold = 0;
	expect_done(net, 0);
	afd_transport_destroy(net);
	server_stop(&server);
}

/* ---- an event loop of the host's ---- */

static void wait_as_a_host(afd_transport *net)
{
	struct pollfd one = { .fd = afd_transport_fd(net), .events = POLLIN };

	assert_true(one.fd >= 0);
	poll(&one, 1, afd_transport_timeout_ms(net));
}

static void a_descriptor_and_a_timeout_are_enough_to_drive_a_client(void **state)
{
	struct afd_transport_params params = { .max_rows = 4, .spin_us = UINT32_MAX };
	float x[30 * HIDDEN] = { 0 }, y[30 * HIDDEN];
	struct afd_frame frame = frame_of(2, 0, 30, x, y);
	struct server server;
	afd_transport *net;
	char address[96];
	int rc;

	rig_address(address);
	net = make_client(address, &params);
	assert_int_equal(afd_transport_poll(net), 0);
	server_start_at(&server, address, &params);
	while (!(rc = afd_transport_poll(net)))
		wait_as_a_host(net);
	assert_int_equal(rc, 1);
	for (int i = 0; i < 50; i++) {
		fill_rows(x, 30, i);
		assert_int_equal(begin_step(net, 30), 0);
		assert_int_equal(afd_transport_dispatch(net, &frame), 0);
		while (!(rc = afd_transport_collect(net, 0)))
			wait_as_a_host(net);
		assert_int_equal(rc, 1);
		expect_rows(x, y, 30, 2);
	}
	afd_transport_destroy(net);
	server_stop(&server);
}

static void both_sides_can_be_driven_by_one_thread(void **state)
{
	struct afd_transport_params params = { .max_rows = 4 };
	float x[30 * HIDDEN] = { 0 }, y[30 * HIDDEN];
	struct afd_frame frame = frame_of(2, 0, 30, x, y);
	struct afd__part part;
	char address[96];
	afd_transport *ffn, *net;
	int rc;

	rig_address(address);
	ffn = make_server(address, NULL);
	net = make_client(address, &params);
	while (afd_transport_poll(net) != 1)
		assert_int_equal(afd_transport_poll(ffn), 1);
	fill_rows(x, 30, 1);
	assert_int_equal(begin_step(net, 30), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	while (!(rc = afd_transport_collect(net, 0))) {
		while (afd__exchange_take(ffn, &part) == 1) {
			for (uint32_t i = 0; i < part.n_rows * HIDDEN; i++)
				((float *)part.y)[i] = ((const float *)part.x)[i] + 3;
			assert_int_equal(afd__exchange_reply(ffn, &part, 0, 0, 0), 0);
		}
	}
	assert_int_equal(rc, 1);
	expect_rows(x, y, 30, 2);
	afd_transport_destroy(net);
	afd_transport_destroy(ffn);
}

static void a_descriptor_is_not_readable_when_there_is_nothing_to_do(void **state)
{
	struct pollfd one = { .events = POLLIN };
	struct server server;
	afd_transport *net;

	server_start(&server, NULL);
	net = join(&server, NULL);
	for (int i = 0; i < 20; i++) {
		run_step(net, 3, i);
		sleep_ms(1);
		assert_int_equal(afd_transport_poll(net), 1);
		assert_int_equal(afd_transport_timeout_ms(net), -1);
		one.fd = afd_transport_fd(net);
		assert_int_equal(poll(&one, 1, 5), 0);
	}
	server_stop(&server);
	assert_int_equal(poll(&one, 1, 1000), 1);
	expect_error(afd_transport_poll(net), -ECONNRESET, "has left");
	assert_int_equal(poll(&one, 1, 5), 0);
	afd_transport_destroy(net);
}

/* ---- fork ---- */

/* Both inherited transports are refused and destroyed; 0 when all was as it should be. */
static int as_a_child(afd_transport *net, afd_transport *ffn)
{
	int rc = 0;

	rc |= afd_transport_poll(net) != -EINVAL || !strstr(afd_last_error(), "child");
	rc |= (afd_transport_wait(net, 10) != -EINVAL) << 1;
	rc |= (begin_step(net, 1) != -EINVAL) << 2;
	rc |= (afd_transport_fd(net) != -EINVAL) << 3;
	afd_transport_destroy(net);
	afd_transport_destroy(ffn);
	return rc;
}

static void a_child_of_fork_is_refused_and_says_nothing_to_the_peer(void **state)
{
	struct server server;
	afd_transport *net;
	int status = -1;
	pid_t child;

	server_start(&server, NULL);
	net = join(&server, NULL);
	run_step(net, 2, 1);
	park(&server);
	child = fork();
	if (!child)
		_exit(as_a_child(net, server.net));
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
	server.silent = 0;
	for (int i = 0; i < 5; i++)
		run_step(net, 2, i);
	assert_int_equal(server.n_joined, 1);
	assert_int_equal(afd_transport_poll(net), 1);
	afd_transport_destroy(net);
	server_stop(&server);
}

static void an_end_is_seen_although_a_child_holds_the_descriptors(void **state)
{
	struct server server;
	afd_transport *net;
	pid_t child;

	server_start(&server, NULL);
	net = join(&server, NULL);
	run_step(net, 2, 1);
	child = fork();
	if (!child) {
		for (;;)
			pause();
	}
	server_stop(&server);
	expect_error(collect_within(net, 0, 1000) == 1 ? afd_transport_poll(net) : -1, -ECONNRESET,
		"has left");
	afd_transport_destroy(net);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(steps_allocate_nothing_on_either_side),
		RIG_TEST(peers_that_come_and_go_leave_no_descriptor_behind),
		RIG_TEST(an_idle_server_with_idle_clients_uses_under_one_percent_of_a_core),
		RIG_TEST(a_client_that_waits_long_sleeps),
		RIG_TEST(a_descriptor_and_a_timeout_are_enough_to_drive_a_client),
		RIG_TEST(both_sides_can_be_driven_by_one_thread),
		RIG_TEST(a_descriptor_is_not_readable_when_there_is_nothing_to_do),
		RIG_TEST(a_child_of_fork_is_refused_and_says_nothing_to_the_peer),
		RIG_TEST(an_end_is_seen_although_a_child_holds_the_descriptors),
	};
	return RIG_RUN(argc, argv, tests);
}
