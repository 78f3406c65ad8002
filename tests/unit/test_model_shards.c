/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Shards: the parts of a role fit together without a gap, copies are only where the rules say so, and what a rank will hold
 * is told to the byte. A shard that would hold nothing is refused.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>

#include <afd/transport.h>

#include "../../lib/model/shard.h"
#include "lent_model.h"

/* Layer 0 dense, layer 1 routed; every width odd to most counts of ranks. */
enum { H = 40, VOCAB = 11, HEADS = 6, KV = 2, DIM = 4, DENSE = 50, EXPERTS = 5, WIDTH = 12, SHARED = 24 };

#define CONFIG "{\"model_type\":\"afmoe\",\"hidden_size\":40,\"num_hidden_layers\":2,\"vocab_size\":11,\"num_attention_heads\":6," \
	"\"num_key_value_heads\":2,\"head_dim\":4,\"intermediate_size\":50,\"num_experts\":5,\"num_experts_per_tok\":2," \
	"\"moe_intermediate_size\":12,\"num_dense_layers\":1,\"num_shared_experts\":2,\"route_scale\":1,\"mup_enabled\":true," \
	"\"rms_norm_eps\":1e-5,\"sliding_window\":4,\"attention_bias\":true,\"tie_word_embeddings\":true}"

static afd_context *ctx;
static afd_model *model;
static struct lent_model lent;

static void matrix(const char *name, int layer, uint64_t rows, uint64_t columns)
{
	lend(&lent, AFD_DTYPE_BF16, rows, columns, 0, "model.layers.%d.%s", layer, name);
}

static void lend_attention(int layer)
{
	matrix("input_layernorm.weight", layer, H, 0);
	matrix("post_attention_layernorm.weight", layer, H, 0);
	matrix("pre_mlp_layernorm.weight", layer, H, 0);
	matrix("post_mlp_layernorm.weight", layer, H, 0);
	matrix("self_attn.q_proj.weight", layer, HEADS * DIM, H);
	matrix("self_attn.k_proj.weight", layer, KV * DIM, H);
	matrix("self_attn.v_proj.weight", layer, KV * DIM, H);
	matrix("self_attn.gate_proj.weight", layer, HEADS * DIM, H);
	matrix("self_attn.o_proj.weight", layer, H, HEADS * DIM);
	matrix("self_attn.q_proj.bias", layer, HEADS * DIM, 0);
	matrix("self_attn.k_proj.bias", layer, KV * DIM, 0);
	matrix("self_attn.v_proj.bias", layer, KV * DIM, 0);
	matrix("self_attn.o_proj.bias", layer, H, 0);
	matrix("self_attn.q_norm.weight", layer, DIM, 0);
	matrix("self_attn.k_norm.weight", layer, DIM, 0);
}

static void lend_mlp(const char *prefix, int layer, uint64_t width)
{
	lend(&lent, AFD_DTYPE_BF16, width, H, 0, "model.layers.%d.mlp.%sgate_proj.weight", layer, prefix);
	lend(&lent, AFD_DTYPE_BF16, width, H, 0, "model.layers.%d.mlp.%sup_proj.weight", layer, prefix);
	lend(&lent, AFD_DTYPE_BF16, H, width, 0, "model.layers.%d.mlp.%sdown_proj.weight", layer, prefix);
}

static void lend_all(void)
{
	lend(&lent, AFD_DTYPE_BF16, VOCAB, H, 0, "model.embed_tokens.weight");
	lend(&lent, AFD_DTYPE_BF16, H, 0, 0, "model.norm.weight");
	lend_attention(0);
	lend_attention(1);
	lend_mlp("", 0, DENSE);
	lend_mlp("shared_experts.", 1, SHARED);
	matrix("mlp.router.gate.weight", 1, EXPERTS, H);
	lend(&lent, AFD_DTYPE_F32, EXPERTS, 0, 0, "model.layers.1.mlp.expert_bias");
}

static int begin(void **state)
{
	model = NULL;
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_model_close(model);
	afd_context_destroy(ctx);
	free_lent(&lent);
	return 0;
}

