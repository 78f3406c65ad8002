/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd-serve-ffn: an FFN stage that serves attention peers until SIGINT or SIGTERM. The main thread
 * serves; a keeper thread takes the signals, and rewrites the metrics file every second (by rename,
 * so a reader never sees half of one).
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <afd/afd.h>

#include "tool/file.h"
#include "tool/progress.h"
#include "tool/stage.h"

struct flags {
	struct tool_stage stage;
	struct tool_list listen;
	const char *metrics;
	uint32_t max_peers, gather_us;
	uint32_t tp[2], ep[2]; /* index and ranks */
	int32_t wire_dtypes[2]; /* attention to FFN, FFN to attention; 0: any */
};

struct loading {
	struct tool_progress bar;
	const sigset_t *signals;
};

struct server {
	afd_context *ctx;
	afd_model *model;
	afd_transport *net;
	afd_ffn *ffn;
	const struct flags *flags;
	sigset_t signals;
};

/* The text of the metrics, which the caller frees; it may grow between the two calls. */
static char *render_metrics(const afd_context *ctx, int *n_bytes)
{
	char *text = NULL, *grown;
	int capacity = 16384;

	for (;;) {
		grown = realloc(text, capacity);
		if (!grown)
			break;
		text = grown;
		*n_bytes = afd_context_metrics(ctx, text, capacity);
		if (*n_bytes < 0)
			break;
		if (*n_bytes < capacity)
			return text;
		capacity = *n_bytes + 4096;
	}
	free(text);
	return NULL;
}

/* 0, or a negative errno. */
static int write_metrics(const struct server *server)
{
	struct tool_file out = { 0 };
	int n_bytes = 0, rc;
	char *text;

	if (!server->flags->metrics)
		return 0;
	text = render_metrics(server->ctx, &n_bytes);
	rc = text ? tool_file_open(&out, server->flags->metrics) : -ENOMEM;
	if (!rc)
		fwrite(text, 1, n_bytes, out.file);
	free(text);
	return rc ? rc : tool_file_close(&out, 1);
}

static void *keep(void *arg)
{
	struct server *server = arg;
	const struct timespec second = { .tv_sec = 1 };
	int told = 0, rc;

	for (;;) {
		int signal = server->flags->metrics ? sigtimedwait(&server->signals, NULL, &second)
						    : sigwaitinfo(&server->signals, NULL);

		if (signal == SIGINT || signal == SIGTERM) {
			afd_ffn_stop(server->ffn);
			return NULL;
		}
		if (signal == SIGUSR1) /* the main thread: the server has ended by itself */
			return NULL;
		if (errno == EAGAIN && (rc = write_metrics(server)) && !told++)
			tool_fail(0, "warn: --metrics %s: cannot be written: %s",
				server->flags->metrics, strerror(-rc));
	}
}

/* The signals are blocked here, and a large model takes a while: nobody is served yet, so there is
 * nothing to drain. */
static void load_progress(void *user, uint64_t done_bytes, uint64_t total_bytes)
{
	const struct timespec now = { 0 };
	struct loading *loading = user;

	tool_progress_show(&loading->bar, done_bytes, total_bytes);
	if (sigtimedwait(loading->signals, NULL, &now) > 0)
		_exit(TOOL_DONE);
}

static int create(struct server *server)
{
	const struct flags *flags = server->flags;
	char what[256];
	struct loading loading = { .bar = { .what = what }, .signals = &server->signals };
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params transport = {
		.size = sizeof transport,
		.listen = flags->listen.items,
		.n_listen = flags->listen.n_items,
		.max_rows = flags->stage.max_rows,
		.max_peers = flags->max_peers,
		.deadline_ms = flags->stage.deadline_ms,
		.key_file = flags->stage.key,
		.tls = (uint32_t)flags->stage.tls,
		.to_ffn_dtype = flags->wire_dtypes[0],
		.to_attention_dtype = flags->wire_dtypes[1],
		.shard = { flags->tp[0], flags->tp[1], flags->ep[0], flags->ep[1] },
	};
	struct afd_ffn_params ffn = {
		.size = sizeof ffn,
		.device = flags->stage.device,
		.gather_us = flags->gather_us,
		.progress = load_progress,
		.progress_user = &loading,
		.shard = transport.shard,
		.quantize_activations = flags->stage.quantize,
	};
	int rc;

	snprintf(what, sizeof what, "loading %s", flags->stage.model);
	if (tool_context_create(&server->ctx, &flags->stage, NULL))
		return TOOL_FAILED;
	if (afd_model_open(&server->model, server->ctx, flags->stage.model, NULL) ||
		afd_model_contract(server->model, &contract))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	rc = afd_transport_create(&server->net, server->ctx, &contract, &transport);
	if (rc) /* an address that means nothing here is wrong usage; one that is taken is not */
		return tool_fail(rc == -EINVAL || rc == -ENOSYS ? TOOL_USAGE : TOOL_FAILED, "%s",
			afd_last_error());
	if (afd_ffn_create(&server->ffn, server->model, server->net, &ffn))
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	return TOOL_DONE;
}

