/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The CUDA module on the emulator's runtime: what it says of machines that cannot, which errors
 * stay, whose context is current, and that a queue in use allocates nothing. What all devices
 * promise stands in the other tests of this folder.
 */
#include "rig.h"

#include <dlfcn.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* Opens a device of a machine with this fault; *out is NULL when it cannot. */
static int open_faulty(struct rig *r, const char *fault, const char *name, struct afd__device **out)
{
	int rc;

	*out = NULL;
	setenv("AFD_EMU_FAULT", fault, 1);
	rc = afd__device_open(out, r->ctx, name);
	unsetenv("AFD_EMU_FAULT");
	return rc;
}

static void machines_that_cannot_are_told_apart(void **state)
{
	const struct {
		const char *fault, *name, *word;
	} bad[] = {
		{ "no_driver", "cuda:0", "cuda:0: no driver" },
		{ "old_driver", "cuda:0", "driver too old: it is for CUDA 12.2, this module needs 13.0" },
		{ "no_device", "cuda", "no device" },
		{ "old_gpu", "cuda:1", "compute capability 7.5, limit 8.0" },
		{ "none", "cuda:2", "number 2, this machine has 2" },
	};
	struct afd__device *dev;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		int rc = open_faulty(*state, bad[i].fault, bad[i].name, &dev);

		if (rc != -ENODEV || dev || !strstr(afd_last_error(), bad[i].word))
			fail_msg("%s: %d, \"%s\"", bad[i].fault, rc, afd_last_error());
	}
}

static void memory_for_an_adapter_is_given_by_a_gpu_that_orders_its_writes(void **state)
{
	const struct {
		const char *fault;
		int dmabuf, peer;
		const char *word;
	} cases[] = {
		{ "none", 0, 0, "" },
		{ "no_dmabuf", -ENOTSUP, 0, "the driver has no cuMemGetHandleForAddressRange" },
		{ "no_gpudirect", -ENOTSUP, -ENOTSUP, "has no GPUDirect RDMA" },
		{ "no_ordering", -ENOTSUP, -ENOTSUP, "ordering is 0, must be 100" },
	};
	struct rig *r = *state;
	void *block, *page, *address;
	uint64_t offset = 7;

	assert_int_equal(afd__device_alloc(r->dev, 3 * 4096, "a test", &block), 0);
	page = (void *)(((uintptr_t)block + 4095) & ~(uintptr_t)4095);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		int fd = -1;

		setenv("AFD_EMU_FAULT", cases[i].fault, 1);
		assert_int_equal(afd__device_peer_address(r->dev, page, 8192, &address), cases[i].peer);
		assert_int_equal(afd__device_dmabuf(r->dev, page, 8192, &fd, &offset), cases[i].dmabuf);
		unsetenv("AFD_EMU_FAULT");
		if (cases[i].dmabuf)
			assert_non_null(strstr(afd_last_error(), cases[i].word));
		else
			assert_int_equal(close(fd), 0);
		assert_ptr_equal(address, page);
		assert_int_equal(offset, 0);
	}
	afd__device_free(r->dev, block, 3 * 4096);
}

static void a_gpu_without_code_for_it_is_named_at_the_first_launch(void **state)
{
	struct rig *r = *state;
	uint64_t ticket;

	setenv("AFD_EMU_FAULT", "no_image", 1);
	assert_int_equal(afd__queue_ticket(&r->q, &ticket), -ENODEV);
	unsetenv("AFD_EMU_FAULT");
	assert_non_null(strstr(afd_last_error(), "cudaErrorNoKernelImageForDevice"));
}

