/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files of a checkpoint's directory. All are opened relative to one descriptor of the directory, so
 * that a host may change its working directory while a model is open. Called by checkpoint.c and
 * model.c.
 */
#include "file.h"

#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../context/core.h"

static int system_error(const char *name, const char *call)
{
	int code = errno;
	char why[128];
	const char *text = strerror_r(code, why, sizeof(why));

	if (code == ENOENT || code == ENOTDIR)
		return afd__error(-ENOENT, "%s: no such file", name);
	if (code == EACCES || code == EPERM)
		return afd__error(-EACCES, "%s: not permitted to read it", name);
	return afd__error(-EIO, "%s: %s: %s", name, call, text);
}

int afd__dir_open(int *fd, const char *dir)
{
	*fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (*fd >= 0)
		return 0;
	if (errno == ENOENT || errno == ENOTDIR)
		return afd__error(-ENOENT, "no such directory");
	return system_error("the directory", "open");
}

int afd__file_open(int *fd, uint64_t *file_bytes, int dir_fd, const char *name)
{
	struct stat info;
	int rc;

	/* O_NONBLOCK: a FIFO under this name must not hold us. */
	*fd = openat(dir_fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (*fd < 0)
		return system_error(name, "open");
	if (fstat(*fd, &info)) {
		rc = system_error(name, "fstat");
		goto fail;
	}
	if (!S_ISREG(info.st_mode)) {
		rc = afd__error(-EBADMSG, "%s: not a regular file", name);
		goto fail;
	}
	*file_bytes = (uint64_t)info.st_size;
	return 0;
fail:
	close(*fd);
	*fd = -1;
	return rc;
}

int afd__file_read_at(int fd, void *out, uint64_t n, uint64_t offset, const char *name)
{
	uint64_t done = 0;

	while (done < n) {
		ssize_t got = pread(fd, (char *)out + done, n - done, (off_t)(offset + done));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return system_error(name, "read");
		if (!got)
			return afd__error(-EBADMSG,
					  "%s: ends at %" PRIu64 " bytes, %" PRIu64 " are needed",
					  name, offset + done, offset + n);
		done += (uint64_t)got;
	}
	return 0;
}

int afd__file_read(char **text, size_t *n_bytes, struct afd_context *ctx, int dir_fd,
		   const char *name, uint64_t max_bytes)
{
	uint64_t file_bytes;
	char *bytes = NULL;
	int fd, rc;

	rc = afd__file_open(&fd, &file_bytes, dir_fd, name);
	if (rc)
		return rc;
	if (file_bytes > max_bytes) {
		rc = afd__error(-EBADMSG, "%s: %" PRIu64 " bytes, limit %" PRIu64, name, file_bytes,
				max_bytes);
		goto out;
	}
	bytes = afd__alloc(ctx, file_bytes + 1, 1);
	rc = bytes ? afd__file_read_at(fd, bytes, file_bytes, 0, name) : -ENOMEM;
	if (rc)
		goto out;
	*text = bytes;
	*n_bytes = file_bytes;
	bytes = NULL;
out:
	afd__free(bytes);
	close(fd);
	return rc;
}
