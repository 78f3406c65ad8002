/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Recordings of a queue as CUDA graphs. While the stream is captured its operations are noted and
 * not run; what stands in a graph is launches and copies within the device, with the arguments that
 * they had, so that a replay is one call.
 *
 * Invariant: a capture that has begun is ended, whatever happened between. Called by the front door.
 */
#include "cuda.h"

struct afd__graph {
	cudaGraphExec_t exec;
};

int cuda_record_begin(struct afd__queue *q)
{
	struct cuda_queue *d = q->state;
	void *before;
	int rc = cuda_enter_uncaptured(d, "a recording", &before);

	if (rc)
		return rc;
	/* What other threads of the host do is no concern of this capture. */
	rc = cudaStreamBeginCapture(d->gpu.stream, cudaStreamCaptureModeThreadLocal);
	rc = cuda_error(q->dev, rc, "a recording cannot begin");
	cuda_leave(q->dev, before);
	return rc;
}

static int instantiate(struct afd__device *dev, cudaGraph_t captured, struct afd__graph **out)
{
	struct afd__graph *graph = dev->host->alloc(dev->ctx, 1, sizeof(*graph));
	int rc;

	if (!graph)
		return -ENOMEM;
	rc = cudaGraphInstantiate(&graph->exec, captured, 0);
	if (rc) {
		dev->host->free(graph);
		return cuda_error(dev, rc, "a recording cannot be made a graph");
	}
	*out = graph;
	return 0;
}

int cuda_record_end(struct afd__queue *q, struct afd__graph **out)
{
	struct cuda_queue *d = q->state;
	cudaGraph_t captured = NULL;
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	rc = cuda_error(q->dev, cudaStreamEndCapture(d->gpu.stream, &captured),
		"a recording was given up");
	if (!rc)
		rc = instantiate(q->dev, captured, out);
	if (captured)
		cudaGraphDestroy(captured);
	cuda_leave(q->dev, before);
	return rc;
}

int cuda_replay(struct afd__queue *q, struct afd__graph *graph)
{
	struct cuda_queue *d = q->state;
	void *before;
	int rc = cuda_enter(q->dev, &before);

	if (rc)
		return rc;
	rc = cuda_error(q->dev, cudaGraphLaunch(graph->exec, d->gpu.stream), "a graph");
	cuda_leave(q->dev, before);
	return rc;
}

void cuda_graph_free(struct afd__device *dev, struct afd__graph *graph)
{
	void *before;

	if (!cuda_forked(dev->state) && !cuda_enter(dev, &before)) {
		cudaGraphExecDestroy(graph->exec);
		cuda_leave(dev, before);
	}
	dev->host->free(graph);
}
