/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The messages of the handshake: round trips, what may be added later, what is refused, and that a
 * disagreement names its field and both values.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../lib/transport/hello.h"
#include "../../lib/transport/ops.h"
#include "../../lib/transport/wire.h"

enum { PREFIX = 12 };

static uint8_t message[AFD__HELLO_MAX + 64];
static struct afd__hello hello, back;

static void make(uint32_t kind)
{
	static const uint8_t kinds[3] = { AFD_FFN_DENSE, AFD_FFN_MOE, AFD_FFN_DENSE };
	struct afd_contract contract = { .size = sizeof(contract),
		.hidden_size = 1024,
		.n_layers = 3,
		.ffn_kinds = kinds,
		.router = AFD_ROUTER_NONE,
		.activation = AFD_ACTIVATION_SILU };

	memset(&hello, 0, sizeof(hello));
	hello.kind = kind;
	afd__hello_state(&hello, &contract);
	hello.role = AFD_ROLE_ATTENTION;
	hello.lanes = 2;
	hello.max_rows = 512;
	hello.to_ffn_dtype = AFD_DTYPE_BF16;
	hello.to_attention_dtype = AFD_DTYPE_F32;
	hello.gate = AFD_GATE_FFN;
	hello.first_layer = 1;
	hello.n_held = 2;
	hello.weights[0] = 0x0123456789abcdef;
	hello.weights[1] = 42;
	hello.weights_epoch = 7;
	strcpy(hello.device, "avx512");
	strcpy(hello.version, "0.1.0");
}

static size_t encode(void)
{
	size_t bytes = afd__hello_encode(message, AFD__HELLO_MAX, &hello);

	assert_true(bytes > PREFIX);
	return bytes;
}

/* Appends a field as a later version would, and corrects the prefix. */
static size_t append(size_t bytes, uint16_t tag, const void *value, uint16_t value_bytes)
{
	afd__put16(message + bytes, tag);
	afd__put16(message + bytes + 2, value_bytes);
	memcpy(message + bytes + 4, value, value_bytes);
	bytes += 4 + (size_t)value_bytes;
	afd__put32(message + 8, (uint32_t)bytes);
	return bytes;
}

static void refuse(size_t bytes, const char *text)
{
	if (afd__hello_decode(&back, message, bytes) != -EPROTO || !strstr(afd_last_error(), text))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), text);
}

/* ---- round trips ---- */

static void a_hello_is_decoded_as_it_was_encoded(void **state)
{
	make(AFD__HELLO);
	assert_int_equal(afd__hello_decode(&back, message, encode()), 0);
	/* The fingerprint is the FFN side's to state. */
	hello.weights[0] = hello.weights[1] = hello.weights_epoch = 0;
	assert_memory_equal(&hello, &back, sizeof(hello));
}

static void a_welcome_is_decoded_as_it_was_encoded(void **state)
{
	make(AFD__WELCOME);
	assert_int_equal(afd__hello_decode(&back, message, encode()), 0);
	assert_memory_equal(&hello, &back, sizeof(hello));
}

static void a_refusal_is_decoded_as_it_was_encoded(void **state)
{
	afd__hello_refuse(&hello, "lanes", "4", "%u", 7);
	assert_int_equal(afd__hello_decode(&back, message, encode()), 0);
	assert_memory_equal(&hello, &back, sizeof(hello));
}

static void a_hello_of_1024_layers_fits(void **state)
{
	static uint8_t kinds[AFD__LAYERS_MAX];
	struct afd_contract contract = {
		.hidden_size = 1, .n_layers = AFD__LAYERS_MAX, .ffn_kinds = kinds
	};

	make(AFD__WELCOME);
	afd__hello_state(&hello, &contract);
	assert_int_equal(afd__hello_decode(&back, message, encode()), 0);
	assert_int_equal(back.ffn_kinds_bytes, AFD__LAYERS_MAX);
}

/* ---- other versions ---- */

static void a_field_of_a_later_version_is_skipped(void **state)
{
	make(AFD__HELLO);
	assert_int_equal(afd__hello_decode(&back, message, append(encode(), 1000, "later", 5)), 0);
	assert_int_equal(back.hidden_size, 1024);
}

static void a_field_that_must_be_understood_is_refused(void **state)
{
	make(AFD__HELLO);
	refuse(append(encode(), 0x8001, "must", 4), "field 32769 must be understood");
}

static void a_later_wire_version_is_read_as_far_as_its_prefix(void **state)
{
	make(AFD__HELLO);
	hello.wire_version = 2;
	assert_int_equal(afd__hello_decode(&back, message, encode()), 0);
	assert_int_equal(back.wire_version, 2);
	assert_int_equal(back.hidden_size, 0);
}

/* ---- what is refused ---- */

static void malformed_messages_are_refused(void **state)
{
	size_t bytes;

	make(AFD__HELLO);
	bytes = encode();
	refuse(PREFIX - 1, "11 bytes came");
	refuse(bytes - 1, "the message says");
	message[0] ^= 1;
	refuse(bytes, "magic is");
	message[0] ^= 1;
	message[6] = 9;
	refuse(bytes, "kind is 9, limit 8");
}

static void a_field_that_stands_twice_is_refused(void **state)
{
	make(AFD__HELLO);
	refuse(append(encode(), 1, "\1\0\0\0", 4), "hidden_size stands twice");
}

static void a_field_of_another_size_is_refused(void **state)
{
	size_t bytes;

	make(AFD__HELLO);
	bytes = encode();
	/* The first field is hidden_size. */
	message[PREFIX + 2] = 2;
	refuse(bytes, "hidden_size has 2 bytes, must have 4");
}

