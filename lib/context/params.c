/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Structs of any version. A struct begins with its size and only ever grows at its end, so an older
 * caller's struct is a prefix of ours and a newer caller's has a tail that we do not know: zero
 * there means "as before" and is accepted.
 */
#include "core.h"

#include <string.h>

enum { SIZE_LIMIT = 64 * 1024 };

static int check_size(size_t size, const char *what)
{
	if (size < sizeof(size_t))
		return afd__error(-EINVAL, "%s: size is %zu, must be sizeof the struct", what,
				  size);
	if (size > SIZE_LIMIT)
		return afd__error(-EINVAL, "%s: size is %zu, limit %d", what, size, SIZE_LIMIT);
	return 0;
}

int afd__params_copy(void *dst, size_t known, const void *src, const char *what)
{
	const unsigned char *bytes = src;
	size_t size, i;
	int rc;

	memset(dst, 0, known);
	if (!src)
		return 0;
	memcpy(&size, src, sizeof(size));
	rc = check_size(size, what);
	if (rc)
		return rc;
	for (i = known; i < size; i++) {
		if (bytes[i])
			return afd__error(-E2BIG,
					  "%s: byte %zu is set, this version knows %zu bytes", what,
					  i, known);
	}
	memcpy(dst, src, size < known ? size : known);
	return 0;
}

int afd__params_give(void *dst, const void *src, size_t known, const char *what)
{
	size_t room, given;
	int rc;

	if (!dst)
		return afd__error(-EINVAL, "%s: out is NULL", what);
	memcpy(&room, dst, sizeof(room));
	rc = check_size(room, what);
	if (rc)
		return rc;
	given = room < known ? room : known;
	memcpy((char *)dst + sizeof(room), (const char *)src + sizeof(room), given - sizeof(room));
	memset((char *)dst + given, 0, room - given);
	return 0;
}
