/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Planning: how many attention workers per FFN, what the network allows, and when not to split at
 * all. Pure functions: no handle, no state, no allocation; arrays and scratch are the caller's. All
 * errors are those of context.h, and their text names the field, its value and its limit.
 *
 * Times may be in any unit, the same for all; they are of one layer, or of a whole step, but of one
 * of them throughout. Sizes in bytes, rates in bytes or operations per second, where a name does
 * not say otherwise.
 *
 * Where a formula comes from:
 *   [sizing]    "Analytical Provisioning for Attention-FFN Disaggregated LLM Serving under
 *               Stochastic Workloads", arXiv 2601.21351; equation numbers 14 to 20 are those of its
 *               first version
 *   [roofline]  arXiv 2602.09721, on communication and imbalance of this split
 *   [megascale] MegaScale-Infer, arXiv 2504.02263, section 4
 *   [step3]     Step-3, arXiv 2507.19427
 *   [ours]      derived here; docs/planning.md says how
 */
#ifndef AFD_PLAN_H
#define AFD_PLAN_H

#include "context.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- the workload ---- */

/* Laws of whole numbers: a draw of the continuous law is rounded, prompts to the nearest, outputs
 * up to 1 or more, and cut at max. */
enum afd_plan_law_kind {
	AFD_PLAN_CONSTANT = 1,     /* mean */
	AFD_PLAN_GEOMETRIC = 2,    /* on 1, 2, ...; mean >= 1 */
	AFD_PLAN_EXPONENTIAL = 3,  /* mean */
	AFD_PLAN_LOGNORMAL = 4,    /* mean; shape: the coefficient of variation */
	AFD_PLAN_PARETO = 5,       /* mean without the cut; shape: the tail index, over 1 */
	AFD_PLAN_UNIFORM = 6,      /* shape .. 2 mean - shape */
	AFD_PLAN_PROPORTIONAL = 7, /* outputs only: mean times the prompt's draw; a joint law */
};

struct afd_plan_law {
	int32_t kind; /* enum afd_plan_law_kind; 0: none */
	uint32_t max; /* the largest draw; 0 means 1048576 */
	double mean;
	double shape;
};

/* A row of a trace. */
struct afd_plan_request {
	uint32_t prompt_tokens; /* 0 .. 100000000 */
	uint32_t output_tokens; /* 1 .. 100000000: the steps that the request keeps its slot */
};

/* One of three: theta and nu2; two laws; a trace, whose pairs are kept. */
struct afd_plan_workload {
	size_t size;
	double theta; /* mean KV positions of a slot, seen at a random step */
	double nu2;   /* their variance */
	struct afd_plan_law prompt;
	struct afd_plan_law output; /* of lifetimes: decode steps of a request, 1 or more */
	const struct afd_plan_request *requests; /* [n_requests] */
	size_t n_requests;                       /* at most 100000000 */
	uint32_t request_bytes;                  /* sizeof(struct afd_plan_request) */
	uint32_t _pad;
};

struct afd_plan_load {
	size_t size;
	double theta, nu2;
	double mean_prompt, mean_output; /* 0 when theta was given */
	double biased_output; /* mean lifetime of the request that a random step meets: the
				 time that an empty start needs to forget itself; 0 unknown */
};

/*
 * theta = E[D P + D(D-1)/2] / E[D], nu2 = E[D P^2 + P D(D-1) + D(D-1)(2D-1)/6] / E[D] - theta^2:
 * renewal-reward over a slot's life [sizing, later versions]. Of a trace the sums over its rows
 * replace E. "Mean prompt + mean output" is another number, and a wrong one.
 */
AFD_API int afd_plan_average(const struct afd_plan_workload *workload, struct afd_plan_load *out);

/* ---- sizing: r attention workers per FFN ---- */

enum afd_plan_scope {
	AFD_PLAN_WORKER = 1, /* the default: communication takes alpha_c B + beta_c */
	AFD_PLAN_BUNDLE = 2, /* alpha_c r B + beta_c: one link carries the rows of all workers */
};

/* What a cycle is bound by; what a choice is limited by. */
enum afd_plan_bound {
	AFD_PLAN_ATTENTION = 1,
	AFD_PLAN_FFN = 2,
	AFD_PLAN_COMMUNICATION = 3,
	AFD_PLAN_LATENCY = 4, /* too few lanes to hide one stage behind another */
	AFD_PLAN_DEVICES = 5, /* processes that share devices */
};

