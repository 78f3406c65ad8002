/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The product: every variant against double precision and against plain C, bit by bit. Outputs are
 * poisoned and stand between canaries, paddings of x are NaN, weights in place lie at an odd
 * address. A variant that this CPU lacks is skipped, and says so.
 */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../kernels/cpu/kernels.h"
#include "../../kernels/cpu/number.h"

#define ROWS   40
#define PAD    5 /* floats between rows of x and y */
#define POISON 0x7fc0deadu

static const uint32_t all_n[] = { 1, 31, 33, 100, 251 };
static const uint32_t all_k[] = { 1, 7, 72, 1000 };
static const int32_t all_dtypes[] = { AFD_DTYPE_F32, AFD_DTYPE_BF16, AFD_DTYPE_F16 };

/* How large inputs are: products that underflow, products near the end of the range, ordinary ones.
 */
struct kind {
	const char *name;
	int x_exponent, w_exponent; /* powers of two; f16 keeps its own */
};
static const struct kind all_kinds[] = { { "tiny", -80, -60 }, { "huge", 60, 55 },
	{ "ordinary", 0, 0 } };

struct matrices {
	uint32_t n, k;
	int32_t dtype;
	float *x;     /* [ROWS][k + PAD] */
	float *bias;  /* [n] */
	char *rows;   /* [n][k] at an odd address */
	char *memory; /* of rows */
	void *packed;
	size_t packed_bytes;
};

static uint64_t random_state = 88172645463325252u;

static uint32_t random_bits(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t)(random_state >> 32);
}

static float random_float(int exponent)
{
	return ldexpf((float)(int32_t)random_bits(), exponent - 31);
}

static void random_weight(char *at, int32_t dtype, int exponent)
{
	float f = random_float(exponent);
	uint32_t bits;
	uint16_t half;

	memcpy(&bits, &f, sizeof(bits));
	if (dtype == AFD_DTYPE_F32) {
		memcpy(at, &bits, 4);
		return;
	}
	/* f16: any finite number, subnormals too, shifted by the kind through its exponent bits
	 * only. */
	half = dtype == AFD_DTYPE_BF16
		       ? (uint16_t)(bits >> 16)
		       : (uint16_t)(random_bits() & (exponent < 0 ? 0x87ff : 0xbbff));
	memcpy(at, &half, 2);
}

static void fill_poison(float *at, size_t n)
{
	uint32_t bits = POISON;

	for (size_t i = 0; i < n; i++)
		memcpy(&at[i], &bits, sizeof(bits));
}

static void *aligned(size_t bytes)
{
	void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);

	assert_non_null(memory);
	return memory;
}

static struct afd__matrix matrix_of(const struct matrices *m, int32_t layout)
{
	return (struct afd__matrix){ .data = layout == AFD__LAYOUT_PACKED ? m->packed : m->rows,
		.n = m->n,
		.k = m->k,
		.dtype = m->dtype,
		.layout = layout };
}

static void pack_all(const struct matrices *m)
{
	struct afd__matrix w = matrix_of(m, AFD__LAYOUT_PACKED);

	memset(m->packed, 0xff, m->packed_bytes);
	afd__cpu_kernels(AFD__ISA_C)
		->pack(&w, m->rows, 0, m->n, 0, (m->n + AFD_K_PANEL - 1) / AFD_K_PANEL);
}

static struct matrices make_matrices(uint32_t n, uint32_t k, int32_t dtype, const struct kind *kind)
{
	struct matrices m = { .n = n, .k = k, .dtype = dtype };
	size_t number_bytes = afd_dtype_bytes(dtype);

	m.x = aligned(ROWS * (k + PAD) * sizeof(float));
	fill_poison(m.x, ROWS * (k + PAD));
	for (uint32_t r = 0; r < ROWS; r++) {
		for (uint32_t i = 0; i < k; i++)
			m.x[r * (k + PAD) + i] = random_float(kind->x_exponent);
	}
	m.bias = aligned(n * sizeof(float));
	for (uint32_t i = 0; i < n; i++)
		m.bias[i] = random_float(kind->x_exponent + kind->w_exponent);
	m.memory = malloc((size_t)n * k * number_bytes + 1);
	assert_non_null(m.memory);
	m.rows = m.memory + 1;
	for (size_t i = 0; i < (size_t)n * k; i++)
		random_weight(m.rows + i * number_bytes, dtype, kind->w_exponent);
	m.packed_bytes = afd_k_packed_bytes(n, k, dtype);
	m.packed = aligned(m.packed_bytes);
	pack_all(&m);
	return m;
}

