/* SPDX-License-Identifier: Apache-2.0 */
/* The operations at a model's dimensions (dims.h): products in bf16 and FP8, attention, experts,
 * rows. */
#include "dims.h"

#include <afd/model.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define ENQUEUE(op) \
	static int enqueue_##op(struct rig *r, const void *args) \
	{ \
		return afd__##op(&r->q, args); \
	}
ENQUEUE(product)
ENQUEUE(attend)
ENQUEUE(experts)
ENQUEUE(activation)
ENQUEUE(embed)

/* ---- products ---- */

struct product {
	uint32_t n, k, n_rows;
	int32_t dtype;
};

static void product_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	const struct product *p = how;
	struct afd__matrix_shape shape = { .n = p->n, .k = p->k, .dtype = p->dtype };
	struct afd__product_args a = { .x_stride = p->k, .y_stride = p->n, .n_rows = p->n_rows };

	dims_weights(r, &a.w, &shape);
	a.x = dims_rows(r, (size_t)p->n_rows * p->k);
	a.y = rig_output(r, (size_t)p->n_rows * p->n * 4);
	dims_run(r, enqueue_product, &a, out, a.y, (size_t)p->n_rows * p->n);
	afd__matrix_destroy(r->dev, &a.w);
}

static void products(const struct dims *m, uint32_t n, uint32_t k, uint32_t n_rows)
{
	for (int i = 0; i < 2; i++) {
		struct product p = { n, k, n_rows, i ? AFD_DTYPE_FP8 : AFD_DTYPE_BF16 };

		dims_compare(m, product_body, &p, (size_t)n_rows * n, dims_allowed(k));
	}
}

static void qkv(const struct dims *m)
{
	uint32_t n = (m->n_heads + 2 * m->n_kv_heads) * DIMS_HEAD;

	products(m, n, m->hidden, 1);
	products(m, n, m->hidden, 17);
	products(m, n, m->hidden, 300);
}

static void output(const struct dims *m)
{
	products(m, m->hidden, m->n_heads * DIMS_HEAD, 5);
}

static void gate_up(const struct dims *m)
{
	products(m, 2 * m->intermediate, m->hidden, 3);
}

static void down(const struct dims *m)
{
	products(m, m->hidden, m->intermediate, 1);
	products(m, m->hidden, m->intermediate, 33);
}

static int is_dense(const struct dims *m)
{
	return m->intermediate > 0;
}

/* ---- embedding and head: one matrix serves both ---- */

static void vocab_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	enum { ROWS = 2 };
	struct afd__matrix_shape shape = { .n = m->vocab, .k = m->hidden, .dtype = AFD_DTYPE_BF16 };
	int32_t ids[ROWS] = { (int32_t)m->vocab - 1, (int32_t)m->vocab / 3 }, found[ROWS];
	struct afd__embed_args e = { .n_rows = ROWS, .scale = 3 };
	struct afd__product_args a = {
		.x_stride = m->hidden, .y_stride = m->vocab, .n_rows = ROWS
	};
	struct afd__argmax_args best = { .n_rows = ROWS, .width = m->vocab };

	dims_weights(r, &a.w, &shape);
	e.table = a.w;
	e.ids = rig_input(r, ids, sizeof ids);
	e.out = rig_output(r, (size_t)ROWS * m->hidden * 4);
	dims_run(r, enqueue_embed, &e, out, e.out, (size_t)ROWS * m->hidden);
	a.x = dims_rows(r, (size_t)ROWS * m->hidden);
	a.y = rig_output(r, (size_t)ROWS * m->vocab * 4);
	dims_run(r, enqueue_product, &a, out + (size_t)ROWS * m->hidden, a.y,
		(size_t)ROWS * m->vocab);
	best.x = a.y;
	best.ids = rig_output(r, sizeof found);
	RIG_OK(afd__argmax(&r->q, &best));
	rig_fetch(r, found, best.ids, sizeof found);
	for (int row = 0; row < ROWS; row++) {
		const float *y = out + (size_t)ROWS * m->hidden + (size_t)row * m->vocab;

		for (uint32_t i = 0; i < m->vocab; i++)
			assert_true(y[i] <= y[found[row]]);
	}
	afd__matrix_destroy(r->dev, &a.w);
}

