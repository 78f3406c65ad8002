/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The gather for real: attention peers as processes of their own, which compute for a while between
 * a reply and the next rows, on however few cores there are. Rows of equal peers meet in one pass;
 * a peer that stands still costs the others nothing; and a step that goes on allocates nothing.
 */
#include "serving.h"

#include "../../lib/context/core.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { H = SERVING_HIDDEN, N_STEPS = 300 };

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void busy_us(uint64_t us)
{
	uint64_t end = now_ns() + us * 1000;

	while (now_ns() < end)
		;
}

struct rhythm {
	uint32_t n_steps, think_us, between_us;
	uint32_t stand_still_at; /* a step; 0: never */
};

/* A child has no part in its parent's handles: everything is made anew. Ends with 0 when all went
 * well. */
static int run_peer(const char *address, const struct rhythm *rhythm)
{
	struct afd_contract contract = {
		.size = sizeof(contract), .hidden_size = H, .n_layers = SERVING_LAYERS
	};
	struct afd_transport_params tp = {
		.size = sizeof(tp), .connect = &address, .n_connect = 1
	};
	float x[H] = { 0.5f }, y[H];
	afd_context *ctx;
	afd_transport *net;
	int rc;

	if (afd_context_create(&ctx, NULL) || afd_transport_create(&net, ctx, &contract, &tp))
		return 2;
	rc = afd_transport_wait(net, 0) == 1 ? 0 : 3;
	for (uint32_t step = 0; step < rhythm->n_steps && !rc; step++) {
		busy_us(rhythm->between_us);
		rc = peer_begin(net, 1, 1);
		if (rhythm->stand_still_at && step == rhythm->stand_still_at)
			raise(SIGSTOP);
		for (int32_t layer = 0; layer < SERVING_LAYERS && !rc; layer++) {
			busy_us(rhythm->think_us);
			rc = peer_exchange(net, layer, 1, x, y);
		}
	}
	if (rc)
		fprintf(stderr, "peer: %s\n", afd_last_error());
	afd_transport_destroy(net);
	afd_context_destroy(ctx);
	return rc ? 1 : 0;
}

/* A peer as a process. It is made before the server, since a child of a process with threads may
 * find locks that nobody will open, and waits until it is released. */
struct peer {
	pid_t pid;
	int go;
};

static struct peer make_peer(const struct rhythm *rhythm)
{
	struct peer peer;
	pid_t parent = getpid();
	char address[80], byte;
	int go[2];

	serving_next_address(address, "shm");
	assert_int_equal(pipe(go), 0);
	peer = (struct peer){ .pid = fork(), .go = go[1] };
	assert_true(peer.pid >= 0);
	if (!peer.pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(go[1]);
		if (getppid() != parent || read(go[0], &byte, 1) != 1)
			_exit(4);
		_exit(run_peer(address, rhythm));
	}
	close(go[0]);
	return peer;
}

static void release(const struct peer *peer)
{
	assert_int_equal(write(peer->go, "", 1), 1);
	close(peer->go);
}

