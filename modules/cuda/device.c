/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The device `cuda:N`: the probe that tells why a machine cannot, and the context that every entry
 * makes current. The library finds this file by afd_module_entry.
 *
 * Nothing of the driver is linked: the runtime opens it when it is first asked. The caller's own
 * context comes back exactly, also where it had none, so a thread of the host never finds itself
 * on another GPU.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "cuda.h"
#include "lib/device/build_id.h"

#define LEAST_MAJOR 8 /* compute capability: cp.async, mma of bf16 */

/* ---- errors ---- */

static int errno_of(int error)
{
	switch (error) {
	case cudaErrorMemoryAllocation:
		return -ENOMEM;
	case cudaErrorInvalidValue:
		return -EINVAL;
	case cudaErrorInsufficientDriver:
	case cudaErrorNoDevice:
	case cudaErrorInvalidDevice:
	case cudaErrorNoKernelImageForDevice:
	case cudaErrorSystemDriverMismatch:
		return -ENODEV;
	default:
		return -EIO;
	}
}

int cuda_error(const struct afd__device *dev, int error, const char *what)
{
	if (!error)
		return 0;
	cudaGetLastError(); /* what is told here is not told again */
	return dev->host->error(errno_of(error), "device %s: %s: %s (%s)", dev->name, what,
		cudaGetErrorName((cudaError_t)error), cudaGetErrorString((cudaError_t)error));
}

/* ---- context ---- */

bool cuda_forked(const struct cuda *c)
{
	return c->pid != getpid();
}

int cuda_enter_loading(const struct afd__device *dev, void **before)
{
	const struct cuda *c = dev->state;
	int rc;

	if (cuda_forked(c))
		return dev->host->error(-EINVAL,
			"device %s: opened by process %d, CUDA cannot be used in its child",
			dev->name, (int)c->pid);
	rc = c->context_get(before);
	if (!rc && *before != c->context)
		rc = c->context_set(c->context);
	return rc ? dev->host->error(-EIO, "device %s: its context cannot be made current: %d",
			    dev->name, rc)
		  : 0;
}

int cuda_enter(const struct afd__device *dev, void **before)
{
	const struct cuda *c = dev->state;
	int rc = cuda_enter_loading(dev, before);

	if (rc || !c->arriving)
		return rc;
	rc = cuda_arrive(dev);
	if (rc)
		cuda_leave(dev, *before);
	return rc;
}

void cuda_leave(const struct afd__device *dev, void *before)
{
	const struct cuda *c = dev->state;

	if (before != c->context)
		c->context_set(before);
}

/* ---- probe ---- */

static int no_driver(const struct afd__device *dev)
{
	int version = 0;

	cudaDriverGetVersion(&version);
	if (!version)
		return dev->host->error(-ENODEV,
			"device %s: no driver: this machine has no libcuda.so.1 that works",
			dev->name);
	return dev->host->error(-ENODEV,
		"device %s: driver too old: it is for CUDA %d.%d, this module needs %d.%d",
		dev->name, version / 1000, version % 1000 / 10, CUDART_VERSION / 1000,
		CUDART_VERSION % 1000 / 10);
}

/* How many devices there are, or why there is none. */
static int probe(const struct afd__device *dev, int *n_devices)
{
	int rc = cudaGetDeviceCount(n_devices);

	if (rc)
		cudaGetLastError();
	if (rc == cudaErrorInsufficientDriver)
		return no_driver(dev);
	if (rc == cudaErrorNoDevice || (!rc && !*n_devices))
		return dev->host->error(-ENODEV,
			"device %s: no device: the driver is there, but shows no GPU", dev->name);
	return cuda_error(dev, rc, "its number cannot be asked");
}

static int check_ordinal(const struct afd__device *dev, const struct cuda *c)
{
	int n_devices = 0, major = 0, minor = 0, rc = probe(dev, &n_devices);

	if (rc)
		return rc;
	if (c->ordinal >= n_devices)
		return dev->host->error(-ENODEV, "device %s: number %d, this machine has %d",
			dev->name, c->ordinal, n_devices);
	rc = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, c->ordinal);
	if (!rc)
		rc = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, c->ordinal);
	if (!rc && major < LEAST_MAJOR)
		return dev->host->error(-ENODEV,
			"device %s: compute capability %d.%d, limit %d.0 and up", dev->name, major,
			minor, LEAST_MAJOR);
	return cuda_error(dev, rc, "its compute capability cannot be asked");
}

