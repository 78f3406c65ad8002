/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Wraps afd__transport_loop. A slot that is dropped counts as sent, as it would on a network; a
 * delayed one waits in a queue of its own until a timer says so, and all later ones behind it.
 */
#include "lossy.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define LOOP (&afd__transport_loop)

enum { QUEUE = 64, WHICH_TIMER = 7 };

struct lossy_plan lossy_plan;

struct late {
	uint32_t slot, bytes;
	uint64_t at_ns;
};

struct lossy {
	struct afd__wire loop;
	int side, timer;
	unsigned n_late, n_lost;
	struct late late[QUEUE];
	uint32_t lost[QUEUE]; /* slots that were dropped, and not reported as sent yet */
};

static struct lossy *of(struct afd__wire *wire)
{
	return wire->state;
}

void lossy_begin(int side)
{
	lossy_plan.drop = lossy_plan.garble = lossy_plan.garble_at = lossy_plan.cut = 0;
	lossy_plan.delay_ms = lossy_plan.silent_from = 0;
	lossy_plan.n_sent[LOSSY_ATTENTION] = lossy_plan.n_sent[LOSSY_FFN] = 0;
	lossy_plan.side = side;
}

void lossy_add(struct afd_context *ctx)
{
	ctx->test_transport = &lossy_transport;
}

/* ---- meeting ---- */

static int probe(struct afd_context *ctx)
{
	return 0;
}

static int listen_at(struct afd__listener *ln, const char *name)
{
	return LOOP->listen(ln, name);
}
static void unlisten(struct afd__listener *ln)
{
	LOOP->unlisten(ln);
}

static int wrap(struct afd__wire *wire, const struct lossy *made)
{
	struct lossy *lossy = malloc(sizeof(*lossy));

	assert(lossy);
	*lossy = *made;
	lossy->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
	wire->state = lossy;
	return 1;
}

static int accept_one(struct afd__listener *ln, struct afd__wire *wire)
{
	struct lossy lossy = { .loop = *wire, .side = LOSSY_FFN };
	int rc;

	lossy.loop.ops = LOOP;
	rc = LOOP->accept(ln, &lossy.loop);
	return rc == 1 ? wrap(wire, &lossy) : rc;
}

static int connect_to(struct afd__wire *wire, const char *name)
{
	struct lossy lossy = { .loop = *wire, .side = LOSSY_ATTENTION };
	int rc;

	lossy.loop.ops = LOOP;
	rc = LOOP->connect(&lossy.loop, name);
	return rc == 1 ? wrap(wire, &lossy) : rc;
}

static int hello_send(struct afd__wire *wire, const void *message, size_t bytes)
{
	return LOOP->hello_send(&of(wire)->loop, message, bytes);
}

static int hello_receive(struct afd__wire *wire, void *message, size_t capacity, size_t *bytes)
{
	return LOOP->hello_receive(&of(wire)->loop, message, capacity, bytes);
}

static int bind_slots(struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting)
{
	struct epoll_event event = { .events = EPOLLIN,
		.data.ptr = (char *)wire->tag + WHICH_TIMER };
	int rc = LOOP->bind(&of(wire)->loop, geometry, accepting);

	if (rc == 1)
		epoll_ctl(wire->epoll_fd, EPOLL_CTL_ADD, of(wire)->timer, &event);
	return rc;
}

/* ---- slots ---- */

static void *send_slot(struct afd__wire *wire, uint32_t slot)
{
	return LOOP->send_slot(&of(wire)->loop, slot);
}
static const void *receive_slot(struct afd__wire *wire, uint32_t slot)
{
	return LOOP->receive_slot(&of(wire)->loop, slot);
}

