// SPDX-License-Identifier: Apache-2.0
/*
 * The CUDA runtime of the emulator: devices that are this machine, streams that are threads, memory
 * that is the heap's. It lets the module itself run, not a copy of it.
 *
 * AFD_EMU_FAULT makes it a machine with a fault: no_driver, old_driver, no_device, no_image,
 * no_pageable (no GPU reads memory that is not registered), no_register (and none can be),
 * no_gpudirect, no_ordering (of an adapter's writes), no_dmabuf, or
 * launch:N, malloc:N, copy:N, capture:N, graph:N (the N-th of its kind fails). A fault of a launch is
 * sticky, as on a GPU.
 *
 * A captured stream notes what it is given, and a graph runs it again with the arguments that it had.
 * What may not be captured, or is asked of another device's stream, fails as it would there.
 */
#include <atomic>
#include <condition_variable>
#include <deque>
#include <malloc.h>
#include <map>
#include <mutex>
#include <stdio.h>
#include <sys/mman.h>
#include <stdlib.h>
#include <thread>
#include <vector>

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
thread_local unsigned n_capturing; /* streams that this thread captures */
std::atomic<unsigned> n_allocations;
std::atomic<unsigned> n_launches, n_replays; /* of kernels by the host, of graphs */

std::mutex heap_lock;
struct Piece {
	size_t bytes;
	cudaMemoryType type;
	int device; /* -1: the host's */
	bool registered;
};
std::map<const char *, Piece> heap; /* by address */

/* The piece that holds p, or NULL; heap_lock is held. */
Piece *piece_of(const void *p)
{
	auto after = heap.upper_bound((const char *)p);

	if (after == heap.begin())
		return NULL;
	auto piece = std::prev(after);

	return (const char *)p < piece->first + piece->second.bytes ? &piece->second : NULL;
}

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

/* Without a context a thread gets that of device 0, as the runtime does it. */
Context *need_context(void)
{
	if (!current)
		current = &contexts[0];
	return current;
}

void *take(size_t bytes, cudaMemoryType type)
{
	void *memory = bytes >> 46 ? NULL : memalign(256, bytes);
	int device = need_context()->device;

	n_allocations++;
	if (memory) {
		memset(memory, 0xff, bytes < POISON_MAX ? bytes : POISON_MAX);
		std::lock_guard<std::mutex> held(heap_lock);
		heap[(const char *)memory] = { bytes, type,
			type == cudaMemoryTypeDevice ? device : -1, false };
	}
	return memory;
}

cudaError_t give(void *memory)
{
	if (!memory)
		return cudaSuccess;
	{
		std::lock_guard<std::mutex> held(heap_lock);
		auto piece = heap.find((const char *)memory);

		if (piece == heap.end() || piece->second.registered)
			return cudaErrorInvalidValue;
		heap.erase(piece);
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
	std::vector<std::function<cudaError_t()>> captured;
	cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
	int device;
	cudaError_t error = cudaSuccess; /* sticky */
	bool busy = false, stop = false;
	std::thread worker;

	explicit emu_stream(int of) : device(of), worker([this] { work(); }) {}

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

		if (need_context()->device != device)
			return cudaErrorInvalidResourceHandle;
		if (capture == cudaStreamCaptureStatusInvalidated)
			return cudaErrorStreamCaptureInvalidated;
		if (capture == cudaStreamCaptureStatusActive) {
			captured.push_back(std::move(f));
			return cudaSuccess;
		}
		changed.wait(held, [this] { return pending.size() < PENDING_MAX; });
		if (error)
			return error;
		pending.push_back(std::move(f));
		changed.notify_all();
		return cudaSuccess;
	}
};

struct emu_graph {
	std::vector<std::function<cudaError_t()>> nodes;
};

struct emu_graph_exec {
	std::vector<std::function<cudaError_t()>> nodes;
};

