/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the stages ask of the front door: frames of rows and sums over a group on the attention
 * side, parts of frames on the FFN side. The stages never see links, slots' states, credits or
 * sequence numbers; the front door never sees a device. Rows are written to and read from slots by
 * the stage itself, so that a device can do it (and later do it without the host).
 *
 * Everything here is called from the one thread that owns the transport, and nothing blocks.
 */
#ifndef AFD_LIB_EXCHANGE_H
#define AFD_LIB_EXCHANGE_H

#include <stdbool.h>

#include <afd/transport.h>

#include "../context/core.h"

/* What both sides agreed on, for stages; valid once joined (attention) or from creation (FFN:
 * max_rows is ours then). */
struct afd__exchange_info {
	struct afd_context *ctx;
	struct afd_contract contract;             /* ffn_kinds points into the transport */
	int32_t to_ffn_dtype, to_attention_dtype; /* attention side: of our frames. FFN side: 0,
						     each part says its own */
	uint32_t lanes;
	uint32_t max_rows;              /* of one part, before the smaller side wins */
	int32_t attention;              /* 1: made to connect; 0: made to listen */
	uint32_t first_layer, n_layers; /* held (FFN side), wanted (attention side) */
	uint32_t max_peers; /* FFN side: attention peers at once; at most 2 * max_peers *
			       AFD_MAX_LANES parts are out */
	int32_t gate;       /* enum afd_gate, attention side; FFN side: 0, parts with ids are routed */
	uint32_t n_ffn_peers; /* attention side: with their replicas */
	uint32_t n_targets; /* attention side: shards of the FFN; before it has joined a guess */
	uint32_t group_index, group_size; /* attention side; 0 of 1 without a group */
	struct afd_shard shard;           /* FFN side: what is stated, counts at least 1 */
};
void afd__transport_info(const afd_transport *net, struct afd__exchange_info *info);

/* A stage takes the transport for itself; -EBUSY when another has it. NULL gives it back, when the
 * stage's fills and drains are over (its queue is closed): frames that are out are forgotten. */
int afd__transport_own(afd_transport *net, const void *stage);

/* A trace id as text: 32 digits, or "none". */
enum { AFD__TRACE_TEXT = 33 };
const char *afd__trace_text(char text[AFD__TRACE_TEXT], const uint8_t trace_id[16]);

/* The caller is about to compute: what is found at the next look may have come at any time since
 * now_ns, and is not counted as time on the wire. */
void afd__exchange_computes(afd_transport *net, uint64_t now_ns);

/* For a stage on a device: the memory that slots lie in, told before anything is written to or read
 * from them, and when it goes. */
struct afd__slot_memory {
	void (*added)(void *user, void *memory, size_t bytes);
	void (*removed)(void *user, void *memory, size_t bytes);
	void *user;
	/* Rows of links that are bound from now on may lie in its memory, until nobody is told any
	 * more; NULL: they do not. */
	struct afd__device *device;
};
/* NULL: nobody is told any more; what was added is removed first. */
void afd__transport_watch_slots(afd_transport *net, const struct afd__slot_memory *watch);

/* Sends beats to the peers that wait for us, when the last are older than 50 ms. Cheap; called
 * between tiles. */
void afd__transport_beat(afd_transport *net);

/* What the FFN stage states in handshakes: weights, their fingerprint and epoch, and device. Before the
 * first poll. */
void afd__transport_state(afd_transport *net, const uint64_t weights[2], uint64_t weights_epoch,
	const char *device);
/* The same of the shard that it holds; counts of 0 mean 1. -EINVAL when the transport's own params
 * say another, or when it is none. Before the first poll. */
int afd__transport_state_shard(afd_transport *net, const struct afd_shard *shard);

/* ---- attention side ---- */

enum { AFD__TARGETS_MAX = 64 }; /* FFN peers of one attention peer */

/*
 * A target is a shard, and the FFN peer that holds it now; targets are numbered by the rank of
 * their shard, rank = ep * n_tp + tp, whatever the order of addresses. Together they hold everything
 * exactly once; replicas stand beside them unseen. Known once joined.
 */
