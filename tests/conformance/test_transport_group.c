/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Attention groups: sums and gathered rows that do not depend on who comes first, ranks that
 * disagree, and ranks that end. All ranks live in this thread and are moved on in turn, so that the
 * order is the test's; a rank that is killed has a process of its own.
 */
#include "transport_rig.h"

#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../lib/transport/net.h"

enum { RANKS_MAX = 4, ROWS_MAX = 21, LANES = 2 };

/* What the stage of one rank has in one lane. */
struct work {
	struct rank *rank;
	float own[ROWS_MAX * HIDDEN], all[ROWS_MAX * HIDDEN];
	int delay, filling, draining; /* polls until a fill or drain is done; 0: at once */
};

struct rank {
	afd_transport *net;
	uint32_t index;
	struct work lanes[LANES];
};

static struct rank ranks[RANKS_MAX];
static char group[96];

/* ---- the stage ---- */

static int stage_fill(void *user, uint32_t lane, uint32_t row0, uint32_t n_rows, float *slot)
{
	struct work *w = &((struct rank *)user)->lanes[lane];

	assert_int_equal(w->filling, 0);
	memcpy(slot, w->own + row0 * HIDDEN, n_rows * HIDDEN * sizeof(float));
	w->filling = w->delay;
	return !w->filling;
}

static int stage_filled(void *user, uint32_t lane)
{
	return !--((struct rank *)user)->lanes[lane].filling;
}

static int add_drain(void *user, uint32_t lane, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	struct work *w = &((struct rank *)user)->lanes[lane];

	assert_int_equal(w->draining, 0);
	assert_int_equal(!slot, rank == ((struct rank *)user)->index);
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++) {
		float *sum = &w->all[row0 * HIDDEN + i];

		*sum = (rank ? *sum : 0.0f) + (slot ? slot[i] : w->own[row0 * HIDDEN + i]);
	}
	w->draining = w->delay;
	return !w->draining;
}

static int copy_drain(void *user, uint32_t lane, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	struct work *w = &((struct rank *)user)->lanes[lane];

	assert_int_equal(w->draining, 0);
	assert_int_not_equal(rank, ((struct rank *)user)->index);
	memcpy(w->own + row0 * HIDDEN, slot, n_rows * HIDDEN * sizeof(float));
	w->draining = w->delay;
	return !w->draining;
}

static int stage_drained(void *user, uint32_t lane)
{
	return !--((struct rank *)user)->lanes[lane].draining;
}

static struct afd__group_io io_of(struct rank *rank, uint8_t type)
{
	return (struct afd__group_io){ .fill = stage_fill,
		.filled = stage_filled,
		.drain = type == AFD__REDUCE ? add_drain : copy_drain,
		.drained = stage_drained,
		.user = rank };
}

static int start(struct rank *rank, uint8_t type, uint32_t lane, uint32_t layer, uint32_t n_rows)
{
	struct afd__group_io io = io_of(rank, type);

	return type == AFD__REDUCE ? afd__group_reduce(rank->net, lane, layer, n_rows, &io)
				   : afd__group_gather(rank->net, lane, layer, n_rows, &io);
}

/* ---- groups ---- */

static struct afd_transport_params params_of(uint32_t index, uint32_t n)
{
	return (struct afd_transport_params){ .size = sizeof(struct afd_transport_params),
		.group = group,
		.group_index = index,
		.group_size = n,
		.max_rows = 4,
		.lanes = LANES,
		.spin_us = UINT32_MAX };
}

static void make_rank(uint32_t index, const struct afd_transport_params *params)
{
	ranks[index].index = index;
	if (afd_transport_create(&ranks[index].net, client_ctx, &rig_contract, params))
		fail_msg("%s", afd_last_error());
}

static void join_all(uint32_t n)
{
	uint64_t until = now_ms() + 3000;
	uint32_t n_joined = 0;

	while (n_joined < n) {
		n_joined = 0;
		for (uint32_t i = 0; i < n; i++) {
			int rc = afd_transport_poll(ranks[i].net);

			if (rc < 0 || now_ms() > until)
				fail_msg("rank %u: %d %s", i, rc, afd_last_error());
			n_joined += (uint32_t)rc;
		}
	}
}

static void make_group(uint32_t n, uint32_t deadline_ms)
{
	memset(ranks, 0, sizeof(ranks));
	rig_address(group);
	/* The last one first: it waits for the others. */
	for (uint32_t i = n; i--;) {
		struct afd_transport_params params = params_of(i, n);

		params.deadline_ms = deadline_ms;
		make_rank(i, &params);
	}
	join_all(n);
}

static void end_group(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		afd_transport_destroy(ranks[i].net);
}

static int begin(struct rank *rank, uint32_t rows0, uint32_t rows1)
{
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { rows0, rows1 } };

	return afd__exchange_begin(rank->net, &step);
}

