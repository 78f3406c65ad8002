/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Conversion is where rows cross the wire, so it is exact: every bf16 and f16 pattern, and float32
 * numbers around every tie, against rounding by definition (rig_encode). Then strides, the gather,
 * the scatter and the accumulation.
 */
#include "rig.h"

#include <math.h>
#include <string.h>

#define N_HALF 65536

static bool is_nan_half(uint16_t h, int32_t dtype)
{
	uint16_t infinity = dtype == AFD_DTYPE_BF16 ? 0x7f80 : 0x7c00;

	return (h & 0x7fff) > infinity;
}

static void convert_all(
	struct rig *r, const void *src, int32_t src_dtype, void *dst, int32_t dst_dtype, uint32_t n)
{
	struct afd__convert_args a = { .src = rig_input(r, src, n * rig_bytes(src_dtype)),
		.src_dtype = src_dtype,
		.dst = rig_output(r, n * rig_bytes(dst_dtype)),
		.dst_dtype = dst_dtype,
		.n_rows = 1,
		.width = n };

	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, dst, a.dst, n * rig_bytes(dst_dtype));
}

static void every_half_becomes_its_float_and_comes_back(void **state)
{
	static uint16_t halves[N_HALF], back[N_HALF];
	static float floats[N_HALF];

	for (int i = 0; i < N_HALF; i++)
		halves[i] = (uint16_t)i;
	for (int32_t dtype = AFD_DTYPE_BF16; dtype <= AFD_DTYPE_F16; dtype++) {
		convert_all(*state, halves, dtype, floats, AFD_DTYPE_F32, N_HALF);
		convert_all(*state, floats, AFD_DTYPE_F32, back, dtype, N_HALF);
		for (size_t i = 0; i < N_HALF; i++) {
			double want = rig_decode(halves, i, dtype);

			if (is_nan_half(halves[i], dtype)) {
				assert_true(isnan(floats[i]));
				assert_true(is_nan_half(back[i], dtype));
				continue;
			}
			assert_true(floats[i] == want && !signbit(floats[i]) == !signbit(want));
			assert_int_equal(back[i], halves[i]);
		}
	}
}

/* Between each half and the next: a little above it, just below, at and just above the tie. */
static void floats_round_to_the_nearest_half_ties_to_even(void **state)
{
	static float x[4 * 32768];
	static uint16_t got[4 * 32768], want[1];

	for (int32_t dtype = AFD_DTYPE_BF16; dtype <= AFD_DTYPE_F16; dtype++) {
		uint32_t n_finite = dtype == AFD_DTYPE_BF16 ? 0x7f80 : 0x7c00,
			 n = 4 * (n_finite - 1);

		for (uint32_t h = 0; h < n_finite - 1; h++) {
			uint16_t pair[2] = { (uint16_t)h, (uint16_t)(h + 1) };
			float low = (float)rig_decode(pair, 0, dtype),
			      high = (float)rig_decode(pair, 1, dtype);
			float tie = (float)(((double)low + high) / 2), sign = h % 3 ? 1 : -1;

			x[4 * h] = sign * nextafterf(low, INFINITY);
			x[4 * h + 1] = sign * nextafterf(tie, 0);
			x[4 * h + 2] = sign * tie;
			x[4 * h + 3] = sign * nextafterf(tie, INFINITY);
		}
		convert_all(*state, x, AFD_DTYPE_F32, got, dtype, n);
		for (size_t i = 0; i < n; i++) {
			rig_encode(want, 0, dtype, x[i]);
			if (got[i] != want[0])
				fail_msg("%s of %a: got %04x, want %04x", afd_dtype_name(dtype),
					x[i], got[i], want[0]);
		}
	}
}

static void numbers_at_the_end_of_the_range_become_infinity_or_stay(void **state)
{
	const float x[] = { 65504, 65519.996f, 65520, -65520, 1e30f, INFINITY, -INFINITY, 0, -0.0f,
		1e-45f, 2.9802322e-8f, 2.9802326e-8f };
	const uint16_t want_f16[] = { 0x7bff, 0x7bff, 0x7c00, 0xfc00, 0x7c00, 0x7c00, 0xfc00, 0,
		0x8000, 0, 0, 1 };
	const float y[] = { 3.3895314e38f, 3.3961775e38f, 3.3961776e38f, -3.4e38f, NAN };
	uint16_t got[12];

	convert_all(*state, x, AFD_DTYPE_F32, got, AFD_DTYPE_F16, 12);
	assert_memory_equal(got, want_f16, sizeof(want_f16));
	convert_all(*state, y, AFD_DTYPE_F32, got, AFD_DTYPE_BF16, 5);
	for (size_t i = 0; i < 4; i++) {
		uint16_t want;

		rig_encode(&want, 0, AFD_DTYPE_BF16, y[i]);
		assert_int_equal(got[i], want);
	}
	assert_true(is_nan_half(got[4], AFD_DTYPE_BF16));
}