enum afd_plan_constraint {
	AFD_PLAN_FREE = 1,  /* nothing but the times */
	AFD_PLAN_RANGE = 2, /* r_min or r_max */
	AFD_PLAN_SLO = 3,
	AFD_PLAN_KV_MEMORY = 4,
	AFD_PLAN_FFN_MEMORY = 5,
};

/* A point of a measured FFN: the time of a pass over `rows` rows. */
struct afd_plan_knot {
	double rows, time;
};

struct afd_plan_params {
	size_t size;
	double alpha_a, beta_a; /* attention of one lane: alpha_a B theta + beta_a */
	double alpha_f, beta_f; /* FFN of the rows of all workers: alpha_f r B + beta_f */
	double alpha_c, beta_c; /* rows from one side to the other, one direction */
	double ffn_floor;       /* a roofline: max(ffn_floor, alpha_f r B) + beta_f */
	const struct afd_plan_knot *ffn_knots; /* [n_ffn_knots], rows ascending: instead of alpha_f
						  and ffn_floor; between them and beyond the last it
						  is linear, before the first constant */
	uint32_t n_ffn_knots;                  /* 0, or 2 .. 4096 */
	uint32_t knot_bytes;                   /* sizeof(struct afd_plan_knot) */
	int32_t comm_scope;                    /* enum afd_plan_scope */
	uint32_t half_duplex;                  /* 1: both directions share the link */
	uint32_t lanes;        /* 1 .. 64; 0: as many as hide all latency, the paper's max form */
	uint32_t layers;       /* that follow each other until a token; 0 means 1: times are of a
				  whole step */
	double batch;          /* B: slots per worker and lane, 0 < B <= 1e7 */
	double cost_a, cost_f; /* of a worker and of the FFN: devices, or money; 0 means 1 */
	uint32_t r_min, r_max; /* 0 means 1, and 64; at most 65536 */
	uint32_t y_max;        /* FFNs of a bundle that are tried; 0 means 8; at most 64 */
	uint32_t devices;      /* compute devices that all processes share; 0: each has its own */
	double tpot_limit;     /* longest time per output token; 0: none */
	double accept;         /* tokens that a step yields, with speculation; 0 means 1 */
	double kv_bytes_per_token, attention_weight_bytes;
	double attention_memory_bytes; /* of a worker; 0: no limit */
	double ffn_row_bytes, ffn_weight_bytes;
	double ffn_memory_bytes; /* 0: no limit */
};

/* One ratio. Throughput is tokens per time and cost: r B / ((r cost_a + cost_f) tau). */
struct afd_plan_point {
	size_t size;
	double r;
	double t_a, t_f, t_c;  /* t_c: one direction */
	double tau_mean_field; /* the time from frame to frame at mean load: lower bound */
	double tau_gaussian;   /* with the barrier of r workers of random load, in lock step:
				  upper bound */
	double throughput_mean_field, throughput_gaussian; /* the bracket */
	double idle_a, idle_f;                             /* at mean load */
	double tpot;    /* layers * lanes * tau_mean_field / accept */
	int32_t bound;  /* enum afd_plan_bound */
	uint32_t lanes; /* those asked for, or as many as hide all latency */
};

/*
 * The cycle at r (a real number: x attention workers with y FFNs have r = x / y):
 *   tau = max{ t_a, t_f, t_link, (t_a + t_f + 2 t_c) / lanes }      [ours; equation 3 of megascale]
 * without the last term at lanes 0 [sizing]. t_link is t_c, or 2 t_c half duplex. The Gaussian one
 * is E[max{...}] with t_a the largest of r independent normal loads, alpha_a sqrt(B nu2) each
 * [sizing, later versions; the integral is ours].
 */
AFD_API int afd_plan_evaluate(const struct afd_plan_params *params,
	const struct afd_plan_load *load, double r, struct afd_plan_point *out);

