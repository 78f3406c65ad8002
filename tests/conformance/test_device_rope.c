/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rope against a reference in double: the norm of each head, the rotation of halves, and where k
 * and v land in the cache and how they are rounded. Head sizes with halves around the lanes of a
 * vector.
 */
#include "rig.h"

#include <math.h>
#include <string.h>

enum { N_ROWS = 4, N_HEADS = 6, N_KV = 2, MAX_DIM = 80, PAGE = 3, N_PAGES = 4 };

struct rope_case {
	const char *name;
	uint32_t head_dim;
	int32_t dtype;
	bool norm, rotate, heads_outside; /* layout: [head][position] or [position][head] */
};

static const struct rope_case cases[] = {
	{ "all of it in f32", 64, AFD_DTYPE_F32, true, true, true },
	{ "bf16, heads inside", 80, AFD_DTYPE_BF16, true, true, false },
	{ "f16, a head of 24", 24, AFD_DTYPE_F16, true, true, true },
	{ "a head of 2", 2, AFD_DTYPE_F32, true, true, false },
	{ "a head of 34, no norm", 34, AFD_DTYPE_BF16, false, true, true },
	{ "no rotation", 48, AFD_DTYPE_F32, true, false, true },
	{ "only the append", 30, AFD_DTYPE_F16, false, false, false },
	{ "fp8", 32, AFD_DTYPE_FP8, true, true, true },
	{ "fp8, a head of 34, heads inside", 34, AFD_DTYPE_FP8, true, true, false },
};

static struct afd__kv_view view_of(const struct rope_case *c, void *data)
{
	size_t head = c->head_dim * rig_bytes(c->dtype);
	struct afd__kv_view kv = { .data = data,
		.page_size = PAGE,
		.n_kv_heads = N_KV,
		.head_dim = c->head_dim,
		.dtype = c->dtype };

	kv.head_stride = c->heads_outside ? PAGE * head : head;
	kv.position_stride = c->heads_outside ? head : N_KV * head;
	kv.v_offset = N_KV * PAGE * head;
	kv.page_stride = 2 * kv.v_offset;
	return kv;
}

/* One head in double, as models.md's order says: norm, then rotation. */
static void reference_head(
	double *x, const float *weight, const float *angles, uint32_t head_dim, float eps)
{
	double sum = 0, first;
	uint32_t half = head_dim / 2;

	for (uint32_t d = 0; d < head_dim; d++)
		sum += x[d] * x[d];
	for (uint32_t d = 0; weight && d < head_dim; d++)
		x[d] = x[d] / sqrt(sum / head_dim + (double)eps) * weight[d];
	for (uint32_t d = 0; angles && d < half; d++) {
		first = x[d];
		x[d] = first * angles[d] - x[d + half] * angles[half + d];
		x[d + half] = x[d + half] * angles[d] + first * angles[half + d];
	}
}

/* A number next to a rounding boundary may fall on either side. */
static void near_in_dtype(
	double got, double want, double size, int32_t dtype, const char *what, size_t i)
{
	double ulp = dtype == AFD_DTYPE_F32	   ? 0
		     : dtype == AFD_DTYPE_BF16 ? 0x1p-7
		     : dtype == AFD_DTYPE_F16  ? 0x1p-10
					       : 0x1p-3;

	rig_near(got, want, ulp,
		4e-6 * size + (dtype == AFD_DTYPE_F16	? 0x1p-24
				      : dtype == AFD_DTYPE_FP8 ? 0x1p-9 * 0.03 * size
							       : 0),
		what, i);
}

struct rope_data {
	float qkv[N_ROWS * (N_HEADS + 2 * N_KV) * MAX_DIM],
		got[N_ROWS * (N_HEADS + 2 * N_KV) * MAX_DIM];
	float weight[2][MAX_DIM], angles[N_ROWS * MAX_DIM];
	_Alignas(4) char cache[2 * N_PAGES * PAGE * N_KV * MAX_DIM * 4];
	float kv_scale[2]; /* of FP8, so that nothing saturates; 0.03 of the size of k and of v */
	bool written[2 * N_PAGES * PAGE * N_KV * MAX_DIM]; /* per number of the cache */
};

