/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The rig of the device tests (rig.h).
 */
#include "rig.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CANARY_BYTES 64
#define CANARY       0x5a

static const char *device_name = "cpu";

const struct rig_kind rig_kinds[RIG_N_KINDS] = { { "ordinary", 1 }, { "tiny", 1e-30f },
	{ "huge", 1e15f } };
const struct rig_kind rig_kinds_f16[RIG_N_KINDS] = { { "ordinary", 1 }, { "tiny", 1e-6f },
	{ "huge", 8e3f } };

int rig_device(int argc, char **argv)
{
	afd_context *ctx;

	if (argc > 1)
		device_name = argv[1];
	if (getenv("AFD_TEST_ONLY")) /* a name, with * and ? */
		cmocka_set_test_filter(getenv("AFD_TEST_ONLY"));
	if (!afd_context_create(&ctx, NULL)) {
		afd_context_destroy(ctx);
		return 0;
	}
	printf("%s\n", afd_last_error());
	return 77;
}

const char *rig_device_name(void)
{
	return device_name;
}

struct rig *rig_make_on(const char *device, uint32_t n_threads)
{
	struct afd_context_params params = { .size = sizeof(params), .n_threads = n_threads };
	struct rig *r = calloc(1, sizeof(*r));

	assert_non_null(r);
	r->random = 88172645463325252u;
	RIG_OK(afd_context_create(&r->ctx, &params));
	if (afd__device_open(&r->dev, r->ctx, device))
		fail_msg("%s", afd_last_error());
	RIG_OK(afd__queue_open(&r->q, r->dev));
	return r;
}

struct rig *rig_make(uint32_t n_threads)
{
	return rig_make_on(device_name, n_threads);
}

static void check_canaries(struct rig *r, const struct rig_memory *m)
{
	unsigned char before[CANARY_BYTES], after[CANARY_BYTES];
	uint64_t ticket;

	RIG_OK(afd__queue_download(&r->q, before, m->base, CANARY_BYTES));
	RIG_OK(afd__queue_download(&r->q, after, m->base + CANARY_BYTES + m->bytes, CANARY_BYTES));
	RIG_OK(afd__queue_ticket(&r->q, &ticket));
	RIG_OK(afd__queue_wait(&r->q, ticket, 0, "canaries"));
	for (unsigned i = 0; i < CANARY_BYTES; i++) {
		assert_int_equal(before[i], CANARY);
		assert_int_equal(after[i], CANARY);
	}
}

void rig_end(struct rig *r)
{
	for (unsigned i = 0; i < r->n_memory; i++)
		check_canaries(r, &r->memory[i]);
	afd__queue_close(&r->q);
	for (unsigned i = 0; i < r->n_memory; i++)
		afd__device_free(r->dev, r->memory[i].base, r->memory[i].bytes + 2 * CANARY_BYTES);
	for (unsigned i = 0; i < r->n_lent; i++) {
		afd__device_unregister(r->dev, r->lent[i].memory, r->lent[i].bytes);
		free(r->lent[i].memory);
	}
	assert_int_equal(atomic_load(&r->dev->bytes_held), 0);
	afd__device_close(r->dev);
	afd_context_destroy(r->ctx);
	free(r);
}

bool rig_has_inputs(void)
{
	struct rig *r = rig_make(1);
	struct afd__matrix w;
	bool has;

	RIG_OK(afd__matrix_create(r->dev, &w, 8, 64, AFD_DTYPE_BF16, NULL));
	has = afd__matrix_inputs(r->dev, &w, false).row_bytes > 0;
	afd__matrix_destroy(r->dev, &w);
	rig_end(r);
	return has;
}

void rig_need_inputs(void)
{
	if (!rig_has_inputs())
		rig_skip("products of this device take float32 alone");
}

int rig_open(void **state)
{
	*state = rig_make(2);
	return 0;
}

int rig_close(void **state)
{
	rig_end(*state);
	return 0;
}

/* xorshift64*, so that a failure can be repeated anywhere */
static uint32_t next_random(struct rig *r)
{
	r->random ^= r->random >> 12;
	r->random ^= r->random << 25;
	r->random ^= r->random >> 27;
	return (uint32_t)((r->random * 2685821657736338717u) >> 32);
}

uint32_t rig_below(struct rig *r, uint32_t n)
{
	return (uint32_t)((uint64_t)next_random(r) * n >> 32);
}