struct afd_plan_sizing {
	size_t size;
	double r_continuous; /* the best real ratio, from 1 / y_max on */
	double throughput_continuous;
	uint32_t r;           /* the best whole one at mean load; 0: none keeps the limits */
	uint32_t r_gaussian;  /* the same for workers in lock step */
	uint32_t x, y;        /* the best bundle of x attention workers and y FFNs, y <= y_max */
	int32_t bound;        /* enum afd_plan_bound, at r; or at r_continuous when r is 0 */
	int32_t constraint;   /* enum afd_plan_constraint: what keeps r from being larger or the
				 batch as it is */
	double r_limit;       /* the largest ratio that keeps SLO and FFN memory; 0: none */
	double batch_limit;   /* the largest batch that KV memory takes; 0: no limit was given */
	uint32_t ffn_limited; /* 1: less than one worker keeps an FFN busy; look at x and y */
	uint32_t heavy_tail;  /* 1: nu2 > 4 theta^2 and batch * lanes < 500; the Gaussian
				 understates the barrier. Trust the simulation */
	double r_attention, r_communication, r_peak; /* the paper's terms (equations 15, 16, 18);
							HUGE_VAL where the slope is 0 */
};

/* Theorem 4.4 of [sizing] and its form for few lanes, limits and an FFN of several pieces [ours]:
 * all crossings of two terms and all peaks are tried, so the result is exact. */
AFD_API int afd_plan_size(const struct afd_plan_params *params, const struct afd_plan_load *load,
	struct afd_plan_sizing *out);

/* ---- simulation ---- */

enum afd_plan_start {
	AFD_PLAN_STATIONARY = 1, /* the default: slots as a random step finds them */
	AFD_PLAN_EMPTY = 2,      /* all slots begin a request: as the paper does it */
};

enum afd_plan_flow {
	AFD_PLAN_PIPELINED = 1, /* the default: a worker goes on when its own rows are back */
	AFD_PLAN_LOCK_STEP = 2, /* all wait for the slowest in every frame */
};

enum afd_plan_replay {
	AFD_PLAN_SHUFFLED = 1, /* the default: rows of the trace with replacement */
	AFD_PLAN_IN_ORDER = 2, /* one after the other, from the first again after the last */
};

/* When a stage was busy, for a timeline. */
struct afd_plan_span {
	double start, end;
	uint32_t stage;  /* enum afd_plan_bound: attention, FFN or communication */
	uint32_t worker; /* of attention; 0 else */
	uint32_t lane;
	uint32_t step;
};

struct afd_plan_simulate_params {
	size_t size;
	uint32_t r;          /* 1 .. 65536 */
	uint32_t n_seeds;    /* 0 means 8; at most 4096 */
	uint64_t seed;       /* the first; the others follow. Worker j sees the same requests at
				any r */
	uint64_t n_requests; /* that a worker finishes on average; 0 means 3000 */
	int32_t start;       /* enum afd_plan_start */
	int32_t flow;        /* enum afd_plan_flow */
	int32_t replay;      /* enum afd_plan_replay */
	uint32_t span_bytes; /* sizeof(struct afd_plan_span) */
	struct afd_plan_span *spans; /* [span_room] of the first seed's first steps, or NULL */
	size_t span_room;
	void *scratch; /* afd_plan_simulate_bytes(), aligned to 64 */
	size_t scratch_bytes;
};

struct afd_plan_simulation {
	size_t size;
	double throughput; /* per time and cost: mean over seeds */
	double ci95;       /* half the width of its 95 % interval (Student); 0 with one seed */
	double tau;        /* mean time from frame to frame */
	double theta;      /* mean load that the slots had */
	double tpot_p50, tpot_p99; /* of finished requests: from slot to last token, per token; bins
				      of 0.2 % */
	double idle_a, idle_f, idle_c; /* idle_c: of the busier direction */
	uint64_t n_slot_updates, n_finished;
	size_t n_spans;     /* written */
	uint32_t short_run; /* 1: an empty start that had no time to forget itself */
	uint32_t _pad;
};

/* Bytes of scratch; 0 on an error, see afd_last_error(). */
AFD_API size_t afd_plan_simulate_bytes(const struct afd_plan_params *params,
	const struct afd_plan_workload *workload, const struct afd_plan_simulate_params *simulate);
/*
 * Every slot of every worker and lane, step by step; the pipeline is its max-plus recursion, which
 * is exact [ours]. The workload is laws or a trace (with theta and nu2 alone there is nothing to
 * draw: -EINVAL); batch is a whole number. -ENOTSUP: devices,
 * half_duplex.
 */
