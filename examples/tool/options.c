/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Flags: getopt_long over the table, strict values, and --help from the same rows.
 * Numbers are read whole: "12x", "-1", "1e3" and "" are refused where an integer is meant.
 */
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <afd/afd.h>

#include "options.h"

#define MAX_OPTIONS 62

int tool_fail(int status, const char *format, ...)
{
	char text[1024];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof text, format, args);
	va_end(args);
	fprintf(stderr, "%s: %s\n", program_invocation_short_name, text);
	return status;
}

int tool_flush(void)
{
	if (ferror(stdout) || fflush(stdout))
		return tool_fail(TOOL_FAILED, "stdout: cannot be written");
	return TOOL_DONE;
}

int tool_set_flag(const struct tool_option *option, const char *value)
{
	(void)value;
	*(int *)option->into = 1;
	return TOOL_DONE;
}

int tool_set_text(const struct tool_option *option, const char *value)
{
	if (!*value)
		return tool_fail(TOOL_USAGE, "--%s: the value is empty", option->name);
	*(const char **)option->into = value;
	return TOOL_DONE;
}

int tool_set_list(const struct tool_option *option, const char *value)
{
	struct tool_list *list = option->into;
	const char **items = realloc(list->items, (list->n_items + 1) * sizeof *items);

	if (!items)
		return tool_fail(TOOL_USAGE, "--%s: no memory", option->name);
	items[list->n_items++] = value;
	list->items = items;
	return TOOL_DONE;
}

static int read_u64(const char *text, uint64_t *out)
{
	char *end;

	errno = 0;
	*out = strtoull(text, &end, 10);
	return isdigit((unsigned char)*text) && !*end && !errno ? 0 : -1;
}

int tool_set_u64(const struct tool_option *option, const char *value)
{
	if (read_u64(value, option->into))
		return tool_fail(TOOL_USAGE, "--%s: value '%s', limit 0 to %llu", option->name,
			value, ~0ull);
	return TOOL_DONE;
}

int tool_set_u32(const struct tool_option *option, const char *value)
{
	uint64_t number;

	if (read_u64(value, &number) || number < option->min || number > option->max)
		return tool_fail(TOOL_USAGE, "--%s: value '%s', limit %.0f to %.0f", option->name,
			value, option->min, option->max);
	*(uint32_t *)option->into = number;
	return TOOL_DONE;
}

int tool_set_real(const struct tool_option *option, const char *value)
{
	char *end;
	double number = strtod(value, &end);

	if (end == value || *end || !isfinite(number) || number < option->min ||
		number > option->max)
		return tool_fail(TOOL_USAGE, "--%s: value '%s', limit %g to %g", option->name,
			value, option->min, option->max);
	*(double *)option->into = number;
	return TOOL_DONE;
}

int tool_set_log(const struct tool_option *option, const char *value)
{
	static const char *const levels[] = { "error", "warn", "info", "debug" };

	for (int i = 0; i < 4; i++) {
		if (!strcmp(value, levels[i])) {
			*(int32_t *)option->into = AFD_LOG_ERROR + i;
			return TOOL_DONE;
		}
	}
	return tool_fail(TOOL_USAGE, "--%s: value '%s', limit error, warn, info or debug",
		option->name, value);
}

int tool_set_either(const struct tool_option *option, const char *value)
{
	size_t n_first = strcspn(option->value, "|");
	const char *second = option->value + n_first + 1;
	int is_first = strlen(value) == n_first && !memcmp(value, option->value, n_first);

	assert(option->value[n_first]);
	if (!is_first && strcmp(value, second))
		return tool_fail(TOOL_USAGE, "--%s: value '%s', limit %.*s or %s", option->name,
			value, (int)n_first, option->value, second);
	*(int32_t *)option->into = is_first ? 1 : 2;
	return TOOL_DONE;
}

/* One name of the value, n_chars from `name` on. */
static int read_dtype(const struct tool_option *option, const char *value, const char *name,
	size_t n_chars, int32_t *out)
{
	static const struct {
		const char *name;
		int32_t dtype;
	} names[] = {
		{ "auto", 0 },
		{ "f32", AFD_DTYPE_F32 },
		{ "bf16", AFD_DTYPE_BF16 },
		{ "f16", AFD_DTYPE_F16 },
		{ "fp8", AFD_DTYPE_FP8 },
	};

	for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
		if (strlen(names[i].name) == n_chars && !memcmp(name, names[i].name, n_chars)) {
			*out = names[i].dtype;
			return TOOL_DONE;
		}
	}
	return tool_fail(TOOL_USAGE, "--%s: value '%s', limit auto, f32, bf16, f16 or fp8",
		option->name, value);
}

int tool_set_dtype(const struct tool_option *option, const char *value)
{
	return read_dtype(option, value, value, strlen(value), option->into);
}

