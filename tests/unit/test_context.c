/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The context: structs of any version, errors, hooks, memory, the CPU variant, and a child of fork.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../lib/context/core.h"

static afd_context *ctx;
static struct afd_context_params params;

static int begin(void **state)
{
	unsetenv("AFD_ISA");
	ctx = NULL;
	params = (struct afd_context_params){ .size = sizeof(params) };
	return 0;
}

static int end(void **state)
{
	afd_context_destroy(ctx);
	return 0;
}

static void make(void)
{
	if (afd_context_create(&ctx, &params))
		fail_msg("%s", afd_last_error());
}

static void refuse(int code, const char *text)
{
	assert_int_equal(afd_context_create(&ctx, &params), code);
	if (!strstr(afd_last_error(), text))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), text);
	assert_null(ctx);
}

/* ---- structs of any version ---- */

struct old { size_t size; int32_t a; };
struct now { size_t size; int32_t a, b; int64_t c; };
struct later { size_t size; int32_t a, b; int64_t c, d; };

static void params_of_an_older_header_are_filled_with_zeros(void **state)
{
	struct { struct old old; char behind[64]; } src = { { sizeof(src.old), 7 }, { 0 } };
	struct now dst;

	memset(src.behind, 1, sizeof(src.behind));
	assert_int_equal(afd__params_copy(&dst, sizeof(dst), &src.old, "now"), 0);
	assert_int_equal(dst.a, 7);
	assert_int_equal(dst.c, 0);
}

static void params_of_a_newer_header_pass_when_their_tail_is_zero(void **state)
{
	struct later src = { .size = sizeof(src), .a = 7, .c = 9 };
	struct now dst;

	assert_int_equal(afd__params_copy(&dst, sizeof(dst), &src, "now"), 0);
	assert_int_equal(dst.c, 9);
}

static void a_field_of_a_newer_header_is_refused_with_its_byte(void **state)
{
	struct later src = { .size = sizeof(src), .d = 1 };
	struct now dst;

	assert_int_equal(afd__params_copy(&dst, sizeof(dst), &src, "now params"), -E2BIG);
	assert_string_equal(afd_last_error(), "now params: byte 24 is set, this version knows 24 bytes");
}

static void a_size_that_is_no_size_is_refused(void **state)
{
	struct now src = { .size = 4 }, dst;

	assert_int_equal(afd__params_copy(&dst, sizeof(dst), &src, "now"), -EINVAL);
	src.size = 1 << 20;
	assert_int_equal(afd__params_copy(&dst, sizeof(dst), &src, "now"), -EINVAL);
}

static void null_params_are_all_zero(void **state)
{
	struct now dst = { .a = 1 };

	assert_int_equal(afd__params_copy(&dst, sizeof(dst), NULL, "now"), 0);
	assert_int_equal(dst.a, 0);
}

static void out_structs_are_filled_as_far_as_they_reach(void **state)
{
	struct now src = { .a = 1, .b = 2, .c = 3 };
	struct { struct old old; int32_t canary; } small = { { sizeof(small.old), 0 }, 77 };
	struct later large = { .size = sizeof(large), .d = 5 };

	assert_int_equal(afd__params_give(&small.old, &src, sizeof(src), "now"), 0);
	assert_int_equal(small.old.a, 1);
	assert_int_equal(small.old.size, sizeof(small.old));
	assert_int_equal(small.canary, 77);
	assert_int_equal(afd__params_give(&large, &src, sizeof(src), "now"), 0);
	assert_int_equal(large.c, 3);
	assert_int_equal(large.d, 0);
}

/* ---- errors ---- */

static void an_error_has_a_prefix_put_before_it(void **state)
{
	assert_int_equal(afd__error(-EIO, "disk %d", 3), -EIO);
	assert_int_equal(afd__error_prefix(-ENOENT, "model %s", "m"), -ENOENT);
	assert_string_equal(afd_last_error(), "model m: disk 3");
}

static void an_error_may_quote_the_last_one(void **state)
{
	afd__error(-EIO, "first");
	afd__error(-EIO, "second, after %s", afd_last_error());
	assert_string_equal(afd_last_error(), "second, after first");
}

static void a_long_error_is_cut_at_511_bytes(void **state)
{
	char text[2000];

	memset(text, 'x', sizeof(text) - 1);
	text[sizeof(text) - 1] = '\0';
	afd__error(-EIO, "%s", text);
	assert_int_equal(strlen(afd_last_error()), 511);
	afd__error_prefix(-EIO, "%s", text);
	assert_int_equal(strlen(afd_last_error()), 511);
}

