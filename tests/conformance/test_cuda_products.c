/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who does a product of the CUDA module, on the emulator and with a fake of cuBLASLt: where the
 * library is looked for, what is said when it is not there or cannot, which products it is given,
 * and that a queue in use asks it once for a shape. What comes out is judged by test_device_dense.c.
 */
#include "rig.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char fake[PATH_MAX], lacking[PATH_MAX];

/* What a library says of itself, and the device of it. */
struct open {
	afd_context *ctx;
	struct afd__device *dev;
	char told[2048];
};

static void note(void *user, int32_t level, const char *line)
{
	struct open *o = user;
	size_t at = strlen(o->told);

	snprintf(o->told + at, sizeof(o->told) - at, "%d %s\n", level, line);
}

/* NULL: unset. */
static void set(const char *name, const char *value)
{
	if (value)
		setenv(name, value, 1);
	else
		unsetenv(name);
}

static int open_with(struct open *o, const char *ways, const char *place, const char *mode)
{
	struct afd_context_params params = { .size = sizeof(params), .n_threads = 1 };
	int rc;

	memset(o, 0, sizeof(*o));
	params.log.write = note;
	params.log.user = o;
	params.log.max_level = AFD_LOG_INFO;
	set("AFD_CUDA_PRODUCTS", ways);
	set("AFD_CUBLASLT", place);
	set("AFD_EMU_CUBLASLT", mode);
	RIG_OK(afd_context_create(&o->ctx, &params));
	rc = afd__device_open(&o->dev, o->ctx, "cuda:0");
	return rc;
}

static void end(struct open *o)
{
	if (o->dev)
		afd__device_close(o->dev);
	afd_context_destroy(o->ctx);
}

/* ---- finding it ---- */

static void what_is_found_is_said_once_and_what_is_not_with_its_reason(void **state)
{
	const struct {
		const char *ways, *place, *mode, *said;
	} cases[] = {
		{ NULL, fake, NULL, "large products by cuBLASLt: cuBLASLt 130100, with FP8 in blocks" },
		{ "auto", fake, "v12", "by cuBLASLt: cuBLASLt 120800, without FP8" },
		{ "auto", fake, "no_blocks", "by cuBLASLt: cuBLASLt 130100, without FP8" },
		{ "own", fake, NULL, "by our own kernels: AFD_CUDA_PRODUCTS says so" },
		{ "auto", NULL, NULL, "by our own kernels: libcublasLt-emu.so.13: cannot open" },
		{ "auto", "/nowhere", NULL, "AFD_CUBLASLT is /nowhere: it is no file" },
		{ "auto", "/etc/passwd", NULL, "by our own kernels: /etc/passwd: " },
		{ "auto", lacking, NULL, "has no cublasLtMatmul\n" },
		{ "auto", fake, "old", "is of version 111103, limit 120000" },
		{ "auto", fake, "no_create", "cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED" },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct open o;
		const char *line;

		RIG_OK(open_with(&o, cases[i].ways, cases[i].place, cases[i].mode));
		line = strstr(o.told, "large products");
		if (!line || !strstr(o.told, cases[i].said) || strstr(line + 1, "large products"))
			fail_msg("case %zu: \"%s\"", i, o.told);
		end(&o);
	}
}

static void what_must_be_and_is_not_there_is_an_error(void **state)
{
	const struct {
		const char *ways, *place, *said;
		int code;
	} cases[] = {
		{ "cublaslt", NULL, "cuda:0: AFD_CUDA_PRODUCTS is cublaslt, which is not there: lib",
			-ENOSYS },
		{ "cublaslt", lacking, "has no cublasLtMatmul", -ENOSYS },
		{ "cutlass", fake, "AFD_CUDA_PRODUCTS is \"cutlass\", must be auto, own or", -EINVAL },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct open o;

		assert_int_equal(open_with(&o, cases[i].ways, cases[i].place, NULL), cases[i].code);
		if (!strstr(afd_last_error(), cases[i].said))
			fail_msg("case %zu: \"%s\"", i, afd_last_error());
		end(&o);
	}
}

