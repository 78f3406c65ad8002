/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checkpoints that lie: every one is refused with a text that names the file and what is wrong,
 * under a 4 GiB limit of address space (but for sanitizers, which need more), and the directory can
 * be opened again.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <stdbool.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "../../lib/model/model.h"
#include "../unit/checkpoint_files.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define SANITIZED 1
#endif
#endif

static afd_context *ctx;
static char dir[64];

static int begin(void **state)
{
	make_dir(dir);
	write_text(dir, "config.json", TINY_CONFIG);
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_context_destroy(ctx);
	remove_dir(dir);
	return 0;
}

static void refuse_open(int code, const char *text)
{
	afd_model *model = NULL;
	int rc = afd_model_open(&model, ctx, dir, NULL);

	if (!rc)
		fail_msg("it was opened, should say \"%s\"", text);
	if (rc != code || !strstr(afd_last_error(), text))
		fail_msg("%d: says \"%s\", should say \"%s\"", rc, afd_last_error(), text);
	assert_null(model);
	write_tiny(dir, "model.safetensors", 0, TINY_ALL, 0);
	write_text(dir, "config.json", TINY_CONFIG);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	afd_model_close(model);
}

/* ---- headers ---- */

struct bad_header {
	const char *name, *header;
	size_t data_bytes;
	const char *text; /* a part of the error */
};

#define ONE(rest) "{\"a\":{" rest "}}"
#define F32(shape, offsets) "\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":" offsets

