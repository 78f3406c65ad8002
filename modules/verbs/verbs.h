/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inside of afd-verbs.so. A hub is what the verbs: links of one transport share: devices (nics),
 * the arena, a completion queue for each device. An end is one link's part: its slots in the arena
 * and a queue pair on each of its devices (a rail).
 *
 *   hub.c    devices, completion queues, whose completion it is
 *   arena.c  registered memory
 *   device.c rows in memory of a device: tried, proved, chosen
 *   proof.c  what an adapter writes there, and reads
 *   end.c    queue pairs: made, described to the peer, connected, ended
 *   flow.c   slots: who has them, what is posted, what has come
 */
#ifndef AFD_MODULES_VERBS_H
#define AFD_MODULES_VERBS_H

#include <unistd.h>

#include <infiniband/verbs.h>

#include "lib/device/module.h"
#include "lib/transport/verbs.h"

enum {
	NICS_MAX = 4, /* as many as tags have numbers for their two descriptors */
	RECORD_BYTES = 64,
	HEADER_BYTES = 64, /* of a slot: crosses with the record, the rest before it */
	INLINE_BYTES = RECORD_BYTES + HEADER_BYTES,
	ENDS_MAX = 4096,
	DONE_MAX = 2 * AFD__SLOTS_MAX,
};

/* What lies in front of a slot, and arrives with its header. Little-endian, like libibverbs' own
 * hosts; the description says so. */
struct record {
	uint32_t slot, bytes;
	uint32_t sequence; /* of the slots that its sender sent on this link, from 0 */
	uint32_t _pad[5];
	uint8_t returned[32]; /* bit n: slot n is given back */
};
_Static_assert(sizeof(struct record) == RECORD_BYTES, "a record fills its place");

struct nic {
	char name[AFD__DEVICE_NAME_BYTES];
	struct ibv_context *device;
	struct ibv_device_attr attr;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_comp_channel *channel;
	uint32_t cqe_wanted; /* completions that its ends can have at once */
	bool armed;          /* the next completion makes the channel readable */
	uint32_t refused_ways; /* to memory of devices, by enum way: not tried again */
	bool told_way;
};

/* How an adapter may reach memory of a device, in the order in which it is tried. */
enum way { BY_DMABUF, BY_PEER_MEMORY, N_WAYS };

/* A piece of the arena: registered once on each nic that needs it. */
struct chunk {
	struct chunk *next;
	uint8_t *memory;
	size_t bytes;
	/* Payload may pass other writes on its way; headers may not. */
	struct ibv_mr *payload[NICS_MAX], *header[NICS_MAX];
	struct area *areas; /* ascending */
};
struct area { /* of an end */
	struct area *next;
	struct chunk *chunk;
	size_t offset, bytes;
};

struct end;
struct hub {
	struct afd__shared shared; /* first: the library knows it by this */
	const struct afd__module_host *host;
	struct afd_context *ctx;
	int epoll_fd;
	pid_t pid;
	struct nic nics[NICS_MAX];
	uint32_t n_nics;
	uint32_t faults; /* by enum way: AFD_VERBS_FAULT, its proof fails */
	struct chunk *chunks;
	struct end *ends[ENDS_MAX];
	uint32_t serial; /* of the next end: completions of one that is gone are known by it */
};

struct rail {
	struct nic *nic;
	uint32_t port;
	struct ibv_port_attr port_attr;
	union ibv_gid gid;
	int gid_index;
	struct ibv_qp *qp;
	uint32_t first_psn;
	uint32_t max_inline;
	/* Work requests of the send queue: room, and how many each signalled one ends. */
	uint32_t room;
	uint16_t chains[4 * AFD__SLOTS_MAX];
	uint32_t chain_head, n_chains;
	uint32_t payload_key, header_key; /* the peer's */
	bool rows_apart;      /* the peer's key for payload leads to rows only */
	struct ibv_mr *rows;  /* ours in memory of a device; at the addresses of the area */
};

struct end {
	struct hub *hub;
	uint32_t index, serial;
	struct afd__verbs_place place;
	struct afd__wire_slots geometry;
	struct rail rails[AFD__RAILS_MAX];
	uint32_t n_rails;
	struct area *area; /* send slots, then receive slots, each behind its record */
	uint8_t *memory;
	size_t direction_bytes;
	uint64_t peer_memory; /* the peer's receive slots, in its address space */
	/* Rows in memory of a device, laid out as the area; NULL: they lie in the area. */
	struct afd__device *device;
	uint8_t *device_memory;
	void *device_block; /* that it lies in, [device_bytes] */
	size_t device_bytes;
	bool connected;
	int error;
	char error_text[160];

