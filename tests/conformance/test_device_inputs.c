/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows that a norm leaves in the form that products take (struct afd__inputs): a product of them has
 * the bits of norm, quantize and product one after the other, whatever the dtype, the width, the
 * rows and what the rows cross on the way. A device without a form says so and refuses them. And
 * what crosses a wire in a norm has the bits of the conversions one by one, on every device.
 */
#include "rig.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_ROWS = 70, MAX_WIDTH = 1100, N = 45 };

struct inputs_case {
	const char *name;
	int32_t dtype;
	uint32_t width, n_rows;
	uint32_t column_offset;
	int32_t wire;
	bool quantize, with_add;
};

static const struct inputs_case cases[] = {
	{ "one number", AFD_DTYPE_BF16, 1, 1 },
	{ "bf16, odd", AFD_DTYPE_BF16, 131, 9, .with_add = true },
	{ "bf16, groups", AFD_DTYPE_BF16, 256, 1, .wire = AFD_DTYPE_BF16 },
	{ "bf16, long", AFD_DTYPE_BF16, 1100, 70, .wire = AFD_DTYPE_F16, .with_add = true },
	{ "f16, one number", AFD_DTYPE_F16, 1, 3 },
	{ "f16, odd", AFD_DTYPE_F16, 131, 33, .with_add = true },
	{ "f16, groups", AFD_DTYPE_F16, 1024, 2, .wire = AFD_DTYPE_BF16 },
	{ "fp8, one number", AFD_DTYPE_FP8, 1, 1 },
	{ "fp8, odd", AFD_DTYPE_FP8, 331, 5, .with_add = true },
	{ "fp8, of bf16", AFD_DTYPE_FP8, 256, 17, .wire = AFD_DTYPE_BF16, .with_add = true },
	{ "fp8, quantised", AFD_DTYPE_FP8, 1093, 3, .quantize = true, .with_add = true },
	{ "fp8, quantised, wire", AFD_DTYPE_FP8, 250, 70, .wire = AFD_DTYPE_BF16, .quantize = true },
	{ "fp8, a part", AFD_DTYPE_FP8, 333, 4, 48, .with_add = true },
	{ "fp8, a part, quantised", AFD_DTYPE_FP8, 96, 8, 112, .quantize = true },
};
#define N_CASES (sizeof(cases) / sizeof(cases[0]))

/* The same numbers in every rig. */
struct inputs_data {
	float h[MAX_ROWS * MAX_WIDTH], add[MAX_ROWS * MAX_WIDTH], weight[MAX_WIDTH], scales[16];
	_Alignas(4) char w[N * MAX_WIDTH * 2];
};

static struct inputs_data *make(const struct inputs_case *c, float scale)
{
	struct inputs_data *t = calloc(1, sizeof(*t));
	struct rig source = { .random = 77 };

	rig_fill(&source, t->h, MAX_ROWS * MAX_WIDTH, scale);
	rig_fill(&source, t->add, MAX_ROWS * MAX_WIDTH, scale);
	t->add[0] = -0.0f;
	rig_fill(&source, t->weight, MAX_WIDTH, scale < 1 ? 1 : 3);
	for (size_t i = 0; i < (size_t)N * c->width; i++)
		rig_encode(t->w, i, c->dtype, rig_random(&source, 0.5f));
	for (int i = 0; i < 16; i++)
		t->scales[i] = 0.01f + 0.003f * (float)i;
	return t;
}

static struct afd__matrix load(struct rig *r, const struct inputs_data *t, const struct inputs_case *c,
	uint32_t n)
{
	struct afd__matrix_shape shape = { .n = n,
		.k = c->width,
		.dtype = c->dtype,
		.column_offset = c->column_offset };
	const struct afd__scale_blocks blocks = { .data = t->scales,
		.n_rows = 1,
		.n_columns = 16,
		.dtype = AFD_DTYPE_F32,
		.column_offset = c->column_offset };
	struct afd__matrix w;

	RIG_OK(afd__matrix_create_stack(r->dev, &w, &shape, NULL));
	RIG_OK(afd__matrix_load(r->dev, &w, t->w, 0, n));
	if (c->dtype == AFD_DTYPE_FP8)
		RIG_OK(afd__matrix_load_scales(r->dev, &w, &blocks, 0, n));
	return w;
}

static struct afd__norm_args norm_of(
	struct rig *r, const struct inputs_data *t, const struct inputs_case *c)
{
	size_t bytes = (size_t)c->n_rows * c->width * sizeof(float);

	return (struct afd__norm_args){ .h = rig_input(r, t->h, bytes),
		.add = c->with_add ? rig_input(r, t->add, bytes) : NULL,
		.weight = rig_input(r, t->weight, c->width * sizeof(float)),
		.n_rows = c->n_rows,
		.width = c->width,
		.eps = 1e-6f,
		.out_wire = c->wire };
}