static const struct bad_header bad_headers[] = {
	{ "a_header_that_is_no_json_is_refused", "{\"a\":", 0, "model.safetensors: not JSON" },
	{ "a_header_that_is_a_list_is_refused", "[1,2]", 0, "the header must be an object" },
	{ "an_empty_header_is_refused", "", 0, "not JSON" },
	{ "a_header_of_spaces_is_refused", " \n ", 0, "it is empty" },
	{ "text_behind_the_header_is_refused", "{} x", 0, "not JSON" },
	{ "duplicate_tensors_are_refused", "{\"a\":{" F32("[1]", "[0,4]") "},\"a\":{" F32("[1]",
		"[0,4]") "}}", 4,
	  "duplicate object key" },
	{ "duplicate_keys_of_a_tensor_are_refused", ONE("\"dtype\":\"F32\"," F32("[1]", "[0,4]")),
		4, "duplicate object key" },
	{ "nul_in_a_name_is_refused", "{\"a\\u0000b\":{" F32("[1]", "[0,4]") "}}", 4, "not JSON" },
	{ "bad_utf8_in_a_name_is_refused", "{\"a\xff\":{" F32("[1]", "[0,4]") "}}", 4, "not JSON" },
	{ "a_tensor_that_is_a_number_is_refused", "{\"a\":1}", 0, "tensor a: must be an object" },
	{ "metadata_that_is_no_object_is_refused", "{\"__metadata__\":1}", 0,
		"__metadata__ must be an object" },
	{ "a_missing_dtype_is_refused", ONE("\"shape\":[1],\"data_offsets\":[0,4]"), 4,
		"tensor a: dtype must be a string" },
	{ "a_missing_shape_is_refused", ONE("\"dtype\":\"F32\",\"data_offsets\":[0,4]"), 4,
		"tensor a: shape must be a list" },
	{ "missing_offsets_are_refused", ONE("\"dtype\":\"F32\",\"shape\":[1]"), 4,
		"data_offsets must be two integers" },
	{ "three_offsets_are_refused", ONE(F32("[1]", "[0,4,8]")), 4,
		"data_offsets must be two integers" },
	{ "a_fraction_in_a_shape_is_refused", ONE(F32("[1.5]", "[0,4]")), 4,
		"shape must hold integers" },
	{ "a_negative_dimension_is_refused", ONE(F32("[-1]", "[0,4]")), 4,
		"shape must hold integers from 0 on" },
	{ "a_fraction_in_offsets_is_refused", ONE(F32("[1]", "[0,4.0]")), 4,
		"data_offsets must be two integers" },
	{ "negative_offsets_are_refused", ONE(F32("[1]", "[-4,0]")), 4, "data_offsets must rise" },
	{ "falling_offsets_are_refused", ONE(F32("[1]", "[4,0]")), 4, "data_offsets must rise" },
	{ "nine_dimensions_are_refused", ONE(F32("[1,1,1,1,1,1,1,1,1]", "[0,4]")), 4,
		"more than 8 dimensions" },
	{ "a_shape_whose_product_overflows_is_refused", ONE(F32("[4294967296,4294967296,4]",
		"[0,4]")), 4, "overflows" },
	{ "a_shape_whose_bits_overflow_is_refused", ONE(F32("[9223372036854775807]", "[0,4]")), 4,
		"do not fill" },
	{ "an_integer_beyond_64_bits_is_refused", ONE(F32("[99999999999999999999]", "[0,4]")), 4,
		"not JSON" },
	{ "a_shape_larger_than_its_bytes_is_refused", ONE(F32("[2]", "[0,4]")), 4,
		"2 numbers of F32 do not fill its 4 bytes" },
	{ "a_shape_smaller_than_its_bytes_is_refused", ONE(F32("[0]", "[0,4]")), 4,
		"0 numbers of F32" },
	{ "half_a_byte_is_refused", ONE("\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]"), 1,
		"3 numbers of F4" },
	{ "an_end_beyond_the_file_is_refused", ONE(F32("[2]", "[0,8]")), 4,
		"data ends at 8, the file has 4 bytes of data" },
	{ "an_absurd_end_is_refused", ONE(F32("[1]", "[0,9223372036854775807]")), 4,
		"data ends at 9223372036854775807" },
	{ "overlapping_tensors_are_refused", "{\"a\":{" F32("[2]", "[0,8]") "},\"b\":{" F32("[2]",
		"[4,12]") "}}", 12,
	  "tensors a and b overlap" },
	{ "tensors_at_one_place_are_refused", "{\"a\":{" F32("[1]", "[0,4]") "},\"b\":{" F32("[1]",
		"[0,4]") "}}", 4, "overlap" },
	{ "a_hole_before_a_tensor_is_refused", ONE(F32("[1]", "[4,8]")), 8,
		"4 bytes before tensor a belong to no tensor" },
	{ "bytes_behind_the_last_tensor_are_refused", ONE(F32("[1]", "[0,4]")), 6,
		"2 bytes at its end belong to no tensor" },
	{ "data_without_a_tensor_is_refused", "{}", 1, "1 bytes at its end" },
};

static void check_header(void **state)
{
	const struct bad_header *c = *state;

	write_safetensors(dir, "model.safetensors", c->header, NULL, c->data_bytes);
	refuse_open(-EBADMSG, c->text);
}

static void write_length(uint64_t header_bytes, size_t file_bytes)
{
	char bytes[64] = { 0 };

	memcpy(bytes, &header_bytes, 8);
	write_bytes(dir, "model.safetensors", bytes, file_bytes);
}

static void an_empty_file_is_refused(void **state)
{
	write_length(0, 0);
	refuse_open(-EBADMSG, "model.safetensors: 0 bytes, too short");
}

static void a_file_that_ends_in_its_length_is_refused(void **state)
{
	write_length(2, 7);
	refuse_open(-EBADMSG, "model.safetensors: 7 bytes, too short");
}

static void a_truncated_header_is_refused_with_its_size(void **state)
{
	write_length(1000, 64);
	refuse_open(-EBADMSG, "header of 1000 bytes, the file has 64");
}

static void an_absurd_header_is_refused_before_it_is_read(void **state)
{
	write_length(UINT64_MAX, 64);
	refuse_open(-EBADMSG, "header of 18446744073709551615 bytes, limit 100000000");
}

