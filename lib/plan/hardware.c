/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How long a model's stages take on devices, from data sheets: the longer of reading and computing,
 * and K and V on top, which no batch shares. Measured times take their place where there are any.
 * Derived here; at 8K positions the sums are those of Step-3 (arXiv 2507.19427), table 2.
 */
#include <math.h>
#include <string.h>

#include "plan.h"

void afd__plan_hardware_open(struct afd__plan_hardware *h, const struct afd_plan_report_params *p)
{
	const struct afd_plan_model *m = p->model;
	double hidden = m->hidden_size, dense = m->n_layers - m->n_moe_layers;
	double ffn =
		dense * 3 * hidden * m->intermediate_size +
		m->n_moe_layers *
			(3 * hidden * ((double)m->expert_size * m->n_experts + m->shared_size) +
				hidden * m->n_experts);

	*h = (struct afd__plan_hardware){ .p = p, .m = m };
	h->attention_weights = m->attention_params * p->weight_bytes;
	h->ffn_weights = ffn * p->weight_bytes;
	h->embed_weights = hidden * m->vocab_size * (m->tied_head ? 1 : 2) * p->weight_bytes;
}

double afd__plan_kv_bytes(const struct afd__plan_hardware *h, double context)
{
	const struct afd_plan_model *m = h->m;
	double seen = m->sliding_window ? fmin(context, m->sliding_window) : context;

	return (m->kv_numbers_per_token * context + m->sliding_kv_numbers * seen) * h->p->kv_bytes;
}

/* A head reads its weights once a step, too. */
static double head_s(
	const struct afd__plan_hardware *h, const struct afd_plan_device *d, double slots)
{
	double params = (double)h->m->hidden_size * h->m->vocab_size;

	return fmax(
		params * h->p->weight_bytes / d->hbm_bytes_per_s, 2 * params * slots / d->flops);
}

double afd__plan_attention_s(const struct afd__plan_hardware *h, const struct afd_plan_device *d,
	double slots, double context, double *weights_s)
{
	const struct afd_plan_model *m = h->m;
	double us = afd__plan_timed(h->p, "attention", d->name, slots, context);
	double seen = m->sliding_window ? fmin(context, m->sliding_window) : context;
	double flops = m->attention_flops_per_position * context + m->sliding_flops * seen;
	double head = head_s(h, d, slots),
	       measured = afd__plan_timed(h->p, "head", d->name, slots, 0);

	head = measured >= 0 ? measured * 1e-6 : head;
	*weights_s = fmax(h->attention_weights / d->hbm_bytes_per_s,
			     2 * m->attention_params * slots / d->flops) +
		     head;
	if (us >= 0)
		return us * 1e-6 * m->n_layers + head;
	return *weights_s +
	       slots * fmax(afd__plan_kv_bytes(h, context) / d->hbm_bytes_per_s, flops / d->flops);
}

/* Experts that n rows meet, when each row picks top_k of them evenly. */
static double experts_met(const struct afd_plan_model *m, double rows)
{
	return m->n_experts * -expm1(rows * log1p(-(double)m->top_k / m->n_experts));
}

double afd__plan_ffn_s(const struct afd__plan_hardware *h, const struct afd_plan_device *d,
	double rows, uint32_t n_devices)
{
	const struct afd_plan_model *m = h->m;
	double us = afd__plan_timed(h->p, "ffn", d->name, rows, 0), hidden = m->hidden_size;
	double dense = (double)(m->n_layers - m->n_moe_layers) * 3 * hidden * m->intermediate_size;
	double row_params = dense, met_params = dense;

	if (us >= 0)
		return us * 1e-6 * m->n_layers / n_devices;
	if (m->n_moe_layers) {
		double shared = (3.0 * m->shared_size + m->n_experts) * hidden * m->n_moe_layers;
		double expert = 3.0 * hidden * m->expert_size * m->n_moe_layers;

		row_params += shared + expert * m->top_k;
		met_params += shared + (m->top_k < m->n_experts ? expert * experts_met(m, rows)
								: expert * m->n_experts);
	}
	return fmax(met_params * h->p->weight_bytes / d->hbm_bytes_per_s,
		       2 * row_params * rows / d->flops) /
	       n_devices;
}

/* Dense rows go to every shard; routed ones to those that hold their experts. */
static double copies_of(const struct afd_plan_model *m, uint32_t n_ffn)
{
	double routed = n_ffn > 1 ? n_ffn * -expm1(m->top_k * log1p(-1.0 / n_ffn)) : 1;
	double moe = m->n_moe_layers, dense = m->n_layers - moe;

	return (dense * n_ffn + moe * (m->shared_size ? n_ffn : routed)) / m->n_layers;
}

double afd__plan_exchange_s(const struct afd__plan_hardware *h, double rows, uint32_t n_attention,
	uint32_t n_ffn, double bytes, double attention_bytes_per_s, double ffn_bytes_per_s)
{
	double sent = rows * h->m->hidden_size * bytes * copies_of(h->m, n_ffn);
	double us = afd__plan_timed(h->p, "exchange", NULL, rows, 0);
	double layer;

	if (us >= 0)
		return us * 1e-6 * h->m->n_layers;
	layer = fmax(sent / attention_bytes_per_s, sent * n_attention / n_ffn / ffn_bytes_per_s);
	return (layer + h->p->latency_us * 1e-6) * h->m->n_layers;
}
