/* SPDX-License-Identifier: Apache-2.0 */
/* Loads, asynchronous copies into shared memory, and what the host looks at. */
#include "words_each.h"

enum { THREADS = 64, VECTORS = 3 * THREADS };

GPU_KERNEL(THREADS) load_once_kernel(const uint32_t *in, uint32_t *out)
{
	for (unsigned i = thread_x(); i < VECTORS; i += THREADS) {
		vec16 v = load_once(in + (block_x() * VECTORS + i) * 4);

		((vec16 *)out)[block_x() * VECTORS + i] = v;
	}
}

/* Three groups on their way at once, each awaited in its turn; of every 16 bytes 0 to 16 are read,
 * the rest is zeros. What a thread copied it reads back itself, so that no barrier is needed. */
GPU_KERNEL(THREADS) copy_async_kernel(const uint32_t *in, uint32_t *out)
{
	GPU_SHARED(vec16, stage, VECTORS);
	unsigned t = thread_x();
	vec16 *to = (vec16 *)out + block_x() * VECTORS;

	for (unsigned i = 0; i < 3; i++) {
		unsigned at = i * THREADS + t;

		copy_async(
			&stage[at], in + (block_x() * VECTORS + at) * 4, (at + block_x()) % 5 * 4);
		copy_commit();
	}
	copy_wait<2>();
	to[t] = stage[t];
	copy_wait<1>();
	to[THREADS + t] = stage[THREADS + t];
	copy_wait<0>();
	to[2 * THREADS + t] = stage[2 * THREADS + t];
}

/* The address in shared memory is that of the window, whose distances are the pointers'. */
GPU_KERNEL(THREADS) dynamic_kernel(const uint32_t *in, uint32_t *out)
{
	GPU_DYNAMIC_SHARED(bytes);
	uint32_t *numbers = (uint32_t *)bytes;
	unsigned t = thread_x();

	for (unsigned i = t; i < 16 * THREADS; i += THREADS)
		numbers[i] = in[block_x() * 16 * THREADS + i];
	barrier();
	for (unsigned i = t; i < 16 * THREADS; i += THREADS)
		out[block_x() * 16 * THREADS + i] = numbers[16 * THREADS - 1 - i];
}

GPU_KERNEL(32) store_kernel(const uint32_t *in, uint32_t *out)
{
	uint64_t *to = (uint64_t *)out + block_x() * 32 + thread_x();
	uint32_t v = in[block_x() * 32 + thread_x()];

	store_release_system(to, (uint64_t)v << 32 | (v ^ 0x5a5a5a5a));
}

/* It does not go back, and moves while a warp waits for it. */
GPU_KERNEL(32) clock_kernel(const uint32_t *in, uint32_t *out)
{
	uint64_t start = now_ns(), last = start, now = start;
	uint32_t back = 0;

	for (unsigned i = 0; i < 1u << 20 && now - start < 5000; i++, last = now) {
		now = now_ns();
		back |= now < last;
	}
	out[block_x() * 32 + thread_x()] = back << 1 | (now - start >= 5000);
}

/* Sums that wrap, of all threads in three places. */
GPU_KERNEL(THREADS) add_shared_kernel(const uint32_t *in, uint32_t *out)
{
	GPU_SHARED(uint64_t, sums, 3);
	unsigned t = thread_x();
	uint64_t v = in[block_x() * THREADS + t];

	if (t < 3)
		sums[t] = 0;
	barrier();
	add_shared(&sums[t % 3], v << 32 | (v ^ 0x5a5a5a5a));
	barrier();
	((uint64_t *)out)[block_x() * THREADS + t] = sums[(t + 1) % 3];
}

/* Each thread in a word of its own: what stood there, and what stands there. */
GPU_KERNEL(32) add_ordered_kernel(const uint32_t *in, uint32_t *out)
{
	uint32_t *place = out + (block_x() * 32 + thread_x()) * 2, v = in[block_x() * 32 + thread_x()];

	place[0] = v;
	place[1] = add_ordered(&place[0], v ^ 0x5a5a5a5a);
}

extern "C" const struct word words_memory[] = {
	{ "a_load_brings_16_bytes", "load_once", WORDS_BITS, WORDS_RAW, 4 * VECTORS, 4 * VECTORS, 0,
		launch_blocks<load_once_kernel, THREADS, 0> },
	{ "copies_arrive_at_their_wait_and_end_in_zeros",
		"copy_async copy_commit copy_wait shared_address", WORDS_BITS, WORDS_RAW,
		4 * VECTORS, 4 * VECTORS, 0, launch_blocks<copy_async_kernel, THREADS, 0> },
	{ "dynamic_shared_memory_holds_what_was_asked_for", "gpu_launch barrier", WORDS_BITS,
		WORDS_RAW, 16 * THREADS, 16 * THREADS, 0,
		launch_blocks<dynamic_kernel, THREADS, 64 * THREADS> },
	{ "much_dynamic_shared_memory_can_be_had", "gpu_launch", WORDS_BITS, WORDS_RAW,
		16 * THREADS, 16 * THREADS, 0, launch_blocks<dynamic_kernel, THREADS, 96 << 10> },
	{ "sums_of_several_threads_are_the_same_in_any_order", "add_shared", WORDS_BITS, WORDS_RAW,
		THREADS, 2 * THREADS, 0, launch_blocks<add_shared_kernel, THREADS, 0> },
	{ "a_word_that_is_added_to_tells_what_stood_there", "add_ordered", WORDS_BITS, WORDS_RAW, 32,
		64, 0, launch_blocks<add_ordered_kernel, 32, 0> },
	{ "a_word_for_the_host_is_written_whole", "store_release_system", WORDS_BITS, WORDS_RAW, 32,
		64, 0, launch_blocks<store_kernel, 32, 0> },
	{ "the_clock_moves_on", "now_ns", WORDS_BITS, WORDS_RAW, 32, 32, 0,
		launch_blocks<clock_kernel, 32, 0> },
	{},
};