static void a_field_that_runs_beyond_the_message_is_refused(void **state)
{
	size_t bytes;

	make(AFD__HELLO);
	bytes = append(encode(), 1000, "", 0);
	afd__put16(message + bytes - 2, 1);
	refuse(bytes, "field 1000 has 1 bytes, 0 came");
}

static void a_missing_field_is_refused_by_name(void **state)
{
	size_t bytes;

	make(AFD__HELLO);
	bytes = encode() - 8;
	afd__put32(message + 8, (uint32_t)bytes);
	refuse(bytes, "group_size is missing");
}

static void layers_without_a_kind_are_refused(void **state)
{
	make(AFD__HELLO);
	hello.ffn_kinds_bytes = 2;
	refuse(encode(), "ffn_kinds has 2 bytes, n_layers is 3");
}

static void no_prefix_of_a_message_is_read_beyond(void **state)
{
	size_t bytes;

	make(AFD__WELCOME);
	bytes = encode();
	for (size_t n = 0; n < bytes; n++) {
		uint8_t *copy = malloc(n + 1);

		memcpy(copy, message, n);
		if (n >= PREFIX)
			afd__put32(copy + 8, (uint32_t)n);
		assert_int_equal(afd__hello_decode(&back, copy, n), -EPROTO);
		free(copy);
	}
}

static void texts_of_a_stranger_are_made_printable(void **state)
{
	make(AFD__HELLO);
	strcpy(hello.device, "a\x1b[31m\n");
	assert_int_equal(afd__hello_decode(&back, message, encode()), 0);
	assert_string_equal(back.device, "a?[31m?");
}

/* ---- disagreement ---- */

struct difference {
	const char *field, *ours, *theirs;
	size_t offset;
	uint32_t value;
};

static void a_disagreement_names_its_field_and_both_values(void **state)
{
	static const struct difference cases[] = {
		{ "hidden_size", "1024", "4096", offsetof(struct afd__hello, hidden_size), 4096 },
		{ "n_layers", "3", "4", offsetof(struct afd__hello, n_layers), 4 },
		{ "n_experts", "0", "128", offsetof(struct afd__hello, n_experts), 128 },
		{ "top_k", "0", "8", offsetof(struct afd__hello, top_k), 8 },
		{ "router", "1", "2", offsetof(struct afd__hello, router), 2 },
		{ "activation", "1", "9", offsetof(struct afd__hello, activation), 9 },
	};
	struct afd__hello refusal;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		make(AFD__HELLO);
		back = hello;
		memcpy((char *)&back + cases[i].offset, &cases[i].value, 4);
		assert_int_equal(afd__hello_compare(&hello, &back, &refusal), 1);
		assert_string_equal(refusal.field, cases[i].field);
		assert_string_equal(refusal.refuser_value, cases[i].ours);
		assert_string_equal(refusal.refused_value, cases[i].theirs);
	}
}

static void a_layer_of_another_kind_is_named(void **state)
{
	struct afd__hello refusal;

	make(AFD__HELLO);
	back = hello;
	back.ffn_kinds[2] = AFD_FFN_MOE;
	assert_int_equal(afd__hello_compare(&hello, &back, &refusal), 1);
	assert_string_equal(refusal.field, "ffn_kinds[2]");
	assert_string_equal(refusal.refuser_value, "1");
	assert_string_equal(refusal.refused_value, "2");
}

static void equal_contracts_have_equal_digests(void **state)
{
	struct afd__hello refusal;
	uint64_t digest;

	make(AFD__HELLO);
	digest = hello.digest;
	make(AFD__WELCOME);
	assert_int_equal(hello.digest, digest);
	back = hello;
	assert_int_equal(afd__hello_compare(&hello, &back, &refusal), 0);
	back.digest++;
	assert_int_equal(afd__hello_compare(&hello, &back, &refusal), 1);
	assert_string_equal(refusal.field, "digest");
}

/* docs/wire.md gives this number, so that another implementation can be checked. */
static void the_digest_is_that_of_the_document(void **state)
{
	make(AFD__HELLO);
	if (hello.digest != UINT64_C(0xea59c0e855701cb8))
		fail_msg("digest is 0x%016llx", (unsigned long long)hello.digest);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(a_hello_is_decoded_as_it_was_encoded),
		cmocka_unit_test(a_welcome_is_decoded_as_it_was_encoded),
		cmocka_unit_test(a_refusal_is_decoded_as_it_was_encoded),
		cmocka_unit_test(a_hello_of_1024_layers_fits),
		cmocka_unit_test(a_field_of_a_later_version_is_skipped),
		cmocka_unit_test(a_field_that_must_be_understood_is_refused),
		cmocka_unit_test(a_later_wire_version_is_read_as_far_as_its_prefix),
		cmocka_unit_test(malformed_messages_are_refused),
		cmocka_unit_test(a_field_that_stands_twice_is_refused),
		cmocka_unit_test(a_field_of_another_size_is_refused),
		cmocka_unit_test(a_field_that_runs_beyond_the_message_is_refused),
		cmocka_unit_test(a_missing_field_is_refused_by_name),
		cmocka_unit_test(layers_without_a_kind_are_refused),
		cmocka_unit_test(no_prefix_of_a_message_is_read_beyond),
		cmocka_unit_test(texts_of_a_stranger_are_made_printable),
		cmocka_unit_test(a_disagreement_names_its_field_and_both_values),
		cmocka_unit_test(a_layer_of_another_kind_is_named),
		cmocka_unit_test(equal_contracts_have_equal_digests),
		cmocka_unit_test(the_digest_is_that_of_the_document),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
