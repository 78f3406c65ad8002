/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Routed experts against a reference in double: every dtype, packed and in place, shards of experts
 * and of width, slots that do not count. The law of rows: the bits of a row depend on nothing but
 * the row, its slots and the weights. And an expert that no row needs is not read.
 */
#include "rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_ROWS = 70, MAX_TOP = 8, MAX_WEIGHTS = 1 << 20, MAX_HIDDEN = 160, MAX_WIDTH = 260 };

struct experts_case {
	const char *name;
	uint32_t n_experts, top_k, hidden, width;
	int32_t dtype;
	uint32_t first, n_held; /* experts of this shard; n_held 0: all */
	uint32_t width_offset;  /* of this shard in the expert's width, for scales and groups */
	bool quantize, accumulate;
};

static const struct experts_case cases[] = {
	{ "f32", 8, 2, 64, 48, AFD_DTYPE_F32, 0, 0, 0, false, false },
	{ "bf16, accumulated", 16, 4, 96, 40, AFD_DTYPE_BF16, 0, 0, 0, false, true },
	{ "f16, odd sizes", 5, 3, 45, 31, AFD_DTYPE_F16, 0, 0, 0, false, false },
	{ "one of one", 1, 1, 32, 16, AFD_DTYPE_BF16, 0, 0, 0, false, false },
	{ "all of eight", 8, 8, 32, 33, AFD_DTYPE_BF16, 0, 0, 0, false, false },
	{ "second half of the experts", 16, 4, 64, 48, AFD_DTYPE_BF16, 8, 8, 0, false, true },
	{ "fp8", 6, 2, 160, 256, AFD_DTYPE_FP8, 0, 0, 0, false, false },
	{ "fp8, short blocks", 6, 2, 150, 130, AFD_DTYPE_FP8, 0, 0, 0, false, false },
	{ "fp8, a shard of width between blocks", 6, 2, 64, 100, AFD_DTYPE_FP8, 2, 3, 92, false,
		false },
	{ "fp8, quantised", 6, 2, 160, 192, AFD_DTYPE_FP8, 0, 0, 192, true, false },
	{ "bf16, quantised", 4, 2, 130, 70, AFD_DTYPE_BF16, 0, 0, 0, true, true },
};
#define N_CASES (sizeof(cases) / sizeof(cases[0]))

struct how {
	uint32_t row0, n_rows, n_threads, chunk_rows; /* chunk_rows 0: scratch for all */
	bool in_place, in_x;                           /* in_x: y is x */
};
static const struct how usual = { .n_rows = MAX_ROWS, .n_threads = 2 };

struct experts_data {
	const struct experts_case *c;
	uint32_t n_held, gate_up_bytes, down_bytes; /* of one expert */
	float x[MAX_ROWS * MAX_HIDDEN], y[MAX_ROWS * MAX_HIDDEN];
	int32_t ids[MAX_ROWS * MAX_TOP];
	float weights[MAX_ROWS * MAX_TOP];
	_Alignas(4) char gate_up[MAX_WEIGHTS]; /* [n_held][2 * width][hidden] */
	_Alignas(4) char down[MAX_WEIGHTS];    /* [n_held][hidden][width] */
	float scales[3][16][16];               /* gate, up, down; the same for all experts + 0.01 e */
};

static float scale_of(const struct experts_data *t, int which, uint32_t e, uint32_t n, uint32_t k)
{
	if (t->c->dtype != AFD_DTYPE_FP8)
		return 1;
	return t->scales[which][n / 128][k / 128] * (1 + 0.25f * (float)e);
}