/* Faults count from the first call of the process, so each has a process of its own. */
static void in_a_child(void (*body)(void))
{
	pid_t child = fork();
	int status;

	if (!child) {
		body();
		_exit(0);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
}

static int copy_until_it_fails(struct rig *r, float *dev)
{
	struct afd__copy_args copy = { .dst = dev + 16, .src = dev, .bytes = 64 };
	uint64_t ticket;
	int rc = 0;

	for (int i = 0; !rc && i < 100; i++) {
		rc = afd__copy(&r->q, &copy);
		if (!rc)
			rc = afd__queue_ticket(&r->q, &ticket);
		if (!rc)
			rc = afd__queue_wait(&r->q, ticket, 0, "a copy");
	}
	return rc;
}

static void fail_a_copy(void)
{
	struct rig *r;
	uint64_t ticket;
	void *dev;

	setenv("AFD_EMU_FAULT", "copy:5", 1);
	r = rig_make(1);
	RIG_OK(afd__device_alloc(r->dev, 256, "memory", &dev));
	assert_int_equal(copy_until_it_fails(r, dev), -EIO);
	assert_non_null(strstr(afd_last_error(), "cudaErrorLaunchFailure"));
	afd__error(-EINVAL, "something else");
	assert_int_equal(afd__queue_ticket(&r->q, &ticket), -EIO);
	assert_non_null(strstr(afd_last_error(), "cudaErrorLaunchFailure"));
	afd__device_free(r->dev, dev, 256);
	rig_end(r);
}

static void an_operation_that_fails_later_breaks_the_queue_for_good(void **state)
{
	in_a_child(fail_a_copy);
}

static void fail_allocations(void)
{
	struct rig *r = rig_make(1);
	const char *const kinds[] = { "malloc:%d", "host:%d" };
	char fault[16];
	struct afd__queue q;
	int n_failed = 0;

	/* The rig's queue took some of each; those of the next one fail in turn. */
	for (int i = 0; i < 20; i++) {
		snprintf(fault, sizeof(fault), kinds[i % 2], 1 + i / 2);
		setenv("AFD_EMU_FAULT", fault, 1);
		if (!afd__queue_open(&q, r->dev)) {
			afd__queue_close(&q);
			continue;
		}
		n_failed++;
		assert_non_null(strstr(afd_last_error(), "cudaErrorMemoryAllocation"));
	}
	unsetenv("AFD_EMU_FAULT");
	assert_true(n_failed > 0);
	rig_end(r);
}

static void a_queue_that_cannot_be_made_leaves_nothing(void **state)
{
	in_a_child(fail_allocations);
}

/* ---- contexts and devices ---- */

struct emu {
	void *(*context)(void);
	void (*set_context)(int device);
	unsigned (*n_allocations)(void);
};

static struct emu emu_of_module(void)
{
	char path[1024];
	void *module;
	struct emu e;

	snprintf(path, sizeof(path), "%s/afd-cuda.so", getenv("AFD_MODULE_DIR"));
	module = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
	assert_non_null(module);
	*(void **)&e.context = dlsym(module, "emu_context");
	*(void **)&e.set_context = dlsym(module, "emu_set_context");
	*(void **)&e.n_allocations = dlsym(module, "emu_n_allocations");
	assert_true(e.context && e.set_context && e.n_allocations);
	dlclose(module);
	return e;
}

static void use(struct rig *r)
{
	float x[40], got[40];
	struct afd__norm_args a;

	rig_fill(r, x, 40, 1);
	a = (struct afd__norm_args){
		.h = rig_input(r, x, sizeof(x)), .n_rows = 1, .width = 40 };
	a.add = rig_input(r, x, sizeof(x));
	RIG_OK(afd__norm(&r->q, &a));
	rig_fetch(r, got, a.h, sizeof(got));
	for (int i = 0; i < 40; i++)
		assert_true(got[i] == 2 * x[i]);
}

static void the_callers_context_stays(void **state)
{
	struct emu e = emu_of_module();

	for (int device = -1; device < 2; device++) {
		void *before;
		struct rig *r;

		e.set_context(device);
		before = e.context();
		r = rig_make(1);
		assert_ptr_equal(e.context(), before);
		use(r);
		assert_ptr_equal(e.context(), before);
		rig_end(r);
		assert_ptr_equal(e.context(), before);
	}
	e.set_context(-1);
}

static void two_devices_work_side_by_side(void **state)
{
	struct rig *r = *state, other = { .random = 7, .ctx = r->ctx };

	RIG_OK(afd__device_open(&other.dev, r->ctx, "cuda:1"));
	RIG_OK(afd__queue_open(&other.q, other.dev));
	for (int i = 0; i < 3; i++) {
		use(r);
		use(&other);
	}
	afd__queue_close(&other.q);
	for (unsigned i = 0; i < other.n_memory; i++)
		afd__device_free(other.dev, other.memory[i].base, 0);
	afd__device_close(other.dev);
}

/* ---- queues ---- */

static void the_descriptor_wakes_who_sleeps_on_it(void **state)
{
	struct rig *r = *state;
	struct pollfd watch = { .fd = r->q.fd, .events = POLLIN };
	float *x = rig_output(r, 4 << 20);
	struct afd__activation_args a = {
		.gate_up = x, .out = x, .n_rows = 1, .width = 1 << 19
	};
	uint64_t ticket;
	int rc, n_sleeps = 0;

	assert_true(watch.fd >= 0);
	for (int i = 0; i < 3; i++)
		RIG_OK(afd__activation(&r->q, &a));
	RIG_OK(afd__queue_ticket(&r->q, &ticket));
	while (!(rc = afd__queue_reached(&r->q, ticket))) {
		assert_int_equal(poll(&watch, 1, 5000), 1);
		n_sleeps++;
	}
	assert_int_equal(rc, 1);
	assert_true(n_sleeps > 0);
}

/* More than the rings hold, with targets on the way that wait for their ticket. */
static void long_transfers_arrive_whole(void **state)
{
	enum { BYTES = 40 << 20 };
	struct rig *r = *state;
	unsigned *there = malloc(BYTES), *back = calloc(1, BYTES);
	uint64_t ticket;
	void *dev;

	for (unsigned i = 0; i < BYTES / 4; i++)
		there[i] = i * 2654435761u;
	RIG_OK(afd__device_alloc(r->dev, BYTES, "memory", &dev));
	RIG_OK(afd__queue_upload(&r->q, dev, there, BYTES));
	RIG_OK(afd__queue_download(&r->q, back, dev, BYTES));
	RIG_OK(afd__queue_ticket(&r->q, &ticket));
	RIG_OK(afd__queue_wait(&r->q, ticket, 0, "a transfer"));
	assert_memory_equal(there, back, BYTES);
	afd__device_free(r->dev, dev, BYTES);
	free(there);
	free(back);
}

static void a_queue_in_use_allocates_nothing(void **state)
{
	struct rig *r = *state;
	struct emu e = emu_of_module();
	float x[64] = { 0 };
	float *dev = rig_output(r, sizeof(x));
	uint64_t ticket, n_library;
	unsigned n_module;

	use(r);
	n_module = e.n_allocations();
	n_library = atomic_load(&r->ctx->n_allocations);
	for (int i = 0; i < 300; i++) {
		RIG_OK(afd__queue_upload(&r->q, dev, x, sizeof(x)));
		RIG_OK(afd__queue_download(&r->q, x, dev, sizeof(x)));
		RIG_OK(afd__queue_ticket(&r->q, &ticket));
	}
	RIG_OK(afd__queue_wait(&r->q, ticket, 0, "transfers"));
	assert_int_equal(e.n_allocations(), n_module);
	assert_int_equal(atomic_load(&r->ctx->n_allocations), n_library);
}

/* ---- recordings ---- */

static void what_depends_on_the_host_cannot_be_recorded_and_the_rest_is_replayed(void **state)
{
	struct rig *r = *state;
	float x[40], got[40];
	struct afd__graph *graph;
	uint64_t ticket;
	struct afd__norm_args a = { .n_rows = 1, .width = 40 };

	rig_fill(r, x, 40, 1);
	a.h = rig_input(r, x, sizeof(x));
	a.add = rig_input(r, x, sizeof(x));
	RIG_OK(afd__queue_record(&r->q));
	RIG_OK(afd__norm(&r->q, &a));
	assert_int_equal(afd__queue_upload(&r->q, a.h, x, sizeof(x)), -ENOTSUP);
	assert_int_equal(afd__queue_download(&r->q, got, a.h, sizeof(x)), -ENOTSUP);
	assert_int_equal(afd__queue_ticket(&r->q, &ticket), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "a ticket cannot be recorded"));
	RIG_OK(afd__queue_recorded(&r->q, &graph));
	rig_fetch(r, got, a.h, sizeof(got));
	assert_memory_equal(got, x, sizeof(x));
	RIG_OK(afd__queue_replay(&r->q, graph));
	RIG_OK(afd__queue_replay(&r->q, graph));
	rig_fetch(r, got, a.h, sizeof(got));
	for (int i = 0; i < 40; i++)
		assert_true(got[i] == x[i] + x[i] + x[i]);
	afd__graph_free(r->dev, graph);
}

