/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Each word of kernels/cuda/gpu.h as a case: a kernel that reads random numbers, says the word, and
 * writes what came of it. The same files (words_*.cu) are compiled by nvcc and for the emulator,
 * into a shared object each; test_words.c runs both on the same numbers and compares.
 *
 * Invariant: `covers` of all cases together names every word of gpu.h (tests/tools/test_gpu.py
 * looks), so a new word brings its case.
 */
#ifndef AFD_TESTS_GPU_WORDS_H
#define AFD_TESTS_GPU_WORDS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct afd_gpu;

enum { WORDS_BLOCKS = 16 }; /* of a launch; each has its own part of the numbers */

enum words_input {    /* what in[] holds, word by word of 32 bits */
	WORDS_BITS,   /* any bits */
	WORDS_COUNT,  /* 0, 1, 2, .. : all patterns of 16 bits, when there are as many */
	WORDS_FLOATS, /* f32 of both signs around 1, and now and then an odd one: 0, tiny, huge, NaN
		       */
	WORDS_ORDINARY,   /* f32 of both signs around 1 */
	WORDS_BF16,       /* two bf16 around 1 */
	WORDS_F16,        /* two f16 around 1 */
	WORDS_BF16_WHOLE, /* two bf16, whole numbers of -4 .. 4: their sums of products are exact */
	WORDS_F16_WHOLE,
};

enum words_output { /* what out[] holds; one NaN is as good as another, else bits are compared */
	WORDS_RAW,
	WORDS_F32,
	WORDS_TWO_F16,
	WORDS_TWO_BF16,
	WORDS_FP8, /* one in a word */
	/* f32 in the first half, in the second the sum of magnitudes that a sum was made of: both
	 * sides agree within `bound` of that. */
	WORDS_SUMS,
};

struct word {
	const char *name;   /* a sentence */
	const char *covers; /* words of gpu.h */
	enum words_input input;
	enum words_output output;
	uint32_t n_in, n_out; /* words of 32 bits of a block */
	double bound;         /* of WORDS_SUMS */
	int (*launch)(const struct afd_gpu *gpu, const uint32_t *in, uint32_t *out);
};

/* What a shared object shows: its cases, and a way to run one. */
struct words_side {
	const struct word *(*at)(unsigned i); /* NULL past the last */
	/* in [WORDS_BLOCKS][n_in] and out [WORDS_BLOCKS][n_out] are host memory. 0, or a
	 * cudaError_t and its name in *error. */
	int (*run)(const struct word *w, const uint32_t *in, uint32_t *out, const char **error);
};
#define WORDS_SYMBOL "words_side"

/* The groups: words_*.cu; each ends with an entry without a name. */
extern const struct word words_lanes[], words_numbers[], words_memory[], words_matrices[];

#ifdef __cplusplus
}
#endif

#endif
