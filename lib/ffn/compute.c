/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host's compute function as the executor of a pass: an engine's own kernels, another
 * accelerator. It gets rows in host memory, and either writes y before it returns or returns
 * -EINPROGRESS and reports by afd_ffn_complete from any thread.
 *
 * One pass is under way at a time. Its id is published before the function is called, since another
 * thread may report it before the call has returned; exactly one report of an id is taken. Called
 * by pass.c; afd_ffn_complete by the host.
 */
#include "stage.h"

#include <assert.h>
#include <string.h>
#include <unistd.h>

/* The closed list of context.h: what a compute function may return, beside -EINPROGRESS. */
static bool is_listed(int status)
{
	static const int16_t list[] = {
		EINVAL,
		E2BIG,
		ENOENT,
		EEXIST,
		ENOSPC,
		ENOMEM,
		EBADMSG,
		ENOTSUP,
		ENOSYS,
		ENODEV,
		EAGAIN,
		EBUSY,
		EALREADY,
		ECANCELED,
		ETIMEDOUT,
		ECONNREFUSED,
		ECONNRESET,
		EPROTO,
		EADDRINUSE,
		EACCES,
		EDOM,
		EIO,
	};
	size_t i;

	for (i = 0; i < sizeof(list) / sizeof(list[0]); i++) {
		if (status == -list[i])
			return true;
	}
	return false;
}

static int outcome(const struct afd_ffn *ffn, int status)
{
	char text[64];

	if (!status)
		return 1;
	if (status > 0)
		return afd__error(-EINVAL,
			"ffn compute function: layer %u: returned %d, must be 0 or a negative "
			"errno",
			ffn->server.run.layer, status);
	return afd__error(is_listed(status) ? status : -EIO,
		"ffn compute function: layer %u: %u rows failed: %s (%d)", ffn->server.run.layer,
		ffn->server.run.n_pass_rows, strerror_r(-status, text, sizeof(text)), status);
}

int afd__ffn_host_begin(struct afd_ffn *ffn, const float *x, float *y)
{
	const struct afd__ffn_run *run = &ffn->server.run;
	struct afd__ffn_host *host = &ffn->host;
	bool routed = run->routed;
	struct afd_ffn_pass pass = {
		.size = sizeof(pass),
		.id = ++host->last_id,
		.layer = (int32_t)run->layer,
		.n_rows = run->n_pass_rows,
		.x = x,
		.y = y,
		.ids = routed ? ffn->ids : NULL,
		.weights = routed ? ffn->expert_weights : NULL,
		.top_k = routed ? afd__ffn_top_k(ffn) : 0,
	};
	uint64_t id = pass.id;
	int status;

	atomic_store(&host->under_way, id);
	status = host->compute(host->user, &pass);
	if (status == -EINPROGRESS)
		return afd__ffn_host_reached(ffn);
	/* The call has the last word: a report of a pass that did not say -EINPROGRESS is not
	 * listened to. */
	atomic_compare_exchange_strong(&host->under_way, &id, 0);
	return outcome(ffn, status);
}

int afd__ffn_host_reached(struct afd_ffn *ffn)
{
	if (atomic_load_explicit(&ffn->host.completed, memory_order_acquire) != ffn->host.last_id)
		return 0;
	return outcome(ffn, atomic_load_explicit(&ffn->host.status, memory_order_relaxed));
}

int afd_ffn_complete(afd_ffn *ffn, uint64_t id, int status)
{
	uint64_t expected = id;
	uint64_t one = 1;
	int rc = afd__ffn_check(ffn);

	if (rc)
		return rc;
	if (!id || !atomic_compare_exchange_strong(&ffn->host.under_way, &expected, 0))
		return afd__error(-ENOENT, "ffn pass %llu: not under way", (unsigned long long)id);
	atomic_store_explicit(&ffn->host.status, status, memory_order_relaxed);
	atomic_store_explicit(&ffn->host.completed, id, memory_order_release);
	/* Full means that the server has been woken already. */
	rc = write(ffn->server.wake_fd, &one, sizeof(one)) < 0 && errno != EAGAIN ? -EIO : 0;
	atomic_store_explicit(&ffn->server.woken, 1, memory_order_release);
	if (rc)
		return afd__error(-EIO, "ffn pass %llu: the server cannot be woken: %s",
			(unsigned long long)id, strerror(errno));
	return 0;
}
