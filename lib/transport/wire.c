/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Frames to bytes and back. What a header may say is checked here as far as it can be without
 * knowing the link; what depends on the link (lane, layer, sequence, sizes of slots) is checked
 * where the frame is taken (frames.c, parts.c).
 */
#include "wire.h"

#include <stdbool.h>
#include <string.h>

#include "../context/error.h"
#include "../device/args.h"

#define MAGIC 0x46444641u /* "AFDF" */
enum { ROWS_MAX = 65536, TOP_K_MAX = 64, HIDDEN_MAX = 65536 };

void afd__wire_encode(void *bytes, const struct afd__header *h)
{
	uint8_t *b = bytes;

	afd__put32(b, MAGIC);
	afd__put16(b + 4, AFD__WIRE_VERSION);
	afd__put16(b + 6, h->header_bytes);
	b[8] = h->kind;
	b[9] = h->type;
	b[10] = h->lane;
	b[11] = h->dtype;
	afd__put16(b + 12, h->layer);
	afd__put16(b + 14, h->flags);
	afd__put64(b + 16, h->sequence);
	afd__put32(b + 24, h->step);
	afd__put32(b + 28, h->status);
	afd__put32(b + 32, h->n_rows);
	afd__put16(b + 36, h->part);
	afd__put16(b + 38, h->n_parts);
	b[40] = h->scale_format;
	b[41] = h->top_k;
	afd__put16(b + 42, h->row_meta_bytes);
	afd__put32(b + 44, h->queue_ns);
	afd__put32(b + 48, h->gather_ns);
	afd__put32(b + 52, h->compute_ns);
	afd__put64(b + 56, h->stamp_ns);
}

static void read_fields(struct afd__header *h, const uint8_t *b)
{
	h->header_bytes = afd__take16(b + 6);
	h->kind = b[8];
	h->type = b[9];
	h->lane = b[10];
	h->dtype = b[11];
	h->layer = afd__take16(b + 12);
	h->flags = afd__take16(b + 14);
	h->sequence = afd__take64(b + 16);
	h->step = afd__take32(b + 24);
	h->status = afd__take32(b + 28);
	h->n_rows = afd__take32(b + 32);
	h->part = afd__take16(b + 36);
	h->n_parts = afd__take16(b + 38);
	h->scale_format = b[40];
	h->top_k = b[41];
	h->row_meta_bytes = afd__take16(b + 42);
	h->queue_ns = afd__take32(b + 44);
	h->gather_ns = afd__take32(b + 48);
	h->compute_ns = afd__take32(b + 52);
	h->stamp_ns = afd__take64(b + 56);
}

static int check_size(const struct afd__header *h, size_t n_bytes)
{
	if (h->header_bytes < AFD__HEADER_BYTES || h->header_bytes > AFD__HEADER_BYTES_MAX ||
		h->header_bytes % 16)
		return afd__error(-EPROTO,
			"frame: header_bytes is %u, must be a multiple of 16 in %d .. %d",
			h->header_bytes, AFD__HEADER_BYTES, AFD__HEADER_BYTES_MAX);
	if (h->header_bytes > n_bytes)
		return afd__error(-EPROTO, "frame: header_bytes is %u, %zu bytes came",
			h->header_bytes, n_bytes);
	if (h->flags & AFD__FLAGS_CRITICAL)
		return afd__error(-EPROTO, "frame: flags are 0x%04x, of which 0x%04x are unknown",
			h->flags, h->flags & AFD__FLAGS_CRITICAL);
	return 0;
}