static void vocab(const struct dims *m)
{
	dims_compare(
		m, vocab_body, NULL, 2 * ((size_t)m->hidden + m->vocab), dims_allowed(m->hidden));
}

/* ---- attention: rope appends K and V, then attend reads what is there ---- */

struct cache {
	int32_t dtype;
	uint32_t n_positions;
};

enum { PAGE = 16, SEQUENCES = 3 };

static struct afd__kv_view make_cache(
	struct rig *r, const struct dims *m, int32_t dtype, uint32_t n_pages)
{
	size_t position_bytes = DIMS_HEAD * rig_bytes(dtype),
	       side = position_bytes * PAGE * m->n_kv_heads;
	size_t n = n_pages * 2 * side / rig_bytes(dtype);
	unsigned char *numbers = malloc(n * rig_bytes(dtype));
	struct afd__kv_view kv = { .page_stride = 2 * side,
		.v_offset = side,
		.head_stride = position_bytes * PAGE,
		.position_stride = position_bytes,
		.page_size = PAGE,
		.n_kv_heads = m->n_kv_heads,
		.head_dim = DIMS_HEAD,
		.dtype = dtype,
		.k_scale = 0.25f,
		.v_scale = 0.5f };

	for (size_t i = 0; i < n; i++) {
		uint32_t bits = rig_below(r, 1u << 16);
		uint16_t bf16 = (uint16_t)((bits & 0x80ff) | 0x3e00 | (bits & 0x100));

		if (dtype == AFD_DTYPE_FP8)
			numbers[i] = (uint8_t)((bits & 0x87) | (0x28 + (bits >> 4 & 0x10)));
		else
			memcpy(numbers + 2 * i, &bf16, 2);
	}
	kv.data = rig_input(r, numbers, n * rig_bytes(dtype));
	free(numbers);
	return kv;
}

/* Three rows of sequences of different length, whose own K and V are appended at their places. */
static void attention_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	const struct cache *c = how;
	uint32_t n_pages = (c->n_positions + PAGE - 1) / PAGE, width = m->n_heads * DIMS_HEAD,
		 qkv_width = width + 2 * m->n_kv_heads * DIMS_HEAD;
	int32_t positions[SEQUENCES] = { (int32_t)c->n_positions - 1, (int32_t)c->n_positions / 3,
		0 };
	int32_t sequences[SEQUENCES] = { 2, 0, 1 }, slots[SEQUENCES];
	int32_t *table = malloc((size_t)SEQUENCES * n_pages * 4);
	float angles[SEQUENCES * DIMS_HEAD];
	struct afd__rope_args rope = { .n_rows = SEQUENCES, .n_heads = m->n_heads, .eps = 1e-6f };
	struct afd__attend_args a = { .n_rows = SEQUENCES,
		.n_heads = m->n_heads,
		.table_stride = n_pages,
		.window = m->window,
		.scale = 0.3f / sqrtf(DIMS_HEAD) };

	for (uint32_t i = 0; i < SEQUENCES * n_pages; i++)
		table[i] = (int32_t)((i * 7 + 5) % (SEQUENCES * n_pages));
	if (SEQUENCES * n_pages % 7 == 0)
		for (uint32_t i = 0; i < SEQUENCES * n_pages; i++)
			table[i] = (int32_t)(SEQUENCES * n_pages - 1 - i);
	for (int i = 0; i < SEQUENCES; i++)
		slots[i] = table[(uint32_t)sequences[i] * n_pages + (uint32_t)positions[i] / PAGE] *
				   PAGE +
			   positions[i] % PAGE;
	for (int i = 0; i < SEQUENCES * DIMS_HEAD; i++)
		angles[i] = rig_random(r, 0.3f);
	rope.qkv = (float *)dims_rows(r, (size_t)SEQUENCES * qkv_width);
	rope.q_norm = rope.k_norm = dims_rows(r, DIMS_HEAD);
	rope.angles = rig_input(r, angles, sizeof angles);
	rope.slots = rig_input(r, slots, sizeof slots);
	rope.kv = a.kv = make_cache(r, m, c->dtype, SEQUENCES * n_pages);
	RIG_OK(afd__rope(&r->q, &rope));
	a.qkv = rope.qkv;
	a.positions = rig_input(r, positions, sizeof positions);
	a.sequences = rig_input(r, sequences, sizeof sequences);
	a.page_table = rig_input(r, table, (size_t)SEQUENCES * n_pages * 4);
	a.out = rig_output(r, (size_t)SEQUENCES * width * 4);
	dims_run(r, enqueue_attend, &a, out, a.out, (size_t)SEQUENCES * width);
	free(table);
}

