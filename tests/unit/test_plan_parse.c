/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The planner's readers: traces as CSV and JSONL, also with the columns of the published Azure LLM
 * trace; measured times; calibrations; and the fit of a line with what it does not explain.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <afd/afd.h>

#include "../support/near.h"

struct refusal {
	const char *text;
	const char *words[2];
};

static void traces_of_every_form_give_the_same_rows(void **state)
{
	static const char *const texts[] = {
		"prompt_tokens,output_tokens\n10,2\n40,8\n",
		"\xef\xbb\xbfoutput_tokens , id, prompt_tokens\r\n2,a,10\r\n\r\n8,b,40",
		"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 "
		"18:17:03.97,10,2\nx,40,8\nx,7,0\n",
		"{\"prompt_tokens\": 10, \"output_tokens\": 2}\n{\"output_tokens\": 8, "
		"\"prompt_tokens\": 40}\n",
		"\n{\"ContextTokens\": 10, \"GeneratedTokens\": 2, \"at\": [1]}\n\n"
		"{\"ContextTokens\": 40, \"GeneratedTokens\": 8}",
		"\"prompt_tokens\",\"output_tokens\"\n\"10\",\"2\"\n\"40\",\"8\"\n",
	};
	struct afd_plan_request rows[4];
	size_t n;

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		n = 0;
		if (afd_plan_parse_trace(texts[i], strlen(texts[i]), rows, 4, &n) != 2)
			fail_msg("text %zu: %s", i, afd_last_error());
		assert_int_equal(n, 2);
		assert_int_equal(rows[0].prompt_tokens, 10);
		assert_int_equal(rows[0].output_tokens, 2);
		assert_int_equal(rows[1].prompt_tokens, 40);
		assert_int_equal(rows[1].output_tokens, 8);
	}
	assert_int_equal(afd_plan_parse_trace(texts[0], strlen(texts[0]), rows, 1, &n), -ENOSPC);
	assert_int_equal(n, 2);
}

static void bad_traces_are_refused_with_line_and_column(void **state)
{
	static const struct refusal cases[] = {
		{ "", { "no request", "" } },
		{ "prompt_tokens,output_tokens\n", { "no request", "" } },
		{ "prompt_tokens,output_tokens\n5,0\n", { "no request", "" } },
		{ "prompt,output_tokens\n1,2\n", { "line 1", "prompt_tokens" } },
		{ "prompt_tokens,prompt_tokens,output_tokens\n1,2,3\n",
			{ "twice", "prompt_tokens" } },
		{ "prompt_tokens,output_tokens\n1,2\n-3,4\n", { "line 3", "'-3'" } },
		{ "prompt_tokens,output_tokens\n1,2.5\n", { "line 2", "output_tokens is '2.5'" } },
		{ "prompt_tokens,output_tokens\n1,nan\n", { "line 2", "'nan'" } },
		{ "prompt_tokens,output_tokens\n1,999999999999999999999\n", { "line 2", "limit" } },
		{ "prompt_tokens,output_tokens\n1,100000001\n", { "line 2", "100000000" } },
		{ "prompt_tokens,output_tokens\n1\n", { "line 2", "output_tokens is missing" } },
		{ "{\"prompt_tokens\": 1}\n", { "line 1", "output_tokens is missing" } },
		{ "{\"prompt_tokens\": 1, \"output_tokens\": 2.0}\n", { "line 1", "integer" } },
		{ "{\"prompt_tokens\": 1, \"output_tokens\": 2}\n{\n", { "line 2", "not JSON" } },
		{ "{\"prompt_tokens\": 1, \"output_tokens\": 2}\n3\n",
			{ "line 2", "not an object" } },
		{ "{\"prompt_tokens\": 1, \"ContextTokens\": 2, \"output_tokens\": 2}\n",
			{ "line 1", "differs" } },
	};
	struct afd_plan_request rows[4];
	size_t n = 77;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_int_equal(
			afd_plan_parse_trace(cases[i].text, strlen(cases[i].text), rows, 4, &n),
			-EBADMSG);
		if (!strstr(afd_last_error(), cases[i].words[0]) ||
			!strstr(afd_last_error(), cases[i].words[1]))
			fail_msg("case %zu: %s", i, afd_last_error());
		assert_int_equal(n, 77);
	}
}

