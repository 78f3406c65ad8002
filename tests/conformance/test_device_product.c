/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product through the front door: against double, in every dtype and both layouts; and the law
 * that a row's bits depend neither on the other rows, nor on the threads, nor on how the matrix was
 * loaded. (tests/unit/test_product.c looks at the kernels themselves.)
 */
#include "rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 70, N = 77, K = 131, X_STRIDE = 140, Y_STRIDE = 90 };

struct product_data {
	float x[MAX_ROWS * X_STRIDE], bias[N];
	_Alignas(4) char w[N * K * 4];
};

static struct product_data *make(struct rig *r, int32_t dtype, float scale)
{
	struct product_data *t = malloc(sizeof(*t));

	rig_fill(r, t->x, MAX_ROWS * X_STRIDE, scale);
	for (size_t i = 0; i < MAX_ROWS * X_STRIDE; i++) {
		if (i % X_STRIDE >= K) /* no part of the row */
			t->x[i] = NAN;
	}
	rig_fill(r, t->bias, N, scale);
	for (size_t i = 0; i < N * K; i++)
		rig_encode(t->w, i, dtype, rig_random(r, 0.1f));
	return t;
}

/* y: [n_rows][Y_STRIDE], untouched beyond N. load_rows: how many rows of w each load brings; 0: in
 * place. */
static void run(const struct product_data *t, int32_t dtype, uint32_t row0, uint32_t n_rows,
	uint32_t n_threads, uint32_t load_rows, float *y)
{
	struct rig *r = rig_make(n_threads);
	struct afd__matrix w;

	RIG_OK(afd__matrix_create(r->dev, &w, N, K, dtype,
		load_rows ? NULL : rig_lend(r, t->w, N * K * rig_bytes(dtype))));
	for (uint32_t row = 0; load_rows && row < N; row += load_rows)
		RIG_OK(afd__matrix_load(r->dev, &w, t->w + row * K * rig_bytes(dtype), row,
			N - row < load_rows ? N - row : load_rows));
	struct afd__product_args a = { .x = rig_input(
					       r, t->x + row0 * X_STRIDE, n_rows * X_STRIDE * 4),
		.w = w,
		.bias = rig_input(r, t->bias, sizeof(t->bias)),
		.y = rig_output(r, n_rows * Y_STRIDE * 4),
		.x_stride = X_STRIDE,
		.y_stride = Y_STRIDE,
		.n_rows = n_rows };
	RIG_OK(afd__product(&r->q, &a));
	rig_fetch(r, y, a.y, n_rows * Y_STRIDE * 4);
	afd__matrix_destroy(r->dev, &w);
	rig_end(r);
}

/* x of 8 bits is taken as it is by every device; others may be rounded. */
static void check(int32_t dtype, float scale, uint32_t load_rows, bool x_of_8_bits)
{
	static float y[MAX_ROWS * Y_STRIDE];
	struct rig source = { .random = 99 };
	struct product_data *t = make(&source, dtype, scale);
	double unit = 3e-6 + (x_of_8_bits ? 0 : rig_product_unit(dtype));

	for (size_t i = 0; x_of_8_bits && i < MAX_ROWS * X_STRIDE; i++) {
		uint16_t number;

		rig_encode(&number, 0, AFD_DTYPE_BF16, t->x[i]);
		t->x[i] = (float)rig_decode(&number, 0, AFD_DTYPE_BF16);
	}
	run(t, dtype, 0, MAX_ROWS, 2, load_rows, y);
	for (size_t i = 0; i < MAX_ROWS * Y_STRIDE; i++) {
		size_t row = i / Y_STRIDE, column = i % Y_STRIDE;
		double want = 0, size = 0;

		if (column >= N) {
			assert_true(isnan(y[i]));
			continue;
		}
		for (size_t k = 0; k < K; k++) {
			want += t->x[row * X_STRIDE + k] * rig_decode(t->w, column * K + k, dtype);
			size += fabs(
				t->x[row * X_STRIDE + k] * rig_decode(t->w, column * K + k, dtype));
		}
		rig_near(y[i], want + t->bias[column], 0, unit * (size + fabs(t->bias[column])),
			"product", i);
	}
	free(t);
}