float rig_random(struct rig *r, float scale)
{
	double sum = 0;

	for (int i = 0; i < 12; i++)
		sum += next_random(r) * 0x1p-32;
	sum -= 6;
	return (float)((fabs(sum) < 1e-3 ? 0.5 : sum) * scale);
}

void rig_fill(struct rig *r, float *x, size_t n, float scale)
{
	for (size_t i = 0; i < n; i++)
		x[i] = rig_random(r, scale);
}

float *rig_bf16_rows(struct rig *r, size_t n)
{
	float *x = malloc(n * 4);

	rig_fill(r, x, n, 1);
	for (size_t i = 0; i < n; i++) {
		uint32_t bits;

		memcpy(&bits, &x[i], 4);
		bits &= 0xffff0000;
		memcpy(&x[i], &bits, 4);
	}
	return x;
}

static void *memory_between_canaries(struct rig *r, const void *contents, size_t bytes)
{
	size_t whole = (bytes + 3) / 4 * 4; /* uploads are aligned */
	struct rig_memory *m = &r->memory[r->n_memory];
	unsigned char *image = malloc(whole + 2 * CANARY_BYTES);
	void *base;

	assert_true(r->n_memory < sizeof(r->memory) / sizeof(r->memory[0]));
	assert_non_null(image);
	memset(image, CANARY, whole + 2 * CANARY_BYTES);
	memset(image + CANARY_BYTES, 0xff, whole);
	if (contents)
		memcpy(image + CANARY_BYTES, contents, bytes);
	RIG_OK(afd__device_alloc(r->dev, whole + 2 * CANARY_BYTES, "test memory", &base));
	assert_int_equal((uintptr_t)base % 64, 0);
	m->base = base;
	m->bytes = whole;
	r->n_memory++;
	RIG_OK(afd__queue_upload(&r->q, m->base, image, whole + 2 * CANARY_BYTES));
	memset(image, 0xee,
		whole + 2 * CANARY_BYTES); /* an upload has read its source when it returns */
	free(image);
	return m->base + CANARY_BYTES;
}

void *rig_input(struct rig *r, const void *host, size_t bytes)
{
	return memory_between_canaries(r, host, bytes);
}

void *rig_output(struct rig *r, size_t bytes)
{
	return memory_between_canaries(r, NULL, bytes);
}

void rig_write(struct rig *r, void *dev, const void *host, size_t bytes)
{
	RIG_OK(afd__queue_upload(&r->q, dev, host, bytes));
}

void rig_fetch(struct rig *r, void *host, const void *dev, size_t bytes)
{
	uint64_t ticket;

	RIG_OK(afd__queue_download(&r->q, host, dev, bytes));
	RIG_OK(afd__queue_ticket(&r->q, &ticket));
	RIG_OK(afd__queue_wait(&r->q, ticket, 0, "a test"));
}

/* Whole pages of its own, since pages are what is registered; what is lent ends where it ends. */
void *rig_lend(struct rig *r, const void *host, size_t bytes)
{
	struct rig_lent *lent = &r->lent[r->n_lent];

	assert_true(r->n_lent++ < sizeof(r->lent) / sizeof(r->lent[0]));
	assert_int_equal(posix_memalign((void **)&lent->memory, 4096, bytes), 0);
	lent->bytes = bytes;
	if (host)
		memcpy(lent->memory, host, bytes);
	else
		memset(lent->memory, 0, bytes);
	RIG_OK(afd__device_register(r->dev, lent->memory, bytes, "test memory"));
	return lent->memory;
}

size_t rig_bytes(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 ? 4 : dtype == AFD_DTYPE_FP8 ? 1 : 2;
}

/* e4m3 without infinities: exponent bias 7, the last pattern is NaN. */
static double decode_fp8(uint8_t b)
{
	int exponent = (b & 0x7f) >> 3, fraction = b & 7;
	double size = exponent ? ldexp(8 + fraction, exponent - 10) : ldexp(fraction, -9);

	return (b & 0x7f) == 0x7f ? (double)NAN : b & 0x80 ? -size : size;
}

