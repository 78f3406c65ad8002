/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tensor cores: how ldmatrix deals numbers to lanes, and what mma makes of them. Whole numbers show
 * the layout bit by bit. Other sums differ: the emulator adds in float32, a tensor core aligns all
 * terms to the largest and cuts, so that each of 17 terms may lose one unit in the last place of 24
 * bits.
 */
#include "words_each.h"

enum { MATRICES = 4, ROWS = 8, WORDS_OF_ROW = 4 };

template <bool TRANSPOSED> GPU_KERNEL(32) ldmatrix_kernel(const uint32_t *in, uint32_t *out)
{
	GPU_SHARED(uint32_t, numbers, MATRICES * ROWS * WORDS_OF_ROW);
	unsigned lane = lane_id();
	uint32_t r[4];

	for (unsigned i = lane; i < MATRICES * ROWS * WORDS_OF_ROW; i += 32)
		numbers[i] = in[block_x() * MATRICES * ROWS * WORDS_OF_ROW + i];
	warp_sync();
	/* Rows in an order of their own, so that the lane that names a row counts. */
	load_matrices<TRANSPOSED>(r, numbers + (lane * 13 + 7) % 32 * WORDS_OF_ROW);
	for (unsigned i = 0; i < 4; i++)
		out[(block_x() * 32 + lane) * 4 + i] = r[i];
}

/* in: per lane 4 words of a, 2 of b, 2 of which d is made. Two mma on end, as kernels chain them.
 */
template <class T> GPU_KERNEL(32) mma_kernel(const uint32_t *in, uint32_t *out)
{
	const uint32_t *mine = in + (block_x() * 32 + lane_id()) * 8;
	uint32_t a[4], b[2];
	float d[4], magnitude[4];

	for (int i = 0; i < 4; i++) {
		a[i] = mine[i];
		d[i] = to_float(T{ (uint16_t)(mine[6 + i / 2] >> i % 2 * 16) });
		magnitude[i] = fabsf(d[i]);
	}
	b[0] = mine[4];
	b[1] = mine[5];
	mma(T{}, d, a, b[0], b[1]);
	mma(T{}, d, a, b[1], b[0]);
	for (int i = 0; i < 4; i++)
		a[i] &= 0x7fff7fff;
	mma(T{}, magnitude, a, b[0] & 0x7fff7fff, b[1] & 0x7fff7fff);
	mma(T{}, magnitude, a, b[1] & 0x7fff7fff, b[0] & 0x7fff7fff);
	for (unsigned i = 0; i < 4; i++) {
		out[block_x() * 256 + lane_id() * 4 + i] = bits_of(d[i]);
		out[block_x() * 256 + 128 + lane_id() * 4 + i] = bits_of(magnitude[i]);
	}
}

#define SUM_BOUND 0x1p-18 /* 2 x 17 units of 2^-24, and the emulator's own rounding */

extern "C" const struct word words_matrices[] = {
	{ "ldmatrix_deals_four_matrices_to_lanes", "load_matrices", WORDS_BITS, WORDS_RAW, 128, 128,
		0, launch_blocks<ldmatrix_kernel<false>, 32, 0> },
	{ "ldmatrix_deals_them_transposed", "load_matrices", WORDS_BITS, WORDS_RAW, 128, 128, 0,
		launch_blocks<ldmatrix_kernel<true>, 32, 0> },
	{ "mma_of_whole_bf16_is_exact", "mma", WORDS_BF16_WHOLE, WORDS_F32, 256, 256, 0,
		launch_blocks<mma_kernel<bf16>, 32, 0> },
	{ "mma_of_whole_f16_is_exact", "mma", WORDS_F16_WHOLE, WORDS_F32, 256, 256, 0,
		launch_blocks<mma_kernel<f16>, 32, 0> },
	{ "mma_of_bf16_is_near", "mma", WORDS_BF16, WORDS_SUMS, 256, 256, SUM_BOUND,
		launch_blocks<mma_kernel<bf16>, 32, 0> },
	{ "mma_of_f16_is_near", "mma", WORDS_F16, WORDS_SUMS, 256, 256, SUM_BOUND,
		launch_blocks<mma_kernel<f16>, 32, 0> },
	{},
};
