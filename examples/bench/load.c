/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `load`: how fast weights get from a mapped file, whose pages are in memory, onto a
 * device, beside what the way allows: memory that is registered with the device, uploaded directly
 * in the same seconds. Without a model it is one packed bf16 matrix, as the stages load it; with one
 * it is each stage of it, with all that loading has to do (fingerprint, shards, routers).
 *
 * On a device whose memory is this machine's both are copies, and their ratio tells of no other.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../lib/device/device.h"
#include "bench.h"

#define K             4096
#define ROW_BYTES     (2 * (size_t)K)
#define BLOCK_ROWS    512 /* 4 MiB, as a stage's loader has them */
#define DIRECT_BYTES  ((size_t)64 << 20)
#define DIRECT_TURN   4 /* uploads of that, as one sample */
#define ROUNDS_MIN    3
#define WAIT_MS       60000

struct load_options {
	struct bench_options common;
	uint32_t mib;
};

struct load {
	struct bench *b;
	const struct load_options *options;
	struct afd__device *dev;
	struct afd__queue queue;
	char *registered; /* [DIRECT_BYTES] */
	void *target;     /* dev [DIRECT_BYTES] */
	int is_registered;
	const char *file; /* mapped [file_bytes], of the matrix */
	size_t file_bytes;
	struct afd__matrix matrix;
	struct afd_model *model;
	struct afd_ffn *ffn;
	struct bench_samples direct; /* bytes per ns */
};

static int settle(struct load *l)
{
	uint64_t ticket;
	int rc = afd__queue_ticket(&l->queue, &ticket);

	return rc ? rc : afd__queue_wait(&l->queue, ticket, WAIT_MS, "the bench");
}

/* ---- what the way allows ---- */

static int open_direct(struct load *l)
{
	int rc;

	l->registered = afd__large_alloc(l->b->ctx, DIRECT_BYTES, 4096, "bench memory");
	if (!l->registered)
		return -ENOMEM;
	memset(l->registered, 1, DIRECT_BYTES);
	rc = afd__device_alloc(l->dev, DIRECT_BYTES, "bench memory", &l->target);
	rc = rc ? rc : afd__device_register(l->dev, l->registered, DIRECT_BYTES, "bench memory");
	l->is_registered = !rc;
	return rc;
}

static int probe_direct(struct load *l)
{
	uint64_t start = afd__now_ns();
	int rc = 0;

	for (int i = 0; !rc && i < DIRECT_TURN; i++)
		rc = afd__queue_upload(&l->queue, l->target, l->registered, DIRECT_BYTES);
	rc = rc ? rc : settle(l);
	if (!rc)
		bench_samples_add(&l->direct,
			(double)DIRECT_BYTES * DIRECT_TURN / (afd__now_ns() - start));
	return rc;
}

/* ---- a matrix ---- */

