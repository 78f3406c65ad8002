/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compute threads. A job is written while it is closed, opened, and closed again by its owner
 * when no task is left to take; a thread that wakes late finds it closed and sleeps on. So a run
 * never waits for a thread that is still asleep, only for those that joined.
 *
 * Invariant: task, arg and n_tasks change only while `state` is closed with no thread inside, and
 * `busy` is held. Waiting is a bounded spin, then a futex; there is no lock, and nothing is
 * allocated after creation.
 */
#include "executor.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Longer than most gaps between operations of a step, shorter than a wake-up by the scheduler. */
#define SPIN_NS 10000

#define CACHE_LINE         64
#define STATE_INSIDE       0x0000ffffu /* how many threads of the pool are inside */
#define STATE_OPEN         0x00010000u
#define STATE_OWNER_SLEEPS 0x00020000u

struct afd__pool {
	afd_task task;
	void *arg;
	uint32_t n_tasks;
	_Alignas(CACHE_LINE) _Atomic uint64_t next_task; /* 64 bits: every thread overshoots once */
	_Alignas(CACHE_LINE) _Atomic uint32_t state;
	/* Counts jobs; idle threads sleep on it. */
	_Alignas(CACHE_LINE) _Atomic uint32_t generation;
	_Atomic uint32_t n_sleepers;
	_Alignas(CACHE_LINE) _Atomic uint32_t busy;
	_Atomic uint32_t stop;
	pid_t pid;
	void *memory; /* what afd__alloc gave; the pool lies aligned in it */
	uint32_t n_started;
	pthread_t threads[]; /* [n_started] */
};

static void futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, uint32_t n_threads)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, n_threads, NULL, NULL, 0);
}

static void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield");
#endif
}

/* Spins while (*word & mask) == seen, at most SPIN_NS; returns the word as last seen. */
static uint32_t spin_while(_Atomic uint32_t *word, uint32_t mask, uint32_t seen)
{
	uint64_t until = 0;
	uint32_t now;

	for (;;) {
		for (int i = 0; i < 16; i++) {
			now = atomic_load_explicit(word, memory_order_acquire);
			if ((now & mask) != seen)
				return now;
			cpu_relax();
		}
		if (!until)
			until = afd__now_ns() + SPIN_NS;
		else if (afd__now_ns() > until)
			return now;
	}
}

static void run_tasks(struct afd__pool *pool)
{
	uint64_t i;

	while ((i = atomic_fetch_add_explicit(&pool->next_task, 1, memory_order_relaxed)) <
		pool->n_tasks)
		pool->task(pool->arg, (uint32_t)i);
}

static void join_job(struct afd__pool *pool)
{
	uint32_t state = atomic_load_explicit(&pool->state, memory_order_relaxed);

	do {
		if (!(state & STATE_OPEN))
			return;
	} while (!atomic_compare_exchange_weak_explicit(
		&pool->state, &state, state + 1, memory_order_acquire, memory_order_relaxed));
	run_tasks(pool);
	state = atomic_fetch_sub_explicit(&pool->state, 1, memory_order_release);
	if ((state & STATE_OWNER_SLEEPS) && (state & STATE_INSIDE) == 1)
		futex_wake(&pool->state, 1);
}

static void *thread_main(void *user)
{
	struct afd__pool *pool = user;
	uint32_t seen = 0, now;

	while (!atomic_load_explicit(&pool->stop, memory_order_acquire)) {
		now = spin_while(&pool->generation, ~0u, seen);
		if (now != seen) {
			seen = now;
			join_job(pool);
			continue;
		}
		/* The owner bumps the generation before it looks for sleepers; the kernel compares
		 * after we are counted. */
		atomic_fetch_add(&pool->n_sleepers, 1);
		futex_wait(&pool->generation, seen);
		atomic_fetch_sub(&pool->n_sleepers, 1);
	}
	return NULL;
}

