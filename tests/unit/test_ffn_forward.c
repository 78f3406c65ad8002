/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd_ffn_forward against the plain double computation of a layer: shapes that fit no block, every
 * dtype of weights and rows, strides, and what it refuses. The laws of the bits (a row does not
 * know its neighbours) stand beside it.
 */
#include "../system/ffn_model.h"

struct forward_case {
	const char *name;
	uint32_t hidden, width, n_rows, max_rows;
	int32_t weights, dtype[3], x_dtype, y_dtype;
	double nmse;
};

#define F32        AFD_DTYPE_F32
#define BF16       AFD_DTYPE_BF16
#define F16        AFD_DTYPE_F16
#define ALL(dtype) { dtype, dtype, dtype }

static const struct forward_case cases[] = {
	{ "f32", 32, 64, 4, 0, AFD_WEIGHTS_PACKED, ALL(F32), F32, F32, 1e-11 },
	{ "f32, odd sizes", 37, 53, 5, 0, AFD_WEIGHTS_PACKED, ALL(F32), F32, F32, 1e-11 },
	{ "f32 in place", 37, 53, 5, 0, AFD_WEIGHTS_IN_PLACE, ALL(F32), F32, F32, 1e-11 },
	{ "bf16", 37, 53, 5, 0, AFD_WEIGHTS_PACKED, ALL(BF16), F32, F32, 1e-11 },
	{ "bf16 in place", 38, 54, 5, 0, AFD_WEIGHTS_IN_PLACE, ALL(BF16), F32, F32, 1e-11 },
	{ "f16", 37, 53, 5, 0, AFD_WEIGHTS_PACKED, ALL(F16), F32, F32, 1e-11 },
	{ "f16 in place", 38, 54, 5, 0, AFD_WEIGHTS_IN_PLACE, ALL(F16), F32, F32, 1e-11 },
	{ "mixed dtypes", 37, 53, 5, 0, AFD_WEIGHTS_PACKED, { BF16, F32, F16 }, F32, F32, 1e-11 },
	{ "one number", 1, 1, 1, 0, AFD_WEIGHTS_PACKED, ALL(F32), F32, F32, 1e-11 },
	{ "wide and one row", 8, 300, 1, 0, AFD_WEIGHTS_PACKED, ALL(BF16), F32, F32, 1e-11 },
	{ "several passes", 37, 53, 11, 3, AFD_WEIGHTS_PACKED, ALL(BF16), F32, F32, 1e-11 },
	{ "rows in bf16", 37, 53, 5, 0, AFD_WEIGHTS_PACKED, ALL(BF16), BF16, BF16, 1e-4 },
	{ "rows in f16", 37, 53, 5, 0, AFD_WEIGHTS_PACKED, ALL(BF16), F16, F16, 1e-6 },
	{ "x in bf16, y in f32", 37, 53, 5, 2, AFD_WEIGHTS_PACKED, ALL(BF16), BF16, F32, 1e-11 },
	{ "x in f32, y in f16", 37, 53, 5, 2, AFD_WEIGHTS_PACKED, ALL(BF16), F32, F16, 1e-6 },
};

enum { N_LAYERS = 2 };

struct stage {
	afd_context *ctx;
	struct ffn_model model;
	afd_ffn *ffn;
};

static void stage_create(struct stage *s, const struct forward_case *c)
{
	struct afd_ffn_params params = {
		.size = sizeof(params), .max_rows = c->max_rows, .device = test_device()
	};

	*s = (struct stage){
		.model = { .hidden = c->hidden, .width = c->width, .n_layers = N_LAYERS }
	};
	memcpy(s->model.dtype, c->dtype, sizeof(c->dtype));
	assert_int_equal(afd_context_create(&s->ctx, NULL), 0);
	ffn_model_open(&s->model, s->ctx, c->weights);
	if (afd_ffn_create(&s->ffn, s->model.model, NULL, &params))
		fail_msg("%s: %s", c->name, afd_last_error());
}

