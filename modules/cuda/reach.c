/* SPDX-License-Identifier: Apache-2.0 */
/*
 * GPU memory for an adapter on the same bus (GPUDirect RDMA): as a dma-buf, which the driver gives
 * where it can, or by its address, which a driver of peer memory knows. Both are refused where the
 * GPU would not see an adapter's writes in order; nothing here says that the adapter reaches it.
 *
 * Called through the seam when a link is made. The driver's entry is asked for, not linked.
 */
#include <string.h>

#include "cuda.h"

enum { RANGE_DMABUF = 1, PAGE = 4096 };

typedef int (*range_handle)(
	void *handle, unsigned long long memory, size_t bytes, int type, unsigned long long flags);

/* Between here and the rows' kernel nobody flushes the adapter's writes. */
static int check(const struct afd__device *dev)
{
	const struct cuda *c = dev->state;
	int supported = 0, ordering = 0,
	    rc = cudaDeviceGetAttribute(
		    &supported, cudaDevAttrGPUDirectRDMASupported, c->ordinal);

	if (!rc)
		rc = cudaDeviceGetAttribute(
			&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, c->ordinal);
	if (rc)
		return cuda_error(dev, rc, "its attributes cannot be asked");
	if (!supported)
		return dev->host->error(-ENOTSUP, "device %s: has no GPUDirect RDMA", dev->name);
	if (ordering < cudaGPUDirectRDMAWritesOrderingOwner)
		return dev->host->error(-ENOTSUP,
			"device %s: sees an adapter's writes only when they are flushed; ordering "
			"is %d, must be %d",
			dev->name, ordering, cudaGPUDirectRDMAWritesOrderingOwner);
	return 0;
}

static int export_range(const struct afd__device *dev, void *memory, size_t bytes, int *fd)
{
	enum cudaDriverEntryPointQueryResult found;
	range_handle export;
	void *entry = NULL;
	int rc = cudaGetDriverEntryPointByVersion(
		"cuMemGetHandleForAddressRange", &entry, 11070, cudaEnableDefault, &found);

	if (rc || !entry)
		return dev->host->error(-ENOTSUP,
			"device %s: the driver has no cuMemGetHandleForAddressRange", dev->name);
	memcpy(&export, &entry, sizeof(export));
	*fd = -1;
	rc = export(fd, (unsigned long long)(uintptr_t)memory, bytes, RANGE_DMABUF, 0);
	return rc || *fd < 0 ? dev->host->error(-ENOTSUP,
				       "device %s: the driver gives no dma-buf, CUresult %d",
				       dev->name, rc)
			     : 0;
}

int cuda_dmabuf(struct afd__device *dev, void *memory, size_t bytes, int *fd, uint64_t *offset)
{
	void *before;
	int rc;

	if ((uintptr_t)memory % PAGE || bytes % PAGE)
		return dev->host->error(-EINVAL,
			"device %s: dma-buf: %zu bytes at %p, must be whole pages of %d", dev->name,
			bytes, memory, PAGE);
	rc = cuda_enter(dev, &before);
	if (rc)
		return rc;
	rc = check(dev);
	if (!rc)
		rc = export_range(dev, memory, bytes, fd);
	cuda_leave(dev, before);
	*offset = 0;
	return rc;
}

int cuda_peer_address(struct afd__device *dev, void *memory, size_t bytes, void **address)
{
	void *before;
	int rc = cuda_enter(dev, &before);

	if (rc)
		return rc;
	rc = check(dev);
	cuda_leave(dev, before);
	*address = memory;
	return rc;
}