AFD_API int afd_plan_simulate(const struct afd_plan_params *params,
	const struct afd_plan_workload *workload, const struct afd_plan_simulate_params *simulate,
	struct afd_plan_simulation *out);

/* ---- devices and models ---- */

struct afd_plan_device {
	size_t size;
	const char *name;       /* "H800" */
	const char *source;     /* where the numbers come from */
	double flops;           /* dense operations per second, FP8 where the device has it */
	double hbm_bytes_per_s; /* of the memory that holds weights and KV */
	double memory_bytes;
	double scale_up_bytes_per_s; /* one direction, per device, as a program reaches it */
	double scale_out_bytes_per_s;
	double price; /* per hour or relative; 0 unknown */
	uint32_t devices_per_node;
	uint32_t _pad;
};

struct afd_plan_model {
	size_t size;
	const char *name;
	const char *source;
	uint32_t hidden_size, n_layers;
	uint32_t n_moe_layers;      /* the others are dense */
	uint32_t intermediate_size; /* of a dense layer */
	uint32_t expert_size;       /* width of a routed expert; 0: none */
	uint32_t shared_size;       /* width of the shared experts together */
	uint32_t n_experts, top_k;
	uint32_t vocab_size;
	uint32_t tied_head;
	double attention_params;                  /* projections of all layers */
	double kv_numbers_per_token;              /* of all layers that see all positions */
	double attention_flops_per_position;      /* one query row against one position, likewise */
	double sliding_kv_numbers, sliding_flops; /* the same of layers with a window */
	uint32_t sliding_window;
	uint32_t _pad;
};

/* Built in, by name (upper and lower case are one; -ENOENT lists the names) or by index from 0
 * (-ENOENT beyond the last). Strings are static. */
AFD_API int afd_plan_find_device(const char *name, struct afd_plan_device *out);
AFD_API int afd_plan_find_model(const char *name, struct afd_plan_model *out);
AFD_API int afd_plan_device_at(uint32_t index, struct afd_plan_device *out);
AFD_API int afd_plan_model_at(uint32_t index, struct afd_plan_model *out);

/* ---- communication roofline ---- */

struct afd_plan_roofline_params {
	size_t size;
	uint32_t hidden_size, expert_size, n_experts, top_k, n_layers;
	uint32_t ffn_nodes;                  /* N_F, 1 .. 65536 */
	uint32_t attention_nodes;            /* 0: as many as are needed */
	uint32_t devices_per_node;           /* 0 means 8 */
	uint32_t attention_devices_per_node; /* 0: as the FFN's */
	uint32_t lanes;                      /* micro-batches of a layer; 0 means 3 */
	double flops, hbm_bytes_per_s;       /* of one device of the FFN */
	double scale_up_bytes_per_s, scale_out_bytes_per_s;
	double attention_scale_out_bytes_per_s; /* of an unlike device on that side; 0: the same */
	double slo_ms;                          /* per output token */
	double accept;                          /* tokens that a step yields; 0 means 1 */
	double overhead_ms;                     /* of a step, outside the layers */
	double lambda; /* attention time over FFN time of large-scale EP, for the
			  comparison; 0 means 3 */
};

enum afd_plan_region {
	AFD_PLAN_SCALE_UP = 1,         /* N_F < N1 */
	AFD_PLAN_STABLE_INTENSITY = 2, /* N1 .. N2 */
	AFD_PLAN_SCALE_OUT = 3,        /* N2 .. N3 */
	AFD_PLAN_MAX_INTENSITY = 4,    /* N3 and more */
};

struct afd_plan_roofline {
	size_t size;
	uint32_t feasible; /* 0: reading the weights alone takes longer than t_b */
	int32_t region;    /* enum afd_plan_region */
	double t_b_ms;     /* the budget of one lane at one layer */
	double rank_batch; /* routed (row, expert) pairs of a device and lane */
	uint32_t experts_per_rank;
	uint32_t _pad;
	double intensity; /* operations per byte of weights: 2 rank_batch / experts_per_rank */
	double ofu;       /* use of the operators while they run */
	double temporal_sparsity; /* the share of the budget in which they run */
	double hfu;               /* ofu * temporal_sparsity */
	double ceiling, floor;    /* of hfu, bound by scale-up and by scale-out */
	double breakpoints[3];    /* N1 = top_k * out / up, N2 = top_k, N3 = n_experts / devices */
	double dead_zone_from;    /* from this N_F on more nodes never raise hfu; 0: no dead zone */
	double ep_hfu;            /* large-scale EP, whose communication hides behind attention too:
				     (lambda + 1) times the scale-out bound [ours] */
};