static void free_matrices(struct matrices *m)
{
	free(m->x);
	free(m->bias);
	free(m->memory);
	free(m->packed);
}

static const struct afd_cpu_kernels *kernels_or_skip(void *state)
{
	const char *name = state;
	int isa;

	setenv("AFD_ISA", name, 1);
	isa = afd__isa_choose();
	unsetenv("AFD_ISA");
	if (isa < 0) {
		print_message("skipped: %s\n", afd_last_error());
		skip();
	}
	return afd__cpu_kernels(isa);
}

/* y of rows row0 .. row0+n_rows-1, one row of canaries before and after; caller frees. */
static float *run(const struct afd_cpu_kernels *kernels, const struct matrices *m, int32_t layout,
	uint32_t row0, uint32_t n_rows, uint32_t n_split)
{
	size_t y_stride = m->n + PAD;
	float *y = aligned((n_rows + 2) * y_stride * sizeof(float));
	struct afd__product_args a = { .x = m->x + row0 * (m->k + PAD),
		.w = matrix_of(m, layout),
		.bias = m->bias,
		.y = y + y_stride,
		.x_stride = m->k + PAD,
		.y_stride = y_stride,
		.n_rows = n_rows };
	void (*product)(const struct afd__product_args *, uint32_t, uint32_t) =
		layout == AFD__LAYOUT_PACKED ? kernels->product : kernels->product_in_place;

	fill_poison(y, (n_rows + 2) * y_stride);
	if (n_split && n_split < m->n) {
		product(&a, n_split, m->n);
		product(&a, 0, n_split);
	} else {
		product(&a, 0, m->n);
	}
	return y;
}

static bool is_poison(float f)
{
	uint32_t bits;

	memcpy(&bits, &f, sizeof(bits));
	return bits == POISON;
}

/* Canaries stand, and rows have the bits of expected[row0 ..] (as run() gave it). */
static void assert_same(
	const float *y, const float *expected, uint32_t n, uint32_t row0, uint32_t n_rows)
{
	size_t stride = n + PAD;

	for (size_t i = 0; i < stride; i++)
		assert_true(is_poison(y[i]) && is_poison(y[(n_rows + 1) * stride + i]));
	for (uint32_t r = 0; r < n_rows; r++) {
		const float *row = y + (r + 1) * stride;

		assert_memory_equal(row, expected + (row0 + r + 1) * stride, n * sizeof(float));
		for (uint32_t i = n; i < stride; i++)
			assert_true(is_poison(row[i]));
	}
}

/* |error| <= (k + 1) eps sum|x w| + (k + 1) of the smallest subnormal: the bound of a sum in any
 * order. */
static void assert_near_double(const float *y, const struct matrices *m)
{
	for (uint32_t r = 0; r < ROWS; r++) {
		for (uint32_t n = 0; n < m->n; n++) {
			double sum = m->bias[n], magnitude = fabs(m->bias[n]), limit;

			for (uint32_t k = 0; k < m->k; k++) {
				double product =
					(double)m->x[r * (m->k + PAD) + k] *
					afd_k_float_at(m->rows, (size_t)n * m->k + k, m->dtype);

				sum += product;
				magnitude += fabs(product);
			}
			limit = (m->k + 1) * (0x1p-24 * magnitude + 0x1p-149);
			assert_true(fabs(y[(r + 1) * (m->n + PAD) + n] - sum) <= limit);
		}
	}
}

/* Calls check for every shape, dtype and kind. */
static void for_all(const struct afd_cpu_kernels *kernels, int32_t layout,
	void (*check)(const struct afd_cpu_kernels *, const struct matrices *, int32_t))
{
	for (size_t i = 0; i < sizeof(all_n) / sizeof(*all_n) * sizeof(all_k) / sizeof(*all_k) * 9;
		i++) {
		struct matrices m = make_matrices(
			all_n[i % 5], all_k[i / 5 % 4], all_dtypes[i / 20 % 3], &all_kinds[i / 60]);

		check(kernels, &m, layout);
		free_matrices(&m);
	}
}

static void check_double(
	const struct afd_cpu_kernels *kernels, const struct matrices *m, int32_t layout)
{
	float *y = run(kernels, m, layout, 0, ROWS, 0);

	assert_near_double(y, m);
	free(y);
}

