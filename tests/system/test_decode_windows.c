/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages that leave sliding windows, in whole decodes. Every page that is free is overwritten with
 * NaN after each step, on the device itself, so whoever still reads one shows it; and the bits must
 * be those of a run that computes everything in one step and frees nothing.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/attn/attn.h"
#include "../support/rig.h"

/* What decodes go through: layers with and without a window, all with one, one of a single
 * position. */
static const char *const cases[] = { "window-layer-types", "window-v4", "moe-window", "afmoe-f32",
	"afmoe-long", "window-one" };

static void poison_free_pages(const struct rig *rig)
{
	struct afd_attn *attn = rig->attn;
	size_t page_bytes = attn->layout.page_bytes;
	void *nan = malloc(page_bytes);
	uint32_t layer, page;

	memset(nan, 0xff, page_bytes); /* NaN in every dtype */
	for (layer = 0; layer < rig->n_layers; layer++) {
		const struct afd__kv_group *group = &attn->kv.groups[attn->groups[layer]];
		char *pages = (char *)attn->layout.memory + attn->layer_at[layer];

		for (page = 0; page < group->n_pages; page++) {
			if (!group->references[page])
				assert_int_equal(afd__queue_upload(&attn->queue,
							 pages + page * page_bytes, nan, page_bytes),
					0);
		}
	}
	free(nan);
}

/* Logits of ids, `chunk` at a time, with what is free poisoned before each step. */
static void append_poisoned(struct rig *rig, uint64_t sequence, const int32_t *ids, uint32_t n,
	uint32_t chunk, float *logits)
{
	uint32_t done, rows;

	for (done = 0; done < n; done += rows) {
		rows = n - done < chunk ? n - done : chunk;
		poison_free_pages(rig);
		rig_append(rig, sequence, ids + done, rows, logits + (size_t)done * rig->vocab);
	}
}

static void open_case(struct golden *golden, struct rig *rig, const char *name,
	struct rig_params params, float **logits)
{
	golden_open(golden, name);
	params.checkpoint = golden->checkpoint;
	params.attn.max_outputs = params.attn.max_rows = 256;
	rig_open(rig, &params);
	*logits = calloc((size_t)golden->n_positions * golden->vocab, sizeof(**logits));
	assert_non_null(*logits);
	assert_int_equal(afd_attn_add(rig->attn, 1), 0);
}

/* In one step, in which nothing is free that was used before. */
static float *run_at_once(const char *name, int32_t kv_dtype)
{
	struct golden golden;
	struct rig rig;
	float *logits;

	open_case(&golden, &rig, name, (struct rig_params){ .attn.kv_dtype = kv_dtype }, &logits);
	rig_append(&rig, 1, golden.ids, golden.n_positions, logits);
	rig_close(&rig);
	golden_close(&golden);
	return logits;
}

static uint32_t pages_gone(const struct rig *rig, uint64_t sequence, uint32_t layer)
{
	int32_t ids[256];
	int n = afd_attn_pages(rig->attn, sequence, layer, ids, 256), gone = 0;

	assert_true(n > 0);
	while (gone < n && ids[gone] == AFD__PAGE_GONE)
		gone++;
	return (uint32_t)gone;
}

/* ---- nobody reads a page that is free ---- */

static void check_poisoned(const char *name, int32_t kv_dtype, uint32_t page_size, uint32_t chunk)
{
	const struct rig_params params = { .n_threads = 2,
		.attn = { .kv_dtype = kv_dtype, .page_size = page_size, .kv_pages = 200 } };
	float *want = run_at_once(name, kv_dtype), *got;
	struct golden golden;
	struct rig rig;
	uint32_t layer, n_gone = 0;

	open_case(&golden, &rig, name, params, &got);
	append_poisoned(&rig, 1, golden.ids, golden.n_positions, chunk, got);
	if (memcmp(got, want, (size_t)golden.n_positions * golden.vocab * sizeof(*got)))
		fail_msg("%s: pages of %u, steps of %u: other bits", name, page_size, chunk);
	for (layer = 0; layer < rig.n_layers; layer++)
		n_gone += pages_gone(&rig, 1, layer);
	assert_true(n_gone > 0);
	free(got);
	free(want);
	rig_close(&rig);
	golden_close(&golden);
}

