/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Layers with experts, beyond the golden checkpoints: grouped selection of the DeepSeek-V3 family,
 * e4m3 shards that begin inside a block, exact zeros, what a shard holds, quantised activations,
 * weights in place, and what is refused.
 */
#include "routed_model.h"

enum { N_ROWS = 6, HIDDEN = 160 };

static const struct routed_sizes small = { HIDDEN, 3, 96, 200, 3, 8 };

static afd_context *ctx;

static int make_context(void **state)
{
	return afd_context_create(&ctx, NULL);
}

static int end_context(void **state)
{
	afd_context_destroy(ctx);
	return 0;
}

/* ---- the numbers ---- */

struct numbers {
	const char *name, *family;
	int32_t dtype;
	struct afd_shard shard[4];
	uint32_t n_shards;
};

#define WHOLE  { { 0, 1, 0, 1 } }, 1
#define TP2    { { 0, 2, 0, 1 }, { 1, 2, 0, 1 } }, 2
#define TP3    { { 0, 3, 0, 1 }, { 1, 3, 0, 1 }, { 2, 3, 0, 1 } }, 3
#define EP3    { { 0, 1, 0, 3 }, { 0, 1, 1, 3 }, { 0, 1, 2, 3 } }, 3
#define TP2EP2 { { 0, 2, 0, 2 }, { 1, 2, 0, 2 }, { 0, 2, 1, 2 }, { 1, 2, 1, 2 } }, 4

static const struct numbers numbers[] = {
	{ "Qwen3-MoE", qwen3_moe, AFD_DTYPE_F32, WHOLE },
	{ "grouped selection", deepseek_v3, AFD_DTYPE_F32, WHOLE },
	{ "grouped selection in shards", deepseek_v3, AFD_DTYPE_BF16, TP2EP2 },
	{ "more experts than ranks divide", deepseek_v3, AFD_DTYPE_F16, EP3 },
	{ "e4m3", deepseek_v3, AFD_DTYPE_FP8, WHOLE },
	{ "e4m3 cut inside a block", deepseek_v3, AFD_DTYPE_FP8, TP2 },
	{ "e4m3 cut anywhere", deepseek_v3, AFD_DTYPE_FP8, TP3 },
	{ "e4m3 by experts and width", deepseek_v3, AFD_DTYPE_FP8, TP2EP2 },
};

static void add_ranks(const struct numbers *c, const struct routed_model *m, uint32_t layer,
	const float *x, float *sum)
{
	float part[N_ROWS * HIDDEN];

	memset(sum, 0, sizeof(part));
	for (uint32_t rank = 0; rank < c->n_shards; rank++) {
		afd_ffn *ffn = routed_stage(m->model, &c->shard[rank], 4);

		routed_forward(ffn, layer, N_ROWS, x, NULL, NULL, 0, part);
		for (int i = 0; i < N_ROWS * HIDDEN; i++)
			sum[i] += part[i];
		afd_ffn_destroy(ffn);
	}
}

static void drawn_models_agree_with_double_precision(void **state)
{
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		const struct numbers *c = &numbers[i];
		float x[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN];
		double expected[N_ROWS * HIDDEN], nmse;
		struct routed_model m;

		routed_model_open(&m, ctx, c->family, &small, c->dtype);
		draw_rows(x, N_ROWS * HIDDEN, 3);
		for (uint32_t layer = 0; layer < small.n_layers; layer++) {
			for (int row = 0; row < N_ROWS; row++)
				reference_row(
					m.model, layer, x + row * HIDDEN, expected + row * HIDDEN);
			add_ranks(c, &m, layer, x, y);
			nmse = nmse_of(y, expected, N_ROWS * HIDDEN);
			if (!(nmse <= 1e-10))
				fail_msg("%s: layer %u: NMSE %g", c->name, layer, nmse);
		}
		routed_model_close(&m);
	}
}

