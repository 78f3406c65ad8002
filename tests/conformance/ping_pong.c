/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long a frame takes there and back when nothing is computed: the exchange's own cost, with
 * rows written afresh each time. Prints microseconds; judges nothing. Arguments: rows (1), numbers
 * in a row (1024), rounds (20000).
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../lib/transport/exchange.h"

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, afd_last_error());
	exit(1);
}

static afd_transport *create(const char *address, int attention, uint32_t hidden)
{
	struct afd_contract contract = {
		.size = sizeof(contract), .hidden_size = hidden, .n_layers = 1
	};
	struct afd_transport_params params = {
		.size = sizeof(params), .n_listen = !attention, .n_connect = attention
	};
	afd_transport *net;
	afd_context *ctx;

	params.listen = params.connect = &address;
	if (afd_context_create(&ctx, NULL) || afd_transport_create(&net, ctx, &contract, &params))
		die("create");
	return net;
}

static void serve(const char *address, uint32_t hidden)
{
	afd_transport *net = create(address, 0, hidden);
	struct afd__part part;

	while (afd_transport_poll(net) >= 0) {
		while (afd__exchange_take(net, &part) == 1) {
			memcpy(part.y, part.x, (size_t)part.n_rows * hidden * sizeof(float));
			afd__exchange_reply(net, &part, 0, 0, 0);
		}
		afd__transport_sleep(net, -1, -1);
	}
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

static void measure(afd_transport *net, uint32_t n_rows, uint32_t hidden, uint32_t n_rounds)
{
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { n_rows } };
	float *x = malloc((size_t)n_rows * hidden * sizeof(float)),
	      *y = malloc((size_t)n_rows * hidden * sizeof(float));
	struct afd_frame frame = { .size = sizeof(frame), .n_rows = n_rows, .x = x, .y = y };
	uint64_t *ns = malloc(n_rounds * sizeof(*ns));

	for (uint32_t i = 0; i < n_rounds; i++) {
		for (size_t k = 0; k < (size_t)n_rows * hidden; k++)
			x[k] = (float)(i + k);
		if (afd_transport_begin(net, &step))
			die("begin");
		ns[i] = afd__now_ns();
		if (afd_transport_exchange(net, &frame))
			die("exchange");
		ns[i] = afd__now_ns() - ns[i];
	}
	qsort(ns, n_rounds, sizeof(*ns), compare);
	printf("%u rows of %u f32: p50 %.2f us, p99 %.2f us, max %.2f us\n", n_rows, hidden,
		1e-3 * (double)ns[n_rounds / 2], 1e-3 * (double)ns[n_rounds - 1 - n_rounds / 100],
		1e-3 * (double)ns[n_rounds - 1]);
	free(ns);
	free(x);
	free(y);
}

int main(int argc, char **argv)
{
	uint32_t n_rows = argc > 1 ? (uint32_t)atoi(argv[1]) : 1,
		 hidden = argc > 2 ? (uint32_t)atoi(argv[2]) : 1024;
	uint32_t n_rounds = argc > 3 ? (uint32_t)atoi(argv[3]) : 20000;
	char address[64];
	afd_transport *net;
	pid_t server;

	snprintf(address, sizeof(address), "shm:ping-pong-%d", (int)getpid());
	server = fork();
	if (!server) {
		serve(address, hidden);
		return 0;
	}
	net = create(address, 1, hidden);
	if (afd_transport_wait(net, 0) != 1)
		die("join");
	measure(net, n_rows, hidden, n_rounds);
	afd_transport_destroy(net);
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	return 0;
}