static void begin_all(uint32_t n, uint32_t n_rows)
{
	for (uint32_t i = 0; i < n; i++)
		assert_int_equal(begin(&ranks[i], n_rows, n_rows), 0);
}

/* Until it is done or has failed; only this rank is moved. */
static int finish(struct rank *rank, uint32_t lane, int timeout_ms)
{
	uint64_t until = now_ms() + (uint64_t)timeout_ms;
	int rc;

	while (!(rc = afd__group_done(rank->net, lane))) {
		if (now_ms() > until)
			fail_msg("rank %u is not done after %d ms", rank->index, timeout_ms);
		rc = afd__exchange_progress(rank->net);
		if (!rc)
			afd__transport_sleep(rank->net, -1, 5);
	}
	return rc;
}

/* All ranks in turn, the first given first, until all are done. */
static void finish_all(uint32_t n, uint32_t lane, uint32_t first)
{
	uint64_t until = now_ms() + 3000;
	uint32_t n_done = 0;

	while (n_done < n) {
		n_done = 0;
		for (uint32_t k = 0; k < n; k++) {
			struct rank *rank = &ranks[(first + k) % n];

			if (afd__exchange_progress(rank->net) < 0 || now_ms() > until)
				fail_msg("rank %u: %s", rank->index, afd_last_error());
			n_done += afd__group_done(rank->net, lane) == 1;
		}
	}
}

/* ---- numbers whose sum depends on the order ---- */

static float partial(uint32_t rank, uint32_t i)
{
	static const float scales[] = { 1e8f, 1.0f, -1e8f, 1e-3f };

	return scales[(rank + i) % 4] * (1.0f + (float)((i * 31 + rank * 17) % 97) / 97.0f);
}

static void fill_partials(uint32_t n, uint32_t lane, uint32_t salt)
{
	for (uint32_t r = 0; r < n; r++) {
		for (uint32_t i = 0; i < ROWS_MAX * HIDDEN; i++)
			ranks[r].lanes[lane].own[i] = partial(r, i + salt);
	}
}

static void expect_sums(uint32_t n, uint32_t lane, uint32_t n_rows, uint32_t salt)
{
	for (uint32_t i = 0; i < n_rows * HIDDEN; i++) {
		float sum = 0.0f;

		for (uint32_t r = 0; r < n; r++)
			sum += partial(r, i + salt);
		for (uint32_t r = 0; r < n; r++) {
			if (memcmp(&ranks[r].lanes[lane].all[i], &sum, sizeof(sum)))
				fail_msg("rank %u of %u, number %u: %a, should be %a", r, n, i,
					(double)ranks[r].lanes[lane].all[i], (double)sum);
		}
	}
}

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
		assert_int_equal(afd__exchange_cancel(ranks[culprit].net), 0);
		for (uint32_t r = 0; r < 4; r++) {
			if (r == culprit)
				continue;
			expect_error(finish(&ranks[r], 0, 2000), -ECANCELED, "cancelled step");
			assert_int_equal(afd__exchange_cancel(ranks[r].net), 0);
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

/* ---- ranks that end ---- */

static void a_rank_that_leaves_when_it_is_done_disturbs_nobody(void **state)
{
	make_group(2, 0);
	fill_partials(2, 0, 1);
	begin_all(2, 3);
	for (uint32_t r = 0; r < 2; r++) {
		assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, 3), 0);
		assert_true(afd__exchange_progress(ranks[r].net) >= 0);
	}
	assert_int_equal(finish(&ranks[1], 0, 2000), 1);
	afd_transport_destroy(ranks[1].net);
	assert_int_equal(finish(&ranks[0], 0, 2000), 1);
	assert_true(afd__exchange_progress(ranks[0].net) >= 0);
	expect_error(start(&ranks[0], AFD__REDUCE, 0, 1, 3), -ECONNRESET, "rank 1 of the group has left");
	expect_error(begin(&ranks[0], 1, 1), -ECONNRESET, "rank 1 of the group has left");
	end_group(1);
}

static void a_rank_that_leaves_in_the_middle_is_named(void **state)
{
	make_group(4, 0);
	begin_all(4, 3);
	for (uint32_t r = 0; r < 4; r++) {
		if (r != 2)
			assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, 3), 0);
	}
	afd_transport_destroy(ranks[2].net);
	ranks[2].net = NULL;
	for (uint32_t r = 0; r < 4; r++) {
		if (r != 2)
			expect_error(finish(&ranks[r], 0, 2000), -ECONNRESET,
				"rank 2 of the group has left");
	}
	end_group(4);
}

