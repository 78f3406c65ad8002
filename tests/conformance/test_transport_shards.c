/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Several FFN peers: who may stand together, which rows go to whom, what is counted, and in which
 * order partial results are read. The servers answer y = x + layer + 1, whatever they hold.
 */
#include "transport_rig.h"

#include <stdio.h>

enum { EXPERTS = 8, TOP_K = 2, SHARDS_MAX = 4, ROWS = 11 };

static const uint8_t kinds[LAYERS] = { AFD_FFN_DENSE, AFD_FFN_MOE, AFD_FFN_MOE };
static struct server servers[SHARDS_MAX];
static float x[ROWS * HIDDEN], y[ROWS * HIDDEN], weights[ROWS * TOP_K];
static int32_t ids[ROWS * TOP_K];

static void use_experts(int32_t shared)
{
	rig_contract.ffn_kinds = kinds;
	rig_contract.n_experts = EXPERTS;
	rig_contract.top_k = TOP_K;
	rig_contract.router = AFD_ROUTER_SOFTMAX;
	rig_contract.shared_experts = shared;
}

static void start_shards(const struct afd_shard *shards, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		struct afd_transport_params params = { .shard = shards[i] };

		server_start(&servers[i], &params);
	}
}

static void stop_shards(uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		server_stop(&servers[i]);
}

static afd_transport *connect_shards(uint32_t n, const struct afd_transport_params *params)
{
	struct afd_transport_params p = params ? *params : (struct afd_transport_params){ 0 };
	const char *addresses[SHARDS_MAX];
	afd_transport *net;

	for (uint32_t i = 0; i < n; i++)
		addresses[i] = servers[i].address;
	p.size = sizeof(p);
	p.connect = addresses;
	p.n_connect = n;
	rig_secret(&p);
	if (afd_transport_create(&net, client_ctx, &rig_contract, &p))
		fail_msg("%s", afd_last_error());
	return net;
}

static afd_transport *join_shards(uint32_t n, const struct afd_transport_params *params)
{
	afd_transport *net = connect_shards(n, params);

	if (afd_transport_wait(net, 0) != 1)
		fail_msg("%s", afd_last_error());
	return net;
}

static void choose(int seed)
{
	fill_rows(x, ROWS, seed);
	for (int i = 0; i < ROWS; i++) {
		ids[i * TOP_K] = (i * 3 + seed) % EXPERTS;
		ids[i * TOP_K + 1] = (i * 3 + seed + 1 + i % (EXPERTS - 1)) % EXPERTS;
		weights[i * TOP_K] = 0.25f * (float)i;
		weights[i * TOP_K + 1] = 1.0f - weights[i * TOP_K];
	}
}

static struct afd_frame routed_frame(int32_t layer)
{
	struct afd_frame frame = frame_of(layer, 0, ROWS, x, y);

	frame.ids = ids;
	frame.weights = weights;
	return frame;
}

static void exchange(afd_transport *net, const struct afd_frame *frame)
{
	if (afd_transport_exchange(net, frame))
		fail_msg("%s", afd_last_error());
}

static uint64_t rows_sent(const afd_transport *net, uint32_t index)
{
	return peer_of(net, index).n_rows;
}

static bool chose(int row, int begin, int end)
{
	return (ids[row * TOP_K] >= begin && ids[row * TOP_K] < end) ||
	       (ids[row * TOP_K + 1] >= begin && ids[row * TOP_K + 1] < end);
}

/* ---- who stands together ---- */

