/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transport: this process's end of the activation exchange, with all its peers. One row per
 * token crosses twice per layer: x, the normed input of the FFN, one way; y, its raw output, the
 * other. docs/wire.md specifies the bytes.
 *
 * A host that gives its transport to a stage (attn.h, ffn.h) needs only _create and _destroy of
 * this header. A host that keeps its own attention sends frames itself: _begin once per step, then
 * per layer and lane _dispatch and _collect.
 *
 * Addresses: "loop:NAME" inside one context, "shm:NAME" between processes of one user on one host
 * (and in one network namespace), "tcp:HOST:PORT" between hosts. NAME is 1 to 80 of
 * [A-Za-z0-9._-]; "verbs:HOST:PORT?dev=NAME&..." between hosts with RDMA, docs/transports.md has its
 * parameters; "auto:HOST:PORT" the best of these that was proved. HOST is a name, an IPv4 address,
 * or an IPv6 address in brackets; PORT 0 listens at a free one, see afd_transport_address. An
 * address is free again the moment its listener is gone, however it went. A HOST that the system's
 * resolver has to ask for may hold up _create (listen) or _poll (connect) for as long as that takes;
 * numbers and /etc/hosts do not.
 *
 * Deadlines count silence, not work: a peer that computes sends beats. A peer that died is noticed
 * within one second. Rows that an FFN peer has not answered when it is lost go to another one that
 * holds the same shard, if there is one: the frame completes with the same bits. Without one the
 * frame fails, the cause is kept and named, and the step can be repeated when a peer is back.
 */
#ifndef AFD_TRANSPORT_H
#define AFD_TRANSPORT_H

#include "context.h"
#include "model.h"

