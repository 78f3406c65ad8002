/* SPDX-License-Identifier: Apache-2.0 */
/* Reading and replacing whole files; see file.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "file.h"
#include "options.h"

/* So that a device which never ends is an error, not all of the memory. */
static const size_t READ_BYTES_MAX = (size_t)1 << 30;

int tool_file_open(struct tool_file *out, const char *path)
{
	struct stat info;
	int rc;

	*out = (struct tool_file){ .path = path };
	if ((lstat(path, &info) || S_ISREG(info.st_mode)) &&
		asprintf(&out->part_path, "%s.part", path) < 0) {
		out->part_path = NULL;
		return -ENOMEM;
	}
	out->file = fopen(out->part_path ? out->part_path : path, "wb");
	if (out->file)
		return 0;
	rc = -errno;
	free(out->part_path);
	return rc;
}

int tool_file_close(struct tool_file *out, int keep)
{
	int rc = 0;

	if (!out->file)
		return 0;
	if (ferror(out->file))
		rc = -EIO;
	if (fclose(out->file) && !rc)
		rc = -errno;
	if (keep && !rc && out->part_path && rename(out->part_path, out->path))
		rc = -errno;
	if ((!keep || rc) && out->part_path)
		remove(out->part_path);
	free(out->part_path);
	*out = (struct tool_file){ 0 };
	return rc;
}

static int read_all(FILE *file, const char *path, char **text, size_t *n_bytes)
{
	size_t room = 0;

	for (*n_bytes = 0; !ferror(file) && !feof(file);) {
		if (*n_bytes + 1 >= room) {
			char *more = realloc(*text, room = 2 * room + 4096);

			if (!more)
				return tool_fail(TOOL_FAILED, "%s: no memory for %zu bytes", path, room);
			*text = more;
		}
		*n_bytes += fread(*text + *n_bytes, 1, room - *n_bytes - 1, file);
		if (*n_bytes > READ_BYTES_MAX)
			return tool_fail(
				TOOL_FAILED, "%s: over %zu bytes", path, READ_BYTES_MAX);
	}
	if (ferror(file))
		return tool_fail(TOOL_FAILED, "%s: %s", path, strerror(errno));
	(*text)[*n_bytes] = '\0';
	return TOOL_DONE;
}

char *tool_file_read(const char *path, size_t *n_bytes)
{
	FILE *file = fopen(path, "rb");
	char *text = NULL;
	int status;

	if (!file) {
		tool_fail(TOOL_FAILED, "%s: %s", path, strerror(errno));
		return NULL;
	}
	status = read_all(file, path, &text, n_bytes);
	fclose(file);
	if (!status)
		return text;
	free(text);
	return NULL;
}
