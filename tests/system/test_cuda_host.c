/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stages on the emulated GPU beside a host that has streams, graphs and several GPUs of its own:
 * its order and its current device stay, slots are registered for as long as their link lives and
 * bounce where they cannot be, and what it may not ask for is refused and changes nothing.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../support/emulator.h"
#include "../support/rig.h"

static const char DENSE[] = "bf16-tied", ROUTED[] = "moe-bf16";

/* All logits of a case; to be freed. */
static float *decode(const char *name, struct rig_params params)
{
	struct golden golden;
	struct rig rig;
	float *logits;

	golden_open(&golden, name);
	params.checkpoint = golden.checkpoint;
	params.wire_dtype = AFD_DTYPE_BF16;
	rig_open(&rig, &params);
	logits = calloc((size_t)golden.n_positions * golden.vocab, sizeof(*logits));
	rig_decode(&rig, &golden, 5, logits);
	rig_close(&rig);
	golden_close(&golden);
	return logits;
}

static void expect_same(const char *name, float *a, float *b)
{
	struct golden golden;

	golden_open(&golden, name);
	if (memcmp(a, b, (size_t)golden.n_positions * golden.vocab * sizeof(*a)))
		fail_msg("%s: other bits", name);
	golden_close(&golden);
	free(a);
	free(b);
}

/* ---- several devices ---- */

static void attention_and_ffn_on_two_gpus_give_the_bits_of_one(void **state)
{
	static const char *const addresses[] = { "loop:two", "shm:afd-test-cuda-two" };
	const struct rig_params one = { 0 };
	struct rig_params two = { .ffn_device = "cuda:1", .lanes = 2 };
	static const char *const names[] = { DENSE, ROUTED };

	for (size_t i = 0; i < 4; i++) {
		two.address = addresses[i / 2];
		two.gate = i % 2 ? AFD_GATE_ATTENTION : AFD_GATE_FFN;
		expect_same(names[i % 2], decode(names[i % 2], one), decode(names[i % 2], two));
	}
}

static void each_stage_keeps_to_its_gpu_and_the_callers_stays_current(void **state)
{
	struct rig_params params = { .address = "loop:place", .ffn_device = "cuda:1" };
	struct afd_kv_layout layout = { .size = sizeof(layout) };
	struct golden golden;
	struct emulator e;
	struct rig rig;
	int32_t id = 1;

	golden_open(&golden, DENSE);
	params.checkpoint = golden.checkpoint;
	for (int current = -1; current < 2; current++) {
		void *before;

		params.device = current ? "cuda:0" : "cuda:1";
		params.ffn_device = current ? "cuda:1" : "cuda:0";
		emulator_open(&e);
		e.set_context(current);
		before = e.context();
		rig_open(&rig, &params);
		assert_int_equal(afd_attn_kv_layout(rig.attn, &layout), 0);
		assert_int_equal(e.device_of(layout.memory), current ? 0 : 1);
		assert_int_equal(afd_attn_add(rig.attn, 1), 0);
		rig_append(&rig, 1, &id, 1, NULL);
		rig_close(&rig);
		assert_ptr_equal(e.context(), before);
	}
	e.set_context(-1);
	golden_close(&golden);
}

/* ---- slots ---- */

static void slots_are_registered_while_their_link_lives(void **state)
{
	static const char *const addresses[] = { "loop:slots", "shm:afd-test-cuda-slots" };
	struct golden golden;
	struct emulator e;
	struct rig rig;
	int32_t id = 1;

	golden_open(&golden, DENSE);
	emulator_open(&e);
	for (size_t i = 0; i < 2; i++) {
		const struct rig_params params = { .checkpoint = golden.checkpoint,
			.address = addresses[i],
			.ffn_device = "cuda:1" };

		rig_open(&rig, &params);
		assert_int_equal(afd_attn_add(rig.attn, 1), 0);
		rig_append(&rig, 1, &id, 1, NULL);
		/* Both ends see one piece. */
		assert_int_equal(e.n_registered(), 1);
		/* It stays for the other end. */
		afd_attn_destroy(rig.attn);
		rig.attn = NULL;
		assert_int_equal(e.n_registered(), 1);
		rig_close(&rig);
		assert_int_equal(e.n_registered(), 0);
	}
	golden_close(&golden);
}

static void count_lines(void *user, int32_t level, const char *text)
{
	*(int *)user += strstr(text, "cannot be registered") != NULL;
}

