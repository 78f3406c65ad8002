/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Addresses: "scheme:rest". The scheme picks the backend; the rest is the backend's to read. Called
 * when a transport is created, never later.
 */
#ifndef AFD_LIB_TRANSPORT_ADDRESS_H
#define AFD_LIB_TRANSPORT_ADDRESS_H

#include "ops.h"

struct afd__address {
	const struct afd__transport_ops *ops;
	char text[128];   /* as given */
	const char *name; /* in text, after the colon */
};

/* -EINVAL malformed, -ENOSYS a scheme that is not part of this build. */
int afd__address_parse(struct afd__address *address, struct afd_context *ctx, const char *text,
	bool to_listen);
/* The same, but does not ask whether this machine can carry it. */
int afd__address_read(struct afd__address *address, struct afd_context *ctx, const char *text,
	bool to_listen);

#endif
