/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Quantised activations of FFN shards, held against double precision that rounds the same way, rank
 * by rank. Groups of 128 lie where they lie in the whole width; a shard that begins or ends inside
 * one takes the largest of its own part. Inputs are drawn until no number lies so near a tie that
 * float32 noise could push it over.
 */
#include "routed_model.h"

enum { N_ROWS = 3, MAX_HIDDEN = 300, MAX_WIDTH = 600 };
static const double CLEAR = 1e-4; /* of a step of e4m3 */

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

/* ---- the reference ---- */

static double nearest_tie;

static double round_e4m3(double x)
{
	int exponent = ilogb(x) > -6 ? ilogb(x) : -6;
	double step = ldexp(1, exponent - 3), parts = fabs(x) / step;
	double tie = fabs(parts - floor(parts) - 0.5);

	if (fabs(x) < 448 * (1 - 1e-9) && tie < nearest_tie)
		nearest_tie = tie;
	return copysign(fmin(rint(parts) * step, 448), x);
}

/* A part of a row that begins at `offset`. */
static void quantize(double *x, uint32_t n, uint32_t offset)
{
	for (uint32_t i = 0, end; i < n; i = end) {
		double largest = 1e-10, scale;

		end = (offset + i) / 128 * 128 + 128 - offset;
		end = end < n ? end : n;
		for (uint32_t j = i; j < end; j++)
			largest = fmax(largest, fabs(x[j]));
		scale = (float)largest / 448.0f;
		for (uint32_t j = i; j < end; j++)
			x[j] = round_e4m3(x[j] / scale) * scale;
	}
}

struct part {
	uint32_t begin, end;
};

static struct part part_of(uint32_t n, uint32_t i, uint32_t n_parts)
{
	return (struct part){ i * n / n_parts, (i + 1) * n / n_parts };
}

/* y += weight * down(silu(gate x) * up x) over the rows `part` of gate and up. */
static void add_part(const struct afd__tensor w[3], const double *x, struct part part,
	double weight, double *y)
{
	uint32_t hidden = (uint32_t)w[2].shape[0], n = part.end - part.begin;
	double a[MAX_WIDTH];

	for (uint32_t i = 0; i < n; i++) {
		double gate = 0, up = 0;

		for (uint32_t k = 0; k < hidden; k++) {
			gate += x[k] * weight_at(&w[0], part.begin + i, k);
			up += x[k] * weight_at(&w[1], part.begin + i, k);
		}
		a[i] = gate / (1 + exp(-gate)) * up;
	}
	quantize(a, n, part.begin);
	for (uint32_t k = 0; k < hidden; k++) {
		for (uint32_t i = 0; i < n; i++)
			y[k] += weight * a[i] * weight_at(&w[2], k, part.begin + i);
	}
}

/* What a rank gives for a row; the router sees x as it is. Ends early once a number is near a tie:
 * nobody looks at y then. */
static void reference_rank(const struct afd_model *m, uint32_t layer, const struct afd_shard *s,
	const float *row, double *y)
{
	const struct afd__layer *l = &m->arch.layers[layer];
	uint32_t hidden = m->arch.hidden_size, width;
	double x[MAX_HIDDEN], as_it_is[MAX_HIDDEN], weights[REFERENCE_TOP_K];
	int32_t ids[REFERENCE_TOP_K];
	struct afd__tensor t[3];

	for (uint32_t k = 0; k < hidden; k++)
		x[k] = as_it_is[k] = row[k];
	quantize(x, hidden, 0);
	if (nearest_tie <= CLEAR)
		return;
	if (l->ffn_kind == AFD_FFN_MOE)
		reference_route(m, layer, as_it_is, ids, weights);
	memset(y, 0, hidden * sizeof(*y));
	if (l->ffn_kind == AFD_FFN_DENSE || l->shared_size) {
		reference_tensors(m, layer, -1,
			l->shared_size ? AFD__TENSOR_SHARED_GATE : AFD__TENSOR_GATE, t);
		width = (uint32_t)t[0].shape[0];
		add_part(t, x, part_of(width, s->ep * s->n_tp + s->tp, s->n_tp * s->n_ep), 1, y);
	}
	for (uint32_t i = 0; l->ffn_kind == AFD_FFN_MOE && i < l->top_k && nearest_tie > CLEAR; i++) {
		struct part experts = part_of(l->n_experts, s->ep, s->n_ep);

		if ((uint32_t)ids[i] < experts.begin || (uint32_t)ids[i] >= experts.end)
			continue;
		reference_tensors(m, layer, ids[i], AFD__TENSOR_EXPERT_GATE, t);
		width = (uint32_t)t[0].shape[0];
		add_part(t, x, part_of(width, s->tp, s->n_tp), weights[i], y);
	}
}

/* ---- ranks ---- */

static afd_ffn *stage(const afd_model *model, const struct afd_shard *shard)
{
	const struct afd_ffn_params params = { .size = sizeof(params),
		.device = test_device(),
		.quantize_activations = 1,
		.shard = *shard };
	afd_ffn *ffn;

	if (afd_ffn_create(&ffn, model, NULL, &params))
		fail_msg("%s", afd_last_error());
	return ffn;
}

