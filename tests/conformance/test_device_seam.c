/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The seam itself: who may touch device memory, when operations are done, what waiting promises,
 * errors that stay, and modules that are refused. Runs on every device; what only an asynchronous
 * one can show opens `deferred` by itself.
 */
#include "rig.h"

#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static bool is_deferred(void)
{
	return !strcmp(rig_device_name(), "deferred");
}

/* How a child ends that reads the first number of the memory; 0 when it can. */
static int signal_of_reading(const volatile float *memory)
{
	pid_t child = fork();
	int status;

	assert_true(child >= 0);
	if (!child) {
		signal(SIGSEGV, SIG_DFL); /* a sanitizer's own */
		_exit(memory[0] == 1.5f ? 0 : 99);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	return WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
}

static void reading_device_memory_on_the_host_dies_on_deferred_and_works_on_cpu(void **state)
{
	const float x[4] = { 1.5f, 2, 3, 4 };
	float got[4], *dev = rig_input(*state, x, sizeof(x));

	rig_fetch(*state, got, dev, sizeof(got));
	assert_memory_equal(got, x, sizeof(x));
	assert_int_equal(signal_of_reading(dev), is_deferred() ? SIGSEGV : 0);
}

static void fresh_memory_is_poisoned_on_deferred(void **state)
{
	struct rig *r = *state;
	unsigned char got[256];
	void *memory;

	for (int again = 0; again < 2; again++) {
		RIG_OK(afd__device_alloc(r->dev, sizeof(got), "fresh memory", &memory));
		rig_fetch(r, got, memory, sizeof(got));
		for (size_t i = 0; is_deferred() && i < sizeof(got); i++)
			assert_int_equal(got[i], 0xff);
		memset(got, 0, sizeof(got));
		rig_write(r, memory, got, sizeof(got));
		rig_fetch(r, got, memory, sizeof(got));
		afd__device_free(r->dev, memory, sizeof(got));
	}
}

static void bytes_held_counts_memory_and_packed_matrices(void **state)
{
	struct rig *r = *state;
	struct afd__matrix m;
	void *memory;

	RIG_OK(afd__device_alloc(r->dev, 1000, "memory", &memory));
	assert_int_equal(atomic_load(&r->dev->bytes_held), 1000);
	RIG_OK(afd__matrix_create(r->dev, &m, 33, 10, AFD_DTYPE_BF16, NULL));
	assert_int_equal(atomic_load(&r->dev->bytes_held), 1000 + m.bytes);
	assert_true(m.bytes >= 33 * 10 * 2);
	afd__matrix_destroy(r->dev, &m);
	afd__device_free(r->dev, memory, 1000);
	assert_int_equal(atomic_load(&r->dev->bytes_held), 0);
}

static void memory_that_was_freed_is_given_again(void **state)
{
	struct rig *r = *state;
	void *memory[20];

	for (int round = 0; round < 50; round++) {
		for (int i = 0; i < 20; i++)
			RIG_OK(afd__device_alloc(r->dev,
				100000u * (1 + (unsigned)(i * 7 + round) % 11), "memory",
				&memory[i]));
		for (int i = 0; i < 20; i++)
			afd__device_free(r->dev, memory[(i * 7) % 20],
				100000u * (1 + (unsigned)((i * 7) % 20 * 7 + round) % 11));
	}
	assert_int_equal(atomic_load(&r->dev->bytes_held), 0);
}

static void count_tile(void *user)
{
	++*(unsigned *)user;
}

/* Of all threads of this process: a loaded machine does not make a beat late by this clock. */
static unsigned cpu_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
	return (unsigned)(t.tv_sec * 1000 + t.tv_nsec / 1000000);
}

