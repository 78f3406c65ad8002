/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Products and SwiGLUs at shapes that a device may give to a library: against double, in all dtypes,
 * with strides and a bias; FP8 with rows that went through `quantize` and with blocks of scales that
 * end inside of 128. On cuda:0 it runs once with our kernels and once with cuBLASLt
 * (AFD_CUDA_PRODUCTS).
 */
#include "rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct shape {
	const char *name;
	int32_t dtype;
	uint32_t n, k, n_rows, x_gap, y_gap; /* gaps between rows */
	int bias, whole_blocks;
};

/* Numbers on the host, and where they are on the device. */
struct problem {
	struct shape shape;
	float *x, *scales;
	char *w;
	float bias[8192];
	struct afd__product_args args;
	uint32_t n_blocks; /* of a row of w */
};

static void load_scales(struct rig *r, struct problem *p)
{
	uint32_t n_rows = (p->shape.n + 127) / 128;
	struct afd__scale_blocks blocks = {
		.n_rows = n_rows, .n_columns = p->n_blocks, .dtype = AFD_DTYPE_F32
	};

	p->scales = malloc((size_t)n_rows * p->n_blocks * 4);
	for (uint32_t i = 0; i < n_rows * p->n_blocks; i++)
		p->scales[i] = 0.01f * (float)(1 + rig_below(r, 60));
	blocks.data = p->scales;
	RIG_OK(afd__matrix_load_scales(r->dev, &p->args.w, &blocks, 0, p->shape.n));
}

static void make_matrix(struct rig *r, struct problem *p)
{
	const struct shape *s = &p->shape;
	const struct afd__matrix_shape shape = {
		.n = s->n, .k = s->k, .dtype = s->dtype, .whole_blocks = s->whole_blocks
	};
	size_t n = (size_t)s->n * s->k;

	p->w = malloc(n * rig_bytes(s->dtype));
	for (size_t i = 0; i < n; i++)
		rig_encode(p->w, i, s->dtype, rig_random(r, s->dtype == AFD_DTYPE_FP8 ? 2 : 0.1f));
	RIG_OK(afd__matrix_create_stack(r->dev, &p->args.w, &shape, NULL));
	RIG_OK(afd__matrix_load(r->dev, &p->args.w, p->w, 0, s->n));
	p->n_blocks = (s->k + 127) / 128;
	if (s->dtype == AFD_DTYPE_FP8)
		load_scales(r, p);
}

/* x of 8 bits is taken as it is by every device; for FP8 it goes through `quantize`. What enters the
 * product is fetched back. */
static void make_rows(struct rig *r, struct problem *p)
{
	const struct shape *s = &p->shape;
	size_t n = (size_t)s->n_rows * (s->k + s->x_gap);
	const bool fp8 = s->dtype == AFD_DTYPE_FP8;
	uint16_t number;

	p->x = malloc(n * 4);
	for (size_t i = 0; i < n; i++) {
		rig_encode(&number, 0, AFD_DTYPE_BF16, rig_random(r, 1));
		p->x[i] = (float)rig_decode(&number, 0, AFD_DTYPE_BF16);
		if (i % (s->k + s->x_gap) >= s->k) /* no part of the row */
			p->x[i] = NAN;
	}
	p->args.x = rig_input(r, p->x, n * 4);
	if (!fp8)
		return;
	RIG_OK(afd__quantize(&r->q, &(struct afd__quantize_args){ .x = (float *)p->args.x,
					     .n_rows = s->n_rows, .width = s->k }));
	rig_fetch(r, p->x, p->args.x, n * 4);
	p->args.quantized = 1;
}

static struct problem *make(struct rig *r, const struct shape *s)
{
	struct problem *p = calloc(1, sizeof(*p));

	p->shape = *s;
	make_matrix(r, p);
	make_rows(r, p);
	rig_fill(r, p->bias, s->n, 1);
	p->args.bias = s->bias ? rig_input(r, p->bias, s->n * 4) : NULL;
	p->args.x_stride = s->k + s->x_gap;
	p->args.y_stride = s->n + s->y_gap;
	p->args.n_rows = s->n_rows;
	p->args.y = rig_output(r, s->n_rows * p->args.y_stride * 4);
	return p;
}

