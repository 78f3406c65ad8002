/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command `probe`: what afd_transport_probe found of each backend at an address. Its exit status
 * is 0 when one of them was proved; else the table is there all the same, and the cause on stderr.
 */
#include <stdio.h>
#include <string.h>

#include "bench.h"

struct probe_options {
	struct bench_options common;
	uint32_t timeout_ms;
};

static json_t *describe(const struct afd_probe_backend *b, bool is_chosen)
{
	json_t *what = json_pack("{s:s, s:s, s:s, s:b, s:b, s:b}", "op", "probe", "backend",
		b->scheme, "address", b->address, "machine", b->machine == 0, "proved",
		b->error == 0, "chosen", is_chosen);

	if (what && b->error)
		json_object_set_new(what, "reason", json_string(b->text));
	if (what && !b->error) {
		json_object_set_new(what, "us", json_real(b->round_trip_us));
		json_object_set_new(what, "bytes_per_second", json_real(b->bytes_per_second));
	}
	return what;
}

static void print_line(struct bench_report *report, const struct afd_probe_backend *b, bool is_chosen)
{
	if (!report->n_lines++)
		printf("%-8s %-8s %-7s %10s %10s  %s\n", "backend", "machine", "proved", "us", "GB/s",
			"");
	printf("%-8s %-8s %-7s ", b->scheme, b->machine ? "no" : "yes", b->error ? "no" : "yes");
	if (b->error)
		printf("%10s %10s  %s\n", "-", "-", b->text);
	else
		printf("%10.2f %10.2f  %s%s\n", b->round_trip_us, b->bytes_per_second * 1e-9, b->address,
			is_chosen ? ", chosen" : "");
}

static int report_all(struct bench *b, const struct afd_probe *probe)
{
	for (uint32_t i = 0; i < probe->n_backends; i++) {
		const struct afd_probe_backend *one = &probe->backends[i];
		bool is_chosen = probe->chosen == (int32_t)i;

		if (!b->report.results)
			print_line(&b->report, one, is_chosen);
		else if (json_array_append_new(b->report.results, describe(one, is_chosen)))
			return tool_fail(TOOL_FAILED, "report: no memory");
	}
	return TOOL_DONE;
}

static int run(struct bench *b, const struct probe_options *o, const char *address)
{
	struct afd_probe_backend table[AFD_MAX_BACKENDS];
	struct afd_probe_params params = { .size = sizeof params,
		.timeout_ms = o->timeout_ms,
		.key_file = o->common.stage.key,
		.tls = (uint32_t)o->common.stage.tls };
	struct afd_probe probe = { .size = sizeof probe,
		.backends = table,
		.backend_bytes = sizeof table[0],
		.max_backends = AFD_MAX_BACKENDS };
	int rc = afd_transport_probe(b->ctx, address, &params, &probe), status;

	/* The line comes first: what is on stdout does not change it. */
	if (rc)
		bench_fail();
	if (!probe.n_backends)
		return TOOL_FAILED;
	status = report_all(b, &probe);
	status = bench_report_end(&b->report, status);
	return rc ? TOOL_FAILED : status;
}

/* A value of the flag before it, not an address. */
static int is_value(const struct tool_option *options, const char *before)
{
	for (; options->name; options++) {
		if (!strncmp(before, "--", 2) && !strcmp(before + 2, options->name))
			return options->value != NULL;
	}
	return 0;
}

/* The address stands first, or last. It is taken out; NULL: there is none. */
static const char *take_address(const struct tool_option *options, int *argc, char **argv)
{
	int last = *argc - 1;
	const char *address;

	if (last < 1)
		return NULL;
	if (argv[1][0] != '-') {
		address = argv[1];
		memmove(&argv[1], &argv[2], (size_t)(*argc - 1) * sizeof argv[0]);
	} else if (argv[last][0] != '-' && !is_value(options, argv[last - 1])) {
		address = argv[last];
		argv[last] = NULL;
	} else {
		return NULL;
	}
	--*argc;
	return address;
}

int bench_probe(int argc, char **argv)
{
	struct probe_options o = { .common = { .stage = { .device = "cpu", .threads = 1 } } };
	const struct tool_option options[] = {
		{ "timeout-ms", "N", "10000 ms", "for all of it, 1 to 3600000 ms", tool_set_u32,
			&o.timeout_ms, 1, 3600000 },
		{ "key", "FILE", NULL, "a key of 16 to 4096 bytes that the listener proves, too",
			tool_set_text, &o.common.stage.key, 0, 0 },
		{ "tls", NULL, NULL, "with a key: only what is encrypted, or stays on this host",
			tool_set_flag, &o.common.stage.tls, 0, 0 },
		{ "json", NULL, NULL, "one JSON object on stdout", tool_set_flag, &o.common.json, 0,
			0 },
		TOOL_OPTION_LOG(o.common.stage),
		{ 0 },
	};
	const char *address = take_address(options, &argc, argv);
	struct bench b;
	int status = tool_options_read(options,
		"probe ADDR [--timeout-ms N] [--key FILE] [--tls] [--json]\n\n"
		"Which backends this build and this machine can carry to who listens at ADDR, proved\n"
		"by bytes there and back: shm:NAME, tcp:HOST:PORT and verbs:HOST:PORT that one,\n"
		"auto:HOST:PORT all that the listener has. It needs no model and disturbs no peer.",
		argc, argv);

	if (status)
		return status < 0 ? TOOL_DONE : status;
	if (!address)
		return tool_fail(TOOL_USAGE, "probe: no address, wanted one such as auto:HOST:PORT");
	if (o.common.stage.tls && !o.common.stage.key)
		return tool_fail(TOOL_USAGE, "--tls: there is no --key");
	status = bench_machine_open(&b, &o.common);
	if (status == TOOL_DONE)
		status = run(&b, &o, address);
	return bench_close(&b, status);
}
