/* SPDX-License-Identifier: Apache-2.0 */
/* The medium of floor_verbs.c, in builds that have libibverbs (BENCH_VERBS). */
#ifndef BENCH_FLOOR_VERBS_H
#define BENCH_FLOOR_VERBS_H

extern const struct bench_floor_medium bench_floor_verbs;

#endif
