/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations on rows against references in double: embed, norm, angles, activation, argmax,
 * copy and the transfers. Widths are chosen around the lanes of a vector (1, 15, 16, 17, 33) and
 * one larger.
 */
#include "rig.h"

#include <math.h>
#include <string.h>

static const uint32_t widths[] = { 1, 2, 7, 15, 16, 17, 33, 96, 300 };
#define N_WIDTHS  (sizeof(widths) / sizeof(widths[0]))
#define MAX_WIDTH 300
#define N_ROWS    5

static void check_norm(struct rig *r, uint32_t width, float scale, bool with_add)
{
	float h[N_ROWS * MAX_WIDTH], add[N_ROWS * MAX_WIDTH], weight[MAX_WIDTH],
		got_h[N_ROWS * MAX_WIDTH], got[N_ROWS * MAX_WIDTH];
	size_t bytes = N_ROWS * width * sizeof(float);
	float eps = 1e-6f;

	rig_fill(r, h, N_ROWS * width, scale);
	rig_fill(r, add, N_ROWS * width, scale);
	rig_fill(r, weight, width, 1);
	struct afd__norm_args a = { .h = rig_input(r, h, bytes),
		.add = with_add ? rig_input(r, add, bytes) : NULL,
		.weight = rig_input(r, weight, width * sizeof(float)),
		.out = rig_output(r, bytes),
		.n_rows = N_ROWS,
		.width = width,
		.eps = eps };
	RIG_OK(afd__norm(&r->q, &a));
	rig_fetch(r, got_h, a.h, bytes);
	rig_fetch(r, got, a.out, bytes);
	for (uint32_t row = 0; row < N_ROWS; row++) {
		double sum = 0;

		for (uint32_t i = row * width; i < (row + 1) * width; i++) {
			float x = with_add ? h[i] + add[i] : h[i];

			assert_memory_equal(&got_h[i], &x, sizeof(x));
			sum += (double)x * x;
		}
		for (uint32_t i = 0; i < width; i++)
			rig_near(got[row * width + i],
				got_h[row * width + i] / sqrt(sum / width + (double)eps) *
					weight[i],
				2e-6, 0, "norm", i);
	}
}

static void norm_agrees_with_double_in_every_width_and_kind(void **state)
{
	for (size_t k = 0; k < RIG_N_KINDS; k++) {
		for (size_t w = 0; w < N_WIDTHS; w++) {
			struct rig *r = rig_make(2);

			check_norm(r, widths[w], rig_kinds[k].scale, false);
			check_norm(r, widths[w], rig_kinds[k].scale, true);
			rig_end(r);
		}
	}
}

static void norm_without_an_output_only_adds(void **state)
{
	struct rig *r = *state;
	float h[40], add[40], got[40];

	rig_fill(r, h, 40, 1);
	rig_fill(r, add, 40, 1);
	struct afd__norm_args a = { .h = rig_input(r, h, sizeof(h)),
		.add = rig_input(r, add, sizeof(add)),
		.n_rows = 2,
		.width = 20 };
	RIG_OK(afd__norm(&r->q, &a));
	rig_fetch(r, got, a.h, sizeof(got));
	for (int i = 0; i < 40; i++)
		assert_true(got[i] == h[i] + add[i]);
}

static void check_activation(struct rig *r, uint32_t width, float scale)
{
	float x[N_ROWS * 2 * MAX_WIDTH], got[N_ROWS * MAX_WIDTH];

	rig_fill(r, x, N_ROWS * 2 * width, scale);
	struct afd__activation_args a = { .gate_up = rig_input(
						  r, x, N_ROWS * 2 * width * sizeof(float)),
		.out = rig_output(r, N_ROWS * width * sizeof(float)),
		.n_rows = N_ROWS,
		.width = width };
	RIG_OK(afd__activation(&r->q, &a));
	rig_fetch(r, got, a.out, N_ROWS * width * sizeof(float));
	for (uint32_t i = 0; i < N_ROWS * width; i++) {
		double gate = x[i / width * 2 * width + i % width],
		       up = x[i / width * 2 * width + width + i % width];

		rig_near(got[i], gate / (1 + exp(-gate)) * up, 1e-6, 1e-37, "activation", i);
	}
}

static void activation_agrees_with_double_in_every_width_and_kind(void **state)
{
	for (size_t k = 0; k < RIG_N_KINDS; k++) {
		for (size_t w = 0; w < N_WIDTHS; w++) {
			struct rig *r = rig_make(2);

			check_activation(r, widths[w], rig_kinds[k].scale);
			rig_end(r);
		}
	}
}

