/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Looking: who the peers are and were, and the metrics of links. Series of a link exist while it is
 * joined; what is told of peers that have gone is kept in a ring of as many as there can be peers.
 */
#include <stdio.h>
#include <string.h>

#include "net.h"

static const double seconds[] = { 1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3,
	5e-3, 1e-2, 2e-2, 5e-2, 0.1, 1 };

#define BOUNDS .bounds = seconds, .n_bounds = sizeof(seconds) / sizeof(seconds[0])

static const struct afd__metric_family families[] = {
	{ .name = "afd_transport_parts_total",
		.kind = AFD__COUNTER,
		.help = "Parts of frames: attention side sent to the peer, FFN side answered." },
	{ .name = "afd_transport_rows_total",
		.kind = AFD__COUNTER,
		.help = "Rows in these parts." },
	{ .name = "afd_transport_stay_seconds",
		.kind = AFD__HISTOGRAM,
		BOUNDS,
		.help = "From finding a part of the peer to its reply, FFN side." },
};
static const struct afd__metric_family peers_family = {
	.name = "afd_transport_peers",
	.kind = AFD__GAUGE,
	.help = "Peers that are joined.",
};
static const struct afd__metric_family refused_family = {
	.name = "afd_transport_refused_total",
	.kind = AFD__COUNTER,
	.help = "Connections that were refused or gave up in the handshake.",
};
static const struct afd__metric_family lost_family = {
	.name = "afd_transport_lost_total",
	.kind = AFD__COUNTER,
	.help = "Joined peers that were lost without a goodbye.",
};

static const struct afd__metric_family resent_family = {
	.name = "afd_transport_resent_rows_total",
	.kind = AFD__COUNTER,
	.help = "Rows that were sent once more, to another FFN peer, because the first was lost.",
};

int afd__peers_create(afd_transport *net)
{
	char labels[32] = "";

	if (afd__metric_label(labels, sizeof(labels), "role", net->attention ? "attention" : "ffn"))
		return -ENOSPC;
	net->peers_metric = afd__metric_add(net->ctx, &peers_family, labels);
	net->refused_metric = afd__metric_add(net->ctx, &refused_family, labels);
	net->lost_metric = afd__metric_add(net->ctx, &lost_family, labels);
	net->resent_metric = afd__metric_add(net->ctx, &resent_family, labels);
	return net->peers_metric && net->refused_metric && net->lost_metric && net->resent_metric
		       ? 0
		       : -ENOMEM;
}

void afd__peers_destroy(afd_transport *net)
{
	afd__metric_remove(net->ctx, net->peers_metric);
	afd__metric_remove(net->ctx, net->refused_metric);
	afd__metric_remove(net->ctx, net->lost_metric);
	afd__metric_remove(net->ctx, net->resent_metric);
}

static struct afd__metric *add(struct afd__link *link, int family)
{
	char labels[192] = "";

	/* Without memory the peer goes uncounted; that is no reason to refuse it. */
	if (afd__metric_label(labels, sizeof(labels), "peer", link->name))
		return NULL;
	return afd__metric_add(link->net->ctx, &families[family], labels);
}

void afd__peers_joined(struct afd__link *link)
{
	afd_transport *net = link->net;

	/* What a group exchanges are no rows for an FFN; it is in afd_transport_peer. */
	if (link->kind != AFD__LINK_IN_GROUP) {
		link->metrics.parts = add(link, 0);
		link->metrics.rows = add(link, 1);
	}
	if (link->kind == AFD__LINK_FROM_ATTENTION)
		link->metrics.stay = add(link, 2);
	afd__metric_set(net->peers_metric, net->n_joined);
	afd__log(net->ctx, AFD_LOG_INFO,
		"peer joined: %s, device %s, version %s, lanes %u, max_rows %u, %s to FFN, %s back",
		link->name, link->device, link->version, link->lanes, link->max_rows,
		afd_dtype_name(link->to_ffn_dtype), afd_dtype_name(link->to_attention_dtype));
}

void afd__peers_gone(struct afd__link *link)
{
	afd_transport *net = link->net;

	afd__metric_remove(net->ctx, link->metrics.parts);
	afd__metric_remove(net->ctx, link->metrics.rows);
	afd__metric_remove(net->ctx, link->metrics.stay);
	memset(&link->metrics, 0, sizeof(link->metrics));
	afd__metric_set(net->peers_metric, net->n_joined);
	if (net->attention)
		return;
	if (net->n_departed == net->max_links)
		memmove(net->departed, net->departed + 1,
			--net->n_departed * sizeof(*net->departed));
	afd__peers_info(link, &net->departed[net->n_departed++]);
}