static void free_pages_may_hold_anything(void **state)
{
	static const uint32_t shapes[][2] = { { 1, 1 }, { 2, 3 }, { 4, 1 }, { 7, 5 } };
	size_t c, s;

	for (c = 0; c < sizeof(cases) / sizeof(*cases); c++) {
		for (s = 0; s < sizeof(shapes) / sizeof(*shapes); s++)
			check_poisoned(cases[c], AFD_DTYPE_F32, shapes[s][0], shapes[s][1]);
	}
}

static void free_pages_of_an_fp8_cache_may_hold_anything(void **state)
{
	check_poisoned("afmoe-f32", AFD_DTYPE_FP8, 3, 2);
}

/* The last position that is seen: a page less than what is there would show. */
static void a_page_that_is_still_seen_is_felt(void **state)
{
	struct rig_params params = { .attn = { .page_size = 1, .kv_pages = 64 } };
	struct golden golden;
	struct rig rig;
	int32_t first;
	float *got;

	open_case(&golden, &rig, "moe-window", params, &got);
	append_poisoned(&rig, 1, golden.ids, 20, 1, got);
	/* Position 19 was the last; position 20 sees 13 .. 20, so page 13 is the first it needs. */
	assert_int_equal(pages_gone(&rig, 1, 0), 12);
	first = afd__kv_list(&rig.attn->kv, 0, 0)[13];
	rig.attn->kv.groups[0].references[first] = 0;
	poison_free_pages(&rig);
	rig.attn->kv.groups[0].references[first] = 1;
	assert_int_equal(
		rig_step(&rig, &(struct afd_batch){ .size = sizeof(struct afd_batch),
				       .entries = &(struct afd_entry){ .sequence = 1,
					       .ids = golden.ids + 20,
					       .n_ids = 1 },
				       .n_entries = 1,
				       .entry_bytes = sizeof(struct afd_entry),
				       .logits = got,
				       .logits_rows = 1 }),
		-EDOM);
	free(got);
	rig_close(&rig);
	golden_close(&golden);
}

/* ---- few pages go a long way ---- */

static void a_model_whose_layers_all_slide_outgrows_its_pool(void **state)
{
	struct rig_params params = { .attn = { .size = sizeof(params.attn),
					     .page_size = 4,
					     .max_sequences = 2,
					     .max_outputs = 4,
					     .max_rows = 8,
					     .max_positions = 1000,
					     .kv_pages = 6 } };
	struct golden golden;
	struct rig rig;
	uint32_t i;
	float *logits;

	golden_open(&golden, "moe-window");
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	assert_int_equal(afd_attn_kv_pages(rig.model, &params.attn, 1000, 4), 6);
	logits = calloc((size_t)4 * golden.vocab, sizeof(*logits));
	assert_int_equal(afd_attn_add(rig.attn, 1), 0);
	for (i = 0; i < 1000; i += 4)
		rig_append(&rig, 1, golden.ids + i % 32, 4, logits);
	assert_int_equal(afd_attn_length(rig.attn, 1), 1000);
	free(logits);
	rig_close(&rig);
	golden_close(&golden);
}

static void what_one_sequence_needs_is_told(void **state)
{
	const struct {
		const char *name;
		uint32_t n_positions, n_rows;
		int64_t n_pages;
	} needs[] = {
		{ "window-layer-types", 1000, 1, 250 }, /* a layer sees all positions */
		{ "moe-window", 1000, 1, (7 + 1 + 6 + 1) / 4 + 1 },
		{ "moe-window", 1000, 100, (7 + 64 + 6 + 100) / 4 + 1 },
		{ "moe-window", 9, 100, 3 },
		{ "moe-window", 0, 1, 0 },
	};
	const struct afd_attn_params params = { .size = sizeof(params), .page_size = 4 };
	struct golden golden;
	struct rig rig;
	size_t i;

	for (i = 0; i < sizeof(needs) / sizeof(*needs); i++) {
		golden_open(&golden, needs[i].name);
		rig_open(&rig, &(struct rig_params){ .checkpoint = golden.checkpoint });
		assert_int_equal(afd_attn_kv_pages(rig.model, &params, needs[i].n_positions,
					 needs[i].n_rows),
			needs[i].n_pages);
		rig_close(&rig);
		golden_close(&golden);
	}
	assert_int_equal(afd_attn_kv_pages(NULL, &params, 1, 1), -EINVAL);
}

