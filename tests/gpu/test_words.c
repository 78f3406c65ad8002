/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs every case of words.h on both sides with the same random numbers and compares: bits, one NaN
 * for another, or within the bound that the case states. test_words SIDE.so EMULATION.so [--list];
 * AFD_WORDS_ROUNDS says with how many sets of numbers (3), AFD_WORDS_SPOIL=CASE changes one bit of
 * that case's result, which must then fail (a test of this test).
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "words.h"

enum { CASES_MAX = 128, UNWRITTEN = 0x3c };

static const struct words_side *sides[2]; /* what is tested, and the emulation */
static uint64_t random_state;

static uint32_t next_random(void)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return (uint32_t)((random_state * 2685821657736338717u) >> 32);
}

static float float_of(uint32_t bits)
{
	float x;

	memcpy(&x, &bits, 4);
	return x;
}

/* ---- numbers that go in ---- */

static uint32_t ordinary(void)
{
	uint32_t bits = next_random();

	return (bits & 0x807fffff) | (uint32_t)(124 + bits % 7) << 23;
}

static uint32_t odd(void)
{
	static const uint32_t numbers[] = { 0, 0x80000000, 1, 0x807fffff, 0x7f7fffff, 0xff7fffff,
		0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x477fe000, 0x477ff000, 0x43e00000,
		0x3b000000 };

	return numbers[next_random() % (sizeof numbers / sizeof numbers[0])];
}

static uint16_t sixteen_bits(enum words_input input)
{
	/* Of 0, 1, 2, 3, 4: the bf16, the f16. */
	static const uint16_t whole[2][5] = { { 0, 0x3f80, 0x4000, 0x4040, 0x4080 },
		{ 0, 0x3c00, 0x4000, 0x4200, 0x4400 } };
	uint32_t bits = next_random();

	if (input == WORDS_BF16)
		return (uint16_t)((bits & 0x807f) | (124 + (bits >> 16) % 6) << 7);
	if (input == WORDS_F16)
		return (uint16_t)((bits & 0x83ff) | (12 + (bits >> 16) % 6) << 10);
	return whole[input == WORDS_F16_WHOLE][(bits >> 16) % 5] | (bits & 0x8000);
}

static uint32_t input_at(enum words_input input, uint32_t i)
{
	switch (input) {
	case WORDS_BITS:
		return next_random();
	case WORDS_COUNT:
		return i;
	case WORDS_FLOATS:
		return next_random() % 8 ? ordinary() : odd();
	case WORDS_ORDINARY:
		return ordinary();
	default:
		return sixteen_bits(input) | (uint32_t)sixteen_bits(input) << 16;
	}
}

/* ---- what comes out ---- */

static int is_nan(enum words_output output, uint32_t x)
{
	switch (output) {
	case WORDS_F32:
		return (x & 0x7fffffff) > 0x7f800000;
	case WORDS_TWO_F16:
		return (x & 0x7fff) > 0x7c00;
	case WORDS_TWO_BF16:
		return (x & 0x7fff) > 0x7f80;
	case WORDS_FP8:
		return (x & 0x7f) == 0x7f;
	default:
		return 0;
	}
}

static int same(enum words_output output, uint32_t a, uint32_t b)
{
	if (output == WORDS_TWO_F16 || output == WORDS_TWO_BF16) {
		uint32_t high_a = a >> 16, high_b = b >> 16;

		if (high_a != high_b && !(is_nan(output, high_a) && is_nan(output, high_b)))
			return 0;
		a &= 0xffff;
		b &= 0xffff;
	}
	return a == b || (is_nan(output, a) && is_nan(output, b));
}

static void compare_sums(
	const struct word *w, const uint32_t *got, const uint32_t *want, uint32_t block)
{
	uint32_t half = w->n_out / 2;

	for (uint32_t i = 0; i < half; i++) {
		double a = float_of(got[i]), b = float_of(want[i]),
		       magnitude = float_of(want[half + i]);

		if (!(fabs(a - b) <= w->bound * magnitude))
			fail_msg("%s: block %u, number %u: got %.9g, emulation %.9g, off by %.3g "
				 "of the magnitudes' "
				 "sum, bound %.3g",
				w->name, block, i, a, b, fabs(a - b) / magnitude, w->bound);
	}
}

static void compare(const struct word *w, const uint32_t *got, const uint32_t *want)
{
	for (uint32_t block = 0; block < WORDS_BLOCKS; block++, got += w->n_out, want += w->n_out) {
		if (w->output == WORDS_SUMS) {
			compare_sums(w, got, want, block);
			continue;
		}
		for (uint32_t i = 0; i < w->n_out; i++) {
			if (!same(w->output, got[i], want[i]))
				fail_msg("%s: block %u, word %u: got 0x%08x, emulation 0x%08x",
					w->name, block, i, got[i], want[i]);
		}
	}
}

static void spoil(const struct word *w, uint32_t *out)
{
	const char *name = getenv("AFD_WORDS_SPOIL");

	if (name && !strcmp(name, w->name))
		out[w->n_out / 4] ^= w->output == WORDS_SUMS ? 1u << 22 : 1u;
}

/* ---- cases ---- */

static const struct word *case_named(const struct words_side *side, const char *name)
{
	const struct word *w;

	for (unsigned i = 0; (w = side->at(i)); i++) {
		if (!strcmp(w->name, name))
			return w;
	}
	return NULL;
}

static void run_case(void **state)
{
	const struct word *w = *state, *emulated = case_named(sides[1], w->name);
	size_t n_in = (size_t)WORDS_BLOCKS * w->n_in, n_out = (size_t)WORDS_BLOCKS * w->n_out;
	uint32_t *in = malloc(n_in * 4), *out[2] = { malloc(n_out * 4), malloc(n_out * 4) };
	const char *rounds = getenv("AFD_WORDS_ROUNDS"), *error;

	assert_non_null(emulated);
	for (int round = 0; round < (rounds ? atoi(rounds) : 3); round++) {
		random_state = 88172645463325252u + (uint64_t)round * 7919;
		for (size_t i = 0; i < n_in; i++)
			in[i] = input_at(w->input, (uint32_t)i);
		for (int side = 0; side < 2; side++) {
			memset(out[side], UNWRITTEN + side, n_out * 4);
			if (sides[side]->run(side ? emulated : w, in, out[side], &error))
				fail_msg("%s: %s: %s", w->name, side ? "the emulator" : "the GPU",
					error);
		}
		spoil(w, out[0]);
		compare(w, out[0], out[1]);
	}
	free(in);
	free(out[0]);
	free(out[1]);
}

static const struct words_side *open_side(const char *path)
{
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL), *symbol;

	symbol = handle ? dlsym(handle, WORDS_SYMBOL) : NULL;
	if (!symbol)
		fprintf(stderr, "%s\n", dlerror());
	return symbol;
}

int main(int argc, char **argv)
{
	static struct CMUnitTest tests[CASES_MAX];
	size_t n = 0;
	const struct word *w;

	if (argc < 3 || !(sides[0] = open_side(argv[1])) || !(sides[1] = open_side(argv[2])))
		return 2;
	for (; n < CASES_MAX && (w = sides[0]->at((unsigned)n)); n++) {
		tests[n] = (struct CMUnitTest){
			.name = w->name, .test_func = run_case, .initial_state = (void *)w
		};
		if (argc > 3)
			printf("%s: %s\n", w->name, w->covers);
	}
	return argc > 3 ? 0 : _cmocka_run_group_tests("words", tests, n, NULL, NULL);
}
