/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inside of the front door: a transport and its links. A link is one peer, from its first byte
 * to its last; frames (attention side) and parts (FFN side) stand on joined links.
 *
 * Everything is driven by afd__net_settle: rings are polled, handshakes moved on, timers looked at,
 * until nothing moves; then the transport is armed, so that its descriptor wakes whoever sleeps.
 * One thread at a time.
 */
#ifndef AFD_LIB_TRANSPORT_NET_H
#define AFD_LIB_TRANSPORT_NET_H

#include <afd/transport.h>

#include "../context/range.h"
#include "address.h"
#include "exchange.h"
#include "hello.h"
#include "ops.h"
#include "secret.h"
#include "survey.h"
#include "times.h"
#include "wire.h"

enum {
	AFD__N_CONTROL = 4, /* control slots of a link, each way */
	AFD__CONTROL_BYTES = 512,
	AFD__SLOTS_PER_LANE = 2,
	AFD__N_ROW_SLOTS = AFD__SLOTS_PER_LANE * AFD_MAX_LANES,
	AFD__NONCE_MESSAGE_BYTES = 48,
	AFD__PENDING_MAX = 64, /* handshakes under way on the FFN side */
	AFD__PROBES_MAX = 8,   /* of these, that are probes */
	AFD__PROBE_BYTES_MAX = 256 << 10, /* of a slot that is echoed */
	AFD__PROBE_SLOTS = 128,           /* that are echoed on one link */
	AFD__GROUP_MAX = 64,   /* ranks of an attention group */
	AFD__BEAT_MS = 50, /* so that a peer hears from us every 100 ms, whatever the timers do */
	AFD__HANDSHAKE_MS = 5000, /* FFN side: the longest that a stranger may take */
	AFD__RETRY_MS = 20,       /* attention side: how often a server that is not up is tried */
	AFD__RETURN_MS = 200,     /* the same, once the others hold everything */
	AFD__REFUSED_MS = 1000,   /* the same, of one that refused or was refused then */
	AFD__PIECES_MAX = 8,
	/* Attention side: silence is confirmed once more, as both processes may have been frozen.
	 */
	AFD__GRACE_MS = 100,
};

/* ---- a link ---- */

enum afd__link_phase {
	AFD__LINK_IDLE, /* attention side: to be connected at retry_ns */
	AFD__LINK_CONNECTING,
	AFD__LINK_NONCE,  /* with a key. Attention: ours goes out. FFN: the peer's is awaited */
	AFD__LINK_ANSWER, /* with a key. Attention: the peer's is awaited. FFN: ours goes out */
	AFD__LINK_HELLO,   /* attention: our hello goes out. FFN: the peer's is awaited */
	AFD__LINK_WELCOME, /* attention: awaited. FFN: goes out */
	AFD__LINK_BINDING,
	AFD__LINK_READY,    /* attention: goes out. FFN: awaited */
	AFD__LINK_ECHOING,  /* a probe: slots cross, and come back as they were */
	AFD__LINK_REFUSING, /* a refusal goes out, then the end */
	AFD__LINK_JOINED,
	AFD__LINK_LEFT, /* orderly */
	AFD__LINK_LOST,
};

/* Who the peer is to us. */
enum afd__link_kind {
	AFD__LINK_TO_FFN,         /* we are attention */
	AFD__LINK_FROM_ATTENTION, /* we are FFN */
	AFD__LINK_IN_GROUP,       /* both are attention */
};

/* Attention side: what a row slot holds. */
enum afd__slot_state {
	AFD__SLOT_FREE,
	AFD__SLOT_FILLING,  /* the stage writes x */
	AFD__SLOT_FILLED,   /* waits to be posted */
	AFD__SLOT_POSTED,   /* the peer owes a reply */
	AFD__SLOT_ARRIVED,  /* y is here */
	AFD__SLOT_DRAINING, /* the stage reads y */
};
struct afd__slot_out {
	struct afd__frame_io io;
	struct afd__header reply;
	uint64_t sequence, posted_ns;
	uint32_t lane, layer, row0, n_rows, step;
	uint16_t part, n_parts;
	uint8_t state, type, top_k;
	bool unsent;    /* the backend has not given x's slot back */
	bool abandoned; /* its frame has ended; the reply is dropped when it comes */
};

