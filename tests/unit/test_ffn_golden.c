/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The FFN of every golden checkpoint with experts or e4m3 weights, layer by layer: against double
 * precision, with the gate on either side, and in every way of sharding. One test per directory
 * under tests/golden.
 */
#include "routed_model.h"

#include <dirent.h>

enum { MAX_CASES = 100, N_ROWS = 7, MAX_HIDDEN = 256 };

static afd_context *ctx;
static char root[300], names[MAX_CASES][160], dirs[MAX_CASES][600];
static struct CMUnitTest tests[MAX_CASES];

struct golden {
	afd_model *model;
	afd_ffn *ffn;
	uint32_t hidden, n_layers;
	float x[N_ROWS * MAX_HIDDEN];
};

static void setup_golden(struct golden *g, const char *dir)
{
	if (afd_model_open(&g->model, ctx, dir, NULL))
		fail_msg("%s", afd_last_error());
	/* Passes of three rows, so that there are some. */
	g->ffn = routed_stage(g->model, NULL, 3);
	g->hidden = g->model->arch.hidden_size;
	g->n_layers = g->model->arch.n_layers;
	assert_true(g->hidden <= MAX_HIDDEN);
	draw_rows(g->x, (size_t)N_ROWS * g->hidden, 17);
}

static void teardown_golden(struct golden *g)
{
	afd_ffn_destroy(g->ffn);
	afd_model_close(g->model);
}

/* ---- the numbers ---- */

static void check_numbers(const struct golden *g, uint32_t layer, const float *y)
{
	double expected[N_ROWS * MAX_HIDDEN], nmse;

	for (int i = 0; i < N_ROWS; i++)
		reference_row(g->model, layer, g->x + i * g->hidden, expected + i * g->hidden);
	nmse = nmse_of(y, expected, (size_t)N_ROWS * g->hidden);
	if (!(nmse <= 1e-10))
		fail_msg("layer %u: NMSE %g, limit 1e-10", layer, nmse);
}

static void check_gate(const struct golden *g, uint32_t layer, const float *y)
{
	const struct afd__layer *l = &g->model->arch.layers[layer];
	float weights[N_ROWS * REFERENCE_TOP_K], again[N_ROWS * MAX_HIDDEN];
	int32_t ids[N_ROWS * REFERENCE_TOP_K];

	gate_rows(g->model, layer, N_ROWS, g->x, ids, weights);
	routed_forward(g->ffn, layer, N_ROWS, g->x, ids, weights, l->top_k, again);
	assert_memory_equal(y, again, sizeof(float) * N_ROWS * g->hidden);
}

static void check_rows_alone(const struct golden *g, uint32_t layer, const float *y)
{
	float alone[MAX_HIDDEN];

	for (int i = 0; i < N_ROWS; i++) {
		routed_forward(g->ffn, layer, 1, g->x + i * g->hidden, NULL, NULL, 0, alone);
		assert_memory_equal(alone, y + i * g->hidden, sizeof(float) * g->hidden);
	}
}

/* ---- shards ---- */

struct sharding {
	uint32_t n_tp, n_ep;
};

static void check_held(const struct golden *g, const afd_ffn *ffn, const struct afd_shard *shard)
{
	struct afd_shard_params params = {
		.size = sizeof(params), .role = AFD_ROLE_FFN, .shard = *shard
	};
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	struct afd_role_info info = { .size = sizeof(info) };

	assert_int_equal(afd_model_shard(g->model, &params, &info), 0);
	assert_int_equal(afd_ffn_stats(ffn, &stats), 0);
	assert_int_equal(stats.stored_bytes, info.bytes);
	assert_true(stats.weight_bytes >= info.bytes * 9 / 10);
}

/* Partial results added in rank order, in float32 from +0.0 on. */
static void add_shards(const struct golden *g, const struct sharding *s, float *sum)
{
	size_t n = (size_t)N_ROWS * g->hidden;
	float part[N_ROWS * MAX_HIDDEN];

	memset(sum, 0, sizeof(float) * n * g->n_layers);
	for (uint32_t rank = 0; rank < s->n_tp * s->n_ep; rank++) {
		struct afd_shard shard = { rank % s->n_tp, s->n_tp, rank / s->n_tp, s->n_ep };
		afd_ffn *ffn = routed_stage(g->model, &shard, 0);

		check_held(g, ffn, &shard);
		for (uint32_t layer = 0; layer < g->n_layers; layer++) {
			routed_forward(ffn, layer, N_ROWS, g->x, NULL, NULL, 0, part);
			for (size_t i = 0; i < n; i++)
				sum[layer * n + i] += part[i];
		}
		afd_ffn_destroy(ffn);
	}
}

