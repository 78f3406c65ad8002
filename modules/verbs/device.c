/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows in memory of a device. Three ways, in this order: a dma-buf that the device gives, peer
 * memory (its address, which the kernel's drivers know), the arena, from and to which the stage
 * copies. The first two are trusted when the adapter has written to that very piece of memory and
 * read from it (proof.c): registering can succeed where nothing arrives. What was tried and chosen
 * is logged.
 *
 * The memory is laid out as the end's area and registered at the area's addresses, so only keys
 * tell which of the two is meant, and the record and the header of a slot never leave the area.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "verbs.h"

/* What dma-bufs and drivers of peer memory want. */
enum { ALIGNMENT = 65536 };

static const char *const way_names[N_WAYS] = { "dmabuf", "peer" };
static const char *const way_texts[N_WAYS] = { "dma-buf", "peer memory" };

int verbs_read_faults(struct hub *hub)
{
	const char *text = secure_getenv("AFD_VERBS_FAULT");

	for (const char *at = text; at && *at; at += *at == ',') {
		size_t n = strcspn(at, ",");
		uint32_t way = 0;

		while (way < N_WAYS &&
			(strlen(way_names[way]) != n || strncmp(at, way_names[way], n)))
			way++;
		if (way == N_WAYS)
			return hub->host->error(-EINVAL,
				"AFD_VERBS_FAULT: \"%.32s\" names what is not dmabuf or peer",
				text);
		hub->faults |= 1u << way;
		at += n;
	}
	return 0;
}

/* ---- registering ---- */

static int refusal(const struct end *end, const struct nic *nic, int error)
{
	return end->hub->host->error(-ENOTSUP, "device %s refuses to register it: %s", nic->name,
		strerror(error));
}

static int register_dmabuf(
	struct end *end, const struct rail *rail, int access, struct ibv_mr **out)
{
	uint64_t offset;
	int fd, rc = end->hub->host->device_dmabuf(
			end->device, end->device_memory, end->area->bytes, &fd, &offset);

	if (rc)
		return rc;
	*out = ibv_reg_dmabuf_mr(rail->nic->pd, offset, end->area->bytes, (uintptr_t)end->memory,
		fd, access);
	rc = *out ? 0 : refusal(end, rail->nic, errno);
	close(fd);
	return rc;
}

static int register_peer(struct end *end, const struct rail *rail, int access, struct ibv_mr **out)
{
	void *address;
	int rc = end->hub->host->device_peer_address(
		end->device, end->device_memory, end->area->bytes, &address);

	if (rc)
		return rc;
	*out = ibv_reg_mr_iova(rail->nic->pd, address, end->area->bytes, (uintptr_t)end->memory,
		access);
	return *out ? 0 : refusal(end, rail->nic, errno);
}

static int try_way(struct end *end, const struct rail *rail, enum way way, struct ibv_mr **out)
{
	const int access =
		IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_RELAXED_ORDERING;
	int rc = way == BY_DMABUF ? register_dmabuf(end, rail, access, out)
				  : register_peer(end, rail, access, out);

	if (rc)
		return rc;
	rc = verbs_prove(end, rail, *out, end->hub->faults >> way & 1);
	if (rc) {
		ibv_dereg_mr(*out);
		*out = NULL;
	}
	return rc;
}

/* Once for an adapter, and again when the choice changes. NULL: none of the ways. */
static void tell(const struct end *end, struct nic *nic, const char *way)
{
	const struct afd__module_host *host = end->hub->host;

	if (nic->told_way)
		return;
	nic->told_way = true;
	if (way)
		host->log(end->hub->ctx, AFD_LOG_INFO,
			"verbs: device %s: rows lie in memory of device %s, reached by %s and proved",
			nic->name, end->device->name, way);
	else
		host->log(end->hub->ctx, AFD_LOG_INFO,
			"verbs: device %s: rows lie in the host's memory, device %s copies them",
			nic->name, end->device->name);
}

/* A way that failed stays refused to the adapter: trying takes time, and does so for every link. */
static int choose(struct end *end, struct rail *rail)
{
	const struct afd__module_host *host = end->hub->host;
	struct nic *nic = rail->nic;
	char text[256];

	for (uint32_t way = 0; way < N_WAYS; way++) {
		if (nic->refused_ways >> way & 1)
			continue;
		if (!try_way(end, rail, way, &rail->rows)) {
			tell(end, nic, way_texts[way]);
			return 0;
		}
		host->error_save(text, sizeof(text));
		host->log(end->hub->ctx, AFD_LOG_INFO,
			"verbs: device %s: memory of device %s is not reached by %s: %s", nic->name,
			end->device->name, way_texts[way], text);
		nic->refused_ways |= 1u << way;
		nic->told_way = false;
	}
	tell(end, nic, NULL);
	return -ENOTSUP;
}

/* ---- taking and leaving ---- */

static int take_memory(struct end *end)
{
	uintptr_t at;

	end->device_bytes = end->area->bytes + ALIGNMENT;
	if (end->hub->host->device_alloc(end->device, end->device_bytes, "rows of a verbs: link",
		    &end->device_block))
		return -ENOMEM;
	at = ((uintptr_t)end->device_block + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	end->device_memory = (uint8_t *)at;
	return 0;
}

void verbs_device_leave(struct end *end)
{
	for (uint32_t i = 0; i < end->n_rails; i++) {
		if (end->rails[i].rows && !verbs_forked(end->hub))
			ibv_dereg_mr(end->rails[i].rows);
		end->rails[i].rows = NULL;
	}
	if (end->device_block && !verbs_forked(end->hub))
		end->hub->host->device_free(end->device, end->device_block, end->device_bytes);
	end->device_block = NULL;
	end->device_memory = NULL;
	end->device = NULL;
}

void verbs_device_take(struct end *end, struct afd__device *device)
{
	const struct afd__module_host *host = end->hub->host;
	const uint32_t all = (1u << N_WAYS) - 1;
	char text[256];
	int rc = 0;

	for (uint32_t i = 0; i < end->n_rails; i++) {
		if (end->rails[i].nic->refused_ways == all)
			return;
	}
	end->device = device;
	if (take_memory(end)) {
		host->error_save(text, sizeof(text));
		host->log(end->hub->ctx, AFD_LOG_WARN, "verbs: rows lie in the host's memory: %s",
			text);
		rc = -ENOMEM;
	}
	for (uint32_t i = 0; i < end->n_rails && !rc; i++)
		rc = choose(end, &end->rails[i]);
	if (rc)
		verbs_device_leave(end);
}
