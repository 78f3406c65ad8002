/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A queue: one stream, and a word in host memory that says how far it is. A ticket is a kernel that
 * writes the next number there, so a look costs no call; graphs that are replayed count on.
 *
 * Who waits gets a descriptor: a timer, set by each look that finds the ticket not reached, to about
 * an eighth of the time waited so far. It holds up no stream and needs no thread; the same look
 * finds a device that has failed.
 */
#include <string.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "blaslt.h"

#define WORKSPACE_BYTES ((size_t)64 << 20)
#define UPLOAD_BYTES    ((size_t)1 << 20) /* of a segment */
#define DOWNLOAD_BYTES  ((size_t)4 << 20)
#define COUNTER_BYTES   (AFD_GPU_COUNTERS * sizeof(uint32_t))
#define SILENCE_NS      30000000000ull /* how long a caller that needs room waits */
#define BEAT_NS         10000000ull
#define LOOK_LEAST_NS   20000ull
#define LOOK_MOST_NS    1000000ull

static void free_queue(struct cuda_queue *d)
{
	struct afd__device *dev = d->q->dev;

	blaslt_queue_close(d);
	ring_close(dev, &d->up);
	ring_close(dev, &d->down);
	if (!cuda_forked(dev->state)) {
		if (d->gpu.stream && d->owns_stream)
			cudaStreamDestroy(d->gpu.stream);
		cudaFree(d->gpu.workspace);
		cudaFree(d->gpu.counters);
		cudaFree(d->counter);
		cudaFreeHost(d->word);
	}
	if (d->q->fd >= 0)
		close(d->q->fd);
	d->q->fd = -1;
	dev->host->free(d);
}

/* The host's stream, if it is of this device; or one of our own. */
static int take_stream(struct cuda_queue *d)
{
	struct afd__device *dev = d->q->dev;
	const struct cuda *c = dev->state;
	cudaStream_t stream = d->q->options.stream;
	int rc, ordinal = -1;

	if (!stream) {
		rc = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
		d->owns_stream = !rc;
	} else {
		rc = cudaStreamGetDevice(stream, &ordinal);
		if (!rc && ordinal != c->ordinal)
			return dev->host->error(-EINVAL,
				"device %s: the stream is of device %d, must be of %d", dev->name,
				ordinal, c->ordinal);
	}
	if (!rc)
		d->gpu.stream = stream;
	return cuda_error(dev, rc, "its stream cannot be used");
}

/* The context is current. */
static int check_capture(const struct cuda_queue *d, const char *what)
{
	enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
	struct afd__device *dev = d->q->dev;
	int rc;

	if (d->owns_stream)
		return 0;
	rc = cuda_error(dev, cudaStreamIsCapturing(d->gpu.stream, &status), "its stream");
	if (!rc && status != cudaStreamCaptureStatusNone)
		rc = dev->host->error(-ENOTSUP,
			"device %s: the host's stream is being captured, and %s cannot be",
			dev->name, what);
	return rc;
}

int cuda_enter_uncaptured(const struct cuda_queue *d, const char *what, void **before)
{
	int rc = cuda_enter(d->q->dev, before);

	if (rc)
		return rc;
	rc = check_capture(d, what);
	if (rc)
		cuda_leave(d->q->dev, *before);
	return rc;
}

static int make_queue(struct cuda_queue *d)
{
	struct afd__device *dev = d->q->dev;
	int rc = take_stream(d);

	if (rc)
		return rc;
	rc = cudaMalloc(&d->gpu.workspace, WORKSPACE_BYTES + blaslt_workspace_bytes(d));
	if (!rc)
		rc = cudaMalloc((void **)&d->counter, sizeof(*d->counter));
	if (!rc)
		rc = cudaMalloc((void **)&d->gpu.counters, COUNTER_BYTES);
	if (!rc)
		rc = cudaHostAlloc((void **)&d->word, sizeof(*d->word), cudaHostAllocMapped);
	if (!rc)
		rc = cudaMemsetAsync(d->counter, 0, sizeof(*d->counter), d->gpu.stream);
	if (!rc)
		rc = cudaMemsetAsync(d->gpu.counters, 0, COUNTER_BYTES, d->gpu.stream);
	if (rc)
		return cuda_error(dev, rc, "a queue cannot be made");
	*d->word = 0;
	d->gpu.workspace_bytes = WORKSPACE_BYTES;
	d->gpu.deterministic = (uint32_t)d->q->options.deterministic;
	d->gpu.n_sms = ((struct cuda *)dev->state)->n_sms;
	d->q->fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	if (d->q->fd < 0)
		return dev->host->error(-EIO, "device %s: timerfd: %s", dev->name, strerror(errno));
	rc = blaslt_queue_open(d);
	if (!rc)
		rc = ring_open(dev, &d->up, UPLOAD_BYTES);
	return rc ? rc : ring_open(dev, &d->down, DOWNLOAD_BYTES);
}

