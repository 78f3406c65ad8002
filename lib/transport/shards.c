/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who holds what: each FFN peer states its shard in its welcome; together they must hold all shards
 * of one way of sharding. Several of one shard are replicas: one of them, the target, gets the rows,
 * and when it is lost another one. Targets are numbered by the rank of their shard, whatever the
 * order of addresses. Called by the handshake, by links that come and go, and by the attention
 * stage to find out which rows go where.
 */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "net.h"

enum { NAME_BYTES = 48 };

/* "tp0/2" or "tp0/2,ep1/2", as the tools write it. */
static void name_shard(char name[NAME_BYTES], uint32_t rank, uint32_t n_tp, uint32_t n_shards)
{
	if (n_tp == n_shards)
		snprintf(name, NAME_BYTES, "tp%u/%u", rank, n_tp);
	else
		snprintf(name, NAME_BYTES, "tp%u/%u,ep%u/%u", rank % n_tp, n_tp, rank / n_tp,
			n_shards / n_tp);
}

/* ---- the FFN side's own ---- */

int afd__shards_check(const afd_transport *net, const struct afd_shard *shard)
{
	uint64_t n_tp = shard->n_tp ? shard->n_tp : 1, n_ep = shard->n_ep ? shard->n_ep : 1;

	if (shard->tp >= n_tp || shard->ep >= n_ep)
		return afd__error(-EINVAL,
			"transport: shard is tp %u of %llu, ep %u of %llu, counted from 0",
			shard->tp, (unsigned long long)n_tp, shard->ep, (unsigned long long)n_ep);
	if (n_tp > AFD__TARGETS_MAX || n_ep > AFD__TARGETS_MAX || n_tp * n_ep > AFD__TARGETS_MAX)
		return afd__error(-EINVAL, "transport: %llu x %llu shards, limit %d",
			(unsigned long long)n_tp, (unsigned long long)n_ep, AFD__TARGETS_MAX);
	if (net->contract.n_experts && n_ep > net->contract.n_experts)
		return afd__error(-EINVAL, "transport: ep is %u of %llu, the contract has %u experts",
			shard->ep, (unsigned long long)n_ep, net->contract.n_experts);
	return 0;
}

int afd__transport_state_shard(afd_transport *net, const struct afd_shard *shard)
{
	struct afd_shard s = { shard->tp, shard->n_tp ? shard->n_tp : 1, shard->ep,
		shard->n_ep ? shard->n_ep : 1 };
	int rc = afd__shards_check(net, &s);

	if (!rc && net->attention)
		rc = afd__error(-EINVAL, "transport: made to connect, shards are the FFN side's");
	if (!rc && net->shard_given && memcmp(&s, &net->shard, sizeof(s)))
		rc = afd__error(-EINVAL,
			"transport: shard is tp%u/%u,ep%u/%u, that of the stage tp%u/%u,ep%u/%u",
			net->shard.tp, net->shard.n_tp, net->shard.ep, net->shard.n_ep, s.tp,
			s.n_tp, s.ep, s.n_ep);
	if (!rc)
		net->shard = s;
	return rc;
}

/* ---- what a peer said ---- */

/* A peer that contradicts itself, or has a map that this version does not know. 1: refused. */
static int judge_shard(
	const afd_transport *net, const struct afd__hello *said, struct afd__hello *refusal)
{
	struct afd__range experts;
	char value[NAME_BYTES];

	if (said->map_version != AFD__MAP_VERSION) {
		snprintf(value, sizeof(value), "%d", AFD__MAP_VERSION);
		afd__hello_refuse(refusal, "map_version", value, "%u", said->map_version);
		return 1;
	}
	if (!said->n_shards || said->n_shards > AFD__TARGETS_MAX || !said->n_tp ||
		said->n_shards % said->n_tp || said->shard_rank >= said->n_shards ||
		said->shard_tp != said->shard_rank % said->n_tp) {
		snprintf(value, sizeof(value), "one of at most %d", AFD__TARGETS_MAX);
		afd__hello_refuse(refusal, "shard", value, "%u of %u with tp %u of %u",
			said->shard_rank, said->n_shards, said->shard_tp, said->n_tp);
		return 1;
	}
	experts = afd__shard_range(net->contract.n_experts, said->shard_rank / said->n_tp,
		said->n_shards / said->n_tp);
	if (said->expert_begin == experts.begin && said->expert_end == experts.end)
		return 0;
	snprintf(value, sizeof(value), "%u .. %u", experts.begin, experts.end);
	afd__hello_refuse(refusal, "experts", value, "%u .. %u", said->expert_begin,
		said->expert_end);
	return 1;
}

static void keep_shard(struct afd__link *link)
{
	const struct afd__hello *said = link->said;

	link->rank = said->shard_rank;
	link->shard = (struct afd__target){
		.n_targets = said->n_shards,
		.tp = said->shard_tp,
		.n_tp = said->n_tp,
		.expert_begin = said->expert_begin,
		.expert_end = said->expert_end,
		.max_rows = link->max_rows,
	};
	link->placed = true;
}

