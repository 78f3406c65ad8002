/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every golden checkpoint opens, and every tensor that a role needs is found, mapped and of the shape that its config says.
 * One test per directory under tests/golden.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../../lib/model/model.h"

enum { MAX_CASES = 200 };

static afd_context *ctx;
static char root[300];
static char names[MAX_CASES][160], dirs[MAX_CASES][600];
static struct CMUnitTest tests[MAX_CASES];

static void check_checkpoint(void **state)
{
	uint64_t bytes[3] = { 0 };
	struct afd_role_info info = { .size = sizeof(info) };
	struct afd__tensor t;
	afd_model *model;
	uint32_t i;
	int role;

	if (afd_model_open(&model, ctx, *state, NULL))
		fail_msg("%s", afd_last_error());
	for (i = 0; i < model->n_slots; i++) {
		if (afd__model_tensor(model, model->slots[i].layer, model->slots[i].kind, &t))
			fail_msg("%s", afd_last_error());
		assert_non_null(t.data);
		assert_int_equal(t.bytes, t.shape[0] * (t.n_dims > 1 ? t.shape[1] : 1) * afd_dtype_bytes(t.dtype));
		if (!afd__slot_is_shared(model, &model->slots[i]))
			bytes[model->slots[i].role] += t.bytes;
	}
	for (role = AFD_ROLE_ATTENTION; role <= AFD_ROLE_FFN; role++) {
		assert_int_equal(afd_model_role(model, role, &info), 0);
		assert_int_equal(info.bytes, bytes[role]);
	}
	afd_model_close(model);
}

/* Recorded for later versions. */
static void check_refusal(void **state)
{
	afd_model *model = NULL;

	assert_int_equal(afd_model_open(&model, ctx, *state, NULL), -ENOTSUP);
	assert_null(model);
}

static bool is_for_later(const char *name)
{
	static const char *const families[] = { "afmoe", "moe", "fp8" };

	for (size_t i = 0; i < sizeof(families) / sizeof(*families); i++) {
		if (!strncmp(name, families[i], strlen(families[i])))
			return true;
	}
	return false;
}

static int find_cases(void)
{
	const char *source = getenv("AFD_TEST_SOURCE");
	struct dirent *entry;
	char config[900];
	int n = 0;
	DIR *d;

	snprintf(root, sizeof(root), "%s/golden", source ? source : "tests");
	d = opendir(root);
	while (d && n < MAX_CASES && (entry = readdir(d))) {
		snprintf(dirs[n], sizeof(dirs[n]), "%s/%s", root, entry->d_name);
		snprintf(config, sizeof(config), "%.599s/config.json", dirs[n]);
		if (entry->d_name[0] == '.' || access(config, R_OK))
			continue;
		snprintf(names[n], sizeof(names[n]), "golden_%.100s_%s", entry->d_name,
			 is_for_later(entry->d_name) ? "is_refused" : "opens");
		tests[n] = (struct CMUnitTest){ names[n], is_for_later(entry->d_name) ? check_refusal : check_checkpoint,
						NULL, NULL, dirs[n] };
		n++;
	}
	if (d)
		closedir(d);
	return n;
}

int main(void)
{
	int n = find_cases(), rc;

	if (!n) {
		fprintf(stderr, "no checkpoint under %s\n", root);
		return 1;
	}
	if (afd_context_create(&ctx, NULL))
		return 1;
	rc = _cmocka_run_group_tests("golden", tests, (size_t)n, NULL, NULL);
	afd_context_destroy(ctx);
	return rc;
}