static void check_sharding(const struct golden *g, const struct sharding *s)
{
	size_t n = (size_t)N_ROWS * g->hidden;
	float *sum = malloc(sizeof(float) * n * g->n_layers), y[N_ROWS * MAX_HIDDEN];

	add_shards(g, s, sum);
	for (uint32_t layer = 0; layer < g->n_layers; layer++) {
		double whole[N_ROWS * MAX_HIDDEN], nmse;

		routed_forward(g->ffn, layer, N_ROWS, g->x, NULL, NULL, 0, y);
		for (size_t i = 0; i < n; i++)
			whole[i] = y[i];
		nmse = nmse_of(sum + layer * n, whole, n);
		if (!(nmse <= 1e-10))
			fail_msg("tp %u, ep %u, layer %u: NMSE %g, limit 1e-10", s->n_tp, s->n_ep,
				layer, nmse);
	}
	free(sum);
}

static bool has_experts(const struct golden *g)
{
	for (uint32_t layer = 0; layer < g->n_layers; layer++) {
		if (g->model->arch.layers[layer].ffn_kind == AFD_FFN_MOE)
			return true;
	}
	return false;
}

/* ---- in place ---- */

static void check_in_place(const struct golden *g, const char *dir, const struct afd_shard *shard)
{
	struct afd_model_params params = { .size = sizeof(params),
		.weights = AFD_WEIGHTS_IN_PLACE };
	struct afd_ffn_stats packed = { .size = sizeof(packed) }, lent = { .size = sizeof(lent) };
	size_t n = (size_t)N_ROWS * g->hidden;
	float y[N_ROWS * MAX_HIDDEN], in_place[N_ROWS * MAX_HIDDEN];
	double expected[N_ROWS * MAX_HIDDEN], nmse;
	afd_ffn *ffn = routed_stage(g->model, shard, 0), *other;
	afd_model *model;

	assert_int_equal(afd_model_open(&model, ctx, dir, &params), 0);
	other = routed_stage(model, shard, 0);
	for (uint32_t layer = 0; layer < g->n_layers; layer++) {
		routed_forward(ffn, layer, N_ROWS, g->x, NULL, NULL, 0, y);
		routed_forward(other, layer, N_ROWS, g->x, NULL, NULL, 0, in_place);
		for (size_t i = 0; i < n; i++)
			expected[i] = y[i];
		nmse = nmse_of(in_place, expected, n);
		if (!(nmse <= 1e-10))
			fail_msg("in place: layer %u: NMSE %g, limit 1e-10", layer, nmse);
	}
	assert_int_equal(afd_ffn_stats(ffn, &packed), 0);
	assert_int_equal(afd_ffn_stats(other, &lent), 0);
	assert_memory_equal(packed.weights, lent.weights, sizeof(packed.weights));
	assert_int_equal(packed.stored_bytes, lent.stored_bytes);
	/* Experts that lie apart are packed all the same; what lies in a stack is not. */
	assert_true(lent.weight_bytes <= packed.weight_bytes);
	if (!shard && strstr(dir, "fused"))
		assert_true(lent.weight_bytes < packed.weight_bytes / 2);
	afd_ffn_destroy(other);
	afd_ffn_destroy(ffn);
	afd_model_close(model);
}

/* ---- the fingerprint ---- */

/* Taken by the version that hashed in one thread. */
static const struct recorded {
	const char *name;
	uint64_t weights[2];
} recorded[] = {
	{ "fp8-moe-ragged", { 0x691ef9b84c1c264e, 0xeb65a0ee756ce975 } },
	{ "moe-fused", { 0x64159b944e0f7b90, 0x301efe89ffa6d682 } },
	{ "afmoe-two-shared", { 0xd9b27563479e0e23, 0xb948a69cf7ac2d00 } },
};