static void make(struct experts_data *t, const struct experts_case *c, float scale)
{
	struct rig source = { .random = 1234 };
	float weight = c->dtype == AFD_DTYPE_FP8 ? 20 : 0.1f;

	memset(t, 0, sizeof(*t));
	t->c = c;
	t->n_held = c->n_held ? c->n_held : c->n_experts;
	t->gate_up_bytes = 2 * c->width * c->hidden * (uint32_t)rig_bytes(c->dtype);
	t->down_bytes = c->width * c->hidden * (uint32_t)rig_bytes(c->dtype);
	assert_true(t->n_held * t->gate_up_bytes <= MAX_WEIGHTS);
	rig_fill(&source, t->x, MAX_ROWS * c->hidden, scale);
	rig_fill(&source, t->y, MAX_ROWS * c->hidden, scale);
	for (uint32_t i = 0; i < t->n_held * 2 * c->width * c->hidden; i++)
		rig_encode(t->gate_up, i, c->dtype, rig_random(&source, weight));
	for (uint32_t i = 0; i < t->n_held * c->width * c->hidden; i++)
		rig_encode(t->down, i, c->dtype, rig_random(&source, weight));
	for (uint32_t i = 0; i < 3 * 16 * 16; i++)
		t->scales[i / 256][i / 16 % 16][i % 16] = 0.002f + fabsf(rig_random(&source, 0.003f));
	for (uint32_t i = 0; i < MAX_ROWS * c->top_k; i++) {
		uint32_t slot = i % c->top_k, id;
		bool fresh;

		/* Few rows use the last experts, some slots are none; all ids of a row differ. */
		do {
			id = rig_below(&source, c->n_experts);
			fresh = true;
			for (uint32_t j = i - slot; j < i; j++)
				fresh &= t->ids[j] != (int32_t)id;
		} while (!fresh);
		t->ids[i] = rig_below(&source, 9) ? (int32_t)id : (int32_t)id - 4096;
		t->weights[i] = rig_random(&source, 0.5f);
	}
}

static void load_scales(struct rig *r, const struct experts_data *t, struct afd__matrix *m,
	uint32_t e, int which, uint32_t row0, uint32_t n_rows)
{
	float expert[16][16];
	bool down = which == 2;
	struct afd__scale_blocks blocks = { .data = expert,
		.n_rows = 16,
		.n_columns = 16,
		.dtype = AFD_DTYPE_F32,
		.row_offset = down ? 0 : t->c->width_offset,
		.column_offset = down ? t->c->width_offset : 0 };

	for (uint32_t i = 0; i < 16 * 16; i++)
		expert[i / 16][i % 16] = t->scales[which][i / 16][i % 16] * (1 + 0.25f * (float)e);
	RIG_OK(afd__matrix_load_scales(r->dev, m, &blocks, row0, n_rows));
}

static void load(struct rig *r, const struct experts_data *t, bool in_place,
	struct afd__matrix *gate_up, struct afd__matrix *down)
{
	const struct experts_case *c = t->c;
	struct afd__matrix_shape shape = { .n = 2 * c->width,
		.k = c->hidden,
		.n_stack = t->n_held,
		.dtype = c->dtype,
		.mixed_panels = c->width % 32 || c->width_offset % 32 };

	RIG_OK(afd__matrix_create_stack(r->dev, gate_up, &shape,
		in_place ? rig_lend(r, t->gate_up, t->n_held * t->gate_up_bytes) : NULL));
	shape.n = c->hidden;
	shape.k = c->width;
	shape.column_offset = c->width_offset;
	shape.mixed_panels = 0;
	RIG_OK(afd__matrix_create_stack(r->dev, down, &shape,
		in_place ? rig_lend(r, t->down, t->n_held * t->down_bytes) : NULL));
	for (uint32_t e = 0; e < t->n_held; e++) {
		struct afd__matrix one = afd__matrix_at(gate_up, e), two = afd__matrix_at(down, e);

		if (!in_place) {
			RIG_OK(afd__matrix_load(r->dev, &one, t->gate_up + e * t->gate_up_bytes, 0,
				2 * c->width));
			RIG_OK(afd__matrix_load(
				r->dev, &two, t->down + e * t->down_bytes, 0, c->hidden));
		}
		if (c->dtype == AFD_DTYPE_FP8) {
			load_scales(r, t, &one, e, 0, 0, c->width);
			load_scales(r, t, &one, e, 1, c->width, c->width);
			load_scales(r, t, &two, e, 2, 0, c->hidden);
		}
	}
}

