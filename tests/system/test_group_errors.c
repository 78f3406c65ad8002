/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an attention group refuses, and how its steps fail: ranks that cannot be, ranks whose batches
 * differ, one that gives a step up, one that is lost. A failed step leaves every rank as it was
 * before it, and can be repeated while all ranks live.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../support/ranks.h"

static struct golden golden;

static int begin(void **state)
{
	golden_open(&golden, "f32-tied");
	return 0;
}

static int end(void **state)
{
	golden_close(&golden);
	return 0;
}

/* ---- what is refused ---- */

struct refusal {
	const char *name;
	uint32_t rank, n_ranks; /* of the transport; 0: none */
	bool peer, ffn;         /* an FFN peer, and an FFN of this process */
	struct afd_attn_params attn;
	const char *text;
};

static const struct refusal REFUSALS[] = {
	{ "more ranks than heads", 0, 7, true, false, { 0 },
		"7 tensor-parallel ranks, limit 6: the model's query heads" },
	{ "another size than the transport's", 1, 2, true, false,
		{ .group_index = 1, .group_size = 3 },
		"group_index and group_size are 1 of 3, the transport's 1 of 2" },
	{ "another rank than the transport's", 1, 2, true, false,
		{ .group_index = 0, .group_size = 2 },
		"group_index and group_size are 0 of 2, the transport's 1 of 2" },
	{ "a rank without a transport", 0, 0, false, true, { .group_index = 1, .group_size = 2 },
		"group_index and group_size are 1 of 2, the transport's 0 of 1" },
	{ "two FFNs", 0, 2, true, true, { 0 }, "1 FFN peers and params.ffn is given, too" },
	{ "no FFN", 0, 2, false, false, { 0 }, "0 FFN peers and params.ffn is NULL" },
};

static int try_create(const struct refusal *r, struct ranks *ranks)
{
	static const char *const peer = "loop:nobody";
	struct afd_contract contract = { .size = sizeof(contract) };
	const struct afd_transport_params net = { .size = sizeof(net),
		.connect = &peer,
		.n_connect = r->peer,
		.group = r->n_ranks ? "loop:refused" : NULL,
		.group_index = r->rank,
		.group_size = r->n_ranks };
	struct afd_attn_params attn = r->attn;

	attn.size = sizeof(attn);
	attn.device = ranks->device;
	attn.ffn = r->ffn ? ranks->ffns[0] : NULL;
	assert_int_equal(afd_model_contract(ranks->model, &contract), 0);
	if (r->n_ranks)
		assert_int_equal(
			afd_transport_create(&ranks->nets[1], ranks->ctx, &contract, &net), 0);
	return afd_attn_create(&ranks->attns[1], ranks->model, ranks->nets[1], &attn);
}

static void a_group_that_cannot_be_is_refused(void **state)
{
	const struct ranks_params p = { .checkpoint = golden.checkpoint, .n_ranks = 1 };
	uint32_t i;

	for (i = 0; i < sizeof(REFUSALS) / sizeof(*REFUSALS); i++) {
		struct ranks ranks;

		/* For its context, model and FFN. */
		ranks_open(&ranks, &p);
		afd_attn_destroy(ranks.attns[0]);
		ranks.attns[0] = NULL;
		assert_int_equal(try_create(&REFUSALS[i], &ranks), -EINVAL);
		if (!strstr(afd_last_error(), REFUSALS[i].text))
			fail_msg("%s: '%s'", REFUSALS[i].name, afd_last_error());
		assert_null(ranks.attns[1]);
		ranks_close(&ranks);
	}
}

static void kv_bytes_of_a_rank_that_cannot_be_are_refused(void **state)
{
	const struct ranks_params p = { .checkpoint = golden.checkpoint, .n_ranks = 1 };
	const struct afd_attn_params beyond = { .size = sizeof(beyond), .group_index = 2,
		.group_size = 2 };
	struct ranks ranks;

	ranks_open(&ranks, &p);
	assert_int_equal(afd_attn_kv_bytes(ranks.model, &beyond), 0);
	assert_non_null(strstr(afd_last_error(), "index is 2 of 2, limit 1"));
	ranks_close(&ranks);
}