static void nan_of_any_payload_stays_nan(void **state)
{
	uint32_t bits[5] = { 0x7f800001, 0x7fffffff, 0xff800001, 0xffc00000, 0x7f80ffff };
	uint16_t got[5];

	for (int32_t dtype = AFD_DTYPE_BF16; dtype <= AFD_DTYPE_F16; dtype++) {
		convert_all(*state, bits, AFD_DTYPE_F32, got, dtype, 5);
		for (int i = 0; i < 5; i++)
			assert_true(is_nan_half(got[i], dtype));
	}
}

/* Rows with gaps on both sides, gathered in an odd order, some twice; the gaps of dst keep their
 * poison. */
static void check_gather(
	struct rig *r, int32_t src_dtype, int32_t dst_dtype, uint32_t width, int32_t accumulate)
{
	enum { N_SRC = 6, N = 9, STRIDE = 64 };
	static char src[N_SRC * STRIDE * 4], dst[N * STRIDE * 4], want[N * STRIDE * 4];
	int32_t index[N] = { 5, 0, 0, 3, 1, 5, 2, 4, 4 };
	size_t s = rig_bytes(src_dtype), d = rig_bytes(dst_dtype);

	memset(dst, 0xff, sizeof(dst));
	for (size_t i = 0; i < N_SRC * STRIDE; i++)
		rig_encode(src, i, src_dtype, rig_random(r, 1));
	for (size_t i = 0; accumulate && i < N * STRIDE; i++)
		rig_encode(dst, i, dst_dtype, rig_random(r, 1));
	memcpy(want, dst, sizeof(dst));
	for (size_t row = 0; row < N; row++) {
		for (size_t i = 0; i < width; i++) {
			double x = rig_decode(src, (size_t)index[row] * STRIDE + i, src_dtype);

			if (accumulate)
				x = (float)rig_decode(dst, row * STRIDE + i, dst_dtype) + (float)x;
			rig_encode(want, row * STRIDE + i, dst_dtype, x);
		}
	}
	struct afd__convert_args a = { .src = rig_input(r, src, N_SRC * STRIDE * s),
		.dst = rig_input(r, dst, N * STRIDE * d),
		.index = rig_input(r, index, sizeof(index)),
		.src_stride = STRIDE * s,
		.dst_stride = STRIDE * d,
		.n_rows = N,
		.width = width,
		.src_dtype = src_dtype,
		.dst_dtype = dst_dtype,
		.accumulate = accumulate };
	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, dst, a.dst, N * STRIDE * d);
	assert_memory_equal(dst, want, N * STRIDE * d);
}

static void rows_are_gathered_converted_and_added_with_strides(void **state)
{
	const int32_t pairs[][2] = { { AFD_DTYPE_F32, AFD_DTYPE_F32 },
		{ AFD_DTYPE_F32, AFD_DTYPE_BF16 }, { AFD_DTYPE_F32, AFD_DTYPE_F16 },
		{ AFD_DTYPE_BF16, AFD_DTYPE_F32 }, { AFD_DTYPE_F16, AFD_DTYPE_F32 },
		{ AFD_DTYPE_BF16, AFD_DTYPE_BF16 }, { AFD_DTYPE_F16, AFD_DTYPE_F16 } };
	const uint32_t widths[] = { 1, 15, 32, 47 };

	for (size_t w = 0; w < 4; w++) {
		for (size_t p = 0; p < 7; p++) {
			struct rig *r = rig_make(2);

			check_gather(r, pairs[p][0], pairs[p][1], widths[w], 0);
			if (pairs[p][1] == AFD_DTYPE_F32)
				check_gather(r, pairs[p][0], pairs[p][1], widths[w], 1);
			rig_end(r);
		}
	}
}