static int32_t state_of(const struct afd__link *link)
{
	switch (link->phase == AFD__LINK_JOINED ? link->phase
		: link->ended ? link->ended
			      : link->phase) {
	case AFD__LINK_JOINED:
		return AFD_PEER_JOINED;
	case AFD__LINK_LEFT:
		return AFD_PEER_LEFT;
	case AFD__LINK_LOST:
		return AFD_PEER_LOST;
	default:
		return AFD_PEER_CONNECTING;
	}
}

void afd__peers_info(const struct afd__link *link, struct afd_peer_info *info)
{
	*info = link->counts;
	info->size = sizeof(*info);
	snprintf(info->address, sizeof(info->address), "%s", link->name);
	snprintf(info->version, sizeof(info->version), "%s", link->version);
	snprintf(info->device, sizeof(info->device), "%s", link->device);
	info->state = state_of(link);
	info->to_ffn_dtype = link->to_ffn_dtype;
	info->to_attention_dtype = link->to_attention_dtype;
	info->lanes = link->lanes;
	info->max_rows = link->max_rows;
	memcpy(info->weights, link->weights, sizeof(info->weights));
	info->weights_epoch = link->weights_epoch;
	info->role = link->kind == AFD__LINK_TO_FFN ? AFD_ROLE_FFN : AFD_ROLE_ATTENTION;
	if (link->kind == AFD__LINK_IN_GROUP) {
		info->rank = link->rank;
		info->n_ranks = link->net->params.group_size;
	} else if (link->placed) {
		info->rank = link->rank;
		info->n_ranks = link->shard.n_targets;
	}
}

/* A rank that has to come to us and has not. */
static void tell_absent(const afd_transport *net, uint32_t index, struct afd_peer_info *info)
{
	uint32_t slot = index - net->n_addresses;

	*info = (struct afd_peer_info){ .size = sizeof(*info),
		.state = AFD_PEER_CONNECTING,
		.role = AFD_ROLE_ATTENTION,
		.rank = slot + (slot >= net->params.group_index),
		.n_ranks = net->params.group_size };
}

/* The k-th of those that are joined, in order of joining. Looked for, not kept: nobody asks on the
 * path of a row. */
static const struct afd__link *joined_at(const afd_transport *net, uint32_t k)
{
	const struct afd__link *found = NULL;
	uint64_t after = 0;

	do {
		found = NULL;
		for (uint32_t i = 0; i < net->max_links; i++) {
			const struct afd__link *link = net->links[i];

			if (afd__link_is_joined(link) && link->number > after &&
				(!found || link->number < found->number))
				found = link;
		}
		after = found ? found->number : 0;
	} while (found && k--);
	return found;
}

int afd_transport_peer(const afd_transport *net, uint32_t index, struct afd_peer_info *info)
{
	const struct afd__link *link = NULL;
	struct afd_peer_info found;
	int rc = afd__net_check(net);

	if (rc)
		return rc;
	if (net->attention && index < net->max_links)
		link = net->links[index];
	else if (!net->attention && index >= net->n_departed)
		link = joined_at(net, index - net->n_departed);
	if (net->attention && index < net->max_links && !link)
		tell_absent(net, index, &found);
	else if (!net->attention && index < net->n_departed)
		found = net->departed[index];
	else if (link)
		afd__peers_info(link, &found);
	else
		return afd__error(-ENOENT, "transport: no peer has index %u", index);
	return afd__params_give(info, &found, sizeof(found), "peer info");
}

int afd_transport_address(const afd_transport *net, uint32_t index, char *buffer, size_t capacity)
{
	int rc = afd__net_check(net);

	if (rc)
		return rc;
	if (index >= net->n_own_listeners)
		return afd__error(-ENOENT, "transport: no listener has index %u, it has %u", index,
			net->n_own_listeners);
	if (!buffer || strlen(net->listeners[index].address) >= capacity)
		return afd__error(-ENOSPC,
			"transport: the address needs %zu bytes, the buffer has %zu",
			strlen(net->listeners[index].address) + 1, buffer ? capacity : (size_t)0);
	memcpy(buffer, net->listeners[index].address, strlen(net->listeners[index].address) + 1);
	return 0;
}
