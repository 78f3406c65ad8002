/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes and ends an FFN stage: checks what it was given, opens the device, loads the weights,
 * allocates the activations of max_rows rows, and takes the transport. Everything that a pass needs
 * is there when afd_ffn_create returns. Called by hosts.
 */
#include "stage.h"

#include <stdio.h>
#include <string.h>

enum { DEFAULT_MAX_ROWS = 2048 };

int afd__ffn_check(const struct afd_ffn *ffn)
{
	if (!ffn)
		return afd__error(-EINVAL, "ffn: is NULL");
	return afd__context_check(ffn->ctx, "ffn");
}

bool afd__ffn_holds(const struct afd_ffn *ffn, int64_t layer)
{
	return layer >= ffn->first_layer && layer < (int64_t)ffn->first_layer + ffn->n_layers;
}

/* ---- what it was given ---- */

static int check_params(
	const afd_model *model, const afd_transport *net, const struct afd_ffn_params *p)
{
	if (!model == !p->compute)
		return afd__error(-EINVAL, "ffn: %s of model and compute are given, it takes one",
			model ? "both" : "none");
	if (p->compute && !net)
		return afd__error(
			-EINVAL, "ffn: a compute function serves a transport, but net is NULL");
	if (p->compute && p->device && strcmp(p->device, "cpu"))
		return afd__error(-EINVAL,
			"ffn: device is \"%s\", but the rows of a compute function are in host "
			"memory",
			p->device);
	if (p->max_rows > AFD__FFN_MAX_ROWS)
		return afd__error(
			-EINVAL, "ffn: max_rows is %u, limit %d", p->max_rows, AFD__FFN_MAX_ROWS);
	if (p->_pad)
		return afd__error(-EINVAL, "ffn: _pad is %u, must be 0", p->_pad);
	if (p->quantize_activations < 0 || p->quantize_activations > 1)
		return afd__error(-EINVAL, "ffn: quantize_activations is %d, limit 1",
			p->quantize_activations);
	if (p->compute && p->quantize_activations)
		return afd__error(-EINVAL, "ffn: quantize_activations is 1, but a compute function "
					   "has its own products");
	return 0;
}

/* 0 and the enum's default are the same. */
static int32_t or_default(int32_t value, int32_t default_value)
{
	return value ? value : default_value;
}

/* The transport's contract against the model's: what the handshake compares, field by field. */
static int compare(const struct afd_contract *net, const struct afd_contract *model)
{
	const struct {
		const char *name;
		int64_t net, model;
	} fields[] = {
		{ "hidden_size", net->hidden_size, model->hidden_size },
		{ "n_layers", net->n_layers, model->n_layers },
		{ "n_experts", net->n_experts, model->n_experts },
		{ "top_k", net->top_k, model->top_k },
		{ "router", or_default(net->router, AFD_ROUTER_NONE),
			or_default(model->router, AFD_ROUTER_NONE) },
		{ "activation", or_default(net->activation, AFD_ACTIVATION_SILU),
			or_default(model->activation, AFD_ACTIVATION_SILU) },
		{ "shared_experts", net->shared_experts, model->shared_experts },
	};
	size_t i;

	for (i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
		if (fields[i].net != fields[i].model)
			return afd__error(-EINVAL,
				"ffn: the transport's contract has %s %lld, the model has %lld",
				fields[i].name, (long long)fields[i].net,
				(long long)fields[i].model);
	}
	return 0;
}

static bool is_given(const struct afd_shard *s)
{
	return s->tp || s->n_tp || s->ep || s->n_ep;
}

/* The shard of the params, or that which net was made with. */
static int choose_shard(struct afd_ffn *ffn, const afd_model *model, const struct afd_ffn_params *p,
	const struct afd__exchange_info *net)
{
	const struct afd_shard *given = ffn->net && !is_given(&p->shard) ? &net->shard : &p->shard;
	int rc = afd__shard_read(
		&ffn->shard, given, AFD_ROLE_FFN, model ? &model->arch : NULL, "ffn: shard");

	/* Without experts they are ranks like the tensor-parallel ones: layers are split by width. */
	if (!rc && ffn->contract.n_experts && ffn->shard.n_ep > ffn->contract.n_experts)
		rc = afd__error(-EINVAL, "ffn: shard: %u expert-parallel ranks, limit %u experts",
			ffn->shard.n_ep, ffn->contract.n_experts);
	return rc;
}

