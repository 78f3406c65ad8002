/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Split equals whole: attention and FFN with a transport between them give the bits of one process,
 * for every transport, wire dtype and number of lanes, and when frames cross in several parts.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../support/batches.h"

static const char *const CASES[] = { "bf16-tied", "odd-f32", "mixed-dtypes" };
static const struct {
	int32_t x, y; /* on the wire */
} DTYPES[] = { { AFD_DTYPE_F32, 0 }, { AFD_DTYPE_BF16, 0 }, { AFD_DTYPE_F16, 0 },
	{ AFD_DTYPE_FP8, AFD_DTYPE_BF16 }, { AFD_DTYPE_BF16, AFD_DTYPE_FP8 }, { AFD_DTYPE_FP8, 0 } };
enum { N_CASES = 3, N_DTYPES = 6, MAX_OUTPUTS = 64 };

static void expect_split_is_whole(const struct golden *golden, struct rig_params split)
{
	struct rig_params whole = split;
	size_t n = (size_t)BATCHES_ROWS * golden->vocab;
	float *a, *b;

	whole.address = NULL;
	whole.lanes = 1;
	a = batches_run(golden, &whole, true);
	b = batches_run(golden, &split, true);
	if (memcmp(a, b, n * sizeof(*a)))
		fail_msg("%s, %u lanes, %s:%s: other bits than in one process", split.address,
			split.lanes, afd_dtype_name(split.wire_dtype),
			afd_dtype_name(split.y_dtype ? split.y_dtype : split.wire_dtype));
	free(a);
	free(b);
}

static void compare_all(const char *address, uint32_t max_part_rows)
{
	uint32_t c, d, lanes;

	for (c = 0; c < N_CASES; c++) {
		struct golden golden;

		golden_open(&golden, CASES[c]);
		for (d = 0; d < N_DTYPES; d++) {
			for (lanes = 1; lanes <= AFD_MAX_LANES; lanes++) {
				const struct rig_params params = { .address = address,
					.lanes = lanes,
					.wire_dtype = DTYPES[d].x,
					.y_dtype = DTYPES[d].y,
					.max_part_rows = max_part_rows,
					.attn.max_outputs = MAX_OUTPUTS };

				expect_split_is_whole(&golden, params);
			}
		}
		golden_close(&golden);
	}
}

static void loop_gives_the_bits_of_one_process(void **state)
{
	compare_all("loop:split", 0);
}

/* Tests of several build folders may run at once. */
static const char *shm_address(void)
{
	static char address[40];

	snprintf(address, sizeof(address), "shm:split-%d", (int)getpid());
	return address;
}

static void shm_gives_the_bits_of_one_process(void **state)
{
	compare_all(shm_address(), 0);
}

static void frames_in_several_parts_give_the_same_bits(void **state)
{
	compare_all("loop:parts", 2);
	compare_all(shm_address(), 3);
}

/* What rounding on the wire does must show, or the comparisons above would compare nothing. */
static void wire_dtypes_differ_in_bits(void **state)
{
	static const double limits[N_DTYPES] = { 1e-30, 1e-3, 1e-5, 3e-2, 3e-2, 3e-2 };
	struct rig_params params = { .attn.max_outputs = MAX_OUTPUTS };
	float *logits[N_DTYPES];
	struct golden golden;
	size_t n;
	int d, e;

	golden_open(&golden, "odd-f32");
	n = (size_t)BATCHES_ROWS * golden.vocab;
	for (d = 0; d < N_DTYPES; d++) {
		params.wire_dtype = DTYPES[d].x;
		params.y_dtype = DTYPES[d].y;
		logits[d] = batches_run(&golden, &params, true);
		for (e = 0; e < d; e++)
			assert_true(memcmp(logits[d], logits[e], n * sizeof(float)));
		assert_true(nmse(logits[d], logits[0], n) < limits[d]);
	}
	for (d = 0; d < N_DTYPES; d++)
		free(logits[d]);
	golden_close(&golden);
}

static void a_prompt_over_the_wire_agrees_with_transformers(void **state)
{
	const struct rig_params params = {
		.address = "loop:golden", .lanes = 2, .max_part_rows = 7, .attn.max_outputs = 2048
	};
	struct golden golden;
	float *logits;

	golden_open(&golden, "long-prompt");
	logits = rig_run(&golden, &params, 0);
	assert_true(
		nmse(logits, golden.logits, (uint64_t)golden.n_positions * golden.vocab) <= 1e-9);
	free(logits);
	golden_close(&golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(loop_gives_the_bits_of_one_process),
		cmocka_unit_test(shm_gives_the_bits_of_one_process),
		cmocka_unit_test(frames_in_several_parts_give_the_same_bits),
		cmocka_unit_test(wire_dtypes_differ_in_bits),
		cmocka_unit_test(a_prompt_over_the_wire_agrees_with_transformers),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
