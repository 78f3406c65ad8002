/* SPDX-License-Identifier: Apache-2.0 */
/* Bursts between stamps, and the device's ceilings (gpu.h). */
#include "gpu.h"

#define BURST_NS 400e3 /* of device time, where the device is not too slow for it */
#define BURST_MAX \
	100 /* runs; a queue takes about a thousand launches before the host must wait \
	     */
#define READ_LEAST ((size_t)16 << 20)
#define READ_MOST  ((size_t)1 << 30)
#define READ_NS    100e3 /* at least, unless READ_MOST is read in less: far more than caches hold */
#define PROBE_NS   250e3

static int finish(struct bench_gpu *g)
{
	uint64_t ticket;
	int rc = afd__queue_ticket(g->queue, &ticket);

	return rc ? rc : afd__queue_wait(g->queue, ticket, 60000, "bench");
}

static int probe(struct bench_gpu *g, int32_t kind, uint64_t amount, uint32_t way, double *work)
{
	struct afd__probe_args a = {
		.kind = kind, .way = way, .memory = g->cold, .out = g->stamps + 2, .amount = amount
	};

	return afd__queue_probe(g->queue, &a, work);
}

static int stamp(struct bench_gpu *g, int i)
{
	struct afd__probe_args a = { .kind = AFD__PROBE_STAMP, .out = g->stamps + i };
	double work;

	return afd__queue_probe(g->queue, &a, &work);
}

/* ns between the stamps, once they are there; at least one. */
static int between(struct bench_gpu *g, double *ns)
{
	uint64_t stamps[2];
	int rc = afd__queue_download(g->queue, stamps, g->stamps, sizeof stamps);

	if (!rc)
		rc = finish(g);
	*ns = rc || stamps[1] <= stamps[0] ? 1 : (double)(stamps[1] - stamps[0]);
	return rc;
}

/* One burst of n runs; the delay covers what the host needs to enqueue them. */
static int burst(
	struct bench_gpu *g, int n, double delay_ns, int (*run)(void *), void *arg, double *ns)
{
	double work;
	int rc = delay_ns > 0 ? probe(g, AFD__PROBE_DELAY, (uint64_t)delay_ns, 0, &work) : 0;

	if (!rc)
		rc = stamp(g, 0);
	for (int i = 0; !rc && i < n; i++)
		rc = run(arg);
	if (!rc)
		rc = stamp(g, 1);
	return rc ? rc : between(g, ns);
}

/* ---- ceilings ---- */

struct probe_run {
	struct bench_gpu *g;
	int32_t kind;
	uint64_t amount;
	uint32_t way;
	double work;
};

static int run_probe(void *arg)
{
	struct probe_run *p = arg;

	return probe(p->g, p->kind, p->amount, p->way, &p->work);
}

static int take(struct bench_gpu *g, int32_t kind, uint64_t amount, uint32_t way, double *rate)
{
	struct probe_run p = { g, kind, amount, way, 0 };
	double ns = 1;
	int rc = burst(g, 1, 20e3, run_probe, &p, &ns);

	*rate = p.work / ns;
	return rc;
}

int bench_gpu_read(struct bench_gpu *g, double *rate)
{
	int rc = take(g, AFD__PROBE_READ, g->read_bytes, g->read_way, rate);

	if (!rc)
		bench_samples_add(&g->read, *rate);
	return rc;
}

int bench_gpu_multiply(struct bench_gpu *g, double *rate)
{
	int rc = take(g, AFD__PROBE_MULTIPLY, g->multiply_amount, g->multiply_way, rate);

	if (!rc)
		bench_samples_add(&g->multiply, *rate);
	return rc;
}

/* So much that it lasts long enough to be timed, also where the device is an emulated one. */
static int size_probes(struct bench_gpu *g)
{
	struct probe_run p = { g, AFD__PROBE_MULTIPLY, 4, 0, 0 };
	double ns = 1;
	int rc = burst(g, 1, 0, run_probe, &p, &ns);

	while (!rc && ns < PROBE_NS && p.amount < 1u << 20) {
		p.amount *= 4;
		rc = burst(g, 1, 0, run_probe, &p, &ns);
	}
	g->multiply_amount = p.amount;
	p = (struct probe_run){ g, AFD__PROBE_READ, READ_LEAST, 0, 0 };
	if (!rc)
		rc = burst(g, 1, 0, run_probe, &p, &ns);
	while (!rc && ns < READ_NS && 2 * p.amount <= READ_MOST && 2 * p.amount <= g->cold_bytes) {
		p.amount *= 2;
		rc = burst(g, 1, 0, run_probe, &p, &ns);
	}
	g->read_bytes = p.amount;
	return rc;
}

static int find_ways(struct bench_gpu *g)
{
	double best_read = 0, best_multiply = 0, rate;
	uint32_t read_way = 0, multiply_way = 0;
	int rc = size_probes(g);

	for (uint32_t i = 0; !rc && i < 2 * AFD__PROBE_WAYS; i++) {
		g->read_way = g->multiply_way = i % AFD__PROBE_WAYS;
		rc = bench_gpu_read(g, &rate);
		if (!rc && rate > best_read) {
			best_read = rate;
			read_way = g->read_way;
		}
		if (!rc)
			rc = bench_gpu_multiply(g, &rate);
		if (!rc && rate > best_multiply) {
			best_multiply = rate;
			multiply_way = g->multiply_way;
		}
	}
	g->read_way = read_way;
	g->multiply_way = multiply_way;
	g->read.n = g->multiply.n = 0; /* of the best ways only */
	return rc;
}

int bench_gpu_open(
	struct bench_gpu *g, struct afd__queue *queue, const char *cold, size_t cold_bytes)
{
	void *memory;
	int rc;

	*g = (struct bench_gpu){ .queue = queue, .cold = cold, .cold_bytes = cold_bytes };
	rc = afd__device_alloc(queue->dev, 4 * sizeof(uint64_t), "bench stamps", &memory);
	if (rc)
		return rc;
	g->stamps = memory;
	rc = find_ways(g);
	if (rc)
		bench_gpu_close(g);
	return rc;
}

void bench_gpu_close(struct bench_gpu *g)
{
	if (g->stamps)
		afd__device_free(g->queue->dev, g->stamps, 4 * sizeof(uint64_t));
	g->stamps = NULL;
}

/* ---- operations ---- */

int bench_gpu_time(struct bench_gpu *g, double seconds, struct bench_samples *us,
	int (*run)(void *arg), void *arg)
{
	uint64_t until = afd__now_ns() + (uint64_t)(seconds * 1e9), start;
	double ns = 1, host_ns;
	int n, rc = burst(g, 1, 0, run, arg, &ns); /* what is done for the first time */

	if (rc)
		return rc;
	start = afd__now_ns();
	rc = run(arg);
	host_ns = (double)(afd__now_ns() - start);
	if (!rc)
		rc = burst(g, 1, host_ns, run, arg, &ns);
	n = ns < BURST_NS / BURST_MAX ? BURST_MAX : ns > BURST_NS ? 1 : (int)(BURST_NS / ns);
	do {
		if (rc)
			return rc;
		rc = burst(g, n, 2 * n * host_ns + 20e3, run, arg, &ns);
		if (!rc)
			bench_samples_add(us, ns / n * 1e-3);
	} while (!rc && (us->n < 3 || afd__now_ns() < until));
	return rc;
}