static void a_deeply_nested_header_is_refused(void **state)
{
	char text[20001];

	memset(text, '[', 20000);
	text[20000] = '\0';
	write_safetensors(dir, "model.safetensors", text, NULL, 0);
	refuse_open(-EBADMSG, "maximum parsing depth");
}

/* Truncated at every byte, a good file is refused; nothing reads beyond it. */
static void a_file_cut_anywhere_is_refused(void **state)
{
	char path[100];
	struct stat info;
	off_t at;

	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	write_tiny(dir, "model.safetensors", 0, 1, 0);
	assert_int_equal(stat(path, &info), 0);
	for (at = info.st_size - 1; at >= 0; at--) {
		afd_model *model = NULL;

		assert_int_equal(truncate(path, at), 0);
		assert_int_equal(afd_model_open(&model, ctx, dir, NULL), -EBADMSG);
	}
}

static void a_header_of_100000_tensors_is_read(void **state)
{
	char *header = malloc(100000 * 80), *end = header;
	afd_model *model;
	int i;

	assert_non_null(header);
	end += sprintf(end, "{");
	for (i = 0; i < 100000; i++)
		end += sprintf(end, "%s\"t%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}", i ? "," : "", i, i,
			       i + 1);
	sprintf(end, "}");
	write_safetensors(dir, "model.safetensors", header, NULL, 100000);
	free(header);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	afd_model_close(model);
}

/* ---- tensors that are there, but not what is needed ---- */

static void a_needed_tensor_of_another_dtype_is_refused(void **state)
{
	struct afd__tensor t;
	afd_model *model;

	write_safetensors(dir, "model.safetensors",
			  "{\"model.norm.weight\":{\"dtype\":\"I64\",\"shape\":[4],\"data_offsets\":[0,32]}}", NULL, 32);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_FINAL_NORM, &t), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "model.norm.weight: dtype I64 is not supported, only F32, F16, BF16 and F8_E4M3"));
	afd_model_close(model);
}

static void a_needed_tensor_of_a_future_dtype_is_refused(void **state)
{
	struct afd__tensor t;
	afd_model *model;

	write_safetensors(dir, "model.safetensors",
			  "{\"model.norm.weight\":{\"dtype\":\"F3_E1M1_AND_MORE_TO_COME\",\"shape\":[4],\"data_offsets\":[0,2]}}",
			  NULL, 2);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_FINAL_NORM, &t), -ENOTSUP);
	afd_model_close(model);
}

/* ---- an index ---- */

struct bad_index {
	const char *name, *index;
	const char *text;
};

static const struct bad_index bad_indexes[] = {
	{ "an_index_that_is_no_json_is_refused", "{", "model.safetensors.index.json: not JSON" },
	{ "an_index_without_a_map_is_refused", "{\"metadata\":{}}", "weight_map is missing" },
	{ "a_map_that_is_a_list_is_refused", "{\"weight_map\":[]}",
		"weight_map is [], must be an object" },
	{ "a_duplicate_tensor_in_the_index_is_refused",
		"{\"weight_map\":{\"a\":\"x\",\"a\":\"y\"}}", "duplicate object key" },
	{ "a_file_that_is_a_number_is_refused", "{\"weight_map\":{\"a\":1}}",
		"the file of tensor a must be a string" },
	{ "a_file_outside_the_directory_is_refused", "{\"weight_map\":{\"a\":\"../secret\"}}",
	  "tensor a: \"../secret\" is not the name of a file" },
	{ "an_absolute_file_is_refused", "{\"weight_map\":{\"a\":\"/etc/passwd\"}}",
		"\"/etc/passwd\" is not the name" },
	{ "the_parent_directory_is_refused", "{\"weight_map\":{\"a\":\"..\"}}",
		"\"..\" is not the name" },
	{ "a_file_in_a_subdirectory_is_refused", "{\"weight_map\":{\"a\":\"x/y\"}}",
		"\"x/y\" is not the name" },
	{ "an_empty_file_name_is_refused", "{\"weight_map\":{\"a\":\"\"}}",
		"\"\" is not the name" },
};

