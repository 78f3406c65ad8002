/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One table of fields stands for the whole handshake: each message kind carries the fields whose
 * mask names it. A tag that is unknown in its message is skipped when it is below TAG_CRITICAL, so
 * that later versions can state more, else refused.
 */
#include "hello.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "../context/error.h"
#include "wire.h"

#define MAGIC        0x48444641u /* "AFDH" */
#define TAG_CRITICAL 0x8000u
enum { PREFIX_BYTES = 12, FIELD_BYTES = 4 };

enum type { U32, U64, TEXT, BYTES, DTYPE, FINGERPRINT };
enum { IN_HELLO = 1 << AFD__HELLO, IN_WELCOME = 1 << AFD__WELCOME, IN_REFUSAL = 1 << AFD__REFUSAL };
enum { IN_BOTH = IN_HELLO | IN_WELCOME };
enum { IN_PROBE = 1 << AFD__PROBE, IN_OFFER = 1 << AFD__OFFER };

struct field {
	const char *name;
	uint16_t tag;
	uint16_t kinds;
	uint8_t type;
	uint8_t compared; /* part of the contract */
	uint16_t offset, bytes;
};

#define FIELD(tag_, type_, kinds_, compared_, member) \
	{ #member, tag_, kinds_, type_, compared_, offsetof(struct afd__hello, member), \
		sizeof(((struct afd__hello *)0)->member) }

static const struct field fields[] = {
	/* The digest is over the encoding of the first eight, in this order. */
	FIELD(1, U32, IN_BOTH, 1, hidden_size),
	FIELD(2, U32, IN_BOTH, 1, n_layers),
	FIELD(3, BYTES, IN_BOTH, 1, ffn_kinds),
	FIELD(4, U32, IN_BOTH, 1, n_experts),
	FIELD(5, U32, IN_BOTH, 1, top_k),
	FIELD(6, U32, IN_BOTH, 1, router),
	FIELD(7, U32, IN_BOTH, 1, activation),
	FIELD(9, U32, IN_BOTH, 1, shared_experts),
	FIELD(8, U64, IN_BOTH, 1, digest),
	FIELD(16, U32, IN_BOTH, 0, role),
	FIELD(17, U32, IN_BOTH, 0, lanes),
	FIELD(18, U32, IN_BOTH, 0, max_rows),
	FIELD(19, DTYPE, IN_BOTH, 0, to_ffn_dtype),
	FIELD(20, DTYPE, IN_BOTH, 0, to_attention_dtype),
	FIELD(21, U32, IN_BOTH, 0, gate),
	FIELD(22, U32, IN_BOTH, 0, first_layer),
	FIELD(23, U32, IN_BOTH, 0, n_held),
	FIELD(24, FINGERPRINT, IN_WELCOME, 0, weights),
	FIELD(25, U64, IN_WELCOME, 0, weights_epoch),
	FIELD(26, TEXT, IN_BOTH, 0, device),
	FIELD(27, TEXT, IN_BOTH | IN_PROBE | IN_OFFER, 0, version),
	FIELD(28, U32, IN_BOTH, 0, group_index),
	FIELD(29, U32, IN_BOTH, 0, group_size),
	FIELD(32, U32, IN_WELCOME, 0, map_version),
	FIELD(33, U32, IN_WELCOME, 0, shard_rank),
	FIELD(34, U32, IN_WELCOME, 0, n_shards),
	FIELD(35, U32, IN_WELCOME, 0, shard_tp),
	FIELD(36, U32, IN_WELCOME, 0, n_tp),
	FIELD(37, U32, IN_WELCOME, 0, expert_begin),
	FIELD(38, U32, IN_WELCOME, 0, expert_end),
	FIELD(48, U32, IN_REFUSAL, 0, status),
	FIELD(49, TEXT, IN_REFUSAL, 0, field),
	FIELD(50, TEXT, IN_REFUSAL, 0, refuser_value),
	FIELD(51, TEXT, IN_REFUSAL, 0, refused_value),
	FIELD(52, TEXT, IN_REFUSAL, 0, text),
	FIELD(80, U32, IN_PROBE | IN_OFFER, 0, probe_bytes),
	FIELD(81, U32, IN_OFFER, 0, probe_slots),
	FIELD(82, TEXT, IN_OFFER, 0, shm_name),
	FIELD(83, U32, IN_OFFER, 0, verbs_port),
};
enum { N_FIELDS = sizeof(fields) / sizeof(fields[0]), N_CONTRACT = 8 };
_Static_assert(N_FIELDS <= 64, "decode keeps a bit for each");