static void a_silent_rank_is_named_after_the_deadline(void **state)
{
	uint64_t begun;

	make_group(2, 250);
	begin_all(2, 2);
	assert_int_equal(start(&ranks[0], AFD__GATHER, 1, 2, 2), 0);
	begun = now_ms();
	expect_error(finish(&ranks[0], 1, 3000), -ETIMEDOUT,
		"rank 0 waited for rank 1 of the group: silent for");
	assert_non_null(strstr(afd_last_error(), "in gather of step 1, layer 2, lane 1"));
	assert_in_range(now_ms() - begun, 250, 1500);
	end_group(2);
}

static void a_rank_that_computes_may_take_longer_than_the_deadline(void **state)
{
	uint64_t until;

	make_group(2, 200);
	begin_all(2, 2);
	fill_partials(2, 0, 0);
	assert_int_equal(start(&ranks[0], AFD__REDUCE, 0, 0, 2), 0);
	/* Between tiles. */
	for (until = now_ms() + 700; now_ms() < until; sleep_ms(5)) {
		assert_true(afd__exchange_progress(ranks[0].net) >= 0);
		afd__transport_beat(ranks[1].net);
	}
	assert_int_equal(start(&ranks[1], AFD__REDUCE, 0, 0, 2), 0);
	finish_all(2, 0, 0);
	expect_sums(2, 0, 2, 0);
	end_group(2);
}

/* Rank 1 has the only row: while it is at the FFN nothing crosses between the ranks. */
static void a_rank_at_the_ffn_is_heard_by_those_that_have_no_rows(void **state)
{
	uint64_t until;

	make_group(2, 200);
	begin_all(2, 1);
	for (uint32_t r = 0; r < 2; r++)
		assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, LAYERS - 1, 1), 0);
	finish_all(2, 0, 0);
	assert_int_equal(start(&ranks[0], AFD__GATHER, 0, LAYERS - 1, 1), 0);
	for (until = now_ms() + 700; now_ms() < until; sleep_ms(5)) {
		for (uint32_t r = 0; r < 2; r++)
			assert_true(afd__exchange_progress(ranks[r].net) >= 0);
	}
	assert_int_equal(start(&ranks[1], AFD__GATHER, 0, LAYERS - 1, 1), 0);
	finish_all(2, 0, 0);
	end_group(2);
}

/* ---- a rank that lies ---- */

static void a_part_that_is_cut_short_is_refused_and_never_read(void **state)
{
	enum { SLOT = AFD__N_CONTROL, N_ROWS = 2, SHORT = HIDDEN * sizeof(float) };
	struct afd__header h = { .header_bytes = AFD__HEADER_BYTES, .kind = AFD__FRAME_COLLECTIVE,
		.type = AFD__REDUCE, .dtype = AFD_DTYPE_F32, .step = 1, .n_rows = N_ROWS,
		.n_parts = 1 };
	struct afd__link *link;

	make_group(2, 0);
	begin_all(2, N_ROWS);
	assert_int_equal(start(&ranks[0], AFD__REDUCE, 0, 0, N_ROWS), 0);
	assert_true(afd__exchange_progress(ranks[0].net) >= 0);
	link = ranks[1].net->links[0];
	h.sequence = link->sequence_out + 1;
	afd__wire_encode(link->wire.ops->send_slot(&link->wire, SLOT), &h);
	assert_int_equal(
		link->wire.ops->post_send(&link->wire, SLOT, AFD__HEADER_BYTES + SHORT), 0);
	expect_error(finish(&ranks[0], 0, 2000), -EPROTO, "bytes follow the header, 2 rows of");
	end_group(2);
}

/* ---- meeting ---- */

static void a_rank_that_does_not_come_is_named_after_the_timeout(void **state)
{
	for (uint32_t own = 0; own < 3; own += 2) {
		struct afd_transport_params params = params_of(own, 3);

		rig_address(group);
		params.connect_timeout_ms = 150;
		make_rank(own, &params);
		expect_error(afd_transport_wait(ranks[own].net, 3000), -ETIMEDOUT,
			own ? "no rank 0 of the group joined" : "rank 1 of the group did not join");
		afd_transport_destroy(ranks[own].net);
	}
}

struct stranger {
	const char *name;
	struct afd_transport_params params; /* beside group */
	const char *text;
};

static void ranks_that_do_not_fit_are_refused_by_field(void **state)
{
	static const struct stranger cases[] = {
		{ "size", { .group_index = 1, .group_size = 3, .lanes = LANES, .max_rows = 4 },
			"group_size is 2 there, 3 here" },
		{ "lanes", { .group_index = 1, .group_size = 2, .lanes = 1, .max_rows = 4 },
			"lanes is 2 there, 1 here" },
		{ "rows", { .group_index = 1, .group_size = 2, .lanes = LANES, .max_rows = 5 },
			"max_rows is 4 there, 5 here" },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_transport_params first = params_of(0, 2), second = cases[i].params;
		int rc;

		rig_address(group);
		make_rank(0, &first);
		second.size = sizeof(second);
		second.group = group;
		make_rank(1, &second);
		while (!(rc = afd_transport_poll(ranks[1].net)))
			afd_transport_poll(ranks[0].net);
		expect_error(rc, -EPROTO, cases[i].text);
		end_group(2);
	}
}

