/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of an attention stage, and of its sequences between steps. Creation checks every
 * parameter, fills in the defaults, and sizes all that a step will need, so that nothing is
 * allocated later.
 */
#include "attn.h"

#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

/* ---- parents ---- */

static int check_parents(
	const struct afd_model *model, const afd_transport *net, const struct afd_attn_params *p)
{
	int rc = afd__model_check(model);

	rc = rc ? rc : afd__model_check_role(model, AFD_ROLE_ATTENTION);
	if (!rc && !net && !p->ffn)
		return afd__error(-EINVAL, "attn: none of transport and params.ffn is given");
	return rc;
}

static int check_contract(
	const struct afd_model *model, const struct afd_contract *c, const char *what)
{
	const struct afd__arch *arch = &model->arch;

	if (c->hidden_size != arch->hidden_size)
		return afd__error(-EINVAL, "attn: the %s has hidden_size %u, the model %u", what,
			c->hidden_size, arch->hidden_size);
	if (c->n_layers != arch->n_layers)
		return afd__error(-EINVAL, "attn: the %s has %u layers, the model %u", what,
			c->n_layers, arch->n_layers);
	return 0;
}

static int take_net(struct afd_attn *attn, const struct afd__exchange_info *info)
{
	struct afd_peer_info peer = { .size = sizeof(peer) };
	int rc;

	if (info->ctx != attn->ctx)
		return afd__error(
			-EINVAL, "attn: the transport is of another context than the model");
	if (!info->attention)
		return afd__error(
			-EINVAL, "attn: the transport was made to listen, attention connects");
	if (!info->n_targets == !attn->ffn)
		return afd__error(-EINVAL,
			"attn: the transport has %u FFN peers and params.ffn is %s, one must do "
			"the FFN",
			info->n_targets, attn->ffn ? "given, too" : "NULL");
	rc = check_contract(attn->model, &info->contract, "transport");
	rc = rc ? rc : afd__attn_route_check(attn, info);
	rc = rc ? rc : afd__transport_own(attn->net, attn);
	attn->owns_net = !rc;
	if (!rc && info->n_ffn_peers == 1)
		rc = afd_transport_peer(attn->net, 0, &peer);
	memcpy(attn->peer, peer.address, sizeof(attn->peer));
	return rc;
}

static int take_ffn(struct afd_attn *attn, const char *device)
{
	struct afd__ffn_info info;
	int rc;

	afd__ffn_info(attn->ffn, &info);
	if (info.served)
		return afd__error(-EINVAL, "attn: params.ffn was made with a transport");
	rc = check_contract(attn->model, &info.contract, "ffn");
	if (rc)
		return rc;
	if (info.first_layer || info.n_layers != attn->arch->n_layers)
		return afd__error(-EINVAL, "attn: the ffn holds layers %u .. %u, the model has %u",
			info.first_layer, info.first_layer + info.n_layers - 1,
			attn->arch->n_layers);
	if (device && strcmp(device, info.device->name))
		return afd__error(
			-EINVAL, "attn: device is %s, the ffn is on %s", device, info.device->name);
	attn->device = info.device;
	attn->params.deterministic |= info.deterministic;
	rc = afd__ffn_own(attn->ffn, attn);
	attn->owns_ffn = !rc;
	return rc;
}

/* ---- creation, in the order of need ---- */

static void beat(void *user)
{
	struct afd_attn *attn = user;

	if (attn->net)
		afd__transport_beat(attn->net);
}

static int open_device(struct afd_attn *attn, const char *device)
{
	const struct afd__queue_options options = { attn->params.stream,
		attn->params.deterministic };
	int rc;

	if (!attn->device) {
		rc = afd__device_open(&attn->device, attn->ctx, device ? device : "cpu");
		if (rc)
			return rc;
		attn->owns_device = 1;
	}
	rc = afd__queue_open_with(&attn->queue, attn->device, &options);
	if (rc)
		return rc;
	attn->queue.on_tile = beat;
	attn->queue.on_tile_user = attn;
	return 0;
}

