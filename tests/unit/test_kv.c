/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The books of the KV cache, without a device: page lists, counts, copies, and going back. The
 * random walk holds every count against what the lists themselves say after each operation.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "../../lib/attn/kv.h"

static const uint32_t no_windows[2] = { 0, 0 };

static int create(struct afd__kv *kv, uint32_t n_groups, uint32_t n_pages, const uint32_t *windows,
	struct afd__kv_shape shape)
{
	const uint32_t all[2] = { n_pages, n_pages };
	struct afd_context *ctx;
	int rc;

	assert_int_equal(afd_context_create(&ctx, NULL), 0);
	shape.n_groups = n_groups;
	shape.n_pages = all;
	shape.windows = windows;
	rc = afd__kv_create(kv, ctx, &shape);
	if (rc)
		afd_context_destroy(ctx);
	return rc;
}

static struct afd__kv make(
	uint32_t n_groups, uint32_t n_pages, uint32_t page_size, uint32_t n_sequences)
{
	const struct afd__kv_shape shape = { .page_size = page_size,
		.n_sequences = n_sequences,
		.max_positions = n_pages * page_size };
	struct afd__kv kv;

	assert_int_equal(create(&kv, n_groups, n_pages, no_windows, shape), 0);
	return kv;
}

static void end(struct afd__kv *kv)
{
	struct afd_context *ctx = kv->ctx;

	afd__kv_destroy(kv);
	afd_context_destroy(ctx);
}

static void grow(struct afd__kv *kv, uint32_t sequence, uint32_t n_rows)
{
	assert_int_equal(afd__kv_reserve(kv, sequence, n_rows), 0);
	afd__kv_commit(kv, sequence);
}

static void pages_are_taken_only_when_a_page_is_full(void **state)
{
	struct afd__kv kv = make(1, 4, 4, 2);

	grow(&kv, 0, 3);
	assert_int_equal(afd__kv_free(&kv), 3);
	grow(&kv, 0, 1);
	assert_int_equal(afd__kv_free(&kv), 3);
	grow(&kv, 0, 1);
	assert_int_equal(afd__kv_free(&kv), 2);
	assert_int_equal(kv.sequences[0].length, 5);
	end(&kv);
}

static void every_group_has_its_own_pages(void **state)
{
	struct afd__kv kv = make(2, 4, 4, 2);

	grow(&kv, 0, 9);
	assert_int_equal(kv.groups[0].n_free, 1);
	assert_int_equal(kv.groups[1].n_free, 1);
	assert_ptr_not_equal(afd__kv_list(&kv, 0, 0), afd__kv_list(&kv, 0, 1));
	end(&kv);
}

static void a_fork_shares_pages_and_a_drop_of_one_keeps_them(void **state)
{
	struct afd__kv kv = make(1, 4, 4, 2);

	grow(&kv, 0, 8);
	afd__kv_fork(&kv, 0, 1, 6);
	assert_int_equal(afd__kv_free(&kv), 2);
	assert_memory_equal(afd__kv_list(&kv, 0, 0), afd__kv_list(&kv, 1, 0), 2 * sizeof(int32_t));
	afd__kv_truncate(&kv, 0, 0);
	assert_int_equal(afd__kv_free(&kv), 2);
	afd__kv_truncate(&kv, 1, 0);
	assert_int_equal(afd__kv_free(&kv), 4);
	end(&kv);
}

static void a_write_to_a_shared_page_copies_it(void **state)
{
	struct afd__kv kv = make(1, 4, 4, 2);
	int32_t from, to, shared;

	grow(&kv, 0, 6);
	shared = afd__kv_list(&kv, 0, 0)[1];
	afd__kv_fork(&kv, 0, 1, 6);
	assert_int_equal(afd__kv_reserve(&kv, 1, 1), 0);
	assert_int_equal(afd__kv_copy(&kv, 1, 0, &from, &to), 1);
	assert_int_equal(from, shared);
	assert_int_equal(to, afd__kv_list(&kv, 1, 0)[1]);
	assert_int_not_equal(to, shared);
	afd__kv_commit(&kv, 1);
	assert_int_equal(kv.groups[0].references[shared], 1);
	assert_int_equal(afd__kv_list(&kv, 0, 0)[1], shared);
	end(&kv);
}

