/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files of e4m3 and of fused experts that are wrong, or only odd: a tensor is refused with its name and what it lacks, or read
 * as it is meant. A checkpoint that can be opened stays open for the tensors that are good.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>

#include "../../lib/model/model.h"
#include "../unit/checkpoint_files.h"

#define CONFIG \
	"{\"model_type\":\"qwen3_moe\",\"hidden_size\":3,\"num_hidden_layers\":1,\"vocab_size\":5,\"num_attention_heads\":2," \
	"\"head_dim\":2,\"num_experts\":2,\"num_experts_per_tok\":1,\"moe_intermediate_size\":3}"
#define EXPERT "model.layers.0.mlp.experts.1."
#define FUSED "model.layers.0.mlp.experts."
#define TENSOR(name, dtype, shape, offsets) \
	"\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static afd_context *ctx;
static afd_model *model;
static char dir[64];

static int begin(void **state)
{
	model = NULL;
	make_dir(dir);
	write_text(dir, "config.json", CONFIG);
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_model_close(model);
	afd_context_destroy(ctx);
	remove_dir(dir);
	return 0;
}

/* Data of bytes that count up from 0. */
static void write_counting(const char *name, const char *header, size_t data_bytes)
{
	char bytes[1024];
	size_t i;

	for (i = 0; i < data_bytes; i++)
		bytes[i] = (char)i;
	write_safetensors(dir, name, header, (const float *)bytes, data_bytes);
}

/* ---- a tensor alone ---- */

static const struct bad {
	const char *name, *header;
	size_t data_bytes;
	int code;
	const char *text;
} bad[] = {
	{ "e4m3_without_scales_is_refused", "{" TENSOR(EXPERT "up_proj.weight", "F8_E4M3", "[3,3]", "[0,9]") "}", 9, -ENOENT,
	  EXPERT "up_proj.weight_scale_inv (or _scale) are not there" },
	{ "scales_of_the_exponent_alone_are_refused",
	  "{" TENSOR(EXPERT "up_proj.weight", "F8_E4M3", "[3,3]", "[0,9]") ","
	  TENSOR(EXPERT "up_proj.weight_scale_inv", "F8_E8M0", "[1,1]", "[9,10]") "}",
	  10, -ENOTSUP, "dtype F8_E8M0 is not supported" },
	{ "the_other_eight_bits_are_refused", "{" TENSOR(EXPERT "up_proj.weight", "F8_E5M2", "[3,3]", "[0,9]") "}", 9, -ENOTSUP,
	  EXPERT "up_proj.weight: dtype F8_E5M2 is not supported, only F32, F16, BF16 and F8_E4M3" },
	{ "packed_four_bits_are_refused", "{" TENSOR(EXPERT "up_proj.weight", "U8", "[3,2]", "[0,6]") "}", 6, -ENOTSUP,
	  "dtype U8 is not supported" },
	{ "a_fused_tensor_of_half_the_experts_is_refused", "{" TENSOR(FUSED "gate_up_proj", "BF16", "[1,6,3]", "[0,36]") "}", 36,
	  -EBADMSG, "shape is [1, 6, 3], config.json says [2, 6, 3]" },
	{ "a_fused_tensor_of_four_dimensions_is_refused", "{" TENSOR(FUSED "gate_up_proj", "BF16", "[2,2,3,3]", "[0,72]") "}", 72,
	  -EBADMSG, "shape is [2, 2, 3, 3], config.json says [2, 6, 3]" },
	{ "fused_scales_without_experts_are_refused",
	  "{" TENSOR(FUSED "gate_up_proj", "F8_E4M3", "[2,6,3]", "[0,36]") ","
	  TENSOR(FUSED "gate_up_proj_scale_inv", "F32", "[1,1]", "[36,40]") "}",
	  40, -EBADMSG, "gate_up_proj_scale_inv: shape is [1, 1], its matrix needs [2, 1, 1]" },
};

