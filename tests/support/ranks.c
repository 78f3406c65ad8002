/* SPDX-License-Identifier: Apache-2.0 */
/* Builds and drives the group of ranks.h. */
#include "ranks.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A name of this process, so that runs beside each other do not meet. */
static void name_address(char address[48], const char *scheme, const char *what, uint32_t i)
{
	snprintf(address, 48, "%s:%s%u-%d", scheme ? scheme : "loop", what, i, (int)getpid());
}

static void open_model(struct ranks *ranks, const struct ranks_params *p)
{
	const struct afd_context_params context = { .size = sizeof(context), .tracer = p->tracer };
	const struct afd_model_params model = { .size = sizeof(model), .weights = p->weights };
	struct afd_model_info info = { .size = sizeof(info) };

	rig_check(afd_context_create(&ranks->ctx, &context), "context");
	rig_check(afd_model_open(&ranks->model, ranks->ctx, p->checkpoint, &model), "model");
	rig_check(afd_model_info(ranks->model, &info), "model info");
	ranks->vocab = info.vocab_size;
	ranks->n_layers = info.n_layers;
}

static void open_shard(struct ranks *ranks, const struct ranks_params *p,
	const struct afd_contract *contract, uint32_t i)
{
	char name[48];
	const char *address = name;
	const struct afd_transport_params net = { .size = sizeof(net),
		.listen = &address,
		.n_listen = 1,
		.max_rows = p->max_part_rows,
		.shard = p->by_experts ? (struct afd_shard){ .ep = i, .n_ep = p->n_shards }
				       : (struct afd_shard){ .tp = i, .n_tp = p->n_shards } };
	const struct afd_ffn_params ffn = { .size = sizeof(ffn),
		.device = ranks->device,
		.shard = net.shard,
		.graphs = p->attn.graphs,
		.quantize_activations = p->attn.quantize_activations };

	name_address(name, p->scheme, "ffn", i);
	rig_check(afd_transport_create(&ranks->ffn_nets[i], ranks->ctx, contract, &net),
		"FFN transport");
	rig_check(afd_ffn_create(&ranks->ffns[i], ranks->model, ranks->ffn_nets[i], &ffn), "ffn");
}

static void open_net(struct ranks *ranks, const struct ranks_params *p,
	const struct afd_contract *contract, uint32_t rank)
{
	char group[48], names[RANKS_SHARDS_MAX][48];
	const char *addresses[RANKS_SHARDS_MAX] = { names[0], names[1] };
	const struct afd_transport_params net = { .size = sizeof(net),
		.connect = addresses,
		.n_connect = p->n_shards,
		.lanes = p->lanes,
		.max_rows = p->max_part_rows,
		.to_ffn_dtype = p->wire_dtype ? p->wire_dtype : AFD_DTYPE_F32,
		.to_attention_dtype = p->wire_dtype ? p->wire_dtype : AFD_DTYPE_F32,
		.gate = p->gate ? p->gate : AFD_GATE_FFN,
		.group = p->n_ranks > 1 ? group : NULL,
		.group_index = rank,
		.group_size = p->n_ranks };
	uint32_t i;

	name_address(group, p->scheme, "group", 0);
	for (i = 0; i < RANKS_SHARDS_MAX; i++)
		name_address(names[i], p->scheme, "ffn", i);
	rig_check(afd_transport_create(&ranks->nets[rank], ranks->ctx, contract, &net),
		"transport");
}

static void open_rank(struct ranks *ranks, const struct ranks_params *p,
	const struct afd_contract *contract, uint32_t rank)
{
	const struct afd_ffn_params ffn = { .size = sizeof(ffn),
		.device = ranks->device,
		.quantize_activations = p->attn.quantize_activations };
	struct afd_attn_params attn = p->attn;

	attn.size = sizeof(attn);
	attn.device = ranks->device;
	attn.kv_dtype = attn.kv_dtype ? attn.kv_dtype : AFD_DTYPE_F32;
	if (p->n_ranks > 1 || p->n_shards)
		open_net(ranks, p, contract, rank);
	if (!p->n_shards) {
		rig_check(afd_ffn_create(&ranks->ffns[rank], ranks->model, NULL, &ffn), "ffn");
		attn.ffn = ranks->ffns[rank];
	}
	rig_check(afd_attn_create(&ranks->attns[rank], ranks->model, ranks->nets[rank], &attn),
		"attn");
}

