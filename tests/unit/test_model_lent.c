/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A model from a host's memory: tensors are used where they are and never freed, names and shapes
 * are copied, and what is malformed is refused by the name of its tensor.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>

#include "../../lib/model/model.h"
#include "checkpoint_files.h"

static afd_context *ctx;
static struct afd_tensor lent[TINY_ALL];
static uint64_t shapes[TINY_ALL][2];
static float numbers[TINY_ALL][24];
static struct afd_model_params params;

static int begin(void **state)
{
	unsigned i, j;

	for (i = 0; i < TINY_ALL; i++) {
		shapes[i][0] = tiny_tensors[i].rows;
		shapes[i][1] = tiny_tensors[i].columns;
		lent[i] = (struct afd_tensor){ .name = tiny_tensors[i].name, .shape = shapes[i],
			.data = numbers[i],
					       .n_dims = shapes[i][1] ? 2 : 1, .dtype = AFD_DTYPE_F32 };
		for (j = 0; j < 24; j++)
			numbers[i][j] = (float)(100 * i + j);
	}
	params = (struct afd_model_params){ .size = sizeof(params), .config_json = TINY_CONFIG,
		.tensors = lent,
					    .n_tensors = TINY_ALL, .tensor_bytes = sizeof(struct afd_tensor) };
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_context_destroy(ctx);
	return 0;
}

static void lent_tensors_are_used_where_they_are(void **state)
{
	struct afd_tensor_info info = { .size = sizeof(info) };
	struct afd__tensor t;
	afd_model *model;

	assert_int_equal(afd_model_open(&model, ctx, NULL, &params), 0);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_UP, &t), 0);
	assert_ptr_equal(t.data, numbers[12]);
	afd__model_release(&t);
	assert_true(numbers[12][1] == 1201);
	assert_int_equal(afd_model_tensor(model, 0, &info), 0);
	assert_null(info.file);
	afd_model_close(model);
}

static void names_shapes_and_config_are_copied(void **state)
{
	char name[64], config[sizeof(TINY_CONFIG)];
	struct afd__tensor t;
	afd_model *model;

	strcpy(name, lent[12].name);
	strcpy(config, TINY_CONFIG);
	lent[12].name = name;
	params.config_json = config;
	assert_int_equal(afd_model_open(&model, ctx, NULL, &params), 0);
	memset(name, 'x', sizeof(name));
	memset(config, 'x', sizeof(config));
	shapes[12][0] = 99;
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_UP, &t), 0);
	assert_string_equal(t.name, "model.layers.0.mlp.up_proj.weight");
	afd_model_close(model);
}

static void tensors_of_one_role_are_enough(void **state)
{
	struct afd_role_info info = { .size = sizeof(info) };
	afd_model *model;

	params.tensors = lent + TINY_ATTENTION;
	params.n_tensors = TINY_FFN;
	assert_int_equal(afd_model_open(&model, ctx, NULL, &params), 0);
	assert_int_equal(afd_model_role(model, AFD_ROLE_FFN, &info), 0);
	assert_int_equal(afd_model_role(model, AFD_ROLE_ATTENTION, &info), -ENOENT);
	assert_non_null(strstr(afd_last_error(),
			"model.embed_tokens.weight: not in the host's tensors"));
	afd_model_close(model);
}

static void a_wider_entry_of_a_newer_header_is_read(void **state)
{
	struct wide { struct afd_tensor tensor; uint64_t later; } wide[TINY_ALL] = { 0 };
	afd_model *model;
	int i;

	for (i = 0; i < TINY_ALL; i++)
		wide[i].tensor = lent[i];
	params.tensors = &wide[0].tensor;
	params.tensor_bytes = sizeof(struct wide);
	assert_int_equal(afd_model_open(&model, ctx, NULL, &params), 0);
	afd_model_close(model);
	wide[3].later = 1;
	assert_int_equal(afd_model_open(&model, ctx, NULL, &params), -E2BIG);
	assert_non_null(strstr(afd_last_error(), "tensors[3]"));
}

/* ---- what is refused; each case spoils the last tensor or the params ---- */

static uint64_t huge[2] = { (uint64_t)1 << 40, (uint64_t)1 << 40 };