static void *fail_elsewhere(void *arg)
{
	afd__error(-EIO, "of another thread");
	return NULL;
}

static void an_error_belongs_to_its_thread(void **state)
{
	pthread_t thread;

	afd__error(-EIO, "of this thread");
	assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
	pthread_join(thread, NULL);
	assert_string_equal(afd_last_error(), "of this thread");
}

/* ---- creation ---- */

static void *no_alloc(void *user, size_t bytes, size_t alignment) { return NULL; }
static void free_nothing(void *user, void *memory, size_t bytes) { }
static void run_nothing(void *user, uint32_t n_tasks, afd_task task, void *arg) { }

static void half_a_pair_of_hooks_is_refused(void **state)
{
	params.allocator.alloc = no_alloc;
	refuse(-EINVAL, "allocator: half of a pair is set");
	params.allocator.alloc = NULL;
	params.allocator.free = free_nothing;
	refuse(-EINVAL, "allocator: half of a pair is set");
}

static void too_many_threads_are_refused_with_the_limit(void **state)
{
	params.n_threads = 1025;
	refuse(-EINVAL, "n_threads is 1025, limit 1024");
}

static void threads_beside_an_executor_are_refused(void **state)
{
	params.executor.run = run_nothing;
	params.n_threads = 2;
	refuse(-EINVAL, "n_threads is 2 beside executor.run");
}

static void an_unknown_log_level_is_refused(void **state)
{
	params.log.max_level = 5;
	refuse(-EINVAL, "log.max_level is 5, limit 4");
}

static void padding_must_be_zero(void **state)
{
	params._pad = 1;
	refuse(-EINVAL, "_pad is 1, must be 0");
}

static void a_context_needs_a_place(void **state)
{
	assert_int_equal(afd_context_create(NULL, NULL), -EINVAL);
}

/* ---- the CPU variant ---- */

static void afd_isa_forces_the_variant_in_c(void **state)
{
	setenv("AFD_ISA", "c", 1);
	make();
	unsetenv("AFD_ISA");
	assert_string_equal(afd_context_isa(ctx), "c");
}

static void no_context_has_no_variant(void **state)
{
	assert_string_equal(afd_context_isa(NULL), "?");
}

static void an_unknown_afd_isa_is_refused_with_the_names(void **state)
{
	setenv("AFD_ISA", "sse9", 1);
	refuse(-EINVAL, "AFD_ISA: \"sse9\" is none of c, avx2, avx512");
	unsetenv("AFD_ISA");
}

/* ---- hooks ---- */

static struct { size_t bytes, alignment; int n_allocs, n_frees; void *give; } asked;

static void *record_alloc(void *user, size_t bytes, size_t alignment)
{
	asked.bytes = bytes;
	asked.alignment = alignment;
	asked.n_allocs++;
	return asked.give;
}

static void record_free(void *user, void *memory, size_t bytes)
{
	assert_ptr_equal(memory, asked.give);
	assert_int_equal(bytes, asked.bytes);
	asked.n_frees++;
}

static void large_memory_comes_from_the_hosts_hooks(void **state)
{
	static _Alignas(256) char memory[512];
	void *large;

	params.allocator = (struct afd_allocator){ record_alloc, record_free, NULL };
	make();
	memset(&asked, 0, sizeof(asked));
	asked.give = memory;
	large = afd__large_alloc(ctx, 300, 256, "weights");
	assert_ptr_equal(large, memory);
	assert_int_equal(asked.alignment, 256);
	afd__large_free(ctx, large, 300);
	assert_int_equal(asked.n_frees, 1);
}

static void memory_of_another_alignment_is_refused(void **state)
{
	static _Alignas(256) char memory[512];

	params.allocator = (struct afd_allocator){ record_alloc, record_free, NULL };
	make();
	memset(&asked, 0, sizeof(asked));
	asked.give = memory + 64;
	assert_null(afd__large_alloc(ctx, 300, 256, "weights"));
	assert_non_null(strstr(afd_last_error(), "asked for alignment 256"));
	assert_int_equal(asked.n_frees, 1);
}

static void a_host_without_memory_is_an_error_with_the_bytes(void **state)
{
	params.allocator = (struct afd_allocator){ no_alloc, free_nothing, NULL };
	make();
	assert_null(afd__large_alloc(ctx, 300, 64, "KV pages"));
	assert_string_equal(afd_last_error(), "KV pages: the host's allocator has no 300 bytes");
}

