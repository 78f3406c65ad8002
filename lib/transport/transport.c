/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a transport: params checked and defaults filled in, listeners opened or links
 * prepared, and the end. All that does not depend on a peer is allocated here; a link's memory when
 * it comes; nothing on the path of a row.
 */
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "net.h"
#include "socket.h"

enum { MAX_ROWS = 65536, MAX_PEERS = 1024, MAX_HIDDEN = 65536, MAX_ADDRESSES = 64 };
enum { MAX_EXPERTS = 65536, MAX_TOP_K = 64 };
enum { MAX_BESIDE = 2 }; /* listeners of auto: besides tcp: */
enum {
	DEFAULT_ROWS = 512,
	DEFAULT_PEERS = 64,
	DEFAULT_DEADLINE_MS = 5000,
	DEFAULT_CONNECT_MS = 10000,
	DEFAULT_SPIN_US = 50
};
static const uint64_t PART_BYTES_MAX = UINT64_C(1) << 31;

/* ---- what was asked for ---- */

static int check_range(const char *name, uint32_t value, uint32_t limit)
{
	if (value <= limit)
		return 0;
	return afd__error(-EINVAL, "transport: %s is %u, limit %u", name, value, limit);
}

static int check_dtype(const char *name, int32_t dtype)
{
	if (dtype < 0 || dtype > AFD_DTYPE_FP8)
		return afd__error(
			-EINVAL, "transport: %s is %d, limit %d", name, dtype, AFD_DTYPE_FP8);
	return 0;
}

static int check_group(const struct afd_transport_params *p)
{
	if (p->group_size > AFD__GROUP_MAX)
		return afd__error(-EINVAL, "transport: group_size is %u, limit %d", p->group_size,
			AFD__GROUP_MAX);
	if (p->group_index && p->group_index >= p->group_size)
		return afd__error(-EINVAL, "transport: group_index is %u, group_size is %u",
			p->group_index, p->group_size);
	if ((p->group_size > 1) != !!p->group)
		return afd__error(-EINVAL, "transport: group_size is %u, and group is %s",
			p->group_size, p->group ? "given" : "NULL");
	if (p->group && p->n_listen)
		return afd__error(-EINVAL, "transport: group is the attention side's, n_listen is %u",
			p->n_listen);
	return 0;
}

static int check_sides(const struct afd_transport_params *p)
{
	const struct afd_shard *shard = &p->shard;

	if (p->n_listen ? p->n_connect : !p->n_connect && p->group_size < 2)
		return afd__error(-EINVAL,
			"transport: n_listen is %u, n_connect is %u, exactly one must be set",
			p->n_listen, p->n_connect);
	if ((p->n_listen && !p->listen) || (p->n_connect && !p->connect))
		return afd__error(-EINVAL, "transport: %s is NULL beside a count",
			p->n_listen ? "listen" : "connect");
	if (p->n_listen > MAX_ADDRESSES || p->n_connect > AFD__TARGETS_MAX)
		return afd__error(-EINVAL, "transport: %u addresses, limit %d",
			p->n_listen + p->n_connect, MAX_ADDRESSES);
	if (!p->n_listen && (shard->tp || shard->n_tp || shard->ep || shard->n_ep))
		return afd__error(
			-EINVAL, "transport: shard is the FFN side's, n_connect is %u", p->n_connect);
	return check_group(p);
}

static int check_key(const struct afd_transport_params *p)
{
	if (p->key && p->key_file)
		return afd__error(-EINVAL, "transport: key and key_file are both given");
	if (!p->key != !p->key_bytes)
		return afd__error(-EINVAL, "transport: key is %s, and key_bytes is %zu",
			p->key ? "given" : "NULL", p->key_bytes);
	if (p->tls > 1)
		return check_range("tls", p->tls, 1);
	if (p->tls && !p->key && !p->key_file)
		return afd__error(-EINVAL, "transport: tls is 1, and there is no key");
	return 0;
}