static void end(struct rig *r, struct problem *p)
{
	afd__matrix_destroy(r->dev, &p->args.w);
	free(p->x);
	free(p->w);
	free(p->scales);
	free(p);
}

/* Row x column, and the sum of the magnitudes. */
static double value_at(const struct problem *p, uint32_t row, uint32_t column, double *size)
{
	const struct shape *s = &p->shape;
	double sum = s->bias ? p->bias[column] : 0;

	*size = fabs(sum);
	for (uint32_t k = 0; k < s->k; k++) {
		double term = (double)p->x[row * p->args.x_stride + k] *
			      rig_decode(p->w, (size_t)column * s->k + k, s->dtype);

		if (p->scales)
			term *= p->scales[column / 128 * p->n_blocks + k / 128];
		sum += term;
		*size += fabs(term);
	}
	return sum;
}

/* `unit`: what numbers of x may be rounded by. */
static void check(struct rig *r, struct problem *p, double unit)
{
	size_t n = p->shape.n_rows * p->args.y_stride;
	float *y = malloc(n * 4);

	rig_fetch(r, y, p->args.y, n * 4);
	for (uint32_t row = 0; row < p->shape.n_rows; row++) {
		for (uint32_t i = 0; i < p->args.y_stride; i++) {
			double size, want = i < p->shape.n ? value_at(p, row, i, &size) : 0;
			float got = y[row * p->args.y_stride + i];

			if (i >= p->shape.n)
				assert_true(isnan(got)); /* as it was */
			else
				rig_near(got, want, 0, (3e-6 + unit) * size, p->shape.name, i);
		}
	}
	free(y);
}

static void products_of_all_dtypes_are_right_at_odd_shapes(void **state)
{
	static const struct shape shapes[] = {
		{ "f32 with a bias and gaps", AFD_DTYPE_F32, 77, 131, 9, 5, 3, 1 },
		{ "f32", AFD_DTYPE_F32, 5, 40, 66, 0, 0, 0 },
		{ "bf16", AFD_DTYPE_BF16, 64, 128, 65, 0, 0, 0 },
		{ "bf16 with a bias and gaps", AFD_DTYPE_BF16, 77, 131, 70, 9, 13, 1 },
		{ "one row of bf16", AFD_DTYPE_BF16, 40, 200, 1, 0, 0, 0 },
		{ "f16 with a bias and gaps", AFD_DTYPE_F16, 77, 131, 70, 9, 13, 1 },
		{ "f16", AFD_DTYPE_F16, 130, 264, 3, 0, 0, 0 },
		{ "fp8", AFD_DTYPE_FP8, 256, 384, 68, 0, 0, 0, 1 },
		{ "fp8 with blocks cut", AFD_DTYPE_FP8, 132, 272, 36, 0, 8, 0, 1 },
		{ "fp8 with a bias and rows left over", AFD_DTYPE_FP8, 260, 656, 71, 0, 4, 1, 1 },
		{ "fp8 with too few rows", AFD_DTYPE_FP8, 128, 128, 3, 0, 0, 0, 1 },
		{ "fp8 of a width that is odd", AFD_DTYPE_FP8, 130, 136, 8, 0, 0, 0, 1 },
		{ "fp8 whose blocks are not known to be whole", AFD_DTYPE_FP8, 128, 256, 8, 0, 0, 1 },
	};
	struct rig *r;

	for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
		struct problem *p;

		r = rig_make(2);
		p = make(r, &shapes[i]);
		RIG_OK(afd__product(&r->q, &p->args));
		check(r, p, 0);
		end(r, p);
		rig_end(r);
	}
}

