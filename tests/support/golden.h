/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A recorded case of tests/golden: where its checkpoint lies, the ids, and the logits that
 * transformers gave. Used by every suite that compares with them.
 */
#ifndef AFD_TEST_GOLDEN_H
#define AFD_TEST_GOLDEN_H

#include <stdbool.h>
#include <stdint.h>

struct golden {
	char checkpoint[512]; /* a directory */
	int32_t *ids;         /* [n_prompt + n_generated] */
	uint32_t n_prompt, n_generated;
	uint32_t n_positions; /* n_prompt + n_generated - 1: those with logits */
	uint32_t vocab;
	float *logits; /* [n_positions][vocab] */
};

/* Fails the test when the case cannot be read. */
void golden_open(struct golden *golden, const char *name);
void golden_close(struct golden *golden);


/* Squared error over squared size; infinite when a value is not finite. */
double nmse(const float *got, const float *wanted, uint64_t n);

/* Reads a float32 .npy file of two dimensions in C order. Fails the test when it is something else.
 */
float *npy_read(const char *path, uint32_t shape[2]);

/* What a copy of a checkpoint differs in. */
struct golden_change {
	const char *find, *replace; /* in config.json, where `find` stands once; NULL: nothing */
	const char *tensor;         /* a float32 one; NULL: none */
	uint64_t index, n_numbers;  /* that become `value`; n_numbers 0: all from index on */
	float value;
};
/* Copies a case's checkpoint of one file to a fresh directory, with that change. */
void golden_change(
	const struct golden *golden, const struct golden_change *change, char directory[64]);
/* The same with number `index` of a float32 tensor replaced. */
void golden_patch(const struct golden *golden, const char *tensor, uint64_t index, float value,
	char directory[64]);
void golden_patch_remove(const char *directory);

/* The directories in tests/golden that hold a case, sorted; returns how many. */
uint32_t golden_names(char names[][64], uint32_t capacity);

#endif
