/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations of the front door: each checks its arguments, then hands them to the backend. A
 * check keeps the first thing that is wrong and names the operation, the argument, its value and
 * the limit.
 *
 * What lies in device memory (ids, positions, slots) cannot be looked at here: the stage has
 * checked it before upload.
 */
#include "device.h"

#include <afd/model.h>
#include <float.h>

#include "../../kernels/cpu/kernels.h"
#include "backends.h"

struct check {
	const char *op;
	struct afd__device *dev;
	int code;
};

static void need_aligned(struct check *c, const char *name, const void *p, size_t alignment)
{
	if (c->code)
		return;
	if (!p)
		c->code = afd__error(-EINVAL, "%s: %s is NULL", c->op, name);
	else if ((uintptr_t)p % alignment)
		c->code = afd__error(-EINVAL, "%s: %s %p, must be aligned to %zu bytes", c->op,
			name, p, alignment);
}

static void need(struct check *c, const char *name, const void *p)
{
	need_aligned(c, name, p, 4);
}

static void may(struct check *c, const char *name, const void *p)
{
	if (p)
		need_aligned(c, name, p, 4);
}

static void within(struct check *c, const char *name, uint64_t value, uint64_t low, uint64_t high)
{
	if (!c->code && (value < low || value > high))
		c->code = afd__error(-EINVAL, "%s: %s %llu, limit %llu to %llu", c->op, name,
			(unsigned long long)value, (unsigned long long)low,
			(unsigned long long)high);
}

static void need_positive(struct check *c, const char *name, float value)
{
	if (!c->code && !(value > 0 && value <= FLT_MAX))
		c->code = afd__error(
			-EINVAL, "%s: %s %g, must be positive and finite", c->op, name, value);
}

/* n_rows * width numbers of 4 bytes must be countable. */
static void countable(struct check *c, uint64_t n_rows, uint64_t width)
{
	uint64_t bytes;

	within(c, "width", width, 1, UINT32_MAX);
	if (!c->code && (__builtin_mul_overflow(n_rows, width, &bytes) || bytes > SIZE_MAX / 8))
		c->code = afd__error(-EINVAL, "%s: %llu rows of %llu numbers overflow", c->op,
			(unsigned long long)n_rows, (unsigned long long)width);
}

/* Any size, so that what divides by it survives until need_dtype. */
static size_t number_bytes(int32_t dtype)
{
	size_t bytes = afd_dtype_bytes(dtype);

	return bytes ? bytes : 1;
}

static void need_dtype(struct check *c, const char *name, int32_t dtype)
{
	if (!c->code && dtype != AFD_DTYPE_F32 && dtype != AFD_DTYPE_BF16 && dtype != AFD_DTYPE_F16)
		c->code = afd__error(
			-EINVAL, "%s: %s %d is none of f32, bf16, f16", c->op, name, dtype);
}

static void need_dtype_or_fp8(struct check *c, const char *name, int32_t dtype)
{
	if (!c->code && (dtype < AFD_DTYPE_F32 || dtype > AFD_DTYPE_FP8))
		c->code = afd__error(
			-EINVAL, "%s: %s %d is none of f32, bf16, f16, fp8", c->op, name, dtype);
}

static void need_matrix(struct check *c, const char *name, const struct afd__matrix *m)
{
	need_dtype_or_fp8(c, "matrix dtype", m->dtype);
	need_aligned(
		c, name, m->data, m->layout == AFD__LAYOUT_IN_PLACE ? number_bytes(m->dtype) : 4);
	if (m->dtype == AFD_DTYPE_FP8)
		need(c, "matrix scales", m->scales);
	within(c, "matrix layout", (uint64_t)m->layout, AFD__LAYOUT_PACKED, AFD__LAYOUT_IN_PLACE);
	within(c, "matrix n", m->n, 1, UINT32_MAX - AFD_K_PANEL);
	within(c, "matrix k", m->k, 1, UINT32_MAX);
}

/* Heads of a position and positions of a page may interleave, but never overlap a position's own
 * numbers. */