static int agree(struct afd_ffn *ffn, const afd_model *model, const struct afd_ffn_params *p)
{
	struct afd__exchange_info net = { 0 };
	int rc;

	ffn->contract.size = sizeof(ffn->contract);
	if (ffn->net) {
		afd__transport_info(ffn->net, &net);
		if (net.attention)
			return afd__error(-EINVAL, "ffn: net was made to connect, an FFN stage "
						   "takes one that listens");
		ffn->contract = net.contract;
	}
	if (model) {
		rc = afd_model_contract(model, &ffn->contract);
		if (!rc && ffn->net)
			rc = compare(&net.contract, &ffn->contract);
		if (rc)
			return rc;
	}
	if (p->first_layer >= ffn->contract.n_layers ||
		p->n_layers > ffn->contract.n_layers - p->first_layer)
		return afd__error(-EINVAL, "ffn: first_layer %u and n_layers %u, the model has %u",
			p->first_layer, p->n_layers, ffn->contract.n_layers);
	ffn->first_layer = p->first_layer;
	ffn->n_layers = p->n_layers ? p->n_layers : ffn->contract.n_layers - p->first_layer;
	ffn->hidden = ffn->contract.hidden_size;
	ffn->max_rows = p->max_rows ? p->max_rows : DEFAULT_MAX_ROWS;
	if (ffn->net && (!afd__ffn_holds(ffn, net.first_layer) ||
				!afd__ffn_holds(ffn, (int64_t)net.first_layer + net.n_layers - 1)))
		return afd__error(-EINVAL,
			"ffn: holds layers %u .. %u, but net was made for %u .. %u",
			ffn->first_layer, ffn->first_layer + ffn->n_layers - 1, net.first_layer,
			net.first_layer + net.n_layers - 1);
	return choose_shard(ffn, model, p, &net);
}

/* ---- activations ---- */

/* Or SIZE_MAX, which no device has. A row's bytes come from numbers of 32 bits. */
static size_t rows_bytes(uint32_t n_rows, size_t row_bytes)
{
	size_t all;

	return __builtin_mul_overflow((size_t)n_rows, row_bytes, &all) ? SIZE_MAX : all;
}

enum { MAX_BUFFERS = 10 };

struct buffer {
	void **at;
	size_t bytes; /* 0: not needed */
	const char *what;
};

static void list_buffers(struct afd_ffn *ffn, struct buffer *list /* [MAX_BUFFERS] */)
{
	bool host = ffn->host.compute != NULL;
	size_t hidden = ffn->hidden, width = ffn->weights.max_width, top_k = afd__ffn_top_k(ffn);
	const struct {
		void **at;
		size_t row_bytes;
		const char *what;
	} rows[MAX_BUFFERS - 1] = {
		{ (void **)&ffn->x, hidden * sizeof(float), "ffn: x" },
		{ (void **)&ffn->y, hidden * sizeof(float), "ffn: y" },
		{ (void **)&ffn->ids, top_k * sizeof(int32_t), "ffn: ids" },
		{ (void **)&ffn->expert_weights, top_k * sizeof(float), "ffn: weights of experts" },
		{ (void **)&ffn->gate_up, 2 * width * sizeof(float), "ffn: gate and up" },
		{ (void **)&ffn->activated, width * sizeof(float), "ffn: activation" },
		{ (void **)&ffn->logits, host ? 0 : ffn->contract.n_experts * sizeof(float),
			"ffn: logits" },
		{ (void **)&ffn->quantized, ffn->quantizes ? hidden * sizeof(float) : 0,
			"ffn: quantised x" },
		{ &ffn->staging, host ? 0 : AFD__FFN_STAGING_ROW_BYTES(hidden), "ffn: staging" },
	};
	size_t i;

	for (i = 0; i < MAX_BUFFERS - 1; i++)
		list[i] = (struct buffer){ rows[i].at, rows_bytes(ffn->max_rows, rows[i].row_bytes),
			rows[i].what };
	list[i] = (struct buffer){ &ffn->scratch, ffn->scratch_bytes, "ffn: scratch of experts" };
}

