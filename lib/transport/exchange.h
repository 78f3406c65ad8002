/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the stages ask of the front door: frames of rows on the attention side, parts of frames on
 * the FFN side. The stages never see links, slots' states, credits or sequence numbers; the front
 * door never sees a device. Rows are written to and read from slots by the stage itself, so that a
 * device can do it (and later do it without the host).
 *
 * Everything here is called from the one thread that owns the transport, and nothing blocks.
 */
#ifndef AFD_LIB_EXCHANGE_H
#define AFD_LIB_EXCHANGE_H

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
};
void afd__transport_info(const afd_transport *net, struct afd__exchange_info *info);

/* A stage takes the transport for itself; -EBUSY when another has it. NULL gives it back, when the
 * stage's fills and drains are over (its queue is closed): frames that are out are forgotten. */
int afd__transport_own(afd_transport *net, const void *stage);

/* Sends beats to the peers that wait for us, when the last are older than 50 ms. Cheap; called
 * between tiles. */
void afd__transport_beat(afd_transport *net);

/* What the FFN stage states in handshakes: weights fingerprint and device ("avx512"). Before the
 * first poll. */
void afd__transport_state(afd_transport *net, const uint64_t weights[2], const char *device);

/* ---- attention side ---- */

/*
 * How a frame's rows come out of and go into slots. fill writes wire rows row0 .. row0+n_rows-1 of
 * the lane's frame to `slot`; drain reads y rows from it. Both may only enqueue (return 0): then
 * `filled`/`drained` is asked until it returns 1. Returning 1 means done. `shard` and n_shards tell
 * whose partial result it is (0 of 1 today): drain adds in shard order.
 */
struct afd__frame_io {
	int (*fill)(void *user, uint32_t lane, uint32_t row0, uint32_t n_rows, void *slot);
	int (*filled)(void *user, uint32_t lane);
	int (*drain)(void *user, uint32_t lane, uint32_t row0, uint32_t n_rows, const void *slot,
		uint32_t shard);
	int (*drained)(void *user, uint32_t lane);
	void *user;
};

/* The step is opened as by afd_transport_begin. Cancel ends all frames without a word to their
 * callers; fills and drains that are under way are still asked for, until they are done. */
int afd__exchange_begin(afd_transport *net, const struct afd_step_params *params);
int afd__exchange_cancel(afd_transport *net);
/* Starts a frame; slots are asked for in _progress, part by part, two at a time. n_rows > 0. */
int afd__exchange_send(afd_transport *net, uint32_t lane, uint32_t layer, uint32_t n_rows,
	const struct afd__frame_io *io);
/* Moves all lanes' frames on: fills, posts, drains. 1 when anything moved, 0 when not, or the error
 * of the link that failed. After 0 the transport's descriptor is readable when there is something
 * to do. */
int afd__exchange_progress(afd_transport *net);
/* 1 when the lane's frame is complete (or none is out), 0 not yet, or its error: until the next
 * send, and only when none of its fills and drains is under way any more. */
int afd__exchange_done(afd_transport *net, uint32_t lane);

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
	uint64_t step;
	uint64_t arrived_ns;
	uint32_t slot;     /* the front door's */
	uint64_t sequence; /* the frame's, echoed in the reply */
};
/* Takes the next part that arrived, oldest first. 1: *part is filled; 0: none. The slots stay
 * mapped until _reply, also when the peer is lost meanwhile. */
int afd__exchange_take(afd_transport *net, struct afd__part *part);
/* Sends the reply (status 0: y is filled; negative errno: the error goes to the peer, with the
 * thread's text). Compute_ns and gather_ns are echoed for tracing. A link that was lost meanwhile
 * is fine: 0. */
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

#endif
