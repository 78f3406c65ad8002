/* SPDX-License-Identifier: Apache-2.0 */
/* Who a thread is, and what the lanes of a warp tell each other. */
#include "words_each.h"

enum { THREADS = 96 };

/* A grid of two by four by two blocks, so that no coordinate stands for another. */
GPU_KERNEL(THREADS) place_kernel(const uint32_t *in, uint32_t *out)
{
	unsigned block = block_x() + 2 * (block_y() + 4 * block_z());
	uint32_t *mine = out + (block * THREADS + thread_x()) * 8;

	mine[0] = thread_x();
	mine[1] = block_threads();
	mine[2] = block_x() | block_y() << 8 | block_z() << 16;
	mine[3] = grid_x() | grid_z() << 8;
	mine[4] = lane_id();
	mine[5] = warp_id();
	mine[6] = in[block * THREADS + thread_x()];
	mine[7] = least(thread_x(), 40);
}

static int launch_place(const struct afd_gpu *gpu, const uint32_t *in, uint32_t *out)
{
	static_assert(WORDS_BLOCKS == 2 * 4 * 2, "the grid of place");

	return gpu_launch(gpu, "place", place_kernel, { 2, 4, 2 }, THREADS, 0, in, out);
}

/* Each thread's number goes to another warp through shared memory, and back from the next. */
GPU_KERNEL(THREADS) barrier_kernel(const uint32_t *in, uint32_t *out)
{
	GPU_SHARED(uint32_t, numbers, THREADS);
	unsigned t = thread_x();

	numbers[t] = in[block_x() * THREADS + t];
	barrier();
	out[block_x() * 2 * THREADS + t] = numbers[(t + 37) % THREADS];
	barrier();
	numbers[(t + 64) % THREADS] = t;
	barrier();
	out[(block_x() * 2 + 1) * THREADS + t] = numbers[t];
}

/* Through shared memory, from lane to lane of a warp. */
GPU_KERNEL(THREADS) warp_sync_kernel(const uint32_t *in, uint32_t *out)
{
	GPU_SHARED(uint32_t, numbers, THREADS);
	unsigned t = thread_x(), other = t / 32 * 32 + (t * 5 + 3) % 32;

	numbers[t] = in[block_x() * THREADS + t];
	warp_sync();
	out[block_x() * THREADS + t] = numbers[other];
}

GPU_KERNEL(THREADS) shuffle_kernel(const uint32_t *in, uint32_t *out)
{
	uint32_t v = in[block_x() * THREADS + thread_x()], from = v >> 7;
	uint32_t *mine = out + (block_x() * THREADS + thread_x()) * 6;

	mine[0] = shuffle((unsigned)v, from);
	mine[1] = bits_of(shuffle(float_of_bits(v), from));
	mine[2] = (uint32_t)shuffle_xor((int)v, 1);
	mine[3] = (uint32_t)shuffle_xor((int)v, 16);
	mine[4] = bits_of(shuffle_xor(float_of_bits(v), 5));
	mine[5] = warp_ballot(v & 4);
}

GPU_KERNEL(THREADS) warp_sum_kernel(const uint32_t *in, uint32_t *out)
{
	uint32_t at = block_x() * THREADS + thread_x();

	out[at] = bits_of(warp_sum(float_of_bits(in[at])));
}

GPU_KERNEL(THREADS) warp_max_kernel(const uint32_t *in, uint32_t *out)
{
	uint32_t at = block_x() * THREADS + thread_x();

	out[at] = bits_of(warp_max(float_of_bits(in[at])));
}

extern "C" const struct word words_lanes[] = {
	{ "a_thread_knows_its_place",
		"thread_x block_threads block_x block_y block_z grid_x grid_z lane_id warp_id "
		"least "
		"gpu_launch",
		WORDS_BITS, WORDS_RAW, THREADS, 8 * THREADS, 0, launch_place },
	{ "a_barrier_orders_shared_memory", "barrier", WORDS_BITS, WORDS_RAW, THREADS, 2 * THREADS,
		0, launch_blocks<barrier_kernel, THREADS, 0> },
	{ "warp_sync_orders_shared_memory", "warp_sync", WORDS_BITS, WORDS_RAW, THREADS, THREADS, 0,
		launch_blocks<warp_sync_kernel, THREADS, 0> },
	{ "lanes_hand_numbers_to_each_other", "shuffle shuffle_xor warp_ballot", WORDS_BITS,
		WORDS_RAW, THREADS, 6 * THREADS, 0, launch_blocks<shuffle_kernel, THREADS, 0> },
	/* In one order of additions, so the same bits. */
	{ "warp_sum_adds_in_one_order", "warp_sum", WORDS_ORDINARY, WORDS_F32, THREADS, THREADS, 0,
		launch_blocks<warp_sum_kernel, THREADS, 0> },
	{ "warp_max_takes_nan_for_less_than_any_number", "warp_max", WORDS_FLOATS, WORDS_F32,
		THREADS, THREADS, 0, launch_blocks<warp_max_kernel, THREADS, 0> },
	{},
};
