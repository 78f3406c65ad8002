/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step in one piece, where the FFN is in this process and the device has graphs: inputs, all
 * layers and the head are enqueued behind each other, and one ticket tells of the end. What lies
 * between upload and outputs is recorded (pieces.c): a step is then a single call. Called by step.
 */
#include "attn.h"

static bool has_head(const struct afd_attn *attn)
{
	return attn->batch.n_outputs && attn->batch.n_outputs <= AFD__HEAD_ROWS;
}

static int enqueue_layers(struct afd_attn *attn)
{
	struct afd__lane *lane = &attn->step.lanes[0];
	int rc = 0;

	for (lane->layer = 0; !rc && lane->layer < attn->arch->n_layers; lane->layer++) {
		afd__range_push(&attn->queue, "afd attention");
		rc = afd__attn_enqueue_attention(attn, lane);
		rc = rc ? rc : afd__attn_enqueue_ffn_input(attn, lane);
		afd__range_pop(&attn->queue);
		afd__range_push(&attn->queue, "afd ffn");
		rc = rc ? rc : afd__attn_local_enqueue(attn, lane);
		afd__range_pop(&attn->queue);
	}
	return rc;
}

int afd__attn_whole_enqueue(struct afd_attn *attn)
{
	int rc = afd__attn_enqueue_embedding(attn);

	rc = rc ? rc : enqueue_layers(attn);
	return rc || !has_head(attn) ? rc
				     : afd__attn_enqueue_head(attn, 0, attn->batch.n_outputs);
}

/* What is recorded counts its passes when it is enqueued. */
static int run(struct afd_attn *attn)
{
	int rc = afd__attn_run_piece(attn, AFD__PIECE_WHOLE, NULL);

	if (rc > 0)
		afd__ffn_count_replayed(attn->ffn, attn->batch.n_rows);
	return rc < 0 ? rc : 0;
}

int afd__attn_whole_begin(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	int rc;

	step->state = AFD__STEP_WHOLE;
	step->head_ns = afd__now_ns();
	afd__range_push(&attn->queue, "afd step");
	rc = afd__attn_enqueue_inputs(attn);
	rc = rc ? rc : run(attn);
	if (!rc && has_head(attn))
		rc = afd__attn_enqueue_outputs(attn, 0, attn->batch.n_outputs);
	afd__range_pop(&attn->queue);
	return rc ? rc : afd__queue_ticket(&attn->queue, &step->head_ticket);
}

int afd__attn_whole_poll(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	int rc = afd__queue_reached(&attn->queue, step->head_ticket);

	if (rc <= 0)
		return rc;
	attn->attention_ns += afd__now_ns() - step->head_ns;
	step->moved = 1;
	if (!attn->batch.n_outputs || has_head(attn))
		return 1;
	step->state = AFD__STEP_HEAD;
	return 0;
}
