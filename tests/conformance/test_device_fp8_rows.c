/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows of e4m3 with a scale per group of 128, as they cross a wire: every byte against a plain
 * reference, so that all devices and variants have the same ones; what is not finite, all zeros,
 * tiny and huge; and that a row which crosses twice is the row that crossed once.
 */
#include "rig.h"

#include <math.h>
#include <string.h>

enum { MAX_WIDTH = 1100, MAX_ROWS = 5, FP8 = AFD_DTYPE_FP8, F32 = AFD_DTYPE_F32 };
#define MAX_ROW_BYTES 2048

static const uint32_t widths[] = { 1, 3, 16, 127, 128, 129, 200, 256, 300, 1024, 1100 };
enum { N_WIDTHS = sizeof(widths) / sizeof(widths[0]) };

/* ---- the definition ---- */

/* 20 bits of it, towards 0, so that its products with numbers are exact. */
static float scale_of(const float *x, size_t n)
{
	double largest = 0, scale;
	int exponent;

	for (size_t i = 0; i < n; i++) {
		if (isfinite(x[i]) && fabs(x[i]) > largest)
			largest = fabs(x[i]);
	}
	scale = frexp((float)(largest / 448), &exponent);
	scale = ldexp(floor(ldexp(scale, 20)), exponent - 20);
	return (float)fmax(scale, 0x1p-100);
}

static void reference(const float *x, uint32_t width, uint8_t *row)
{
	size_t scales_at = ((size_t)width + 15) / 16 * 16;

	memset(row, 0, afd__row_bytes(width, FP8));
	for (uint32_t first = 0; first < width; first += 128) {
		size_t n = width - first < 128 ? width - first : 128;
		float scale = scale_of(x + first, n);

		memcpy(row + scales_at + first / 128 * 4, &scale, 4);
		for (size_t i = first; i < first + n; i++) {
			if (isfinite(x[i]))
				rig_encode(row, i, FP8, (float)((double)x[i] / scale));
			else
				row[i] = signbit(x[i]) ? 0xff : 0x7f;
		}
	}
}

static float scale_at(const uint8_t *row, uint32_t width, size_t i)
{
	float scale;

	memcpy(&scale, row + ((size_t)width + 15) / 16 * 16 + i / 128 * 4, 4);
	return scale;
}

static float value_at(const uint8_t *row, uint32_t width, size_t i)
{
	return (float)(rig_decode(row, i, FP8) * scale_at(row, width, i));
}

/* ---- both ways on the device; outputs are poisoned and stand between canaries ---- */

static void to_fp8(struct rig *r, const float *x, uint32_t n_rows, uint32_t width, uint8_t *rows)
{
	size_t bytes = afd__row_bytes(width, FP8);
	struct afd__convert_args a = { .src = rig_input(r, x, n_rows * width * sizeof(float)),
		.dst = rig_output(r, n_rows * bytes),
		.src_stride = width * sizeof(float),
		.dst_stride = bytes,
		.n_rows = n_rows,
		.width = width,
		.src_dtype = F32,
		.dst_dtype = FP8 };

	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, rows, a.dst, n_rows * bytes);
}

static void from_fp8(struct rig *r, const uint8_t *rows, uint32_t n_rows, uint32_t width, float *x)
{
	size_t bytes = afd__row_bytes(width, FP8);
	struct afd__convert_args a = { .src = rig_input(r, rows, n_rows * bytes),
		.dst = rig_output(r, n_rows * width * sizeof(float)),
		.src_stride = bytes,
		.dst_stride = width * sizeof(float),
		.n_rows = n_rows,
		.width = width,
		.src_dtype = FP8,
		.dst_dtype = F32 };

	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, x, a.dst, n_rows * width * sizeof(float));
}

static void expect_bytes(const uint8_t *got, const uint8_t *want, size_t n, const char *what)
{
	for (size_t i = 0; i < n; i++) {
		if (got[i] != want[i])
			fail_msg("%s: byte %zu is %02x, want %02x", what, i, got[i], want[i]);
	}
}

