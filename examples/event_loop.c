/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host that lends libafd nothing it would miss: both stages of two models in one process and one
 * thread, driven by the host's own epoll loop. Every large allocation goes through the host's
 * hooks, the KV pages lie in the host's memory, and the compute tasks run on the host's executor.
 * Ids and logits must have the bits of a plain run without any transport.
 */
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include <afd/afd.h>

#define CHECK(call) \
	do { \
		if ((call) < 0) \
			return fprintf(stderr, "event_loop: %s\n", afd_last_error()), -1; \
	} while (0)

enum { N_MODELS = 2, N_PROMPT = 5, N_TOKENS = 12, KV_ALIGNMENT = 64 };

/* ---- what the host lends: memory, an executor, KV pages ---- */

struct host {
	size_t n_allocations, n_live, live_bytes;
	size_t n_tasks;
};

static void *host_alloc(void *user, size_t bytes, size_t alignment)
{
	struct host *host = user;
	void *memory;

	if (posix_memalign(&memory, alignment < sizeof(void *) ? sizeof(void *) : alignment, bytes))
		return NULL;
	host->n_allocations++;
	host->n_live++;
	host->live_bytes += bytes;
	return memory;
}

static void host_free(void *user, void *memory, size_t bytes)
{
	struct host *host = user;

	if (!memory)
		return;
	host->n_live--;
	host->live_bytes -= bytes;
	free(memory);
}

static void host_run(void *user, uint32_t n_tasks, afd_task task, void *arg)
{
	struct host *host = user;

	host->n_tasks += n_tasks;
	for (uint32_t i = 0; i < n_tasks; i++)
		task(arg, i);
}

static int count_threads(void)
{
	DIR *directory = opendir("/proc/self/task");
	struct dirent *entry;
	int n = 0;

	while (directory && (entry = readdir(directory)))
		n += entry->d_name[0] != '.';
	if (directory)
		closedir(directory);
	return n;
}

/* ---- one sequence, decoded step by step ---- */

struct job {
	afd_model *model;
	afd_transport *attn_net, *ffn_net;
	afd_ffn *ffn;
	afd_attn *attn;
	void *kv;
	int32_t ids[N_PROMPT + N_TOKENS];
	uint32_t n_ids, n_fed;
	int32_t next_id;
	uint32_t vocab_size;
	float *logits; /* [N_TOKENS][vocab_size] */
};

static int job_start(struct job *job)
{
	struct afd_model_info info = { .size = sizeof info };

	CHECK(afd_model_info(job->model, &info));
	CHECK(afd_attn_add(job->attn, 1));
	job->vocab_size = info.vocab_size;
	job->logits = calloc(N_TOKENS, info.vocab_size * sizeof *job->logits);
	for (job->n_ids = 0; job->n_ids < N_PROMPT; job->n_ids++)
		job->ids[job->n_ids] = 3 + 7 * job->n_ids;
	return job->logits ? 0 : -1;
}

static int job_ended(const struct job *job)
{
	return job->n_ids == N_PROMPT + N_TOKENS;
}

static int job_begin(struct job *job)
{
	struct afd_entry entry = {
		.sequence = 1, .ids = job->ids + job->n_fed, .n_ids = job->n_ids - job->n_fed
	};
	struct afd_batch batch = { .size = sizeof batch,
		.entries = &entry,
		.n_entries = 1,
		.entry_bytes = sizeof entry,
		.greedy_ids = &job->next_id,
		.greedy_rows = 1,
		.logits = job->logits + (size_t)(job->n_ids - N_PROMPT) * job->vocab_size,
		.logits_rows = 1 };

	CHECK(afd_attn_begin(job->attn, &batch));
	return 0;
}

static void job_take(struct job *job)
{
	job->n_fed = job->n_ids;
	job->ids[job->n_ids++] = job->next_id;
}

/* ---- the plain run, to compare with ---- */

static int run_plain(struct job *job, const char *dir)
{
	afd_context *ctx;

	CHECK(afd_context_create(&ctx, NULL));
	CHECK(afd_model_open(&job->model, ctx, dir, NULL));
	CHECK(afd_ffn_create(&job->ffn, job->model, NULL, NULL));
	struct afd_attn_params params = { .size = sizeof params, .ffn = job->ffn };
	CHECK(afd_attn_create(&job->attn, job->model, NULL, &params));
	if (job_start(job))
		return -1;
	for (; !job_ended(job); job_take(job)) {
		if (job_begin(job))
			return -1;
		CHECK(afd_attn_wait(job->attn, 0));
	}
	afd_attn_destroy(job->attn);
	afd_ffn_destroy(job->ffn);
	afd_model_close(job->model);
	afd_context_destroy(ctx);
	return 0;
}

/* ---- the event loop ---- */

