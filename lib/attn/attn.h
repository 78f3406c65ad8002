/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The attention stage from inside: what its files share. A step goes begin (batch) → start → layers
 * of lanes → head → end; step.c moves it on, layer.c and head.c enqueue what the device does,
 * exchange.c brings rows to the FFN and back.
 *
 * Invariant: the host never looks at device memory, and everything a step needs was sized at
 * creation.
 */
#ifndef AFD_LIB_ATTN_ATTN_H
#define AFD_LIB_ATTN_ATTN_H

#include <afd/attn.h>

#include "../device/recordings.h"
#include "../ffn/ffn.h"
#include "../model/model.h"
#include "../transport/exchange.h"
#include "batch.h"
#include "kv.h"
#include "sequences.h"
#include "weights.h"

/* Rows of the head's product at a time, so that logits of a long prompt need little memory. */
enum { AFD__HEAD_ROWS = 64 };

/* Device memory that a step writes; one piece. */
struct afd__attn_memory {
	void *all;
	size_t bytes;
	float *h; /* [max_rows][hidden] residual stream */
	float *x; /* [max_rows][hidden] normed: input of attention, then of the FFN */
	float *y; /* [max_rows][hidden] output of attention, then of the FFN: what is added next */
	float *qkv;     /* [max_rows][qkv_width] */
	float *mixed;   /* [max_rows][n_heads * head_dim] */
	float *angles;  /* [n_ropes][max_rows][head_dim] */
	void *wire;     /* [max_rows][hidden] in a wire dtype; NULL when rows are rounded by the FFN's
			   slots alone */
	void *inputs; /* [max_rows][input_row_bytes] x as products take it; NULL: always in float32 */
	float *zeros;   /* max(hidden, max_rows) numbers of +0.0, which are also indices of 0 */
	int32_t *words; /* the batch's */
	float *gate; /* [max_rows][mixed_width]; NULL without output gates */
	float *quantized; /* [max_rows][hidden] x in e4m3; NULL: activations are not quantised */
	float *post; /* [max_rows][hidden] what a norm after a block leaves; NULL without them */
	/* where this side routes; NULL else */
	float *router_logits;  /* [max_rows][n_experts] */
	int32_t *expert_ids;   /* [max_rows][top_k] */
	float *expert_weights; /* [max_rows][top_k] */
	int32_t *row_lists;    /* [max_rows][n_targets], as the host's */
	float *head_h, *head_y, *head_x; /* [AFD__HEAD_ROWS][hidden] */
	float *logits;                   /* [AFD__HEAD_ROWS][vocab] */
	int32_t *greedy, *sampled;       /* [AFD__HEAD_ROWS] */
};

/* The rows of a lane that go to one target: list[first .. first + n_rows - 1] of the lane. */
struct afd__attn_share {
	uint32_t first, n_rows;
};

/* What was chosen, and who gets which rows; on the host. A lane uses the part of its own rows. */
struct afd__attn_route {
	uint32_t n_targets; /* FFN peers, routed to or not; 0: the FFN is here */
	uint32_t top_k;     /* 0: this side does not route */
	uint32_t n_experts;
	int32_t *ids;   /* [max_rows][top_k] */
	float *weights; /* [max_rows][top_k] */
	/* [max_rows][n_targets]: of each lane, from its row0 on, the rows of target 0, then of 1 ..,
	 * ascending, counted from the lane's first. */
	int32_t *lists;
	struct afd__attn_share shares[AFD_MAX_LANES][AFD__TARGETS_MAX];
};

enum afd__lane_state {
	AFD__LANE_IDLE = 0, /* no rows, or all layers done */
	AFD__LANE_READY,    /* the layer's attention can begin */
	AFD__LANE_REDUCING, /* in a group: attention is enqueued, its sum over the ranks is awaited */
	AFD__LANE_ROUTING,  /* attention and routing are enqueued; the choice is awaited */
	AFD__LANE_AT_FFN,   /* enqueued or sent; y is awaited */
	AFD__LANE_GATHERING, /* in a group: y of the other ranks' rows is awaited */
};