/* ---- tests ---- */

static void rows_have_the_bytes_of_the_definition(void **state)
{
	static float x[MAX_ROWS * MAX_WIDTH];
	static uint8_t got[MAX_ROWS * MAX_ROW_BYTES], want[MAX_ROW_BYTES];

	for (int i = 0; i < N_WIDTHS * RIG_N_KINDS; i++) {
		uint32_t width = widths[i / RIG_N_KINDS];
		size_t bytes = afd__row_bytes(width, FP8);
		struct rig *r = rig_make(2);

		assert_int_equal(bytes % 16, 0);
		rig_fill(r, x, MAX_ROWS * width, rig_kinds[i % RIG_N_KINDS].scale);
		to_fp8(r, x, MAX_ROWS, width, got);
		for (uint32_t row = 0; row < MAX_ROWS; row++) {
			reference(x + row * width, width, want);
			expect_bytes(got + row * bytes, want, bytes, rig_kinds[i % RIG_N_KINDS].name);
		}
		rig_end(r);
	}
}

static void rows_come_back_as_number_times_scale(void **state)
{
	static uint8_t rows[MAX_ROWS * MAX_ROW_BYTES];
	static float x[MAX_ROWS * MAX_WIDTH], got[MAX_ROWS * MAX_WIDTH];

	for (int i = 0; i < N_WIDTHS * RIG_N_KINDS; i++) {
		uint32_t width = widths[i / RIG_N_KINDS];
		size_t bytes = afd__row_bytes(width, FP8);
		struct rig *r = rig_make(2);

		rig_fill(r, x, MAX_ROWS * width, rig_kinds[i % RIG_N_KINDS].scale);
		for (uint32_t row = 0; row < MAX_ROWS; row++)
			reference(x + row * width, width, rows + row * bytes);
		from_fp8(r, rows, MAX_ROWS, width, got);
		for (size_t at = 0; at < (size_t)MAX_ROWS * width; at++) {
			const uint8_t *row = rows + at / width * bytes;
			float want = value_at(row, width, at % width);

			assert_memory_equal(&got[at], &want, sizeof(want));
			/* Half a step: 3 bits of a number, or the last bit of the smallest. */
			rig_near(got[at], x[at], 0x1.0001p-4,
				0x1p-10 * scale_at(row, width, at % width), "x", at);
		}
		rig_end(r);
	}
}

static void a_row_that_crosses_twice_is_the_row_that_crossed_once(void **state)
{
	static uint8_t once[MAX_ROWS * MAX_ROW_BYTES], twice[MAX_ROWS * MAX_ROW_BYTES];
	static float x[MAX_ROWS * MAX_WIDTH], back[MAX_ROWS * MAX_WIDTH];

	for (int i = 0; i < 40; i++) {
		uint32_t width = widths[i % N_WIDTHS];
		size_t bytes = MAX_ROWS * afd__row_bytes(width, FP8);
		struct rig *r = rig_make(1);

		for (uint32_t at = 0; at < MAX_ROWS * width; at++)
			x[at] = rig_random(r, 1) * ldexpf(1, (int)rig_below(r, 240) - 120);
		to_fp8(r, x, MAX_ROWS, width, once);
		from_fp8(r, once, MAX_ROWS, width, back);
		to_fp8(r, back, MAX_ROWS, width, twice);
		expect_bytes(twice, once, bytes, "twice");
		rig_end(r);
	}
}

