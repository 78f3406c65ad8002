/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For LD_PRELOAD in the virtual machine, whose soft-RoCE knows no dma-buf: stands in for an adapter
 * that does. The descriptor's memory is mapped here and registered at the address that was asked
 * for, so that the adapter really writes and reads it. AFD_TEST_DMABUF=lies: what is registered is
 * memory of nobody, as on a machine where registering succeeds and nothing arrives.
 *
 * Mappings stay until the process ends.
 */
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <infiniband/verbs.h>

struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t bytes, uint64_t address,
	int fd, int access)
{
	const char *how = getenv("AFD_TEST_DMABUF");
	bool lies = how && !strcmp(how, "lies");
	void *memory = lies ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
				      -1, 0)
			    : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
				      (off_t)offset);

	return memory == MAP_FAILED ? NULL : ibv_reg_mr_iova(pd, memory, bytes, address, access);
}
