/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model: which tensors a role has, that a role opens only the files that hold them, the head of
 * tied models, and tensors that a host lends.
 */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <sys/wait.h>

#include "../../lib/model/model.h"
#include "checkpoint_files.h"

static afd_context *ctx;
static afd_model *model;
static char dir[64];

static int begin(void **state)
{
	model = NULL;
	make_dir(dir);
	return afd_context_create(&ctx, NULL);
}

static int end(void **state)
{
	afd_model_close(model);
	afd_context_destroy(ctx);
	remove_dir(dir);
	return 0;
}

static void open_tiny(const char *config)
{
	write_text(dir, "config.json", config);
	write_tiny(dir, "model.safetensors", 0, TINY_ALL, 0);
	if (afd_model_open(&model, ctx, dir, NULL))
		fail_msg("%s", afd_last_error());
}

static void open_sharded(void)
{
	if (afd_model_open(&model, ctx, dir, NULL))
		fail_msg("%s", afd_last_error());
}

static float first_number(int32_t layer, int32_t kind)
{
	struct afd__tensor t;

	if (afd__model_tensor(model, layer, kind, &t))
		fail_msg("%s", afd_last_error());
	assert_int_equal(t.dtype, AFD_DTYPE_F32);
	return *(const float *)t.data;
}

/* ---- roles and tensors ---- */

static void info_and_contract_say_what_the_config_says(void **state)
{
	struct afd_model_info info = { .size = sizeof(info) };
	struct afd_contract contract = { .size = sizeof(contract) };

	open_tiny(TINY_CONFIG);
	assert_int_equal(afd_model_info(model, &info), 0);
	assert_string_equal(info.architecture, "Qwen3ForCausalLM");
	assert_int_equal(info.head_dim, 2);
	assert_int_equal(info.n_full_layers, 1);
	assert_int_equal(info.n_tensors, TINY_ALL);
	/* of the tensor, not of the config, which says bfloat16 */
	assert_int_equal(info.dtype, AFD_DTYPE_F32);
	assert_int_equal(info.kv_bytes_per_token, 2 * 2 * 4);
	assert_int_equal(afd_model_contract(model, &contract), 0);
	assert_int_equal(contract.size, sizeof(contract));
	assert_int_equal(contract.hidden_size, 4);
	assert_int_equal(contract.n_layers, 1);
	assert_int_equal(contract.ffn_kinds[0], AFD_FFN_DENSE);
	assert_int_equal(contract.dtype, AFD_DTYPE_F32);
}

static void each_role_has_its_own_tensors(void **state)
{
	struct afd_role_info attention = { .size = sizeof(attention) }, ffn = { .size = sizeof(ffn) };

	open_tiny(TINY_CONFIG);
	assert_int_equal(afd_model_role(model, AFD_ROLE_ATTENTION, &attention), 0);
	assert_int_equal(afd_model_role(model, AFD_ROLE_FFN, &ffn), 0);
	assert_int_equal(attention.n_tensors, TINY_ATTENTION);
	assert_int_equal(attention.bytes, 4 * (20 + 20 + 4 + 4 + 4 + 16 + 8 + 8 + 16 + 2 + 2));
	assert_int_equal(ffn.n_tensors, TINY_FFN);
	assert_int_equal(ffn.bytes, 4 * 3 * 24);
	assert_int_equal(afd_model_role(model, 3, &ffn), -EINVAL);
}

static void every_kind_finds_its_tensor(void **state)
{
	open_tiny(TINY_CONFIG);
	assert_true(first_number(-1, AFD__TENSOR_EMBED) == 0);
	assert_true(first_number(-1, AFD__TENSOR_HEAD) == 100);
	assert_true(first_number(-1, AFD__TENSOR_FINAL_NORM) == 200);
	assert_true(first_number(0, AFD__TENSOR_INPUT_NORM) == 300);
	assert_true(first_number(0, AFD__TENSOR_FFN_NORM) == 400);
	assert_true(first_number(0, AFD__TENSOR_Q) == 500);
	assert_true(first_number(0, AFD__TENSOR_K) == 600);
	assert_true(first_number(0, AFD__TENSOR_V) == 700);
	assert_true(first_number(0, AFD__TENSOR_O) == 800);
	assert_true(first_number(0, AFD__TENSOR_Q_NORM) == 900);
	assert_true(first_number(0, AFD__TENSOR_K_NORM) == 1000);
	assert_true(first_number(0, AFD__TENSOR_GATE) == 1100);
	assert_true(first_number(0, AFD__TENSOR_UP) == 1200);
	assert_true(first_number(0, AFD__TENSOR_DOWN) == 1300);
}

