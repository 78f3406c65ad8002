/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Operations at the dimensions of real models (Qwen3-8B, 30B-A3B), once each, against the CPU
 * device in the same process: what small shapes cannot show, such as indices beyond a tile, several
 * splits, and products that are cut in k.
 */
#include "rig.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Runs body on the CPU, then on the device under test, with the same random numbers. Both fill n
 * numbers, which must agree within `allowed` of the largest. */
static void compare(void (*body)(struct rig *r, float *out), size_t n, double allowed)
{
	float *want = malloc(n * 4), *got = malloc(n * 4);
	struct rig *cpu = rig_make_on("cpu", 2), *dev = rig_make(2);

	cpu->random = dev->random = 4242;
	body(cpu, want);
	body(dev, got);
	rig_agree(got, want, n, allowed, "number");
	rig_end(dev);
	rig_end(cpu);
	free(want);
	free(got);
}

static void make_weights(struct rig *r, struct afd__matrix *m, const struct afd__matrix_shape *shape)
{
	uint32_t n_stack = shape->n_stack ? shape->n_stack : 1;
	size_t n = (size_t)shape->n * shape->k;
	unsigned char *rows = malloc(n * rig_bytes(shape->dtype));
	static float scales[64 * 128];

	RIG_OK(afd__matrix_create_stack(r->dev, m, shape, NULL));
	for (uint32_t e = 0; e < n_stack; e++) {
		struct afd__matrix one = afd__matrix_at(m, e);
		struct afd__scale_blocks blocks = {
			.data = scales, .n_rows = 64, .n_columns = 128, .dtype = AFD_DTYPE_F32
		};

		/* Numbers of both signs and sizes around 1: any bf16 or e4m3 with such an exponent. */
		for (size_t i = 0; i < n; i++) {
			uint32_t bits = rig_below(r, 1u << 16);
			uint16_t bf16 = (uint16_t)((bits & 0x80ff) | 0x3c00 | (bits & 0x100) << 1);

			if (shape->dtype == AFD_DTYPE_FP8)
				rows[i] = (uint8_t)((bits & 0x87) | (0x28 + (bits >> 4 & 0x10)));
			else
				memcpy(rows + 2 * i, &bf16, 2);
		}
		for (size_t i = 0; i < 64 * 128; i++)
			scales[i] = 0.001f * (float)(1 + rig_below(r, 9));
		RIG_OK(afd__matrix_load(r->dev, &one, rows, 0, shape->n));
		if (shape->dtype == AFD_DTYPE_FP8)
			RIG_OK(afd__matrix_load_scales(r->dev, &one, &blocks, 0, shape->n));
	}
	free(rows);
}

static void run_product(
	struct rig *r, uint32_t n, uint32_t k, uint32_t n_rows, int32_t dtype, float *out)
{
	struct afd__matrix_shape shape = { .n = n, .k = k, .dtype = dtype };
	float *x = rig_bf16_rows(r, (size_t)n_rows * k);
	struct afd__product_args a = { .x_stride = k, .y_stride = n, .n_rows = n_rows };

	make_weights(r, &a.w, &shape);
	a.x = rig_input(r, x, (size_t)n_rows * k * 4);
	a.y = rig_output(r, (size_t)n_rows * n * 4);
	RIG_OK(afd__product(&r->q, &a));
	rig_fetch(r, out, a.y, (size_t)n_rows * n * 4);
	afd__matrix_destroy(r->dev, &a.w);
	free(x);
}

static void product_of_16_rows(struct rig *r, float *out)
{
	run_product(r, 4096, 4096, 16, AFD_DTYPE_BF16, out);
}

static void product_of_1_row(struct rig *r, float *out)
{
	run_product(r, 4096, 12288, 1, AFD_DTYPE_FP8, out);
}

static void product_of_70_rows(struct rig *r, float *out)
{
	run_product(r, 1024, 4096, 70, AFD_DTYPE_FP8, out);
}

static void products_at_the_sizes_of_qwen3_8b_agree_with_the_cpu(void **state)
{
	compare(product_of_16_rows, 16 * 4096, 2e-5);
	compare(product_of_1_row, 4096, 2e-5);
	compare(product_of_70_rows, 70 * 1024, 2e-5);
}

enum { DIM = 128, PAGE = 16, PAGES = 190 };

/* Heads of 128 numbers in bf16, over up to 3,040 positions in pages of 16, for rows of two sequences
 * at most. Both caches are the same random numbers. */
