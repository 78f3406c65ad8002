/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queue pairs: one reliable connection on each device of a link. Made with their receives posted,
 * described to the peer, connected to what it describes, ended when everything of ours has arrived.
 *
 * Retries are bounded, so that a peer that is gone is an error: 4.096 us * 2^timeout for an
 * acknowledgement, 6 more times (7 means for ever with some drivers). Receives are posted for all
 * that the peer can send, so that it never finds none.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "lib/transport/wire.h"
#include "verbs.h"

enum { TIMEOUT = 15, RETRIES = 6, RNR_TIMER = 12, HOPS = 64, LINGER_MS = 100 };
enum { BLOB_VERSION = 1, HEAD_BYTES = 24, RAIL_BYTES = 40, ROWS_APART = 1 };

/* ---- queue pairs ---- */

static int qp_error(struct end *end, const struct rail *rail, const char *what, int error)
{
	return end->hub->host->error(-EIO, "verbs: device %s: %s: %s", rail->nic->name, what,
		strerror(error));
}

int verbs_qp_begin(struct ibv_qp *qp, const struct rail *rail)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT,
		.port_num = (uint8_t)rail->port,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE };

	return ibv_modify_qp(
		qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

struct ibv_ah_attr verbs_qp_path(
	const struct rail *rail, uint16_t lid, const uint8_t gid[16], bool is_global)
{
	struct ibv_ah_attr path = { .dlid = lid, .port_num = (uint8_t)rail->port };

	if (rail->port_attr.link_layer == IBV_LINK_LAYER_ETHERNET || is_global) {
		path.is_global = 1;
		path.grh.sgid_index = (uint8_t)rail->gid_index;
		path.grh.hop_limit = HOPS;
		memcpy(path.grh.dgid.raw, gid, 16);
	}
	return path;
}

int verbs_qp_receive(struct ibv_qp *qp, const struct ibv_ah_attr *path, enum ibv_mtu mtu,
	uint32_t number, uint32_t psn)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_RTR,
		.path_mtu = mtu,
		.dest_qp_num = number,
		.rq_psn = psn,
		.max_dest_rd_atomic = 0,
		.min_rnr_timer = RNR_TIMER,
		.ah_attr = *path };

	return ibv_modify_qp(qp, &attr,
		IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

int verbs_qp_send(struct ibv_qp *qp, uint32_t timeout, uint32_t psn)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_RTS,
		.timeout = (uint8_t)(timeout ? timeout : TIMEOUT),
		.retry_cnt = RETRIES,
		.rnr_retry = RETRIES,
		.sq_psn = psn };

	return ibv_modify_qp(qp, &attr,
		IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
			IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

static int check_limits(const struct end *end, const struct rail *rail)
{
	const struct ibv_device_attr *attr = &rail->nic->attr;
	uint32_t deepest = verbs_send_depth(&end->geometry);

	if (deepest > (uint32_t)attr->max_qp_wr)
		return end->hub->host->error(-ENOTSUP,
			"verbs: device %s: %u slots need queues of %u requests, limit %d",
			rail->nic->name, end->geometry.n_slots, deepest, attr->max_qp_wr);
	if (rail->port_attr.max_msg_sz && end->geometry.slot_bytes > rail->port_attr.max_msg_sz)
		return end->hub->host->error(-ENOTSUP,
			"verbs: device %s: a part of %zu bytes, limit %u; lower max_rows",
			rail->nic->name, end->geometry.slot_bytes, rail->port_attr.max_msg_sz);
	return 0;
}

static int make_qp(struct end *end, struct rail *rail)
{
	struct ibv_qp_init_attr init = { .send_cq = rail->nic->cq,
		.recv_cq = rail->nic->cq,
		.cap = { .max_send_wr = verbs_send_depth(&end->geometry),
			.max_recv_wr = verbs_receive_depth(&end->geometry),
			.max_send_sge = 1,
			.max_recv_sge = 1,
			.max_inline_data = INLINE_BYTES },
		.qp_type = IBV_QPT_RC };
	int rc;

	rail->qp = ibv_create_qp(rail->nic->pd, &init);
	if (!rail->qp) {
		/* An adapter without room for a header in a request reads it from memory. */
		init.cap.max_inline_data = 0;
		rail->qp = ibv_create_qp(rail->nic->pd, &init);
	}
	if (!rail->qp)
		return qp_error(end, rail, "no queue pair", errno);
	rail->max_inline = init.cap.max_inline_data;
	rail->room = verbs_send_depth(&end->geometry);
	rc = verbs_qp_begin(rail->qp, rail);
	return rc ? qp_error(end, rail, "the queue pair cannot begin", rc) : 0;
}

static int open_rail(struct end *end, uint32_t index)
{
	struct rail *rail = &end->rails[index];
	struct hub *hub = end->hub;
	int rc = verbs_find_nic(hub, end->place.devices[index], &end->place, &rail->nic);

	if (!rc)
		rc = verbs_choose_port(hub, rail, &end->place);
	if (!rc)
		rc = check_limits(end, rail);
	if (!rc)
		rc = verbs_area_register(hub, end->area->chunk, rail->nic);
	if (!rc)
		rc = verbs_reserve(hub, rail->nic,
			verbs_send_depth(&end->geometry) + verbs_receive_depth(&end->geometry));
	if (rc) {
		rail->nic = NULL;
		return rc;
	}
	rail->first_psn = (uint32_t)hub->host->now_ns() & 0xffffff;
	rc = make_qp(end, rail);
	return rc ? rc : verbs_post_receives(end, index, verbs_receive_depth(&end->geometry));
}

/* ---- life ---- */

static int take_number(struct hub *hub, struct end *end)
{
	for (uint32_t i = 0; i < ENDS_MAX; i++) {
		if (hub->ends[i])
			continue;
		hub->ends[i] = end;
		end->index = i;
		end->serial = ++hub->serial;
		return 0;
	}
	return hub->host->error(-ENOSPC, "verbs: %d links, limit %d", ENDS_MAX, ENDS_MAX);
}

static void destroy_queue_pairs(struct end *end)
{
	for (uint32_t i = 0; i < end->n_rails; i++) {
		struct rail *rail = &end->rails[i];

		if (rail->nic && !verbs_forked(end->hub)) {
			if (rail->qp)
				ibv_destroy_qp(rail->qp);
			rail->nic->cqe_wanted -= verbs_send_depth(&end->geometry) +
						 verbs_receive_depth(&end->geometry);
		}
		rail->qp = NULL;
		rail->nic = NULL;
	}
}

static void wait_ms(int ms)
{
	struct timespec time = { .tv_nsec = ms * 1000000L };

	nanosleep(&time, NULL);
}

/* A queue pair that is destroyed takes along what has not arrived, such as a goodbye. */
static void linger(struct end *end)
{
	uint64_t until = end->hub->host->now_ns() + LINGER_MS * UINT64_C(1000000);

	if (!end->rails[0].qp || !end->connected || verbs_forked(end->hub))
		return;
	for (;;) {
		verbs_drain(end->hub);
		if (end->error || verbs_is_quiet(end) || end->hub->host->now_ns() > until)
			return;
		wait_ms(1);
	}
}

/* What was posted is read from there until it has arrived. */
void verbs_end_leave_device(void *opaque)
{
	struct end *end = opaque;

	if (end->device)
		linger(end);
	verbs_device_leave(end);
}

void verbs_end_shut(void *opaque)
{
	struct end *end = opaque;

	linger(end);
	destroy_queue_pairs(end);
	if (end->error)
		return;
	/* The thread's text is the caller's: it may say why. */
	end->error = -ECONNRESET;
	snprintf(end->error_text, sizeof(end->error_text), "the link has ended");
}

void verbs_end_close(void *opaque)
{
	struct end *end = opaque;
	struct hub *hub = end->hub;

	verbs_end_shut(end);
	verbs_device_leave(end);
	if (hub->ends[end->index] == end)
		hub->ends[end->index] = NULL;
	if (end->area)
		verbs_area_give(hub, end->area);
	hub->host->free(end);
}

int verbs_end_open(void **out, struct afd__shared *shared, const struct afd__verbs_place *place,
	const struct afd__wire_slots *geometry, struct afd__device *device)
{
	struct hub *hub = (struct hub *)shared;
	struct end *end = hub->host->alloc(hub->ctx, 1, sizeof(*end));
	int rc;

	if (!end)
		return -ENOMEM;
	end->hub = hub;
	end->place = *place;
	end->geometry = *geometry;
	end->n_rails = place->n_devices ? place->n_devices : 1;
	rc = take_number(hub, end);
	if (rc) {
		hub->host->free(end);
		return rc;
	}
	end->direction_bytes = verbs_direction_bytes(geometry);
	rc = end->direction_bytes ? verbs_area_take(hub, 2 * end->direction_bytes, &end->area)
				  : hub->host->error(-EINVAL, "slots: %u of %zu bytes are out of range",
					    geometry->n_slots, geometry->slot_bytes);
	for (uint32_t i = 0; !rc && i < end->n_rails; i++)
		rc = open_rail(end, i);
	if (rc) {
		verbs_end_close(end);
		return rc;
	}
	end->memory = end->area->chunk->memory + end->area->offset;
	if (device)
		verbs_device_take(end, device);
	for (uint32_t slot = 0; slot < geometry->n_slots; slot++)
		end->ours[slot] = true;
	*out = end;
	return 0;
}

/* ---- the description ---- */

size_t verbs_end_describe(const void *opaque, uint8_t blob[AFD__VERBS_BLOB_MAX])
{
	const struct end *end = opaque;
	const struct chunk *chunk = end->area->chunk;
	uint8_t *at = blob + HEAD_BYTES;

	afd__put32(blob, BLOB_VERSION);
	afd__put32(blob + 4, end->n_rails);
	afd__put64(blob + 8, (uintptr_t)end->memory + end->direction_bytes);
	afd__put64(blob + 16, end->direction_bytes);
	for (uint32_t i = 0; i < end->n_rails; i++, at += RAIL_BYTES) {
		const struct rail *rail = &end->rails[i];
		size_t nic = (size_t)(rail->nic - end->hub->nics);

		afd__put32(at, rail->qp->qp_num);
		afd__put32(at + 4, rail->first_psn);
		afd__put32(at + 8, rail->rows ? rail->rows->rkey : chunk->payload[nic]->rkey);
		afd__put32(at + 12, chunk->header[nic]->rkey);
		afd__put16(at + 16, rail->port_attr.lid);
		at[18] = (uint8_t)rail->port_attr.active_mtu;
		at[19] = rail->port_attr.link_layer;
		afd__put32(at + 20, rail->rows ? ROWS_APART : 0);
		memcpy(at + 24, rail->gid.raw, 16);
	}
	return (size_t)(at - blob);
}

static enum ibv_mtu mtu_of(uint32_t bytes)
{
	enum ibv_mtu mtu = IBV_MTU_256;

	while (256u << (mtu - IBV_MTU_256) < bytes && mtu < IBV_MTU_4096)
		mtu++;
	return mtu;
}

static enum ibv_mtu path_mtu(const struct end *end, const struct rail *rail, uint8_t peer)
{
	enum ibv_mtu mtu = rail->port_attr.active_mtu;

	if (peer < mtu)
		mtu = peer;
	if (end->place.mtu && mtu_of(end->place.mtu) < mtu)
		mtu = mtu_of(end->place.mtu);
	return mtu;
}

static int connect_rail(struct end *end, struct rail *rail, const uint8_t *at)
{
	struct ibv_ah_attr path =
		verbs_qp_path(rail, afd__take16(at + 16), at + 24, end->place.gid >= 0);
	int rc;

	if (at[18] < IBV_MTU_256 || at[18] > IBV_MTU_4096)
		return end->hub->host->error(-EPROTO, "verbs: the peer's MTU is %u, must be 1 .. 5",
			at[18]);
	if (at[19] != rail->port_attr.link_layer)
		return end->hub->host->error(-EPROTO,
			"verbs: the peer's link layer is %u, device %s has %u", at[19],
			rail->nic->name, rail->port_attr.link_layer);
	rail->payload_key = afd__take32(at + 8);
	rail->header_key = afd__take32(at + 12);
	rail->rows_apart = afd__take32(at + 20) & ROWS_APART;
	path.sl = (uint8_t)end->place.service_level;
	rc = verbs_qp_receive(rail->qp, &path, path_mtu(end, rail, at[18]), afd__take32(at),
		afd__take32(at + 4) & 0xffffff);
	if (rc)
		return qp_error(end, rail, "the peer cannot be reached from here", rc);
	rc = verbs_qp_send(rail->qp, end->place.timeout, rail->first_psn);
	return rc ? qp_error(end, rail, "the queue pair cannot send", rc) : 0;
}

int verbs_end_connect(void *opaque, const uint8_t *blob, size_t bytes)
{
	struct end *end = opaque;
	uint32_t n_rails = bytes >= HEAD_BYTES ? afd__take32(blob + 4) : 0;
	int rc = 0;

	if (bytes < HEAD_BYTES || afd__take32(blob) != BLOB_VERSION || !n_rails ||
		n_rails > AFD__RAILS_MAX || bytes != HEAD_BYTES + (size_t)n_rails * RAIL_BYTES)
		return end->hub->host->error(-EPROTO,
			"verbs: the peer describes %u queue pairs in %zu bytes, limit %d", n_rails,
			bytes, AFD__RAILS_MAX);
	if (n_rails != end->n_rails)
		return end->hub->host->error(-EPROTO,
			"verbs: the peer uses %u devices, we use %u; name as many in both addresses",
			n_rails, end->n_rails);
	if (afd__take64(blob + 16) != end->direction_bytes)
		return end->hub->host->error(-EPROTO,
			"verbs: the peer has %llu bytes of slots, must be %zu",
			(unsigned long long)afd__take64(blob + 16), end->direction_bytes);
	end->peer_memory = afd__take64(blob + 8);
	for (uint32_t i = 0; i < n_rails && !rc; i++)
		rc = connect_rail(end, &end->rails[i], blob + HEAD_BYTES + i * RAIL_BYTES);
	end->connected = !rc;
	return rc;
}