/* x: norm and quantize, of which the product makes what it wants. */
static const float *rows_of(struct rig *r, const struct inputs_data *t, const struct inputs_case *c)
{
	struct afd__norm_args norm = norm_of(r, t, c);
	struct afd__quantize_args quantize = { .n_rows = c->n_rows,
		.width = c->width,
		.column_offset = c->column_offset };

	norm.out = rig_output(r, (size_t)c->n_rows * c->width * sizeof(float));
	RIG_OK(afd__norm(&r->q, &norm));
	quantize.x = norm.out;
	if (c->quantize)
		RIG_OK(afd__quantize(&r->q, &quantize));
	return norm.out;
}

/* The same in the device's form, and with float32 beside it. */
static const void *inputs_of(struct rig *r, const struct inputs_data *t, const struct inputs_case *c,
	const struct afd__matrix *w, float *beside)
{
	struct afd__norm_args norm = norm_of(r, t, c);

	norm.inputs = afd__matrix_inputs(r->dev, w, c->quantize);
	norm.inputs.rows = rig_output(r, c->n_rows * norm.inputs.row_bytes);
	norm.out = beside;
	RIG_OK(afd__norm(&r->q, &norm));
	return norm.inputs.rows;
}

static void run_product(const struct inputs_data *t, const struct inputs_case *c, bool fused, float *y)
{
	struct rig *r = rig_make(2);
	struct afd__matrix w = load(r, t, c, N);
	size_t bytes = (size_t)c->n_rows * N * sizeof(float);
	struct afd__product_args a = { .w = w,
		.y = rig_output(r, bytes),
		.x_stride = c->width,
		.y_stride = N,
		.n_rows = c->n_rows };

	if (fused)
		a.inputs = inputs_of(r, t, c, &w, NULL);
	else
		a.x = rows_of(r, t, c);
	RIG_OK(afd__product(&r->q, &a));
	rig_fetch(r, y, a.y, bytes);
	afd__matrix_destroy(r->dev, &w);
	rig_end(r);
}

static void products_of_a_norm_have_the_bits_of_two_operations(void **state)
{
	static float y[MAX_ROWS * N], want[MAX_ROWS * N];

	rig_need_inputs();
	for (size_t i = 0; i < N_CASES * RIG_N_KINDS; i++) {
		const struct inputs_case *c = &cases[i / RIG_N_KINDS];
		struct inputs_data *t = make(c, rig_kinds[i % RIG_N_KINDS].scale);
		size_t bytes = (size_t)c->n_rows * N * sizeof(float);

		run_product(t, c, false, want);
		run_product(t, c, true, y);
		if (memcmp(y, want, bytes))
			fail_msg("%s: not the same bits", c->name);
		free(t);
	}
}

/* gate and up of 16 each, and a down of the same dtype. */
static void run_mlp(const struct inputs_data *t, const struct inputs_case *c, bool fused, float *y)
{
	enum { HALF = 16 };
	struct inputs_case down_case = { .dtype = c->dtype, .width = HALF };
	struct rig *r = rig_make(2);
	struct inputs_case wide = *c;
	size_t rows = c->n_rows;

	wide.width = 45 < c->width ? 45 : c->width;
	struct afd__matrix up = load(r, t, &wide, 2 * HALF),
			   down = load(r, t, &down_case, wide.width);
	struct afd__mlp_args a = { .gate_up = up,
		.down = down,
		.y = rig_output(r, rows * wide.width * sizeof(float)),
		.gate_up_rows = rig_output(r, rows * 2 * HALF * sizeof(float)),
		.activated = rig_output(r, rows * HALF * sizeof(float)),
		.n_rows = c->n_rows,
		.quantize = c->quantize };

	if (fused)
		a.inputs = inputs_of(r, t, &wide, &up, NULL);
	else
		a.x = rows_of(r, t, &wide);
	RIG_OK(afd__mlp(&r->q, &a));
	rig_fetch(r, y, a.y, rows * wide.width * sizeof(float));
	afd__matrix_destroy(r->dev, &up);
	afd__matrix_destroy(r->dev, &down);
	rig_end(r);
}

static void mlps_of_a_norm_have_the_bits_of_two_operations(void **state)
{
	static float y[MAX_ROWS * MAX_WIDTH], want[MAX_ROWS * MAX_WIDTH];

	rig_need_inputs();
	for (size_t i = 0; i < N_CASES; i++) {
		const struct inputs_case *c = &cases[i];
		struct inputs_data *t = make(c, 1);
		uint32_t width = 45 < c->width ? 45 : c->width;

		run_mlp(t, c, false, want);
		run_mlp(t, c, true, y);
		if (memcmp(y, want, (size_t)c->n_rows * width * sizeof(float)))
			fail_msg("%s: not the same bits", c->name);
		free(t);
	}
}

