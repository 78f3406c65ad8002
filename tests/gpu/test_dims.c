/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every operation at the dimensions of the published models, on the device of argv[1] against the
 * CPU device in the same process, between canaries (the rig of the conformance tests). dims.c has
 * the operations; here are the models and what of them is a case.
 *
 * AFD_DIMS_SHRINK=N divides the dimensions, for an emulated GPU; AFD_DIMS_REPEAT=N runs what can be
 * run again N more times, and each run must give the same bits.
 */
#include "dims.h"

#include <stdio.h>
#include <stdlib.h>

/* Of experts the first 8: more of them are more of the same, but for route. */
static const struct dims models[] = {
	{ "qwen3_0.6b", 1024, 16, 8, 3072, 151936 },
	{ "qwen3_1.7b", 2048, 16, 8, 6144, 151936 },
	{ "qwen3_4b", 2560, 32, 8, 9728, 151936 },
	{ "qwen3_8b", 4096, 32, 8, 12288, 151936 },
	{ "qwen3_14b", 5120, 40, 8, 17408, 151936 },
	{ "qwen3_32b", 5120, 64, 8, 25600, 151936 },
	{ "qwen3_30b_a3b", 2048, 32, 4, 0, 151936, 768, 128, 8 },
	{ "qwen3_235b_a22b", 4096, 64, 4, 0, 151936, 1536, 128, 8 },
	{ "qwen3_coder_480b_a35b", 6144, 96, 8, 0, 151936, 2560, 160, 8 },
	{ "trinity_nano", 1024, 8, 2, 3072, 200192, 256, 128, 8, .window = 2048, .sigmoid = 1 },
	{ "trinity_mini", 2048, 32, 4, 6144, 200192, 1024, 128, 8, .window = 2048, .sigmoid = 1 },
	{ "trinity_large", 3072, 48, 8, 12288, 200192, 3072, 256, 4, .window = 4096, .sigmoid = 1 },
};
enum { N_MODELS = sizeof models / sizeof models[0], CASES_MAX = N_MODELS * DIMS_OPS_MAX };

struct dims_case {
	struct dims m;
	const struct dims_op *op;
	char name[80];
};

static void run_case(void **state)
{
	const struct dims_case *c = *state;

	c->op->run(&c->m);
}

static uint32_t divided(uint32_t n, uint32_t by, uint32_t multiple)
{
	uint32_t less = n / by / multiple * multiple;

	return !n ? 0 : less ? less : multiple;
}

/* Heads keep their 128 numbers and their groups. */
static struct dims shrunk(const struct dims *m, uint32_t by)
{
	struct dims small = *m;

	if (by <= 1)
		return small;
	small.hidden = divided(m->hidden, by, 16);
	small.n_kv_heads = divided(m->n_kv_heads, by, 1);
	small.n_heads = m->n_heads / m->n_kv_heads * small.n_kv_heads;
	small.intermediate = divided(m->intermediate, by, 24);
	small.width = divided(m->width, by, 24);
	small.vocab = divided(m->vocab, by * 8, 8);
	small.window = divided(m->window, by, 1);
	return small;
}

int main(int argc, char **argv)
{
	static struct dims_case cases[CASES_MAX];
	static struct CMUnitTest tests[CASES_MAX];
	const char *shrink = getenv("AFD_DIMS_SHRINK");
	size_t n = 0;

	if (rig_device(argc, argv))
		return 77;
	for (size_t m = 0; m < N_MODELS; m++) {
		for (const struct dims_op *op = dims_ops; op->name; op++) {
			struct dims_case *c = &cases[n];

			if (op->applies && !op->applies(&models[m]))
				continue;
			c->m = shrunk(&models[m], shrink ? (uint32_t)atoi(shrink) : 1);
			c->op = op;
			snprintf(c->name, sizeof c->name, "%s_of_%s_agrees_with_the_cpu", op->name,
				models[m].name);
			tests[n++] = (struct CMUnitTest){
				.name = c->name, .test_func = run_case, .initial_state = c
			};
		}
	}
	return _cmocka_run_group_tests("dims", tests, n, NULL, NULL);
}
