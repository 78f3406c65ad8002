/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The attention stage: embedding, norms, attention over a paged KV cache, residual stream, LM head.
 * Sequences are added, advanced by steps, forked, truncated and dropped by the host's ids. The FFN
 * of each layer is done by peers (over a transport) or by a stage in this process; the bits are the
 * same either way.
 *
 *     afd_attn_add(attn, 7);
 *     struct afd_entry entry = { .sequence = 7, .ids = prompt, .n_ids = n };
 *     struct afd_batch batch = { .size = sizeof batch, .entries = &entry, .n_entries = 1,
 *                                .entry_bytes = sizeof entry, .logits = logits, .logits_rows = 1 };
 *     afd_attn_step(attn, &batch, 0);
 *
 * With a transport of an attention group the stage is one rank of it: it holds some of the heads and
 * caches K and V of these. All ranks make the same calls with the same batches, and each has all
 * outputs, with the same bits. A rank that begins a step later than another by deadline_ms is lost
 * to that one, also when it refuses the batch; so ranks are made with the same capacities. A step
 * that fails or is cancelled on one rank ends on those that still need it, as if it had not begun
 * there; on one that needed nothing more it succeeds, so a host that goes on compares what its ranks
 * say, and truncates.
 *
 * A step is a resumable object: _begin, then _poll until it returns 1; or _step, which does both
 * and waits. A step that fails or is cancelled leaves KV and sequences as they were before it, and
 * can be repeated.
 */
#ifndef AFD_ATTN_H
#define AFD_ATTN_H

#include "context.h"
#include "ffn.h"
#include "model.h"
#include "transport.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct afd_attn afd_attn;

struct afd_attn_params {
	size_t size;
	const char *device;     /* "cpu" (default), "cuda:0", "deferred" */
	/* An FFN stage in this process, on the same device; instead of a transport, or with one of an
	 * attention group without FFN peers. */
	afd_ffn *ffn;
	uint32_t max_sequences; /* 1 .. 1048576; 0 means 64 */
	uint32_t max_rows;      /* rows of one batch, 1 .. 65536; 0 means 2048 */
	/* Positions of one batch that give an output, 1 .. max_rows; 0 means max_sequences, at most
	 * max_rows. */
	uint32_t max_outputs;
	uint32_t page_size;     /* positions in a KV page, 1 .. 65536; 0 means 16 */
	/* Pages of each layer, of page_size positions. 0 means enough for 4096 positions. Pages leave
	 * layers with a window, which therefore get fewer where max_sequences and max_rows can never
	 * use as many. */
	uint32_t kv_pages;
	int32_t kv_dtype;       /* enum afd_dtype; 0 means that of embed_tokens. AFD_DTYPE_FP8: with a
				   scale for K and one for V of each layer, the checkpoint's or 1;
				   what exceeds 448 scales is held as 448 scales */
	/* With ffn: rows are rounded as on a wire; 0 means the dtype of embed_tokens. With a
	 * transport its params say these and the lanes: leave 0. */
	int32_t to_ffn_dtype;
	int32_t to_attention_dtype;
	uint32_t lanes;         /* 1 .. AFD_MAX_LANES; 0 means 1 */
	/* Length of the longest sequence; 0 means as many positions as the pool holds. Where every
	 * layer has a window it may be more than that; then 0 means max_position_embeddings, at most
	 * 1048576. Page lists take 8 bytes for each sequence and page of this length, and as much
	 * again where some layers have a window. */
	uint32_t max_positions;
	/* The host's memory for the pool, 64-byte aligned, at least afd_attn_kv_bytes(); NULL: the
	 * library's. */
	void *kv_memory;
	size_t kv_memory_bytes;
	afd_progress progress;  /* while weights are loaded */
	void *progress_user;
	/* The rank in an attention group, as the transport's params say it. afd_attn_kv_bytes needs
	 * them; for _create leave 0, or say the same. */
	uint32_t group_index;
	uint32_t group_size;    /* 0 means 1 */
	/* Positions that _truncate can always take a sequence back by, whatever has left a sliding
	 * window; 0 means the rows of its last step, at most 64. */
	uint32_t rollback;
	int32_t quantize_activations; /* 1: what enters a product with e4m3 weights is rounded to e4m3
				   itself, as afd_ffn_params has it; 0: it is not */
	/* Of a device with streams ("cuda:N": a cudaStream_t of that device): all work of the stage,
	 * that of params.ffn included, is enqueued there in order with the host's own, and nothing
	 * that is enqueued waits. Outlives the stage. NULL: a stream of the stage's own. While the
	 * host captures it a step fails with -ENOTSUP. */
	void *stream;
	/* On a device with graphs ("cuda:N"): what a batch like an earlier one (in sequences, rows,
	 * outputs and page table) has enqueued is recorded as graphs, then replayed. With params.ffn
	 * alone a step is one piece, and lanes are not used, unless there is a tracer; with a
	 * transport it is recorded between the crossings of each layer and lane. How many such
	 * batches are kept, 1 .. 1024; 0 means 32; UINT32_MAX: none, and steps go layer by layer. */
	uint32_t graphs;
	int32_t deterministic; /* 1: a row's bits depend on that row alone, whatever shares its batch,
				   also where the device has faster ways; 0: as is fastest. The cpu
				   device always does that */
};

