/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Making an attention stage: what is refused and by which name, what the defaults are, and the KV
 * memory that a host can lend, read and write.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../support/rig.h"

struct bench {
	struct golden golden;
	struct rig rig;
};

static int set_up(void **state)
{
	static struct bench b;
	struct rig_params params = { 0 };

	golden_open(&b.golden, "window-layer-types");
	params.checkpoint = b.golden.checkpoint;
	rig_open(&b.rig, &params);
	*state = &b;
	return 0;
}

static int tear_down(void **state)
{
	struct bench *b = *state;

	rig_close(&b->rig);
	golden_close(&b->golden);
	return 0;
}

/* ---- refusals ---- */

static void params_out_of_range_are_refused_by_name(void **state)
{
	const struct {
		struct afd_attn_params params;
		int rc;
		const char *text;
	} cases[] = {
		{ { .max_sequences = 1048577 }, -EINVAL,
			"max_sequences is 1048577, limit 1048576" },
		{ { .max_rows = 65537 }, -EINVAL, "max_rows is 65537" },
		{ { .max_rows = 8, .max_outputs = 9 }, -EINVAL, "max_outputs is 9, limit 8" },
		{ { .page_size = 65537 }, -EINVAL, "page_size is 65537" },
		{ { .page_size = 65536, .kv_pages = 32768 }, -EINVAL,
			"kv_pages is 32768, limit 32767" },
		{ { .kv_pages = 2, .page_size = 4, .max_positions = 9 }, -EINVAL,
			"max_positions is 9, limit 8" },
		{ { .lanes = 5 }, -EINVAL, "lanes is 5, limit 4" },
		{ { .kv_dtype = 9 }, -EINVAL, "kv_dtype is 9" },
		{ { .to_ffn_dtype = 5 }, -EINVAL, "to_ffn_dtype is 5, limit 4" },
		{ { .to_attention_dtype = -1 }, -EINVAL, "to_attention_dtype is -1" },
		{ { .quantize_activations = 2 }, -EINVAL, "quantize_activations is 2, limit 1" },
		{ { .quantize_activations = -1 }, -EINVAL, "quantize_activations is -1" },
		{ { .device = "abacus" }, -EINVAL, "abacus" },
		{ { .kv_memory = (void *)8 }, -EINVAL,
			"kv_memory is 0x8, must be aligned to 64 bytes" },
		{ { .kv_memory = (void *)64, .kv_memory_bytes = 100 }, -EINVAL,
			"kv_memory_bytes is 100, 256 pages take" },
		{ { .max_sequences = 256, .kv_pages = 1 << 20, .page_size = 1 }, -EINVAL,
			"lower max_positions" },
	};
	struct bench *b = *state;
	afd_attn *attn = NULL;
	size_t i;

	afd_attn_destroy(b->rig.attn);
	b->rig.attn = NULL;
	for (i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct afd_attn_params params = cases[i].params;

		params.size = sizeof(params);
		params.ffn = b->rig.ffn;
		assert_int_equal(afd_attn_create(&attn, b->rig.model, NULL, &params), cases[i].rc);
		if (!strstr(afd_last_error(), cases[i].text))
			fail_msg("\"%s\" does not say \"%s\"", afd_last_error(), cases[i].text);
		assert_null(attn);
	}
}

static void one_of_transport_and_ffn_must_be_given(void **state)
{
	struct bench *b = *state;
	afd_attn *attn = NULL;

	assert_int_equal(afd_attn_create(&attn, b->rig.model, NULL, NULL), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "none of transport and params.ffn"));
	assert_int_equal(afd_attn_create(NULL, b->rig.model, NULL, NULL), -EINVAL);
	assert_int_equal(afd_attn_create(&attn, NULL, NULL, NULL), -EINVAL);
}

static void an_ffn_serves_one_local_stage(void **state)
{
	struct bench *b = *state;
	const struct afd_attn_params params = {
		.size = sizeof(params), .ffn = b->rig.ffn, .device = rig_device()
	};
	afd_attn *attn = NULL;

	assert_int_equal(afd_attn_create(&attn, b->rig.model, NULL, &params), -EBUSY);
	afd_attn_destroy(b->rig.attn);
	b->rig.attn = NULL;
	assert_int_equal(afd_attn_create(&attn, b->rig.model, NULL, &params), 0);
	afd_attn_destroy(attn);
}