static void stage_destroy(struct stage *s)
{
	afd_ffn_destroy(s->ffn);
	ffn_model_close(&s->model);
	afd_context_destroy(s->ctx);
}

/* Rows in memory of a dtype, with a gap behind each that must stay as it is. */
struct rows {
	unsigned char *memory;
	size_t row_bytes;
	int32_t dtype;
};

enum { GAP = 24, GAP_BYTE = 0x5a };

static struct rows rows_create(uint32_t n_rows, uint32_t hidden, int32_t dtype, const float *from)
{
	struct rows r = { .row_bytes = hidden * afd_dtype_bytes(dtype) + GAP, .dtype = dtype };

	r.memory = malloc(n_rows * r.row_bytes);
	assert_non_null(r.memory);
	memset(r.memory, GAP_BYTE, n_rows * r.row_bytes);
	for (uint32_t i = 0; from && i < n_rows; i++) {
		for (uint32_t k = 0; k < hidden; k++) {
			float x = from[(size_t)i * hidden + k];
			uint16_t half = dtype == BF16 ? bf16_of(x) : (uint16_t)0;
			int exponent;

			if (dtype == F16 && x != 0) {
				float fraction = frexpf(fabsf(x), &exponent);

				half = (uint16_t)((x < 0) << 15 | (exponent + 14) << 10 |
						  ((int)(fraction * 2048) & 1023));
			}
			if (dtype == F32)
				memcpy(r.memory + i * r.row_bytes + 4 * k, &x, 4);
			else
				memcpy(r.memory + i * r.row_bytes + 2 * k, &half, 2);
		}
	}
	return r;
}

static void check_rows(const struct stage *s, const struct forward_case *c, uint32_t layer,
	const float *x, const struct rows *y)
{
	double expected[512], error = 0, size = 0;

	for (uint32_t i = 0; i < c->n_rows; i++) {
		const unsigned char *row = y->memory + i * y->row_bytes;

		ffn_model_row(&s->model, layer, x + (size_t)i * c->hidden, expected);
		for (uint32_t k = 0; k < c->hidden; k++) {
			double got = number_at(row, k, y->dtype);

			error += (got - expected[k]) * (got - expected[k]);
			size += expected[k] * expected[k];
		}
		for (int k = 0; k < GAP; k++)
			assert_int_equal(row[y->row_bytes - GAP + k], GAP_BYTE);
	}
	if (!(error <= c->nmse * size))
		fail_msg("%s: layer %u: NMSE %g, limit %g", c->name, layer, error / size, c->nmse);
}

static void run_layer(struct stage *s, const struct forward_case *c, uint32_t layer, const float *x)
{
	struct rows xs = rows_create(c->n_rows, c->hidden, c->x_dtype, x);
	struct rows ys = rows_create(c->n_rows, c->hidden, c->y_dtype, NULL);
	struct afd_ffn_rows rows = {
		.size = sizeof(rows),
		.layer = (int32_t)layer,
		.n_rows = c->n_rows,
		.x = xs.memory,
		.y = ys.memory,
		.x_dtype = c->x_dtype,
		.y_dtype = c->y_dtype,
		.x_row_bytes = xs.row_bytes,
		.y_row_bytes = ys.row_bytes,
	};

	if (afd_ffn_forward(s->ffn, &rows))
		fail_msg("%s: %s", c->name, afd_last_error());
	check_rows(s, c, layer, x, &ys);
	free(xs.memory);
	free(ys.memory);
}

static void every_shape_and_dtype_agrees_with_double_precision(void **state)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		float x[16 * 64];
		struct stage s;

		stage_create(&s, &cases[i]);
		draw_rows(x, (size_t)cases[i].n_rows * cases[i].hidden, 5);
		for (uint32_t layer = 0; layer < N_LAYERS; layer++)
			run_layer(&s, &cases[i], layer, x);
		stage_destroy(&s);
	}
}

/* ---- laws ---- */