static void times_are_read_from_csv_and_json(void **state)
{
	static const char *const texts[] = {
		"stage,device,dtype,rows,context,us\nffn,H200,fp8,8,0,96.6\nattention,H200,bf16,1,"
		"1024,11.8\n",
		"us , "
		"context,rows,dtype,device,stage\r\n96.6,0,8,fp8,H200,ffn\r\n11.8,1024,1,bf16,H200,"
		"attention\n",
		"[{\"stage\": \"ffn\", \"device\": \"H200\", \"dtype\": \"fp8\", \"rows\": 8, "
		"\"us\": 96.6},"
		" {\"stage\": \"attention\", \"device\": \"H200\", \"rows\": 1, \"context\": 1024, "
		"\"us\": 11.8}]",
		"{\"times\": [{\"stage\": \"ffn\", \"device\": \"H200\", \"rows\": 8, \"us\": "
		"96.6},"
		" {\"stage\": \"attention\", \"device\": \"H200\", \"rows\": 1, \"context\": 1024, "
		"\"us\": 11.8}]}",
	};
	struct afd_plan_time times[2];
	size_t n;

	for (size_t i = 0; i < 4; i++) {
		if (afd_plan_parse_times(texts[i], strlen(texts[i]), times, 2, &n) != 2)
			fail_msg("text %zu: %s", i, afd_last_error());
		assert_string_equal(times[0].stage, "ffn");
		assert_string_equal(times[1].device, "H200");
		near(times[0].us, 96.6, 1e-12);
		near(times[1].context, 1024, 0);
	}
	assert_int_equal(afd_plan_parse_times(texts[0], strlen(texts[0]), NULL, 0, &n), -ENOSPC);
	assert_int_equal(n, 2);
}

static void bad_times_are_refused_with_their_place(void **state)
{
	static const struct refusal cases[] = {
		{ "", { "none", "" } },
		{ "stage,device,dtype,rows,us\nffn,a,b,1,2\n", { "line 1", "context" } },
		{ "stage,device,dtype,rows,context,us\nffn,a,b,1,0\n", { "line 2", "5 fields" } },
		{ "stage,device,dtype,rows,context,us\nffn,a,b,0,0,1\n",
			{ "line 2", "rows is '0'" } },
		{ "stage,device,dtype,rows,context,us\nffn,a,b,1,0,nan\n",
			{ "line 2", "us is 'nan'" } },
		{ "stage,device,dtype,rows,context,us\nffn,a,b,1,0,-1\n",
			{ "line 2", "us is '-1'" } },
		{ "stage,device,dtype,rows,context,us\nffm,a,b,1,0,1\n", { "line 2", "'ffm'" } },
		{ "{\"time\": []}", { "list", "" } },
		{ "[3]", { "entry 0", "object" } },
		{ "[{\"stage\": \"ffn\", \"us\": 1}]", { "entry 0", "rows is missing" } },
		{ "[{\"rows\": 1, \"us\": 1}]", { "entry 0", "stage" } },
		{ "[{\"stage\": \"ffn\", \"rows\": 1e10, \"us\": 1}]", { "entry 0", "rows" } },
		{ "[{\"stage\": \"ffn\", \"rows\": 1, \"us\": 1}", { "not JSON", "" } },
	};
	struct afd_plan_time times[2];
	size_t n = 77;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		assert_int_equal(
			afd_plan_parse_times(cases[i].text, strlen(cases[i].text), times, 2, &n),
			-EBADMSG);
		if (!strstr(afd_last_error(), cases[i].words[0]) ||
			!strstr(afd_last_error(), cases[i].words[1]))
			fail_msg("case %zu: %s", i, afd_last_error());
		assert_int_equal(n, 77);
	}
}