/* Collectives have rows too, and never a status or ids. */
static int check_rows(const struct afd__header *h)
{
	bool is_reply = h->kind == AFD__FRAME_ROWS && h->type == AFD__ROWS_Y;

	if (!h->type || h->type > 2)
		return afd__error(-EPROTO, "frame of rows: type is %u, limit 2", h->type);
	if (h->dtype < AFD_DTYPE_F32 || h->dtype > AFD_DTYPE_FP8)
		return afd__error(
			-EPROTO, "frame of rows: dtype is %u, limit %d", h->dtype, AFD_DTYPE_FP8);
	if (!h->n_parts || h->part >= h->n_parts)
		return afd__error(-EPROTO, "frame of rows: part is %u of %u", h->part, h->n_parts);
	if (h->n_rows > ROWS_MAX)
		return afd__error(
			-EPROTO, "frame of rows: n_rows is %u, limit %d", h->n_rows, ROWS_MAX);
	if (h->status && (!is_reply || h->n_rows))
		return afd__error(-EPROTO, "frame of rows: status is %u beside %u rows of type %u",
			h->status, h->n_rows, h->type);
	if (!h->status && !h->n_rows)
		return afd__error(
			-EPROTO, "frame of rows: n_rows is 0, such a frame does not cross");
	if (h->scale_format != afd__wire_scales(h->dtype))
		return afd__error(-EPROTO, "frame of rows: scale_format is %u, of %s it must be %u",
			h->scale_format, afd_dtype_name(h->dtype), afd__wire_scales(h->dtype));
	if (h->row_meta_bytes)
		return afd__error(-EPROTO, "frame of rows: row_meta_bytes is %u, must be 0",
			h->row_meta_bytes);
	if (h->top_k > TOP_K_MAX)
		return afd__error(
			-EPROTO, "frame of rows: top_k is %u, limit %d", h->top_k, TOP_K_MAX);
	if (h->top_k && (h->kind != AFD__FRAME_ROWS || is_reply))
		return afd__error(-EPROTO, "frame of rows: top_k is %u, only x has ids", h->top_k);
	return 0;
}

int afd__wire_decode(struct afd__header *h, const void *bytes, size_t n_bytes)
{
	const uint8_t *b = bytes;
	int rc;

	if (n_bytes < AFD__HEADER_BYTES)
		return afd__error(-EPROTO, "frame: %zu bytes came, the header has %d", n_bytes,
			AFD__HEADER_BYTES);
	if (afd__take32(b) != MAGIC)
		return afd__error(
			-EPROTO, "frame: magic is 0x%08x, must be 0x%08x", afd__take32(b), MAGIC);
	if (afd__take16(b + 4) != AFD__WIRE_VERSION)
		return afd__error(-EPROTO, "frame: wire_version is %u, ours is %d",
			afd__take16(b + 4), AFD__WIRE_VERSION);
	read_fields(h, b);
	rc = check_size(h, n_bytes);
	if (rc)
		return rc;
	switch (h->kind) {
	case AFD__FRAME_ROWS:
	case AFD__FRAME_COLLECTIVE:
		return check_rows(h);
	case AFD__FRAME_CONTROL:
		if (h->type < AFD__STEP_OPEN || h->type > AFD__GOODBYE)
			return afd__error(-EPROTO, "control frame: type is %u, limit %d", h->type,
				AFD__GOODBYE);
		return 0;
	default:
		return afd__error(-EPROTO, "frame: kind is %u, limit %d", h->kind,
			AFD__FRAME_COLLECTIVE);
	}
}

size_t afd__wire_rows_bytes(uint32_t n_rows, uint32_t hidden_size, int32_t dtype)
{
	size_t bytes;

	if (hidden_size > HIDDEN_MAX || n_rows > ROWS_MAX)
		return 0;
	if (__builtin_mul_overflow((size_t)n_rows, afd__row_bytes(hidden_size, dtype), &bytes))
		return 0;
	return bytes;
}

void afd__wire_part(struct afd__wire_part *out, uint32_t n_rows, uint32_t hidden_size,
	int32_t dtype, uint32_t top_k)
{
	size_t rows = afd__wire_rows_bytes(n_rows, hidden_size, dtype);
	size_t choices = (size_t)n_rows * top_k * sizeof(int32_t);

	*out = (struct afd__wire_part){ .bytes = rows };
	if (!rows || !top_k || top_k > TOP_K_MAX)
		return;
	out->ids = (rows + 15) / 16 * 16;
	out->weights = out->ids + (choices + 15) / 16 * 16;
	out->bytes = out->weights + choices;
}

int afd__wire_check_rows(
	const struct afd__header *h, size_t n_bytes, uint32_t hidden_size, uint32_t max_rows)
{
	struct afd__wire_part part;

	afd__wire_part(&part, h->n_rows, hidden_size, h->dtype, h->top_k);
	if (h->n_rows > max_rows)
		return afd__error(
			-EPROTO, "frame of rows: n_rows is %u, limit %u", h->n_rows, max_rows);
	if (!part.bytes || n_bytes - h->header_bytes != part.bytes)
		return afd__error(-EPROTO,
			"frame of rows: %zu bytes follow the header, %u rows of %u %s numbers with "
			"%u ids are %zu",
			n_bytes - h->header_bytes, h->n_rows, hidden_size, afd_dtype_name(h->dtype),
			h->top_k, part.bytes);
	return 0;
}

/* ---- status ---- */

/* Position is the number on the wire: append only. */
static const int status_codes[] = { 0, EIO, EINVAL, ENOMEM, EDOM, ECANCELED, ENOTSUP, ETIMEDOUT,
	ENOSPC, ENODEV, EBADMSG };
