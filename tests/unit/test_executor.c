/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The compute threads: every task once, whatever the number of threads and callers; nobody waits
 * for somebody who sleeps; idle threads cost nothing.
 */
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "../../lib/context/executor.h"

#define TASKS_MAX 5000

struct counts {
	_Atomic uint32_t n[TASKS_MAX];
};

static void count_task(void *arg, uint32_t index)
{
	atomic_fetch_add(&((struct counts *)arg)->n[index], 1);
}

static void assert_each(const struct counts *c, uint32_t n_tasks, uint32_t times)
{
	for (uint32_t i = 0; i < TASKS_MAX; i++)
		assert_int_equal(c->n[i], i < n_tasks ? times : 0);
}

static void sleep_ms(long ms)
{
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };

	nanosleep(&t, NULL);
}

static void every_task_runs_once(void **state)
{
	static const uint32_t all_threads[] = { 1, 2, 3, 9 },
			      all_tasks[] = { 0, 1, 2, 7, TASKS_MAX };

	for (int i = 0; i < 4; i++) {
		struct afd__pool *pool = afd__pool_create(NULL, all_threads[i]);

		assert_non_null(pool);
		for (int j = 0; j < 5; j++) {
			struct counts c = { 0 };

			afd__pool_run(pool, all_tasks[j], count_task, &c);
			assert_each(&c, all_tasks[j], 1);
		}
		afd__pool_destroy(pool);
	}
}

static void without_a_pool_the_caller_runs_every_task(void **state)
{
	struct counts c = { 0 };

	afd__pool_run(NULL, 100, count_task, &c);
	assert_each(&c, 100, 1);
	afd__pool_destroy(NULL);
}

/* Runs of few tasks, back to back and after pauses in which the threads fall asleep. */
static void many_short_runs_lose_no_task(void **state)
{
	struct afd__pool *pool = afd__pool_create(NULL, 4);
	struct counts c = { 0 };

	assert_non_null(pool);
	for (int i = 0; i < 3000; i++) {
		afd__pool_run(pool, 5, count_task, &c);
		if (i % 100 == 0)
			sleep_ms(1);
	}
	assert_each(&c, 5, 3000);
	afd__pool_destroy(pool);
}

/* Comes back only when `wanted` tasks are inside at once, or after two seconds. */
struct meeting {
	_Atomic uint32_t n_inside, n_met;
	uint32_t wanted;
};

static void meet_task(void *arg, uint32_t index)
{
	struct meeting *m = arg;
	uint64_t until = afd__now_ns() + 2000000000u;

	atomic_fetch_add(&m->n_inside, 1);
	while (atomic_load(&m->n_inside) < m->wanted && afd__now_ns() < until)
		sleep_ms(0);
	if (atomic_load(&m->n_inside) >= m->wanted)
		atomic_fetch_add(&m->n_met, 1);
}

static void all_threads_take_part(void **state)
{
	struct afd__pool *pool = afd__pool_create(NULL, 4);

	assert_non_null(pool);
	for (int i = 0; i < 20; i++) {
		struct meeting m = { .wanted = 4 };

		sleep_ms(i % 2);
		afd__pool_run(pool, 4, meet_task, &m);
		assert_int_equal(m.n_met, 4);
	}
	afd__pool_destroy(pool);
}

struct nested {
	struct afd__pool *pool;
	struct counts inner;
};

static void nested_task(void *arg, uint32_t index)
{
	struct nested *n = arg;

	afd__pool_run(n->pool, 10, count_task, &n->inner);
}

static void run_inside_a_task_is_done_by_its_caller(void **state)
{
	struct nested n = { .pool = afd__pool_create(NULL, 3) };

	assert_non_null(n.pool);
	afd__pool_run(n.pool, 50, nested_task, &n);
	assert_each(&n.inner, 10, 50);
	afd__pool_destroy(n.pool);
}

struct caller {
	struct afd__pool *pool;
	struct counts c;
};

static void *call_often(void *arg)
{
	struct caller *caller = arg;

	for (int i = 0; i < 500; i++)
		afd__pool_run(caller->pool, 20, count_task, &caller->c);
	return NULL;
}

