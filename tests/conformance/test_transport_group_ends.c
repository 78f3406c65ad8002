/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The beginning and the end of attention groups: ranks that meet or do not, that leave, fall silent
 * or give up, and one that is killed, which has a process of its own. The others name it, and why.
 */
#include "group_rig.h"

#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

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

/* Rank 1 has the one row, so it is done when it has sent it. */
static void what_a_rank_sent_before_it_left_can_be_gathered_later(void **state)
{
	make_group(2, 0);
	fill_partials(2, 0, 1);
	begin_all(2, 1);
	assert_int_equal(start(&ranks[1], AFD__GATHER, 0, 0, 1), 0);
	assert_int_equal(finish(&ranks[1], 0, 2000), 1);
	afd_transport_destroy(ranks[1].net);
	for (int i = 0; i < 20; i++) {
		assert_true(afd__exchange_progress(ranks[0].net) >= 0);
		afd__transport_sleep(ranks[0].net, -1, 5);
	}
	assert_int_equal(start(&ranks[0], AFD__GATHER, 0, 0, 1), 0);
	assert_int_equal(finish(&ranks[0], 0, 2000), 1);
	assert_memory_equal(
		ranks[0].lanes[0].own, ranks[1].lanes[0].own, HIDDEN * sizeof(float));
	end_group(1);
}

static void a_rank_that_gives_up_says_why(void **state)
{
	make_group(4, 0);
	begin_all(4, 3);
	for (uint32_t r = 0; r < 3; r++)
		assert_int_equal(start(&ranks[r], AFD__REDUCE, 0, 0, 3), 0);
	assert_int_equal(afd__exchange_cancel(ranks[3].net, "the cat has it"), 0);
	expect_error(finish(&ranks[0], 0, 2000), -ECANCELED,
		"rank 3 failed in step 1: the cat has it");
	/* What a rank passes on is the first cause, not what it has heard. */
	assert_int_equal(afd__exchange_cancel(ranks[0].net, afd_last_error()), 0);
	afd_transport_destroy(ranks[3].net);
	ranks[3].net = NULL;
	for (uint32_t r = 1; r < 3; r++)
		expect_error(finish(&ranks[r], 0, 2000), -ECANCELED, "in step 1: the cat has it");
	end_group(4);
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

	if (!strcmp(rig_scheme(), "loop"))
		rig_skip("ranks of processes do not meet over loop:");
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
		RIG_TEST(a_rank_that_leaves_when_it_is_done_disturbs_nobody),
		RIG_TEST(what_a_rank_sent_before_it_left_can_be_gathered_later),
		RIG_TEST(a_rank_that_gives_up_says_why),
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
