/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Whose matrix products a device runs: our kernels', or for some cuBLASLt's. AFD_CUDA_PRODUCTS says
 * it: `own`, `cublaslt` (wherever that can) or `auto` (where our kernels would read the weights more
 * than once, and cuBLASLt is found).
 *
 * Invariant: what is not there is said once, when the device is opened, and changes no result but
 * in its last bits. Called by device.c.
 */
#include <stdlib.h>
#include <string.h>

#include "blaslt.h"

#ifndef AFD_CUBLASLT
void blaslt_open(const struct afd__device *dev, struct cuda *c, char *reason, size_t capacity)
{
	strncpy(reason, "this module was built without cublasLt.h", capacity);
}

void blaslt_close(struct cuda *c)
{
}
#endif

static int read_way(const struct afd__device *dev, struct cuda *c)
{
	static const char *const ways[] = { "auto", "own", "cublaslt" };
	const char *way = secure_getenv("AFD_CUDA_PRODUCTS");

	if (!way || !way[0])
		way = ways[CUDA_PRODUCTS_AUTO];
	for (int i = CUDA_PRODUCTS_AUTO; i <= CUDA_PRODUCTS_CUBLASLT; i++) {
		if (strcmp(way, ways[i]))
			continue;
		c->products = (enum cuda_products)i;
		return 0;
	}
	return dev->host->error(-EINVAL,
		"device %s: AFD_CUDA_PRODUCTS is \"%s\", must be auto, own or cublaslt", dev->name, way);
}

int products_open(const struct afd__device *dev, struct cuda *c)
{
	char reason[512] = "AFD_CUDA_PRODUCTS says so";
	int rc = read_way(dev, c);

	if (rc)
		return rc;
	if (c->products != CUDA_PRODUCTS_OWN)
		blaslt_open(dev, c, reason, sizeof(reason));
	if (!c->blaslt && c->products == CUDA_PRODUCTS_CUBLASLT)
		return dev->host->error(-ENOSYS,
			"device %s: AFD_CUDA_PRODUCTS is cublaslt, which is not there: %s", dev->name,
			reason);
	dev->host->log(dev->ctx, AFD_LOG_INFO, "device %s: large products by %s: %s", dev->name,
		c->blaslt ? "cuBLASLt" : "our own kernels", reason);
	return 0;
}

void products_close(struct afd__device *dev)
{
	struct cuda *c = dev->state;
	void *before;

	if (c->blaslt && !cuda_forked(c) && !cuda_enter(dev, &before)) {
		blaslt_close(c);
		cuda_leave(dev, before);
	}
	dev->host->free(c->blaslt);
	c->blaslt = NULL;
}
