/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An engine that keeps its own attention and its own FFN, and takes only the exchange from libafd:
 * no checkpoint, no stage of attention. One process runs the attention loop, the other serves the
 * engine's FFN function; rows of two lanes cross, so that one lane computes while the other is
 * away. The result must have the bits of the same loop without any transport.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <afd/afd.h>

#define CHECK(call) \
	do { \
		if ((call) < 0) \
			return fprintf(stderr, "own_engine: %s\n", afd_last_error()), 1; \
	} while (0)

enum { HIDDEN = 64, LAYERS = 6, LANES = 2, ROWS = 3 };

/* ---- the engine: toys, but each row depends on all its numbers and on the layer ---- */

static int engine_ffn(void *user, const struct afd_ffn_pass *pass)
{
	(void)user;
	for (uint32_t row = 0; row < pass->n_rows; row++) {
		const float *x = pass->x + row * HIDDEN;
		float *y = pass->y + row * HIDDEN;

		for (int i = 0; i < HIDDEN; i++)
			y[i] = x[i] * x[(i + 1 + pass->layer) % HIDDEN] + 0.25f * x[HIDDEN - 1 - i];
	}
	return 0;
}

static void engine_attention(int layer, float *rows) /* [ROWS][HIDDEN] */
{
	for (int row = 1; row < ROWS; row++) {
		for (int i = 0; i < HIDDEN; i++)
			rows[row * HIDDEN + i] =
				0.5f * rows[row * HIDDEN + i] +
				0.375f * rows[(row - 1) * HIDDEN + (i + layer) % HIDDEN];
	}
}

static void engine_residual(float *rows, const float *y)
{
	for (int i = 0; i < ROWS * HIDDEN; i++)
		rows[i] = 0.5f * (rows[i] + y[i]);
}

static void first_rows(float rows[LANES][ROWS * HIDDEN])
{
	for (int i = 0; i < LANES * ROWS * HIDDEN; i++)
		rows[0][i] = (i * 37 % 101 - 50) / 50.0f;
}

/* ---- the same loop twice: alone, and with the FFN in another process ---- */

static void run_alone(float rows[LANES][ROWS * HIDDEN])
{
	float y[ROWS * HIDDEN];

	for (int layer = 0; layer < LAYERS; layer++) {
		for (int lane = 0; lane < LANES; lane++) {
			struct afd_ffn_pass pass = { .size = sizeof pass,
				.layer = layer,
				.n_rows = ROWS,
				.x = rows[lane],
				.y = y };

			engine_attention(layer, rows[lane]);
			engine_ffn(NULL, &pass);
			engine_residual(rows[lane], y);
		}
	}
}

static int collect(afd_transport *net, int lane)
{
	int rc;

	while (!(rc = afd_transport_collect(net, lane))) {
		struct pollfd fd = { .fd = afd_transport_fd(net), .events = POLLIN };

		poll(&fd, 1, afd_transport_timeout_ms(net));
	}
	return rc;
}

static int run_split(afd_transport *net, float rows[LANES][ROWS * HIDDEN])
{
	struct afd_step_params step = { .size = sizeof step, .n_rows = { ROWS, ROWS } };
	float y[LANES][ROWS * HIDDEN];

	CHECK(afd_transport_begin(net, &step));
	for (int layer = 0; layer <= LAYERS; layer++) {
		for (int lane = 0; lane < LANES; lane++) {
			struct afd_frame frame = { .size = sizeof frame,
				.layer = layer,
				.lane = lane,
				.n_rows = ROWS,
				.x = rows[lane],
				.y = y[lane] };

			if (layer > 0) { /* meanwhile the other lane is at the FFN */
				CHECK(collect(net, lane));
				engine_residual(rows[lane], y[lane]);
			}
			if (layer < LAYERS) {
				engine_attention(layer, rows[lane]);
				CHECK(afd_transport_dispatch(net, &frame));
			}
		}
	}
	return 0;
}

/* ---- the two processes ---- */

static afd_ffn *server;

static void stop(int signal)
{
	(void)signal;
	afd_ffn_stop(server);
}

static int ffn_process(afd_context *ctx, const struct afd_contract *contract, const char *address)
{
	struct afd_transport_params listen = {
		.size = sizeof listen, .listen = &address, .n_listen = 1
	};
	struct afd_ffn_params params = {
		.size = sizeof params, .compute = engine_ffn, .weights = { 1, 1 }
	};
	afd_transport *net;

	CHECK(afd_transport_create(&net, ctx, contract, &listen));
	CHECK(afd_ffn_create(&server, NULL, net, &params));
	signal(SIGTERM, stop);
	CHECK(afd_ffn_serve(server));
	afd_ffn_destroy(server);
	afd_transport_destroy(net);
	return 0;
}

static int attention_process(
	afd_context *ctx, const struct afd_contract *contract, const char *address)
{
	struct afd_transport_params connect = {
		.size = sizeof connect, .connect = &address, .n_connect = 1, .lanes = LANES
	};
	float alone[LANES][ROWS * HIDDEN], split[LANES][ROWS * HIDDEN];
	afd_transport *net;

	first_rows(alone);
	first_rows(split);
	run_alone(alone);
	CHECK(afd_transport_create(&net, ctx, contract, &connect));
	CHECK(afd_transport_wait(net, 0));
	if (run_split(net, split))
		return 1;
	afd_transport_destroy(net);
	printf("row 0 begins %g %g %g\nbits: %s\n", split[0][0], split[0][1], split[0][2],
		memcmp(alone, split, sizeof split) ? "differ" : "equal");
	return memcmp(alone, split, sizeof split) != 0;
}

int main(void)
{
	struct afd_contract contract = {
		.size = sizeof contract, .hidden_size = HIDDEN, .n_layers = LAYERS
	};
	char address[64];
	pid_t parent = getpid(), child;
	int status, child_status;
	afd_context *ctx;

	snprintf(address, sizeof address, "shm:own-engine.%d", (int)parent);
	child = fork(); /* before the library is used: handles do not cross a fork */
	CHECK(afd_context_create(&ctx, NULL));
	status = child ? attention_process(ctx, &contract, address)
		       : ffn_process(ctx, &contract, address);
	afd_context_destroy(ctx);
	if (child) {
		kill(child, SIGTERM);
		waitpid(child, &child_status, 0);
		status |= child_status != 0;
	}
	return status;
}