static void open_apart(void)
{
	char prefix[40];

	lend_all();
	for (int e = 0; e < EXPERTS; e++) {
		snprintf(prefix, sizeof(prefix), "experts.%d.", e);
		lend_mlp(prefix, 1, WIDTH);
	}
	if (open_lent(&model, ctx, &lent, CONFIG))
		fail_msg("%s", afd_last_error());
}

static struct afd_role_info held(struct afd_shard_params p)
{
	struct afd_role_info info = { .size = sizeof(info) };

	p.size = sizeof(p);
	if (afd_model_shard(model, &p, &info))
		fail_msg("%s", afd_last_error());
	return info;
}

static struct afd_role_info ffn(uint32_t tp, uint32_t n_tp, uint32_t ep, uint32_t n_ep)
{
	return held((struct afd_shard_params){ .role = AFD_ROLE_FFN, .shard = { tp, n_tp, ep, n_ep } });
}

static struct afd_role_info attention(uint32_t tp, uint32_t n_tp)
{
	return held(
		(struct afd_shard_params){ .role = AFD_ROLE_ATTENTION, .gate = AFD_GATE_FFN, .shard = { .tp = tp, .n_tp = n_tp } });
}

enum { ROUTER_BYTES = 2 * EXPERTS * H + 4 * EXPERTS };

/* ---- heads ---- */

static void check_heads(uint32_t n_heads, uint32_t n_kv, uint32_t n)
{
	uint32_t at = 0, group = n_heads / n_kv;

	for (uint32_t i = 0; i < n; i++) {
		struct afd__heads h = afd__shard_heads(n_heads, n_kv, i, n);
		uint32_t n_q = h.q.end - h.q.begin, n_own = h.kv.end - h.kv.begin;

		assert_int_equal(h.q.begin, at);
		assert_true(n_q > 0 && n_own > 0);
		assert_int_equal(n_q % n_own, 0);
		/* query head j of this rank uses its KV head j / (n_q / n_own), which must be that of the whole */
		for (uint32_t j = 0; j < n_q; j++)
			assert_int_equal(h.kv.begin + j / (n_q / n_own), (h.q.begin + j) / group);
		at = h.q.end;
	}
	assert_int_equal(at, n_heads);
}

static void heads_are_dealt_out_with_the_kv_heads_that_they_use(void **state)
{
	static const uint32_t groups[] = { 1, 2, 3, 4, 5, 8 };

	for (uint32_t n_kv = 1; n_kv <= 8; n_kv++) {
		for (size_t g = 0; g < sizeof(groups) / sizeof(groups[0]); g++) {
			for (uint32_t n = 1; n <= n_kv * groups[g]; n++)
				check_heads(n_kv * groups[g], n_kv, n);
		}
	}
}

static void kv_heads_are_copied_only_when_there_are_more_ranks(void **state)
{
	struct afd__heads two = afd__shard_heads(8, 4, 1, 2), eight = afd__shard_heads(8, 4, 5, 8);

	assert_int_equal(two.kv.begin, 2);
	assert_int_equal(two.kv.end, 4);
	assert_int_equal(two.q.begin, 4);
	assert_int_equal(eight.kv.begin, 2);
	assert_int_equal(eight.kv.end, 3);
	assert_int_equal(eight.q.begin, 5);
	assert_int_equal(eight.q.end, 6);
}

/* ---- sums ---- */

static void one_shard_is_the_role(void **state)
{
	struct afd_role_info role = { .size = sizeof(role) };

	open_apart();
	assert_int_equal(afd_model_role(model, AFD_ROLE_FFN, &role), 0);
	assert_int_equal(ffn(0, 1, 0, 1).bytes, role.bytes);
	assert_int_equal(ffn(0, 1, 0, 1).n_tensors, role.n_tensors);
	assert_int_equal(ffn(0, 0, 0, 0).bytes, role.bytes);
	assert_int_equal(afd_model_role(model, AFD_ROLE_ATTENTION, &role), 0);
	assert_int_equal(attention(0, 1).bytes, role.bytes);
	assert_int_equal(attention(0, 1).n_tensors, role.n_tensors);
}

