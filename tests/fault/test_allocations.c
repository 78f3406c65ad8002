/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every allocation of ours fails once. This executable brings its own malloc, which counts the
 * calls made inside the library and fails the n-th; a scenario runs with n = 0, 1, 2, … until it
 * meets no failure. Each run must end in success or in
 * -ENOMEM with a text, and must leave no memory and no descriptor behind.
 *
 * Large memory comes through the host's allocator hooks, which count on the same counter.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <afd/afd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static struct {
	bool on;       /* between walk_begin and walk_end */
	int fail_at;   /* index of the allocation that fails; -1: none */
	int n_calls;   /* allocations so far */
	long n_live;   /* allocated and not freed while on, by size-less count */
	bool has_failed;
} walk;

static bool fails(void)
{
	if (!walk.on)
		return false;
	if (walk.n_calls++ != walk.fail_at)
		return false;
	walk.has_failed = true;
	errno = ENOMEM;
	return true;
}

static void *taken(void *memory)
{
	if (walk.on && memory)
		walk.n_live++;
	return memory;
}

void *malloc(size_t bytes) { return fails() ? NULL : taken(__libc_malloc(bytes)); }
void *calloc(size_t n, size_t bytes) { return fails() ? NULL : taken(__libc_calloc(n, bytes)); }
void *memalign(size_t alignment, size_t bytes);
void *memalign(size_t alignment,
	       size_t bytes) { return fails() ? NULL : taken(__libc_memalign(alignment, bytes)); }
void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void **out, size_t alignment, size_t bytes)
{
	void *memory = memalign(alignment, bytes);

	if (!memory)
		return ENOMEM;
	*out = memory;
	return 0;
}

void *realloc(void *memory, size_t bytes)
{
	void *moved;

	if (fails())
		return NULL;
	moved = __libc_realloc(memory, bytes);
	return memory ? moved : taken(moved);
}

void free(void *memory)
{
	if (walk.on && memory)
		walk.n_live--;
	__libc_free(memory);
}

static void *host_alloc(void *user, size_t bytes, size_t alignment)
{
	return aligned_alloc(alignment < 64 ? 64 : alignment, bytes);
}

static void host_free(void *user, void *memory, size_t bytes)
{
	free(memory);
}

static int count_descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int n = 0;

	assert_non_null(dir);
	while (readdir(dir))
		n++;
	closedir(dir);
	return n;
}

/* Segments of shm: that are still mapped. */
static int count_segments(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	char line[512];
	int n = 0;

	assert_non_null(maps);
	while (fgets(line, sizeof line, maps))
		n += strstr(line, "memfd:afd") != NULL;
	fclose(maps);
	return n;
}

/* ---- the scenarios: everything a host does, from nothing to nothing ---- */

enum { MAX_VOCAB = 4096 };

struct host {
	afd_context *ctx;
	afd_model *model;
	afd_transport *ffn_net, *attn_net;
	afd_ffn *ffn;
	afd_attn *attn;
	float logits[MAX_VOCAB];
};

static const char *model_dir(void)
{
	static char path[512];

	snprintf(path, sizeof path, "%s/golden/%s", getenv("AFD_TEST_SOURCE"), "sharded-two");
	return path;
}

static int open_model(struct host *h)
{
	struct afd_context_params params = {
		.size = sizeof params, .allocator = { .alloc = host_alloc,
			.free = host_free }, .n_threads = 2,
	};
	int rc = afd_context_create(&h->ctx, &params);

	return rc ? rc : afd_model_open(&h->model, h->ctx, model_dir(), NULL);
}

static int take_step(struct host *h)
{
	static const int32_t ids[] = { 1, 2, 3, 4, 5 };
	struct afd_entry entry = { .sequence = 7, .ids = ids, .n_ids = 5 };
	struct afd_batch batch = {
		.size = sizeof batch, .entries = &entry, .n_entries = 1, .entry_bytes = sizeof entry,
		.logits = h->logits, .logits_rows = 1,
	};
	int rc = afd_attn_add(h->attn, 7);

	if (!rc)
		rc = afd_attn_begin(h->attn, &batch);
	while (!rc) {
		rc = h->ffn_net ? afd_ffn_poll(h->ffn) : 0;
		if (rc >= 0)
			rc = afd_attn_poll(h->attn);
	}
	return rc < 0 ? rc : 0;
}

static int run_one_process(struct host *h)
{
	struct afd_attn_params params = { .size = sizeof params, .max_rows = 16, .kv_pages = 4 };
	int rc = open_model(h);

	if (!rc)
		rc = afd_ffn_create(&h->ffn, h->model, NULL, NULL);
	params.ffn = h->ffn;
	if (!rc)
		rc = afd_attn_create(&h->attn, h->model, NULL, &params);
	return rc ? rc : take_step(h);
}

