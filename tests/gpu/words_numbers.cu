/* SPDX-License-Identifier: Apache-2.0 */
/* From one kind of number to another: all patterns of 16 bits, and random ones of 32. */
#include "words_each.h"

enum { N = 4096 }; /* of a block: 16 blocks count through 16 bits */
static_assert(N * WORDS_BLOCKS == 1 << 16, "all patterns of 16 bits");

#define EACH(name, result) \
	struct name { \
		static GPU_INLINE uint32_t of(uint32_t x) \
		{ \
			return result; \
		} \
	}

EACH(bf16_to_f32, bits_of(to_float(bf16{ (uint16_t)x })));
EACH(f16_to_f32, bits_of(to_float(f16{ (uint16_t)x })));
EACH(fp8_to_f32, bits_of(to_float(fp8{ (uint8_t)x })));
EACH(fp8_to_f16, f16x2_of_fp8x2(x));
EACH(f32_to_f32, bits_of(from_float<float>(to_float(float_of_bits(x)))));
EACH(f32_to_bf16, from_float<bf16>(float_of_bits(x)).bits);
EACH(f32_to_f16, from_float<f16>(float_of_bits(x)).bits);
EACH(f32_to_fp8, from_float<fp8>(float_of_bits(x)).bits);
/* The ties between two bf16 and between two f16: x counts. */
EACH(ties_to_bf16, from_float<bf16>(float_of_bits(x << 16 | 0x8000)).bits);
EACH(ties_to_f16, from_float<f16>(float_of_bits(0x30000000 + (x << 12))).bits);
EACH(ties_to_fp8, from_float<fp8>(float_of_bits(0x38000000 + (x << 18))).bits);
EACH(pack_bf16, pack2<bf16>(float_of_bits(x), float_of_bits(x * 2654435761u)));
EACH(pack_f16, pack2<f16>(float_of_bits(x), float_of_bits(x * 2654435761u)));
EACH(finite_and_bits, count_bits(x) | (uint32_t)is_finite(float_of_bits(x)) << 8);
EACH(products, bits_of(multiply(float_of_bits(x), float_of_bits(x * 2654435761u))));
/* An fma would round once. */
EACH(product_then_sum, bits_of(times(float_of_bits(x), 1.37f) +
			       times(float_of_bits(x), float_of_bits(0x3f800001))));
EACH(divisions, (uint32_t)divide_up(x, 1 + x % 977));

#define CASE(name, covers, input, output, f) \
	{ name, covers, input, output, N, N, 0, launch_each<f, N> }

extern "C" const struct word words_numbers[] = {
	CASE("every_bf16_becomes_its_f32", "to_float bits_of", WORDS_COUNT, WORDS_F32, bf16_to_f32),
	CASE("every_f16_becomes_its_f32", "to_float", WORDS_COUNT, WORDS_F32, f16_to_f32),
	CASE("every_e4m3_becomes_its_f32", "to_float", WORDS_COUNT, WORDS_F32, fp8_to_f32),
	CASE("every_pair_of_e4m3_becomes_two_f16", "f16x2_of_fp8x2", WORDS_COUNT, WORDS_TWO_F16,
		fp8_to_f16),
	CASE("an_f32_stays_itself", "to_float from_float round_to float_of_bits", WORDS_BITS,
		WORDS_F32, f32_to_f32),
	CASE("any_f32_becomes_the_nearest_bf16", "from_float round_to", WORDS_BITS, WORDS_TWO_BF16,
		f32_to_bf16),
	CASE("any_f32_becomes_the_nearest_f16", "from_float round_to", WORDS_BITS, WORDS_TWO_F16,
		f32_to_f16),
	CASE("f32_around_1_become_the_nearest_f16", "from_float", WORDS_FLOATS, WORDS_TWO_F16,
		f32_to_f16),
	CASE("any_f32_becomes_the_nearest_e4m3", "from_float round_to", WORDS_BITS, WORDS_FP8,
		f32_to_fp8),
	CASE("f32_around_1_become_the_nearest_e4m3", "from_float", WORDS_FLOATS, WORDS_FP8,
		f32_to_fp8),
	CASE("ties_between_bf16_go_to_the_even_one", "round_to", WORDS_COUNT, WORDS_TWO_BF16,
		ties_to_bf16),
	CASE("ties_between_f16_go_to_the_even_one", "round_to", WORDS_COUNT, WORDS_TWO_F16,
		ties_to_f16),
	CASE("ties_between_e4m3_go_to_the_even_one", "round_to", WORDS_COUNT, WORDS_FP8,
		ties_to_fp8),
	CASE("two_f32_become_two_bf16", "pack2 pack_as", WORDS_BITS, WORDS_TWO_BF16, pack_bf16),
	CASE("two_f32_become_two_f16", "pack2 pack_as", WORDS_BITS, WORDS_TWO_F16, pack_f16),
	CASE("bits_are_counted_and_infinities_found", "count_bits is_finite", WORDS_BITS, WORDS_RAW,
		finite_and_bits),
	CASE("two_f32_are_multiplied", "multiply", WORDS_BITS, WORDS_F32, products),
	CASE("a_product_is_rounded_before_it_is_added", "times", WORDS_FLOATS, WORDS_F32,
		product_then_sum),
	CASE("divisions_round_up", "divide_up", WORDS_COUNT, WORDS_RAW, divisions),
	{},
};