int tool_set_dtypes(const struct tool_option *option, const char *value)
{
	const char *second = strchr(value, ':');
	int32_t *dtypes = option->into;
	int status;

	if (!second) {
		status = read_dtype(option, value, value, strlen(value), &dtypes[0]);
		dtypes[1] = dtypes[0];
		return status;
	}
	status = read_dtype(option, value, value, second - value, &dtypes[0]);
	return status ? status
		      : read_dtype(option, value, second + 1, strlen(second + 1), &dtypes[1]);
}

int tool_set_device(const struct tool_option *option, const char *value)
{
	int is_cuda = !strncmp(value, "cuda", 4) && (!value[4] || value[4] == ':');

	/* What follows "cuda:" is looked at by the library. */
	if (strcmp(value, "cpu") && strcmp(value, "deferred") && !is_cuda)
		return tool_fail(TOOL_USAGE, "--%s: value '%s', limit cpu, cuda:N or deferred",
			option->name, value);
	*(const char **)option->into = value;
	return TOOL_DONE;
}

static int set_only(const struct tool_option *option, const char *value, const char *limit)
{
	if (!strcmp(value, limit))
		return TOOL_DONE;
	return tool_fail(
		TOOL_USAGE, "--%s %s: not in this version, limit %s", option->name, value, limit);
}

int tool_set_shard(const struct tool_option *option, const char *value)
{
	uint32_t *shard = option->into;
	unsigned long long index, n;
	char *end = NULL;
	int fits;

	errno = 0;
	fits = isdigit((unsigned char)*value);
	index = strtoull(value, &end, 10);
	fits = fits && *end == '/' && isdigit((unsigned char)end[1]);
	n = fits ? strtoull(end + 1, &end, 10) : 0;
	if (!fits || *end || errno || n > UINT32_MAX || index >= n)
		return tool_fail(TOOL_USAGE, "--%s %s: not a shard i/n, limit 0/n to n-1/n",
			option->name, value);
	shard[0] = (uint32_t)index;
	shard[1] = (uint32_t)n;
	return TOOL_DONE;
}

int tool_set_one(const struct tool_option *option, const char *value)
{
	return set_only(option, value, "1");
}

int tool_set_zero(const struct tool_option *option, const char *value)
{
	return set_only(option, value, "0");
}

int tool_set_later(const struct tool_option *option, const char *value)
{
	return tool_fail(TOOL_USAGE, "--%s%s%s: not in this version", option->name,
		value ? " " : "", value ? value : "");
}

static void print_help(const struct tool_option *options, const char *usage)
{
	printf("usage: %s %s\n\n", program_invocation_short_name, usage);
	for (const struct tool_option *o = options; o->name; o++) {
		char left[64];

		snprintf(left, sizeof left, "--%s%s%s", o->name, o->value ? " " : "",
			o->value ? o->value : "");
		printf("  %-28s %s", left, o->text);
		if (o->initial)
			printf(" (default %s)", o->initial);
		printf("\n");
	}
	printf("  %-28s %s\n  %-28s %s\n", "--help", "this text", "--version",
		"the version of the library");
	printf("\nexit status: 0 done, 1 failed, 2 wrong usage\n");
}

/* optind - 1 is the word that getopt stumbled over. */
static int refuse_word(int found, char **argv)
{
	const char *word = argv[optind - 1];

	if (found == ':')
		return tool_fail(TOOL_USAGE, "%s: a value is missing, see --help", word);
	if (strchr(word, '='))
		return tool_fail(TOOL_USAGE, "%.*s: no such flag, or it takes no value, see --help",
			(int)strcspn(word, "="), word);
	return tool_fail(TOOL_USAGE, "%s: no such flag, see --help", word);
}

int tool_options_read(const struct tool_option *options, const char *usage, int argc, char **argv)
{
	struct option flags[MAX_OPTIONS + 3] = { 0 };
	int n = 0, found, index, status;

	for (; options[n].name && n < MAX_OPTIONS; n++)
		flags[n] = (struct option){ options[n].name,
			options[n].value ? required_argument : no_argument, NULL, 'o' };
	flags[n] = (struct option){ "help", no_argument, NULL, 'h' };
	flags[n + 1] = (struct option){ "version", no_argument, NULL, 'v' };

	while ((found = getopt_long(argc, argv, "+:", flags, &index)) != -1) {
		if (found == 'h') {
			print_help(options, usage);
			return tool_flush() ? TOOL_FAILED : -1;
		}
		if (found == 'v') {
			printf("%s %s\n", program_invocation_short_name, afd_version());
			return tool_flush() ? TOOL_FAILED : -1;
		}
		if (found != 'o')
			return refuse_word(found, argv);
		status = options[index].set(&options[index], optarg);
		if (status)
			return status;
	}
	if (optind < argc)
		return tool_fail(TOOL_USAGE, "'%s': flags only, see --help", argv[optind]);
	return TOOL_DONE;
}
