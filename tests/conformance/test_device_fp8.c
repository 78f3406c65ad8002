/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products with FP8 weights against double: every scale has a value of its own, blocks stand where
 * the whole tensor has them, the last ones are short. A shard gives what the whole gives, and a
 * row's bits depend neither on the other rows, nor on threads, nor on how the matrix was loaded.
 */
#include "rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 40, MAX_N = 300, MAX_K = 420, MAX_BLOCKS = 8 };

struct fp8_case {
	const char *name;
	uint32_t n, k;
	uint32_t row_offset, column_offset; /* of this part in its tensor */
	uint32_t part_rows; /* rows after which the tensor's rows begin anew (gate, up); 0: never */
	int32_t scale_dtype;
};

static const struct fp8_case cases[] = {
	{ "two blocks each way", 256, 256, 0, 0, 0, AFD_DTYPE_F32 },
	{ "short last blocks", 200, 300, 0, 0, 0, AFD_DTYPE_BF16 },
	{ "one number", 1, 1, 0, 0, 0, AFD_DTYPE_F32 },
	{ "less than a panel, odd k", 7, 131, 0, 0, 0, AFD_DTYPE_F16 },
	{ "a shard on blocks", 128, 128, 256, 128, 0, AFD_DTYPE_F32 },
	{ "a shard of 96 columns at 96", 77, 96, 64, 96, 0, AFD_DTYPE_F32 },
	{ "a shard of rows and columns between blocks", 50, 333, 37, 59, 0, AFD_DTYPE_BF16 },
	{ "columns of one block, from 1", 64, 127, 0, 1, 0, AFD_DTYPE_F32 },
	{ "gate and up of 64", 128, 200, 192, 0, 64, AFD_DTYPE_F32 },
	{ "gate and up of 48", 96, 256, 96, 5, 48, AFD_DTYPE_F16 },
};
#define N_CASES (sizeof(cases) / sizeof(cases[0]))

/* How the same product is asked for. */
struct how {
	uint32_t row0, n_rows, n_threads, load_rows;
	bool in_place, mixed;
};

struct fp8_data {
	float x[MAX_ROWS * MAX_K], bias[MAX_N];
	uint8_t w[MAX_N * MAX_K]; /* [n][k] */
	_Alignas(4) char scales[2][MAX_BLOCKS * MAX_BLOCKS * 4]; /* of gate (or all) and of up */
	uint32_t n_scale_rows, n_scale_columns;
};

static uint32_t blocks_of(uint32_t n)
{
	return (n + 127) / 128;
}

static void make(struct fp8_data *t, const struct fp8_case *c, float scale)
{
	struct rig source = { .random = 4711 };

	memset(t, 0, sizeof(*t));
	rig_fill(&source, t->x, MAX_ROWS * c->k, scale);
	rig_fill(&source, t->bias, c->n, scale);
	for (uint32_t i = 0; i < c->n * c->k; i++)
		rig_encode(t->w, i, AFD_DTYPE_FP8, rig_random(&source, i % 3 ? 30 : 0.01f));
	t->n_scale_rows = blocks_of(c->row_offset + (c->part_rows ? c->part_rows : c->n));
	t->n_scale_columns = blocks_of(c->column_offset + c->k);
	for (uint32_t i = 0; i < 2 * t->n_scale_rows * t->n_scale_columns; i++)
		rig_encode(t->scales[i % 2], i / 2, c->scale_dtype,
			0.001 + fabs(rig_random(&source, 0.01f)));
}

static double scale_of(
	const struct fp8_data *t, const struct fp8_case *c, uint32_t n, uint32_t k)
{
	uint32_t part = c->part_rows ? n / c->part_rows : 0,
		 row = c->row_offset + (c->part_rows ? n % c->part_rows : n);

	return rig_decode(t->scales[part],
		row / 128 * t->n_scale_columns + (c->column_offset + k) / 128, c->scale_dtype);
}

static bool needs_mixed(const struct fp8_case *c)
{
	return c->row_offset % 32 || c->part_rows % 32;
}