static int connect_peers(struct host *h, const char *address)
{
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params serve = { .size = sizeof serve, .listen = &address,
		.n_listen = 1, .max_rows = 16, .max_peers = 2 };
	struct afd_transport_params join = { .size = sizeof join, .connect = &address,
		.n_connect = 1, .max_rows = 16, .lanes = 2 };
	int rc = afd_model_contract(h->model, &contract);

	if (!rc)
		rc = afd_transport_create(&h->ffn_net, h->ctx, &contract, &serve);
	return rc ? rc : afd_transport_create(&h->attn_net, h->ctx, &contract, &join);
}

static int run_two_stages(struct host *h, const char *address)
{
	struct afd_attn_params params = { .size = sizeof params, .max_rows = 16, .kv_pages = 4 };
	int rc = open_model(h);

	if (!rc)
		rc = connect_peers(h, address);
	if (!rc)
		rc = afd_ffn_create(&h->ffn, h->model, h->ffn_net, NULL);
	if (!rc)
		rc = afd_attn_create(&h->attn, h->model, h->attn_net, &params);
	return rc ? rc : take_step(h);
}

static int run_over_loop(struct host *h) { return run_two_stages(h, "loop:alloc"); }
static int run_over_shm(struct host *h) { return run_two_stages(h, "shm:alloc-test"); }

/* The same port each time: it is free again when the listener is gone. */
static int run_over_auto(struct host *h)
{
	char address[32];

	snprintf(address, sizeof address, "auto:127.0.0.1:%d", 19000 + (int)getpid() % 900);
	return run_two_stages(h, address);
}

static void end(struct host *h)
{
	afd_attn_destroy(h->attn);
	afd_ffn_destroy(h->ffn);
	afd_transport_destroy(h->attn_net);
	afd_transport_destroy(h->ffn_net);
	afd_model_close(h->model);
	afd_context_destroy(h->ctx);
}

/* ---- the walk ---- */

static int run_failing(int (*scenario)(struct host *), int fail_at)
{
	static struct host h;
	int rc;

	memset(&h, 0, sizeof h);
	walk.fail_at = fail_at;
	walk.n_calls = 0;
	walk.n_live = 0;
	walk.has_failed = false;
	walk.on = true;
	rc = scenario(&h);
	end(&h);
	walk.on = false;
	return rc;
}

/* A peer whose half of the connection has no memory tells the other in its own words. */
static bool is_honest(int rc)
{
	return rc == 0 || rc == -ENOMEM || rc == -ECONNRESET || rc == -ECONNREFUSED || rc == -EPROTO || rc == -ETIMEDOUT;
}

static void walk_over(int (*scenario)(struct host *))
{
	int n_descriptors = 0, n = 0;

	assert_int_equal(run_failing(scenario, -1), 0); /* warms up libc: locale, stdio, dl */
	n_descriptors = count_descriptors();
	do {
		int rc = run_failing(scenario, n);

		if (walk.has_failed && !is_honest(rc))
			fail_msg("allocation %d failed, and the run gave %d (%s)", n, rc,
				 afd_last_error());
		if (walk.has_failed && rc == -ENOMEM && !*afd_last_error())
			fail_msg("allocation %d failed without a text", n);
		if (walk.n_live != 0)
			fail_msg("allocation %d failed, and %ld are still held", n, walk.n_live);
		if (count_descriptors() != n_descriptors)
			fail_msg("allocation %d failed, and descriptors leak", n);
		if (count_segments() != 0)
			fail_msg("allocation %d failed, and a segment is still mapped", n);
		n++;
	} while (walk.has_failed);
	print_message("walked over %d allocations\n", n - 1);
	assert_true(n > 20);
}

static void one_process_survives_the_failure_of_each_allocation(void **state) { walk_over(run_one_process); }
static void two_stages_over_loop_survive_the_failure_of_each_allocation(void **state) { walk_over(run_over_loop); }
static void two_stages_over_auto_survive_the_failure_of_each_allocation(void **state) { walk_over(run_over_auto); }
static void two_stages_over_shm_survive_the_failure_of_each_allocation(void **state) { walk_over(run_over_shm); }

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_process_survives_the_failure_of_each_allocation),
		cmocka_unit_test(two_stages_over_loop_survive_the_failure_of_each_allocation),
		cmocka_unit_test(two_stages_over_shm_survive_the_failure_of_each_allocation),
		cmocka_unit_test(two_stages_over_auto_survive_the_failure_of_each_allocation),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