/* y: [how->n_rows][hidden] */
static void run(const struct experts_data *t, const struct how *how, float *y)
{
	const struct experts_case *c = t->c;
	size_t row_bytes = c->hidden * 4, slots = how->row0 * c->top_k;
	struct rig *r = rig_make(how->n_threads);
	struct afd__experts_args a = { .n_rows = how->n_rows,
		.top_k = c->top_k,
		.first_expert = (int32_t)c->first,
		.accumulate = c->accumulate,
		.quantize = c->quantize,
		.width_offset = c->width_offset };

	load(r, t, how->in_place, &a.gate_up, &a.down);
	a.x = rig_input(r, t->x + how->row0 * c->hidden, how->n_rows * row_bytes);
	a.y = how->in_x ? (float *)a.x
			: rig_input(r, t->y + how->row0 * c->hidden, how->n_rows * row_bytes);
	a.ids = rig_input(r, t->ids + slots, how->n_rows * c->top_k * 4);
	a.weights = rig_input(r, t->weights + slots, how->n_rows * c->top_k * 4);
	if (how->chunk_rows)
		a.n_rows = how->chunk_rows;
	a.scratch_bytes = afd__experts_scratch_bytes(r->dev, &a);
	a.n_rows = how->n_rows;
	a.scratch = rig_output(r, a.scratch_bytes);
	if (afd__experts(&r->q, &a))
		fail_msg("%s: %s", c->name, afd_last_error());
	rig_fetch(r, y, a.y, how->n_rows * row_bytes);
	afd__matrix_destroy(r->dev, &a.gate_up);
	afd__matrix_destroy(r->dev, &a.down);
	rig_end(r);
}

/* ---- the reference ---- */

/* Of a part of a row that begins at `offset`; a number near a tie may go either way, so the error
 * that this can make is returned. */
static void quantize(double *x, uint32_t n, uint32_t offset, double *error)
{
	for (uint32_t i = 0, end; i < n; i = end) {
		double largest = 1e-10;

		end = (offset + i) / 128 * 128 + 128 - offset;
		end = end < n ? end : n;
		for (uint32_t j = i; j < end; j++)
			largest = fmax(largest, fabs(x[j]));
		for (uint32_t j = i; j < end; j++) {
			uint8_t low, high;

			rig_encode(&low, 0, AFD_DTYPE_FP8, x[j] / largest * 448 * (1 - 1e-5));
			rig_encode(&high, 0, AFD_DTYPE_FP8, x[j] / largest * 448 * (1 + 1e-5));
			x[j] = rig_decode(&low, 0, AFD_DTYPE_FP8) * largest / 448;
			error[j] = fabs(rig_decode(&high, 0, AFD_DTYPE_FP8) * largest / 448 - x[j]);
		}
	}
}

static double silu(double x)
{
	return x / (1 + exp(-x));
}

