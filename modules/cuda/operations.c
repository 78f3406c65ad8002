/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The operations of the seam, each a launch on the queue's stream. Called by the front door, which
 * has checked the arguments.
 */
#include "blaslt.h"

/* Weights in place lie where the caller has them: in memory of the device, or in host memory that it
 * can read. */
static int check_place(const struct afd__queue *q, const struct afd__matrix *m)
{
	const struct cuda *c = q->dev->state;

	if (m->layout != AFD__LAYOUT_IN_PLACE || cuda_reaches(c, m->data))
		return 0;
	return q->dev->host->error(-ENOTSUP,
		"device %s: weights in place at %p are in host memory that this GPU cannot read",
		q->dev->name, m->data);
}

static int check_embed(const struct afd__queue *q, const struct afd__embed_args *a)
{
	return check_place(q, &a->table);
}

static int check_product(const struct afd__queue *q, const struct afd__product_args *a)
{
	return check_place(q, &a->w);
}

static int check_experts(const struct afd__queue *q, const struct afd__experts_args *a)
{
	int rc = check_place(q, &a->gate_up);

	return rc ? rc : check_place(q, &a->down);
}

static int check_mlp(const struct afd__queue *q, const struct afd__mlp_args *a)
{
	int rc = check_place(q, &a->gate_up);

	return rc ? rc : check_place(q, &a->down);
}

#define check_nothing(q, a) 0

/* 1: somebody else has enqueued it, 0: our kernels shall. */
#define ours(d, a) 0

#define OPERATION(op, check, other) \
	int cuda_##op(struct afd__queue *q, const struct afd__##op##_args *a) \
	{ \
		struct cuda_queue *d = q->state; \
		void *before; \
		int rc = cuda_enter(q->dev, &before); \
\
		if (rc) \
			return rc; \
		rc = check(q, a); \
		if (!rc) \
			rc = other(d, a); \
		if (!rc) \
			rc = cuda_error(q->dev, afd_gpu_##op(&d->gpu, a), #op); \
		cuda_leave(q->dev, before); \
		return rc < 0 ? rc : 0; \
	}

OPERATION(embed, check_embed, ours)
OPERATION(norm, check_nothing, ours)
OPERATION(product, check_product, blaslt_product)
OPERATION(angles, check_nothing, ours)
OPERATION(rope, check_nothing, ours)
OPERATION(attend, check_nothing, ours)
OPERATION(activation, check_nothing, ours)
OPERATION(argmax, check_nothing, ours)
OPERATION(gate, check_nothing, ours)
OPERATION(quantize, check_nothing, ours)
OPERATION(route, check_nothing, ours)
OPERATION(experts, check_experts, ours)
OPERATION(mlp, check_mlp, blaslt_mlp)
OPERATION(sample, check_nothing, ours)

static int convert(struct cuda_queue *d, const struct afd__convert_args *a)
{
	const struct cuda *c = d->q->dev->state;

	if (!cuda_reaches(c, a->src))
		return cuda_bounce(d, a, true);
	if (!cuda_reaches(c, a->dst))
		return cuda_bounce(d, a, false);
	return cuda_error(d->q->dev, afd_gpu_convert(&d->gpu, a), "convert");
}

int cuda_convert(struct afd__queue *q, const struct afd__convert_args *a)
{
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	rc = convert(q->state, a);
	cuda_leave(q->dev, before);
	return rc;
}

int cuda_copy(struct afd__queue *q, const struct afd__copy_args *a)
{
	const struct cuda_queue *d = q->state;
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	rc = cuda_error(q->dev,
		cudaMemcpyAsync(
			a->dst, a->src, a->bytes, cudaMemcpyDeviceToDevice, d->gpu.stream),
		"copy");
	cuda_leave(q->dev, before);
	return rc;
}

int cuda_probe(struct afd__queue *q, const struct afd__probe_args *a, double *work)
{
	const struct cuda_queue *d = q->state;
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	rc = cuda_error(q->dev, afd_gpu_probe(&d->gpu, a, work), "probe");
	cuda_leave(q->dev, before);
	return rc;
}

size_t cuda_input_row_bytes(struct afd__device *dev, const struct afd__matrix *w)
{
	return afd_gpu_input_row_bytes(w);
}

size_t cuda_experts_scratch_bytes(
	struct afd__device *dev, const struct afd__experts_args *a, bool least)
{
	return afd_gpu_experts_scratch_bytes(a, least);
}