static void need_kv(
	struct check *c, const struct afd__kv_view *kv, uint32_t n_rows, uint32_t n_heads)
{
	size_t head_bytes = (size_t)kv->head_dim * number_bytes(kv->dtype);

	need(c, "kv.data", kv->data);
	need_dtype_or_fp8(c, "kv.dtype", kv->dtype);
	if (kv->dtype == AFD_DTYPE_FP8) {
		need_positive(c, "kv.k_scale", kv->k_scale);
		need_positive(c, "kv.v_scale", kv->v_scale);
	}
	within(c, "kv.page_size", kv->page_size, 1, INT32_MAX);
	within(c, "kv.head_dim", kv->head_dim, 2, 1u << 20);
	within(c, "kv.n_kv_heads", kv->n_kv_heads, 1, 1u << 16);
	within(c, "n_heads", n_heads, 1, 1u << 16);
	within(c, "kv.position_stride", kv->position_stride, head_bytes, SIZE_MAX / 2);
	within(c, "kv.v_offset", kv->v_offset, head_bytes, SIZE_MAX / 2);
	if (kv->n_kv_heads > 1)
		within(c, "kv.head_stride", kv->head_stride, head_bytes, SIZE_MAX / 2);
	within(c, "kv.page_stride", kv->page_stride, head_bytes, SIZE_MAX / 2);
	if (!c->code && (kv->head_dim % 2 || n_heads % kv->n_kv_heads))
		c->code = afd__error(-EINVAL,
			"%s: head_dim %u must be even, %u heads a multiple of %u kv heads", c->op,
			kv->head_dim, n_heads, kv->n_kv_heads);
	if (!c->code && (kv->position_stride | kv->v_offset | kv->head_stride | kv->page_stride) %
				number_bytes(kv->dtype))
		c->code = afd__error(-EINVAL, "%s: a stride of kv is no multiple of %zu bytes",
			c->op, number_bytes(kv->dtype));
	countable(c, n_rows, ((uint64_t)n_heads + 2 * (uint64_t)kv->n_kv_heads) * kv->head_dim);
}

static void check_embed(struct check *c, const struct afd__embed_args *a)
{
	need_dtype(c, "matrix dtype", a->table.dtype);
	need_matrix(c, "table", &a->table);
	need(c, "ids", a->ids);
	need(c, "out", a->out);
	countable(c, a->n_rows, a->table.k);
}

/* 0, or a dtype of which each number is rounded by itself. */
static void may_wire(struct check *c, const char *name, int32_t dtype)
{
	if (dtype)
		need_dtype(c, name, dtype);
}

static void may_inputs(struct check *c, uint32_t n_rows, uint32_t width, const struct afd__inputs *i)
{
	const struct afd__matrix w = { .data = i->rows, .k = width, .dtype = i->dtype,
		.column_offset = i->column_offset, .layout = AFD__LAYOUT_PACKED };
	size_t row_bytes;

	if (c->code || !i->rows)
		return;
	need_aligned(c, "inputs.rows", i->rows, 16);
	need_dtype_or_fp8(c, "inputs.dtype", i->dtype);
	within(c, "inputs.column_offset", i->column_offset, 0,
		i->dtype == AFD_DTYPE_FP8 ? AFD__SCALE_ROWS - 1 : 0);
	within(c, "inputs.quantize", (uint64_t)i->quantize, 0, i->dtype == AFD_DTYPE_FP8);
	if (c->code)
		return;
	within(c, "inputs.row_bytes", i->row_bytes, 1, SIZE_MAX / 2);
	row_bytes = afd__matrix_inputs(c->dev, &w, false).row_bytes;
	within(c, "inputs.row_bytes (as the device has them)", i->row_bytes, row_bytes, row_bytes);
	countable(c, n_rows, i->row_bytes);
}

static void check_norm(struct check *c, const struct afd__norm_args *a)
{
	need(c, "h", a->h);
	may(c, "add", a->add);
	may(c, "out", a->out);
	if (a->out || a->inputs.rows)
		need(c, "weight", a->weight);
	else
		need(c, "add (out is NULL)", a->add);
	may_wire(c, "add_wire", a->add_wire);
	may_wire(c, "out_wire", a->out_wire);
	countable(c, a->n_rows, a->width);
	may_inputs(c, a->n_rows, a->width, &a->inputs);
}

