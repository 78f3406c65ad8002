// SPDX-License-Identifier: Apache-2.0
/*
 * The CUDA runtime of the emulator: devices that are this machine, streams that are threads, memory
 * that is the heap's. It lets the module itself run, not a copy of it.
 *
 * AFD_EMU_FAULT makes it a machine with a fault: no_driver, old_driver, no_device, no_image, or
 * launch:N, malloc:N, copy:N (the N-th of its kind fails). A fault of a launch is sticky, as on a
 * GPU.
 */
#include <atomic>
#include <condition_variable>
#include <deque>
#include <malloc.h>
#include <map>
#include <mutex>
#include <stdio.h>
#include <stdlib.h>
#include <thread>

#include "emu.h"

namespace {

/* Fresh memory is NaN; of large pieces the beginning, since filling all would take most of the time. */
const size_t POISON_MAX = 1 << 20;
enum { N_DEVICES = 2, PENDING_MAX = 4 };

struct Context {
	int device;
};
Context contexts[N_DEVICES] = { { 0 }, { 1 } };
thread_local Context *current; /* NULL: the thread has none yet */
std::atomic<unsigned> n_allocations;

std::mutex heap_lock;
std::map<const char *, std::pair<size_t, cudaMemoryType>> heap; /* by address */

/* Whether this call is the N-th of "kind:N". */
bool faulty(const char *kind, int *n_calls)
{
	const char *fault = getenv("AFD_EMU_FAULT");
	size_t n = strlen(kind);

	return fault && !strncmp(fault, kind, n) && fault[n] == ':' &&
	       ++*n_calls == atoi(fault + n + 1);
}

bool machine_is(const char *what)
{
	const char *fault = getenv("AFD_EMU_FAULT");

	return fault && !strcmp(fault, what);
}

void *take(size_t bytes, cudaMemoryType type)
{
	void *memory = bytes >> 46 ? NULL : memalign(256, bytes);

	n_allocations++;
	if (memory) {
		memset(memory, 0xff, bytes < POISON_MAX ? bytes : POISON_MAX);
		std::lock_guard<std::mutex> held(heap_lock);
		heap[(const char *)memory] = { bytes, type };
	}
	return memory;
}

cudaError_t give(void *memory)
{
	if (!memory)
		return cudaSuccess;
	{
		std::lock_guard<std::mutex> held(heap_lock);
		if (!heap.erase((const char *)memory))
			return cudaErrorInvalidValue;
	}
	free(memory);
	return cudaSuccess;
}

int context_get(void **context)
{
	*context = current;
	return 0;
}

int context_set(void *context)
{
	current = (Context *)context;
	return 0;
}

} // namespace

struct emu_stream {
	std::mutex lock;
	std::condition_variable changed;
	std::deque<std::function<cudaError_t()>> pending;
	cudaError_t error = cudaSuccess; /* sticky */
	bool busy = false, stop = false;
	std::thread worker;

	emu_stream() : worker([this] { work(); }) {}

	~emu_stream()
	{
		{
			std::lock_guard<std::mutex> held(lock);
			stop = true;
		}
		changed.notify_all();
		worker.join();
	}

	void work()
	{
		std::unique_lock<std::mutex> held(lock);

		for (;;) {
			changed.wait(held, [this] { return stop || !pending.empty(); });
			if (pending.empty())
				break;
			auto next = std::move(pending.front());

			pending.pop_front();
			busy = true;
			changed.notify_all();
			cudaError_t before = error;
			held.unlock();
			cudaError_t rc = before ? before : next();

			next = nullptr;
			held.lock();
			error = rc;
			busy = false;
			changed.notify_all();
		}
		emu::end_thread();
	}

	/* Like a GPU's, the queue is bounded, and the caller waits for room. */
	cudaError_t push(std::function<cudaError_t()> f)
	{
		std::unique_lock<std::mutex> held(lock);

		changed.wait(held, [this] { return pending.size() < PENDING_MAX; });
		if (error)
			return error;
		pending.push_back(std::move(f));
		changed.notify_all();
		return cudaSuccess;
	}
};

namespace emu {

int enqueue(cudaStream_t stream, const char *name, Index grid, unsigned n_threads,
	size_t shared_bytes, std::function<void()> body)
{
	static int n_calls;

	if (machine_is("no_image"))
		return cudaErrorNoKernelImageForDevice;
	bool fails = faulty("launch", &n_calls);

	return stream->push([=]() -> cudaError_t {
		Launch launch = { name, grid, n_threads, shared_bytes,
			[](void *arg) { (*(std::function<void()> *)arg)(); }, (void *)&body };

		return fails || run(launch) ? cudaErrorLaunchFailure : cudaSuccess;
	});
}

} // namespace emu