struct afd__target {
	uint32_t n_targets;                 /* its shard is `rank` of n_targets of the dense widths */
	uint32_t tp, n_tp;                  /* and tp of n_tp of the widths of its experts, */
	uint32_t expert_begin, expert_end;  /* which are these */
	uint32_t max_rows;                  /* of one part to it */
};
int afd__exchange_target(const afd_transport *net, uint32_t target, struct afd__target *out);

/* True when a row of this layer goes to the target: always, unless the attention side routes and
 * the layer has experts and no shared ones; then when one of the row's ids is the target's. */
bool afd__exchange_wants(
	const afd_transport *net, uint32_t target, uint32_t layer, const int32_t *ids /* [top_k] */);
/* True when rows of this layer travel with their ids and weights. */
bool afd__exchange_routed(const afd_transport *net, uint32_t layer);

/* A slot as fill sees it. */
struct afd__slot_rows {
	void *rows;     /* [n_rows][hidden_size] in the wire's dtype, packed */
	int32_t *ids;   /* [n_rows][top_k] chosen experts; NULL unless the layer is routed here */
	float *weights; /* [n_rows][top_k], likewise */
};

/*
 * How a frame's rows come out of and go into slots. fill writes rows row0 .. row0+n_rows-1 of what
 * the lane's frame sends to the target (counted from the target's own first row, so the stage knows
 * which rows of the lane they are), and the same rows again when the peer that had them is lost
 * before its answer; drain reads that target's partial y of the same rows, each once. Both may only
 * enqueue (return 0): then `filled`/`drained` is asked until it returns 1. Returning 1 means done.
 * At most one fill and one drain of a (lane, target) are under way.
 *
 * Parts are drained as they come, in no order among targets nor within one. For the same bits
 * always, the stage keeps partial results apart and adds them by target to +0.0 when the frame is
 * complete; or it sets in_order: then all rows of a target have been drained (`drained` said 1)
 * before the first of the next one is, and drain may add at once.
 */
struct afd__frame_io {
	int (*fill)(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
		const struct afd__slot_rows *slot);
	int (*filled)(void *user, uint32_t lane, uint32_t target);
	int (*drain)(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
		const void *slot);
	int (*drained)(void *user, uint32_t lane, uint32_t target);
	void *user;
	bool in_order;
};

/* The step is opened as by afd_transport_begin. Cancel ends all frames without a word to their
 * callers; fills and drains that are under way are still asked for, until they are done. The other
 * ranks of a group are told the cause (NULL: the step is given up). */
int afd__exchange_begin(afd_transport *net, const struct afd_step_params *params);
int afd__exchange_cancel(afd_transport *net, const char *cause);
/*
 * Starts a frame; slots are asked for in _progress, part by part, two at a time for each target.
 * n_rows[t] rows go to target t; one with 0 gets nothing and owes nothing. At least one has rows.
 */
int afd__exchange_send(afd_transport *net, uint32_t lane, uint32_t layer,
	const uint32_t *n_rows /* [n_targets] */, const struct afd__frame_io *io);
/* Moves all lanes' frames and group operations on: fills, posts, drains. 1 when anything moved, 0
 * when not, or the error of the link that failed. After 0 the transport's descriptor is readable
 * when there is something to do. */
int afd__exchange_progress(afd_transport *net);
/* The number of the open step, or of the last one, as peers know it. */
uint64_t afd__exchange_step(const afd_transport *net);
/* 1 when the lane's frame is complete (or none is out), 0 not yet, or its error: until the next
 * send, and only when none of its fills and drains is under way any more. */
int afd__exchange_done(afd_transport *net, uint32_t lane);

/* ---- attention side: the group ---- */

/*
 * Operations over the ranks of an attention group, on f32 rows [n_rows][hidden_size] of one lane:
 *
 * reduce: every rank has a partial result of all n_rows rows; every rank gets the sum. fill writes
 *   the own rows to a slot, once for each other rank. For each range of rows drain is called once
 *   for each rank in the order 0, 1, .. group_size-1, for the own one with slot NULL: the stage
 *   starts from +0.0 at rank 0 and adds, its own rows too. Bits depend on nothing but the order.
 * gather: rank i has rows floor(i n_rows / n) .. floor((i+1) n_rows / n); every rank gets all. fill
 *   writes own rows, drain reads those of another rank; row0 counts from the lane's first row.
 *
 * Returning 0 from fill and drain means enqueued, as in afd__frame_io; at most one fill and one
 * drain of a lane are under way. All ranks call the same operations with the same step, layer and
 * rows, in the same order in each lane; a rank that does not ends the operation on the others with
 * -EPROTO, which names both. A lane has one operation or one frame out at a time, as the stage
 * likes. n_rows 0 is done at once and nothing crosses, nor without a group.
 */