static void a_write_behind_a_full_shared_page_copies_nothing(void **state)
{
	struct afd__kv kv = make(1, 4, 4, 2);
	int32_t from, to;

	grow(&kv, 0, 4);
	afd__kv_fork(&kv, 0, 1, 4);
	assert_int_equal(afd__kv_reserve(&kv, 1, 1), 0);
	assert_int_equal(afd__kv_copy(&kv, 1, 0, &from, &to), 0);
	assert_int_equal(afd__kv_list(&kv, 0, 0)[0], afd__kv_list(&kv, 1, 0)[0]);
	end(&kv);
}

static void both_sharers_that_write_in_one_step_get_copies(void **state)
{
	struct afd__kv kv = make(1, 4, 4, 2);
	int32_t shared;

	grow(&kv, 0, 2);
	shared = afd__kv_list(&kv, 0, 0)[0];
	afd__kv_fork(&kv, 0, 1, 2);
	assert_int_equal(afd__kv_reserve(&kv, 0, 1), 0);
	assert_int_equal(afd__kv_reserve(&kv, 1, 1), 0);
	assert_int_not_equal(afd__kv_list(&kv, 0, 0)[0], shared);
	assert_int_not_equal(afd__kv_list(&kv, 1, 0)[0], shared);
	afd__kv_commit(&kv, 0);
	afd__kv_commit(&kv, 1);
	assert_int_equal(kv.groups[0].references[shared], 0);
	assert_int_equal(afd__kv_free(&kv), 2);
	end(&kv);
}

static void a_restored_reservation_leaves_the_books_byte_for_byte(void **state)
{
	struct afd__kv kv = make(2, 12, 4, 3);
	char before[4096];

	grow(&kv, 0, 6);
	afd__kv_fork(&kv, 0, 1, 5);
	assert_true(kv.memory_bytes <= sizeof(before));
	memcpy(before, kv.memory, kv.memory_bytes);
	assert_int_equal(afd__kv_reserve(&kv, 0, 7), 0);
	assert_int_equal(afd__kv_reserve(&kv, 1, 4), 0);
	assert_int_equal(afd__kv_reserve(&kv, 2, 5), 0);
	afd__kv_restore(&kv, 2);
	afd__kv_restore(&kv, 1);
	afd__kv_restore(&kv, 0);
	/* Entries behind the end of a list are nobody's, so compare all before the lists, and the
	 * lists by length. */
	assert_memory_equal(before, kv.memory, (size_t)((char *)kv.lists - (char *)kv.memory));
	assert_memory_equal(before + ((char *)kv.lists - (char *)kv.memory),
		afd__kv_list(&kv, 0, 0), 2 * sizeof(int32_t));
	end(&kv);
}

static void too_few_pages_are_refused_and_change_nothing(void **state)
{
	struct afd__kv kv = make(1, 4, 4, 2);

	grow(&kv, 0, 6);
	afd__kv_fork(&kv, 0, 1, 6);
	/* A copy and two pages: three, of which two are free. */
	assert_int_equal(afd__kv_reserve(&kv, 1, 10), -ENOSPC);
	assert_non_null(strstr(afd_last_error(), "3 KV pages needed, 2 free of 4"));
	assert_int_equal(kv.sequences[1].reserved, 0);
	assert_int_equal(afd__kv_free(&kv), 2);
	assert_int_equal(afd__kv_reserve(&kv, 1, 6), 0);
	end(&kv);
}

static void more_than_max_positions_is_refused(void **state)
{
	const struct afd__kv_shape shape = {
		.page_size = 4, .n_sequences = 2, .max_positions = 9
	};
	struct afd__kv kv;

	assert_int_equal(create(&kv, 1, 8, no_windows, shape), 0);
	grow(&kv, 0, 8);
	assert_int_equal(afd__kv_reserve(&kv, 0, 2), -ENOSPC);
	assert_non_null(strstr(afd_last_error(), "max_positions is 9"));
	assert_int_equal(afd__kv_reserve(&kv, 0, 1), 0);
	end(&kv);
}

static void more_positions_than_slots_can_count_are_refused(void **state)
{
	const struct afd__kv_shape shape = {
		.page_size = 1u << 16, .n_sequences = 1, .max_positions = 1
	};
	struct afd__kv kv;

	assert_int_equal(create(&kv, 1, 1u << 20, no_windows, shape), -EINVAL);
}

