/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The fingerprint against values that an independent program computed from the definition in
 * docs/wire.md, and what it must and must not depend on.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <string.h>

#include "../../lib/model/fingerprint.h"

static const float numbers[6] = { 0, 1, 2, 3, 4, 5 };
static const unsigned char bytes[8] = { 0, 1, 2, 3, 4, 5, 6, 7 };

static struct afd__tensor up = { .name = "model.layers.0.mlp.up_proj.weight", .data = numbers,
	.bytes = sizeof(numbers),
				 .shape = { 2, 3 }, .n_dims = 2, .dtype = AFD_DTYPE_F32 };
static struct afd__tensor norm = { .name = "model.norm.weight", .data = bytes,
	.bytes = sizeof(bytes), .shape = { 4 },
				   .n_dims = 1, .dtype = AFD_DTYPE_BF16 };

static void value_of(const struct afd__tensor *const tensors[], int n, uint64_t value[2])
{
	struct afd__fingerprint *fp = afd__fingerprint_create(NULL);
	int i;

	assert_non_null(fp);
	for (i = 0; i < n; i++)
		afd__fingerprint_tensor(fp, tensors[i]);
	afd__fingerprint_value(fp, value);
	afd__fingerprint_destroy(fp);
}

#if __has_include(<xxhash.h>)

static void the_fingerprint_is_the_one_of_the_definition(void **state)
{
	uint64_t value[2];

	value_of((const struct afd__tensor *[]){ &up, &norm }, 2, value);
	assert_true(value[0] == 0x87b836856a7409f3 && value[1] == 0x4a9340e6e3390bf0);
	value_of(NULL, 0, value);
	assert_true(value[0] == 0x743df94ee4c78a2a && value[1] == 0x10e45c7ce2292320);
}

static void the_order_of_tensors_does_not_matter(void **state)
{
	uint64_t value[2];

	value_of((const struct afd__tensor *[]){ &norm, &up }, 2, value);
	assert_true(value[0] == 0x87b836856a7409f3 && value[1] == 0x4a9340e6e3390bf0);
}

static void a_slice_is_hashed_with_its_place(void **state)
{
	const uint64_t begin[2] = { 1, 0 }, end[2] = { 2, 3 };
	struct afd__fingerprint *fp = afd__fingerprint_create(NULL);
	uint64_t value[2];

	afd__fingerprint_begin(fp, &up, begin, end);
	afd__fingerprint_add(fp, numbers + 3, 4);
	afd__fingerprint_add(fp, numbers + 4, 8);
	afd__fingerprint_end(fp);
	afd__fingerprint_value(fp, value);
	afd__fingerprint_destroy(fp);
	assert_true(value[0] == 0x0394c68d4dc1fc83 && value[1] == 0x6854f1a161fc70b6);
}

static void differs(struct afd__tensor other)
{
	uint64_t value[2];

	value_of((const struct afd__tensor *[]){ &other, &norm }, 2, value);
	assert_true(value[0] != 0x87b836856a7409f3 && value[1] != 0x4a9340e6e3390bf0);
}

static void name_dtype_shape_and_numbers_all_count(void **state)
{
	static const float others[6] = { 0, 1, 2, 3, 4, 6 };
	struct afd__tensor t = up;

	t.name = "model.layers.1.mlp.up_proj.weight";
	differs(t);
	t = up;
	t.dtype = AFD_DTYPE_F16;
	differs(t);
	t = up;
	t.shape[0] = 3;
	t.shape[1] = 2;
	differs(t);
	t = up;
	t.data = others;
	differs(t);
}

/* ---- e4m3: [300][130] with [3][2] scales ---- */

enum { FP8_ROWS = 300, FP8_COLUMNS = 130 };
static unsigned char fp8_numbers[FP8_ROWS * FP8_COLUMNS];
static const float fp8_scales[6] = { 1, 2, 3, 4, 5, 6 };

static struct afd__tensor fp8_matrix(void)
{
	for (size_t i = 0; i < sizeof(fp8_numbers); i++)
		fp8_numbers[i] = (unsigned char)(i * 7 & 0x77);
	return (struct afd__tensor){
		.name = "model.layers.0.mlp.gate_proj.weight", .data = fp8_numbers, .bytes = sizeof(fp8_numbers),
		.shape = { FP8_ROWS, FP8_COLUMNS }, .n_dims = 2, .dtype = AFD_DTYPE_FP8,
		.scales = { .data = fp8_scales, .bytes = sizeof(fp8_scales), .rows = 3, .columns = 2, .dtype = AFD_DTYPE_F32 },
	};
}

