/* SPDX-License-Identifier: Apache-2.0 */
/* .npy version 1.0 with a header of 128 bytes, written again when the number of rows is known. See
 * npy.h. */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "npy.h"

#define HEADER_BYTES 128
#define PREFIX_BYTES 10 /* magic, version, bytes of the text that follows */

static int write_header(struct tool_npy *npy)
{
	char header[HEADER_BYTES + 1];
	int n;

	memset(header, ' ', sizeof header);
	memcpy(header, "\x93NUMPY\x01\x00\x76\x00", PREFIX_BYTES); /* 0x76 = 128 - 10 */
	n = snprintf(header + PREFIX_BYTES, HEADER_BYTES - PREFIX_BYTES,
		"{'descr': '<f4', 'fortran_order': False, 'shape': (%" PRIu64 ", %" PRIu32 "), }",
		npy->n_rows, npy->n_columns);
	header[PREFIX_BYTES + n] = ' ';
	header[HEADER_BYTES - 1] = '\n';
	return fwrite(header, HEADER_BYTES, 1, npy->file) == 1 ? 0 : -EIO;
}

int tool_npy_open(struct tool_npy *npy, const char *path, uint32_t n_columns)
{
	int rc;

	*npy = (struct tool_npy){ .path = path, .n_columns = n_columns };
	if (asprintf(&npy->part_path, "%s.part", path) < 0)
		return -ENOMEM;
	npy->file = fopen(npy->part_path, "wb");
	if (!npy->file) {
		rc = -errno;
		free(npy->part_path);
		return rc;
	}
	return write_header(npy);
}

int tool_npy_append(struct tool_npy *npy, const float *rows, uint64_t n_rows)
{
	npy->n_rows += n_rows;
	return fwrite(rows, npy->n_columns * sizeof *rows, n_rows, npy->file) == n_rows ? 0 : -EIO;
}

int tool_npy_close(struct tool_npy *npy, int keep)
{
	int rc = 0;

	if (!npy->file)
		return 0;
	if (keep && (fseek(npy->file, 0, SEEK_SET) || write_header(npy)))
		rc = -EIO;
	if (fclose(npy->file) && !rc)
		rc = -EIO;
	if (keep && !rc && rename(npy->part_path, npy->path))
		rc = -errno;
	if (!keep || rc)
		remove(npy->part_path);
	free(npy->part_path);
	npy->file = NULL;
	return rc;
}
