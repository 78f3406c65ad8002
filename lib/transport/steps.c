/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Steps and frames as the attention side's callers see them: begin, send, progress, done, cancel. A
 * step is told to the peers before its rows; its frames are moved by frames.c. Called by the
 * attention stage and, for a host's own, by host.c.
 */
#include <assert.h>
#include <string.h>

#include "net.h"

/* The first cause of why nothing can be sent; 0 when something can. */
static int check_links(const afd_transport *net)
{
	if (!net->attention)
		return afd__error(-EINVAL,
			"transport: made to listen, frames are sent by the attention side");
	if (net->error)
		return afd__error(net->error, "%s", net->error_text);
	if (net->n_joined < net->n_addresses)
		return afd__error(-EAGAIN, "transport: %u of %u FFN peers have joined",
			net->n_joined, net->n_addresses);
	for (uint32_t i = 0; i < net->max_links; i++) {
		if (net->links[i]->leaving)
			return afd__error(-ECONNRESET, "link %s: the FFN peer is leaving",
				net->links[i]->name);
	}
	return 0;
}

static int begin(afd_transport *net, const struct afd_step_params *params)
{
	int rc = check_links(net);

	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		if (rc)
			return rc;
		if (net->frames[lane].active)
			rc = afd__error(-EINVAL,
				"step: the frame of lane %u at layer %u is still out", lane,
				net->frames[lane].layer);
		else if (lane >= net->params.lanes && params->n_rows[lane])
			rc = afd__error(-EINVAL,
				"step: lane %u has %u rows, the transport has %u lanes", lane,
				params->n_rows[lane], net->params.lanes);
	}
	if (rc)
		return rc;
	net->step++;
	net->step_open = true;
	for (uint32_t i = 0; i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		link->step_open.step = net->step;
		memcpy(link->step_open.n_rows, params->n_rows, sizeof(params->n_rows));
		memcpy(link->step_open.trace_id, params->trace_id, sizeof(params->trace_id));
		link->open_due = true;
		afd__link_timers(link, afd__now_ns());
	}
	return net->error ? afd__error(net->error, "%s", net->error_text) : 0;
}

int afd__exchange_cancel(afd_transport *net)
{
	if (!net->attention)
		return afd__error(
			-EINVAL, "transport: made to listen, steps are the attention side's");
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		afd__frame_end(&net->frames[lane], lane, 0);
		net->frames[lane].error = 0;
	}
	for (uint32_t i = 0; net->step_open && i < net->max_links; i++) {
		struct afd__link *link = net->links[i];

		/* A step that the peer has not heard of need not be closed. */
		if (!link->open_due && afd__link_is_joined(link)) {
			link->step_close = (struct afd__step_close){ .step = net->step,
				.reason = AFD__CLOSE_CANCELLED };
			link->close_due = true;
			afd__link_timers(link, afd__now_ns());
		}
		link->open_due = false;
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
	int rc = check_links(net);

	net->frames[lane].error = 0;
	return rc;
}

static int check_frame(const afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows)
{
	if (!net->step_open)
		return afd__error(-EINVAL, "frame: no step is open");
	if (lane >= net->params.lanes)
		return afd__error(
			-EINVAL, "frame: lane is %u, limit %u", lane, net->params.lanes - 1);
	if (layer >= net->contract.n_layers)
		return afd__error(
			-EINVAL, "frame: layer is %u, limit %u", layer, net->contract.n_layers - 1);
	if (net->frames[lane].active)
		return afd__error(-EBUSY, "frame: lane %u has one out, at layer %u", lane,
			net->frames[lane].layer);
	if (!n_rows)
		return afd__error(-EINVAL, "frame: n_rows is 0, such a frame does not cross");
	return 0;
}

int afd__exchange_send(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__frame_io *io)
{
	struct afd__link *link;
	struct afd__frame_out *frame;
	uint32_t n_parts;
	int rc = check_links(net);

	if (!rc)
		rc = check_frame(net, lane, layer, n_rows);
	if (rc)
		return rc;
	link = net->links[0];
	n_parts = (n_rows - 1) / link->max_rows + 1;
	if (n_parts > UINT16_MAX)
		return afd__error(-EINVAL, "frame: %u rows make %u parts of %u rows, limit %d",
			n_rows, n_parts, link->max_rows, UINT16_MAX);
	frame = &net->frames[lane];
	frame->active = true;
	frame->error = 0;
	frame->layer = layer;
	frame->n_rows = n_rows;
	frame->part_rows = link->max_rows;
	frame->n_parts = (uint16_t)n_parts;
	frame->io = *io;
	frame->n_targets = 1;
	frame->targets[0] = (struct afd__frame_target){ .link = link };
	return 0;
}

static bool any_frame_is_out(const afd_transport *net)
{
	for (uint32_t lane = 0; lane < AFD_MAX_LANES; lane++) {
		if (net->frames[lane].active)
			return true;
	}
	return false;
}

int afd__exchange_progress(afd_transport *net)
{
	int moved = afd__net_move(net);

	if (moved < 0)
		return moved;
	/* What outlives its link needs nothing of it any more, and is let come to its end. */
	return net->error && !any_frame_is_out(net) ? afd__error(net->error, "%s", net->error_text)
						    : moved;
}

int afd__exchange_done(afd_transport *net, uint32_t lane)
{
	struct afd__frame_out *frame = &net->frames[lane];

	assert(lane < AFD_MAX_LANES);
	if (frame->active)
		return 0;
	/* The stage may not take its memory back while it is still written or read. */
	if (afd__frame_is_touched(frame, lane))
		return 0;
	return frame->error ? afd__error(frame->error, "%s", frame->error_text) : 1;
}
