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

/* Every kind of layer that the stage would hold is one that it can compute. */
static int check_kinds(const struct afd_ffn *ffn, const uint8_t *kinds)
{
	uint32_t layer;

	for (layer = ffn->first_layer; kinds && layer < ffn->first_layer + ffn->n_layers; layer++) {
		if (kinds[layer] != AFD_FFN_DENSE && !ffn->host.compute)
			return afd__error(-ENOTSUP,
				"ffn: layer %u is of kind %u, supported is %d (dense)", layer,
				kinds[layer], AFD_FFN_DENSE);
	}
	return 0;
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
	return check_kinds(ffn, ffn->contract.ffn_kinds);
}

/* ---- activations ---- */

/* n_rows * width * bytes, or SIZE_MAX, which no device has. */
static size_t rows_bytes(uint32_t n_rows, size_t width, size_t bytes)
{
	size_t all;

	if (__builtin_mul_overflow((size_t)n_rows, width, &all) ||
		__builtin_mul_overflow(all, bytes, &all))
		return SIZE_MAX;
	return all;
}

static int allocate(struct afd_ffn *ffn)
{
	const struct {
		void **out;
		size_t width, bytes;
		const char *what;
	} buffers[] = {
		{ (void **)&ffn->x, ffn->hidden, sizeof(float), "ffn: x" },
		{ (void **)&ffn->y, ffn->hidden, sizeof(float), "ffn: y" },
		{ (void **)&ffn->gate_up, 2 * (size_t)ffn->weights.max_width, sizeof(float),
			"ffn: gate and up" },
		{ (void **)&ffn->activated, ffn->weights.max_width, sizeof(float),
			"ffn: activation" },
		{ &ffn->staging, AFD__FFN_STAGING_ROW_BYTES(ffn->hidden), 1, "ffn: staging" },
	};
	size_t i, n = ffn->host.compute ? 2 : sizeof(buffers) / sizeof(buffers[0]);
	int rc = 0;

	for (i = 0; i < n && !rc; i++)
		rc = afd__device_alloc(ffn->device,
			rows_bytes(ffn->max_rows, buffers[i].width, buffers[i].bytes),
			buffers[i].what, buffers[i].out);
	return rc;
}

static void release(struct afd_ffn *ffn)
{
	const struct {
		void *memory;
		size_t width, bytes;
	} buffers[] = {
		{ ffn->x, ffn->hidden, sizeof(float) },
		{ ffn->y, ffn->hidden, sizeof(float) },
		{ ffn->gate_up, 2 * (size_t)ffn->weights.max_width, sizeof(float) },
		{ ffn->activated, ffn->weights.max_width, sizeof(float) },
		{ ffn->staging, AFD__FFN_STAGING_ROW_BYTES(ffn->hidden), 1 },
	};
	size_t i;

	for (i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) {
		if (buffers[i].memory)
			afd__device_free(ffn->device, buffers[i].memory,
				rows_bytes(ffn->max_rows, buffers[i].width, buffers[i].bytes));
	}
}

/* ---- life ---- */

/* What the handshake says of the bits that this stage gives: replicas must agree in it. */
static void state(const struct afd_ffn *ffn)
{
	const char *kind = ffn->device->ops->name;
	bool in_place =
		ffn->weights.layers && ffn->weights.layers[0].down.layout == AFD__LAYOUT_IN_PLACE;
	char text[16];

	if (!strcmp(kind, "cpu") || !strcmp(kind, "deferred"))
		kind = afd_context_isa(ffn->ctx);
	if (ffn->host.compute)
		kind = "host";
	snprintf(text, sizeof(text), "%s%s", kind, in_place ? "/in-place" : "");
	afd__transport_state(ffn->net, ffn->weights.fingerprint, text);
}

static int build(struct afd_ffn *ffn, const afd_model *model, const struct afd_ffn_params *p)
{
	int rc = agree(ffn, model, p);

	if (!rc)
		rc = afd__device_open(&ffn->device, ffn->ctx, p->device ? p->device : "cpu");
	if (!rc && model)
		rc = afd__ffn_load(ffn, model, p);
	if (!rc)
		rc = allocate(ffn);
	if (!rc)
		rc = afd__queue_open(&ffn->queue, ffn->device);
	if (!rc)
		rc = afd__ffn_metrics_create(ffn);
	if (!rc && ffn->net)
		rc = afd__ffn_server_create(ffn, p->gather_us);
	if (!rc && ffn->net)
		state(ffn);
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
	if (p.compute)
		memcpy(ffn->weights.fingerprint, p.weights, sizeof(p.weights));
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
	afd__ffn_server_destroy(ffn);
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
		.served = ffn->net != NULL,
	};
}

int afd__ffn_own(afd_ffn *ffn, const void *stage)
{
	if (stage && ffn->owner && ffn->owner != stage)
		return afd__error(-EBUSY, "ffn: another attention stage has it");
	ffn->owner = stage;
	return 0;
}
