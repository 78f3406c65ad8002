/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps and frames as the attention side's callers see them: begin, send, progress, done, cancel. A
 * step is told to the peers before its rows; its frames are moved by frames.c. Called by the
 * attention stage and, for a host's own, by host.c.
 */
#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "net.h"

int afd__steps_check_links(const afd_transport *net)
{
	int rc;

	if (!net->attention)
		return afd__error(-EINVAL,
			"transport: made to listen, frames are sent by the attention side");
	rc = afd__shards_error(net);
	if (rc)
		return rc;
	for (uint32_t i = net->n_addresses; i < net->max_links; i++) {
		if (net->links[i] && net->links[i]->error)
			return afd__group_error(net->links[i]);
	}
	if (!net->complete)
		return afd__error(-EAGAIN, "transport: %u of %u peers have joined", net->n_joined,
			net->n_links_wanted);
	for (uint32_t t = 0; t < net->n_targets; t++) {
		if (net->targets[t] && net->targets[t]->leaving)
			return afd__error(-ECONNRESET, "link %s: the FFN peer is leaving",
				net->targets[t]->name);
	}
	return 0;
}

/* In a group FFN peers are told this rank's share, the other ranks the whole. */
static void tell_rows(struct afd__link *link)
{
	const struct afd_transport_params *p = &link->net->params;
	uint32_t i = link->kind == AFD__LINK_TO_FFN ? p->group_index : 0;
	uint32_t n = link->kind == AFD__LINK_TO_FFN ? p->group_size : 1;

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++)
		link->step_open.n_rows[lane] =
			afd__range_size(afd__shard_range(link->net->step_rows[lane], i, n));
}

void afd__steps_tell(struct afd__link *link)
{
	afd_transport *net = link->net;

	if (link->step_open.step == net->step)
		return;
	link->step_open.step = net->step;
	tell_rows(link);
	memcpy(link->step_open.trace_id, net->trace_id, sizeof(net->trace_id));
	link->open_due = true;
	afd__link_timers(link, afd__now_ns());
}

/* Replicas hear of a step when they get rows of it, so that their gather waits for nobody. */
static bool is_told(const struct afd__link *link)
{
	return afd__link_is_joined(link) && (link->kind == AFD__LINK_IN_GROUP ||
						    link->net->targets[link->rank] == link);
}

static int begin(afd_transport *net, const struct afd_step_params *params)
{
	int rc = afd__steps_check_links(net);

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		if (rc)
			return rc;
		if (net->frames[lane].active)
			rc = afd__error(-EINVAL,
				"step: the frame of lane %u at layer %u is still out", lane,
				net->frames[lane].layer);
		else if (net->groups[lane].active)
			rc = afd__error(-EINVAL,
				"step: the group operation of lane %u at layer %u is still out",
				lane, net->groups[lane].layer);
		else if (lane >= net->params.lanes && params->n_rows[lane])
			rc = afd__error(-EINVAL,
				"step: lane %u has %u rows, the transport has %u lanes", lane,
				params->n_rows[lane], net->params.lanes);
	}
	if (rc)
		return rc;
	net->step++;
	net->step_open = true;
	memcpy(net->step_rows, params->n_rows, sizeof(net->step_rows));
	memcpy(net->trace_id, params->trace_id, sizeof(net->trace_id));
	for (uint32_t i = 0; i < net->max_links; i++) {
		if (net->links[i] && is_told(net->links[i]))
			afd__steps_tell(net->links[i]);
	}
	return afd__shards_error(net);
}

/* A rank of our group may wait for what will not come, whether it has heard of the step or not. */
static void close_step(struct afd__link *link, const char *cause)
{
	bool in_group = link->kind == AFD__LINK_IN_GROUP;

	if ((in_group || (!link->open_due && link->step_open.step == link->net->step)) &&
		afd__link_is_joined(link)) {
		link->step_close = (struct afd__step_close){ .step = link->net->step,
			.reason = AFD__CLOSE_CANCELLED };
		if (in_group && cause)
			snprintf(link->step_close.text, sizeof(link->step_close.text), "%s", cause);
		link->close_due = true;
	}
	link->open_due = false;
	if (link->close_due)
		afd__link_timers(link, afd__now_ns());
}

/* The first cause, when another rank has said it. */
static const char *first_cause(const afd_transport *net, const char *cause)
{
	for (uint32_t i = net->n_addresses; cause && i < net->max_links; i++) {
		const struct afd__link *link = net->links[i];

		if (link && link->peer_closed.step == net->step && link->peer_closed.text[0])
			return link->peer_closed.text;
	}
	return cause;
}