static void several_callers_share_a_pool(void **state)
{
	static struct caller callers[4];
	struct afd__pool *pool = afd__pool_create(NULL, 3);
	pthread_t threads[4];

	assert_non_null(pool);
	for (int i = 0; i < 4; i++) {
		callers[i].pool = pool;
		assert_int_equal(pthread_create(&threads[i], NULL, call_often, &callers[i]), 0);
	}
	for (int i = 0; i < 4; i++) {
		pthread_join(threads[i], NULL);
		assert_each(&callers[i].c, 20, 500);
	}
	afd__pool_destroy(pool);
}

static void idle_threads_use_no_cpu(void **state)
{
	struct afd__pool *pool = afd__pool_create(NULL, 4);
	struct counts c = { 0 };
	struct timespec before, after;

	assert_non_null(pool);
	afd__pool_run(pool, 100, count_task, &c);
	sleep_ms(10);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
	sleep_ms(300);
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
	assert_true((after.tv_sec - before.tv_sec) * 1000000000L + after.tv_nsec - before.tv_nsec <
		    3000000);
	afd__pool_destroy(pool);
}

static void look_at_mask(void *arg, uint32_t index)
{
	struct meeting *m = arg;
	sigset_t mask;

	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	if (sigismember(&mask, SIGTERM))
		atomic_fetch_add(&m->n_met, 1);
	atomic_fetch_add(&m->n_inside, 1);
	while (atomic_load(&m->n_inside) < m->wanted)
		sleep_ms(0);
}

static void signals_of_the_host_do_not_reach_compute_threads(void **state)
{
	struct afd__pool *pool = afd__pool_create(NULL, 3);
	struct meeting m = { .wanted = 3 };
	sigset_t mask;

	assert_non_null(pool);
	afd__pool_run(pool, 3, look_at_mask, &m);
	assert_int_equal(m.n_met, 2); /* the caller keeps its own */
	pthread_sigmask(SIG_SETMASK, NULL, &mask);
	assert_false(sigismember(&mask, SIGTERM));
	afd__pool_destroy(pool);
}

static void threads_that_cannot_be_started_are_an_error_with_the_count(void **state)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
	print_message("skipped: sanitizers need more address space than the limit leaves\n");
	skip();
#else
	struct rlimit before, small = { .rlim_cur = (rlim_t)1 << 30 };

	assert_int_equal(getrlimit(RLIMIT_AS, &before), 0);
	small.rlim_max = before.rlim_max;
	assert_int_equal(setrlimit(RLIMIT_AS, &small), 0);
	assert_null(afd__pool_create(NULL, 1024));
	assert_int_equal(setrlimit(RLIMIT_AS, &before), 0);
	assert_non_null(strstr(afd_last_error(), "of 1024 cannot be started"));
#endif
}

static void child_of_fork_frees_a_pool_without_waiting_for_threads_it_lacks(void **state)
{
	struct afd__pool *pool = afd__pool_create(NULL, 3);
	int status = -1;
	pid_t child;

	assert_non_null(pool);
	child = fork();
	if (child == 0) {
		alarm(5);
		afd__pool_destroy(pool);
		_exit(7);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	afd__pool_destroy(pool);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_task_runs_once),
		cmocka_unit_test(without_a_pool_the_caller_runs_every_task),
		cmocka_unit_test(many_short_runs_lose_no_task),
		cmocka_unit_test(all_threads_take_part),
		cmocka_unit_test(run_inside_a_task_is_done_by_its_caller),
		cmocka_unit_test(several_callers_share_a_pool),
		cmocka_unit_test(idle_threads_use_no_cpu),
		cmocka_unit_test(signals_of_the_host_do_not_reach_compute_threads),
		cmocka_unit_test(threads_that_cannot_be_started_are_an_error_with_the_count),
		cmocka_unit_test(child_of_fork_frees_a_pool_without_waiting_for_threads_it_lacks),
	};

	return cmocka_run_group_tests_name("executor", tests, NULL, NULL);
}