static void forward(struct stage *s, uint32_t n_rows, const float *x, float *y)
{
	struct afd_ffn_rows rows = { .size = sizeof(rows), .n_rows = n_rows, .x = x, .y = y };

	if (afd_ffn_forward(s->ffn, &rows))
		fail_msg("%s", afd_last_error());
}

static void a_row_does_not_know_its_neighbours(void **state)
{
	const struct forward_case c = { "bits", 37, 53, 9, 4, AFD_WEIGHTS_PACKED, ALL(BF16), F32,
		F32, 0 };
	float x[9 * 37], together[9 * 37], alone[37];
	struct stage s;

	stage_create(&s, &c);
	draw_rows(x, 9 * 37, 6);
	forward(&s, 9, x, together);
	for (int i = 0; i < 9; i++) {
		forward(&s, 1, x + i * 37, alone);
		assert_memory_equal(alone, together + i * 37, sizeof(alone));
	}
	stage_destroy(&s);
}

static void a_row_of_nan_leaves_the_others_alone(void **state)
{
	const struct forward_case c = { "nan", 37, 53, 3, 0, AFD_WEIGHTS_PACKED, ALL(F32), F32, F32,
		0 };
	float x[3 * 37], clean[3 * 37], y[3 * 37];
	struct stage s;

	stage_create(&s, &c);
	draw_rows(x, 3 * 37, 6);
	forward(&s, 3, x, clean);
	x[37] = NAN;
	forward(&s, 3, x, y);
	assert_memory_equal(y, clean, 37 * sizeof(float));
	assert_true(isnan(y[37]));
	assert_memory_equal(y + 2 * 37, clean + 2 * 37, 37 * sizeof(float));
	stage_destroy(&s);
}

static void y_may_be_x(void **state)
{
	const struct forward_case c = { "in place", 37, 53, 5, 2, AFD_WEIGHTS_PACKED, ALL(BF16),
		F32, F32, 0 };
	float x[5 * 37], y[5 * 37];
	struct stage s;

	stage_create(&s, &c);
	draw_rows(x, 5 * 37, 8);
	forward(&s, 5, x, y);
	forward(&s, 5, x, x);
	assert_memory_equal(x, y, sizeof(y));
	stage_destroy(&s);
}

static void no_rows_are_fine(void **state)
{
	struct afd_ffn_rows rows = { .size = sizeof(rows) };
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	struct stage s;

	stage_create(&s, &cases[0]);
	assert_int_equal(afd_ffn_forward(s.ffn, &rows), 0);
	assert_int_equal(afd_ffn_stats(s.ffn, &stats), 0);
	assert_int_equal(stats.n_passes, 0);
	stage_destroy(&s);
}

static void rows_and_passes_are_counted(void **state)
{
	const struct forward_case c = { "counts", 8, 16, 5, 2, AFD_WEIGHTS_PACKED, ALL(BF16), F32,
		F32, 0 };
	struct afd_ffn_stats stats = { .size = sizeof(stats) };
	float x[5 * 8] = { 0 };
	struct stage s;

	stage_create(&s, &c);
	forward(&s, 5, x, x);
	assert_int_equal(afd_ffn_stats(s.ffn, &stats), 0);
	assert_int_equal(stats.n_rows, 5);
	assert_int_equal(stats.n_passes, 3);
	/* Packing rounds rows up to its panels. */
	assert_in_range(stats.weight_bytes, N_LAYERS * 3 * 8 * 16 * 2, N_LAYERS * 3 * 64 * 16 * 2);
	stage_destroy(&s);
}

static void packed_and_in_place_weights_have_one_fingerprint(void **state)
{
	struct forward_case c = { "fingerprint", 38, 54, 1, 0, AFD_WEIGHTS_PACKED, ALL(BF16), F32,
		F32, 0 };
	struct afd_ffn_stats packed = { .size = sizeof(packed) },
			     in_place = { .size = sizeof(in_place) };
	struct stage s;

	stage_create(&s, &c);
	assert_int_equal(afd_ffn_stats(s.ffn, &packed), 0);
	stage_destroy(&s);
	c.weights = AFD_WEIGHTS_IN_PLACE;
	stage_create(&s, &c);
	assert_int_equal(afd_ffn_stats(s.ffn, &in_place), 0);
	stage_destroy(&s);
	assert_memory_equal(packed.weights, in_place.weights, sizeof(packed.weights));
	assert_int_equal(in_place.weight_bytes, 0);
}

