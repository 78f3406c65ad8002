/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The worker of a deferred queue: takes records in order and runs them through the CPU backend.
 * Idle, it spins a little, then sleeps. After a failure it runs nothing more, but goes on taking
 * records, so that nobody waits for it in vain.
 *
 * AFD_DEFERRED_DELAY_US makes it wait a random time before each record, so that a stage that forgot
 * to wait shows; AFD_DEFERRED_FAIL_AT=N makes the queue's N-th operation fail.
 */
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "queue.h"

#define SPIN_NS 10000

static void fail(struct deferred_queue *d, int code)
{
	d->q->dev->host->error_save(d->error_text, sizeof(d->error_text));
	atomic_store_explicit(&d->error, code, memory_order_release);
}

static int run_operation(struct deferred_queue *d, const struct record *r)
{
	const struct afd__module_host *host = d->q->dev->host;

	if (++d->n_operations == d->fail_at)
		return host->error(-EIO,
			"device %s: operation %llu fails, as AFD_DEFERRED_FAIL_AT asks",
			d->q->dev->name, (unsigned long long)d->fail_at);
	switch (r->kind) {
#define RUN(op) \
	case KIND_##op: \
		return host->cpu->op(&d->cpu, &r->args.op);
		AFD__DEVICE_OPERATIONS(RUN)
#undef RUN
	default:
		return 0;
	}
}

static void signal_advance(const struct deferred_queue *d)
{
	uint64_t one = 1;

	/* A full counter is readable already. */
	if (write(d->q->fd, &one, sizeof(one)) < 0)
		return;
}

static void delay(struct deferred_queue *d)
{
	struct timespec t = { 0 };

	if (!d->delay_us)
		return;
	d->random = d->random * 1664525u + 1013904223u;
	t.tv_nsec = (long)((d->random >> 8) % d->delay_us) * 1000;
	nanosleep(&t, NULL);
}

static void run_record(struct deferred_queue *d, const struct record *r)
{
	bool broken = atomic_load_explicit(&d->error, memory_order_relaxed) != 0;
	int rc;

	delay(d);
	if (r->kind == KIND_upload || r->kind == KIND_download) {
		if (!broken)
			memcpy(r->args.transfer.dst, r->args.transfer.src, r->args.transfer.bytes);
		if (r->kind == KIND_upload)
			atomic_store(&d->staging_done, r->args.transfer.staging_end);
	} else if (r->kind != KIND_ticket && !broken) {
		rc = run_operation(d, r);
		if (rc < 0)
			fail(d, rc);
	}
}

/* True when there is a record; else the worker has slept or shall end. */
static bool wait_for_record(struct deferred_queue *d, uint64_t done)
{
	const struct afd__module_host *host = d->q->dev->host;
	uint64_t until = 0;

	while (atomic_load(&d->head) == done) {
		if (!until)
			until = host->now_ns() + SPIN_NS;
		else if (host->now_ns() > until)
			break;
	}
	if (atomic_load(&d->head) != done)
		return true;
	atomic_store(&d->sleeping, 1);
	/* The caller stores head before it looks at `sleeping`; we do it the other way round. */
	if (atomic_load(&d->head) == done && !atomic_load(&d->stop))
		syscall(SYS_futex, &d->sleeping, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
	atomic_store(&d->sleeping, 0);
	return false;
}

static void *worker_main(void *user)
{
	struct deferred_queue *d = user;
	uint64_t done = 0;

	for (;;) {
		if (!wait_for_record(d, done)) {
			if (atomic_load(&d->stop) && atomic_load(&d->head) == done)
				return NULL;
			continue;
		}
		const struct record *r = &d->records[done % N_RECORDS];
		bool tell = r->kind == KIND_ticket;

		run_record(d, r);
		tell |= atomic_load_explicit(&d->error, memory_order_relaxed) != 0;
		atomic_store(&d->done, ++done);
		if (tell)
			signal_advance(d);
	}
}

void worker_wake(struct deferred_queue *d)
{
	if (atomic_exchange(&d->sleeping, 0))
		syscall(SYS_futex, &d->sleeping, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static int environment_number(
	const struct deferred_queue *d, const char *name, uint64_t limit, uint64_t *value)
{
	const char *text = secure_getenv(name);
	char *end;

	*value = 0;
	if (!text || !text[0])
		return 0;
	*value = strtoull(text, &end, 10);
	if (*end || text[0] < '0' || text[0] > '9' || *value > limit)
		return d->q->dev->host->error(-EINVAL, "%s: \"%.32s\", limit 0 to %llu", name, text,
			(unsigned long long)limit);
	return 0;
}

int worker_start(struct deferred_queue *d)
{
	sigset_t all, before;
	uint64_t delay_us;
	int rc = environment_number(d, "AFD_DEFERRED_DELAY_US", 900000, &delay_us);

	if (!rc)
		rc = environment_number(d, "AFD_DEFERRED_FAIL_AT", UINT64_MAX, &d->fail_at);
	if (rc)
		return rc;
	d->delay_us = (uint32_t)delay_us;
	d->pid = getpid();
	/* Signals are the host's: none of its handlers shall run on this thread. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	rc = pthread_create(&d->worker, NULL, worker_main, d);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (rc)
		return d->q->dev->host->error(-ENOMEM,
			"device %s: its thread cannot be started: %s", d->q->dev->name,
			strerror(rc));
	pthread_setname_np(d->worker, "afd-deferred");
	return 0;
}

void worker_stop(struct deferred_queue *d)
{
	/* In a child of fork there is no such thread. */
	if (d->pid != getpid())
		return;
	atomic_store(&d->stop, 1);
	worker_wake(d);
	pthread_join(d->worker, NULL);
}