/* Of each case one group, repeated: the width ends within the last one. */
static void groups_at_the_ends_of_the_range_are_as_defined(void **state)
{
	static const float cases[][4] = { { 0, 0, 0, 0 }, { 0, -0.0f, 0, -0.0f },
		{ NAN, 1, -2, 0.5f }, { -NAN, NAN, NAN, -NAN }, { INFINITY, 1, -INFINITY, 3 },
		{ INFINITY, -INFINITY, INFINITY, NAN }, { 3.4028235e38f, -3.4028235e38f, 1, 1e38f },
		{ 1e-45f, -1e-45f, 1.1754944e-38f, 0 }, { 0x1p-92f, 0x1p-100f, -0x1p-109f, 0x1p-111f },
		{ 448, 447, -0.0078125f, 0.00097656256f }, { 1e-30f, 1, 1e30f, -1 } };
	enum { N = sizeof(cases) / sizeof(cases[0]), WIDTH = 128 * N - 30 };
	static float x[128 * N], back[WIDTH];
	static uint8_t got[2 * MAX_ROW_BYTES], want[2 * MAX_ROW_BYTES];

	for (size_t i = 0; i < 128 * N; i++)
		x[i] = cases[i / 128][i % 4];
	to_fp8(*state, x, 1, WIDTH, got);
	reference(x, WIDTH, want);
	expect_bytes(got, want, afd__row_bytes(WIDTH, FP8), "ends");
	from_fp8(*state, got, 1, WIDTH, back);
	for (size_t i = 0; i < WIDTH; i++) {
		float value = value_at(want, WIDTH, i);

		if (isfinite(x[i]))
			assert_memory_equal(&back[i], &value, sizeof(value));
		else
			assert_true(isnan(back[i]));
	}
}

static void every_number_of_every_scale_is_read(void **state)
{
	static const float scales[] = { 1, 0x1.fffffep0f, 0x1.99999ap-30f, 0x1p-149f, 0x1p-126f,
		3e38f, 0, -2, INFINITY, NAN };
	enum { N = sizeof(scales) / sizeof(scales[0]) };
	static uint8_t row[2 * MAX_ROW_BYTES];
	static float got[256 * N];
	size_t bytes = afd__row_bytes(256, FP8);

	for (size_t s = 0; s < N; s++) {
		for (int i = 0; i < 256; i++)
			row[s * bytes + (size_t)i] = (uint8_t)i;
		memcpy(row + s * bytes + 256, &scales[s], 4);
		memcpy(row + s * bytes + 260, &scales[s], 4);
	}
	from_fp8(*state, row, N, 256, got);
	for (size_t i = 0; i < 256 * N; i++) {
		float want = value_at(row + i / 256 * bytes, 256, i % 256);

		assert_true(isnan(want) ? isnan(got[i]) : !memcmp(&got[i], &want, 4));
	}
}

enum { N_SRC = 6, N_DST = 9 };

static void rows_are_gathered_into_fp8(void **state)
{
	static const int32_t index[N_DST] = { 5, 0, 0, 3, 1, 5, 2, 4, 4 };
	enum { WIDTH = 150, GAP = 32 };
	static float x[N_SRC * WIDTH];
	static uint8_t got[N_DST * (MAX_ROW_BYTES + GAP)], want[MAX_ROW_BYTES];
	size_t bytes = afd__row_bytes(WIDTH, FP8), stride = bytes + GAP;
	struct rig *r = *state;

	rig_fill(r, x, N_SRC * WIDTH, 1);
	memset(got, 0xab, sizeof(got));
	struct afd__convert_args a = { .src = rig_input(r, x, sizeof(x)),
		.dst = rig_input(r, got, N_DST * stride),
		.index = rig_input(r, index, sizeof(index)),
		.src_stride = WIDTH * sizeof(float),
		.dst_stride = stride,
		.n_rows = N_DST,
		.width = WIDTH,
		.src_dtype = F32,
		.dst_dtype = FP8 };
	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, got, a.dst, N_DST * stride);
	for (size_t row = 0; row < N_DST; row++) {
		reference(x + (size_t)index[row] * WIDTH, WIDTH, want);
		expect_bytes(got + row * stride, want, bytes, "gathered");
		memset(want, 0xab, GAP);
		expect_bytes(got + row * stride + bytes, want, GAP, "between rows");
	}
}