static void check_ffn_sum(uint32_t n_tp, uint32_t n_ep)
{
	uint64_t bytes = 0;

	for (uint32_t ep = 0; ep < n_ep; ep++) {
		for (uint32_t tp = 0; tp < n_tp; tp++)
			bytes += ffn(tp, n_tp, ep, n_ep).bytes - ROUTER_BYTES;
	}
	assert_int_equal(bytes + ROUTER_BYTES, ffn(0, 1, 0, 1).bytes);
}

static void the_shards_of_the_ffn_are_the_ffn_and_a_router_each(void **state)
{
	open_apart();
	for (uint32_t n_tp = 1; n_tp <= 4; n_tp++) {
		for (uint32_t n_ep = 1; n_ep <= 5; n_ep++)
			check_ffn_sum(n_tp, n_ep);
	}
}

static void dense_and_shared_width_is_split_over_all_ranks(void **state)
{
	struct afd_shard_params dense = { .role = AFD_ROLE_FFN, .shard = { 1, 2, 1, 2 }, .n_layers = 1 };

	open_apart();
	/* rank 3 of 4: columns 37 .. 50 of 50 */
	assert_int_equal(held(dense).bytes, 2 * 3 * 13 * H);
	/* rank 1 has 12 .. 25, rank 2 has 25 .. 37: tensor-parallel ranks are neighbours */
	dense.shard = (struct afd_shard){ 1, 2, 0, 2 };
	assert_int_equal(held(dense).bytes, 2 * 3 * 13 * H);
	dense.shard = (struct afd_shard){ 0, 2, 1, 2 };
	assert_int_equal(held(dense).bytes, 2 * 3 * 12 * H);
	/* rank 3 also 18 .. 24 of 24 shared, experts 2 .. 5, of each columns 6 .. 12 */
	assert_int_equal(ffn(1, 2, 1, 2).bytes, 2 * 3 * (13 + 6 + 3 * 6) * H + ROUTER_BYTES);
	assert_int_equal(ffn(1, 2, 1, 2).n_tensors, 3 + 3 + 3 * 3 + 2);
}

static void the_heads_of_attention_are_split_and_the_rest_is_copied(void **state)
{
	/* norms, biases of o, embedding */
	uint64_t whole = 2 * (H + VOCAB * H) + 2 * 2 * (5 * H + 2 * DIM);

	open_apart();
	for (uint32_t tp = 0; tp < 2; tp++)
		assert_int_equal(attention(tp, 2).bytes, whole + 2 * 2 * ((3 * 3 + 2) * DIM * H + (3 + 2) * DIM));
	/* one of two ranks of a KV head has a copy of it, and one or two of its three query heads */
	assert_int_equal(attention(0, 4).bytes, whole + 2 * 2 * ((3 * 1 + 2) * DIM * H + (1 + 2) * DIM));
	assert_int_equal(attention(3, 4).bytes, whole + 2 * 2 * ((3 * 2 + 2) * DIM * H + (2 + 2) * DIM));
	assert_int_equal(attention(5, 6).bytes, attention(0, 4).bytes);
}

static void routers_are_attentions_too_when_it_routes(void **state)
{
	struct afd_shard_params p = { .role = AFD_ROLE_ATTENTION };
	uint64_t n_tensors, bytes;

	open_apart();
	n_tensors = held(p).n_tensors;
	bytes = held(p).bytes;
	p.gate = AFD_GATE_FFN;
	assert_int_equal(bytes - held(p).bytes, ROUTER_BYTES);
	assert_int_equal(n_tensors - held(p).n_tensors, 2);
}

