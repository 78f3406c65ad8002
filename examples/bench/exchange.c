/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `exchange`: how long frames take there and back through the public API, beside the
 * floor of the same medium. Floor and exchange take turns in short slices, because the machine may
 * be shared: a ratio is only worth something against a floor of the same moment. x is written anew
 * before each round and y is looked at after it, outside of the clock; the FFN end's compute
 * rewrites all of y inside of it, in both.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"
#include "exchange_ends.h"
#include "floor.h"

enum { SLICE_BYTES = 16 << 20, WARM_ROUNDS = 8, N_SIZES = 4, SPIN_US = 50 };
#define BYTES_MAX  (UINT64_C(256) << 20)
#define BYTES_EACH (UINT64_C(1) << 30) /* what the rounds of one size move by default */

struct exchange_options {
	struct bench_options common;
	const char *a, *b;
	uint32_t rows, row_bytes, lanes, max_rows, rounds, spin_us;
	int cpus[2];
};

struct exchange {
	struct bench *b;
	const struct exchange_options *options;
	struct exchange_link link;
	struct bench_floor floor;
	afd_transport *net;
	uint8_t *x, *y; /* [lanes][n_rows][row_bytes] */
	uint64_t n_rounds;
	struct bench_samples us, floor_us;
};

/* ---- rounds ---- */

static void write_x(struct exchange *e, size_t n_bytes)
{
	uint32_t *words = (uint32_t *)e->x, base = (uint32_t)++e->n_rounds * 2654435761u;

	for (size_t i = 0; i < n_bytes / sizeof *words; i++)
		words[i] = base + (uint32_t)i;
}

/* 0, or -EBADMSG: y is not the answer to x. */
static int check_y(const struct exchange *e, size_t n_bytes)
{
	const uint32_t *x = (const uint32_t *)e->x, *y = (const uint32_t *)e->y;
	uint32_t wrong = 0;

	for (size_t i = 0; i < n_bytes / sizeof *y; i++)
		wrong |= x[i] ^ ~y[i];
	return wrong ? -EBADMSG : 0;
}

static int failed(const struct exchange *e, const char *what, const char *why)
{
	return tool_fail(
		TOOL_FAILED, "%s, round %llu: %s", what, (unsigned long long)e->n_rounds, why);
}

static int floor_slice(struct exchange *e, size_t n_bytes, uint32_t n_rounds, bool keep)
{
	int error = bench_floor_begin(&e->floor, n_bytes, n_rounds);

	for (uint32_t i = 0; i < n_rounds && !error; i++) {
		uint64_t start;

		write_x(e, n_bytes);
		start = afd__now_ns();
		error = e->floor.medium->round(&e->floor, e->x, e->y, n_bytes);
		/* The first round of a slice wakes the other end. */
		if (keep && i)
			bench_samples_add(&e->floor_us, (afd__now_ns() - start) * 1e-3);
		if (!error && check_y(e, n_bytes))
			error = EBADMSG;
	}
	return error ? failed(e, "floor", strerror(error)) : TOOL_DONE;
}

static int exchange_slice(struct exchange *e, uint32_t n_rows, uint32_t n_rounds, bool keep)
{
	size_t n_bytes = (size_t)n_rows * e->link.row_bytes * e->link.lanes;

	for (uint32_t i = 0; i < n_rounds; i++) {
		struct afd_step_params step = { .size = sizeof step };
		int32_t layer = i % EXCHANGE_LAYERS;
		uint64_t start;
		int rc = 0;

		for (uint32_t lane = 0; lane < e->link.lanes; lane++)
			step.n_rows[lane] = n_rows;
		write_x(e, n_bytes);
		if (!layer)
			rc = afd_transport_begin(e->net, &step);
		start = afd__now_ns();
		if (!rc)
			rc = exchange_round(e->net, &e->link, layer, n_rows, e->x, e->y);
		if (rc)
			return failed(e, "exchange", afd_last_error());
		if (keep && i)
			bench_samples_add(&e->us, (afd__now_ns() - start) * 1e-3);
		if (check_y(e, n_bytes))
			return failed(e, "exchange", "y is not the answer to x");
	}
	return TOOL_DONE;
}

