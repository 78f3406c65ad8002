/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Groups rows by expert (experts.h): a counting sort in one block, without atomics, so that entries
 * stand in the order of their rows. A warp counts for one expert at a time.
 */
#include "experts.h"

enum { THREADS = 1024, WARPS = THREADS / 32 };

/* The slot's expert in the stack; -1 when it is elsewhere, none, or stood in a slot before. */
GPU_FN int expert_of(const experts &e, unsigned row, unsigned slot)
{
	const int32_t *ids = e.ids + (size_t)row * e.top_k;
	int64_t expert = (int64_t)ids[slot] - e.first_expert;

	if (ids[slot] < 0 || expert < 0 || expert >= e.n_stack)
		return -1;
	for (unsigned i = 0; i < slot; i++) {
		if (ids[i] == ids[slot])
			return -1;
	}
	return (int)expert;
}

GPU_FN unsigned count_entries(const experts &e, int expert)
{
	unsigned n = e.n_rows * e.top_k, count = 0;

	for (unsigned base = 0; base < n; base += 32) {
		unsigned i = base + lane_id();

		count += count_bits(warp_ballot(i < n && e.entries[i] == expert));
	}
	return count;
}

/* Sum of v over the lanes before this one; *all over all lanes. */
GPU_FN unsigned sum_before(unsigned v, unsigned *all)
{
	unsigned sum = v;

	GPU_UNROLL
	for (unsigned step = 1; step < 32; step *= 2) {
		unsigned other = shuffle(sum, lane_id() - step);

		if (lane_id() >= step)
			sum += other;
	}
	*all = shuffle(sum, 31);
	return sum - v;
}

/* counts [n_stack] become where each expert's entries begin; its tasks are written. */
GPU_FN void place_experts(const experts &e, uint32_t *counts)
{
	unsigned n_entries = 0, n_tasks = 0;

	for (unsigned base = 0; base < e.n_stack; base += 32) {
		unsigned i = base + lane_id(), count = i < e.n_stack ? counts[i] : 0, all;
		unsigned first = n_entries + sum_before(count, &all);

		n_entries += all;
		unsigned n = (count + e.task_rows - 1) / e.task_rows;
		unsigned task = n_tasks + sum_before(n, &all);
		n_tasks += all;
		for (unsigned j = 0; j < n; j++)
			e.tasks[task + j] = { i, first + j * e.task_rows,
				least(count - j * e.task_rows, e.task_rows) };
		if (i < e.n_stack)
			e.first[i] = first;
	}
	if (lane_id() == 0) {
		*e.n_entries = n_entries;
		*e.n_tasks = n_tasks;
	}
}

/* Entries of one expert, in the order of their slots; `found` gets their numbers. */
GPU_FN void place_entries(const experts &e, int expert, int32_t *found)
{
	unsigned n = e.n_rows * e.top_k, at = e.first[expert];

	for (unsigned base = 0; base < n; base += 32) {
		unsigned i = base + lane_id();
		bool mine = i < n && e.entries[i] == expert;
		unsigned mask = warp_ballot(mine),
			 before = count_bits(mask & ((1u << lane_id()) - 1));

		if (mine) {
			e.rows[at + before] = i / e.top_k;
			found[i] = (int32_t)(at + before);
		}
		at += count_bits(mask);
	}
}

GPU_KERNEL(THREADS) plan_kernel(experts e, int32_t *found)
{
	GPU_DYNAMIC_SHARED(memory);
	uint32_t *counts = (uint32_t *)memory; /* [n_stack] */
	unsigned n = e.n_rows * e.top_k;

	for (unsigned i = thread_x(); i < n; i += THREADS) {
		e.entries[i] = expert_of(e, i / e.top_k, i % e.top_k);
		found[i] = -1;
	}
	barrier();
	for (unsigned expert = warp_id(); expert < e.n_stack; expert += WARPS) {
		unsigned count = count_entries(e, (int)expert);

		if (lane_id() == 0)
			counts[expert] = count;
	}
	barrier();
	if (warp_id() == 0)
		place_experts(e, counts);
	barrier();
	for (unsigned expert = warp_id(); expert < e.n_stack; expert += WARPS) {
		if (counts[expert])
			place_entries(e, (int)expert, found);
	}
}

int experts_plan(const struct afd_gpu *gpu, const experts &e)
{
	return gpu_launch(gpu, "experts_plan", plan_kernel, { 1, 1, 1 }, THREADS,
		(size_t)e.n_stack * sizeof(uint32_t), e, e.entries + (size_t)e.n_rows * e.top_k);
}
