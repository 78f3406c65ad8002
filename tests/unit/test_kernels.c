/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CPU kernels without a device: the exponential against double, and the law that a row's bits
 * do not depend on the range that it is computed in, nor on its place among the rows, in every
 * variant that this CPU has.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define AFD_K_LANES   4
#define AFD_K_VARIANT c
#include "../../kernels/cpu/vec.h"

/* ---- e^x ---- */

static float exp_of(float x)
{
	return vec_exp(vec_splat(x))[1];
}

/* Distance in units of the last place of the float nearest to the true value. */
static double ulps(float got, double want)
{
	float nearest = (float)want;
	double ulp = nextafterf(fabsf(nearest), INFINITY) - (double)fabsf(nearest);

	return fabs(got - want) / ulp;
}

static void exp_is_within_two_ulp_of_double_everywhere(void **state)
{
	double worst = 0;

	for (float x = -104; x < 88.7f; x += 0.00173f)
		worst = fmax(worst, ulps(exp_of(x), exp(x)));
	for (float x = 1e-30f; x < 1; x *= 1.01f)
		worst = fmax(worst, fmax(ulps(exp_of(x), exp(x)), ulps(exp_of(-x), exp(-x))));
	if (worst > 2)
		fail_msg("worst error %.3f ulp", worst);
}

static void exp_ends_in_infinity_zero_and_nan(void **state)
{
	assert_true(exp_of(88.73f) == INFINITY);
	assert_true(exp_of(INFINITY) == INFINITY);
	assert_true(exp_of(3e38f) == INFINITY);
	assert_true(exp_of(-INFINITY) == 0 && !signbit(exp_of(-INFINITY)));
	assert_true(exp_of(-3e38f) == 0);
	assert_true(exp_of(0) == 1 && exp_of(-0.0f) == 1);
	assert_true(isnan(exp_of(NAN)) && isnan(exp_of(-NAN)));
}

/* ---- ranges ---- */

enum { N_ROWS = 9, WIDTH = 68, N_HEADS = 4, N_KV = 2, HEAD_DIM = 10, PAGE = 4 };

/* What the operations read and write; none reads what another wrote for another row. */
struct world {
	float h[N_ROWS * WIDTH], add[N_ROWS * WIDTH], weight[WIDTH], x[N_ROWS * 2 * WIDTH];
	float qkv[N_ROWS * (N_HEADS + 2 * N_KV) * HEAD_DIM], angles[N_ROWS * HEAD_DIM],
		inv_freq[HEAD_DIM / 2];
	float normed[N_ROWS * WIDTH], out[N_ROWS * WIDTH], embedded[N_ROWS * 4],
		attended[N_ROWS * N_HEADS * HEAD_DIM];
	uint16_t halves[N_ROWS * WIDTH], cache[4 * 2 * N_KV * PAGE * HEAD_DIM];
	int32_t ids[N_ROWS], slots[N_ROWS], sequences[N_ROWS], pages[4], largest[N_ROWS];
};

static struct world *world_make(void)
{
	struct world *w = calloc(1, sizeof(*w));
	float *floats = w->h;

	assert_non_null(w);
	srand(1);
	for (size_t i = 0; i < offsetof(struct world, normed) / 4; i++)
		floats[i] = (float)(rand() % 2001 - 1000) / 300;
	for (int i = 0; i < N_ROWS; i++)
		w->ids[i] = w->slots[i] = i + 3;
	for (int i = 0; i < 4; i++)
		w->pages[i] = i;
	return w;
}

/* Runs every operation on rows row0 .. row1-1, in the order of a stage. */
static void run_rows(const struct afd_cpu_kernels *k, struct world *w, uint32_t row0, uint32_t row1)
{
	struct afd__kv_view kv = { .data = w->cache,
		.page_stride = sizeof(w->cache) / 4,
		.v_offset = sizeof(w->cache) / 8,
		.head_stride = PAGE * HEAD_DIM * 2,
		.position_stride = HEAD_DIM * 2,
		.page_size = PAGE,
		.n_kv_heads = N_KV,
		.head_dim = HEAD_DIM,
		.dtype = AFD_DTYPE_BF16 };
	struct afd__matrix table = { .data = w->weight,
		.n = 17,
		.k = 4,
		.dtype = AFD_DTYPE_F32,
		.layout = AFD__LAYOUT_IN_PLACE };

	k->norm(&(struct afd__norm_args){ w->h, w->add, w->weight, w->normed, N_ROWS, WIDTH,
			1e-6f },
		row0, row1);
	k->activation(&(struct afd__activation_args){ w->x, w->out, N_ROWS, WIDTH }, row0, row1);
	k->convert(&(struct afd__convert_args){ w->out, w->halves, NULL, WIDTH * 4, WIDTH * 2,
			   N_ROWS, WIDTH, AFD_DTYPE_F32, AFD_DTYPE_BF16, 0 },
		row0, row1);
	k->argmax(&(struct afd__argmax_args){ w->out, w->largest, N_ROWS, WIDTH }, row0, row1);
	k->angles(&(struct afd__angles_args){ w->ids, w->inv_freq, w->angles, N_ROWS, HEAD_DIM, 1 },
		row0, row1);
	k->rope(&(struct afd__rope_args){ w->qkv, w->weight, w->weight, w->angles, w->slots, kv,
			N_ROWS, N_HEADS, 1e-6f },
		row0, row1);
	k->embed(&(struct afd__embed_args){ table, w->ids, w->embedded, N_ROWS, 2 }, row0, row1);
}