static int watch(struct afd_attn *attn, int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };

	if (fd >= 0 && epoll_ctl(attn->epoll_fd, EPOLL_CTL_ADD, fd, &event))
		return afd__error(-EIO, "attn: epoll: %s", strerror(errno));
	return 0;
}

static int open_epoll(struct afd_attn *attn)
{
	int rc;

	attn->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (attn->epoll_fd < 0)
		return afd__error(-EIO, "attn: epoll: %s", strerror(errno));
	rc = watch(attn, attn->queue.fd);
	return rc || !attn->net ? rc : watch(attn, afd_transport_fd(attn->net));
}

static int create_books(struct afd_attn *attn)
{
	const struct afd_attn_params *p = &attn->params;
	struct afd__kv_shape shape = { .page_size = p->page_size,
		.n_sequences = p->max_sequences,
		.max_positions = p->max_positions,
		.rollback = p->rollback };
	struct afd__batch_limits limits = { .max_rows = p->max_rows,
		.max_outputs = p->max_outputs,
		.vocab = attn->arch->vocab_size,
		.n_lanes = attn->n_lanes,
		.steady_tables = attn->graphs.capacity != 0 };
	int rc;

	limits.max_entries = p->max_sequences < p->max_rows ? p->max_sequences : p->max_rows;
	rc = afd__attn_layout_plan(&attn->layout, attn->arch, p);
	rc = rc ? rc : afd__attn_groups_create(attn, &shape.n_groups);
	shape.n_pages = attn->group_pages;
	shape.windows = attn->windows;
	rc = rc ? rc : afd__kv_create(&attn->kv, attn->ctx, &shape);
	rc = rc ? rc : afd__sequences_create(&attn->sequences, attn->ctx, p->max_sequences);
	rc = rc ? rc
		: afd__batch_create(&attn->batch, attn->ctx, &limits, &attn->kv, &attn->sequences);
	if (rc)
		return rc;
	attn->greedy = afd__alloc(attn->ctx, p->max_outputs, sizeof(*attn->greedy));
	attn->sampled = afd__alloc(attn->ctx, p->max_outputs, sizeof(*attn->sampled));
	return attn->greedy && attn->sampled ? 0 : -ENOMEM;
}

/* The host's memory for K and V, which the device has to reach. */
static int lend_pool(struct afd_attn *attn, void *memory)
{
	size_t bytes = attn->layout.memory_bytes;
	int rc = afd__device_register(attn->device, memory, bytes, "kv_memory");
	char text[256];

	attn->layout.memory = memory;
	if (!rc)
		return 0;
	afd__error_save(text, sizeof(text));
	return afd__error(-ENOTSUP, "attn: device %s does not reach kv_memory %p, %zu bytes: %s",
		attn->device->name, memory, bytes, text);
}

static int create_pool(struct afd_attn *attn, const struct afd_attn_params *p)
{
	int rc;

	if (!p->kv_memory) {
		rc = afd__device_alloc(
			attn->device, attn->layout.memory_bytes, "KV pool", &attn->kv_owned);
		attn->layout.memory = attn->kv_owned;
		return rc;
	}
	if ((uintptr_t)p->kv_memory % 64)
		return afd__error(-EINVAL, "attn: kv_memory is %p, must be aligned to 64 bytes",
			p->kv_memory);
	if (p->kv_memory_bytes < attn->layout.memory_bytes)
		return afd__error(-EINVAL, "attn: kv_memory_bytes is %zu, %u pages take %zu",
			p->kv_memory_bytes, attn->params.kv_pages, attn->layout.memory_bytes);
	return lend_pool(attn, p->kv_memory);
}

/* Of this rank's heads. */
static void measure_widths(struct afd_attn *attn)
{
	uint32_t i;

	for (i = 0; i < attn->arch->n_layers; i++) {
		const struct afd__layer *l = &attn->arch->layers[i];
		struct afd__heads heads = afd__shard_heads(l->n_heads, l->n_kv_heads,
			attn->params.group_index, attn->params.group_size);
		uint32_t mixed = afd__range_size(heads.q) * l->head_dim,
			 qkv = mixed + 2 * afd__range_size(heads.kv) * l->head_dim;

		attn->mixed_width = mixed > attn->mixed_width ? mixed : attn->mixed_width;
		attn->qkv_width = qkv > attn->qkv_width ? qkv : attn->qkv_width;
	}
}

