/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the planner share: checked fields, laws of whole numbers, the barrier's
 * integral and the cycle time. Everything is a pure function of its arguments; the fields of a
 * params struct are checked and their defaults filled in once, by the function that reads it.
 */
#ifndef AFD_LIB_PLAN_H
#define AFD_LIB_PLAN_H

#include <stdbool.h>

#include <afd/plan.h>

#include "../context/core.h"

/* ---- check.c ---- */

/* -EINVAL "plan: field is VALUE, limit MIN .. MAX"; NaN is outside any limit. */
int afd__plan_real(const char *field, double value, double min, double max);
int afd__plan_whole(const char *field, uint64_t value, uint64_t min, uint64_t max);
/* The same as above with 0 replaced by a default first. */
int afd__plan_real_or(const char *field, double *value, double fallback, double min, double max);
int afd__plan_whole_or(
	const char *field, uint32_t *value, uint32_t fallback, uint32_t min, uint32_t max);

/* ---- laws.c ---- */

#define AFD__PLAN_MAX_TOKENS 100000000u
#define AFD__PLAN_MAX_DRAW   1048576u /* without a max of the law's own */

struct afd__plan_moments {
	double m1, m2, m3; /* E[N], E[N^2], E[N^3] */
};

/* Checks a law and fills in its max. */
int afd__plan_law_read(struct afd_plan_law *law, const char *what);
/* P(X > x) of the continuous law, uncut. */
double afd__plan_law_above(const struct afd_plan_law *law, double x);
/* Of draws rounded to the nearest (prompts), or up to 1 or more (outputs); cut at max. */
void afd__plan_law_moments(
	const struct afd_plan_law *law, bool is_output, struct afd__plan_moments *out);
/* Lognormal: mu and sigma of the logarithm. */
void afd__plan_lognormal(const struct afd_plan_law *law, double *mu, double *sigma);

/* ---- average.c ---- */

/* Copies and checks; laws have their max. */
int afd__plan_workload_read(struct afd_plan_workload *out, const struct afd_plan_workload *in);
int afd__plan_load_read(struct afd_plan_load *out, const struct afd_plan_load *in);
const struct afd_plan_request *afd__plan_request_at(const struct afd_plan_workload *w, size_t i);
/* The lifetime of a proportional law. */
uint32_t afd__plan_proportional(const struct afd_plan_law *output, double prompt);

/* ---- barrier.c ---- */

/* The integral of 1 - Phi(x)^r from z on: what a maximum of r normal variables exceeds z by. */
double afd__plan_excess(double z, double r);

/* The cycle as a function of the slowest worker's time w: max(floor, w, (w + rest) / lanes),
 * without the last term at lanes 0. */
struct afd__plan_cycle {
	double floor, rest;
	double lanes;
};
double afd__plan_cycle_at(const struct afd__plan_cycle *cycle, double w);
/* Its mean over the largest of r normal times. */
double afd__plan_cycle_mean(
	const struct afd__plan_cycle *cycle, double mean, double sigma, double r);

/* ---- cycle.c ---- */

int afd__plan_params_read(struct afd_plan_params *out, const struct afd_plan_params *in);
const struct afd_plan_knot *afd__plan_knot_at(const struct afd_plan_params *p, uint32_t i);
double afd__plan_t_a(const struct afd_plan_params *p, double theta);
double afd__plan_t_f(const struct afd_plan_params *p, double rows);
double afd__plan_t_c(const struct afd_plan_params *p, double r);
/* tau_mean_field of checked params. */
double afd__plan_tau(const struct afd_plan_params *p, const struct afd_plan_load *load, double r);
double afd__plan_throughput(const struct afd_plan_params *p, double r, double tau);
/* Lanes that hide all latency at these times. */
uint32_t afd__plan_hiding_lanes(double t_a, double t_f, double t_c);
void afd__plan_fill(const struct afd_plan_params *p, const struct afd_plan_load *load, double r,
	struct afd_plan_point *point);

/* ---- draw.c ---- */