/* FFN side: a part that is here. */
struct afd__slot_in {
	struct afd__slot_in *next; /* in the transport's queue of arrived parts */
	struct afd__link *link;
	struct afd__header header;
	uint64_t arrived_ns;
	uint64_t since_ns; /* the earliest that it can have come */
	uint32_t slot;     /* of the wire */
	enum { AFD__PART_NONE, AFD__PART_ARRIVED, AFD__PART_TAKEN } state;
};

/* FFN side: what a lane of a peer is about. */
struct afd__lane_in {
	uint32_t n_rows;     /* of the open step; 0: none */
	uint32_t next_layer; /* n_layers: done */
	uint32_t layer;      /* of the frame whose parts come */
	uint16_t next_part, n_parts;
	uint64_t last_ns;
};

struct afd__link_metrics {
	struct afd__metric *parts, *rows, *stay;
};

struct afd__link {
	struct afd__tag tag; /* first: events lead here */
	afd_transport *net;
	struct afd__wire wire;
	bool open;    /* wire has to be closed */
	bool bound;   /* the wire has slots */
	void *slots;  /* the memory that the watcher was told of; NULL: of none */
	size_t slots_bytes;
	bool stirred; /* something may have to be done for the handshake */
	enum afd__link_kind kind;
	enum afd__link_phase phase;
	const struct afd__address *address; /* that we connect to; NULL: the peer came to us */
	const struct afd__address *via; /* by which: the same, or what a survey is at or chose */
	uint32_t index;  /* among joined links; stable while anything of it is here */
	uint64_t number; /* in order of arrival, from 1 */
	char name[128];  /* its address, on the FFN side with #number */
	char who[40];    /* the peer, for errors: "the FFN peer", "rank 1 of the group" */
	int error;       /* first cause */
	char error_text[512];

	/* handshake */
	uint64_t since_ns, retry_ns;
	enum afd__link_phase ended; /* attention side: how it ended last, until it joins again */
	struct afd__hello *said; /* by the peer */
	uint8_t *message;        /* [AFD__HELLO_MAX] what goes out */
	size_t message_bytes;    /* 0: nothing does */
	/* with a key (prove.c) */
	bool sealed; /* both nonces are known: messages end in a proof */
	uint8_t nonce_here[AFD__NONCE_MESSAGE_BYTES], nonce_there[AFD__NONCE_MESSAGE_BYTES];
	uint8_t chain[AFD__MAC_BYTES];

	/* a probe: no peer, and never joined (survey.c, echo.c) */
	struct afd__survey *survey; /* that connects; NULL: there is none */
	bool probing;
	bool gone; /* its connection has ended; what had come before is still echoed */
	uint32_t probe_bytes, n_echoed;

	/* what was agreed on */
	uint32_t lanes, max_rows;
	int32_t to_ffn_dtype, to_attention_dtype;
	int32_t gate;
	char device[16], version[16];
	uint64_t weights[2], weights_epoch;
	uint32_t rank; /* of its shard among targets, or in the group */
	bool placed;   /* attention side: its shard is known */
	struct afd__target shard;

	/* the flow */
	uint64_t sequence_out, sequence_in;
	uint64_t heard_ns; /* last frame of the peer */
	uint64_t quiet_ns; /* attention: since when the peer is silent although it owes a reply */
	uint64_t spoke_ns; /* our last frame */
	uint64_t looked_ns; /* when it was last looked at between tiles */
	uint32_t control_free; /* bits of control slots that are ours */
	uint32_t n_owed;       /* attention: replies that we wait for; FFN: replies that we owe */
	bool leaving;          /* the peer said that it takes no new frames */
	bool goodbye_said;
	uint64_t noticed_ns; /* attention: when the deadline was seen to have passed; 0: it was not
			      */

	/* attention side */
	struct afd__slot_out out[AFD__N_ROW_SLOTS]; /* [lane][turn] */
	uint8_t turn[AFD_MAX_LANES];                /* which of the lane's slots is next */
	bool open_due, close_due; /* control frames that wait for a slot; rows wait behind them */
	struct afd__step_open step_open;
	struct afd__step_close step_close;
	struct afd__times_of_link times;

