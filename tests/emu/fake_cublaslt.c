/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A cuBLASLt for the emulator: every symbol that the module takes, computed on the CPU, one number
 * at a time, exactly as layouts, orders and scales say. What the real one would refuse is refused;
 * a plan is good for the product that it was made for only; the workspace is overwritten.
 *
 * AFD_EMU_CUBLASLT makes it another: old (11.11), v12 (12.8: no blocks), no_create, no_blocks,
 * no_plan (nothing is offered), refuse (what was offered is not done), break (it fails). Test code
 * only.
 */
#include <cublasLt.h>

#include <dlfcn.h>
#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORKSPACE_BYTES ((size_t)1 << 20)
#define MAGIC           0x6661666465ull

struct fake_layout {
	uint32_t type;
	uint64_t n_rows, n_columns;
	int64_t stride; /* from column to column */
};
struct fake_product {
	cublasComputeType_t compute;
	cublasOperation_t a_op, b_op;
	uint32_t epilogue, bias_type, a_mode, b_mode;
	const float *bias, *a_scales, *b_scales;
};
struct fake_preference {
	size_t workspace_bytes;
	uint32_t alignments[4]; /* of A, B, C, D */
};

/* What a stream is given; it lives as long as the handle, since a graph runs it again. */
struct job {
	struct job *next;
	struct fake_product product;
	struct fake_layout a_layout, b_layout, d_layout;
	const char *a, *b;
	float *d;
	char *workspace;
};
struct fake_handle {
	struct job *jobs;
};

static atomic_uint n_asked, n_multiplied;
unsigned fake_cublaslt_n_asked(void);
unsigned fake_cublaslt_n_multiplied(void);

__attribute__((visibility("default"))) unsigned fake_cublaslt_n_asked(void)
{
	return n_asked;
}

__attribute__((visibility("default"))) unsigned fake_cublaslt_n_multiplied(void)
{
	return n_multiplied;
}

static bool it_is(const char *what)
{
	const char *mode = getenv("AFD_EMU_CUBLASLT");

	return mode && !strcmp(mode, what);
}

/* ---- objects ---- */

size_t cublasLtGetVersion(void)
{
	return it_is("old") ? 111103 : it_is("v12") ? 120800 : 130100;
}