/* What the GPUs' way of products in e4m3 costs: about 2^-4 of a number, over many of them. */
static void quantized_activations_are_near_and_not_the_same(void **state)
{
	struct afd_ffn_params params = {
		.size = sizeof(params), .device = test_device(), .quantize_activations = 1
	};
	float x[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN], q[N_ROWS * HIDDEN];
	double expected[N_ROWS * HIDDEN], nmse;
	struct routed_model m;
	afd_ffn *plain, *ffn;

	routed_model_open(&m, ctx, deepseek_v3, &small, AFD_DTYPE_FP8);
	draw_rows(x, N_ROWS * HIDDEN, 3);
	plain = routed_stage(m.model, NULL, 0);
	assert_int_equal(afd_ffn_create(&ffn, m.model, NULL, &params), 0);
	for (uint32_t layer = 0; layer < small.n_layers; layer++) {
		routed_forward(plain, layer, N_ROWS, x, NULL, NULL, 0, y);
		routed_forward(ffn, layer, N_ROWS, x, NULL, NULL, 0, q);
		for (int i = 0; i < N_ROWS * HIDDEN; i++)
			expected[i] = y[i];
		nmse = nmse_of(q, expected, N_ROWS * HIDDEN);
		if (!(nmse > 1e-6 && nmse < 1e-2))
			fail_msg("layer %u: NMSE %g", layer, nmse);
	}
	afd_ffn_destroy(ffn);
	afd_ffn_destroy(plain);
	routed_model_close(&m);
}

static void weights_that_are_not_e4m3_quantize_nothing(void **state)
{
	struct afd_ffn_params params = {
		.size = sizeof(params), .device = test_device(), .quantize_activations = 1
	};
	float x[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN], q[N_ROWS * HIDDEN];
	struct routed_model m;
	afd_ffn *plain, *ffn;

	routed_model_open(&m, ctx, deepseek_v3, &small, AFD_DTYPE_BF16);
	draw_rows(x, N_ROWS * HIDDEN, 3);
	plain = routed_stage(m.model, NULL, 0);
	assert_int_equal(afd_ffn_create(&ffn, m.model, NULL, &params), 0);
	for (uint32_t layer = 0; layer < small.n_layers; layer++) {
		routed_forward(plain, layer, N_ROWS, x, NULL, NULL, 0, y);
		routed_forward(ffn, layer, N_ROWS, x, NULL, NULL, 0, q);
		assert_memory_equal(y, q, sizeof(y));
	}
	afd_ffn_destroy(ffn);
	afd_ffn_destroy(plain);
	routed_model_close(&m);
}

/* ---- laws ---- */

static void a_row_without_experts_here_is_zero_and_positive(void **state)
{
	const struct afd_shard shard = { 0, 1, 0, 2 }; /* experts 0 .. 3 of 8 */
	const int32_t ids[] = { 4, 5, 6, 1, 7, 4, -1, -1, -1 };
	const float weights[] = { 0.5f, -0.25f, 1, 0.5f, 0.25f, 1, 1, 1, 1 };
	float x[3 * HIDDEN], y[3 * HIDDEN], zeros[HIDDEN] = { 0 };
	struct routed_model m;
	afd_ffn *ffn;

	routed_model_open(&m, ctx, qwen3_moe, &small, AFD_DTYPE_BF16);
	ffn = routed_stage(m.model, &shard, 0);
	draw_rows(x, 3 * HIDDEN, 9);
	memset(y, 0xff, sizeof(y));
	routed_forward(ffn, 1, 3, x, ids, weights, 3, y);
	assert_memory_equal(y, zeros, sizeof(zeros));
	assert_memory_not_equal(y + HIDDEN, zeros, sizeof(zeros));
	assert_memory_equal(y + 2 * HIDDEN, zeros, sizeof(zeros));
	afd_ffn_destroy(ffn);
	routed_model_close(&m);
}

static void y_may_be_x_where_there_are_shared_experts(void **state)
{
	float x[N_ROWS * HIDDEN], y[N_ROWS * HIDDEN], *rows;
	struct afd__ffn_info info;
	struct afd__queue q;
	struct routed_model m;
	uint64_t ticket;
	afd_ffn *ffn;

	routed_model_open(&m, ctx, deepseek_v3, &small, AFD_DTYPE_BF16);
	ffn = routed_stage(m.model, NULL, 4);
	draw_rows(x, N_ROWS * HIDDEN, 9);
	routed_forward(ffn, 2, N_ROWS, x, NULL, NULL, 0, y);
	afd__ffn_info(ffn, &info);
	assert_int_equal(afd__queue_open(&q, info.device), 0);
	rows = device_floats(info.device, N_ROWS * HIDDEN);
	assert_int_equal(afd__queue_upload(&q, rows, x, sizeof(x)), 0);
	assert_int_equal(afd__ffn_enqueue(ffn, &q, 2, N_ROWS, rows, NULL, rows), 0);
	assert_int_equal(afd__queue_download(&q, x, rows, sizeof(x)), 0);
	assert_int_equal(afd__queue_ticket(&q, &ticket), 0);
	assert_int_equal(afd__queue_wait(&q, ticket, 0, "test"), 0);
	assert_memory_equal(x, y, sizeof(y));
	afd__queue_close(&q);
	afd__device_free(info.device, rows, sizeof(x));
	afd_ffn_destroy(ffn);
	routed_model_close(&m);
}

