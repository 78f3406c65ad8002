/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The words of a GPU that kernels use, each with two meanings side by side: PTX under nvcc, plain
 * C++ under the tests' emulation (tests/emu). A kernel file includes this and nothing of CUDA.
 *
 * Invariant: both meanings agree. Without a GPU only their use is checked, by results; on one, each is
 * to be compared with the other (docs/cuda.md). Intrinsics, asm and CUDA's own words stand in this file only.
 */
#ifndef AFD_KERNELS_CUDA_GPU_H
#define AFD_KERNELS_CUDA_GPU_H

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define GPU_FN static __device__ __forceinline__
#define GPU_INLINE __device__ __forceinline__ /* of a specialisation */
#define GPU_BOTH static __host__ __device__ __forceinline__
#define GPU_KERNEL(...) static __global__ void __launch_bounds__(__VA_ARGS__)
#define GPU_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define GPU_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define GPU_UNROLL _Pragma("unroll")
#define GPU_PLACE
#define GPU_PASS_PLACE
#else
#include <emu.h>
#define GPU_FN static inline
#define GPU_INLINE inline
#define GPU_BOTH static inline
#define GPU_KERNEL(...) static void
#define GPU_SHARED(type, name, count) \
	static char name##_key; \
	type *const name = (type *)emu::shared(&name##_key, sizeof(type) * (count))
#define GPU_DYNAMIC_SHARED(name) unsigned char *const name = emu::dynamic_shared()
#define GPU_UNROLL
/* Where a word stands in the kernel, for what the emulator has to say about it. */
#define GPU_PLACE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define GPU_PASS_PLACE , file, line
#endif

/* ---- who am I: blocks are whole warps in one dimension, grids have three ---- */
#ifdef __CUDACC__
GPU_FN unsigned thread_x(void) { return threadIdx.x; }
GPU_FN unsigned block_threads(void) { return blockDim.x; }
GPU_FN unsigned block_x(void) { return blockIdx.x; }
GPU_FN unsigned block_y(void) { return blockIdx.y; }
GPU_FN unsigned block_z(void) { return blockIdx.z; }
GPU_FN unsigned grid_x(void) { return gridDim.x; }
GPU_FN unsigned grid_z(void) { return gridDim.z; }
GPU_FN void barrier(void) { __syncthreads(); }
#else
GPU_FN unsigned thread_x(void) { return emu::self.thread; }
GPU_FN unsigned block_threads(void) { return emu::self.n_threads; }
GPU_FN unsigned block_x(void) { return emu::self.block.x; }
GPU_FN unsigned block_y(void) { return emu::self.block.y; }
GPU_FN unsigned block_z(void) { return emu::self.block.z; }
GPU_FN unsigned grid_x(void) { return emu::self.grid.x; }
GPU_FN unsigned grid_z(void) { return emu::self.grid.z; }
GPU_FN void barrier(const char *file = __builtin_FILE(), int line = __builtin_LINE())
{
	emu::barrier(file, line);
}
#endif
GPU_FN unsigned lane_id(void) { return thread_x() % 32; }
GPU_FN unsigned warp_id(void) { return thread_x() / 32; }

/* ---- launch ---- */
struct gpu_grid {
	unsigned x, y, z;
};
#ifdef __CUDACC__
template <class... P, class... A>
static inline int gpu_launch(const struct afd_gpu *gpu, const char *name, void (*kernel)(P...),
	gpu_grid grid, unsigned n_threads, size_t shared_bytes, A... args)
{
	cudaLaunchConfig_t config = {};

	if (shared_bytes > 48u << 10) {
		cudaError_t rc = cudaFuncSetAttribute((const void *)kernel,
			cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
		if (rc)
			return rc;
	}
	config.gridDim = dim3(grid.x, grid.y, grid.z);
	config.blockDim = dim3(n_threads, 1, 1);
	config.dynamicSmemBytes = shared_bytes;
	config.stream = (cudaStream_t)gpu->stream;
	return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}
#else
template <class... P, class... A>
static inline int gpu_launch(const struct afd_gpu *gpu, const char *name, void (*kernel)(P...),
	gpu_grid grid, unsigned n_threads, size_t shared_bytes, A... args)
{
	return emu::enqueue((cudaStream_t)gpu->stream, name, { grid.x, grid.y, grid.z }, n_threads,
		shared_bytes, [=] { kernel(static_cast<P>(args)...); });
}
#endif

/* ---- warp operations: all 32 lanes take part; only warp_sync orders memory ---- */
#ifdef __CUDACC__
GPU_FN void warp_sync(void) { __syncwarp(); }
GPU_FN float shuffle_xor(float v, unsigned lanes) { return __shfl_xor_sync(~0u, v, lanes); }
GPU_FN int shuffle_xor(int v, unsigned lanes) { return __shfl_xor_sync(~0u, v, lanes); }
GPU_FN float shuffle(float v, unsigned lane) { return __shfl_sync(~0u, v, lane); }
GPU_FN unsigned shuffle(unsigned v, unsigned lane) { return __shfl_sync(~0u, v, lane); }
GPU_FN uint64_t shuffle(uint64_t v, unsigned lane)
{
	return __shfl_sync(~0u, (unsigned long long)v, (int)lane);
}
GPU_FN unsigned warp_ballot(bool p) { return __ballot_sync(~0u, p); }
#else
GPU_FN void warp_sync(const char *file = __builtin_FILE(), int line = __builtin_LINE())
{
	emu::meet(~0u, "warp_sync", NULL, NULL, true, file, line);
}

template <class T> GPU_FN T shuffle(T v, unsigned lane GPU_PLACE)
{
	struct Arg {
		T in, out;
		unsigned from;
	} arg = { v, v, lane % 32 };

	emu::meet_as<Arg>(~0u, "shuffle", &arg, [](Arg **lanes) {
		for (int i = 0; i < 32; i++)
			lanes[i]->out = lanes[lanes[i]->from]->in;
	}, false, file, line);
	return arg.out;
}

template <class T> GPU_FN T shuffle_xor(T v, unsigned lanes GPU_PLACE)
{
	return shuffle<T>(v, lane_id() ^ lanes GPU_PASS_PLACE);
}

GPU_FN unsigned warp_ballot(bool p GPU_PLACE)
{
	struct Arg {
		bool in;
		unsigned out;
	} arg = { p, 0 };

	emu::meet_as<Arg>(~0u, "ballot", &arg, [](Arg **lanes) {
		unsigned bits = 0;

		for (int i = 0; i < 32; i++)
			bits |= (unsigned)lanes[i]->in << i;
		for (int i = 0; i < 32; i++)
			lanes[i]->out = bits;
	}, false, file, line);
	return arg.out;
}
#endif

/* By exchange with the lane 16, 8, 4, 2, 1 away; every lane gets the same bits. In a maximum NaN counts
 * as less than any number. */
#ifdef __CUDACC__
GPU_FN float warp_sum(float v)
{
	GPU_UNROLL
	for (unsigned lanes = 16; lanes; lanes /= 2)
		v += shuffle_xor(v, lanes);
	return v;
}

GPU_FN float warp_max(float v)
{
	GPU_UNROLL
	for (unsigned lanes = 16; lanes; lanes /= 2)
		v = fmaxf(v, shuffle_xor(v, lanes));
	return v;
}
#else
template <float (*JOIN)(float, float)>
static void exchange_all(float **lanes)
{
	for (unsigned step = 16; step; step /= 2) {
		float v[32];

		for (unsigned i = 0; i < 32; i++)
			v[i] = JOIN(*lanes[i], *lanes[i ^ step]);
		for (unsigned i = 0; i < 32; i++)
			*lanes[i] = v[i];
	}
}

GPU_FN float add(float a, float b) { return a + b; }
GPU_FN float larger(float a, float b) { return fmaxf(a, b); }

GPU_FN float warp_sum(float v GPU_PLACE)
{
	emu::meet_as<float>(~0u, "warp_sum", &v, exchange_all<add>, false, file, line);
	return v;
}

GPU_FN float warp_max(float v GPU_PLACE)
{
	emu::meet_as<float>(~0u, "warp_max", &v, exchange_all<larger>, false, file, line);
	return v;
}
#endif

/* ---- numbers ---- */
struct bf16 {
	uint16_t bits;
};
struct f16 {
	uint16_t bits;
};
struct fp8 { /* e4m3: no infinity, NaN is 0x7f and 0xff */
	uint8_t bits;
};
struct alignas(16) vec16 { /* one access of 16 bytes */
	uint32_t words[4];
};
struct alignas(8) vec8 {
	uint32_t words[2];
};
struct alignas(16) float4_ {
	float v[4];
};

GPU_BOTH float float_of_bits(uint32_t bits)
{
	float f;

	memcpy(&f, &bits, sizeof(f));
	return f;
}

GPU_BOTH uint32_t bits_of(float f)
{
	uint32_t bits;

	memcpy(&bits, &f, sizeof(bits));
	return bits;
}

GPU_BOTH float to_float(float x) { return x; }
GPU_BOTH float to_float(bf16 x) { return float_of_bits((uint32_t)x.bits << 16); }

/* Denormals by a product, which is exact. */
GPU_BOTH float to_float(f16 x)
{
	uint32_t magnitude = x.bits & 0x7fff, sign = (uint32_t)(x.bits & 0x8000) << 16;

	if (magnitude >= 0x7c00)
		return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
	return float_of_bits(bits_of(float_of_bits(magnitude << 13) * 0x1p112f) | sign);
}

GPU_BOTH float to_float(fp8 x)
{
	uint32_t magnitude = x.bits & 0x7f, sign = (uint32_t)(x.bits & 0x80) << 24;

	if (magnitude == 0x7f)
		return float_of_bits(sign | 0x7fc00000);
	return float_of_bits(bits_of(float_of_bits(magnitude << 20) * 0x1p120f) | sign);
}

GPU_BOTH float round_to(float, float x) { return x; }

GPU_BOTH bf16 round_to(bf16, float x)
{
	uint32_t bits = bits_of(x);

	if ((bits & 0x7fffffff) > 0x7f800000)
		return { (uint16_t)(bits >> 16 | 0x40) };
	return { (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) };
}

/* Nearest even by the float adder itself: adding a number whose last bit is the last of the result.
 */
GPU_BOTH f16 round_to(f16, float x)
{
	uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;

	if (magnitude > 0x7f800000)
		return { (uint16_t)(sign | 0x7e00) };
	if (magnitude >= 0x477ff000) /* 65520, the tie above the largest */
		return { (uint16_t)(sign | 0x7c00) };
	if (magnitude < 0x38800000) /* denormal in f16 */
		return { (uint16_t)(sign | (bits_of(float_of_bits(magnitude) + 0.5f) - 0x3f000000)) };
	magnitude += 0xfff + (magnitude >> 13 & 1);
	return { (uint16_t)(sign | ((magnitude >> 13) - (112 << 10))) };
}

/* What is larger than 448 becomes 448. */
GPU_BOTH fp8 round_to(fp8, float x)
{
	uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = bits >> 24 & 0x80;

	if (magnitude > 0x7f800000)
		return { (uint8_t)(sign | 0x7f) };
	if (magnitude >= 0x43e00000)
		return { (uint8_t)(sign | 0x7e) };
	if (magnitude < 0x3c800000) /* below 2^-6: multiples of 2^-9 */
		return { (uint8_t)(sign |
			(bits_of(float_of_bits(magnitude) + 0x1p14f) - bits_of(0x1p14f))) };
	magnitude += 0x7ffff + (magnitude >> 20 & 1);
	return { (uint8_t)(sign | ((magnitude >> 20) - (120 << 3))) };
}

/* Nearest even; f16 overflows to infinity, e4m3 to 448. */
template <class T> GPU_BOTH T from_float(float x) { return round_to(T{}, x); }

/* Two numbers of 16 bits in a word, the first one low. */
#ifdef __CUDACC__
GPU_FN uint32_t pack_as(bf16, float low, float high)
{
	uint32_t r;

	asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
	return r;
}
GPU_FN uint32_t pack_as(f16, float low, float high)
{
	uint32_t r;

	asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
	return r;
}
template <class T> GPU_FN uint32_t pack2(float low, float high) { return pack_as(T{}, low, high); }
#else
template <class T> GPU_FN uint32_t pack2(float low, float high)
{
	return from_float<T>(low).bits | (uint32_t)from_float<T>(high).bits << 16;
}
#endif

/* Two e4m3 in the low half of a word to two f16; exact, NaN stays NaN. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
GPU_FN uint32_t f16x2_of_fp8x2(uint32_t pair)
{
	uint32_t r;
	uint16_t two = (uint16_t)pair;

	asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(two));
	return r;
}
#else
GPU_FN uint32_t f16x2_of_fp8x2(uint32_t pair)
{
	fp8 low = { (uint8_t)pair }, high = { (uint8_t)(pair >> 8) };

	return pack2<f16>(to_float(low), to_float(high));
}
#endif

/* a b, rounded on its own: never fused with an addition, so that two kernels give the same bits. */
#ifdef __CUDACC__
GPU_FN float multiply(float a, float b) { return __fmul_rn(a, b); }
#else
GPU_FN float multiply(float a, float b) { return a * b; }
#endif

#ifdef __CUDACC__
GPU_FN unsigned count_bits(unsigned bits) { return (unsigned)__popc(bits); }
#else
GPU_FN unsigned count_bits(unsigned bits) { return (unsigned)__builtin_popcount(bits); }
#endif
/* A product that no addition is fused into. */
#ifdef __CUDACC__
GPU_FN float times(float a, float b) { return __fmul_rn(a, b); }
#else
GPU_FN float times(float a, float b) { return a * b; }
#endif
GPU_FN bool is_finite(float x) { return (bits_of(x) & 0x7f800000) != 0x7f800000; }
GPU_BOTH unsigned least(unsigned a, unsigned b) { return a < b ? a : b; }
GPU_BOTH size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

/* ---- the device's clock, which counts nanoseconds in coarse steps ---- */
#ifdef __CUDACC__
GPU_FN uint64_t now_ns(void)
{
	uint64_t now;

	asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
	return now;
}
#else
GPU_FN uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
#endif

/* ---- words that the host looks at ---- */
#ifdef __CUDACC__
GPU_FN void store_release_system(uint64_t *p, uint64_t v)
{
	asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
#else
GPU_FN void store_release_system(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}
#endif

/* ---- integers in shared memory to which several threads add, in any order ---- */
#ifdef __CUDACC__
GPU_FN void add_shared(uint64_t *p, uint64_t v)
{
	atomicAdd((unsigned long long *)p, (unsigned long long)v);
}
#else
GPU_FN void add_shared(uint64_t *p, uint64_t v) { __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
#endif

/* ---- a word of device memory to which blocks add; returns what stood there. What a thread (and, before
 * a barrier, its block) wrote is there for whoever adds later, and its barrier's block ---- */
#ifdef __CUDACC__
GPU_FN uint32_t add_ordered(uint32_t *p, uint32_t v)
{
	uint32_t before;

	asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
		     : "=r"(before) : "l"(p), "r"(v) : "memory");
	return before;
}
#else
GPU_FN uint32_t add_ordered(uint32_t *p, uint32_t v)
{
	return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
#endif

/* ---- a stream of 16 bytes that is read once ---- */
#ifdef __CUDACC__
GPU_FN vec16 load_once(const void *p)
{
	vec16 v;

	asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
		     : "=r"(v.words[0]), "=r"(v.words[1]), "=r"(v.words[2]), "=r"(v.words[3])
		     : "l"(p));
	return v;
}
#else
GPU_FN vec16 load_once(const void *p GPU_PLACE)
{
	emu::need_aligned(p, 16, "a load of 16 bytes", file, line);
	return *(const vec16 *)p;
}
#endif

/* ---- asynchronous copies of 16 bytes: `bytes` of them are read, the rest is zeros ---- */
#ifdef __CUDACC__
GPU_FN unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
GPU_FN void copy_async(void *dst, const void *src, unsigned bytes)
{
	asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)),
		"l"(src), "r"(bytes)
		: "memory");
}
GPU_FN void copy_commit(void) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int KEEP> GPU_FN void copy_wait(void)
{
	asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
}
#else
GPU_FN void copy_async(void *dst, const void *src, unsigned bytes GPU_PLACE)
{
	emu::copy_async16(dst, src, bytes, file, line);
}
GPU_FN void copy_commit(void) { emu::copy_commit(); }
template <int KEEP> GPU_FN void copy_wait(void) { emu::copy_wait(KEEP); }
#endif