static void silu_is_right_from_minus_87_to_90(void **state)
{
	enum { N = 17700 };
	struct rig *r = *state;
	static float x[2 * N], got[N];

	for (int i = 0; i < N; i++) {
		x[i] = -87 + 0.01f * (float)i;
		x[N + i] = 1;
	}
	struct afd__activation_args a = { .gate_up = rig_input(r, x, sizeof(x)),
		.out = rig_output(r, sizeof(got)),
		.n_rows = 1,
		.width = N };
	RIG_OK(afd__activation(&r->q, &a));
	rig_fetch(r, got, a.out, sizeof(got));
	for (int i = 0; i < N; i++)
		rig_near(got[i], x[i] / (1 + exp(-(double)x[i])), 4 * 0x1p-23, 0x1p-120, "silu",
			(size_t)i);
}

static void activation_passes_nan_and_infinity_on(void **state)
{
	struct rig *r = *state;
	float x[8] = { NAN, INFINITY, -1000, 1, 1, 1, 1, NAN }, got[4]; /* gates, then ups */

	struct afd__activation_args a = { .gate_up = rig_input(r, x, sizeof(x)),
		.out = rig_output(r, sizeof(got)),
		.n_rows = 1,
		.width = 4 };
	RIG_OK(afd__activation(&r->q, &a));
	rig_fetch(r, got, a.out, sizeof(got));
	assert_true(isnan(got[0]));
	assert_true(isinf(got[1]) && got[1] > 0);
	assert_true(got[2] == 0);
	assert_true(isnan(got[3]));
}

static void angles_are_those_of_the_float_product_even_far_out(void **state)
{
	enum { HALF = 12 };
	struct rig *r = *state;
	int32_t positions[] = { 0, 1, 77, 4095, 262143, 2000000000 };
	float inv_freq[HALF], got[6 * 2 * HALF];

	for (int i = 0; i < HALF; i++)
		inv_freq[i] = (float)pow(1e6, -2.0 * i / (2 * HALF));
	struct afd__angles_args a = { .positions = rig_input(r, positions, sizeof(positions)),
		.inv_freq = rig_input(r, inv_freq, sizeof(inv_freq)),
		.out = rig_output(r, sizeof(got)),
		.n_rows = 6,
		.head_dim = 2 * HALF,
		.scale = 1.25f };
	RIG_OK(afd__angles(&r->q, &a));
	rig_fetch(r, got, a.out, sizeof(got));
	for (int row = 0; row < 6; row++) {
		for (int i = 0; i < HALF; i++) {
			double angle = (float)positions[row] * inv_freq[i];

			rig_near(got[row * 2 * HALF + i], 1.25 * cos(angle), 2e-7, 1e-12, "cosine",
				(size_t)i);
			rig_near(got[row * 2 * HALF + HALF + i], 1.25 * sin(angle), 2e-7, 1e-12,
				"sine", (size_t)i);
		}
	}
}

static void check_embed(struct rig *r, int32_t dtype, bool packed)
{
	enum { VOCAB = 70, HIDDEN = 45, N = 7 };
	static _Alignas(4) char rows[VOCAB * HIDDEN * 4];
	int32_t ids[N] = { 0, 69, 31, 32, 15, 16, 69 };
	float got[N * HIDDEN];
	struct afd__matrix table;

	for (size_t i = 0; i < VOCAB * HIDDEN; i++)
		rig_encode(rows, i, dtype, rig_random(r, 1));
	RIG_OK(afd__matrix_create(r->dev, &table, VOCAB, HIDDEN, dtype,
		packed ? NULL : rig_lend(r, rows, VOCAB * HIDDEN * rig_bytes(dtype))));
	if (packed)
		RIG_OK(afd__matrix_load(r->dev, &table, rows, 0, VOCAB));
	struct afd__embed_args a = { .table = table,
		.ids = rig_input(r, ids, sizeof(ids)),
		.out = rig_output(r, sizeof(got)),
		.n_rows = N,
		.scale = 3 };
	RIG_OK(afd__embed(&r->q, &a));
	rig_fetch(r, got, a.out, sizeof(got));
	for (size_t i = 0; i < N * HIDDEN; i++) {
		float want = (float)rig_decode(
				     rows, (size_t)ids[i / HIDDEN] * HIDDEN + i % HIDDEN, dtype) *
			     3;

		assert_memory_equal(&got[i], &want, sizeof(want));
	}
	afd__matrix_destroy(r->dev, &table);
}

static void embed_gives_the_rows_of_packed_and_in_place_tables_of_every_dtype(void **state)
{
	for (int32_t dtype = AFD_DTYPE_F32; dtype <= AFD_DTYPE_F16; dtype++) {
		check_embed(*state, dtype, false);
		check_embed(*state, dtype, true);
	}
}

