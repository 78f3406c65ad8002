/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The messages of the handshake: what each side states before slots exist. A message is a fixed
 * prefix that no version changes (magic, wire version, kind, bytes) and fields of (tag, bytes,
 * value) that any version may add to; one table encodes, decodes and compares them, so that a
 * disagreement names its field and both values. docs/wire.md has the list.
 *
 * A message comes from a stranger: sizes and tags are checked before use, texts are made printable.
 */
#ifndef AFD_LIB_TRANSPORT_HELLO_H
#define AFD_LIB_TRANSPORT_HELLO_H

#include <afd/transport.h>

enum { AFD__LAYERS_MAX = 1024, AFD__MAP_VERSION = 1 };

enum afd__hello_kind {
	AFD__HELLO = 1,   /* attention side: who I am and what I want */
	AFD__WELCOME = 2, /* FFN side: who I am, and what the link will be */
	AFD__READY = 3,   /* attention side: I have the slots */
	AFD__REFUSAL = 4, /* either side, instead of its next message; then it closes */
	AFD__NONCE = 5,   /* either side, first, when it has a key */
	AFD__QUEUE_PAIRS = 6, /* either side of a verbs: link, before READY: no fields, verbs.c */
	AFD__PROBE = 7, /* attention side, instead of HELLO: what else have you, and echo (survey.c) */
	AFD__OFFER = 8, /* FFN side, to a PROBE (echo.c) */
};

struct afd__hello {
	uint32_t kind;
	uint32_t wire_version;
	/* The contract: both sides' are equal, or the link is refused. */
	uint32_t hidden_size, n_layers, n_experts, top_k, router, activation, shared_experts;
	uint32_t ffn_kinds_bytes;
	uint8_t ffn_kinds[AFD__LAYERS_MAX]; /* [n_layers] */
	uint64_t digest;
	/* The link. The welcome repeats what the hello asked for; max_rows is the smaller side's.
	 */
	uint32_t role, lanes, max_rows, to_ffn_dtype, to_attention_dtype, gate;
	uint32_t first_layer, n_held; /* layers wanted, layers held */
	uint32_t group_index, group_size; /* between ranks of an attention group; else 0, 0 */
	uint64_t weights[2], weights_epoch;
	/* FFN side: what of the layers is held. Ranges, not a count of shards, so that a later
	 * version of the map can place experts as it likes. */
	uint32_t map_version, shard_rank, n_shards, shard_tp, n_tp, expert_begin, expert_end;
	char device[16], version[16];
	/* A probe: bytes of the large slot, 0: only asks. An offer: the same, the smaller side's;
	 * how many slots are echoed; where else the FFN side listens. */
	uint32_t probe_bytes, probe_slots, verbs_port;
	char shm_name[81];
	/* A refusal. */
	uint32_t status;
	char field[32];
	char refuser_value[48], refused_value[48];
	char text[160];
};

/* Fills the contract's fields and their digest. */
void afd__hello_state(struct afd__hello *hello, const struct afd_contract *contract);

/* The 12 bytes that no version changes. */
void afd__hello_prefix(void *out, uint32_t kind, uint32_t bytes);
/* Bytes written, or 0 when they do not fit (they do in AFD__HELLO_MAX). */
size_t afd__hello_encode(void *bytes, size_t capacity, const struct afd__hello *hello);
/* -EPROTO names what is wrong. A message of another wire version decodes as far as its prefix: only
 * kind and wire_version are set. */
int afd__hello_decode_prefix(struct afd__hello *hello, const void *bytes, size_t n_bytes);
int afd__hello_decode(struct afd__hello *hello, const void *bytes, size_t n_bytes);

/* 0 when ours and the peer's contract agree; else 1, and the refusal is filled from our point of
 * view: field and both values. */
int afd__hello_compare(
	const struct afd__hello *ours, const struct afd__hello *peer, struct afd__hello *refusal);

/* Fills a refusal: status, field and the two values. */
__attribute__((format(printf, 4, 5))) void afd__hello_refuse(struct afd__hello *refusal,
	const char *field, const char *refuser_value, const char *refused_format, ...);

#endif
