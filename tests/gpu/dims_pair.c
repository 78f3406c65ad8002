/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Two rigs on the same random numbers (dims.h). Weights come out of one pool of random numbers at
 * random places, since a model's are more than can be drawn one by one.
 */
#include "dims.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { POOL_NUMBERS = 1 << 25, ROWS_AT_ONCE = 256 };

void dims_compare(
	const struct dims *m, dims_body body, const void *how, size_t numbers, double allowed)
{
	float *want = malloc(numbers * 4), *got = malloc(numbers * 4);
	long n_cores = sysconf(_SC_NPROCESSORS_ONLN);
	struct rig *cpu = rig_make_on("cpu", n_cores > 64 ? 64 : (uint32_t)n_cores),
		   *dev = rig_make(2);

	cpu->random = dev->random = 4242 + m->hidden;
	body(cpu, m, how, want);
	body(dev, m, how, got);
	rig_agree(got, want, numbers, allowed, m->name);
	rig_end(dev);
	rig_end(cpu);
	free(want);
	free(got);
}

/* A recording gives these bits, too. */
static void replay(struct rig *r, int (*enqueue)(struct rig *r, const void *args), const void *args,
	float *again, const void *out, size_t numbers)
{
	struct afd__graph *graph;

	memset(again, 0xff, numbers * 4);
	rig_write(r, (void *)out, again, numbers * 4);
	RIG_OK(afd__queue_record(&r->q));
	RIG_OK(enqueue(r, args));
	RIG_OK(afd__queue_recorded(&r->q, &graph));
	RIG_OK(afd__queue_replay(&r->q, graph));
	rig_fetch(r, again, out, numbers * 4);
	afd__graph_free(r->dev, graph);
}

void dims_run(struct rig *r, int (*enqueue)(struct rig *r, const void *args), const void *args,
	float *host, const void *out, size_t numbers)
{
	const char *repeat = getenv("AFD_DIMS_REPEAT");
	float *again;

	RIG_OK(enqueue(r, args));
	rig_fetch(r, host, out, numbers * 4);
	if (!repeat)
		return;
	again = malloc(numbers * 4);
	for (int i = 0; i < atoi(repeat); i++) {
		memset(again, 0xff, numbers * 4);
		rig_write(r, (void *)out, again, numbers * 4);
		RIG_OK(enqueue(r, args));
		rig_fetch(r, again, out, numbers * 4);
		assert_memory_equal(host, again, numbers * 4);
	}
	if (afd__device_has_graphs(r->dev)) {
		replay(r, enqueue, args, again, out, numbers);
		assert_memory_equal(host, again, numbers * 4);
	}
	free(again);
}

const float *dims_rows(struct rig *r, size_t n)
{
	float *x = rig_bf16_rows(r, n);
	const float *dev = rig_input(r, x, n * 4);

	free(x);
	return dev;
}

/* bf16 of both signs from 2^-7 to 2^-5; or e4m3 from 1/4 to 2. */
static const void *pool_of(int32_t dtype)
{
	static uint16_t *bf16;
	static uint8_t *fp8;
	struct rig r = { .random = 99 };

	if (dtype == AFD_DTYPE_FP8 && !fp8) {
		fp8 = malloc(POOL_NUMBERS);
		for (size_t i = 0; i < POOL_NUMBERS; i++) {
			uint32_t bits = rig_below(&r, 1u << 16);

			fp8[i] = (uint8_t)((bits & 0x87) | (0x28 + (bits >> 4 & 0x10)));
		}
	}
	if (dtype != AFD_DTYPE_FP8 && !bf16) {
		bf16 = malloc(POOL_NUMBERS * 2);
		for (size_t i = 0; i < POOL_NUMBERS; i++)
			bf16[i] = (uint16_t)((rig_below(&r, 1u << 16) & 0x80ff) | 0x3c00);
	}
	return dtype == AFD_DTYPE_FP8 ? (const void *)fp8 : bf16;
}

static void load_scales(struct rig *r, struct afd__matrix *m)
{
	struct afd__scale_blocks blocks = { .n_rows = (m->n + 127) / 128,
		.n_columns = (m->k + 127) / 128,
		.dtype = AFD_DTYPE_F32 };
	size_t n = (size_t)blocks.n_rows * blocks.n_columns;
	float *scales = malloc(n * 4);

	for (size_t i = 0; i < n; i++)
		scales[i] = 0.004f * (float)(1 + rig_below(r, 9));
	blocks.data = scales;
	RIG_OK(afd__matrix_load_scales(r->dev, m, &blocks, 0, m->n));
	free(scales);
}

void dims_weights(struct rig *r, struct afd__matrix *out, const struct afd__matrix_shape *shape)
{
	const char *pool = pool_of(shape->dtype);
	size_t row_bytes = shape->k * rig_bytes(shape->dtype);
	size_t pool_bytes = (size_t)POOL_NUMBERS * rig_bytes(shape->dtype);
	uint32_t step = pool_bytes / 2 / row_bytes < ROWS_AT_ONCE
				? (uint32_t)(pool_bytes / 2 / row_bytes)
				: ROWS_AT_ONCE;

	assert_true(step > 0);
	RIG_OK(afd__matrix_create_stack(r->dev, out, shape, NULL));
	for (uint32_t e = 0; e < (shape->n_stack ? shape->n_stack : 1); e++) {
		struct afd__matrix one = afd__matrix_at(out, e);

		for (uint32_t row = 0, n; row < shape->n; row += n) {
			size_t at = 2 * (size_t)rig_below(r, POOL_NUMBERS / 4);

			n = shape->n - row < step ? shape->n - row : step;
			RIG_OK(afd__matrix_load(r->dev, &one, pool + at, row, n));
		}
		if (shape->dtype == AFD_DTYPE_FP8)
			load_scales(r, &one);
	}
}

double dims_allowed(uint32_t k)
{
	return 2e-5 + k / 16 * 0x1p-24;
}
