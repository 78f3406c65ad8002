/* SPDX-License-Identifier: Apache-2.0 */
/*
 * verbs: RDMA between hosts, "HOST:PORT" as tcp: has it, then "?dev=NAME,NAME&port=N&gid=N&mtu=N&
 * sl=N&timeout=N", all of it optional. The ends meet over a tcp: connection: the handshake crosses
 * there, then what each end's queue pairs are, and at last its end tells a death, since a side that
 * only receives is told nothing by its adapter. Rows cross by the module (modules/verbs).
 *
 * Invariant: the accepting end's queue pairs are ready before the connecting end knows of them, and
 * that one's before it says READY; so nothing is sent to a queue pair that drops it.
 */
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "../device/backends.h"
#include "../device/module.h"
#include "hello.h"
#include "socket.h"
#include "tcp.h"
#include "verbs.h"

enum { PREFIX_BYTES = 12, NAME_BYTES = 96, TIMEOUT_MAX = 21 };

enum bind_phase { BIND_BEGINS, BIND_SENDS, BIND_AWAITS, BIND_DONE };

struct verbs {
	struct afd__wire control; /* the tcp: connection */
	struct afd__verbs_place place;
	const struct afd__verbs_ops *ops;
	void *end;
	enum bind_phase phase;
	/* that goes out */
	uint8_t message[PREFIX_BYTES + AFD__VERBS_BLOB_MAX + AFD__SEAL_BYTES];
	size_t message_bytes;
	/* A message that came instead of the peer's queue pairs: a refusal. */
	uint8_t other[AFD__HELLO_MAX];
	size_t other_bytes;
};

struct verbs_listener {
	struct afd__listener tcp;
	struct afd__verbs_place place;
};

static struct verbs *verbs_of(const struct afd__wire *wire)
{
	return wire->state;
}

/* ---- addresses ---- */

static int parse_number(const char *text, const char *key, const char *value, unsigned long limit,
	unsigned long *out)
{
	char *rest;

	errno = 0;
	*out = strtoul(value, &rest, 10);
	if (*value < '0' || *value > '9' || *rest || errno || *out > limit)
		return afd__error(-EINVAL, "address \"%.100s\": %s is \"%.20s\", limit 0 to %lu",
			text, key, value, limit);
	return 0;
}