/* On the CPU the thread that calls beats between tiles; elsewhere while it waits. */
static void a_long_operation_beats(void **state)
{
	enum { ROWS = 128, N = 1024, K = 1024 };
	struct rig *r = *state;
	struct afd__matrix w;
	unsigned n_tiles = 0, start;
	uint64_t ticket;
	void *x, *y;

	r->q.on_tile = count_tile;
	r->q.on_tile_user = &n_tiles;
	RIG_OK(afd__matrix_create(r->dev, &w, N, K, AFD_DTYPE_F32, NULL));
	RIG_OK(afd__device_alloc(r->dev, ROWS * K * 4, "x", &x));
	RIG_OK(afd__device_alloc(r->dev, ROWS * N * 4, "y", &y));
	struct afd__product_args a = {
		.x = x, .w = w, .y = y, .x_stride = K, .y_stride = N, .n_rows = ROWS
	};
	start = cpu_ms();
	for (int i = 0; i < 200 && cpu_ms() - start < 200; i++)
		RIG_OK(afd__product(&r->q, &a));
	RIG_OK(afd__queue_ticket(&r->q, &ticket));
	RIG_OK(afd__queue_wait(&r->q, ticket, 100000, "products"));
	assert_true(cpu_ms() - start >= 50);
	if (n_tiles < (cpu_ms() - start) / 50)
		fail_msg("%u beats in %u ms of computing", n_tiles, cpu_ms() - start);
	r->q.on_tile = NULL;
	afd__device_free(r->dev, x, ROWS * K * 4);
	afd__device_free(r->dev, y, ROWS * N * 4);
	afd__matrix_destroy(r->dev, &w);
}

/* ---- a backend that breaks ---- */

static int broken_calls;

static int broken_reached(struct afd__queue *q, uint64_t ticket)
{
	broken_calls++;
	return ticket < 5 ? (int)(ticket % 2) : afd__error(-EIO, "the device has burnt");
}

static void an_error_that_came_later_stays_with_its_text(void **state)
{
	const struct afd__device_ops ops = { .name = "broken", .reached = broken_reached };
	struct afd__device dev = { .ops = &ops, .name = "broken" };
	struct afd__queue q = { .dev = &dev, .fd = -1 };
	struct afd__copy_args copy = { 0 };
	uint64_t ticket;
	char byte[4];

	broken_calls = 0;
	assert_int_equal(afd__queue_reached(&q, 4), 0);
	assert_int_equal(afd__queue_reached(&q, 3), 1);
	assert_int_equal(afd__queue_wait(&q, 5, 0, "anything"), -EIO);
	afd__error(-EINVAL, "something else");
	assert_int_equal(afd__queue_reached(&q, 3), -EIO);
	assert_string_equal(afd_last_error(), "the device has burnt");
	assert_int_equal(afd__queue_ticket(&q, &ticket), -EIO);
	assert_int_equal(afd__copy(&q, &copy), -EIO);
	assert_int_equal(afd__queue_upload(&q, byte, byte, 4), -EIO);
	assert_int_equal(broken_calls, 3);
}

static void a_wait_that_fails_says_for_what_and_how_long(void **state)
{
	const struct afd__device_ops ops = { .name = "slow", .reached = broken_reached };
	struct afd__device dev = { .ops = &ops, .name = "slow" };
	unsigned n_tiles = 0, told_ms = UINT_MAX;
	struct afd__queue q = {
		.dev = &dev, .fd = -1, .on_tile = count_tile, .on_tile_user = &n_tiles
	};

	assert_int_equal(afd__queue_wait(&q, 4, -1, "layer 3"), -EAGAIN);
	assert_int_equal(n_tiles, 0);
	/* The best of some: a busy machine wakes late. */
	for (int i = 0; i < 5 && told_ms >= 130; i++) {
		n_tiles = 0;
		assert_int_equal(afd__queue_wait(&q, 4, 120, "layer 3"), -ETIMEDOUT);
		assert_int_equal(sscanf(afd_last_error(),
			"device slow: layer 3 is not done after %u ms", &told_ms), 1);
		assert_true(told_ms >= 120);
		assert_true(n_tiles >= 2);
	}
	assert_true(told_ms < 130);
	assert_int_equal(afd__queue_wait(&q, 3, -1, "layer 3"), 0);
}

/* ---- what only the deferred device shows ---- */

struct seam {
	afd_context *ctx;
	struct afd__device *dev;
	struct afd__queue q;
	void *memory;
};

/* Opens `deferred` with a variable of the environment; skips the test where that device is not
 * under test. */