static void a_stage_of_some_layers_holds_only_those(void **state)
{
	struct afd_shard_params p = { .role = AFD_ROLE_FFN, .first_layer = 1 };

	open_apart();
	assert_int_equal(held(p).bytes, 2 * 3 * (SHARED + EXPERTS * WIDTH) * H + ROUTER_BYTES);
	p.first_layer = 0;
	p.n_layers = 1;
	assert_int_equal(held(p).bytes, 2 * 3 * DENSE * H);
}

static void a_rank_reads_of_each_fused_tensor_and_holds_its_experts(void **state)
{
	lend_all();
	lend(&lent, AFD_DTYPE_BF16, EXPERTS, 2 * WIDTH, H, "model.layers.1.mlp.experts.gate_up_proj");
	lend(&lent, AFD_DTYPE_BF16, EXPERTS, H, WIDTH, "model.layers.1.mlp.experts.down_proj");
	assert_int_equal(open_lent(&model, ctx, &lent, CONFIG), 0);
	for (uint32_t ep = 0; ep < 2; ep++)
		assert_int_equal(ffn(0, 1, ep, 2).n_tensors, 3 + 3 + 2 + 2);
	assert_int_equal(ffn(0, 1, 1, 2).bytes, 2 * 3 * (25 + 12 + 3 * WIDTH) * H + ROUTER_BYTES);
}

/* The tensors of one shard are enough for it. */
static void experts_of_other_ranks_may_be_missing(void **state)
{
	struct afd_shard_params p = { .size = sizeof(p), .role = AFD_ROLE_FFN, .shard = { 0, 1, 0, 5 } };
	struct afd_role_info info = { .size = sizeof(info) };
	char prefix[40];

	lend_all();
	for (int e = 1; e < EXPERTS; e++) {
		snprintf(prefix, sizeof(prefix), "experts.%d.", e);
		lend_mlp(prefix, 1, WIDTH);
	}
	assert_int_equal(open_lent(&model, ctx, &lent, CONFIG), 0);
	assert_int_equal(afd_model_shard(model, &p, &info), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "model.layers.1.mlp.experts.0.gate_proj.weight"));
	p.shard.ep = 1;
	assert_int_equal(afd_model_shard(model, &p, &info), 0);
}

/* ---- blocks ---- */

#define FP8_CONFIG \
	"{\"model_type\":\"qwen3\",\"hidden_size\":200,\"num_hidden_layers\":1,\"vocab_size\":11,\"num_attention_heads\":2," \
	"\"head_dim\":4,\"intermediate_size\":300}"

/* Shard 1 of 2 owns columns 150 .. 300: of three blocks the second and the third. */
static void scales_of_every_touched_block_are_held(void **state)
{
	lend(&lent, AFD_DTYPE_FP8, 300, 200, 0, "model.layers.0.mlp.gate_proj.weight");
	lend(&lent, AFD_DTYPE_FP8, 300, 200, 0, "model.layers.0.mlp.up_proj.weight");
	lend(&lent, AFD_DTYPE_FP8, 200, 300, 0, "model.layers.0.mlp.down_proj.weight");
	lend(&lent, AFD_DTYPE_F32, 3, 2, 0, "model.layers.0.mlp.gate_proj.weight_scale_inv");
	lend(&lent, AFD_DTYPE_F32, 3, 2, 0, "model.layers.0.mlp.up_proj.weight_scale_inv");
	lend(&lent, AFD_DTYPE_BF16, 2, 3, 0, "model.layers.0.mlp.down_proj.weight_scale_inv");
	assert_int_equal(open_lent(&model, ctx, &lent, FP8_CONFIG), 0);
	assert_int_equal(ffn(0, 2, 0, 1).bytes, 3 * 150 * 200 + 2 * 4 * (2 * 2) + 2 * (2 * 2));
	assert_int_equal(ffn(1, 2, 0, 1).bytes, 3 * 150 * 200 + 2 * 4 * (2 * 2) + 2 * (2 * 2));
	assert_int_equal(ffn(1, 3, 0, 1).bytes, 3 * 100 * 200 + 2 * 4 * (2 * 2) + 2 * (2 * 2));
	assert_int_equal(ffn(2, 3, 0, 1).bytes, 3 * 100 * 200 + 2 * 4 * (2 * 2) + 2 * (2 * 2));
	assert_int_equal(ffn(2, 3, 0, 1).n_tensors, 6);
}

