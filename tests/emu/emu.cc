// SPDX-License-Identifier: Apache-2.0
/*
 * The scheduler of the emulator (emu.h): fibers, barriers, warp operations, shared memory.
 *
 * Invariant: a fiber leaves the processor only in park() and at its end, so the state here needs no
 * lock. This file is never instrumented for threads: what it reads and writes is no access of the
 * kernel. It uses no templates of the library, whose code might be shared with instrumented files.
 */
#include "emu.h"

#include <malloc.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef EMU_ASAN
#define EMU_ASAN 0
#endif
#ifndef EMU_WITH_TSAN
#define EMU_WITH_TSAN 0
#endif

extern "C" {
void emu_swap(void **save, void *load);
#if EMU_ASAN
void __sanitizer_start_switch_fiber(void **fake_stack, const void *bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void *fake_stack, const void **bottom, size_t *bytes);
void __asan_unpoison_memory_region(const volatile void *p, size_t bytes);
#endif
#if EMU_WITH_TSAN
void *__tsan_get_current_fiber(void);
void *__tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void *fiber);
void __tsan_switch_to_fiber(void *fiber, unsigned flags);
void __tsan_acquire(void *p);
void __tsan_release(void *p);
void AnnotateIgnoreReadsBegin(const char *file, int line);
void AnnotateIgnoreReadsEnd(const char *file, int line);
void AnnotateIgnoreWritesBegin(const char *file, int line);
void AnnotateIgnoreWritesEnd(const char *file, int line);
#endif
}

/* Parks the callee-saved registers on the old stack and takes up those of the new one. */
#if defined(__x86_64__)
__asm__(".text\n.hidden emu_swap\n.globl emu_swap\n.type emu_swap, @function\nemu_swap:\n"
	"	push %rbx\n	push %rbp\n	push %r12\n	push %r13\n	push %r14\n	push %r15\n"
	"	mov %rsp, (%rdi)\n	mov %rsi, %rsp\n"
	"	pop %r15\n	pop %r14\n	pop %r13\n	pop %r12\n	pop %rbp\n	pop %rbx\n"
	"	ret\n.size emu_swap, . - emu_swap\n");
enum { SAVED_REGISTERS = 6 };
#else
#error "write emu_swap for this processor"
#endif