static void packed_product_agrees_with_double_precision(void **state)
{
	for_all(kernels_or_skip(*state), AFD__LAYOUT_PACKED, check_double);
}

static void product_in_place_agrees_with_double_precision(void **state)
{
	for_all(kernels_or_skip(*state), AFD__LAYOUT_IN_PLACE, check_double);
}

/* Every number of rows; so also that a row does not know its neighbours. */
static void check_bits(
	const struct afd_cpu_kernels *kernels, const struct matrices *m, int32_t layout)
{
	float *expected = run(afd__cpu_kernels(AFD__ISA_C), m, layout, 0, ROWS, 0);

	/* Plain C takes rows one by one: a few counts will do. */
	for (uint32_t n_rows = 1; n_rows <= ROWS; n_rows += strcmp(kernels->name, "c") ? 1 : 19) {
		uint32_t row0 = random_bits() % (ROWS - n_rows + 1);
		float *y = run(kernels, m, layout, row0, n_rows, 0);

		assert_same(y, expected, m->n, row0, n_rows);
		free(y);
	}
	free(expected);
}

static void packed_product_of_1_to_40_rows_has_the_bits_of_plain_c(void **state)
{
	for_all(kernels_or_skip(*state), AFD__LAYOUT_PACKED, check_bits);
}

static void product_in_place_of_1_to_40_rows_has_the_bits_of_plain_c(void **state)
{
	for_all(kernels_or_skip(*state), AFD__LAYOUT_IN_PLACE, check_bits);
}

static void range_of_columns_has_the_bits_of_the_whole(void **state)
{
	const struct afd_cpu_kernels *kernels = kernels_or_skip(*state);
	struct matrices m = make_matrices(251, 1000, AFD_DTYPE_BF16, &all_kinds[2]);

	for (int32_t layout = AFD__LAYOUT_PACKED; layout <= AFD__LAYOUT_IN_PLACE; layout++) {
		float *whole = run(kernels, &m, layout, 0, ROWS, 0);

		for (uint32_t n = AFD_K_PANEL; n < m.n; n += AFD_K_PANEL) {
			for (uint32_t n_rows = 1; n_rows <= ROWS; n_rows += 3) {
				float *y = run(kernels, &m, layout, 1,
					n_rows < ROWS ? n_rows : ROWS - 1, n);

				assert_same(y, whole, m.n, 1, n_rows < ROWS ? n_rows : ROWS - 1);
				free(y);
			}
		}
		free(whole);
	}
	free_matrices(&m);
}

static void product_of_many_rows_has_the_bits_of_its_rows_alone(void **state)
{
	const struct afd_cpu_kernels *kernels = kernels_or_skip(*state);
	struct matrices m = make_matrices(70, 600, AFD_DTYPE_F16, &all_kinds[2]);
	struct afd__product_args a = {
		.w = matrix_of(&m, AFD__LAYOUT_PACKED), .x_stride = 600, .y_stride = 70
	};
	float *x = aligned(200 * 600 * sizeof(float)), *y = aligned(200 * 70 * sizeof(float)),
	      alone[70];

	for (size_t i = 0; i < 200 * 600; i++)
		x[i] = random_float(0);
	for (uint32_t n_rows = 50; n_rows <= 200; n_rows += 25) {
		a.x = x, a.y = y, a.n_rows = n_rows;
		kernels->product(&a, 0, 70);
		for (uint32_t r = 0; r < n_rows; r++) {
			a.x = x + r * 600, a.y = alone, a.n_rows = 1;
			kernels->product(&a, 0, 70);
			assert_memory_equal(alone, y + r * 70, sizeof(alone));
		}
	}
	free(x);
	free(y);
	free_matrices(&m);
}

static void infinity_and_nan_in_a_weight_reach_their_column_only(void **state)
{
	const struct afd_cpu_kernels *kernels = kernels_or_skip(*state);
	struct matrices m = make_matrices(40, 72, AFD_DTYPE_BF16, &all_kinds[2]);
	const uint16_t infinity_bits = 0x7f80, nan_bits = 0x7fc0;

	memcpy(m.rows + 2 * (3 * 72 + 5), &infinity_bits, 2);
	memcpy(m.rows + 2 * (39 * 72 + 71), &nan_bits, 2);
	pack_all(&m);
	for (int32_t layout = AFD__LAYOUT_PACKED; layout <= AFD__LAYOUT_IN_PLACE; layout++) {
		float *y = run(kernels, &m, layout, 0, ROWS, 0);

		for (uint32_t i = 0; i < ROWS * 40; i++) {
			float f = y[(i / 40 + 1) * (40 + PAD) + i % 40];

			assert_int_equal(!!isnan(f), i % 40 == 39);
			assert_int_equal(!!isinf(f), i % 40 == 3);
		}
		free(y);
	}
	free_matrices(&m);
}