struct afd__lane {
	int32_t state;
	uint32_t layer;
	uint32_t row0, n_rows;
	uint32_t own_row0, n_own_rows; /* of these, what this rank sends to the FFN */
	uint64_t attention_ticket; /* behind attention */
	uint64_t ticket;      /* local: of the FFN's last operation. Remote: of a fill or drain */
	int32_t moving;       /* the device fills or drains a slot */
	int32_t cleared;      /* y is +0.0, or what has been added to that */
	uint64_t start_ns;    /* attention was enqueued */
	uint64_t computed_ns; /* attention was done; 0: not yet */
};

enum afd__step_state {
	AFD__STEP_NONE = 0,
	AFD__STEP_JOINING,
	AFD__STEP_LAYERS,
	AFD__STEP_WHOLE, /* all layers are enqueued, and the head where it fits */
	AFD__STEP_HEAD,
};

/* What of a step is recorded. */
enum afd__attn_piece {
	AFD__PIECE_WHOLE = 1, /* all of it, between upload and outputs */
	AFD__PIECE_EMBEDDING,
	AFD__PIECE_ATTENTION, /* of a lane's layer; without a group also what is the next */
	AFD__PIECE_FFN_SIDE,  /* the FFN's input, and the choice of experts where this side routes */
	AFD__PIECE_HEAD,
};

struct afd__step {
	int32_t state;
	int32_t opened; /* the transport's step was begun */
	int32_t moved;  /* the last poll did something: there may be more to do at once */
	uint64_t number;
	uint64_t start_ns, moved_ns;
	uint64_t free_ns; /* when the last attention was done */
	uint64_t wait_ns; /* since when there is nothing to do but wait for peers; 0: there is */
	struct afd__lane lanes[AFD_MAX_LANES];
	uint32_t head_row;  /* outputs enqueued */
	uint32_t head_rows; /* of the chunk under way; 0: none */
	uint64_t head_ticket, head_ns; /* of a step in one piece its own */
	/* the host's, until the step is done */
	float *logits;
	int32_t *greedy_ids, *sampled_ids;
	uint8_t trace_id[16];
};

struct afd_attn {
	struct afd_context *ctx;
	const struct afd_model *model;
	const struct afd__arch *arch;
	afd_transport *net; /* with FFN peers, or a group, or both; NULL: neither */
	afd_ffn *ffn;       /* NULL: FFN peers are */
	struct afd__device *device;
	int32_t owns_device; /* the FFN's else */
	int32_t owns_net, owns_ffn;
	char peer[128]; /* for spans: address of the FFN peer, if there is but one */
	struct afd__queue queue;
	int epoll_fd;

	struct afd_attn_params params; /* with every default filled in; strings and memory of the
					  host are not kept */
	uint32_t n_lanes, qkv_width, mixed_width;
	size_t input_row_bytes; /* of the longest form; 0: there is none */
	struct afd__attn_weights weights;
	struct afd__attn_memory memory;
	struct afd__attn_route route;
	struct afd__recordings graphs;
	int32_t whole; /* a step is enqueued in one piece */

	struct afd__sequences sequences;
	struct afd__kv kv;
	uint32_t *groups;      /* [n_layers]: the page group of each */
	uint32_t *windows;     /* [n_groups]: what layers of the group see */
	uint32_t *group_pages; /* [n_groups] */
	size_t *layer_at;      /* [n_layers]: byte of the pool where each begins */
	struct afd_kv_layout layout;
	void *kv_owned; /* dev: the pool, when it is ours */

	struct afd__batch batch;
	struct afd__step step;
	int32_t *greedy, *sampled; /* [max_outputs] what argmax and sample said */
	int32_t warned_position;

	_Atomic uint64_t n_steps, n_rows, attention_ns, ffn_ns,
		wait_ns; /* stats may be read beside a step */
	_Atomic uint32_t pages_free, window_pages_free, n_sequences;
	struct afd__metric *metric_steps, *metric_rows, *metric_seconds, *metric_pages,
		*metric_window_pages, *metric_sequences;
};

/* ---- attn.c ---- */
/* -EBUSY while a step is under way; -EINVAL for NULL or in a child of fork. */
int afd__attn_check_idle(const struct afd_attn *attn);

/* ---- params.c ---- */
/* net: what the transport says, or NULL. */
int afd__attn_params_fill(struct afd_attn_params *params, const struct afd_model *model,
	const struct afd__exchange_info *net);