/* out[n] = the expert's output; size[n]: how large an error may be, relative to 1. */
static void reference_expert(
	const struct experts_data *t, uint32_t e, const float *x, double *out, double *size)
{
	const struct experts_case *c = t->c;
	double input[MAX_HIDDEN], error[MAX_WIDTH] = { 0 }, activated[MAX_WIDTH];
	double input_error[MAX_HIDDEN] = { 0 }, extra[MAX_WIDTH];
	/* FP8 takes what was quantised as it is. */
	double unit = c->dtype == AFD_DTYPE_FP8 && c->quantize ? 0 : rig_product_unit(c->dtype);

	for (uint32_t k = 0; k < c->hidden; k++)
		input[k] = x[k];
	if (c->quantize)
		quantize(input, c->hidden, 0, input_error);
	for (uint32_t i = 0; i < c->width; i++) {
		double sum[2] = { 0 }, magnitude = 0;

		extra[i] = 0;
		for (uint32_t half = 0; half < 2; half++) {
			for (uint32_t k = 0; k < c->hidden; k++) {
				size_t at = ((size_t)e * 2 + half) * c->width * c->hidden +
					    (size_t)i * c->hidden + k;
				double w = rig_decode(t->gate_up, at, c->dtype) *
					   scale_of(t, (int)half, e, c->width_offset + i, k);

				sum[half] += w * input[k];
				magnitude += fabs(w * input[k]) * (1e-6 + unit);
				extra[i] += fabs(w) * input_error[k];
			}
		}
		activated[i] = silu(sum[0]) * sum[1];
		/* The slope of silu is at most 1.1. */
		extra[i] = (extra[i] + magnitude) * 1.1 * (fabs(sum[0]) + fabs(sum[1]));
	}
	if (c->quantize)
		quantize(activated, c->width, c->width_offset, error);
	for (uint32_t n = 0; n < c->hidden; n++) {
		out[n] = size[n] = 0;
		for (uint32_t k = 0; k < c->width; k++) {
			double w = rig_decode(t->down,
					   ((size_t)e * c->hidden + n) * c->width + k, c->dtype) *
				   scale_of(t, 2, e, n, c->width_offset + k);

			out[n] += w * activated[k];
			/* A larger error before the quantisation is one step of it. */
			size[n] += fabs(w) * ((2e-6 + unit) * fabs(activated[k]) + error[k] +
						     (c->quantize ? 0.15 : 1) * extra[k]);
		}
	}
}

static void reference_row(
	const struct experts_data *t, uint32_t row, double *want, double *allowed)
{
	const struct experts_case *c = t->c;
	double out[MAX_HIDDEN], size[MAX_HIDDEN];

	for (uint32_t n = 0; n < c->hidden; n++) {
		want[n] = c->accumulate ? t->y[row * c->hidden + n] : 0;
		allowed[n] = 3e-6 * fabs(want[n]) + 1e-35;
	}
	for (uint32_t slot = 0; slot < c->top_k; slot++) {
		int32_t id = t->ids[row * c->top_k + slot];
		double weight = t->weights[row * c->top_k + slot];

		if (id < (int32_t)c->first || id >= (int32_t)(c->first + t->n_held))
			continue;
		reference_expert(t, (uint32_t)id - c->first, t->x + row * c->hidden, out, size);
		for (uint32_t n = 0; n < c->hidden; n++) {
			want[n] += weight * out[n];
			allowed[n] += fabs(weight) * size[n] + 3e-6 * fabs(want[n]);
		}
	}
}

static void experts_agree_with_double_in_every_case_and_kind(void **state)
{
	/* silu of the gate times up: the square of what goes in must stay in range. */
	const float kinds[] = { 1, 1e-15f, 1e6f };
	static struct experts_data t;
	static float y[MAX_ROWS * MAX_HIDDEN];
	double want[MAX_HIDDEN], allowed[MAX_HIDDEN];

	for (size_t i = 0; i < N_CASES * 6; i++) {
		const struct experts_case *c = &cases[i / 6];
		struct how how = usual;

		how.in_place = i % 2;
		make(&t, c, kinds[i / 2 % 3]);
		run(&t, &how, y);
		for (uint32_t row = 0; row < MAX_ROWS; row += 9) {
			reference_row(&t, row, want, allowed);
			for (uint32_t n = 0; n < c->hidden; n++)
				rig_near(y[row * c->hidden + n], want[n], 0, allowed[n], c->name, n);
		}
	}
}

/* ---- a SwiGLU by itself: an expert that every row takes ---- */

static const struct experts_case mlp_cases[] = {
	{ "f32", 1, 1, 64, 48, AFD_DTYPE_F32, 0, 0, 0, false, false },
	{ "bf16", 1, 1, 160, 128, AFD_DTYPE_BF16, 0, 0, 0, false, false },
	{ "bf16, odd sizes", 1, 1, 45, 31, AFD_DTYPE_BF16, 0, 0, 0, false, false },
	{ "f16", 1, 1, 96, 70, AFD_DTYPE_F16, 0, 0, 0, false, false },
	{ "fp8", 1, 1, 160, 256, AFD_DTYPE_FP8, 0, 0, 0, false, false },
	{ "fp8, a shard of width between blocks", 1, 1, 64, 100, AFD_DTYPE_FP8, 0, 0, 92, false,
		false },
	{ "fp8, quantised", 1, 1, 160, 192, AFD_DTYPE_FP8, 0, 0, 192, true, false },
	{ "fp8, quantised, between blocks", 1, 1, 130, 144, AFD_DTYPE_FP8, 0, 0, 80, true, false },
};
#define N_MLP_CASES (sizeof(mlp_cases) / sizeof(mlp_cases[0]))