	/* FFN side */
	struct afd__slot_in in[AFD__N_ROW_SLOTS]; /* [lane][turn] */
	struct afd__lane_in lane[AFD_MAX_LANES];
	uint64_t step;
	uint8_t trace_id[16]; /* of that step */
	uint32_t n_taken; /* parts that the stage holds; the link lives as long as they */

	/* In a group: `out` sends, `in` receives. */
	uint8_t turn_in[AFD_MAX_LANES], turn_came[AFD_MAX_LANES]; /* to be read, to come next */
	struct afd__step_open peer_open;                          /* the last that it began */
	struct afd__step_close peer_closed;                       /* the last that it cancelled */
	uint64_t beat_ns;                                         /* when beats were last thought of */

	struct afd_peer_info counts;
	struct afd__link_metrics metrics;
};

/* Rows that lie side by side. */
struct afd__piece { uint32_t row0, n_rows; };

/* ---- a frame on its way (attention side) ---- */

/* Rows of a frame for one shard. They go to the peer that holds it now; when that is lost, those
 * without an answer go to the next one, as a frame of its own. */
struct afd__frame_target {
	struct afd__link *link; /* NULL: nobody holds the shard now */
	uint32_t n_rows; /* 0: it has no part in this frame */
	uint32_t rows_done;
	struct afd__piece pieces[AFD__PIECES_MAX]; /* [n_pieces] ascending: not in a slot yet */
	uint32_t n_pieces;
	uint32_t n_again; /* rows of these that were sent before */
	uint16_t n_parts, next_part; /* of the frame as the link sees it; next to fill */
};

struct afd__frame_out {
	bool active;
	int error;
	char error_text[512];
	uint32_t layer;
	struct afd__frame_io io;
	uint32_t n_targets; /* all of the transport's, since an earlier frame may still touch any */
	struct afd__frame_target targets[AFD__TARGETS_MAX]; /* by rank of shard */
};

/* ---- an operation over the group on its way (group.c) ---- */

enum { AFD__NOBODY = UINT32_MAX };
struct afd__group_op {
	bool active;
	uint8_t type; /* enum afd__collective_type */
	int error;
	char error_text[512];
	uint64_t step;
	uint32_t layer, n_rows;
	struct afd__group_io io;
	uint32_t filling, draining; /* ranks whose slot the stage writes, reads; AFD__NOBODY */
	uint32_t rank;              /* reduce: whose turn it is to be drained */
	uint16_t sent[AFD__GROUP_MAX], read[AFD__GROUP_MAX]; /* parts, by rank */
	bool waits[AFD__GROUP_MAX];                          /* counted in the link's n_owed */
};

/* ---- a transport ---- */

struct afd_transport {
	struct afd_context *ctx;
	struct afd_transport_params
		params; /* defaults filled in; listen and connect are not kept */
	struct afd_contract contract;
	uint8_t ffn_kinds[AFD__LAYERS_MAX];
	bool attention;
	int epoll_fd;
	struct afd__address *addresses; /* [n_addresses] */
	uint32_t n_addresses;           /* FFN peers, or what we listen at */
	struct afd__address *group;     /* [group_index + 1]: those of lower ranks, and our own */
	uint32_t n_links_wanted;        /* attention side: FFN peers and other ranks */
	struct afd__listener *listeners; /* [n_listeners] */
	uint32_t n_listeners;
	uint32_t n_own_listeners; /* the first of them: one for each address; the rest is offered */
	char shm_name[81];        /* offered to who asks at an auto: address; "": none */
	uint32_t verbs_port;      /* likewise; 0: none */
	bool listeners_stirred;
	uint64_t accept_again_ns; /* descriptors had run out, or many had come; 0: no */
	uint64_t accept_window_ns; /* since when connections are counted, */
	uint32_t n_accepts;        /* and how many were accepted */
	uint32_t first_listener;   /* of the next round of accepting */

	struct afd__secret *secret; /* NULL: no key */
	struct afd__shared *shared; /* of a backend's wires; NULL: nothing */

