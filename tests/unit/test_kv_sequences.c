/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The table from the host's sequence ids to indices, held against an array of what it should hold.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#include "../../lib/attn/sequences.h"

static void an_added_id_is_found_and_a_removed_one_is_not(void **state)
{
	struct afd__sequences table;
	int index;

	assert_int_equal(afd__sequences_create(&table, NULL, 2), 0);
	index = afd__sequences_add(&table, UINT64_MAX);
	assert_true(index >= 0);
	assert_int_equal(afd__sequences_find(&table, UINT64_MAX), index);
	assert_int_equal(afd__sequences_find(&table, 0), -ENOENT);
	afd__sequences_remove(&table, (uint32_t)index);
	assert_int_equal(afd__sequences_find(&table, UINT64_MAX), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "18446744073709551615"));
	afd__sequences_destroy(&table);
}

static void an_id_stands_once_and_the_capacity_holds(void **state)
{
	struct afd__sequences table;

	assert_int_equal(afd__sequences_create(&table, NULL, 2), 0);
	assert_true(afd__sequences_add(&table, 5) >= 0);
	assert_int_equal(afd__sequences_add(&table, 5), -EEXIST);
	assert_true(afd__sequences_add(&table, 6) >= 0);
	assert_int_equal(afd__sequences_add(&table, 7), -ENOSPC);
	assert_non_null(strstr(afd_last_error(), "max_sequences is 2"));
	assert_int_equal(table.n, 2);
	afd__sequences_destroy(&table);
}

enum { CAPACITY = 37, IDS = 90 };

static void the_table_agrees_with_an_array_over_a_random_walk(void **state)
{
	int index_of[IDS], i, id;
	struct afd__sequences table;

	memset(index_of, 0xff, sizeof(index_of));
	assert_int_equal(afd__sequences_create(&table, NULL, CAPACITY), 0);
	srand(3);
	for (i = 0; i < 100000; i++) {
		id = rand() % IDS;
		if (index_of[id] >= 0) {
			afd__sequences_remove(&table, (uint32_t)index_of[id]);
			index_of[id] = -1;
		} else if (table.n < CAPACITY) {
			index_of[id] = afd__sequences_add(&table, (uint64_t)id);
			assert_in_range(index_of[id], 0, CAPACITY - 1);
		}
		id = rand() % IDS;
		assert_int_equal(afd__sequences_find(&table, (uint64_t)id),
			index_of[id] >= 0 ? index_of[id] : -ENOENT);
	}
	afd__sequences_destroy(&table);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(an_added_id_is_found_and_a_removed_one_is_not),
		cmocka_unit_test(an_id_stands_once_and_the_capacity_holds),
		cmocka_unit_test(the_table_agrees_with_an_array_over_a_random_walk),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