/* ---- ldmatrix: four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
 * r[m] of lane l: row l / 4, columns 2 (l % 4) and the next of matrix m; TRANSPOSED: row and column
 * change places ---- */
#ifdef __CUDACC__
template <bool TRANSPOSED> GPU_FN void load_matrices(uint32_t (&r)[4], const void *row)
{
	if (TRANSPOSED)
		asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
			     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
			     : "r"(shared_address(row))
			     : "memory");
	else
		asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
			     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
			     : "r"(shared_address(row))
			     : "memory");
}
#else
template <bool TRANSPOSED> GPU_FN void load_matrices(uint32_t (&r)[4], const void *row GPU_PLACE)
{
	struct Arg {
		const void *row;
		uint16_t numbers[8];
		uint32_t out[4];
	} arg;

	emu::need_aligned(row, 16, "ldmatrix: row", file, line);
	arg.row = row;
	memcpy(arg.numbers, row, 16); /* the lane's own access */
	emu::meet_as<Arg>(~0u, TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", &arg, [](Arg **lanes) {
		for (int m = 0; m < 4; m++) {
			unsigned banks = 0;

			for (int i = 0; i < 8; i++)
				banks |= 1u << ((uintptr_t)lanes[8 * m + i]->row / 16 % 8);
			emu::count_conflicts(8 - (unsigned)__builtin_popcount(banks));
			for (int i = 0; i < 32; i++) {
				for (int half = 0; half < 2; half++) {
					int a = i / 4, b = i % 4 * 2 + half;
					uint32_t number = TRANSPOSED ? lanes[8 * m + b]->numbers[a]
								     : lanes[8 * m + a]->numbers[b];

					lanes[i]->out[m] = half ? lanes[i]->out[m] | number << 16
								: number;
				}
			}
		}
	}, false, file, line);
	memcpy(r, arg.out, sizeof(r));
}
#endif