/* Bytes of the KV pool that these params ask for (kv_memory is not looked at). 0 on an error, see
 * afd_last_error(). */
AFD_API size_t afd_attn_kv_bytes(const afd_model *model, const struct afd_attn_params *params);
/* The most pages of a layer that one sequence of n_positions ever holds when no step appends more
 * than n_rows to it: what it adds to kv_pages. Of params page_size and rollback matter. Or an
 * error. */
AFD_API int64_t afd_attn_kv_pages(const afd_model *model, const struct afd_attn_params *params,
	uint32_t n_positions, uint32_t n_rows);

/*
 * Makes an attention stage and loads its weights. Either net (made to connect) or params->ffn is
 * given, or both when net has a group and no FFN peers. Calls on net are the stage's from now on.
 * Model, net and ffn outlive the stage. Does not wait for peers: _poll, _wait and _step do.
 *
 *   -EINVAL   no FFN, or FFN peers and ffn; a field out of range; net made for another contract or
 *             to listen, or, when attention routes, for other experts than the model's; ffn on
 *             another device, for other layers, or made with a transport; more ranks in the group
 *             than query heads; a stream for a device that has none, or of another device
 *   -EBUSY    another stage has net or ffn
 *   -ENOENT   a tensor is missing: named
 *   -EBADMSG  a tensor has another shape than the config says, or the scale of an fp8 KV cache is
 *             no positive number: named
 *   -ENOTSUP  the device does not reach kv_memory
 *   -ENOSYS, -ENODEV   the device
 *   -E2BIG, -ENOMEM
 */
AFD_API int afd_attn_create(afd_attn **out, const afd_model *model, afd_transport *net,
	const struct afd_attn_params *params);
AFD_API void afd_attn_destroy(afd_attn *attn);

/* ---- sequences; none of these while a step is under way (-EBUSY) ---- */

/* A new empty sequence. -EEXIST; -ENOSPC when max_sequences exist. */
AFD_API int afd_attn_add(afd_attn *attn, uint64_t sequence);
/* Forgets a sequence; pages that no other one shares are free. -ENOENT. */
AFD_API int afd_attn_drop(afd_attn *attn, uint64_t sequence);
/*
 * Pages leave a sliding window for good: those that no position to come sees, nor one that comes
 * again after params.rollback positions were taken back. Further back, what position n_positions
 * would see may be gone: then _truncate and _fork say -EINVAL and change nothing. 0 is always
 * possible, and every n_positions where no layer has a window.
 */
/* A new sequence that shares the first n_positions of `from`; pages are copied when one of them
 * writes. -EINVAL beyond its length, or pages are gone. */
AFD_API int afd_attn_fork(afd_attn *attn, uint64_t from, uint64_t to, uint32_t n_positions);
/* Keeps the first n_positions. -EINVAL beyond its length, or pages are gone. */
AFD_API int afd_attn_truncate(afd_attn *attn, uint64_t sequence, uint32_t n_positions);
/* Positions in the KV cache, or -ENOENT. While a step is under way: those from before it. */
AFD_API int64_t afd_attn_length(const afd_attn *attn, uint64_t sequence);

/* ---- a step ---- */

enum afd_outputs {
	AFD_OUTPUT_NONE = 1,
	AFD_OUTPUT_LAST = 2, /* the default: the last id of the entry */
	AFD_OUTPUT_ALL = 3,  /* every id of the entry */
};