static void scales_are_a_tensor_of_their_own(void **state)
{
	const struct afd__tensor t = fp8_matrix();
	uint64_t value[2];

	value_of((const struct afd__tensor *[]){ &t }, 1, value);
	assert_true(value[0] == 0xb3e951643f36ed3e && value[1] == 0x924852897e048bbb);
}

static void a_slice_brings_the_scales_of_the_blocks_that_it_touches(void **state)
{
	const uint64_t begin[2] = { 150, 128 }, end[2] = { 300, 130 };
	struct afd__fingerprint *fp = afd__fingerprint_create(NULL);
	const struct afd__tensor t = fp8_matrix();
	uint64_t value[2];

	afd__fingerprint_slice(fp, &t, begin, end);
	afd__fingerprint_value(fp, value);
	afd__fingerprint_destroy(fp);
	assert_true(value[0] == 0x6b5e407df22b1c52 && value[1] == 0x211d858fb1e9ce95);
}

static void a_scale_that_a_slice_does_not_touch_does_not_count(void **state)
{
	static const float others[6] = { 9, 9, 9, 4, 9, 6 };
	const uint64_t begin[2] = { 150, 128 }, end[2] = { 300, 130 };
	struct afd__fingerprint *fp = afd__fingerprint_create(NULL);
	struct afd__tensor t = fp8_matrix();
	uint64_t value[2];

	t.scales.data = others;
	afd__fingerprint_slice(fp, &t, begin, end);
	afd__fingerprint_value(fp, value);
	afd__fingerprint_destroy(fp);
	assert_true(value[0] == 0x6b5e407df22b1c52 && value[1] == 0x211d858fb1e9ce95);
}

/* Some slices of the e4m3 matrix, ever others; `threads` 0: at once. */
static void value_of_slices(uint32_t threads, int n, uint64_t value[2])
{
	const struct afd_context_params params = { .size = sizeof(params), .n_threads = threads };
	const struct afd__tensor t = fp8_matrix();
	struct afd__fingerprint *fp;
	afd_context *ctx = NULL;

	assert_int_equal(afd_context_create(&ctx, threads ? &params : NULL), 0);
	fp = afd__fingerprint_create(threads ? ctx : NULL);
	assert_non_null(fp);
	for (int i = 0; i < n; i++) {
		const uint64_t begin[2] = { 150 - (uint64_t)i, 128 }, end[2] = { 300, 130 };
		bool waits = afd__fingerprint_later(fp, &t, begin, end, false);

		assert_int_equal(waits, threads > 1);
		if (!waits)
			afd__fingerprint_slice(fp, &t, begin, end);
	}
	afd__fingerprint_value(fp, value);
	afd__fingerprint_destroy(fp);
	afd_context_destroy(ctx);
}

static void slices_that_wait_for_threads_give_the_value_of_the_definition(void **state)
{
	uint64_t value[2], wanted[2];

	value_of_slices(3, 1, value);
	assert_true(value[0] == 0x6b5e407df22b1c52 && value[1] == 0x211d858fb1e9ce95);
	value_of_slices(0, 100, wanted);
	for (uint32_t threads = 1; threads <= 4; threads++) {
		value_of_slices(threads, 100, value);
		assert_memory_equal(value, wanted, sizeof(value));
	}
}

static const struct CMUnitTest tests[] = {
	cmocka_unit_test(slices_that_wait_for_threads_give_the_value_of_the_definition),
	cmocka_unit_test(scales_are_a_tensor_of_their_own),
	cmocka_unit_test(a_slice_brings_the_scales_of_the_blocks_that_it_touches),
	cmocka_unit_test(a_scale_that_a_slice_does_not_touch_does_not_count),
	cmocka_unit_test(the_fingerprint_is_the_one_of_the_definition),
	cmocka_unit_test(the_order_of_tensors_does_not_matter),
	cmocka_unit_test(a_slice_is_hashed_with_its_place),
	cmocka_unit_test(name_dtype_shape_and_numbers_all_count),
};

#else

static void without_xxhash_the_fingerprint_is_unknown(void **state)
{
	uint64_t value[2] = { 1, 1 };

	value_of((const struct afd__tensor *[]){ &up, &norm }, 2, value);
	assert_true(value[0] == 0 && value[1] == 0);
}

static const struct CMUnitTest tests[] = {
	cmocka_unit_test(without_xxhash_the_fingerprint_is_unknown),
};

#endif

int main(void)
{
	return cmocka_run_group_tests(tests, NULL, NULL);
}