	const void *owner;
	struct afd__slot_memory watch; /* .added NULL: nobody */
	struct afd_shard shard; /* FFN side */
	bool shard_given;       /* by the params */
	uint64_t weights[2], weights_epoch;
	char device[16];

	struct afd__link **links; /* [max_links]; attention: FFN peers by address, then the other
				     ranks, NULL: has not come. FFN: by index, NULL is free */
	/* attention: by rank of shard, who holds it now; NULL: nobody */
	struct afd__link *targets[AFD__TARGETS_MAX];
	uint32_t n_targets; /* shards; 0: no FFN peer has said it yet */
	struct afd__target shards[AFD__TARGETS_MAX]; /* by rank, as its first peer stated it */
	struct afd__holding {
		uint64_t weights[2], weights_epoch;
		uint32_t first_layer, n_layers;
		char device[16];
		bool known;
	} holdings[AFD__TARGETS_MAX]; /* by rank: what its first peer stated, and others must too */
	bool complete;         /* attention: all shards and ranks were there once */
	bool error_passes;     /* `error` is of a shard that nobody holds, until somebody does */
	uint64_t uncovered_ns; /* since when */
	uint32_t step_rows[AFD_MAX_LANES]; /* of the open step */
	uint8_t trace_id[16];
	uint32_t max_links;
	uint32_t n_used_links; /* no link stands, or stood, from this index on */
	struct afd__link *pending[AFD__PENDING_MAX]; /* FFN side: handshakes, oldest first */
	uint32_t n_pending;
	uint32_t n_joined;
	uint32_t n_probes;    /* of those that are pending */
	uint32_t n_echoing;   /* links where slots are echoed */
	uint32_t echo_bytes;  /* in this window, */
	uint64_t echo_window_ns; /* since when */
	uint64_t n_accepted;            /* for names */
	struct afd_peer_info *departed; /* [max_links] ring: links that have gone (FFN side) */
	uint32_t n_departed;

	uint64_t step; /* attention side: number of the open step */
	bool step_open;
	struct afd__frame_out frames[AFD_MAX_LANES];
	struct afd__group_op groups[AFD_MAX_LANES];
	struct afd_frame host[AFD_MAX_LANES]; /* a host's frames, with its memory (host.c) */
	float *row;                           /* [hidden_size] between two 16-bit dtypes (host.c) */

	struct afd__slot_in *arrived, **arrived_end; /* FFN side: oldest first */
	bool draining;

	int error; /* attention side: of the first link that failed */
	char error_text[512];
	uint64_t created_ns;
	bool undone;        /* a poll ended with work left */
	bool waits_inside;  /* whoever polls now waits by afd__transport_sleep */
	uint64_t round_ns;  /* the last look at the clock, */
	uint64_t harvested_ns; /* and that at which events were taken */
	uint64_t warned_ns; /* refusals are logged at a limited rate */
	uint32_t n_warned, n_unwarned;
	uint64_t busy_ns;  /* since when nobody looked, because the caller computed; 0: it did not */
	bool harvested;    /* the next round sees all that has come */
	uint64_t n_traced; /* parts whose spans were reported */
	struct afd__metric *peers_metric, *refused_metric, *lost_metric, *resent_metric;
};

/* ---- net.c: progress ---- */
int afd__net_check(const afd_transport *net);
/* Moves everything that can be moved; leaves the transport armed. 1 when anything moved. */
int afd__net_settle(afd_transport *net);
/* The same, but returns as soon as something moved. For those who call again. */
int afd__net_move(afd_transport *net);
uint64_t afd__net_next_timer(const afd_transport *net); /* UINT64_MAX: none */

/* ---- handshake.c ---- */
int afd__handshake_round(afd_transport *net, uint64_t now);
uint64_t afd__handshake_timer(const afd_transport *net);
/* A summary of who is missing, for errors of waiting. */
void afd__handshake_missing(const afd_transport *net, char *text, size_t capacity);

/* What both sides of a handshake use. say: the link's message becomes this one; the rest as the
 * operations of a backend, 1 done, 0 not now. */
int afd__shake_say(
	struct afd__link *link, const struct afd__hello *hello, enum afd__link_phase phase);