/* ---- what is refused ---- */

struct refusal {
	const char *name;
	struct afd_ffn_rows rows;
	int error;
	const char *text;
};

static void bad_rows_are_refused_and_y_is_as_before(void **state)
{
	float x[32] = { 0 }, y[32];
	const struct refusal refusals[] = {
		{ "layer below", { .layer = -1, .n_rows = 1, .x = x, .y = y }, -EINVAL,
			"layer -1 is not held, it holds 0 .. 1" },
		{ "layer above", { .layer = 2, .n_rows = 1, .x = x, .y = y }, -EINVAL,
			"layer 2 is not held, it holds 0 .. 1" },
		{ "no x", { .n_rows = 1, .y = y }, -EINVAL, "x is NULL" },
		{ "no y", { .n_rows = 1, .x = x }, -EINVAL, "y is NULL" },
		{ "x_dtype", { .n_rows = 1, .x = x, .y = y, .x_dtype = 9 }, -EINVAL,
			"x_dtype is 9" },
		{ "y_dtype", { .n_rows = 1, .x = x, .y = y, .y_dtype = -1 }, -EINVAL,
			"y_dtype is -1" },
		{ "fp8", { .n_rows = 1, .x = x, .y = y, .x_dtype = AFD_DTYPE_FP8 }, -ENOTSUP,
			"x_dtype is fp8" },
		{ "x_row_bytes", { .n_rows = 1, .x = x, .y = y, .x_row_bytes = 127 }, -EINVAL,
			"x_row_bytes is 127, a row has 128" },
		{ "in place, dtypes", { .n_rows = 1, .x = y, .y = y, .y_dtype = AFD_DTYPE_F16 },
			-EINVAL, "x and y share memory, but not dtype and row bytes" },
		{ "in place, strides", { .n_rows = 1, .x = y, .y = y, .y_row_bytes = 132 },
			-EINVAL, "x and y share memory, but not dtype and row bytes" },
	};
	struct stage s;

	stage_create(&s, &cases[0]);
	memset(y, GAP_BYTE, sizeof(y));
	for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
		struct afd_ffn_rows rows = refusals[i].rows;

		rows.size = sizeof(rows);
		print_message("%s\n", refusals[i].name);
		assert_int_equal(afd_ffn_forward(s.ffn, &rows), refusals[i].error);
		assert_non_null(strstr(afd_last_error(), refusals[i].text));
	}
	for (size_t i = 0; i < sizeof(y); i++)
		assert_int_equal(((unsigned char *)y)[i], GAP_BYTE);
	stage_destroy(&s);
}

static int compute_nothing(void *user, const struct afd_ffn_pass *pass)
{
	return 0;
}

struct bad_params {
	const char *name;
	struct afd_ffn_params params;
	int error;
	const char *text;
};

static void bad_params_are_refused_by_name(void **state)
{
	static const struct bad_params bad[] = {
		{ "max_rows", { .max_rows = 65537 }, -EINVAL, "max_rows is 65537, limit 65536" },
		{ "first_layer", { .first_layer = 2 }, -EINVAL, "first_layer 2" },
		{ "n_layers", { .first_layer = 1, .n_layers = 2 }, -EINVAL,
			"n_layers 2, the model has 2" },
		{ "n_layers that overflows", { .first_layer = 1, .n_layers = UINT32_MAX }, -EINVAL,
			"the model has 2" },
		{ "device", { .device = "abacus" }, -EINVAL, "abacus" },
		{ "both", { .compute = compute_nothing }, -EINVAL, "both of model and compute" },
		{ "weights", { .weights = { 1, 2 } }, -EINVAL, "weights" },
	};
	struct stage s;

	stage_create(&s, &cases[0]);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		struct afd_ffn_params params = bad[i].params;
		afd_ffn *ffn = NULL;

		params.size = sizeof(params);
		print_message("%s\n", bad[i].name);
		assert_int_equal(afd_ffn_create(&ffn, s.model.model, NULL, &params), bad[i].error);
		assert_non_null(strstr(afd_last_error(), bad[i].text));
		assert_null(ffn);
	}
	stage_destroy(&s);
}