static void load(struct rig *r, const struct fp8_data *t, const struct fp8_case *c,
	const struct how *how, struct afd__matrix *w)
{
	uint32_t part_rows = c->part_rows ? c->part_rows : c->n;
	struct afd__matrix_shape shape = { .n = c->n,
		.k = c->k,
		.dtype = AFD_DTYPE_FP8,
		.column_offset = c->column_offset,
		.mixed_panels = needs_mixed(c) || how->mixed };

	RIG_OK(afd__matrix_create_stack(r->dev, w, &shape,
		how->in_place ? rig_lend(r, t->w, (size_t)c->n * c->k) : NULL));
	assert_int_equal((how->in_place ? 0 : w->bytes) + w->scales_bytes,
		atomic_load(&r->dev->bytes_held));
	if (!how->in_place)
		assert_int_equal(
			w->bytes + w->scales_bytes, afd__matrix_shape_bytes(r->dev, &shape));
	for (uint32_t row = 0, n; !how->in_place && row < c->n; row += n) {
		n = c->n - row < how->load_rows ? c->n - row : how->load_rows;
		RIG_OK(afd__matrix_load(r->dev, w, t->w + row * c->k, row, n));
	}
	/* In two pieces when panels may be cut. */
	for (uint32_t row = 0, n; row < c->n; row += n) {
		uint32_t in_part = row % part_rows;
		struct afd__scale_blocks blocks = { .data = t->scales[row / part_rows],
			.n_rows = t->n_scale_rows,
			.n_columns = t->n_scale_columns,
			.dtype = c->scale_dtype,
			.row_offset = c->row_offset + in_part,
			.column_offset = c->column_offset };

		n = part_rows - in_part;
		if (shape.mixed_panels && n > 40)
			n = 40;
		RIG_OK(afd__matrix_load_scales(r->dev, w, &blocks, row, n));
	}
}

/* y: [how->n_rows][n + 3], untouched beyond n. */
static void run(const struct fp8_data *t, const struct fp8_case *c, const struct how *how, float *y)
{
	struct rig *r = rig_make(how->n_threads);
	struct afd__matrix w;

	load(r, t, c, how, &w);
	struct afd__product_args a = {
		.x = rig_input(r, t->x + how->row0 * c->k, how->n_rows * c->k * 4),
		.w = w,
		.bias = rig_input(r, t->bias, c->n * 4),
		.y = rig_output(r, how->n_rows * (c->n + 3) * 4),
		.x_stride = c->k,
		.y_stride = c->n + 3,
		.n_rows = how->n_rows };
	RIG_OK(afd__product(&r->q, &a));
	rig_fetch(r, y, a.y, how->n_rows * (c->n + 3) * 4);
	afd__matrix_destroy(r->dev, &w);
	rig_end(r);
}

static void quantize_x(struct fp8_data *t, const struct fp8_case *c)
{
	struct rig *r = rig_make(1);
	struct afd__quantize_args a = { .x = rig_input(r, t->x, MAX_ROWS * c->k * 4),
		.n_rows = MAX_ROWS,
		.width = c->k,
		.column_offset = c->column_offset };

	RIG_OK(afd__quantize(&r->q, &a));
	rig_fetch(r, t->x, a.x, MAX_ROWS * c->k * 4);
	rig_end(r);
}

/* quantized: x is what `quantize` makes of it, which no device rounds again. */
static void check_double(
	const struct fp8_case *c, float scale, bool in_place, bool quantized)
{
	double unit = 3e-6 + (quantized ? 0 : rig_product_unit(AFD_DTYPE_FP8));
	static struct fp8_data t;
	static float y[MAX_ROWS * (MAX_N + 3)];
	struct how how = {
		.n_rows = MAX_ROWS, .n_threads = 2, .load_rows = c->n, .in_place = in_place
	};

	make(&t, c, scale);
	if (quantized)
		quantize_x(&t, c);
	run(&t, c, &how, y);
	for (uint32_t i = 0; i < MAX_ROWS * (c->n + 3); i++) {
		uint32_t row = i / (c->n + 3), n = i % (c->n + 3);
		double want = 0, size = 0;

		if (n >= c->n) {
			assert_true(isnan(y[i]));
			continue;
		}
		for (uint32_t k = 0; k < c->k; k++) {
			double term = t.x[row * c->k + k] * scale_of(&t, c, n, k) *
				      rig_decode(t.w, n * c->k + k, AFD_DTYPE_FP8);

			want += term;
			size += fabs(term);
		}
		rig_near(y[i], want + t.bias[n], 0, unit * (size + fabs(t.bias[n])), c->name, i);
	}
}