/* x, or what the device makes of it for w. */
static void need_x(
	struct check *c, const float *x, const void *inputs, const struct afd__matrix *w)
{
	if (!inputs) {
		need(c, "x", x);
		return;
	}
	need_aligned(c, "inputs", inputs, 16);
	if (!c->code && !afd__matrix_inputs(c->dev, w, false).row_bytes)
		c->code = afd__error(-EINVAL,
			"%s: inputs %p, but device %s takes float32 with this matrix of %s", c->op,
			inputs, c->dev->name, afd_dtype_name(w->dtype));
}

static void check_product(struct check *c, const struct afd__product_args *a)
{
	need_matrix(c, "w", &a->w);
	within(c, "matrix n_stack", a->w.n_stack, 0, 0);
	need_x(c, a->x, a->inputs, &a->w);
	may(c, "bias", a->bias);
	need(c, "y", a->y);
	within(c, "x_stride", a->x_stride, a->w.k, UINT32_MAX);
	within(c, "y_stride", a->y_stride, a->w.n, UINT32_MAX);
	within(c, "quantized", (uint64_t)a->quantized, 0, 1);
	countable(c, a->n_rows, a->x_stride > a->y_stride ? a->x_stride : a->y_stride);
}

static void check_mlp(struct check *c, const struct afd__mlp_args *a)
{
	need_matrix(c, "gate_up", &a->gate_up);
	need_matrix(c, "down", &a->down);
	within(c, "gate_up.n_stack", a->gate_up.n_stack, 0, 0);
	within(c, "down.n_stack", a->down.n_stack, 0, 0);
	within(c, "gate_up.n (twice the width)", a->gate_up.n, 2 * (uint64_t)a->down.k,
		2 * (uint64_t)a->down.k);
	within(c, "gate_up.k (hidden)", a->gate_up.k, a->down.n, a->down.n);
	need_x(c, a->x, a->inputs, &a->gate_up);
	need(c, "y", a->y);
	need(c, "gate_up_rows", a->gate_up_rows);
	need(c, "activated", a->activated);
	within(c, "quantize", (uint64_t)a->quantize, 0, 1);
	within(c, "quantized", (uint64_t)a->quantized, 0, 1);
	countable(c, a->n_rows, a->gate_up.n);
	countable(c, a->n_rows, a->gate_up.k);
}

static void check_sample(struct check *c, const struct afd__sample_args *a)
{
	need(c, "logits", a->logits);
	need_aligned(c, "rows", a->rows, 8);
	need(c, "ids", a->ids);
	within(c, "width", a->width, 1, INT32_MAX);
	countable(c, a->n_rows, a->width);
}

static void check_angles(struct check *c, const struct afd__angles_args *a)
{
	need(c, "positions", a->positions);
	need(c, "inv_freq", a->inv_freq);
	need(c, "out", a->out);
	within(c, "head_dim", a->head_dim, 2, 1u << 20);
	if (!c->code && a->head_dim % 2)
		c->code = afd__error(-EINVAL, "angles: head_dim %u must be even", a->head_dim);
	countable(c, a->n_rows, a->head_dim);
}

static void check_rope(struct check *c, const struct afd__rope_args *a)
{
	need(c, "qkv", a->qkv);
	may(c, "q_norm", a->q_norm);
	may(c, "k_norm", a->k_norm);
	may(c, "angles", a->angles);
	need(c, "slots", a->slots);
	need_kv(c, &a->kv, a->n_rows, a->n_heads);
}

static void check_attend(struct check *c, const struct afd__attend_args *a)
{
	need(c, "qkv", a->qkv);
	need(c, "positions", a->positions);
	need(c, "sequences", a->sequences);
	need(c, "page_table", a->page_table);
	need(c, "out", a->out);
	need_kv(c, &a->kv, a->n_rows, a->n_heads);
	within(c, "table_stride", a->table_stride, 1, INT32_MAX);
	if (!c->code)
		within(c, "query heads of a kv head", a->n_heads / a->kv.n_kv_heads, 1,
			AFD_K_GROUP_MAX);
	within(c, "tasks", (uint64_t)a->n_rows * a->kv.n_kv_heads, 0, UINT32_MAX);
}

