/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Both ends of a measured exchange, by the public API alone: an FFN server whose compute function
 * answers with bench_floor_answer, and an attention end that sends frames and waits for them. Rows
 * are f32 in memory and on the wire, so nothing but bytes moves.
 */
#ifndef BENCH_EXCHANGE_ENDS_H
#define BENCH_EXCHANGE_ENDS_H

#include <sys/types.h>

#include "../tool/stage.h"

struct exchange_link {
	struct tool_stage stage; /* log, key and tls */
	uint32_t row_bytes, lanes;
	uint32_t n_rows;   /* the most of a frame */
	uint32_t max_rows; /* of one part */
	int cpu;           /* of the end that is made; -1: any */
	uint32_t spin_us;  /* of both ends' waits; 0: the library's default */
};

enum { EXCHANGE_ADDRESS = 128, EXCHANGE_LAYERS = 64 };

/* The FFN end as a process of its own, which lives as long as this one; before this process has
 * threads. Fills the address that it listens at. The pid, or -1 after a line on stderr. */
pid_t exchange_start_ffn(
	const struct exchange_link *link, const char *listen, char address[EXCHANGE_ADDRESS]);
void exchange_end_ffn(pid_t pid);
/* The FFN end in this process: says "ready ADDRESS" on stdout and serves until SIGINT or SIGTERM.
 * An exit status of the tool. */
int exchange_serve(const struct exchange_link *link, const char *listen);

/* The attention end, joined. TOOL_DONE, or TOOL_FAILED after a line on stderr. */
int exchange_connect(afd_transport **out, afd_context *ctx, const struct exchange_link *link,
	const char *address);
/* One round: a frame of n_rows rows in each lane, x and y [lanes][n_rows][row_bytes]; in layer
 * `layer` of an open step. 0 or a negative errno with the library's text. */
int exchange_round(afd_transport *net, const struct exchange_link *link, int32_t layer,
	uint32_t n_rows, const void *x, void *y);

#endif
