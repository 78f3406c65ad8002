/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The life of a context: checks what the host asked for, starts the compute threads, and ends them.
 * After creation its fields do not change (but for counters), so stages of several threads read it
 * without a lock.
 */
#include "core.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "executor.h"
#include "metrics.h"

enum { MAX_THREADS = 1024, PAGE_BYTES = 4096 };

static int check_pair(const char *what, bool first, bool second, const char *names)
{
	if (first == second)
		return 0;
	return afd__error(-EINVAL, "context: %s: half of a pair is set, set both or none of %s",
			  what, names);
}

static int check_params(const struct afd_context_params *params)
{
	int rc = check_pair("allocator", params->allocator.alloc, params->allocator.free,
			    "alloc and free");

	if (rc)
		return rc;
	if (params->log.max_level < 0 || params->log.max_level > AFD_LOG_DEBUG)
		return afd__error(-EINVAL, "context: log.max_level is %d, limit %d",
				  params->log.max_level, AFD_LOG_DEBUG);
	if (params->n_threads > MAX_THREADS || params->executor.n_threads > MAX_THREADS)
		return afd__error(-EINVAL, "context: n_threads is %u, limit %d",
				  params->n_threads > MAX_THREADS ? params->n_threads : params->executor.n_threads,
				  MAX_THREADS);
	if (params->executor.run && params->n_threads)
		return afd__error(-EINVAL,
				  "context: n_threads is %u beside executor.run, which brings its own threads",
				  params->n_threads);
	if (!params->executor.run && params->executor.n_threads)
		return afd__error(-EINVAL, "context: executor.n_threads is %u without executor.run",
				  params->executor.n_threads);
	if (params->_pad)
		return afd__error(-EINVAL, "context: _pad is %u, must be 0", params->_pad);
	return 0;
}

static int start_executor(struct afd_context *ctx, uint32_t n_threads)
{
	if (ctx->executor.run) {
		if (!ctx->executor.n_threads)
			ctx->executor.n_threads = 1;
		return 0;
	}
	ctx->executor.run = afd__pool_run;
	ctx->executor.n_threads = n_threads ? n_threads : 1;
	/* One thread is the caller alone, which needs no pool. */
	if (ctx->executor.n_threads == 1)
		return 0;
	ctx->pool = afd__pool_create(ctx, n_threads);
	ctx->executor.user = ctx->pool;
	return ctx->pool ? 0 : -ENOMEM;
}

/* Without the page every call asks for the process's id. */
static void open_page(struct afd_context *ctx)
{
#ifdef MADV_WIPEONFORK
	void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		return;
	if (madvise(page, PAGE_BYTES, MADV_WIPEONFORK)) {
		munmap(page, PAGE_BYTES);
		return;
	}
	ctx->alive = page;
	atomic_store_explicit(ctx->alive, 1, memory_order_relaxed);
#endif
}

static void close_page(struct afd_context *ctx)
{
	if (ctx->alive)
		munmap(ctx->alive, PAGE_BYTES);
}

bool afd__forked(const struct afd_context *ctx)
{
	return ctx->alive ? !atomic_load_explicit(ctx->alive, memory_order_relaxed)
			  : ctx->pid != getpid();
}

int afd_context_create(afd_context **out, const struct afd_context_params *params)
{
	struct afd_context_params p;
	struct afd_context *ctx;
	int rc;

	if (!out)
		return afd__error(-EINVAL, "context: out is NULL");
	rc = afd__params_copy(&p, sizeof(p), params, "context params");
	if (!rc)
		rc = check_params(&p);
	if (rc)
		return rc;
	ctx = afd__alloc(NULL, 1, sizeof(*ctx));
	if (!ctx)
		return -ENOMEM;
	ctx->log = p.log;
	if (!ctx->log.max_level)
		ctx->log.max_level = AFD_LOG_WARN;
	ctx->allocator = p.allocator;
	ctx->executor = p.executor;
	ctx->tracer = p.tracer;
	ctx->pid = getpid();
	open_page(ctx);
	rc = afd__isa_choose();
	if (rc < 0)
		goto fail;
	ctx->isa = rc;
	rc = -ENOMEM;
	ctx->metrics = afd__metrics_create();
	if (!ctx->metrics)
		goto fail;
	rc = start_executor(ctx, p.n_threads);
	if (rc)
		goto fail;
	*out = ctx;
	return 0;
fail:
	afd__metrics_destroy(ctx->metrics);
	close_page(ctx);
	afd__free(ctx);
	return rc;
}

void afd_context_destroy(afd_context *ctx)
{
	if (!ctx)
		return;
	afd__pool_destroy(ctx->pool);
	afd__metrics_destroy(ctx->metrics);
	afd__free(ctx->local);
	afd__free(ctx->host_memory);
	close_page(ctx);
	afd__free(ctx);
}

int afd__context_check(const struct afd_context *ctx, const char *what)
{
	if (!ctx)
		return afd__error(-EINVAL, "%s: the handle is NULL", what);
	if (afd__forked(ctx))
		return afd__error(-EINVAL,
				  "%s: the handle is of process %d, this is its child %d by fork", what,
				  (int)ctx->pid, (int)getpid());
	return 0;
}

const char *afd_context_isa(const afd_context *ctx)
{
	return ctx ? afd__isa_name(ctx->isa) : "?";
}

#define STRING(x) #x
#define VERSION(major, minor, patch) STRING(major) "." STRING(minor) "." STRING(patch)

const char *afd_version(void)
{
	return VERSION(AFD_VERSION_MAJOR, AFD_VERSION_MINOR, AFD_VERSION_PATCH);
}

size_t afd_dtype_bytes(int32_t dtype)
{
	switch (dtype) {
	case AFD_DTYPE_F32:
		return 4;
	case AFD_DTYPE_BF16:
	case AFD_DTYPE_F16:
		return 2;
	case AFD_DTYPE_FP8:
		return 1;
	default:
		return 0;
	}
}

const char *afd_dtype_name(int32_t dtype)
{
	static const char *const names[] = { "?", "f32", "bf16", "f16", "fp8" };

	return dtype >= AFD_DTYPE_F32 && dtype <= AFD_DTYPE_FP8 ? names[dtype] : "?";
}