static int load_weights(struct afd_attn *attn, const struct afd_attn_params *p)
{
	const struct afd__attn_weights_params weights = {
		.model = attn->model,
		.queue = &attn->queue,
		.rank = attn->params.group_index,
		.n_ranks = attn->params.group_size,
		.routes = attn->route.top_k != 0,
		.kv_dtype = attn->params.kv_dtype,
		.progress = p->progress,
		.progress_user = p->progress_user,
	};

	return afd__attn_weights_load(&attn->weights, &weights);
}

static int build(struct afd_attn *attn, const struct afd_attn_params *p)
{
	struct afd__exchange_info info;
	int rc;

	memset(&info, 0, sizeof(info));
	if (attn->net)
		afd__transport_info(attn->net, &info);
	rc = afd__attn_params_fill(&attn->params, attn->model, attn->net ? &info : NULL);
	if (rc)
		return rc;
	attn->n_lanes = attn->params.lanes;
	measure_widths(attn);
	rc = attn->net ? take_net(attn, &info) : 0;
	rc = rc || !attn->ffn ? rc : take_ffn(attn, p->device);
	rc = rc ? rc : open_device(attn, p->device);
	rc = rc ? rc : afd__attn_graphs_create(attn);
	rc = rc ? rc : open_epoll(attn);
	rc = rc ? rc : create_books(attn);
	rc = rc ? rc : create_pool(attn, p);
	rc = rc ? rc : load_weights(attn, p);
	if (!rc)
		afd__attn_layout_scales(attn);
	rc = rc ? rc : afd__attn_route_create(attn);
	rc = rc ? rc : afd__attn_memory_create(attn);
	rc = rc ? rc : afd__attn_metrics_create(attn);
	if (!rc && attn->net)
		afd__device_watch_slots(attn->device, attn->net);
	return rc;
}

/* Also of one that was built half. */
static void tear_down(struct afd_attn *attn)
{
	/* In a child of fork nobody runs what the step has enqueued, and peers are not to hear of
	 * it. */
	if (attn->step.state != AFD__STEP_NONE && attn->ctx->pid == getpid())
		afd__attn_step_abandon(attn, NULL);
	if (attn->device)
		afd__queue_close(&attn->queue);
	if (attn->owns_net)
		afd__transport_watch_slots(attn->net, NULL);
	if (attn->layout.memory && !attn->kv_owned)
		afd__device_unregister(
			attn->device, attn->layout.memory, attn->layout.memory_bytes);
	afd__attn_metrics_destroy(attn);
	afd__attn_memory_destroy(attn);
	afd__attn_route_destroy(attn);
	afd__recordings_destroy(&attn->graphs);
	afd__attn_weights_free(&attn->weights);
	if (attn->kv_owned)
		afd__device_free(attn->device, attn->kv_owned, attn->layout.memory_bytes);
	afd__batch_destroy(&attn->batch);
	afd__sequences_destroy(&attn->sequences);
	if (attn->kv.memory)
		afd__kv_destroy(&attn->kv);
	if (attn->epoll_fd >= 0)
		close(attn->epoll_fd);
	if (attn->owns_device)
		afd__device_close(attn->device);
	if (attn->owns_net)
		afd__transport_own(attn->net, NULL);
	if (attn->owns_ffn)
		afd__ffn_own(attn->ffn, NULL);
	afd__free(attn->groups);
	afd__free(attn->windows);
	afd__free(attn->group_pages);
	afd__free(attn->layer_at);
	afd__free(attn->greedy);
	afd__free(attn->sampled);
	afd__free(attn);
}

