/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Measuring on a device that has probes (cuda:N): many runs of an operation stand in the queue
 * behind a delay, between two stamps of the device's own clock, so that neither the host nor a
 * launch is in the time; and the device's own ceilings, taken in between.
 */
#ifndef BENCH_GPU_H
#define BENCH_GPU_H

#include "../../lib/device/device.h"
#include "report.h"

struct bench_gpu {
	struct afd__queue *queue;
	uint64_t *stamps; /* dev [4]: two stamps, and 16 bytes for the probes */
	const char *cold; /* dev [cold_bytes], what reading is measured on */
	size_t cold_bytes;
	uint32_t read_way, multiply_way; /* the best */
	uint64_t multiply_amount, read_bytes;
	struct bench_samples read, multiply; /* all probes; bytes or flops per ns */
};

/* Looks for the best ways to read and multiply. 0 or a negative errno; -ENOTSUP: no probes. */
int bench_gpu_open(
	struct bench_gpu *g, struct afd__queue *queue, const char *cold, size_t cold_bytes);
void bench_gpu_close(struct bench_gpu *g);

/* Each waits for its result, bytes or flops per ns, and keeps it. */
int bench_gpu_read(struct bench_gpu *g, double *rate);
int bench_gpu_multiply(struct bench_gpu *g, double *rate);

/* Runs it as often as fits into `seconds`, at least thrice; us has the mean of each burst. */
int bench_gpu_time(struct bench_gpu *g, double seconds, struct bench_samples *us,
	int (*run)(void *arg), void *arg);

#endif