static void check_activation(struct check *c, const struct afd__activation_args *a)
{
	need(c, "gate_up", a->gate_up);
	need(c, "out", a->out);
	countable(c, a->n_rows, 2 * (uint64_t)a->width);
}

/* Rows of FP8 have f32 scales in them. */
static size_t row_alignment(int32_t dtype)
{
	return dtype == AFD_DTYPE_FP8 ? sizeof(float) : number_bytes(dtype);
}

static void check_convert(struct check *c, const struct afd__convert_args *a)
{
	size_t src = row_alignment(a->src_dtype), dst = row_alignment(a->dst_dtype);

	need_dtype_or_fp8(c, "src_dtype", a->src_dtype);
	need_dtype_or_fp8(c, "dst_dtype", a->dst_dtype);
	need_aligned(c, "src", a->src, src);
	need_aligned(c, "dst", a->dst, dst);
	within(c, "scatter", (uint64_t)a->scatter, 0, 1);
	if (a->scatter)
		need(c, "index", a->index);
	else
		may(c, "index", a->index);
	countable(c, a->n_rows, a->width);
	within(c, "src_stride", a->src_stride,
		a->n_rows > 1 || (a->index && !a->scatter) ? afd__row_bytes(a->width, a->src_dtype)
							   : 0,
		SIZE_MAX / 2);
	within(c, "dst_stride", a->dst_stride,
		a->n_rows > 1 || a->scatter ? afd__row_bytes(a->width, a->dst_dtype) : 0,
		SIZE_MAX / 2);
	if (!c->code && (a->src_stride % src || a->dst_stride % dst))
		c->code = afd__error(-EINVAL,
			"convert: strides %zu and %zu must be multiples of %zu and %zu bytes",
			a->src_stride, a->dst_stride, src, dst);
	within(c, "accumulate", (uint64_t)a->accumulate, 0, 1);
	if (!c->code && a->accumulate && a->dst_dtype != AFD_DTYPE_F32)
		c->code = afd__error(-EINVAL, "convert: accumulates in f32, dst_dtype is %s",
			afd_dtype_name(a->dst_dtype));
	if (!c->code && (a->src_dtype != a->dst_dtype || a->src_dtype == AFD_DTYPE_FP8) &&
		a->src_dtype != AFD_DTYPE_F32 && a->dst_dtype != AFD_DTYPE_F32)
		c->code = afd__error(-EINVAL, "convert: from %s to %s, one of them must be f32",
			afd_dtype_name(a->src_dtype), afd_dtype_name(a->dst_dtype));
}

static void check_argmax(struct check *c, const struct afd__argmax_args *a)
{
	need(c, "x", a->x);
	need(c, "ids", a->ids);
	within(c, "width", a->width, 1, INT32_MAX);
	countable(c, a->n_rows, a->width);
}

static void check_copy(struct check *c, const struct afd__copy_args *a)
{
	const char *dst = a->dst, *src = a->src;

	need(c, "dst", dst);
	need(c, "src", src);
	if (!c->code && (dst < src ? (size_t)(src - dst) : (size_t)(dst - src)) < a->bytes)
		c->code = afd__error(
			-EINVAL, "copy: %zu bytes from %p to %p overlap", a->bytes, a->src, a->dst);
}

static void check_gate(struct check *c, const struct afd__gate_args *a)
{
	need(c, "x", a->x);
	need(c, "gate", a->gate);
	within(c, "gate_stride", a->gate_stride, a->width, UINT32_MAX);
	countable(c, a->n_rows, a->width);
	countable(c, a->n_rows, a->gate_stride);
}

static void check_quantize(struct check *c, const struct afd__quantize_args *a)
{
	need(c, "x", a->x);
	countable(c, a->n_rows, a->width);
}