static int job_create(struct job *job, afd_context *ctx, const char *dir, const char *address)
{
	struct afd_contract contract = { .size = sizeof contract };
	struct afd_transport_params listen = {
		.size = sizeof listen, .listen = &address, .n_listen = 1
	};
	struct afd_transport_params connect = {
		.size = sizeof connect, .connect = &address, .n_connect = 1
	};
	struct afd_attn_params params = { .size = sizeof params, .kv_pages = 4 };

	CHECK(afd_model_open(&job->model, ctx, dir, NULL));
	CHECK(afd_model_contract(job->model, &contract));
	CHECK(afd_transport_create(&job->ffn_net, ctx, &contract, &listen));
	CHECK(afd_ffn_create(&job->ffn, job->model, job->ffn_net, NULL));
	CHECK(afd_transport_create(&job->attn_net, ctx, &contract, &connect));

	params.kv_memory_bytes = afd_attn_kv_bytes(job->model, &params);
	if (!params.kv_memory_bytes ||
		posix_memalign(&job->kv, KV_ALIGNMENT, params.kv_memory_bytes))
		return fprintf(stderr, "event_loop: no KV memory: %s\n", afd_last_error()), -1;
	params.kv_memory = job->kv;
	CHECK(afd_attn_create(&job->attn, job->model, job->attn_net, &params));
	return job_start(job) ? -1 : job_begin(job);
}

static void job_destroy(struct job *job)
{
	afd_attn_destroy(job->attn);
	afd_transport_destroy(job->attn_net);
	afd_ffn_destroy(job->ffn);
	afd_transport_destroy(job->ffn_net);
	afd_model_close(job->model);
	free(job->kv);
}

/* All that can be done now. Returns 1 when something was, 0 when not. */
static int job_advance(struct job *job)
{
	int moved, rc;

	CHECK(moved = afd_ffn_poll(job->ffn));
	if (job_ended(job))
		return moved;
	CHECK(rc = afd_attn_poll(job->attn));
	if (!rc)
		return moved;
	job_take(job);
	return job_ended(job) || !job_begin(job) ? 1 : -1;
}

static int32_t sooner(int32_t a, int32_t b)
{
	return a < 0 ? b : b < 0 || a < b ? a : b;
}

static int watch(int epoll_fd, int fd)
{
	struct epoll_event event = { .events = EPOLLIN };

	return epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static int run_loop(struct job *jobs, int epoll_fd)
{
	struct epoll_event events[2 * N_MODELS];

	while (!job_ended(&jobs[0]) || !job_ended(&jobs[1])) {
		int32_t timeout_ms = -1;
		int moved = 0;

		for (int i = 0; i < N_MODELS; i++) {
			int rc = job_advance(&jobs[i]);

			if (rc < 0)
				return -1;
			moved |= rc;
			timeout_ms = sooner(timeout_ms, sooner(afd_ffn_timeout_ms(jobs[i].ffn),
								afd_attn_timeout_ms(jobs[i].attn)));
		}
		if (!moved)
			epoll_wait(epoll_fd, events, 2 * N_MODELS, timeout_ms);
	}
	return 0;
}

static int run_host(struct job *jobs, struct host *host, char **dirs)
{
	static const char *const addresses[N_MODELS] = { "loop:first", "loop:second" };
	struct afd_context_params params = {
		.size = sizeof params,
		.allocator = { .alloc = host_alloc, .free = host_free, .user = host },
		.executor = { .run = host_run, .user = host, .n_threads = 2 },
	};
	int epoll_fd = epoll_create1(0), n_threads;
	afd_context *ctx;

	CHECK(afd_context_create(&ctx, &params));
	for (int i = 0; i < N_MODELS; i++) {
		if (job_create(&jobs[i], ctx, dirs[i], addresses[i]))
			return -1;
		if (watch(epoll_fd, afd_ffn_fd(jobs[i].ffn)) ||
			watch(epoll_fd, afd_attn_fd(jobs[i].attn)))
			return perror("event_loop: epoll_ctl"), -1;
	}
	if (run_loop(jobs, epoll_fd))
		return -1;
	n_threads = count_threads();
	printf("%zu large allocations of %zu bytes through the hooks, %zu tasks on the executor, "
	       "%d thread\n",
		host->n_allocations, host->live_bytes, host->n_tasks, n_threads);
	for (int i = 0; i < N_MODELS; i++)
		job_destroy(&jobs[i]);
	afd_context_destroy(ctx);
	if (n_threads != 1 || !host->n_allocations || host->n_live || !host->n_tasks)
		return fprintf(stderr,
			       "event_loop: %d threads, %zu allocations, %zu still live, %zu "
			       "tasks\n",
			       n_threads, host->n_allocations, host->n_live, host->n_tasks),
		       -1;
	return 0;
}

int main(int argc, char **argv)
{
	struct job plain[N_MODELS] = { 0 }, jobs[N_MODELS] = { 0 };
	struct host host = { 0 };
	char *dirs[N_MODELS] = { argc > 1 ? argv[1] : "models/tiny-qwen3",
		argc > 2   ? argv[2]
		: argc > 1 ? argv[1]
			   : "models/tiny-qwen3" };
	int equal = 1;

	if (run_host(jobs, &host, dirs))
		return 1;
	for (int i = 0; i < N_MODELS; i++) {
		if (run_plain(&plain[i], dirs[i]))
			return 1;
		for (int j = 0; j < N_TOKENS; j++)
			printf("%d%c", jobs[i].ids[N_PROMPT + j], j < N_TOKENS - 1 ? ' ' : '\n');
		equal &= !memcmp(jobs[i].ids, plain[i].ids, sizeof plain[i].ids) &&
			 !memcmp(jobs[i].logits, plain[i].logits,
				 N_TOKENS * plain[i].vocab_size * sizeof *plain[i].logits);
		free(jobs[i].logits);
		free(plain[i].logits);
	}
	printf("bits: %s\n", equal ? "equal" : "differ");
	return !equal;
}