static int parse_devices(struct afd__verbs_place *place, const char *text, char *names)
{
	char *save = NULL;

	for (char *name = strtok_r(names, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
		if (place->n_devices == AFD__RAILS_MAX)
			return afd__error(-EINVAL, "address \"%.100s\": dev names more than %d", text,
				AFD__RAILS_MAX);
		if (strlen(name) >= AFD__DEVICE_NAME_BYTES)
			return afd__error(-EINVAL,
				"address \"%.100s\": dev \"%.40s\" has %zu characters, limit %d",
				text, name, strlen(name), AFD__DEVICE_NAME_BYTES - 1);
		snprintf(place->devices[place->n_devices++], AFD__DEVICE_NAME_BYTES, "%s", name);
	}
	return place->n_devices
		       ? 0
		       : afd__error(-EINVAL, "address \"%.100s\": dev names no device", text);
}

static int parse_parameter(struct afd__verbs_place *place, const char *text, char *parameter)
{
	char *value = strchr(parameter, '=');
	unsigned long n;
	int rc;

	if (!value)
		return afd__error(-EINVAL, "address \"%.100s\": \"%.20s\" must be NAME=VALUE", text,
			parameter);
	*value++ = '\0';
	if (!strcmp(parameter, "dev"))
		return parse_devices(place, text, value);
	if (!strcmp(parameter, "mtu")) {
		rc = parse_number(text, parameter, value, 4096, &n);
		place->mtu = (uint32_t)n;
		if (!rc && (n < 256 || (n & (n - 1))))
			rc = afd__error(-EINVAL,
				"address \"%.100s\": mtu is %lu, must be 256, 512, 1024, 2048 or 4096",
				text, n);
	} else if (!strcmp(parameter, "port")) {
		rc = parse_number(text, parameter, value, 255, &n);
		place->port = (uint32_t)n;
	} else if (!strcmp(parameter, "gid")) {
		rc = parse_number(text, parameter, value, 255, &n);
		place->gid = (int32_t)n;
	} else if (!strcmp(parameter, "sl")) {
		rc = parse_number(text, parameter, value, 15, &n);
		place->service_level = (uint32_t)n;
	} else if (!strcmp(parameter, "timeout")) {
		rc = parse_number(text, parameter, value, TIMEOUT_MAX, &n);
		place->timeout = (uint32_t)n;
	} else {
		rc = afd__error(-EINVAL,
			"address \"%.100s\": no parameter \"%.20s\"; there are dev, port, gid, mtu, "
			"sl and timeout",
			text, parameter);
	}
	return rc;
}

/* HOST:PORT to `host`, the rest to `place`. `text` is for errors. */
static int parse_name(char host[NAME_BYTES], struct afd__verbs_place *place, const char *text,
	const char *name)
{
	const char *query = strchrnul(name, '?');
	char parameters[NAME_BYTES + 32], *rest = parameters;
	int rc = 0;

	*place = (struct afd__verbs_place){ .gid = -1 };
	if ((size_t)(query - name) >= NAME_BYTES || strlen(query) >= sizeof(parameters))
		return afd__error(-EINVAL, "address \"%.100s\": is too long", text);
	snprintf(host, NAME_BYTES, "%.*s", (int)(query - name), name);
	if (!*query)
		return 0;
	snprintf(parameters, sizeof(parameters), "%s", query + 1);
	while (rest && !rc)
		rc = parse_parameter(place, text, strsep(&rest, "&"));
	return rc;
}

static int verbs_check_name(const char *text, const char *name, bool to_listen)
{
	struct afd__verbs_place place;
	char host[NAME_BYTES];

	if (parse_name(host, &place, text, name))
		return -EINVAL;
	return afd__transport_tcp.check_name(text, host, to_listen);
}

static int verbs_rank_name(char *out, size_t capacity, const char *name, uint32_t rank)
{
	struct afd__verbs_place place;
	char host[NAME_BYTES], at[NAME_BYTES];
	int rc = parse_name(host, &place, name, name);

	if (!rc)
		rc = afd__transport_tcp.rank_name(at, sizeof(at), host, rank);
	if (!rc)
		snprintf(out, capacity, "%s%s", at, strchrnul(name, '?'));
	return rc;
}

static int verbs_probe(struct afd_context *ctx)
{
	const struct afd__verbs_ops *ops;
	void *handle;
	int rc = afd__module_load_verbs(&handle, &ops);

	if (rc)
		return rc;
	rc = ops->probe(&afd__module_host, ctx);
	afd__module_unload(handle);
	return rc;
}

/* ---- the listener ---- */

static int verbs_listen(struct afd__listener *ln, const char *name)
{
	struct verbs_listener *own = afd__alloc(ln->ctx, 1, sizeof(*own));
	char host[NAME_BYTES];
	int rc;

	if (!own)
		return -ENOMEM;
	own->tcp = *ln;
	own->tcp.ops = &afd__transport_tcp;
	rc = parse_name(host, &own->place, ln->address, name);
	if (!rc)
		rc = afd__transport_tcp.listen(&own->tcp, host);
	if (rc) {
		afd__free(own);
		return rc;
	}
	/* It has written down the port that 0 became. */
	if (!strncmp(own->tcp.address, "tcp:", 4))
		snprintf(ln->address, sizeof(ln->address), "verbs:%.90s%.30s", own->tcp.address + 4,
			strchrnul(name, '?'));
	ln->state = own;
	return 0;
}

static void verbs_unlisten(struct afd__listener *ln)
{
	struct verbs_listener *own = ln->state;

	afd__transport_tcp.unlisten(&own->tcp);
	afd__free(own);
	ln->state = NULL;
}

/* ---- a wire ---- */

static int verbs_open(struct afd__wire *wire, const struct afd__verbs_place *place)
{
	struct verbs *v = afd__alloc(wire->ctx, 1, sizeof(*v));

	if (!v)
		return -ENOMEM;
	v->control = (struct afd__wire){ .ops = &afd__transport_tcp,
		.ctx = wire->ctx,
		.epoll_fd = wire->epoll_fd,
		.tag = wire->tag };
	v->place = *place;
	wire->state = v;
	return 0;
}

static void verbs_free(struct afd__wire *wire)
{
	afd__free(wire->state);
	wire->state = NULL;
}

static int verbs_accept(struct afd__listener *ln, struct afd__wire *wire)
{
	struct verbs_listener *own = ln->state;
	int rc = verbs_open(wire, &own->place);

	if (rc)
		return rc;
	rc = afd__transport_tcp.accept(&own->tcp, &verbs_of(wire)->control);
	if (rc != 1) {
		verbs_free(wire);
		return rc;
	}
	snprintf(wire->peer, sizeof(wire->peer), "%s", verbs_of(wire)->control.peer);
	wire->source = verbs_of(wire)->control.source;
	return 1;
}

static int verbs_connect(struct afd__wire *wire, const char *name)
{
	struct afd__verbs_place place;
	char host[NAME_BYTES];
	int rc = parse_name(host, &place, name, name);

	if (!rc && !wire->state)
		rc = verbs_open(wire, &place);
	if (rc)
		return rc;
	rc = afd__transport_tcp.connect(&verbs_of(wire)->control, host);
	if (rc < 0)
		verbs_free(wire);
	return rc;
}

static int verbs_hello_send(struct afd__wire *wire, const void *message, size_t bytes)
{
	return wire->error ? afd__wire_failed(wire)
			   : afd__stream_hello_send(&verbs_of(wire)->control, message, bytes);
}

static int verbs_hello_receive(
	struct afd__wire *wire, void *message, size_t capacity, size_t *bytes)
{
	struct verbs *v = verbs_of(wire);

	if (wire->error)
		return afd__wire_failed(wire);
	if (!v->other_bytes || v->other_bytes > capacity)
		return afd__stream_hello_receive(&v->control, message, capacity, bytes);
	memcpy(message, v->other, v->other_bytes);
	*bytes = v->other_bytes;
	v->other_bytes = 0;
	return 1;
}

/* ---- binding ---- */

/* Where our end of the connection is tells which device and GID lead to the peer. */
static void find_address(const struct afd__wire *control, uint8_t out[16])
{
	static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };
	struct sockaddr_storage ours = { 0 };
	socklen_t bytes = sizeof(ours);

	if (getsockname(tcp_of(control)->fd, (struct sockaddr *)&ours, &bytes))
		return;
	if (ours.ss_family == AF_INET6) {
		memcpy(out, &((const struct sockaddr_in6 *)&ours)->sin6_addr, 16);
	} else {
		memcpy(out, mapped, sizeof(mapped));
		memcpy(out + 12, &((const struct sockaddr_in *)&ours)->sin_addr, 4);
	}
}

