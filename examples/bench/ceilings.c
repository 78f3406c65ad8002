/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The probes (ceilings.h). Reading takes several streams per thread and fetches ahead where that
 * helps: one stream is 10 to 20 % below what DRAM gives. Multiply-adds run on registers alone.
 */
#include "ceilings.h"

#include <string.h>

#include "../../kernels/cpu/product_drive.h"
#include "../tool/options.h"

#define PROBE_BYTES      ((size_t)64 << 20)
#define TASKS_PER_THREAD 4
#define FMA_STEPS        100000
#define FMA_ACCUMULATORS 12 /* more than latency times ports, and few enough for 16 registers */

const struct bench_pattern bench_patterns[BENCH_PATTERNS] = {
	{ 1, 0 },
	{ 2, 0 },
	{ 4, 0 },
	{ 8, 0 },
	{ 1, 4096 },
	{ 1, 12288 },
	{ 2, 2048 },
	{ 4, 1024 },
};

static void pause_task(void *arg, uint32_t index)
{
	uint64_t until = afd__now_ns() + 20000;

	while (afd__now_ns() < until)
		continue;
}

/* Threads that fell asleep during another probe are awake when the clock starts. */
static void wake_threads(const struct bench_ceilings *c)
{
	afd__parallel(c->ctx, c->ctx->executor.n_threads * TASKS_PER_THREAD, pause_task, NULL);
}

/* ---- reading ---- */

typedef uint64_t line_part __attribute__((vector_size(16)));

struct reading {
	const char *memory;
	size_t task_bytes, stream_bytes;
	struct bench_pattern pattern;
	_Atomic uint64_t sum; /* so that nothing is optimised away */
};

static void read_task(void *arg, uint32_t index)
{
	struct reading *r = arg;
	const char *from = r->memory + index * r->task_bytes;
	size_t stream_bytes = r->stream_bytes, ahead = r->pattern.prefetch_bytes;
	line_part sum[4] = { { 0 } };

	for (size_t at = 0; at < stream_bytes; at += 128) {
		for (int i = 0; i < r->pattern.n_streams; i++) {
			const line_part *p = (const line_part *)(from + i * stream_bytes + at);

			if (ahead) {
				__builtin_prefetch((const char *)p + ahead);
				__builtin_prefetch((const char *)p + ahead + 64);
			}
			sum[0] ^= p[0] ^ p[4];
			sum[1] ^= p[1] ^ p[5];
			sum[2] ^= p[2] ^ p[6];
			sum[3] ^= p[3] ^ p[7];
		}
	}
	sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
	atomic_fetch_add_explicit(&r->sum, sum[0][0] ^ sum[0][1], memory_order_relaxed);
}

/* A part of the memory that was not read for a while. */
static char *next_part(struct bench_ceilings *c, size_t bytes)
{
	if (c->position + bytes > c->bytes)
		c->position = 0;
	c->position += bytes;
	return c->memory + c->position - bytes;
}

double bench_probe_pattern(struct bench_ceilings *c, int pattern)
{
	uint32_t n_tasks = c->ctx->executor.n_threads * TASKS_PER_THREAD;
	struct reading r = { .pattern = bench_patterns[pattern] };
	uint64_t start;

	r.task_bytes = PROBE_BYTES / n_tasks / 4096 * 4096;
	/* Streams a power of two apart would fight for one set of each cache. */
	r.stream_bytes = r.task_bytes / r.pattern.n_streams / 4096 * 4096;
	if (r.pattern.n_streams > 1 && r.stream_bytes > 65536)
		r.stream_bytes -= 4096 - 384;
	r.memory = next_part(c, PROBE_BYTES);
	wake_threads(c);
	start = afd__now_ns();
	afd__parallel(c->ctx, n_tasks, read_task, &r);
	return (double)r.stream_bytes * r.pattern.n_streams * n_tasks / (afd__now_ns() - start);
}

double bench_probe_dram(struct bench_ceilings *c)
{
	double best = 0;

	for (int i = 0; i < 3; i++) {
		double rate = bench_probe_pattern(c, c->best[i]);

		best = rate > best ? rate : best;
	}
	bench_samples_add(&c->dram, best);
	return best;
}

/* ---- multiply-adds ---- */

/* a = a * b + c for ever stays near 2. The empty asm keeps accumulators apart and in registers. */
#define FMA_LOOP(type, set, fma, constraint) \
	do { \
		type a[FMA_ACCUMULATORS], b = set(0.5f), c = set(1.1f); \
		AFD_K_UNROLL for (int i = 0; i < FMA_ACCUMULATORS; i++) a[i] = set((float)i); \
		for (int step = 0; step < FMA_STEPS; step++) { \
			AFD_K_UNROLL for (int i = 0; i < FMA_ACCUMULATORS; i++) \
			{ \
				a[i] = fma(a[i], b, c); \
				__asm__ volatile("" : constraint(a[i])); \
			} \
		} \
	} while (0)

typedef float four __attribute__((vector_size(16)));

static inline four set_four(float x)
{
	return (four){ x, x, x, x };
}