const char *cublasLtGetStatusName(cublasStatus_t status)
{
	switch (status) {
	case CUBLAS_STATUS_NOT_INITIALIZED:
		return "CUBLAS_STATUS_NOT_INITIALIZED";
	case CUBLAS_STATUS_INVALID_VALUE:
		return "CUBLAS_STATUS_INVALID_VALUE";
	case CUBLAS_STATUS_EXECUTION_FAILED:
		return "CUBLAS_STATUS_EXECUTION_FAILED";
	case CUBLAS_STATUS_NOT_SUPPORTED:
		return "CUBLAS_STATUS_NOT_SUPPORTED";
	default:
		return "CUBLAS_STATUS_OF_THE_FAKE";
	}
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
	if (it_is("no_create"))
		return CUBLAS_STATUS_NOT_INITIALIZED;
	*handle = calloc(1, sizeof(**handle));
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
	for (struct job *job = handle->jobs, *next; job; job = next) {
		next = job->next;
		free(job);
	}
	free(handle);
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(
	cublasLtMatmulDesc_t *product, cublasComputeType_t compute, cudaDataType_t scale_type)
{
	if (scale_type != CUDA_R_32F)
		return CUBLAS_STATUS_INVALID_VALUE;
	*product = calloc(1, sizeof(**product));
	(*product)->compute = compute;
	(*product)->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product)
{
	free(product);
	return CUBLAS_STATUS_SUCCESS;
}

static cublasStatus_t take(void *member, size_t member_bytes, const void *value, size_t bytes)
{
	if (bytes != member_bytes)
		return CUBLAS_STATUS_INVALID_VALUE;
	memcpy(member, value, bytes);
	return CUBLAS_STATUS_SUCCESS;
}
#define TAKE(member) take(&(member), sizeof(member), value, bytes)

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t p,
	cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes)
{
	switch (attribute) {
	case CUBLASLT_MATMUL_DESC_TRANSA:
		return TAKE(p->a_op);
	case CUBLASLT_MATMUL_DESC_TRANSB:
		return TAKE(p->b_op);
	case CUBLASLT_MATMUL_DESC_EPILOGUE:
		return TAKE(p->epilogue);
	case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
		return TAKE(p->bias);
	case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
		return TAKE(p->bias_type);
	case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
		return TAKE(p->a_scales);
	case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
		return TAKE(p->b_scales);
	case CUBLASLT_MATMUL_DESC_A_SCALE_MODE:
		return cublasLtGetVersion() < 120900 ? CUBLAS_STATUS_INVALID_VALUE : TAKE(p->a_mode);
	case CUBLASLT_MATMUL_DESC_B_SCALE_MODE:
		return cublasLtGetVersion() < 120900 ? CUBLAS_STATUS_INVALID_VALUE : TAKE(p->b_mode);
	}
	return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type,
	uint64_t n_rows, uint64_t n_columns, int64_t stride)
{
	*layout = malloc(sizeof(**layout));
	**layout = (struct fake_layout){ type, n_rows, n_columns, stride };
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
	free(layout);
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
	cublasLtMatrixLayoutAttribute_t attribute, const void *value, size_t bytes)
{
	switch (attribute) {
	case CUBLASLT_MATRIX_LAYOUT_TYPE:
		return TAKE(layout->type);
	case CUBLASLT_MATRIX_LAYOUT_ROWS:
		return TAKE(layout->n_rows);
	case CUBLASLT_MATRIX_LAYOUT_COLS:
		return TAKE(layout->n_columns);
	case CUBLASLT_MATRIX_LAYOUT_LD:
		return TAKE(layout->stride);
	}
	return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference)
{
	*preference = calloc(1, sizeof(**preference));
	for (int i = 0; i < 4; i++)
		(*preference)->alignments[i] = 256;
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
	free(preference);
	return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p,
	cublasLtMatmulPreferenceAttributes_t attribute, const void *value, size_t bytes)
{
	if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
		return TAKE(p->workspace_bytes);
	if (attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
		attribute <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
		return TAKE(p->alignments[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES]);
	return CUBLAS_STATUS_INVALID_VALUE;
}

/* ---- what is allowed ---- */

static size_t number_bytes(uint32_t type)
{
	return type == CUDA_R_32F ? 4 : type == CUDA_R_8F_E4M3 ? 1 : 2;
}

static bool is_16_aligned(const void *p)
{
	return p && (uintptr_t)p % 16 == 0;
}

/* The rules of the block scales, and of FP8 at all. */
static cublasStatus_t check_fp8(const struct fake_product *p, const struct fake_layout *a,
	const struct fake_layout *b, const struct fake_layout *d)
{
	if (p->a_op != CUBLAS_OP_T || p->b_op != CUBLAS_OP_N || p->epilogue != CUBLASLT_EPILOGUE_DEFAULT)
		return CUBLAS_STATUS_NOT_SUPPORTED;
	if (a->stride % 16 || b->stride % 16 || a->n_rows % 16 || d->n_rows % 4 || d->n_columns % 4)
		return CUBLAS_STATUS_NOT_SUPPORTED;
	if (p->a_mode != CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F ||
		p->b_mode != CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F || it_is("no_blocks"))
		return CUBLAS_STATUS_NOT_SUPPORTED;
	return is_16_aligned(p->a_scales) && is_16_aligned(p->b_scales) ? CUBLAS_STATUS_SUCCESS
									: CUBLAS_STATUS_INVALID_VALUE;
}

static cublasStatus_t check(const struct fake_product *p, const struct fake_layout *a,
	const struct fake_layout *b, const struct fake_layout *d)
{
	const bool a_turns = p->a_op == CUBLAS_OP_T, b_turns = p->b_op == CUBLAS_OP_T;
	uint64_t m = a_turns ? a->n_columns : a->n_rows, k = a_turns ? a->n_rows : a->n_columns,
		 n = b_turns ? b->n_rows : b->n_columns, k_too = b_turns ? b->n_columns : b->n_rows;

	if (!m || !n || !k || k != k_too || m != d->n_rows || n != d->n_columns)
		return CUBLAS_STATUS_INVALID_VALUE;
	if (a->stride < (int64_t)a->n_rows || b->stride < (int64_t)b->n_rows ||
		d->stride < (int64_t)d->n_rows)
		return CUBLAS_STATUS_INVALID_VALUE;
	if (a->type != b->type || d->type != CUDA_R_32F)
		return CUBLAS_STATUS_NOT_SUPPORTED;
	if (p->epilogue == CUBLASLT_EPILOGUE_BIAS && (!p->bias || p->bias_type != CUDA_R_32F))
		return CUBLAS_STATUS_INVALID_VALUE;
	return a->type == CUDA_R_8F_E4M3 ? check_fp8(p, a, b, d) : CUBLAS_STATUS_SUCCESS;
}

/* What a plan is for. */
static uint64_t name_of(const struct fake_product *p, const struct fake_layout *a,
	const struct fake_layout *b, const struct fake_layout *d)
{
	const uint64_t words[] = { p->compute, p->a_op, p->b_op, p->epilogue, p->a_mode, p->b_mode,
		a->type, a->n_rows, a->n_columns, (uint64_t)a->stride, b->n_rows, b->n_columns,
		(uint64_t)b->stride, (uint64_t)d->stride };
	uint64_t name = MAGIC;

	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
		name = (name ^ words[i]) * 0x100000001b3ull;
	return name;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t p,
	cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
	cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int n_wanted,
	cublasLtMatmulHeuristicResult_t found[], int *n_found)
{
	cublasStatus_t status = check(p, a, b, d);

	n_asked++;
	*n_found = 0;
	if (status || memcmp(c, d, sizeof(*c)) || n_wanted < 1)
		return status ? status : CUBLAS_STATUS_INVALID_VALUE;
	if (it_is("no_plan") || preference->workspace_bytes < WORKSPACE_BYTES)
		return CUBLAS_STATUS_NOT_SUPPORTED;
	memset(found, 0, sizeof(*found));
	found->algo.data[0] = MAGIC;
	found->algo.data[1] = name_of(p, a, b, d);
	for (int i = 0; i < 4; i++)
		found->algo.data[2 + i] = preference->alignments[i];
	found->workspaceSize = WORKSPACE_BYTES;
	*n_found = 1;
	return CUBLAS_STATUS_SUCCESS;
}

/* ---- the product ---- */

static double decode_e4m3(uint8_t bits)
{
	int exponent = bits >> 3 & 15, fraction = bits & 7;
	double size = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);

	if ((bits & 0x7f) == 0x7f)
		size = NAN;
	return bits & 0x80 ? -size : size;
}