static void products_agree_with_double_in_every_dtype_layout_and_kind(void **state)
{
	for (int32_t dtype = AFD_DTYPE_F32; dtype <= AFD_DTYPE_F16; dtype++) {
		for (size_t k = 0; k < RIG_N_KINDS; k++) {
			for (int i = 0; i < 4; i++)
				check(dtype, rig_kinds[k].scale, i % 2 ? N : 0, i / 2);
		}
	}
}

static void neither_neighbours_nor_threads_nor_loading_show(void **state)
{
	static float all[MAX_ROWS * Y_STRIDE], part[MAX_ROWS * Y_STRIDE];
	struct rig source = { .random = 100 };
	const uint32_t counts[] = { 1, 2, 3, 5, 8, 13, 33 };

	for (int32_t dtype = AFD_DTYPE_F32; dtype <= AFD_DTYPE_F16; dtype++) {
		struct product_data *t = make(&source, dtype, 1);

		for (size_t i = 0; i < 14; i++) {
			uint32_t n = counts[i % 7], row0 = MAX_ROWS - n - 4;

			run(t, dtype, 0, MAX_ROWS, 2, i < 7 ? N : 0, all);
			run(t, dtype, row0, n, 1 + i % 3, i < 7 ? 19 : 0, part);
			assert_memory_equal(part, all + row0 * Y_STRIDE, n * Y_STRIDE * 4);
		}
		free(t);
	}
}

enum { LONG_K = 2310, LONG_ROWS = 9 };

/* Long enough for a device to cut k, and what it counts with is as it was before. */
static void a_long_product_has_the_same_bits_when_it_runs_again(void **state)
{
	static float x[LONG_ROWS * LONG_K], y[LONG_ROWS * N], again[LONG_ROWS * N];
	static _Alignas(4) char w[N * LONG_K * 2];
	struct rig *r = *state;
	struct afd__product_args a = { .x_stride = LONG_K, .y_stride = N, .n_rows = LONG_ROWS };

	for (size_t i = 0; i < LONG_ROWS * LONG_K; i++)
		x[i] = (float)rig_below(r, 9) - 4;
	for (size_t i = 0; i < N * LONG_K; i++)
		rig_encode(w, i, AFD_DTYPE_BF16, (double)rig_below(r, 5) - 2);
	RIG_OK(afd__matrix_create(r->dev, &a.w, N, LONG_K, AFD_DTYPE_BF16, NULL));
	RIG_OK(afd__matrix_load(r->dev, &a.w, w, 0, N));
	a.x = rig_input(r, x, sizeof(x));
	for (int run = 0; run < 3; run++) {
		a.y = rig_output(r, sizeof(y));
		RIG_OK(afd__product(&r->q, &a));
		rig_fetch(r, run ? again : y, a.y, sizeof(y));
		assert_true(!run || !memcmp(again, y, sizeof(y)));
	}
	for (size_t i = 0; i < LONG_ROWS * N; i++) {
		double want = 0; /* of whole numbers: exact */

		for (size_t k = 0; k < LONG_K; k++)
			want += x[i / N * LONG_K + k] *
				rig_decode(w, i % N * LONG_K + k, AFD_DTYPE_BF16);
		assert_true(y[i] == (float)want);
	}
	afd__matrix_destroy(r->dev, &a.w);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(products_agree_with_double_in_every_dtype_layout_and_kind),
		cmocka_unit_test(neither_neighbours_nor_threads_nor_loading_show),
		RIG_TEST(a_long_product_has_the_same_bits_when_it_runs_again),
	};

	return RIG_RUN(tests);
}
