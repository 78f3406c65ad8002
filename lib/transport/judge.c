/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What each side states of itself in the handshake, and what it accepts of the other. Changes no
 * link: called by handshake.c. Each side checks all that it depends on, so that each side's error
 * names the field and both values.
 */
#include <stdio.h>
#include <string.h>

#include "net.h"

static void state_shard(const afd_transport *net, struct afd__hello *hello)
{
	const struct afd_shard *shard = &net->shard;
	struct afd__range experts =
		afd__shard_range(net->contract.n_experts, shard->ep, shard->n_ep);

	hello->map_version = AFD__MAP_VERSION;
	hello->shard_rank = shard->ep * shard->n_tp + shard->tp;
	hello->n_shards = shard->n_ep * shard->n_tp;
	hello->shard_tp = shard->tp;
	hello->n_tp = shard->n_tp;
	hello->expert_begin = experts.begin;
	hello->expert_end = experts.end;
}

void afd__hello_state_ours(const struct afd__link *link, struct afd__hello *hello, uint32_t kind)
{
	const afd_transport *net = link->net;

	memset(hello, 0, sizeof(*hello));
	hello->kind = kind;
	afd__hello_state(hello, &net->contract);
	hello->role = net->attention ? AFD_ROLE_ATTENTION : AFD_ROLE_FFN;
	hello->lanes = net->params.lanes;
	hello->max_rows = net->params.max_rows;
	hello->to_ffn_dtype = (uint32_t)net->params.to_ffn_dtype;
	hello->to_attention_dtype = (uint32_t)net->params.to_attention_dtype;
	hello->gate = (uint32_t)net->params.gate;
	hello->first_layer = net->params.first_layer;
	hello->n_held = net->params.n_layers;
	memcpy(hello->weights, net->weights, sizeof(hello->weights));
	hello->weights_epoch = net->weights_epoch;
	snprintf(hello->device, sizeof(hello->device), "%s", net->device);
	snprintf(hello->version, sizeof(hello->version), "%s", afd_version());
	if (!net->attention)
		state_shard(net, hello);
	if (link->kind != AFD__LINK_IN_GROUP)
		return;
	hello->group_index = net->params.group_index;
	hello->group_size = net->params.group_size;
}

static int refuse_number(
	struct afd__hello *refusal, const char *field, uint32_t ours, uint32_t theirs)
{
	char value[16];

	snprintf(value, sizeof(value), "%u", ours);
	afd__hello_refuse(refusal, field, value, "%u", theirs);
	return 1;
}

static int refuse_dtype(
	struct afd__hello *refusal, const char *field, int32_t ours, uint32_t theirs)
{
	char value[16] = "";

	if (ours)
		snprintf(value, sizeof(value), "%s", afd_dtype_name(ours));
	afd__hello_refuse(refusal, field, ours ? value : "f32, bf16, f16 or fp8", "%s",
		afd_dtype_name((int32_t)theirs));
	return 1;
}

static bool is_wire_dtype(uint32_t dtype)
{
	return dtype >= AFD_DTYPE_F32 && dtype <= AFD_DTYPE_FP8;
}

static int judge_version(const struct afd__hello *said, uint32_t kind, struct afd__hello *refusal)
{
	if (said->wire_version != AFD__WIRE_VERSION)
		return refuse_number(
			refusal, "wire_version", AFD__WIRE_VERSION, said->wire_version);
	if (said->kind == AFD__NONCE) {
		afd__hello_refuse(refusal, "key", "none", "required");
		return 1;
	}
	if (said->kind != kind)
		return refuse_number(refusal, "message kind", kind, said->kind);
	return 0;
}

/* What ranks of one group must share, so that they cut rows alike. 1: refused. */
static int judge_rank(
	const afd_transport *net, const struct afd__hello *said, struct afd__hello *refusal)
{
	const struct afd_transport_params *p = &net->params;

	if (said->group_size != p->group_size)
		return refuse_number(refusal, "group_size", p->group_size, said->group_size);
	if (said->group_index >= p->group_size || said->group_index == p->group_index)
		return refuse_number(refusal, "group_index", p->group_index, said->group_index);
	if (said->lanes != p->lanes)
		return refuse_number(refusal, "lanes", p->lanes, said->lanes);
	if (said->max_rows != p->max_rows)
		return refuse_number(refusal, "max_rows", p->max_rows, said->max_rows);
	return 0;
}

