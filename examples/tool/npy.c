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
	return fwrite(header, HEADER_BYTES, 1, npy->out.file) == 1 ? 0 : -EIO;
}

int tool_npy_open(struct tool_npy *npy, const char *path, uint32_t n_columns)
{
	int rc;

	*npy = (struct tool_npy){ .n_columns = n_columns };
	rc = tool_file_open(&npy->out, path);
	if (!rc && write_header(npy)) {
		tool_file_close(&npy->out, 0);
		rc = -EIO;
	}
	return rc;
}

int tool_npy_append(struct tool_npy *npy, const float *rows, uint64_t n_rows)
{
	npy->n_rows += n_rows;
	return fwrite(rows, npy->n_columns * sizeof *rows, n_rows, npy->out.file) == n_rows ? 0 : -EIO;
}

int tool_npy_close(struct tool_npy *npy, int keep)
{
	int rc = 0, closed;

	if (npy->out.file && keep && (fseek(npy->out.file, 0, SEEK_SET) || write_header(npy)))
		rc = -EIO;
	closed = tool_file_close(&npy->out, keep && !rc);
	return rc ? rc : closed;
}