static void slots_that_no_gpu_can_reach_bounce_and_that_is_told_once_a_stage(void **state)
{
	static const char *const names[] = { DENSE, ROUTED };

	for (size_t i = 0; i < 4; i++) {
		int n_told = 0;
		const char *name = names[i % 2];
		const struct rig_params local = { .wire_dtype = i < 2 ? 0 : AFD_DTYPE_FP8 };
		const struct rig_params params = { .address = "loop:bounce",
			.lanes = 2,
			.max_part_rows = 2,
			.wire_dtype = local.wire_dtype,
			.gate = i % 2 ? AFD_GATE_ATTENTION : AFD_GATE_FFN,
			.log = { .write = count_lines, .user = &n_told } };
		float *far;

		setenv("AFD_EMU_FAULT", "no_register", 1);
		far = decode(name, params);
		unsetenv("AFD_EMU_FAULT");
		assert_int_equal(n_told, 2);
		expect_same(name, decode(name, local), far);
	}
}

static void a_kv_pool_in_host_memory_is_registered_or_refused(void **state)
{
	struct rig_params params = { 0 };
	const struct rig_params plain = { 0 };
	struct afd_attn_params attn = { .size = sizeof(attn), .kv_dtype = AFD_DTYPE_F32 };
	struct golden golden;
	struct emulator e;
	struct rig rig;
	void *memory;

	golden_open(&golden, DENSE);
	params.checkpoint = golden.checkpoint;
	rig_open(&rig, &params);
	attn.kv_memory_bytes = afd_attn_kv_bytes(rig.model, &attn);
	rig_close(&rig);
	assert_int_equal(posix_memalign(&memory, 4096, attn.kv_memory_bytes), 0);
	params.attn.kv_memory = memory;
	params.attn.kv_memory_bytes = attn.kv_memory_bytes;
	setenv("AFD_EMU_FAULT", "no_pageable", 1);
	expect_same(DENSE, decode(DENSE, plain), decode(DENSE, params));
	emulator_open(&e);
	assert_int_equal(e.n_registered(), 0);
	setenv("AFD_EMU_FAULT", "no_register", 1);
	rig_open(&rig, &(struct rig_params){ .checkpoint = golden.checkpoint });
	afd_attn_destroy(rig.attn);
	attn.ffn = rig.ffn;
	attn.device = "cuda:0";
	attn.kv_memory = memory;
	assert_int_equal(afd_attn_create(&rig.attn, rig.model, NULL, &attn), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "does not reach kv_memory"));
	rig.attn = NULL;
	unsetenv("AFD_EMU_FAULT");
	rig_close(&rig);
	golden_close(&golden);
	free(memory);
}

/* ---- streams ---- */

struct host {
	struct emulator e;
	struct golden golden;
	struct rig rig;
	void *stream;
	uint32_t hidden;
	float *x, *y; /* dev [ROWS][hidden] */
};

enum { ROWS = 3 };

static void open_host(struct host *h, const char *name)
{
	struct rig_params params = { 0 };
	struct afd_model_info info = { .size = sizeof(info) };

	emulator_open(&h->e);
	h->e.set_context(0);
	assert_int_equal(h->e.stream_create(&h->stream, 1), 0);
	golden_open(&h->golden, name);
	params.checkpoint = h->golden.checkpoint;
	params.stream = h->stream;
	rig_open(&h->rig, &params);
	assert_int_equal(afd_model_info(h->rig.model, &info), 0);
	h->hidden = info.hidden_size;
	assert_int_equal(h->e.alloc((void **)&h->x, ROWS * h->hidden * sizeof(float)), 0);
	assert_int_equal(h->e.alloc((void **)&h->y, ROWS * h->hidden * sizeof(float)), 0);
}

static void close_host(struct host *h)
{
	rig_close(&h->rig);
	h->e.free(h->x);
	h->e.free(h->y);
	h->e.stream_destroy(h->stream);
	golden_close(&h->golden);
	h->e.set_context(-1);
}

static void fill(float *x, size_t n, float first)
{
	for (size_t i = 0; i < n; i++)
		x[i] = first - (float)(i % 13) * 0.25f;
}

/* y of rows that the library moves itself. */
static void forward(const struct host *h, const float *x, float *y)
{
	const struct afd_ffn_rows rows = { .size = sizeof(rows), .n_rows = ROWS, .x = x, .y = y };

	if (afd_ffn_forward(h->rig.ffn, &rows))
		fail_msg("%s", afd_last_error());
}

