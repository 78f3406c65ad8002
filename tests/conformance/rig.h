/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the conformance tests of devices share: a device and a queue opened by the name in argv[1],
 * inputs of three kinds, and outputs that are poisoned and stand between canaries. A test runs
 * unchanged on every device.
 *
 * Nothing here computes what an operation computes: references stand in the tests, in double,
 * written plainly.
 */
#ifndef AFD_TESTS_RIG_H
#define AFD_TESTS_RIG_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../../lib/device/device.h"
#include "../support/skip.h"

struct rig {
	afd_context *ctx;
	struct afd__device *dev;
	struct afd__queue q;
	struct rig_memory {
		char *base;
		size_t bytes; /* without the canaries */
	} memory[128];
	unsigned n_memory;
	struct rig_lent {
		char *memory;
		size_t bytes;
	} lent[64];
	unsigned n_lent;
	uint64_t random;
};

/* Runs the tests on the device argv[1] ("cpu" when absent); 77 when this machine cannot. */
#define RIG_RUN(tests) (rig_device(argc, argv) ? 77 : cmocka_run_group_tests(tests, NULL, NULL))

int rig_device(int argc, char **argv);
const char *rig_device_name(void);

/* For cmocka_unit_test_setup_teardown: *state is a struct rig. n_threads as RIG_THREADS says. */
int rig_open(void **state);
int rig_close(void **state); /* checks every canary first */
#define RIG_TEST(f) cmocka_unit_test_setup_teardown(f, rig_open, rig_close)
struct rig *rig_make(uint32_t n_threads);
/* On another device than the one under test: the cpu, to compare with. */
struct rig *rig_make_on(const char *device, uint32_t n_threads);
void rig_end(struct rig *r);

/* Whether products of this device take more than float32 (struct afd__inputs); _need skips the test
 * where they do not. */
bool rig_has_inputs(void);
void rig_need_inputs(void);

/* ---- kinds of input ---- */
struct rig_kind {
	const char *name;
	float scale;
};
enum { RIG_N_KINDS = 3 };
extern const struct rig_kind rig_kinds[RIG_N_KINDS];     /* ordinary, tiny, huge: in f32 and bf16 */
extern const struct rig_kind rig_kinds_f16[RIG_N_KINDS]; /* the same within the range of f16 */

float rig_random(struct rig *r, float scale); /* about normal, not 0 */
uint32_t rig_below(struct rig *r, uint32_t n);
void rig_fill(struct rig *r, float *x, size_t n, float scale);
/* Rounded to bf16, which products on all devices take as it is; to be freed. */
float *rig_bf16_rows(struct rig *r, size_t n);

/* ---- device memory between canaries; fetch waits for the queue, copies and checks them ---- */
void *rig_input(struct rig *r, const void *host, size_t bytes);
void *rig_output(struct rig *r, size_t bytes); /* poisoned: NaN in every dtype */
void rig_fetch(struct rig *r, void *host, const void *dev, size_t bytes);
void rig_write(struct rig *r, void *dev, const void *host, size_t bytes);

/* Host memory that the device is told of, for slots and for weights in place, until the rig ends:
 * a copy of host, or zeros when that is NULL. */
void *rig_lend(struct rig *r, const void *host, size_t bytes);

/* ---- numbers, by their definition ---- */
double rig_decode(const void *numbers, size_t i, int32_t dtype);
/* Nearest, ties to even; FP8 saturates. */
void rig_encode(void *numbers, size_t i, int32_t dtype, double x);
size_t rig_bytes(int32_t dtype);

/* What this device may round a number of x by, relative, before a product with packed weights of the
 * dtype (docs/kernels.md): 0 where products take float32. */
double rig_product_unit(int32_t dtype);

/* Fails unless |got - want| <= relative * |want| + absolute. */
void rig_near(
	double got, double want, double relative, double absolute, const char *what, size_t i);

/* Fails unless each of n differs by at most `allowed` of the largest that is wanted. */
void rig_agree(const float *got, const float *want, size_t n, double allowed, const char *what);

#define RIG_OK(call) assert_int_equal(call, 0)

#endif