static void check_scatter(struct rig *r, uint32_t width, int32_t accumulate)
{
	static const int32_t index[N_SRC] = { 7, 0, 8, 3, 2, 5 };
	static uint8_t rows[N_SRC * MAX_ROW_BYTES];
	static float y[N_DST * MAX_WIDTH], want[N_DST * MAX_WIDTH];
	size_t bytes = afd__row_bytes(width, FP8);

	rig_fill(r, y, N_DST * width, 1);
	for (size_t row = 0; row < N_SRC; row++)
		reference(y + row * width, width, rows + row * bytes);
	rig_fill(r, y, N_DST * width, 1);
	memcpy(want, y, sizeof(want));
	for (size_t i = 0; i < N_SRC * width; i++) {
		float *to = &want[(size_t)index[i / width] * width + i % width],
		      value = value_at(rows + i / width * bytes, width, i % width);

		*to = accumulate ? value + *to : value;
	}
	struct afd__convert_args a = { .src = rig_input(r, rows, N_SRC * bytes),
		.dst = rig_input(r, y, N_DST * width * sizeof(float)),
		.index = rig_input(r, index, sizeof(index)),
		.src_stride = bytes,
		.dst_stride = width * sizeof(float),
		.n_rows = N_SRC,
		.width = width,
		.src_dtype = FP8,
		.dst_dtype = F32,
		.accumulate = accumulate,
		.scatter = 1 };
	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, y, a.dst, N_DST * width * sizeof(float));
	expect_bytes((uint8_t *)y, (uint8_t *)want, N_DST * width * sizeof(float), "scattered");
}

static void rows_of_fp8_are_scattered_and_added(void **state)
{
	for (int i = 0; i < N_WIDTHS; i++) {
		struct rig *r = rig_make(2);

		check_scatter(r, widths[i], 0);
		check_scatter(r, widths[i], 1);
		rig_end(r);
	}
}

/* A slot: 16 bytes are all that is promised of it. */
static void a_slot_in_host_memory_takes_and_gives_rows(void **state)
{
	enum { WIDTH = 130, ROWS = 2 };
	static uint8_t want[ROWS * MAX_ROW_BYTES];
	float x[ROWS * WIDTH], got[ROWS * WIDTH];
	size_t bytes = afd__row_bytes(WIDTH, FP8);
	struct rig *r = *state;
	uint8_t *slot = rig_lend(r, NULL, 16 + ROWS * MAX_ROW_BYTES);

	rig_fill(r, x, ROWS * WIDTH, 1);
	struct afd__convert_args out = { .src = rig_input(r, x, sizeof(x)),
		.dst = slot + 16,
		.src_stride = WIDTH * sizeof(float),
		.dst_stride = bytes,
		.n_rows = ROWS,
		.width = WIDTH,
		.src_dtype = F32,
		.dst_dtype = FP8 };
	struct afd__convert_args in = out;
	in.src = out.dst;
	in.dst = rig_output(r, sizeof(x));
	in.src_stride = out.dst_stride;
	in.dst_stride = out.src_stride;
	in.src_dtype = FP8;
	in.dst_dtype = F32;
	RIG_OK(afd__convert(&r->q, &out));
	RIG_OK(afd__convert(&r->q, &in));
	rig_fetch(r, got, in.dst, sizeof(got));
	for (size_t i = 0; i < ROWS * WIDTH; i++) {
		reference(x + i / WIDTH * WIDTH, WIDTH, want);
		assert_true(got[i] == value_at(want, WIDTH, i % WIDTH));
		expect_bytes(slot + 16 + i / WIDTH * bytes, want, bytes, "slot");
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rows_have_the_bytes_of_the_definition),
		cmocka_unit_test(rows_come_back_as_number_times_scale),
		cmocka_unit_test(a_row_that_crosses_twice_is_the_row_that_crossed_once),
		RIG_TEST(groups_at_the_ends_of_the_range_are_as_defined),
		RIG_TEST(every_number_of_every_scale_is_read),
		RIG_TEST(rows_are_gathered_into_fp8),
		cmocka_unit_test(rows_of_fp8_are_scattered_and_added),
		RIG_TEST(a_slot_in_host_memory_takes_and_gives_rows),
	};

	return RIG_RUN(tests);
}