int afd__shake_send_message(struct afd__link *link);
int afd__shake_receive_message(struct afd__link *link);
int afd__shake_receive_nonce(struct afd__link *link);
void afd__shake_keep_said(struct afd__link *link);
int afd__shake_bind_slots(struct afd__link *link, int accepting);

/* Refuses, with a line in the log. */
void afd__shake_refuse(struct afd__link *link, const struct afd__hello *refusal);
/* Of one that is pending: closes and frees it. */
void afd__shake_end_pending(struct afd__link *link);

/* ---- auto.c ---- */
/* Besides an auto: address that is listened at: where else whoever asks there can come. */
void afd__auto_listen_beside(afd_transport *net, const struct afd__address *address);
/* The verbs: address at the host of an auto: name, with the parameters of that. As snprintf. */
int afd__auto_write_verbs(char *text, size_t capacity, const char *name, uint32_t port);
/* Opens one more listener; its address becomes the real one. */
int afd__transport_listen_at(afd_transport *net, const struct afd__address *address);

/* ---- echo.c: the side that listens ---- */
/* A probe was said instead of a hello: it gets an offer or a refusal. 1, or negative: over. */
int afd__echo_answer(struct afd__link *link);
/* Slots of a probe that have come go back. 1 when there were any, negative: over. */
int afd__echo_round(struct afd__link *link, uint64_t now);
/* For a while enough was echoed, so that those who are served have the rest of the time. */
bool afd__echo_rests(const afd_transport *net);
uint64_t afd__echo_timer(const afd_transport *net); /* UINT64_MAX: none */
/* The two slots each way of a probe's link. */
void afd__echo_geometry(const struct afd__link *link, struct afd__wire_slots *geometry);
/* Both sides: slots cross from now on. */
void afd__echo_begin(struct afd__link *link);

/* ---- survey.c: the side that connects ---- */
int afd__survey_create(struct afd__link *link);
/* Begins anew, with the address that was given. */
void afd__survey_begin(struct afd__link *link);
/* In place of the handshake's own steps while the survey runs. */
int afd__survey_ask(struct afd__link *link);
int afd__survey_take_offer(struct afd__link *link);
/* Of the answer that was said: the offer is one that was asked for, and its places are kept. */
int afd__survey_judge(struct afd__link *link);
int afd__survey_exchange(struct afd__link *link);
/* The trial under way has ended with rc. False: nobody is there at all, as far as is known. */
bool afd__survey_end_trial(struct afd__link *link, int rc);
/* The next connection begins with a survey again, if there is one. */
void afd__survey_forget(struct afd__link *link);
static inline bool afd__survey_runs(const struct afd__link *link)
{
	return link->survey && link->survey->runs;
}

/* ---- connect.c ---- */
/* 1 when it moved. Errors end the link. */
int afd__connect_move(struct afd__link *link, uint64_t now);
/* The error of the refusal that was said: -EACCES the key, -EPROTO all else. */
int afd__connect_refused(const struct afd__link *link);
/* Of a link that is lost or has left: it is connected anew. */
bool afd__connect_returns(const struct afd__link *link);

/* ---- prove.c ---- */
/* A fresh nonce becomes the link's message. */
int afd__prove_begin(struct afd__link *link);
/* The peer's, which has come; from now on messages are sealed. -EPROTO */
int afd__prove_nonce(struct afd__link *link, const uint8_t *message, size_t bytes);
/* Appends the proof to the link's message, when it is sealed. */
int afd__prove_seal(struct afd__link *link);
/* Before a byte behind the prefix is looked at: -EACCES when the message does not prove the key. */
int afd__prove_check(struct afd__link *link, const uint8_t *message, size_t bytes);
/* Both, for what the link's backend says itself. */
struct afd__wire_proof afd__prove_wire(struct afd__link *link);

/* ---- judge.c ---- */
void afd__hello_state_ours(const struct afd__link *link, struct afd__hello *hello, uint32_t kind);
/* The side that accepted: 1 when the peer is refused, and the refusal is filled. */
int afd__hello_judge(
	const struct afd__link *link, const struct afd__hello *said, struct afd__hello *refusal);
/* The side that connected: 1 when the welcome is not one that we can use. */
int afd__welcome_judge(
	const struct afd__link *link, const struct afd__hello *said, struct afd__hello *refusal);