/* ---- together ---- */

static int check_same_way(const struct afd__link *link, const struct afd__link *other)
{
	char ours[NAME_BYTES], theirs[NAME_BYTES];

	if (other->shard.n_targets == link->shard.n_targets && other->shard.n_tp == link->shard.n_tp)
		return 0;
	name_shard(ours, link->rank, link->shard.n_tp, link->shard.n_targets);
	name_shard(theirs, other->rank, other->shard.n_tp, other->shard.n_targets);
	return afd__error(-EPROTO, "the FFN peers are sharded in different ways: it holds %s, %s %s",
		ours, other->name, theirs);
}

/* The text of what is missing. */
static int describe(const struct afd__link *link, const uint32_t *n_of)
{
	char text[384] = "", name[NAME_BYTES];
	size_t at = 0;

	for (uint32_t rank = 0; rank < link->shard.n_targets; rank++) {
		if (n_of[rank] || at > sizeof(text) - 2)
			continue;
		name_shard(name, rank, link->shard.n_tp, link->shard.n_targets);
		at += (size_t)snprintf(text + at, sizeof(text) - at, "%sno FFN peer holds %s",
			at ? "; " : "", name);
	}
	return at ? afd__error(-EPROTO, "shards: %s", text) : 0;
}

/* All peers have said what they hold. */
static int check_cover(const afd_transport *net, const struct afd__link *link)
{
	uint32_t n_of[AFD__TARGETS_MAX] = { 0 };

	for (uint32_t i = 0; i < net->n_addresses; i++)
		n_of[net->links[i]->rank]++;
	return describe(link, n_of);
}

/* Who holds a shard that another peer has held before must hold the same. */
static int check_holding(const struct afd__link *link)
{
	const struct afd__holding *before = &link->net->holdings[link->rank];

	if (!before->known)
		return 0;
	if (strcmp(before->device, link->device))
		return afd__error(-EPROTO, "its device is %s, that of the shard's first peer was %s",
			link->device, before->device);
	if (before->first_layer != link->said->first_layer || before->n_layers != link->said->n_held)
		return afd__error(-EPROTO,
			"its layers are %u from %u on, those of the shard's first peer were %u from %u on",
			link->said->n_held, link->said->first_layer, before->n_layers,
			before->first_layer);
	if (before->weights_epoch != link->weights_epoch)
		return afd__error(-EPROTO,
			"its weights_epoch is %llu, that of the shard's first peer was %llu",
			(unsigned long long)link->weights_epoch,
			(unsigned long long)before->weights_epoch);
	if (!(link->weights[0] | link->weights[1]) || !(before->weights[0] | before->weights[1])) {
		afd__log(link->net->ctx, AFD_LOG_WARN,
			"link %s: that it holds the same weights as the other peer of its shard is "
			"not known",
			link->name);
		return 0;
	}
	if (!memcmp(before->weights, link->weights, sizeof(link->weights)))
		return 0;
	return afd__error(-EPROTO,
		"its weights are %016llx%016llx, those of the shard's first peer were %016llx%016llx",
		(unsigned long long)link->weights[1], (unsigned long long)link->weights[0],
		(unsigned long long)before->weights[1], (unsigned long long)before->weights[0]);
}

/* From the welcome on, since two peers of one shard may be on their way in together. */
static void keep_holding(const struct afd__link *link)
{
	afd_transport *net = link->net;
	struct afd__holding *holding = &net->holdings[link->rank];

	net->n_targets = link->shard.n_targets;
	if (holding->known)
		return;
	net->shards[link->rank] = link->shard;
	memcpy(holding->weights, link->weights, sizeof(holding->weights));
	memcpy(holding->device, link->device, sizeof(holding->device));
	holding->weights_epoch = link->weights_epoch;
	holding->first_layer = link->said->first_layer;
	holding->n_layers = link->said->n_held;
	holding->known = true;
}

static int place(struct afd__link *link)
{
	afd_transport *net = link->net;
	uint32_t n_placed = 0;
	int rc;

	for (uint32_t i = 0; i < net->n_addresses; i++) {
		if (!net->links[i]->placed)
			continue;
		rc = check_same_way(link, net->links[i]);
		if (rc)
			return rc;
		n_placed++;
	}
	rc = check_holding(link);
	if (rc)
		return rc;
	return n_placed == net->n_addresses ? check_cover(net, link) : 0;
}

int afd__shards_place(struct afd__link *link, struct afd__hello *refusal)
{
	char value[NAME_BYTES];
	int rc;

	if (judge_shard(link->net, link->said, refusal))
		return afd__error(-EPROTO, "the FFN peer disagrees: %s is %s there, %s here",
			refusal->field, refusal->refused_value, refusal->refuser_value);
	keep_shard(link);
	rc = place(link);
	if (!rc) {
		keep_holding(link);
		return 0;
	}
	link->placed = false;
	name_shard(value, link->rank, link->shard.n_tp, link->shard.n_targets);
	afd__hello_refuse(refusal, "shard", "one that completes the others", "%s", value);
	snprintf(refusal->text, sizeof(refusal->text), "%s", afd_last_error());
	return rc;
}

