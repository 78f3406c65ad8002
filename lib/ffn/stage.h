/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inside of an FFN stage, for the files of lib/ffn. A stage has one queue, one set of
 * activations for max_rows rows, and at most one pass on its way; everything is allocated when it
 * is made.
 *
 * In reading order: stage.c makes it, load.c brings the weights of its shard, serve.c takes parts
 * from the transport and asks gather.c which of them go next, pass.c carries those through the
 * stage, layer.c is the math of a layer, with dense.c and routed.c for its kinds, compute.c a
 * host's own; forward.c is the same math for a host that moves rows itself.
 */
#ifndef AFD_LIB_FFN_STAGE_H
#define AFD_LIB_FFN_STAGE_H

#include "../model/shard.h"
#include "../device/recordings.h"
#include "ffn.h"
#include "gather.h"

enum {
	AFD__FFN_MAX_ROWS = 65536,
	AFD__FFN_WAIT_MS = 60000, /* for a device, and for the last passes after a stop */
};

/* Rows of 2-byte numbers stand 4-byte aligned, as the seam asks of what is uploaded. */
#define AFD__FFN_STAGING_ROW_BYTES(hidden) (((size_t)(hidden) * 2 + 3) & ~(size_t)3)

/* A SwiGLU: a dense layer, or the shared experts of a routed one. Gate and up are one matrix
 * [2 * width][hidden] where they have one dtype and are packed: then a row is read once for both.
 */
struct afd__ffn_mlp {
	struct afd__matrix gate; /* or gate and up */
	struct afd__matrix up;   /* data NULL: it is in gate */
	struct afd__matrix down; /* [hidden][width] */
	uint32_t width;          /* of the shard; 0: the layer has none */
	uint32_t width_offset;   /* where that begins in the whole width */
};

/* Experts that follow each other and have the same dtypes. */
struct afd__ffn_experts {
	struct afd__matrix gate_up; /* a stack of [2 * width][hidden] */
	struct afd__matrix down;    /* a stack of [hidden][width] */
	uint32_t first;             /* of the model's experts */
};

struct afd__ffn_layer {
	const struct afd__layer *arch; /* the model's */
	struct afd__ffn_mlp mlp;
	/* of a routed layer */
	struct afd__matrix
		router;     /* [n_experts][hidden], of every shard the whole, always packed */
	float *router_bias; /* dev [n_experts], or NULL */
	struct afd__ffn_experts *stacks; /* [n_stacks], ascending; together the shard's experts */
	uint32_t n_stacks;
	uint32_t width_offset; /* where the shard begins in the width of an expert */
};

struct afd__ffn_weights {
	struct afd__ffn_layer *layers; /* [n_layers]; NULL with a compute function */
	uint32_t max_width;            /* of an mlp */
	uint32_t n_packed, n_in_place; /* matrices and stacks, but for routers */
	uint64_t bytes;                /* dev memory */
	uint64_t stored_bytes;         /* the same as the checkpoint has it */
	uint64_t fingerprint[2], epoch;
};

/* One call of a layer's math. */
struct afd__ffn_call {
	uint32_t layer;     /* the contract's number */
	uint32_t n_rows;    /* at most max_rows */
	const float *x;     /* dev [n_rows][hidden] */
	const void *inputs; /* dev: x in the form of afd__ffn_inputs, or NULL */
	float *y;           /* dev [n_rows][hidden]; may be x */
	const int32_t *ids; /* dev [n_rows][top_k]; NULL: the stage routes, or the layer is dense */
	const float *weights; /* dev [n_rows][top_k], with ids */
};

/* A host's compute function, and the pass that it has not completed yet. */
struct afd__ffn_host {
	afd_ffn_compute compute; /* NULL: the stage has weights */
	void *user;
	uint64_t last_id;
	_Atomic uint64_t under_way; /* id that afd_ffn_complete may report; 0: none */
	_Atomic uint64_t completed; /* id whose status is written */
	_Atomic int status;
};

/* The parts that are being run, as one sequence of rows; more than max_rows of them take several
 * passes. */
struct afd__ffn_run {
	struct afd__part *parts; /* [max_parts] */
	uint64_t *gather_ns; /* [max_parts] how long the stage was free and they waited for others */
	uint32_t n_parts;
	uint32_t layer;        /* the contract's number */
	uint64_t n_rows, row0; /* of all parts; of the pass that is under way */
	uint32_t n_pass_rows;
	bool routed; /* the parts came with ids, all of them */
	bool under_way;
	uint64_t ticket;
	uint64_t started_ns, pass_ns;  /* of this pass */
	uint64_t begun_ns, compute_ns; /* of all */
};