/* Of Qwen3-0.6B: what q, k and v are, and the product behind attention. */
static void products_of_real_shapes_are_right(void **state)
{
	static const struct shape shapes[] = {
		{ "qkv in bf16", AFD_DTYPE_BF16, 4096, 1024, 8, 0, 0, 0 },
		{ "qkv in fp8", AFD_DTYPE_FP8, 4096, 1024, 8, 0, 0, 0, 1 },
		{ "output in fp8", AFD_DTYPE_FP8, 1024, 2048, 12, 0, 0, 0, 1 },
	};
	struct rig *r = *state;

	for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
		struct problem *p = make(r, &shapes[i]);

		RIG_OK(afd__product(&r->q, &p->args));
		check(r, p, 0);
		end(r, p);
	}
}

static void a_product_that_is_recorded_gives_the_same_bits(void **state)
{
	static const struct shape shape = { "fp8", AFD_DTYPE_FP8, 256, 384, 71, 0, 0, 0, 1 };
	static float first[71 * 256], again[71 * 256];
	struct rig *r = *state;
	struct afd__graph *graph;
	struct problem *p;

	if (!afd__device_has_graphs(r->dev))
		rig_skip("this device has no graphs");
	p = make(r, &shape);
	RIG_OK(afd__product(&r->q, &p->args));
	rig_fetch(r, first, p->args.y, sizeof(first));
	memset(again, 0xff, sizeof(again));
	rig_write(r, p->args.y, again, sizeof(again));
	RIG_OK(afd__queue_record(&r->q));
	RIG_OK(afd__product(&r->q, &p->args));
	RIG_OK(afd__queue_recorded(&r->q, &graph));
	RIG_OK(afd__queue_replay(&r->q, graph));
	RIG_OK(afd__queue_replay(&r->q, graph));
	rig_fetch(r, again, p->args.y, sizeof(again));
	assert_memory_equal(first, again, sizeof(first));
	afd__graph_free(r->dev, graph);
	end(r, p);
}

/* The rows come from a norm, in the form of the device (struct afd__inputs). */
static void check_rows_of_a_norm(struct rig *r, const struct shape *s)
{
	struct problem *p = make(r, s);
	const bool fp8 = s->dtype == AFD_DTYPE_FP8;
	struct afd__inputs inputs = afd__matrix_inputs(r->dev, &p->args.w, fp8);
	struct afd__norm_args norm = { .h = (float *)p->args.x, .n_rows = s->n_rows, .width = s->k };

	norm.weight = rig_input(r, p->x, s->k * 4);
	norm.out = rig_output(r, (size_t)s->n_rows * s->k * 4);
	norm.inputs = inputs;
	norm.inputs.rows = rig_output(r, s->n_rows * inputs.row_bytes);
	RIG_OK(afd__norm(&r->q, &norm));
	if (fp8)
		RIG_OK(afd__quantize(&r->q,
			&(struct afd__quantize_args){
				.x = norm.out, .n_rows = s->n_rows, .width = s->k }));
	rig_fetch(r, p->x, norm.out, (size_t)s->n_rows * s->k * 4);
	p->args.inputs = norm.inputs.rows;
	p->args.x = NULL;
	RIG_OK(afd__product(&r->q, &p->args));
	check(r, p, fp8 ? 0 : rig_product_unit(s->dtype));
	end(r, p);
}

static void products_of_the_rows_of_a_norm_are_right(void **state)
{
	static const struct shape shapes[] = {
		{ "bf16 of a norm", AFD_DTYPE_BF16, 72, 144, 70 },
		{ "f16 of a norm", AFD_DTYPE_F16, 72, 272, 70 },
		{ "fp8 of a norm", AFD_DTYPE_FP8, 132, 272, 71, .whole_blocks = 1 },
	};

	rig_need_inputs();
	for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
		struct rig *r = rig_make(1);

		check_rows_of_a_norm(r, &shapes[i]);
		rig_end(r);
	}
}

/* ---- SwiGLU ---- */