/* Equations of [roofline] for a batch that fills the network within t_b, where
 * slo * accept = overhead + n_layers * lanes * t_b; dispatch in FP8, combine in BF16, weights FP8.
 */
AFD_API int afd_plan_roofline(
	const struct afd_plan_roofline_params *params, struct afd_plan_roofline *out);

struct afd_plan_imbalance {
	size_t size;
	double ep;  /* throughput that is left under expert imbalance: large-scale EP, */
	double afd; /* AFD with whole nodes, the better of the two below, */
	double afd_continuous, afd_floor, afd_ceil;
	double dp_ep, dp_afd; /* and under imbalance of the attention's data parallelism */
};

/* sigma = mean over maximal load, 0 < sigma <= 1; lambda: attention over FFN time of EP, 0 means
 * attention_nodes / ffn_nodes. [roofline]; the discrete forms and dp_ep are ours. */
AFD_API int afd_plan_balance(double sigma, uint32_t attention_nodes, uint32_t ffn_nodes,
	double lambda, struct afd_plan_imbalance *out);

/* ---- conditions of others ---- */

struct afd_plan_pipeline_params {
	size_t size;
	double t_a, t_f, t_c; /* of one layer and lane; t_c one direction */
	uint32_t lanes, n_layers;
	double k1, k3; /* slopes of attention and expert time per row; both 0: no n_a */
	uint32_t n_experts, top_k;
};

struct afd_plan_pipeline {
	size_t size;
	uint32_t min_lanes;     /* 2 (1 + t_c / t_f), rounded up; t_f the longer of both stages */
	uint32_t hidden;        /* 1: t_c < t_f and lanes >= min_lanes: equations 2 and 3 */
	double iteration;       /* equation 5 */
	double attention_nodes; /* n_a = k1 E / (k3 K) */
	uint32_t no_bubbles;    /* the three conditions of 3 lanes of [roofline] hold */
	uint32_t _pad;
};
/* [megascale] equations 1 to 5. */
AFD_API int afd_plan_pipeline(
	const struct afd_plan_pipeline_params *params, struct afd_plan_pipeline *out);

/* The least share of experts that a row must meet for the network to keep up: S >= H * flops * L /
 * (net * memory rate * time) [step3, table 7]. net is that of a server in bytes/s; stage_s the time
 * of one of the three stages summed over layers, of which two thirds move rows. */
AFD_API int afd_plan_sparsity(double hidden_size, double n_layers, double flops,
	double hbm_bytes_per_s, double net_bytes_per_s, double stage_s, double *out);

/* ---- the report ---- */

/* A measured time, as afd-plan calibrate and the converter write it. */
struct afd_plan_time {
	char stage[16]; /* "attention", "ffn", "exchange", "head" */
	char device[48];
	char dtype[16];
	double rows, context;
	double us; /* of one layer (of a head: once) */
};

struct afd_plan_report_params {
	size_t size;
	const struct afd_plan_model *model;
	const struct afd_plan_device *attention_device;
	const struct afd_plan_device *ffn_device; /* NULL: the same */
	uint32_t n_attention, n_ffn; /* devices; those of the FFN hold one shard each of one FFN */
	uint32_t lanes;              /* 1 .. 4; 0: the best of them */
	uint32_t slots;              /* sequences of an attention device; 0: as many as fit, at most
					slots_max */
	uint32_t slots_max;          /* 0 means 256 */
	double context;              /* theta */
	double nu2;                  /* 0: all contexts alike, no barrier */
	double slo_ms;               /* 0: none */
	double accept;               /* 0 means 1 */
	double weight_bytes;         /* of one number; 0 means 1 */
	double kv_bytes;             /* of one number; 0 means 2 */
	double row_bytes_up, row_bytes_down; /* of one number of a row; 0 means 1 and 2 */
	double memory_share; /* of the device that weights and KV may fill; 0 means 0.9 */
	double latency_us;   /* of one message */
	const struct afd_plan_time *times; /* [n_times] measured: they replace the data sheet where
					      a stage has any */
	size_t n_times;
	uint32_t time_bytes; /* sizeof(struct afd_plan_time) */
	uint32_t group_max;  /* devices that may share an FFN in colocation; 0: all, 1: data
				parallel alone */
};

