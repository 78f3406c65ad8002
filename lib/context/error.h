/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Errors: a negative errno and a text in the thread. The text names the object, the value and the
 * limit, for example "link shm:ffn0: peer has hidden_size 4096, we have 2048".
 */
#ifndef AFD_LIB_ERROR_H
#define AFD_LIB_ERROR_H

#include <errno.h>
#include <stddef.h>

/* Sets the thread's text and returns code, so that a failing path is one line: return
 * afd__error(-EINVAL, …). */
__attribute__((format(printf, 2, 3))) int afd__error(int code, const char *format, ...);

/* Puts "prefix: " before the text that a callee left, and returns code. */
__attribute__((format(printf, 2, 3))) int afd__error_prefix(int code, const char *format, ...);

/* Copies the thread's text: for a handle that keeps its first cause. */
void afd__error_save(char *text, size_t capacity);

#endif