static void seam_open(struct seam *s, const char *variable, const char *value)
{
	setenv(variable, value, 1);
	RIG_OK(afd_context_create(&s->ctx, NULL));
	RIG_OK(afd__device_open(&s->dev, s->ctx, "deferred"));
	RIG_OK(afd__queue_open(&s->q, s->dev));
	RIG_OK(afd__device_alloc(s->dev, 1 << 16, "memory", &s->memory));
	unsetenv(variable);
}

static void seam_close(struct seam *s)
{
	afd__device_free(s->dev, s->memory, 1 << 16);
	afd__queue_close(&s->q);
	afd__device_close(s->dev);
	afd_context_destroy(s->ctx);
}

static void operations_run_later_and_the_descriptor_tells(void **state)
{
	struct seam s;
	float x[4] = { 1, 2, 3, 4 }, got[4] = { 0 };
	uint64_t ticket;

	seam_open(&s, "AFD_DEFERRED_DELAY_US", "200000");
	struct pollfd watch = { .fd = s.q.fd, .events = POLLIN };
	for (int i = 0; i < 4; i++)
		RIG_OK(afd__queue_upload(&s.q, s.memory, x, sizeof(x)));
	RIG_OK(afd__queue_download(&s.q, got, s.memory, sizeof(got)));
	RIG_OK(afd__queue_ticket(&s.q, &ticket));
	assert_int_equal(afd__queue_reached(&s.q, ticket), 0);
	assert_int_equal(afd__queue_wait(&s.q, ticket, 1, "an upload"), -ETIMEDOUT);
	while (!afd__queue_reached(&s.q, ticket))
		assert_int_equal(poll(&watch, 1, 5000), 1);
	assert_memory_equal(got, x, sizeof(x));
	seam_close(&s);
}

static void a_full_queue_waits_for_room_and_beats(void **state)
{
	struct seam s;
	unsigned n_tiles = 0;
	uint64_t ticket;
	char got[64];

	seam_open(&s, "AFD_DEFERRED_DELAY_US", "300");
	s.q.on_tile = count_tile;
	s.q.on_tile_user = &n_tiles;
	for (int i = 0; i < 1500; i++) {
		memset(got, i & 0x7f, sizeof(got));
		RIG_OK(afd__queue_upload(&s.q, s.memory, got, sizeof(got)));
	}
	RIG_OK(afd__queue_download(&s.q, got, s.memory, sizeof(got)));
	RIG_OK(afd__queue_ticket(&s.q, &ticket));
	RIG_OK(afd__queue_wait(&s.q, ticket, 0, "uploads"));
	assert_int_equal(got[63], 1499 & 0x7f);
	assert_true(n_tiles >= 2);
	seam_close(&s);
}

static void an_operation_that_fails_later_breaks_the_queue_for_good(void **state)
{
	struct seam s;
	struct afd__copy_args copy;
	uint64_t ticket;

	seam_open(&s, "AFD_DEFERRED_FAIL_AT", "3");
	copy = (struct afd__copy_args){
		.dst = (char *)s.memory + 4096, .src = s.memory, .bytes = 64
	};
	for (int i = 0; i < 3; i++)
		RIG_OK(afd__copy(&s.q, &copy));
	ticket = 3;
	assert_int_equal(afd__queue_wait(&s.q, ticket, 0, "copies"), -EIO);
	assert_non_null(strstr(afd_last_error(), "operation 3"));
	assert_int_equal(afd__copy(&s.q, &copy), -EIO);
	assert_int_equal(afd__queue_ticket(&s.q, &ticket), -EIO);
	seam_close(&s);
}

static void closing_a_queue_runs_what_it_was_given(void **state)
{
	struct seam s;
	char got[64], x[64];

	seam_open(&s, "AFD_DEFERRED_DELAY_US", "20000");
	memset(x, 7, sizeof(x));
	RIG_OK(afd__queue_upload(&s.q, s.memory, x, sizeof(x)));
	RIG_OK(afd__queue_download(&s.q, got, s.memory, sizeof(got)));
	afd__queue_close(&s.q);
	assert_memory_equal(got, x, sizeof(x));
	afd__queue_close(&s.q);
	seam_close(&s);
}

