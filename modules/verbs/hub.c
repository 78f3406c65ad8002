/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Devices and their completion queues. A completion belongs to the end whose number and serial its
 * request carries; those of ends that are gone are dropped.
 *
 * Invariant: a completion channel is readable when its device was armed and something has come
 * since; arming looks at the queue once more, so nothing is slept over.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "lib/device/build_id.h"
#include "verbs.h"

enum { FIRST_CQE = 256, BATCH = 16, GIDS_MAX = 256, ASYNC = 4 /* tag number of nic 0's */ };

/* ---- devices ---- */

int verbs_probe(const struct afd__module_host *host, struct afd_context *ctx)
{
	struct ibv_device **list;
	int n = 0;

	errno = 0;
	list = ibv_get_device_list(&n);
	if (!list)
		return host->error(errno == ENOSYS ? -ENODEV : -EIO, "verbs: no RDMA device: %s",
			errno == ENOSYS ? "the kernel has no RDMA" : strerror(errno));
	ibv_free_device_list(list);
	return n > 0 ? 0 : host->error(-ENODEV, "verbs: this machine has no RDMA device");
}

static int nonblocking(int fd)
{
	int flags = fcntl(fd, F_GETFL);

	return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -1 : 0;
}

static int watch(struct hub *hub, int fd, unsigned number)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET,
		.data.ptr = (char *)&hub->shared.tag + number };

	return nonblocking(fd) || epoll_ctl(hub->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -1 : 0;
}

static void close_nic(struct hub *hub, struct nic *nic)
{
	if (verbs_forked(hub)) {
		/* What the kernel holds is the parent's; only our copies of descriptors go. */
		if (nic->channel)
			close(nic->channel->fd);
		close(nic->device->async_fd);
		close(nic->device->cmd_fd);
		return;
	}
	if (nic->channel)
		epoll_ctl(hub->epoll_fd, EPOLL_CTL_DEL, nic->channel->fd, NULL);
	epoll_ctl(hub->epoll_fd, EPOLL_CTL_DEL, nic->device->async_fd, NULL);
	if (nic->cq)
		ibv_destroy_cq(nic->cq);
	if (nic->channel)
		ibv_destroy_comp_channel(nic->channel);
	if (nic->pd)
		ibv_dealloc_pd(nic->pd);
	ibv_close_device(nic->device);
}

static int open_nic(struct hub *hub, struct ibv_device *device, struct nic **out)
{
	struct nic *nic = &hub->nics[hub->n_nics];
	int rc;

	memset(nic, 0, sizeof(*nic));
	snprintf(nic->name, sizeof(nic->name), "%s", ibv_get_device_name(device));
	nic->device = ibv_open_device(device);
	if (!nic->device)
		return hub->host->error(-EIO, "verbs: device %s cannot be opened: %s", nic->name,
			strerror(errno));
	if (!ibv_query_device(nic->device, &nic->attr) &&
		(nic->pd = ibv_alloc_pd(nic->device)) &&
		(nic->channel = ibv_create_comp_channel(nic->device)) &&
		(nic->cq = ibv_create_cq(nic->device, FIRST_CQE, NULL, nic->channel, 0)) &&
		!watch(hub, nic->channel->fd, hub->n_nics) &&
		!watch(hub, nic->device->async_fd, ASYNC + hub->n_nics)) {
		hub->n_nics++;
		*out = nic;
		return 0;
	}
	rc = hub->host->error(-EIO, "verbs: device %s cannot be set up: %s", nic->name,
		strerror(errno));
	close_nic(hub, nic);
	return rc;
}

static int open_named(struct hub *hub, const char *name, struct nic **out)
{
	struct ibv_device **list;
	int n = 0, rc;

	for (uint32_t i = 0; i < hub->n_nics; i++) {
		if (!strcmp(hub->nics[i].name, name)) {
			*out = &hub->nics[i];
			return 0;
		}
	}
	if (hub->n_nics == NICS_MAX)
		return hub->host->error(-ENOSPC, "verbs: device %s: %d devices are open, limit %d",
			name, NICS_MAX, NICS_MAX);
	list = ibv_get_device_list(&n);
	rc = hub->host->error(-ENODEV, "verbs: no device %s on this machine, which has %d", name, n);
	for (int i = 0; list && i < n; i++) {
		if (!strcmp(ibv_get_device_name(list[i]), name)) {
			rc = open_nic(hub, list[i], out);
			break;
		}
	}
	if (list)
		ibv_free_device_list(list);
	return rc;
}

/* ---- ports and GIDs ---- */

static bool is_routable(const union ibv_gid *gid)
{
	return gid->raw[0] != 0xfe; /* not fe80::, the link's own */
}

/* How well an entry fits: 3 it is the place's address, 2 any of RoCE v2 that is routable, 1 any of
 * RoCE v2, 0 no. */
static int fit_of(const struct ibv_gid_entry *entry, const struct afd__verbs_place *place)
{
	if (place->port && entry->port_num != place->port)
		return 0;
	if (entry->gid_type != IBV_GID_TYPE_ROCE_V2)
		return 0;
	if (!memcmp(entry->gid.raw, place->address, 16))
		return 3;
	return is_routable(&entry->gid) ? 2 : 1;
}

