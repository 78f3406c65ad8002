/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The proof that an adapter reaches memory of a device: over two queue pairs of our own, connected
 * to each other, it writes a random pattern there, which the device itself reads back; then it reads
 * what the device itself has written. At the first and at the last page of the piece, since a
 * mapping can end early. No wait is without an end.
 *
 * Called for each registration before anything is told of its key (device.c).
 */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "verbs.h"

enum { PAGE = 4096, WAIT_MS = 1000 };

struct proof {
	const struct end *end;
	const struct rail *rail;
	const struct ibv_mr *mr; /* of the device's memory */
	bool fault;
	const struct afd__module_host *host;
	uint8_t *page, *pattern; /* [PAGE] each: the adapter's, and what we expect */
	struct ibv_mr *page_mr;
	struct ibv_cq *cq;
	struct ibv_qp *qps[2]; /* requests go from the first to the second */
	uint64_t random;
};

static int failed(const struct proof *p, const char *what, int error)
{
	return p->host->error(-EIO, "proof: device %s: %s: %s", p->rail->nic->name, what,
		strerror(error));
}

static void draw(struct proof *p, uint8_t *bytes)
{
	for (size_t i = 0; i < PAGE; i++) {
		p->random = p->random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
		bytes[i] = (uint8_t)(p->random >> 56);
	}
}

/* ---- queue pairs ---- */

static int connect_qp(struct proof *p, struct ibv_qp *qp, const struct ibv_qp *to)
{
	const struct rail *rail = p->rail;
	const struct ibv_ah_attr path =
		verbs_qp_path(rail, rail->port_attr.lid, rail->gid.raw, false);
	int rc = verbs_qp_begin(qp, rail);

	if (!rc)
		rc = verbs_qp_receive(qp, &path, rail->port_attr.active_mtu, to->qp_num, 0);
	return rc ? rc : verbs_qp_send(qp, 0, 0);
}

static int begin(struct proof *p)
{
	const struct nic *nic = p->rail->nic;
	struct ibv_qp_init_attr init = { .cap = { .max_send_wr = 2,
						 .max_recv_wr = 1,
						 .max_send_sge = 1,
						 .max_recv_sge = 1 },
		.qp_type = IBV_QPT_RC };
	int rc;

	p->page = p->host->large_alloc(p->end->hub->ctx, 2 * PAGE, PAGE, "proof of device memory");
	if (!p->page)
		return -ENOMEM;
	p->pattern = p->page + PAGE;
	p->random = p->host->now_ns() ^ (uintptr_t)p;
	p->page_mr = ibv_reg_mr(
		nic->pd, p->page, PAGE, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	p->cq = p->page_mr ? ibv_create_cq(nic->device, 8, NULL, NULL, 0) : NULL;
	if (!p->cq)
		return failed(p, "no memory or queue for it", errno);
	init.send_cq = init.recv_cq = p->cq;
	for (int i = 0; i < 2; i++) {
		p->qps[i] = ibv_create_qp(nic->pd, &init);
		if (!p->qps[i])
			return failed(p, "no queue pair for it", errno);
	}
	rc = connect_qp(p, p->qps[0], p->qps[1]);
	if (!rc)
		rc = connect_qp(p, p->qps[1], p->qps[0]);
	return rc ? failed(p, "its queue pairs cannot be connected", rc) : 0;
}

static void end_proof(struct proof *p)
{
	for (int i = 0; i < 2; i++) {
		if (p->qps[i])
			ibv_destroy_qp(p->qps[i]);
	}
	if (p->cq)
		ibv_destroy_cq(p->cq);
	if (p->page_mr)
		ibv_dereg_mr(p->page_mr);
	if (p->page)
		p->host->large_free(p->end->hub->ctx, p->page, 2 * PAGE);
}

/* ---- one page ---- */

static int await(const struct proof *p)
{
	uint64_t until = p->host->now_ns() + WAIT_MS * UINT64_C(1000000);
	const struct timespec nap = { .tv_nsec = 20000 };
	struct ibv_wc wc;
	int n;

	while (!(n = ibv_poll_cq(p->cq, 1, &wc))) {
		if (p->host->now_ns() > until)
			return p->host->error(-ETIMEDOUT,
				"proof: device %s has not written within %d ms",
				p->rail->nic->name, WAIT_MS);
		nanosleep(&nap, NULL);
	}
	if (n < 0 || wc.status != IBV_WC_SUCCESS)
		return p->host->error(-EIO, "proof: device %s: %s", p->rail->nic->name,
			n < 0 ? "its completions cannot be read" : ibv_wc_status_str(wc.status));
	return 0;
}

static int write_there(
	struct proof *p, uint64_t from, uint32_t local_key, uint64_t to, uint32_t remote_key)
{
	struct ibv_sge part = { from, PAGE, local_key };
	struct ibv_send_wr *bad, request = { .sg_list = &part,
					 .num_sge = 1,
					 .opcode = IBV_WR_RDMA_WRITE,
					 .send_flags = IBV_SEND_SIGNALED,
					 .wr.rdma = { to, remote_key } };
	int rc = ibv_post_send(p->qps[0], &request, &bad);

	return rc ? failed(p, "a request was not taken", rc) : await(p);
}

static int compare(const struct proof *p, const char *what, size_t offset)
{
	for (size_t i = 0; i < PAGE; i++) {
		if (p->page[i] != p->pattern[i])
			return p->host->error(-EIO,
				"proof: %s: byte %zu of %zu is %u, must be %u", what, offset + i,
				p->end->area->bytes, p->page[i], p->pattern[i]);
	}
	return 0;
}

/* The adapter writes, the device reads. */
static int prove_write(struct proof *p, size_t offset)
{
	const struct end *end = p->end;
	uint8_t *memory = end->device_memory + offset;
	int rc;

	/* What is there before is known not to be the pattern. */
	draw(p, p->page);
	rc = p->host->device_copy(end->device, memory, p->page, PAGE, true);
	if (rc)
		return rc;
	draw(p, p->pattern);
	memcpy(p->page, p->pattern, PAGE);
	if (!p->fault)
		rc = write_there(p, (uintptr_t)p->page, p->page_mr->lkey,
			(uintptr_t)end->memory + offset, p->mr->rkey);
	memset(p->page, 0, PAGE);
	if (!rc)
		rc = p->host->device_copy(end->device, memory, p->page, PAGE, false);
	return rc ? rc : compare(p, "what the adapter wrote did not arrive", offset);
}

/* The device writes, the adapter reads. */
static int prove_read(struct proof *p, size_t offset)
{
	const struct end *end = p->end;
	int rc;

	draw(p, p->pattern);
	rc = p->host->device_copy(end->device, end->device_memory + offset, p->pattern, PAGE, true);
	memset(p->page, 0, PAGE);
	if (!rc)
		rc = write_there(p, (uintptr_t)end->memory + offset, p->mr->lkey, (uintptr_t)p->page,
			p->page_mr->rkey);
	return rc ? rc : compare(p, "what the adapter read was not there", offset);
}

int verbs_prove(
	const struct end *end, const struct rail *rail, const struct ibv_mr *mr, bool fault)
{
	const size_t offsets[] = { 0, end->area->bytes - PAGE };
	struct proof p = {
		.end = end, .rail = rail, .mr = mr, .fault = fault, .host = end->hub->host
	};
	int rc = begin(&p);

	for (size_t i = 0; i < 2 && !rc; i++) {
		rc = prove_write(&p, offsets[i]);
		if (!rc)
			rc = prove_read(&p, offsets[i]);
	}
	end_proof(&p);
	return rc;
}
