/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any message of the handshake, to both sides: what decodes is encoded again to the same fields, and
 * judging it ends in a refusal that names a field, or in values that a link can be made of.
 */
#include <stdlib.h>
#include <string.h>

#include "../../lib/transport/net.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

static void expect(int holds)
{
	if (!holds)
		abort();
}

static afd_transport *create(afd_context *ctx, int attention)
{
	struct afd_contract contract = { .size = sizeof(contract), .hidden_size = 4, .n_layers = 3 };
	const char *address[1] = { "loop:fuzz" };
	struct afd_transport_params params = { .size = sizeof(params),
		.max_rows = 8,
		.lanes = 2,
		.max_peers = 1,
		.n_listen = !attention,
		.n_connect = attention };
	afd_transport *net;

	params.listen = attention ? NULL : address;
	params.connect = attention ? address : NULL;
	expect(!afd_transport_create(&net, ctx, &contract, &params));
	return net;
}

static void again(const struct afd__hello *said)
{
	static struct afd__hello once_more;
	uint8_t message[AFD__HELLO_MAX];
	size_t bytes;

	if (said->wire_version != AFD__WIRE_VERSION || said->kind == AFD__NONCE)
		return;
	bytes = afd__hello_encode(message, sizeof(message), said);
	expect(bytes && !afd__hello_decode(&once_more, message, bytes));
	expect(!memcmp(said, &once_more, sizeof(*said)));
}

static void judge(afd_context *ctx, const struct afd__hello *said, int attention)
{
	struct afd__hello refusal = { .kind = 0 };
	afd_transport *net = create(ctx, attention);
	struct afd__link *link = attention ? net->links[0] : afd__link_create(net, NULL);
	int refused;

	link->kind = attention ? AFD__LINK_TO_FFN : AFD__LINK_FROM_ATTENTION;
	refused = attention ? afd__welcome_judge(link, said, &refusal)
			    : afd__hello_judge(link, said, &refusal);
	if (refused)
		expect(refusal.kind == AFD__REFUSAL && refusal.field[0]);
	else
		expect(said->lanes >= 1 && said->lanes <= AFD_MAX_LANES && said->max_rows >= 1);
	if (!refused && attention) {
		*link->said = *said;
		link->max_rows = said->max_rows;
		if (afd__shards_place(link, &refusal))
			expect(refusal.field[0]);
		else
			expect(link->rank < link->shard.n_targets);
	}
	if (!attention)
		afd__link_destroy(link);
	afd_transport_destroy(net);
}

/* A probe gets an offer within the listener's limits. */
static void answer_probe(afd_context *ctx, const struct afd__hello *said)
{
	afd_transport *net = create(ctx, 0);
	struct afd__link *link = afd__link_create(net, NULL);

	*link->said = *said;
	expect(afd__echo_answer(link) == 1 && net->n_probes == 1);
	expect(link->probe_bytes <= AFD__PROBE_BYTES_MAX && link->probe_bytes % 64 == 0);
	expect(!said->probe_bytes == !link->probe_bytes);
	afd__link_destroy(link);
	expect(!net->n_probes);
	afd_transport_destroy(net);
}

/* An offer is refused, or leads to places that are addresses, or have a reason why not. */
static void take_offer(afd_context *ctx, const struct afd__hello *said)
{
	struct afd_contract contract = { .size = sizeof(contract), .hidden_size = 4, .n_layers = 3 };
	const char *address = "auto:127.0.0.1:9";
	struct afd_transport_params params = {
		.size = sizeof(params), .connect = &address, .n_connect = 1
	};
	struct afd__survey *survey;
	afd_transport *net;

	expect(!afd_transport_create(&net, ctx, &contract, &params));
	survey = net->links[0]->survey;
	survey->measures = true;
	afd__survey_begin(net->links[0]);
	net->links[0]->probe_bytes = AFD__PROBE_BYTES_MAX;
	*net->links[0]->said = *said;
	if (!afd__survey_judge(net->links[0]))
		expect(net->links[0]->probe_bytes && survey->n_trials <= AFD__TRIALS_MAX);
	for (uint32_t i = 0; i < survey->n_trials; i++)
		expect(survey->trials[i].error ? survey->trials[i].text[0] != 0
					       : survey->trials[i].address.name != NULL);
	afd_transport_destroy(net);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	static struct afd__hello said;
	afd_context *ctx;

	if (n_bytes > AFD__HELLO_MAX || afd__hello_decode(&said, data, n_bytes))
		return 0;
	again(&said);
	expect(!afd_context_create(&ctx, NULL));
	judge(ctx, &said, 0);
	judge(ctx, &said, 1);
	if (said.kind == AFD__PROBE && said.wire_version == AFD__WIRE_VERSION)
		answer_probe(ctx, &said);
	take_offer(ctx, &said);
	afd_context_destroy(ctx);
	return 0;
}