static void attend_pages(struct rig *r, struct afd__attend_args a, const int32_t *positions,
	const int32_t *sequences, float *out)
{
	size_t page_numbers = 2 * (size_t)a.kv.n_kv_heads * PAGE * DIM, n = PAGES * page_numbers;
	size_t q_numbers = (size_t)a.n_rows * (a.n_heads + 2 * a.kv.n_kv_heads) * DIM,
	       out_bytes = (size_t)a.n_rows * a.n_heads * DIM * 4;
	float *q = rig_bf16_rows(r, q_numbers);
	uint16_t *pages = malloc(n * 2);
	int32_t table[2 * PAGES];

	for (size_t i = 0; i < n; i++) {
		float x = rig_random(r, 1);
		uint32_t bits;

		memcpy(&bits, &x, 4);
		pages[i] = (uint16_t)(bits >> 16);
	}
	for (int32_t i = 0; i < 2 * PAGES; i++)
		table[i] = (i * 77 + 5) % PAGES;
	a.qkv = rig_input(r, q, q_numbers * 4);
	a.positions = rig_input(r, positions, a.n_rows * 4);
	a.sequences = rig_input(r, sequences, a.n_rows * 4);
	a.page_table = rig_input(r, table, sizeof(table));
	a.table_stride = PAGES;
	a.out = rig_output(r, out_bytes);
	a.scale = 0.3f / sqrtf(DIM);
	a.kv.data = rig_input(r, pages, n * 2);
	a.kv.page_stride = page_numbers * 2;
	a.kv.v_offset = page_numbers;
	a.kv.head_stride = PAGE * DIM * 2;
	a.kv.position_stride = DIM * 2;
	a.kv.page_size = PAGE;
	a.kv.head_dim = DIM;
	a.kv.dtype = AFD_DTYPE_BF16;
	RIG_OK(afd__attend(&r->q, &a));
	rig_fetch(r, out, a.out, out_bytes);
	free(pages);
	free(q);
}

static void attention(struct rig *r, float *out)
{
	const int32_t positions[2] = { 2999, 4 }, sequences[2] = { 0, 1 };

	attend_pages(r, (struct afd__attend_args){ .n_rows = 2, .n_heads = 32, .kv.n_kv_heads = 8 },
		positions, sequences, out);
}

enum { CHUNK = 18 };

static void attend_chunk(struct rig *r, uint32_t run_rows, float *out)
{
	int32_t positions[CHUNK], sequences[CHUNK] = { 0 };

	for (int32_t i = 0; i < CHUNK; i++)
		positions[i] = 2980 + i;
	attend_pages(r, (struct afd__attend_args){ .n_rows = CHUNK, .n_heads = 8, .kv.n_kv_heads = 2,
				.run_rows = run_rows }, positions, sequences, out);
}

static void chunk(struct rig *r, float *out)
{
	attend_chunk(r, 1 << 20, out);
}

static void attention_over_3000_positions_agrees_with_the_cpu(void **state)
{
	compare(attention, 2 * 32 * 128, 3e-5);
}

static void a_chunk_over_3000_positions_agrees_with_the_cpu(void **state)
{
	compare(chunk, CHUNK * 8 * 128, 3e-5);
}

static void rows_of_a_chunk_over_3000_positions_have_the_bits_that_they_have_alone(void **state)
{
	static float together[CHUNK * 8 * 128], alone[CHUNK * 8 * 128];
	struct rig *r = rig_make(2);
	uint64_t random = r->random;

	attend_chunk(r, 1 << 20, together);
	r->random = random;
	attend_chunk(r, 0, alone);
	assert_memory_equal(together, alone, sizeof(alone));
	rig_end(r);
}

/* 8 experts of Qwen3-30B-A3B, 5 rows. */
static void run_experts(struct rig *r, int32_t dtype, float *out)
{
	enum { ROWS = 5, HIDDEN = 2048, WIDTH = 768, EXPERTS = 8, TOP = 4 };
	struct afd__matrix_shape up = {
		.n = 2 * WIDTH, .k = HIDDEN, .n_stack = EXPERTS, .dtype = dtype
	};
	struct afd__matrix_shape down = {
		.n = HIDDEN, .k = WIDTH, .n_stack = EXPERTS, .dtype = dtype
	};
	struct afd__experts_args a = { .n_rows = ROWS, .top_k = TOP };
	float *x = rig_bf16_rows(r, ROWS * HIDDEN), weights[ROWS * TOP];
	int32_t ids[ROWS * TOP];

	for (uint32_t i = 0; i < ROWS * TOP; i++) {
		ids[i] = (int32_t)((i % TOP * 3 + i / TOP) % EXPERTS);
		weights[i] = 0.25f;
	}
	for (uint32_t i = 0; i < ROWS * HIDDEN; i++)
		x[i] *= 0x1p-6f;
	make_weights(r, &a.gate_up, &up);
	make_weights(r, &a.down, &down);
	a.x = rig_input(r, x, ROWS * HIDDEN * 4);
	a.y = rig_output(r, ROWS * HIDDEN * 4);
	a.ids = rig_input(r, ids, sizeof(ids));
	a.weights = rig_input(r, weights, sizeof(weights));
	a.scratch_bytes = afd__experts_scratch_bytes(r->dev, &a);
	a.scratch = rig_output(r, a.scratch_bytes);
	RIG_OK(afd__experts(&r->q, &a));
	rig_fetch(r, out, a.y, ROWS * HIDDEN * 4);
	afd__matrix_destroy(r->dev, &a.gate_up);
	afd__matrix_destroy(r->dev, &a.down);
	free(x);
}

