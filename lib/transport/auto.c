/* SPDX-License-Identifier: Apache-2.0 */
/*
 * auto: the best that was proved, "HOST:PORT" as tcp: has it, then what a verbs: address may have
 * behind it. It is no backend: a wire is always one of another table. Who listens does so by tcp: at
 * HOST:PORT, and at a shm: name and a verbs: port of chance, which it tells to whoever asks at the
 * first and has proved the key; who connects makes a survey (survey.c), each time anew.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "net.h"

enum { NAME_BYTES = 96 };

/* The tcp: part of a name. */
static int take_place(char place[NAME_BYTES], const char *text, const char *name)
{
	size_t bytes = strcspn(name, "?");

	if (bytes >= NAME_BYTES)
		return afd__error(-EINVAL, "address \"%.100s\": has %zu characters, limit %d", text,
			bytes, NAME_BYTES - 1);
	snprintf(place, NAME_BYTES, "%.*s", (int)bytes, name);
	return 0;
}

static int auto_check_name(const char *text, const char *name, bool to_listen)
{
	char place[NAME_BYTES];
	int rc = take_place(place, text, name);

	if (rc || !strchr(name, '?'))
		return rc ? rc : afd__transport_tcp.check_name(text, place, to_listen);
	return afd__transport_verbs.check_name(text, name, to_listen);
}

static int auto_probe(struct afd_context *ctx)
{
	return afd__transport_tcp.probe(ctx);
}

static int auto_listen(struct afd__listener *ln, const char *name)
{
	char place[NAME_BYTES], given[sizeof(ln->address)];
	int rc = take_place(place, ln->address, name);

	snprintf(given, sizeof(given), "%s", ln->address);
	ln->ops = &afd__transport_tcp;
	if (!rc)
		rc = ln->ops->listen(ln, place);
	/* It has written down the port that 0 became. */
	if (!rc && !strncmp(ln->address, "tcp:", 4)) {
		snprintf(place, sizeof(place), "%.80s", ln->address + 4);
		snprintf(ln->address, sizeof(ln->address), "auto:%.80s%.40s", place,
			strchrnul(given, '?'));
	}
	return rc;
}

static int make_name(char *name, size_t capacity)
{
	uint64_t chance[2];

	if (getrandom(chance, sizeof(chance), 0) != sizeof(chance))
		return afd__error(-EIO, "auto: no random numbers: %s", strerror(errno));
	snprintf(name, capacity, "auto-%016llx%016llx", (unsigned long long)chance[0],
		(unsigned long long)chance[1]);
	return 0;
}

static int listen_beside(afd_transport *net, const char *text)
{
	struct afd__address address;
	int rc = afd__address_parse(&address, net->ctx, text, true);

	return rc ? rc : afd__transport_listen_at(net, &address);
}

static int listen_by_shm(afd_transport *net)
{
	char name[sizeof(net->shm_name)], text[sizeof(name) + 8];
	int rc = make_name(name, sizeof(name));

	snprintf(text, sizeof(text), "shm:%s", name);
	if (!rc)
		rc = listen_beside(net, text);
	if (!rc)
		memcpy(net->shm_name, name, sizeof(name));
	return rc;
}

/* ":PORT", and what follows it: behind the last colon before any '?'. */
static const char *port_of(const char *name)
{
	return memrchr(name, ':', strcspn(name, "?"));
}

int afd__auto_write_verbs(char *text, size_t capacity, const char *name, uint32_t port)
{
	return snprintf(text, capacity, "verbs:%.*s:%u%s", (int)(port_of(name) - name), name, port,
		strchrnul(name, '?'));
}

/* At the same host, at a port of its own. */
static int listen_by_verbs(afd_transport *net, const char *name)
{
	char text[2 * NAME_BYTES];
	int rc;

	if (net->params.tls)
		return afd__error(-ENOTSUP, "rows cannot be encrypted there, and tls is 1");
	afd__auto_write_verbs(text, sizeof(text), name, 0);
	rc = listen_beside(net, text);
	if (rc)
		return rc;
	net->verbs_port = (uint32_t)atoi(port_of(net->listeners[net->n_listeners - 1].address) + 1);
	return 0;
}

/* What cannot be had is not offered; tcp: is there. The first auto: address is enough for all. */
void afd__auto_listen_beside(afd_transport *net, const struct afd__address *address)
{
	if (!net->shm_name[0] && listen_by_shm(net))
		afd__log(net->ctx, AFD_LOG_INFO, "%s: shm: is not offered: %s", address->text,
			afd_last_error());
	if (!net->verbs_port && listen_by_verbs(net, address->name))
		afd__log(net->ctx, AFD_LOG_INFO, "%s: verbs: is not offered: %s", address->text,
			afd_last_error());
}

static int auto_rank_name(char *out, size_t capacity, const char *name, uint32_t rank)
{
	char place[NAME_BYTES], at[NAME_BYTES];
	int rc = take_place(place, name, name);

	if (!rc)
		rc = afd__transport_tcp.rank_name(at, sizeof(at), place, rank);
	if (!rc)
		snprintf(out, capacity, "%s%s", at, strchrnul(name, '?'));
	return rc;
}

const struct afd__transport_ops afd__transport_auto = {
	.scheme = "auto",
	.check_name = auto_check_name,
	.rank_name = auto_rank_name,
	.probe = auto_probe,
	.listen = auto_listen,
};