static void a_stage_of_some_layers_computes_those_only(void **state)
{
	struct afd_ffn_params params = {
		.size = sizeof(params), .first_layer = 1, .n_layers = 1, .device = test_device()
	};
	struct afd_ffn_rows rows = { .size = sizeof(rows), .n_rows = 1 };
	float x[32], whole[32], part[32];
	struct stage s;
	afd_ffn *ffn;

	stage_create(&s, &cases[0]);
	draw_rows(x, 32, 3);
	assert_int_equal(afd_ffn_create(&ffn, s.model.model, NULL, &params), 0);
	rows.x = x;
	rows.layer = 1;
	rows.y = whole;
	assert_int_equal(afd_ffn_forward(s.ffn, &rows), 0);
	rows.y = part;
	assert_int_equal(afd_ffn_forward(ffn, &rows), 0);
	assert_memory_equal(whole, part, sizeof(whole));
	rows.layer = 0;
	assert_int_equal(afd_ffn_forward(ffn, &rows), -EINVAL);
	afd_ffn_destroy(ffn);
	stage_destroy(&s);
}

struct seen {
	uint64_t done, total, n;
};

static void keep_progress(void *user, uint64_t done, uint64_t total)
{
	struct seen *seen = user;

	assert_true(done > seen->done);
	*seen = (struct seen){ done, total, seen->n + 1 };
}

static void progress_ends_at_all_bytes(void **state)
{
	struct seen seen = { 0 };
	struct afd_ffn_params params = {
		.size = sizeof(params), .progress = keep_progress, .progress_user = &seen
	};
	struct stage s;
	afd_ffn *ffn;

	stage_create(&s, &cases[0]);
	assert_int_equal(afd_ffn_create(&ffn, s.model.model, NULL, &params), 0);
	assert_true(seen.n >= 6);
	assert_int_equal(seen.done, seen.total);
	assert_int_equal(seen.total, N_LAYERS * 3 * 32 * 64 * 4);
	afd_ffn_destroy(ffn);
	stage_destroy(&s);
}

static void a_stage_without_a_transport_does_not_serve(void **state)
{
	struct stage s;

	stage_create(&s, &cases[0]);
	assert_int_equal(afd_ffn_poll(s.ffn), -EINVAL);
	assert_int_equal(afd_ffn_serve(s.ffn), -EINVAL);
	assert_int_equal(afd_ffn_fd(s.ffn), -EINVAL);
	assert_int_equal(afd_ffn_complete(s.ffn, 1, 0), -ENOENT);
	afd_ffn_stop(s.ffn);
	stage_destroy(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_shape_and_dtype_agrees_with_double_precision),
		cmocka_unit_test(a_row_does_not_know_its_neighbours),
		cmocka_unit_test(a_row_of_nan_leaves_the_others_alone),
		cmocka_unit_test(y_may_be_x),
		cmocka_unit_test(no_rows_are_fine),
		cmocka_unit_test(rows_and_passes_are_counted),
		cmocka_unit_test(packed_and_in_place_weights_have_one_fingerprint),
		cmocka_unit_test(bad_rows_are_refused_and_y_is_as_before),
		cmocka_unit_test(bad_params_are_refused_by_name),
		cmocka_unit_test(a_stage_of_some_layers_computes_those_only),
		cmocka_unit_test(progress_ends_at_all_bytes),
		cmocka_unit_test(a_stage_without_a_transport_does_not_serve),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