/* How an id is drawn from logits; zeros: the largest logit's. */
struct afd_sample_params {
	size_t size;
	float temperature; /* 0: greedy; finite, not below 0 */
	float top_p;       /* 0 or 1: off */
	uint32_t top_k;    /* 0: off */
	uint32_t _pad;     /* 0 */
	uint64_t seed;
};

/* One sequence's part of a batch: ids to append. A sequence stands in a batch once. */
struct afd_entry {
	uint64_t sequence;
	const int32_t *ids; /* [n_ids], each in 0 .. vocab-1; copied by _begin */
	uint32_t n_ids;     /* 1 or more: a decode token, a chunk of a prompt, tokens to verify */
	int32_t outputs;    /* enum afd_outputs */
	uint64_t user_id;   /* of the host's request; when not 0, error texts name it too */
	/* How its sampled_ids are drawn, each at the position where the id will stand: read by
	 * _begin only. NULL: greedy. top_k is at most vocab. */
	const struct afd_sample_params *sample;
};

struct afd_batch {
	size_t size;
	const struct afd_entry *entries;
	uint32_t n_entries;   /* 0 is legal: the step is done at once */
	uint32_t entry_bytes; /* sizeof(struct afd_entry) */
	/* Host memory; outputs stand in the order of entries and ids. Each may be NULL: then it is
	 * neither computed nor copied. */
	float *logits;        /* [logits_rows][vocab] */
	int32_t *greedy_ids;  /* [greedy_rows]: the largest logit's id, the lowest among equals */
	uint32_t logits_rows; /* room; at least the number of outputs when logits is given */
	uint32_t greedy_rows;
	uint8_t trace_id[16]; /* passed through to the FFN peers */
	/* [sampled_rows]: drawn on the device as the entry's sample says: the id that afd_sample
	 * draws from these logits, with the position where it will stand in the sequence. */
	int32_t *sampled_ids;
	uint32_t sampled_rows;
	uint32_t _pad; /* 0 */
};

/*
 * Reserves all that the batch needs and begins its step. Outputs are borrowed until the step is
 * done; after a failure what they hold is undefined. With none of logits, greedy_ids and
 * sampled_ids nothing is put out, whatever entries say.
 *
 *   -EBUSY   a step is under way
 *   -EINVAL  an id out of range, an empty entry, a sequence that stands twice, too little room for
 *            outputs; a temperature that is negative or not finite, top_p outside 0 .. 1, top_k
 *            above vocab
 *   -ENOENT  no such sequence
 *   -ENOSPC  not enough pages, or more rows or outputs than max_rows or max_outputs; nothing has
 *            changed
 */
AFD_API int afd_attn_begin(afd_attn *attn, const struct afd_batch *batch);

/*
 * Makes progress; never waits, and computes at most one layer of one lane (or one chunk of outputs)
 * on the cpu device. 1: the step is done, outputs are written, sequences have grown; 0: not yet.
 * With no step under way it drives the transport: 1 when all FFN peers and ranks of the group have
 * joined (or there is no transport), 0 not yet. After any error the step has ended and sequences are as before it.
 *
 *   -ECONNRESET, -ETIMEDOUT, -EPROTO   the FFN peer or rank that is named in the text was lost
 *   -EPROTO     also: another rank of the group has another batch
 *   -ECANCELED  another rank of the group has ended the step
 *   -ETIMEDOUT  also: the device did nothing for 60 s
 *   -EDOM       a logit is not finite: the text names sequence and position
 *   others      as the FFN peer or its compute function reported it
 */
AFD_API int afd_attn_poll(afd_attn *attn);

/*
 * _poll until it returns 1 (then 0) or an error. timeout_ms 0: no limit of its own, those of
 * transport and device hold. -ETIMEDOUT with the step still under way when the timeout passes
 * (afd_attn_busy tells). Without a step: waits for the FFN peers and ranks to join.
 */
AFD_API int afd_attn_wait(afd_attn *attn, int32_t timeout_ms);

/* _begin and _wait; a step that is not done in time is cancelled. Returns 0. */
AFD_API int afd_attn_step(afd_attn *attn, const struct afd_batch *batch, int32_t timeout_ms);

/* Ends the step that is under way, as if it had not begun. 0 also when there is none. Peers and
 * ranks may hear of it only from a later _poll. */
AFD_API int afd_attn_cancel(afd_attn *attn);