/* ---- open ---- */

static int find_driver(const struct afd__device *dev, struct cuda *c)
{
	enum cudaDriverEntryPointQueryResult found;
	void *get = NULL, *set = NULL;
	int rc = cudaGetDriverEntryPointByVersion(
		"cuCtxGetCurrent", &get, 12000, cudaEnableDefault, &found);

	if (!rc)
		rc = cudaGetDriverEntryPointByVersion(
			"cuCtxSetCurrent", &set, 12000, cudaEnableDefault, &found);
	if (rc || !get || !set)
		return cuda_error(dev, rc ? rc : (int)cudaErrorSymbolNotFound,
			"the driver has no cuCtxGetCurrent");
	memcpy(&c->context_get, &get, sizeof(get));
	memcpy(&c->context_set, &set, sizeof(set));
	return 0;
}

static int ask(const struct afd__device *dev, struct cuda *c)
{
	int n_sms = 0, pageable = 0, one_address = 0,
	    rc = cudaDeviceGetAttribute(&n_sms, cudaDevAttrMultiProcessorCount, c->ordinal);

	if (!rc)
		rc = cudaDeviceGetAttribute(&pageable, cudaDevAttrPageableMemoryAccess, c->ordinal);
	if (!rc)
		rc = cudaDeviceGetAttribute(
			&one_address, cudaDevAttrCanUseHostPointerForRegisteredMem, c->ordinal);
	c->n_sms = (uint32_t)n_sms;
	c->pageable = pageable != 0;
	c->one_address = one_address != 0;
	return cuda_error(dev, rc, "its attributes cannot be asked");
}

static int open_context(const struct afd__device *dev, struct cuda *c)
{
	void *before;
	int rc = find_driver(dev, c);

	if (rc)
		return rc;
	rc = c->context_get(&before);
	if (!rc)
		rc = cudaSetDevice(c->ordinal);
	if (!rc)
		rc = c->context_get(&c->context);
	if (rc)
		return cuda_error(dev, rc, "its context cannot be made");
	rc = ask(dev, c);
	if (!rc)
		rc = products_open(dev, c);
	c->context_set(before);
	return rc;
}

static int cuda_open(struct afd__device *dev, int index)
{
	struct cuda *c = dev->host->alloc(dev->ctx, 1, sizeof(*c));
	int rc;

	if (!c)
		return -ENOMEM;
	c->ordinal = index < 0 ? 0 : index;
	c->pid = getpid();
	rc = check_ordinal(dev, c);
	if (!rc)
		rc = open_context(dev, c);
	if (rc) {
		dev->host->free(c);
		return rc;
	}
	dev->state = c;
	return 0;
}

static void cuda_close(struct afd__device *dev)
{
	loader_close(dev);
	products_close(dev);
	dev->host->free(dev->state);
}

static const struct afd__device_ops cuda_ops = { .name = "cuda",
	.streams = 1,
	.open = cuda_open,
	.close = cuda_close,
	.alloc = cuda_alloc,
	.free = cuda_free,
	.matrix_bytes = cuda_matrix_bytes,
	.matrix_load = cuda_matrix_load,
	.scales_load = cuda_scales_load,
	.input_row_bytes = cuda_input_row_bytes,
	.experts_scratch_bytes = cuda_experts_scratch_bytes,
	.host_register = cuda_host_register,
	.host_unregister = cuda_host_unregister,
	.dmabuf = cuda_dmabuf,
	.peer_address = cuda_peer_address,
	.queue_open = cuda_queue_open,
	.queue_close = cuda_queue_close,
	.reached = cuda_reached,
	.ticket = cuda_ticket,
	.record_begin = cuda_record_begin,
	.record_end = cuda_record_end,
	.replay = cuda_replay,
	.graph_free = cuda_graph_free,
	.range_push = CUDA_RANGE_PUSH,
	.range_pop = CUDA_RANGE_POP,
	.upload = cuda_upload,
	.download = cuda_download,
	.probe = cuda_probe,
#define ENTRY(op) .op = cuda_##op,
	AFD__DEVICE_OPERATIONS(ENTRY)
#undef ENTRY
};

extern const struct afd__module afd_module_entry;
AFD_API const struct afd__module afd_module_entry = { .build = AFD__BUILD_ID, .ops = &cuda_ops };
