/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages are taken from a stack and given back to it. A step first reserves: new pages at the end of
 * the lists, and a copy in place of a last page that others share. The page that was shared stays
 * counted until the step has succeeded, so that two sharers which both write in one step both get
 * copies, and going back is exact whatever the other did.
 *
 * Nothing leaves a window before the step has succeeded, and then only what would not be seen either
 * after a rollback. Where the host states none, that is the step itself: so one that verifies tokens
 * can take them back by truncating. Of a long step, a prompt's, only the last rows can be: else a
 * prompt would stay whole.
 */
#include "kv.h"

#include <assert.h>
#include <string.h>

/* ---- life ---- */

/* Adds n * bytes to *total at an alignment of 8; where the part begins is written to *at. */
static int add_part(size_t *total, size_t *at, size_t n, size_t bytes)
{
	size_t part;

	*at = *total;
	if (__builtin_mul_overflow(n, bytes, &part) || __builtin_add_overflow(part, 7, &part) ||
		__builtin_add_overflow(*total, part & ~(size_t)7, total))
		return afd__error(-EINVAL, "KV books: %zu entries of %zu bytes overflow", n, bytes);
	return 0;
}

static int check_shape(const struct afd__kv_shape *shape)
{
	uint32_t g;

	assert(shape->n_groups && shape->page_size && shape->n_sequences && shape->max_positions);
	if (shape->max_positions > INT32_MAX)
		return afd__error(-EINVAL, "KV cache: max_positions is %u, limit %d",
			shape->max_positions, INT32_MAX);
	for (g = 0; g < shape->n_groups; g++) {
		uint64_t positions = (uint64_t)shape->n_pages[g] * shape->page_size;

		assert(positions);
		if (positions > INT32_MAX)
			return afd__error(-EINVAL,
				"KV cache: %u pages of %u positions, limit %d positions",
				shape->n_pages[g], shape->page_size, INT32_MAX);
		if (!shape->windows[g] && shape->max_positions > positions)
			return afd__error(-EINVAL, "KV cache: max_positions is %u, its pages hold %llu",
				shape->max_positions, (unsigned long long)positions);
	}
	return 0;
}

static int allocate(struct afd__kv *kv, const struct afd__kv_shape *s)
{
	size_t n_lists = (size_t)s->n_sequences * s->n_groups, n_counted = 0;
	size_t lists, kept, gone, sequences, stacks, counts, total = 0;
	uint32_t g;
	int rc;

	for (g = 0; g < s->n_groups; g++)
		n_counted += s->n_pages[g];
	rc = add_part(&total, &sequences, s->n_sequences, sizeof(*kv->sequences));
	rc = rc ? rc : add_part(&total, &kept, n_lists, sizeof(int32_t));
	rc = rc ? rc : add_part(&total, &gone, n_lists, sizeof(uint32_t));
	rc = rc ? rc : add_part(&total, &stacks, n_counted, sizeof(int32_t));
	rc = rc ? rc : add_part(&total, &counts, n_counted, sizeof(uint32_t));
	rc = rc ? rc
		: add_part(&total, &lists, n_lists, sizeof(int32_t) * (size_t)kv->list_capacity);
	if (rc)
		return rc;
	kv->groups = afd__alloc(kv->ctx, s->n_groups, sizeof(*kv->groups));
	kv->memory = kv->groups ? afd__large_alloc(kv->ctx, total, 64, "KV page lists") : NULL;
	if (!kv->memory)
		return -ENOMEM;
	kv->memory_bytes = total;
	kv->sequences = (void *)((char *)kv->memory + sequences);
	kv->kept = (void *)((char *)kv->memory + kept);
	kv->gone = (void *)((char *)kv->memory + gone);
	kv->lists = (void *)((char *)kv->memory + lists);
	for (g = 0, n_counted = 0; g < s->n_groups; g++) {
		kv->groups[g].free = (int32_t *)((char *)kv->memory + stacks) + n_counted;
		kv->groups[g].references = (uint32_t *)((char *)kv->memory + counts) + n_counted;
		kv->groups[g].n_pages = s->n_pages[g];
		kv->groups[g].window = s->windows[g];
		n_counted += s->n_pages[g];
	}
	return 0;
}