/* ---- the walk ---- */

enum { WALK_SEQUENCES = 6, WALK_PAGES = 24, WALK_PAGE = 3 };

static void check_counts(const struct afd__kv *kv)
{
	uint32_t counts[WALK_PAGES], g, s, i, n_used;

	for (g = 0; g < kv->shape.n_groups; g++) {
		memset(counts, 0, sizeof(counts));
		for (s = 0; s < WALK_SEQUENCES; s++) {
			uint32_t n = afd__kv_pages(
				kv, kv->sequences[s].length + kv->sequences[s].reserved);
			int32_t kept = kv->kept[s * kv->shape.n_groups + g];

			for (i = 0; i < n; i++)
				counts[afd__kv_list(kv, s, g)[i]]++;
			if (kept >= 0)
				counts[kept]++;
		}
		for (n_used = i = 0; i < WALK_PAGES; i++) {
			assert_int_equal(counts[i], kv->groups[g].references[i]);
			n_used += counts[i] != 0;
		}
		assert_int_equal(n_used, WALK_PAGES - kv->groups[g].n_free);
	}
}

/* No page that a step writes may be seen by anybody else. */
static void check_written_pages_are_private(const struct afd__kv *kv, uint32_t s)
{
	uint32_t i = kv->sequences[s].length / WALK_PAGE, g;

	for (g = 0; g < kv->shape.n_groups; g++) {
		for (; i < afd__kv_pages(kv, kv->sequences[s].length + kv->sequences[s].reserved);
			i++)
			assert_int_equal(kv->groups[g].references[afd__kv_list(kv, s, g)[i]], 1);
	}
}

static void step(struct afd__kv *kv)
{
	uint32_t order[WALK_SEQUENCES], n = 0, s;
	bool succeeds = rand() % 3 != 0;

	for (s = 0; s < WALK_SEQUENCES; s++) {
		if (rand() % 2 && afd__kv_reserve(kv, s, 1 + (uint32_t)rand() % 7) == 0)
			order[n++] = s;
	}
	check_counts(kv);
	for (s = 0; s < n; s++)
		check_written_pages_are_private(kv, order[s]);
	while (n-- > 0) {
		if (succeeds)
			afd__kv_commit(kv, order[n]);
		else
			afd__kv_restore(kv, order[n]);
	}
}

static void counts_stay_exact_over_a_random_walk(void **state)
{
	struct afd__kv kv = make(2, WALK_PAGES, WALK_PAGE, WALK_SEQUENCES);
	int i;

	srand(7);
	for (i = 0; i < 20000; i++) {
		uint32_t a = (uint32_t)rand() % WALK_SEQUENCES,
			 b = (uint32_t)rand() % WALK_SEQUENCES;

		switch (rand() % 4) {
		case 0:
			afd__kv_truncate(&kv, a, (uint32_t)rand() % (kv.sequences[a].length + 1));
			break;
		case 1:
			if (a != b && !kv.sequences[b].length)
				afd__kv_fork(
					&kv, a, b, (uint32_t)rand() % (kv.sequences[a].length + 1));
			break;
		default:
			step(&kv);
		}
		check_counts(&kv);
	}
	for (i = 0; i < WALK_SEQUENCES; i++)
		afd__kv_truncate(&kv, (uint32_t)i, 0);
	assert_int_equal(afd__kv_free(&kv), WALK_PAGES);
	end(&kv);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(pages_are_taken_only_when_a_page_is_full),
		cmocka_unit_test(every_group_has_its_own_pages),
		cmocka_unit_test(a_fork_shares_pages_and_a_drop_of_one_keeps_them),
		cmocka_unit_test(a_write_to_a_shared_page_copies_it),
		cmocka_unit_test(a_write_behind_a_full_shared_page_copies_nothing),
		cmocka_unit_test(both_sharers_that_write_in_one_step_get_copies),
		cmocka_unit_test(a_restored_reservation_leaves_the_books_byte_for_byte),
		cmocka_unit_test(too_few_pages_are_refused_and_change_nothing),
		cmocka_unit_test(more_than_max_positions_is_refused),
		cmocka_unit_test(more_positions_than_slots_can_count_are_refused),
		cmocka_unit_test(counts_stay_exact_over_a_random_walk),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