static void check_route(struct check *c, const struct afd__route_args *a)
{
	need(c, "logits", a->logits);
	may(c, "bias", a->bias);
	need(c, "ids", a->ids);
	need(c, "weights", a->weights);
	within(c, "n_experts", a->n_experts, 1, AFD_K_EXPERTS_MAX);
	within(c, "n_groups", a->n_groups, 1, a->n_experts);
	within(c, "top_groups", a->top_groups, 1, a->n_groups);
	if (!c->code && a->n_experts % a->n_groups)
		c->code = afd__error(-EINVAL, "route: n_experts %u, must be a multiple of %u groups",
			a->n_experts, a->n_groups);
	if (!c->code)
		within(c, "top_k (of the experts in top_groups)", a->top_k, 1,
			a->n_experts / a->n_groups * a->top_groups);
	within(c, "top_k", a->top_k, 1, AFD_K_TOP_K_MAX);
	within(c, "score", (uint64_t)a->score, AFD_ROUTER_SOFTMAX, AFD_ROUTER_SIGMOID);
	within(c, "normalize", (uint64_t)a->normalize, 0, 1);
	countable(c, a->n_rows, a->n_experts);
}

static void check_experts(
	struct check *c, struct afd__device *dev, const struct afd__experts_args *a)
{
	need_matrix(c, "gate_up", &a->gate_up);
	need_matrix(c, "down", &a->down);
	need(c, "x", a->x);
	need(c, "ids", a->ids);
	need(c, "weights", a->weights);
	need(c, "y", a->y);
	need(c, "scratch", a->scratch);
	within(c, "gate_up.n_stack", a->gate_up.n_stack, 1, AFD_K_EXPERTS_MAX);
	within(c, "down.n_stack", a->down.n_stack, a->gate_up.n_stack, a->gate_up.n_stack);
	within(c, "gate_up.n (twice the width)", a->gate_up.n, 2 * (uint64_t)a->down.k,
		2 * (uint64_t)a->down.k);
	within(c, "gate_up.k (hidden)", a->gate_up.k, a->down.n, a->down.n);
	within(c, "top_k", a->top_k, 1, AFD_K_TOP_K_MAX);
	within(c, "first_expert", (uint64_t)a->first_expert, 0, INT32_MAX);
	within(c, "accumulate", (uint64_t)a->accumulate, 0, 1);
	within(c, "quantize", (uint64_t)a->quantize, 0, 1);
	countable(c, a->n_rows, a->down.n);
	if (!c->code)
		within(c, "scratch_bytes", a->scratch_bytes,
			dev->ops->experts_scratch_bytes(dev, a, true), SIZE_MAX / 2);
}

size_t afd__experts_scratch_bytes(struct afd__device *dev, const struct afd__experts_args *a)
{
	return a->n_rows && a->top_k ? dev->ops->experts_scratch_bytes(dev, a, false) : 0;
}

int afd__experts(struct afd__queue *q, const struct afd__experts_args *a)
{
	struct check c = { .op = "experts" };

	if (q->error)
		return afd__queue_error(q);
	if (!a->n_rows)
		return 0;
	check_experts(&c, q->dev, a);
	return c.code ? c.code : q->dev->ops->experts(q, a);
}

#define OPERATION(name, count) \
	int afd__##name(struct afd__queue *q, const struct afd__##name##_args *a) \
	{ \
		struct check c = { .op = #name, .dev = q->dev }; \
\
		if (q->error) \
			return afd__queue_error(q); \
		if (!a->count) \
			return 0; \
		check_##name(&c, a); \
		return c.code ? c.code : q->dev->ops->name(q, a); \
	}

OPERATION(embed, n_rows)
OPERATION(norm, n_rows)
OPERATION(product, n_rows)
OPERATION(angles, n_rows)
OPERATION(rope, n_rows)
OPERATION(attend, n_rows)
OPERATION(activation, n_rows)
OPERATION(convert, n_rows)
OPERATION(argmax, n_rows)
OPERATION(copy, bytes)
OPERATION(gate, n_rows)
OPERATION(quantize, n_rows)
OPERATION(route, n_rows)
OPERATION(mlp, n_rows)
OPERATION(sample, n_rows)
