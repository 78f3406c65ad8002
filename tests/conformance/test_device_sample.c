/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sampling against a reference in double: what stands where in the order of candidates, and where
 * the draw falls. Where it falls within 1e-8 of an edge, the neighbour is right, too.
 */
#include "rig.h"

#include "../../kernels/draw.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { N_ROWS = 6, MAX_WIDTH = 5000 };

static const struct afd__sample_row kinds[] = {
	{ 1, 0, 1, 0, 0, 0 },
	{ 2, 7, 0.7f, 1, 0, 0 },
	{ 3, 1000, 1.5f, 0, 1, 0 },
	{ 4, 5, 1, 0.9f, 0, 0 },
	{ 5, 6, 2, 0.3f, 40, 0 },
	{ 6, 123456789012345u, 0.5f, 0, 5, 0 },
	{ 7, 8, 0, 0.5f, 3, 0 },
	{ 8, 9, 5, 0, 37, 0 },
};
#define N_KINDS (sizeof(kinds) / sizeof(kinds[0]))

static const float *sorted;

static int compare_ids(const void *a, const void *b)
{
	int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;

	if (sorted[i] != sorted[j])
		return sorted[i] > sorted[j] ? -1 : 1;
	return i < j ? -1 : 1;
}

/* order: ids, the best first. top_p and the draw moved by these parts of one. */
static int32_t reference(const float *x, const int32_t *order, uint32_t width,
	const struct afd__sample_row *p, double move_p, double move)
{
	uint32_t n = p->top_k && p->top_k < width ? p->top_k : width, i;
	double sum = 0, through = 0, target;

	if (p->temperature == 0)
		return order[0];
	for (i = 0; i < n; i++)
		sum += exp(((double)x[order[i]] - x[order[0]]) / p->temperature);
	if (p->top_p > 0 && p->top_p < 1) {
		target = ((double)p->top_p + move_p) * sum;
		for (sum = 0, i = 0; i < n && sum < target; i++)
			sum += exp(((double)x[order[i]] - x[order[0]]) / p->temperature);
		n = i;
	}
	target = (afd__draw_uniform(p->seed, p->position) + move) * sum;
	for (i = 0; i + 1 < n; i++) {
		through += exp(((double)x[order[i]] - x[order[0]]) / p->temperature);
		if (through > target)
			break;
	}
	return order[i];
}

static void check(const float *x, uint32_t width, const struct afd__sample_row *p, int32_t got)
{
	static int32_t order[MAX_WIDTH];
	bool right = false;

	for (uint32_t i = 0; i < width; i++)
		order[i] = (int32_t)i;
	sorted = x;
	qsort(order, width, sizeof(*order), compare_ids);
	for (int i = 0; i < 9; i++)
		right |= got == reference(x, order, width, p, (i / 3 - 1) * 1e-8, (i % 3 - 1) * 1e-8);
	if (!right)
		fail_msg("width %u, seed %llu: got %d, want %d", width, (unsigned long long)p->seed,
			got, reference(x, order, width, p, 0, 0));
}

/* Logits in steps of `step`, so that some are equal; 0: as they come. */
static void run(uint32_t width, float scale, float step)
{
	static float x[N_ROWS * MAX_WIDTH];
	struct afd__sample_row rows[N_ROWS];
	int32_t got[N_ROWS];

	for (size_t first = 0; first < N_KINDS * 2; first += N_ROWS) {
		struct rig *r = rig_make(2);

		r->random += first;
		rig_fill(r, x, (size_t)N_ROWS * width, scale);
		for (uint32_t i = 0; step > 0 && i < N_ROWS * width; i++)
			x[i] = rintf(x[i] / step) * step;
		for (size_t i = 0; i < N_ROWS; i++) {
			rows[i] = kinds[(first + i) % N_KINDS];
			rows[i].position += first;
		}
		struct afd__sample_args a = {
			.logits = rig_input(r, x, (size_t)N_ROWS * width * 4),
			.rows = rig_input(r, rows, sizeof(rows)),
			.ids = rig_output(r, sizeof(got)),
			.n_rows = N_ROWS,
			.width = width,
		};
		RIG_OK(afd__sample(&r->q, &a));
		rig_fetch(r, got, a.ids, sizeof(got));
		for (size_t i = 0; i < N_ROWS; i++)
			check(x + i * width, width, &rows[i], got[i]);
		rig_end(r);
	}
}

static void draws_agree_with_double(void **state)
{
	const uint32_t widths[] = { 1, 2, 33, 300, MAX_WIDTH };

	for (size_t i = 0; i < 5; i++) {
		run(widths[i], 3, 0);
		run(widths[i], 100, 0);
		run(widths[i], 1e-3f, 0);
	}
}

static void of_equal_logits_the_lower_id_comes_first(void **state)
{
	run(33, 1, 0.5f);
	run(MAX_WIDTH, 2, 0.5f);
	run(300, 1, 100);
}

static void a_logit_that_is_not_finite_is_named(void **state)
{
	struct rig *r = rig_make(2);
	float x[2][40];
	int32_t got[2];

	rig_fill(r, x[0], 80, 1);
	x[0][39] = NAN;
	x[1][3] = -INFINITY;
	x[1][4] = NAN;
	struct afd__sample_args a = { .logits = rig_input(r, x, sizeof(x)),
		.rows = rig_input(r, kinds, 2 * sizeof(kinds[0])),
		.ids = rig_output(r, sizeof(got)),
		.n_rows = 2,
		.width = 40 };
	RIG_OK(afd__sample(&r->q, &a));
	rig_fetch(r, got, a.ids, sizeof(got));
	assert_int_equal(got[0], -40);
	assert_int_equal(got[1], -4);
	rig_end(r);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(draws_agree_with_double),
		cmocka_unit_test(of_equal_logits_the_lower_id_comes_first),
		cmocka_unit_test(a_logit_that_is_not_finite_is_named),
	};

	return RIG_RUN(tests);
}
