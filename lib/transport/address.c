/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The registry of backends is the arrays below. Names are short and plain, so that they can stand in
 * a log line, a metric's label and the name of a socket as they are.
 */
#include "address.h"

#include <stdio.h>
#include <string.h>

enum { NAME_MAX_BYTES = 80 };

const struct afd__transport_ops *const afd__backends[AFD__N_BACKENDS] = { &afd__transport_loop,
	&afd__transport_shm, &afd__transport_tcp, &afd__transport_verbs };

const char *const afd__absent_backends[AFD__N_ABSENT_BACKENDS] = { "nccl", "ipc" };

static int check_name(const char *text, const char *name)
{
	size_t bytes = strlen(name), at;

	if (!bytes || bytes > NAME_MAX_BYTES)
		return afd__error(-EINVAL,
			"address \"%.100s\": the name has %zu characters, must have 1 .. %d", text,
			bytes, NAME_MAX_BYTES);
	at = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");
	if (at < bytes)
		return afd__error(-EINVAL,
			"address \"%.100s\": character %zu of the name is none of [A-Za-z0-9._-]",
			text, at + 1);
	return 0;
}

static bool is_scheme(const char *scheme, const char *text, size_t bytes)
{
	return strlen(scheme) == bytes && !strncmp(scheme, text, bytes);
}

static const struct afd__transport_ops *find_backend(
	struct afd_context *ctx, const char *text, size_t bytes)
{
	for (size_t i = 0; i < AFD__N_BACKENDS; i++) {
		if (is_scheme(afd__backends[i]->scheme, text, bytes))
			return afd__backends[i];
	}
	if (is_scheme(afd__transport_auto.scheme, text, bytes))
		return &afd__transport_auto;
	if (ctx->test_transport && is_scheme(ctx->test_transport->scheme, text, bytes))
		return ctx->test_transport;
	return NULL;
}

int afd__address_read(
	struct afd__address *address, struct afd_context *ctx, const char *text, bool to_listen)
{
	const char *colon = text ? strchr(text, ':') : NULL;
	size_t bytes;

	if (!text)
		return afd__error(-EINVAL, "address: NULL");
	if (!colon || colon == text)
		return afd__error(
			-EINVAL, "address \"%.100s\": must be SCHEME:NAME, such as shm:ffn0", text);
	bytes = (size_t)(colon - text);
	address->ops = find_backend(ctx, text, bytes);
	for (size_t i = 0; !address->ops && i < AFD__N_ABSENT_BACKENDS; i++) {
		if (is_scheme(afd__absent_backends[i], text, bytes))
			return afd__error(-ENOSYS,
				"address \"%.100s\": %s: is not part of this build, which has "
				"loop:, shm:, tcp:, verbs: and auto:",
				text, afd__absent_backends[i]);
	}
	if (!address->ops)
		return afd__error(-EINVAL,
			"address \"%.100s\": unknown scheme; this build has loop:, shm:, "
			"tcp:, verbs: and auto:", text);
	if (strlen(text) >= sizeof(address->text))
		return afd__error(-EINVAL, "address \"%.100s\": has %zu characters, limit %zu",
			text, strlen(text), sizeof(address->text) - 1);
	if (address->ops->check_name ? address->ops->check_name(text, colon + 1, to_listen)
				     : check_name(text, colon + 1))
		return -EINVAL;
	snprintf(address->text, sizeof(address->text), "%s", text);
	address->name = address->text + bytes + 1;
	return 0;
}

int afd__address_parse(
	struct afd__address *address, struct afd_context *ctx, const char *text, bool to_listen)
{
	int rc = afd__address_read(address, ctx, text, to_listen);

	return rc ? rc : address->ops->probe(ctx);
}