static void an_ffn_that_holds_only_some_layers_is_refused(void **state)
{
	struct bench *b = *state;
	const struct afd_ffn_params ffn_params = {
		.size = sizeof(ffn_params), .device = rig_device(), .n_layers = 1
	};
	struct afd_attn_params params = { .size = sizeof(params), .device = rig_device() };
	afd_attn *attn = NULL;
	afd_ffn *ffn;

	assert_int_equal(afd_ffn_create(&ffn, b->rig.model, NULL, &ffn_params), 0);
	params.ffn = ffn;
	assert_int_equal(afd_attn_create(&attn, b->rig.model, NULL, &params), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "holds layers 0 .. 0"));
	afd_ffn_destroy(ffn);
}

/* ---- loading ---- */

struct seen {
	uint64_t done, total;
	int n;
};

static void note_progress(void *user, uint64_t done, uint64_t total)
{
	struct seen *seen = user;

	assert_true(done >= seen->done && done <= total);
	*seen = (struct seen){ done, total, seen->n + 1 };
}

static void progress_ends_at_the_bytes_of_the_role(void **state)
{
	static const int32_t layouts[] = { AFD_WEIGHTS_PACKED, AFD_WEIGHTS_IN_PLACE };
	static const char *const names[] = { "bf16-tied", "tied-own-head", "bias-f32",
		"sharded-two" };
	uint32_t i;

	for (i = 0; i < 8; i++) {
		struct seen seen = { 0 };
		struct rig_params params = { .weights = layouts[i % 2],
			.attn = { .progress = note_progress, .progress_user = &seen } };
		struct afd_role_info role = { .size = sizeof(role) };
		struct golden golden;
		struct rig rig;

		golden_open(&golden, names[i / 2]);
		params.checkpoint = golden.checkpoint;
		rig_open(&rig, &params);
		assert_int_equal(afd_model_role(rig.model, AFD_ROLE_ATTENTION, &role), 0);
		assert_true(seen.n > 3);
		assert_int_equal(seen.total, role.bytes);
		assert_int_equal(seen.done, role.bytes);
		rig_close(&rig);
		golden_close(&golden);
	}
}

static void weights_in_place_hold_no_copy_and_agree_with_transformers(void **state)
{
	static const char *const names[] = { "odd-f32", "odd-bf16", "bias-bf16", "mixed-dtypes" };
	uint32_t i;

	for (i = 0; i < 4; i++) {
		struct rig_params params = { .weights = AFD_WEIGHTS_IN_PLACE };
		struct afd_attn_stats stats = { .size = sizeof(stats) };
		struct golden golden;
		struct rig rig;
		float *logits;

		golden_open(&golden, names[i]);
		params.checkpoint = golden.checkpoint;
		params.attn.max_outputs = golden.n_prompt;
		rig_open(&rig, &params);
		logits = calloc((size_t)golden.n_positions * golden.vocab, sizeof(*logits));
		rig_decode(&rig, &golden, 0, logits);
		assert_true(nmse(logits, golden.logits,
				    (uint64_t)golden.n_positions * golden.vocab) <= 1e-9);
		assert_int_equal(afd_attn_stats(rig.attn, &stats), 0);
		/* Norms and biases alone. */
		assert_in_range(stats.weight_bytes, 1, 16384);
		free(logits);
		rig_close(&rig);
		golden_close(&golden);
	}
}

/* ---- KV ---- */

static void the_layout_of_kv_adds_up(void **state)
{
	struct bench *b = *state;
	struct afd_kv_layout l = { .size = sizeof(l) };
	struct afd_model_info info = { .size = sizeof(info) };
	const struct afd_attn_params params = { .size = sizeof(params), .kv_dtype = AFD_DTYPE_F32 };

	assert_int_equal(afd_model_info(b->rig.model, &info), 0);
	assert_int_equal(afd_attn_kv_layout(b->rig.attn, &l), 0);
	assert_int_equal(l.page_size, 16);
	assert_int_equal(l.n_pages, 256);
	assert_int_equal(l.dtype, AFD_DTYPE_F32);
	assert_int_equal(l.position_bytes, info.head_dim * 4);
	assert_int_equal(l.head_bytes, 16 * l.position_bytes);
	assert_int_equal(l.kv_bytes, info.n_kv_heads * l.head_bytes);
	assert_int_equal(l.page_bytes, 2 * l.kv_bytes);
	assert_int_equal(l.layer_bytes, 256 * l.page_bytes);
	assert_int_equal(l.memory_bytes, info.n_layers * l.layer_bytes);
	assert_int_equal(afd_attn_kv_bytes(b->rig.model, &params), l.memory_bytes);
}