static void fp8_products_agree_with_double_wherever_blocks_lie(void **state)
{
	for (size_t i = 0; i < N_CASES * RIG_N_KINDS; i++) {
		for (int j = 0; j < 4; j++)
			check_double(&cases[i / RIG_N_KINDS], rig_kinds[i % RIG_N_KINDS].scale,
				j % 2, j / 2);
	}
}

static void neither_neighbours_nor_threads_nor_loading_show(void **state)
{
	static struct fp8_data t;
	static float all[MAX_ROWS * (MAX_N + 3)], part[MAX_ROWS * (MAX_N + 3)];
	const uint32_t counts[] = { 1, 2, 3, 7, 8, 9, 12, 13, 25, 31 };

	for (size_t i = 0; i < 2 * N_CASES; i++) {
		const struct fp8_case *c = &cases[i / 2];
		struct how how = { .n_rows = MAX_ROWS,
			.n_threads = 2,
			.load_rows = c->n,
			.in_place = i % 2 };

		make(&t, c, 1);
		run(&t, c, &how, all);
		for (size_t j = 0; j < 10; j++) {
			how.n_rows = counts[(i + j) % 10];
			how.row0 = MAX_ROWS - how.n_rows - 2;
			how.n_threads = 1 + j % 3;
			how.load_rows = 17;
			how.mixed = j % 2;
			run(&t, c, &how, part);
			assert_memory_equal(part, all + how.row0 * (c->n + 3),
				how.n_rows * (c->n + 3) * 4);
		}
	}
}

/* Rows of a matrix, as a tensor-parallel rank has them: with the bits of the whole. */
static void a_shard_of_rows_has_the_bits_of_the_whole(void **state)
{
	static struct fp8_data t, shard;
	static float whole[MAX_ROWS * (MAX_N + 3)], part[MAX_ROWS * (MAX_N + 3)];
	struct fp8_case c = { "whole", 300, 390, 0, 0, 0, AFD_DTYPE_F32 }, s = c;
	struct how how = { .n_rows = 5, .n_threads = 2, .load_rows = 300 };

	make(&t, &c, 1);
	run(&t, &c, &how, whole);
	for (uint32_t first = 0; first < 300; first += 61) {
		shard = t;
		s.row_offset = first;
		s.n = 300 - first < 61 ? 300 - first : 61;
		memmove(shard.w, t.w + first * c.k, s.n * c.k);
		memmove(shard.bias, t.bias + first, s.n * 4);
		run(&shard, &s, &how, part);
		for (uint32_t row = 0; row < how.n_rows; row++)
			assert_memory_equal(part + row * (s.n + 3),
				whole + row * (c.n + 3) + first, s.n * 4);
	}
}

/* One column for each pattern, so that a NaN stays in its own. */
static void check_patterns(uint32_t n_rows, bool in_place)
{
	static float x[MAX_ROWS * 2], y[MAX_ROWS * 256];
	const float scales[2] = { 0.5f, 3 };
	struct rig *r = rig_make(1);
	struct afd__scale_blocks blocks = {
		.data = scales, .n_rows = 2, .n_columns = 1, .dtype = AFD_DTYPE_F32
	};
	struct afd__matrix m;
	uint8_t w[256 * 2] = { 0 };

	for (size_t i = 0; i < 256; i++)
		w[2 * i + i % 2] = (uint8_t)i;
	for (uint32_t i = 0; i < 2 * MAX_ROWS; i++)
		x[i] = -2;
	RIG_OK(afd__matrix_create(
		r->dev, &m, 256, 2, AFD_DTYPE_FP8, in_place ? rig_lend(r, w, sizeof(w)) : NULL));
	if (!in_place)
		RIG_OK(afd__matrix_load(r->dev, &m, w, 0, 256));
	RIG_OK(afd__matrix_load_scales(r->dev, &m, &blocks, 0, 256));
	struct afd__product_args a = { .x = rig_input(r, x, sizeof(x)),
		.w = m,
		.y = rig_output(r, n_rows * 256 * 4),
		.x_stride = 2,
		.y_stride = 256,
		.n_rows = n_rows };
	RIG_OK(afd__product(&r->q, &a));
	rig_fetch(r, y, a.y, n_rows * 256 * 4);
	for (size_t i = 0; i < n_rows * 256; i++) {
		double want = -2 * scales[i % 256 / 128] *
			      rig_decode(w, i % 256 * 2 + i % 2, AFD_DTYPE_FP8);

		assert_true(isnan(want) ? isnan(y[i]) : y[i] == want);
	}
	afd__matrix_destroy(r->dev, &m);
	rig_end(r);
}