/* What plain C may hope for: two instructions per multiply-add, four lanes. */
static inline four multiply_add(four a, four b, four c)
{
	return a * b + c;
}

#if defined(__x86_64__)
#include <immintrin.h>

static void fma_task_c(void *arg, uint32_t index)
{
	FMA_LOOP(four, set_four, multiply_add, "+x");
}

__attribute__((target("avx2,fma"))) static void fma_task_avx2(void *arg, uint32_t index)
{
	FMA_LOOP(__m256, _mm256_set1_ps, _mm256_fmadd_ps, "+x");
}

__attribute__((target("avx512f"))) static void fma_task_avx512(void *arg, uint32_t index)
{
	FMA_LOOP(__m512, _mm512_set1_ps, _mm512_fmadd_ps, "+v");
}
#else
static void fma_task_c(void *arg, uint32_t index)
{
	FMA_LOOP(four, set_four, multiply_add, "+w");
}
#define fma_task_avx2   fma_task_c
#define fma_task_avx512 fma_task_c
#endif

double bench_probe_fma(struct bench_ceilings *c)
{
	static const struct {
		afd_task task;
		int n_lanes;
	} variants[] = {
		[AFD__ISA_C] = { fma_task_c, 4 },
		[AFD__ISA_AVX2] = { fma_task_avx2, 8 },
		[AFD__ISA_AVX512] = { fma_task_avx512, 16 },
	};
	uint32_t n_tasks = c->ctx->executor.n_threads * TASKS_PER_THREAD;
	double flops = 2.0 * variants[c->ctx->isa].n_lanes * FMA_ACCUMULATORS * FMA_STEPS * n_tasks;
	uint64_t start;
	double rate;

	wake_threads(c);
	start = afd__now_ns();
	afd__parallel(c->ctx, n_tasks, variants[c->ctx->isa].task, NULL);
	rate = flops / (afd__now_ns() - start);
	bench_samples_add(&c->fma, rate);
	return rate;
}

/* ---- copying ---- */

struct copying {
	char *to;
	const char *from;
	size_t task_bytes;
};

static void copy_task(void *arg, uint32_t index)
{
	struct copying *copy = arg;

	memcpy(copy->to + index * copy->task_bytes, copy->from + index * copy->task_bytes,
		copy->task_bytes);
}

double bench_probe_copy(struct bench_ceilings *c)
{
	uint32_t n_tasks = c->ctx->executor.n_threads * TASKS_PER_THREAD;
	struct copying copy = { .task_bytes = PROBE_BYTES / 2 / n_tasks / 4096 * 4096 };
	uint64_t start;
	double rate;

	copy.from = next_part(c, PROBE_BYTES);
	copy.to = (char *)copy.from + PROBE_BYTES / 2;
	wake_threads(c);
	start = afd__now_ns();
	afd__parallel(c->ctx, n_tasks, copy_task, &copy);
	rate = (double)copy.task_bytes * n_tasks / (afd__now_ns() - start);
	bench_samples_add(&c->copy, rate);
	return rate;
}

/* ---- the whole ---- */

static void find_best(struct bench_ceilings *c)
{
	double rates[BENCH_PATTERNS] = { 0 };

	for (int round = 0; round < 4; round++) {
		for (int i = 0; i < BENCH_PATTERNS; i++) {
			double rate = bench_probe_pattern(c, i);

			rates[i] = rate > rates[i] ? rate : rates[i];
		}
	}
	for (int place = 0; place < 3; place++) {
		int best = 0;

		for (int i = 1; i < BENCH_PATTERNS; i++)
			best = rates[i] > rates[best] ? i : best;
		c->best[place] = best;
		rates[best] = 0;
	}
}

struct filling {
	char *memory;
	size_t task_bytes;
};

/* Each thread touches what it may read; halves that are ordinary numbers in every dtype. */
static void fill_task(void *arg, uint32_t index)
{
	struct filling *f = arg;
	uint64_t state = index + 88172645463325252u;
	uint64_t *words = (uint64_t *)(f->memory + index * f->task_bytes);

	for (size_t i = 0; i < f->task_bytes / 8; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		words[i] = (state & 0x83ff83ff83ff83ffu) | 0x3c003c003c003c00u;
	}
}

int bench_ceilings_open(struct bench_ceilings *c, struct afd_context *ctx)
{
	struct filling f;

	memset(c, 0, sizeof *c);
	c->ctx = ctx;
	c->bytes = BENCH_COLD_BYTES;
	c->memory = afd__large_alloc(ctx, c->bytes, 4096, "bench memory");
	if (!c->memory)
		return tool_fail(TOOL_FAILED, "%s", afd_last_error());
	f = (struct filling){ c->memory, c->bytes / 64 };
	afd__parallel(ctx, 64, fill_task, &f);
	find_best(c);
	return TOOL_DONE;
}

void bench_ceilings_close(struct bench_ceilings *c)
{
	if (c->memory)
		afd__large_free(c->ctx, c->memory, c->bytes);
}