/* What enters the first product is quantised by itself, as the stage does. */
static void run_mlp(const struct experts_data *t, const struct how *how, float *y)
{
	const struct experts_case *c = t->c;
	size_t row_bytes = c->hidden * 4;
	struct rig *r = rig_make(how->n_threads);
	struct afd__matrix gate_up, down;

	load(r, t, how->in_place, &gate_up, &down);
	struct afd__mlp_args a = {
		.x = rig_input(r, t->x + how->row0 * c->hidden, how->n_rows * row_bytes),
		.gate_up = afd__matrix_at(&gate_up, 0),
		.down = afd__matrix_at(&down, 0),
		.y = rig_output(r, how->n_rows * row_bytes),
		.gate_up_rows = rig_output(r, how->n_rows * 2 * c->width * 4),
		.activated = rig_output(r, how->n_rows * c->width * 4),
		.n_rows = how->n_rows,
		.quantize = c->quantize,
	};
	struct afd__quantize_args quantize = { (float *)a.x, how->n_rows, c->hidden, 0 };

	if (c->quantize)
		RIG_OK(afd__quantize(&r->q, &quantize));
	if (afd__mlp(&r->q, &a))
		fail_msg("%s: %s", c->name, afd_last_error());
	rig_fetch(r, y, a.y, how->n_rows * row_bytes);
	afd__matrix_destroy(r->dev, &gate_up);
	afd__matrix_destroy(r->dev, &down);
	rig_end(r);
}

static void mlps_agree_with_double_in_every_case_and_kind(void **state)
{
	const float kinds[] = { 1, 1e-15f, 1e6f };
	static struct experts_data t;
	static float y[MAX_ROWS * MAX_HIDDEN];
	double want[MAX_HIDDEN], size[MAX_HIDDEN];

	for (size_t i = 0; i < N_MLP_CASES * 3; i++) {
		const struct experts_case *c = &mlp_cases[i / 3];

		make(&t, c, kinds[i % 3]);
		run_mlp(&t, &(struct how){ .n_rows = MAX_ROWS, .n_threads = 2, .in_place = i % 2 }, y);
		for (uint32_t row = 0; row < MAX_ROWS; row += 9) {
			reference_expert(&t, 0, t.x + row * c->hidden, want, size);
			for (uint32_t n = 0; n < c->hidden; n++)
				rig_near(y[row * c->hidden + n], want[n], 3e-6, size[n] + 1e-35,
					c->name, n);
		}
	}
}

static void the_other_rows_of_an_mlp_do_not_show(void **state)
{
	static struct experts_data t;
	static float all[MAX_ROWS * MAX_HIDDEN], part[MAX_ROWS * MAX_HIDDEN];

	for (size_t i = 0; i < N_MLP_CASES; i++) {
		uint32_t hidden = mlp_cases[i].hidden;

		make(&t, &mlp_cases[i], 1);
		run_mlp(&t, &usual, all);
		run_mlp(&t, &(struct how){ .row0 = 7, .n_rows = 3, .n_threads = 1 }, part);
		assert_memory_equal(part, all + (size_t)7 * hidden, (size_t)3 * hidden * 4);
	}
}