static void tensors_are_listed_in_the_order_of_use(void **state)
{
	struct afd_tensor_info info = { .size = sizeof(info) };

	open_tiny(TINY_CONFIG);
	assert_int_equal(afd_model_tensor(model, 0, &info), 0);
	assert_string_equal(info.name, "model.embed_tokens.weight");
	assert_string_equal(info.file, "model.safetensors");
	assert_int_equal(info.layer, -1);
	assert_int_equal(afd_model_tensor(model, 2, &info), 0);
	assert_string_equal(info.name, "model.layers.0.self_attn.q_proj.weight");
	assert_int_equal(info.layer, 0);
	assert_int_equal(info.role, AFD_ROLE_ATTENTION);
	assert_int_equal(info.n_dims, 2);
	assert_int_equal(info.shape[1], 4);
	assert_int_equal(info.bytes, 64);
	assert_int_equal(afd_model_tensor(model, TINY_ALL, &info), -EINVAL);
}

static void data_at_an_odd_place_is_given_aligned(void **state)
{
	struct afd__tensor t;

	write_text(dir, "config.json", TINY_CONFIG);
	write_tiny(dir, "model.safetensors", 0, TINY_ALL, 3);
	open_sharded();
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_UP, &t), 0);
	assert_int_equal((uintptr_t)t.data % 4, 0);
	assert_true(((const float *)t.data)[23] == 1223);
	afd__model_release(&t);
	assert_true(((const float *)t.data)[23] == 1223);
}

static void released_pages_come_back(void **state)
{
	struct afd__tensor t;

	open_tiny(TINY_CONFIG);
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_UP, &t), 0);
	afd__model_release(&t);
	assert_true(((const float *)t.data)[23] == 1223);
}

/* ---- files of the other role ---- */

static void the_ffn_role_starts_without_the_attention_file(void **state)
{
	struct afd_role_info info = { .size = sizeof(info) };

	write_tiny_sharded(dir);
	remove_file(dir, "a.safetensors");
	open_sharded();
	assert_int_equal(afd_model_role(model, AFD_ROLE_FFN, &info), 0);
	assert_int_equal(info.n_tensors, TINY_FFN);
	assert_true(first_number(0, AFD__TENSOR_DOWN) == 1300);
}

static void the_attention_role_starts_without_the_ffn_file(void **state)
{
	write_tiny_sharded(dir);
	remove_file(dir, "f.safetensors");
	open_sharded();
	assert_true(first_number(0, AFD__TENSOR_Q) == 500);
}

static void a_broken_file_of_the_other_role_is_not_looked_at(void **state)
{
	write_tiny_sharded(dir);
	write_text(dir, "a.safetensors", "broken");
	open_sharded();
	assert_true(first_number(0, AFD__TENSOR_GATE) == 1100);
}

static void a_missing_file_is_named_with_the_tensor(void **state)
{
	struct afd__tensor t;

	write_tiny_sharded(dir);
	remove_file(dir, "a.safetensors");
	open_sharded();
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_Q, &t), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "a.safetensors"));
	assert_non_null(strstr(afd_last_error(), "model.layers.0.self_attn.q_proj.weight"));
}

static void the_contract_falls_back_to_the_dtype_of_the_config(void **state)
{
	struct afd_contract contract = { .size = sizeof(contract) };

	write_tiny_sharded(dir);
	remove_file(dir, "a.safetensors");
	open_sharded();
	assert_int_equal(afd_model_contract(model, &contract), 0);
	assert_int_equal(contract.dtype, AFD_DTYPE_BF16);
}

static void the_one_file_wins_over_an_index(void **state)
{
	write_tiny_sharded(dir);
	write_tiny(dir, "model.safetensors", 0, TINY_ALL, 0);
	remove_file(dir, "a.safetensors");
	open_sharded();
	assert_true(first_number(0, AFD__TENSOR_Q) == 500);
}

static void a_changed_working_directory_does_not_matter(void **state)
{
	char was[400];

	assert_non_null(getcwd(was, sizeof(was)));
	write_tiny_sharded(dir);
	assert_int_equal(chdir(dir), 0);
	assert_int_equal(afd_model_open(&model, ctx, ".", NULL), 0);
	assert_int_equal(chdir(was), 0);
	assert_true(first_number(0, AFD__TENSOR_UP) == 1200);
}

/* ---- threads ---- */

static void *look_up_all(void *found)
{
	const void **data = found;
	struct afd__tensor t;
	uint32_t i;

	for (i = 0; i < model->n_slots; i++)
		data[i] = afd__model_tensor(model, model->slots[i].layer, model->slots[i].kind,
					    &t) ? NULL : t.data;
	return NULL;
}

