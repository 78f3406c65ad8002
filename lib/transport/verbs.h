/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the module afd-verbs.so does for verbs: links. verbs.c (in the library) is how two ends meet:
 * over a tcp: connection, which also tells a death. The module (modules/verbs) is all that knows
 * libibverbs: devices, registered memory, queue pairs, completions.
 *
 * A transport has one hub, made by its first verbs: link: its devices, one arena of registered
 * memory, one completion queue a device. A link has one end in it.
 */
#ifndef AFD_LIB_TRANSPORT_VERBS_H
#define AFD_LIB_TRANSPORT_VERBS_H

#include "ops.h"

struct afd__module_host;

enum {
	AFD__RAILS_MAX = 4, /* devices that one link uses */
	AFD__DEVICE_NAME_BYTES = 32,
	AFD__VERBS_BLOB_MAX = 512,
};

/* What an address says behind its '?'. */
struct afd__verbs_place {
	char devices[AFD__RAILS_MAX][AFD__DEVICE_NAME_BYTES]; /* [n_devices] */
	uint32_t n_devices; /* 0: the one that the tcp: connection's address belongs to */
	uint32_t port;      /* of each device; 0: the first that is active */
	int32_t gid;        /* its index; -1: as n_devices 0, else the first of RoCE v2 */
	uint32_t mtu;       /* 256 .. 4096; 0: the port's */
	uint32_t service_level;
	uint32_t timeout;    /* an ack is waited for 4.096 us * 2^timeout; 0: 15 */
	uint8_t address[16]; /* of our end of the connection; IPv4 as ::ffff:a.b.c.d */
};

/* 0 or 1, or a negative errno with the thread's text. */
struct afd__verbs_ops {
	/* -ENODEV: there is no device. */
	int (*probe)(const struct afd__module_host *host, struct afd_context *ctx);
	/* Descriptors of the hub go to epoll_fd. It ends by its own `end`. */
	int (*hub_open)(struct afd__shared **out, const struct afd__module_host *host,
		struct afd_context *ctx, int epoll_fd);

	/* Rows come to lie in memory of `device`, unless that is NULL or was not proved. */
	int (*open)(void **end, struct afd__shared *hub, const struct afd__verbs_place *place,
		const struct afd__wire_slots *geometry, struct afd__device *device);
	/* What the peer has to know: queue pairs, and where slots lie. */
	size_t (*describe)(const void *end, uint8_t blob[AFD__VERBS_BLOB_MAX]);
	int (*connect)(void *end, const uint8_t *blob, size_t bytes);

	/* As in struct afd__transport_ops. */
	void *(*send_slot)(void *end, uint32_t slot);
	const void *(*receive_slot)(void *end, uint32_t slot);
	void *(*memory)(void *end, size_t *bytes);
	void *(*rows)(void *end, uint32_t slot, bool to_send);
	void (*leave_device)(void *end);
	int (*post_rows)(void *end, uint32_t slot, uint32_t bytes, uint32_t rows_bytes);
	int (*post_receive)(void *end, uint32_t slot);
	int (*poll)(void *end, struct afd__completion *out, int max);
	int (*ready)(void *end);
	int (*arm)(void *end);

	/* Waits at most 100 ms until what was posted has arrived: a queue pair that ends takes it
	 * along. Slots stay until close. */
	void (*shut)(void *end);
	void (*close)(void *end);
};

#endif