struct afd__group_io {
	int (*fill)(void *user, uint32_t lane, uint32_t row0, uint32_t n_rows, float *slot);
	int (*filled)(void *user, uint32_t lane);
	int (*drain)(void *user, uint32_t lane, uint32_t rank, uint32_t row0, uint32_t n_rows,
		const float *slot);
	int (*drained)(void *user, uint32_t lane);
	void *user;
};
/* Start; then afd__exchange_progress moves it on. -EBUSY while the lane has one out. */
int afd__group_reduce(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__group_io *io);
int afd__group_gather(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__group_io *io);
/* 1 when the lane's operation is complete (or none is out), 0 not yet, or its error; never while a
 * fill or drain of it is under way. */
int afd__group_done(afd_transport *net, uint32_t lane);

/* ---- FFN side ---- */

/* A part that has arrived and waits for its reply. */
struct afd__part {
	struct afd__link *link;
	uint32_t peer; /* index of the peer, stable while it is joined */
	uint32_t lane, layer;
	uint32_t part, n_parts; /* of its frame */
	uint32_t n_rows;
	int32_t x_dtype, y_dtype;
	const void *x; /* slot rows [n_rows][hidden_size] in x_dtype, packed */
	void *y;       /* the reply's slot rows, to be filled in y_dtype */
	const int32_t *ids;   /* [n_rows][top_k] from the attention side; NULL: the rank routes for
				 itself, or the layer is dense. The peer's numbers, and in memory
				 that it can write: one that is no expert held here is skipped */
	const float *weights; /* [n_rows][top_k], with ids */
	uint32_t top_k;       /* 0 without ids */
	uint64_t step;
	uint8_t trace_id[16]; /* of the step */
	uint64_t arrived_ns;
	uint32_t slot;     /* the front door's */
	uint64_t sequence; /* the frame's, echoed in the reply */
};
/* Takes the next part that arrived, oldest first. 1: *part is filled; 0: none. The slots stay
 * mapped until _reply, also when the peer is lost meanwhile. */
int afd__exchange_take(afd_transport *net, struct afd__part *part);
/* Sends the reply (status 0: y is filled; negative errno: the error goes to the peer, with the
 * thread's text). The peer is told how long its part waited for rows of others (gather_ns), for its
 * passes (compute_ns), and for anything else since it came. A link that was lost meanwhile is fine:
 * 0. */
int afd__exchange_reply(afd_transport *net, const struct afd__part *part, int status,
	uint64_t gather_ns, uint64_t compute_ns);

/* What the gather needs to know: who could still send rows of `layer` soon. For each joined peer
 * and lane with an open step whose lane has rows: the layer that it will send next (n_layers: done
 * with the step). Returns the number of entries written. */
struct afd__source {
	uint32_t peer, lane, next_layer, n_rows;
	uint64_t last_ns; /* when its last part came or was answered */
};
uint32_t afd__exchange_sources(
	const afd_transport *net, struct afd__source *sources, uint32_t capacity);
/* Peers that are joined now. */
uint32_t afd__exchange_n_joined(const afd_transport *net);
/* Drain: tells peers that we leave; parts already here may still be answered. 1 when nothing is
 * owed any more. */
int afd__exchange_drain(afd_transport *net);

/* Sleeps until the transport's descriptor or `fd` (or -1) is readable, or timeout_ms passed (-1:
 * none, 0: returns at once), or the transport has a deadline to look at; spins first as params say.
 * 1: something came, 0: it did not, -EIO. */
int afd__transport_sleep(afd_transport *net, int fd, int32_t timeout_ms);
/* Between true and false whoever polls waits by _sleep alone, so polls need not leave the
 * transport's descriptor ready to be waited on: that costs system calls, and makes peers ring. */
void afd__transport_wait_inside(afd_transport *net, bool inside);

#endif
