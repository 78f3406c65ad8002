/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The inside of an FFN stage, for the files of lib/ffn. A stage has one queue, one set of
 * activations for max_rows rows, and at most one pass on its way; everything is allocated when it
 * is made.
 *
 * In reading order: stage.c makes it, load.c brings the weights, serve.c takes parts from the
 * transport and asks gather.c which of them go next, pass.c carries those through the stage,
 * dense.c is the math of a layer, compute.c a host's own; forward.c is the same math for a host
 * that moves rows itself.
 */
#ifndef AFD_LIB_FFN_STAGE_H
#define AFD_LIB_FFN_STAGE_H

#include "../model/model.h"
#include "ffn.h"
#include "gather.h"

enum {
	AFD__FFN_MAX_ROWS = 65536,
	AFD__FFN_WAIT_MS = 60000, /* for a device, and for the last passes after a stop */
};

/* Rows of 2-byte numbers stand 4-byte aligned, as the seam asks of what is uploaded. */
#define AFD__FFN_STAGING_ROW_BYTES(hidden) (((size_t)(hidden) * 2 + 3) & ~(size_t)3)

/* The weights of one layer. Gate and up are one matrix [2 * width][hidden] where they have one
 * dtype and are packed: then a row is read once for both. */
struct afd__ffn_layer {
	struct afd__matrix gate; /* or gate and up */
	struct afd__matrix up;   /* data NULL: it is in gate */
	struct afd__matrix down; /* [hidden][width] */
	uint32_t width;
};

struct afd__ffn_weights {
	struct afd__ffn_layer *layers; /* [n_layers]; NULL with a compute function */
	uint32_t max_width;
	uint64_t bytes;
	uint64_t fingerprint[2];
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
	uint32_t n_parts;
	uint32_t layer;        /* the contract's number */
	uint64_t n_rows, row0; /* of all parts; of the pass that is under way */
	uint32_t n_pass_rows;
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
	_Atomic int stop;
};

struct afd__ffn_metrics {
	struct afd__metric *rows_per_pass, *gather_seconds, *compute_seconds, *passes, *rows,
		*errors, *peers;
};

struct afd_ffn {
	struct afd_context *ctx;
	afd_transport *net;           /* NULL: for calls, or a local attention stage */
	const void *owner;            /* the local attention stage */
	struct afd_contract contract; /* ffn_kinds NULL: all dense, as this version has no others */
	struct afd__device *device;
	struct afd__queue queue;
	uint32_t first_layer, n_layers, hidden, max_rows;
	struct afd__ffn_weights weights;
	struct afd__ffn_host host;

	float *x, *y;     /* dev (host memory for a compute function) [max_rows][hidden] */
	float *gate_up;   /* dev [max_rows][2 * max_width] */
	float *activated; /* dev [max_rows][max_width] */
	void *staging;    /* dev [max_rows] rows of 2-byte numbers, for afd_ffn_forward */

	struct afd__ffn_server server; /* net only */
	struct afd__ffn_metrics metrics;
	_Atomic uint64_t n_passes, n_rows, compute_ns;
};

/* -EINVAL for NULL or in a child of fork. */
int afd__ffn_check(const struct afd_ffn *ffn);
bool afd__ffn_holds(const struct afd_ffn *ffn, int64_t layer);

/* load.c: the weights of the held layers, and their fingerprint. */
int afd__ffn_load(
	struct afd_ffn *ffn, const struct afd_model *model, const struct afd_ffn_params *params);
void afd__ffn_unload(struct afd_ffn *ffn);

/* dense.c: y = F(layer, x) for at most max_rows rows. x may be y. */
int afd__ffn_dense(struct afd_ffn *ffn, struct afd__queue *q, uint32_t layer, uint32_t n_rows,
	const float *x /* dev [n_rows][hidden] */, float *y /* dev [n_rows][hidden] */);

/* compute.c: 1: y is complete; 0: under way, ask _reached; or the error. */
int afd__ffn_host_begin(struct afd_ffn *ffn, uint32_t layer, uint32_t n_rows);
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
void afd__ffn_count_pass(struct afd_ffn *ffn, uint32_t n_rows, uint64_t compute_ns);

#endif