static int best_gid(struct ibv_context *device, const struct afd__verbs_place *place,
	struct ibv_gid_entry *best)
{
	struct ibv_gid_entry entries[GIDS_MAX];
	ssize_t n = ibv_query_gid_table(device, entries, GIDS_MAX, 0);
	int fit = 0;

	for (ssize_t i = 0; i < n; i++) {
		if (fit_of(&entries[i], place) > fit) {
			fit = fit_of(&entries[i], place);
			*best = entries[i];
		}
	}
	return fit;
}

static bool has_active_port(struct ibv_context *device)
{
	struct ibv_device_attr attr;
	struct ibv_port_attr port;

	if (ibv_query_device(device, &attr))
		return false;
	for (uint8_t i = 1; i <= attr.phys_port_cnt; i++) {
		if (!ibv_query_port(device, i, &port) && port.state == IBV_PORT_ACTIVE)
			return true;
	}
	return false;
}

/* A device is worth 4 when it owns the address, 1 when it has an active port. */
static int worth_of(struct ibv_context *device, const struct afd__verbs_place *place)
{
	struct ibv_gid_entry entry;

	if (!has_active_port(device))
		return 0;
	return best_gid(device, place, &entry) == 3 ? 4 : 1;
}

static int worth_of_unopened(struct ibv_device *device, const struct afd__verbs_place *place)
{
	struct ibv_context *opened = ibv_open_device(device);
	int worth = opened ? worth_of(opened, place) : 0;

	if (opened)
		ibv_close_device(opened);
	return worth;
}

int verbs_find_nic(struct hub *hub, const char *name, const struct afd__verbs_place *place,
	struct nic **out)
{
	char chosen[AFD__DEVICE_NAME_BYTES] = "";
	struct ibv_device **list;
	int n = 0, worth = 0;

	if (name[0])
		return open_named(hub, name, out);
	/* To look at a device is to open it: not for each link anew. */
	for (uint32_t i = 0; i < hub->n_nics; i++) {
		if (worth_of(hub->nics[i].device, place) == 4) {
			*out = &hub->nics[i];
			return 0;
		}
	}
	list = ibv_get_device_list(&n);
	for (int i = 0; list && i < n && worth < 4; i++) {
		int this = worth_of_unopened(list[i], place);

		if (this <= worth)
			continue;
		worth = this;
		snprintf(chosen, sizeof(chosen), "%s", ibv_get_device_name(list[i]));
	}
	if (list)
		ibv_free_device_list(list);
	return worth ? open_named(hub, chosen, out)
		     : hub->host->error(-ENODEV, "verbs: none of %d devices has an active port", n);
}

static int read_port(struct hub *hub, struct rail *rail)
{
	struct nic *nic = rail->nic;

	if (ibv_query_port(nic->device, (uint8_t)rail->port, &rail->port_attr))
		return hub->host->error(-EINVAL, "verbs: device %s: port %u, limit %u", nic->name,
			rail->port, nic->attr.phys_port_cnt);
	if (rail->port_attr.state != IBV_PORT_ACTIVE)
		return hub->host->error(-ENODEV, "verbs: device %s: port %u is %s", nic->name,
			rail->port, ibv_port_state_str(rail->port_attr.state));
	return 0;
}

static int first_active(const struct rail *rail, uint32_t *port)
{
	struct ibv_port_attr attr;

	for (uint8_t i = 1; i <= rail->nic->attr.phys_port_cnt; i++) {
		if (!ibv_query_port(rail->nic->device, i, &attr) && attr.state == IBV_PORT_ACTIVE) {
			*port = i;
			return 0;
		}
	}
	return -1;
}

int verbs_choose_port(struct hub *hub, struct rail *rail, const struct afd__verbs_place *place)
{
	static const uint8_t nowhere[16];
	struct nic *nic = rail->nic;
	struct ibv_gid_entry entry;
	int rc;

	rail->port = place->port;
	rail->gid_index = place->gid;
	if (place->gid < 0 && best_gid(nic->device, place, &entry)) {
		rail->gid_index = (int)entry.gid_index;
		rail->port = entry.port_num;
	}
	if (!rail->port && first_active(rail, &rail->port))
		return hub->host->error(-ENODEV, "verbs: device %s has no active port", nic->name);
	rc = read_port(hub, rail);
	if (rc)
		return rc;
	if (rail->gid_index < 0)
		rail->gid_index = 0;
	if (ibv_query_gid(nic->device, (uint8_t)rail->port, rail->gid_index, &rail->gid) ||
		!memcmp(rail->gid.raw, nowhere, sizeof(nowhere)))
		return hub->host->error(-EINVAL, "verbs: device %s: port %u has no GID %d; its table has %d places", nic->name,
			rail->port, rail->gid_index, rail->port_attr.gid_tbl_len);
	return 0;
}

/* ---- completions ---- */

