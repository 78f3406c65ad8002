/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What OpenSSL does for a transport with a key: random numbers, HMAC-SHA256, and TLS 1.3 with a
 * pre-shared key (HKDF-SHA256 of the transport's key, since OpenSSL takes no more than 512 bytes).
 * The only file that knows OpenSSL; opened at first use by lib/device/module.c.
 *
 * A session reads and writes its socket through a BIO of ours, so that nothing raises SIGPIPE, and
 * is good only when the pre-shared key was used: a server with a certificate instead is refused.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>

#include <openssl/core_names.h>

#include "lib/device/build_id.h"
#include "lib/device/module.h"
#include "lib/transport/secret.h"

enum { PSK_BYTES = 32 };
/* AES-GCM is good for 2^24.5 records with one key (RFC 8446, 5.5). */
enum { RECORDS_PER_KEY = 1 << 23 };

static const char identity[] = "afd";
static const char psk_info[] = "afd tls 1.3 psk 1";
static const unsigned char suite_id[] = { 0x13, 0x01 }; /* TLS_AES_128_GCM_SHA256 */

struct config {
	SSL_CTX *ctx;
	BIO_METHOD *socket_bio;
	unsigned char psk[PSK_BYTES];
};

struct session {
	SSL *ssl;
	int fd;
	int checked;        /* that the pre-shared key was used */
	uint32_t n_written; /* calls since the key that we write with is new */
	int refused;        /* the last one, which has to be repeated before anything else */
};

/* ---- numbers ---- */

static int tls_random(void *bytes, size_t n_bytes)
{
	return RAND_bytes(bytes, (int)n_bytes) == 1 ? 0 : -EIO;
}

static int tls_mac(uint8_t out[AFD__MAC_BYTES], const void *key, size_t key_bytes,
	const struct iovec *parts, int n_parts)
{
	OSSL_PARAM params[] = { OSSL_PARAM_construct_utf8_string(
					OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0),
		OSSL_PARAM_construct_end() };
	EVP_MAC *mac = EVP_MAC_fetch(NULL, "HMAC", NULL);
	EVP_MAC_CTX *ctx = mac ? EVP_MAC_CTX_new(mac) : NULL;
	size_t bytes = 0;
	int ok = ctx && EVP_MAC_init(ctx, key, key_bytes, params);

	for (int i = 0; ok && i < n_parts; i++)
		ok = EVP_MAC_update(ctx, parts[i].iov_base, parts[i].iov_len);
	ok = ok && EVP_MAC_final(ctx, out, &bytes, AFD__MAC_BYTES) && bytes == AFD__MAC_BYTES;
	EVP_MAC_CTX_free(ctx);
	EVP_MAC_free(mac);
	ERR_clear_error();
	return ok ? 0 : -EIO;
}

static int tls_equal(const void *a, const void *b, size_t n_bytes)
{
	return !CRYPTO_memcmp(a, b, n_bytes);
}

static int derive(unsigned char psk[PSK_BYTES], const void *key, size_t key_bytes)
{
	EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
	EVP_KDF_CTX *ctx = kdf ? EVP_KDF_CTX_new(kdf) : NULL;
	OSSL_PARAM params[] = {
		OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char *)"SHA256", 0),
		OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)key, key_bytes),
		OSSL_PARAM_construct_octet_string(
			OSSL_KDF_PARAM_INFO, (void *)psk_info, sizeof(psk_info) - 1),
		OSSL_PARAM_construct_end(),
	};
	int ok = ctx && EVP_KDF_derive(ctx, psk, PSK_BYTES, params) > 0;

	EVP_KDF_CTX_free(ctx);
	EVP_KDF_free(kdf);
	return ok;
}

/* ---- the socket ---- */

static int bio_write(BIO *bio, const char *bytes, int n_bytes)
{
	const struct session *s = BIO_get_data(bio);
	ssize_t n = send(s->fd, bytes, (size_t)n_bytes, MSG_DONTWAIT | MSG_NOSIGNAL);

	BIO_clear_retry_flags(bio);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		BIO_set_retry_write(bio);
	return (int)n;
}