static void layers_with_a_window_get_no_more_pages_than_they_can_use(void **state)
{
	const struct rig_params params = { .attn = { .page_size = 4,
						   .kv_pages = 60,
						   .max_sequences = 1 } };
	struct afd_kv_layout layout = { .size = sizeof(layout) };
	struct afd_kv_layer layer = { .size = sizeof(layer) };
	struct afd_attn_params attn;
	struct golden golden;
	struct rig rig;
	size_t at = 0;
	uint32_t i;
	float *logits;

	open_case(&golden, &rig, "window-layer-types", params, &logits);
	/* 256 rows can be in one step; with 4 the sliding layers need few. */
	assert_int_equal(afd_attn_kv_layout(rig.attn, &layout), 0);
	assert_int_equal(layout.layer_bytes, 60 * layout.page_bytes);
	afd_attn_destroy(rig.attn);
	attn = (struct afd_attn_params){ .size = sizeof(attn), .ffn = rig.ffn, .page_size = 4,
		.kv_pages = 60, .max_sequences = 1, .max_rows = 4, .device = rig_device() };
	assert_int_equal(afd_attn_create(&rig.attn, rig.model, NULL, &attn), 0);
	assert_int_equal(afd_attn_kv_layout(rig.attn, &layout), 0);
	for (i = 0; i < 3; i++, at += layer.n_pages * layout.page_bytes) {
		assert_int_equal(afd_attn_kv_layer(rig.attn, i, &layer), 0);
		assert_int_equal(layer.window, i == 1 ? 0 : 8);
		assert_int_equal(layer.n_pages, i == 1 ? 60 : (7 + 4 + 6 + 4) / 4 + 1);
		assert_int_equal(layer.offset, at);
	}
	assert_int_equal(layout.layer_bytes, 0);
	assert_int_equal(layout.memory_bytes, at);
	assert_int_equal(afd_attn_kv_bytes(rig.model, &attn), at);
	free(logits);
	rig_close(&rig);
	golden_close(&golden);
}

/* With that few pages, and others' in between. */
static void the_pages_that_windows_get_suffice(void **state)
{
	struct rig_params params = { .checkpoint = NULL,
		.attn = { .page_size = 3, .kv_pages = 120, .max_sequences = 2, .max_rows = 5 } };
	float *want = run_at_once("afmoe-long", AFD_DTYPE_F32), *got, *other;
	struct golden golden;
	struct rig rig;
	uint32_t i;

	golden_open(&golden, "afmoe-long");
	params.checkpoint = golden.checkpoint;
	params.attn.max_outputs = 5;
	rig_open(&rig, &params);
	assert_true(rig.attn->group_pages[rig.attn->groups[0]] < 30);
	got = calloc((size_t)5 * golden.vocab, sizeof(*got));
	other = calloc((size_t)5 * golden.vocab, sizeof(*other));
	assert_true(!afd_attn_add(rig.attn, 1) && !afd_attn_add(rig.attn, 2));
	for (i = 0; i + 5 <= golden.n_positions; i += 5) {
		append_poisoned(&rig, 1, golden.ids + i, 5, 5, got);
		assert_memory_equal(got, want + (size_t)i * golden.vocab,
			5 * golden.vocab * sizeof(*got));
		append_poisoned(&rig, 2, golden.ids + 1, 5, 5, other);
	}
	free(other);
	free(got);
	free(want);
	rig_close(&rig);
	golden_close(&golden);
}

/* ---- going back ---- */

static void the_last_step_can_be_taken_back_with_the_same_bits(void **state)
{
	struct rig_params params = { .attn = { .page_size = 2, .kv_pages = 200 } };
	float *want = run_at_once("afmoe-f32", AFD_DTYPE_F32), *got;
	struct golden golden;
	struct rig rig;
	uint32_t i, n;

	open_case(&golden, &rig, "afmoe-f32", params, &got);
	for (i = 0; i + 6 <= golden.n_positions; i += n) {
		/* Of five rows that were tried, the first is right. */
		append_poisoned(&rig, 1, golden.ids + i, 1, 1, got);
		append_poisoned(&rig, 1, golden.ids, 4, 4, got);
		assert_int_equal(afd_attn_truncate(rig.attn, 1, i + 1), 0);
		append_poisoned(&rig, 1, golden.ids + i + 1, 4, 4, got);
		assert_memory_equal(got, want + (size_t)(i + 1) * golden.vocab,
			4 * golden.vocab * sizeof(*got));
		n = 5;
	}
	assert_true(pages_gone(&rig, 1, 0) > 4);
	free(got);
	free(want);
	rig_close(&rig);
	golden_close(&golden);
}

