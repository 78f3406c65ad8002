/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The cuBLASLt of a device: finds the library, takes its symbols, and puts a product into its words.
 *
 * Its matrices stand in columns: our rows [n][k] of weights are its k x n with op T, rows of x its
 * k x n_rows, rows of y its n x n_rows. That is also the one form that it takes FP8 in.
 *
 * Invariant: what a version or a GPU cannot do is asked of the library, never guessed. Called when a
 * device is opened (products.c), and by blaslt_product.c.
 */
#include "blaslt.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define LEAST_VERSION  120000
#define BLOCKS_VERSION 120900 /* the first that knows scales of blocks */

#ifndef AFD_CUBLASLT_NAMES
#define AFD_CUBLASLT_NAMES "libcublasLt.so.13", "libcublasLt.so.12"
#endif

static const char *const names[] = { AFD_CUBLASLT_NAMES };
/* Where a folder may have it: itself, a toolkit's, and the wheels of pip. */
static const char *const folders[] = { "", "/lib", "/lib64", "/nvidia/cu13/lib",
	"/nvidia/cublas/lib", "/cu13/lib", "/cublas/lib" };
#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* ---- the library ---- */

/* It keeps threads and memory until the process ends, so it is never unmapped. */
static void *open_file(const char *path, char *reason, size_t capacity)
{
	void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);

	if (!library)
		snprintf(reason, capacity, "%s", dlerror());
	return library;
}

/* `place` is the file, or a folder that has it. */
static void *open_place(const char *place, char *reason, size_t capacity)
{
	char path[1024];
	struct stat s;

	if (!stat(place, &s) && S_ISREG(s.st_mode))
		return open_file(place, reason, capacity);
	for (size_t i = 0; i < COUNT(folders) * COUNT(names); i++) {
		int n = snprintf(path, sizeof(path), "%s%s/%s", place, folders[i / COUNT(names)],
			names[i % COUNT(names)]);

		if (n > 0 && (size_t)n < sizeof(path) && !stat(path, &s))
			return open_file(path, reason, capacity);
	}
	snprintf(reason, capacity, "AFD_CUBLASLT is %s: it is no file, and no folder with %s", place,
		names[0]);
	return NULL;
}

static void *open_library(char *reason, size_t capacity)
{
	const char *place = secure_getenv("AFD_CUBLASLT");
	char later[256]; /* why the older names are not there either is no news */
	void *library;

	if (place && place[0])
		return open_place(place, reason, capacity);
	library = open_file(names[0], reason, capacity);
	for (size_t i = 1; !library && i < COUNT(names); i++)
		library = open_file(names[i], later, sizeof(later));
	return library;
}

static bool take_symbol(void *library, const char *name, void *member, char *reason, size_t capacity)
{
	void *symbol = dlsym(library, name);

	if (!symbol)
		snprintf(reason, capacity, "the cuBLASLt that was found has no %s", name);
	memcpy(member, &symbol, sizeof(symbol));
	return symbol != NULL;
}