static void peers_in_any_order_are_numbered_by_their_shards(void **state)
{
	static const struct afd_shard shards[] = { { 1, 2, 1, 2 }, { 0, 2, 0, 2 }, { 0, 2, 1, 2 },
		{ 1, 2, 0, 2 } };
	static const uint32_t ranks[] = { 3, 0, 2, 1 };
	struct afd_peer_info info;
	struct afd__target target;
	afd_transport *net;

	use_experts(0);
	start_shards(shards, 4);
	net = join_shards(4, NULL);
	for (uint32_t i = 0; i < 4; i++) {
		info = peer_of(net, i);
		assert_int_equal(info.rank, ranks[i]);
		assert_int_equal(info.n_ranks, 4);
		assert_int_equal(info.role, AFD_ROLE_FFN);
		assert_int_equal(afd__exchange_target(net, i, &target), 0);
		assert_int_equal(target.tp, i % 2);
		assert_int_equal(target.expert_begin, i / 2 * 4);
		assert_int_equal(target.expert_end, i / 2 * 4 + 4);
	}
	afd_transport_destroy(net);
	stop_shards(4);
}

struct cover {
	const char *name;
	uint32_t n;
	struct afd_shard shards[SHARDS_MAX];
	int code;
	const char *text;
};

static void peers_that_do_not_hold_everything_are_refused_by_shard(void **state)
{
	static const struct cover cases[] = {
		{ "one of two", 1, { { 0, 2, 0, 1 } }, -EPROTO, "no FFN peer holds tp1/2" },
		{ "three of four", 3, { { 0, 2, 0, 2 }, { 1, 2, 1, 2 }, { 1, 2, 0, 2 } }, -EPROTO,
			"no FFN peer holds tp0/2,ep1/2" },
		{ "one twice", 2, { { 0, 2, 0, 1 }, { 0, 2, 0, 1 } }, -EPROTO,
			"no FFN peer holds tp1/2" },
		{ "two ways", 2, { { 0, 2, 0, 1 }, { 0, 1, 1, 2 } }, -EPROTO,
			"sharded in different ways" },
		{ "two counts", 2, { { 0, 2, 0, 1 }, { 1, 3, 0, 1 } }, -EPROTO,
			"sharded in different ways" },
	};

	use_experts(0);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		afd_transport *net;

		start_shards(cases[i].shards, cases[i].n);
		net = connect_shards(cases[i].n, NULL);
		expect_error(afd_transport_wait(net, 0), cases[i].code, cases[i].text);
		expect_error(begin_step(net, 1), cases[i].code, cases[i].text);
		rig_wait_logged("shard is ");
		afd_transport_destroy(net);
		stop_shards(cases[i].n);
	}
}

static void shared_experts_on_one_side_only_are_refused(void **state)
{
	afd_transport *net;

	use_experts(1);
	start_shards(&(struct afd_shard){ 0 }, 1);
	rig_contract.shared_experts = 0;
	net = connect_shards(1, NULL);
	expect_error(afd_transport_wait(net, 0), -EPROTO, "shared_experts is 1 there, 0 here");
	afd_transport_destroy(net);
	stop_shards(1);
}

/* ---- which rows go to whom ---- */

static const struct afd_shard ep2[] = { { 0, 1, 1, 2 }, { 0, 1, 0, 2 } };

static void rows_of_a_dense_layer_go_to_all_and_are_added(void **state)
{
	struct afd_transport_params params = { .max_rows = 4 };
	struct afd_frame frame = frame_of(0, 0, ROWS, x, y);
	afd_transport *net;

	use_experts(0);
	start_shards(ep2, 2);
	net = join_shards(2, &params);
	choose(1);
	assert_int_equal(begin_step(net, ROWS), 0);
	exchange(net, &frame);
	for (int i = 0; i < ROWS * HIDDEN; i++)
		assert_true(y[i] == 2 * (x[i] + 1));
	assert_int_equal(rows_sent(net, 0), ROWS);
	assert_int_equal(rows_sent(net, 1), ROWS);
	afd_transport_destroy(net);
	stop_shards(2);
}