static void clear(struct afd__kv *kv)
{
	size_t n_lists = (size_t)kv->shape.n_sequences * kv->shape.n_groups;
	uint32_t g, i;

	memset(kv->sequences, 0, kv->shape.n_sequences * sizeof(*kv->sequences));
	memset(kv->kept, 0xff, n_lists * sizeof(*kv->kept));
	memset(kv->gone, 0, n_lists * sizeof(*kv->gone));
	for (g = 0; g < kv->shape.n_groups; g++) {
		struct afd__kv_group *group = &kv->groups[g];

		group->n_free = group->n_pages;
		/* The lowest page is taken first. */
		for (i = 0; i < group->n_pages; i++)
			group->free[i] = (int32_t)(group->n_pages - 1 - i);
		memset(group->references, 0, group->n_pages * sizeof(uint32_t));
	}
}

int afd__kv_create(struct afd__kv *kv, struct afd_context *ctx, const struct afd__kv_shape *shape)
{
	int rc = check_shape(shape);

	if (rc)
		return rc;
	memset(kv, 0, sizeof(*kv));
	kv->ctx = ctx;
	kv->shape = *shape;
	/* The caller's arrays; the groups have copies. */
	kv->shape.n_pages = kv->shape.windows = NULL;
	kv->list_capacity = afd__kv_pages(kv, shape->max_positions);
	rc = allocate(kv, shape);
	if (rc) {
		afd__kv_destroy(kv);
		return rc;
	}
	clear(kv);
	return 0;
}

void afd__kv_destroy(struct afd__kv *kv)
{
	afd__large_free(kv->ctx, kv->memory, kv->memory_bytes);
	afd__free(kv->groups);
	memset(kv, 0, sizeof(*kv));
}

/* ---- pages ---- */

static int32_t take(struct afd__kv_group *group)
{
	int32_t page;

	assert(group->n_free);
	page = group->free[--group->n_free];
	assert(!group->references[page]);
	group->references[page] = 1;
	return page;
}

static void release(struct afd__kv_group *group, int32_t page)
{
	if (page == AFD__PAGE_GONE)
		return;
	assert(group->references[page]);
	if (!--group->references[page])
		group->free[group->n_free++] = page;
}

/* From the last on, so that what was taken last lies on top of the stack again. */
static void release_tail(
	struct afd__kv_group *group, const int32_t *list, uint32_t first, uint32_t end)
{
	while (end-- > first)
		release(group, list[end]);
}

static uint32_t *gone_of(const struct afd__kv *kv, uint32_t sequence, uint32_t group)
{
	return &kv->gone[(size_t)sequence * kv->shape.n_groups + group];
}

/* How many pages at the front no position from `position` on sees. */
static uint32_t count_unseen(const struct afd__kv *kv, uint32_t group, uint32_t position)
{
	uint32_t window = kv->groups[group].window;

	return window && position >= window ? (position - window + 1) / kv->shape.page_size : 0;
}

/* ---- between steps ---- */

int afd__kv_check_end(const struct afd__kv *kv, uint32_t sequence, uint32_t n_positions)
{
	uint32_t n = afd__kv_pages(kv, n_positions), g;

	for (g = 0; g < kv->shape.n_groups; g++) {
		uint32_t gone = *gone_of(kv, sequence, g), first = count_unseen(kv, g, n_positions);

		/* first == n: it sees no page that it has. */
		if (gone > first && first < n)
			return afd__error(-EINVAL,
				"%u positions wanted, a window of %u then begins in page %u, and "
				"pages below %u are gone",
				n_positions, kv->groups[g].window, first, gone);
	}
	return 0;
}