/* ---- slots out of reach ---- */

enum { SLOT_ROWS = 5, SLOT_WIDTH = 33, SLOT_STRIDE = 40 };

/* Rows that an index picks, to a slot and back; rows of a slot lie apart or close together. */
static void bounce(struct rig *r, size_t stride)
{
	static const int32_t index[SLOT_ROWS] = { 4, 0, 3, 1, 2 };
	float x[SLOT_ROWS * SLOT_WIDTH], got[SLOT_ROWS * SLOT_WIDTH];
	uint16_t slot[SLOT_ROWS * SLOT_STRIDE];
	struct afd__convert_args out = { .n_rows = SLOT_ROWS,
		.width = SLOT_WIDTH,
		.src_stride = SLOT_WIDTH * 4,
		.dst_stride = stride * 2,
		.dst = slot,
		.src_dtype = AFD_DTYPE_F32,
		.dst_dtype = AFD_DTYPE_BF16 };
	struct afd__convert_args in = { .n_rows = SLOT_ROWS,
		.width = SLOT_WIDTH,
		.src_stride = stride * 2,
		.dst_stride = SLOT_WIDTH * 4,
		.src = slot,
		.src_dtype = AFD_DTYPE_BF16,
		.dst_dtype = AFD_DTYPE_F32,
		.accumulate = 1,
		.scatter = 1 };

	rig_fill(r, x, SLOT_ROWS * SLOT_WIDTH, 1);
	memset(slot, 0x77, sizeof(slot));
	out.src = rig_input(r, x, sizeof(x));
	out.index = in.index = rig_input(r, index, sizeof(index));
	RIG_OK(afd__convert(&r->q, &out));
	rig_fetch(r, got, out.src, sizeof(got)); /* a ticket: the slot is written */
	memset(got, 0, sizeof(got));
	in.dst = rig_input(r, got, sizeof(got));
	RIG_OK(afd__convert(&r->q, &in));
	rig_fetch(r, got, in.dst, sizeof(got));
	for (size_t i = 0; i < SLOT_ROWS; i++) {
		for (size_t c = 0; c < SLOT_WIDTH; c++) {
			size_t at = (size_t)index[i] * SLOT_WIDTH + c;
			uint16_t want;

			rig_encode(&want, 0, AFD_DTYPE_BF16, x[at]);
			assert_int_equal(slot[i * stride + c], want);
			assert_true(got[at] == (float)rig_decode(&want, 0, AFD_DTYPE_BF16));
		}
		for (size_t c = SLOT_WIDTH; c < stride; c++)
			assert_int_equal(slot[i * stride + c], 0x7777);
	}
	in.scatter = in.accumulate = 0;
	assert_int_equal(afd__convert(&r->q, &in), -ENOTSUP);
	assert_non_null(strstr(afd_last_error(), "host memory that this GPU cannot read"));
}

