/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Servers of layers with experts: the gate on either side gives the same bits, peers whose gates
 * differ are served each for itself, shards each answer with their part, and a host's compute
 * function is given what attention has routed.
 */
#include "../unit/routed_model.h"
#include "serving.h"

#include <math.h>

#include "../../lib/transport/exchange.h"

enum { N_ROWS = 9, HIDDEN = 96, TOP_K = 3, MAX_SERVERS = 4 };

static const struct routed_sizes sizes = { HIDDEN, 3, 64, 48, TOP_K, 8 };

struct server {
	afd_transport *net;
	afd_ffn *ffn;
	char address[80];
	pthread_t thread;
};

struct layout {
	afd_context *ctx;
	struct routed_model m;
	struct afd_contract contract;
	struct server servers[MAX_SERVERS];
	uint32_t n_servers;
	float x[N_ROWS * HIDDEN];
	int32_t ids[N_ROWS * TOP_K]; /* of layer 1 */
	float weights[N_ROWS * TOP_K];
};

static void *serve_one(void *arg)
{
	struct server *server = arg;

	if (afd_ffn_serve(server->ffn))
		fprintf(stderr, "serve: %s\n", afd_last_error());
	return NULL;
}

static void add_server(struct layout *l, const char *scheme, struct afd_ffn_params params)
{
	static int n_all;
	struct server *server = &l->servers[l->n_servers++];
	const char *listen[1] = { server->address };
	struct afd_transport_params tp = { .size = sizeof(tp), .n_listen = 1, .listen = listen };

	params.size = sizeof(params);
	params.device = params.compute ? NULL : test_device();
	snprintf(server->address, sizeof(server->address), "%s:routed-%d-%d", scheme, (int)getpid(),
		n_all++);
	if (afd_transport_create(&server->net, l->ctx, &l->contract, &tp) ||
		afd_ffn_create(
			&server->ffn, params.compute ? NULL : l->m.model, server->net, &params))
		fail_msg("%s", afd_last_error());
	assert_int_equal(pthread_create(&server->thread, NULL, serve_one, server), 0);
}

static void layout_create(struct layout *l, const char *family)
{
	*l = (struct layout){ .contract = { .size = sizeof(l->contract) } };
	assert_int_equal(afd_context_create(&l->ctx, NULL), 0);
	routed_model_open(&l->m, l->ctx, family, &sizes, AFD_DTYPE_BF16);
	assert_int_equal(afd_model_contract(l->m.model, &l->contract), 0);
	draw_rows(l->x, N_ROWS * HIDDEN, 21);
	gate_rows(l->m.model, 1, N_ROWS, l->x, l->ids, l->weights);
}

static void layout_destroy(struct layout *l)
{
	for (uint32_t i = 0; i < l->n_servers; i++) {
		afd_ffn_stop(l->servers[i].ffn);
		pthread_join(l->servers[i].thread, NULL);
		afd_ffn_destroy(l->servers[i].ffn);
		afd_transport_destroy(l->servers[i].net);
	}
	routed_model_close(&l->m);
	afd_context_destroy(l->ctx);
}

/* ---- attention peers ---- */

static afd_transport *join(const struct layout *l, int32_t gate, uint32_t max_rows)
{
	const char *connect[MAX_SERVERS];
	struct afd_transport_params tp = { .size = sizeof(tp),
		.connect = connect,
		.n_connect = l->n_servers,
		.gate = gate,
		.max_rows = max_rows,
		.to_ffn_dtype = AFD_DTYPE_F32,
		.to_attention_dtype = AFD_DTYPE_F32 };
	afd_transport *net;

	/* In any order: the last one first. */
	for (uint32_t i = 0; i < l->n_servers; i++)
		connect[i] = l->servers[l->n_servers - 1 - i].address;
	if (afd_transport_create(&net, l->ctx, &l->contract, &tp))
		fail_msg("%s", afd_last_error());
	peer_join(net);
	return net;
}

