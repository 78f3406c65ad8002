/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of a device as an adapter on the same bus sees it: under which name it can be asked for,
 * and what is in it by the device's own account. Whether the adapter really reaches it is not known
 * here; who registers it has to prove that.
 *
 * Called by modules (module.h) when links are made, never on the path of a row.
 */
#include "device.h"

enum { COPY_MS = 5000 };

bool afd__device_can_be_reached(const struct afd__device *dev)
{
	return dev->ops->dmabuf || dev->ops->peer_address;
}

int afd__device_dmabuf(
	struct afd__device *dev, void *memory, size_t bytes, int *fd, uint64_t *offset)
{
	if (!dev->ops->dmabuf)
		return afd__error(-ENOTSUP, "device %s has no dma-buf", dev->name);
	return dev->ops->dmabuf(dev, memory, bytes, fd, offset);
}

int afd__device_peer_address(struct afd__device *dev, void *memory, size_t bytes, void **address)
{
	if (!dev->ops->peer_address)
		return afd__error(-ENOTSUP, "device %s has no peer memory", dev->name);
	return dev->ops->peer_address(dev, memory, bytes, address);
}

int afd__device_copy(struct afd__device *dev, void *memory, void *host, size_t bytes, bool up)
{
	struct afd__queue queue;
	uint64_t ticket;
	int rc = afd__queue_open(&queue, dev);

	if (rc)
		return rc;
	rc = up ? afd__queue_upload(&queue, memory, host, bytes)
		: afd__queue_download(&queue, host, memory, bytes);
	if (!rc)
		rc = afd__queue_ticket(&queue, &ticket);
	if (!rc)
		rc = afd__queue_wait(&queue, ticket, COPY_MS, "a copy for an adapter");
	afd__queue_close(&queue);
	return rc;
}
