/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Several attention stages at one FFN stage: the server computes rows of all of them in one pass,
 * and each still gets the bits of a process of its own. One thread drives all, turn by turn.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../support/rig.h"

enum { MAX_PEERS = 4, N_IDS = 6, N_STEPS = 8 };

struct peer {
	afd_transport *net;
	afd_attn *attn;
	int32_t ids[N_IDS];
	struct afd_entry entry;
	struct afd_batch batch;
	float *logits; /* [N_STEPS][vocab] */
	uint32_t n_steps;
};

struct group {
	struct golden golden;
	struct rig server; /* its FFN; the rig's own attention stage is not used */
	struct peer peers[MAX_PEERS];
	uint32_t n_peers;
	const char *device;
};

static void open_peer(struct group *g, struct peer *peer, const char *address, uint32_t lanes)
{
	const struct afd_transport_params net = { .size = sizeof(net),
		.connect = &address,
		.n_connect = 1,
		.lanes = lanes,
		.to_ffn_dtype = AFD_DTYPE_BF16,
		.to_attention_dtype = AFD_DTYPE_BF16 };
	const struct afd_attn_params attn = { .size = sizeof(attn), .device = g->device };
	struct afd_contract contract = { .size = sizeof(contract) };

	rig_check(afd_model_contract(g->server.model, &contract), "contract");
	rig_check(afd_transport_create(&peer->net, g->server.ctx, &contract, &net), "transport");
	rig_check(afd_attn_create(&peer->attn, g->server.model, peer->net, &attn), "attn");
	rig_check(afd_attn_add(peer->attn, 1), "add");
	peer->logits = calloc(N_STEPS * (size_t)g->server.vocab, sizeof(float));
	assert_non_null(peer->logits);
}

static void close_peer(struct peer *peer)
{
	afd_attn_destroy(peer->attn);
	afd_transport_destroy(peer->net);
	free(peer->logits);
}

/* Step 0 appends the prompt, each later one an id of the case. */
static void begin_step(struct group *g, struct peer *peer)
{
	uint32_t n = peer->n_steps ? 1 : N_IDS;
	const int32_t *ids = g->golden.ids + (peer->n_steps ? N_IDS - 1 + peer->n_steps : 0);

	memcpy(peer->ids, ids, n * sizeof(*ids));
	peer->entry = (struct afd_entry){ .sequence = 1, .ids = peer->ids, .n_ids = n };
	peer->batch = (struct afd_batch){ .size = sizeof(peer->batch),
		.entries = &peer->entry,
		.n_entries = 1,
		.entry_bytes = sizeof(peer->entry),
		.logits = peer->logits + peer->n_steps * (size_t)g->server.vocab,
		.logits_rows = 1 };
	rig_check(afd_attn_begin(peer->attn, &peer->batch), "begin");
}

/* 1 when the peer has done all its steps. */
static int turn(struct group *g, struct peer *peer)
{
	int rc;

	if (peer->n_steps == N_STEPS)
		return 1;
	if (!afd_attn_busy(peer->attn))
		begin_step(g, peer);
	do {
		rc = afd_attn_poll(peer->attn);
		rig_check(rc, "poll");
	} while (!rc && !afd_attn_timeout_ms(peer->attn));
	peer->n_steps += rc == 1;
	return 0;
}

static void run(struct group *g, const char *address, uint32_t n_peers, uint32_t lanes)
{
	const struct rig_params params = { .checkpoint = g->golden.checkpoint,
		.address = address,
		.device = g->device };
	time_t end = time(NULL) + 60;
	uint32_t i, n_done = 0;

	rig_open(&g->server, &params);
	afd_attn_destroy(g->server.attn);
	afd_transport_destroy(g->server.attn_net);
	g->server.attn = NULL;
	g->server.attn_net = NULL;
	g->n_peers = n_peers;
	for (i = 0; i < n_peers; i++)
		open_peer(g, &g->peers[i], address, lanes);
	while (n_done < n_peers) {
		assert_true(time(NULL) < end);
		for (n_done = i = 0; i < n_peers; i++)
			n_done += (uint32_t)turn(g, &g->peers[i]);
		rig_check(afd_ffn_poll(g->server.ffn), "ffn poll");
	}
}

static void end(struct group *g)
{
	uint32_t i;

	for (i = 0; i < g->n_peers; i++)
		close_peer(&g->peers[i]);
	rig_close(&g->server);
	memset(g->peers, 0, sizeof(g->peers));
}

/* What one process gives. */
static float *decode_alone(struct group *g)
{
	const struct rig_params params = { .checkpoint = g->golden.checkpoint,
		.wire_dtype = AFD_DTYPE_BF16,
		.attn.kv_dtype = AFD_DTYPE_BF16 };
	size_t vocab = g->golden.vocab;
	float *all = calloc((N_IDS + N_STEPS) * vocab, sizeof(float));
	struct rig rig;
	uint32_t i;

	rig_open(&rig, &params);
	assert_int_equal(afd_attn_add(rig.attn, 1), 0);
	rig_append(&rig, 1, g->golden.ids, N_IDS, all);
	for (i = 1; i < N_STEPS; i++)
		rig_append(&rig, 1, g->golden.ids + N_IDS - 1 + i, 1, all + (N_IDS - 1 + i) * vocab);
	rig_close(&rig);
	memmove(all, all + (N_IDS - 1) * vocab, N_STEPS * vocab * sizeof(float));
	return all;
}

static void compare(const char *name, const char *address)
{
	struct group g = { .device = rig_device() };
	uint32_t n_peers, lanes, i;
	float *alone;

	golden_open(&g.golden, name);
	alone = decode_alone(&g);
	for (n_peers = 1; n_peers <= MAX_PEERS; n_peers *= 2) {
		for (lanes = 1; lanes <= AFD_MAX_LANES; lanes += 3) {
			run(&g, address, n_peers, lanes);
			for (i = 0; i < n_peers; i++)
				assert_memory_equal(g.peers[i].logits, alone,
					N_STEPS * (size_t)g.golden.vocab * sizeof(float));
			end(&g);
		}
	}
	free(alone);
	golden_close(&g.golden);
}

static void peers_at_one_ffn_get_the_bits_of_one_process(void **state)
{
	char address[40];

	compare("bf16-tied", "loop:peers");
	snprintf(address, sizeof(address), "shm:peers-%d", (int)getpid());
	compare("bf16-tied", address);
}

/* Each chooses the experts of its own rows, and the server runs rows of all in one pass. */
static void peers_that_route_get_the_bits_of_one_process(void **state)
{
	compare("moe-bf16", "loop:routing-peers");
	compare("afmoe-bf16", "loop:routing-peers");
}

static void rows_of_several_peers_share_a_pass(void **state)
{
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	/* Where attention is done when its poll returns, all rows are here before the server looks. */
	struct group g = { .device = "cpu" };

	golden_open(&g.golden, "bf16-tied");
	run(&g, "loop:gather", MAX_PEERS, 1);
	rig_check(afd_ffn_stats(g.server.ffn, &stats), "stats");
	assert_int_equal(
		stats.n_rows, MAX_PEERS * (N_IDS + N_STEPS - 1) * (uint64_t)g.server.n_layers);
	/* Fewer passes than if only two peers ever met. */
	assert_true(stats.n_passes < MAX_PEERS * N_STEPS * (uint64_t)g.server.n_layers / 2);
	end(&g);
	golden_close(&g.golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(peers_at_one_ffn_get_the_bits_of_one_process),
		cmocka_unit_test(peers_that_route_get_the_bits_of_one_process),
		cmocka_unit_test(rows_of_several_peers_share_a_pass),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