/* The FFN end of the exchange spins on for that long, and would take a processor from the floor. */
static void let_sleep(const struct exchange *e)
{
	if (e->options->spin_us > SPIN_US)
		usleep(e->options->spin_us + SPIN_US);
}

static int take_turns(struct exchange *e, uint32_t n_rows)
{
	size_t n_bytes = (size_t)n_rows * e->link.row_bytes * e->link.lanes;
	uint64_t n_rounds = e->options->rounds, n_slice = SLICE_BYTES / n_bytes;
	int status = TOOL_DONE;

	if (!n_rounds)
		n_rounds = BYTES_EACH / n_bytes;
	n_rounds = n_rounds > BENCH_SAMPLES ? BENCH_SAMPLES : n_rounds < 16 ? 16 : n_rounds;
	n_slice = n_slice > EXCHANGE_LAYERS ? EXCHANGE_LAYERS : n_slice < 8 ? 8 : n_slice;
	e->us.n = e->floor_us.n = 0;
	if (e->floor.medium)
		status = floor_slice(e, n_bytes, WARM_ROUNDS, false);
	if (status == TOOL_DONE)
		status = exchange_slice(e, n_rows, WARM_ROUNDS, false);
	while (status == TOOL_DONE && e->us.n < n_rounds) {
		if (e->floor.medium) {
			let_sleep(e);
			status = floor_slice(e, n_bytes, (uint32_t)n_slice, true);
		}
		if (status == TOOL_DONE)
			status = exchange_slice(e, n_rows, (uint32_t)n_slice, true);
	}
	return status;
}

/* ---- the table ---- */

static void print_line(struct exchange *e, const char *medium, size_t n_bytes)
{
	double us = bench_samples_at(&e->us, 0.5), floor_us = bench_samples_at(&e->floor_us, 0.5);

	if (!e->b->report.n_lines++)
		printf("%-6s %10s %5s %10s %10s %10s %7s | %10s %10s %10s | %10s\n", "medium",
			"bytes", "lanes", "p50 us", "p99 us", "max us", "GB/s", "floor p50",
			"p99 us", "max us", "over floor");
	printf("%-6s %10zu %5u %10.2f %10.2f %10.2f %7.2f |", medium, n_bytes, e->link.lanes, us,
		bench_samples_at(&e->us, 0.99), bench_samples_at(&e->us, 1),
		2e-3 * (double)n_bytes * e->link.lanes / us);
	if (e->floor.medium)
		printf(" %10.2f %10.2f %10.2f | %10.2f\n", floor_us,
			bench_samples_at(&e->floor_us, 0.99), bench_samples_at(&e->floor_us, 1),
			us / floor_us);
	else
		printf(" %10s %10s %10s | %10s\n", "-", "-", "-", "-");
	fflush(stdout);
}

static int report(struct exchange *e, const char *medium, uint32_t n_rows)
{
	size_t n_bytes = (size_t)n_rows * e->link.row_bytes;
	double floor_us = bench_samples_at(&e->floor_us, 0.5);
	char shape[64];
	json_t *what;

	if (!e->b->report.results) {
		print_line(e, medium, n_bytes);
		return TOOL_DONE;
	}
	snprintf(shape, sizeof shape, "%s, %u x %u B", medium, n_rows, e->link.row_bytes);
	what = json_pack("{s:s, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:f, s:f, s:f}", "op",
		"exchange", "shape", shape, "medium", medium, "rows", (json_int_t)n_rows,
		"row_bytes", (json_int_t)e->link.row_bytes, "bytes", (json_int_t)n_bytes, "lanes",
		(json_int_t)e->link.lanes, "max_rows", (json_int_t)e->link.max_rows, "spin_us",
		(json_int_t)e->link.spin_us, "dtype", "f32",
		"us_p99", bench_samples_at(&e->us, 0.99), "us_max", bench_samples_at(&e->us, 1),
		"gb_per_s",
		2e-3 * (double)n_bytes * e->link.lanes / bench_samples_at(&e->us, 0.5));
	if (what && e->floor.medium)
		json_object_set_new(what, "floor",
			json_pack("{s:s, s:f, s:f, s:f, s:I}", "what", e->floor.medium->what, "us",
				floor_us, "us_p99", bench_samples_at(&e->floor_us, 0.99), "us_max",
				bench_samples_at(&e->floor_us, 1), "runs",
				(json_int_t)e->floor_us.n));
	return bench_report_add(
		&e->b->report, what, &e->us, floor_us, e->floor.medium ? "floor" : "none");
}