int afd__exchange_cancel(afd_transport *net, const char *cause)
{
	if (!net->attention)
		return afd__error(
			-EINVAL, "transport: made to listen, steps are the attention side's");
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		afd__frame_end(net, lane, 0);
		net->frames[lane].error = 0;
	}
	afd__group_cancel(net);
	cause = first_cause(net, cause);
	for (uint32_t i = 0; net->step_open && i < net->max_links; i++) {
		if (net->links[i])
			close_step(net->links[i], cause);
	}
	net->step_open = false;
	return 0;
}

int afd__exchange_begin(afd_transport *net, const struct afd_step_params *params)
{
	struct afd_step_params p;
	int rc = afd__params_copy(&p, sizeof(p), params, "step params");

	if (!rc && (p.flags || p._pad))
		rc = afd__error(-EINVAL, "step params: flags are 0x%x, _pad is %u, both must be 0",
			p.flags, p._pad);
	return rc ? rc : begin(net, &p);
}

int afd__frames_clear(afd_transport *net, uint32_t lane)
{
	int rc = afd__steps_check_links(net);

	net->frames[lane].error = 0;
	return rc;
}

static int check_frame(const afd_transport *net, uint32_t lane, uint32_t layer)
{
	if (!net->step_open)
		return afd__error(-EINVAL, "frame: no step is open");
	if (!net->n_addresses)
		return afd__error(-EINVAL, "frame: the transport was made without FFN peers");
	if (lane >= net->params.lanes)
		return afd__error(
			-EINVAL, "frame: lane is %u, limit %u", lane, net->params.lanes - 1);
	if (layer >= net->contract.n_layers)
		return afd__error(
			-EINVAL, "frame: layer is %u, limit %u", layer, net->contract.n_layers - 1);
	if (net->frames[lane].active)
		return afd__error(-EBUSY, "frame: lane %u has one out, at layer %u", lane,
			net->frames[lane].layer);
	return 0;
}

/* How many parts the rows make for each target. */
static int check_parts(const afd_transport *net, const uint32_t *n_rows)
{
	uint32_t any = 0;

	for (uint32_t t = 0; t < net->n_targets; t++) {
		uint32_t limit = net->shards[t].max_rows;

		any |= n_rows[t];
		if (n_rows[t] && (n_rows[t] - 1) / limit + 1 > UINT16_MAX)
			return afd__error(-EINVAL,
				"frame: %u rows make more than %d parts of %u rows", n_rows[t],
				UINT16_MAX, limit);
	}
	return any ? 0 : afd__error(-EINVAL, "frame: n_rows is 0, such a frame does not cross");
}

int afd__exchange_send(afd_transport *net, uint32_t lane, uint32_t layer, const uint32_t *n_rows,
	const struct afd__frame_io *io)
{
	struct afd__frame_out *frame;
	int rc = afd__steps_check_links(net);

	if (!rc)
		rc = check_frame(net, lane, layer);
	if (!rc)
		rc = check_parts(net, n_rows);
	if (rc)
		return rc;
	frame = &net->frames[lane];
	frame->active = true;
	frame->error = 0;
	frame->layer = layer;
	frame->io = *io;
	frame->n_targets = net->n_targets;
	for (uint32_t t = 0; t < frame->n_targets; t++) {
		struct afd__frame_target *target = &frame->targets[t];

		target->link = net->targets[t];
		target->n_rows = n_rows[t];
		target->rows_done = target->n_again = 0;
		target->pieces[0] = (struct afd__piece){ 0, n_rows[t] };
		target->n_pieces = n_rows[t] != 0;
		target->next_part = 0;
		target->n_parts = (uint16_t)afd__frame_count_parts(target);
	}
	return 0;
}

static bool any_frame_is_out(const afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		if (net->frames[lane].active || net->groups[lane].active)
			return true;
	}
	return false;
}

uint64_t afd__exchange_step(const afd_transport *net)
{
	return net->step;
}

int afd__exchange_progress(afd_transport *net)
{
	int moved = afd__net_move(net);

	if (moved < 0)
		return moved;
	/* What outlives its link needs nothing of it any more, and is let come to its end. */
	return net->error && !any_frame_is_out(net) && afd__shards_error(net) ? net->error : moved;
}

int afd__exchange_done(afd_transport *net, uint32_t lane)
{
	struct afd__frame_out *frame = &net->frames[lane];

	assert(lane < AFD_MAX_LANES);
	if (frame->active)
		return 0;
	/* The stage may not take its memory back while it is still written or read. */
	if (afd__frame_is_touched(net, lane))
		return 0;
	return frame->error ? afd__error(frame->error, "%s", frame->error_text) : 1;
}