static void every_pattern_of_a_weight_is_its_number_and_nan_stays_in_its_column(void **state)
{
	for (uint32_t n_rows = 1; n_rows <= MAX_ROWS; n_rows += 3) {
		check_patterns(n_rows, false);
		check_patterns(n_rows, true);
	}
}

/* ---- quantize ---- */

enum { WIDTH = 300 };

/* One group in double. */
static void reference_group(const float *x, uint32_t n, double *want, double *scale)
{
	double largest = 1e-10;

	for (uint32_t i = 0; i < n; i++)
		largest = fmax(largest, fabs(x[i]));
	*scale = largest / 448;
	for (uint32_t i = 0; i < n; i++) {
		uint8_t number;

		rig_encode(&number, 0, AFD_DTYPE_FP8, x[i] / *scale);
		want[i] = rig_decode(&number, 0, AFD_DTYPE_FP8) * *scale;
	}
}

/* Whether x lies as good as in the middle between two numbers of e4m3 (times scale). */
static bool is_tie(double x, double scale)
{
	uint8_t near[2];

	rig_encode(near, 0, AFD_DTYPE_FP8, x / scale * (1 - 1e-6));
	rig_encode(near, 1, AFD_DTYPE_FP8, x / scale * (1 + 1e-6));
	return near[0] != near[1];
}

static void check_quantize(struct rig *r, float *x, uint32_t n_rows, uint32_t offset)
{
	float got[3 * WIDTH];
	double want[WIDTH], scale;
	struct afd__quantize_args a = { .x = rig_input(r, x, n_rows * WIDTH * 4),
		.n_rows = n_rows,
		.width = WIDTH,
		.column_offset = offset };

	RIG_OK(afd__quantize(&r->q, &a));
	rig_fetch(r, got, a.x, n_rows * WIDTH * 4);
	for (uint32_t row = 0; row < n_rows; row++) {
		for (uint32_t i = 0, end; i < WIDTH; i = end) {
			end = (offset + i) / 128 * 128 + 128 - offset;
			if (end > WIDTH)
				end = WIDTH;
			reference_group(x + row * WIDTH + i, end - i, want, &scale);
			for (uint32_t j = i; j < end; j++) {
				if (!is_tie(x[row * WIDTH + j], scale))
					rig_near(got[row * WIDTH + j], want[j - i], 1e-6, 0,
						"quantize", j);
			}
		}
	}
}

static void quantize_agrees_with_double_in_groups_of_the_whole_row(void **state)
{
	const uint32_t offsets[] = { 0, 1, 64, 127, 128, 200 };
	float x[3 * WIDTH];

	for (size_t i = 0; i < 6 * RIG_N_KINDS; i++) {
		struct rig *r = rig_make(2);

		rig_fill(r, x, 3 * WIDTH, rig_kinds[i % RIG_N_KINDS].scale);
		check_quantize(r, x, 3, offsets[i / RIG_N_KINDS]);
		rig_end(r);
	}
}

static void a_group_of_zeros_stays_zero_and_nan_stays_nan(void **state)
{
	struct rig *r = *state;
	float x[256] = { 0 }, got[256];

	x[128] = NAN;
	x[129] = 448;
	x[130] = -1;
	x[131] = 1e-3f;
	struct afd__quantize_args a = {
		.x = rig_input(r, x, sizeof(x)), .n_rows = 1, .width = 256
	};
	RIG_OK(afd__quantize(&r->q, &a));
	rig_fetch(r, got, a.x, sizeof(got));
	for (int i = 0; i < 128; i++)
		assert_true(got[i] == 0);
	assert_true(isnan(got[128]));
	assert_true(got[129] == 448 && got[130] == -1);
	assert_true(got[131] == 0x1p-9f || got[131] == 0);
}

/* ---- what is refused ---- */