static void a_calibration_fills_the_coefficients_and_leaves_the_rest(void **state)
{
	static const char text[] =
		"{\"alpha_a\": 0.5, \"beta_a\": 3, \"alpha_f\": 0.25, \"beta_f\": 4,"
		" \"alpha_c\": 0.125, \"beta_c\": 5, \"layers\": 2, \"devices\": 2, \"batch\": 16, "
		"\"x\": {}}";
	static const char *const bad[] = { "[]", "{}", "{\"alpha_a\": -1}", "{\"alpha_a\": \"1\"}",
		"{\"alpha_a\": 1, \"layers\": 0}", "{\"alpha_a\": 1, \"alpha_a\": 2}",
		"{\"alpha_a\": 1" };
	struct afd_plan_params p = { .size = sizeof(p), .batch = 9, .lanes = 3 };

	assert_int_equal(afd_plan_parse_calibration(text, strlen(text), &p), 0);
	near(p.alpha_a + p.beta_a + p.alpha_f + p.beta_f + p.alpha_c + p.beta_c, 12.875, 1e-12);
	assert_int_equal(p.layers, 2);
	assert_int_equal(p.devices, 2);
	assert_int_equal(p.lanes, 3);
	near(p.batch, 16, 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(afd_plan_parse_calibration(bad[i], strlen(bad[i]), &p), -EBADMSG);
		near(p.alpha_a, 0.5, 0);
	}
}

static void a_line_is_fitted_with_its_residuals(void **state)
{
	double x[20], y[20];
	struct afd_plan_line line = { .size = sizeof(line) };

	for (int i = 0; i < 20; i++) {
		x[i] = i;
		y[i] = 3 + 2 * i + (i % 2 ? 0.1 : -0.1);
	}
	assert_int_equal(afd_plan_fit(x, y, 20, &line), 0);
	near(line.alpha, 2, 0.005);
	near(line.beta, 3, 0.05);
	near(line.r2, 1, 1e-3);
	assert_true(line.r2 < 1);
	near(line.residual_p95, 0.1, 0.02);
	assert_true(line.residual_max >= line.residual_p95);
}

static void a_fit_that_means_nothing_is_refused(void **state)
{
	static const double rising[] = { 1, 2, 3, 4 }, falling[] = { 9, 7, 5, 3 },
			    same[] = { 2, 2, 2, 2 };
	static const double low[] = { 0, 5, 10, 15 }, noisy[] = { 2.02, 1.99, 2.01, 1.98 };
	struct afd_plan_line line = { .size = sizeof(line) };
	double with_nan[] = { 1, NAN, 3, 4 };

	assert_int_equal(afd_plan_fit(rising, falling, 4, &line), -EDOM);
	assert_non_null(strstr(afd_last_error(), "alpha"));
	assert_int_equal(afd_plan_fit(same, rising, 4, &line), -EINVAL);
	assert_int_equal(afd_plan_fit(rising, rising, 1, &line), -EINVAL);
	assert_int_equal(afd_plan_fit(rising, with_nan, 4, &line), -EINVAL);
	/* A bend: the line through 0, with what it leaves. */
	assert_int_equal(afd_plan_fit(rising, low, 4, &line), 0);
	near(line.beta, 0, 0);
	near(line.alpha, 100 / 30.0, 1e-12);
	near(line.residual_max, 10 / 3.0, 1e-9);
	/* Within the noise a slope below 0 is none. */
	assert_int_equal(afd_plan_fit(rising, noisy, 4, &line), 0);
	near(line.alpha, 0, 0);
	near(line.beta, 2, 1e-9);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(traces_of_every_form_give_the_same_rows),
		cmocka_unit_test(bad_traces_are_refused_with_line_and_column),
		cmocka_unit_test(times_are_read_from_csv_and_json),
		cmocka_unit_test(bad_times_are_refused_with_their_place),
		cmocka_unit_test(a_calibration_fills_the_coefficients_and_leaves_the_rest),
		cmocka_unit_test(a_line_is_fitted_with_its_residuals),
		cmocka_unit_test(a_fit_that_means_nothing_is_refused),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