/* The transport's hub is the first wire's to make. */
static int open_end(struct afd__wire *wire, const struct afd__wire_slots *geometry)
{
	struct verbs *v = verbs_of(wire);
	void *handle;
	int rc;

	if (v->end)
		return 0;
	/* Its code is never unmapped, so the handle may go. */
	rc = afd__module_load_verbs(&handle, &v->ops);
	if (rc)
		return rc;
	afd__module_unload(handle);
	if (!*wire->shared)
		rc = v->ops->hub_open(wire->shared, &afd__module_host, wire->ctx, wire->epoll_fd);
	if (rc)
		return rc;
	find_address(&v->control, v->place.address);
	return v->ops->open(&v->end, *wire->shared, &v->place, geometry, wire->device);
}

static int state_ours(struct afd__wire *wire)
{
	struct verbs *v = verbs_of(wire);
	size_t bytes = PREFIX_BYTES + v->ops->describe(v->end, v->message + PREFIX_BYTES);
	int rc;

	afd__hello_prefix(v->message, AFD__QUEUE_PAIRS, (uint32_t)bytes);
	rc = wire->proof.seal(wire->proof.user, v->message, &bytes);
	if (!rc)
		v->message_bytes = bytes;
	return rc;
}

static int send_ours(struct afd__wire *wire)
{
	struct verbs *v = verbs_of(wire);
	int rc = v->message_bytes ? 0 : state_ours(wire);

	return rc ? rc : afd__stream_hello_send(&v->control, v->message, v->message_bytes);
}

/* What is no description of queue pairs is kept for the front door, which is told of an end and
 * checks its proof. */
static int take_theirs(struct afd__wire *wire)
{
	struct verbs *v = verbs_of(wire);
	struct afd__hello said = { 0 };
	size_t bytes;
	int rc = afd__stream_hello_receive(&v->control, v->other, sizeof(v->other), &bytes);

	if (rc != 1)
		return rc;
	rc = afd__hello_decode_prefix(&said, v->other, bytes);
	if (rc)
		return rc;
	if (said.kind != AFD__QUEUE_PAIRS) {
		v->other_bytes = bytes;
		return afd__error(-ECONNRESET, "the peer sent message %u, not its queue pairs",
			said.kind);
	}
	rc = wire->proof.check(wire->proof.user, v->other, &bytes);
	if (rc)
		return afd__error_prefix(rc, "queue pairs");
	rc = v->ops->connect(v->end, v->other + PREFIX_BYTES, bytes - PREFIX_BYTES);
	return rc ? rc : 1;
}

static int bind_step(struct afd__wire *wire, int accepting)
{
	struct verbs *v = verbs_of(wire);
	int rc;

	switch (v->phase) {
	case BIND_BEGINS:
		v->phase = accepting ? BIND_AWAITS : BIND_SENDS;
		return 1;
	case BIND_SENDS:
		rc = send_ours(wire);
		if (rc == 1)
			v->phase = accepting ? BIND_DONE : BIND_AWAITS;
		return rc;
	case BIND_AWAITS:
		rc = take_theirs(wire);
		if (rc == 1)
			v->phase = accepting ? BIND_SENDS : BIND_DONE;
		return rc;
	default:
		return 0;
	}
}

