/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The private table between the library and a module (afd-<name>.so): a device, or afd-tls.so. A module links nothing
 * of the library: it gets what it needs here, and memory is freed by the side that allocated it.
 *
 * Invariant: both sides were built from the same headers. The module's one symbol,
 * afd_module_entry, begins with the build it is of; the library compares that before it calls
 * anything. Included by module.c and by every module.
 */
#ifndef AFD_LIB_MODULE_H
#define AFD_LIB_MODULE_H

#include "device.h"

struct afd__secret_ops;
struct afd__verbs_ops;

#define AFD__MODULE_BUILD_BYTES 96

struct afd__module_host {
	const struct afd__device_ops *cpu; /* for a module that runs the CPU's operations */
	void *(*alloc)(struct afd_context *ctx, size_t n, size_t bytes);
	void (*free)(void *memory);
	void *(*large_alloc)(
		struct afd_context *ctx, size_t bytes, size_t alignment, const char *what);
	void (*large_free)(struct afd_context *ctx, void *memory, size_t bytes);
	__attribute__((format(printf, 2, 3))) int (*error)(int code, const char *format, ...);
	void (*error_save)(char *text, size_t capacity);
	__attribute__((format(printf, 3, 4))) void (*log)(
		const struct afd_context *ctx, int level, const char *format, ...);
	uint64_t (*now_ns)(void);

	/* Of devices, for adapters (device.h). */
	int (*device_alloc)(
		struct afd__device *dev, size_t bytes, const char *what, void **out);
	void (*device_free)(struct afd__device *dev, void *memory, size_t bytes);
	int (*device_dmabuf)(
		struct afd__device *dev, void *memory, size_t bytes, int *fd, uint64_t *offset);
	int (*device_peer_address)(
		struct afd__device *dev, void *memory, size_t bytes, void **address);
	int (*device_copy)(
		struct afd__device *dev, void *memory, void *host, size_t bytes, bool up);
};

/* What a module is: constant data, so that nothing of it runs before it was accepted. */
struct afd__module {
	char build[AFD__MODULE_BUILD_BYTES]; /* AFD__BUILD_ID, made of the version and headers */
	const struct afd__device_ops *ops;   /* they find the table above in dev->host */
	const struct afd__secret_ops *secret; /* of afd-tls.so, which is no device */
	const struct afd__verbs_ops *verbs;   /* of afd-verbs.so, which is none either */
};

#define AFD__MODULE_SYMBOL "afd_module_entry"

/* afd-tls.so, for keys (transport/secret.c). Bound before all else, since a host may have another
 * OpenSSL, and never unmapped, since OpenSSL leaves work for the end of the process. */
int afd__module_load_secret(void **handle, const struct afd__secret_ops **ops);
/* afd-verbs.so, for verbs: links. Never unmapped, since libibverbs keeps its drivers. */
int afd__module_load_verbs(void **handle, const struct afd__verbs_ops **ops);
void afd__module_unload(void *handle);

#endif