static int check_params(const struct afd_transport_params *p)
{
	int rc = check_sides(p);

	if (!rc)
		rc = check_range("lanes", p->lanes, AFD_MAX_LANES);
	if (!rc)
		rc = check_range("max_rows", p->max_rows, MAX_ROWS);
	if (!rc)
		rc = check_range("max_peers", p->max_peers, MAX_PEERS);
	if (!rc)
		rc = check_dtype("to_ffn_dtype", p->to_ffn_dtype);
	if (!rc)
		rc = check_dtype("to_attention_dtype", p->to_attention_dtype);
	if (!rc && (p->gate < 0 || p->gate > AFD_GATE_FFN))
		rc = afd__error(-EINVAL, "transport: gate is %d, limit %d", p->gate, AFD_GATE_FFN);
	if (!rc && p->_pad)
		rc = afd__error(-EINVAL, "transport: _pad is %u, must be 0", p->_pad);
	if (!rc)
		rc = check_key(p);
	return rc;
}

static int check_kinds(const struct afd_contract *c)
{
	for (uint32_t i = 0; c->ffn_kinds && i < c->n_layers; i++) {
		if (c->ffn_kinds[i] == AFD_FFN_MOE && !c->n_experts)
			return afd__error(-EINVAL,
				"contract: layer %u has experts, and n_experts is 0", i);
		if (c->ffn_kinds[i] != AFD_FFN_DENSE && c->ffn_kinds[i] != AFD_FFN_MOE)
			return afd__error(-EINVAL, "contract: ffn_kinds[%u] is %u, limit %d", i,
				c->ffn_kinds[i], AFD_FFN_MOE);
	}
	return 0;
}

static int check_experts(const struct afd_contract *c)
{
	bool routed = c->router > AFD_ROUTER_NONE;

	if (c->router < 0 || c->router > AFD_ROUTER_SIGMOID)
		return afd__error(
			-EINVAL, "contract: router is %d, limit %d", c->router, AFD_ROUTER_SIGMOID);
	if (routed != !!c->n_experts || routed != !!c->top_k)
		return afd__error(-EINVAL,
			"contract: router is %d, n_experts is %u, top_k is %u; all are set or none",
			c->router, c->n_experts, c->top_k);
	if (c->n_experts > MAX_EXPERTS)
		return afd__error(-EINVAL, "contract: n_experts is %u, limit %d", c->n_experts,
			MAX_EXPERTS);
	if (c->top_k > c->n_experts || c->top_k > MAX_TOP_K)
		return afd__error(-EINVAL, "contract: top_k is %u, limit %u", c->top_k,
			c->n_experts < MAX_TOP_K ? c->n_experts : MAX_TOP_K);
	if (c->shared_experts < 0 || c->shared_experts > 1)
		return afd__error(
			-EINVAL, "contract: shared_experts is %d, limit 1", c->shared_experts);
	return 0;
}

static int check_contract(const struct afd_contract *c)
{
	if (!c->hidden_size || c->hidden_size > MAX_HIDDEN)
		return afd__error(-EINVAL, "contract: hidden_size is %u, must be 1 .. %d",
			c->hidden_size, MAX_HIDDEN);
	if (!c->n_layers || c->n_layers > AFD__LAYERS_MAX)
		return afd__error(-EINVAL, "contract: n_layers is %u, must be 1 .. %d", c->n_layers,
			AFD__LAYERS_MAX);
	if (c->activation < 0 || c->activation > AFD_ACTIVATION_SILU)
		return afd__error(-EINVAL, "contract: activation is %d, limit %d", c->activation,
			AFD_ACTIVATION_SILU);
	if (c->dtype < 0 || c->dtype > AFD_DTYPE_FP8)
		return afd__error(
			-EINVAL, "contract: dtype is %d, limit %d", c->dtype, AFD_DTYPE_FP8);
	return check_experts(c) ? -EINVAL : check_kinds(c);
}

static uint32_t or_default(uint32_t value, uint32_t fallback)
{
	return value ? value : fallback;
}