static void set_timer(struct lossy *lossy)
{
	uint64_t at_ns = lossy->n_late ? lossy->late[0].at_ns : 0;
	struct itimerspec when = { .it_value = { .tv_sec = (time_t)(at_ns / 1000000000),
					   .tv_nsec = (long)(at_ns % 1000000000) } };

	timerfd_settime(lossy->timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static void flush(struct lossy *lossy)
{
	unsigned n = 0;

	while (n < lossy->n_late && lossy->late[n].at_ns <= afd__now_ns()) {
		LOOP->post_send(&lossy->loop, lossy->late[n].slot, lossy->late[n].bytes);
		n++;
	}
	if (!n)
		return;
	lossy->n_late -= n;
	memmove(lossy->late, lossy->late + n, lossy->n_late * sizeof(lossy->late[0]));
	set_timer(lossy);
}

static int post_late(struct lossy *lossy, uint32_t slot, uint32_t bytes)
{
	assert(lossy->n_late < QUEUE);
	lossy->late[lossy->n_late++] = (struct late){ slot, bytes,
		afd__now_ns() + lossy_plan.delay_ms * UINT64_C(1000000) };
	set_timer(lossy);
	return 0;
}

static int post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes)
{
	struct lossy *lossy = of(wire);
	unsigned n;

	if (lossy->side != lossy_plan.side)
		return LOOP->post_send(&lossy->loop, slot, bytes);
	n = ++lossy_plan.n_sent[lossy->side];
	if (n == lossy_plan.cut) {
		LOOP->shut(&lossy->loop);
		return afd__error(-ECONNRESET, "cut by the test");
	}
	if (n == lossy_plan.drop || (lossy_plan.silent_from && n >= lossy_plan.silent_from)) {
		lossy->lost[lossy->n_lost++] = slot;
		return 0;
	}
	if (n == lossy_plan.garble)
		((uint8_t *)send_slot(wire, slot))[lossy_plan.garble_at] ^= 0x5a;
	return lossy_plan.delay_ms ? post_late(lossy, slot, bytes)
				   : LOOP->post_send(&lossy->loop, slot, bytes);
}

static int post_receive(struct afd__wire *wire, uint32_t slot)
{
	return LOOP->post_receive(&of(wire)->loop, slot);
}

static int poll_slots(struct afd__wire *wire, struct afd__completion *out, int max)
{
	struct lossy *lossy = of(wire);
	int n = 0;

	flush(lossy);
	while (lossy->n_lost && n < max)
		out[n++] = (struct afd__completion){ .kind = AFD__SENT,
			.slot = lossy->lost[--lossy->n_lost] };
	return n ? n : LOOP->poll(&lossy->loop, out, max);
}

static int ready(struct afd__wire *wire)
{
	return of(wire)->n_lost || LOOP->ready(&of(wire)->loop);
}
static int arm(struct afd__wire *wire)
{
	return of(wire)->n_lost || LOOP->arm(&of(wire)->loop);
}

static int event(struct afd__wire *wire, unsigned which, uint32_t events)
{
	uint64_t n;

	if (which != WHICH_TIMER)
		return LOOP->event(&of(wire)->loop, which, events);
	if (read(of(wire)->timer, &n, sizeof(n)) > 0)
		flush(of(wire));
	return 0;
}

static void shut(struct afd__wire *wire)
{
	struct lossy *lossy = of(wire);

	if (lossy->timer >= 0) {
		epoll_ctl(wire->epoll_fd, EPOLL_CTL_DEL, lossy->timer, NULL);
		close(lossy->timer);
	}
	lossy->timer = -1;
	LOOP->shut(&lossy->loop);
}

static void close_wire(struct afd__wire *wire)
{
	shut(wire);
	LOOP->close(&of(wire)->loop);
	free(wire->state);
	wire->state = NULL;
}

const struct afd__transport_ops lossy_transport = {
	.scheme = "lossy",
	.probe = probe,
	.listen = listen_at,
	.unlisten = unlisten,
	.accept = accept_one,
	.connect = connect_to,
	.hello_send = hello_send,
	.hello_receive = hello_receive,
	.bind = bind_slots,
	.send_slot = send_slot,
	.receive_slot = receive_slot,
	.post_send = post_send,
	.post_receive = post_receive,
	.poll = poll_slots,
	.ready = ready,
	.arm = arm,
	.event = event,
	.shut = shut,
	.close = close_wire,
};
