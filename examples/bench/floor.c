/* SPDX-License-Identifier: Apache-2.0 */
/* Raw ping-pongs over shared memory and over a TCP socket; floor.h says what for. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../tool/options.h"
#include "floor.h"
#include "floor_verbs.h"

enum { PAGE = 4096, MEET_S = 10 };
#define LOOKS_MAX (UINT64_C(1) << 33) /* some seconds */

void bench_pin(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	(void)sched_setaffinity(0, sizeof set, &set);
}

void bench_floor_answer(void *y, const void *x, size_t n_bytes)
{
	const uint64_t *from = x;
	uint64_t *to = y;
	size_t n_words = n_bytes / sizeof *to, rest = n_bytes % sizeof *to;

	for (size_t i = 0; i < n_words; i++)
		to[i] = ~from[i];
	for (size_t i = n_bytes - rest; i < n_bytes; i++)
		((uint8_t *)y)[i] = (uint8_t)~((const uint8_t *)x)[i];
}

/* ---- spinning shared memory ---- */

/* Each end counts its messages in a line of its own; the bytes follow on pages of their own. */
struct shared {
	_Alignas(128) _Atomic uint64_t asked;
	_Alignas(128) _Atomic uint64_t answered;
};

static uint8_t *there(const struct bench_floor *f)
{
	return (uint8_t *)f->memory + PAGE;
}

static uint8_t *back(const struct bench_floor *f)
{
	return there(f) + (f->max_bytes + PAGE - 1) / PAGE * PAGE;
}