static void check_row(
	const struct rope_case *c, struct rope_data *t, uint32_t row, uint32_t slot, double size)
{
	struct afd__kv_view kv = view_of(c, t->cache);
	uint32_t dim = c->head_dim, width = (N_HEADS + 2 * N_KV) * dim;

	for (uint32_t head = 0; head < N_HEADS + 2 * N_KV; head++) {
		bool is_q = head < N_HEADS, is_v = head >= N_HEADS + N_KV;
		uint32_t kv_head = (head - N_HEADS) % N_KV;
		size_t at = slot / PAGE * kv.page_stride + slot % PAGE * kv.position_stride +
			    kv_head * kv.head_stride + (is_v ? kv.v_offset : 0);
		double x[MAX_DIM];

		for (uint32_t d = 0; d < dim; d++)
			x[d] = t->qkv[row * width + head * dim + d];
		if (!is_v)
			reference_head(x, c->norm ? t->weight[!is_q] : NULL,
				c->rotate ? &t->angles[row * dim] : NULL, dim, 1e-6f);
		for (uint32_t d = 0; d < dim; d++) {
			if (is_q) {
				near_in_dtype(t->got[row * width + head * dim + d], x[d], size,
					AFD_DTYPE_F32, c->name, d);
				continue;
			}
			near_in_dtype(rig_decode(t->cache + at, d, c->dtype) * t->kv_scale[is_v],
				x[d], size, c->dtype, c->name, d);
			t->written[at / rig_bytes(c->dtype) + d] = true;
		}
	}
}

static void check_rope(struct rig *r, const struct rope_case *c, float scale)
{
	static struct rope_data t;
	const int32_t slots[N_ROWS] = { 7, 0, 11, 8 }; /* page * PAGE + offset */
	uint32_t dim = c->head_dim, width = (N_HEADS + 2 * N_KV) * dim;
	size_t cache_bytes = 2 * N_PAGES * PAGE * N_KV * dim * rig_bytes(c->dtype);

	memset(&t, 0, sizeof(t));
	rig_fill(r, t.qkv, N_ROWS * width, scale);
	rig_fill(r, t.weight[0], 2 * MAX_DIM, 1);
	for (uint32_t i = 0; i < N_ROWS * dim; i++)
		t.angles[i] = (float)(i % dim < dim / 2 ? cos(i * 0.7) : sin((i - dim / 2) * 0.7));
	struct afd__rope_args a = { .qkv = rig_input(r, t.qkv, N_ROWS * width * 4),
		.slots = rig_input(r, slots, sizeof(slots)),
		.q_norm = c->norm ? rig_input(r, t.weight[0], dim * 4) : NULL,
		.k_norm = c->norm ? rig_input(r, t.weight[1], dim * 4) : NULL,
		.angles = c->rotate ? rig_input(r, t.angles, N_ROWS * dim * 4) : NULL,
		.kv = view_of(c, rig_output(r, cache_bytes)),
		.n_rows = N_ROWS,
		.n_heads = N_HEADS,
		.eps = 1e-6f };
	t.kv_scale[0] = t.kv_scale[1] = 1;
	if (c->dtype == AFD_DTYPE_FP8) {
		a.kv.k_scale = t.kv_scale[0] = 0.03f * (c->norm ? 1 : scale);
		a.kv.v_scale = t.kv_scale[1] = 0.03f * scale;
	}
	RIG_OK(afd__rope(&r->q, &a));
	rig_fetch(r, t.got, a.qkv, N_ROWS * width * 4);
	rig_fetch(r, t.cache, a.kv.data, cache_bytes);
	for (uint32_t row = 0; row < N_ROWS; row++)
		check_row(c, &t, row, (uint32_t)slots[row], c->norm ? 1 : scale);
	for (size_t i = 0; i < cache_bytes / rig_bytes(c->dtype); i++)
		assert_true(t.written[i] || isnan(rig_decode(t.cache, i, c->dtype)));
}

static void rope_agrees_with_double_in_every_case_and_kind(void **state)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		for (size_t k = 0; k < RIG_N_KINDS; k++) {
			struct rig *r = rig_make(2);

			check_rope(r, &cases[i],
				(cases[i].dtype == AFD_DTYPE_F16 ? rig_kinds_f16 : rig_kinds)[k]
					.scale);
			rig_end(r);
		}
	}
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(rope_agrees_with_double_in_every_case_and_kind),
	};

	return RIG_RUN(tests);
}