namespace emu {

int enqueue(cudaStream_t stream, const char *name, Index grid, unsigned n_threads,
	size_t shared_bytes, std::function<void()> body)
{
	static int n_calls;

	if (machine_is("no_image"))
		return cudaErrorNoKernelImageForDevice;
	bool fails = faulty("launch", &n_calls);

	n_launches++;
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

/* -1: not memory of a device. */
EMU_API int emu_device_of(const void *memory)
{
	std::lock_guard<std::mutex> held(heap_lock);
	Piece *piece = piece_of(memory);

	return piece ? piece->device : -1;
}

EMU_API unsigned emu_n_registered(void)
{
	std::lock_guard<std::mutex> held(heap_lock);
	unsigned n = 0;

	for (const auto &piece : heap)
		n += piece.second.registered;
	return n;
}

EMU_API unsigned emu_n_launches(void)
{
	return n_launches;
}

EMU_API unsigned emu_n_replays(void)
{
	return n_replays;
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
		*value = !machine_is("no_pageable") && !machine_is("no_register");
		return cudaSuccess;
	case cudaDevAttrCanUseHostPointerForRegisteredMem:
		*value = 1;
		return cudaSuccess;
	case cudaDevAttrGPUDirectRDMASupported:
		*value = !machine_is("no_gpudirect");
		return cudaSuccess;
	case cudaDevAttrGPUDirectRDMAWritesOrdering:
		*value = machine_is("no_ordering") ? cudaGPUDirectRDMAWritesOrderingNone
						   : cudaGPUDirectRDMAWritesOrderingOwner;
		return cudaSuccess;
	}
	return cudaErrorInvalidValue;
}

/* A descriptor of memory that is not the range's: the heap has none of its own. */
static int range_handle(void *handle, unsigned long long memory, size_t bytes, int type,
	unsigned long long flags)
{
	const int invalid_value = 1;

	if (type != 1 || flags || memory % 4096 || bytes % 4096)
		return invalid_value;
	*(int *)handle = memfd_create("emu", MFD_CLOEXEC);
	return 0;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
	unsigned long long flags, cudaDriverEntryPointQueryResult *status)
{
	*function = !strcmp(symbol, "cuCtxGetCurrent")	 ? (void *)context_get
		    : !strcmp(symbol, "cuCtxSetCurrent") ? (void *)context_set
		    : !strcmp(symbol, "cuMemGetHandleForAddressRange") && !machine_is("no_dmabuf")
			    ? (void *)range_handle
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
	case cudaErrorStreamCaptureUnsupported:
		return "cudaErrorStreamCaptureUnsupported";
	case cudaErrorStreamCaptureInvalidated:
		return "cudaErrorStreamCaptureInvalidated";
	case cudaErrorNotSupported:
		return "cudaErrorNotSupported";
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

	*memory = NULL;
	if (n_capturing)
		return cudaErrorStreamCaptureUnsupported;
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

	*memory = NULL;
	if (n_capturing)
		return cudaErrorStreamCaptureUnsupported;
	*memory = faulty("host", &n_calls) ? NULL : take(bytes, cudaMemoryTypeHost);
	return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void *memory)
{
	return give(memory);
}

cudaError_t cudaHostRegister(void *memory, size_t bytes, unsigned flags)
{
	static int n_calls;
	const char *begin = (const char *)memory;

	need_context();
	if (machine_is("no_register") || faulty("register", &n_calls))
		return cudaErrorNotSupported;
	std::lock_guard<std::mutex> held(heap_lock);
	auto next = heap.lower_bound(begin);

	if (!memory || !bytes)
		return cudaErrorInvalidValue;
	if (piece_of(begin) || (next != heap.end() && next->first < begin + bytes))
		return cudaErrorHostMemoryAlreadyRegistered;
	heap[begin] = { bytes, cudaMemoryTypeHost, -1, true };
	return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *memory)
{
	std::lock_guard<std::mutex> held(heap_lock);
	auto piece = heap.find((const char *)memory);

	if (piece == heap.end() || !piece->second.registered)
		return cudaErrorHostMemoryNotRegistered;
	heap.erase(piece);
	return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *p)
{
	std::lock_guard<std::mutex> held(heap_lock);
	const Piece *piece = piece_of(p);

	*attributes = {};
	attributes->type = piece ? piece->type : cudaMemoryTypeUnregistered;
	attributes->device = piece && piece->device > 0 ? piece->device : 0;
	attributes->devicePointer = attributes->hostPointer = (void *)p;
	return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
	*stream = new emu_stream(need_context()->device);
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

	if (stream->capture) {
		stream->capture = cudaStreamCaptureStatusInvalidated;
		return cudaErrorStreamCaptureUnsupported;
	}
	return stream->error				 ? stream->error
	       : stream->busy || !stream->pending.empty() ? cudaErrorNotReady
							   : cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
	std::unique_lock<std::mutex> held(stream->lock);

	if (stream->capture) {
		stream->capture = cudaStreamCaptureStatusInvalidated;
		return cudaErrorStreamCaptureUnsupported;
	}
	stream->changed.wait(held, [=] { return !stream->busy && stream->pending.empty(); });
	return stream->error;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device)
{
	*device = stream->device;
	return cudaSuccess;
}

/* ---- graphs ---- */

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
	std::lock_guard<std::mutex> held(stream->lock);

	*status = stream->capture;
	return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
	std::lock_guard<std::mutex> held(stream->lock);

	if (stream->capture)
		return cudaErrorStreamCaptureUnsupported;
	stream->capture = cudaStreamCaptureStatusActive;
	n_capturing++;
	return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
	static int n_calls;
	std::lock_guard<std::mutex> held(stream->lock);
	bool valid = stream->capture == cudaStreamCaptureStatusActive;

	*graph = NULL;
	if (!stream->capture)
		return cudaErrorInvalidValue;
	n_capturing--;
	stream->capture = cudaStreamCaptureStatusNone;
	if (valid && !faulty("capture", &n_calls))
		*graph = new emu_graph{ std::move(stream->captured) };
	stream->captured.clear();
	return *graph ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags)
{
	static int n_calls;

	*exec = faulty("graph", &n_calls) ? NULL : new emu_graph_exec{ graph->nodes };
	n_allocations++;
	return *exec ? cudaSuccess : cudaErrorNotSupported;
}

/* The nodes are those of the graph until it is destroyed, which the caller does after it has run. */
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream)
{
	n_replays++;
	return stream->push([=]() -> cudaError_t {
		cudaError_t rc = cudaSuccess;

		for (size_t i = 0; !rc && i < exec->nodes.size(); i++)
			rc = exec->nodes[i]();
		return rc;
	});
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
	delete graph;
	return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec)
{
	delete exec;
	return cudaSuccess;
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

/* For libraries beside the module, whose work is their own. */
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*f)(void *), void *arg)
{
	return stream->push([=]() -> cudaError_t {
		f(arg);
		return cudaSuccess;
	});
}

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream)
{
	return stream->push([=]() -> cudaError_t {
		memset(memory, value, bytes);
		return cudaSuccess;
	});
}

} // extern "C"