static void fill_contract(afd_transport *net, const struct afd_contract *given)
{
	net->contract = *given;
	net->contract.ffn_kinds = net->ffn_kinds;
	net->contract.router = given->router ? given->router : AFD_ROUTER_NONE;
	net->contract.activation = AFD_ACTIVATION_SILU;
	if (!given->dtype)
		net->contract.dtype = AFD_DTYPE_F32;
	/* What is stored as fp8 crosses as bf16 unless the host says otherwise. */
	if (given->dtype == AFD_DTYPE_FP8)
		net->contract.dtype = AFD_DTYPE_BF16;
	memset(net->ffn_kinds, AFD_FFN_DENSE, sizeof(net->ffn_kinds));
	if (given->ffn_kinds)
		memcpy(net->ffn_kinds, given->ffn_kinds, given->n_layers);
}

/* FFN side: dtypes of 0 stay, they accept what the peer asks for. */
static int fill_params(afd_transport *net, const struct afd_transport_params *given)
{
	struct afd_transport_params *p = &net->params;
	uint32_t n_layers = net->contract.n_layers;

	*p = *given;
	p->listen = p->connect = NULL;
	p->group = p->key_file = NULL;
	p->key = NULL;
	p->group_size = or_default(p->group_size, 1);
	p->lanes = or_default(p->lanes, 1);
	p->max_rows = or_default(p->max_rows, DEFAULT_ROWS);
	p->max_peers = or_default(p->max_peers, DEFAULT_PEERS);
	p->deadline_ms = or_default(p->deadline_ms, DEFAULT_DEADLINE_MS);
	p->connect_timeout_ms = or_default(p->connect_timeout_ms, DEFAULT_CONNECT_MS);
	p->spin_us = or_default(p->spin_us, DEFAULT_SPIN_US);
	p->gate = p->gate ? p->gate : AFD_GATE_ATTENTION;
	if (net->attention) {
		p->to_ffn_dtype = p->to_ffn_dtype ? p->to_ffn_dtype : net->contract.dtype;
		p->to_attention_dtype =
			p->to_attention_dtype ? p->to_attention_dtype : net->contract.dtype;
		p->first_layer = 0;
		p->n_layers = n_layers;
	}
	if (p->first_layer >= n_layers || p->n_layers > n_layers - p->first_layer)
		return afd__error(-EINVAL,
			"transport: layers held are %u from %u on, the contract has %u",
			p->n_layers, p->first_layer, n_layers);
	p->n_layers = or_default(p->n_layers, n_layers - p->first_layer);
	/* A row of FP8 is at most 28 bytes longer than its numbers would be in f32. */
	if (p->max_rows * ((uint64_t)net->contract.hidden_size * sizeof(float) + 28 +
				  8 * (uint64_t)net->contract.top_k) >
		PART_BYTES_MAX)
		return afd__error(-EINVAL,
			"transport: a part of %u rows of %u numbers has over %llu bytes; lower "
			"max_rows",
			p->max_rows, net->contract.hidden_size, (unsigned long long)PART_BYTES_MAX);
	return 0;
}

/* ---- life ---- */

int afd__transport_listen_at(afd_transport *net, const struct afd__address *address)
{
	struct afd__listener *ln = &net->listeners[net->n_listeners];
	int rc;

	*ln = (struct afd__listener){ .tag = { .kind = AFD__TAG_LISTENER },
		.ops = address->ops,
		.ctx = net->ctx,
		.epoll_fd = net->epoll_fd };
	snprintf(ln->address, sizeof(ln->address), "%s", address->text);
	rc = ln->ops->listen(ln, address->name);
	if (!rc)
		net->n_listeners++;
	return rc;
}

/* At all of them, then at what auto: has besides. */
static int listen_all(afd_transport *net, const struct afd__address *addresses, uint32_t n)
{
	int rc = 0;

	net->listeners = afd__alloc(net->ctx, n + MAX_BESIDE, sizeof(*net->listeners));
	if (!net->listeners)
		return -ENOMEM;
	for (uint32_t i = 0; i < n && !rc; i++)
		rc = afd__transport_listen_at(net, &addresses[i]);
	net->n_own_listeners = net->n_listeners;
	for (uint32_t i = 0; i < n && !rc; i++) {
		if (addresses[i].ops == &afd__transport_auto)
			afd__auto_listen_beside(net, &addresses[i]);
	}
	return rc;
}

