/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One result, four ways to see it: lines and a table, JSON, CSV, a picture. The picture is drawn by
 * afd_plan_plot.py, which lies beside the tool or under share/afd, and gets the same JSON.
 */
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../tool/json.h"
#include "plan.h"

int plan_fail(void)
{
	return tool_fail(TOOL_FAILED, "%s", afd_last_error());
}

json_t *plan_number(double value)
{
	return isfinite(value) ? json_real(value) : json_null();
}

const char *plan_bound_name(int32_t bound)
{
	static const char *const names[] = { "none", "attention", "ffn", "communication", "latency",
		"devices" };

	return bound >= 0 && bound <= AFD_PLAN_DEVICES ? names[bound] : "?";
}

const char *plan_constraint_name(int32_t constraint)
{
	static const char *const names[] = { "none", "none", "range", "slo", "kv_memory",
		"ffn_memory" };

	return constraint >= 0 && constraint <= AFD_PLAN_FFN_MEMORY ? names[constraint] : "?";
}

static int ends_with(const char *text, const char *end)
{
	size_t n = strlen(text), m = strlen(end);

	return n > m && !strcmp(text + n - m, end);
}

int plan_output_check(const struct plan_output *o)
{
	if (o->json && o->csv)
		return tool_fail(TOOL_USAGE, "--csv: not beside --json");
	if (o->plot && !ends_with(o->plot, ".svg") && !ends_with(o->plot, ".png"))
		return tool_fail(TOOL_USAGE, "--plot %s: limit FILE.svg or FILE.png", o->plot);
	return TOOL_DONE;
}

/* ---- text ---- */

static void print_value(const json_t *value, int width)
{
	if (json_is_real(value))
		printf("%*.6g", width, json_real_value(value));
	else if (json_is_integer(value))
		printf("%*lld", width, (long long)json_integer_value(value));
	else if (json_is_string(value))
		printf("%*s", width, json_string_value(value));
	else if (json_is_boolean(value))
		printf("%*s", width, json_is_true(value) ? "yes" : "no");
	else
		printf("%*s", width, "-");
}

/* Numbers on one line, sentences on one each. */
static void print_list(const json_t *value)
{
	size_t i;
	json_t *item;

	json_array_foreach(value, i, item)
	{
		if (i)
			printf("%s", json_is_string(item) ? "\n                           " : ", ");
		print_value(item, 0);
	}
	printf("\n");
}

static void print_members(const json_t *object, const char *but, int indent)
{
	const char *key;
	json_t *value;

	json_object_foreach((json_t *)object, key, value)
	{
		if (but && !strcmp(key, but))
			continue;
		if (json_is_array(value) && json_is_object(json_array_get(value, 0)))
			continue;
		printf("%*s%-*s ", indent, "", 26 - indent, key);
		if (json_is_object(value)) {
			printf("\n");
			print_members(value, NULL, indent + 2);
		} else if (json_is_array(value)) {
			print_list(value);
		} else {
			print_value(value, 0);
			printf("\n");
		}
	}
}

static int width_of(const json_t *rows, const char *key)
{
	int width = (int)strlen(key);
	size_t i;
	json_t *row;

	json_array_foreach(rows, i, row)
	{
		const char *text = json_string_value(json_object_get(row, key));
		int n = text ? (int)strlen(text) : 9;

		width = n > width ? n : width;
	}
	return width;
}

/* Reasons are too long for a column: each stands once, under the table. */
static void print_reasons(const json_t *rows)
{
	const char *before = "";
	size_t i;
	json_t *row;

	json_array_foreach(rows, i, row)
	{
		const char *reason = json_string_value(json_object_get(row, "reason"));
		const char *name = json_string_value(json_object_get(row, "name"));

		if (!reason || !name || !strcmp(reason, before))
			continue;
		printf("\n%.*s: %s\n", (int)strcspn(name, ","), name, reason);
		before = reason;
	}
}

static void print_row(const json_t *rows, const json_t *row, int names)
{
	const char *key;
	json_t *value;

	json_object_foreach((json_t *)row, key, value)
	{
		if (!strcmp(key, "reason"))
			continue;
		printf("  ");
		if (names)
			printf("%*s", width_of(rows, key), key);
		else
			print_value(value, width_of(rows, key));
	}
	printf("\n");
}