static void argmax_is_the_lowest_index_of_the_largest(void **state)
{
	struct rig *r = *state;
	static float x[3][1000];
	int32_t got[3];

	rig_fill(r, x[0], 3000, 1);
	x[0][998] = x[0][41] = x[0][40] = 100;
	for (int i = 0; i < 1000; i++)
		x[1][i] = -5;
	x[2][999] = 1e30f;
	struct afd__argmax_args a = { .x = rig_input(r, x, sizeof(x)),
		.ids = rig_output(r, sizeof(got)),
		.n_rows = 3,
		.width = 1000 };
	RIG_OK(afd__argmax(&r->q, &a));
	rig_fetch(r, got, a.ids, sizeof(got));
	assert_int_equal(got[0], 40);
	assert_int_equal(got[1], 0);
	assert_int_equal(got[2], 999);
}

static void argmax_names_the_first_number_that_is_not_finite(void **state)
{
	struct rig *r = *state;
	float x[5][37];
	int32_t got[5];

	rig_fill(r, x[0], 5 * 37, 1);
	x[0][36] = NAN;
	x[1][0] = INFINITY;
	x[2][20] = -INFINITY;
	x[2][21] = NAN;
	x[3][33] = x[3][3] = -NAN;
	x[4][5] = 3e38f;
	struct afd__argmax_args a = { .x = rig_input(r, x, sizeof(x)),
		.ids = rig_output(r, sizeof(got)),
		.n_rows = 5,
		.width = 37 };
	RIG_OK(afd__argmax(&r->q, &a));
	rig_fetch(r, got, a.ids, sizeof(got));
	assert_int_equal(got[0], -37);
	assert_int_equal(got[1], -1);
	assert_int_equal(got[2], -21);
	assert_int_equal(got[3], -4);
	assert_int_equal(got[4], 5);
}

static void copy_and_transfers_keep_every_byte(void **state)
{
	enum { BYTES = 3 << 20 };
	struct rig *r = *state;
	static char there[BYTES + 1], back[BYTES + 1];
	void *from, *to;

	for (int i = 0; i <= BYTES; i++)
		there[i] = (char)rig_below(r, 256);
	from = rig_input(r, there, sizeof(there));
	to = rig_output(r, sizeof(there));
	struct afd__copy_args a = { .dst = to, .src = from, .bytes = sizeof(there) };
	RIG_OK(afd__copy(&r->q, &a));
	rig_fetch(r, back, to, sizeof(back));
	assert_memory_equal(there, back, sizeof(back));
}

static void operations_run_in_the_order_of_the_calls(void **state)
{
	enum { N = 4096 };
	struct rig *r = *state;
	static float one[N], got[N];
	float *h, *add, want = 1, want_add = 1;

	for (int i = 0; i < N; i++)
		one[i] = 1;
	h = rig_input(r, one, sizeof(one));
	add = rig_input(r, one, sizeof(one));
	for (int i = 0; i < 500; i++) {
		struct afd__norm_args more = { .h = h, .add = add, .n_rows = 1, .width = N };
		struct afd__copy_args copy = { .dst = add, .src = h, .bytes = sizeof(one) };

		RIG_OK(afd__norm(&r->q, &more));
		want += want_add;
		if (i % 10 == 9) {
			RIG_OK(afd__copy(&r->q, &copy));
			want_add = want;
		}
		if (i % 70 == 69) {
			rig_write(r, add, one, sizeof(one));
			want_add = 1;
		}
	}
	rig_fetch(r, got, h, sizeof(got));
	for (int i = 0; i < N; i++)
		assert_true(got[i] == want);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(norm_agrees_with_double_in_every_width_and_kind),
		RIG_TEST(norm_without_an_output_only_adds),
		cmocka_unit_test(activation_agrees_with_double_in_every_width_and_kind),
		RIG_TEST(silu_is_right_from_minus_87_to_90),
		RIG_TEST(activation_passes_nan_and_infinity_on),
		RIG_TEST(angles_are_those_of_the_float_product_even_far_out),
		RIG_TEST(embed_gives_the_rows_of_packed_and_in_place_tables_of_every_dtype),
		RIG_TEST(argmax_is_the_lowest_index_of_the_largest),
		RIG_TEST(argmax_names_the_first_number_that_is_not_finite),
		RIG_TEST(copy_and_transfers_keep_every_byte),
		RIG_TEST(operations_run_in_the_order_of_the_calls),
	};

	return RIG_RUN(tests);
}