static int prepare_link(afd_transport *net, uint32_t index, const struct afd__address *address)
{
	struct afd__link *link = afd__link_create(net, address);

	if (!link)
		return -ENOMEM;
	link->index = index;
	link->number = index + 1;
	snprintf(link->who, sizeof(link->who), "the FFN peer");
	net->links[index] = link;
	if (address->ops == &afd__transport_auto && afd__survey_create(link))
		return -ENOMEM;
	return index < net->n_addresses ? afd__times_create(link) : 0;
}

/* Links to the ranks below ours, and a listener for those above. */
static int prepare_group(afd_transport *net)
{
	uint32_t own = net->params.group_index;
	int rc = 0;

	for (uint32_t rank = 0; rank < own && !rc; rank++) {
		uint32_t index = afd__group_link_index(net, rank);

		rc = prepare_link(net, index, &net->group[rank]);
		if (rc)
			break;
		net->links[index]->kind = AFD__LINK_IN_GROUP;
		net->links[index]->rank = rank;
		snprintf(net->links[index]->who, sizeof(net->links[index]->who),
			"rank %u of the group", rank);
	}
	if (rc || own + 1 == net->params.group_size)
		return rc;
	return listen_all(net, &net->group[own], 1);
}

static int prepare_links(afd_transport *net)
{
	int rc = 0;

	for (uint32_t i = 0; i < net->n_addresses && !rc; i++)
		rc = prepare_link(net, i, &net->addresses[i]);
	return rc || net->params.group_size < 2 ? rc : prepare_group(net);
}

/* Rank 0 listens at the address that was given; the others where the backend says, as a rule at
 * the same with ".i". */
static int parse_rank(afd_transport *net, uint32_t rank, const char *text)
{
	const struct afd__address *first = &net->group[0];
	char name[160], place[128];
	int rc;

	if (!rank)
		return afd__address_parse(&net->group[0], net->ctx, text, false);
	if (!first->ops->rank_name) {
		snprintf(name, sizeof(name), "%.140s.%u", text, rank);
		return afd__address_parse(&net->group[rank], net->ctx, name, false);
	}
	rc = first->ops->rank_name(place, sizeof(place), first->name, rank);
	if (rc)
		return rc;
	snprintf(name, sizeof(name), "%s:%s", first->ops->scheme, place);
	return afd__address_parse(&net->group[rank], net->ctx, name, false);
}

/* The rank's own of several with commas between them, as on several hosts. */
static int parse_listed_rank(afd_transport *net, uint32_t rank, const char *text)
{
	char name[sizeof(net->group->text) + 1];

	for (uint32_t i = 0; i < rank; i++)
		text = strchr(text, ',') + 1;
	snprintf(name, sizeof(name), "%.*s", (int)strcspn(text, ","), text);
	return afd__address_parse(&net->group[rank], net->ctx, name, false);
}

/* One address for all ranks, or one for each. */
static int parse_group(afd_transport *net, const char *text)
{
	uint32_t n = net->params.group_index + 1, n_listed = 1;
	int rc = 0;

	for (const char *at = text; (at = strchr(at, ',')); at++)
		n_listed++;
	if (n_listed != 1 && n_listed != net->params.group_size)
		return afd__error(-EINVAL,
			"transport: group has %u addresses, must have one, or one for each of %u ranks",
			n_listed, net->params.group_size);
	net->group = afd__alloc(net->ctx, n, sizeof(*net->group));
	if (!net->group)
		return -ENOMEM;
	for (uint32_t rank = 0; rank < n && !rc; rank++)
		rc = n_listed > 1 ? parse_listed_rank(net, rank, text) : parse_rank(net, rank, text);
	return rc;
}

static int parse_addresses(afd_transport *net, const struct afd_transport_params *given)
{
	const char *const *texts = net->attention ? given->connect : given->listen;
	int rc = 0;

	net->n_addresses = net->attention ? given->n_connect : given->n_listen;
	net->addresses = afd__alloc(net->ctx, net->n_addresses + 1, sizeof(*net->addresses));
	if (!net->addresses)
		return -ENOMEM;
	for (uint32_t i = 0; i < net->n_addresses && !rc; i++)
		rc = afd__address_parse(&net->addresses[i], net->ctx, texts[i], !net->attention);
	return rc || !given->group ? rc : parse_group(net, given->group);
}