static struct afd_frame routed_frame(const struct layout *l, int32_t layer, int32_t gate, float *y)
{
	struct afd_frame frame = frame_of(layer, 0, N_ROWS, l->x, y);

	if (gate == AFD_GATE_ATTENTION && layer == 1) {
		frame.ids = l->ids;
		frame.weights = l->weights;
	}
	return frame;
}

static void exchange(
	const struct layout *l, int32_t layer, int32_t gate, uint32_t max_rows, float *y)
{
	struct afd_frame frame = routed_frame(l, layer, gate, y);
	afd_transport *net = join(l, gate, max_rows);

	assert_int_equal(peer_begin(net, 1, N_ROWS), 0);
	if (afd_transport_exchange(net, &frame))
		fail_msg("%s", afd_last_error());
	afd_transport_destroy(net);
}

static void forward_whole(const struct layout *l, uint32_t layer, float *y)
{
	afd_ffn *ffn = routed_stage(l->m.model, NULL, 0);

	routed_forward(ffn, layer, N_ROWS, l->x, NULL, NULL, 0, y);
	afd_ffn_destroy(ffn);
}

/* ---- bits ---- */

static void the_gate_on_either_side_gives_the_bits_of_one_process(void **state)
{
	static const char *const schemes[] = { "loop", "shm" };
	static const char *const families[] = { qwen3_moe, deepseek_v3 };

	for (int i = 0; i < 4; i++) {
		struct afd_ffn_params params = { .max_rows = i % 2 ? 4 : 0 };
		float whole[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN];
		struct layout l;

		layout_create(&l, families[i / 2]);
		add_server(&l, schemes[i % 2], params);
		forward_whole(&l, 1, whole);
		for (uint32_t max_rows = 0; max_rows <= 2; max_rows += 2) {
			exchange(&l, 1, AFD_GATE_ATTENTION, max_rows, y);
			assert_memory_equal(y, whole, sizeof(y));
			exchange(&l, 1, AFD_GATE_FFN, max_rows, y);
			assert_memory_equal(y, whole, sizeof(y));
		}
		layout_destroy(&l);
	}
}

/* Both dispatch before either collects, so the server holds rows of both at one layer. */
static void peers_whose_gates_differ_are_served_together(void **state)
{
	struct afd_ffn_params params = { .gather_us = 20000 };
	static const int32_t gates[3] = { AFD_GATE_ATTENTION, AFD_GATE_FFN, AFD_GATE_ATTENTION };
	float whole[N_ROWS * HIDDEN], y[3][N_ROWS * HIDDEN];
	afd_transport *nets[3];
	struct layout l;

	layout_create(&l, deepseek_v3);
	add_server(&l, "loop", params);
	forward_whole(&l, 1, whole);
	for (int i = 0; i < 3; i++) {
		nets[i] = join(&l, gates[i], 0);
		assert_int_equal(peer_begin(nets[i], 1, N_ROWS), 0);
	}
	for (int i = 0; i < 3; i++) {
		struct afd_frame frame = routed_frame(&l, 1, gates[i], y[i]);

		assert_int_equal(afd_transport_dispatch(nets[i], &frame), 0);
	}
	for (int i = 0; i < 3; i++) {
		int rc;

		while (!(rc = afd_transport_collect(nets[i], 0)))
			;
		if (rc < 0)
			fail_msg("%s", afd_last_error());
		assert_memory_equal(y[i], whole, sizeof(whole));
		afd_transport_destroy(nets[i]);
	}
	layout_destroy(&l);
}

struct sharding {
	uint32_t n_tp, n_ep;
};