/* ---- mma m16n8k16, sums in f32: d += a b. With g = lane / 4 and t = lane % 4, pairs (2t, 2t + 1):
 * a[0] A[g][2t], a[1] A[g+8][2t], a[2] A[g][2t+8], a[3] A[g+8][2t+8]; b[0] B[2t][g], b[1] B[2t+8][g];
 * d[0], d[1] D[g][2t], d[2], d[3] D[g+8][2t] ---- */
#ifdef __CUDACC__
#define GPU_MMA(type, word) \
	GPU_FN void mma(type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) \
	{ \
		asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." word "." word \
			     ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
			     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
			     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); \
	}
GPU_MMA(bf16, "bf16")
GPU_MMA(f16, "f16")
#undef GPU_MMA
#else
template <class T>
GPU_FN void mma(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 GPU_PLACE)
{
	struct Arg {
		const uint32_t *a;
		uint32_t b[2];
		float *d;
	} arg = { a, { b0, b1 }, d };

	emu::meet_as<Arg>(~0u, "mma", &arg, [](Arg **lanes) {
		float a[16][16], b[16][8];

		for (int i = 0; i < 64; i++) {
			const Arg *lane = lanes[i / 2];
			int shift = i % 2 * 16, g = i / 8, t = i / 2 % 4 * 2 + i % 2;

			for (int r = 0; r < 4; r++)
				a[g + r % 2 * 8][t + r / 2 * 8] =
					to_float(T{ (uint16_t)(lane->a[r] >> shift) });
			for (int r = 0; r < 2; r++)
				b[t + r * 8][g] = to_float(T{ (uint16_t)(lane->b[r] >> shift) });
		}
		for (int i = 0; i < 32 * 4; i++) {
			int g = i / 16 + i % 4 / 2 * 8, t = i / 4 % 4 * 2 + i % 2;
			float sum = 0;

			for (int k = 0; k < 16; k++)
				sum += a[g][k] * b[k][t];
			lanes[i / 4]->d[i % 4] += sum;
		}
	}, false, file, line);
}
#endif

#endif