static int read_shard(afd_transport *net)
{
	const struct afd_shard *given = &net->params.shard;
	int rc = afd__shards_check(net, given);

	net->shard_given = given->n_tp || given->n_ep;
	net->shard = (struct afd_shard){ given->tp, or_default(given->n_tp, 1), given->ep,
		or_default(given->n_ep, 1) };
	return rc;
}

/* Who asks for encryption does not get a link without. */
static int refuse_in_clear(const char *what, const struct afd__address *addresses, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (addresses[i].ops->in_clear)
			return afd__error(-ENOTSUP,
				"%s%s: rows cannot be encrypted there; tls is for tcp: links", what,
				addresses[i].text);
	}
	return 0;
}

static int check_in_clear(const afd_transport *net)
{
	int rc = 0;

	if (net->params.tls)
		rc = refuse_in_clear("", net->addresses, net->n_addresses);
	if (!rc && net->params.tls && net->group)
		rc = refuse_in_clear("group ", net->group, net->params.group_index + 1);
	return rc;
}

static int open_transport(afd_transport *net, const struct afd_transport_params *given)
{
	int rc = fill_params(net, given);

	if (!rc)
		rc = read_shard(net);
	if (!rc)
		rc = parse_addresses(net, given);
	if (rc)
		return rc;
	net->n_links_wanted = net->attention ? net->n_addresses + net->params.group_size - 1 : 0;
	net->max_links = net->attention ? net->n_links_wanted : net->params.max_peers;
	net->n_used_links = net->n_links_wanted;
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++)
		net->groups[lane].filling = net->groups[lane].draining = AFD__NOBODY;
	net->links = afd__alloc(net->ctx, net->max_links, sizeof(*net->links));
	net->departed = afd__alloc(net->ctx, net->max_links, sizeof(*net->departed));
	net->row = afd__alloc(net->ctx, net->contract.hidden_size, sizeof(*net->row));
	if (!net->links || !net->departed || !net->row)
		return -ENOMEM;
	rc = check_in_clear(net);
	if (rc)
		return rc;
	if (given->key || given->key_file) {
		rc = afd__secret_open(&net->secret, net->ctx, given->key_file, given->key,
			given->key_bytes, (int)given->tls);
		if (rc)
			return rc;
	}
	net->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	if (net->epoll_fd < 0)
		return afd__error(-EIO, "transport: epoll_create1: %s", strerror(errno));
	rc = afd__peers_create(net);
	if (rc)
		return rc;
	return net->attention ? prepare_links(net)
			      : listen_all(net, net->addresses, net->n_addresses);
}

int afd_transport_create(afd_transport **out, afd_context *ctx, const struct afd_contract *contract,
	const struct afd_transport_params *params)
{
	struct afd_transport_params p;
	struct afd_contract c;
	afd_transport *net;
	int rc = afd__context_check(ctx, "transport: its context");

	if (!rc && (!out || !contract || !params))
		rc = afd__error(-EINVAL, "transport: %s is NULL",
			!out        ? "out"
			: !contract ? "contract"
				    : "params");
	if (!rc)
		rc = afd__params_copy(&p, sizeof(p), params, "transport params");
	if (!rc)
		rc = afd__params_copy(&c, sizeof(c), contract, "contract");
	if (!rc)
		rc = check_params(&p);
	if (!rc)
		rc = check_contract(&c);
	if (rc)
		return rc;
	net = afd__alloc(ctx, 1, sizeof(*net));
	if (!net)
		return -ENOMEM;
	net->ctx = ctx;
	net->epoll_fd = -1;
	net->attention = !p.n_listen;
	net->arrived_end = &net->arrived;
	net->created_ns = afd__now_ns();
	snprintf(net->device, sizeof(net->device), "%s", afd_context_isa(ctx));
	fill_contract(net, &c);
	rc = open_transport(net, &p);
	if (rc) {
		afd_transport_destroy(net);
		return rc;
	}
	*out = net;
	return 0;
}