static void check_bits(const struct how *how)
{
	static struct experts_data t;
	static float all[MAX_ROWS * MAX_HIDDEN], part[MAX_ROWS * MAX_HIDDEN];

	for (size_t i = 0; i < N_CASES; i++) {
		struct how whole = usual;

		if (how->in_x && cases[i].accumulate)
			continue;
		make(&t, &cases[i], 1);
		whole.in_place = how->in_place;
		run(&t, &whole, all);
		run(&t, how, part);
		if (memcmp(part, all + how->row0 * cases[i].hidden,
			    how->n_rows * cases[i].hidden * 4))
			fail_msg("%s: other bits", cases[i].name);
	}
}

static void the_other_rows_do_not_show(void **state)
{
	const uint32_t counts[] = { 1, 2, 5, 33 };

	for (uint32_t i = 0; i < 8; i++)
		check_bits(&(struct how){ .row0 = 7 + i,
			.n_rows = counts[i / 2],
			.n_threads = 2,
			.in_place = i % 2 });
}

static void neither_threads_nor_chunks_nor_y_in_x_show(void **state)
{
	check_bits(&(struct how){ .n_rows = MAX_ROWS, .n_threads = 1 });
	check_bits(&(struct how){ .n_rows = MAX_ROWS, .n_threads = 5 });
	for (uint32_t chunk = 1; chunk < MAX_ROWS; chunk += 16)
		check_bits(&(struct how){
			.n_rows = MAX_ROWS, .n_threads = 2, .chunk_rows = chunk, .in_x = true });
}

/* Many rows of one expert make several groups of it. */
static void many_rows_of_one_expert_have_the_bits_of_each_alone(void **state)
{
	enum { ROWS = 300, HIDDEN = 32, WIDTH = 16 };
	static float x[ROWS * HIDDEN], y[ROWS * HIDDEN], alone[HIDDEN], weights[ROWS];
	static float gate_up[2 * 2 * WIDTH * HIDDEN], down[2 * HIDDEN * WIDTH];
	static int32_t ids[ROWS];
	struct rig *r = *state;
	struct afd__matrix_shape shape = {
		.n = 2 * WIDTH, .k = HIDDEN, .n_stack = 2, .dtype = AFD_DTYPE_F32
	};
	struct afd__experts_args a = { .top_k = 1, .n_rows = ROWS };

	rig_fill(r, x, ROWS * HIDDEN, 1);
	rig_fill(r, weights, ROWS, 1);
	rig_fill(r, gate_up, 2 * 2 * WIDTH * HIDDEN, 1);
	rig_fill(r, down, 2 * HIDDEN * WIDTH, 1);
	for (int row = 0; row < ROWS; row++)
		ids[row] = row % 50 == 0;
	RIG_OK(afd__matrix_create_stack(
		r->dev, &a.gate_up, &shape, rig_lend(r, gate_up, sizeof(gate_up))));
	shape.n = HIDDEN;
	shape.k = WIDTH;
	RIG_OK(afd__matrix_create_stack(
		r->dev, &a.down, &shape, rig_lend(r, down, sizeof(down))));
	a.x = rig_input(r, x, sizeof(x));
	a.y = rig_output(r, sizeof(y));
	a.ids = rig_input(r, ids, sizeof(ids));
	a.weights = rig_input(r, weights, sizeof(weights));
	a.scratch_bytes = afd__experts_scratch_bytes(r->dev, &a);
	a.scratch = rig_output(r, a.scratch_bytes);
	RIG_OK(afd__experts(&r->q, &a));
	rig_fetch(r, y, a.y, sizeof(y));
	for (int row = 0; row < ROWS; row += 23) {
		struct afd__experts_args one = a;

		one.n_rows = 1;
		one.x += row * HIDDEN;
		one.y += row * HIDDEN;
		one.ids += row;
		one.weights += row;
		RIG_OK(afd__experts(&r->q, &one));
		rig_fetch(r, alone, one.y, sizeof(alone));
		assert_memory_equal(alone, y + row * HIDDEN, sizeof(alone));
	}
}

/* ---- slots ---- */

/* An expert of width 1 over one number: y = weight * down * silu(gate x) * up x, with gate = up = 1
 * and down = 10^expert. */