namespace emu {

thread_local Self self;

namespace {

enum { STACK_BYTES = 256 << 10, PAGE_BYTES = 4096, THREADS_MAX = 1024, ARRAYS_MAX = 32 };
enum { SHARED_MAX = 227 << 10 };

/* Clocks of the thread sanitizer stand at addresses: two per barrier, used in turn. */
struct Clocks {
	char at[2];
};

struct Fiber {
	void *stack, *sp, *fake, *tsan;
	const void *bottom;
	size_t bytes;
};

struct Thread {
	unsigned id;
	Fiber *fiber; /* NULL: not begun */
	bool done;
	const char *what, *file; /* where it waits */
	int line;
	unsigned n_copies, n_groups, group_end[GROUPS_MAX];
	Copy copies[COPIES_MAX]; /* of committed groups, oldest first, then of the open one */
};

struct Warp {
	unsigned arrived, mask, phase;
	const char *what, *file;
	int line;
	void *args[32];
	Clocks *clocks;
};

struct State {
	const Launch *launch;
	Thread *threads[THREADS_MAX], *current;
	Warp warps[THREADS_MAX / 32];
	Fiber *idle[THREADS_MAX], host, *running;
	unsigned n_idle, n_runnable, n_done;
	Thread *runnable[THREADS_MAX];
	unsigned arrived, phase; /* at the block's barrier */
	const char *barrier_file;
	int barrier_line;
	Clocks *clocks; /* of the block's barrier, its start and its end */
	struct {
		const void *key;
		void *memory;
	} arrays[ARRAYS_MAX];
	unsigned n_arrays;
	unsigned char *dynamic;
	bool failed;
	uint64_t random;
	enum { FIRST, LAST, RANDOM } order;
	State *next_stuck;
};

thread_local State *state __attribute__((tls_model("initial-exec")));
thread_local State *stuck; /* those whose fibers never ended */

void acquire(void *clock)
{
#if EMU_WITH_TSAN
	__tsan_acquire(clock);
#endif
}

void release(void *clock)
{
#if EMU_WITH_TSAN
	__tsan_release(clock);
#endif
}

/* What is done for a kernel's threads, and is no access of theirs. */
void hide(bool on)
{
#if EMU_WITH_TSAN
	if (on) {
		AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
		AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
	} else {
		AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
		AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
	}
#endif
}

unsigned next_random(unsigned n)
{
	state->random = state->random * 6364136223846793005u + 1442695040888963407u;
	return (unsigned)((state->random >> 33) % n);
}

State *make_state(void)
{
	State *s = (State *)calloc(1, sizeof(State));
	const char *order = getenv("AFD_EMU_ORDER");

	if (!s)
		abort();
	if (order && !strcmp(order, "last"))
		s->order = State::LAST;
	if (order && !strncmp(order, "random", 6))
		s->order = State::RANDOM;
	s->random = order && strchr(order, ':') ? strtoull(strchr(order, ':') + 1, NULL, 10) : 1;
	for (unsigned i = 0; i < THREADS_MAX; i++) {
		s->threads[i] = (Thread *)calloc(1, sizeof(Thread));
		if (!s->threads[i])
			abort();
		s->threads[i]->id = i;
	}
	return s;
}

/* ---- fibers ---- */

void switch_to(Fiber *to)
{
	Fiber *from = state->running;

	if (from == to)
		return;
	state->running = to;
#if EMU_ASAN
	__sanitizer_start_switch_fiber(&from->fake, to->bottom, to->bytes);
#endif
#if EMU_WITH_TSAN
	__tsan_switch_to_fiber(to->tsan, 1); /* 1: the switch orders nothing */
#endif
	emu_swap(&from->sp, to->sp);
#if EMU_ASAN
	__sanitizer_finish_switch_fiber(state->running->fake, NULL, NULL);
#endif
}

void become(Thread *t)
{
	state->current = t;
	self.thread = t->id;
	self.lane = t->id % 32;
}

Thread *take_runnable(void)
{
	unsigned i;
	Thread *t;

	if (!state->n_runnable)
		return NULL;
	i = state->order == State::RANDOM ? next_random(state->n_runnable) : state->n_runnable - 1;
	t = state->runnable[i];
	state->runnable[i] = state->runnable[--state->n_runnable];
	return t;
}

void run_thread(void)
{
	Clocks *clocks = state->clocks;
	Thread *t = state->current;

	acquire(&clocks[1].at[0]);
	state->launch->body(state->launch->arg);
	release(&clocks[1].at[1]);
	if (t->n_copies || t->n_groups)
		fail(NULL, 0, "cp.async is still on its way at the end of the thread");
	t->done = true;
	state->n_done++;
}

void fiber_main(void)
{
#if EMU_ASAN
	__sanitizer_finish_switch_fiber(
		NULL, &state->host.bottom, &state->host.bytes); /* only the host begins fibers */
#endif
	for (;;) {
		Fiber *own = state->running;

		run_thread();
		state->current->fiber = NULL;
		state->idle[state->n_idle++] = own;
		switch_to(&state->host);
	}
}

Fiber *new_fiber(void)
{
	Fiber *f = (Fiber *)calloc(1, sizeof(Fiber));
	char *stack = (char *)mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	void **top;

	if (!f || stack == MAP_FAILED || mprotect(stack, PAGE_BYTES, PROT_NONE))
		abort();
	f->stack = stack;
	f->bottom = stack + PAGE_BYTES;
	f->bytes = STACK_BYTES - PAGE_BYTES;
	/* `ret` finds fiber_main, which finds its stack 8 bytes beside a multiple of 16, as after a
	 * call. */
	top = (void **)(stack + STACK_BYTES) - 2;
	top[0] = (void *)fiber_main;
	top[1] = NULL;
	f->sp = top - SAVED_REGISTERS;
#if EMU_WITH_TSAN
	f->tsan = __tsan_create_fiber(0);
#endif
	return f;
}

/* The host goes on with any thread that can run. */
void schedule(void)
{
	Thread *t;

	while (!state->failed && (t = take_runnable())) {
		if (!t->fiber)
			t->fiber = state->n_idle ? state->idle[--state->n_idle] : new_fiber();
		become(t);
		switch_to(t->fiber);
	}
}

/* The current thread waits until it is runnable again. Threads that have begun go on at once, so
 * that most switches are one, not two. */
void park(void)
{
	Thread *me = state->current, *t = take_runnable();

	if (t && t->fiber) {
		become(t);
		switch_to(t->fiber);
	} else {
		if (t)
			state->runnable[state->n_runnable++] = t;
		switch_to(&state->host);
	}
	if (state->current != me)
		abort();
}

/* Makes threads a .. b-1 runnable, so that they are taken in the chosen order. */
void wake(unsigned a, unsigned b, unsigned mask, const Thread *except)
{
	for (unsigned i = 0; i < b - a; i++) {
		unsigned id = state->order == State::LAST ? a + i : b - 1 - i;
		Thread *t = state->threads[id];

		if ((mask >> id % 32 & 1) && t != except)
			state->runnable[state->n_runnable++] = t;
	}
}

void set_place(const char *what, const char *file, int line)
{
	state->current->what = what;
	state->current->file = file;
	state->current->line = line;
}

} // namespace

[[noreturn]] void fail(const char *file, int line, const char *format, ...)
{
	char text[400];
	va_list list;

	va_start(list, format);
	vsnprintf(text, sizeof(text), format, list);
	va_end(list);
	fprintf(stderr, "emu: kernel %s, block (%u, %u, %u), thread %u, %s:%d: %s\n",
		state->launch->name, self.block.x, self.block.y, self.block.z, self.thread,
		file ? file : "the end", line, text);
	state->failed = true;
	for (;;)
		switch_to(&state->host);
}

/* ---- barriers and warp operations ---- */

void barrier(const char *file, int line)
{
	State *s = state;
	char *clock = &s->clocks[0].at[s->phase & 1];

	set_place("barrier", file, line);
	if (s->n_done)
		fail(file, line, "a barrier after %u threads have returned", s->n_done);
	if (s->arrived && (s->barrier_line != line || strcmp(s->barrier_file, file)))
		fail(file, line, "a barrier, while %u threads wait at %s:%d", s->arrived,
			s->barrier_file, s->barrier_line);
	s->barrier_file = file;
	s->barrier_line = line;
	release(clock);
	if (++s->arrived < s->launch->n_threads) {
		park();
	} else {
		s->arrived = 0;
		s->phase++;
		wake(0, s->launch->n_threads, ~0u, s->current);
	}
	acquire(clock);
}

void meet(unsigned mask, const char *what, void *arg, void (*run)(void **), bool fence,
	const char *file, int line)
{
	Thread *me = state->current;
	Warp *w = &state->warps[me->id / 32];
	char *clock = &w->clocks->at[w->phase & 1];
	unsigned bit = 1u << me->id % 32;

	set_place(what, file, line);
	if (!(mask & bit))
		fail(file, line, "%s: lane %u is not in the mask %08x", what, me->id % 32, mask);
	if (w->arrived && (w->mask != mask || w->line != line || strcmp(w->what, what) ||
				  strcmp(w->file, file)))
		fail(file, line, "%s, while lanes %08x of the warp wait in %s at %s:%d", what,
			w->arrived, w->what, w->file, w->line);
	w->what = what;
	w->file = file;
	w->line = line;
	w->mask = mask;
	w->args[me->id % 32] = arg;
	w->arrived |= bit;
	if (fence)
		release(clock);
	if (w->arrived != mask) {
		park();
	} else {
		if (run) {
			hide(true);
			run(w->args);
			hide(false);
		}
		w->arrived = 0;
		w->phase++;
		wake(me->id / 32 * 32, me->id / 32 * 32 + 32, mask, me);
	}
	if (fence)
		acquire(clock);
}

/* ---- shared memory and copies ---- */

/* Hidden, since to the thread sanitizer fresh memory was written by who asked for it. */
static void *poisoned(size_t bytes)
{
	void *memory;

	hide(true);
	memory = memalign(128, bytes);
	if (!memory)
		abort();
	memset(memory, 0xff, bytes);
	hide(false);
	return memory;
}

void *shared(const void *key, size_t bytes)
{
	for (unsigned i = 0; i < state->n_arrays; i++) {
		if (state->arrays[i].key == key)
			return state->arrays[i].memory;
	}
	if (state->n_arrays == ARRAYS_MAX)
		fail(NULL, 0, "more than %d shared arrays", ARRAYS_MAX);
	state->arrays[state->n_arrays].key = key;
	state->arrays[state->n_arrays].memory = poisoned(bytes);
	return state->arrays[state->n_arrays++].memory;
}

unsigned char *dynamic_shared(void)
{
	return state->dynamic;
}

void copy_push(const Copy &copy, const char *file, int line)
{
	Thread *t = state->current;

	if (t->n_copies == COPIES_MAX)
		fail(file, line, "cp.async: more than %d copies of a thread", COPIES_MAX);
	t->copies[t->n_copies++] = copy;
}

void copy_commit(void)
{
	Thread *t = state->current;

	if (t->n_groups == GROUPS_MAX)
		fail(NULL, 0, "cp.async: more than %d groups of a thread", GROUPS_MAX);
	t->group_end[t->n_groups++] = t->n_copies;
}

unsigned copy_take(unsigned keep, Copy *out)
{
	Thread *t = state->current;
	unsigned n;

	if (t->n_groups <= keep)
		return 0;
	n = t->group_end[0];
	memcpy(out, t->copies, n * sizeof(Copy));
	t->n_copies -= n;
	memmove(t->copies, t->copies + n, t->n_copies * sizeof(Copy));
	t->n_groups--;
	for (unsigned i = 0; i < t->n_groups; i++)
		t->group_end[i] = t->group_end[i + 1] - n;
	return n + 1;
}

void count_conflicts(unsigned n)
{
	static const bool wanted = getenv("AFD_EMU_CONFLICTS") != NULL;

	if (n && wanted)
		fail(NULL, 0, "ldmatrix: %u rows share a bank", n);
}

/* ---- launch ---- */

static void report_deadlock(void)
{
	const Launch *l = state->launch;
	unsigned n_shown = 0;

	fprintf(stderr, "emu: kernel %s, block (%u, %u, %u): %u of %u threads wait for ever:\n",
		l->name, self.block.x, self.block.y, self.block.z, l->n_threads - state->n_done,
		l->n_threads);
	for (unsigned i = 0; i < l->n_threads && n_shown < 8; i++) {
		const Thread *t = state->threads[i], *before = i ? state->threads[i - 1] : NULL;

		if (t->done || (before && !before->done && before->line == t->line))
			continue;
		fprintf(stderr, "emu:   from thread %u on, in %s at %s:%d\n", i, t->what, t->file,
			t->line);
		n_shown++;
	}
	state->failed = true;
}

/* clocks: [2 + warps], this block's own, so that blocks are not ordered among themselves */
static void run_block(Clocks *clocks)
{
	const Launch *l = state->launch;

	state->clocks = clocks;
	state->arrived = state->n_done = state->n_runnable = state->n_arrays = 0;
	state->dynamic = l->shared_bytes ? (unsigned char *)poisoned(l->shared_bytes) : NULL;
	for (unsigned i = 0; i < l->n_threads / 32; i++) {
		memset(&state->warps[i], 0, sizeof(state->warps[i]));
		state->warps[i].clocks = &clocks[2 + i];
	}
	for (unsigned i = 0; i < l->n_threads; i++)
		state->threads[i]->done = false;
	wake(0, l->n_threads, ~0u, NULL);
	release(&clocks[1].at[0]);
	schedule();
	if (!state->failed && state->n_done < l->n_threads)
		report_deadlock();
	if (state->failed)
		return; /* its memory stays: fibers that are stuck may point to it */
	acquire(&clocks[1].at[1]);
	free(state->dynamic);
	for (unsigned i = 0; i < state->n_arrays; i++)
		free(state->arrays[i].memory);
}

static int check(const Launch &l)
{
	const char *what = NULL;

	if (!l.n_threads || l.n_threads > THREADS_MAX || l.n_threads % 32)
		what = "threads of a block: 32 to 1024, whole warps";
	else if (l.shared_bytes > SHARED_MAX)
		what = "shared memory of a block: at most 227 KiB";
	else if (!l.grid.x || !l.grid.y || !l.grid.z || l.grid.x > 0x7fffffff ||
		 l.grid.y > 65535 || l.grid.z > 65535)
		what = "grid: 1 to 2147483647 x 65535 x 65535";
	if (what)
		fprintf(stderr, "emu: kernel %s, grid (%u, %u, %u), %u threads, %zu bytes: %s\n",
			l.name, l.grid.x, l.grid.y, l.grid.z, l.n_threads, l.shared_bytes, what);
	return what ? -1 : 0;
}

int run(const Launch &launch)
{
	size_t n = (size_t)launch.grid.x * launch.grid.y * launch.grid.z,
	       each = 2 + launch.n_threads / 32;
	Clocks *clocks;

	if (check(launch))
		return -1;
	if (!state)
		state = make_state();
	state->launch = &launch;
	state->running = &state->host;
#if EMU_WITH_TSAN
	state->host.tsan = __tsan_get_current_fiber();
#endif
	clocks = (Clocks *)calloc(n * each, sizeof(Clocks));
	if (!clocks)
		abort();
	self.grid = launch.grid;
	self.n_threads = launch.n_threads;
	for (size_t i = 0, at = 0; i < n && !state->failed; i++) {
		size_t block = state->order == State::LAST ? n - 1 - i : i;

		/* A stride that shares no factor with n visits every block once. */
		if (state->order == State::RANDOM)
			block = at = n > 2 ? (at + (n % 7 ? 7 : n % 11 ? 11 : 1)) % n : i;
		self.block = { (unsigned)(block % launch.grid.x),
			(unsigned)(block / launch.grid.x % launch.grid.y),
			(unsigned)(block / launch.grid.x / launch.grid.y) };
		run_block(clocks + block * each);
	}
	if (state->failed) {
		state->next_stuck = stuck;
		stuck = state;
		state = NULL;
		return -1;
	}
	free(clocks);
	return 0;
}

void end_thread(void)
{
	State *s = state;

	state = NULL;
	for (unsigned i = 0; s && i < s->n_idle; i++) {
#if EMU_WITH_TSAN
		__tsan_destroy_fiber(s->idle[i]->tsan);
#endif
#if EMU_ASAN
		__asan_unpoison_memory_region(s->idle[i]->bottom, s->idle[i]->bytes);
#endif
		munmap(s->idle[i]->stack, STACK_BYTES);
		free(s->idle[i]);
	}
	for (unsigned i = 0; s && i < THREADS_MAX; i++)
		free(s->threads[i]);
	free(s);
}

} // namespace emu