static int verbs_bind(struct afd__wire *wire, const struct afd__wire_slots *geometry, int accepting)
{
	struct verbs *v = verbs_of(wire);
	int rc;

	if (wire->error)
		return afd__wire_failed(wire);
	rc = open_end(wire, geometry);
	if (rc)
		return rc;
	wire->geometry = *geometry;
	do
		rc = bind_step(wire, accepting);
	while (rc == 1 && v->phase != BIND_DONE);
	return rc;
}

/* ---- rows ---- */

static void *verbs_send_slot(struct afd__wire *wire, uint32_t slot)
{
	return verbs_of(wire)->ops->send_slot(verbs_of(wire)->end, slot);
}

static const void *verbs_receive_slot(struct afd__wire *wire, uint32_t slot)
{
	return verbs_of(wire)->ops->receive_slot(verbs_of(wire)->end, slot);
}

static void *verbs_memory(struct afd__wire *wire, size_t *bytes)
{
	return verbs_of(wire)->ops->memory(verbs_of(wire)->end, bytes);
}

static void *verbs_rows(struct afd__wire *wire, uint32_t slot, bool to_send)
{
	return verbs_of(wire)->ops->rows(verbs_of(wire)->end, slot, to_send);
}

static void verbs_leave_device(struct afd__wire *wire)
{
	struct verbs *v = verbs_of(wire);

	if (v && v->end)
		v->ops->leave_device(v->end);
}

static int verbs_post_rows(
	struct afd__wire *wire, uint32_t slot, uint32_t bytes, uint32_t rows_bytes)
{
	if (wire->error)
		return afd__wire_failed(wire);
	return verbs_of(wire)->ops->post_rows(verbs_of(wire)->end, slot, bytes, rows_bytes);
}

static int verbs_post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes)
{
	return verbs_post_rows(wire, slot, bytes, 0);
}

static int verbs_post_receive(struct afd__wire *wire, uint32_t slot)
{
	if (wire->error)
		return afd__wire_failed(wire);
	return verbs_of(wire)->ops->post_receive(verbs_of(wire)->end, slot);
}

static int verbs_poll(struct afd__wire *wire, struct afd__completion *out, int max)
{
	if (wire->error)
		return afd__wire_failed(wire);
	return afd__wire_fail(wire, verbs_of(wire)->ops->poll(verbs_of(wire)->end, out, max));
}

static int verbs_ready(struct afd__wire *wire)
{
	return wire->error || verbs_of(wire)->ops->ready(verbs_of(wire)->end);
}

static int verbs_arm(struct afd__wire *wire)
{
	return wire->error || verbs_of(wire)->ops->arm(verbs_of(wire)->end);
}

/* After the handshake nothing comes on the connection but its end. */
static int verbs_event(struct afd__wire *wire, unsigned which, uint32_t events)
{
	const struct tcp *control = tcp_of(&verbs_of(wire)->control);

	if (control->fd < 0 || !(events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)))
		return 0;
	return afd__socket_event(control->fd);
}

static void verbs_shut(struct afd__wire *wire)
{
	struct verbs *v = verbs_of(wire);

	/* First what was posted, then the connection, at whose end the peer stops listening. */
	if (v->end)
		v->ops->shut(v->end);
	afd__transport_tcp.shut(&v->control);
	if (!wire->error)
		wire->error = -ECONNRESET;
}

static void verbs_close(struct afd__wire *wire)
{
	struct verbs *v = verbs_of(wire);

	verbs_shut(wire);
	if (v->end)
		v->ops->close(v->end);
	afd__transport_tcp.close(&v->control);
	verbs_free(wire);
}

const struct afd__transport_ops afd__transport_verbs = {
	.scheme = "verbs",
	.in_clear = true,
	.check_name = verbs_check_name,
	.rank_name = verbs_rank_name,
	.probe = verbs_probe,
	.listen = verbs_listen,
	.unlisten = verbs_unlisten,
	.accept = verbs_accept,
	.connect = verbs_connect,
	.hello_send = verbs_hello_send,
	.hello_receive = verbs_hello_receive,
	.bind = verbs_bind,
	.send_slot = verbs_send_slot,
	.receive_slot = verbs_receive_slot,
	.memory = verbs_memory,
	.rows = verbs_rows,
	.leave_device = verbs_leave_device,
	.post_send = verbs_post_send,
	.post_rows = verbs_post_rows,
	.post_receive = verbs_post_receive,
	.poll = verbs_poll,
	.ready = verbs_ready,
	.arm = verbs_arm,
	.event = verbs_event,
	.shut = verbs_shut,
	.close = verbs_close,
};
