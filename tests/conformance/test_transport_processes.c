/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Between processes: ends by SIGKILL and SIGSTOP, and names that are free at once. Children
 * are forked before they make anything of the library.
 */
#include "transport_rig.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- children ---- */

/* The parent's descriptors that the child does not need would keep links open that the parent has
 * closed. */
static void close_inherited(int keep)
{
	for (int fd = 3; fd < 256; fd++) {
		if (fd != keep)
			close(fd);
	}
}

static void child_of(afd_context **ctx, int keep)
{
	close_inherited(keep);
	server_ctx = client_ctx = NULL;
	if (afd_context_create(ctx, NULL))
		_exit(90);
	server_ctx = client_ctx = *ctx;
}

static pid_t spawn_server(const char *address, int hold, int n_children)
{
	struct server server;
	afd_context *ctx;
	int ready[2];
	char byte;
	pid_t pid;

	assert_int_equal(pipe(ready), 0);
	pid = fork();
	if (!pid) {
		child_of(&ctx, ready[1]);
		server_start_at(&server, address, NULL);
		server.hold = hold;
		if (write(ready[1], "r", 1) != 1)
			_exit(91);
		/* Each takes the descriptors of links that exist when it is forked. */
		for (int i = 0; i < n_children; i++) {
			wait_for(&server.n_joined, 1);
			if (!fork())
				alarm(5);
		}
		for (;;)
			pause();
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		fail_msg("the server did not start");
	close(ready[0]);
	return pid;
}

static void end_child(pid_t pid)
{
	int status;

	kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
}

static afd_transport *join_at(const char *address, const struct afd_transport_params *params)
{
	afd_transport *net = make_client(address, params);

	if (afd_transport_wait(net, 0) != 1)
		fail_msg("%s", afd_last_error());
	return net;
}

static void dispatch_one(afd_transport *net)
{
	static float x[HIDDEN], y[HIDDEN];
	struct afd_frame frame = frame_of(1, 0, 1, x, y);

	assert_int_equal(begin_step(net, 1), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
}

static int count_shared_memory(void)
{
	DIR *dir = opendir("/dev/shm");
	struct dirent *entry;
	int n = 0;

	while (dir && (entry = readdir(dir)))
		n += !strncmp(entry->d_name, "afd", 3);
	if (dir)
		closedir(dir);
	return n;
}

/* ---- servers that end ---- */

static void rows_come_back_from_another_process(void **state)
{
	char address[96];
	afd_transport *net;
	pid_t pid;

	rig_address(address);
	pid = spawn_server(address, 0, 0);
	net = join_at(address, NULL);
	for (int i = 0; i < 200; i++)
		run_step(net, 1 + (uint32_t)i % 9, i);
	afd_transport_destroy(net);
	end_child(pid);
}

static void a_killed_server_is_noticed_within_a_second(void **state)
{
	int before = count_descriptors(), shared = count_shared_memory();
	char address[96];

	for (int i = 0; i < 5; i++) {
		afd_transport *net;
		uint64_t start;
		pid_t pid;

		rig_address(address);
		pid = spawn_server(address, i % 2, 0);
		net = join_at(address, NULL);
		if (i % 2)
			dispatch_one(net);
		else
			run_step(net, 3, i);
		start = now_ms();
		end_child(pid);
		while (afd_transport_poll(net) >= 0)
			afd__transport_sleep(net, -1, 10);
		expect_error(afd_transport_poll(net), -ECONNRESET, "the FFN peer is gone");
		assert_in_range(now_ms() - start, 0, 1000);
		afd_transport_destroy(net);
	}
	assert_int_equal(count_descriptors(), before);
	assert_int_equal(count_shared_memory(), shared);
}

static void a_killed_server_is_noticed_although_its_child_lives(void **state)
{
	char address[96];
	afd_transport *net;
	uint64_t start;
	pid_t pid;

	if (!strcmp(rig_scheme(), "tcp") || !strcmp(rig_scheme(), "verbs"))
		rig_skip("between machines nobody can tell that from silence");
	rig_address(address);
	pid = spawn_server(address, 1, 1);
	net = join_at(address, NULL);
	dispatch_one(net);
	sleep_ms(100);
	start = now_ms();
	end_child(pid);
	expect_error(collect_within(net, 0, 2000), -ECONNRESET, "the FFN peer is gone");
	assert_in_range(now_ms() - start, 0, 1000);
	afd_transport_destroy(net);
}

static void a_stopped_server_is_named_after_the_deadline(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 400 };
	char address[96];
	afd_transport *net;
	uint64_t start;
	pid_t pid;

	rig_address(address);
	pid = spawn_server(address, 1, 0);
	net = join_at(address, &params);
	dispatch_one(net);
	/* It computes and beats; then it stops. */
	for (start = now_ms(); now_ms() < start + 600;)
		assert_int_equal(afd_transport_collect(net, 0), 0);
	kill(pid, SIGSTOP);
	start = now_ms();
	expect_error(collect_within(net, 0, 3000), -ETIMEDOUT, "limit 400");
	assert_in_range(now_ms() - start, 300, 1400);
	afd_transport_destroy(net);
	end_child(pid);
}

static void a_server_that_is_stopped_for_less_than_the_deadline_goes_on(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 1000 };
	char address[96];
	afd_transport *net;
	pid_t pid;

	rig_address(address);
	pid = spawn_server(address, 0, 0);
	net = join_at(address, &params);
	kill(pid, SIGSTOP);
	dispatch_one(net);
	sleep_ms(300);
	kill(pid, SIGCONT);
	expect_done(net, 0);
	run_step(net, 3, 1);
	afd_transport_destroy(net);
	end_child(pid);
}

static void the_address_of_a_killed_server_is_free_at_once(void **state)
{
	char address[96];
	afd_transport *net;
	pid_t pid;

	rig_address(address);
	for (int i = 0; i < 5; i++) {
		pid = spawn_server(address, 0, 0);
		net = join_at(address, NULL);
		run_step(net, 2, i);
		afd_transport_destroy(net);
		end_child(pid);
	}
}

/* ---- clients that end ---- */

static pid_t spawn_client(const char *address)
{
	afd_context *ctx;
	pid_t pid = fork();

	if (pid)
		return pid;
	child_of(&ctx, -1);
	for (;;) {
		afd_transport *net = join_at(address, NULL);

		for (int i = 0; i < 50; i++)
			run_step(net, 2, i);
		afd_transport_destroy(net);
	}
}

static void clients_that_are_killed_anywhere_disturb_nobody(void **state)
{
	char address[96];
	afd_transport *net;
	pid_t server, client;

	rig_address(address);
	server = spawn_server(address, 0, 0);
	net = join_at(address, NULL);
	for (int i = 0; i < 30; i++) {
		client = spawn_client(address);
		for (int k = 0; k < 5; k++)
			run_step(net, 3, i + k);
		sleep_ms(i % 7);
		end_child(client);
	}
	run_step(net, 3, 1);
	afd_transport_destroy(net);
	end_child(server);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(rows_come_back_from_another_process),
		RIG_TEST(a_killed_server_is_noticed_within_a_second),
		RIG_TEST(a_killed_server_is_noticed_although_its_child_lives),
		RIG_TEST(a_stopped_server_is_named_after_the_deadline),
		RIG_TEST(a_server_that_is_stopped_for_less_than_the_deadline_goes_on),
		RIG_TEST(the_address_of_a_killed_server_is_free_at_once),
		RIG_TEST(clients_that_are_killed_anywhere_disturb_nobody),
	};
	return RIG_RUN(argc, argv, tests);
}
