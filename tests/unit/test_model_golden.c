/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every golden checkpoint opens, and every tensor that a role needs is found, mapped and of the
 * shape that its config says. One test per directory under tests/golden.
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

#include <afd/transport.h>

#include "../../lib/model/checkpoint_state.h"

enum { MAX_CASES = 200 };

static afd_context *ctx;
static char root[300];
static char names[MAX_CASES][160], dirs[MAX_CASES][600];
static struct CMUnitTest tests[MAX_CASES];

static void check_slot(const struct afd_model *model, const struct afd__slot *slot)
{
	struct afd__tensor t;
	int rc = slot->expert < 0 ? afd__model_tensor(model, slot->layer, slot->kind, &t)
				  : afd__model_expert(model, slot->layer, (uint32_t)slot->expert, slot->kind, &t);

	if (rc)
		fail_msg("%s", afd_last_error());
	assert_non_null(t.data);
	assert_int_equal(t.bytes, t.shape[0] * (t.n_dims > 1 ? t.shape[1] : 1) * afd_dtype_bytes(t.dtype));
	if (t.dtype == AFD_DTYPE_FP8) {
		assert_non_null(t.scales.data);
		assert_int_equal(t.scales.rows, (t.scales.row_offset + t.shape[0] + 127) / 128);
		assert_int_equal(t.scales.columns, (t.shape[1] + 127) / 128);
	}
}

/* What a role says of itself is what is listed of it, and the one shard of one. */
static void check_role(const struct afd_model *model, int32_t role)
{
	struct afd_shard_params whole = { .size = sizeof(whole), .role = role, .gate = AFD_GATE_FFN };
	struct afd_role_info info = { .size = sizeof(info) }, shard = { .size = sizeof(shard) };
	struct afd_model_info about = { .size = sizeof(about) };
	struct afd_tensor_info t = { .size = sizeof(t) };
	uint64_t bytes = 0;
	uint32_t i;

	assert_int_equal(afd_model_info(model, &about), 0);
	for (i = 0; i < about.n_tensors; i++) {
		assert_int_equal(afd_model_tensor(model, i, &t), 0);
		bytes += t.role == role ? t.bytes : 0;
	}
	assert_int_equal(afd_model_role(model, role, &info), 0);
	assert_int_equal(afd_model_shard(model, &whole, &shard), 0);
	assert_int_equal(info.bytes, bytes);
	/* A block of scales that gate and up of a fused tensor share is held with each of them. */
	assert_in_range(shard.bytes, bytes, bytes + bytes / 1000);
	assert_int_equal(shard.n_tensors, info.n_tensors);
}

static void check_checkpoint(void **state)
{
	afd_model *model;
	uint32_t i;

	if (afd_model_open(&model, ctx, *state, NULL))
		fail_msg("%s", afd_last_error());
	for (i = 0; i < model->n_slots; i++)
		check_slot(model, &model->slots[i]);
	check_role(model, AFD_ROLE_ATTENTION);
	check_role(model, AFD_ROLE_FFN);
	/* Every tensor of the file is somebody's; that of a tied head may be there and count for nothing. */
	assert_in_range(model->checkpoint->n_stored + model->arch.tied_head, model->n_listed, model->n_listed + 1);
	afd_model_close(model);
}

/* transformers takes a default here that describes no published model. */
static void check_refusal(void **state)
{
	afd_model *model = NULL;

	assert_int_equal(afd_model_open(&model, ctx, *state, NULL), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "route_scale is missing"));
	assert_null(model);
}

static bool is_refused(const char *name)
{
	return !strcmp(name, "afmoe-scale-absent");
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
			 is_refused(entry->d_name) ? "is_refused" : "opens");
		tests[n] = (struct CMUnitTest){ names[n], is_refused(entry->d_name) ? check_refusal : check_checkpoint,
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
