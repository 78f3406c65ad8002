/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a key comes from and goes to. The bytes of a file are the key as they are, a line's end
 * included, so that any 16 random bytes will do.
 */
#include "secret.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../context/core.h"
#include "../device/module.h"

static int check_bytes(size_t bytes)
{
	if (bytes >= AFD__KEY_MIN && bytes <= AFD__KEY_MAX)
		return 0;
	return afd__error(-EINVAL, "key: has %zu bytes, must have %d .. %d", bytes, AFD__KEY_MIN,
		AFD__KEY_MAX);
}

static int check_file(const char *file, int fd)
{
	struct stat st;

	if (fstat(fd, &st))
		return afd__error(-EIO, "key %s: %s", file, strerror(errno));
	if (!S_ISREG(st.st_mode))
		return afd__error(-EINVAL, "key %s: is no regular file", file);
	if (st.st_mode & (S_IRWXG | S_IRWXO))
		return afd__error(-EACCES, "key %s: others may open it, mode is %03o, limit 600", file,
			(unsigned)st.st_mode & 0777);
	return 0;
}

static int read_all(const char *file, int fd, uint8_t *key, size_t *bytes)
{
	ssize_t n = 1;

	*bytes = 0;
	while (n && *bytes <= AFD__KEY_MAX) {
		n = read(fd, key + *bytes, AFD__KEY_MAX + 1 - *bytes);
		if (n < 0 && errno != EINTR)
			return afd__error(-EIO, "key %s: %s", file, strerror(errno));
		if (n > 0)
			*bytes += (size_t)n;
	}
	return check_bytes(*bytes) ? afd__error_prefix(-EINVAL, "file %s", file) : 0;
}

static int read_file(struct afd__secret *secret, const char *file)
{
	int fd = open(file, O_RDONLY | O_CLOEXEC | O_NONBLOCK), rc;

	if (fd < 0)
		return afd__error(errno == ENOENT ? -ENOENT : -EACCES, "key %s: %s", file,
			strerror(errno));
	rc = check_file(file, fd);
	if (!rc)
		rc = read_all(file, fd, secret->key, &secret->key_bytes);
	close(fd);
	return rc;
}

static int take_key(struct afd__secret *secret, const char *file, const void *key, size_t key_bytes)
{
	int rc;

	if (file)
		return read_file(secret, file);
	rc = check_bytes(key_bytes);
	if (rc)
		return rc;
	memcpy(secret->key, key, key_bytes);
	secret->key_bytes = key_bytes;
	return 0;
}

static int load(struct afd__secret *secret, int tls)
{
	char text[AFD__SECRET_TEXT] = "";
	int rc = afd__module_load_secret(&secret->module, &secret->ops);

	if (rc || !tls)
		return rc;
	rc = secret->ops->tls_config(&secret->tls_config, secret->key, secret->key_bytes, text);
	return rc ? afd__error(rc, "tls: %s", text) : 0;
}

int afd__secret_open(struct afd__secret **out, struct afd_context *ctx, const char *file,
	const void *key, size_t key_bytes, int tls)
{
	struct afd__secret *secret = afd__alloc(ctx, 1, sizeof(*secret));
	int rc = -ENOMEM;

	if (secret)
		secret->key = afd__alloc(ctx, 1, AFD__KEY_MAX + 1);
	if (!secret || !secret->key)
		goto fail;
	rc = take_key(secret, file, key, key_bytes);
	if (!rc)
		rc = load(secret, tls);
	if (rc)
		goto fail;
	*out = secret;
	return 0;
fail:
	afd__secret_close(secret);
	return rc;
}

void afd__secret_close(struct afd__secret *secret)
{
	if (!secret)
		return;
	if (secret->tls_config)
		secret->ops->tls_config_free(secret->tls_config);
	if (secret->key)
		explicit_bzero(secret->key, AFD__KEY_MAX + 1);
	afd__free(secret->key);
	afd__module_unload(secret->module);
	afd__free(secret);
}