/* ---- encode ---- */

static size_t value_bytes(const struct field *field, const struct afd__hello *hello)
{
	switch (field->type) {
	case TEXT:
		return strnlen((const char *)hello + field->offset, field->bytes - 1);
	case BYTES:
		return hello->ffn_kinds_bytes;
	default:
		return field->bytes;
	}
}

static size_t encode_field(
	uint8_t *out, size_t capacity, const struct field *field, const struct afd__hello *hello)
{
	const char *value = (const char *)hello + field->offset;
	size_t bytes = value_bytes(field, hello);
	uint64_t words[2];
	uint32_t word;

	if (bytes > capacity || capacity - bytes < FIELD_BYTES)
		return 0;
	afd__put16(out, field->tag);
	afd__put16(out + 2, (uint16_t)bytes);
	out += FIELD_BYTES;
	if (field->type == TEXT || field->type == BYTES) {
		memcpy(out, value, bytes);
	} else if (bytes == 4) {
		memcpy(&word, value, 4);
		afd__put32(out, word);
	} else {
		memcpy(words, value, bytes);
		for (size_t i = 0; i < bytes / 8; i++)
			afd__put64(out + 8 * i, words[i]);
	}
	return FIELD_BYTES + bytes;
}

size_t afd__hello_encode(void *bytes, size_t capacity, const struct afd__hello *hello)
{
	uint8_t *out = bytes;
	size_t at = PREFIX_BYTES, wrote;

	if (capacity < PREFIX_BYTES)
		return 0;
	for (int i = 0; i < N_FIELDS; i++) {
		if (!(fields[i].kinds & 1 << hello->kind))
			continue;
		wrote = encode_field(out + at, capacity - at, &fields[i], hello);
		if (!wrote)
			return 0;
		at += wrote;
	}
	afd__hello_prefix(out, hello->kind, (uint32_t)at);
	afd__put16(out + 4, (uint16_t)hello->wire_version);
	return at;
}

void afd__hello_prefix(void *bytes, uint32_t kind, uint32_t n_bytes)
{
	uint8_t *out = bytes;

	afd__put32(out, MAGIC);
	afd__put16(out + 4, AFD__WIRE_VERSION);
	afd__put16(out + 6, (uint16_t)kind);
	afd__put32(out + 8, n_bytes);
}

/* FNV-1a, 64 bits: names a contract in few bytes. It protects nothing, and the fields themselves
 * are compared too. */
static uint64_t digest(const uint8_t *bytes, size_t n_bytes)
{
	uint64_t hash = 0xcbf29ce484222325u;

	for (size_t i = 0; i < n_bytes; i++)
		hash = (hash ^ bytes[i]) * 0x100000001b3u;
	return hash;
}

void afd__hello_state(struct afd__hello *hello, const struct afd_contract *contract)
{
	uint8_t bytes[AFD__LAYERS_MAX + 128];
	size_t at = 0;

	hello->wire_version = AFD__WIRE_VERSION;
	hello->hidden_size = contract->hidden_size;
	hello->n_layers = contract->n_layers;
	hello->n_experts = contract->n_experts;
	hello->top_k = contract->top_k;
	hello->router = (uint32_t)contract->router;
	hello->activation = (uint32_t)contract->activation;
	hello->shared_experts = (uint32_t)contract->shared_experts;
	hello->ffn_kinds_bytes = contract->n_layers;
	memcpy(hello->ffn_kinds, contract->ffn_kinds, contract->n_layers);
	for (int i = 0; i < N_CONTRACT; i++)
		at += encode_field(bytes + at, sizeof(bytes) - at, &fields[i], hello);
	hello->digest = digest(bytes, at);
}