/* The first draw of rows that is clear for a rank; `expected` [N_ROWS][hidden] of it. */
static void draw_clear(const struct routed_model *m, uint32_t layer, const struct afd_shard *s,
	float *x, double *expected)
{
	uint32_t hidden = m->model->arch.hidden_size;

	for (uint32_t seed = 1; seed < 500; seed++) {
		draw_rows(x, N_ROWS * hidden, seed);
		nearest_tie = 1;
		for (int row = 0; row < N_ROWS && nearest_tie > CLEAR; row++)
			reference_rank(m->model, layer, s, x + row * hidden,
				expected + row * hidden);
		if (nearest_tie > CLEAR)
			return;
	}
	fail_msg("every draw has a number near a tie");
}

static void check_rank(const char *name, const struct routed_model *m, const struct afd_shard *s)
{
	uint32_t hidden = m->model->arch.hidden_size;
	float x[N_ROWS * MAX_HIDDEN], y[N_ROWS * MAX_HIDDEN];
	double expected[N_ROWS * MAX_HIDDEN], error;
	afd_ffn *ffn = stage(m->model, s);

	for (uint32_t layer = 0; layer < m->model->arch.n_layers; layer++) {
		draw_clear(m, layer, s, x, expected);
		routed_forward(ffn, layer, N_ROWS, x, NULL, NULL, 0, y);
		error = nmse_of(y, expected, N_ROWS * hidden);
		if (!(error <= 1e-10))
			fail_msg("%s, tp %u/%u, ep %u/%u, layer %u: NMSE %g", name, s->tp, s->n_tp,
				s->ep, s->n_ep, layer, error);
	}
	afd_ffn_destroy(ffn);
}

static void every_rank_agrees_with_double_that_rounds_its_part_of_a_group(void **state)
{
	static const struct {
		const char *name, *family;
		struct routed_sizes sizes;
		uint32_t n_tp, n_ep;
	} cases[] = {
		/* hidden, layers, dense width, expert width, top k, experts */
		{ "whole", deepseek_v3, { 160, 2, 300, 200, 3, 8 }, 1, 1 },
		{ "cut at 100 and 150", deepseek_v3, { 160, 2, 300, 200, 3, 8 }, 2, 1 },
		{ "a rank within one group", deepseek_v3, { 160, 2, 300, 200, 3, 8 }, 5, 1 },
		{ "by experts and width", deepseek_v3, { 160, 2, 300, 200, 3, 8 }, 2, 2 },
		{ "cut between groups", deepseek_v3, { 128, 2, 512, 256, 3, 8 }, 2, 2 },
		{ "without shared experts", qwen3_moe, { 136, 2, 96, 150, 2, 8 }, 2, 4 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct routed_model m;

		routed_model_open(&m, ctx, cases[i].family, &cases[i].sizes, AFD_DTYPE_FP8);
		for (uint32_t rank = 0; rank < cases[i].n_tp * cases[i].n_ep; rank++) {
			const struct afd_shard shard = { rank % cases[i].n_tp, cases[i].n_tp,
				rank / cases[i].n_tp, cases[i].n_ep };

			check_rank(cases[i].name, &m, &shard);
		}
		routed_model_close(&m);
	}
}

/* Error of the sum of two ranks against the whole, in a layer with experts. */
static double error_of_sum(uint32_t dense_width, uint32_t expert_width)
{
	const struct routed_sizes sizes = { 160, 2, dense_width, expert_width, 3, 8 };
	const struct afd_shard shards[] = { { 0, 1, 0, 1 }, { 0, 2, 0, 1 }, { 1, 2, 0, 1 } };
	float x[N_ROWS * 160], y[3][N_ROWS * 160];
	double whole[N_ROWS * 160], error;
	struct routed_model m;

	routed_model_open(&m, ctx, deepseek_v3, &sizes, AFD_DTYPE_FP8);
	draw_clear(&m, 1, &shards[0], x, whole);
	for (int i = 0; i < 3; i++) {
		afd_ffn *ffn = stage(m.model, &shards[i]);

		routed_forward(ffn, 1, N_ROWS, x, NULL, NULL, 0, y[i]);
		afd_ffn_destroy(ffn);
	}
	for (int i = 0; i < N_ROWS * 160; i++)
		y[0][i] = y[1][i] + y[2][i];
	error = nmse_of(y[0], whole, N_ROWS * 160);
	routed_model_close(&m);
	return error;
}

static void shards_cut_between_groups_add_up_to_the_whole_and_others_nearly(void **state)
{
	double error = error_of_sum(512, 256);

	if (!(error <= 1e-10))
		fail_msg("cut between groups: NMSE %g", error);
	error = error_of_sum(300, 200);
	if (!(error > 1e-7 && error < 1e-2))
		fail_msg("cut inside groups: NMSE %g", error);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_rank_agrees_with_double_that_rounds_its_part_of_a_group),
		cmocka_unit_test(shards_cut_between_groups_add_up_to_the_whole_and_others_nearly),
	};

	return cmocka_run_group_tests(tests, make_context, end_context);
}