/* 1 while a step is under way. */
AFD_API int afd_attn_busy(const afd_attn *attn);

/*
 * For a host's event loop: the descriptor is readable when _poll has something to do; call it too
 * when the timeout has passed: 0 while this process itself has something to compute, -1 none. The
 * descriptor is the library's.
 */
AFD_API int afd_attn_fd(const afd_attn *attn);
AFD_API int32_t afd_attn_timeout_ms(const afd_attn *attn);

/* ---- the KV cache ---- */

/*
 * Where K and V lie. Byte offset of head h of position p (K: v = 0, V: v = 1) of page i of a layer:
 *
 *     offset of the layer + i * page_bytes + v * kv_bytes + h * head_bytes
 *             + (p % page_size) * position_bytes
 *
 * K is after norm and rope. Layer l begins at l * layer_bytes; where layers have unequal numbers of
 * pages layer_bytes is 0, and afd_attn_kv_layer() says where.
 */
struct afd_kv_layout {
	size_t size;
	void *memory;          /* the pool: device memory, which a host reads on "cpu" alone */
	size_t memory_bytes;
	size_t layer_bytes, page_bytes, kv_bytes, head_bytes, position_bytes;
	uint32_t n_layers, n_pages, page_size, n_kv_heads, head_dim; /* n_pages: kv_pages */
	int32_t dtype;
	/* Of all layers; 0 when layers have different ones, see afd_attn_kv_layer(). */
	float k_scale, v_scale;
};
AFD_API int afd_attn_kv_layout(const afd_attn *attn, struct afd_kv_layout *layout);

/* What is one layer's own. */
struct afd_kv_layer {
	size_t size;
	size_t offset;          /* in the pool */
	uint32_t n_pages;
	uint32_t window;        /* positions that a row sees, its own included; 0: all */
	/* An e4m3 number times its scale is the value; 1 in a cache of another dtype. They are the
	 * checkpoint's, or 1 where it brings none. */
	float k_scale, v_scale;
};
/* -EINVAL: no such layer. */
AFD_API int afd_attn_kv_layer(const afd_attn *attn, uint32_t layer, struct afd_kv_layer *out);

/*
 * Page ids of (sequence, layer) in order of position, into ids[capacity]; returns how many there
 * are. -1 stands for a page that has left a sliding window. Layers that see the same window have
 * the same pages. Not while a step is under way (-EBUSY). -ENOENT; -ENOSPC; -EINVAL no such layer.
 */
AFD_API int afd_attn_pages(const afd_attn *attn, uint64_t sequence, uint32_t layer, int32_t *ids,
	uint32_t capacity);

/* ---- sampling, a helper on the host ---- */

/*
 * Draws an id from logits[vocab]; the draw depends on seed and position only, so it is the same in
 * any layout, and from the same logits the same on every device. Order: temperature, top_k, softmax,
 * top_p (the smallest set whose sum reaches it), draw. Equal logits: the lower id first. A step draws
 * for itself: see sampled_ids. scratch is not looked at any more, and may be NULL: its bytes are 0.
 * Returns the id; -EDOM when a logit is not finite, -EINVAL.
 */
AFD_API int32_t afd_sample(const float *logits, uint32_t vocab, uint64_t position,
	const struct afd_sample_params *params, void *scratch);
AFD_API size_t afd_sample_scratch_bytes(uint32_t vocab);

/* ---- looking ---- */

struct afd_attn_stats {
	size_t size;
	uint64_t n_steps;
	uint64_t n_rows;       /* rows of finished steps */
	uint64_t attention_ns; /* time that this stage computed, LM head included; of a step in one
				  piece all of it */
	uint64_t ffn_ns;       /* time that an FFN of this process computed, 0 with a transport */
	uint64_t wait_ns;      /* time in which nothing could be done but wait for peers */
	uint64_t weight_bytes; /* device memory held by weights, with what packing pads */
	uint32_t pages_free;   /* of the layers that have least */
	uint32_t n_sequences;
	uint64_t stored_bytes; /* what was loaded, as the checkpoint stores it: as much as
				  afd_model_shard says for the rank */
	uint32_t window_pages_free; /* of the layers with a window that have least; 0: none has one */
	uint32_t _pad;
};
AFD_API int afd_attn_stats(const afd_attn *attn, struct afd_attn_stats *stats);

#ifdef __cplusplus
}
#endif

#endif