/* ---- decode ---- */

static void make_printable(char *text)
{
	for (; *text; text++) {
		if (*text < ' ' || *text > '~')
			*text = '?';
	}
}

static int decode_value(
	struct afd__hello *hello, const struct field *field, const uint8_t *in, size_t bytes)
{
	char *value = (char *)hello + field->offset;
	uint64_t words[2];
	uint32_t word;

	switch (field->type) {
	case TEXT:
		bytes = strnlen((const char *)in, bytes < field->bytes ? bytes : field->bytes - 1u);
		memcpy(value, in, bytes);
		value[bytes] = '\0';
		make_printable(value);
		return 0;
	case BYTES:
		if (bytes > field->bytes)
			return afd__error(-EPROTO, "handshake: %s has %zu bytes, limit %u",
				field->name, bytes, field->bytes);
		memcpy(value, in, bytes);
		hello->ffn_kinds_bytes = (uint32_t)bytes;
		return 0;
	default:
		break;
	}
	if (bytes != field->bytes)
		return afd__error(-EPROTO, "handshake: %s has %zu bytes, must have %u", field->name,
			bytes, field->bytes);
	if (bytes == 4) {
		word = afd__take32(in);
		memcpy(value, &word, 4);
		return 0;
	}
	for (size_t i = 0; i < bytes / 8; i++)
		words[i] = afd__take64(in + 8 * i);
	memcpy(value, words, bytes);
	return 0;
}

static int decode_field(
	struct afd__hello *hello, uint64_t *seen, uint16_t tag, const uint8_t *in, size_t bytes)
{
	int i = 0;

	while (i < N_FIELDS && (fields[i].tag != tag || !(fields[i].kinds & 1 << hello->kind)))
		i++;
	if (i == N_FIELDS) {
		if (tag & TAG_CRITICAL)
			return afd__error(-EPROTO,
				"handshake: field %u must be understood, and is not known here",
				tag);
		return 0;
	}
	if (*seen & UINT64_C(1) << i)
		return afd__error(-EPROTO, "handshake: %s stands twice", fields[i].name);
	*seen |= UINT64_C(1) << i;
	return decode_value(hello, &fields[i], in, bytes);
}

static int check_complete(const struct afd__hello *hello, uint64_t seen)
{
	for (int i = 0; i < N_FIELDS; i++) {
		if ((fields[i].kinds & 1 << hello->kind) && !(seen & UINT64_C(1) << i))
			return afd__error(-EPROTO, "handshake: %s is missing", fields[i].name);
	}
	if ((IN_BOTH & 1 << hello->kind) && hello->ffn_kinds_bytes != hello->n_layers)
		return afd__error(-EPROTO, "handshake: ffn_kinds has %u bytes, n_layers is %u",
			hello->ffn_kinds_bytes, hello->n_layers);
	return 0;
}

int afd__hello_decode_prefix(struct afd__hello *hello, const void *bytes, size_t n_bytes)
{
	const uint8_t *in = bytes;

	memset(hello, 0, sizeof(*hello));
	if (n_bytes < PREFIX_BYTES)
		return afd__error(-EPROTO, "handshake: %zu bytes came, a message has at least %d",
			n_bytes, PREFIX_BYTES);
	if (afd__take32(in) != MAGIC)
		return afd__error(-EPROTO, "handshake: magic is 0x%08x, must be 0x%08x",
			afd__take32(in), MAGIC);
	hello->wire_version = afd__take16(in + 4);
	hello->kind = afd__take16(in + 6);
	if (hello->wire_version != AFD__WIRE_VERSION)
		return 0;
	if (hello->kind < AFD__HELLO || hello->kind > AFD__OFFER)
		return afd__error(-EPROTO, "handshake: kind is %u, limit %d", hello->kind,
			AFD__OFFER);
	if (afd__take32(in + 8) != n_bytes)
		return afd__error(-EPROTO, "handshake: %zu bytes came, the message says %u",
			n_bytes, afd__take32(in + 8));
	return 0;
}