static void rows_of_slots_that_a_gpu_cannot_reach_bounce(void **state)
{
	struct rig *r;

	setenv("AFD_EMU_FAULT", "no_register", 1);
	r = rig_make(1);
	bounce(r, SLOT_WIDTH);
	bounce(r, SLOT_STRIDE);
	unsetenv("AFD_EMU_FAULT");
	rig_end(r);
}

static void a_child_of_fork_closes_and_may_do_nothing_else(void **state)
{
	struct rig *r = rig_make(1);
	pid_t child = fork();
	uint64_t ticket;
	int status;

	if (!child) {
		int rc = afd__queue_ticket(&r->q, &ticket);

		alarm(20);
		afd__queue_close(&r->q);
		afd__device_close(r->dev);
		_exit(rc == -EINVAL ? 0 : 1);
	}
	assert_int_equal(waitpid(child, &status, 0), child);
	assert_int_equal(status, 0);
	rig_end(r);
}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		RIG_TEST(machines_that_cannot_are_told_apart),
		RIG_TEST(memory_for_an_adapter_is_given_by_a_gpu_that_orders_its_writes),
		RIG_TEST(a_gpu_without_code_for_it_is_named_at_the_first_launch),
		RIG_TEST(the_callers_context_stays),
		RIG_TEST(two_devices_work_side_by_side),
		RIG_TEST(the_descriptor_wakes_who_sleeps_on_it),
		RIG_TEST(long_transfers_arrive_whole),
		RIG_TEST(a_queue_in_use_allocates_nothing),
		RIG_TEST(what_depends_on_the_host_cannot_be_recorded_and_the_rest_is_replayed),
		cmocka_unit_test(rows_of_slots_that_a_gpu_cannot_reach_bounce),
	};
	/* Before this process has a device of its own. */
	const struct CMUnitTest children[] = {
		cmocka_unit_test(an_operation_that_fails_later_breaks_the_queue_for_good),
		cmocka_unit_test(a_queue_that_cannot_be_made_leaves_nothing),
		cmocka_unit_test(a_child_of_fork_closes_and_may_do_nothing_else),
	};
	int status = RIG_RUN(children);

	return status ? status : RIG_RUN(tests);
}