static void the_folders_of_pips_wheels_are_looked_into(void **state)
{
	static const char *const parts[] = { "/nvidia", "/nvidia/cu13", "/nvidia/cu13/lib" };
	char root[] = "/tmp/afd-wheel-XXXXXX", path[sizeof(root) + 64];
	struct open o;

	assert_non_null(mkdtemp(root));
	for (int i = 0; i < 3; i++) {
		snprintf(path, sizeof(path), "%s%s", root, parts[i]);
		RIG_OK(mkdir(path, 0700));
	}
	snprintf(path, sizeof(path), "%s%s/libcublasLt-emu.so.13", root, parts[2]);
	RIG_OK(symlink(fake, path));
	RIG_OK(open_with(&o, "cublaslt", root, NULL));
	end(&o);
	unlink(path);
	for (int i = 3; i-- > 0;) {
		snprintf(path, sizeof(path), "%s%s", root, parts[i]);
		rmdir(path);
	}
	rmdir(root);
}

/* ---- choosing ---- */

struct counts {
	unsigned (*n_asked)(void), (*n_multiplied)(void), (*n_allocations)(void);
};

static struct counts counts_of(void)
{
	char path[1024];
	void *library = dlopen(fake, RTLD_NOW), *module;
	struct counts c;

	snprintf(path, sizeof(path), "%s/afd-cuda.so", getenv("AFD_MODULE_DIR"));
	module = dlopen(path, RTLD_NOW);
	assert_true(library && module);
	*(void **)&c.n_asked = dlsym(library, "fake_cublaslt_n_asked");
	*(void **)&c.n_multiplied = dlsym(library, "fake_cublaslt_n_multiplied");
	*(void **)&c.n_allocations = dlsym(module, "emu_n_allocations");
	assert_true(c.n_asked && c.n_multiplied && c.n_allocations);
	return c;
}

enum { N = 128, K = 256, ROWS = 80 };

/* A product with numbers that are all 1 (or 2^-7 of bf16's): its args. */
static struct afd__product_args product_of_ones(struct rig *r, int32_t dtype, int whole_blocks)
{
	static float x[ROWS * K];
	static char w[N * K * 4];
	const float scales[2] = { 1, 1 };
	const struct afd__matrix_shape shape = {
		.n = N, .k = K, .dtype = dtype, .whole_blocks = whole_blocks
	};
	const struct afd__scale_blocks blocks = {
		.data = scales, .n_rows = 1, .n_columns = 2, .dtype = AFD_DTYPE_F32
	};
	struct afd__product_args a = { .x_stride = K, .y_stride = N, .n_rows = ROWS };

	for (int i = 0; i < ROWS * K; i++)
		x[i] = 1;
	for (int i = 0; i < N * K; i++)
		rig_encode(w, (size_t)i, dtype, 1);
	RIG_OK(afd__matrix_create_stack(r->dev, &a.w, &shape, NULL));
	RIG_OK(afd__matrix_load(r->dev, &a.w, w, 0, N));
	if (dtype == AFD_DTYPE_FP8)
		RIG_OK(afd__matrix_load_scales(r->dev, &a.w, &blocks, 0, N));
	a.x = rig_input(r, x, sizeof(x));
	a.y = rig_output(r, ROWS * N * 4);
	return a;
}

/* Runs it, and looks at what comes out. */
static int run(struct rig *r, const struct afd__product_args *a)
{
	static float y[ROWS * N];
	int rc = afd__product(&r->q, a);

	if (rc)
		return rc;
	rig_fetch(r, y, a->y, sizeof(y));
	for (uint32_t i = 0; i < a->n_rows * N; i++)
		assert_true(y[i] == K);
	return 0;
}

static struct rig *rig_with(const char *ways, const char *mode)
{
	set("AFD_CUDA_PRODUCTS", ways);
	set("AFD_CUBLASLT", fake);
	set("AFD_EMU_CUBLASLT", mode);
	return rig_make(1);
}