/* ---- shards.c ---- */
/* FFN side, from its params or its stage. */
int afd__shards_check(const afd_transport *net, const struct afd_shard *shard);
/* Attention side: takes what an FFN peer said of its shard; with the last of them all are held
 * together. An error fills the refusal too. */
int afd__shards_place(struct afd__link *link, struct afd__hello *refusal);
/* All that is wanted is there: 1 from the first time on. */
int afd__shards_complete(afd_transport *net, uint64_t now);
/* A link has joined: takes its shard if nobody holds it, and rows that wait for that. */
void afd__shards_joined(struct afd__link *link);
/* A link takes no new rows, or is lost: another one takes its shard, if there is one. */
void afd__shards_left(struct afd__link *link);
/* True when its end takes no shard away: another peer holds it, or it held none. */
bool afd__shards_spare(const struct afd__link *link);
/* The transport's error as far as it counts: while a shard is waited for there is none. */
int afd__shards_error(const afd_transport *net);
bool afd__shards_waits(const afd_transport *net);

/* ---- link.c ---- */
struct afd__link *afd__link_create(afd_transport *net, const struct afd__address *address);
void afd__link_destroy(struct afd__link *link); /* closes the wire too */
void afd__link_close_wire(struct afd__link *link);
/* Tells the watcher of slots that there are now, or that they go. */
void afd__link_slots_added(struct afd__link *link);
void afd__link_slots_removed(struct afd__link *link);
void afd__link_geometry(
	const struct afd__link *link, uint32_t hidden_size, struct afd__wire_slots *geometry);
void afd__link_joined(struct afd__link *link, uint64_t now);
/* Polls the wire and takes what came. 1 when anything came. Errors end the link. */
int afd__link_poll(struct afd__link *link, uint64_t now);
/* Deadlines and beats, and control frames that are due. 1 when anything was sent. */
int afd__link_timers(struct afd__link *link, uint64_t now);
uint64_t afd__link_next_timer(const struct afd__link *link);
/* The peer waits for us, and has not heard of us for long. */
bool afd__link_is_beat_due(const struct afd__link *link, uint64_t now);
/* Ends the link with the thread's error text as its first cause. */
void afd__link_fail(struct afd__link *link, int rc);
/* Ends the link in order: the peer said goodbye. */
void afd__link_leave(struct afd__link *link, const char *text);
/* Ends the link because the connection has: in order where one of the two drains, else it is lost. */
void afd__link_hung_up(struct afd__link *link);
int afd__link_error(const struct afd__link *link); /* sets the thread's text again */
/* Sends a slot with so many bytes behind the header, which is completed here: its size, sequence
 * and time. 1 sent, 0 not now, negative: the link has failed. */
int afd__link_post(struct afd__link *link, uint32_t slot, struct afd__header *h, size_t bytes);
/* Where a slot's rows lie: behind its header, or in memory of the stage's device, which the host may
 * not touch. Ids, weights and texts always lie in the slot. */
void *afd__link_send_rows(struct afd__link *link, uint32_t slot);
const void *afd__link_receive_rows(
	struct afd__link *link, uint32_t slot, const struct afd__header *h);
/* To the backend as it is: `bytes` behind the header, which stands in the slot. */
int afd__link_post_slot(
	struct afd__link *link, uint32_t slot, const struct afd__header *h, size_t bytes);
/* 1 sent, 0 no slot is free, negative: the link has failed. */
int afd__link_control(struct afd__link *link, uint32_t type, const void *payload, size_t bytes);
int afd__link_goodbye(struct afd__link *link, uint32_t reason, const char *text);
/* The lane's two slots, [AFD__SLOTS_PER_LANE]; and which of the wire's it is. */
static inline struct afd__slot_out *afd__link_out(struct afd__link *link, uint32_t lane)
{
	return &link->out[lane * AFD__SLOTS_PER_LANE];
}
static inline uint32_t afd__link_wire_slot(
	const struct afd__link *link, const struct afd__slot_out *out)
{
	return AFD__N_CONTROL + (uint32_t)(out - link->out);
}
static inline bool afd__link_is_echoing(const struct afd__link *link)
{
	return link && link->phase == AFD__LINK_ECHOING;
}
static inline bool afd__link_is_joined(const struct afd__link *link)
{
	return link && link->phase == AFD__LINK_JOINED;
}

