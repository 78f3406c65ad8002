/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages that leave sliding windows, without a device: when exactly, what a truncation can take back,
 * what forks keep, and how many pages a group can ever need. Of two groups the first sees all
 * positions and the second has the window.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/attn/kv.h"

enum { PAGE = 4, PAGES = 100, N_SEQUENCES = 5 };

static struct afd__kv make_with(
	uint32_t window, uint32_t page_size, uint32_t windowed_pages, uint32_t rollback)
{
	const uint32_t n_pages[2] = { PAGES, windowed_pages }, windows[2] = { 0, window };
	const struct afd__kv_shape shape = { 2, n_pages, windows, page_size, N_SEQUENCES,
		PAGES * page_size, rollback };
	struct afd_context *ctx;
	struct afd__kv kv;

	assert_int_equal(afd_context_create(&ctx, NULL), 0);
	assert_int_equal(afd__kv_create(&kv, ctx, &shape), 0);
	return kv;
}

static struct afd__kv make(uint32_t window, uint32_t page_size, uint32_t windowed_pages)
{
	return make_with(window, page_size, windowed_pages, 0);
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

/* Pages gone from the front of the windowed list; the rest must be there. */
static uint32_t gone(const struct afd__kv *kv, uint32_t sequence)
{
	uint32_t n = afd__kv_pages(kv, kv->sequences[sequence].length), first = 0, i;
	const int32_t *list = afd__kv_list(kv, sequence, 1);

	while (first < n && list[first] == AFD__PAGE_GONE)
		first++;
	for (i = first; i < n; i++)
		assert_true(list[i] >= 0 && kv->groups[1].references[list[i]]);
	return first;
}

/* ---- when ---- */

/* Position p is decoded; what it saw first is p - window + 1, and no page from there on may go. */
static void a_page_leaves_when_no_row_of_the_last_step_saw_it(void **state)
{
	static const uint32_t windows[] = { 1, 2, 3, 4, 5, 7, 8, 9, 16, 17 };
	uint32_t w, p;

	for (w = 0; w < sizeof(windows) / sizeof(*windows); w++) {
		struct afd__kv kv = make(windows[w], PAGE, PAGES);

		for (p = 0; p < 60; p++) {
			uint32_t first = p + 1 > windows[w] ? p + 1 - windows[w] : 0;

			grow(&kv, 0, 1);
			assert_int_equal(gone(&kv, 0), first / PAGE);
			assert_int_equal(afd__kv_free_windowed(&kv),
				PAGES - (p / PAGE + 1 - first / PAGE));
			assert_int_equal(kv.groups[0].n_free, PAGES - (p / PAGE + 1));
		}
		end(&kv);
	}
}

static void nothing_leaves_before_the_step_has_succeeded(void **state)
{
	struct afd__kv kv = make(8, PAGE, PAGES);
	char before[16384];

	grow(&kv, 0, 11);
	grow(&kv, 0, 1);
	assert_int_equal(gone(&kv, 0), 1);
	assert_true(kv.memory_bytes <= sizeof(before));
	memcpy(before, kv.memory, kv.memory_bytes);
	assert_int_equal(afd__kv_reserve(&kv, 0, 9), 0);
	assert_int_equal(gone(&kv, 0), 1);
	afd__kv_restore(&kv, 0);
	/* Entries behind the end of a list are nobody's. */
	assert_memory_equal(before, kv.memory, (size_t)((char *)kv.lists - (char *)kv.memory));
	assert_int_equal(gone(&kv, 0), 1);
	end(&kv);
}

static void a_prompt_leaves_at_once_but_for_what_can_be_taken_back(void **state)
{
	struct afd__kv kv = make(8, PAGE, PAGES);

	grow(&kv, 0, 300);
	assert_int_equal(gone(&kv, 0), (300 - AFD__ROLLBACK - 8 + 1) / PAGE);
	grow(&kv, 0, 1);
	assert_int_equal(gone(&kv, 0), (300 - 8 + 1) / PAGE);
	end(&kv);
}

/* ---- going back ---- */

static void the_last_step_can_be_taken_back_and_no_more(void **state)
{
	uint32_t length, rows;

	for (length = 9; length < 40; length++) {
		for (rows = 1; rows < 9; rows++) {
			struct afd__kv kv = make(8, PAGE, PAGES);

			grow(&kv, 0, length);
			grow(&kv, 0, rows);
			assert_int_equal(afd__kv_check_end(&kv, 0, length), 0);
			/* The page before is gone when the window begins with a page. */
			if (gone(&kv, 0) * PAGE == length - 8 + 1)
				assert_int_equal(afd__kv_check_end(&kv, 0, length - 1), -EINVAL);
			afd__kv_truncate(&kv, 0, length);
			grow(&kv, 0, 12);
			end(&kv);
		}
	}
}

static void a_stated_rollback_is_kept_whatever_the_steps_are(void **state)
{
	static const uint32_t rollbacks[] = { 1, 3, 10, 150 };
	uint32_t r, i;

	for (r = 0; r < 4; r++) {
		struct afd__kv kv = make_with(8, PAGE, PAGES, rollbacks[r]);

		for (i = 0; kv.sequences[0].length < 250; i++) {
			uint32_t length, back = rollbacks[r];

			grow(&kv, 0, 1 + i % 7);
			length = kv.sequences[0].length;
			back = back < length ? back : length;
			assert_int_equal(afd__kv_check_end(&kv, 0, length - back), 0);
			if (length - back >= 8)
				assert_int_equal(gone(&kv, 0), (length - back - 7) / PAGE);
		}
		end(&kv);
	}
}

static void going_back_behind_what_is_gone_is_refused_by_name(void **state)
{
	struct afd__kv kv = make(8, PAGE, PAGES);

	grow(&kv, 0, 30);
	grow(&kv, 0, 1); /* position 30 sees 23 .. 30: pages 0 .. 4 are gone */
	assert_int_equal(gone(&kv, 0), 5);
	assert_int_equal(afd__kv_check_end(&kv, 0, 27), 0);
	assert_int_equal(afd__kv_check_end(&kv, 0, 26), -EINVAL);
	assert_non_null(strstr(afd_last_error(),
		"26 positions wanted, a window of 8 then begins in page 4, and pages below 5 are "
		"gone"));
	assert_int_equal(afd__kv_check_end(&kv, 0, 1), -EINVAL);
	assert_int_equal(afd__kv_check_end(&kv, 0, 0), 0);
	afd__kv_truncate(&kv, 0, 0);
	assert_int_equal(afd__kv_free(&kv), PAGES);
	grow(&kv, 0, 3);
	assert_int_equal(gone(&kv, 0), 0);
	end(&kv);
}

static void a_window_of_one_needs_only_the_page_it_writes(void **state)
{
	struct afd__kv kv = make(1, PAGE, PAGES);

	grow(&kv, 0, 30);
	grow(&kv, 0, 1);
	assert_int_equal(gone(&kv, 0), 7);
	assert_int_equal(afd__kv_check_end(&kv, 0, 27), -EINVAL);
	assert_int_equal(afd__kv_check_end(&kv, 0, 24), 0);
	afd__kv_truncate(&kv, 0, 24);
	assert_int_equal(gone(&kv, 0), 6);
	grow(&kv, 0, 2);
	assert_int_equal(gone(&kv, 0), 6);
	end(&kv);
}

/* ---- sharing ---- */

static void a_page_that_a_fork_sees_stays_for_it(void **state)
{
	struct afd__kv kv = make(8, PAGE, PAGES);
	int32_t pages[3];
	uint32_t i;

	grow(&kv, 0, 12);
	afd__kv_fork(&kv, 0, 1, 12);
	memcpy(pages, afd__kv_list(&kv, 1, 1), sizeof(pages));
	for (i = 0; i < 12; i++)
		grow(&kv, 0, 1);
	assert_int_equal(gone(&kv, 0), 4);
	assert_int_equal(gone(&kv, 1), 0);
	assert_memory_equal(afd__kv_list(&kv, 1, 1), pages, sizeof(pages));
	assert_int_equal(kv.groups[1].references[pages[0]], 1);
	grow(&kv, 1, 1);
	assert_int_equal(gone(&kv, 1), 1);
	assert_int_equal(kv.groups[1].references[pages[0]], 0);
	end(&kv);
}

static void a_fork_takes_over_what_is_gone(void **state)
{
	struct afd__kv kv = make(8, PAGE, PAGES);

	grow(&kv, 0, 30);
	grow(&kv, 0, 1);
	assert_int_equal(afd__kv_check_end(&kv, 0, 28), 0);
	afd__kv_fork(&kv, 0, 1, 28);
	assert_int_equal(gone(&kv, 1), 5);
	afd__kv_truncate(&kv, 0, 0);
	assert_int_equal(gone(&kv, 1), 5);
	grow(&kv, 1, 5);
	afd__kv_truncate(&kv, 1, 0);
	assert_int_equal(kv.groups[1].n_free, PAGES);
	end(&kv);
}

/* ---- the walk ---- */

static void check_counts(const struct afd__kv *kv, uint32_t g)
{
	uint32_t counts[PAGES] = { 0 }, n_used = 0, s, i;

	for (s = 0; s < N_SEQUENCES; s++) {
		uint32_t n = afd__kv_pages(kv, kv->sequences[s].length + kv->sequences[s].reserved);
		int32_t kept = kv->kept[s * 2 + g];

		for (i = 0; i < n; i++) {
			int32_t page = afd__kv_list(kv, s, g)[i];

			assert_int_equal(page == AFD__PAGE_GONE, i < kv->gone[s * 2 + g]);
			if (page >= 0)
				counts[page]++;
		}
		if (kept >= 0)
			counts[kept]++;
	}
	for (i = 0; i < kv->groups[g].n_pages; i++) {
		assert_int_equal(counts[i], kv->groups[g].references[i]);
		n_used += counts[i] != 0;
	}
	assert_int_equal(n_used, kv->groups[g].n_pages - kv->groups[g].n_free);
}

static void step(struct afd__kv *kv, uint32_t n_rows)
{
	uint32_t order[N_SEQUENCES], n = 0, s;
	bool succeeds = rand() % 3 != 0;

	for (s = 0; s < N_SEQUENCES && n_rows; s++) {
		uint32_t rows = 1 + (uint32_t)rand() % n_rows;

		if (rand() % 2)
			continue;
		if (afd__kv_reserve(kv, s, rows) == 0)
			order[n++] = s;
		else /* the full group's pages, or the length: never the window's */
			assert_null(strstr(afd_last_error(), "of 27"));
		n_rows -= rows;
	}
	while (n-- > 0) {
		if (succeeds)
			afd__kv_commit(kv, order[n]);
		else
			afd__kv_restore(kv, order[n]);
	}
}

static void go_back(struct afd__kv *kv, uint32_t a, uint32_t b)
{
	uint32_t n = (uint32_t)rand() % (kv->sequences[a].length + 1);
	int rc = afd__kv_check_end(kv, a, n);

	if (rc)
		n = rand() % 4 ? kv->sequences[a].length : 0;
	if (rand() % 2)
		afd__kv_truncate(kv, a, n);
	else if (a != b && !kv->sequences[b].length)
		afd__kv_fork(kv, a, b, n);
}

/* The windowed group has just the pages that it is said to need at most. */
static void counts_stay_exact_and_the_most_pages_suffice_over_a_random_walk(void **state)
{
	enum { WINDOW = 7, ROWS = 9, WALK_PAGE = 6 };
	uint64_t most = afd__kv_most_pages(WINDOW, WALK_PAGE, N_SEQUENCES, ROWS, 0);
	struct afd__kv kv = make(WINDOW, WALK_PAGE, (uint32_t)most);
	uint32_t least = (uint32_t)most;
	int i;

	assert_int_equal(most, 27);
	srand(11);
	for (i = 0; i < 40000; i++) {
		if (rand() % 4)
			step(&kv, ROWS);
		else
			go_back(&kv, (uint32_t)rand() % N_SEQUENCES, (uint32_t)rand() % N_SEQUENCES);
		check_counts(&kv, 0);
		check_counts(&kv, 1);
		least = kv.groups[1].n_free < least ? kv.groups[1].n_free : least;
	}
	/* It was nearly used up, so a much larger number would not be needed. */
	assert_in_range(least, 0, 12);
	end(&kv);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_page_leaves_when_no_row_of_the_last_step_saw_it),
		cmocka_unit_test(nothing_leaves_before_the_step_has_succeeded),
		cmocka_unit_test(a_prompt_leaves_at_once_but_for_what_can_be_taken_back),
		cmocka_unit_test(the_last_step_can_be_taken_back_and_no_more),
		cmocka_unit_test(a_stated_rollback_is_kept_whatever_the_steps_are),
		cmocka_unit_test(going_back_behind_what_is_gone_is_refused_by_name),
		cmocka_unit_test(a_window_of_one_needs_only_the_page_it_writes),
		cmocka_unit_test(a_page_that_a_fork_sees_stays_for_it),
		cmocka_unit_test(a_fork_takes_over_what_is_gone),
		cmocka_unit_test(counts_stay_exact_and_the_most_pages_suffice_over_a_random_walk),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