/* ---- layout.c: where K and V lie ---- */
/* Sizes of pages and of the pool; from params with defaults filled in. */
int afd__attn_layout_plan(struct afd_kv_layout *layout, const struct afd__arch *arch,
	const struct afd_attn_params *params);
uint32_t afd__attn_layer_pages(
	const struct afd__layer *layer, const struct afd_attn_params *params);
/* Groups of layers; the layout is planned. */
int afd__attn_groups_create(struct afd_attn *attn, uint32_t *n_groups);
/* What the layout says of scales; weights are loaded. */
void afd__attn_layout_scales(struct afd_attn *attn);
void afd__attn_kv_view(const struct afd_attn *attn, uint32_t layer, struct afd__kv_view *view);

/* ---- memory.c ---- */
int afd__attn_memory_create(struct afd_attn *attn);
void afd__attn_memory_destroy(struct afd_attn *attn);

/* ---- layer.c: operations, enqueued ---- */
/* Upload, copies of shared pages; then angles and embedding, of which nothing but that depends on
 * what is uploaded. */
int afd__attn_enqueue_inputs(struct afd_attn *attn);
int afd__attn_enqueue_embedding(struct afd_attn *attn);
/* The residual stream and attention of one layer for a lane: y is what attention adds to it, and in
 * a group x is this rank's part of that. */
int afd__attn_enqueue_attention(struct afd_attn *attn, const struct afd__lane *lane);
/* y is added: x is the FFN's input after it. */
int afd__attn_enqueue_ffn_input(struct afd_attn *attn, const struct afd__lane *lane);

/* ---- inputs.c: rows as products take them ---- */
/* Decides which norms leave them so; weights and the FFN are here. */
void afd__attn_inputs_plan(struct afd_attn *attn);
/* The form with its rows, from `row` on, of a lane that begins at row0. */
struct afd__inputs afd__attn_inputs(
	const struct afd_attn *attn, const struct afd__inputs *form, uint32_t row0, uint32_t row);

/* ---- rows.c: rows [n_rows][hidden], packed; dev or slot ---- */
/* dst becomes src, or of src the rows that a list (dev [n_rows], NULL: none) counts. */
int afd__attn_convert_rows(struct afd_attn *attn, const void *src, int32_t src_dtype,
	const int32_t *list, void *dst, int32_t dst_dtype, uint32_t n_rows);
/* x of the lane's own rows becomes what FFN peers will see of it, where the norm did not see to it. */
int afd__attn_round_rows(struct afd_attn *attn, const struct afd__lane *lane);
/* rows become +0.0; and src in a dtype is added to them, or to those that a list (dev [n_rows],
 * NULL: none) counts. */
int afd__attn_clear_rows(struct afd_attn *attn, float *rows, uint32_t n_rows);
int afd__attn_add_rows(struct afd_attn *attn, const void *src, int32_t dtype, float *rows,
	const int32_t *list, uint32_t n_rows);

/* ---- route.c: the choice of experts, where this side routes ---- */
/* True when rows of the layer travel with their experts. */
bool afd__attn_routes(const struct afd_attn *attn, uint32_t layer);
/* -EINVAL when the transport's experts are not the model's; keeps what _create and memory need. */
int afd__attn_route_check(struct afd_attn *attn, const struct afd__exchange_info *info);
int afd__attn_route_create(struct afd_attn *attn);
void afd__attn_route_destroy(struct afd_attn *attn);
/* The choice for a lane's rows, from its x; and from the device down to the host. */
int afd__attn_enqueue_choice(struct afd_attn *attn, const struct afd__lane *lane);
int afd__attn_enqueue_choice_down(struct afd_attn *attn, const struct afd__lane *lane);
/* The choice is here: who gets which rows. */
int afd__attn_route_plan(struct afd_attn *attn, uint32_t lane);
/* Of the lane's frame, routed or not: how many rows go to a target, and which; dev [n_rows], NULL:
 * all of them. */