void afd__kv_fork(struct afd__kv *kv, uint32_t from, uint32_t to, uint32_t n_positions)
{
	uint32_t n = afd__kv_pages(kv, n_positions), g, i;

	assert(n_positions <= kv->sequences[from].length && !kv->sequences[to].length);
	for (g = 0; g < kv->shape.n_groups; g++) {
		const int32_t *source = afd__kv_list(kv, from, g);
		int32_t *target = afd__kv_list(kv, to, g);
		uint32_t gone = *gone_of(kv, from, g);

		gone = gone < n ? gone : n;
		memcpy(target, source, n * sizeof(*target));
		for (i = gone; i < n; i++)
			kv->groups[g].references[source[i]]++;
		*gone_of(kv, to, g) = gone;
	}
	kv->sequences[to].length = n_positions;
}

void afd__kv_truncate(struct afd__kv *kv, uint32_t sequence, uint32_t n_positions)
{
	struct afd__kv_sequence *s = &kv->sequences[sequence];
	uint32_t n = afd__kv_pages(kv, n_positions), g;

	assert(n_positions <= s->length && !s->reserved);
	for (g = 0; g < kv->shape.n_groups; g++) {
		uint32_t *gone = gone_of(kv, sequence, g);

		release_tail(&kv->groups[g], afd__kv_list(kv, sequence, g), n,
			afd__kv_pages(kv, s->length));
		*gone = *gone < n ? *gone : n;
	}
	s->length = n_positions;
}

/* ---- a step ---- */

/* The last page is partly filled, will be written, and somebody else holds it too. */
static bool tail_is_shared(const struct afd__kv *kv, uint32_t sequence, uint32_t group)
{
	uint32_t length = kv->sequences[sequence].length;
	int32_t page;

	if (length % kv->shape.page_size == 0)
		return false;
	page = afd__kv_list(kv, sequence, group)[length / kv->shape.page_size];
	return kv->groups[group].references[page] > 1;
}

static int check_room(const struct afd__kv *kv, uint32_t sequence, uint32_t n_rows)
{
	uint32_t length = kv->sequences[sequence].length, n_new, g;

	if (n_rows > kv->shape.max_positions - length)
		return afd__error(-ENOSPC, "%u positions and %u more, max_positions is %u", length,
			n_rows, kv->shape.max_positions);
	n_new = afd__kv_pages(kv, length + n_rows) - afd__kv_pages(kv, length);
	for (g = 0; g < kv->shape.n_groups; g++) {
		uint32_t need = n_new + tail_is_shared(kv, sequence, g);

		if (need > kv->groups[g].n_free)
			return afd__error(-ENOSPC, "%u KV pages needed, %u free of %u", need,
				kv->groups[g].n_free, kv->groups[g].n_pages);
	}
	return 0;
}

int afd__kv_reserve(struct afd__kv *kv, uint32_t sequence, uint32_t n_rows)
{
	struct afd__kv_sequence *s = &kv->sequences[sequence];
	uint32_t first = afd__kv_pages(kv, s->length), end, g, i;
	int rc;

	assert(n_rows && !s->reserved);
	rc = check_room(kv, sequence, n_rows);
	if (rc)
		return rc;
	end = afd__kv_pages(kv, s->length + n_rows);
	for (g = 0; g < kv->shape.n_groups; g++) {
		int32_t *list = afd__kv_list(kv, sequence, g);

		if (tail_is_shared(kv, sequence, g)) {
			kv->kept[(size_t)sequence * kv->shape.n_groups + g] = list[first - 1];
			list[first - 1] = take(&kv->groups[g]);
		}
		for (i = first; i < end; i++)
			list[i] = take(&kv->groups[g]);
	}
	s->reserved = n_rows;
	return 0;
}

