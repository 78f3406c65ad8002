/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How fast this machine reads memory, in the plainest way: the threads add up 64 MiB, then the next
 * 64 MiB, and so on, five times around 1 GiB; the best pass counts. Shares nothing with afd-bench,
 * whose ceilings are held against it.
 *
 *     read_loop N_THREADS      prints GB/s
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define BYTES       ((size_t)1 << 30)
#define PASS_BYTES  ((size_t)64 << 20)
#define N_PASSES    (5 * BYTES / PASS_BYTES)
#define THREADS_MAX 256

struct part {
	pthread_barrier_t *begin;
	const uint64_t *words; /* [n_words] */
	size_t n_words;
	uint64_t sum;
	double start, end;
};

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static void *add_up(void *arg)
{
	struct part *part = arg;
	uint64_t sum = 0;

	pthread_barrier_wait(part->begin);
	part->start = seconds();
	for (size_t i = 0; i < part->n_words; i++)
		sum += part->words[i];
	part->end = seconds();
	part->sum = sum;
	return NULL;
}

/* From the first thread's start to the last one's end. */
static double time_pass(const uint64_t *words, int n_threads, uint64_t *sum)
{
	struct part parts[THREADS_MAX];
	pthread_t threads[THREADS_MAX];
	pthread_barrier_t begin;
	double start = 1e300, end = 0;

	pthread_barrier_init(&begin, NULL, n_threads);
	for (int i = 0; i < n_threads; i++) {
		size_t n_words = PASS_BYTES / 8 / n_threads;

		parts[i] = (struct part){
			.begin = &begin, .words = words + i * n_words, .n_words = n_words
		};
		if (pthread_create(&threads[i], NULL, add_up, &parts[i]))
			exit(1);
	}
	for (int i = 0; i < n_threads; i++) {
		pthread_join(threads[i], NULL);
		start = parts[i].start < start ? parts[i].start : start;
		end = parts[i].end > end ? parts[i].end : end;
		*sum += parts[i].sum;
	}
	pthread_barrier_destroy(&begin);
	return end - start;
}

int main(int argc, char **argv)
{
	int n_threads = argc == 2 ? atoi(argv[1]) : 0;
	uint64_t *words = malloc(BYTES), sum = 0;
	double best = 1e300;

	if (n_threads < 1 || n_threads > THREADS_MAX || !words)
		return 1;
	for (size_t i = 0; i < BYTES / 8; i++)
		words[i] = i;
	for (size_t pass = 0; pass < N_PASSES; pass++) {
		size_t at = pass * PASS_BYTES % BYTES;
		double time = time_pass(words + at / 8, n_threads, &sum);

		best = time < best ? time : best;
	}
	printf("%.2f\n", PASS_BYTES / best / 1e9);
	free(words);
	return sum == 0; /* the sum is used, so the loop stays */
}