/* A file of memory: mapped like a checkpoint, whose pages are there. */
static int map_file(struct load *l)
{
	int fd = memfd_create("afd-bench", MFD_CLOEXEC);
	const char *mapped = MAP_FAILED;
	size_t at;

	l->file_bytes = (size_t)l->options->mib << 20;
	for (at = 0; fd >= 0 && at < l->file_bytes; at += DIRECT_BYTES) {
		size_t n = l->file_bytes - at < DIRECT_BYTES ? l->file_bytes - at : DIRECT_BYTES;

		if (pwrite(fd, l->registered, n, (off_t)at) != (ssize_t)n)
			break;
	}
	if (fd >= 0 && at >= l->file_bytes)
		mapped = mmap(NULL, l->file_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
	if (fd >= 0)
		close(fd);
	if (mapped == MAP_FAILED)
		return afd__error(-ENOMEM, "bench: a file of %u MiB in memory: %s",
			l->options->mib, strerror(errno));
	l->file = mapped;
	return afd__matrix_create(l->dev, &l->matrix, (uint32_t)(l->file_bytes / ROW_BYTES), K,
		AFD_DTYPE_BF16, NULL);
}

/* As a loader does it: block behind block, and pages of the file are mapped anew each time. */
static int load_matrix(struct load *l, double *bytes, double *ns)
{
	uint32_t row, n;
	uint64_t start;
	int rc = 0;

	madvise((void *)l->file, l->file_bytes, MADV_DONTNEED);
	start = afd__now_ns();
	for (row = 0; !rc && row < l->matrix.n; row += n) {
		n = l->matrix.n - row < BLOCK_ROWS ? l->matrix.n - row : BLOCK_ROWS;
		rc = afd__matrix_load(
			l->dev, &l->matrix, l->file + row * ROW_BYTES, row, n);
	}
	rc = rc ? rc : settle(l);
	*bytes = (double)l->file_bytes;
	*ns = (double)(afd__now_ns() - start);
	return rc;
}

/* ---- the stages of a model ---- */

/* From the first block on: before it memory is allocated, and the device comes up. */
struct progress {
	uint64_t start_ns, first_bytes, bytes;
};

static void note_progress(void *user, uint64_t done_bytes, uint64_t total_bytes)
{
	struct progress *p = user;

	if (!p->bytes) {
		p->start_ns = afd__now_ns();
		p->first_bytes = done_bytes;
	}
	p->bytes = done_bytes;
}

/* The end is when the stage stands: then all has arrived. Where one block is all, the whole counts. */
static void measure(const struct progress *p, uint64_t begin_ns, double *bytes, double *ns)
{
	bool has_more = p->bytes > p->first_bytes;

	*bytes = (double)(p->bytes - (has_more ? p->first_bytes : 0));
	*ns = (double)(afd__now_ns() - (has_more ? p->start_ns : begin_ns));
}

static int load_ffn(struct load *l, double *bytes, double *ns)
{
	struct progress p = { 0 };
	const struct afd_ffn_params params = { .size = sizeof params,
		.device = l->options->common.stage.device,
		.max_rows = 64,
		.progress = note_progress,
		.progress_user = &p };
	uint64_t begin_ns = afd__now_ns();
	int rc;

	afd_ffn_destroy(l->ffn);
	l->ffn = NULL;
	rc = afd_ffn_create(&l->ffn, l->model, NULL, &params);
	measure(&p, begin_ns, bytes, ns);
	return rc;
}

static int load_attention(struct load *l, double *bytes, double *ns)
{
	struct progress p = { 0 };
	const struct afd_attn_params params = { .size = sizeof params,
		.ffn = l->ffn,
		.max_rows = 64,
		.max_sequences = 1,
		.kv_pages = 4,
		.progress = note_progress,
		.progress_user = &p };
	uint64_t begin_ns = afd__now_ns();
	afd_attn *attn = NULL;
	int rc = afd_attn_create(&attn, l->model, NULL, &params);

	measure(&p, begin_ns, bytes, ns);
	afd_attn_destroy(attn);
	return rc;
}

/* ---- the command ---- */

typedef int (*load_run)(struct load *l, double *bytes, double *ns);

/* Both ways take turns. The first round brings pages of the file into memory, and does not count. */
static int measure_load(struct load *l, const char *shape, double seconds, load_run run)
{
	static struct bench_samples us;
	uint64_t until = 0;
	double bytes = 0, ns, direct, median;
	int rc = run(l, &bytes, &ns), status;

	us.n = l->direct.n = 0;
	until = afd__now_ns() + (uint64_t)(seconds * 1e9);
	while (!rc && (us.n < ROUNDS_MIN || afd__now_ns() < until)) {
		rc = probe_direct(l);
		rc = rc ? rc : run(l, &bytes, &ns);
		if (!rc)
			bench_samples_add(&us, ns * 1e-3);
	}
	if (rc)
		return bench_fail();
	median = bench_samples_at(&us, 0.5);
	direct = bench_samples_at(&l->direct, 0.5);
	status = bench_report_add(&l->b->report,
		json_pack("{s:s, s:s, s:f, s:f, s:f}", "op", "load", "shape", shape, "bytes", bytes,
			"gb_per_s", bytes / median * 1e-3, "host_to_device_gb_per_s", direct),
		&us, bytes / direct * 1e-3, "h2d");
	if (status == TOOL_DONE && !l->b->report.results)
		printf("%-12s %.2f GB/s of %.2f GB/s from registered memory\n", shape,
			bytes / median * 1e-3, direct);
	return status;
}

static int open_load(struct load *l)
{
	const struct bench_options *o = &l->options->common;
	int rc = afd__device_open(&l->dev, l->b->ctx, o->stage.device);

	rc = rc ? rc : afd__queue_open(&l->queue, l->dev);
	rc = rc ? rc : open_direct(l);
	if (rc)
		return bench_fail();
	rc = o->stage.model ? afd_model_open(&l->model, l->b->ctx, o->stage.model, NULL)
			    : map_file(l);
	return rc ? bench_fail() : TOOL_DONE;
}

static void close_load(struct load *l)
{
	afd_ffn_destroy(l->ffn);
	afd_model_close(l->model);
	if (l->dev)
		afd__matrix_destroy(l->dev, &l->matrix);
	afd__queue_close(&l->queue);
	if (l->is_registered)
		afd__device_unregister(l->dev, l->registered, DIRECT_BYTES);
	if (l->target)
		afd__device_free(l->dev, l->target, DIRECT_BYTES);
	if (l->registered)
		afd__large_free(l->b->ctx, l->registered, DIRECT_BYTES);
	if (l->file)
		munmap((void *)l->file, l->file_bytes);
	if (l->dev)
		afd__device_close(l->dev);
}

static int run_load(struct bench *b, const struct load_options *o)
{
	struct load l = { .b = b, .options = o };
	int status = open_load(&l);

	if (status == TOOL_DONE && !l.model)
		status = measure_load(&l, "mapped file", o->common.seconds, load_matrix);
	if (status == TOOL_DONE && l.model)
		status = measure_load(&l, "ffn", o->common.seconds / 2, load_ffn);
	if (status == TOOL_DONE && l.model)
		status = measure_load(&l, "attention", o->common.seconds / 2, load_attention);
	close_load(&l);
	return status;
}

int bench_load(int argc, char **argv)
{
	struct load_options o = { .common = { .stage = { .device = "cpu" }, .seconds = 5 },
		.mib = 256 };
	const struct tool_option options[] = {
		TOOL_OPTION_MODEL(o.common.stage),
		{ "mib", "N", "256", "without a model: MiB of the matrix, 1 to 65536", tool_set_u32,
			&o.mib, 1, 65536 },
		BENCH_OPTIONS(o.common, "5 s"),
		{ 0 },
	};
	struct bench b;
	int status = tool_options_read(options,
		"load [--model DIR | --mib N] [--device D] [--json]\n\n"
		"Weights from a mapped file, whose pages are in memory, onto the device, beside\n"
		"registered memory that is uploaded directly in the same seconds: its rate is the limit.",
		argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	status = bench_machine_open(&b, &o.common);
	if (status == TOOL_DONE)
		status = run_load(&b, &o);
	return bench_close(&b, status);
}
