/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Times of this machine's stages and exchange, taken through the public API. One measurement is the
 * median of runs that take turns with nothing else; all times are microseconds of a whole step.
 */
#ifndef PLAN_MEASURE_H
#define PLAN_MEASURE_H

#include "../tool/stage.h"

struct measure {
	struct tool_stage stage;
	double seconds; /* of one point */
	afd_context *ctx;
	afd_model *model;
	afd_ffn *ffn;
	struct afd_model_info info;
	int64_t server; /* pid of the process that answers rows at once */
	char address[64];
};

/* Forks the server first: before the library has threads. TOOL_DONE or TOOL_FAILED. */
int measure_open(struct measure *m);
void measure_close(struct measure *m);

/* Negative after a line on stderr. */
double measure_ffn(struct measure *m, uint32_t n_rows);
/* A decode step of `batch` sequences without its FFN. */
double measure_attention(struct measure *m, uint32_t batch, uint32_t context);
/* One direction: half of the way there and back. */
double measure_exchange(struct measure *m, uint32_t n_rows);

#endif
