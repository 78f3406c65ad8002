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

static pid_t start_peer(const char *address, const struct rhythm *rhythm)
{
	pid_t parent = getpid(), pid = fork();

	assert_true(pid >= 0);
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	_exit(getppid() == parent ? run_peer(address, rhythm) : 4);
}

static void wait_for_peer(pid_t pid)
{
	int status;

	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
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
	pid_t peers[4];
	double mean;

	serving_create(&s, "shm", &params);
	for (int p = 0; p < 4; p++)
		peers[p] = start_peer(s.address, rhythm);
	for (int p = 0; p < 4; p++)
		wait_for_peer(peers[p]);
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
	struct serving s;
	pid_t stalled, peer;
	uint64_t started, alone_ns, beside_ns;
	int status;

	serving_create(&s, "shm", NULL);
	started = now_ns();
	wait_for_peer(start_peer(s.address, &quick));
	alone_ns = now_ns() - started;
	stalled = start_peer(s.address, &stalls);
	assert_int_equal(waitpid(stalled, &status, WUNTRACED), stalled);
	assert_true(WIFSTOPPED(status));
	started = now_ns();
	peer = start_peer(s.address, &quick);
	wait_for_peer(peer);
	beside_ns = now_ns() - started;
	print_message("alone %.1f ms, beside a peer that stands still %.1f ms\n",
		(double)alone_ns * 1e-6, (double)beside_ns * 1e-6);
	/* Waiting 2 ms for it at each layer would take 1.8 s more. */
	assert_true(beside_ns < 2 * alone_ns + 900000000);
	assert_int_equal(kill(stalled, SIGCONT), 0);
	wait_for_peer(stalled);
	serving_destroy(&s);
}

static void a_peer_that_is_killed_in_a_step_leaves_the_others_alone(void **state)
{
	const struct rhythm quick = { .n_steps = N_STEPS, .think_us = 20, .between_us = 20 };
	const struct rhythm endless = { .n_steps = UINT32_MAX, .think_us = 20, .between_us = 20 };
	struct serving s;
	pid_t victim, peer;
	int status;

	serving_create(&s, "shm", NULL);
	victim = start_peer(s.address, &endless);
	peer = start_peer(s.address, &quick);
	sleep_ms(30);
	assert_int_equal(kill(victim, SIGKILL), 0);
	assert_int_equal(waitpid(victim, &status, 0), victim);
	wait_for_peer(peer);
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