static void a_shard_is_not_for_a_local_attention_stage(void **state)
{
	const struct afd_shard shard = { 1, 2, 0, 1 };
	struct routed_model m;
	afd_ffn *ffn;

	routed_model_open(&m, ctx, qwen3_moe, &small, AFD_DTYPE_BF16);
	ffn = routed_stage(m.model, &shard, 0);
	assert_int_equal(afd__ffn_own(ffn, &m), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "holds shard tp 1/2, ep 0/1"));
	afd_ffn_destroy(ffn);
	routed_model_close(&m);
}

/* ---- what is held ---- */

struct held {
	const char *name;
	int32_t dtype;
	struct afd_shard shard;
};

static const struct held held[] = {
	{ "all of bf16", AFD_DTYPE_BF16, { 0, 1, 0, 1 } },
	{ "tp 1/2 of bf16", AFD_DTYPE_BF16, { 1, 2, 0, 1 } },
	{ "ep 3/4 of bf16", AFD_DTYPE_BF16, { 0, 1, 3, 4 } },
	{ "tp 1/2, ep 1/2 of f32", AFD_DTYPE_F32, { 1, 2, 1, 2 } },
	{ "all of e4m3", AFD_DTYPE_FP8, { 0, 1, 0, 1 } },
	{ "tp 0/2, ep 1/2 of e4m3", AFD_DTYPE_FP8, { 0, 2, 1, 2 } },
};

static void a_shard_holds_what_is_foretold_of_it(void **state)
{
	const struct routed_sizes sizes = { 256, 2, 512, 256, 2, 32 };

	for (size_t i = 0; i < sizeof(held) / sizeof(held[0]); i++) {
		struct afd_shard_params params = {
			.size = sizeof(params), .role = AFD_ROLE_FFN, .shard = held[i].shard
		};
		struct afd_role_info info = { .size = sizeof(info) };
		struct afd_ffn_stats stats = { .size = sizeof(stats) };
		struct routed_model m;
		afd_ffn *ffn;

		routed_model_open(&m, ctx, qwen3_moe, &sizes, held[i].dtype);
		ffn = routed_stage(m.model, &held[i].shard, 16);
		assert_int_equal(afd_model_shard(m.model, &params, &info), 0);
		assert_int_equal(afd_ffn_stats(ffn, &stats), 0);
		print_message("%s: %llu bytes stored, %llu held\n", held[i].name,
			(unsigned long long)stats.stored_bytes,
			(unsigned long long)stats.weight_bytes);
		assert_int_equal(stats.stored_bytes, info.bytes);
		assert_in_range(stats.weight_bytes, info.bytes * 99 / 100, info.bytes * 101 / 100);
		afd_ffn_destroy(ffn);
		routed_model_close(&m);
	}
}

static void two_shards_have_two_fingerprints_and_one_has_one(void **state)
{
	const struct afd_shard shards[] = { { 0, 2, 0, 1 }, { 1, 2, 0, 1 }, { 0, 2, 0, 1 } };
	struct afd_ffn_stats stats[3];
	struct routed_model m;

	routed_model_open(&m, ctx, deepseek_v3, &small, AFD_DTYPE_FP8);
	for (int i = 0; i < 3; i++) {
		afd_ffn *ffn = routed_stage(m.model, &shards[i], 0);

		stats[i].size = sizeof(stats[i]);
		assert_int_equal(afd_ffn_stats(ffn, &stats[i]), 0);
		afd_ffn_destroy(ffn);
	}
	assert_memory_not_equal(stats[0].weights, stats[1].weights, sizeof(stats[0].weights));
	assert_memory_equal(stats[0].weights, stats[2].weights, sizeof(stats[0].weights));
	routed_model_close(&m);
}

/* ---- what is refused ---- */

struct refused_shard {
	const char *name;
	struct afd_shard shard;
	const char *text;
};