static void run_slots(struct rig *r, const int32_t *ids, uint32_t n_rows, uint32_t top_k,
	int32_t first, uint32_t n_held, float *y)
{
	float ones[2 * 8], powers[8] = { 1, 10, 100, 1000, 10000, 100000, 1000000, 10000000 };
	float weights[64], x[16];
	struct afd__matrix_shape shape = {
		.n = 2, .k = 1, .n_stack = n_held, .dtype = AFD_DTYPE_F32
	};
	struct afd__experts_args a = { .top_k = top_k, .n_rows = n_rows, .first_expert = first };

	for (int i = 0; i < 16; i++)
		ones[i] = x[i] = 1;
	for (int i = 0; i < 64; i++)
		weights[i] = 1;
	RIG_OK(afd__matrix_create_stack(
		r->dev, &a.gate_up, &shape, rig_lend(r, ones, sizeof(ones))));
	shape.n = 1;
	RIG_OK(afd__matrix_create_stack(
		r->dev, &a.down, &shape, rig_lend(r, powers + first, n_held * sizeof(float))));
	a.x = rig_input(r, x, n_rows * 4);
	a.y = rig_output(r, n_rows * 4);
	a.ids = rig_input(r, ids, n_rows * top_k * 4);
	a.weights = rig_input(r, weights, n_rows * top_k * 4);
	a.scratch_bytes = afd__experts_scratch_bytes(r->dev, &a);
	a.scratch = rig_output(r, a.scratch_bytes);
	RIG_OK(afd__experts(&r->q, &a));
	rig_fetch(r, y, a.y, n_rows * 4);
	for (uint32_t i = 0; i < n_rows; i++)
		y[i] *= 1 + expf(-1); /* silu(1) is 1 / that */
}

static void slots_that_are_none_elsewhere_or_repeated_are_skipped(void **state)
{
	const int32_t ids[][3] = { { 0, 1, 2 }, { -1, 3, -1 }, { 2, 2, 3 }, { 8, 9, 4000 },
		{ -1, -1, -1 }, { 7, 0, INT32_MAX }, { INT32_MIN, 1, 1 } };
	const double all[] = { 111, 1000, 1100, 0, 0, 10000001, 10 },
		     some[] = { 100, 1000, 1100, 0, 0, 0, 0 }; /* experts 2 to 4 */
	float y[7];

	run_slots(*state, ids[0], 7, 3, 0, 8, y);
	for (size_t i = 0; i < 7; i++)
		rig_near(y[i], all[i], 1e-6, 0, "all experts", i);
	run_slots(*state, ids[0], 7, 3, 2, 3, y);
	for (size_t i = 0; i < 7; i++)
		rig_near(y[i], some[i], 1e-6, 0, "experts 2 to 4", i);
	assert_true(!signbit(y[3])); /* a sum of nothing is +0 */
}

enum { SPARE_HIDDEN = 64, SPARE_WIDTH = 64, SPARE_STACK = 5 };

/* Three rows that need experts 1 and 3 of five. */
static void run_spare(struct rig *r, struct afd__experts_args *a)
{
	const int32_t ids[6] = { 1, 3, 3, 1, -1, 3 };
	const float weights[6] = { 1, 1, 1, 1, 1, 1 };
	float x[3 * SPARE_HIDDEN], y[3 * SPARE_HIDDEN];

	rig_fill(r, x, 3 * SPARE_HIDDEN, 1);
	a->n_rows = 3;
	a->top_k = 2;
	a->x = rig_input(r, x, sizeof(x));
	a->y = rig_output(r, sizeof(y));
	a->ids = rig_input(r, ids, sizeof(ids));
	a->weights = rig_input(r, weights, sizeof(weights));
	a->scratch_bytes = afd__experts_scratch_bytes(r->dev, a);
	a->scratch = rig_output(r, a->scratch_bytes);
	RIG_OK(afd__experts(&r->q, a));
	rig_fetch(r, y, a->y, sizeof(y));
	for (int i = 0; i < 3 * SPARE_HIDDEN; i++)
		assert_true(isfinite(y[i]));
}