static void sum_shards(const struct layout *l, const struct sharding *s, uint32_t layer, float *y)
{
	float part[N_ROWS * HIDDEN];

	memset(y, 0, sizeof(part));
	for (uint32_t rank = 0; rank < s->n_tp * s->n_ep; rank++) {
		struct afd_shard shard = { rank % s->n_tp, s->n_tp, rank / s->n_tp, s->n_ep };
		afd_ffn *ffn = routed_stage(l->m.model, &shard, 0);

		routed_forward(ffn, layer, N_ROWS, l->x, NULL, NULL, 0, part);
		for (int i = 0; i < N_ROWS * HIDDEN; i++)
			y[i] += part[i];
		afd_ffn_destroy(ffn);
	}
}

static void shards_answer_with_their_parts_whichever_side_routes(void **state)
{
	static const struct sharding shardings[] = { { 2, 1 }, { 1, 2 }, { 2, 2 }, { 3, 1 } };

	for (int i = 0; i < 8; i++) {
		const struct sharding *s = &shardings[i % 4];
		float sum[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN];
		struct layout l;

		layout_create(&l, i < 4 ? qwen3_moe : deepseek_v3);
		for (uint32_t rank = 0; rank < s->n_tp * s->n_ep; rank++) {
			struct afd_ffn_params params = { .shard = { rank % s->n_tp, s->n_tp,
								 rank / s->n_tp, s->n_ep } };

			add_server(&l, "loop", params);
		}
		for (uint32_t layer = i < 4; layer < 2; layer++) {
			sum_shards(&l, s, layer, sum);
			exchange(&l, (int32_t)layer, AFD_GATE_ATTENTION, 4, y);
			assert_memory_equal(y, sum, sizeof(y));
			exchange(&l, (int32_t)layer, AFD_GATE_FFN, 4, y);
			assert_memory_equal(y, sum, sizeof(y));
		}
		layout_destroy(&l);
	}
}

/* With no shared experts a rank is sent the rows only that have an expert there. */
static void a_rank_gets_only_rows_that_have_an_expert_there(void **state)
{
	struct afd_ffn_params params[2] = { { .shard = { 0, 1, 0, 2 } },
		{ .shard = { 0, 1, 1, 2 } } };
	uint64_t expected[2] = { 0, 0 };
	float y[N_ROWS * HIDDEN];
	struct layout l;

	layout_create(&l, qwen3_moe);
	for (int i = 0; i < N_ROWS; i += 2) /* rows of one rank alone, too */
		l.ids[i * TOP_K] = l.ids[i * TOP_K + 1] = l.ids[i * TOP_K + 2] = i % 8;
	for (int i = 0; i < N_ROWS; i++) {
		bool low = false, high = false;

		for (int k = 0; k < TOP_K; k++) {
			low |= l.ids[i * TOP_K + k] < 4;
			high |= l.ids[i * TOP_K + k] >= 4;
		}
		expected[0] += low;
		expected[1] += high;
	}
	assert_true(expected[0] < N_ROWS && expected[1] < N_ROWS);
	add_server(&l, "loop", params[0]);
	add_server(&l, "loop", params[1]);
	exchange(&l, 1, AFD_GATE_ATTENTION, 0, y);
	for (int i = 0; i < 2; i++) {
		struct afd_ffn_stats stats = { .size = sizeof(stats) };

		assert_int_equal(afd_ffn_stats(l.servers[i].ffn, &stats), 0);
		assert_int_equal(stats.n_rows, expected[i]);
	}
	layout_destroy(&l);
}

/* ---- a host's own ---- */

struct host {
	const struct layout *l;
	uint32_t n_routed, n_other;
	bool wrong;
};

/* y = x, times the weight of the first slot when there is one. */
static int compute_scaled(void *user, const struct afd_ffn_pass *pass)
{
	struct host *host = user;

	host->wrong |= (pass->top_k != 0) != (pass->ids != NULL) ||
		       (pass->ids && (pass->top_k != TOP_K || !pass->weights));
	host->n_routed += pass->ids ? pass->n_rows : 0;
	host->n_other += pass->ids ? 0 : pass->n_rows;
	for (size_t i = 0; i < (size_t)pass->n_rows * HIDDEN; i++)
		pass->y[i] =
			pass->x[i] * (pass->weights ? pass->weights[i / HIDDEN * TOP_K] *
							      (float)pass->ids[i / HIDDEN * TOP_K]
						    : 1);
	return 0;
}

