/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds and opens modules. They lie in afd/ beside libafd.so, wherever that was loaded from,
 * so that a wheel or a DESTDIR works; AFD_MODULE_DIR names another folder. No code of a module runs
 * before its build was compared.
 */
#include "module.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backends.h"
#include "lib/device/build_id.h"

const struct afd__module_host afd__module_host = {
	.cpu = &afd__cpu_device_ops,
	.alloc = afd__alloc,
	.free = afd__free,
	.large_alloc = afd__large_alloc,
	.large_free = afd__large_free,
	.error = afd__error,
	.error_save = afd__error_save,
	.log = afd__log,
	.now_ns = afd__now_ns,
	.device_alloc = afd__device_alloc,
	.device_free = afd__device_free,
	.device_dmabuf = afd__device_dmabuf,
	.device_peer_address = afd__device_peer_address,
	.device_copy = afd__device_copy,
};

/* Which package brings a module, for the text of its absence. */
static const char *package_of(const char *name)
{
	if (!strcmp(name, "deferred"))
		return "it comes with libafd unless that was built with -Ddeferred=false";
	if (!strcmp(name, "tls"))
		return "it comes with libafd when that was built with OpenSSL, Debian's libssl-dev";
	if (!strcmp(name, "verbs"))
		return "it comes with libafd when that was built with rdma-core, Debian's "
		       "libibverbs-dev";
	return "it comes with a libafd that was built with CUDA, see docs/cuda.md";
}

static int module_path(const char *name, char *path, size_t capacity)
{
	const char *dir = secure_getenv("AFD_MODULE_DIR"), *slash;
	Dl_info info;
	int n;

	if (dir && dir[0]) {
		n = snprintf(path, capacity, "%s/afd-%s.so", dir, name);
	} else {
		if (!dladdr((void *)&afd__module_host, &info) || !info.dli_fname)
			return afd__error(-ENOSYS,
				"module %s: the place of libafd.so is unknown; set AFD_MODULE_DIR",
				name);
		slash = strrchr(info.dli_fname, '/');
		n = snprintf(path, capacity, "%.*s/afd/afd-%s.so",
			slash ? (int)(slash - info.dli_fname) : 1, slash ? info.dli_fname : ".",
			name);
	}
	if (n < 0 || (size_t)n >= capacity)
		return afd__error(-EINVAL, "module %s: its path has %d bytes, limit %zu", name, n,
			capacity - 1);
	return 0;
}

static int check_build(const char *path, const struct afd__module *module)
{
	if (!module)
		return afd__error(-EPROTO, "%s: has no symbol %s, so it is no module of libafd",
			path, AFD__MODULE_SYMBOL);
	if (strncmp(module->build, AFD__BUILD_ID, sizeof(module->build)))
		return afd__error(-EPROTO, "%s: is of build \"%.*s\", libafd is of \"%s\"", path,
			(int)strnlen(module->build, sizeof(module->build)), module->build,
			AFD__BUILD_ID);
	return 0;
}

/* `what` is what was asked for, in the text: "device deferred", "key". */
static int load(const char *name, const char *what, int flags, void **handle,
	const struct afd__module **out)
{
	const struct afd__module *module;
	char path[1024];
	void *opened;
	int rc;

	rc = module_path(name, path, sizeof(path));
	if (rc)
		return rc;
	opened = dlopen(path, RTLD_NOW | RTLD_LOCAL | flags);
	if (!opened)
		return afd__error(
			-ENOSYS, "%s: no module (%s): %s", what, package_of(name), dlerror());
	module = dlsym(opened, AFD__MODULE_SYMBOL);
	rc = check_build(path, module);
	if (rc) {
		dlclose(opened);
		return rc;
	}
	*handle = opened;
	*out = module;
	return 0;
}

int afd__module_load(const char *name, void **handle, const struct afd__device_ops **ops)
{
	const struct afd__module *module;
	char what[48];
	int rc;

	snprintf(what, sizeof(what), "device %s", name);
	rc = load(name, what, 0, handle, &module);
	if (!rc)
		*ops = module->ops;
	return rc;
}

int afd__module_load_secret(void **handle, const struct afd__secret_ops **ops)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(RTLD_DEEPBIND)
	const int flags = RTLD_NODELETE; /* a sanitizer's malloc must be the module's, too */
#else
	const int flags = RTLD_NODELETE | RTLD_DEEPBIND;
#endif
	const struct afd__module *module;
	int rc = load("tls", "key", flags, handle, &module);

	if (!rc)
		*ops = module->secret;
	return rc;
}

int afd__module_load_verbs(void **handle, const struct afd__verbs_ops **ops)
{
	const struct afd__module *module;
	int rc = load("verbs", "verbs", RTLD_NODELETE, handle, &module);

	if (!rc)
		*ops = module->verbs;
	return rc;
}

void afd__module_unload(void *handle)
{
	if (handle)
		dlclose(handle);
}