/* What the largest stack asks for. */
static size_t scratch_bytes(const struct afd_ffn *ffn)
{
	size_t most = 0, bytes;
	uint32_t i, k;

	for (i = 0; ffn->weights.layers && i < ffn->n_layers; i++) {
		const struct afd__ffn_layer *layer = &ffn->weights.layers[i];

		for (k = 0; k < layer->n_stacks; k++) {
			struct afd__experts_args experts = {
				.gate_up = layer->stacks[k].gate_up,
				.down = layer->stacks[k].down,
				.n_rows = ffn->max_rows,
				.top_k = layer->arch->top_k,
				.quantize = ffn->quantizes,
			};

			bytes = afd__experts_scratch_bytes(ffn->device, &experts);
			most = bytes > most ? bytes : most;
		}
	}
	return most;
}

static int allocate(struct afd_ffn *ffn)
{
	struct buffer list[MAX_BUFFERS];
	size_t i;
	int rc = 0;

	ffn->scratch_bytes = scratch_bytes(ffn);
	list_buffers(ffn, list);
	for (i = 0; i < MAX_BUFFERS && !rc; i++) {
		if (list[i].bytes)
			rc = afd__device_alloc(
				ffn->device, list[i].bytes, list[i].what, list[i].at);
	}
	return rc;
}

static void release(struct afd_ffn *ffn)
{
	struct buffer list[MAX_BUFFERS];
	size_t i;

	list_buffers(ffn, list);
	for (i = 0; i < MAX_BUFFERS; i++) {
		if (*list[i].at)
			afd__device_free(ffn->device, *list[i].at, list[i].bytes);
	}
}

/* ---- life ---- */

/* What the handshake says of the shard, and of the bits that it gives: replicas must agree in it.
 */
static int state(const struct afd_ffn *ffn)
{
	const struct afd__ffn_weights *weights = &ffn->weights;
	const struct afd_shard shard = { ffn->shard.tp, ffn->shard.n_tp, ffn->shard.ep,
		ffn->shard.n_ep };
	const char *kind = ffn->device->ops->name, *layout = "";
	char text[16];

	if (!strcmp(kind, "cpu") || !strcmp(kind, "deferred"))
		kind = afd_context_isa(ffn->ctx);
	if (ffn->host.compute)
		kind = "host";
	if (weights->n_in_place)
		layout = weights->n_packed ? "/mixed" : "/in-place";
	snprintf(text, sizeof(text), "%s%s", kind, layout);
	afd__transport_state(ffn->net, weights->fingerprint, weights->epoch, text);
	return afd__transport_state_shard(ffn->net, &shard);
}

static int build(struct afd_ffn *ffn, const afd_model *model, const struct afd_ffn_params *p)
{
	int rc = agree(ffn, model, p);

	if (!rc)
		rc = afd__device_open(&ffn->device, ffn->ctx, p->device ? p->device : "cpu");
	if (!rc)
		rc = afd__queue_open_with(&ffn->queue, ffn->device, &ffn->options);
	if (!rc && model)
		rc = afd__ffn_load(ffn, model, p);
	if (!rc)
		rc = allocate(ffn);
	if (!rc)
		rc = afd__ffn_metrics_create(ffn);
	if (!rc)
		rc = afd__recordings_create(&ffn->graphs, ffn->device, "ffn", p->graphs,
			ffn->net && model ? ffn->n_layers : 0);
	if (!rc && ffn->net)
		rc = afd__ffn_server_create(ffn, p->gather_us);
	if (!rc && ffn->net)
		rc = state(ffn);
	if (!rc && ffn->net)
		afd__device_watch_slots(ffn->device, ffn->net);
	return rc;
}

static afd_context *context_of(const afd_model *model, const afd_transport *net)
{
	struct afd__exchange_info info;

	if (model)
		return model->ctx;
	afd__transport_info(net, &info);
	return info.ctx;
}