static void large_memory_of_the_library_is_aligned_and_writable(void **state)
{
	static const size_t sizes[] = { 1, 4096, 5000, (2 << 20) - 1, 2 << 20, (5 << 20) + 3 };
	unsigned i;

	make();
	for (i = 0; i < 6; i++) {
		char *large = afd__large_alloc(ctx, sizes[i], 1 << 16, "test");

		assert_non_null(large);
		assert_int_equal((uintptr_t)large % (1 << 16), 0);
		memset(large, 1, sizes[i]);
		afd__large_free(ctx, large, sizes[i]);
	}
	assert_null(afd__large_alloc(ctx, SIZE_MAX - 10, 64, "too much"));
}

static void every_allocation_is_counted(void **state)
{
	uint64_t before;
	void *small, *large;

	make();
	before = ctx->n_allocations;
	small = afd__alloc(ctx, 3, 5);
	large = afd__large_alloc(ctx, 4096, 64, "test");
	assert_int_equal(ctx->n_allocations - before, 2);
	afd__free(small);
	afd__large_free(ctx, large, 4096);
	assert_null(afd__alloc(ctx, SIZE_MAX / 2, 3));
}

static char lines[400];

static void record_line(void *user, int32_t level, const char *text)
{
	size_t used = strlen(lines);

	snprintf(lines + used, sizeof(lines) - used, "%d %s;", level, text);
}

static void lines_up_to_the_level_are_logged(void **state)
{
	params.log = (struct afd_log){ record_line, NULL, 0 };
	make();
	lines[0] = '\0';
	afd__log(ctx, AFD_LOG_ERROR, "a %d", 1);
	afd__log(ctx, AFD_LOG_WARN, "b");
	afd__log(ctx, AFD_LOG_INFO, "c");
	assert_string_equal(lines, "1 a 1;2 b;");
}

/* ---- fork ---- */

static void a_child_of_fork_is_refused_and_may_destroy(void **state)
{
	int status;
	pid_t pid;

	params.n_threads = 3;
	make();
	pid = fork();
	if (!pid) {
		int rc = afd_context_metrics(ctx, NULL, 0);

		afd_context_destroy(ctx);
		_exit(rc == -EINVAL ? 0 : 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static void dtypes_have_names_and_sizes(void **state)
{
	assert_int_equal(afd_dtype_bytes(AFD_DTYPE_F32), 4);
	assert_int_equal(afd_dtype_bytes(AFD_DTYPE_BF16), 2);
	assert_int_equal(afd_dtype_bytes(AFD_DTYPE_FP8), 1);
	assert_int_equal(afd_dtype_bytes(0), 0);
	assert_string_equal(afd_dtype_name(AFD_DTYPE_F16), "f16");
	assert_string_equal(afd_dtype_name(5), "?");
	assert_string_equal(afd_dtype_name(-1), "?");
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)
	const struct CMUnitTest tests[] = {
		T(params_of_an_older_header_are_filled_with_zeros),
		T(params_of_a_newer_header_pass_when_their_tail_is_zero),
		T(a_field_of_a_newer_header_is_refused_with_its_byte),
		T(a_size_that_is_no_size_is_refused),
		T(null_params_are_all_zero),
		T(out_structs_are_filled_as_far_as_they_reach),
		T(an_error_has_a_prefix_put_before_it),
		T(an_error_may_quote_the_last_one),
		T(a_long_error_is_cut_at_511_bytes),
		T(an_error_belongs_to_its_thread),
		T(half_a_pair_of_hooks_is_refused),
		T(too_many_threads_are_refused_with_the_limit),
		T(threads_beside_an_executor_are_refused),
		T(an_unknown_log_level_is_refused),
		T(padding_must_be_zero),
		T(a_context_needs_a_place),
		T(afd_isa_forces_the_variant_in_c),
		T(no_context_has_no_variant),
		T(an_unknown_afd_isa_is_refused_with_the_names),
		T(large_memory_comes_from_the_hosts_hooks),
		T(memory_of_another_alignment_is_refused),
		T(a_host_without_memory_is_an_error_with_the_bytes),
		T(large_memory_of_the_library_is_aligned_and_writable),
		T(every_allocation_is_counted),
		T(lines_up_to_the_level_are_logged),
		T(a_child_of_fork_is_refused_and_may_destroy),
		T(dtypes_have_names_and_sizes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