int cuda_queue_open(struct afd__queue *q)
{
	struct cuda_queue *d = q->dev->host->alloc(q->dev->ctx, 1, sizeof(*d));
	void *before;
	int rc;

	if (!d)
		return -ENOMEM;
	d->q = q;
	rc = cuda_enter(q->dev, &before);
	if (rc) {
		q->dev->host->free(d);
		return rc;
	}
	rc = make_queue(d);
	if (rc)
		free_queue(d);
	else
		q->state = d;
	cuda_leave(q->dev, before);
	return rc;
}

void cuda_queue_close(struct afd__queue *q)
{
	struct cuda_queue *d = q->state;
	struct afd__device *dev = q->dev;
	void *before;

	if (cuda_forked(dev->state) || cuda_enter(dev, &before)) {
		free_queue(d);
		return;
	}
	/* Downloads arrive; a device that failed or hangs is given up. */
	cuda_wait(d, d->issued + 1, "the end of a queue");
	free_queue(d);
	cuda_leave(dev, before);
}

/* ---- tickets ---- */

static int give_ticket(struct cuda_queue *d)
{
	int rc = afd_gpu_mark(&d->gpu, d->counter, d->word);

	if (rc)
		return cuda_error(d->q->dev, rc, "a ticket");
	d->issued++;
	return 0;
}

int cuda_ticket(struct afd__queue *q, uint64_t *ticket)
{
	struct cuda_queue *d = q->state;
	void *before;
	int rc = cuda_enter_uncaptured(d, "a ticket", &before);

	if (rc)
		return rc;
	rc = give_ticket(d);
	*ticket = d->issued;
	cuda_leave(q->dev, before);
	return rc;
}

static uint64_t reached_by_now(const struct cuda_queue *d)
{
	return __atomic_load_n(d->word, __ATOMIC_ACQUIRE);
}

/* The next look of whoever sleeps on the descriptor. */
static void set_timer(struct cuda_queue *d, uint64_t ticket)
{
	uint64_t now = d->q->dev->host->now_ns(), after;
	struct itimerspec t = { 0 };

	if (d->waited_for != ticket) {
		d->waited_for = ticket;
		d->waiting_since = now;
	}
	after = (now - d->waiting_since) / 8;
	after = after < LOOK_LEAST_NS ? LOOK_LEAST_NS : after > LOOK_MOST_NS ? LOOK_MOST_NS : after;
	t.it_value.tv_nsec = (long)after;
	timerfd_settime(d->q->fd, 0, &t, NULL);
}

/* Setting the timer anew takes back what it told before. */
static int look(struct cuda_queue *d, uint64_t ticket)
{
	uint64_t reached = reached_by_now(d);
	int rc;

	deliver(d, reached);
	if (reached >= ticket)
		return 1;
	/* A question would end the host's capture. */
	rc = check_capture(d, "a look") == -ENOTSUP ? cudaErrorNotReady
						     : cudaStreamQuery(d->gpu.stream);
	if (rc && rc != cudaErrorNotReady)
		return cuda_error(d->q->dev, rc, "an operation has failed");
	set_timer(d, ticket);
	return 0;
}

int cuda_reached(struct afd__queue *q, uint64_t ticket)
{
	struct cuda_queue *d = q->state;
	void *before;
	int rc;

	/* What has arrived needs no context. */
	if (reached_by_now(d) >= ticket) {
		deliver(d, ticket);
		return 1;
	}
	rc = cuda_enter(q->dev, &before);
	if (rc)
		return rc;
	rc = look(d, ticket);
	cuda_leave(q->dev, before);
	return rc;
}

int cuda_wait(struct cuda_queue *d, uint64_t ticket, const char *what)
{
	const struct timespec nap = { .tv_nsec = 20000 };
	struct afd__device *dev = d->q->dev;
	uint64_t since, beat, now, seen = reached_by_now(d);
	int rc = 0;

	while (!rc && d->issued < ticket)
		rc = give_ticket(d);
	since = beat = dev->host->now_ns();
	while (!rc && !(rc = look(d, ticket))) {
		now = dev->host->now_ns();
		if (reached_by_now(d) != seen) {
			seen = reached_by_now(d);
			since = now;
		}
		if (now - since > SILENCE_NS)
			return dev->host->error(-ETIMEDOUT,
				"device %s: %s waits for ticket %llu, the stream stands at %llu",
				dev->name, what, (unsigned long long)ticket,
				(unsigned long long)seen);
		if (d->q->on_tile && now - beat > BEAT_NS) {
			beat = now;
			d->q->on_tile(d->q->on_tile_user);
		}
		nanosleep(&nap, NULL);
	}
	return rc < 0 ? rc : 0;
}