/* A bf16 that K rounds to on one side of a tie, and to the other on the other device, moves a
 * result by 2^-9 of one position of many. */
static void attention(const struct dims *m)
{
	for (int i = 0; i < 2; i++) {
		struct cache c = { i ? AFD_DTYPE_FP8 : AFD_DTYPE_BF16,
			m->window ? m->window + 333 : 2999 };

		if (getenv("AFD_DIMS_SHRINK"))
			c.n_positions = 300;
		dims_compare(
			m, attention_body, &c, (size_t)SEQUENCES * m->n_heads * DIMS_HEAD, 2e-4);
	}
}

/* ---- experts ---- */

enum { EXPERT_ROWS = 19, EXPERTS = 8 };

static void experts_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	int32_t dtype = *(const int32_t *)how, ids[EXPERT_ROWS * 8];
	struct afd__matrix_shape up = {
		.n = 2 * m->width, .k = m->hidden, .n_stack = EXPERTS, .dtype = dtype
	};
	struct afd__matrix_shape down = {
		.n = m->hidden, .k = m->width, .n_stack = EXPERTS, .dtype = dtype
	};
	struct afd__experts_args a = {
		.n_rows = EXPERT_ROWS, .top_k = m->top_k, .quantize = dtype == AFD_DTYPE_FP8
	};
	float weights[EXPERT_ROWS * 8];

	/* Expert 6 is in no row; 0 is in most. */
	for (uint32_t i = 0; i < EXPERT_ROWS * m->top_k; i++) {
		uint32_t slot = i % m->top_k, id = slot * 3 + i / m->top_k % 2;

		ids[i] = id % EXPERTS == 6 ? -1 : (int32_t)(id % EXPERTS);
		weights[i] = 1.0f / (float)(1 + slot);
	}
	dims_weights(r, &a.gate_up, &up);
	dims_weights(r, &a.down, &down);
	a.x = dims_rows(r, (size_t)EXPERT_ROWS * m->hidden);
	a.y = rig_output(r, (size_t)EXPERT_ROWS * m->hidden * 4);
	a.ids = rig_input(r, ids, (size_t)EXPERT_ROWS * m->top_k * 4);
	a.weights = rig_input(r, weights, (size_t)EXPERT_ROWS * m->top_k * 4);
	a.scratch_bytes = afd__experts_scratch_bytes(r->dev, &a);
	a.scratch = rig_output(r, a.scratch_bytes);
	dims_run(r, enqueue_experts, &a, out, a.y, (size_t)EXPERT_ROWS * m->hidden);
	afd__matrix_destroy(r->dev, &a.gate_up);
	afd__matrix_destroy(r->dev, &a.down);
}

/* What is activated is rounded before the second product. */
static void experts(const struct dims *m)
{
	for (int i = 0; i < 2; i++) {
		int32_t dtype = i ? AFD_DTYPE_FP8 : AFD_DTYPE_BF16;

		dims_compare(m, experts_body, &dtype, (size_t)EXPERT_ROWS * m->hidden,
			dims_allowed(m->hidden) + (i ? 0x1p-4 : 0x1p-8));
	}
}