static double decode_f16(uint16_t bits)
{
	int exponent = bits >> 10 & 31, fraction = bits & 1023;
	double size = exponent == 31 ? (fraction ? NAN : INFINITY)
		      : exponent     ? ldexp(1024 + fraction, exponent - 25)
				     : ldexp(fraction, -24);

	return bits & 0x8000 ? -size : size;
}

static double number_at(const char *data, uint32_t type, size_t i)
{
	uint32_t wide;
	uint16_t half;
	float x;

	if (type == CUDA_R_8F_E4M3)
		return decode_e4m3((uint8_t)data[i]);
	if (type == CUDA_R_32F) {
		memcpy(&x, data + 4 * i, 4);
		return x;
	}
	memcpy(&half, data + 2 * i, 2);
	if (type == CUDA_R_16F)
		return decode_f16(half);
	wide = (uint32_t)half << 16;
	memcpy(&x, &wide, 4);
	return x;
}

/* Of the numbers (row of A, column of B) at k. */
static double scale_at(const struct job *job, uint64_t row, uint64_t column, uint64_t k)
{
	uint64_t n_blocks = (job->a_layout.n_rows + 127) / 128, stride = (n_blocks + 3) / 4 * 4;

	if (job->a_layout.type != CUDA_R_8F_E4M3)
		return 1;
	return (double)job->product.a_scales[row / 128 * stride + k / 128] *
	       job->product.b_scales[k / 128 * job->d_layout.n_columns + column];
}