static void attend_tasks(
	const struct afd_cpu_kernels *k, struct world *w, uint32_t task0, uint32_t task1)
{
	struct afd__kv_view kv = { .data = w->cache,
		.page_stride = sizeof(w->cache) / 4,
		.v_offset = sizeof(w->cache) / 8,
		.head_stride = PAGE * HEAD_DIM * 2,
		.position_stride = HEAD_DIM * 2,
		.page_size = PAGE,
		.n_kv_heads = N_KV,
		.head_dim = HEAD_DIM,
		.dtype = AFD_DTYPE_BF16 };

	k->attend(&(struct afd__attend_args){ w->qkv, w->ids, w->sequences, w->pages, w->attended,
			  kv, N_ROWS, N_HEADS, 4, 5, 0.3f },
		task0, task1);
}

static void the_range_of_a_call_does_not_show_in_any_variant(void **state)
{
	for (int isa = AFD__ISA_C; isa <= afd__isa_choose(); isa++) {
		const struct afd_cpu_kernels *k = afd__cpu_kernels(isa);
		struct world *whole = world_make(), *cut = world_make();

		assert_string_equal(k->name, afd__isa_name(isa));
		run_rows(k, whole, 0, N_ROWS);
		attend_tasks(k, whole, 0, N_ROWS * N_KV);
		run_rows(k, cut, 5, N_ROWS);
		run_rows(k, cut, 0, 1);
		run_rows(k, cut, 1, 5);
		run_rows(k, cut, 5, 5);
		for (uint32_t task = N_ROWS * N_KV; task > 0; task--)
			attend_tasks(k, cut, task - 1, task);
		assert_memory_equal(whole, cut, sizeof(*whole));
		free(whole);
		free(cut);
	}
}

static void equal_rows_have_equal_bits_wherever_they_stand(void **state)
{
	for (int isa = AFD__ISA_C; isa <= afd__isa_choose(); isa++) {
		struct world *w = world_make();

		for (int row = 1; row < N_ROWS; row++) {
			memcpy(w->h + row * WIDTH, w->h, WIDTH * 4);
			memcpy(w->add + row * WIDTH, w->add, WIDTH * 4);
			memcpy(w->x + row * 2 * WIDTH, w->x, 2 * WIDTH * 4);
			memcpy(w->qkv + row * (N_HEADS + 2 * N_KV) * HEAD_DIM, w->qkv,
				(N_HEADS + 2 * N_KV) * HEAD_DIM * 4);
			w->ids[row] = w->ids[0];
		}
		run_rows(afd__cpu_kernels(isa), w, 0, N_ROWS);
		for (int row = 1; row < N_ROWS; row++) {
			assert_memory_equal(w->angles + row * HEAD_DIM, w->angles, HEAD_DIM * 4);
			assert_memory_equal(w->qkv + row * (N_HEADS + 2 * N_KV) * HEAD_DIM, w->qkv,
				(N_HEADS + 2 * N_KV) * HEAD_DIM * 4);
			assert_memory_equal(w->normed + row * WIDTH, w->normed, WIDTH * 4);
			assert_memory_equal(w->out + row * WIDTH, w->out, WIDTH * 4);
			assert_memory_equal(w->embedded + row * 4, w->embedded, 4 * 4);
			assert_memory_equal(w->halves + row * WIDTH, w->halves, WIDTH * 2);
			assert_int_equal(w->largest[row], w->largest[0]);
		}
		free(w);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(exp_is_within_two_ulp_of_double_everywhere),
		cmocka_unit_test(exp_ends_in_infinity_zero_and_nan),
		cmocka_unit_test(the_range_of_a_call_does_not_show_in_any_variant),
		cmocka_unit_test(equal_rows_have_equal_bits_wherever_they_stand),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