/* ---- who holds them now ---- */

static bool takes_rows(const struct afd__link *link)
{
	return afd__link_is_joined(link) && !link->leaving;
}

static struct afd__link *find_holder(const afd_transport *net, uint32_t rank,
	const struct afd__link *except)
{
	for (uint32_t i = 0; i < net->n_addresses; i++) {
		struct afd__link *link = net->links[i];

		if (link != except && takes_rows(link) && link->rank == rank)
			return link;
	}
	return NULL;
}

static bool is_covered(const afd_transport *net)
{
	for (uint32_t rank = 0; rank < net->n_targets; rank++) {
		if (!net->targets[rank] || !afd__link_is_joined(net->targets[rank]))
			return false;
	}
	return net->n_targets || !net->n_addresses;
}

/* A peer that is up is heard before the others go on without it: it may contradict them. */
static bool is_under_way(const struct afd__link *link, uint64_t now)
{
	return link->phase > AFD__LINK_IDLE && link->phase < AFD__LINK_JOINED &&
	       now - link->since_ns < AFD__REFUSED_MS * UINT64_C(1000000);
}

int afd__shards_complete(afd_transport *net, uint64_t now)
{
	if (net->complete)
		return 1;
	if (net->error || !is_covered(net))
		return 0;
	for (uint32_t i = net->n_addresses; i < net->max_links; i++) {
		if (!net->links[i] || net->links[i]->phase < AFD__LINK_JOINED)
			return 0;
	}
	for (uint32_t i = 0; i < net->n_addresses; i++) {
		if (is_under_way(net->links[i], now))
			return 0;
	}
	for (uint32_t i = 0; i < net->n_addresses; i++) {
		if (net->links[i]->phase < AFD__LINK_JOINED)
			afd__log(net->ctx, AFD_LOG_WARN,
				"link %s: has not joined yet; the other FFN peers hold all shards%s%s",
				net->links[i]->name, net->links[i]->error_text[0] ? ": " : "",
				net->links[i]->error_text);
	}
	net->complete = true;
	return 1;
}

void afd__shards_joined(struct afd__link *link)
{
	afd_transport *net = link->net;
	struct afd__link *before = net->targets[link->rank];

	if (before && takes_rows(before))
		return;
	net->targets[link->rank] = link;
	afd__frames_retarget(net, link->rank);
	if (!net->error_passes || !is_covered(net))
		return;
	afd__log(net->ctx, AFD_LOG_INFO, "link %s: all shards are held again", link->name);
	net->error = 0;
	net->error_passes = false;
}

void afd__shards_left(struct afd__link *link)
{
	afd_transport *net = link->net;
	struct afd__link *next;

	if (net->targets[link->rank] != link)
		return;
	next = find_holder(net, link->rank, link);
	if (next)
		afd__log(net->ctx, AFD_LOG_WARN, "link %s: its shard is taken over by %s",
			link->name, next->name);
	/* One that drains is named in the error until it is gone. */
	if (!next && link->leaving && link->phase == AFD__LINK_JOINED &&
		!net->params.reconnect_ms)
		return;
	net->targets[link->rank] = next;
	afd__frames_retarget(net, link->rank);
}

bool afd__shards_spare(const struct afd__link *link)
{
	const afd_transport *net = link->net;

	if (!net->complete || link->kind != AFD__LINK_TO_FFN)
		return false;
	return link->phase < AFD__LINK_JOINED || net->targets[link->rank] != link ||
	       find_holder(net, link->rank, link);
}

bool afd__shards_waits(const afd_transport *net)
{
	return net->error_passes && net->params.reconnect_ms &&
	       afd__now_ns() - net->uncovered_ns <
		       net->params.reconnect_ms * UINT64_C(1000000);
}

int afd__shards_error(const afd_transport *net)
{
	if (!net->error || afd__shards_waits(net))
		return 0;
	return afd__error(net->error, "%s", net->error_text);
}

/* ---- what the attention stage asks ---- */

int afd__exchange_target(const afd_transport *net, uint32_t target, struct afd__target *out)
{
	if (target >= net->n_targets || !net->shards[target].n_targets)
		return afd__error(-ENOENT, "transport: target is %u, %u are known", target,
			net->n_targets);
	*out = net->shards[target];
	return 0;
}

bool afd__exchange_routed(const afd_transport *net, uint32_t layer)
{
	return net->params.gate == AFD_GATE_ATTENTION && net->ffn_kinds[layer] == AFD_FFN_MOE;
}

bool afd__exchange_wants(
	const afd_transport *net, uint32_t target, uint32_t layer, const int32_t *ids)
{
	const struct afd__target *shard = &net->shards[target];

	if (!afd__exchange_routed(net, layer) || net->contract.shared_experts)
		return true;
	for (uint32_t k = 0; k < net->contract.top_k; k++) {
		if (ids[k] >= 0 && (uint32_t)ids[k] >= shard->expert_begin &&
			(uint32_t)ids[k] < shard->expert_end)
			return true;
	}
	return false;
}