static void check_bad(void **state)
{
	const struct bad *c = *state;
	struct afd__tensor t;

	write_counting("model.safetensors", c->header, c->data_bytes);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	/* Twice: a failure leaves nothing half done. */
	for (int i = 0; i < 2; i++) {
		assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &t), c->code);
		if (!strstr(afd_last_error(), c->text))
			fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), c->text);
	}
}

static void e4m3_of_too_few_bytes_is_refused(void **state)
{
	write_counting("model.safetensors", "{" TENSOR(EXPERT "up_proj.weight", "F8_E4M3", "[3,3]", "[0,8]") "}", 8);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "9 numbers of F8_E4M3 do not fill its 8 bytes"));
}

/* ---- several files ---- */

static void write_index_of_two(void)
{
	write_text(dir, "model.safetensors.index.json", "{\"weight_map\":{\"" EXPERT "up_proj.weight\":\"w.safetensors\","
		   "\"" EXPERT "up_proj.weight_scale_inv\":\"s.safetensors\"}}");
	write_counting("w.safetensors", "{" TENSOR(EXPERT "up_proj.weight", "F8_E4M3", "[3,3]", "[0,9]") "}", 9);
}

static void scales_may_lie_in_another_file(void **state)
{
	struct afd__tensor t;

	write_index_of_two();
	write_counting("s.safetensors", "{" TENSOR(EXPERT "up_proj.weight_scale_inv", "BF16", "[1,1]", "[0,2]") "}", 2);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &t), 0);
	assert_memory_equal(t.data, "\0\1\2\3\4\5\6\7\10", 9);
	assert_memory_equal(t.scales.data, "\0\1", 2);
}

static void a_missing_file_of_scales_is_named(void **state)
{
	struct afd__tensor t;

	write_index_of_two();
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	assert_int_equal(afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &t), -ENOENT);
	assert_non_null(strstr(afd_last_error(), EXPERT "up_proj.weight_scale_inv"));
	assert_non_null(strstr(afd_last_error(), "s.safetensors"));
}

/* ---- odd places ---- */

/* Nine numbers of one byte to an expert: the second begins at an odd place of a tensor that does, too. */
static void experts_at_odd_places_are_given_as_they_are(void **state)
{
	struct afd__tensor up, down;

	write_counting("model.safetensors",
		       "{" TENSOR("a", "U8", "[1]", "[0,1]") ","
		       TENSOR(FUSED "gate_up_proj", "F8_E4M3", "[2,6,3]", "[1,37]") ","
		       TENSOR(FUSED "down_proj", "BF16", "[2,3,3]", "[37,73]") ","
		       TENSOR(FUSED "gate_up_proj_scale", "F32", "[2,1,1]", "[73,81]") "}", 81);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	if (afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_UP, &up) ||
	    afd__model_expert(model, 0, 1, AFD__TENSOR_EXPERT_DOWN, &down))
		fail_msg("%s", afd_last_error());
	for (int i = 0; i < 9; i++)
		assert_int_equal(((const char *)up.data)[i], 1 + 27 + i);
	for (int i = 0; i < 18; i++)
		assert_int_equal(((const char *)down.data)[i], 37 + 18 + i);
	assert_int_equal((uintptr_t)down.data % 2, 0);
	assert_int_equal((uintptr_t)up.scales.data % 4, 0);
	assert_memory_equal(up.scales.data, "MNOP", 4); /* 77 .. 80 */
	assert_int_equal(up.scales.row_offset, 3);
	afd__model_release(&up);
	assert_int_equal(((const char *)up.data)[8], 1 + 27 + 8);
}

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)

static const struct CMUnitTest single[] = {
	T(e4m3_of_too_few_bytes_is_refused),
	T(scales_may_lie_in_another_file),
	T(a_missing_file_of_scales_is_named),
	T(experts_at_odd_places_are_given_as_they_are),
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(bad)];
	size_t n = N(single), i;

	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(bad); i++)
		tests[n++] = (struct CMUnitTest){ bad[i].name, check_bad, begin, end, (void *)&bad[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
