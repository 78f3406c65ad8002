/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the front door refuses: each case spoils one argument of a good call and names a word of the
 * text. Nothing reaches the backend, so the good call still works afterwards.
 */
#include "rig.h"

#include <string.h>

#include <afd/model.h>

enum { N_NUMBERS = 4096 };

/* Good arguments of all operations over one piece of device memory; a case changes one field of
 * `a`. */
struct all_args {
	struct afd__embed_args embed;
	struct afd__norm_args norm;
	struct afd__product_args product;
	struct afd__angles_args angles;
	struct afd__rope_args rope;
	struct afd__attend_args attend;
	struct afd__activation_args activation;
	struct afd__convert_args convert;
	struct afd__argmax_args argmax;
	struct afd__copy_args copy;
	struct afd__gate_args gate;
	struct afd__quantize_args quantize;
	struct afd__route_args route;
	struct afd__experts_args experts;
	struct afd__mlp_args mlp;
	struct afd__sample_args sample;
};

/* Those of routed layers. */
static void add_routed_args(struct all_args *args, float *m, const struct afd__matrix *w)
{
	int32_t *ids = (int32_t *)m;
	struct afd__matrix stack = *w;

	stack.n_stack = 1;
	stack.data_stride = 64;
	args->gate = (struct afd__gate_args){
		.x = m + 64, .gate = m, .gate_stride = 4, .n_rows = 1, .width = 4 };
	args->quantize = (struct afd__quantize_args){ .x = m + 64, .n_rows = 1, .width = 4 };
	args->route = (struct afd__route_args){ .logits = m,
		.ids = ids + 64,
		.weights = m + 72,
		.n_rows = 1,
		.n_experts = 4,
		.top_k = 2,
		.n_groups = 1,
		.top_groups = 1,
		.score = AFD_ROUTER_SOFTMAX,
		.scale = 1 };
	args->experts = (struct afd__experts_args){ .x = m,
		.ids = ids,
		.weights = m,
		.gate_up = stack,
		.down = stack,
		.y = m + 64,
		.scratch = m + 256,
		.scratch_bytes = (N_NUMBERS - 256) * sizeof(float),
		.n_rows = 1,
		.top_k = 1 };
	args->experts.down.k = 2;
	args->experts.down.data_stride = 32;
	args->mlp = (struct afd__mlp_args){ .x = m,
		.gate_up = *w,
		.down = *w,
		.y = m + 64,
		.gate_up_rows = m + 72,
		.activated = m + 80,
		.n_rows = 1 };
	args->mlp.down.k = 2;
	args->sample = (struct afd__sample_args){ .logits = m,
		.rows = (struct afd__sample_row *)(m + 256),
		.ids = ids + 64,
		.n_rows = 1,
		.width = 4 };
}

static struct all_args good_args(float *m)
{
	struct all_args args;
	struct afd__matrix w = { .data = m,
		.bytes = 4096,
		.n = 4,
		.k = 4,
		.dtype = AFD_DTYPE_F32,
		.layout = AFD__LAYOUT_IN_PLACE };
	struct afd__kv_view kv = { .data = m,
		.page_stride = 256,
		.v_offset = 128,
		.head_stride = 16,
		.position_stride = 32,
		.page_size = 4,
		.n_kv_heads = 2,
		.head_dim = 4,
		.dtype = AFD_DTYPE_F32 };
	int32_t *ids = (int32_t *)m;

	args = (struct all_args){
		.embed = { .table = w, .ids = ids, .out = m + 64, .n_rows = 1, .scale = 1 },
		.norm = { .h = m, .add = m + 8, .weight = m + 16, .out = m + 24, .n_rows = 1,
			.width = 8 },
		.product = { .x = m, .w = w, .y = m + 64, .x_stride = 4, .y_stride = 4, .n_rows = 1 },
		.angles = { .positions = ids,
			.inv_freq = m,
			.out = m + 8,
			.n_rows = 1,
			.head_dim = 4,
			.scale = 1 },
		.rope = { .qkv = m, .slots = ids, .kv = kv, .n_rows = 1, .n_heads = 4 },
		.attend = { .qkv = m,
			.positions = ids,
			.sequences = ids,
			.page_table = ids,
			.out = m + 64,
			.kv = kv,
			.n_rows = 1,
			.n_heads = 4,
			.table_stride = 1,
			.scale = 1 },
		.activation = { .gate_up = m, .out = m + 64, .n_rows = 1, .width = 4 },
		.convert = { .src = m,
			.dst = m + 64,
			.src_stride = 16,
			.dst_stride = 8,
			.n_rows = 2,
			.width = 4,
			.src_dtype = AFD_DTYPE_F32,
			.dst_dtype = AFD_DTYPE_BF16 },
		.argmax = { .x = m, .ids = ids + 64, .n_rows = 1, .width = 4 },
		.copy = { .dst = m + 64, .src = m, .bytes = 16 },
	};
	add_routed_args(&args, m, &w);
	return args;
}

