/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory of the library: small zeroed objects from malloc, and large memory through the host's
 * hooks. Every allocation is counted, so that a test can show that a step makes none. The default
 * for large memory is anonymous mmap, aligned to a huge page where that can help, because weights
 * and KV pages are read at the rate of DRAM.
 */
#include "core.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t HUGE_PAGE_BYTES = (size_t)2 << 20;

static void count_allocation(struct afd_context *ctx)
{
	if (ctx)
		atomic_fetch_add_explicit(&ctx->n_allocations, 1, memory_order_relaxed);
}

void *afd__alloc(struct afd_context *ctx, size_t n, size_t bytes)
{
	size_t total;
	void *memory;

	count_allocation(ctx);
	if (__builtin_mul_overflow(n, bytes, &total)) {
		afd__error(-ENOMEM, "memory: %zu objects of %zu bytes overflow", n, bytes);
		return NULL;
	}
	memory = calloc(1, total ? total : 1);
	if (!memory)
		afd__error(-ENOMEM, "memory: no %zu bytes", total);
	return memory;
}

void afd__free(void *memory)
{
	free(memory);
}

char *afd__strdup(struct afd_context *ctx, const char *text)
{
	size_t bytes = strlen(text) + 1;
	char *copy = afd__alloc(ctx, bytes, 1);

	if (copy)
		memcpy(copy, text, bytes);
	return copy;
}

static size_t page_bytes(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

/* What mmap really holds for a request; 0 when that overflows. */
static size_t mapped_bytes(size_t bytes)
{
	size_t page = page_bytes(), rounded;

	if (__builtin_add_overflow(bytes, page - 1, &rounded))
		return 0;
	return rounded / page * page;
}

static void *map_aligned(size_t bytes, size_t alignment)
{
	size_t held = mapped_bytes(bytes), wide, head;
	char *memory;

	if (alignment < page_bytes())
		alignment = page_bytes();
	if (bytes >= HUGE_PAGE_BYTES)
		alignment = HUGE_PAGE_BYTES;
	if (!held || __builtin_add_overflow(held, alignment - page_bytes(), &wide))
		return NULL;
	memory = mmap(NULL, wide, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return NULL;
	head = -(uintptr_t)memory & (alignment - 1);
	if (head)
		munmap(memory, head);
	if (wide - head > held)
		munmap(memory + head + held, wide - head - held);
	memory += head;
	/* Advice only: a kernel without huge pages serves small ones. */
	if (held >= HUGE_PAGE_BYTES)
		madvise(memory, held, MADV_HUGEPAGE);
	return memory;
}

static void *host_alloc(struct afd_context *ctx, size_t bytes, size_t alignment, const char *what)
{
	void *memory = ctx->allocator.alloc(ctx->allocator.user, bytes, alignment);

	if (memory && (uintptr_t)memory % alignment) {
		ctx->allocator.free(ctx->allocator.user, memory, bytes);
		afd__error(-EINVAL, "%s: the host's allocator gave %p, asked for alignment %zu",
			   what, memory, alignment);
		return NULL;
	}
	if (!memory)
		afd__error(-ENOMEM, "%s: the host's allocator has no %zu bytes", what, bytes);
	return memory;
}

void *afd__large_alloc(struct afd_context *ctx, size_t bytes, size_t alignment, const char *what)
{
	void *memory;

	count_allocation(ctx);
	if (!bytes)
		bytes = 1;
	if (ctx->allocator.alloc)
		return host_alloc(ctx, bytes, alignment, what);
	memory = map_aligned(bytes, alignment);
	if (!memory)
		afd__error(-ENOMEM, "%s: no %zu bytes of memory", what, bytes);
	return memory;
}

void afd__large_free(struct afd_context *ctx, void *memory, size_t bytes)
{
	if (!memory)
		return;
	if (!bytes)
		bytes = 1;
	if (ctx->allocator.free)
		ctx->allocator.free(ctx->allocator.user, memory, bytes);
	else
		munmap(memory, mapped_bytes(bytes));
}
