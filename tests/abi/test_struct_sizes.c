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
HOLDS(afd_span, 56, peer, 48);
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
HOLDS(afd_peer_info, 248, _pad2, 244);

HOLDS(afd_ffn_pass, 64, _pad, 60);
HOLDS(afd_ffn_params, 104, _pad, 100);
HOLDS(afd_ffn_rows, 80, _pad, 76);
HOLDS(afd_ffn_stats, 72, stored_bytes, 64);

HOLDS(afd_attn_params, 112, quantize_activations, 108);
HOLDS(afd_entry, 32, user_id, 24);
HOLDS(afd_batch, 64, trace_id, 48);
HOLDS(afd_kv_layout, 96, v_scale, 92);
HOLDS(afd_kv_layer, 32, v_scale, 28);
HOLDS(afd_sample_params, 32, seed, 24);
HOLDS(afd_attn_stats, 80, _pad, 76);
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