int afd_attn_create(afd_attn **out, const afd_model *model, afd_transport *net,
	const struct afd_attn_params *params)
{
	struct afd_attn_params p;
	struct afd_attn *attn;
	int rc;

	if (!out)
		return afd__error(-EINVAL, "attn: out is NULL");
	rc = afd__params_copy(&p, sizeof(p), params, "attn params");
	rc = rc ? rc : check_parents(model, net, &p);
	if (rc)
		return rc;
	attn = afd__alloc(model->ctx, 1, sizeof(*attn));
	if (!attn)
		return -ENOMEM;
	attn->ctx = model->ctx;
	attn->model = model;
	attn->arch = &model->arch;
	attn->net = net;
	attn->ffn = p.ffn;
	attn->epoll_fd = -1;
	attn->params = p;
	rc = build(attn, &p);
	attn->params.device = NULL;
	attn->params.kv_memory = NULL;
	if (rc) {
		tear_down(attn);
		return rc;
	}
	*out = attn;
	return 0;
}

void afd_attn_destroy(afd_attn *attn)
{
	if (attn)
		tear_down(attn);
}

/* ---- sequences ---- */

int afd__attn_check_idle(const struct afd_attn *attn)
{
	int rc = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (!rc && attn->step.state != AFD__STEP_NONE)
		return afd__error(-EBUSY, "attn: step %llu is under way",
			(unsigned long long)attn->step.number);
	return rc;
}

int afd_attn_add(afd_attn *attn, uint64_t sequence)
{
	int rc = afd__attn_check_idle(attn);

	rc = rc ? rc : afd__sequences_add(&attn->sequences, sequence);
	if (rc < 0)
		return rc;
	afd__attn_count_sequences(attn);
	return 0;
}

/* The index of a sequence of an idle stage, with at least n_positions. */
static int find(const struct afd_attn *attn, uint64_t sequence, uint32_t n_positions)
{
	int index = afd__attn_check_idle(attn);

	if (index)
		return index;
	index = afd__sequences_find(&attn->sequences, sequence);
	if (index >= 0 && n_positions > attn->kv.sequences[index].length)
		return afd__error(-EINVAL, "sequence %llu: %u positions wanted, it has %u",
			(unsigned long long)sequence, n_positions,
			attn->kv.sequences[index].length);
	return index;
}

/* The same; and the sequence could go on after n_positions. */
static int find_end(const struct afd_attn *attn, uint64_t sequence, uint32_t n_positions)
{
	int index = find(attn, sequence, n_positions), rc;

	if (index < 0)
		return index;
	rc = afd__kv_check_end(&attn->kv, (uint32_t)index, n_positions);
	return rc ? afd__error_prefix(rc, "sequence %llu", (unsigned long long)sequence) : index;
}

int afd_attn_drop(afd_attn *attn, uint64_t sequence)
{
	int index = find(attn, sequence, 0);

	if (index < 0)
		return index;
	afd__kv_truncate(&attn->kv, (uint32_t)index, 0);
	afd__sequences_remove(&attn->sequences, (uint32_t)index);
	afd__attn_count_sequences(attn);
	return 0;
}

int afd_attn_fork(afd_attn *attn, uint64_t from, uint64_t to, uint32_t n_positions)
{
	int source = find_end(attn, from, n_positions), target;

	if (source < 0)
		return source;
	target = afd__sequences_add(&attn->sequences, to);
	if (target < 0)
		return target;
	afd__kv_fork(&attn->kv, (uint32_t)source, (uint32_t)target, n_positions);
	afd__attn_count_sequences(attn);
	return 0;
}

int afd_attn_truncate(afd_attn *attn, uint64_t sequence, uint32_t n_positions)
{
	int index = find_end(attn, sequence, n_positions);

	if (index < 0)
		return index;
	afd__kv_truncate(&attn->kv, (uint32_t)index, n_positions);
	afd__attn_count_sequences(attn);
	return 0;
}

int64_t afd_attn_length(const afd_attn *attn, uint64_t sequence)
{
	int index = afd__context_check(attn ? attn->ctx : NULL, "attn");

	if (index)
		return index;
	index = afd__sequences_find(&attn->sequences, sequence);
	return index < 0 ? index : (int64_t)attn->kv.sequences[index].length;
}