/* Rows of src, packed, go to rows of dst in an odd order; what is between them stays. */
static void check_scatter(struct rig *r, int32_t src_dtype, uint32_t width, int32_t accumulate)
{
	enum { N = 5, N_DST = 9, STRIDE = 64 };
	static char src[N * STRIDE * 4];
	static float dst[N_DST * STRIDE], want[N_DST * STRIDE];
	int32_t index[N] = { 7, 0, 8, 3, 2 };
	size_t s = rig_bytes(src_dtype);

	for (size_t i = 0; i < N * width; i++)
		rig_encode(src, i, src_dtype, rig_random(r, 1));
	rig_fill(r, dst, N_DST * STRIDE, 1);
	memcpy(want, dst, sizeof(dst));
	for (size_t row = 0; row < N; row++) {
		for (size_t i = 0; i < width; i++) {
			float *to = &want[(size_t)index[row] * STRIDE + i];

			*to = (accumulate ? *to : 0) + (float)rig_decode(src, row * width + i, src_dtype);
		}
	}
	struct afd__convert_args a = { .src = rig_input(r, src, N * width * s),
		.dst = rig_input(r, dst, sizeof(dst)),
		.index = rig_input(r, index, sizeof(index)),
		.src_stride = width * s,
		.dst_stride = STRIDE * sizeof(float),
		.n_rows = N,
		.width = width,
		.src_dtype = src_dtype,
		.dst_dtype = AFD_DTYPE_F32,
		.accumulate = accumulate,
		.scatter = 1 };
	RIG_OK(afd__convert(&r->q, &a));
	rig_fetch(r, dst, a.dst, sizeof(dst));
	assert_memory_equal(dst, want, sizeof(dst));
}

static void rows_are_scattered_and_added_where_the_index_says(void **state)
{
	const int32_t dtypes[] = { AFD_DTYPE_F32, AFD_DTYPE_BF16, AFD_DTYPE_F16 };
	const uint32_t widths[] = { 2, 16, 46 };

	for (size_t w = 0; w < 3; w++) {
		for (size_t d = 0; d < 3; d++) {
			struct rig *r = rig_make(2);

			check_scatter(r, dtypes[d], widths[w], 0);
			check_scatter(r, dtypes[d], widths[w], 1);
			rig_end(r);
		}
	}
}

static void a_slot_in_host_memory_takes_and_gives_rows(void **state)
{
	struct rig *r = *state;
	float x[24], got[24];
	uint16_t *slot = rig_lend(r, NULL, 24 * sizeof(*slot));
	float *dev, *back;

	rig_fill(r, x, 24, 1);
	dev = rig_input(r, x, sizeof(x));
	back = rig_output(r, sizeof(x));
	struct afd__convert_args out = { .src = dev,
		.dst = slot,
		.src_stride = 48,
		.dst_stride = 24,
		.n_rows = 2,
		.width = 12,
		.src_dtype = AFD_DTYPE_F32,
		.dst_dtype = AFD_DTYPE_BF16 };
	struct afd__convert_args in = { .src = slot,
		.dst = back,
		.src_stride = 24,
		.dst_stride = 48,
		.n_rows = 2,
		.width = 12,
		.src_dtype = AFD_DTYPE_BF16,
		.dst_dtype = AFD_DTYPE_F32 };
	RIG_OK(afd__convert(&r->q, &out));
	RIG_OK(afd__convert(&r->q, &in));
	rig_fetch(r, got, back, sizeof(got));
	for (size_t i = 0; i < 24; i++) {
		uint16_t want;

		rig_encode(&want, 0, AFD_DTYPE_BF16, x[i]);
		assert_int_equal(slot[i], want);
		assert_true(got[i] == rig_decode(slot, i, AFD_DTYPE_BF16));
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(every_half_becomes_its_float_and_comes_back),
		RIG_TEST(floats_round_to_the_nearest_half_ties_to_even),
		RIG_TEST(numbers_at_the_end_of_the_range_become_infinity_or_stay),
		RIG_TEST(nan_of_any_payload_stays_nan),
		cmocka_unit_test(rows_are_gathered_converted_and_added_with_strides),
		cmocka_unit_test(rows_are_scattered_and_added_where_the_index_says),
		RIG_TEST(a_slot_in_host_memory_takes_and_gives_rows),
	};

	return RIG_RUN(tests);
}