#ifdef __cplusplus
extern "C" {
#endif

#define AFD_MAX_LANES 4

typedef struct afd_transport afd_transport;

/* Which side routes rows to experts; without experts it does not matter. */
enum afd_gate { AFD_GATE_ATTENTION = 1, AFD_GATE_FFN = 2 };

struct afd_transport_params {
	size_t size;
	/* Either listen (FFN side), or connect or group (attention side). */
	const char *const *listen;  /* [n_listen] addresses to listen at */
	/* [n_connect] addresses of all FFN peers, in any order; several of one shard are replicas */
	const char *const *connect;
	uint32_t n_listen;
	uint32_t n_connect;
	uint32_t lanes; /* attention side: batches that overlap, 1 .. AFD_MAX_LANES; 0 means 1 */
	uint32_t max_rows; /* rows of one part, 1 .. 65536; 0 means 512; the smaller side wins */
	/* enum afd_dtype of x on the wire; AFD_DTYPE_FP8: with a scale for each 128 numbers of a row.
	 * Attention side: 0 means the contract's, bf16 for FP8. FFN side: 0 accepts any, else only
	 * this */
	int32_t to_ffn_dtype;
	int32_t to_attention_dtype; /* of y, the same way */
	int32_t gate;               /* attention side: enum afd_gate; 0 means AFD_GATE_ATTENTION */
	uint32_t max_peers;         /* FFN side: peers at once, 1 .. 1024; 0 means 64 */
	uint32_t deadline_ms; /* the longest silence of a peer that owes a reply; 0 means 5000 */
	/* Attention side: a server that is not up yet is waited for until then; 0 means 10000. */
	uint32_t connect_timeout_ms;
	/* How long a wait spins before it sleeps; 0 means 50; UINT32_MAX: it does not spin. */
	uint32_t spin_us;
	uint32_t n_layers;    /* FFN side: layers held, 0 means all of the contract's */
	uint32_t first_layer; /* FFN side: from this one on */
	uint32_t _pad;        /* 0 */
	/* FFN side: the part of each layer that is held; all 0: all of it. The FFN peers that an
	 * attention peer connects to hold all shards of one way of sharding. */
	struct afd_shard shard;
	/* Attention side: ranks of one attention group exchange their partial results. Rank 0
	 * listens at this address, rank i at the same with ".i" after it (tcp: at PORT + i), and
	 * each connects to those of lower rank. Ranks of several hosts: the addresses of all ranks,
	 * in order, with commas between them. NULL: no group */
	const char *group;
	uint32_t group_index; /* this rank, below group_size */
	uint32_t group_size;  /* ranks, 2 .. 64; 0 or 1: no group */
	/* A key that all peers prove to each other before anything else of theirs is looked at: a
	 * file that its owner alone may open, whose bytes are the key, or bytes that are copied.
	 * 16 .. 4096 bytes. Both NULL: no key, and whoever comes is heard. */
	const char *key_file;
	const void *key; /* [key_bytes] */
	size_t key_bytes;
	uint32_t tls; /* 1, with a key: tcp: links are encrypted (TLS 1.3); verbs: is refused then */
	/* Attention side: how long a step waits for an FFN peer to come (back) when nobody holds a
	 * shard any more; then, or at once with 0, it fails. */
	uint32_t reconnect_ms;
};

/*
 * Makes a transport: starts to listen, or starts to connect. Never blocks: connecting finishes in
 * _poll or _wait. The contract and the params are copied. Fields of the other side are ignored, but
 * for shard and group.
 *
 *   -EINVAL      neither or both sides, a bad address, a field out of range, a contract without
 *                sizes
 *   -ENOSYS      the address names a transport that is not part of this build, or whose module
 *                is not there (afd-verbs.so); or a key, and there is no afd-tls.so
 *   -EACCES      others may open the key's file; -ENOENT: there is none
 *   -EADDRINUSE  somebody listens there
 *   -ENOTSUP     tls over verbs:
 *   -ENODEV      the machine cannot: shm: without memfd, verbs: without an RDMA device
 *   -E2BIG, -ENOMEM, -EIO
 */
AFD_API int afd_transport_create(afd_transport **out, afd_context *ctx,
	const struct afd_contract *contract, const struct afd_transport_params *params);

/* Says goodbye to the peers, closes the links, frees. Does not wait. Stages go before. */
AFD_API void afd_transport_destroy(afd_transport *net);

/*
 * Makes progress; never blocks. Returns 1 when the peers that have joined hold every shard (FFN
 * side: at once), 0 when they do not yet, or not any more and reconnect_ms runs. Peers that are
 * missing or lost are looked for on and on, and taken when they come.
 *
 *   -ETIMEDOUT     a peer did not come up within connect_timeout_ms, or was silent for deadline_ms
 *                  while it owed a reply
 *   -EPROTO        a peer disagrees or refuses; the text says field, both values and the address.
 *                  Or the FFN peers do not hold every shard: the text says which is missing
 *   -ECONNRESET    a peer died or left, and no other one holds its shard (attention side; on the
 *                FFN side a lost peer is no error); until one does again
 */
AFD_API int afd_transport_poll(afd_transport *net);

/* _poll until it returns 1 or an error; returns that. timeout_ms 0 means connect_timeout_ms.
 * -ETIMEDOUT: says who is missing, and nothing has changed. */
AFD_API int afd_transport_wait(afd_transport *net, int32_t timeout_ms);

/*
 * For a host's event loop: the descriptor becomes readable when _poll (or _collect) has something
 * to do, after one that left nothing undone; it must also be called when the timeout has passed
 * (-1: none). The descriptor is the library's.
 */
AFD_API int afd_transport_fd(const afd_transport *net);
AFD_API int32_t afd_transport_timeout_ms(const afd_transport *net);

/* ---- a host's own attention ---- */

/* What opens a step. Peers are told the rows of each lane, so that they know whom to wait for; in an
 * attention group FFN peers are told this rank's share of them. */
struct afd_step_params {
	size_t size;
	uint32_t n_rows[AFD_MAX_LANES]; /* of each lane in this step; 0: an empty or unused lane */
	uint32_t flags;                 /* 0 */
	uint8_t trace_id[16];           /* passed through to the peers; all zero: none */
	uint32_t _pad;                  /* 0 */
};

/* Rows of one lane at one layer. Memory is borrowed from _dispatch until _collect returns 1 or an
 * error. */
struct afd_frame {
	size_t size;
	int32_t layer;   /* 0 .. n_layers-1 */
	int32_t lane;    /* 0 .. lanes-1 */
	uint32_t n_rows; /* 0 is legal: nothing crosses, and _collect returns 1 */
	int32_t x_dtype; /* of x in memory, not fp8; 0 means f32. Rounded if the wire has another */
	int32_t y_dtype; /* of y in memory, not fp8; 0 means f32 */
	uint32_t _pad;   /* 0 */
	const void *x;   /* [n_rows][hidden_size], rows x_row_bytes apart */
	/* [n_rows][hidden_size], rows y_row_bytes apart; may be x when dtypes and row bytes are
	 * equal. With several shards their partial results are added here in the order of their
	 * ranks: then y is f32, and not x */
	void *y;
	size_t x_row_bytes; /* 0 means hidden_size numbers */
	size_t y_row_bytes;
	/* [n_rows][top_k] experts of each row, 0 .. n_experts-1, of a layer with experts when the
	 * gate is on the attention side; else not read */
	const int32_t *ids;
	const float *weights; /* [n_rows][top_k], with ids */
};

/*
 * Opens a step. -EINVAL while frames of the last one are out, -EAGAIN before all peers have joined,
 * -EBUSY when a stage has the transport, or the link's error. A host that gives a step up in the
 * middle calls _cancel: its frames end, and replies that are still out are dropped when they come.
 */
AFD_API int afd_transport_begin(afd_transport *net, const struct afd_step_params *params);
AFD_API int afd_transport_cancel(afd_transport *net);

/* Sends a frame: all rows to all FFN peers; with ids a row goes only to those that hold one of its
 * experts, or a part of shared ones. Parts of more than max_rows rows follow in _poll and _collect.
 * -EINVAL when no step is open, or a field is out of range; -EBUSY when the lane has a frame out, or
 * a stage has the transport; -ENOTSUP: fp8 in memory; or the link's error. */
AFD_API int afd_transport_dispatch(afd_transport *net, const struct afd_frame *frame);

/* Makes progress. 1: y of the lane's frame is complete; 0: not yet; or the error that ended it: the
 * link's, or one of the FFN's own for this frame, after which the link goes on. */
AFD_API int afd_transport_collect(afd_transport *net, int32_t lane);

/* _dispatch, then _collect until done; returns 0. The deadline is the transport's. */
AFD_API int afd_transport_exchange(afd_transport *net, const struct afd_frame *frame);

/* ---- looking ---- */

enum afd_peer_state {
	AFD_PEER_CONNECTING = 1,
	AFD_PEER_JOINED = 2,
	AFD_PEER_LEFT = 3, /* with a goodbye */
	AFD_PEER_LOST = 4,
};

struct afd_peer_info {
	size_t size;
	char address[128]; /* as given to connect; FFN side: the address it came by, with #number */
	char version[16];  /* the peer's library */
	char device[16];   /* "avx512", "avx2", "c", or a device kind */
	int32_t state;     /* enum afd_peer_state */
	int32_t to_ffn_dtype, to_attention_dtype;
	uint32_t lanes, max_rows;
	uint32_t _pad;
	uint64_t n_parts;       /* parts of frames sent to it, or answered (FFN side) */
	uint64_t n_rows;        /* rows of these */
	uint64_t n_resent_rows; /* of these, sent a second time */
	uint64_t weights[2];    /* fingerprint that the FFN side states; 0, 0: unknown */
	int32_t role;           /* enum afd_role of the peer */
	/* Of an FFN peer its shard, of one of our attention group its rank there; else 0 of 0, also
	 * before it has joined. */
	uint32_t rank, n_ranks;
	uint32_t _pad2;
	uint64_t weights_epoch; /* that the FFN side states beside the fingerprint */
};

/* Peers that this transport has or had. Attention side: in the order of connect, then the other
 * ranks of the group. FFN side: those that have gone, the latest max_peers of them, then those that
 * are joined, in order of joining. -ENOENT beyond the last. */
AFD_API int afd_transport_peer(const afd_transport *net, uint32_t index,
	struct afd_peer_info *info);

/* The address that listen[index] became; NUL-terminated. -ENOENT beyond the last, -ENOSPC when it
 * does not fit. */
AFD_API int afd_transport_address(const afd_transport *net, uint32_t index, char *buffer,
	size_t capacity);

/* ---- trying ---- */

#define AFD_MAX_BACKENDS 16 /* that this or a later version knows */

struct afd_probe_params {
	size_t size;
	uint32_t timeout_ms; /* for all of it; 0 means 10000 */
	uint32_t tls;        /* as in the transport params, and so is the key */
	const char *key_file;
	const void *key; /* [key_bytes] */
	size_t key_bytes;
};

/* One backend. Errors are codes of context.h. */
struct afd_probe_backend {
	char scheme[16];   /* "shm" */
	char address[128]; /* at which it was tried; "" when it was not */
	int32_t machine;   /* 0: this build and this machine can carry it; else why not */
	int32_t error;     /* 0: proved there, by bytes that came back as they went; else why not */
	char text[256];    /* of the error; "" when it was proved */
	/* When it was proved, medians: 64 bytes there and back, waited for as a transport waits; and
	 * 256 KiB there and back, both ways counted, or less where the listener takes less. */
	double round_trip_us;
	double bytes_per_second;
};

struct afd_probe {
	size_t size;
	/* [n_backends], backend_bytes apart; the caller's memory, which is filled. */
	struct afd_probe_backend *backends;
	uint32_t backend_bytes; /* sizeof(struct afd_probe_backend) */
	uint32_t max_backends;  /* there is room for so many; AFD_MAX_BACKENDS is enough */
	uint32_t n_backends;    /* filled in */
	int32_t chosen;         /* index of the one that auto: would take; -1: none was proved */
};

/*
 * Tries what can carry rows to an address: "shm:NAME", "tcp:HOST:PORT" or "verbs:HOST:PORT" that one;
 * "auto:HOST:PORT" all that who listens there has. Each that is tried has a connection of its own,
 * over which slots of bytes go there and back: who listens answers them beside its work, needs no
 * model, and counts no peer. The table says of every backend whether this build and machine can carry
 * it, and it is filled in also when nobody listens.
 *
 * Blocks for at most timeout_ms; needs nothing but the context, and leaves nothing. 0 when one was
 * proved; else chosen is -1 and the result is why the address's own was not:
 *
 *   -ECONNREFUSED nobody listens there · -ETIMEDOUT no answer · -EACCES the key · -EPROTO the listener
 *   refuses, or does not know probes · -ECONNRESET it went away · -EBADMSG bytes changed on their way
 *   -ENOSYS, -ENODEV, -ENOTSUP what the address says cannot be carried here
 * or, and then nothing has changed:
 *   -EINVAL a bad address, or no context or result · -ENOSPC max_backends is too small · -E2BIG
 */
AFD_API int afd_transport_probe(afd_context *ctx, const char *address,
	const struct afd_probe_params *params, struct afd_probe *out);

#ifdef __cplusplus
}
#endif

#endif