static void check_index(void **state)
{
	const struct bad_index *c = *state;

	write_text(dir, "model.safetensors.index.json", c->index);
	refuse_open(-EBADMSG, c->text);
}

static void look_up_down_proj(int code, const char *text)
{
	struct afd__tensor t;
	afd_model *model;

	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_DOWN, &t), code);
	if (!strstr(afd_last_error(), text))
		fail_msg("says \"%s\", should say \"%s\"", afd_last_error(), text);
	/* The same again: a failure leaves nothing half open. */
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_DOWN, &t), code);
	afd_model_close(model);
}

static void a_tensor_that_stands_in_two_files_is_refused(void **state)
{
	write_tiny_sharded(dir);
	write_tiny(dir, "f.safetensors", TINY_ATTENTION - 1, TINY_FFN + 1, 0);
	look_up_down_proj(-EBADMSG,
			  "tensor model.layers.0.self_attn.k_norm.weight stands in it, and in a.safetensors");
}

static void a_tensor_that_is_not_in_its_file_is_refused(void **state)
{
	write_tiny_sharded(dir);
	write_tiny(dir, "f.safetensors", TINY_ATTENTION, TINY_FFN - 1, 0);
	look_up_down_proj(-EBADMSG,
			  "f.safetensors: tensor model.layers.0.mlp.down_proj.weight is not in it, as the index says");
}

static void a_tensor_that_the_index_lacks_does_not_exist(void **state)
{
	write_tiny_sharded(dir);
	write_text(dir, "model.safetensors.index.json",
		   "{\"weight_map\":{\"model.norm.weight\":\"a.safetensors\"}}");
	look_up_down_proj(-ENOENT, "tensor model.layers.0.mlp.down_proj.weight: not in");
}

static void a_broken_file_of_the_index_is_refused_when_it_is_needed(void **state)
{
	write_tiny_sharded(dir);
	write_text(dir, "f.safetensors", "broken");
	look_up_down_proj(-EBADMSG, "f.safetensors: 6 bytes, too short");
}

/* ---- files that are none ---- */

static void an_empty_directory_is_refused(void **state)
{
	remove_file(dir, "config.json");
	refuse_open(-ENOENT, "config.json: no such file");
}

static void a_directory_without_weights_is_refused(void **state)
{
	refuse_open(-ENOENT, "neither model.safetensors nor model.safetensors.index.json is in it");
}

static void no_directory_is_refused(void **state)
{
	afd_model *model = NULL;

	assert_int_equal(afd_model_open(&model, ctx, "/nonexistent/model", NULL), -ENOENT);
	assert_string_equal(afd_last_error(), "model /nonexistent/model: no such directory");
}

static void a_directory_with_a_long_name_is_refused_with_the_cause(void **state)
{
	afd_model *model = NULL;
	char name[5000];

	memset(name, 'a', sizeof(name) - 1);
	name[sizeof(name) - 1] = '\0';
	assert_int_equal(afd_model_open(&model, ctx, name, NULL), -EIO);
	assert_non_null(strstr(afd_last_error(), "aaa: the directory: open: File name too long"));
}

static void a_fifo_for_a_file_is_refused_and_does_not_block(void **state)
{
	afd_model *model = NULL;
	char path[100];

	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	assert_int_equal(mkfifo(path, 0600), 0);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), -EBADMSG);
	assert_non_null(strstr(afd_last_error(), "model.safetensors: not a regular file"));
}

static void a_config_of_an_absurd_size_is_refused(void **state)
{
	char path[100];

	snprintf(path, sizeof(path), "%s/config.json", dir);
	assert_int_equal(truncate(path, (off_t)1 << 40), 0);
	refuse_open(-EBADMSG, "config.json: 1099511627776 bytes, limit 16777216");
}