static int bio_read(BIO *bio, char *bytes, int n_bytes)
{
	const struct session *s = BIO_get_data(bio);
	ssize_t n = recv(s->fd, bytes, (size_t)n_bytes, MSG_DONTWAIT);

	BIO_clear_retry_flags(bio);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		BIO_set_retry_read(bio);
	return (int)n;
}

static long bio_ctrl(BIO *bio, int command, long number, void *pointer)
{
	return command == BIO_CTRL_FLUSH;
}

/* ---- the pre-shared key ---- */

static SSL_SESSION *make_psk(SSL *ssl)
{
	const struct config *config = SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl));
	const SSL_CIPHER *cipher = SSL_CIPHER_find(ssl, suite_id);
	SSL_SESSION *psk = SSL_SESSION_new();

	if (psk && cipher && SSL_SESSION_set1_master_key(psk, config->psk, PSK_BYTES) &&
		SSL_SESSION_set_cipher(psk, cipher) &&
		SSL_SESSION_set_protocol_version(psk, TLS1_3_VERSION))
		return psk;
	SSL_SESSION_free(psk);
	return NULL;
}

static int use_psk(SSL *ssl, const EVP_MD *md, const unsigned char **id, size_t *id_bytes,
	SSL_SESSION **out)
{
	*id = (const unsigned char *)identity;
	*id_bytes = sizeof(identity) - 1;
	*out = make_psk(ssl);
	return !!*out;
}

static int find_psk(SSL *ssl, const unsigned char *id, size_t id_bytes, SSL_SESSION **out)
{
	*out = NULL;
	if (id_bytes != sizeof(identity) - 1 || memcmp(id, identity, id_bytes))
		return 1;
	*out = make_psk(ssl);
	return !!*out;
}

static void tls_config_free(void *opaque)
{
	struct config *config = opaque;

	if (!config)
		return;
	SSL_CTX_free(config->ctx);
	BIO_meth_free(config->socket_bio);
	OPENSSL_cleanse(config, sizeof(*config));
	free(config);
}

static int set_up(struct config *config)
{
	BIO_METHOD *bio = config->socket_bio;
	SSL_CTX *ctx = config->ctx;

	if (!bio || !ctx || !BIO_meth_set_write(bio, bio_write) ||
		!BIO_meth_set_read(bio, bio_read) || !BIO_meth_set_ctrl(bio, bio_ctrl) ||
		!SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) ||
		!SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256") ||
		!SSL_CTX_set_num_tickets(ctx, 0))
		return 0;
	SSL_CTX_set_app_data(ctx, config);
	SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
	SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
	SSL_CTX_set_mode(ctx, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
	SSL_CTX_set_read_ahead(ctx, 1);
	SSL_CTX_set_psk_use_session_callback(ctx, use_psk);
	SSL_CTX_set_psk_find_session_callback(ctx, find_psk);
	return 1;
}

static int tls_config(void **out, const void *key, size_t key_bytes, char *text)
{
	struct config *config = calloc(1, sizeof(*config));

	if (!config)
		return -ENOMEM;
	config->ctx = SSL_CTX_new(TLS_method());
	config->socket_bio = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "afd");
	if (!derive(config->psk, key, key_bytes) || !set_up(config)) {
		snprintf(text, AFD__SECRET_TEXT, "%s",
			ERR_reason_error_string(ERR_peek_error()) ?: "OpenSSL cannot");
		ERR_clear_error();
		tls_config_free(config);
		return -EIO;
	}
	*out = config;
	return 0;
}

/* ---- sessions ---- */

static void tls_close(void *opaque)
{
	struct session *s = opaque;

	if (!s)
		return;
	SSL_free(s->ssl);
	free(s);
}