static void enqueue(const struct host *h)
{
	const struct afd_ffn_rows rows = { .size = sizeof(rows),
		.n_rows = ROWS,
		.x = h->x,
		.y = h->y,
		.on_device = 1 };

	if (afd_ffn_forward(h->rig.ffn, &rows))
		fail_msg("%s", afd_last_error());
}

static void rows_on_the_device_keep_their_place_in_the_hosts_stream(void **state)
{
	static const char *const names[] = { DENSE, ROUTED };
	static float x[2][4096], want[2][4096], got[2][4096];
	struct host h;

	for (size_t i = 0; i < 2; i++) {
		size_t bytes;

		open_host(&h, names[i]);
		bytes = ROWS * h.hidden * sizeof(float);
		assert_true(bytes <= sizeof(x[0]));
		for (int k = 0; k < 2; k++) {
			fill(x[k], ROWS * h.hidden, 2 + (float)k);
			forward(&h, x[k], want[k]);
		}
		for (int k = 0; k < 2; k++) {
			assert_int_equal(h.e.copy(h.x, x[k], bytes, EMULATOR_COPY, h.stream), 0);
			enqueue(&h);
			assert_int_equal(h.e.copy(got[k], h.y, bytes, EMULATOR_COPY, h.stream), 0);
		}
		assert_int_equal(h.e.stream_synchronize(h.stream), 0);
		for (int k = 0; k < 2; k++)
			assert_memory_equal(got[k], want[k], bytes);
		close_host(&h);
	}
}

static void a_host_captures_rows_on_the_device_and_replays_them_with_others(void **state)
{
	static float x[4096], want[4096], got[4096];
	void *graph, *exec;
	struct host h;
	size_t bytes;

	open_host(&h, ROUTED);
	bytes = ROWS * h.hidden * sizeof(float);
	assert_int_equal(h.e.begin_capture(h.stream, 1), 0);
	enqueue(&h);
	assert_int_equal(h.e.end_capture(h.stream, &graph), 0);
	assert_int_equal(h.e.instantiate(&exec, graph, 0), 0);
	h.e.graph_destroy(graph);
	for (int k = 0; k < 3; k++) {
		fill(x, ROWS * h.hidden, (float)k);
		forward(&h, x, want);
		assert_int_equal(h.e.copy(h.x, x, bytes, EMULATOR_COPY, h.stream), 0);
		assert_int_equal(h.e.graph_launch(exec, h.stream), 0);
		assert_int_equal(h.e.copy(got, h.y, bytes, EMULATOR_COPY, h.stream), 0);
		assert_int_equal(h.e.stream_synchronize(h.stream), 0);
		assert_memory_equal(got, want, bytes);
	}
	h.e.exec_destroy(exec);
	close_host(&h);
}

static void a_step_while_the_host_captures_says_so_and_changes_nothing(void **state)
{
	int32_t ids[] = { 1, 2, 3 };
	struct afd_entry entry = { .sequence = 1, .ids = ids, .n_ids = 3 };
	const struct afd_batch batch = { .size = sizeof(batch),
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof(entry) };
	float x[512] = { 0 };
	void *graph;
	struct host h;

	open_host(&h, DENSE);
	assert_int_equal(afd_attn_add(h.rig.attn, 1), 0);
	assert_int_equal(h.e.begin_capture(h.stream, 1), 0);
	assert_int_equal(afd_attn_step(h.rig.attn, &batch, 0), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "stream is being captured"));
	assert_int_equal(afd_attn_length(h.rig.attn, 1), 0);
	assert_int_equal(afd_ffn_forward(h.rig.ffn, &(struct afd_ffn_rows){ .size = sizeof(struct afd_ffn_rows),
						 .n_rows = 1, .x = x, .y = x }),
		-ENOTSUP);
	/* The capture is none the worse for it. */
	enqueue(&h);
	assert_int_equal(h.e.end_capture(h.stream, &graph), 0);
	h.e.graph_destroy(graph);
	assert_int_equal(rig_step(&h.rig, &batch), 0);
	assert_int_equal(afd_attn_length(h.rig.attn, 1), 3);
	close_host(&h);
}

static void steps_on_the_hosts_stream_have_the_bits_of_a_stream_of_their_own(void **state)
{
	struct rig_params params = { 0 };
	struct emulator e;
	float *own = decode(DENSE, params);

	emulator_open(&e);
	e.set_context(0);
	assert_int_equal(e.stream_create(&params.stream, 1), 0);
	expect_same(DENSE, own, decode(DENSE, params));
	params.attn.graphs = UINT32_MAX;
	own = decode(DENSE, (struct rig_params){ 0 });
	expect_same(DENSE, own, decode(DENSE, params));
	e.stream_destroy(params.stream);
	e.set_context(-1);
}