void ranks_open(struct ranks *ranks, const struct ranks_params *p)
{
	struct afd_contract contract = { .size = sizeof(contract) };
	uint32_t i;

	memset(ranks, 0, sizeof(*ranks));
	ranks->n_ranks = p->n_ranks;
	ranks->n_shards = p->n_shards;
	ranks->device = p->device ? p->device : rig_device();
	open_model(ranks, p);
	rig_check(afd_model_contract(ranks->model, &contract), "contract");
	for (i = 0; i < p->n_shards; i++)
		open_shard(ranks, p, &contract, i);
	for (i = 0; i < p->n_ranks; i++)
		open_rank(ranks, p, &contract, i);
}

void ranks_close(struct ranks *ranks)
{
	uint32_t i;

	for (i = 0; i < RANKS_MAX; i++)
		afd_attn_destroy(ranks->attns[i]);
	for (i = 0; i < RANKS_MAX; i++) {
		afd_ffn_destroy(ranks->ffns[i]);
		afd_transport_destroy(ranks->nets[i]);
	}
	for (i = 0; i < RANKS_SHARDS_MAX; i++)
		afd_transport_destroy(ranks->ffn_nets[i]);
	afd_model_close(ranks->model);
	afd_context_destroy(ranks->ctx);
	memset(ranks, 0, sizeof(*ranks));
}

void ranks_add(struct ranks *ranks, uint64_t sequence)
{
	uint32_t i;

	for (i = 0; i < ranks->n_ranks; i++)
		rig_check(afd_attn_add(ranks->attns[i], sequence), "add");
}

void ranks_try(struct ranks *ranks, const struct afd_batch *batch, float *const *logits, int *rc)
{
	time_t end = time(NULL) + 60;
	uint32_t i, n_busy;

	for (i = 0; i < ranks->n_ranks; i++) {
		struct afd_batch own = *batch;

		own.logits = logits ? logits[i] : NULL;
		rc[i] = afd_attn_begin(ranks->attns[i], &own);
	}
	do {
		assert_true(time(NULL) < end);
		for (i = n_busy = 0; i < ranks->n_ranks; i++) {
			if (afd_attn_busy(ranks->attns[i]) > 0)
				rc[i] = afd_attn_poll(ranks->attns[i]);
			n_busy += afd_attn_busy(ranks->attns[i]) > 0;
		}
		for (i = 0; i < ranks->n_shards; i++)
			rig_check(afd_ffn_poll(ranks->ffns[i]), "ffn poll");
	} while (n_busy);
}

void ranks_step(struct ranks *ranks, const struct afd_batch *batch, float *const *logits)
{
	int rc[RANKS_MAX];
	uint32_t i;

	ranks_try(ranks, batch, logits, rc);
	for (i = 0; i < ranks->n_ranks; i++)
		rig_check(rc[i], "step");
}

void ranks_decode(
	struct ranks *ranks, const struct golden *golden, uint32_t chunk, float *const *logits)
{
	float *at[RANKS_MAX];
	uint32_t done = 0, i, n;

	ranks_add(ranks, 1);
	for (; done < golden->n_positions; done += n) {
		struct afd_entry entry = { .sequence = 1,
			.ids = golden->ids + done,
			.outputs = AFD_OUTPUT_ALL };
		struct afd_batch batch = { .size = sizeof(batch),
			.entries = &entry,
			.n_entries = 1,
			.entry_bytes = sizeof(entry) };

		n = done < golden->n_prompt ? golden->n_prompt - done : 1;
		n = chunk && n > chunk ? chunk : n;
		entry.n_ids = batch.logits_rows = n;
		for (i = 0; i < ranks->n_ranks; i++)
			at[i] = logits[i] + (size_t)done * golden->vocab;
		ranks_step(ranks, &batch, at);
	}
}
