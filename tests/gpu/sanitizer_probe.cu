/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A program with one fault, to learn whether compute-sanitizer works on this machine before its silence is
 * believed: sanitizer_probe memcheck|racecheck|initcheck|synccheck.
 */
#include <stdio.h>
#include <string.h>

__global__ void out_of_bounds(int *x)
{
	x[threadIdx.x + 1 + (1 << 22)] = 1;
}

__global__ void race(int *x)
{
	__shared__ int shared[64];

	shared[threadIdx.x] = x[threadIdx.x];
	x[threadIdx.x] = shared[63 - threadIdx.x]; /* no barrier */
}

__global__ void uninitialised(int *x)
{
	x[threadIdx.x] += x[threadIdx.x + 64];
}

__global__ void divergent_barrier(int *x)
{
	if (threadIdx.x < 40)
		__syncthreads();
	x[threadIdx.x] = 1;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	int *x;

	if (cudaMalloc(&x, 4 << 10))
		return 3;
	if (strcmp(what, "initcheck"))
		cudaMemset(x, 0, 4 << 10);
	if (!strcmp(what, "memcheck"))
		out_of_bounds<<<1, 64>>>(x);
	else if (!strcmp(what, "racecheck"))
		race<<<1, 64>>>(x);
	else if (!strcmp(what, "initcheck"))
		uninitialised<<<1, 64>>>(x);
	else if (!strcmp(what, "synccheck"))
		divergent_barrier<<<1, 64>>>(x);
	else
		return 2;
	cudaDeviceSynchronize();
	return 0;
}