static void a_norm_writes_float32_beside_its_inputs(void **state)
{
	const struct inputs_case *c = &cases[10];
	struct inputs_data *t = make(c, 1);
	struct rig *r = *state;
	struct afd__matrix w = load(r, t, c, N);
	size_t bytes = (size_t)c->n_rows * c->width * sizeof(float);
	float *beside = rig_output(r, bytes), *got = malloc(bytes), *want = malloc(bytes);
	struct inputs_case plain = *c;
	struct afd__norm_args beside_only = norm_of(r, t, c);

	beside_only.out = beside;
	plain.quantize = false;
	if (rig_has_inputs())
		inputs_of(r, t, c, &w, beside);
	else
		RIG_OK(afd__norm(&r->q, &beside_only));
	rig_fetch(r, got, beside, bytes);
	rig_fetch(r, want, rows_of(r, t, &plain), bytes);
	assert_memory_equal(got, want, bytes);
	afd__matrix_destroy(r->dev, &w);
	free(got);
	free(want);
	free(t);
}

static void a_device_without_a_form_refuses_inputs(void **state)
{
	struct rig *r = *state;
	const struct inputs_case *c = &cases[2];
	struct inputs_data *t = make(c, 1);
	struct afd__matrix w = load(r, t, c, N), plain;
	struct afd__norm_args norm = norm_of(r, t, c);
	struct afd__product_args a = { .inputs = rig_output(r, 4096), .y = rig_output(r, N * 4),
		.x_stride = c->width, .y_stride = N, .n_rows = 1 };

	RIG_OK(afd__matrix_create(r->dev, &plain, N, c->width, AFD_DTYPE_F32, NULL));
	a.w = plain;
	assert_int_equal(afd__matrix_inputs(r->dev, &plain, false).row_bytes, 0);
	assert_int_equal(afd__product(&r->q, &a), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "takes float32"));
	norm.inputs = afd__matrix_inputs(r->dev, &w, false);
	norm.inputs.rows = (void *)a.inputs;
	norm.inputs.row_bytes += 16;
	assert_int_equal(afd__norm(&r->q, &norm), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "inputs.row_bytes"));
	afd__matrix_destroy(r->dev, &w);
	afd__matrix_destroy(r->dev, &plain);
	free(t);
}

/* ---- wires ---- */

/* dst = src, or += src, through rows of 2-byte numbers. */
static void cross(
	struct rig *r, const float *src, float *dst, uint32_t n, int32_t wire, int32_t accumulate)
{
	void *slot = rig_output(r, (size_t)n * 4);
	struct afd__convert_args a = { .src = src, .dst = slot, .n_rows = 1, .width = n,
		.src_dtype = AFD_DTYPE_F32, .dst_dtype = wire };

	RIG_OK(afd__convert(&r->q, &a));
	a = (struct afd__convert_args){ .src = slot, .dst = dst, .n_rows = 1, .width = n,
		.src_dtype = wire, .dst_dtype = AFD_DTYPE_F32, .accumulate = accumulate };
	RIG_OK(afd__convert(&r->q, &a));
}

static void check_wires(const struct inputs_data *t, uint32_t width, int32_t wire)
{
	enum { ROWS = 3 };
	static float got[2][ROWS * MAX_WIDTH], want[2][ROWS * MAX_WIDTH], zeros[ROWS * MAX_WIDTH];
	struct inputs_case c = { .width = width, .n_rows = ROWS, .with_add = true };
	size_t bytes = (size_t)ROWS * width * sizeof(float);
	struct rig *r = rig_make(2);
	struct afd__norm_args a = norm_of(r, t, &c), b = norm_of(r, t, &c);
	float *sum = rig_input(r, zeros, bytes);

	a.add_wire = a.out_wire = wire;
	a.out = rig_output(r, bytes);
	RIG_OK(afd__norm(&r->q, &a));
	rig_fetch(r, got[0], a.h, bytes);
	rig_fetch(r, got[1], a.out, bytes);
	cross(r, b.add, sum, ROWS * width, wire, 1);
	b.add = sum;
	b.out = rig_output(r, bytes);
	RIG_OK(afd__norm(&r->q, &b));
	cross(r, b.out, b.out, ROWS * width, wire, 0);
	rig_fetch(r, want[0], b.h, bytes);
	rig_fetch(r, want[1], b.out, bytes);
	assert_memory_equal(got[0], want[0], bytes);
	assert_memory_equal(got[1], want[1], bytes);
	rig_end(r);
}

static void wires_in_a_norm_have_the_bits_of_conversions(void **state)
{
	const uint32_t widths[] = { 1, 7, 8, 17, 130, 1001 };
	const int32_t wires[] = { AFD_DTYPE_F32, AFD_DTYPE_BF16, AFD_DTYPE_F16 };

	for (size_t i = 0; i < 18 * RIG_N_KINDS; i++) {
		struct inputs_data *t = make(&cases[0], rig_kinds[i / 18].scale);

		t->h[0] = -0.0f;
		check_wires(t, widths[i % 6], wires[i / 6 % 3]);
		free(t);
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(products_of_a_norm_have_the_bits_of_two_operations),
		cmocka_unit_test(mlps_of_a_norm_have_the_bits_of_two_operations),
		RIG_TEST(a_norm_writes_float32_beside_its_inputs),
		RIG_TEST(a_device_without_a_form_refuses_inputs),
		cmocka_unit_test(wires_in_a_norm_have_the_bits_of_conversions),
	};

	return RIG_RUN(tests);
}