static void route_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	enum { ROWS = 33 };
	struct afd__route_args a = { .n_rows = ROWS,
		.n_experts = m->n_experts,
		.top_k = m->top_k,
		.n_groups = 1,
		.top_groups = 1,
		.score = m->sigmoid ? AFD_ROUTER_SIGMOID : AFD_ROUTER_SOFTMAX,
		.normalize = 1,
		.scale = m->sigmoid ? 2.826f : 1 };
	size_t n = (size_t)ROWS * m->top_k;
	int32_t ids[ROWS * 8];

	a.logits = dims_rows(r, (size_t)ROWS * m->n_experts);
	a.bias = m->sigmoid ? dims_rows(r, m->n_experts) : NULL;
	a.ids = rig_output(r, n * 4);
	a.weights = rig_output(r, n * 4);
	RIG_OK(afd__route(&r->q, &a));
	rig_fetch(r, ids, a.ids, n * 4);
	rig_fetch(r, out + n, a.weights, n * 4);
	for (size_t i = 0; i < n; i++)
		out[i] = (float)ids[i] / 16; /* a wrong one is far off */
}

static void route(const struct dims *m)
{
	dims_compare(m, route_body, NULL, 2 * 33 * (size_t)m->top_k, 1e-6);
}

static int is_routed(const struct dims *m)
{
	return m->n_experts > 0;
}

/* ---- rows: norm with addition, activation, gate, quantise ---- */

static void rows_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	enum { ROWS = 7 };
	uint32_t width = m->intermediate ? m->intermediate : m->width,
		 gated = m->n_heads * DIMS_HEAD;
	struct afd__norm_args norm = { .n_rows = ROWS, .width = m->hidden, .eps = 1e-6f };
	struct afd__activation_args act = { .n_rows = ROWS, .width = width };
	struct afd__gate_args gate = { .n_rows = ROWS, .width = gated, .gate_stride = gated };

	norm.h = (float *)dims_rows(r, (size_t)ROWS * m->hidden);
	norm.add = dims_rows(r, (size_t)ROWS * m->hidden);
	norm.weight = dims_rows(r, m->hidden);
	norm.out = rig_output(r, (size_t)ROWS * m->hidden * 4);
	RIG_OK(afd__norm(&r->q, &norm));
	rig_fetch(r, out, norm.out, (size_t)ROWS * m->hidden * 4);
	out += (size_t)ROWS * m->hidden;
	act.gate_up = dims_rows(r, (size_t)ROWS * 2 * width);
	act.out = rig_output(r, (size_t)ROWS * width * 4);
	dims_run(r, enqueue_activation, &act, out, act.out, (size_t)ROWS * width);
	out += (size_t)ROWS * width;
	gate.x = (float *)dims_rows(r, (size_t)ROWS * gated);
	gate.gate = dims_rows(r, (size_t)ROWS * gated);
	RIG_OK(afd__gate(&r->q, &gate));
	rig_fetch(r, out, gate.x, (size_t)ROWS * gated * 4);
}

static void rows(const struct dims *m)
{
	uint32_t width = m->intermediate ? m->intermediate : m->width;

	dims_compare(
		m, rows_body, NULL, 7 * ((size_t)m->hidden + width + m->n_heads * DIMS_HEAD), 2e-6);
}

const struct dims_op dims_ops[] = {
	{ "qkv", qkv },
	{ "output", output },
	{ "gate_up", gate_up, is_dense },
	{ "down", down, is_dense },
	{ "mlp", dims_mlp, is_dense },
	{ "vocab", vocab },
	{ "sample", dims_sample },
	{ "attention", attention },
	{ "experts", experts, is_routed },
	{ "route", route, is_routed },
	{ "rows", rows },
	{ 0 },
};
