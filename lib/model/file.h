/* SPDX-License-Identifier: Apache-2.0 */
/* Files of a checkpoint's directory, opened and read in one way: regular files only, nothing that
 * could block. */
#ifndef AFD_LIB_FILE_H
#define AFD_LIB_FILE_H

#include <stddef.h>
#include <stdint.h>

struct afd_context;

/* Opens the directory; *fd is closed by the caller. -ENOENT, -EACCES, -EIO. */
int afd__dir_open(int *fd, const char *dir);
/* Opens a regular file for reading. -ENOENT, -EACCES, -EIO, -EBADMSG when it is not a regular
 * file. */
int afd__file_open(int *fd, uint64_t *file_bytes, int dir_fd, const char *name);
/* Reads exactly n bytes at offset. -EBADMSG when the file ends before, -EIO. */
int afd__file_read_at(int fd, void *out, uint64_t n, uint64_t offset, const char *name);
/* The whole file, with a NUL behind it; afd__free ends it. -EBADMSG beyond max_bytes, and as
 * above. */
int afd__file_read(char **text, size_t *n_bytes, struct afd_context *ctx, int dir_fd,
		   const char *name, uint64_t max_bytes);

#endif