/* PCG-XSH-RR (O'Neill 2014): 64 bits of state, one stream per worker and lane. */
struct afd__plan_random {
	uint64_t state, stream;
};
void afd__plan_random_seed(struct afd__plan_random *random, uint64_t seed, uint64_t stream);
uint32_t afd__plan_random_bits(struct afd__plan_random *random);
/* Uniform in (0, 1), 32 bits. */
double afd__plan_random_real(struct afd__plan_random *random);
uint32_t afd__plan_random_below(struct afd__plan_random *random, uint32_t n);

/* Draws requests. in_order is the next row of an ordered replay. */
struct afd__plan_source {
	const struct afd_plan_workload *workload;
	const double *until; /* [n_requests]: lifetimes of a trace, summed; NULL for laws */
	size_t in_order;
	bool ordered;
};
struct afd_plan_request afd__plan_draw(
	struct afd__plan_source *source, struct afd__plan_random *random);
/* With probability proportional to its lifetime: the request that a random step meets. */
struct afd_plan_request afd__plan_draw_biased(
	struct afd__plan_source *source, struct afd__plan_random *random);

/* ---- slots.c ---- */

/* The slots of one worker and lane. load is the sum of prompt and age over them. */
struct afd__plan_slots {
	struct afd__plan_random random;
	double load;
	uint32_t n_slots;
	uint32_t _pad;
	uint32_t *left;     /* [n_slots] steps until the request ends */
	uint32_t *prompt;   /* [n_slots] */
	uint32_t *lifetime; /* [n_slots] */
	double *since;      /* [n_slots] when the request got its slot; < 0: before the start */
};

/* Times per output token, in bins of equal ratio. */
enum { AFD__PLAN_BINS = 8192 };
struct afd__plan_bins {
	double low; /* lower end of the first bin */
	uint64_t n;
	uint64_t *counts; /* [AFD__PLAN_BINS] */
};
void afd__plan_bins_add(struct afd__plan_bins *bins, double value);
double afd__plan_bins_at(const struct afd__plan_bins *bins, double p);

void afd__plan_slots_fill(
	struct afd__plan_slots *slots, struct afd__plan_source *source, bool stationary);
/* One step of all slots that ends at `now`; bins NULL: finished requests are not counted. Returns
 * how many ended. */
uint32_t afd__plan_slots_step(struct afd__plan_slots *slots, struct afd__plan_source *source,
	double now, struct afd__plan_bins *bins);

/* ---- hardware.c: the times of a model on devices ---- */

struct afd__plan_hardware {
	const struct afd_plan_report_params *p;
	const struct afd_plan_model *m;
	double attention_weights, ffn_weights, embed_weights; /* bytes */
};
void afd__plan_hardware_open(struct afd__plan_hardware *h, const struct afd_plan_report_params *p);
double afd__plan_kv_bytes(const struct afd__plan_hardware *h, double context);
/* Seconds of a step: attention of `slots` sequences; FFN of `rows` rows on n_devices together. */
double afd__plan_attention_s(const struct afd__plan_hardware *h, const struct afd_plan_device *d,
	double slots, double context, double *weights_s);
double afd__plan_ffn_s(const struct afd__plan_hardware *h, const struct afd_plan_device *d,
	double rows, uint32_t n_devices);
/* Rows one way: of n_from devices with `rows` each to n_to devices. */
double afd__plan_exchange_s(const struct afd__plan_hardware *h, double rows, uint32_t n_attention,
	uint32_t n_ffn, double bytes, double out_bytes_per_s, double in_bytes_per_s);

/* ---- times.c ---- */

enum { AFD__PLAN_TIMED_ATTENTION = 1, AFD__PLAN_TIMED_FFN = 2, AFD__PLAN_TIMED_EXCHANGE = 4 };
const struct afd_plan_time *afd__plan_time_at(const struct afd_plan_report_params *p, size_t i);
/* Microseconds of a layer, from measured times; a stage or device that has none: -1. */
double afd__plan_timed(const struct afd_plan_report_params *p, const char *stage,
	const char *device, double rows, double context);

#endif