static void wake_threads(struct afd__pool *pool, uint32_t n_wanted)
{
	atomic_fetch_add(&pool->generation, 1);
	if (atomic_load(&pool->n_sleepers))
		futex_wake(&pool->generation, n_wanted < INT_MAX ? n_wanted : INT_MAX);
}

/* Closes the job and waits until every thread that joined has left. */
static void finish_job(struct afd__pool *pool)
{
	uint32_t state =
		atomic_fetch_and_explicit(&pool->state, ~STATE_OPEN, memory_order_acq_rel) &
		~STATE_OPEN;

	while (state & STATE_INSIDE) {
		state = spin_while(&pool->state, ~0u, state);
		if (!(state & STATE_INSIDE))
			break;
		if (!(state & STATE_OWNER_SLEEPS)) {
			atomic_fetch_or_explicit(
				&pool->state, STATE_OWNER_SLEEPS, memory_order_relaxed);
			state |= STATE_OWNER_SLEEPS;
		}
		futex_wait(&pool->state, state);
		state = atomic_load_explicit(&pool->state, memory_order_acquire);
	}
}

void afd__pool_run(void *user, uint32_t n_tasks, afd_task task, void *arg)
{
	struct afd__pool *pool = user;

	if (n_tasks < 2 || !pool || !pool->n_started ||
		atomic_exchange_explicit(&pool->busy, 1, memory_order_acquire)) {
		for (uint32_t i = 0; i < n_tasks; i++)
			task(arg, i);
		return;
	}
	pool->task = task;
	pool->arg = arg;
	pool->n_tasks = n_tasks;
	atomic_store_explicit(&pool->next_task, 0, memory_order_relaxed);
	atomic_store_explicit(&pool->state, STATE_OPEN, memory_order_release);
	wake_threads(pool, n_tasks - 1);
	run_tasks(pool);
	finish_job(pool);
	atomic_store_explicit(&pool->busy, 0, memory_order_release);
}

static int start_threads(struct afd__pool *pool, uint32_t n_threads)
{
	sigset_t all, before;
	int code = 0;

	/* Signals are the host's: none of its handlers shall run on our threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	while (pool->n_started < n_threads) {
		code = pthread_create(&pool->threads[pool->n_started], NULL, thread_main, pool);
		if (code)
			break;
		pthread_setname_np(pool->threads[pool->n_started], "afd-compute");
		pool->n_started++;
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return code;
}

struct afd__pool *afd__pool_create(struct afd_context *ctx, uint32_t n_threads)
{
	size_t bytes =
		sizeof(struct afd__pool) + (size_t)n_threads * sizeof(pthread_t) + CACHE_LINE;
	struct afd__pool *pool;
	void *memory;
	int code;

	memory = afd__alloc(ctx, 1, bytes);
	if (!memory)
		return NULL;
	pool = (struct afd__pool *)(((uintptr_t)memory + CACHE_LINE - 1) &
				    ~(uintptr_t)(CACHE_LINE - 1));
	pool->memory = memory;
	pool->pid = getpid();
	code = start_threads(pool, n_threads > 1 ? n_threads - 1 : 0);
	if (code) {
		uint32_t n_started = pool->n_started;

		afd__pool_destroy(pool);
		afd__error(-ENOMEM, "context: compute thread %u of %u cannot be started: %s",
			n_started + 2, n_threads, strerror(code));
		return NULL;
	}
	return pool;
}

void afd__pool_destroy(struct afd__pool *pool)
{
	if (!pool)
		return;
	if (pool->pid == getpid()) {
		atomic_store_explicit(&pool->stop, 1, memory_order_release);
		wake_threads(pool, INT_MAX);
		for (uint32_t i = 0; i < pool->n_started; i++)
			pthread_join(pool->threads[i], NULL);
	}
	afd__free(pool->memory);
}

void afd__parallel(struct afd_context *ctx, uint32_t n_tasks, afd_task task, void *arg)
{
	ctx->executor.run(ctx->executor.user, n_tasks, task, arg);
}