static void no_name(void) { lent[13].name = NULL; }
static void empty_name(void) { lent[13].name = ""; }
static void twice(void) { lent[13].name = lent[0].name; }
static void no_dtype(void) { lent[13].dtype = 0; }
static void unknown_dtype(void) { lent[13].dtype = 77; }
static void no_shape(void) { lent[13].shape = NULL; }
static void no_dims(void) { lent[13].n_dims = 0; }
static void five_dims(void) { lent[13].n_dims = 5; }
static void overflow(void) { lent[13].shape = huge; }
static void no_data(void) { lent[13].data = NULL; }
static void odd_data(void) { lent[13].data = (char *)numbers[13] + 1; }
static void no_tensors(void) { params.n_tensors = 0; }
static void null_tensors(void) { params.tensors = NULL; }
static void short_stride(void) { params.tensor_bytes = 8; }
static void bad_weights(void) { params.weights = 3; }

static const struct refusal {
	const char *name;
	void (*spoil)(void);
	int code;
	const char *text;
} refusals[] = {
	{ "a_tensor_without_a_name_is_refused", no_name, -EINVAL, "tensors[13]: it has no name" },
	{ "a_tensor_with_an_empty_name_is_refused", empty_name, -EINVAL, "tensors[13]: it has no name" },
	{ "a_tensor_that_is_lent_twice_is_refused", twice, -EINVAL, "model.embed_tokens.weight: it is lent twice" },
	{ "a_tensor_without_a_dtype_is_refused", no_dtype, -EINVAL, "dtype is 0, no enum afd_dtype" },
	{ "a_tensor_of_an_unknown_dtype_is_refused", unknown_dtype, -EINVAL, "down_proj.weight: dtype is 77" },
	{ "a_tensor_without_a_shape_is_refused", no_shape, -EINVAL, "n_dims is 2" },
	{ "a_tensor_without_dimensions_is_refused", no_dims, -EINVAL, "n_dims is 0, limit 1 .. 4" },
	{ "a_tensor_of_five_dimensions_is_refused", five_dims, -EINVAL,
		"n_dims is 5, limit 1 .. 4" },
	{ "a_shape_that_overflows_is_refused", overflow, -EINVAL,
		"the product of its shape overflows" },
	{ "a_tensor_without_data_is_refused", no_data, -EINVAL, "must be aligned to 4 bytes" },
	{ "data_at_an_odd_place_is_refused", odd_data, -EINVAL, "must be aligned to 4 bytes" },
	{ "no_tensors_are_refused", no_tensors, -EINVAL, "0 tensors, limit 1 .." },
	{ "tensors_of_null_are_refused", null_tensors, -EINVAL, "14 tensors, limit" },
	{ "a_stride_below_the_entry_is_refused", short_stride, -EINVAL, "tensor_bytes is 8" },
	{ "unknown_weights_are_refused", bad_weights, -EINVAL, "weights is 3, limit 2" },
};

static void check_refusal(void **state)
{
	const struct refusal *c = *state;
	afd_model *model = NULL;

	c->spoil();
	assert_int_equal(afd_model_open(&model, ctx, NULL, &params), c->code);
	if (!strstr(afd_last_error(), c->text))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), c->text);
	assert_null(model);
}

static void a_directory_and_a_config_exclude_each_other(void **state)
{
	afd_model *model = NULL;

	assert_int_equal(afd_model_open(&model, ctx, "/tmp", &params), -EINVAL);
	assert_int_equal(afd_model_open(&model, ctx, NULL, NULL), -EINVAL);
	params.config_json = NULL;
	assert_int_equal(afd_model_open(&model, ctx, "/tmp", &params), -EINVAL);
	assert_null(model);
}

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)

static const struct CMUnitTest single[] = {
	T(lent_tensors_are_used_where_they_are),
	T(names_shapes_and_config_are_copied),
	T(tensors_of_one_role_are_enough),
	T(a_wider_entry_of_a_newer_header_is_read),
	T(a_directory_and_a_config_exclude_each_other),
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(refusals)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(refusals); i++)
		tests[n++] = (struct CMUnitTest){ refusals[i].name, check_refusal, begin, end,
			(void *)&refusals[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
