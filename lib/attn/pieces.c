/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What of a step is recorded, and what that depends on. With an FFN of this process it is the whole
 * step (whole.c). Where rows cross to peers, it is what lies between two crossings: the embedding,
 * the attention of a layer for a lane, with the FFN's input and the choice of experts behind it, and
 * the head. Rows into and out of slots, whose places change, are enqueued between.
 *
 * Invariant: a piece depends on the batch by nothing but its key; ids, positions and page tables
 * stand in device memory, at places that the key decides. How many rows of an entry follow each other
 * changes which kernel is recorded, and no bit. Called by step and whole.
 */
#include "attn.h"

struct piece {
	struct afd_attn *attn;
	int32_t kind; /* enum afd__attn_piece */
	const struct afd__lane *lane; /* NULL: of no lane */
};

int afd__attn_graphs_create(struct afd_attn *attn)
{
	bool alone = attn->ffn && !attn->net, traced = attn->ctx->tracer.span != NULL;
	/* Embedding and head; in a group a layer is cut in two. */
	uint32_t per_lane = attn->arch->n_layers * (afd__attn_in_group(attn) ? 2 : 1),
		 pieces = alone ? 1 : 2 + attn->n_lanes * per_lane;
	int rc;

	rc = afd__recordings_create(&attn->graphs, attn->device, "attn", attn->params.graphs,
		alone && traced ? 0 : pieces);
	if (rc || !alone || !attn->graphs.capacity)
		return rc;
	/* Lanes would run one after the other. */
	attn->n_lanes = 1;
	attn->whole = 1;
	return 0;
}

static struct afd__recording_key key_of(const struct piece *piece)
{
	const struct afd__batch *batch = &piece->attn->batch;
	const struct afd__lane *lane = piece->lane;

	return (struct afd__recording_key){ {
		(uint32_t)piece->kind,
		batch->n_rows,
		batch->n_entries,
		batch->n_outputs,
		batch->table_stride,
		batch->ids,
		lane ? lane->layer : 0,
		lane ? lane->row0 : 0,
		lane ? lane->n_rows : 0,
	} };
}

/* Behind attention, or behind the sum over the ranks. */
static int enqueue_ffn_side(struct afd_attn *attn, const struct afd__lane *lane)
{
	int rc = afd__attn_enqueue_ffn_input(attn, lane);

	if (!rc && lane->n_own_rows && afd__attn_routes(attn, lane->layer))
		rc = afd__attn_enqueue_choice(attn, lane);
	return rc;
}

static int enqueue(void *user)
{
	const struct piece *piece = user;
	struct afd_attn *attn = piece->attn;
	int rc;

	switch (piece->kind) {
	case AFD__PIECE_EMBEDDING:
		return afd__attn_enqueue_embedding(attn);
	case AFD__PIECE_ATTENTION:
		rc = afd__attn_enqueue_attention(attn, piece->lane);
		return rc || afd__attn_in_group(attn) ? rc : enqueue_ffn_side(attn, piece->lane);
	case AFD__PIECE_FFN_SIDE:
		return enqueue_ffn_side(attn, piece->lane);
	case AFD__PIECE_HEAD:
		return afd__attn_enqueue_head(attn, 0, attn->batch.n_outputs);
	default:
		return afd__attn_whole_enqueue(attn);
	}
}

int afd__attn_run_piece(struct afd_attn *attn, int32_t kind, const struct afd__lane *lane)
{
	struct piece piece = { attn, kind, lane };
	const struct afd__recording_key key = key_of(&piece);

	return afd__recordings_run(&attn->graphs, &attn->queue, &key, enqueue, &piece);
}