static void take_fingerprint(const char *dir, uint32_t n_threads, uint64_t weights[2])
{
	const struct afd_context_params params = { .size = sizeof(params), .n_threads = n_threads };
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	afd_context *own = NULL;
	afd_model *model = NULL;
	afd_ffn *ffn;

	assert_int_equal(afd_context_create(&own, &params), 0);
	assert_int_equal(afd_model_open(&model, own, dir, NULL), 0);
	ffn = routed_stage(model, &(struct afd_shard){ 1, 2, 0, 1 }, 3);
	assert_int_equal(afd_ffn_stats(ffn, &stats), 0);
	memcpy(weights, stats.weights, sizeof(stats.weights));
	afd_ffn_destroy(ffn);
	afd_model_close(model);
	afd_context_destroy(own);
}

static void check_fingerprint(const char *dir)
{
	uint64_t one[2], three[2];

	take_fingerprint(dir, 1, one);
	take_fingerprint(dir, 3, three);
	assert_memory_equal(one, three, sizeof(one));
	for (size_t i = 0; i < sizeof(recorded) / sizeof(recorded[0]); i++) {
		if (!strcmp(strrchr(dir, '/') + 1, recorded[i].name) &&
			memcmp(one, recorded[i].weights, sizeof(one)))
			fail_msg("%s: fingerprint { 0x%016llx, 0x%016llx }", dir,
				(unsigned long long)one[0], (unsigned long long)one[1]);
	}
}

/* ---- one checkpoint ---- */

static void check_checkpoint(void **state)
{
	static const struct sharding shardings[] = { { 2, 1 }, { 3, 1 }, { 1, 2 }, { 2, 2 } };
	float y[N_ROWS * MAX_HIDDEN];
	struct golden g;

	setup_golden(&g, *state);
	for (uint32_t layer = 0; layer < g.n_layers; layer++) {
		routed_forward(g.ffn, layer, N_ROWS, g.x, NULL, NULL, 0, y);
		check_numbers(&g, layer, y);
		check_rows_alone(&g, layer, y);
		if (g.model->arch.layers[layer].ffn_kind == AFD_FFN_MOE)
			check_gate(&g, layer, y);
	}
	check_held(&g, g.ffn, &(struct afd_shard){ 0 });
	for (size_t i = 0; i < sizeof(shardings) / sizeof(shardings[0]); i++) {
		if (shardings[i].n_ep == 1 || has_experts(&g))
			check_sharding(&g, &shardings[i]);
	}
	check_fingerprint(*state);
	check_in_place(&g, *state, NULL);
	check_in_place(&g, *state, &(struct afd_shard){ 1, 2, 0, 1 });
	teardown_golden(&g);
}

static bool is_taken(const char *name)
{
	return (!strncmp(name, "moe-", 4) || !strncmp(name, "afmoe-", 6) ||
		       !strncmp(name, "fp8-", 4)) &&
	       strcmp(name, "afmoe-scale-absent");
}

static size_t find_cases(void)
{
	const char *source = getenv("AFD_TEST_SOURCE");
	struct dirent *entry;
	size_t n = 0;
	DIR *d;

	snprintf(root, sizeof(root), "%s/golden", source ? source : "tests");
	d = opendir(root);
	while (d && n < MAX_CASES && (entry = readdir(d))) {
		if (!is_taken(entry->d_name))
			continue;
		snprintf(dirs[n], sizeof(dirs[n]), "%s/%s", root, entry->d_name);
		snprintf(names[n], sizeof(names[n]), "golden_%.100s", entry->d_name);
		tests[n] = (struct CMUnitTest){ names[n], check_checkpoint, NULL, NULL, dirs[n] };
		n++;
	}
	if (d)
		closedir(d);
	return n;
}

int main(void)
{
	size_t n = find_cases();
	int rc;

	if (n < 40) {
		fprintf(stderr, "%zu checkpoints under %s, there are more than 40\n", n, root);
		return 1;
	}
	if (afd_context_create(&ctx, NULL))
		return 1;
	rc = _cmocka_run_group_tests("ffn golden", tests, n, NULL, NULL);
	afd_context_destroy(ctx);
	return rc;
}