/* The header of a file of 1 TB is checked and its data never reserved: the limit on address space
 * would show. */
static void a_sparse_file_of_a_terabyte_is_refused_for_its_tail(void **state)
{
	char path[100];

	write_tiny(dir, "model.safetensors", 0, 1, 0);
	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	assert_int_equal(truncate(path, (off_t)1 << 40), 0);
	refuse_open(-EBADMSG, "bytes at its end belong to no tensor");
}

#ifndef SANITIZED
static void a_file_beyond_the_address_space_gives_an_error_when_mapped(void **state)
{
	static const char header[] = "{\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]},"
		"\"b\":{\"dtype\":\"U8\",\"shape\":[8589934592],\"data_offsets\":[16,8589934608]}}";
	struct afd__tensor t;
	afd_model *model;
	char path[100];

	write_safetensors(dir, "model.safetensors", header, NULL, 0);
	snprintf(path, sizeof(path), "%s/model.safetensors", dir);
	assert_int_equal(truncate(path, 8 + (off_t)strlen(header) + 8589934608), 0);
	assert_int_equal(afd_model_open(&model, ctx, dir, NULL), 0);
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_FINAL_NORM, &t), -ENOMEM);
	assert_non_null(strstr(afd_last_error(), "model.safetensors: cannot map its"));
	afd_model_close(model);
}
#endif

/* ---- all cases ---- */

#define N(array) (sizeof(array) / sizeof((array)[0]))
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)

static const struct CMUnitTest single[] = {
	T(an_empty_file_is_refused),
	T(a_file_that_ends_in_its_length_is_refused),
	T(a_truncated_header_is_refused_with_its_size),
	T(an_absurd_header_is_refused_before_it_is_read),
	T(a_deeply_nested_header_is_refused),
	T(a_file_cut_anywhere_is_refused),
	T(a_header_of_100000_tensors_is_read),
	T(a_needed_tensor_of_another_dtype_is_refused),
	T(a_needed_tensor_of_a_future_dtype_is_refused),
	T(a_tensor_that_stands_in_two_files_is_refused),
	T(a_tensor_that_is_not_in_its_file_is_refused),
	T(a_tensor_that_the_index_lacks_does_not_exist),
	T(a_broken_file_of_the_index_is_refused_when_it_is_needed),
	T(an_empty_directory_is_refused),
	T(a_directory_without_weights_is_refused),
	T(no_directory_is_refused),
	T(a_directory_with_a_long_name_is_refused_with_the_cause),
	T(a_fifo_for_a_file_is_refused_and_does_not_block),
	T(a_config_of_an_absurd_size_is_refused),
	T(a_sparse_file_of_a_terabyte_is_refused_for_its_tail),
#ifndef SANITIZED
	T(a_file_beyond_the_address_space_gives_an_error_when_mapped),
#endif
};

int main(void)
{
	struct CMUnitTest tests[N(single) + N(bad_headers) + N(bad_indexes)];
	size_t n = N(single), i;

#ifndef SANITIZED
	const struct rlimit limit = { (rlim_t)4 << 30, (rlim_t)4 << 30 };

	if (setrlimit(RLIMIT_AS, &limit))
		return 1;
#endif
	memcpy(tests, single, sizeof(single));
	for (i = 0; i < N(bad_headers); i++)
		tests[n++] = (struct CMUnitTest){ bad_headers[i].name, check_header, begin, end,
			(void *)&bad_headers[i] };
	for (i = 0; i < N(bad_indexes); i++)
		tests[n++] = (struct CMUnitTest){ bad_indexes[i].name, check_index, begin, end,
			(void *)&bad_indexes[i] };
	return cmocka_run_group_tests(tests, NULL, NULL);
}
