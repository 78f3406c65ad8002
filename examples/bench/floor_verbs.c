/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The floor of verbs: a raw ping-pong of the same work requests, one WRITE of the payload and one
 * WRITE WITH IMMEDIATE of the last 128 bytes, inline where the device can, completions spun on. Each
 * end makes its own queue pair after the fork, on the device that owns 127.0.0.1, else the first.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <infiniband/verbs.h>

#include "floor.h"
#include "floor_verbs.h"

enum { TAIL = 128, RECEIVES = 8, SENDS = 8, GIDS_MAX = 64, TIMEOUT = 15, RETRIES = 6 };
#define LOOKS_MAX (UINT64_C(1) << 31)

struct place { /* of an end, told to the other */
	uint32_t qp_num, key;
	uint64_t memory; /* of its receive buffer */
	union ibv_gid gid;
	uint16_t lid;
	uint8_t mtu;
};

struct raw {
	struct ibv_context *device;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	uint8_t *memory; /* what goes out, then what comes in: [2][span] */
	size_t span;
	uint32_t max_inline;
	struct ibv_port_attr port;
	int gid_index;
	struct place there;
};

/* ---- making ---- */

static int find_gid(struct ibv_context *device, int *fit)
{
	static const uint8_t loopback[16] = { [10] = 0xff, [11] = 0xff, 127, 0, 0, 1 };
	struct ibv_gid_entry entries[GIDS_MAX];
	ssize_t n = ibv_query_gid_table(device, entries, GIDS_MAX, 0);
	int index = 0;

	*fit = 1;
	for (ssize_t i = 0; i < n && *fit < 3; i++) {
		bool is_ours = !memcmp(entries[i].gid.raw, loopback, 16);

		if (entries[i].port_num != 1 || entries[i].gid_type != IBV_GID_TYPE_ROCE_V2 ||
			(*fit == 2 && !is_ours))
			continue;
		*fit = is_ours ? 3 : 2;
		index = (int)entries[i].gid_index;
	}
	return index;
}

static int open_device(struct raw *r)
{
	int n = 0, best = 0, fit;
	struct ibv_device **list = ibv_get_device_list(&n);

	for (int i = 0; list && i < n; i++) {
		struct ibv_context *device = ibv_open_device(list[i]);
		int index = device ? find_gid(device, &fit) : 0;

		if (!device)
			continue;
		if (fit <= best) {
			ibv_close_device(device);
			continue;
		}
		if (r->device)
			ibv_close_device(r->device);
		best = fit;
		r->device = device;
		r->gid_index = index;
	}
	if (list)
		ibv_free_device_list(list);
	return r->device ? 0 : ENODEV;
}

