/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A step in one piece, where the FFN is a stage of this process and the device has graphs: what the
 * step reads is uploaded, then all layers and the head are enqueued behind each other, and one
 * ticket tells of their end. A batch of a shape that came before is recorded as a graph, and one
 * that was recorded is replayed: between upload and outputs a step is then a single call.
 *
 * Invariant: what is recorded depends on the batch by nothing but its shape; ids, positions and
 * page tables stand in device memory, at places that the shape decides. So a replay does what the
 * operations would have done, to the bit. Called by step.
 */
#include <string.h>

#include "attn.h"

enum { DEFAULT_GRAPHS = 32, MAX_GRAPHS = 1024 };

/* ---- life ---- */

int afd__attn_graphs_create(struct afd_attn *attn)
{
	uint32_t wanted = attn->params.graphs;

	if (wanted != UINT32_MAX && wanted > MAX_GRAPHS)
		return afd__error(-EINVAL, "attn: graphs is %u, limit %d, or UINT32_MAX for none",
			wanted, MAX_GRAPHS);
	if (wanted == UINT32_MAX || !attn->ffn || attn->net || attn->ctx->tracer.span ||
		!afd__device_has_graphs(attn->device))
		return 0;
	wanted = wanted ? wanted : DEFAULT_GRAPHS;
	attn->graphs.kept = afd__alloc(attn->ctx, wanted, sizeof(*attn->graphs.kept));
	if (!attn->graphs.kept)
		return -ENOMEM;
	attn->graphs.capacity = wanted;
	/* Lanes would run one after the other. */
	attn->n_lanes = 1;
	return 0;
}

void afd__attn_graphs_destroy(struct afd_attn *attn)
{
	struct afd__attn_graphs *g = &attn->graphs;
	uint32_t i;

	for (i = 0; i < g->n_kept; i++)
		afd__graph_free(attn->device, g->kept[i].graph);
	afd__free(g->kept);
	memset(g, 0, sizeof(*g));
}

/* ---- what is recorded ---- */

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

static int enqueue_body(struct afd_attn *attn)
{
	int rc = afd__attn_enqueue_embedding(attn);

	rc = rc ? rc : enqueue_layers(attn);
	return rc || !has_head(attn) ? rc
				     : afd__attn_enqueue_head(attn, 0, attn->batch.n_outputs);
}

/* ---- the recordings ---- */

static struct afd__attn_shape shape_of(const struct afd_attn *attn)
{
	const struct afd__batch *batch = &attn->batch;

	return (struct afd__attn_shape){
		batch->n_rows, batch->n_entries, batch->n_outputs, batch->table_stride, batch->ids
	};
}

static bool is_alike(const struct afd__attn_shape *a, const struct afd__attn_shape *b)
{
	return a->n_rows == b->n_rows && a->n_entries == b->n_entries &&
	       a->n_outputs == b->n_outputs && a->table_stride == b->table_stride &&
	       a->ids == b->ids;
}

static struct afd__attn_graph *find(struct afd__attn_graphs *g, const struct afd__attn_shape *shape)
{
	uint32_t i;

	for (i = 0; i < g->n_kept; i++) {
		if (is_alike(&g->kept[i].shape, shape))
			return &g->kept[i];
	}
	return NULL;
}

/* A shape that comes for the first time is remembered, and its step runs as it is: so that nothing
 * is recorded for prompts whose like never comes again, and every kernel has run before it is
 * recorded, which may load it. */
static bool was_seen(struct afd__attn_graphs *g, const struct afd__attn_shape *shape)
{
	uint32_t n = g->n_seen < AFD__SHAPES_SEEN ? g->n_seen : AFD__SHAPES_SEEN, i;

	for (i = 0; i < n; i++) {
		if (is_alike(&g->seen[i], shape))
			return true;
	}
	g->seen[g->n_seen++ % AFD__SHAPES_SEEN] = *shape;
	return false;
}

/* The place for one more: that which was not used for longest, when all are taken. */
static struct afd__attn_graph *make_room(struct afd_attn *attn)
{
	struct afd__attn_graphs *g = &attn->graphs;
	struct afd__attn_graph *oldest = g->kept;
	uint32_t i;

	if (g->n_kept < g->capacity)
		return &g->kept[g->n_kept++];
	for (i = 1; i < g->n_kept; i++) {
		if (g->kept[i].used < oldest->used)
			oldest = &g->kept[i];
	}
	/* No step is under way on the device: the last one that used it is done. */
	afd__graph_free(attn->device, oldest->graph);
	return oldest;
}

static void tell(struct afd_attn *attn)
{
	char text[256];

	if (attn->graphs.told)
		return;
	attn->graphs.told = 1;
	afd__error_save(text, sizeof(text));
	afd__log(attn->ctx, AFD_LOG_WARN,
		"attn: a step of %u rows cannot be recorded and runs without a graph: %s",
		attn->batch.n_rows, text);
}

/* Records a shape; what was enqueued meanwhile has not run. */
static struct afd__attn_graph *record(struct afd_attn *attn, const struct afd__attn_shape *shape)
{
	struct afd__attn_graph *kept = make_room(attn);
	int rc = afd__queue_record(&attn->queue), ended;

	*kept = (struct afd__attn_graph){ .shape = *shape };
	if (!rc) {
		rc = enqueue_body(attn);
		if (rc)
			tell(attn);
		ended = afd__queue_recorded(&attn->queue, &kept->graph);
		if (rc && !ended) {
			afd__graph_free(attn->device, kept->graph);
			kept->graph = NULL;
		}
		rc = rc ? rc : ended;
	}
	if (rc)
		tell(attn);
	return kept;
}

static int run_body(struct afd_attn *attn)
{
	struct afd__attn_shape shape = shape_of(attn);
	struct afd__attn_graph *kept = find(&attn->graphs, &shape);

	bool replayed = kept && kept->graph;

	if (!kept && was_seen(&attn->graphs, &shape))
		kept = record(attn, &shape);
	if (!kept || !kept->graph)
		return enqueue_body(attn);
	/* A recording counted its passes when they were enqueued. */
	if (replayed)
		afd__ffn_count_replayed(attn->ffn, attn->batch.n_rows);
	kept->used = attn->step.number;
	return afd__queue_replay(&attn->queue, kept->graph);
}

/* ---- the step ---- */

int afd__attn_whole_begin(struct afd_attn *attn)
{
	struct afd__step *step = &attn->step;
	int rc;

	step->state = AFD__STEP_WHOLE;
	step->head_ns = afd__now_ns();
	afd__range_push(&attn->queue, "afd step");
	rc = afd__attn_enqueue_inputs(attn);
	rc = rc ? rc : run_body(attn);
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