static int measure_sizes(struct exchange *e, const char *address)
{
	static const uint32_t sizes[N_SIZES] = { 1, 8, 64, 512 };
	const struct exchange_options *o = e->options;
	uint32_t n_sizes = o->rows ? 1 : N_SIZES;
	char medium[16];
	int status = TOOL_DONE;

	snprintf(medium, sizeof medium, "%.*s", (int)strcspn(address, ":"), address);
	for (uint32_t i = 0; i < n_sizes && status == TOOL_DONE; i++) {
		uint32_t n_rows = o->rows ? o->rows : sizes[i];

		status = take_turns(e, n_rows);
		if (status == TOOL_DONE)
			status = report(e, medium, n_rows);
	}
	return status;
}

/* ---- both ends ---- */

static size_t bytes_of(const struct exchange_link *link)
{
	return (size_t)link->n_rows * link->row_bytes * link->lanes;
}

static int measure_joined(struct exchange *e, const char *address)
{
	size_t n_bytes = bytes_of(&e->link);
	int status;

	e->x = malloc(n_bytes);
	e->y = malloc(n_bytes);
	if (!e->x || !e->y) {
		status = tool_fail(TOOL_FAILED, "exchange: no memory for two frames of %zu bytes",
			n_bytes);
	} else {
		memset(e->y, 0, n_bytes);
		status = exchange_connect(&e->net, e->b->ctx, &e->link, address);
	}
	if (status == TOOL_DONE)
		status = measure_sizes(e, address);
	afd_transport_destroy(e->net);
	e->net = NULL;
	free(e->x);
	free(e->y);
	return status;
}

/* `listen` NULL: the FFN end is elsewhere, and there is no floor. `connect` NULL: where it listens.
 */
static int measure_medium(struct exchange *e, const char *listen, const char *connect)
{
	char address[EXCHANGE_ADDRESS];
	int status = TOOL_DONE;
	pid_t ffn = 0;

	e->floor = (struct bench_floor){ 0 };
	e->link.cpu = e->options->cpus[1];
	if (listen) {
		const struct bench_floor_medium *medium = bench_floor_medium(listen);

		if (medium)
			status = bench_floor_open(
				&e->floor, medium, bytes_of(&e->link), e->link.cpu);
		ffn = status == TOOL_DONE ? exchange_start_ffn(&e->link, listen, address) : 0;
		if (ffn < 0)
			status = TOOL_FAILED;
	}
	bench_pin(e->options->cpus[0]);
	if (status == TOOL_DONE)
		status = measure_joined(e, connect ? connect : address);
	exchange_end_ffn(ffn);
	bench_floor_close(&e->floor);
	return status;
}

static int measure_all(struct exchange *e)
{
	const struct exchange_options *o = e->options;
	char shm[64];
	int status;

	if (o->a || o->b)
		return measure_medium(e, o->b, o->a);
	snprintf(shm, sizeof shm, "shm:afd-bench-%d", (int)getpid());
	status = measure_medium(e, shm, NULL);
	return status == TOOL_DONE ? measure_medium(e, "tcp:127.0.0.1:0", NULL) : status;
}

/* ---- flags ---- */

static int set_cpus(const struct tool_option *option, const char *value)
{
	int *cpus = option->into, n = 0;

	if (sscanf(value, "%d,%d%n", &cpus[0], &cpus[1], &n) == 2 && !value[n] && cpus[0] >= 0 &&
		cpus[0] < 1024 && cpus[1] >= 0 && cpus[1] < 1024)
		return TOOL_DONE;
	return tool_fail(
		TOOL_USAGE, "--%s: value '%s', limit 0,0 to 1023,1023", option->name, value);
}

static int check_options(struct exchange_options *o)
{
	uint32_t n_rows = o->rows ? o->rows : 512;
	uint64_t n_bytes = (uint64_t)n_rows * o->row_bytes * o->lanes;

	if (o->row_bytes % sizeof(float))
		return tool_fail(TOOL_USAGE, "--row-bytes: value %u, must be a multiple of %zu",
			o->row_bytes, sizeof(float));
	if (n_bytes > BYTES_MAX)
		return tool_fail(TOOL_USAGE,
			"--rows, --row-bytes, --lanes: %llu bytes in a round, limit %llu",
			(unsigned long long)n_bytes, (unsigned long long)BYTES_MAX);
	if (o->common.stage.tls && !o->common.stage.key)
		return tool_fail(TOOL_USAGE, "--tls: there is no --key");
	return TOOL_DONE;
}