static void a_routed_row_goes_only_to_those_that_hold_its_experts(void **state)
{
	struct afd_transport_params params = { .max_rows = 4 };
	struct afd_frame frame = routed_frame(1);
	uint32_t n[2] = { 0, 0 };
	afd_transport *net;

	use_experts(0);
	start_shards(ep2, 2);
	net = join_shards(2, &params);
	choose(2);
	assert_int_equal(begin_step(net, ROWS), 0);
	exchange(net, &frame);
	for (int row = 0; row < ROWS; row++) {
		int n_targets = chose(row, 0, 4) + chose(row, 4, 8);

		n[0] += chose(row, 4, 8);
		n[1] += chose(row, 0, 4);
		for (int i = row * HIDDEN; i < (row + 1) * HIDDEN; i++)
			assert_true(y[i] == (float)n_targets * (x[i] + 2));
	}
	assert_true(n[0] && n[0] < ROWS);
	assert_int_equal(rows_sent(net, 0), n[0]);
	assert_int_equal(rows_sent(net, 1), n[1]);
	afd_transport_destroy(net);
	stop_shards(2);
}

static void ids_and_weights_arrive_with_their_rows(void **state)
{
	struct afd_frame frame = routed_frame(2);
	const struct afd__part *part = &servers[0].held[0];
	afd_transport *net;
	uint32_t n = 0;

	use_experts(0);
	start_shards(ep2, 2);
	net = join_shards(2, &(struct afd_transport_params){ .to_ffn_dtype = AFD_DTYPE_BF16 });
	servers[0].hold = 1;
	choose(3);
	assert_int_equal(begin_step(net, ROWS), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	wait_for(&servers[0].n_held, 1);
	assert_int_equal(part->top_k, TOP_K);
	assert_int_equal((uintptr_t)part->ids % 16 | (uintptr_t)part->weights % 16, 0);
	for (int row = 0; row < ROWS; row++) {
		if (!chose(row, 4, 8))
			continue;
		assert_memory_equal(part->ids + n * TOP_K, ids + row * TOP_K, TOP_K * 4);
		assert_memory_equal(part->weights + n * TOP_K, weights + row * TOP_K, TOP_K * 4);
		assert_true(number(part->x, n * HIDDEN, AFD_DTYPE_BF16) == x[row * HIDDEN]);
		n++;
	}
	assert_int_equal(part->n_rows, n);
	servers[0].hold = 0;
	assert_int_equal(collect_within(net, 0, 2000), 1);
	afd_transport_destroy(net);
	stop_shards(2);
}

static void a_target_without_rows_gets_nothing_and_owes_nothing(void **state)
{
	struct afd_transport_params params = { .deadline_ms = 200 };
	struct afd_frame frame = routed_frame(1);
	afd_transport *net;

	use_experts(0);
	start_shards(ep2, 2);
	net = join_shards(2, &params);
	park(&servers[0]);
	choose(4);
	for (int i = 0; i < ROWS * TOP_K; i++)
		ids[i] = i % 4;
	for (int step = 0; step < 3; step++) {
		assert_int_equal(begin_step(net, ROWS), 0);
		exchange(net, &frame);
		expect_rows(x, y, ROWS, 1);
		sleep_ms(150);
	}
	assert_int_equal(rows_sent(net, 0), 0);
	assert_int_equal(rows_sent(net, 1), 3 * ROWS);
	afd_transport_destroy(net);
	servers[0].silent = 0;
	stop_shards(2);
}

struct gate {
	const char *name;
	int32_t gate, shared;
	bool has_ids;
};

static void all_rows_go_to_all_with_the_gate_on_the_ffn_or_shared_experts(void **state)
{
	static const struct gate cases[] = { { "gate on the FFN", AFD_GATE_FFN, 0, false },
		{ "gate on the FFN, shared experts", AFD_GATE_FFN, 1, false },
		{ "shared experts", AFD_GATE_ATTENTION, 1, true } };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct afd_transport_params params = { .gate = cases[i].gate };
		struct afd_frame frame = routed_frame(1);
		afd_transport *net;

		use_experts(cases[i].shared);
		start_shards(ep2, 2);
		net = join_shards(2, &params);
		servers[1].hold = 1;
		choose(5);
		assert_int_equal(begin_step(net, ROWS), 0);
		assert_int_equal(afd_transport_dispatch(net, &frame), 0);
		wait_for(&servers[1].n_held, 1);
		assert_int_equal(servers[1].held[0].n_rows, ROWS);
		assert_int_equal(!!servers[1].held[0].ids, cases[i].has_ids);
		servers[1].hold = 0;
		assert_int_equal(collect_within(net, 0, 2000), 1);
		assert_int_equal(rows_sent(net, 0) + rows_sent(net, 1), 2 * ROWS);
		afd_transport_destroy(net);
		stop_shards(2);
	}
}