/* ---- steps that fail ---- */

static struct afd_batch batch_of(struct afd_entry *entry, uint32_t n)
{
	*entry = (struct afd_entry){ .sequence = 1, .ids = golden.ids, .n_ids = n };
	return (struct afd_batch){ .size = sizeof(struct afd_batch),
		.entries = entry,
		.n_entries = 1,
		.entry_bytes = sizeof(*entry),
		.logits_rows = 1 };
}

static void open_pair(struct ranks *ranks)
{
	const struct ranks_params p = {
		.checkpoint = golden.checkpoint, .n_ranks = 2, .n_shards = 1
	};

	ranks_open(ranks, &p);
	ranks_add(ranks, 1);
}

/* Both ranks are polled until they have no step any more; rc [2]. */
static void run_to_end(struct ranks *ranks, int rc[2], char text[512])
{
	time_t limit = time(NULL) + 60;
	uint32_t i, n_busy;

	do {
		assert_true(time(NULL) < limit);
		for (i = n_busy = 0; i < 2; i++) {
			if (!ranks->attns[i] || afd_attn_busy(ranks->attns[i]) != 1)
				continue;
			rc[i] = afd_attn_poll(ranks->attns[i]);
			n_busy += !rc[i];
			if (rc[i] < 0)
				strncpy(text, afd_last_error(), 511);
		}
		afd_ffn_poll(ranks->ffns[0]);
	} while (n_busy);
}

/* A step of both ranks; it must give what it gives a group to which nothing has happened. */
static void expect_good_step(struct ranks *ranks)
{
	struct afd_entry entry;
	struct afd_batch batch = batch_of(&entry, 5);
	float *logits = calloc(4 * (size_t)golden.vocab, sizeof(float));
	float *of[2] = { logits, logits + golden.vocab };
	float *fresh[2] = { logits + 2 * golden.vocab, logits + 3 * golden.vocab };
	struct ranks other;

	assert_int_equal(afd_attn_length(ranks->attns[0], 1), 0);
	assert_int_equal(afd_attn_length(ranks->attns[1], 1), 0);
	ranks_step(ranks, &batch, of);
	ranks_close(ranks);
	open_pair(&other);
	ranks_step(&other, &batch, fresh);
	ranks_close(&other);
	assert_memory_equal(logits, fresh[0], 2 * (size_t)golden.vocab * sizeof(float));
	free(logits);
}

static void batches_that_differ_fail_on_both_ranks(void **state)
{
	struct afd_entry entries[2];
	struct ranks ranks;
	char text[512] = "";
	int rc[2];
	uint32_t i;

	open_pair(&ranks);
	for (i = 0; i < 2; i++) {
		struct afd_batch batch = batch_of(&entries[i], 5 + i);

		assert_int_equal(afd_attn_begin(ranks.attns[i], &batch), 0);
	}
	run_to_end(&ranks, rc, text);
	assert_true(rc[0] == -EPROTO || rc[1] == -EPROTO);
	assert_true(rc[0] < 0 && rc[1] < 0);
	expect_good_step(&ranks);
}

static void join(struct ranks *ranks)
{
	time_t limit = time(NULL) + 60;
	int joined;

	do {
		assert_true(time(NULL) < limit);
		joined = afd_attn_poll(ranks->attns[0]) == 1;
		joined &= afd_attn_poll(ranks->attns[1]) == 1;
		afd_ffn_poll(ranks->ffns[0]);
	} while (!joined);
}

/* Polls so often that the ranks are somewhere in the first half of the step. */
static void begin_both(struct ranks *ranks, uint32_t n_polls)
{
	struct afd_entry entry;
	struct afd_batch batch = batch_of(&entry, 5);
	uint32_t i;

	join(ranks);
	assert_int_equal(afd_attn_begin(ranks->attns[0], &batch), 0);
	assert_int_equal(afd_attn_begin(ranks->attns[1], &batch), 0);
	for (i = 0; i < n_polls; i++) {
		afd_attn_poll(ranks->attns[0]);
		afd_attn_poll(ranks->attns[1]);
		afd_ffn_poll(ranks->ffns[0]);
	}
	assert_int_equal(afd_attn_busy(ranks->attns[0]), 1);
}