static void the_library_gets_what_is_large_and_what_it_takes_exactly(void **state)
{
	const struct {
		const char *ways;
		int32_t dtype;
		uint32_t n_rows;
		int quantized, whole_blocks;
		unsigned n_multiplied;
	} cases[] = {
		{ "auto", AFD_DTYPE_BF16, 64, 0, 0, 0 },
		{ "auto", AFD_DTYPE_BF16, 65, 0, 0, 1 },
		{ "auto", AFD_DTYPE_F16, 65, 0, 0, 1 },
		{ "auto", AFD_DTYPE_F32, 4, 0, 0, 0 },
		{ "auto", AFD_DTYPE_F32, 5, 0, 0, 1 },
		{ "auto", AFD_DTYPE_FP8, 68, 1, 1, 1 },
		{ "auto", AFD_DTYPE_FP8, 68, 0, 1, 0 },
		{ "auto", AFD_DTYPE_FP8, 68, 1, 0, 0 },
		{ "own", AFD_DTYPE_BF16, 80, 0, 0, 0 },
		{ "cublaslt", AFD_DTYPE_BF16, 1, 0, 0, 1 },
	};
	struct counts c = counts_of();

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct rig *r = rig_with(cases[i].ways, NULL);
		struct afd__product_args a =
			product_of_ones(r, cases[i].dtype, cases[i].whole_blocks);
		unsigned before = c.n_multiplied();

		a.n_rows = cases[i].n_rows;
		a.quantized = cases[i].quantized;
		RIG_OK(run(r, &a));
		if (c.n_multiplied() - before != cases[i].n_multiplied)
			fail_msg("case %zu: %u products by the library", i, c.n_multiplied() - before);
		afd__matrix_destroy(r->dev, &a.w);
		rig_end(r);
	}
}

static void a_deterministic_queue_keeps_to_our_own_kernels(void **state)
{
	const struct afd__queue_options options = { .deterministic = 1 };
	struct counts c = counts_of();
	struct rig *r = rig_with("cublaslt", NULL);
	struct afd__product_args a = product_of_ones(r, AFD_DTYPE_BF16, 0);
	unsigned before = c.n_multiplied();

	afd__queue_close(&r->q);
	RIG_OK(afd__queue_open_with(&r->q, r->dev, &options));
	RIG_OK(run(r, &a));
	assert_int_equal(c.n_multiplied(), before);
	afd__matrix_destroy(r->dev, &a.w);
	rig_end(r);
}

static void a_shape_is_asked_for_once_and_nothing_is_allocated(void **state)
{
	struct counts c = counts_of();
	struct rig *r = rig_with("cublaslt", NULL);
	struct afd__product_args a = product_of_ones(r, AFD_DTYPE_BF16, 0);
	unsigned n_asked = c.n_asked(), n_allocated, n_multiplied;

	RIG_OK(run(r, &a));
	n_allocated = c.n_allocations();
	for (int i = 0; i < 3; i++)
		RIG_OK(run(r, &a));
	assert_int_equal(c.n_asked(), n_asked + 1);
	n_multiplied = c.n_multiplied();
	for (a.n_rows = 1; a.n_rows < ROWS; a.n_rows++)
		RIG_OK(afd__product(&r->q, &a));
	assert_int_equal(c.n_multiplied(), n_multiplied + ROWS - 1);
	assert_int_equal(c.n_allocations(), n_allocated);
	a.n_rows = 1;
	RIG_OK(run(r, &a)); /* of more shapes than a set of the table holds */
	afd__matrix_destroy(r->dev, &a.w);
	rig_end(r);
}

/* Rows of 2 MB in bf16, of which 32 fit into the workspace. */
static void rows_that_do_not_fit_at_once_go_in_passes(void **state)
{
	enum { LONG = 1 << 20, FEW = 4, PASSED = 36 };
	struct counts c = counts_of();
	struct rig *r = rig_with("cublaslt", NULL);
	uint16_t *w = malloc((size_t)FEW * LONG * 2);
	float *x = malloc((size_t)PASSED * LONG * 4), y[PASSED * FEW];
	struct afd__product_args a = { .x_stride = LONG, .y_stride = FEW, .n_rows = PASSED };
	unsigned before = c.n_multiplied();

	for (size_t i = 0; i < (size_t)FEW * LONG; i++)
		w[i] = 0x3f80; /* 1 */
	for (size_t i = 0; i < (size_t)PASSED * LONG; i++)
		x[i] = (float)(i / LONG);
	RIG_OK(afd__matrix_create(r->dev, &a.w, FEW, LONG, AFD_DTYPE_BF16, NULL));
	RIG_OK(afd__matrix_load(r->dev, &a.w, w, 0, FEW));
	a.x = rig_input(r, x, (size_t)PASSED * LONG * 4);
	a.y = rig_output(r, sizeof(y));
	RIG_OK(afd__product(&r->q, &a));
	rig_fetch(r, y, a.y, sizeof(y));
	for (int i = 0; i < PASSED * FEW; i++)
		assert_true(y[i] == (float)(i / FEW) * LONG);
	assert_int_equal(c.n_multiplied(), before + 2);
	afd__matrix_destroy(r->dev, &a.w);
	rig_end(r);
	free(w);
	free(x);
}

