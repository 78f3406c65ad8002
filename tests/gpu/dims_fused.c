/* SPDX-License-Identifier: Apache-2.0 */
/* Operations that are several in one, at a model's dimensions (dims.h): a SwiGLU, whose x a norm
 * leaves as products take it where the device has a form for that; and the draw of an id. */
#include "dims.h"

#include <stdlib.h>
#include <string.h>

/* ---- norm and SwiGLU ---- */

struct mlp {
	uint32_t n_rows;
	int32_t dtype;
};

static int enqueue_mlp(struct rig *r, const void *args)
{
	return afd__mlp(&r->q, args);
}

/* x = norm(h) of numbers that are bf16 on a wire, in whichever form. */
static void make_x(struct rig *r, const struct dims *m, struct afd__mlp_args *a)
{
	size_t numbers = (size_t)a->n_rows * m->hidden;
	struct afd__norm_args norm = { .h = (float *)dims_rows(r, numbers),
		.add = dims_rows(r, numbers),
		.weight = dims_rows(r, m->hidden),
		.n_rows = a->n_rows,
		.width = m->hidden,
		.eps = 1e-6f,
		.add_wire = AFD_DTYPE_BF16,
		.out_wire = AFD_DTYPE_BF16,
		.inputs = afd__matrix_inputs(r->dev, &a->gate_up, false) };

	if (norm.inputs.row_bytes)
		norm.inputs.rows = rig_output(r, a->n_rows * norm.inputs.row_bytes);
	else
		norm.out = rig_output(r, numbers * 4);
	RIG_OK(afd__norm(&r->q, &norm));
	a->x = norm.out;
	a->inputs = norm.inputs.rows;
}

static void mlp_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	const struct mlp *p = how;
	struct afd__matrix_shape up = { .n = 2 * m->intermediate, .k = m->hidden, .dtype = p->dtype };
	struct afd__matrix_shape down = { .n = m->hidden, .k = m->intermediate, .dtype = p->dtype };
	struct afd__mlp_args a = { .n_rows = p->n_rows, .quantize = p->dtype == AFD_DTYPE_FP8 };
	size_t rows = p->n_rows;

	dims_weights(r, &a.gate_up, &up);
	dims_weights(r, &a.down, &down);
	make_x(r, m, &a);
	a.y = rig_output(r, rows * m->hidden * 4);
	a.gate_up_rows = rig_output(r, rows * 2 * m->intermediate * 4);
	a.activated = rig_output(r, rows * m->intermediate * 4);
	dims_run(r, enqueue_mlp, &a, out, a.y, rows * m->hidden);
	afd__matrix_destroy(r->dev, &a.gate_up);
	afd__matrix_destroy(r->dev, &a.down);
}

/* What is activated is rounded before the second product; and a number of x that stands at a tie
 * may be rounded to the other side. */
void dims_mlp(const struct dims *m)
{
	for (int i = 0; i < 4; i++) {
		struct mlp p = { i / 2 ? 17 : 1, i % 2 ? AFD_DTYPE_FP8 : AFD_DTYPE_BF16 };

		dims_compare(m, mlp_body, &p, (size_t)p.n_rows * m->hidden,
			dims_allowed(m->hidden) + (i % 2 ? 0x1p-4 : 0x1p-8));
	}
}

/* ---- the draw ---- */

enum { DRAWS = 6 };

static int enqueue_sample(struct rig *r, const void *args)
{
	return afd__sample(&r->q, args);
}

/* The ids themselves: the same numbers give the same id everywhere. */
static void sample_body(struct rig *r, const struct dims *m, const void *how, float *out)
{
	const struct afd__sample_row rows[DRAWS] = {
		{ .seed = 1, .position = 7, .temperature = 0 },
		{ .seed = 2, .position = 8, .temperature = 1 },
		{ .seed = 3, .position = 9, .temperature = 0.7f, .top_k = 50 },
		{ .seed = 4, .position = 1, .temperature = 0.7f, .top_p = 0.9f },
		{ .seed = 5, .position = 2, .temperature = 1.3f, .top_k = 1000, .top_p = 0.95f },
		{ .seed = 6, .position = 3, .temperature = 2, .top_k = 1 },
	};
	struct afd__sample_args a = { .n_rows = DRAWS, .width = m->vocab };
	int32_t ids[DRAWS];

	a.logits = dims_rows(r, (size_t)DRAWS * m->vocab);
	a.rows = rig_input(r, rows, sizeof rows);
	a.ids = rig_output(r, sizeof ids);
	dims_run(r, enqueue_sample, &a, (float *)ids, a.ids, DRAWS);
	for (int i = 0; i < DRAWS; i++)
		out[i] = (float)ids[i];
}

void dims_sample(const struct dims *m)
{
	dims_compare(m, sample_body, NULL, DRAWS, 1e-7);
}