static void wait_for(const struct peer *peer)
{
	int status;

	assert_int_equal(waitpid(peer->pid, &status, 0), peer->pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

static uint64_t run_alone(const struct peer *peer)
{
	uint64_t started_ns = now_ns();

	release(peer);
	wait_for(peer);
	return now_ns() - started_ns;
}

static double rows_per_pass(const struct serving *s)
{
	return metric_value(s->ctx, "afd_ffn_rows_per_pass_sum") /
	       metric_value(s->ctx, "afd_ffn_rows_per_pass_count");
}

static double four_peers(const struct rhythm *rhythm, uint32_t gather_us)
{
	struct afd_ffn_params params = { .gather_us = gather_us };
	struct serving s;
	struct peer peers[4];
	double mean;

	for (int p = 0; p < 4; p++)
		peers[p] = make_peer(rhythm);
	serving_create(&s, "shm", &params);
	for (int p = 0; p < 4; p++)
		release(&peers[p]);
	for (int p = 0; p < 4; p++)
		wait_for(&peers[p]);
	mean = rows_per_pass(&s);
	print_message("%.2f rows per pass\n", mean);
	serving_destroy(&s);
	return mean;
}

/* Other work on the machine tears the peers apart; it never brings them together. So one good run
 * of a few will do. */
static void four_equal_peers_meet_in_one_pass(void **state)
{
	const struct rhythm rhythm = { .n_steps = N_STEPS, .think_us = 20, .between_us = 20 };
	double mean = 0;

	for (int run = 0; run < 5 && mean < 2.5; run++)
		mean = four_peers(&rhythm, 0);
	assert_true(mean >= 2.5);
}

static void peers_meet_because_they_are_waited_for(void **state)
{
	const struct rhythm rhythm = { .n_steps = N_STEPS, .think_us = 100, .between_us = 400 };
	double without = four_peers(&rhythm, UINT32_MAX), with = 0;

	for (int run = 0; run < 5 && with < 1.5 * without; run++)
		with = four_peers(&rhythm, 0);
	assert_true(with >= 1.5 * without);
}

static void a_peer_that_stands_still_costs_the_others_one_wait(void **state)
{
	const struct rhythm quick = { .n_steps = N_STEPS, .think_us = 20, .between_us = 20 };
	const struct rhythm stalls = {
		.n_steps = 20, .think_us = 20, .between_us = 20, .stand_still_at = 10
	};
	struct peer first = make_peer(&quick), stalled = make_peer(&stalls),
		    second = make_peer(&quick);
	struct serving s;
	uint64_t alone_ns, beside_ns;
	int status;

	serving_create(&s, "shm", NULL);
	alone_ns = run_alone(&first);
	release(&stalled);
	assert_int_equal(waitpid(stalled.pid, &status, WUNTRACED), stalled.pid);
	assert_true(WIFSTOPPED(status));
	beside_ns = run_alone(&second);
	print_message("alone %.1f ms, beside a peer that stands still %.1f ms\n",
		(double)alone_ns * 1e-6, (double)beside_ns * 1e-6);
	/* Waiting 2 ms for it at each layer would take 1.8 s more. */
	assert_true(beside_ns < 2 * alone_ns + 900000000);
	assert_int_equal(kill(stalled.pid, SIGCONT), 0);
	wait_for(&stalled);
	serving_destroy(&s);
}

static void a_peer_that_is_killed_in_a_step_leaves_the_others_alone(void **state)
{
	const struct rhythm quick = { .n_steps = N_STEPS, .think_us = 20, .between_us = 20 };
	const struct rhythm endless = { .n_steps = UINT32_MAX, .think_us = 20, .between_us = 20 };
	struct peer victim = make_peer(&endless), peer = make_peer(&quick);
	struct serving s;
	int status;

	serving_create(&s, "shm", NULL);
	release(&victim);
	release(&peer);
	sleep_ms(30);
	assert_int_equal(kill(victim.pid, SIGKILL), 0);
	assert_int_equal(waitpid(victim.pid, &status, 0), victim.pid);
	wait_for(&peer);
	serving_destroy(&s);
}

static void steps_that_go_on_allocate_nothing(void **state)
{
	float x[H] = { 0 }, y[H];
	struct serving s;
	afd_transport *net;
	uint64_t before = 0;

	serving_create(&s, "loop", NULL);
	net = peer_create(&s, 1, 0, AFD_DTYPE_BF16);
	peer_join(net);
	for (int step = 0; step < 100; step++) {
		if (step == 10)
			before = s.ctx->n_allocations;
		assert_int_equal(peer_begin(net, 1, 1), 0);
		for (int32_t layer = 0; layer < SERVING_LAYERS; layer++)
			assert_int_equal(peer_exchange(net, layer, 1, x, y), 0);
	}
	assert_int_equal(s.ctx->n_allocations, before);
	afd_transport_destroy(net);
	serving_destroy(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(four_equal_peers_meet_in_one_pass),
		cmocka_unit_test(peers_meet_because_they_are_waited_for),
		cmocka_unit_test(a_peer_that_stands_still_costs_the_others_one_wait),
		cmocka_unit_test(a_peer_that_is_killed_in_a_step_leaves_the_others_alone),
		cmocka_unit_test(steps_that_go_on_allocate_nothing),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