static int tls_open(void **out, void *opaque, int fd, int accepting)
{
	struct config *config = opaque;
	struct session *s = calloc(1, sizeof(*s));
	BIO *bio = BIO_new(config->socket_bio);

	if (s)
		s->ssl = SSL_new(config->ctx);
	if (!s || !bio || !s->ssl) {
		BIO_free(bio);
		tls_close(s);
		ERR_clear_error();
		return -ENOMEM;
	}
	s->fd = fd;
	BIO_set_data(bio, s);
	BIO_set_init(bio, 1);
	SSL_set_bio(s->ssl, bio, bio);
	if (accepting)
		SSL_set_accept_state(s->ssl);
	else
		SSL_set_connect_state(s->ssl);
	/* A certificate instead of the key is never good. */
	if (!accepting)
		SSL_set_verify(s->ssl, SSL_VERIFY_PEER, NULL);
	*out = s;
	return 0;
}

/* 0: not now. */
static int result_of(struct session *s, int rc, char *text)
{
	int kind = SSL_get_error(s->ssl, rc);
	const char *reason = ERR_reason_error_string(ERR_peek_error());

	if (kind == SSL_ERROR_WANT_READ || kind == SSL_ERROR_WANT_WRITE) {
		ERR_clear_error();
		return 0;
	}
	snprintf(text, AFD__SECRET_TEXT, "%s", reason ? reason : "the peer is gone");
	ERR_clear_error();
	return kind == SSL_ERROR_SSL ? -EACCES : -ECONNRESET;
}

/* A handshake that is over without the key is no proof. */
static int check_key(struct session *s, char *text)
{
	if (s->checked || !SSL_is_init_finished(s->ssl))
		return 0;
	if (!SSL_session_reused(s->ssl)) {
		snprintf(text, AFD__SECRET_TEXT, "the peer does not use the key");
		return -EACCES;
	}
	s->checked = 1;
	return 0;
}

static int shake(struct session *s, char *text)
{
	int rc;

	if (s->checked)
		return 1;
	ERR_clear_error();
	rc = SSL_do_handshake(s->ssl);
	if (rc != 1)
		return result_of(s, rc, text);
	rc = check_key(s, text);
	return rc ? rc : 1;
}

static ssize_t tls_read(void *opaque, void *bytes, size_t n_bytes, char *text)
{
	struct session *s = opaque;
	size_t n = 0;
	int rc = shake(s, text);

	if (rc != 1)
		return rc;
	ERR_clear_error();
	rc = SSL_read_ex(s->ssl, bytes, n_bytes, &n);
	return rc == 1 ? (ssize_t)n : result_of(s, rc, text);
}

/* The next write tells the peer first. OpenSSL does not do it by itself. */
static void renew_key(struct session *s)
{
	if (s->refused || s->n_written < RECORDS_PER_KEY)
		return;
	if (SSL_key_update(s->ssl, SSL_KEY_UPDATE_NOT_REQUESTED))
		s->n_written = 0;
}

static ssize_t tls_write(void *opaque, const void *bytes, size_t n_bytes, char *text)
{
	struct session *s = opaque;
	size_t n = 0;
	int rc = shake(s, text);

	if (rc != 1)
		return rc;
	ERR_clear_error();
	renew_key(s);
	rc = SSL_write_ex(s->ssl, bytes, n_bytes, &n);
	s->refused = rc != 1;
	s->n_written += rc == 1;
	return rc == 1 ? (ssize_t)n : result_of(s, rc, text);
}

static const struct afd__secret_ops secret_ops = {
	.random = tls_random,
	.mac = tls_mac,
	.equal = tls_equal,
	.tls_config = tls_config,
	.tls_config_free = tls_config_free,
	.tls_open = tls_open,
	.tls_close = tls_close,
	.tls_read = tls_read,
	.tls_write = tls_write,
};

extern const struct afd__module afd_module_entry;
AFD_API const struct afd__module afd_module_entry = { .build = AFD__BUILD_ID,
	.secret = &secret_ops };