static void threads_that_look_up_at_once_find_the_same(void **state)
{
	enum { N_THREADS = 4 };
	const void *found[N_THREADS][TINY_ALL] = { 0 };
	pthread_t threads[N_THREADS];
	int i, j;

	write_tiny_sharded(dir);
	write_tiny(dir, "f.safetensors", TINY_ATTENTION, TINY_FFN, 1);
	open_sharded();
	for (i = 0; i < N_THREADS; i++)
		assert_int_equal(pthread_create(&threads[i], NULL, look_up_all, found[i]), 0);
	for (i = 0; i < N_THREADS; i++)
		pthread_join(threads[i], NULL);
	for (j = 0; j < TINY_ALL; j++) {
		assert_non_null(found[0][j]);
		for (i = 1; i < N_THREADS; i++)
			assert_ptr_equal(found[i][j], found[0][j]);
	}
}

/* ---- the head ---- */

#define TIED "{\"model_type\":\"qwen3\",\"hidden_size\":4,\"intermediate_size\":6,\"num_hidden_layers\":1," \
	"\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":2,\"vocab_size\":5,\"tie_word_embeddings\":true}"

static void a_tied_head_is_the_embedding(void **state)
{
	struct afd_model_info info = { .size = sizeof(info) };
	struct afd__tensor head, embed;

	write_tiny_sharded(dir);
	write_text(dir, "config.json", TIED);
	write_text(dir, "model.safetensors.index.json",
		   "{\"weight_map\":{\"model.embed_tokens.weight\":\"a.safetensors\"}}");
	open_sharded();
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_HEAD, &head), 0);
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_EMBED, &embed), 0);
	assert_ptr_equal(head.data, embed.data);
	assert_int_equal(afd_model_info(model, &info), 0);
	assert_int_equal(info.n_tensors, TINY_ALL - 1);
}

static void a_tied_head_that_differs_is_used(void **state)
{
	struct afd_model_info info = { .size = sizeof(info) };

	open_tiny(TIED);
	assert_true(first_number(-1, AFD__TENSOR_HEAD) == 100);
	assert_int_equal(afd_model_info(model, &info), 0);
	assert_int_equal(info.tied_head, 1);
	assert_int_equal(info.n_tensors, TINY_ALL);
}

static void an_untied_head_must_be_there(void **state)
{
	struct afd__tensor t;

	write_text(dir, "config.json", TINY_CONFIG);
	write_tiny(dir, "model.safetensors", 2, TINY_ALL - 2, 0);
	open_sharded();
	assert_int_equal(afd__model_tensor(model, -1, AFD__TENSOR_HEAD, &t), -ENOENT);
	assert_non_null(strstr(afd_last_error(), "lm_head.weight"));
}

/* ---- calls that are wrong ---- */

static void a_child_of_fork_is_refused(void **state)
{
	struct afd_model_info info = { .size = sizeof(info) };
	int status;
	pid_t pid;

	open_tiny(TINY_CONFIG);
	pid = fork();
	if (!pid) {
		int rc = afd_model_info(model, &info);

		afd_model_close(model);
		_exit(rc == -EINVAL ? 0 : 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

static void a_shape_that_the_config_contradicts_is_refused_with_both(void **state)
{
	struct afd__tensor t;

	write_tiny_sharded(dir);
	write_text(dir, "config.json",
		   "{\"model_type\":\"qwen3\",\"hidden_size\":4,\"intermediate_size\":8,\"num_hidden_layers\":1,"
		   "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":2,\"vocab_size\":5}");
	open_sharded();
	assert_int_equal(afd__model_tensor(model, 0, AFD__TENSOR_DOWN, &t), -EBADMSG);
	assert_non_null(strstr(afd_last_error(),
			"shape is [4, 6], config.json says [4, 8] (hidden_size, intermediate_size)"));
}

int main(void)
{
#define T(test) cmocka_unit_test_setup_teardown(test, begin, end)
	const struct CMUnitTest tests[] = {
		T(info_and_contract_say_what_the_config_says),
		T(each_role_has_its_own_tensors),
		T(every_kind_finds_its_tensor),
		T(tensors_are_listed_in_the_order_of_use),
		T(data_at_an_odd_place_is_given_aligned),
		T(released_pages_come_back),
		T(the_ffn_role_starts_without_the_attention_file),
		T(the_attention_role_starts_without_the_ffn_file),
		T(a_broken_file_of_the_other_role_is_not_looked_at),
		T(a_missing_file_is_named_with_the_tensor),
		T(the_contract_falls_back_to_the_dtype_of_the_config),
		T(the_one_file_wins_over_an_index),
		T(a_changed_working_directory_does_not_matter),
		T(threads_that_look_up_at_once_find_the_same),
		T(a_tied_head_is_the_embedding),
		T(a_tied_head_that_differs_is_used),
		T(an_untied_head_must_be_there),
		T(a_child_of_fork_is_refused),
		T(a_shape_that_the_config_contradicts_is_refused_with_both),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
