/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The steady state allocates nothing: every call of the library's objects to malloc and its kin,
 * and to mmap, is counted (the linker puts __wrap_ in front of them) over fifty steps of both
 * stages, after ten to get warm; of a model with experts over two ranks, with the gate on the
 * attention side; and of an attention group.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../lib/context/core.h"
#include "../support/ranks.h"

static atomic_int n_calls;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
int __real_posix_memalign(void **memory, size_t alignment, size_t bytes);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);

void *__wrap_malloc(size_t bytes)
{
	n_calls++;
	return __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
	n_calls++;
	return __real_calloc(n, bytes);
}

void *__wrap_realloc(void *memory, size_t bytes)
{
	n_calls++;
	return __real_realloc(memory, bytes);
}

void *__wrap_aligned_alloc(size_t alignment, size_t bytes)
{
	n_calls++;
	return __real_aligned_alloc(alignment, bytes);
}

int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes)
{
	n_calls++;
	return __real_posix_memalign(memory, alignment, bytes);
}

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset)
{
	n_calls++;
	return __real_mmap(at, bytes, protection, flags, fd, offset);
}

static const char DENSE[] = "f32-untied", ROUTED[] = "moe-f32";
enum { N_SEQUENCES = 4, WARM_STEPS = 10, STEADY_STEPS = 50 };

/* Four sequences that append one id each; pages of four positions, so that pages are taken too. */
static void run_steps(struct rig *rig, int n_steps, float *logits)
{
	struct afd_entry entries[N_SEQUENCES] = { 0 };
	int32_t ids[N_SEQUENCES] = { 1, 2, 3, 4 }, greedy[N_SEQUENCES];
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = N_SEQUENCES,
		.entry_bytes = sizeof(*entries),
		.logits = logits,
		.logits_rows = N_SEQUENCES,
		.greedy_ids = greedy,
		.greedy_rows = N_SEQUENCES };
	int i;

	for (i = 0; i < N_SEQUENCES; i++)
		entries[i] =
			(struct afd_entry){ .sequence = (uint64_t)i, .ids = &ids[i], .n_ids = 1 };
	while (n_steps-- > 0) {
		if (rig_step(rig, &batch))
			fail_msg("step: %s", afd_last_error());
		memcpy(ids, greedy, sizeof(ids));
	}
}

static void expect_no_allocation(const char *name, const char *address)
{
	struct rig_params params = { .address = address,
		.n_ep = address && !strcmp(name, ROUTED) ? 2 : 1,
		.lanes = 2,
		.wire_dtype = AFD_DTYPE_BF16,
		.n_threads = 2,
		.attn.page_size = 4 };
	struct golden golden;
	struct rig rig;
	uint64_t s, n_allocations;
	float *logits;
	int before;

	golden_open(&golden, name);
	params.checkpoint = golden.checkpoint;
	before = n_calls;
	rig_open(&rig, &params);
	assert_true(n_calls > before);
	logits = calloc(N_SEQUENCES * (size_t)rig.vocab, sizeof(*logits));
	for (s = 0; s < N_SEQUENCES; s++)
		assert_int_equal(afd_attn_add(rig.attn, s), 0);
	run_steps(&rig, WARM_STEPS, logits);
	before = n_calls;
	n_allocations = rig.ctx->n_allocations;
	run_steps(&rig, STEADY_STEPS, logits);
	assert_int_equal(n_calls - before, 0);
	assert_int_equal(rig.ctx->n_allocations - n_allocations, 0);
	rig_close(&rig);
	free(logits);
	golden_close(&golden);
}

/* The same ids whatever comes out, so that all ranks have the same batch. */
static void run_group_steps(struct ranks *ranks, int n_steps, float *const *logits)
{
	static const int32_t ids[N_SEQUENCES] = { 1, 2, 3, 4 };
	struct afd_entry entries[N_SEQUENCES] = { 0 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = entries,
		.n_entries = N_SEQUENCES,
		.entry_bytes = sizeof(*entries),
		.logits_rows = N_SEQUENCES };
	int i;

	for (i = 0; i < N_SEQUENCES; i++)
		entries[i] =
			(struct afd_entry){ .sequence = (uint64_t)i, .ids = &ids[i], .n_ids = 1 };
	while (n_steps-- > 0)
		ranks_step(ranks, &batch, logits);
}

static void fifty_steps_of_a_group_allocate_nothing_on_any_rank(void **state)
{
	struct ranks_params params = { .n_ranks = 2,
		.n_shards = 2,
		.lanes = 2,
		.gate = AFD_GATE_ATTENTION,
		.attn.page_size = 4 };
	struct golden golden;
	struct ranks ranks;
	float *logits[2];
	uint64_t s;
	int before;

	golden_open(&golden, ROUTED);
	params.checkpoint = golden.checkpoint;
	ranks_open(&ranks, &params);
	logits[0] = calloc(2 * N_SEQUENCES * (size_t)ranks.vocab, sizeof(float));
	logits[1] = logits[0] + N_SEQUENCES * (size_t)ranks.vocab;
	for (s = 0; s < N_SEQUENCES; s++)
		ranks_add(&ranks, s);
	run_group_steps(&ranks, WARM_STEPS, logits);
	before = n_calls;
	run_group_steps(&ranks, STEADY_STEPS, logits);
	assert_int_equal(n_calls - before, 0);
	ranks_close(&ranks);
	free(logits[0]);
	golden_close(&golden);
}

static void fifty_steps_in_one_process_allocate_nothing(void **state)
{
	expect_no_allocation(DENSE, NULL);
	expect_no_allocation(ROUTED, NULL);
}

static void fifty_steps_over_loop_allocate_nothing_on_either_side(void **state)
{
	expect_no_allocation(DENSE, "loop:allocations");
	expect_no_allocation(ROUTED, "loop:allocations");
}

static void fifty_steps_over_shm_allocate_nothing_on_either_side(void **state)
{
	char address[40];

	snprintf(address, sizeof(address), "shm:allocations-%d", (int)getpid());
	expect_no_allocation(DENSE, address);
	expect_no_allocation(ROUTED, address);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fifty_steps_in_one_process_allocate_nothing),
		cmocka_unit_test(fifty_steps_of_a_group_allocate_nothing_on_any_rank),
		cmocka_unit_test(fifty_steps_over_loop_allocate_nothing_on_either_side),
		cmocka_unit_test(fifty_steps_over_shm_allocate_nothing_on_either_side),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