/* ---- what is refused ---- */

static void expect_refused(const struct host *h, const struct afd_ffn_params *params, const char *word)
{
	afd_ffn *ffn = NULL;
	int rc = afd_ffn_create(&ffn, h->rig.model, NULL, params);

	if (rc != -EINVAL || ffn || !strstr(afd_last_error(), word))
		fail_msg("%d, \"%s\", wanted \"%s\"", rc, afd_last_error(), word);
}

static void streams_and_switches_that_do_not_fit_are_refused(void **state)
{
	struct afd_ffn_params ffn = { .size = sizeof(ffn) };
	struct afd_attn_params attn = { .size = sizeof(attn), .device = "cuda:0" };
	afd_attn *none = NULL;
	struct host h;

	open_host(&h, DENSE);
	ffn.stream = h.stream;
	ffn.device = "cpu";
	expect_refused(&h, &ffn, "device cpu: a stream is given, but it has none");
	ffn.device = "cuda:1";
	expect_refused(&h, &ffn, "device cuda:1: the stream is of device 0, must be of 1");
	ffn.stream = NULL;
	ffn.deterministic = 2;
	expect_refused(&h, &ffn, "deterministic is 2, limit 1");
	afd_attn_destroy(h.rig.attn);
	h.rig.attn = NULL;
	attn.ffn = h.rig.ffn;
	attn.graphs = 1025;
	assert_int_equal(afd_attn_create(&none, h.rig.model, NULL, &attn), -EINVAL);
	assert_non_null(strstr(afd_last_error(), "graphs is 1025, limit 1024"));
	close_host(&h);
}

static void rows_on_the_device_need_a_stream_and_on_the_cpu_none(void **state)
{
	static float x[4096], want[4096];
	static const char *const devices[] = { "cuda:0", "cpu" };
	struct golden golden;
	struct rig rig;

	golden_open(&golden, DENSE);
	for (size_t i = 0; i < 2; i++) {
		const struct rig_params params = {
			.checkpoint = golden.checkpoint, .device = devices[i]
		};
		struct afd_ffn_rows rows = { .size = sizeof(rows),
			.n_rows = 2,
			.x = x,
			.y = want };

		rig_open(&rig, &params);
		fill(x, 1024, 1);
		assert_int_equal(afd_ffn_forward(rig.ffn, &rows), 0);
		rows.on_device = 1;
		rows.y = x;
		assert_int_equal(afd_ffn_forward(rig.ffn, &rows), i ? 0 : -EINVAL);
		if (i)
			assert_memory_equal(x, want, 2 * sizeof(float));
		else
			assert_non_null(strstr(afd_last_error(), "made without a stream"));
		rows.on_device = 2;
		assert_int_equal(afd_ffn_forward(rig.ffn, &rows), -EINVAL);
		rig_close(&rig);
	}
	golden_close(&golden);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(attention_and_ffn_on_two_gpus_give_the_bits_of_one),
		cmocka_unit_test(each_stage_keeps_to_its_gpu_and_the_callers_stays_current),
		cmocka_unit_test(slots_are_registered_while_their_link_lives),
		cmocka_unit_test(
			slots_that_no_gpu_can_reach_bounce_and_that_is_told_once_a_stage),
		cmocka_unit_test(a_kv_pool_in_host_memory_is_registered_or_refused),
		cmocka_unit_test(rows_on_the_device_keep_their_place_in_the_hosts_stream),
		cmocka_unit_test(
			a_host_captures_rows_on_the_device_and_replays_them_with_others),
		cmocka_unit_test(a_step_while_the_host_captures_says_so_and_changes_nothing),
		cmocka_unit_test(
			steps_on_the_hosts_stream_have_the_bits_of_a_stream_of_their_own),
		cmocka_unit_test(streams_and_switches_that_do_not_fit_are_refused),
		cmocka_unit_test(rows_on_the_device_need_a_stream_and_on_the_cpu_none),
	};

	if (getenv("AFD_TEST_ONLY")) /* a name, with * and ? */
		cmocka_set_test_filter(getenv("AFD_TEST_ONLY"));
	return cmocka_run_group_tests(tests, NULL, NULL);
}
