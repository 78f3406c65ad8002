/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Log lines, spans and the clock. The library never prints: a line goes to the host's hook or
 * nowhere. Nothing here allocates or locks, so any thread and any step may log.
 */
#include "core.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

void afd__log(const struct afd_context *ctx, int level, const char *format, ...)
{
	char text[1024];
	va_list args;

	if (!ctx->log.write || level > ctx->log.max_level)
		return;
	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	ctx->log.write(ctx->log.user, level, text);
}

void afd__span(const struct afd_context *ctx, const struct afd_span *span)
{
	if (ctx->tracer.span)
		ctx->tracer.span(ctx->tracer.user, span);
}

uint64_t afd__now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