static int run(const struct exchange_options *o)
{
	static struct exchange e; /* its samples are large for a stack */
	uint32_t n_rows = o->rows ? o->rows : 512;
	struct bench b;
	int status;

	e.b = &b;
	e.options = o;
	e.link = (struct exchange_link){ .stage = o->common.stage,
		.row_bytes = o->row_bytes,
		.lanes = o->lanes,
		.n_rows = n_rows,
		.max_rows = o->max_rows ? o->max_rows : n_rows,
		.cpu = o->cpus[1],
		.spin_us = o->spin_us };
	if (o->b && !o->a)
		return exchange_serve(&e.link, o->b);
	/* With one thread, so that the other ends can still be forked. */
	status = bench_machine_open(&b, &o->common);
	if (status == TOOL_DONE)
		status = measure_all(&e);
	return bench_close(&b, status);
}

int bench_exchange(int argc, char **argv)
{
	struct exchange_options o = { .common = { .stage = { .device = "cpu", .threads = 1 } },
		.row_bytes = 8192,
		.lanes = 1,
		.spin_us = SPIN_US,
		.cpus = { -1, -1 } };
	const struct tool_option options[] = {
		{ "a", "ADDR", NULL,
			"where the attention end connects; without --b the FFN end runs elsewhere",
			tool_set_text, &o.a, 0, 0 },
		{ "b", "ADDR", NULL,
			"where the FFN end listens; without --a this process is that end until "
			"SIGINT or SIGTERM",
			tool_set_text, &o.b, 0, 0 },
		{ "rows", "R", "1, 8, 64 and 512", "rows of a frame, 1 to 65536", tool_set_u32,
			&o.rows, 1, 65536 },
		{ "row-bytes", "N", "8192 bytes", "bytes of a row, 4 to 262144", tool_set_u32,
			&o.row_bytes, 4, 262144 },
		{ "lanes", "M", "1", "frames that are out at once, 1 to 4", tool_set_u32, &o.lanes,
			1, AFD_MAX_LANES },
		{ "max-rows", "N", "all", "rows in one part of a frame, 1 to 65536", tool_set_u32,
			&o.max_rows, 1, 65536 },
		{ "rounds", "N", "1 GiB each way", "rounds of a size, 16 to 4096", tool_set_u32,
			&o.rounds, 16, BENCH_SAMPLES },
		{ "spin-us", "N", "50 us",
			"how long either end's wait spins before it sleeps, 1 to 10000000 us",
			tool_set_u32, &o.spin_us, 1, 10000000 },
		{ "cpus", "A,B", NULL, "binds the attention end and the FFN end to a CPU each",
			set_cpus, o.cpus, 0, 0 },
		{ "connect-timeout-ms", "N", "10000 ms",
			"how long an FFN end that is not up yet is waited for, 1 to 3600000 ms",
			tool_set_u32, &o.common.stage.connect_timeout_ms, 1, 3600000 },
		{ "key", "FILE", NULL, "a key of 16 to 4096 bytes that both ends prove",
			tool_set_text, &o.common.stage.key, 0, 0 },
		{ "tls", NULL, NULL, "with a key, on tcp: the link is encrypted, too",
			tool_set_flag, &o.common.stage.tls, 0, 0 },
		{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &o.common.json, 0,
			0 },
		TOOL_OPTION_LOG(o.common.stage),
		{ 0 },
	};
	int status = tool_options_read(options,
		"exchange [--a ADDR] [--b ADDR] [--rows R] [--row-bytes N] [--lanes M] [--json]\n\n"
		"Frames of fresh rows there and back through the exchange, beside the floor of the\n"
		"same medium: spinning shared memory, or a plain TCP socket. Without addresses it\n"
		"makes both ends itself, over shm: and over tcp:.",
		argc, argv);

	if (!status)
		status = check_options(&o);
	else
		return status < 0 ? TOOL_DONE : status;
	return status ? status : run(&o);
}