static void a_compute_function_gets_ids_and_weights_where_attention_routes(void **state)
{
	struct host host = { 0 };
	struct afd_ffn_params params = {
		.compute = compute_scaled, .compute_user = &host, .max_rows = 4
	};
	float y[N_ROWS * HIDDEN];
	struct layout l;

	layout_create(&l, deepseek_v3);
	add_server(&l, "loop", params);
	exchange(&l, 1, AFD_GATE_ATTENTION, 0, y);
	for (size_t i = 0; i < N_ROWS * HIDDEN; i++)
		assert_true(y[i] == l.x[i] * (l.weights[i / HIDDEN * TOP_K] *
						     (float)l.ids[i / HIDDEN * TOP_K]));
	exchange(&l, 1, AFD_GATE_FFN, 0, y);
	assert_memory_equal(y, l.x, sizeof(y));
	exchange(&l, 0, AFD_GATE_ATTENTION, 0, y);
	assert_memory_equal(y, l.x, sizeof(y));
	layout_destroy(&l);
	assert_false(host.wrong);
	assert_int_equal(host.n_routed, N_ROWS);
	assert_int_equal(host.n_other, 2 * N_ROWS);
}

/* ---- what is refused ---- */

/* ---- a peer that writes what it likes ---- */

static const int32_t wild_ids[N_ROWS * TOP_K] = { -1, -1, -1, INT32_MIN, INT32_MAX, 8, 0, 0, 0, 7,
	-7, 7, 1 << 30, 1, 2, 3, 4000, 3, 5, 6, 5, 2, 1, 0, 99, 98, 97 };

struct liar {
	const float *x;
	float y[N_ROWS * HIDDEN];
	int32_t *ids; /* of the slot */
};

static int liar_fill(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const struct afd__slot_rows *slot)
{
	struct liar *liar = user;

	memcpy(slot->rows, liar->x, n_rows * HIDDEN * sizeof(float));
	memcpy(slot->ids, wild_ids, sizeof(wild_ids));
	for (uint32_t i = 0; i < n_rows * TOP_K; i++)
		slot->weights[i] = i / TOP_K == 2 ? NAN : 0.5f;
	liar->ids = slot->ids;
	return 1;
}

static int liar_drain(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const void *slot)
{
	memcpy(((struct liar *)user)->y, slot, n_rows * HIDDEN * sizeof(float));
	return 1;
}

static void send_lies(afd_transport *net, struct liar *liar)
{
	const struct afd__frame_io io = {
		.fill = liar_fill, .drain = liar_drain, .user = liar, .in_order = true
	};
	const uint32_t n_rows = N_ROWS;

	assert_int_equal(peer_begin(net, 1, N_ROWS), 0);
	if (afd__exchange_send(net, 0, 1, &n_rows, &io) || afd__exchange_progress(net) < 0)
		fail_msg("%s", afd_last_error());
}

/* Ids that change while they are used: a slot of shm: is the peer's memory. That is a race, made
 * on purpose, and ThreadSanitizer would say so; under it the ids lie, but stay. */
#ifdef __SANITIZE_THREAD__
enum { IDS_CHANGE = 0 };
#else
enum { IDS_CHANGE = 1 };
#endif

static void scribble(const struct liar *liar, uint32_t seed)
{
	for (uint32_t i = 0; i < N_ROWS * TOP_K; i++)
		((volatile int32_t *)liar->ids)[i] = wild_ids[(i + seed) % (N_ROWS * TOP_K)];
}

static bool is_all(const float *y, float value)
{
	uint32_t i = 0;

	while (i < HIDDEN && (value == 0 ? y[i] == 0 && !signbit(y[i]) : isnan(y[i])))
		i++;
	return i == HIDDEN;
}

