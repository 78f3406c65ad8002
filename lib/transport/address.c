/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The registry of backends is the array below. Names are short and plain, so that they can stand in
 * a log line, a metric's label and the name of a socket as they are.
 */
#include "address.h"

#include <stdio.h>
#include <string.h>

enum { NAME_MAX_BYTES = 80 };

static const struct afd__transport_ops *const backends[] = { &afd__transport_loop,
	&afd__transport_shm, &afd__transport_tcp, &afd__transport_verbs, &afd__transport_auto };

/* Of this library, but not of this build. */
static const char *const other_schemes[] = { "nccl", "ipc" };

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

static const struct afd__transport_ops *find_backend(
	struct afd_context *ctx, const char *scheme, size_t bytes)
{
	for (size_t i = 0; i < sizeof(backends) / sizeof(backends[0]); i++) {
		if (strlen(backends[i]->scheme) == bytes &&
			!strncmp(backends[i]->scheme, scheme, bytes))
			return backends[i];
	}
	if (ctx->test_transport && strlen(ctx->test_transport->scheme) == bytes &&
		!strncmp(ctx->test_transport->scheme, scheme, bytes))
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
	for (size_t i = 0; !address->ops && i < sizeof(other_schemes) / sizeof(other_schemes[0]);
		i++) {
		if (strlen(other_schemes[i]) == bytes && !strncmp(other_schemes[i], text, bytes))
			return afd__error(-ENOSYS,
				"address \"%.100s\": %s: is not part of this build, which has "
				"loop:, shm:, tcp:, verbs: and auto:",
				text, other_schemes[i]);
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