static void experts_bf16(struct rig *r, float *out)
{
	run_experts(r, AFD_DTYPE_BF16, out);
}

static void experts_fp8(struct rig *r, float *out)
{
	run_experts(r, AFD_DTYPE_FP8, out);
}

/* What is activated is rounded before the second product. */
static void experts_at_the_sizes_of_qwen3_30b_agree_with_the_cpu(void **state)
{
	compare(experts_bf16, 5 * 2048, 2e-5 + rig_product_unit(AFD_DTYPE_BF16));
	compare(experts_fp8, 5 * 2048, 2e-5 + rig_product_unit(AFD_DTYPE_FP8));
}

static void run_mlp(struct rig *r, uint32_t hidden, uint32_t width, float *out)
{
	enum { ROWS = 5 };
	struct afd__matrix_shape up = { .n = 2 * width, .k = hidden, .dtype = AFD_DTYPE_BF16 };
	struct afd__matrix_shape down = { .n = hidden, .k = width, .dtype = AFD_DTYPE_BF16 };
	struct afd__mlp_args a = { .n_rows = ROWS };
	float *x = rig_bf16_rows(r, ROWS * (size_t)hidden);

	for (uint32_t i = 0; i < ROWS * hidden; i++)
		x[i] *= 0x1p-6f;
	make_weights(r, &a.gate_up, &up);
	make_weights(r, &a.down, &down);
	a.x = rig_input(r, x, (size_t)ROWS * hidden * 4);
	a.y = rig_output(r, (size_t)ROWS * hidden * 4);
	a.gate_up_rows = rig_output(r, (size_t)ROWS * 2 * width * 4);
	a.activated = rig_output(r, (size_t)ROWS * width * 4);
	RIG_OK(afd__mlp(&r->q, &a));
	rig_fetch(r, out, a.y, (size_t)ROWS * hidden * 4);
	afd__matrix_destroy(r->dev, &a.gate_up);
	afd__matrix_destroy(r->dev, &a.down);
	free(x);
}

static void wide_mlp(struct rig *r, float *out)
{
	run_mlp(r, 1024, 3072, out);
}

/* So few columns that k is cut for them. */
static void narrow_mlp(struct rig *r, float *out)
{
	run_mlp(r, 2048, 80, out);
}

static void mlps_of_a_width_and_of_a_shard_agree_with_the_cpu(void **state)
{
	compare(wide_mlp, 5 * 1024, 2e-5 + rig_product_unit(AFD_DTYPE_BF16));
	compare(narrow_mlp, 5 * 2048, 2e-5 + rig_product_unit(AFD_DTYPE_BF16));
}

static void norm(struct rig *r, float *out)
{
	enum { ROWS = 3, WIDTH = 5120 };
	float *x = rig_bf16_rows(r, ROWS * WIDTH), *weight = rig_bf16_rows(r, WIDTH);
	struct afd__norm_args a = { .n_rows = ROWS, .width = WIDTH, .eps = 1e-6f };

	a.h = rig_input(r, x, ROWS * WIDTH * 4);
	a.weight = rig_input(r, weight, WIDTH * 4);
	a.out = rig_output(r, ROWS * WIDTH * 4);
	RIG_OK(afd__norm(&r->q, &a));
	rig_fetch(r, out, a.out, ROWS * WIDTH * 4);
	free(x);
	free(weight);
}

static void a_norm_of_5120_numbers_agrees_with_the_cpu(void **state)
{
	compare(norm, 3 * 5120, 2e-6);
}

static void the_largest_of_a_real_vocabulary_is_found(void **state)
{
	enum { VOCAB = 151936 };
	struct rig *r = rig_make(2);
	float *x = rig_bf16_rows(r, 2 * VOCAB);
	int32_t ids[2];

	x[151935] = x[100000] = 9;
	x[VOCAB + 151935] = 9;
	struct afd__argmax_args a = { .x = rig_input(r, x, 2 * VOCAB * 4),
		.ids = rig_output(r, sizeof(ids)),
		.n_rows = 2,
		.width = VOCAB };
	RIG_OK(afd__argmax(&r->q, &a));
	rig_fetch(r, ids, a.ids, sizeof(ids));
	assert_int_equal(ids[0], 100000);
	assert_int_equal(ids[1], 151935);
	free(x);
	rig_end(r);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(products_at_the_sizes_of_qwen3_8b_agree_with_the_cpu),
		cmocka_unit_test(attention_over_3000_positions_agrees_with_the_cpu),
		cmocka_unit_test(a_chunk_over_3000_positions_agrees_with_the_cpu),
		cmocka_unit_test(rows_of_a_chunk_over_3000_positions_have_the_bits_that_they_have_alone),
		cmocka_unit_test(mlps_of_a_width_and_of_a_shard_agree_with_the_cpu),
		cmocka_unit_test(experts_at_the_sizes_of_qwen3_30b_agree_with_the_cpu),
		cmocka_unit_test(a_norm_of_5120_numbers_agrees_with_the_cpu),
		cmocka_unit_test(the_largest_of_a_real_vocabulary_is_found),
	};

	return RIG_RUN(tests);
}
