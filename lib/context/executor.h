/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The library's own compute threads. One job at a time: whoever calls takes part, the pool's
 * threads join while the job is open. A call that finds the pool busy (another thread's, or one
 * from inside a task) runs its tasks by itself, so that no caller ever waits for another.
 *
 * The context makes one pool and hands afd__pool_run out as its executor; everybody else calls
 * afd__parallel.
 */
#ifndef AFD_LIB_EXECUTOR_H
#define AFD_LIB_EXECUTOR_H

#include "core.h"

/* n_threads counts the caller; with 1 the pool has no thread of its own. NULL when there is no
 * memory or a thread cannot be started (then -ENOMEM is the code; the error text is set). */
struct afd__pool *afd__pool_create(struct afd_context *ctx, uint32_t n_threads);
/* NULL is fine. No job may run. In a child of fork the threads do not exist: only the memory is
 * freed. */
void afd__pool_destroy(struct afd__pool *pool);
/* struct afd_executor.run with user = the pool; user may be NULL: the caller alone. */
void afd__pool_run(void *user, uint32_t n_tasks, afd_task task, void *arg);

#endif