#define ODD(p) ((p) = (void *)((char *)(p) + 1))
#define SPOILED(X) \
	X(embed, a.table.data = NULL, "table is NULL") \
	X(embed, a.table.dtype = AFD_DTYPE_FP8, "matrix dtype 4") \
	X(embed, a.table.layout = 0, "layout") \
	X(embed, a.ids = NULL, "ids is NULL") \
	X(embed, ODD(a.out), "aligned") \
	X(norm, a.h = NULL, "h is NULL") \
	X(norm, a.weight = NULL, "weight is NULL") \
	X(norm, a.width = 0, "width 0") \
	X(norm, ODD(a.add), "aligned") \
	X(norm, (a.out = NULL, a.add = NULL), "add (out is NULL)") \
	X(norm, a.add_wire = AFD_DTYPE_FP8, "add_wire 4") \
	X(norm, a.out_wire = 9, "out_wire 9") \
	X(norm, a.inputs.rows = (char *)a.h + 8, "aligned to 16") \
	X(norm, (a.inputs.rows = a.h, a.inputs.dtype = 0), "inputs.dtype 0") \
	X(norm, (a.inputs.rows = a.h, a.inputs.dtype = 2, a.inputs.quantize = 1), \
		"inputs.quantize 1") \
	X(norm, (a.inputs.rows = a.h, a.inputs.dtype = 2), "inputs.row_bytes 0") \
	X(product, (a.inputs = a.x), "takes float32") \
	X(product, (a.inputs = (const char *)a.x + 4), "aligned to 16") \
	X(mlp, (a.inputs = a.x), "takes float32") \
	X(product, a.x_stride = 3, "x_stride 3") \
	X(product, a.y_stride = 3, "y_stride 3") \
	X(product, a.w.n = 0, "matrix n 0") \
	X(product, a.w.k = 0, "matrix k 0") \
	X(product, a.x = NULL, "x is NULL") \
	X(product, ODD(a.bias), "bias") \
	X(angles, a.head_dim = 5, "even") \
	X(angles, a.head_dim = 0, "head_dim 0") \
	X(angles, a.inv_freq = NULL, "inv_freq is NULL") \
	X(rope, a.slots = NULL, "slots is NULL") \
	X(rope, a.kv.data = NULL, "kv.data is NULL") \
	X(rope, a.kv.page_size = 0, "page_size 0") \
	X(rope, a.kv.head_dim = 3, "even") \
	X(rope, a.kv.dtype = 77, "kv.dtype 77") \
	X(rope, a.kv.position_stride = 15, "position_stride 15") \
	X(rope, a.kv.v_offset = 0, "v_offset 0") \
	X(rope, a.kv.head_stride = 18, "multiple of 4") \
	X(rope, a.n_heads = 3, "multiple of 2 kv heads") \
	X(rope, a.kv.n_kv_heads = 0, "n_kv_heads 0") \
	X(attend, a.n_heads = 130, "query heads of a kv head 65") \
	X(attend, a.table_stride = 0, "table_stride 0") \
	X(attend, a.page_table = NULL, "page_table is NULL") \
	X(attend, a.n_rows = 0x80000000u, "tasks") \
	X(activation, a.out = NULL, "out is NULL") \
	X(activation, a.width = 0, "width 0") \
	X(convert, a.dst_dtype = 5, "dst_dtype 5") \
	X(convert, (a.dst_dtype = AFD_DTYPE_FP8), "dst_stride 8, limit 32") \
	X(convert, (a.dst_dtype = AFD_DTYPE_FP8, a.dst_stride = 34), "multiples") \
	X(convert, (a.dst_dtype = AFD_DTYPE_FP8, a.dst_stride = 32, a.dst = (char *)a.dst + 2), \
		"aligned to 4") \
	X(convert, (a.src_dtype = AFD_DTYPE_FP8, a.src_stride = 32), "one of them must be f32") \
	X(convert, (a.src_dtype = a.dst_dtype = AFD_DTYPE_FP8, a.src_stride = a.dst_stride = 32), \
		"one of them must be f32") \
	X(convert, (a.src_dtype = AFD_DTYPE_F16), "one of them must be f32") \
	X(convert, a.accumulate = 1, "accumulates in f32") \
	X(convert, a.accumulate = 2, "accumulate 2") \
	X(convert, a.src_stride = 12, "src_stride 12") \
	X(convert, a.dst_stride = 9, "multiples") \
	X(convert, ODD(a.index), "index") \
	X(convert, a.scatter = 1, "index is NULL") \
	X(convert, a.scatter = 2, "scatter 2") \
	X(argmax, a.width = 0x80000000u, "width") \
	X(argmax, a.ids = NULL, "ids is NULL") \
	X(gate, a.gate = NULL, "gate is NULL") \
	X(quantize, a.width = 0, "width 0") \
	X(route, a.top_k = 5, "limit 1 to 4") \
	X(route, a.logits = NULL, "logits is NULL") \
	X(experts, a.ids = NULL, "ids is NULL") \
	X(mlp, a.activated = NULL, "activated is NULL") \
	X(mlp, a.down.k = 3, "twice the width") \
	X(mlp, a.quantize = 2, "quantize 2") \
	X(sample, a.rows = (void *)((char *)a.rows + 4), "aligned to 8") \
	X(sample, a.width = 0, "width 0") \
	X(copy, a.src = NULL, "src is NULL") \
	X(copy, a.bytes = 257, "overlap")