static void shards_that_there_are_not_are_refused_by_name(void **state)
{
	static const struct refused_shard bad[] = {
		{ "tp index", { 2, 2, 0, 1 }, "tensor-parallel index is 2 of 2" },
		{ "ep index", { 0, 1, 5, 4 }, "expert-parallel index is 5 of 4" },
		{ "an index without a count", { 1, 0, 0, 0 }, "tensor-parallel index is 1 of 1" },
		{ "more ranks than experts", { 0, 1, 0, 9 }, "9 expert-parallel ranks, limit 8" },
		{ "more ranks than columns", { 0, 201, 0, 1 }, "201" },
		{ "ranks that overflow", { 0, 1u << 31, 0, 8 }, "limit" },
	};
	struct routed_model m;

	routed_model_open(&m, ctx, qwen3_moe, &small, AFD_DTYPE_BF16);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct afd_ffn_params params = { .size = sizeof(params), .shard = bad[i].shard };
		afd_ffn *ffn = NULL;

		print_message("%s\n", bad[i].name);
		assert_int_equal(afd_ffn_create(&ffn, m.model, NULL, &params), -EINVAL);
		assert_non_null(strstr(afd_last_error(), bad[i].text));
		assert_null(ffn);
	}
	routed_model_close(&m);
}

struct refused_ids {
	const char *name;
	struct afd_ffn_rows rows;
	const char *text;
};

static void ids_that_mean_nothing_are_refused_and_y_is_as_before(void **state)
{
	const int32_t fine[3] = { 0, -1, 7 }, above[3] = { 0, 8, 1 }, below[3] = { 0, 1, -2 };
	const float weights[3] = { 1, 1, 1 };
	float x[HIDDEN] = { 0 }, y[HIDDEN];
	const struct refused_ids bad[] = {
		{ "of a dense layer", { .ids = fine, .weights = weights, .top_k = 3 },
			"layer 0 has no experts" },
		{ "without weights", { .layer = 1, .ids = fine, .top_k = 3 }, "weights is NULL" },
		{ "without ids", { .layer = 1, .weights = weights, .top_k = 3 }, "ids is NULL" },
		{ "top_k", { .layer = 1, .ids = fine, .weights = weights, .top_k = 2 },
			"top_k is 2, the model's is 3" },
		{ "above", { .layer = 1, .ids = above, .weights = weights, .top_k = 3 },
			"id 8 of row 0, limit 7" },
		{ "below", { .layer = 1, .ids = below, .weights = weights, .top_k = 3 },
			"id -2 of row 0" },
	};
	struct routed_model m;
	afd_ffn *ffn;

	routed_model_open(&m, ctx, deepseek_v3, &small, AFD_DTYPE_BF16);
	ffn = routed_stage(m.model, NULL, 0);
	memset(y, 0x5a, sizeof(y));
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct afd_ffn_rows rows = bad[i].rows;

		rows.size = sizeof(rows);
		rows.n_rows = 1;
		rows.x = x;
		rows.y = y;
		print_message("%s\n", bad[i].name);
		assert_int_equal(afd_ffn_forward(ffn, &rows), -EINVAL);
		assert_non_null(strstr(afd_last_error(), bad[i].text));
	}
	for (size_t i = 0; i < sizeof(y); i++)
		assert_int_equal(((unsigned char *)y)[i], 0x5a);
	afd_ffn_destroy(ffn);
	routed_model_close(&m);
}

static void quantize_activations_takes_0_or_1(void **state)
{
	struct afd_ffn_params params = { .size = sizeof(params), .quantize_activations = 2 };
	struct routed_model m;
	afd_ffn *ffn;

	routed_model_open(&m, ctx, qwen3_moe, &small, AFD_DTYPE_BF16);
	assert_int_equal(afd_ffn_create(&ffn, m.model, NULL, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "quantize_activations is 2"));
	routed_model_close(&m);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(drawn_models_agree_with_double_precision),
		cmocka_unit_test(quantized_activations_are_near_and_not_the_same),
		cmocka_unit_test(weights_that_are_not_e4m3_quantize_nothing),
		cmocka_unit_test(a_row_without_experts_here_is_zero_and_positive),
		cmocka_unit_test(y_may_be_x_where_there_are_shared_experts),
		cmocka_unit_test(a_shard_is_not_for_a_local_attention_stage),
		cmocka_unit_test(a_shard_holds_what_is_foretold_of_it),
		cmocka_unit_test(two_shards_have_two_fingerprints_and_one_has_one),
		cmocka_unit_test(shards_that_there_are_not_are_refused_by_name),
		cmocka_unit_test(ids_that_mean_nothing_are_refused_and_y_is_as_before),
		cmocka_unit_test(quantize_activations_takes_0_or_1),
	};

	return cmocka_run_group_tests(tests, make_context, end_context);
}