static void a_child_of_fork_closes_without_its_parents_thread(void **state)
{
	struct seam s;
	int status;
	pid_t child;

	seam_open(&s, "AFD_DEFERRED_DELAY_US", "0");
	child = fork();
	if (!child) {
		alarm(20);
		afd__queue_close(&s.q);
		afd__device_close(s.dev);
		_exit(0);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
	seam_close(&s);
}

static void bad_values_of_its_variables_are_refused(void **state)
{
	const char *const bad[] = { "-1", "x", "10us", "1000000", "99999999999999999999999" };
	struct rig *r = *state;
	struct afd__queue q;

	for (size_t i = 0; i < 5; i++) {
		setenv("AFD_DEFERRED_DELAY_US", bad[i], 1);
		assert_int_equal(afd__queue_open(&q, r->dev), -EINVAL);
		assert_non_null(strstr(afd_last_error(), "AFD_DEFERRED_DELAY_US"));
		unsetenv("AFD_DEFERRED_DELAY_US");
	}
}

/* ---- modules that are refused ---- */

static void check_refused(
	afd_context *ctx, const char *dir, const char *name, int code, const char *word)
{
	const char *before = getenv("AFD_MODULE_DIR");
	char *kept = before ? strdup(before) : NULL;
	struct afd__device *dev = NULL;
	int rc;

	setenv("AFD_MODULE_DIR", dir, 1);
	rc = afd__device_open(&dev, ctx, name);
	if (kept)
		setenv("AFD_MODULE_DIR", kept, 1);
	else
		unsetenv("AFD_MODULE_DIR");
	free(kept);
	if (rc != code || dev || !strstr(afd_last_error(), word))
		fail_msg("%s in %s: %d, \"%s\"", name, dir, rc, afd_last_error());
}

static void a_module_that_is_missing_or_of_another_build_is_refused(void **state)
{
	struct rig *r = *state;
	const char *dir = getenv("AFD_TEST_MODULES");
	char long_dir[1100];

	if (!dir)
		fail_msg("AFD_TEST_MODULES is not set");
	memset(long_dir, 'a', sizeof(long_dir));
	long_dir[sizeof(long_dir) - 1] = 0;
	check_refused(r->ctx, "/nowhere", "deferred", -ENOSYS, "-Ddeferred");
	check_refused(r->ctx, "/nowhere", "cuda:0", -ENOSYS, "/nowhere/afd-cuda.so");
	check_refused(r->ctx, dir, "deferred", -EPROTO, "is of build \"another build\"");
	check_refused(r->ctx, dir, "cuda:0", -EPROTO, "no symbol afd_module_entry");
	check_refused(r->ctx, long_dir, "deferred", -EINVAL, "limit 1023");
}

int main(int argc, char **argv)
{
	const struct CMUnitTest promises[] = {
		RIG_TEST(reading_device_memory_on_the_host_dies_on_deferred_and_works_on_cpu),
		RIG_TEST(fresh_memory_is_poisoned_on_deferred),
		RIG_TEST(bytes_held_counts_memory_and_packed_matrices),
		RIG_TEST(memory_that_was_freed_is_given_again),
		RIG_TEST(a_long_operation_beats),
		cmocka_unit_test(an_error_that_came_later_stays_with_its_text),
		cmocka_unit_test(a_wait_that_fails_says_for_what_and_how_long),
		RIG_TEST(a_module_that_is_missing_or_of_another_build_is_refused),
	};
	/* Of a device whose operations run later; the CPU's have run when they return. */
	const struct CMUnitTest promises_later[] = {
		cmocka_unit_test(operations_run_later_and_the_descriptor_tells),
		cmocka_unit_test(a_full_queue_waits_for_room_and_beats),
		cmocka_unit_test(an_operation_that_fails_later_breaks_the_queue_for_good),
		cmocka_unit_test(closing_a_queue_runs_what_it_was_given),
		cmocka_unit_test(a_child_of_fork_closes_without_its_parents_thread),
		RIG_TEST(bad_values_of_its_variables_are_refused),
	};
	int status = RIG_RUN(promises);

	return status || !is_deferred() ? status : RIG_RUN(promises_later);
}