static void matrix_packed_in_pieces_has_the_bytes_of_one_packed_whole(void **state)
{
	static const uint32_t pieces[] = { 1, 13, 32, 45, 100 };

	for (size_t i = 0; i < 3 * sizeof(pieces) / sizeof(*pieces); i++) {
		struct matrices m = make_matrices(251, 300, all_dtypes[i % 3], &all_kinds[2]);
		struct afd__matrix w = matrix_of(&m, AFD__LAYOUT_PACKED);
		size_t row_bytes = 300 * afd_dtype_bytes(m.dtype);

		w.data = aligned(m.packed_bytes);
		memset(w.data, 0xee, m.packed_bytes);
		for (uint32_t row = 0, n; row < 251; row += n) {
			n = pieces[i / 3] < 251 - row ? pieces[i / 3] : 251 - row;
			for (uint32_t p = row / AFD_K_PANEL; p <= (row + n - 1) / AFD_K_PANEL; p++)
				afd__cpu_kernels(AFD__ISA_C)
					->pack(&w, m.rows + row * row_bytes, row, n, p, p + 1);
		}
		assert_memory_equal(w.data, m.packed, m.packed_bytes);
		free(w.data);
		free_matrices(&m);
	}
}

static void packed_bytes_round_up_to_panels_and_do_not_wrap(void **state)
{
	assert_int_equal(afd_k_packed_bytes(1, 1, AFD_DTYPE_BF16), 64);
	assert_int_equal(afd_k_packed_bytes(33, 10, AFD_DTYPE_F32), 2 * 32 * 10 * 4);
	assert_int_equal(afd_k_packed_bytes(6144, 1024, AFD_DTYPE_BF16), (size_t)6144 * 1024 * 2);
	assert_true(afd_k_packed_bytes(UINT32_MAX, UINT32_MAX, AFD_DTYPE_F32) == SIZE_MAX);
}

static void every_f16_converts_as_its_definition_says(void **state)
{
	for (uint32_t h = 0; h < 0x10000; h++) {
		float f = afd_k_float_of_f16((uint16_t)h), expected;
		int exponent = h >> 10 & 31, fraction = h & 0x3ff;

		if (exponent == 31 && fraction) {
			assert_true(isnan(f));
			continue;
		}
		expected = exponent == 31 ? INFINITY
			   : exponent     ? ldexpf((float)(1024 + fraction), exponent - 25)
					  : ldexpf((float)fraction, -24);
		assert_true(
			f == (h & 0x8000 ? -expected : expected) && !signbit(f) == !(h & 0x8000));
	}
}

#define FOR_VARIANT(variant, test) { variant ": " #test, test, NULL, NULL, (void *)variant }
#define FOR_VARIANTS(test) \
	FOR_VARIANT("c", test), FOR_VARIANT("avx2", test), FOR_VARIANT("avx512", test)

int main(void)
{
	const struct CMUnitTest tests[] = {
		FOR_VARIANTS(packed_product_agrees_with_double_precision),
		FOR_VARIANTS(product_in_place_agrees_with_double_precision),
		FOR_VARIANTS(packed_product_of_1_to_40_rows_has_the_bits_of_plain_c),
		FOR_VARIANTS(product_in_place_of_1_to_40_rows_has_the_bits_of_plain_c),
		FOR_VARIANTS(range_of_columns_has_the_bits_of_the_whole),
		FOR_VARIANTS(product_of_many_rows_has_the_bits_of_its_rows_alone),
		FOR_VARIANTS(infinity_and_nan_in_a_weight_reach_their_column_only),
		cmocka_unit_test(matrix_packed_in_pieces_has_the_bytes_of_one_packed_whole),
		cmocka_unit_test(packed_bytes_round_up_to_panels_and_do_not_wrap),
		cmocka_unit_test(every_f16_converts_as_its_definition_says),
	};

	return cmocka_run_group_tests_name("product", tests, NULL, NULL);
}
