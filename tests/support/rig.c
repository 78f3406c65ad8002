/* SPDX-License-Identifier: Apache-2.0 */
/* Builds and drives the decoder of rig.h. */
#include "rig.h"

#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void rig_check(int rc, const char *what)
{
	if (rc < 0)
		fail_msg("%s: %d, %s", what, rc, afd_last_error());
}

const char *rig_device(void)
{
	const char *device = getenv("AFD_TEST_DEVICE");

	return device ? device : "cpu";
}

static void open_model(struct rig *rig, const struct rig_params *p)
{
	struct afd_context_params context = { .size = sizeof(context),
		.n_threads = p->n_threads,
		.tracer = p->tracer,
		.log = p->log };
	struct afd_model_params model = { .size = sizeof(model), .weights = p->weights };
	struct afd_model_info info = { .size = sizeof(info) };

	rig_check(afd_context_create(&rig->ctx, &context), "context");
	rig_check(afd_model_open(&rig->model, rig->ctx, p->checkpoint, &model), "model");
	rig_check(afd_model_info(rig->model, &info), "model info");
	rig->vocab = info.vocab_size;
	rig->n_layers = info.n_layers;
}

static uint32_t at_least_one(uint32_t n)
{
	return n ? n : 1;
}

static void listen_at(struct rig *rig, const struct rig_params *p, const char *address,
	const struct afd_contract *contract, afd_transport **net)
{
	const struct afd_transport_params params = { .size = sizeof(params),
		.max_rows = p->max_part_rows,
		.listen = &address,
		.n_listen = 1 };

	rig_check(afd_transport_create(net, rig->ctx, contract, &params), "FFN transport");
}

static void open_nets(struct rig *rig, const struct rig_params *p)
{
	static char names[RIG_SHARDS][100];
	const char *connect[RIG_SHARDS];
	struct afd_transport_params params = { .size = sizeof(params),
		.max_rows = p->max_part_rows,
		.connect = connect,
		.lanes = p->lanes,
		.gate = p->gate };
	struct afd_contract contract = { .size = sizeof(contract) };
	uint32_t i, n = at_least_one(p->n_tp) * at_least_one(p->n_ep);

	assert_true(n <= RIG_SHARDS);
	rig_check(afd_model_contract(rig->model, &contract), "contract");
	listen_at(rig, p, p->address, &contract, &rig->ffn_net);
	connect[0] = p->address;
	for (i = 1; i < n; i++) {
		snprintf(names[i], sizeof(names[i]), "%.80s-%u", p->address, i);
		connect[i] = names[i];
		listen_at(rig, p, names[i], &contract, &rig->others[i - 1].net);
	}
	rig->n_others = n - 1;
	params.n_connect = n;
	params.to_ffn_dtype = p->wire_dtype ? p->wire_dtype : AFD_DTYPE_F32;
	params.to_attention_dtype = p->y_dtype ? p->y_dtype : params.to_ffn_dtype;
	rig_check(afd_transport_create(&rig->attn_net, rig->ctx, &contract, &params),
		"attention transport");
}

static void open_ffns(struct rig *rig, const struct rig_params *p, const char *device)
{
	/* A compute function works on host memory, whatever attention runs on. */
	struct afd_ffn_params ffn = { .size = sizeof(ffn),
		.device = p->compute ? "cpu" : p->ffn_device ? p->ffn_device : device,
		.compute = p->compute,
		.compute_user = p->compute_user,
		.stream = p->stream,
		.graphs = p->attn.graphs,
		.quantize_activations = p->quantize_activations };
	uint32_t i, n_tp = at_least_one(p->n_tp), n_ep = at_least_one(p->n_ep);

	for (i = 0; i <= rig->n_others; i++) {
		if (rig->n_others)
			ffn.shard = (struct afd_shard){ i % n_tp, n_tp, i / n_tp, n_ep };
		rig_check(afd_ffn_create(i ? &rig->others[i - 1].ffn : &rig->ffn,
			      p->compute ? NULL : rig->model,
			      i ? rig->others[i - 1].net : rig->ffn_net, &ffn),
			"ffn");
	}
}

void rig_open(struct rig *rig, const struct rig_params *p)
{
	const char *device = p->device ? p->device : rig_device();
	struct afd_attn_params attn = p->attn;

	memset(rig, 0, sizeof(*rig));
	open_model(rig, p);
	if (p->address)
		open_nets(rig, p);
	open_ffns(rig, p, device);
	attn.size = sizeof(attn);
	attn.device = device;
	attn.stream = p->stream;
	/* That a row does not know its neighbours is promised so. */
	attn.deterministic |= !strncmp(device, "cuda", 4);
	attn.quantize_activations |= p->quantize_activations;
	attn.kv_dtype = attn.kv_dtype ? attn.kv_dtype : AFD_DTYPE_F32;
	if (!p->address) {
		attn.ffn = rig->ffn;
		attn.lanes = p->lanes;
		attn.to_ffn_dtype = p->wire_dtype ? p->wire_dtype : AFD_DTYPE_F32;
		attn.to_attention_dtype = p->y_dtype ? p->y_dtype : attn.to_ffn_dtype;
	}
	rig_check(afd_attn_create(&rig->attn, rig->model, rig->attn_net, &attn), "attn");
}