#define SPOILED_CASE(op, change, word) \
	{ \
		struct afd__##op##_args a = good.op; \
		int rc; \
\
		change; \
		rc = afd__##op(&r->q, &a); \
		if (rc != -EINVAL || !strstr(afd_last_error(), #op ":") || \
			!strstr(afd_last_error(), word)) \
			fail_msg("%s with %s: %d, \"%s\"", #op, #change, rc, afd_last_error()); \
	}

static void each_bad_argument_is_refused_by_name(void **state)
{
	struct rig *r = *state;
	float zeros[N_NUMBERS] = { 0 };
	struct all_args good = good_args(rig_input(r, zeros, sizeof(zeros)));

	SPOILED(SPOILED_CASE)
}

static void the_good_arguments_are_taken(void **state)
{
	struct rig *r = *state;
	float zeros[N_NUMBERS] = { 0 };
	struct all_args good = good_args(rig_input(r, zeros, sizeof(zeros)));
	void *in_place = rig_lend(r, zeros, sizeof(zeros));

	good.mlp.gate_up.data = good.mlp.down.data = in_place;
	good.embed.table.data = good.product.w.data = good.experts.gate_up.data =
		good.experts.down.data = in_place;
#define GOOD_CASE(op) RIG_OK(afd__##op(&r->q, &good.op));
	AFD__DEVICE_OPERATIONS(GOOD_CASE)
	rig_fetch(r, zeros, good.norm.h,
		sizeof(zeros)); /* waits: the operations read them in place */
}

static void calls_without_rows_do_nothing(void **state)
{
	struct rig *r = *state;
	float x[N_NUMBERS], got[N_NUMBERS];

	rig_fill(r, x, N_NUMBERS, 1);
	float *m = rig_input(r, x, sizeof(x));
	struct all_args none = good_args(m);
	none.embed.n_rows = none.norm.n_rows = none.product.n_rows = none.angles.n_rows =
		none.rope.n_rows = none.attend.n_rows = 0;
	none.activation.n_rows = none.convert.n_rows = none.argmax.n_rows = 0;
	none.copy.bytes = 0;
	none.gate.n_rows = none.quantize.n_rows = none.route.n_rows = none.experts.n_rows = 0;
	none.mlp.n_rows = none.sample.n_rows = 0;
#define NO_ROWS_CASE(op) RIG_OK(afd__##op(&r->q, &none.op));
	AFD__DEVICE_OPERATIONS(NO_ROWS_CASE)
	RIG_OK(afd__queue_upload(&r->q, m, x + 100, 0));
	rig_fetch(r, got, m, sizeof(got));
	assert_memory_equal(got, x, sizeof(x));
}

static void bad_devices_are_refused_by_name(void **state)
{
	const struct {
		const char *name, *word;
		int code;
	} bad[] = {
		{ "gpu", "none of", -EINVAL },
		{ "", "none of", -EINVAL },
		{ "cpu:x", "number", -EINVAL },
		{ "cpu:0x", "number", -EINVAL },
		{ "cpu:", "number", -EINVAL },
		{ "cpu:-1", "number", -EINVAL },
		{ "cpu:99999999999999999999", "number", -EINVAL },
		{ "cpu:0", "takes no number", -EINVAL },
	};
	struct rig *r = *state;
	struct afd__device *dev = NULL;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		int rc = afd__device_open(&dev, r->ctx, bad[i].name);

		if (rc != bad[i].code || dev || !strstr(afd_last_error(), bad[i].word))
			fail_msg("%s: %d, \"%s\"", bad[i].name, rc, afd_last_error());
	}
}

static void bad_memory_and_matrices_are_refused(void **state)
{
	struct rig *r = *state;
	struct afd__matrix m = { 0 }, lent;
	float rows[64] = { 0 };
	void *p = rows;

	assert_int_equal(afd__device_alloc(r->dev, 0, "nothing", &p), -EINVAL);
	assert_int_equal(afd__device_alloc(r->dev, SIZE_MAX - 100, "all", &p), -EINVAL);
	assert_int_equal(afd__device_alloc(r->dev, (size_t)1 << 62, "too much", &p), -ENOMEM);
	assert_non_null(strstr(afd_last_error(), "too much"));
	assert_ptr_equal(p, rows);
	assert_int_equal(afd__matrix_create(r->dev, &m, 0, 8, AFD_DTYPE_F32, NULL), -EINVAL);
	assert_int_equal(afd__matrix_create(r->dev, &m, 8, 8, 77, NULL), -EINVAL);
	assert_int_equal(
		afd__matrix_create(r->dev, &m, 8, 8, AFD_DTYPE_F32, (char *)rows + 2), -EINVAL);
	assert_true(
		afd__matrix_create(r->dev, &m, UINT32_MAX, UINT32_MAX, AFD_DTYPE_F32, NULL) < 0);
	assert_null(m.data);
	RIG_OK(afd__matrix_create(r->dev, &m, 8, 8, AFD_DTYPE_F32, NULL));
	RIG_OK(afd__matrix_create(r->dev, &lent, 8, 8, AFD_DTYPE_F32, rows));
	assert_int_equal(afd__matrix_load(r->dev, &m, rows, 5, 4), -EINVAL);
	assert_int_equal(afd__matrix_load(r->dev, &m, rows, UINT32_MAX, 2), -EINVAL);
	assert_int_equal(afd__matrix_load(r->dev, &lent, rows, 0, 8), -EINVAL);
	afd__matrix_destroy(r->dev, &lent);
	afd__matrix_destroy(r->dev, &m);
	afd__matrix_destroy(r->dev, &m);
}

static void bad_transfers_are_refused(void **state)
{
	struct rig *r = *state;
	char host[64];
	char *dev = rig_output(r, 64);

	assert_int_equal(afd__queue_upload(&r->q, dev + 1, host, 4), -EINVAL);
	assert_int_equal(afd__queue_upload(&r->q, NULL, host, 4), -EINVAL);
	assert_int_equal(afd__queue_upload(&r->q, dev, NULL, 4), -EINVAL);
	assert_int_equal(afd__queue_upload(&r->q, dev, host, AFD__UPLOAD_MAX + 1), -EINVAL);
	assert_int_equal(afd__queue_download(&r->q, host, dev + 2, 4), -EINVAL);
	assert_int_equal(afd__queue_download(&r->q, NULL, dev, 4), -EINVAL);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(each_bad_argument_is_refused_by_name),
		RIG_TEST(the_good_arguments_are_taken),
		RIG_TEST(calls_without_rows_do_nothing),
		RIG_TEST(bad_devices_are_refused_by_name),
		RIG_TEST(bad_memory_and_matrices_are_refused),
		RIG_TEST(bad_transfers_are_refused),
	};

	return RIG_RUN(tests);
}