/* Ranks of our group may wait for us because of a link that they do not wait for yet. */
static void say_goodbye(struct afd__link *link)
{
	const afd_transport *net = link->net;
	bool failed = link->kind == AFD__LINK_IN_GROUP && net->error;
	uint32_t reason = failed ? AFD__GOODBYE_ERROR : AFD__GOODBYE_LEAVE;
	const char *text = failed ? net->error_text : "";

	if (afd__link_goodbye(link, reason, text) == 1 || !afd__link_is_joined(link))
		return;
	/* No control slot was free. Once more, else the peer sees the end of the socket instead. */
	afd__link_poll(link, afd__now_ns());
	if (afd__link_is_joined(link))
		afd__link_goodbye(link, reason, text);
}

/* In a child of fork the peers and the metrics are the parent's. */
static void end_links(afd_transport *net)
{
	bool forked = afd__forked(net->ctx);

	for (uint32_t i = 0; i < net->n_pending; i++) {
		if (net->pending[i]->index == UINT32_MAX)
			afd__link_destroy(net->pending[i]);
	}
	for (uint32_t i = 0; net->links && i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		if (afd__link_is_joined(link) && !forked) {
			say_goodbye(link);
			if (afd__link_is_joined(link))
				afd__peers_gone(link);
		}
		afd__link_destroy(link);
	}
}

void afd_transport_destroy(afd_transport *net)
{
	if (!net)
		return;
	end_links(net);
	for (uint32_t i = 0; i < net->n_listeners; i++)
		net->listeners[i].ops->unlisten(&net->listeners[i]);
	if (!afd__forked(net->ctx))
		afd__peers_destroy(net);
	if (net->shared)
		net->shared->end(net->shared);
	if (net->epoll_fd >= 0)
		close(net->epoll_fd);
	afd__secret_close(net->secret);
	afd__free(net->row);
	afd__free(net->departed);
	afd__free(net->links);
	afd__free(net->listeners);
	afd__free(net->group);
	afd__free(net->addresses);
	afd__free(net);
}

/* ---- what stages ask ---- */

void afd__transport_info(const afd_transport *net, struct afd__exchange_info *info)
{
	*info = (struct afd__exchange_info){
		.ctx = net->ctx,
		.contract = net->contract,
		.lanes = net->params.lanes,
		.max_rows = net->params.max_rows,
		.attention = net->attention,
		.max_peers = net->max_links,
		.to_ffn_dtype = net->attention ? net->params.to_ffn_dtype : 0,
		.to_attention_dtype = net->attention ? net->params.to_attention_dtype : 0,
		.first_layer = net->params.first_layer,
		.n_layers = net->params.n_layers,
		.gate = net->attention ? net->params.gate : 0,
		.n_targets = net->n_targets ? net->n_targets : net->attention ? net->n_addresses : 0,
		.n_ffn_peers = net->attention ? net->n_addresses : 0,
		.group_index = net->params.group_index,
		.group_size = net->params.group_size,
		.shard = net->shard,
	};
}

int afd__transport_own(afd_transport *net, const void *stage)
{
	if (stage && net->owner && net->owner != stage)
		return afd__error(-EBUSY, "transport: another stage has it");
	/* A stage that gives it back has nothing under way any more, so no slot is written or read.
	 */
	if (!stage && net->attention)
		afd__frames_disown(net);
	if (!stage && net->attention)
		afd__group_disown(net);
	net->owner = stage;
	return 0;
}

void afd__transport_watch_slots(afd_transport *net, const struct afd__slot_memory *watch)
{
	void (*tell)(struct afd__link *) =
		watch ? afd__link_slots_added : afd__link_slots_removed;
	const struct afd__slot_memory nobody = { 0 };

	if (watch)
		net->watch = *watch;
	for (uint32_t i = 0; i < net->max_links; i++) {
		if (net->links[i])
			tell(net->links[i]);
	}
	for (uint32_t i = 0; i < net->n_pending; i++)
		tell(net->pending[i]);
	if (!watch)
		net->watch = nobody;
}

void afd__transport_state(afd_transport *net, const uint64_t weights[2], uint64_t weights_epoch,
	const char *device)
{
	memcpy(net->weights, weights, sizeof(net->weights));
	net->weights_epoch = weights_epoch;
	snprintf(net->device, sizeof(net->device), "%s", device);
}