static int make_queues(struct raw *r)
{
	struct ibv_qp_init_attr init = { .cap = { .max_send_wr = SENDS,
						 .max_recv_wr = RECEIVES,
						 .max_send_sge = 1,
						 .max_recv_sge = 1,
						 .max_inline_data = TAIL },
		.qp_type = IBV_QPT_RC };
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE };

	r->pd = ibv_alloc_pd(r->device);
	r->cq = ibv_create_cq(r->device, SENDS + RECEIVES, NULL, NULL, 0);
	if (!r->pd || !r->cq || ibv_query_port(r->device, 1, &r->port))
		return EIO;
	r->mr = ibv_reg_mr(r->pd, r->memory, 2 * r->span,
		IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	init.send_cq = init.recv_cq = r->cq;
	r->qp = ibv_create_qp(r->pd, &init);
	if (!r->mr || !r->qp)
		return errno ? errno : EIO;
	r->max_inline = init.cap.max_inline_data;
	return ibv_modify_qp(r->qp, &attr,
		IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

static int post_receive(struct raw *r)
{
	struct ibv_recv_wr request = { 0 }, *bad;

	return ibv_post_recv(r->qp, &request, &bad);
}

static int connect_to(struct raw *r)
{
	struct ibv_qp_attr receive = { .qp_state = IBV_QPS_RTR,
		.path_mtu = r->there.mtu < r->port.active_mtu ? r->there.mtu : r->port.active_mtu,
		.dest_qp_num = r->there.qp_num,
		.min_rnr_timer = 12,
		.ah_attr = { .dlid = r->there.lid,
			.port_num = 1,
			.is_global = r->port.link_layer == IBV_LINK_LAYER_ETHERNET,
			.grh = { .sgid_index = (uint8_t)r->gid_index,
				.hop_limit = 64,
				.dgid = r->there.gid } } };
	struct ibv_qp_attr send = { .qp_state = IBV_QPS_RTS,
		.timeout = TIMEOUT,
		.retry_cnt = RETRIES,
		.rnr_retry = RETRIES };
	int error = ibv_modify_qp(r->qp, &receive,
		IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);

	return error ? error
		     : ibv_modify_qp(r->qp, &send,
			       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
				       IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

/* Places cross by the control socket before any order does; a byte more says that the end is ready. */
static int exchange_places(struct bench_floor *f, struct raw *r)
{
	struct place here = { .qp_num = r->qp->qp_num,
		.key = r->mr->rkey,
		.memory = (uintptr_t)r->memory + r->span,
		.lid = r->port.lid,
		.mtu = (uint8_t)r->port.active_mtu };
	char ready = 1;
	int error;

	if (ibv_query_gid(r->device, 1, r->gid_index, &here.gid))
		return EIO;
	if (write(f->control, &here, sizeof here) != sizeof here ||
		read(f->control, &r->there, sizeof r->there) != sizeof r->there)
		return ECONNRESET;
	error = connect_to(r);
	if (error)
		return error;
	return write(f->control, &ready, 1) != 1 || read(f->control, &ready, 1) != 1 ? ECONNRESET : 0;
}

static int verbs_open(struct bench_floor *f)
{
	int n = 0;
	struct ibv_device **list = ibv_get_device_list(&n);

	if (list)
		ibv_free_device_list(list);
	return n > 0 ? 0 : ENODEV;
}

/* After the fork, in both processes: nothing of verbs is shared. */
static int verbs_meet(struct bench_floor *f)
{
	struct raw *r = calloc(1, sizeof *r);
	int error;

	if (!r)
		return ENOMEM;
	f->own = r;
	r->span = (f->max_bytes + 2 * TAIL + 4095) / 4096 * 4096;
	r->memory = aligned_alloc(4096, 2 * r->span);
	if (!r->memory)
		return ENOMEM;
	memset(r->memory, 0, 2 * r->span);
	error = open_device(r);
	if (!error)
		error = make_queues(r);
	for (int i = 0; i < RECEIVES && !error; i++)
		error = post_receive(r);
	return error ? error : exchange_places(f, r);
}

static void verbs_close(struct bench_floor *f)
{
	struct raw *r = f->own;

	if (!r)
		return;
	if (r->qp)
		ibv_destroy_qp(r->qp);
	if (r->mr)
		ibv_dereg_mr(r->mr);
	if (r->cq)
		ibv_destroy_cq(r->cq);
	if (r->pd)
		ibv_dealloc_pd(r->pd);
	if (r->device)
		ibv_close_device(r->device);
	free(r->memory);
	free(r);
	f->own = NULL;
}

/* ---- rounds ---- */

/* The message lies behind TAIL / 2 bytes that stand for the record of the exchange. */
static uint8_t *outgoing(struct raw *r)
{
	return r->memory + TAIL / 2;
}

static uint8_t *incoming(struct raw *r)
{
	return r->memory + r->span + TAIL / 2;
}

static int send_message(struct raw *r, size_t n_bytes)
{
	size_t head = n_bytes < TAIL / 2 ? n_bytes : TAIL / 2;
	struct ibv_sge parts[2] = {
		{ (uintptr_t)outgoing(r) + head, (uint32_t)(n_bytes - head), r->mr->lkey },
		{ (uintptr_t)r->memory, (uint32_t)(TAIL / 2 + head), r->mr->lkey },
	};
	struct ibv_send_wr tail = { .sg_list = &parts[1],
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
		.send_flags = IBV_SEND_SIGNALED | (r->max_inline >= TAIL ? IBV_SEND_INLINE : 0),
		.wr.rdma = { r->there.memory, r->there.key } };
	struct ibv_send_wr payload = { .next = &tail,
		.sg_list = &parts[0],
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE,
		.wr.rdma = { r->there.memory + TAIL / 2 + head, r->there.key } };
	struct ibv_send_wr *bad;

	return ibv_post_send(r->qp, n_bytes > head ? &payload : &tail, &bad);
}

static int await_message(struct raw *r)
{
	for (uint64_t i = 0; i < LOOKS_MAX; i++) {
		struct ibv_wc wc;
		int n = ibv_poll_cq(r->cq, 1, &wc);

		if (n < 0 || (n && wc.status != IBV_WC_SUCCESS))
			return ECONNRESET;
		if (n && wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM)
			return post_receive(r);
	}
	return ETIMEDOUT;
}

static int verbs_round(struct bench_floor *f, const void *x, void *y, size_t n_bytes)
{
	struct raw *r = f->own;
	int error;

	memcpy(outgoing(r), x, n_bytes);
	error = send_message(r, n_bytes);
	if (!error)
		error = await_message(r);
	if (!error)
		memcpy(y, incoming(r), n_bytes);
	return error;
}

static int verbs_answer(struct bench_floor *f, size_t n_bytes)
{
	struct raw *r = f->own;
	int error = await_message(r);

	if (error)
		return error;
	bench_floor_answer(outgoing(r), incoming(r), n_bytes);
	return send_message(r, n_bytes);
}

const struct bench_floor_medium bench_floor_verbs = { "verbs",
	"one WRITE and one WRITE WITH IMMEDIATE, spinning", verbs_open, verbs_meet, verbs_meet,
	verbs_round, verbs_answer, verbs_close };