static void a_matrix_without_scales_or_with_wrong_ones_is_refused(void **state)
{
	struct rig *r = *state;
	struct afd__matrix m, plain;
	struct afd__matrix_shape shape = {
		.n = 100, .k = 200, .dtype = AFD_DTYPE_FP8, .column_offset = 130
	};
	float scales[4] = { 1, 1, 1, 1 };
	const struct {
		struct afd__scale_blocks blocks;
		uint32_t row0, n_rows;
		const char *word;
	} bad[] = {
		{ { NULL, 1, 3, AFD_DTYPE_F32, 0, 130 }, 0, 100, "(nil)" },
		{ { scales, 1, 3, AFD_DTYPE_FP8, 0, 130 }, 0, 100, "dtype 4" },
		{ { scales, 1, 2, AFD_DTYPE_F32, 0, 130 }, 0, 100, "do not cover" },
		{ { scales, 1, 3, AFD_DTYPE_F32, 29, 130 }, 0, 100, "do not cover" },
		{ { scales, 1, 3, AFD_DTYPE_F32, UINT64_MAX, 130 }, 0, 100, "do not cover" },
		{ { scales, 1, 3, AFD_DTYPE_F32, 0, 131 }, 0, 100, "column_offset 131" },
		{ { scales, 2, 3, AFD_DTYPE_F32, 16, 130 }, 0, 100, "mix scales" },
		{ { scales, 2, 3, AFD_DTYPE_F32, 0, 130 }, 16, 84, "mix scales" },
		{ { scales, 2, 3, AFD_DTYPE_F32, 0, 130 }, 0, 99, "mix scales" },
		{ { scales, 1, 3, AFD_DTYPE_F32, 0, 130 }, 64, 64, "it has 100" },
	};

	RIG_OK(afd__matrix_create_stack(r->dev, &m, &shape, NULL));
	RIG_OK(afd__matrix_create(r->dev, &plain, 8, 8, AFD_DTYPE_BF16, NULL));
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		int rc = afd__matrix_load_scales(
			r->dev, &m, &bad[i].blocks, bad[i].row0, bad[i].n_rows);

		if (rc != -EINVAL || !strstr(afd_last_error(), bad[i].word))
			fail_msg("case %zu: %d, \"%s\"", i, rc, afd_last_error());
	}
	assert_int_equal(afd__matrix_load_scales(r->dev, &plain, &bad[0].blocks, 0, 8), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "bf16 has none"));
	afd__matrix_destroy(r->dev, &plain);
	afd__matrix_destroy(r->dev, &m);
}

static void shapes_that_overflow_are_refused_and_hold_nothing(void **state)
{
	struct rig *r = *state;
	struct afd__matrix m = { 0 };
	const struct afd__matrix_shape bad[] = {
		{ .n = UINT32_MAX, .k = UINT32_MAX, .n_stack = 4096, .dtype = AFD_DTYPE_FP8 },
		{ .n = 1u << 31, .k = 1u << 31, .dtype = AFD_DTYPE_F32 },
		{ .n = 8, .k = 0, .dtype = AFD_DTYPE_FP8 },
		{ .n = 8, .k = 8, .dtype = 5 },
		{ .n = 8, .k = 8, .dtype = AFD_DTYPE_FP8, .mixed_panels = 2 },
	};
	uint64_t before = atomic_load(&r->dev->bytes_held);

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_true(afd__matrix_create_stack(r->dev, &m, &bad[i], NULL) < 0);
		assert_null(m.data);
		assert_int_equal(atomic_load(&r->dev->bytes_held), before);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(fp8_products_agree_with_double_wherever_blocks_lie),
		cmocka_unit_test(neither_neighbours_nor_threads_nor_loading_show),
		cmocka_unit_test(a_shard_of_rows_has_the_bits_of_the_whole),
		cmocka_unit_test(
			every_pattern_of_a_weight_is_its_number_and_nan_stays_in_its_column),
		cmocka_unit_test(quantize_agrees_with_double_in_groups_of_the_whole_row),
		RIG_TEST(a_group_of_zeros_stays_zero_and_nan_stays_nan),
		RIG_TEST(a_matrix_without_scales_or_with_wrong_ones_is_refused),
		RIG_TEST(shapes_that_overflow_are_refused_and_hold_nothing),
	};

	return RIG_RUN(tests);
}