static void what_is_gone_cannot_be_forked_or_truncated_to(void **state)
{
	struct rig_params params = { .attn = { .page_size = 2, .kv_pages = 200 } };
	struct golden golden;
	struct rig rig;
	float *logits;

	open_case(&golden, &rig, "window-layer-types", params, &logits);
	append_poisoned(&rig, 1, golden.ids, 30, 1, logits);
	assert_int_equal(afd_attn_truncate(rig.attn, 1, 20), -EINVAL);
	assert_non_null(strstr(afd_last_error(),
		"sequence 1: 20 positions wanted, a window of 8 then begins in page 6, and pages "
		"below 11 are gone"));
	assert_int_equal(afd_attn_fork(rig.attn, 1, 2, 20), -EINVAL);
	assert_int_equal(afd_attn_length(rig.attn, 2), -ENOENT);
	assert_int_equal(afd_attn_length(rig.attn, 1), 30);
	assert_int_equal(afd_attn_fork(rig.attn, 1, 2, 29), 0);
	assert_int_equal(afd_attn_truncate(rig.attn, 1, 0), 0);
	assert_int_equal(pages_gone(&rig, 2, 0), 11);
	free(logits);
	rig_close(&rig);
	golden_close(&golden);
}

static void a_step_that_ends_early_frees_nothing(void **state)
{
	struct rig_params params = { .attn = { .page_size = 1, .kv_pages = 200 } };
	struct afd_entry entry = { .sequence = 1, .n_ids = 9 };
	struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	float *want = run_at_once("afmoe-f32", AFD_DTYPE_F32), *got;
	int32_t before[64], after[64];
	struct golden golden;
	struct rig rig;
	int turns, i;

	open_case(&golden, &rig, "afmoe-f32", params, &got);
	append_poisoned(&rig, 1, golden.ids, 20, 1, got);
	assert_int_equal(afd_attn_pages(rig.attn, 1, 0, before, 64), 20);
	entry.ids = golden.ids + 20;
	for (turns = 0; turns < 4; turns++) {
		assert_int_equal(afd_attn_begin(rig.attn, &batch), 0);
		for (i = 0; i < turns; i++)
			assert_int_equal(rig_turn(&rig), 0);
		assert_int_equal(afd_attn_cancel(rig.attn), 0);
		assert_int_equal(afd_attn_pages(rig.attn, 1, 0, after, 64), 20);
		assert_memory_equal(before, after, 20 * sizeof(*before));
	}
	append_poisoned(&rig, 1, golden.ids + 20, 9, 9, got);
	assert_memory_equal(got, want + (size_t)20 * golden.vocab, 9 * golden.vocab * sizeof(*got));
	free(got);
	free(want);
	rig_close(&rig);
	golden_close(&golden);
}

/* ---- what is told ---- */

static void free_pages_are_counted(void **state)
{
	struct rig_params params = { .attn = { .page_size = 4, .kv_pages = 20 } };
	struct afd_attn_stats stats = { .size = sizeof(stats) };
	static char text[1 << 17];
	struct golden golden;
	struct rig rig;
	float *logits;

	open_case(&golden, &rig, "window-layer-types", params, &logits);
	append_poisoned(&rig, 1, golden.ids, 30, 1, logits);
	assert_int_equal(afd_attn_stats(rig.attn, &stats), 0);
	assert_int_equal(stats.pages_free, 20 - 8);
	/* Position 29 saw 22 .. 29, in pages 5 .. 7. */
	assert_int_equal(stats.window_pages_free, 20 - 3);
	assert_true(afd_context_metrics(rig.ctx, text, sizeof(text)) > 0);
	assert_non_null(strstr(text, "\nafd_attn_kv_window_pages_free 17\n"));
	assert_non_null(strstr(text, "\nafd_attn_kv_pages_free 12\n"));
	free(logits);
	rig_close(&rig);
	golden_close(&golden);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(free_pages_may_hold_anything),
		cmocka_unit_test(free_pages_of_an_fp8_cache_may_hold_anything),
		cmocka_unit_test(a_page_that_is_still_seen_is_felt),
		cmocka_unit_test(a_model_whose_layers_all_slide_outgrows_its_pool),
		cmocka_unit_test(what_one_sequence_needs_is_told),
		cmocka_unit_test(layers_with_a_window_get_no_more_pages_than_they_can_use),
		cmocka_unit_test(the_pages_that_windows_get_suffice),
		cmocka_unit_test(the_last_step_can_be_taken_back_with_the_same_bits),
		cmocka_unit_test(what_is_gone_cannot_be_forked_or_truncated_to),
		cmocka_unit_test(a_step_that_ends_early_frees_nothing),
		cmocka_unit_test(free_pages_are_counted),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