enum { N_STATUS = sizeof(status_codes) / sizeof(status_codes[0]) };

uint32_t afd__wire_status(int code)
{
	for (uint32_t i = 0; i < N_STATUS; i++) {
		if (status_codes[i] == -code)
			return i;
	}
	return 1;
}

int afd__wire_errno(uint32_t status)
{
	return status < N_STATUS ? -status_codes[status] : -EIO;
}

/* ---- control payloads ---- */

void afd__wire_encode_open(void *payload, const struct afd__step_open *open)
{
	uint8_t *b = payload;

	afd__put64(b, open->step);
	for (int lane = 0; lane < AFD_MAX_LANES; lane++)
		afd__put32(b + 8 + 4 * lane, open->n_rows[lane]);
	afd__put32(b + 24, open->flags);
	afd__put32(b + 28, 0);
	memcpy(b + 32, open->trace_id, sizeof(open->trace_id));
}

int afd__wire_decode_open(struct afd__step_open *open, const void *payload, size_t n_bytes)
{
	const uint8_t *b = payload;

	if (n_bytes < AFD__STEP_OPEN_BYTES)
		return afd__error(-EPROTO, "step open: %zu bytes came, it has %d", n_bytes,
			AFD__STEP_OPEN_BYTES);
	open->step = afd__take64(b);
	for (int lane = 0; lane < AFD_MAX_LANES; lane++)
		open->n_rows[lane] = afd__take32(b + 8 + 4 * lane);
	open->flags = afd__take32(b + 24);
	memcpy(open->trace_id, b + 32, sizeof(open->trace_id));
	return 0;
}

/* Text that ends a payload: u32 bytes of it at `at` - 4, then the text. */
static size_t put_text(uint8_t *at, const char *text)
{
	size_t text_bytes = strnlen(text, AFD__TEXT_MAX - 1);

	afd__put32(at - 4, (uint32_t)text_bytes);
	memcpy(at, text, text_bytes);
	return text_bytes;
}

static int take_text(
	char text[AFD__TEXT_MAX], const uint8_t *at, size_t n_bytes, const char *what)
{
	uint32_t text_bytes = afd__take32(at - 4);

	if (text_bytes >= AFD__TEXT_MAX || text_bytes > n_bytes)
		return afd__error(-EPROTO, "%s: text has %u bytes, %zu came, limit %d", what,
			text_bytes, n_bytes, AFD__TEXT_MAX - 1);
	memcpy(text, at, text_bytes);
	text[text_bytes] = '\0';
	/* It goes into logs. */
	for (char *c = text; *c; c++) {
		if (*c < ' ' || *c > '~')
			*c = '?';
	}
	return 0;
}

size_t afd__wire_encode_close(void *payload, const struct afd__step_close *close)
{
	uint8_t *b = payload;

	afd__put64(b, close->step);
	afd__put32(b + 8, close->reason);
	return AFD__STEP_CLOSE_BYTES + put_text(b + AFD__STEP_CLOSE_BYTES, close->text);
}

int afd__wire_decode_close(struct afd__step_close *close, const void *payload, size_t n_bytes)
{
	const uint8_t *b = payload;

	if (n_bytes < AFD__STEP_CLOSE_BYTES)
		return afd__error(-EPROTO, "step close: %zu bytes came, it has %d", n_bytes,
			AFD__STEP_CLOSE_BYTES);
	close->step = afd__take64(b);
	close->reason = afd__take32(b + 8);
	return take_text(close->text, b + AFD__STEP_CLOSE_BYTES, n_bytes - AFD__STEP_CLOSE_BYTES,
		"step close");
}

size_t afd__wire_encode_goodbye(void *payload, uint32_t reason, const char *text)
{
	uint8_t *b = payload;

	afd__put32(b, reason);
	return AFD__GOODBYE_BYTES + put_text(b + AFD__GOODBYE_BYTES, text);
}

int afd__wire_decode_goodbye(
	uint32_t *reason, char text[AFD__TEXT_MAX], const void *payload, size_t n_bytes)
{
	const uint8_t *b = payload;

	if (n_bytes < AFD__GOODBYE_BYTES)
		return afd__error(-EPROTO, "goodbye: %zu bytes came, it has at least %d", n_bytes,
			AFD__GOODBYE_BYTES);
	*reason = afd__take32(b);
	return take_text(text, b + AFD__GOODBYE_BYTES, n_bytes - AFD__GOODBYE_BYTES, "goodbye");
}
