/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What afd-generate is asked to continue: sequences of ids with their own number of tokens and
 * seed, from --ids or from the JSON file of --batch. The place of a sequence in this list is its id
 * everywhere: in KV cache, errors and output.
 */
#ifndef GENERATE_INPUT_H
#define GENERATE_INPUT_H

#include <stdint.h>

struct sequence {
	int32_t *ids; /* [n_prompt + max_tokens]: the prompt, then what was generated */
	uint32_t n_prompt;
	uint32_t max_tokens;
	uint64_t seed;
	uint32_t n_ids; /* ids known: the prompt and the generated ones */
	uint32_t n_fed; /* of these, how many a step has taken */
	int ended;      /* all tokens are there */
};

struct input {
	struct sequence *sequences; /* [n_sequences] */
	uint32_t n_sequences;
};

#define INPUT_MAX_SEQUENCES 32768
#define INPUT_MAX_TOKENS    16777216 /* of one sequence, prompt included */

/* TOOL_DONE, or TOOL_FAILED or TOOL_USAGE after a line on stderr. max_tokens and seed are the
 * defaults. */
int input_from_ids(struct input *input, const char *text, uint32_t max_tokens, uint64_t seed);
int input_from_batch(struct input *input, const char *path, uint32_t max_tokens, uint64_t seed);
void input_free(struct input *input);

#endif