int afd__hello_decode(struct afd__hello *hello, const void *bytes, size_t n_bytes)
{
	const uint8_t *in = bytes;
	size_t at = PREFIX_BYTES, value;
	uint64_t seen = 0;
	int rc;

	rc = afd__hello_decode_prefix(hello, in, n_bytes);
	if (rc || hello->wire_version != AFD__WIRE_VERSION)
		return rc;
	while (at < n_bytes) {
		if (n_bytes - at < FIELD_BYTES)
			return afd__error(
				-EPROTO, "handshake: %zu bytes after the last field", n_bytes - at);
		value = afd__take16(in + at + 2);
		if (value > n_bytes - at - FIELD_BYTES)
			return afd__error(-EPROTO, "handshake: field %u has %zu bytes, %zu came",
				afd__take16(in + at), value, n_bytes - at - FIELD_BYTES);
		rc = decode_field(hello, &seen, afd__take16(in + at), in + at + FIELD_BYTES, value);
		if (rc)
			return rc;
		at += FIELD_BYTES + value;
	}
	return check_complete(hello, seen);
}

/* ---- compare ---- */

void afd__hello_refuse(struct afd__hello *refusal, const char *field, const char *refuser_value,
	const char *refused_format, ...)
{
	va_list args;

	memset(refusal, 0, sizeof(*refusal));
	refusal->kind = AFD__REFUSAL;
	refusal->wire_version = AFD__WIRE_VERSION;
	refusal->status = afd__wire_status(-EINVAL);
	snprintf(refusal->field, sizeof(refusal->field), "%s", field);
	snprintf(refusal->refuser_value, sizeof(refusal->refuser_value), "%s", refuser_value);
	va_start(args, refused_format);
	vsnprintf(refusal->refused_value, sizeof(refusal->refused_value), refused_format, args);
	va_end(args);
}

static int compare_kinds(
	const struct afd__hello *ours, const struct afd__hello *peer, struct afd__hello *refusal)
{
	char field[32], value[16];

	for (uint32_t layer = 0; layer < ours->n_layers; layer++) {
		if (ours->ffn_kinds[layer] == peer->ffn_kinds[layer])
			continue;
		snprintf(field, sizeof(field), "ffn_kinds[%u]", layer);
		snprintf(value, sizeof(value), "%u", ours->ffn_kinds[layer]);
		afd__hello_refuse(refusal, field, value, "%u", peer->ffn_kinds[layer]);
		return 1;
	}
	return 0;
}

static int compare_number(const struct field *field, const struct afd__hello *ours,
	const struct afd__hello *peer, struct afd__hello *refusal)
{
	uint64_t a = 0, b = 0;
	char value[32];

	/* Little or big, a U32 that is copied to the front of a zeroed U64 compares the same on
	 * both sides. */
	memcpy(&a, (const char *)ours + field->offset, field->bytes);
	memcpy(&b, (const char *)peer + field->offset, field->bytes);
	if (a == b)
		return 0;
	if (field->type == U32) {
		uint32_t x, y;

		memcpy(&x, &a, sizeof(x));
		memcpy(&y, &b, sizeof(y));
		snprintf(value, sizeof(value), "%u", x);
		afd__hello_refuse(refusal, field->name, value, "%u", y);
	} else {
		snprintf(value, sizeof(value), "%016llx", (unsigned long long)a);
		afd__hello_refuse(refusal, field->name, value, "%016llx", (unsigned long long)b);
	}
	return 1;
}

int afd__hello_compare(
	const struct afd__hello *ours, const struct afd__hello *peer, struct afd__hello *refusal)
{
	for (int i = 0; i < N_FIELDS; i++) {
		const struct field *field = &fields[i];

		if (!field->compared)
			continue;
		/* Comes after n_layers, so both arrays have the same length here. */
		if (field->type == BYTES ? compare_kinds(ours, peer, refusal)
					 : compare_number(field, ours, peer, refusal))
			return 1;
	}
	return 0;
}