/* ---- what is refused ---- */

static const struct refusal {
	const char *name;
	struct afd_shard_params params;
	const char *text;
} refusals[] = {
	{ "no_role_is_refused", { .shard = { 0, 1, 0, 1 } }, "role is 0" },
	{ "an_index_beyond_its_ranks_is_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 2, 2, 0, 1 } },
	  "tensor-parallel index is 2 of 2, limit 1" },
	{ "an_expert_index_beyond_its_ranks_is_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 0, 1, 3, 3 } },
	  "expert-parallel index is 3 of 3" },
	{ "an_index_without_ranks_is_refused", { .role = AFD_ROLE_FFN, .shard = { .ep = 1 } }, "expert-parallel index is 1 of 1" },
	{ "more_ranks_than_experts_are_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 0, 1, 0, 6 } },
	  "6 expert-parallel ranks, limit 5: the model's experts" },
	{ "more_ranks_than_an_expert_is_wide_are_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 0, 13, 0, 1 } },
	  "13 tensor-parallel ranks, limit 12: the model's expert width" },
	{ "more_ranks_than_shared_experts_are_wide_are_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 0, 12, 0, 3 } },
	  "36 ranks, limit 24: the model's width of shared experts" },
	{ "more_ranks_than_a_dense_layer_is_wide_are_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 0, 12, 0, 5 } },
	  "60 ranks, limit 50: the model's intermediate_size" },
	{ "counts_whose_product_overflows_are_refused",
	  { .role = AFD_ROLE_FFN, .shard = { 0, 1u << 31, 0, 1u << 31 } },
	  "ranks, limit" },
	{ "more_ranks_than_query_heads_are_refused",
	  { .role = AFD_ROLE_ATTENTION, .shard = { .n_tp = 7 } },
	  "7 tensor-parallel ranks, limit 6: the model's query heads" },
	{ "expert_ranks_of_attention_are_refused",
	  { .role = AFD_ROLE_ATTENTION, .shard = { 0, 1, 0, 2 } },
	  "2 expert-parallel ranks, but attention has no experts" },
	{ "an_unknown_gate_is_refused", { .role = AFD_ROLE_ATTENTION, .gate = 3 }, "gate is 3, limit 2" },
	{ "layers_beyond_the_model_are_refused",
	  { .role = AFD_ROLE_FFN, .first_layer = 1, .n_layers = 2 },
	  "2 layers from 1 on, the model has 2" },
};

static void check_refusal(void **state)
{
	const struct refusal *c = *state;
	struct afd_role_info info = { .size = sizeof(info), .bytes = 7 };
	struct afd_shard_params p = c->params;

	open_apart();
	p.size = sizeof(p);
	assert_int_equal(afd_model_shard(model, &p, &info), -EINVAL);
	if (!strstr(afd_last_error(), c->text))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), c->text);
	assert_int_equal(info.bytes, 7);
}

/* ---- all cases ---- */

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)

static const struct CMUnitTest single[] = {
	T(heads_are_dealt_out_with_the_kv_heads_that_they_use),
	T(kv_heads_are_copied_only_when_there_are_more_ranks),
	T(one_shard_is_the_role),
	T(the_shards_of_the_ffn_are_the_ffn_and_a_router_each),
	T(dense_and_shared_width_is_split_over_all_ranks),
	T(the_heads_of_attention_are_split_and_the_rest_is_copied),
	T(routers_are_attentions_too_when_it_routes),
	T(a_stage_of_some_layers_holds_only_those),
	T(a_rank_reads_of_each_fused_tensor_and_holds_its_experts),
	T(experts_of_other_ranks_may_be_missing),
	T(scales_of_every_touched_block_are_held),
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(refusals)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(refusals); i++)
		tests[n++] = (struct CMUnitTest){ refusals[i].name, check_refusal, begin, end, (void *)&refusals[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