static void ids_that_are_no_experts_are_refused_and_change_nothing(void **state)
{
	struct afd_frame frame = routed_frame(1);
	afd_transport *net;

	use_experts(0);
	start_shards(ep2, 2);
	net = join_shards(2, NULL);
	choose(6);
	assert_int_equal(begin_step(net, ROWS), 0);
	ids[5] = EXPERTS;
	expect_error(afd_transport_dispatch(net, &frame), -EINVAL, "id 1 of row 2 is 8, limit 7");
	ids[5] = -1;
	expect_error(afd_transport_dispatch(net, &frame), -EINVAL, "id 1 of row 2 is -1");
	ids[5] = 0;
	frame.weights = NULL;
	expect_error(afd_transport_dispatch(net, &frame), -EINVAL, "weights is NULL");
	frame.weights = weights;
	frame.y = x;
	expect_error(afd_transport_dispatch(net, &frame), -EINVAL, "must be f32 and not x");
	frame.y = y;
	exchange(net, &frame);
	afd_transport_destroy(net);
	stop_shards(2);
}

/* ---- the order of partial results ---- */

struct order {
	uint32_t n;
	uint32_t targets[8], rows[8];
};

static int order_fill(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const struct afd__slot_rows *slot)
{
	memset(slot->rows, 0, n_rows * HIDDEN * sizeof(float));
	return 1;
}

static int order_drain(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const void *slot)
{
	struct order *order = user;

	order->targets[order->n] = target;
	order->rows[order->n++] = row0;
	return 1;
}

static int order_done(void *user, uint32_t lane, uint32_t target) { return 1; }

/* The peer that holds shard 0 (the second address) answers last. */
static void send_with_target_0_last(bool in_order, struct order *order)
{
	struct afd_transport_params params = { .max_rows = 4 };
	struct afd__frame_io io = { .fill = order_fill,
		.filled = order_done,
		.drain = order_drain,
		.drained = order_done,
		.user = order,
		.in_order = in_order };
	uint32_t n_rows[2] = { 7, 8 };
	afd_transport *net;

	*order = (struct order){ 0 };
	start_shards(ep2, 2);
	net = join_shards(2, &params);
	servers[1].hold = 1;
	assert_int_equal(begin_step(net, 8), 0);
	assert_int_equal(afd__exchange_send(net, 0, 0, n_rows, &io), 0);
	for (int i = 0; i < 30 || servers[1].n_held < 2; i++) {
		assert_true(afd__exchange_progress(net) >= 0);
		assert_int_equal(afd__exchange_done(net, 0), 0);
		sleep_ms(2);
	}
	servers[1].hold = 0;
	while (!afd__exchange_done(net, 0)) {
		assert_true(afd__exchange_progress(net) >= 0);
		afd__transport_sleep(net, -1, 10);
	}
	assert_int_equal(order->n, 4);
	afd_transport_destroy(net);
	stop_shards(2);
}

static void parts_are_read_as_they_come(void **state)
{
	struct order order;

	send_with_target_0_last(false, &order);
	assert_int_equal(order.targets[0], 1);
	assert_int_equal(order.targets[1], 1);
	assert_int_equal(order.targets[2], 0);
}

static void parts_are_read_by_target_when_asked_so(void **state)
{
	struct order order;

	send_with_target_0_last(true, &order);
	assert_int_equal(order.targets[0], 0);
	assert_int_equal(order.targets[1], 0);
	assert_int_equal(order.targets[2], 1);
	assert_int_equal(order.targets[3], 1);
}