int afd__kv_copy(
	const struct afd__kv *kv, uint32_t sequence, uint32_t group, int32_t *from, int32_t *to)
{
	int32_t kept = kv->kept[(size_t)sequence * kv->shape.n_groups + group];

	if (kept < 0)
		return 0;
	*from = kept;
	*to = afd__kv_list(
		kv, sequence, group)[kv->sequences[sequence].length / kv->shape.page_size];
	return 1;
}

static uint32_t rollback(uint32_t n_rows, uint32_t stated)
{
	if (stated)
		return stated;
	return n_rows < AFD__ROLLBACK ? n_rows : AFD__ROLLBACK;
}

/* What neither a position to come sees, nor one that comes again. */
static void release_unseen(struct afd__kv *kv, uint32_t sequence, uint32_t group)
{
	const struct afd__kv_sequence *s = &kv->sequences[sequence];
	uint32_t length = s->length + s->reserved, back = rollback(s->reserved, kv->shape.rollback),
		 end = count_unseen(kv, group, length > back ? length - back : 0), i;
	uint32_t *gone = gone_of(kv, sequence, group);
	int32_t *list = afd__kv_list(kv, sequence, group);

	for (i = *gone; i < end; i++) {
		release(&kv->groups[group], list[i]);
		list[i] = AFD__PAGE_GONE;
	}
	*gone = i;
}

void afd__kv_commit(struct afd__kv *kv, uint32_t sequence)
{
	struct afd__kv_sequence *s = &kv->sequences[sequence];
	uint32_t g;

	for (g = 0; g < kv->shape.n_groups; g++) {
		int32_t *kept = &kv->kept[(size_t)sequence * kv->shape.n_groups + g];

		release(&kv->groups[g], *kept);
		*kept = -1;
		release_unseen(kv, sequence, g);
	}
	s->length += s->reserved;
	s->reserved = 0;
}

void afd__kv_restore(struct afd__kv *kv, uint32_t sequence)
{
	struct afd__kv_sequence *s = &kv->sequences[sequence];
	uint32_t first = afd__kv_pages(kv, s->length),
		 end = afd__kv_pages(kv, s->length + s->reserved), g;

	for (g = kv->shape.n_groups; g-- > 0;) {
		int32_t *kept = &kv->kept[(size_t)sequence * kv->shape.n_groups + g];
		int32_t *list = afd__kv_list(kv, sequence, g);

		release_tail(&kv->groups[g], list, first, end);
		if (*kept < 0)
			continue;
		release(&kv->groups[g], list[first - 1]);
		list[first - 1] = *kept;
		*kept = -1;
	}
	s->reserved = 0;
}

static uint32_t least_free(const struct afd__kv *kv, bool windowed)
{
	uint32_t least = UINT32_MAX, g;

	for (g = 0; g < kv->shape.n_groups; g++) {
		const struct afd__kv_group *group = &kv->groups[g];

		if (group->n_free < least && (group->window || !windowed))
			least = group->n_free;
	}
	return least == UINT32_MAX ? 0 : least;
}

uint32_t afd__kv_free(const struct afd__kv *kv)
{
	return least_free(kv, false);
}

uint32_t afd__kv_free_windowed(const struct afd__kv *kv)
{
	return least_free(kv, true);
}

/* Between steps a list holds at most the pages that window - 1 + rollback positions lie in, and in a
 * step those of its rows, too. A run of n positions lies in at most (n + 2 page_size - 2) /
 * page_size pages. Each sequence may keep one more that it copied. */
uint64_t afd__kv_most_pages(uint32_t window, uint32_t page_size, uint32_t n_sequences,
	uint32_t n_rows, uint32_t stated_rollback)
{
	uint64_t each = (uint64_t)window - 1 + rollback(n_rows, stated_rollback) +
			2 * (uint64_t)page_size - 2;

	/* Neither product exceeds 2^20 sequences of 2^33 positions. */
	return (n_sequences * each + n_rows) / page_size + n_sequences;
}
