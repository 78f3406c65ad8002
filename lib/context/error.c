/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The thread's error text. One buffer per thread, written by every failing call and by nothing
 * else, so that a text stays readable until the next failure. Texts are formatted aside first:
 * their arguments may point into the buffer.
 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <afd/context.h>

enum { TEXT_BYTES = 512 };

static _Thread_local char error_text[TEXT_BYTES];

int afd__error(int code, const char *format, ...)
{
	char text[TEXT_BYTES];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	memcpy(error_text, text, sizeof(text));
	return code;
}

int afd__error_prefix(int code, const char *format, ...)
{
	char text[TEXT_BYTES];
	va_list args;
	size_t n;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	n = strlen(text);
	if (n + 2 < sizeof(text))
		snprintf(text + n, sizeof(text) - n, ": %.*s", (int)(sizeof(text) - n - 3),
			 error_text);
	memcpy(error_text, text, sizeof(text));
	return code;
}

void afd__error_save(char *text, size_t capacity)
{
	snprintf(text, capacity, "%s", error_text);
}

const char *afd_last_error(void)
{
	return error_text;
}