static void groups_and_ffn_peers_do_not_mix(void **state)
{
	struct afd_transport_params params = params_of(0, 2);
	struct server server;
	afd_transport *net;
	int rc;

	rig_address(group);
	make_rank(0, &params);
	net = make_client(group, NULL);
	while (!(rc = afd_transport_poll(net)))
		afd_transport_poll(ranks[0].net);
	expect_error(rc, -EPROTO, "group_size is 2 there, 0 here");
	afd_transport_destroy(net);
	afd_transport_destroy(ranks[0].net);
	server_start(&server, NULL);
	snprintf(group, sizeof(group), "%s", server.address);
	params = params_of(1, 2);
	make_rank(1, &params);
	expect_error(afd_transport_wait(ranks[1].net, 2000), -EPROTO, "group_size is 0 there, 2 here");
	afd_transport_destroy(ranks[1].net);
	server_stop(&server);
}

/* ---- a rank that is killed ---- */

static pid_t spawn_rank(uint32_t index, uint32_t n)
{
	afd_context *ctx;
	pid_t pid = fork();

	if (pid)
		return pid;
	for (int fd = 3; fd < 256; fd++)
		close(fd);
	if (afd_context_create(&ctx, NULL))
		_exit(90);
	client_ctx = ctx;
	struct afd_transport_params params = params_of(index, n);

	make_rank(index, &params);
	for (;;) {
		afd_transport_poll(ranks[index].net);
		sleep_ms(1);
	}
}

static void a_killed_rank_is_named_within_a_second(void **state)
{
	uint64_t begun;
	pid_t pid;

	if (strcmp(rig_scheme(), "shm"))
		skip();
	for (uint32_t victim = 0; victim < 3; victim++) {
		char text[64];

		memset(ranks, 0, sizeof(ranks));
		rig_address(group);
		pid = spawn_rank(victim, 3);
		for (uint32_t r = 0; r < 3; r++) {
			struct afd_transport_params params = params_of(r, 3);

			if (r != victim)
				make_rank(r, &params);
		}
		for (int n_joined = 0; n_joined < 2;) {
			n_joined = 0;
			for (uint32_t r = 0; r < 3; r++)
				n_joined += r != victim && afd_transport_poll(ranks[r].net) == 1;
		}
		for (uint32_t r = 0; r < 3; r++) {
			if (r == victim)
				continue;
			assert_int_equal(begin(&ranks[r], 3, 0), 0);
			assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, 3), 0);
		}
		begun = now_ms();
		kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
		snprintf(text, sizeof(text), "rank %u of the group is gone", victim);
		for (uint32_t r = 0; r < 3; r++) {
			if (r != victim)
				expect_error(finish(&ranks[r], 0, 2000), -ECONNRESET, text);
		}
		assert_in_range(now_ms() - begun, 0, 1000);
		end_group(3);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(sums_are_those_of_rank_order_whoever_is_first),
		RIG_TEST(rows_of_all_ranks_are_gathered_also_when_some_have_none),
		RIG_TEST(fills_and_drains_that_take_their_time_change_nothing),
		RIG_TEST(an_operation_without_rows_or_without_others_is_done_at_once),
		RIG_TEST(ranks_share_ffn_peers_of_which_each_sees_its_own_rows),
		RIG_TEST(ranks_that_are_not_at_the_same_are_both_named),
		RIG_TEST(ranks_with_other_rows_in_a_lane_are_both_named),
		RIG_TEST(a_rank_that_is_a_step_ahead_is_named),
		RIG_TEST(a_cancelled_step_ends_on_all_ranks_and_the_next_one_is_clean),
		RIG_TEST(a_rank_that_leaves_when_it_is_done_disturbs_nobody),
		RIG_TEST(a_rank_that_leaves_in_the_middle_is_named),
		RIG_TEST(a_silent_rank_is_named_after_the_deadline),
		RIG_TEST(a_rank_that_computes_may_take_longer_than_the_deadline),
		RIG_TEST(a_rank_at_the_ffn_is_heard_by_those_that_have_no_rows),
		RIG_TEST(a_part_that_is_cut_short_is_refused_and_never_read),
		RIG_TEST(a_rank_that_does_not_come_is_named_after_the_timeout),
		RIG_TEST(ranks_that_do_not_fit_are_refused_by_field),
		RIG_TEST(groups_and_ffn_peers_do_not_mix),
		RIG_TEST(a_killed_rank_is_named_within_a_second),
	};
	return RIG_RUN(argc, argv, tests);
}
