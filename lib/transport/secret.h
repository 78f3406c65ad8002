/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A key that both sides prove, and what the module afd-tls.so does with it (OpenSSL; none of it is
 * ours). The transport has one secret when its params say a key; links prove it in the handshake
 * (prove.c), and tcp: links are encrypted with it when that is asked for.
 *
 * Invariant: the key's bytes are in this struct and in the module's config only, and are wiped with
 * them; they are never logged, and never cross.
 */
#ifndef AFD_LIB_TRANSPORT_SECRET_H
#define AFD_LIB_TRANSPORT_SECRET_H

#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include <afd/context.h>

enum { AFD__KEY_MIN = 16, AFD__KEY_MAX = 4096, AFD__MAC_BYTES = 32, AFD__SECRET_TEXT = 96 };

/* What the module offers. Results are 0 or a negative errno; `text` gets the reason. */
struct afd__secret_ops {
	int (*random)(void *bytes, size_t n_bytes);
	/* HMAC-SHA256 over the parts. */
	int (*mac)(uint8_t out[AFD__MAC_BYTES], const void *key, size_t key_bytes,
		const struct iovec *parts, int n_parts);
	int (*equal)(const void *a, const void *b, size_t n_bytes); /* in constant time */

	/* TLS 1.3 with a pre-shared key that HKDF-SHA256 derives from ours. */
	int (*tls_config)(void **out, const void *key, size_t key_bytes, char *text);
	void (*tls_config_free)(void *config);
	int (*tls_open)(void **out, void *config, int fd, int accepting);
	void (*tls_close)(void *session);
	/* Bytes; 0: not now; negative: the end. The handshake is part of the first of them. */
	ssize_t (*tls_read)(void *session, void *bytes, size_t n_bytes, char *text);
	ssize_t (*tls_write)(void *session, const void *bytes, size_t n_bytes, char *text);
};

struct afd__secret {
	const struct afd__secret_ops *ops;
	void *module;
	uint8_t *key; /* [key_bytes] */
	size_t key_bytes;
	void *tls_config; /* NULL: links are not encrypted */
};

/* From bytes of the host, or from a file that only its owner may read. -EINVAL: a size out of
 * range; -EACCES: others may read the file; -ENOSYS: this build has no afd-tls.so. */
int afd__secret_open(struct afd__secret **out, struct afd_context *ctx, const char *file,
	const void *key, size_t key_bytes, int tls);
void afd__secret_close(struct afd__secret *secret); /* NULL is fine */

#endif