extern "C" {

/* For tests: what this thread's context is, and how much was allocated. */
#define EMU_API __attribute__((visibility("default")))
EMU_API void *emu_context(void)
{
	return current;
}

EMU_API void emu_set_context(int device)
{
	current = device < 0 ? NULL : &contexts[device];
}

EMU_API unsigned emu_n_allocations(void)
{
	return n_allocations;
}

cudaError_t cudaDriverGetVersion(int *version)
{
	*version = machine_is("no_driver") ? 0 : machine_is("old_driver") ? 12020 : 13000;
	return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count)
{
	if (machine_is("no_driver") || machine_is("old_driver"))
		return cudaErrorInsufficientDriver; /* the count stays as it was */
	if (machine_is("no_device"))
		return cudaErrorNoDevice;
	*count = N_DEVICES;
	return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
	if (device < 0 || device >= N_DEVICES)
		return cudaErrorInvalidDevice;
	current = &contexts[device];
	return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
	*device = current ? current->device : 0;
	return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
	switch (attribute) {
	case cudaDevAttrMultiProcessorCount:
		*value = 3;
		return cudaSuccess;
	case cudaDevAttrComputeCapabilityMajor:
		*value = machine_is("old_gpu") ? 7 : 9;
		return cudaSuccess;
	case cudaDevAttrComputeCapabilityMinor:
		*value = machine_is("old_gpu") ? 5 : 0;
		return cudaSuccess;
	case cudaDevAttrPageableMemoryAccess:
		*value = !machine_is("no_pageable");
		return cudaSuccess;
	}
	return cudaErrorInvalidValue;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
	unsigned long long flags, cudaDriverEntryPointQueryResult *status)
{
	*function = !strcmp(symbol, "cuCtxGetCurrent")	 ? (void *)context_get
		    : !strcmp(symbol, "cuCtxSetCurrent") ? (void *)context_set
							 : NULL;
	*status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
	return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t error)
{
	switch (error) {
	case cudaErrorMemoryAllocation:
		return "cudaErrorMemoryAllocation";
	case cudaErrorLaunchFailure:
		return "cudaErrorLaunchFailure";
	case cudaErrorNoKernelImageForDevice:
		return "cudaErrorNoKernelImageForDevice";
	default:
		return "cudaErrorOfTheEmulator";
	}
}

const char *cudaGetErrorString(cudaError_t error)
{
	return "as the emulator has it";
}

cudaError_t cudaGetLastError(void)
{
	return cudaSuccess;
}

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
	static int n_calls;

	*memory = faulty("malloc", &n_calls) ? NULL : take(bytes, cudaMemoryTypeDevice);
	return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void *memory)
{
	return give(memory);
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags)
{
	static int n_calls;

	*memory = faulty("host", &n_calls) ? NULL : take(bytes, cudaMemoryTypeHost);
	return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory)
{
	return give(memory);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p)
{
	std::lock_guard<std::mutex> held(heap_lock);
	auto after = heap.upper_bound((const char *)p);

	*attributes = {};
	if (after != heap.begin()) {
		auto piece = std::prev(after);

		if ((const char *)p < piece->first + piece->second.first)
			attributes->type = piece->second.second;
	}
	attributes->devicePointer = attributes->hostPointer = (void *)p;
	return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
	*stream = new emu_stream;
	return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
	delete stream;
	return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
	std::lock_guard<std::mutex> held(stream->lock);

	return stream->error				 ? stream->error
	       : stream->busy || !stream->pending.empty() ? cudaErrorNotReady
							   : cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
	std::unique_lock<std::mutex> held(stream->lock);

	stream->changed.wait(held, [=] { return !stream->busy && stream->pending.empty(); });
	return stream->error;
}

cudaError_t cudaMemcpy2DAsync(void *dst, size_t dst_stride, const void *src, size_t src_stride,
	size_t width, size_t height, cudaMemcpyKind kind, cudaStream_t stream)
{
	static int n_calls;
	bool fails = faulty("copy", &n_calls);

	return stream->push([=]() -> cudaError_t {
		for (size_t i = 0; i < height && !fails; i++)
			memcpy((char *)dst + i * dst_stride, (const char *)src + i * src_stride,
				width);
		return fails ? cudaErrorLaunchFailure : cudaSuccess;
	});
}

cudaError_t cudaMemcpyAsync(
	void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream)
{
	return cudaMemcpy2DAsync(dst, bytes, src, bytes, bytes, 1, kind, stream);
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream)
{
	return stream->push([=]() -> cudaError_t {
		memset(memory, value, bytes);
		return cudaSuccess;
	});
}

} // extern "C"