/* ---- group.c, ranks.c ---- */
int afd__group_round(afd_transport *net);
int afd__group_take(struct afd__link *link, uint32_t slot, const struct afd__header *h,
	size_t bytes, uint64_t now);
int afd__group_control(
	struct afd__link *link, const struct afd__header *h, const void *payload, size_t bytes);
void afd__group_lost(struct afd__link *link);
/* Why a rank brings nothing more; the link has an error, or the rank has ended our step. */
int afd__group_error(const struct afd__link *link);
void afd__group_cancel(afd_transport *net);
void afd__group_disown(afd_transport *net);
/* The peer may be waiting for us. */
bool afd__group_owes(const struct afd__link *link);
/* The text of a deadline that has passed. */
int afd__group_silence(const struct afd__link *link, uint64_t now);
static inline bool afd__group_is_idle(const struct afd__group_op *op)
{
	return !op->active && op->filling == AFD__NOBODY && op->draining == AFD__NOBODY;
}
static inline uint32_t afd__group_link_index(const afd_transport *net, uint32_t rank)
{
	return net->n_addresses + rank - (rank > net->params.group_index);
}

/* ---- frames.c ---- */
int afd__frames_round(afd_transport *net);
int afd__frames_take(
	struct afd__link *link, uint32_t slot, const struct afd__header *h, size_t bytes);
void afd__frames_lost(struct afd__link *link);
/* The shard's rows that are in no slot yet go to its present holder, or wait for one. */
void afd__frames_retarget(afd_transport *net, uint32_t rank);
/* Ends what waits for a shard, with the transport's error. */
void afd__frames_give_up(afd_transport *net);
/* How many parts the pieces make at the target's link. */
uint32_t afd__frame_count_parts(const struct afd__frame_target *target);
/* Nothing of the link is written or read any more. */
bool afd__frames_untouched(const struct afd__link *link);
/* The stage is gone: nothing is filled or drained any more. */
void afd__frames_disown(afd_transport *net);

/* Ends a frame with its result; what is still on the wire is dropped when it comes. */
void afd__frame_end(afd_transport *net, uint32_t lane, int rc);
/* A fill or drain of the lane is under way. */
bool afd__frame_is_touched(const afd_transport *net, uint32_t lane);

/* ---- times.c ---- */
/* Attention side, of an FFN peer: its histograms, for as long as the transport lives. -ENOMEM */
int afd__times_create(struct afd__link *link);
void afd__times_destroy(struct afd__link *link); /* also of one without */
/* A reply was found: where the time of its part went, as metrics and spans. */
void afd__times_take(struct afd__link *link, const struct afd__slot_out *out,
	const struct afd__header *reply);
/* The part will have no reply. */
void afd__times_lost(struct afd__link *link, const struct afd__slot_out *out);
/* What is found on the link at `now` has come since then. */
uint64_t afd__times_since(const struct afd__link *link, uint64_t now);

/* ---- steps.c ---- */
/* Tells the peer of the open step, before its first rows. */
void afd__steps_tell(struct afd__link *link);
/* The first cause of why nothing can be sent; 0 when something can. */
int afd__steps_check_links(const afd_transport *net);
/* A frame without rows: what the last one left is forgotten. */
int afd__frames_clear(afd_transport *net, uint32_t lane);

/* ---- parts.c ---- */
int afd__parts_take(struct afd__link *link, uint32_t slot, const struct afd__header *h,
	size_t bytes, uint64_t now);
int afd__parts_control(struct afd__link *link, const struct afd__header *h, const void *payload,
	size_t bytes, uint64_t now);
void afd__parts_lost(struct afd__link *link);

/* ---- peers.c ---- */
int afd__peers_create(afd_transport *net);
void afd__peers_destroy(afd_transport *net);
void afd__peers_joined(struct afd__link *link);
void afd__peers_gone(struct afd__link *link); /* before the link is destroyed */
void afd__peers_info(const struct afd__link *link, struct afd_peer_info *info);

#endif