struct afd__ffn_server {
	struct afd__held *held; /* [max_parts], in the order of arrival */
	uint32_t n_held, max_parts;
	struct afd__source *joined; /* [max_sources] */
	uint32_t max_sources;
	struct afd__gather_source *sources; /* [max_sources + max_parts] */
	struct afd__arrivals arrivals;
	struct afd__ffn_run run;
	uint64_t cap_ns;          /* of the gather; UINT64_MAX: from what is measured */
	uint64_t mean_pass_ns;    /* 0: none yet */
	uint64_t until_ns;        /* when the gather decides again; UINT64_MAX: nothing waits */
	_Atomic uint32_t n_peers; /* joined, when last looked at */
	uint64_t stopped_ns;      /* 0: not asked to stop */
	bool drained, progressed;
	int failed; /* the error that ended the server */
	char failed_text[512];
	int fd;     /* epoll: the transport's descriptor, and own_fd */
	int own_fd; /* epoll: wake_fd, timer_fd, the queue's */
	int wake_fd, timer_fd;
	_Atomic int woken; /* wake_fd was written */
	_Atomic int stop;
};

struct afd__ffn_metrics {
	struct afd__metric *rows_per_pass, *queue_seconds, *gather_seconds, *compute_seconds, *passes, *rows,
		*errors, *peers, *weight_bytes, *stored_bytes;
	struct afd__metric **by_layer; /* [n_groups] */
	uint32_t n_groups, group_layers;
};

struct afd_ffn {
	struct afd_context *ctx;
	afd_transport *net; /* NULL: for calls, or a local attention stage */
	const void *owner;  /* the local attention stage */
	struct afd_contract contract;
	struct afd__ffn_shard shard;
	struct afd__device *device;
	struct afd__queue queue;
	uint32_t first_layer, n_layers, hidden, max_rows;
	struct afd__ffn_weights weights;
	struct afd__ffn_host host;

	/* Activations, all dev (host memory for a compute function); NULL: not needed. */
	float *x, *y;          /* [max_rows][hidden] */
	float *gate_up;        /* [max_rows][2 * max_width] */
	float *activated;      /* [max_rows][max_width] */
	float *quantized;      /* [max_rows][hidden]; NULL: activations are not quantised */
	float *logits;         /* [max_rows][n_experts] */
	int32_t *ids;          /* [max_rows][top_k] */
	float *expert_weights; /* [max_rows][top_k] */
	void *staging;         /* [max_rows] rows of 2-byte numbers, for afd_ffn_forward */
	void *scratch;         /* [scratch_bytes], of the experts */
	size_t scratch_bytes;
	bool quantizes;
	struct afd__queue_options options;
	struct afd__recordings graphs; /* of passes; net only */

	struct afd__ffn_server server; /* net only */
	struct afd__ffn_metrics metrics;
	_Atomic uint64_t n_passes, n_rows, compute_ns;
};

/* -EINVAL for NULL or in a child of fork. */
int afd__ffn_check(const struct afd_ffn *ffn);
bool afd__ffn_holds(const struct afd_ffn *ffn, int64_t layer);

/* The experts of a row; 0: no layer has any. */
static inline uint32_t afd__ffn_top_k(const struct afd_ffn *ffn)
{
	return ffn->contract.n_experts ? ffn->contract.top_k : 0;
}

/* load.c: the shard's weights of the held layers, and their fingerprint. */
int afd__ffn_load(
	struct afd_ffn *ffn, const struct afd_model *model, const struct afd_ffn_params *params);
void afd__ffn_unload(struct afd_ffn *ffn);

/* layer.c: y = F(layer, x) of the shard, behind what is on q already. */
int afd__ffn_layer(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_call *call);

/* dense.c: a layer's mlp of the call's rows. */
int afd__ffn_mlp(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_mlp *mlp,
	const struct afd__ffn_call *call);

/* routed.c: a layer with experts. */
int afd__ffn_routed(struct afd_ffn *ffn, struct afd__queue *q, const struct afd__ffn_call *call);

/* compute.c: the pass of `run`, from x and to y, [n_pass_rows][hidden]. 1: y is complete; 0: under
 * way, ask _reached; or the error. */
int afd__ffn_host_begin(struct afd_ffn *ffn, const float *x, float *y);
int afd__ffn_host_reached(struct afd_ffn *ffn);

/* pass.c: begins with run->parts, n_parts, layer and n_rows set; _poll returns 1 when all replies
 * went, 0 not yet, or the error of a device that is lost (then the replies say so). */
int afd__ffn_run_begin(struct afd_ffn *ffn);
int afd__ffn_run_poll(struct afd_ffn *ffn);
/* Answers a part with an error; the thread's text goes with it. */
void afd__ffn_refuse(struct afd_ffn *ffn, const struct afd__part *part, int status);

/* server.c */
int afd__ffn_server_create(struct afd_ffn *ffn, uint32_t gather_us);
void afd__ffn_server_destroy(struct afd_ffn *ffn); /* also of a zeroed one */

/* metrics.c */
int afd__ffn_metrics_create(struct afd_ffn *ffn);
void afd__ffn_metrics_destroy(struct afd_ffn *ffn);
void afd__ffn_count_pass(
	struct afd_ffn *ffn, uint32_t layer, uint32_t n_rows, uint64_t compute_ns);
/* before_ns: from finding the part to the begin of its pass. */
void afd__ffn_count_part(struct afd_ffn *ffn, uint64_t before_ns, uint64_t gather_ns);

#endif