double rig_decode(const void *numbers, size_t i, int32_t dtype)
{
	uint16_t h;
	float f;

	if (dtype == AFD_DTYPE_FP8)
		return decode_fp8(((const uint8_t *)numbers)[i]);

	if (dtype == AFD_DTYPE_F32) {
		memcpy(&f, (const char *)numbers + 4 * i, 4);
		return f;
	}
	memcpy(&h, (const char *)numbers + 2 * i, 2);
	int bits = dtype == AFD_DTYPE_BF16 ? 7 : 10, bias = dtype == AFD_DTYPE_BF16 ? 127 : 15;
	int exponent = (h & 0x7fff) >> bits, fraction = h & ((1 << bits) - 1);
	double sign = h & 0x8000 ? -1 : 1;

	if (exponent == 2 * bias + 1)
		return fraction ? (double)NAN : sign * (double)INFINITY;
	return sign * ldexp(exponent ? fraction + (1 << bits) : fraction,
			      (exponent ? exponent : 1) - bias - bits);
}

/* The nearest number of `bits` fraction bits and the smallest normal exponent `low`, by rint (ties
 * to even). */
static double round_to(double x, int bits, int low)
{
	int exponent;

	frexp(x, &exponent);
	if (exponent - 1 < low)
		exponent = low + 1;
	return ldexp(rint(ldexp(x, bits + 1 - exponent)), exponent - 1 - bits);
}

/* The nearest of all patterns; between two the one with an even fraction; the largest for what is
 * beyond it. */
static uint8_t encode_fp8(double x)
{
	double size = fabs(x), below, above;
	uint8_t low = 0, high = 0x7e; /* patterns ascend with their numbers */

	if (isnan(x))
		return signbit(x) ? 0xff : 0x7f;
	while (high - low > 1) {
		uint8_t middle = (uint8_t)((low + high) / 2);

		if (decode_fp8(middle) <= size)
			low = middle;
		else
			high = middle;
	}
	below = size - decode_fp8(low);
	above = decode_fp8(high) - size;
	if (above < below || (above == below && low % 2))
		low = high;
	return signbit(x) ? low | 0x80 : low;
}

void rig_encode(void *numbers, size_t i, int32_t dtype, double x)
{
	int bits = dtype == AFD_DTYPE_BF16 ? 7 : 10, bias = dtype == AFD_DTYPE_BF16 ? 127 : 15,
	    exponent;
	uint16_t h = signbit(x) ? 0x8000 : 0;
	float f = (float)x;

	if (dtype == AFD_DTYPE_FP8) {
		((uint8_t *)numbers)[i] = encode_fp8(x);
		return;
	}
	if (dtype == AFD_DTYPE_F32) {
		memcpy((char *)numbers + 4 * i, &f, 4);
		return;
	}
	x = fabs(x);
	if (isnan(x)) {
		h |= (uint16_t)((2 * bias + 1) << bits | 1 << (bits - 1));
	} else if (x > 0) {
		double rounded = isinf(x) ? x : round_to(x, bits, 1 - bias);

		if (rounded >= ldexp(1, bias + 1))
			h |= (uint16_t)((2 * bias + 1) << bits);
		else if (rounded < ldexp(1, 1 - bias))
			h |= (uint16_t)ldexp(rounded, bias - 1 + bits);
		else {
			frexp(rounded, &exponent);
			h |= (uint16_t)(((exponent - 1 + bias) << bits) +
					(int)(ldexp(rounded, bits + 1 - exponent)) - (1 << bits));
		}
	}
	memcpy((char *)numbers + 2 * i, &h, 2);
}

double rig_product_unit(int32_t dtype)
{
	if (strncmp(device_name, "cuda", 4) || dtype == AFD_DTYPE_F32)
		return 0;
	return dtype == AFD_DTYPE_BF16 ? 0x1p-8 : 0x1p-11;
}

void rig_near(double got, double want, double relative, double absolute, const char *what, size_t i)
{
	if (!(fabs(got - want) <= relative * fabs(want) + absolute))
		fail_msg("%s[%zu]: got %.9g, want %.9g (relative %.3g, allowed %.3g)", what, i, got,
			want, fabs(got - want) / fabs(want), relative);
}

void rig_agree(const float *got, const float *want, size_t n, double allowed, const char *what)
{
	double largest = 0;

	for (size_t i = 0; i < n; i++)
		largest = fmax(largest, fabs(want[i]));
	assert_true(largest > 0 && isfinite(largest));
	for (size_t i = 0; i < n; i++)
		rig_near(got[i], want[i], 0, allowed * largest, what, i);
}