void rig_close(struct rig *rig)
{
	afd_attn_destroy(rig->attn);
	afd_ffn_destroy(rig->ffn);
	afd_transport_destroy(rig->attn_net);
	afd_transport_destroy(rig->ffn_net);
	for (uint32_t i = 0; i < rig->n_others; i++) {
		afd_ffn_destroy(rig->others[i].ffn);
		afd_transport_destroy(rig->others[i].net);
	}
	afd_model_close(rig->model);
	afd_context_destroy(rig->ctx);
	memset(rig, 0, sizeof(*rig));
}

int rig_turn(struct rig *rig)
{
	int rc = afd_attn_poll(rig->attn);

	/* As with two processes: the FFN gets the rows of one lane while attention goes on with
	 * another. */
	if (rc || !rig->ffn_net || !afd_attn_timeout_ms(rig->attn))
		return rc;
	rig_check(afd_ffn_poll(rig->ffn), "ffn poll");
	for (uint32_t i = 0; i < rig->n_others; i++) {
		if (rig->others[i].ffn)
			rig_check(afd_ffn_poll(rig->others[i].ffn), "ffn poll");
	}
	return 0;
}

int rig_step(struct rig *rig, const struct afd_batch *batch)
{
	time_t end = time(NULL) + 60;
	int rc = afd_attn_begin(rig->attn, batch);

	if (rc)
		return rc;
	while (!(rc = rig_turn(rig)))
		assert_true(time(NULL) < end);
	return rc < 0 ? rc : 0;
}

static int sooner(int a, int b)
{
	return b >= 0 && b < a ? b : a;
}

/* Sleeps until a descriptor or a timeout asks for a poll; returns what the attention side's poll
 * says. */
static int turn_of_loop(struct rig *rig)
{
	struct pollfd fds[1 + RIG_SHARDS] = { { afd_attn_fd(rig->attn), POLLIN, 0 } };
	int timeout_ms = sooner(10000, afd_attn_timeout_ms(rig->attn));
	afd_ffn *ffns[RIG_SHARDS] = { rig->ffn };
	uint32_t i, n_ffns = 1 + rig->n_others;

	for (i = 1; i < n_ffns; i++)
		ffns[i] = rig->others[i - 1].ffn;
	for (i = 0; i < n_ffns; i++) {
		fds[1 + i] = (struct pollfd){ afd_ffn_fd(ffns[i]), POLLIN, 0 };
		timeout_ms = sooner(timeout_ms, afd_ffn_timeout_ms(ffns[i]));
	}
	/* A signal that got lost would make it sleep. */
	assert_true(poll(fds, 1 + n_ffns, timeout_ms) > 0 || timeout_ms < 10000);
	for (i = 0; i < n_ffns; i++)
		assert_true(afd_ffn_poll(ffns[i]) >= 0);
	return afd_attn_poll(rig->attn);
}

void rig_loop(struct rig *rig, const int32_t *ids)
{
	const struct afd_entry entry = { .sequence = 1, .ids = ids, .n_ids = 4 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	int step, rc, n_turns = 0;

	assert_int_equal(afd_attn_add(rig->attn, 1), 0);
	for (step = 0; step < 3; step++) {
		assert_int_equal(afd_attn_begin(rig->attn, &batch), 0);
		while (!(rc = turn_of_loop(rig)))
			n_turns++;
		assert_int_equal(rc, 1);
	}
	/* Each turn did something: far from a loop that spins. */
	assert_true(n_turns < 2000);
	assert_int_equal(afd_attn_length(rig->attn, 1), 12);
}

void rig_append(struct rig *rig, uint64_t sequence, const int32_t *ids, uint32_t n, float *logits)
{
	struct afd_entry entry = {
		.sequence = sequence, .ids = ids, .n_ids = n, .outputs = AFD_OUTPUT_ALL
	};
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry),
		.logits = logits,
		.logits_rows = n };

	rig_check(rig_step(rig, &batch), "step");
}

void rig_decode(struct rig *rig, const struct golden *golden, uint32_t chunk, float *logits)
{
	uint32_t done = 0;

	rig_check(afd_attn_add(rig->attn, 1), "add");
	while (done < golden->n_positions) {
		uint32_t n = done < golden->n_prompt ? golden->n_prompt - done : 1;

		if (chunk && n > chunk)
			n = chunk;
		rig_append(rig, 1, golden->ids + done, n, logits + (size_t)done * golden->vocab);
		done += n;
	}
	rig_check(afd_attn_drop(rig->attn, 1), "drop");
}

float *rig_run(const struct golden *golden, const struct rig_params *params, uint32_t chunk)
{
	float *logits = calloc((size_t)golden->n_positions * golden->vocab, sizeof(*logits));
	struct rig_params p = *params;
	struct rig rig;

	assert_non_null(logits);
	p.checkpoint = golden->checkpoint;
	rig_open(&rig, &p);
	rig_decode(&rig, golden, chunk, logits);
	rig_close(&rig);
	return logits;
}