int afd_ffn_create(afd_ffn **out, const afd_model *model, afd_transport *net,
	const struct afd_ffn_params *params)
{
	struct afd_ffn_params p;
	struct afd_ffn *ffn;
	int rc = afd__params_copy(&p, sizeof(p), params, "struct afd_ffn_params");

	if (rc)
		return rc;
	if (!out)
		return afd__error(-EINVAL, "ffn: out is NULL");
	rc = check_params(model, net, &p);
	if (!rc && model)
		rc = afd__model_check(model);
	if (!rc)
		rc = afd__context_check(context_of(model, net), "ffn");
	if (rc)
		return rc;
	ffn = afd__alloc(context_of(model, net), 1, sizeof(*ffn));
	if (!ffn)
		return -ENOMEM;
	ffn->ctx = context_of(model, net);
	ffn->host.compute = p.compute;
	ffn->host.user = p.compute_user;
	ffn->quantizes = p.quantize_activations;
	ffn->options = (struct afd__queue_options){ p.stream, p.deterministic };
	if (p.compute)
		memcpy(ffn->weights.fingerprint, p.weights, sizeof(p.weights));
	ffn->weights.epoch = p.weights_epoch;
	rc = net ? afd__transport_own(net, ffn) : 0;
	if (!rc) {
		ffn->net = net;
		rc = build(ffn, model, &p);
	}
	if (rc) {
		afd_ffn_destroy(ffn);
		return rc;
	}
	*out = ffn;
	return 0;
}

void afd_ffn_destroy(afd_ffn *ffn)
{
	if (!ffn)
		return;
	/* What is enqueued may still touch slots and activations. */
	afd__queue_close(&ffn->queue);
	afd__recordings_destroy(&ffn->graphs);
	afd__ffn_server_destroy(ffn);
	if (ffn->net && ffn->device)
		afd__transport_watch_slots(ffn->net, NULL);
	if (ffn->net)
		(void)afd__transport_own(ffn->net, NULL);
	afd__ffn_metrics_destroy(ffn);
	if (ffn->device) {
		release(ffn);
		afd__ffn_unload(ffn);
	}
	afd__device_close(ffn->device);
	afd__free(ffn);
}

int afd_ffn_stats(const afd_ffn *ffn, struct afd_ffn_stats *stats)
{
	struct afd_ffn_stats now = { 0 };
	int rc = afd__ffn_check(ffn);

	if (rc)
		return rc;
	now.n_passes = atomic_load(&ffn->n_passes);
	now.n_rows = atomic_load(&ffn->n_rows);
	now.compute_ns = atomic_load(&ffn->compute_ns);
	now.weight_bytes = ffn->weights.bytes;
	memcpy(now.weights, ffn->weights.fingerprint, sizeof(now.weights));
	now.stored_bytes = ffn->weights.stored_bytes;
	now.n_peers = ffn->server.n_peers;
	return afd__params_give(stats, &now, sizeof(now), "struct afd_ffn_stats");
}

/* ---- for a local attention stage ---- */

void afd__ffn_info(const afd_ffn *ffn, struct afd__ffn_info *info)
{
	*info = (struct afd__ffn_info){
		.contract = ffn->contract,
		.device = ffn->device,
		.first_layer = ffn->first_layer,
		.n_layers = ffn->n_layers,
		.max_rows = ffn->max_rows,
		.deterministic = ffn->options.deterministic,
		.served = ffn->net != NULL,
	};
}

int afd__ffn_own(afd_ffn *ffn, const void *stage)
{
	if (stage && ffn->owner && ffn->owner != stage)
		return afd__error(-EBUSY, "ffn: another attention stage has it");
	if (stage && (ffn->shard.n_tp > 1 || ffn->shard.n_ep > 1))
		return afd__error(-EINVAL,
			"ffn: holds shard tp %u/%u, ep %u/%u, a local attention stage needs all",
			ffn->shard.tp, ffn->shard.n_tp, ffn->shard.ep, ffn->shard.n_ep);
	ffn->owner = stage;
	return 0;
}