/* Both have rows at the layer; the liar's ids change until it is answered when `changes` is set. */
static void exchange_beside(const struct layout *l, afd_transport *honest, afd_transport *lying,
	struct liar *liar, bool changes, float *y)
{
	struct afd_frame frame = routed_frame(l, 1, AFD_GATE_ATTENTION, y);
	int rc;

	send_lies(lying, liar);
	assert_int_equal(peer_begin(honest, 1, N_ROWS), 0);
	assert_int_equal(afd_transport_dispatch(honest, &frame), 0);
	while (!(rc = afd__exchange_done(lying, 0))) {
		if (changes)
			scribble(liar, (uint32_t)rand());
		assert_true(afd__exchange_progress(lying) >= 0);
	}
	assert_int_equal(rc, 1);
	while (!(rc = afd_transport_collect(honest, 0)))
		afd__transport_sleep(honest, -1, -1);
	assert_int_equal(rc, 1);
}

static void wild_ids_and_weights_are_the_matter_of_their_own_rows(void **state)
{
	struct afd_ffn_params params = { .gather_us = 20000 };
	float whole[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN];
	afd_transport *honest, *lying;
	struct layout l;
	struct liar liar = { .x = l.x };

	layout_create(&l, qwen3_moe);
	add_server(&l, "shm", params);
	forward_whole(&l, 1, whole);
	honest = join(&l, AFD_GATE_ATTENTION, 0);
	lying = join(&l, AFD_GATE_ATTENTION, 0);
	exchange_beside(&l, honest, lying, &liar, false, y);
	assert_true(is_all(liar.y, 0) && is_all(liar.y + HIDDEN, 0));
	assert_true(is_all(liar.y + 2 * HIDDEN, NAN));
	assert_false(is_all(liar.y + 3 * HIDDEN, 0) || is_all(liar.y + 3 * HIDDEN, NAN));
	for (uint32_t round = 0; round < 40; round++) {
		assert_memory_equal(y, whole, sizeof(y));
		exchange_beside(&l, honest, lying, &liar, IDS_CHANGE, y);
	}
	assert_memory_equal(y, whole, sizeof(y));
	afd_transport_destroy(lying);
	afd_transport_destroy(honest);
	layout_destroy(&l);
}

static void a_shard_that_net_was_not_made_with_is_refused(void **state)
{
	const char *listen[1] = { "loop:other-shard" };
	struct afd_transport_params tp = {
		.size = sizeof(tp), .n_listen = 1, .listen = listen, .shard = { 1, 2, 0, 1 }
	};
	struct afd_ffn_params params = { .size = sizeof(params), .shard = { 0, 2, 0, 1 } };
	afd_transport *net;
	struct layout l;
	afd_ffn *ffn = NULL;

	layout_create(&l, qwen3_moe);
	assert_int_equal(afd_transport_create(&net, l.ctx, &l.contract, &tp), 0);
	assert_int_equal(afd_ffn_create(&ffn, l.m.model, net, &params), -EINVAL);
	assert_null(ffn);
	params.shard = (struct afd_shard){ 0 }; /* that of net */
	if (afd_ffn_create(&ffn, l.m.model, net, &params))
		fail_msg("%s", afd_last_error());
	afd_ffn_destroy(ffn);
	afd_transport_destroy(net);
	layout_destroy(&l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_gate_on_either_side_gives_the_bits_of_one_process),
		cmocka_unit_test(peers_whose_gates_differ_are_served_together),
		cmocka_unit_test(shards_answer_with_their_parts_whichever_side_routes),
		cmocka_unit_test(a_rank_gets_only_rows_that_have_an_expert_there),
		cmocka_unit_test(a_compute_function_gets_ids_and_weights_where_attention_routes),
		cmocka_unit_test(wild_ids_and_weights_are_the_matter_of_their_own_rows),
		cmocka_unit_test(a_shard_that_net_was_not_made_with_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