static bool take_symbols(struct blaslt *lib, void *library, char *reason, size_t capacity)
{
#define TAKE(name) \
	if (!take_symbol(library, "cublasLt" #name, &lib->name, reason, capacity)) \
		return false;
	BLASLT_SYMBOLS(TAKE)
#undef TAKE
	return true;
}

/* ---- a product in its words ---- */

uint32_t blaslt_alignment(const void *p)
{
	uintptr_t lowest = (uintptr_t)p & -(uintptr_t)p;

	return lowest && lowest < 256 ? (uint32_t)lowest : 256;
}

enum blaslt_kind blaslt_kind_of(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 ? BLASLT_F32 : dtype == AFD_DTYPE_FP8 ? BLASLT_FP8 : BLASLT_16;
}

static uint32_t type_of(int32_t dtype)
{
	switch (dtype) {
	case AFD_DTYPE_BF16:
		return CUDA_R_16BF;
	case AFD_DTYPE_F16:
		return CUDA_R_16F;
	case AFD_DTYPE_FP8:
		return CUDA_R_8F_E4M3;
	default:
		return CUDA_R_32F;
	}
}

/* The first of several calls that fails; the others are made, and told by the first. */
#define FIRST(status, call) \
	do { \
		cublasStatus_t of_call = (call); \
		status = (status) ? (status) : of_call; \
	} while (0)
#define SET(set, object, attribute, value) lib->set(object, attribute, &(value), sizeof(value))

/* float32 of weights in float32 is float32, never TF32. */
static cublasStatus_t make_product(
	const struct blaslt *lib, enum blaslt_kind kind, cublasLtMatmulDesc_t *out)
{
	const cublasComputeType_t compute =
		kind == BLASLT_F32 ? CUBLAS_COMPUTE_32F_PEDANTIC : CUBLAS_COMPUTE_32F;
	const cublasOperation_t transposed = CUBLAS_OP_T, plain = CUBLAS_OP_N;
	const cublasLtMatmulMatrixScale_t blocks = CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F,
					  groups = CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F;
	const cudaDataType_t f32 = CUDA_R_32F;
	cublasStatus_t status = lib->MatmulDescCreate(out, compute, f32);

	if (status)
		return status;
	FIRST(status, SET(MatmulDescSetAttribute, *out, CUBLASLT_MATMUL_DESC_TRANSA, transposed));
	FIRST(status, SET(MatmulDescSetAttribute, *out, CUBLASLT_MATMUL_DESC_TRANSB, plain));
	if (kind != BLASLT_FP8) {
		FIRST(status,
			SET(MatmulDescSetAttribute, *out, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, f32));
	} else if (lib->version >= BLOCKS_VERSION) {
		FIRST(status,
			SET(MatmulDescSetAttribute, *out, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, blocks));
		FIRST(status,
			SET(MatmulDescSetAttribute, *out, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, groups));
	}
	return status;
}

cublasStatus_t blaslt_words_open(const struct blaslt *lib, struct blaslt_words *words)
{
	const size_t most = BLASLT_WORKSPACE_BYTES;
	cublasStatus_t status = lib->MatmulPreferenceCreate(&words->preference);

	for (int i = 0; !status && i < BLASLT_KINDS; i++)
		status = make_product(lib, (enum blaslt_kind)i, &words->product[i]);
	if (!status)
		status = lib->MatrixLayoutCreate(&words->w, CUDA_R_32F, 1, 1, 1);
	if (!status)
		status = lib->MatrixLayoutCreate(&words->x, CUDA_R_32F, 1, 1, 1);
	if (!status)
		status = lib->MatrixLayoutCreate(&words->y, CUDA_R_32F, 1, 1, 1);
	if (!status)
		status = SET(MatmulPreferenceSetAttribute, words->preference,
			CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most);
	if (status)
		blaslt_words_close(lib, words);
	return status;
}

void blaslt_words_close(const struct blaslt *lib, struct blaslt_words *words)
{
	const cublasLtMatrixLayout_t layouts[] = { words->w, words->x, words->y };

	for (int i = 0; i < 3; i++) {
		if (layouts[i])
			lib->MatrixLayoutDestroy(layouts[i]);
	}
	for (int i = 0; i < BLASLT_KINDS; i++) {
		if (words->product[i])
			lib->MatmulDescDestroy(words->product[i]);
	}
	if (words->preference)
		lib->MatmulPreferenceDestroy(words->preference);
	memset(words, 0, sizeof(*words));
}

static cublasStatus_t set_layout(const struct blaslt *lib, cublasLtMatrixLayout_t layout,
	uint32_t type, uint64_t n_rows, uint64_t n_columns, int64_t stride)
{
	cublasStatus_t status = SET(MatrixLayoutSetAttribute, layout, CUBLASLT_MATRIX_LAYOUT_TYPE, type);

	FIRST(status, SET(MatrixLayoutSetAttribute, layout, CUBLASLT_MATRIX_LAYOUT_ROWS, n_rows));
	FIRST(status, SET(MatrixLayoutSetAttribute, layout, CUBLASLT_MATRIX_LAYOUT_COLS, n_columns));
	FIRST(status, SET(MatrixLayoutSetAttribute, layout, CUBLASLT_MATRIX_LAYOUT_LD, stride));
	return status;
}

cublasStatus_t blaslt_describe(
	const struct blaslt *lib, const struct blaslt_words *words, const struct blaslt_matmul *m)
{
	const uint32_t type = type_of(m->dtype);
	const cublasLtEpilogue_t epilogue = m->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
	cublasLtMatmulDesc_t product = words->product[blaslt_kind_of(m->dtype)];
	cublasStatus_t status = set_layout(lib, words->w, type, m->k, m->n, (int64_t)m->w_stride);

	FIRST(status, set_layout(lib, words->x, type, m->k, m->n_rows, (int64_t)m->x_stride));
	FIRST(status, set_layout(lib, words->y, CUDA_R_32F, m->n, m->n_rows, (int64_t)m->y_stride));
	FIRST(status, SET(MatmulDescSetAttribute, product, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue));
	FIRST(status,
		SET(MatmulDescSetAttribute, product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, m->bias));
	if (m->dtype != AFD_DTYPE_FP8)
		return status;
	FIRST(status,
		SET(MatmulDescSetAttribute, product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, m->w_scales));
	FIRST(status,
		SET(MatmulDescSetAttribute, product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, m->x_scales));
	return status;
}

cublasStatus_t blaslt_ask(const struct blaslt *lib, const struct blaslt_words *words,
	const struct blaslt_matmul *m, cublasLtMatmulHeuristicResult_t *best)
{
	const uint32_t w = blaslt_alignment(m->w), x = blaslt_alignment(m->x),
		       y = blaslt_alignment(m->y);
	cublasLtMatmulPreference_t p = words->preference;
	cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
	int n_found = 0;

	FIRST(status,
		SET(MatmulPreferenceSetAttribute, p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, w));
	FIRST(status,
		SET(MatmulPreferenceSetAttribute, p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x));
	FIRST(status,
		SET(MatmulPreferenceSetAttribute, p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, y));
	FIRST(status,
		SET(MatmulPreferenceSetAttribute, p, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y));
	if (!status)
		status = lib->MatmulAlgoGetHeuristic(lib->handle,
			words->product[blaslt_kind_of(m->dtype)], words->w, words->x, words->y,
			words->y, p, 1, best, &n_found);
	if (!status && !n_found)
		status = CUBLAS_STATUS_NOT_SUPPORTED;
	return status ? status : best->state;
}

/* ---- opening ---- */

/* Of a product that every size of blocks divides; the addresses are only looked at. */
static bool asks_for_blocks(const struct blaslt *lib)
{
	const void *somewhere = (const void *)(uintptr_t)0x10000;
	const struct blaslt_matmul m = { .w = somewhere,
		.x = somewhere,
		.y = (float *)somewhere,
		.w_scales = somewhere,
		.x_scales = somewhere,
		.w_stride = 512,
		.x_stride = 512,
		.y_stride = 512,
		.n = 512,
		.k = 512,
		.n_rows = 512,
		.dtype = AFD_DTYPE_FP8 };
	struct blaslt_words words = { 0 };
	cublasLtMatmulHeuristicResult_t best;
	cublasStatus_t status;

	if (lib->version < BLOCKS_VERSION || blaslt_words_open(lib, &words))
		return false;
	status = blaslt_describe(lib, &words, &m);
	if (!status)
		status = blaslt_ask(lib, &words, &m, &best);
	blaslt_words_close(lib, &words);
	return !status;
}

static bool start(struct blaslt *lib, char *reason, size_t capacity)
{
	cublasStatus_t status;

	lib->version = lib->GetVersion();
	if (lib->version < LEAST_VERSION) {
		snprintf(reason, capacity, "cuBLASLt is of version %zu, limit %d and up", lib->version,
			LEAST_VERSION);
		return false;
	}
	status = lib->Create(&lib->handle);
	if (status)
		snprintf(reason, capacity, "cublasLtCreate: %s", lib->GetStatusName(status));
	return !status;
}

void blaslt_open(const struct afd__device *dev, struct cuda *c, char *reason, size_t capacity)
{
	void *library = open_library(reason, capacity);
	struct blaslt *lib;

	if (!library)
		return;
	lib = dev->host->alloc(dev->ctx, 1, sizeof(*lib));
	if (!lib) {
		snprintf(reason, capacity, "no memory for its symbols");
	} else if (!take_symbols(lib, library, reason, capacity) || !start(lib, reason, capacity)) {
		dev->host->free(lib);
	} else {
		lib->has_blocks = asks_for_blocks(lib);
		c->blaslt = lib;
		snprintf(reason, capacity, "cuBLASLt %zu, %s FP8 in blocks", lib->version,
			lib->has_blocks ? "with" : "without");
		return;
	}
	dlclose(library);
}

void blaslt_close(struct cuda *c)
{
	if (c->blaslt)
		c->blaslt->Destroy(c->blaslt->handle);
}