static void pages_are_listed_by_sequence_and_layer(void **state)
{
	struct bench *b = *state;
	int32_t full[4], sliding[4];

	assert_int_equal(afd_attn_add(b->rig.attn, 9), 0);
	assert_int_equal(afd_attn_pages(b->rig.attn, 9, 0, full, 4), 0);
	rig_append(&b->rig, 9, b->golden.ids, 18, NULL);
	assert_int_equal(afd_attn_pages(b->rig.attn, 9, 0, full, 4), 2);
	assert_int_equal(afd_attn_pages(b->rig.attn, 9, 1, sliding, 4), 2);
	assert_int_equal(full[0], 0);
	assert_int_equal(full[1], 1);
	assert_int_equal(afd_attn_pages(b->rig.attn, 9, 0, full, 1), -ENOSPC);
	assert_int_equal(afd_attn_pages(b->rig.attn, 9, 99, full, 4), -EINVAL);
	assert_int_equal(afd_attn_pages(b->rig.attn, 8, 0, full, 4), -ENOENT);
}

/* Copies what sequence 1 of `from` holds to sequence 1 of `to`, page by page, as a host with its
 * own store would. */
static void transfer(struct rig *from, struct rig *to, uint32_t n_layers)
{
	struct afd_kv_layout a = { .size = sizeof(a) }, b = { .size = sizeof(b) };
	int32_t pages_a[8], pages_b[8];
	uint32_t layer;
	int n, i;

	assert_int_equal(afd_attn_kv_layout(from->attn, &a), 0);
	assert_int_equal(afd_attn_kv_layout(to->attn, &b), 0);
	for (layer = 0; layer < n_layers; layer++) {
		n = afd_attn_pages(from->attn, 1, layer, pages_a, 8);
		assert_true(n > 0 && n == afd_attn_pages(to->attn, 1, layer, pages_b, 8));
		for (i = 0; i < n; i++)
			memcpy((char *)b.memory + layer * b.layer_bytes +
					(size_t)pages_b[i] * b.page_bytes,
				(char *)a.memory + layer * a.layer_bytes +
					(size_t)pages_a[i] * a.page_bytes,
				a.page_bytes);
	}
}

/* On the cpu device alone may a host read KV. The second stage's pool lies in memory that the host
 * lends. */
static void open_two(const struct golden *golden, struct rig *one, struct rig *two, void **memory)
{
	struct rig_params params = { .checkpoint = golden->checkpoint,
		.device = "cpu",
		.attn = { .size = sizeof(params.attn), .kv_dtype = AFD_DTYPE_BF16 } };
	size_t bytes;

	rig_open(one, &params);
	bytes = afd_attn_kv_bytes(one->model, &params.attn);
	assert_true(bytes > 0);
	*memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
	assert_non_null(*memory);
	params.attn.kv_memory = *memory;
	params.attn.kv_memory_bytes = bytes;
	rig_open(two, &params);
	assert_int_equal(afd_attn_add(one->attn, 1), 0);
	assert_int_equal(afd_attn_add(two->attn, 1), 0);
}

static void kv_that_a_host_moved_goes_on_with_the_same_bits(void **state)
{
	const int32_t wrong[12] = { 0 };
	struct golden golden;
	struct rig one, two;
	float *here, *there;
	void *memory;
	size_t n;

	golden_open(&golden, "window-layer-types");
	open_two(&golden, &one, &two, &memory);
	n = 4 * (size_t)one.vocab;
	here = calloc(n, sizeof(float));
	there = calloc(n, sizeof(float));
	rig_append(&one, 1, golden.ids, 12, NULL);
	rig_append(&two, 1, wrong, 12, NULL);
	transfer(&one, &two, one.n_layers);
	rig_append(&one, 1, golden.ids + 12, 4, here);
	rig_append(&two, 1, golden.ids + 12, 4, there);
	assert_memory_equal(here, there, n * sizeof(float));
	rig_close(&one);
	rig_close(&two);
	free(memory);
	free(here);
	free(there);
	golden_close(&golden);
}

#define WITH_BENCH(test) cmocka_unit_test_setup_teardown(test, set_up, tear_down)

int main(void)
{
	const struct CMUnitTest tests[] = {
		WITH_BENCH(params_out_of_range_are_refused_by_name),
		WITH_BENCH(one_of_transport_and_ffn_must_be_given),
		WITH_BENCH(an_ffn_serves_one_local_stage),
		WITH_BENCH(an_ffn_that_holds_only_some_layers_is_refused),
		cmocka_unit_test(progress_ends_at_the_bytes_of_the_role),
		cmocka_unit_test(weights_in_place_hold_no_copy_and_agree_with_transformers),
		WITH_BENCH(the_layout_of_kv_adds_up),
		WITH_BENCH(pages_are_listed_by_sequence_and_layer),
		cmocka_unit_test(kv_that_a_host_moved_goes_on_with_the_same_bits),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