int afd__hello_judge(
	const struct afd__link *link, const struct afd__hello *said, struct afd__hello *refusal)
{
	const afd_transport *net = link->net;
	const struct afd_transport_params *p = &net->params;
	struct afd__hello ours;
	char value[48];

	if (judge_version(said, AFD__HELLO, refusal))
		return 1;
	afd__hello_state_ours(link, &ours, AFD__WELCOME);
	if (said->role != AFD_ROLE_ATTENTION)
		return refuse_number(
			refusal, "role of a peer that connects", AFD_ROLE_ATTENTION, said->role);
	if (afd__hello_compare(&ours, said, refusal))
		return 1;
	if (link->kind == AFD__LINK_IN_GROUP)
		return judge_rank(net, said, refusal);
	if (said->group_size)
		return refuse_number(refusal, "group_size", 0, said->group_size);
	if (said->first_layer < p->first_layer || said->n_held > p->n_layers ||
		said->first_layer - p->first_layer > p->n_layers - said->n_held) {
		snprintf(value, sizeof(value), "%u from %u on held", p->n_layers, p->first_layer);
		afd__hello_refuse(refusal, "layers", value, "%u from %u on wanted", said->n_held,
			said->first_layer);
		return 1;
	}
	if (!said->lanes || said->lanes > AFD_MAX_LANES)
		return refuse_number(refusal, "lanes", AFD_MAX_LANES, said->lanes);
	if (!said->max_rows)
		return refuse_number(refusal, "max_rows", p->max_rows, said->max_rows);
	if (!is_wire_dtype(said->to_ffn_dtype) ||
		(p->to_ffn_dtype && said->to_ffn_dtype != (uint32_t)p->to_ffn_dtype))
		return refuse_dtype(refusal, "to_ffn_dtype", p->to_ffn_dtype, said->to_ffn_dtype);
	if (!is_wire_dtype(said->to_attention_dtype) ||
		(p->to_attention_dtype &&
			said->to_attention_dtype != (uint32_t)p->to_attention_dtype))
		return refuse_dtype(refusal, "to_attention_dtype", p->to_attention_dtype,
			said->to_attention_dtype);
	if (said->gate != AFD_GATE_ATTENTION && said->gate != AFD_GATE_FFN)
		return refuse_number(refusal, "gate", AFD_GATE_FFN, said->gate);
	return 0;
}

int afd__welcome_judge(
	const struct afd__link *link, const struct afd__hello *said, struct afd__hello *refusal)
{
	const struct afd_transport_params *p = &link->net->params;
	uint32_t role = link->kind == AFD__LINK_IN_GROUP ? AFD_ROLE_ATTENTION : AFD_ROLE_FFN;
	struct afd__hello ours;

	if (judge_version(said, AFD__WELCOME, refusal))
		return 1;
	afd__hello_state_ours(link, &ours, AFD__HELLO);
	if (said->role != role)
		return refuse_number(refusal, "role of a peer that listens", role, said->role);
	if (afd__hello_compare(&ours, said, refusal))
		return 1;
	if (link->kind == AFD__LINK_IN_GROUP && judge_rank(link->net, said, refusal))
		return 1;
	if (link->kind == AFD__LINK_IN_GROUP && said->group_index != link->rank)
		return refuse_number(refusal, "group_index", link->rank, said->group_index);
	if (said->lanes != p->lanes)
		return refuse_number(refusal, "lanes", p->lanes, said->lanes);
	if (!said->max_rows || said->max_rows > p->max_rows)
		return refuse_number(refusal, "max_rows", p->max_rows, said->max_rows);
	if (said->to_ffn_dtype != (uint32_t)p->to_ffn_dtype)
		return refuse_dtype(refusal, "to_ffn_dtype", p->to_ffn_dtype, said->to_ffn_dtype);
	if (said->to_attention_dtype != (uint32_t)p->to_attention_dtype)
		return refuse_dtype(refusal, "to_attention_dtype", p->to_attention_dtype,
			said->to_attention_dtype);
	return 0;
}