	bool ours[AFD__SLOTS_MAX]; /* send slots that the peer does not have */
	bool held[AFD__SLOTS_MAX]; /* receive slots that are not posted */
	uint8_t returned[32];      /* rides with the next record */
	bool urgent;               /* or goes by itself: somebody waits */
	uint32_t sequence_out, sequence_in;
	struct {
		uint16_t slot;
		bool here;
		uint32_t bytes;
	} arrived[AFD__SLOTS_MAX]; /* by sequence: rails overtake each other */
	struct {
		uint16_t slot;
		uint32_t bytes, rows_bytes;
	} queue[AFD__SLOTS_MAX]; /* ring: waits for room in a send queue */
	uint32_t queue_head, n_queued;
	struct afd__completion done[DONE_MAX]; /* ring */
	uint32_t done_head, n_done;
};

static inline uint32_t rail_of(const struct end *end, uint32_t slot)
{
	return slot < end->geometry.n_control ? 0
	       : (slot - end->geometry.n_control) / 2 % end->n_rails;
}

/* ---- hub.c ---- */
int verbs_hub_open(struct afd__shared **out, const struct afd__module_host *host,
	struct afd_context *ctx, int epoll_fd);
int verbs_probe(const struct afd__module_host *host, struct afd_context *ctx);
/* The device of this name; "": that which owns the place's address, else the first that is active. */
int verbs_find_nic(struct hub *hub, const char *name, const struct afd__verbs_place *place,
	struct nic **out);
int verbs_choose_port(struct hub *hub, struct rail *rail, const struct afd__verbs_place *place);
/* Room for so many more completions. */
int verbs_reserve(struct hub *hub, struct nic *nic, uint32_t n_completions);
/* Takes all completions that are there to their ends. */
void verbs_drain(struct hub *hub);
/* 1: something came meanwhile. */
int verbs_arm_hub(struct hub *hub);
static inline bool verbs_forked(const struct hub *hub)
{
	return hub->pid != getpid();
}

/* ---- arena.c ---- */
int verbs_area_take(struct hub *hub, size_t bytes, struct area **out);
void verbs_area_give(struct hub *hub, struct area *area);
int verbs_area_register(struct hub *hub, struct chunk *chunk, const struct nic *nic);
void verbs_arena_free(struct hub *hub);

/* ---- device.c ---- */
/* -EINVAL: AFD_VERBS_FAULT names what is no way. */
int verbs_read_faults(struct hub *hub);
/* Rows of the end, whose rails are open, come to lie in memory of the device; or stay in the area,
 * which is logged. */
void verbs_device_take(struct end *end, struct afd__device *device);
void verbs_device_leave(struct end *end);

/* ---- proof.c ---- */
/* The end's memory of a device, which was registered as `mr` with the rail's adapter: what the
 * adapter writes there the device reads, and the other way round. `fault`: it does not write. */
int verbs_prove(
	const struct end *end, const struct rail *rail, const struct ibv_mr *mr, bool fault);

/* ---- end.c ---- */
/* The steps of a queue pair of the rail: 0 or an errno. Ethernet always has a global route,
 * InfiniBand when it is asked for; timeout 0: the default. */
int verbs_qp_begin(struct ibv_qp *qp, const struct rail *rail);
struct ibv_ah_attr verbs_qp_path(
	const struct rail *rail, uint16_t lid, const uint8_t gid[16], bool is_global);
int verbs_qp_receive(struct ibv_qp *qp, const struct ibv_ah_attr *path, enum ibv_mtu mtu,
	uint32_t number, uint32_t psn);
int verbs_qp_send(struct ibv_qp *qp, uint32_t timeout, uint32_t psn);

int verbs_end_open(void **out, struct afd__shared *hub, const struct afd__verbs_place *place,
	const struct afd__wire_slots *geometry, struct afd__device *device);
size_t verbs_end_describe(const void *end, uint8_t blob[AFD__VERBS_BLOB_MAX]);
int verbs_end_connect(void *end, const uint8_t *blob, size_t bytes);
void verbs_end_leave_device(void *end);
void verbs_end_shut(void *end);
void verbs_end_close(void *end);

/* ---- flow.c ---- */
size_t verbs_direction_bytes(const struct afd__wire_slots *geometry);
uint64_t verbs_request_id(const struct end *end, uint32_t rail, bool is_send);
int verbs_post_receives(struct end *end, uint32_t rail, uint32_t n);
uint32_t verbs_receive_depth(const struct afd__wire_slots *geometry);
uint32_t verbs_send_depth(const struct afd__wire_slots *geometry);
void verbs_end_fail(struct end *end, int rc); /* with the thread's text; the first one counts */
void verbs_take_completion(struct end *end, uint32_t rail, bool is_send, const struct ibv_wc *wc);
bool verbs_is_quiet(const struct end *end); /* nothing of ours is under way */
void *verbs_send_slot(void *end, uint32_t slot);
const void *verbs_receive_slot(void *end, uint32_t slot);
void *verbs_memory(void *end, size_t *bytes);
void *verbs_rows(void *end, uint32_t slot, bool to_send);
int verbs_post_rows(void *end, uint32_t slot, uint32_t bytes, uint32_t rows_bytes);
int verbs_post_receive(void *end, uint32_t slot);
int verbs_poll(void *end, struct afd__completion *out, int max);
int verbs_ready(void *end);
int verbs_arm(void *end);

#endif