int verbs_reserve(struct hub *hub, struct nic *nic, uint32_t n_completions)
{
	uint32_t wanted = nic->cqe_wanted + n_completions, size = (uint32_t)nic->cq->cqe;

	if (wanted > (uint32_t)nic->attr.max_cqe)
		return hub->host->error(-ENOSPC,
			"verbs: device %s: its peers need a completion queue of %u, limit %d",
			nic->name, wanted, nic->attr.max_cqe);
	while (size < wanted)
		size *= 2;
	if (size > (uint32_t)nic->attr.max_cqe)
		size = (uint32_t)nic->attr.max_cqe;
	if (size > (uint32_t)nic->cq->cqe && ibv_resize_cq(nic->cq, (int)size))
		return hub->host->error(-ENOSPC,
			"verbs: device %s: its completion queue cannot grow to %u: %s", nic->name,
			size, strerror(errno));
	nic->cqe_wanted = wanted;
	return 0;
}

/* The library's numbers of a request: see verbs_request_id. */
static void give(struct hub *hub, const struct ibv_wc *wc)
{
	uint32_t index = wc->wr_id & 0xfff, rail = wc->wr_id >> 12 & 0xf;
	struct end *end = hub->ends[index];

	if (end && end->serial == wc->wr_id >> 32)
		verbs_take_completion(end, rail, wc->wr_id >> 16 & 1, wc);
}

void verbs_drain(struct hub *hub)
{
	struct ibv_wc wc[BATCH];

	for (uint32_t i = 0; i < hub->n_nics; i++) {
		int n;

		do {
			n = ibv_poll_cq(hub->nics[i].cq, BATCH, wc);
			for (int k = 0; k < n; k++)
				give(hub, &wc[k]);
		} while (n == BATCH);
	}
}

int verbs_arm_hub(struct hub *hub)
{
	for (uint32_t i = 0; i < hub->n_nics; i++) {
		struct nic *nic = &hub->nics[i];

		if (nic->armed)
			continue;
		/* A failure would show as an end that failed, by the next request. */
		nic->armed = !ibv_req_notify_cq(nic->cq, 0);
	}
	verbs_drain(hub);
	return 0;
}

static void take_channel(struct nic *nic)
{
	struct ibv_cq *cq;
	unsigned n = 0;
	void *user;

	while (!ibv_get_cq_event(nic->channel, &cq, &user))
		n++;
	if (n)
		ibv_ack_cq_events(nic->cq, n);
	nic->armed = false;
}

static void take_async(struct hub *hub, struct nic *nic)
{
	struct ibv_async_event event;

	while (!ibv_get_async_event(nic->device, &event)) {
		hub->host->log(hub->ctx, AFD_LOG_WARN, "verbs: device %s: %s", nic->name,
			ibv_event_type_str(event.event_type));
		ibv_ack_async_event(&event);
	}
}

static void hub_event(struct afd__shared *shared, unsigned which, uint32_t events)
{
	struct hub *hub = (struct hub *)shared;

	if (which < ASYNC && which < hub->n_nics)
		take_channel(&hub->nics[which]);
	else if (which >= ASYNC && which - ASYNC < hub->n_nics)
		take_async(hub, &hub->nics[which - ASYNC]);
}

/* ---- life ---- */

static void hub_end(struct afd__shared *shared)
{
	struct hub *hub = (struct hub *)shared;

	verbs_arena_free(hub);
	for (uint32_t i = 0; i < hub->n_nics; i++)
		close_nic(hub, &hub->nics[i]);
	hub->host->free(hub);
}

int verbs_hub_open(struct afd__shared **out, const struct afd__module_host *host,
	struct afd_context *ctx, int epoll_fd)
{
	struct hub *hub = host->alloc(ctx, 1, sizeof(*hub));
	int rc;

	if (!hub)
		return -ENOMEM;
	hub->shared.tag.kind = AFD__TAG_SHARED;
	hub->shared.event = hub_event;
	hub->shared.end = hub_end;
	hub->host = host;
	hub->ctx = ctx;
	hub->epoll_fd = epoll_fd;
	hub->pid = getpid();
	rc = verbs_read_faults(hub);
	if (rc) {
		host->free(hub);
		return rc;
	}
	*out = &hub->shared;
	return 0;
}

static const struct afd__verbs_ops verbs_ops = {
	.probe = verbs_probe,
	.hub_open = verbs_hub_open,
	.open = verbs_end_open,
	.describe = verbs_end_describe,
	.connect = verbs_end_connect,
	.send_slot = verbs_send_slot,
	.receive_slot = verbs_receive_slot,
	.memory = verbs_memory,
	.rows = verbs_rows,
	.leave_device = verbs_end_leave_device,
	.post_rows = verbs_post_rows,
	.post_receive = verbs_post_receive,
	.poll = verbs_poll,
	.ready = verbs_ready,
	.arm = verbs_arm,
	.shut = verbs_end_shut,
	.close = verbs_end_close,
};

extern const struct afd__module afd_module_entry;
AFD_API const struct afd__module afd_module_entry = { .build = AFD__BUILD_ID, .verbs = &verbs_ops };
