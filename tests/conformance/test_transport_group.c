/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention groups: sums and gathered rows that do not depend on who comes first, and ranks that
 * disagree about what is to be done.
 */
#include "group_rig.h"

#include <stdio.h>

/* ---- sums ---- */

static void sums_are_those_of_rank_order_whoever_is_first(void **state)
{
	static const uint32_t rows[] = { 1, 4, 5, ROWS_MAX };

	for (uint32_t n = 2; n <= RANKS_MAX; n += 2) {
		make_group(n, 0);
		for (uint32_t first = 0; first < n * 4; first++) {
			uint32_t n_rows = rows[first / n];

			fill_partials(n, 0, first);
			begin_all(n, n_rows);
			/* Those before `first` come late, when the others have waited. */
			for (uint32_t k = 0; k < n; k++) {
				struct rank *rank = &ranks[(first + k) % n];

				assert_int_equal(start(rank, AFD__REDUCE, 0, 1, n_rows), 0);
				for (int i = 0; i < 4; i++)
					assert_true(afd__exchange_progress(rank->net) >= 0);
			}
			finish_all(n, 0, first);
			expect_sums(n, 0, n_rows, first);
		}
		end_group(n);
	}
}

static void rows_of_all_ranks_are_gathered_also_when_some_have_none(void **state)
{
	static const uint32_t rows[] = { 1, 3, 4, 10, ROWS_MAX };

	make_group(4, 0);
	for (size_t k = 0; k < sizeof(rows) / sizeof(rows[0]); k++) {
		uint32_t n_rows = rows[k];

		begin_all(4, n_rows);
		for (uint32_t r = 0; r < 4; r++) {
			float *own = ranks[r].lanes[1].own;

			memset(own, 0, ROWS_MAX * HIDDEN * sizeof(float));
			for (uint32_t i = r * n_rows / 4 * HIDDEN; i < (r + 1) * n_rows / 4 * HIDDEN; i++)
				own[i] = (float)(i + 1);
			assert_int_equal(start(&ranks[r], AFD__GATHER, 1, 2, n_rows), 0);
		}
		finish_all(4, 1, 0);
		for (uint32_t r = 0; r < 4; r++) {
			for (uint32_t i = 0; i < n_rows * HIDDEN; i++)
				assert_true(ranks[r].lanes[1].own[i] == (float)(i + 1));
		}
	}
	end_group(4);
}

static void fills_and_drains_that_take_their_time_change_nothing(void **state)
{
	make_group(2, 0);
	for (uint32_t r = 0; r < 2; r++) {
		for (uint32_t lane = 0; lane < LANES; lane++)
			ranks[r].lanes[lane].delay = 1 + (int)(r + lane);
	}
	for (uint32_t salt = 0; salt < 6; salt++) {
		begin_all(2, ROWS_MAX);
		for (uint32_t lane = 0; lane < LANES; lane++) {
			fill_partials(2, lane, salt + 7 * lane);
			for (uint32_t r = 0; r < 2; r++)
				assert_int_equal(
					start(&ranks[r], AFD__REDUCE, lane, salt % LAYERS, ROWS_MAX), 0);
		}
		for (uint32_t lane = 0; lane < LANES; lane++)
			finish_all(2, lane, salt % 2);
		for (uint32_t lane = 0; lane < LANES; lane++)
			expect_sums(2, lane, ROWS_MAX, salt + 7 * lane);
	}
	end_group(2);
}

static void an_operation_without_rows_or_without_others_is_done_at_once(void **state)
{
	struct server server;
	struct rank alone = { 0 };

	make_group(2, 0);
	begin_all(2, 0);
	assert_int_equal(start(&ranks[0], AFD__REDUCE, 0, 0, 0), 0);
	assert_int_equal(afd__group_done(ranks[0].net, 0), 1);
	end_group(2);
	server_start(&server, NULL);
	alone.net = join(&server, NULL);
	assert_int_equal(begin_step(alone.net, 3), 0);
	assert_int_equal(start(&alone, AFD__GATHER, 0, 0, 3), 0);
	assert_int_equal(afd__group_done(alone.net, 0), 1);
	afd_transport_destroy(alone.net);
	server_stop(&server);
}

static void ranks_share_ffn_peers_of_which_each_sees_its_own_rows(void **state)
{
	struct afd_transport_params params[2];
	struct server server;
	const char *address = server.address;
	float x[8 * HIDDEN], y[8 * HIDDEN];

	memset(ranks, 0, sizeof(ranks));
	rig_address(group);
	server_start(&server, NULL);
	for (uint32_t i = 0; i < 2; i++) {
		params[i] = params_of(i, 2);
		params[i].connect = &address;
		params[i].n_connect = 1;
		make_rank(i, &params[i]);
	}
	join_all(2);
	begin_all(2, 7);
	for (uint32_t i = 0; i < 2; i++) {
		struct afd_frame frame = frame_of(1, 0, 3 + i, x, y);

		fill_rows(x, 3 + i, (int)i);
		assert_int_equal(start(&ranks[i], AFD__REDUCE, 1, 1, 7), 0);
		assert_int_equal(afd_transport_dispatch(ranks[i].net, &frame), 0);
		assert_int_equal(collect_within(ranks[i].net, 0, 2000), 1);
		expect_rows(x, y, 3 + i, 1);
	}
	finish_all(2, 1, 0);
	end_group(2);
	server_stop(&server);
}

/* ---- ranks that disagree ---- */

struct quarrel {
	const char *name;
	uint32_t type, layer, rows;
	const char *text;
};

