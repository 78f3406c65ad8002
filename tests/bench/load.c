/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How fast weights get onto a device, beside what the way allows: load DEVICE [MB]. A packed bf16
 * matrix is loaded as the stages do it, in blocks of 4 MB, with 1, 2, 4 .. threads, up to all CPUs;
 * in the same run registered memory is uploaded directly, which is the ceiling from host to device.
 * Printed, not judged; on the emulator both are copies of this machine and say nothing of a GPU.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../lib/device/device.h"

enum { K = 4096, ROW_BYTES = 2 * K, BLOCK_ROWS = (4 << 20) / ROW_BYTES, ROUNDS = 5 };

static int failed(const char *what)
{
	fprintf(stderr, "load: %s: %s\n", what, afd_last_error());
	return 1;
}

static int settle(struct afd__queue *q)
{
	uint64_t ticket;
	int rc = afd__queue_ticket(q, &ticket);

	return rc ? rc : afd__queue_wait(q, ticket, 0, "the bench");
}

/* Best of some rounds, in GB/s; negative: an error. */
static double measure(struct afd__queue *q, struct afd__matrix *m, char *rows, bool upload)
{
	double best = 0;

	for (int round = 0; round < ROUNDS; round++) {
		uint64_t start = afd__now_ns();
		int rc = 0;

		for (uint32_t row = 0, n; !rc && row < m->n; row += n) {
			n = m->n - row < BLOCK_ROWS ? m->n - row : BLOCK_ROWS;
			rc = upload ? afd__queue_upload(q, (char *)m->data + (size_t)row * ROW_BYTES,
					      rows + (size_t)row * ROW_BYTES, (size_t)n * ROW_BYTES)
				    : afd__matrix_load(q->dev, m, rows + (size_t)row * ROW_BYTES,
					      row, n);
		}
		if (rc || settle(q))
			return -1;
		best = best < m->bytes / (double)(afd__now_ns() - start)
			       ? m->bytes / (double)(afd__now_ns() - start)
			       : best;
	}
	return best;
}

static int run(const char *device, uint32_t n_threads, uint32_t n_rows, char *rows)
{
	struct afd_context_params params = { .size = sizeof(params), .n_threads = n_threads };
	struct afd__device *dev = NULL;
	struct afd__queue q = { 0 };
	struct afd__matrix m = { 0 };
	afd_context *ctx = NULL;
	double loaded = -1, direct = -1;
	size_t bytes = (size_t)n_rows * ROW_BYTES;

	if (afd_context_create(&ctx, &params) || afd__device_open(&dev, ctx, device) ||
		afd__queue_open(&q, dev) ||
		afd__matrix_create(dev, &m, n_rows, K, AFD_DTYPE_BF16, NULL))
		return failed(device);
	loaded = measure(&q, &m, rows, false);
	if (!afd__device_register(dev, rows, bytes, "the rows of a bench")) {
		direct = measure(&q, &m, rows, true);
		afd__device_unregister(dev, rows, bytes);
	}
	if (loaded < 0 || direct < 0)
		return failed("transfers");
	printf("%s\t%u threads\tload %.2f GB/s\thost to device %.2f GB/s\t%.0f %%\n", device,
		n_threads, loaded, direct, 100 * loaded / direct);
	afd__matrix_destroy(dev, &m);
	afd__queue_close(&q);
	afd__device_close(dev);
	afd_context_destroy(ctx);
	return 0;
}

int main(int argc, char **argv)
{
	uint32_t n_rows = (uint32_t)((argc > 2 ? atoi(argv[2]) : 256) * (size_t)(1 << 20) / ROW_BYTES);
	long n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
	char *rows;
	int rc = 0;

	if (argc < 2 || !n_rows || posix_memalign((void **)&rows, 4096, (size_t)n_rows * ROW_BYTES)) {
		fprintf(stderr, "usage: load DEVICE [MB]\n");
		return 1;
	}
	memset(rows, 1, (size_t)n_rows * ROW_BYTES);
	for (uint32_t n = 1; !rc && n <= n_cpus; n *= 2)
		rc = run(argv[1], n, n_rows, rows);
	free(rows);
	return rc;
}