static const struct afd__matrix_shape spare_gate_up = { .n = 2 * SPARE_WIDTH,
	.k = SPARE_HIDDEN,
	.n_stack = SPARE_STACK,
	.dtype = AFD_DTYPE_F32 };
static const struct afd__matrix_shape spare_down = {
	.n = SPARE_HIDDEN, .k = SPARE_WIDTH, .n_stack = SPARE_STACK, .dtype = AFD_DTYPE_F32
};

static void packed_experts_that_no_row_needs_do_not_show(void **state)
{
	struct rig *r = *state;
	static float rows[2 * SPARE_WIDTH * SPARE_HIDDEN], nan[2 * SPARE_WIDTH * SPARE_HIDDEN];
	struct afd__experts_args a = { 0 };

	rig_fill(r, rows, 2 * SPARE_WIDTH * SPARE_HIDDEN, 0.1f);
	memset(nan, 0xff, sizeof(nan));
	RIG_OK(afd__matrix_create_stack(r->dev, &a.gate_up, &spare_gate_up, NULL));
	RIG_OK(afd__matrix_create_stack(r->dev, &a.down, &spare_down, NULL));
	for (uint32_t e = 0; e < SPARE_STACK; e++) {
		struct afd__matrix gate_up = afd__matrix_at(&a.gate_up, e),
				   down = afd__matrix_at(&a.down, e);

		RIG_OK(afd__matrix_load(
			r->dev, &gate_up, e % 2 ? rows : nan, 0, 2 * SPARE_WIDTH));
		RIG_OK(afd__matrix_load(r->dev, &down, e % 2 ? rows : nan, 0, SPARE_HIDDEN));
	}
	run_spare(r, &a);
	afd__matrix_destroy(r->dev, &a.gate_up);
	afd__matrix_destroy(r->dev, &a.down);
}

/* The others lie in pages that may not be touched. */
static void experts_that_no_row_needs_are_not_read(void **state)
{
	const size_t gate_up_bytes = 2 * SPARE_WIDTH * SPARE_HIDDEN * 4,
		     down_bytes = SPARE_HIDDEN * SPARE_WIDTH * 4;
	const size_t bytes = SPARE_STACK * (gate_up_bytes + down_bytes);
	struct rig *r = *state;
	struct afd__experts_args a = { 0 };
	char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0),
	     *downs = memory + SPARE_STACK * gate_up_bytes;

	assert_true(memory != MAP_FAILED);
	assert_int_equal(down_bytes % (size_t)sysconf(_SC_PAGESIZE), 0);
	rig_fill(r, (float *)memory, bytes / 4, 0.1f);
	RIG_OK(afd__device_register(r->dev, memory, bytes, "test memory"));
	for (uint32_t e = 0; e < SPARE_STACK; e += 2) {
		RIG_OK(mprotect(memory + e * gate_up_bytes, gate_up_bytes, PROT_NONE));
		RIG_OK(mprotect(downs + e * down_bytes, down_bytes, PROT_NONE));
	}
	RIG_OK(afd__matrix_create_stack(r->dev, &a.gate_up, &spare_gate_up, memory));
	RIG_OK(afd__matrix_create_stack(r->dev, &a.down, &spare_down, downs));
	run_spare(r, &a);
	afd__device_unregister(r->dev, memory, bytes);
	munmap(memory, bytes);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(experts_agree_with_double_in_every_case_and_kind),
		cmocka_unit_test(mlps_agree_with_double_in_every_case_and_kind),
		cmocka_unit_test(the_other_rows_of_an_mlp_do_not_show),
		cmocka_unit_test(the_other_rows_do_not_show),
		cmocka_unit_test(neither_threads_nor_chunks_nor_y_in_x_show),
		RIG_TEST(many_rows_of_one_expert_have_the_bits_of_each_alone),
		RIG_TEST(slots_that_are_none_elsewhere_or_repeated_are_skipped),
		RIG_TEST(packed_experts_that_no_row_needs_do_not_show),
		RIG_TEST(experts_that_no_row_needs_are_not_read),
	};

	return RIG_RUN(tests);
}
