/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What it costs to account for the time of a part, on the attention side when its reply is found:
 * the split and its six histograms, without a tracer and with one that copies. Prints nanoseconds,
 * the least and the middle of many batches, so that other work on the machine is left out; judges
 * nothing.
 */
#include <stdio.h>
#include <stdlib.h>

#include "../../lib/transport/net.h"

enum { LAYERS = 48, PARTS = 2000, BATCHES = 400, RING = 1024 };

static struct afd_span ring[RING];
static uint32_t n_spans;

static void keep(void *user, const struct afd_span *span)
{
	ring[n_spans++ % RING] = *span;
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void measure(struct afd__link *link, const char *what)
{
	struct afd__header reply = {
		.queue_ns = 2000, .gather_ns = 5000, .compute_ns = 20000, .kind = AFD__FRAME_ROWS
	};
	struct afd__slot_out out = { .n_rows = 1, .n_parts = 1 };
	static double ns[BATCHES];

	for (int batch = 0; batch < BATCHES; batch++) {
		uint64_t begin_ns = afd__now_ns();

		for (int i = 0; i < PARTS; i++) {
			out.layer = (uint32_t)i % LAYERS;
			out.posted_ns = begin_ns - 50000;
			afd__times_take(link, &out, &reply);
		}
		ns[batch] = (double)(afd__now_ns() - begin_ns) / PARTS;
	}
	qsort(ns, BATCHES, sizeof(*ns), compare);
	printf("%s: least %.0f ns, median %.0f ns a part\n", what, ns[0], ns[BATCHES / 2]);
}

int main(void)
{
	struct afd_contract contract = {
		.size = sizeof(contract), .hidden_size = 64, .n_layers = LAYERS
	};
	const char *address = "loop:nobody";
	struct afd_transport_params params = {
		.size = sizeof(params), .connect = &address, .n_connect = 1
	};
	afd_transport *net;
	afd_context *ctx;

	if (afd_context_create(&ctx, NULL) || afd_transport_create(&net, ctx, &contract, &params)) {
		fprintf(stderr, "%s\n", afd_last_error());
		return 1;
	}
	measure(net->links[0], "without a tracer");
	ctx->tracer = (struct afd_tracer){ .span = keep };
	measure(net->links[0], "with a tracer");
	afd_transport_destroy(net);
	afd_context_destroy(ctx);
	return 0;
}