/* ---- the end of one of them ---- */

static void a_lost_target_ends_the_frame_and_is_named(void **state)
{
	struct afd_frame frame = frame_of(0, 0, ROWS, x, y);
	afd_transport *net;

	start_shards(ep2, 2);
	net = join_shards(2, NULL);
	servers[1].hold = 1;
	choose(7);
	assert_int_equal(begin_step(net, ROWS), 0);
	assert_int_equal(afd_transport_dispatch(net, &frame), 0);
	wait_for(&servers[1].n_held, 1);
	park(&servers[1]);
	servers[1].n_held = 0;
	server_stop(&servers[1]);
	expect_error(collect_within(net, 0, 2000), -ECONNRESET, servers[1].address);
	afd_transport_destroy(net);
	stop_shards(2);
}

static void an_error_of_one_target_ends_the_frame_and_no_link(void **state)
{
	struct afd_frame frame = frame_of(0, 0, ROWS, x, y);
	afd_transport *net;

	start_shards(ep2, 2);
	net = join_shards(2, NULL);
	choose(8);
	for (int i = 0; i < 20; i++) {
		servers[i % 2].status = i % 4 < 2 ? -EDOM : 0;
		servers[!(i % 2)].status = 0;
		assert_int_equal(begin_step(net, ROWS), 0);
		if (i % 4 < 2) {
			expect_error(afd_transport_exchange(net, &frame), -EDOM, "on purpose");
			assert_non_null(strstr(afd_last_error(), servers[i % 2].address));
			assert_int_equal(afd_transport_cancel(net), 0);
		} else {
			exchange(net, &frame);
			for (int k = 0; k < ROWS * HIDDEN; k++)
				assert_true(y[k] == 2 * (x[k] + 1));
		}
	}
	afd_transport_destroy(net);
	stop_shards(2);
}

/* The other target has answered the parts that it got, and gets no more of them. */
static void a_step_goes_on_after_an_error_of_one_target(void **state)
{
	struct afd_transport_params params = { .max_rows = 1 };
	struct afd_frame frame = frame_of(0, 0, ROWS, x, y);
	afd_transport *net;

	start_shards(ep2, 2);
	net = join_shards(2, &params);
	choose(8);
	assert_int_equal(begin_step(net, ROWS), 0);
	for (int i = 0; i < 20; i++) {
		servers[i % 2].status = -EDOM;
		expect_error(afd_transport_exchange(net, &frame), -EDOM, "on purpose");
		servers[i % 2].status = 0;
		exchange(net, &frame);
	}
	afd_transport_destroy(net);
	stop_shards(2);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(peers_in_any_order_are_numbered_by_their_shards),
		RIG_TEST(peers_that_do_not_hold_everything_are_refused_by_shard),
		RIG_TEST(shared_experts_on_one_side_only_are_refused),
		RIG_TEST(rows_of_a_dense_layer_go_to_all_and_are_added),
		RIG_TEST(a_routed_row_goes_only_to_those_that_hold_its_experts),
		RIG_TEST(ids_and_weights_arrive_with_their_rows),
		RIG_TEST(a_target_without_rows_gets_nothing_and_owes_nothing),
		RIG_TEST(all_rows_go_to_all_with_the_gate_on_the_ffn_or_shared_experts),
		RIG_TEST(ids_that_are_no_experts_are_refused_and_change_nothing),
		RIG_TEST(parts_are_read_as_they_come),
		RIG_TEST(parts_are_read_by_target_when_asked_so),
		RIG_TEST(a_lost_target_ends_the_frame_and_is_named),
		RIG_TEST(an_error_of_one_target_ends_the_frame_and_no_link),
		RIG_TEST(a_step_goes_on_after_an_error_of_one_target),
	};
	return RIG_RUN(argc, argv, tests);
}