struct afd_plan_report {
	size_t size;
	double tokens_per_second, tokens_per_second_per_device;
	double colocated_per_device; /* the best colocation on the same devices */
	double colocated_step_ms;
	uint32_t colocated_slots; /* of one device */
	uint32_t colocated_group; /* devices that share the experts or the width */
	double speedup_per_device;
	double low, high; /* the bracket of tokens_per_second */
	double tpot_ms;
	double t_a_ms, t_f_ms, t_c_ms, tau_ms; /* of a step, one lane; t_c one direction */
	double t_a_weights_ms, t_a_kv_ms;      /* parts of t_a */
	double idle_a, idle_f;
	uint32_t slots, lanes;   /* chosen: sequences of an attention device */
	int32_t bound;           /* enum afd_plan_bound */
	int32_t constraint;      /* enum afd_plan_constraint: what keeps the batch from growing;
				    FREE: nothing below slots_max */
	uint32_t use;            /* 1: low still beats colocation per device */
	uint32_t feasible;       /* 0: weights or SLO do not fit; the rest is 0 */
	uint32_t measured;       /* bits: 1 attention, 2 ffn, 4 exchange came from times */
	uint32_t best_attention; /* attention devices that would be best for n_ffn */
	double best_speedup;
	double speedup_network; /* with twice the network */
	double speedup_memory;  /* with twice the memory on the attention side */
	double speedup_context; /* with four times the context */
};

/* Times of stages, and what they come to per device against colocation on the same devices [ours;
 * formulas in docs/planning.md]. */
AFD_API int afd_plan_report(
	const struct afd_plan_report_params *params, struct afd_plan_report *out);

/* A number of the speed-up tables for Qwen3-32B-FP8 on H20-3e that went with ai-dynamo/dynamo#6570.
 */
struct afd_plan_claim {
	size_t size;
	char name[64];
	double printed;    /* NAN: not printed */
	double reproduced; /* by the formula of the tables */
	double corrected;
	const char *unit; /* "x", "ms", "" */
	const char *reason;
};
/* The claim with this index, from 0; -ENOENT beyond the last. unit and reason are static. */
AFD_API int afd_plan_claim_at(uint32_t index, struct afd_plan_claim *out);

/* ---- measured data ---- */

/* Ordinary least squares of y = alpha x + beta over n points, n >= 2 with two different x. */
struct afd_plan_line {
	size_t size;
	double alpha, beta;
	double r2;
	double residual_p95; /* of |y - fit|, in the unit of y */
	double residual_max;
};
/* -EDOM: a slope below 0 by more than noise; within it, it is set to 0. With an intercept below 0
 * the line is fitted through 0; r2 and residuals are those of the line that is given. */
AFD_API int afd_plan_fit(const double *x, const double *y, size_t n, struct afd_plan_line *out);

/*
 * A trace as CSV with a header line, or JSONL: columns prompt_tokens and output_tokens, or the
 * Azure LLM trace's ContextTokens and GeneratedTokens; others are skipped. Fills rows[room] and
 * returns how many there are, or -ENOSPC with *n_rows set to how many there would be (rows may be
 * NULL with room 0). *n_rows is set on success too.
 * -EBADMSG: the text names line, column and value.
 */
AFD_API int afd_plan_parse_trace(const char *text, size_t n_bytes, struct afd_plan_request *rows,
	size_t room, size_t *n_rows);
/* Measured times: CSV with a header line stage,device,dtype,rows,context,us, or JSON, a list of
 * objects with these keys, or an object with such a list under "times". Results as above. */
AFD_API int afd_plan_parse_times(const char *text, size_t n_bytes, struct afd_plan_time *times,
	size_t room, size_t *n_times);
/* A calibration's JSON: sets alpha_a, which it must have, and of alpha_f .. beta_c, ffn_floor,
 * batch, lanes, layers and devices those that it has. */
AFD_API int afd_plan_parse_calibration(
	const char *text, size_t n_bytes, struct afd_plan_params *params);

#ifdef __cplusplus
}
#endif

#endif