static float product_at(const struct job *job, uint64_t row, uint64_t column)
{
	const struct fake_layout *a = &job->a_layout, *b = &job->b_layout;
	const bool a_turns = job->product.a_op == CUBLAS_OP_T, b_turns = job->product.b_op == CUBLAS_OP_T;
	uint64_t n_k = a_turns ? a->n_rows : a->n_columns;
	double sum = 0;

	for (uint64_t k = 0; k < n_k; k++) {
		uint64_t at_a = a_turns ? row * (uint64_t)a->stride + k : k * (uint64_t)a->stride + row;
		uint64_t at_b =
			b_turns ? k * (uint64_t)b->stride + column : column * (uint64_t)b->stride + k;

		sum += number_at(job->a, a->type, at_a) * number_at(job->b, b->type, at_b) *
		       scale_at(job, row, column, k);
	}
	if (job->product.epilogue == CUBLASLT_EPILOGUE_BIAS)
		sum += job->product.bias[row];
	return (float)sum;
}

static void multiply(void *arg)
{
	const struct job *job = arg;

	memset(job->workspace, 0xff, WORKSPACE_BYTES);
	for (uint64_t column = 0; column < job->d_layout.n_columns; column++) {
		for (uint64_t row = 0; row < job->d_layout.n_rows; row++)
			job->d[column * (uint64_t)job->d_layout.stride + row] =
				product_at(job, row, column);
	}
}

/* The runtime is that of the module which has loaded this library. */
static cublasStatus_t enqueue(cudaStream_t stream, struct job *job)
{
	int (*launch)(cudaStream_t stream, void (*f)(void *), void *arg);
	char path[PATH_MAX];
	void *module, *symbol;

	snprintf(path, sizeof(path), "%s/afd-cuda.so", getenv("AFD_MODULE_DIR"));
	module = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
	symbol = module ? dlsym(module, "cudaLaunchHostFunc") : NULL;
	if (!symbol)
		return CUBLAS_STATUS_NOT_INITIALIZED;
	memcpy(&launch, &symbol, sizeof(launch));
	dlclose(module);
	return launch(stream, multiply, job) ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t p, const void *alpha,
	const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
	cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
	cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
	const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
	cudaStream_t stream)
{
	cublasStatus_t status = check(p, a_layout, b_layout, d_layout);
	const void *const pointers[] = { a, b, c, d };
	struct job *job;

	if (it_is("refuse") || it_is("break"))
		return it_is("break") ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_NOT_SUPPORTED;
	if (status || *(const float *)alpha != 1 || *(const float *)beta != 0 || c != d)
		return status ? status : CUBLAS_STATUS_INVALID_VALUE;
	if (algo->data[0] != MAGIC || algo->data[1] != name_of(p, a_layout, b_layout, d_layout) ||
		workspace_bytes < WORKSPACE_BYTES || !is_16_aligned(workspace))
		return CUBLAS_STATUS_INVALID_VALUE;
	for (int i = 0; i < 4; i++) {
		if (!pointers[i] || (uintptr_t)pointers[i] % algo->data[2 + i] ||
			(uintptr_t)pointers[i] % (i < 2 ? number_bytes(a_layout->type) : 4))
			return CUBLAS_STATUS_INVALID_VALUE;
	}
	job = malloc(sizeof(*job));
	*job = (struct job){ .next = handle->jobs,
		.product = *p,
		.a_layout = *a_layout,
		.b_layout = *b_layout,
		.d_layout = *d_layout,
		.a = a,
		.b = b,
		.d = d,
		.workspace = workspace };
	handle->jobs = job;
	n_multiplied++;
	return enqueue(stream, job);
}