static void each_rank_may_have_an_address_of_its_own(void **state)
{
	char addresses[3][96], list[3 * 96];
	struct afd_transport_params params = params_of(2, 3);
	afd_transport *net;

	for (int i = 0; i < 3; i++)
		rig_address(addresses[i]);
	snprintf(list, sizeof(list), "%s,%s,%s", addresses[0], addresses[1], addresses[2]);
	for (uint32_t i = 3; i--;) {
		params = params_of(i, 3);
		params.group = list;
		make_rank(i, &params);
	}
	join_all(3);
	fill_partials(3, 0, 1);
	begin_all(3, ROWS_MAX);
	for (uint32_t r = 0; r < 3; r++)
		assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, ROWS_MAX), 0);
	finish_all(3, 0, 1);
	expect_sums(3, 0, ROWS_MAX, 1);
	end_group(3);
	snprintf(list, sizeof(list), "%s,%s", addresses[0], addresses[1]);
	rig_secret(&params);
	expect_error(afd_transport_create(&net, client_ctx, &rig_contract, &params), -EINVAL,
		"group has 2 addresses, must have one, or one for each of 3 ranks");
}

static void ranks_that_are_not_at_the_same_are_both_named(void **state)
{
	static const struct quarrel cases[] = {
		{ "operation", AFD__GATHER, 1, 8, "rank 1 sent gather of step 1, layer 1" },
		{ "layer", AFD__REDUCE, 2, 8, "rank 1 sent reduce of step 1, layer 2" },
		{ "rows", AFD__REDUCE, 1, 3, "with 3 rows; rank 0 is at reduce of step 1, layer 1" },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		make_group(2, 0);
		begin_all(2, 8);
		assert_int_equal(start(&ranks[0], AFD__REDUCE, 0, 1, 8), 0);
		assert_int_equal(
			start(&ranks[1], (uint8_t)cases[i].type, 0, cases[i].layer, cases[i].rows), 0);
		assert_true(afd__exchange_progress(ranks[1].net) >= 0);
		expect_error(finish(&ranks[0], 0, 2000), -EPROTO, cases[i].text);
		end_group(2);
	}
}

static void ranks_with_other_rows_in_a_lane_are_both_named(void **state)
{
	make_group(2, 0);
	assert_int_equal(begin(&ranks[0], 8, 0), 0);
	assert_int_equal(begin(&ranks[1], 0, 8), 0);
	assert_int_equal(start(&ranks[0], AFD__REDUCE, 0, 0, 8), 0);
	expect_error(finish(&ranks[0], 0, 2000), -EPROTO,
		"in step 1 lane 0 has 0 rows at rank 1, 8 at rank 0");
	end_group(2);
}

static void a_rank_that_is_a_step_ahead_is_named(void **state)
{
	make_group(2, 0);
	begin_all(2, 2);
	assert_int_equal(begin(&ranks[1], 2, 2), 0);
	assert_int_equal(start(&ranks[0], AFD__REDUCE, 0, 0, 2), 0);
	expect_error(finish(&ranks[0], 0, 2000), -EPROTO, "rank 1 is in step 2, rank 0 in step 1");
	end_group(2);
}

/* As finish, but the others are moved, too: what sockets that hold next to nothing did not take of
 * the culprit's message goes out when it is polled. */
static int finish_among(uint32_t n, uint32_t r)
{
	uint64_t until = now_ms() + PATIENCE_MS;
	int rc;

	while (!(rc = afd__group_done(ranks[r].net, 0))) {
		if (now_ms() > until)
			fail_msg("rank %u is not done after %d ms", r, PATIENCE_MS);
		for (uint32_t i = 0; i < n; i++)
			(void)afd__exchange_progress(ranks[i].net);
	}
	return rc;
}

static void a_cancelled_step_ends_on_all_ranks_and_the_next_one_is_clean(void **state)
{
	make_group(4, 0);
	for (uint32_t round = 0; round < 5; round++) {
		uint32_t culprit = round % 4;

		begin_all(4, ROWS_MAX);
		for (uint32_t r = 0; r < 4; r++) {
			if (r == culprit && round % 2)
				continue;
			assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, ROWS_MAX), 0);
			assert_true(afd__exchange_progress(ranks[r].net) >= 0);
		}
		assert_int_equal(afd__exchange_cancel(ranks[culprit].net, NULL), 0);
		for (uint32_t r = 0; r < 4; r++) {
			if (r == culprit)
				continue;
			expect_error(finish_among(4, r), -ECANCELED, "cancelled step");
			assert_int_equal(afd__exchange_cancel(ranks[r].net, NULL), 0);
		}
		fill_partials(4, 0, round);
		begin_all(4, ROWS_MAX);
		for (uint32_t r = 0; r < 4; r++)
			assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, ROWS_MAX), 0);
		finish_all(4, 0, round % 4);
		expect_sums(4, 0, ROWS_MAX, round);
	}
	end_group(4);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(sums_are_those_of_rank_order_whoever_is_first),
		RIG_TEST(rows_of_all_ranks_are_gathered_also_when_some_have_none),
		RIG_TEST(fills_and_drains_that_take_their_time_change_nothing),
		RIG_TEST(an_operation_without_rows_or_without_others_is_done_at_once),
		RIG_TEST(ranks_share_ffn_peers_of_which_each_sees_its_own_rows),
		RIG_TEST(each_rank_may_have_an_address_of_its_own),
		RIG_TEST(ranks_that_are_not_at_the_same_are_both_named),
		RIG_TEST(ranks_with_other_rows_in_a_lane_are_both_named),
		RIG_TEST(a_rank_that_is_a_step_ahead_is_named),
		RIG_TEST(a_cancelled_step_ends_on_all_ranks_and_the_next_one_is_clean),
	};
	return RIG_RUN(argc, argv, tests);
}