static void print_table(const json_t *rows)
{
	size_t i;
	json_t *row;

	printf("\n");
	print_row(rows, json_array_get(rows, 0), 1);
	json_array_foreach(rows, i, row) print_row(rows, row, 0);
	print_reasons(rows);
}

/* ---- CSV ---- */

static void print_cell(const json_t *value)
{
	const char *text = json_string_value(value);

	if (json_is_null(value))
		return;
	if (!text || !strpbrk(text, ",\"\n")) {
		if (json_is_real(value))
			printf("%.9g", json_real_value(value));
		else
			print_value(value, 0);
		return;
	}
	putchar('"');
	for (; *text; text++)
		printf("%s%c", *text == '"' ? "\"" : "", *text);
	putchar('"');
}

static void print_csv(const json_t *rows)
{
	size_t i;
	json_t *row;

	json_array_foreach(rows, i, row)
	{
		const char *key, *before = "";
		json_t *value;

		if (!i) {
			json_object_foreach(row, key, value)
			{
				printf("%s%s", before, key);
				before = ",";
			}
			printf("\n");
			before = "";
		}
		json_object_foreach(row, key, value)
		{
			printf("%s", before);
			print_cell(value);
			before = ",";
		}
		printf("\n");
	}
}

/* ---- pictures ---- */

/* Beside the program (a build folder), or ../share/afd (an installed tree). */
static int find_script(char *path, size_t room)
{
	static const char *const places[] = { "afd_plan_plot.py", "../share/afd/afd_plan_plot.py" };
	ssize_t n = readlink("/proc/self/exe", path, room - 64);
	char *slash;

	if (n <= 0)
		return -1;
	path[n] = '\0';
	slash = strrchr(path, '/');
	for (int i = 0; slash && i < 2; i++) {
		strcpy(slash + 1, places[i]);
		if (!access(path, R_OK))
			return 0;
	}
	return -1;
}

static int feed_script(FILE *to, const json_t *result)
{
	int rc = json_dumpf(result, to, JSON_REAL_PRECISION(12));

	return fclose(to) || rc ? -1 : 0;
}

static int draw(const struct plan_output *o, const json_t *result, const char *kind)
{
	char script[4096];
	int ends[2], status = 0;
	pid_t child;

	if (find_script(script, sizeof script))
		return tool_fail(TOOL_FAILED,
			"--plot: afd_plan_plot.py is neither beside the tool nor "
			"in ../share/afd");
	if (pipe(ends))
		return tool_fail(TOOL_FAILED, "--plot: pipe: %s", strerror(errno));
	fflush(stdout);
	child = fork();
	if (!child) {
		dup2(ends[0], STDIN_FILENO);
		close(ends[0]);
		close(ends[1]);
		execlp("python3", "python3", script, kind, o->plot, (char *)NULL);
		fprintf(stderr, "python3: %s\n", strerror(errno));
		_exit(127);
	}
	close(ends[0]);
	signal(SIGPIPE, SIG_IGN);
	if (child > 0)
		feed_script(fdopen(ends[1], "w"), result);
	if (child < 0 || waitpid(child, &status, 0) < 0 || status)
		return tool_fail(TOOL_FAILED,
			"--plot %s: python3 did not draw it (is matplotlib "
			"installed?)",
			o->plot);
	return TOOL_DONE;
}

int plan_output_show(
	const struct plan_output *o, json_t *result, const char *list, const char *kind)
{
	int status = TOOL_DONE;

	if (!result)
		return tool_fail(TOOL_FAILED, "output: no memory");
	if (o->plot)
		status = draw(o, result, kind);
	if (o->json) {
		int printed = tool_json_print(result);

		return status ? status : printed;
	}
	if (o->csv) {
		print_csv(list ? json_object_get(result, list) : NULL);
	} else {
		print_members(result, list, 0);
		if (list && json_array_size(json_object_get(result, list)))
			print_table(json_object_get(result, list));
	}
	json_decref(result);
	if (fflush(stdout))
		return tool_fail(TOOL_FAILED, "stdout: cannot write");
	return status;
}