uint32_t afd__attn_route_rows(const struct afd_attn *attn, uint32_t lane, uint32_t target);
const int32_t *afd__attn_route_list(const struct afd_attn *attn, uint32_t lane, uint32_t target);
/* Ids and weights of rows row0 .. row0+n_rows-1 of the target's into a slot. */
void afd__attn_route_fill(const struct afd_attn *attn, uint32_t lane, uint32_t target,
	uint32_t row0, uint32_t n_rows, const struct afd__slot_rows *slot);

/* ---- head.c ---- */
/* Outputs row0 .. row0+n_rows-1 of the batch, to the device's memory; and from there to the host's.
 */
int afd__attn_enqueue_head(struct afd_attn *attn, uint32_t row0, uint32_t n_rows);
int afd__attn_enqueue_outputs(struct afd_attn *attn, uint32_t row0, uint32_t n_rows);
/* All outputs are here: -EDOM names the first that is not finite. Then the host gets its ids. */
int afd__attn_check_outputs(const struct afd_attn *attn);
void afd__attn_give_ids(const struct afd_attn *attn);

/* ---- local.c, remote.c: rows to the FFN and back ---- */
int afd__attn_local_enqueue(struct afd_attn *attn, const struct afd__lane *lane);
/* The dtype of the wire that y of the layer's FFN has not crossed yet and crosses where it is added
 * (afd__norm_args.add_wire); 0: y is complete. */
int32_t afd__attn_y_wire(const struct afd_attn *attn, uint32_t layer);
int afd__attn_local_send(struct afd_attn *attn, uint32_t lane);
int afd__attn_local_done(struct afd_attn *attn, uint32_t lane);
int afd__attn_remote_send(struct afd_attn *attn, uint32_t lane);
/* 1: y of the lane is complete on the device. */
int afd__attn_remote_done(struct afd_attn *attn, uint32_t lane);
/* The device has been told to write or read a slot: 1 when it has done so already, which the cpu
 * device always has. _reached: 1 when it has by now. */
int afd__attn_slot_enqueued(struct afd_attn *attn, struct afd__lane *lane);
int afd__attn_slot_reached(struct afd_attn *attn, struct afd__lane *lane);

/* ---- group.c: what the ranks of an attention group bring together ---- */
bool afd__attn_in_group(const struct afd_attn *attn);
/* Which of a lane's rows this rank sends to the FFN. */
void afd__attn_group_share(const struct afd_attn *attn, struct afd__lane *lane);
/* y of all rows of the lane becomes the sum of the ranks' x. */
int afd__attn_group_reduce(struct afd_attn *attn, uint32_t lane);
/* y of the other ranks' rows comes from them. */
int afd__attn_group_gather(struct afd_attn *attn, uint32_t lane);
/* 1: either is complete on the device. */
int afd__attn_group_done(struct afd_attn *attn, uint32_t lane);

/* ---- pieces.c: what is recorded and replayed ---- */
/* Decides whether steps go in one piece; the device is open, params are filled. */
int afd__attn_graphs_create(struct afd_attn *attn);
/* Enqueues a piece (of a lane, or NULL), as a graph where there is one: 1 when it was replayed, 0, or
 * an error. */
int afd__attn_run_piece(struct afd_attn *attn, int32_t kind, const struct afd__lane *lane);

/* ---- whole.c: a step in one piece ---- */
/* What is recorded of it. */
int afd__attn_whole_enqueue(struct afd_attn *attn);
int afd__attn_whole_begin(struct afd_attn *attn);
/* 1: the step is done; 0: not yet, or only its layers are, and the step is at the head. */
int afd__attn_whole_poll(struct afd_attn *attn);

/* ---- step.c ---- */
/* Ends what is under way as if it had not begun; cause: why, for the other ranks of the group (NULL:
 * it is given up). */
void afd__attn_step_abandon(struct afd_attn *attn, const char *cause);
/* The device owes us something. */
bool afd__attn_waits_for_device(const struct afd_attn *attn);

/* ---- stats.c ---- */
int afd__attn_metrics_create(struct afd_attn *attn);
void afd__attn_metrics_destroy(struct afd_attn *attn);
void afd__attn_count_step(struct afd_attn *attn);
void afd__attn_count_sequences(struct afd_attn *attn);

static inline float *afd__attn_rows(const struct afd_attn *attn, float *matrix, uint32_t row)
{
	return matrix + (size_t)row * attn->arch->hidden_size;
}

#endif
