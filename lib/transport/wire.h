/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The wire format of frames: the header and the payloads of control frames. With hello.c the only
 * code that knows the order of bytes. docs/wire.md specifies it; a change here is a change there.
 *
 * Nothing decoded here makes a reader look past the bytes that arrived: every size is checked
 * against them first. A caller that reads from memory which the peer can still write copies the
 * bytes out before decoding.
 */
#ifndef AFD_LIB_TRANSPORT_WIRE_H
#define AFD_LIB_TRANSPORT_WIRE_H

#include <stddef.h>
#include <stdint.h>

#include <afd/transport.h>

#define AFD__WIRE_VERSION     1
#define AFD__HEADER_BYTES     64
#define AFD__HEADER_BYTES_MAX 4096 /* with a tail that we do not know */

enum afd__frame_kind { AFD__FRAME_ROWS = 1, AFD__FRAME_CONTROL = 2, AFD__FRAME_COLLECTIVE = 3 };
enum afd__rows_type { AFD__ROWS_X = 1, AFD__ROWS_Y = 2 };
enum afd__collective_type { AFD__REDUCE = 1, AFD__GATHER = 2 };
enum afd__control_type { AFD__STEP_OPEN = 1, AFD__STEP_CLOSE = 2, AFD__BEAT = 3, AFD__GOODBYE = 4 };

/* Of y: x may have come at any time within queue_ns, while nobody looked. */
#define AFD__FLAG_QUEUE_LONGEST 0x0001u
/* Bits of flags that a reader may not skip: unknown ones are refused. */
#define AFD__FLAGS_CRITICAL 0xff00u

/* In the order of the bytes. */
struct afd__header {
	uint16_t header_bytes;
	uint8_t kind, type; /* enum afd__frame_kind, then by kind */
	uint8_t lane, dtype;
	uint16_t layer, flags;
	uint64_t sequence;
	uint32_t step;   /* the low half of the step's number */
	uint32_t status; /* of a reply: 0, or enum afd__status */
	uint32_t n_rows;
	uint16_t part, n_parts;
	uint8_t scale_format, top_k;
	uint16_t row_meta_bytes;
	uint32_t queue_ns, gather_ns, compute_ns; /* of a reply, disjoint; saturated */
	uint64_t stamp_ns; /* the sender's clock when x was sent; y brings it back */
};

void afd__wire_encode(void *bytes /* [AFD__HEADER_BYTES] */, const struct afd__header *h);
/* `bytes` holds min(n_bytes, AFD__HEADER_BYTES) bytes, n_bytes is what arrived in all. -EPROTO
 * names the field. */
int afd__wire_decode(struct afd__header *h, const void *bytes, size_t n_bytes);

/* How rows of a dtype are scaled: scale_format of a header. */
enum { AFD__SCALES_NONE = 0, AFD__SCALES_IN_ROWS = 1 };
static inline uint8_t afd__wire_scales(int32_t dtype)
{
	return dtype == AFD_DTYPE_FP8 ? AFD__SCALES_IN_ROWS : AFD__SCALES_NONE;
}

/* Bytes of the rows of a part; 0 when they overflow or the dtype is unknown. */
size_t afd__wire_rows_bytes(uint32_t n_rows, uint32_t hidden_size, int32_t dtype);
/* What follows a header: rows, then with ids of experts their ids and weights. Each of them begins
 * at a multiple of 16. Offsets count from the rows; 0 bytes when they overflow. */
struct afd__wire_part {
	size_t ids, weights, bytes;
};
void afd__wire_part(struct afd__wire_part *out, uint32_t n_rows, uint32_t hidden_size,
	int32_t dtype, uint32_t top_k);
/* -EPROTO unless what the header tells of is exactly what follows it. */
int afd__wire_check_rows(
	const struct afd__header *h, size_t n_bytes, uint32_t hidden_size, uint32_t max_rows);

/* Why a reply has no rows: the wire's own numbers, since errno differs between systems. */
uint32_t afd__wire_status(int code); /* of a negative errno */
int afd__wire_errno(uint32_t status);

/* ---- control payloads ---- */

struct afd__step_open {
	uint64_t step;
	uint32_t n_rows[AFD_MAX_LANES];
	uint32_t flags;
	uint8_t trace_id[16];
};
#define AFD__STEP_OPEN_BYTES 48
void afd__wire_encode_open(void *payload, const struct afd__step_open *open);
int afd__wire_decode_open(struct afd__step_open *open, const void *payload, size_t n_bytes);

enum afd__close_reason { AFD__CLOSE_DONE = 0, AFD__CLOSE_CANCELLED = 1 };
#define AFD__TEXT_MAX 256
struct afd__step_close {
	uint64_t step;
	uint32_t reason;
	char text[AFD__TEXT_MAX]; /* why it was cancelled, between ranks of a group; else empty */
};
#define AFD__STEP_CLOSE_BYTES 16 /* and the text */
size_t afd__wire_encode_close(void *payload, const struct afd__step_close *close);
int afd__wire_decode_close(struct afd__step_close *close, const void *payload, size_t n_bytes);

enum afd__goodbye_reason { AFD__GOODBYE_LEAVE = 0, AFD__GOODBYE_DRAIN = 1, AFD__GOODBYE_ERROR = 2 };
#define AFD__GOODBYE_BYTES 8 /* reason, bytes of text; then text */
size_t afd__wire_encode_goodbye(void *payload, uint32_t reason, const char *text);
int afd__wire_decode_goodbye(
	uint32_t *reason, char text[AFD__TEXT_MAX], const void *payload, size_t n_bytes);

/* ---- bytes ---- */

static inline void afd__put16(void *p, uint16_t v)
{
	uint8_t *b = p;

	b[0] = (uint8_t)v;
	b[1] = (uint8_t)(v >> 8);
}

static inline void afd__put32(void *p, uint32_t v)
{
	afd__put16(p, (uint16_t)v);
	afd__put16((uint8_t *)p + 2, (uint16_t)(v >> 16));
}

static inline void afd__put64(void *p, uint64_t v)
{
	afd__put32(p, (uint32_t)v);
	afd__put32((uint8_t *)p + 4, (uint32_t)(v >> 32));
}

static inline uint16_t afd__take16(const void *p)
{
	const uint8_t *b = p;

	return (uint16_t)(b[0] | b[1] << 8);
}

static inline uint32_t afd__take32(const void *p)
{
	return afd__take16(p) | (uint32_t)afd__take16((const uint8_t *)p + 2) << 16;
}

static inline uint64_t afd__take64(const void *p)
{
	return afd__take32(p) | (uint64_t)afd__take32((const uint8_t *)p + 4) << 32;
}

#endif
