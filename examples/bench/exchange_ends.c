/* SPDX-License-Identifier: Apache-2.0 */
/* The ends of a measured exchange; exchange_ends.h says what they do. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "exchange_ends.h"
#include "floor.h"

static void describe(struct afd_contract *contract, const struct exchange_link *link)
{
	*contract = (struct afd_contract){ .size = sizeof *contract,
		.hidden_size = link->row_bytes / (uint32_t)sizeof(float),
		.n_layers = EXCHANGE_LAYERS,
		.dtype = AFD_DTYPE_F32 };
}

/* ---- the FFN end ---- */

static int compute(void *user, const struct afd_ffn_pass *pass)
{
	const struct exchange_link *link = user;

	bench_floor_answer(pass->y, pass->x, (size_t)pass->n_rows * link->row_bytes);
	return 0;
}

struct ffn_end {
	afd_context *ctx;
	afd_transport *net;
	afd_ffn *ffn;
};

static int open_ffn(struct ffn_end *end, const struct exchange_link *link, const char *listen)
{
	struct afd_transport_params params = { .size = sizeof params,
		.listen = &listen,
		.n_listen = 1,
		.max_rows = link->max_rows,
		.spin_us = link->spin_us,
		.key_file = link->stage.key,
		.tls = (uint32_t)link->stage.tls };
	struct afd_ffn_params stage = { .size = sizeof stage,
		.max_rows = link->n_rows * link->lanes,
		.gather_us = UINT32_MAX,
		.compute = compute,
		.compute_user = (void *)link };
	struct afd_contract contract;
	int rc;

	if (tool_context_create(&end->ctx, &link->stage, NULL))
		return -EIO;
	describe(&contract, link);
	rc = afd_transport_create(&end->net, end->ctx, &contract, &params);
	return rc ? rc : afd_ffn_create(&end->ffn, NULL, end->net, &stage);
}

static void close_ffn(struct ffn_end *end)
{
	afd_ffn_destroy(end->ffn);
	afd_transport_destroy(end->net);
	afd_context_destroy(end->ctx);
}

/* Tells the parent where it listens, or with a "!" why it does not. */
static void live_there(const struct exchange_link *link, const char *listen, int tell)
{
	char text[EXCHANGE_ADDRESS] = "";
	struct ffn_end end = { 0 };
	int rc;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	bench_pin(link->cpu);
	rc = open_ffn(&end, link, listen);
	rc = rc ? rc : afd_transport_address(end.net, 0, text, sizeof text);
	if (rc)
		snprintf(text, sizeof text, "!%.100s", afd_last_error());
	if (write(tell, text, sizeof text) != sizeof text)
		_exit(TOOL_FAILED);
	close(tell);
	_exit(!rc && !afd_ffn_serve(end.ffn) ? TOOL_DONE : TOOL_FAILED);
}

pid_t exchange_start_ffn(
	const struct exchange_link *link, const char *listen, char address[EXCHANGE_ADDRESS])
{
	int ends[2];
	pid_t pid;

	if (pipe(ends)) {
		tool_fail(TOOL_FAILED, "pipe: %s", strerror(errno));
		return -1;
	}
	pid = fork();
	if (!pid) {
		close(ends[0]);
		live_there(link, listen, ends[1]);
	}
	close(ends[1]);
	if (pid < 0)
		tool_fail(TOOL_FAILED, "fork: %s", strerror(errno));
	else if (read(ends[0], address, EXCHANGE_ADDRESS) != EXCHANGE_ADDRESS)
		tool_fail(TOOL_FAILED, "the FFN end at %s: it died", listen);
	else if (*address == '!')
		tool_fail(TOOL_FAILED, "the FFN end: %s", address + 1);
	else {
		close(ends[0]);
		return pid;
	}
	close(ends[0]);
	exchange_end_ffn(pid);
	return -1;
}

void exchange_end_ffn(pid_t pid)
{
	if (pid <= 0)
		return;
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
}

static afd_ffn *served; /* for the signal handler */

static void stop(int signal)
{
	(void)signal;
	afd_ffn_stop(served);
}

int exchange_serve(const struct exchange_link *link, const char *listen)
{
	struct sigaction action = { .sa_handler = stop };
	char address[EXCHANGE_ADDRESS];
	struct ffn_end end = { 0 };
	int rc;

	bench_pin(link->cpu);
	rc = open_ffn(&end, link, listen);
	rc = rc ? rc : afd_transport_address(end.net, 0, address, sizeof address);
	if (!rc) {
		served = end.ffn;
		sigaction(SIGINT, &action, NULL);
		sigaction(SIGTERM, &action, NULL);
		printf("ready %s\n", address);
		fflush(stdout);
		rc = afd_ffn_serve(end.ffn);
	}
	rc = rc ? tool_fail(TOOL_FAILED, "%s", afd_last_error()) : TOOL_DONE;
	close_ffn(&end);
	return rc;
}

/* ---- the attention end ---- */

int exchange_connect(afd_transport **out, afd_context *ctx, const struct exchange_link *link,
	const char *address)
{
	struct afd_transport_params params = { .size = sizeof params,
		.connect = &address,
		.n_connect = 1,
		.lanes = link->lanes,
		.max_rows = link->max_rows,
		.spin_us = link->spin_us,
		.connect_timeout_ms = link->stage.connect_timeout_ms,
		.key_file = link->stage.key,
		.tls = (uint32_t)link->stage.tls };
	struct afd_contract contract;
	int rc;

	describe(&contract, link);
	rc = afd_transport_create(out, ctx, &contract, &params);
	rc = rc ? rc : afd_transport_wait(*out, 0);
	return rc < 0 ? tool_fail(TOOL_FAILED, "%s", afd_last_error()) : TOOL_DONE;
}

static struct afd_frame frame_of(const struct exchange_link *link, uint32_t lane, int32_t layer,
	uint32_t n_rows, const void *x, void *y)
{
	size_t at = (size_t)lane * n_rows * link->row_bytes;

	return (struct afd_frame){ .size = sizeof(struct afd_frame),
		.layer = layer,
		.lane = (int32_t)lane,
		.n_rows = n_rows,
		.x = (const char *)x + at,
		.y = (char *)y + at };
}

/* Without the exchange's own wait: until each lane has come, asking again and again, as a host does
 * that has several of them out. */
static int collect_all(afd_transport *net, uint32_t lanes)
{
	int rc = 0;

	for (uint32_t lane = 0; lane < lanes; lane++) {
		do {
			rc = afd_transport_collect(net, (int32_t)lane);
		} while (!rc);
		if (rc < 0)
			return rc;
	}
	return 0;
}

int exchange_round(afd_transport *net, const struct exchange_link *link, int32_t layer,
	uint32_t n_rows, const void *x, void *y)
{
	struct afd_frame frame;
	int rc = 0;

	if (link->lanes == 1) {
		frame = frame_of(link, 0, layer, n_rows, x, y);
		return afd_transport_exchange(net, &frame);
	}
	for (uint32_t lane = 0; lane < link->lanes && !rc; lane++) {
		frame = frame_of(link, lane, layer, n_rows, x, y);
		rc = afd_transport_dispatch(net, &frame);
	}
	return rc ? rc : collect_all(net, link->lanes);
}
