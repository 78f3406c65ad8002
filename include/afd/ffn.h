/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The FFN stage: y = F(layer, x). Stateless and norm-free: x is the normed input, y the raw output;
 * residual and norms stay with attention.
 *
 * It is made from a checkpoint, or from a host's compute function (an engine's own kernels, another
 * accelerator), and is used by calls (_forward), or as a server over a transport (_serve, or _poll
 * in a host's event loop). The server gathers rows of one layer from several attention peers into
 * one pass, since the weights are read once for all of them.
 */
#ifndef AFD_FFN_H
#define AFD_FFN_H

#include "context.h"
#include "model.h"
#include "transport.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct afd_ffn afd_ffn;

/* One pass that a compute function is asked for. */
struct afd_ffn_pass {
	size_t size;
	uint64_t id;     /* for afd_ffn_complete */
	int32_t layer;
	uint32_t n_rows; /* 1 .. the stage's max_rows */
	/* [n_rows][hidden_size], rounded to the wire dtype already. It may be the link's own slot,
	 * which over shm: a peer that breaks its promises could still write */
	const float *x;
	float *y;        /* [n_rows][hidden_size], to be written; does not overlap x */
	/* Where the gate is on the attention side, the experts of each row; NULL, NULL and 0 in a
	 * dense layer, and where the function routes for itself. Ids are the peer's numbers: one
	 * that is no expert of this shard, or that stands in the row before, counts for nothing. */
	const int32_t *ids;   /* [n_rows][top_k] */
	const float *weights; /* [n_rows][top_k] */
	uint32_t top_k;
	uint32_t _pad;
};

/*
 * A host's FFN. Returns 0 when y is complete, a negative errno when the pass failed (the attention
 * peers of these rows get it as an error), or -EINPROGRESS: then x and y stay valid until
 * afd_ffn_complete is called, and the server beats meanwhile. A function that blocks makes the
 * server silent for as long: the attention side's deadline must allow for it.
 */
typedef int (*afd_ffn_compute)(void *user, const struct afd_ffn_pass *pass);

/* Called while weights are loaded: bytes done of all. Must not call the library. */
typedef void (*afd_progress)(void *user, uint64_t done_bytes, uint64_t total_bytes);

struct afd_ffn_params {
	size_t size;
	const char *device;       /* "cpu" (default), "cuda:0", "deferred" */
	uint32_t max_rows;        /* rows of one pass, 1 .. 65536; 0 means 2048. More rows make
	                             several passes */
	uint32_t first_layer;     /* layers held: n_layers from first_layer on */
	uint32_t n_layers;        /* 0 means all of the model's */
	uint32_t gather_us;       /* the longest wait for rows of other peers, see afd_ffn_serve;
	                             UINT32_MAX: do not wait */
	afd_ffn_compute compute;  /* instead of a model */
	void *compute_user;
	uint64_t weights[2];      /* with compute, or a model whose weights are used in place: the
	                             fingerprint that the host states for them; 0, 0: with compute
	                             unknown, in place it is taken from them */
	afd_progress progress;
	void *progress_user;
	struct afd_shard shard;   /* the part of each layer that is held; all 0: that of net, or all
	                             of it. y is then a partial result: those of all shards, added
	                             by rank ep * n_tp + tp, are the whole */
	int32_t quantize_activations; /* 1: what enters a product with e4m3 weights is rounded to
	                             e4m3 itself, with a float32 scale for each row and group of
	                             128 numbers, as GPUs do it; 0: it is not */
	int32_t deterministic;    /* 1: a row's bits depend on that row alone, as afd_attn_params has it.
	                             For attention of this process either's 1 is enough */
	void *stream;             /* as afd_attn_params has it; attention of this process enqueues on
	                             its own */
	uint64_t weights_epoch;   /* with net: stated beside the fingerprint, for a host that exchanges
	                             weights. Replicas of one shard must state the same */
	uint32_t graphs;          /* with net on a device with graphs ("cuda:N"): of how many row counts
	                             the passes are kept as graphs, 1 .. 1024; 0 means 32; UINT32_MAX:
	                             none */
	uint32_t _pad;            /* 0 */
};

/*
 * Makes an FFN stage and loads its weights onto the device. Exactly one of model and
 * params->compute is given; net may be NULL for a stage that only computes (then compute is not
 * allowed). The stage owns calls on net from now on; net outlives it.
 *
 *   -EINVAL   both or none of model and compute, layers or a field out of range, net was made for
 *             another contract or for attention, there is no such shard, or net was made with
 *             another one; with compute a device or quantize_activations; a stream for a device
 *             that has none
 *   -EBUSY    another stage has net
 *   -ENOENT   a tensor or its file is missing: named
 *   -EBADMSG  a tensor has another shape than the config says
 *   -ENOTSUP  gate and up of an expert have two dtypes; or, with quantize_activations, one of gate
 *             and down is e4m3 and the other is not
 *   -ENOSYS, -ENODEV  the device
 *   -E2BIG, -ENOMEM
 */
AFD_API int afd_ffn_create(afd_ffn **out, const afd_model *model, afd_transport *net,
			   const struct afd_ffn_params *params);
AFD_API void afd_ffn_destroy(afd_ffn *ffn);

/* Rows of one layer in host memory. */
struct afd_ffn_rows {
	size_t size;
	int32_t layer;
	uint32_t n_rows;     /* 0 is legal */
	const void *x;       /* [n_rows][hidden_size] */
	void *y;             /* [n_rows][hidden_size]; may be x when dtypes and strides are equal */
	int32_t x_dtype;     /* 0 means f32 */
	int32_t y_dtype;     /* 0 means f32 */
	size_t x_row_bytes;  /* from row to row; 0 means hidden_size numbers */
	size_t y_row_bytes;
	/* Of a layer with experts, when the host has routed; NULL, NULL and 0: the stage routes. */
	const int32_t *ids;   /* [n_rows][top_k], each an expert of the model, or -1 for none */
	const float *weights; /* [n_rows][top_k] */
	uint32_t top_k;       /* the model's */
	/* 1: x, y, ids and weights are memory of the device, aligned to 4 bytes and strides to a number;
	 * the work is enqueued on params.stream, which must have been given, and the call returns
	 * before it has run; ids are not checked, those of no expert count for nothing. On "cpu" it is
	 * done on return. A host may capture it. */
	int32_t on_device;
};

/*
 * Computes y for a host that moves rows itself. Blocks until y is written, unless rows are
 * on_device. The bits are those of the server.
 * -EINVAL layer not held, a stage made from a compute function, ids of a layer without experts or
 *         beyond them, on_device without a stream; -EBUSY a pass of the server is under way;
 * -ENOTSUP fp8; -ETIMEDOUT a device that does not answer in 60 s.
 */
AFD_API int afd_ffn_forward(afd_ffn *ffn, const struct afd_ffn_rows *rows);

/*
 * Serves until afd_ffn_stop, then drains: peers are told, frames already here are answered. Returns
 * 0, or the error that ended the server; the loss of an attention peer is not one. -ETIMEDOUT: 60 s
 * after the stop a pass is still not done. -EINVAL, here and of _poll and _fd: made without net.
 *
 * Rows of one layer run together. When some are here, the server waits for those peers whose rows
 * of that layer it expects, from what it has measured of each peer and lane, and for peers a few
 * layers behind that will have caught up in time; never for one that is ahead or overdue, and never
 * longer than gather_us from when the rows could have run, nor three times as long as their own
 * peer takes from row to row. gather_us 0 stands for 2000, or for the time of 4 passes where that
 * is longer; the first rows of a step then wait for up to half of what their peer takes between
 * steps, at most 20000, since peers that meet there meet in all layers.
 */
AFD_API int afd_ffn_serve(afd_ffn *ffn);

/* The non-blocking form: makes progress, at most one pass of a device that computes in the call. 1:
 * something was done, and there may be more to do; 0: nothing to do; -ECANCELED: stopped and
 * drained; or the error that ended the server. */
AFD_API int afd_ffn_poll(afd_ffn *ffn);
/* Readable when _poll has something to do; call _poll too when the timeout has passed (-1:
 * none). */
AFD_API int afd_ffn_fd(const afd_ffn *ffn);
AFD_API int32_t afd_ffn_timeout_ms(const afd_ffn *ffn);

/* Asks the server to drain and end. From any thread or signal handler. */
AFD_API void afd_ffn_stop(afd_ffn *ffn);

/* Reports a pass for which compute returned -EINPROGRESS: status 0 or a negative errno. From any
 * thread, once. -ENOENT: no such pass is under way. The stage is destroyed only after all passes
 * were reported. */
AFD_API int afd_ffn_complete(afd_ffn *ffn, uint64_t id, int status);

struct afd_ffn_stats {
	size_t size;
	uint64_t n_passes;
	uint64_t n_rows;
	uint64_t compute_ns;
	uint64_t weight_bytes; /* device memory held by weights, with what packing pads; nothing of
	                          those used in place */
	uint64_t weights[2];   /* their fingerprint; 0, 0 unknown */
	uint32_t n_peers;      /* joined now */
	uint32_t _pad;
	uint64_t stored_bytes; /* what was loaded, as the checkpoint stores it: as much as
	                          afd_model_shard() foretells */
};
AFD_API int afd_ffn_stats(const afd_ffn *ffn, struct afd_ffn_stats *stats);

#ifdef __cplusplus
}
#endif

#endif