/* ---- refusals ---- */

static void what_the_library_does_not_offer_our_kernels_do(void **state)
{
	struct counts c = counts_of();
	struct rig *r = rig_with("cublaslt", "no_plan");
	struct afd__product_args a = product_of_ones(r, AFD_DTYPE_BF16, 0);
	unsigned n_asked = c.n_asked(), before = c.n_multiplied();

	RIG_OK(run(r, &a));
	RIG_OK(run(r, &a));
	assert_int_equal(c.n_asked(), n_asked + 1);
	assert_int_equal(c.n_multiplied(), before);
	afd__matrix_destroy(r->dev, &a.w);
	rig_end(r);
}

static void what_it_offers_and_then_refuses_is_done_by_our_kernels_and_told_once(void **state)
{
	struct open o;
	struct rig r = { .random = 1 };
	struct afd__product_args a;
	const char *line;

	RIG_OK(open_with(&o, "cublaslt", fake, "refuse"));
	r.ctx = o.ctx;
	r.dev = o.dev;
	RIG_OK(afd__queue_open(&r.q, o.dev));
	a = product_of_ones(&r, AFD_DTYPE_BF16, 0);
	for (a.n_rows = 70; a.n_rows < 73; a.n_rows++)
		RIG_OK(run(&r, &a));
	line = strstr(o.told, "cublasLtMatmul of 70 rows by 128 x 256: CUBLAS_STATUS_NOT_SUPPORTED");
	assert_non_null(line);
	assert_null(strstr(line + 1, "cublasLtMatmul of"));
	afd__matrix_destroy(r.dev, &a.w);
	afd__queue_close(&r.q);
	for (unsigned i = 0; i < r.n_memory; i++)
		afd__device_free(r.dev, r.memory[i].base, 0);
	end(&o);
}

static void a_product_that_fails_in_the_library_fails_with_its_words(void **state)
{
	struct rig *r = rig_with("cublaslt", "break");
	struct afd__product_args a = product_of_ones(r, AFD_DTYPE_BF16, 0);

	assert_int_equal(run(r, &a), -EIO);
	assert_non_null(strstr(
		afd_last_error(), "device cuda:0: cublasLtMatmul: CUBLAS_STATUS_EXECUTION_FAILED"));
	afd__matrix_destroy(r->dev, &a.w);
	rig_end(r);
}

/* argv: the device, the fake, and one that lacks a symbol. */
int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(what_is_found_is_said_once_and_what_is_not_with_its_reason),
		cmocka_unit_test(what_must_be_and_is_not_there_is_an_error),
		cmocka_unit_test(the_folders_of_pips_wheels_are_looked_into),
		cmocka_unit_test(the_library_gets_what_is_large_and_what_it_takes_exactly),
		cmocka_unit_test(a_deterministic_queue_keeps_to_our_own_kernels),
		cmocka_unit_test(a_shape_is_asked_for_once_and_nothing_is_allocated),
		cmocka_unit_test(rows_that_do_not_fit_at_once_go_in_passes),
		cmocka_unit_test(what_the_library_does_not_offer_our_kernels_do),
		cmocka_unit_test(
			what_it_offers_and_then_refuses_is_done_by_our_kernels_and_told_once),
		cmocka_unit_test(a_product_that_fails_in_the_library_fails_with_its_words),
	};

	if (argc < 4 || !realpath(argv[2], fake) || !realpath(argv[3], lacking))
		return 77;
	return RIG_RUN(tests);
}