static int shm_open_floor(struct bench_floor *f)
{
	f->memory_bytes = PAGE + 2 * ((f->max_bytes + PAGE - 1) / PAGE * PAGE);
	f->memory = mmap(NULL, f->memory_bytes, PROT_READ | PROT_WRITE,
		MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (f->memory != MAP_FAILED)
		return 0;
	f->memory = NULL;
	return errno;
}

static int shm_meet(struct bench_floor *f)
{
	(void)f;
	return 0;
}

/* An end that died never answers. */
static int await(_Atomic uint64_t *word, uint64_t value)
{
	for (uint64_t i = 0; i < LOOKS_MAX; i++) {
		if (atomic_load_explicit(word, memory_order_acquire) == value)
			return 0;
	}
	return ETIMEDOUT;
}

static int shm_round(struct bench_floor *f, const void *x, void *y, size_t n_bytes)
{
	struct shared *s = f->memory;

	memcpy(there(f), x, n_bytes);
	atomic_store_explicit(&s->asked, ++f->n_messages, memory_order_release);
	if (await(&s->answered, f->n_messages))
		return ETIMEDOUT;
	memcpy(y, back(f), n_bytes);
	return 0;
}

static int shm_answer(struct bench_floor *f, size_t n_bytes)
{
	struct shared *s = f->memory;

	if (await(&s->asked, ++f->n_messages))
		return ETIMEDOUT;
	bench_floor_answer(back(f), there(f), n_bytes);
	atomic_store_explicit(&s->answered, f->n_messages, memory_order_release);
	return 0;
}

static void shm_close(struct bench_floor *f)
{
	if (f->memory)
		munmap(f->memory, f->memory_bytes);
}

/* ---- a plain TCP socket ---- */

static int tcp_open(struct bench_floor *f)
{
	struct sockaddr_in here = { .sin_family = AF_INET,
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct timeval longest = { .tv_sec = MEET_S };

	f->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (f->listener < 0 ||
		setsockopt(f->listener, SOL_SOCKET, SO_RCVTIMEO, &longest, sizeof longest) ||
		bind(f->listener, (struct sockaddr *)&here, sizeof here) ||
		listen(f->listener, 1))
		return errno;
	return 0;
}

static int tcp_ready(struct bench_floor *f)
{
	int one = 1;

	if (f->socket < 0 ||
		setsockopt(f->socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) ||
		fcntl(f->socket, F_SETFL, O_NONBLOCK))
		return errno;
	return 0;
}

static int tcp_enter(struct bench_floor *f)
{
	struct sockaddr_in there;
	socklen_t bytes = sizeof there;

	if (getsockname(f->listener, (struct sockaddr *)&there, &bytes))
		return errno;
	f->socket = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (f->socket < 0 || connect(f->socket, (struct sockaddr *)&there, bytes))
		return errno;
	return tcp_ready(f);
}

static int tcp_meet(struct bench_floor *f)
{
	f->socket = accept(f->listener, NULL, NULL);
	return tcp_ready(f);
}

static int tcp_send(int fd, const void *data, size_t n_bytes)
{
	for (size_t at = 0; at < n_bytes;) {
		ssize_t n = send(fd, (const uint8_t *)data + at, n_bytes - at, MSG_NOSIGNAL);

		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return errno;
		at += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

static int tcp_receive(int fd, void *data, size_t n_bytes)
{
	for (size_t at = 0; at < n_bytes;) {
		ssize_t n = recv(fd, (uint8_t *)data + at, n_bytes - at, 0);

		if (!n)
			return ECONNRESET;
		if (n < 0 && errno != EAGAIN && errno != EINTR)
			return errno;
		at += n > 0 ? (size_t)n : 0;
	}
	return 0;
}

static int tcp_round(struct bench_floor *f, const void *x, void *y, size_t n_bytes)
{
	int error = tcp_send(f->socket, x, n_bytes);

	return error ? error : tcp_receive(f->socket, y, n_bytes);
}

static int tcp_answer(struct bench_floor *f, size_t n_bytes)
{
	int error = tcp_receive(f->socket, f->x, n_bytes);

	if (error)
		return error;
	bench_floor_answer(f->y, f->x, n_bytes);
	return tcp_send(f->socket, f->y, n_bytes);
}

static void tcp_close(struct bench_floor *f)
{
	if (f->socket >= 0)
		close(f->socket);
	if (f->listener >= 0)
		close(f->listener);
}

static const struct bench_floor_medium media[] = {
	{ "shm", "spinning shared memory, the same copies", shm_open_floor, shm_meet, shm_meet,
		shm_round, shm_answer, shm_close },
	{ "tcp", "a plain TCP socket, spinning", tcp_open, tcp_enter, tcp_meet, tcp_round,
		tcp_answer, tcp_close },
};

const struct bench_floor_medium *bench_floor_medium(const char *address)
{
#ifdef BENCH_VERBS
	if (!strncmp(address, "verbs:", 6))
		return &bench_floor_verbs;
#endif
	for (size_t i = 0; i < sizeof media / sizeof media[0]; i++) {
		size_t n = strlen(media[i].scheme);

		if (!strncmp(address, media[i].scheme, n) && address[n] == ':')
			return &media[i];
	}
	return NULL;
}

/* ---- both ends ---- */

struct order {
	uint64_t n_bytes, n_rounds;
};

static void answer_all(struct bench_floor *f)
{
	struct order order;

	while (read(f->control, &order, sizeof order) == sizeof order) {
		for (uint64_t i = 0; i < order.n_rounds; i++) {
			if (f->medium->answer(f, order.n_bytes))
				_exit(TOOL_FAILED);
		}
	}
	_exit(TOOL_DONE);
}

static void live_there(struct bench_floor *f, int cpu)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	bench_pin(cpu);
	f->x = malloc(f->max_bytes);
	f->y = malloc(f->max_bytes);
	if (!f->x || !f->y || f->medium->enter(f))
		_exit(TOOL_FAILED);
	memset(f->x, 1, f->max_bytes);
	memset(f->y, 1, f->max_bytes);
	answer_all(f);
}

int bench_floor_open(struct bench_floor *f, const struct bench_floor_medium *medium,
	size_t max_bytes, int cpu)
{
	int ends[2] = { -1, -1 }, error;

	*f = (struct bench_floor){
		.medium = medium, .max_bytes = max_bytes, .control = -1, .listener = -1, .socket = -1
	};
	error = medium->open(f);
	if (!error && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		error = errno;
	if (!error) {
		f->control = ends[0];
		f->other = fork();
		error = f->other < 0 ? errno : 0;
	}
	if (!f->other && !error) {
		close(ends[0]);
		f->control = ends[1];
		live_there(f, cpu);
	}
	if (ends[1] >= 0)
		close(ends[1]);
	if (!error)
		error = medium->meet(f);
	if (!error)
		return TOOL_DONE;
	bench_floor_close(f);
	return tool_fail(TOOL_FAILED, "floor of %s: %s", medium->scheme, strerror(error));
}

void bench_floor_close(struct bench_floor *f)
{
	if (!f->medium)
		return;
	if (f->other > 0) {
		kill(f->other, SIGKILL);
		waitpid(f->other, NULL, 0);
	}
	if (f->control >= 0)
		close(f->control);
	f->medium->close(f);
	f->medium = NULL;
}

int bench_floor_begin(struct bench_floor *f, size_t n_bytes, uint64_t n_rounds)
{
	struct order order = { n_bytes, n_rounds };

	return write(f->control, &order, sizeof order) == sizeof order ? 0 : errno;
}