static void a_step_that_one_rank_cancels_can_be_repeated(void **state)
{
	uint32_t n_polls;

	for (n_polls = 1; n_polls < 6; n_polls++) {
		struct ranks ranks;
		char text[512] = "";
		int rc[2] = { 0, 0 };

		open_pair(&ranks);
		begin_both(&ranks, n_polls);
		assert_int_equal(afd_attn_cancel(ranks.attns[1]), 0);
		run_to_end(&ranks, rc, text);
		assert_int_equal(rc[0], -ECANCELED);
		assert_non_null(strstr(text, "rank 1 cancelled step"));
		expect_good_step(&ranks);
	}
}

static void a_rank_says_why_its_step_failed(void **state)
{
	struct afd_entry entry;
	struct afd_batch batch = batch_of(&entry, 5);
	struct ranks ranks;
	char text[512] = "";
	int rc[2] = { 0, 0 };

	open_pair(&ranks);
	join(&ranks);
	assert_int_equal(afd_attn_begin(ranks.attns[1], &batch), 0);
	assert_int_equal(afd_attn_step(ranks.attns[0], &batch, 20), -ETIMEDOUT);
	run_to_end(&ranks, rc, text);
	assert_int_equal(rc[1], -ECANCELED);
	assert_non_null(strstr(text, "rank 0 failed in step 1: attn: step 1 not done in 20 ms"));
	expect_good_step(&ranks);
}

static void a_lost_rank_is_named_and_the_ffn_goes_on(void **state)
{
	struct afd_peer_info peer = { .size = sizeof(peer) };
	struct ranks ranks;
	char text[512] = "";
	int rc[2] = { 0, 0 };

	open_pair(&ranks);
	begin_both(&ranks, 3);
	afd_attn_destroy(ranks.attns[1]);
	afd_transport_destroy(ranks.nets[1]);
	ranks.attns[1] = NULL;
	ranks.nets[1] = NULL;
	run_to_end(&ranks, rc, text);
	assert_int_equal(rc[0], -ECONNRESET);
	assert_non_null(strstr(text, "rank 1"));
	assert_int_equal(afd_attn_length(ranks.attns[0], 1), 0);
	assert_int_equal(afd_transport_peer(ranks.nets[0], 0, &peer), 0);
	assert_int_equal(peer.state, AFD_PEER_JOINED);
	ranks_close(&ranks);
}

static void a_wait_that_is_too_short_names_the_group(void **state)
{
	struct afd_entry entry;
	struct afd_batch batch = batch_of(&entry, 5);
	struct ranks ranks;

	open_pair(&ranks);
	join(&ranks);
	assert_int_equal(afd_attn_begin(ranks.attns[0], &batch), 0);
	while (afd_attn_timeout_ms(ranks.attns[0]) == 0)
		assert_int_equal(afd_attn_poll(ranks.attns[0]), 0);
	assert_int_equal(afd_attn_wait(ranks.attns[0], 20), -ETIMEDOUT);
	if (!strstr(afd_last_error(), "waits for the attention group at layer 0"))
		fail_msg("%s", afd_last_error());
	ranks_close(&ranks);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_group_that_cannot_be_is_refused),
		cmocka_unit_test(kv_bytes_of_a_rank_that_cannot_be_are_refused),
		cmocka_unit_test(batches_that_differ_fail_on_both_ranks),
		cmocka_unit_test(a_step_that_one_rank_cancels_can_be_repeated),
		cmocka_unit_test(a_rank_says_why_its_step_failed),
		cmocka_unit_test(a_lost_rank_is_named_and_the_ffn_goes_on),
		cmocka_unit_test(a_wait_that_is_too_short_names_the_group),
	};

	return cmocka_run_group_tests(tests, begin, end);
}
