/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Groups rows by expert with a counting sort, and cuts products over all groups into parts of equal
 * cost (experts.h). It serves every variant: it touches a few numbers per entry.
 */
#include "experts.h"

#include <string.h>

#define ALIGNMENT 64
#define PAD       16 /* floats between rows, which else lie at multiples of 4 KiB */

/* Takes a piece of the scratch; with memory NULL it only counts. */
static void *take(char **memory, size_t *bytes, size_t n, size_t each)
{
	void *piece = *memory;
	size_t more;

	if (__builtin_mul_overflow(n, each, &more) || more > SIZE_MAX / 2 ||
		__builtin_add_overflow(*bytes, (more + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT,
			bytes)) {
		*bytes = SIZE_MAX / 2 + 1;
		return NULL;
	}
	if (*memory)
		*memory += (more + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
	return piece;
}

static size_t lay_out(struct afd_k_experts *e, char *memory)
{
	const struct afd__experts_args *a = e->a;
	size_t n_entries = (size_t)e->n_rows * a->top_k, bytes = ALIGNMENT;
	size_t n_groups = n_entries / AFD_K_EXPERTS_GROUP + a->gate_up.n_stack;

	if (memory)
		memory += -(uintptr_t)memory % ALIGNMENT;
	e->hidden = a->down.n;
	e->width = a->down.k;
	e->x_stride = (size_t)e->hidden + PAD;
	e->gate_up_stride = 2 * (size_t)e->width + PAD;
	e->counts = take(&memory, &bytes, a->gate_up.n_stack, sizeof(*e->counts));
	e->entries = take(&memory, &bytes, n_entries, sizeof(*e->entries));
	e->rows = take(&memory, &bytes, n_entries, sizeof(*e->rows));
	e->groups = take(&memory, &bytes, n_groups, sizeof(*e->groups));
	e->x = take(&memory, &bytes, n_entries, e->x_stride * sizeof(float));
	e->gate_up = take(&memory, &bytes, n_entries, e->gate_up_stride * sizeof(float));
	return bytes > SIZE_MAX / 2 ? SIZE_MAX : bytes;
}

size_t afd_k_experts_bytes(const struct afd__experts_args *a, uint32_t n_rows)
{
	struct afd_k_experts e = { .a = a, .n_rows = n_rows };

	return lay_out(&e, NULL);
}

uint32_t afd_k_experts_chunk(const struct afd__experts_args *a)
{
	uint32_t most = AFD_K_EXPERTS_ENTRIES / a->top_k, least = 1;

	if (most > a->n_rows)
		most = a->n_rows;
	if (afd_k_experts_bytes(a, most) <= a->scratch_bytes)
		return most;
	while (most - least > 1) {
		uint32_t middle = least + (most - least) / 2;

		if (afd_k_experts_bytes(a, middle) <= a->scratch_bytes)
			least = middle;
		else
			most = middle;
	}
	return least;
}

/* The place of a slot's expert in the stack; -1 when the slot does not count. */
static int64_t expert_of(const struct afd__experts_args *a, const int32_t *ids, uint32_t slot)
{
	int64_t expert = (int64_t)ids[slot] - a->first_expert;

	if (ids[slot] < 0 || expert < 0 || expert >= a->gate_up.n_stack)
		return -1;
	for (uint32_t i = 0; i < slot; i++) {
		if (ids[i] == ids[slot])
			return -1;
	}
	return expert;
}

static void add_groups(struct afd_k_experts *e, uint32_t expert, uint32_t n, uint32_t *cost)
{
	while (n) {
		uint32_t part = n < AFD_K_EXPERTS_GROUP ? n : AFD_K_EXPERTS_GROUP;

		e->groups[e->n_groups++] = (struct afd_k_expert_group){ .expert = expert,
			.first = e->n_entries,
			.n_entries = part,
			.cost_before = *cost };
		*cost += part + AFD_K_EXPERTS_WEIGHT;
		e->n_entries += part;
		n -= part;
	}
}

void afd_k_experts_plan(struct afd_k_experts *e, const struct afd__experts_args *a,
	uint32_t row0, uint32_t n_rows)
{
	const int32_t *ids = a->ids + (size_t)row0 * a->top_k; /* [n_rows][top_k] */
	uint32_t cost = 0;

	*e = (struct afd_k_experts){ .a = a, .row0 = row0, .n_rows = n_rows };
	lay_out(e, a->scratch);
	memset(e->counts, 0, a->gate_up.n_stack * sizeof(*e->counts));
	for (size_t row = 0; row < n_rows; row++) {
		for (uint32_t slot = 0; slot < a->top_k; slot++) {
			int64_t expert = expert_of(a, ids + row * a->top_k, slot);

			e->entries[row * a->top_k + slot] = (int32_t)expert;
			if (expert >= 0)
				e->counts[expert]++;
		}
	}
	for (uint32_t expert = 0; expert < a->gate_up.n_stack; expert++) {
		uint32_t n = e->counts[expert];

		e->counts[expert] = e->n_entries; /* now where its entries begin */
		add_groups(e, expert, n, &cost);
	}
	for (size_t i = 0; i < (size_t)n_rows * a->top_k; i++) {
		if (e->entries[i] < 0)
			continue;
		uint32_t entry = e->counts[e->entries[i]]++;

		e->rows[entry] = (uint32_t)(i / a->top_k);
		e->entries[i] = (int32_t)entry;
	}
}

static uint32_t cost_of(const struct afd_k_expert_group *group)
{
	return group->n_entries + AFD_K_EXPERTS_WEIGHT;
}

struct afd_k_experts_place afd_k_experts_cut(
	const struct afd_k_experts *e, uint32_t n_panels, uint32_t i, uint32_t n)
{
	const struct afd_k_expert_group *last = &e->groups[e->n_groups - 1];
	uint64_t total = ((uint64_t)last->cost_before + cost_of(last)) * n_panels,
		 cost = (uint64_t)((double)total * i / n);
	uint32_t low = 0, high = e->n_groups;

	if (i == n)
		return (struct afd_k_experts_place){ .group = e->n_groups };
	while (high - low > 1) {
		uint32_t middle = low + (high - low) / 2;

		if ((uint64_t)e->groups[middle].cost_before * n_panels <= cost)
			low = middle;
		else
			high = middle;
	}
	cost -= (uint64_t)e->groups[low].cost_before * n_panels;
	return (struct afd_k_experts_place){ .group = low,
		.panel = (uint32_t)(cost / cost_of(&e->groups[low])) };
}