/* silu(gate) * up, then down, in double; FP8 as `quantize` leaves it within its unit. */
static double mlp_at(const struct problem *up, const struct problem *down, uint32_t row,
	uint32_t column, double *size)
{
	double sum = 0, ignored;

	*size = 0;
	for (uint32_t i = 0; i < down->shape.k; i++) {
		double gate = value_at(up, row, i, &ignored);
		double term = gate / (1 + exp(-gate)) *
			      value_at(up, row, down->shape.k + i, &ignored) *
			      rig_decode(down->w, (size_t)column * down->shape.k + i,
				      down->shape.dtype);

		if (down->scales)
			term *= down->scales[column / 128 * down->n_blocks + i / 128];
		sum += term;
		*size += fabs(term);
	}
	return sum;
}

/* `unit`: what activated numbers are rounded by. */
static void check_mlp(struct rig *r, int32_t dtype, double unit)
{
	enum { HIDDEN = 144, WIDTH = 256, ROWS = 69 };
	const struct shape first = { "mlp", dtype, 2 * WIDTH, HIDDEN, ROWS, 0, 0, 0, 1 },
			   second = { "mlp", dtype, HIDDEN, WIDTH, ROWS, 0, 0, 0, 1 };
	struct problem *up = make(r, &first), *down = make(r, &second);
	const struct afd__mlp_args a = { .x = up->args.x,
		.gate_up = up->args.w,
		.down = down->args.w,
		.y = down->args.y,
		.gate_up_rows = up->args.y,
		.activated = rig_output(r, ROWS * WIDTH * 4),
		.n_rows = ROWS,
		.quantize = dtype == AFD_DTYPE_FP8,
		.quantized = dtype == AFD_DTYPE_FP8 };
	static float y[ROWS * HIDDEN];

	RIG_OK(afd__mlp(&r->q, &a));
	rig_fetch(r, y, a.y, sizeof(y));
	for (uint32_t i = 0; i < ROWS * HIDDEN; i += 37) {
		double size, want = mlp_at(up, down, i / HIDDEN, i % HIDDEN, &size);

		rig_near(y[i], want, 0, (unit + 4e-6) * size, "mlp", i);
	}
	end(r, up);
	end(r, down);
}

static void an_mlp_is_right_in_all_dtypes(void **state)
{
	static const struct {
		int32_t dtype;
		double unit;
	} cases[] = {
		{ AFD_DTYPE_F32, 0 },
		{ AFD_DTYPE_BF16, 0x1p-8 },
		{ AFD_DTYPE_F16, 0x1p-11 },
		{ AFD_DTYPE_FP8, 0x1p-4 },
	};
	struct rig *r;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		r = rig_make(2);
		check_mlp(r, cases[i].dtype, cases[i].unit);
		rig_end(r);
	}
}

/* ---- blocks ---- */

static void blocks_that_are_said_to_be_whole_and_are_not_are_refused(void **state)
{
	const struct afd__matrix_shape shape = {
		.n = 256, .k = 128, .dtype = AFD_DTYPE_FP8, .whole_blocks = 1
	};
	const float scales[4] = { 1, 1, 1, 1 };
	struct afd__scale_blocks blocks = {
		.data = scales, .n_rows = 4, .n_columns = 1, .dtype = AFD_DTYPE_F32, .row_offset = 32
	};
	struct rig *r = *state;
	struct afd__matrix w;

	RIG_OK(afd__matrix_create_stack(r->dev, &w, &shape, NULL));
	assert_int_equal(afd__matrix_load_scales(r->dev, &w, &blocks, 0, 256), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "no whole blocks of 128"));
	blocks.row_offset = 128;
	assert_int_equal(afd__matrix_load_scales(r->dev, &w, &blocks, 32, 128), -EINVAL);
	RIG_OK(afd__matrix_load_scales(r->dev, &w, &blocks, 128, 128));
	afd__matrix_destroy(r->dev, &w);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(products_of_all_dtypes_are_right_at_odd_shapes),
		RIG_TEST(products_of_real_shapes_are_right),
		RIG_TEST(a_product_that_is_recorded_gives_the_same_bits),
		cmocka_unit_test(products_of_the_rows_of_a_norm_are_right),
		cmocka_unit_test(an_mlp_is_right_in_all_dtypes),
		RIG_TEST(blocks_that_are_said_to_be_whole_and_are_not_are_refused),
	};

	return RIG_RUN(tests);
}
