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

/* What can carry rows in this build, and what has a name but is not part of it. auto: is neither. */
enum { AFD__N_BACKENDS = 4, AFD__N_ABSENT_BACKENDS = 2 };
extern const struct afd__transport_ops *const afd__backends[AFD__N_BACKENDS];
extern const char *const afd__absent_backends[AFD__N_ABSENT_BACKENDS];

/* -EINVAL malformed, -ENOSYS a scheme that is not part of this build. */
int afd__address_parse(struct afd__address *address, struct afd_context *ctx, const char *text,
	bool to_listen);
/* The same, but does not ask whether this machine can carry it. */
int afd__address_read(struct afd__address *address, struct afd_context *ctx, const char *text,
	bool to_listen);

#endif
