/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who holds what: each FFN peer states its shard in its welcome, and when the last of them has, all
 * shards of one way of sharding must be there, each once. Peers are connected to in any order; from
 * here on they are targets, numbered by the rank of their shard. Called by the handshake, and by
 * the attention stage to find out which rows go where.
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
	uint64_t n_experts = net->contract.n_experts, ep, n_ep;
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
	ep = said->shard_rank / said->n_tp;
	n_ep = said->n_shards / said->n_tp;
	if (said->expert_begin == ep * n_experts / n_ep &&
		said->expert_end == (ep + 1) * n_experts / n_ep)
		return 0;
	snprintf(value, sizeof(value), "%u .. %u", (unsigned)(ep * n_experts / n_ep),
		(unsigned)((ep + 1) * n_experts / n_ep));
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

/* The text of what is missing and what is there twice; the code says which of them it is. */
static int describe(const afd_transport *net, const struct afd__link *link, const uint32_t *n_of,
	const uint32_t *first, const uint32_t *last)
{
	char text[384] = "", name[NAME_BYTES];
	uint32_t n_missing = 0, n_doubled = 0;
	size_t at = 0;

	for (uint32_t rank = 0; rank < link->shard.n_targets; rank++) {
		n_missing += !n_of[rank];
		n_doubled += n_of[rank] > 1;
		if (n_of[rank] == 1 || at > sizeof(text) - 2)
			continue;
		name_shard(name, rank, link->shard.n_tp, link->shard.n_targets);
		if (!n_of[rank])
			at += (size_t)snprintf(text + at, sizeof(text) - at,
				"%sno FFN peer holds %s", at ? "; " : "", name);
		else
			at += (size_t)snprintf(text + at, sizeof(text) - at, "%s%s is held by %s and %s",
				at ? "; " : "", name, net->links[first[rank]]->name,
				net->links[last[rank]]->name);
	}
	if (n_missing)
		return afd__error(-EPROTO, "shards: %s", text);
	if (n_doubled)
		return afd__error(
			-ENOTSUP, "shards: %s; replicas are not supported in this version", text);
	return 0;
}

/* All peers have said what they hold. */
static int check_cover(afd_transport *net, const struct afd__link *link)
{
	uint32_t n_of[AFD__TARGETS_MAX] = { 0 }, first[AFD__TARGETS_MAX], last[AFD__TARGETS_MAX];
	int rc;

	for (uint32_t i = 0; i < net->n_addresses; i++) {
		uint32_t rank = net->links[i]->rank;

		if (!n_of[rank]++)
			first[rank] = i;
		last[rank] = i;
	}
	rc = describe(net, link, n_of, first, last);
	for (uint32_t rank = 0; !rc && rank < link->shard.n_targets; rank++)
		net->targets[rank] = net->links[first[rank]];
	return rc;
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
	if (!rc)
		return 0;
	link->placed = false;
	name_shard(value, link->rank, link->shard.n_tp, link->shard.n_targets);
	afd__hello_refuse(refusal, "shard", "one that completes the others", "%s", value);
	snprintf(refusal->text, sizeof(refusal->text), "%s", afd_last_error());
	return rc;
}

/* ---- what the attention stage asks ---- */

int afd__exchange_target(const afd_transport *net, uint32_t target, struct afd__target *out)
{
	if (target >= net->n_addresses || !net->targets[target])
		return afd__error(-ENOENT, "transport: target is %u, %u are known", target,
			net->targets[0] ? net->n_addresses : 0);
	*out = net->targets[target]->shard;
	return 0;
}

bool afd__exchange_routed(const afd_transport *net, uint32_t layer)
{
	return net->params.gate == AFD_GATE_ATTENTION && net->ffn_kinds[layer] == AFD_FFN_MOE;
}

bool afd__exchange_wants(
	const afd_transport *net, uint32_t target, uint32_t layer, const int32_t *ids)
{
	const struct afd__target *shard = &net->targets[target]->shard;

	if (!afd__exchange_routed(net, layer) || net->contract.shared_experts)
		return true;
	for (uint32_t k = 0; k < net->contract.top_k; k++) {
		if (ids[k] >= 0 && (uint32_t)ids[k] >= shard->expert_begin &&
			(uint32_t)ids[k] < shard->expert_end)
			return true;
	}
	return false;
}
