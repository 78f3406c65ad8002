/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Size and last offset of every public struct, on x86-64. A host that was built against an older
 * header passes that many bytes: a struct may grow at its end (change the row, and say so in
 * CHANGELOG.md), and never change otherwise.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include <afd/afd.h>

#define HOLDS(name, bytes, last, offset) \
	_Static_assert(sizeof(struct name) == bytes && offsetof(struct name, last) == offset, \
		       #name " has changed")

#if defined(__x86_64__)
HOLDS(afd_log, 24, max_level, 16);
HOLDS(afd_allocator, 24, user, 16);
HOLDS(afd_executor, 24, n_threads, 16);
HOLDS(afd_span, 96, _pad, 92);
HOLDS(afd_tracer, 16, user, 8);
HOLDS(afd_context_params, 104, tracer, 88);

HOLDS(afd_contract, 48, shared_experts, 44);
HOLDS(afd_tensor, 32, dtype, 28);
HOLDS(afd_model_params, 40, tensor_bytes, 32);
HOLDS(afd_model_info, 112, ffn_only, 108);
HOLDS(afd_role_info, 24, bytes, 16);
HOLDS(afd_shard_params, 40, n_layers, 36);
HOLDS(afd_tensor_info, 80, bytes, 72);

HOLDS(afd_transport_params, 144, reconnect_ms, 140);
HOLDS(afd_step_params, 48, _pad, 44);
HOLDS(afd_frame, 80, weights, 72);
HOLDS(afd_peer_info, 256, weights_epoch, 248);
HOLDS(afd_probe_params, 40, key_bytes, 32);
HOLDS(afd_probe_backend, 424, bytes_per_second, 416);
HOLDS(afd_probe, 32, chosen, 28);

HOLDS(afd_ffn_pass, 64, _pad, 60);
HOLDS(afd_ffn_params, 128, _pad, 124);
HOLDS(afd_ffn_rows, 80, on_device, 76);
HOLDS(afd_ffn_stats, 72, stored_bytes, 64);

HOLDS(afd_attn_params, 128, deterministic, 124);
HOLDS(afd_entry, 40, sample, 32);
HOLDS(afd_batch, 80, _pad, 76);
HOLDS(afd_kv_layout, 96, v_scale, 92);
HOLDS(afd_kv_layer, 32, v_scale, 28);
HOLDS(afd_sample_params, 32, seed, 24);
HOLDS(afd_attn_stats, 80, _pad, 76);

HOLDS(afd_plan_law, 24, shape, 16);
HOLDS(afd_plan_request, 8, output_tokens, 4);
HOLDS(afd_plan_workload, 96, _pad, 92);
HOLDS(afd_plan_load, 48, biased_output, 40);
HOLDS(afd_plan_knot, 16, time, 8);
HOLDS(afd_plan_params, 200, ffn_memory_bytes, 192);
HOLDS(afd_plan_point, 104, lanes, 100);
HOLDS(afd_plan_sizing, 96, r_peak, 88);
HOLDS(afd_plan_span, 32, step, 28);
HOLDS(afd_plan_simulate_params, 80, scratch_bytes, 72);
HOLDS(afd_plan_simulation, 112, _pad, 108);
HOLDS(afd_plan_device, 80, _pad, 76);
HOLDS(afd_plan_model, 112, _pad, 108);
HOLDS(afd_plan_roofline_params, 120, lambda, 112);
HOLDS(afd_plan_roofline, 128, ep_hfu, 120);
HOLDS(afd_plan_imbalance, 64, dp_afd, 56);
HOLDS(afd_plan_pipeline_params, 64, top_k, 60);
HOLDS(afd_plan_pipeline, 40, _pad, 36);
HOLDS(afd_plan_time, 104, us, 96);
HOLDS(afd_plan_report_params, 160, group_max, 156);
HOLDS(afd_plan_report, 208, speedup_context, 200);
HOLDS(afd_plan_claim, 112, reason, 104);
HOLDS(afd_plan_line, 48, residual_max, 40);
#endif

static void the_library_is_of_the_version_of_its_header(void **state)
{
	char version[32];

	(void)state;
	snprintf(version, sizeof version, "%d.%d.%d", AFD_VERSION_MAJOR, AFD_VERSION_MINOR,
		 AFD_VERSION_PATCH);
	assert_string_equal(afd_version(), version);
}

/* What hosts pass, byte for byte: params of half this size, and of a later version. */
static void params_of_every_size_are_read_alike(void **state)
{
	union {
		struct afd_context_params params;
		unsigned char bytes[sizeof(struct afd_context_params) + 64];
	} newer = { .params = { .size = sizeof newer, .n_threads = 1 } };
	struct afd_context_params older = {
		.size = offsetof(struct afd_context_params, allocator) };
	afd_context *ctx = NULL;

	(void)state;
	assert_int_equal(afd_context_create(&ctx, &older), 0);
	afd_context_destroy(ctx);
	assert_int_equal(afd_context_create(&ctx, &newer.params), 0);
	afd_context_destroy(ctx);
	ctx = NULL;
	newer.bytes[sizeof newer - 1] = 1;
	assert_int_equal(afd_context_create(&ctx, &newer.params), -E2BIG);
	assert_null(ctx);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(the_library_is_of_the_version_of_its_header),
		cmocka_unit_test(params_of_every_size_are_read_alike),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