static void destroy(struct server *server)
{
	afd_ffn_destroy(server->ffn);
	afd_transport_destroy(server->net);
	afd_model_close(server->model);
	afd_context_destroy(server->ctx);
}

static int print_ready(const struct server *server)
{
	char address[128];

	for (uint32_t i = 0; i < server->flags->listen.n_items; i++) {
		if (afd_transport_address(server->net, i, address, sizeof address))
			return tool_fail(TOOL_FAILED, "%s", afd_last_error());
		printf("ready %s\n", address);
	}
	return tool_flush();
}

static struct flags flags;

static const struct tool_option options[] = {
	TOOL_OPTIONS_STAGE(flags.stage),
	{ "listen", "ADDR", NULL, "where to listen, shm:NAME or tcp:HOST:PORT; may be repeated; required",
		tool_set_list, &flags.listen, 0, 0 },
	{ "ffn-tp", "i/n", "0/1", "tensor-parallel shard: part i of n of the widths",
		tool_set_shard, flags.tp, 0, 0 },
	{ "ffn-ep", "i/n", "0/1", "expert-parallel shard: part i of n of the routed experts",
		tool_set_shard, flags.ep, 0, 0 },
	{ "metrics", "FILE", "none", "Prometheus text, rewritten every second and at exit",
		tool_set_text, &flags.metrics, 0, 0 },
	{ "max-peers", "N", "64", "attention peers at once, 1 to 1024", tool_set_u32,
		&flags.max_peers, 1, 1024 },
	{ "gather-us", "N", "2000 us", "the longest wait for rows of other peers, 1 to 1000000 us",
		tool_set_u32, &flags.gather_us, 1, 1000000 },
	{ "wire-dtype", "X|X:Y", "any",
		"take only peers with f32, bf16, f16 or fp8 rows (attention to FFN : FFN to attention)",
		tool_set_dtypes, flags.wire_dtypes, 0, 0 },
	{ 0 },
};

static int serve(void)
{
	struct server server = { .flags = &flags };
	pthread_t keeper;
	int status, rc;

	/* Before any thread starts, so that all inherit the mask and the keeper alone takes the
	 * signals. */
	sigemptyset(&server.signals);
	sigaddset(&server.signals, SIGINT);
	sigaddset(&server.signals, SIGTERM);
	sigaddset(&server.signals, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &server.signals, NULL);

	status = create(&server);
	if (!status && (rc = write_metrics(&server)))
		status = tool_fail(TOOL_FAILED, "--metrics %s: cannot be written: %s",
			flags.metrics, strerror(-rc));
	if (!status && pthread_create(&keeper, NULL, keep, &server))
		status = tool_fail(TOOL_FAILED, "the keeper thread cannot be started");
	else if (!status) {
		status = print_ready(&server);
		if (!status && afd_ffn_serve(server.ffn))
			status = tool_fail(TOOL_FAILED, "%s", afd_last_error());
		pthread_kill(keeper, SIGUSR1);
		pthread_join(keeper, NULL);
		write_metrics(&server);
	}
	destroy(&server);
	return status;
}

int main(int argc, char **argv)
{
	int status = tool_options_read(options, "--model DIR --listen ADDR [flags]", argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	if (!flags.stage.model)
		return tool_fail(TOOL_USAGE, "--model: required");
	if (!flags.listen.n_items)
		return tool_fail(TOOL_USAGE, "--listen: required");
	status = serve();
	free(flags.listen.items);
	return status;
}
