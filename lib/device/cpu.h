/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A job of the CPU backend: an operation, or a step of one, as a range of units that stand alone.
 * cpu.c cuts it over threads and time; cpu_experts.c makes several of one operation.
 */
#ifndef AFD_LIB_DEVICE_CPU_H
#define AFD_LIB_DEVICE_CPU_H

#include "../../kernels/cpu/kernels.h"
#include "backends.h"

enum afd__operation {
#define KIND(op) AFD__OPERATION_##op,
	AFD__DEVICE_OPERATIONS(KIND) AFD__N_OPERATIONS
#undef KIND
};

struct afd__job {
	const struct afd_cpu_kernels *kernels;
	const void *args;
	void (*run)(const struct afd__job *job, uint32_t from, uint32_t to);
	uint32_t n_units;
	uint32_t round_from, round_units, n_tasks;
	double cost;              /* multiply-adds or so, of all units */
	enum afd__operation kind; /* whose speed is known */
};

void afd__job_run(struct afd__queue *q, struct afd__job *job);

/* Units of a product are panels, in place too. */
static inline uint32_t afd__product_panels(const struct afd__matrix *m)
{
	return (uint32_t)(((uint64_t)m->n + AFD_K_PANEL - 1) / AFD_K_PANEL);
}

/* Panels panel0 .. panel1-1 of a product, in a task of the job. */
void afd__product_run(const struct afd__job *job, const struct afd__product_args *a,
	uint32_t panel0, uint32_t panel1);

/* cpu_experts.c */
int afd__cpu_experts(struct afd__queue *q, const struct afd__experts_args *a);
size_t afd__cpu_experts_scratch_bytes(
	struct afd__device *dev, const struct afd__experts_args *a, bool least);

#endif
