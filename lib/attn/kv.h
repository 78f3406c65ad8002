/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The books of the paged KV cache: which page holds which positions of which sequence. Pages are
 * counted, shared by forks and copied when a sharer writes. Layers that see the same window form a
 * group, which has its own pages and its own page lists, so that pages leave a sliding window while
 * the full layers keep theirs. A page leaves when a step has succeeded and nobody can see it any
 * more: neither a position to come, nor one that comes again after the step was taken back.
 *
 * Invariant: a page's count is the number of page lists that hold it, plus one while a step keeps
 * it to go back to; what is gone is the beginning of a list. Pure bookkeeping on the host: the
 * memory of the pages is the stage's business. Called by sequences, batch and step.
 */
#ifndef AFD_LIB_ATTN_KV_H
#define AFD_LIB_ATTN_KV_H

#include "../context/core.h"

#define AFD__PAGE_GONE (-1) /* in a page list: the page has left the sliding window */

enum { AFD__ROLLBACK = 64 }; /* rows of the last step that can be taken back, unless it is stated */

struct afd__kv_shape {
	uint32_t n_groups;
	const uint32_t *n_pages; /* [n_groups] */
	const uint32_t *windows; /* [n_groups] positions that a row sees, 0: all. Both are copied */
	uint32_t page_size;     /* positions in a page */
	uint32_t n_sequences;   /* capacity */
	uint32_t max_positions; /* of one sequence */
	uint32_t rollback;      /* positions that can always be taken back; 0: AFD__ROLLBACK */
};

struct afd__kv_group {
	int32_t *free;        /* [n_pages]: the first n_free are free, taken from the end */
	uint32_t *references; /* [n_pages] */
	uint32_t n_pages, n_free;
	uint32_t window;      /* 0: all */
};

struct afd__kv_sequence {
	uint32_t length;   /* positions held */
	uint32_t reserved; /* positions that the step under way appends; 0: not part of it */
};

struct afd__kv {
	struct afd_context *ctx;
	struct afd__kv_shape shape;
	uint32_t list_capacity;             /* pages of the longest sequence */
	struct afd__kv_group *groups;       /* [n_groups] */
	struct afd__kv_sequence *sequences; /* [n_sequences] */
	int32_t *lists; /* [n_sequences][n_groups][list_capacity] page ids in order of position */
	int32_t *kept;  /* [n_sequences][n_groups]: the page that a copy stands in for, or -1 */
	uint32_t *gone; /* [n_sequences][n_groups]: so many pages of the list have left */
	void *memory;   /* of all arrays but groups */
	size_t memory_bytes;
};

int afd__kv_create(struct afd__kv *kv, struct afd_context *ctx, const struct afd__kv_shape *shape);
void afd__kv_destroy(struct afd__kv *kv); /* also of a zeroed one */

/* Pages that n_positions take. */
static inline uint32_t afd__kv_pages(const struct afd__kv *kv, uint32_t n_positions)
{
	return n_positions / kv->shape.page_size + (n_positions % kv->shape.page_size != 0);
}

static inline int32_t *afd__kv_list(const struct afd__kv *kv, uint32_t sequence, uint32_t group)
{
	return kv->lists + ((size_t)sequence * kv->shape.n_groups + group) * kv->list_capacity;
}

/* ---- between steps; `sequence` is an index below n_sequences ---- */

/* -EINVAL when a sequence that ends after n_positions could not go on, because its next position
 * sees a page that is gone: the text says which positions. */
int afd__kv_check_end(const struct afd__kv *kv, uint32_t sequence, uint32_t n_positions);
/* The empty sequence `to` takes the first n_positions of `from`, where it could go on. */
void afd__kv_fork(struct afd__kv *kv, uint32_t from, uint32_t to, uint32_t n_positions);
/* Keeps the first n_positions, where it could go on; 0 empties it. */
void afd__kv_truncate(struct afd__kv *kv, uint32_t sequence, uint32_t n_positions);

/* ---- a step ---- */

/* Gives the sequence pages of its own for n_rows positions more. -ENOSPC changes nothing and names
 * need and limit. */
int afd__kv_reserve(struct afd__kv *kv, uint32_t sequence, uint32_t n_rows);
/* 1 when the reservation replaced a shared page: *to begins as a copy of *from. */
int afd__kv_copy(
	const struct afd__kv *kv, uint32_t sequence, uint32_t group, int32_t *from, int32_t *to);
/* The step has succeeded: the sequence has grown, and pages have left their windows. */
void afd__kv_commit(struct afd__kv *kv, uint32_t sequence);
/* The step has not: as before _reserve. In the reverse order of reservations even the order of free
 * pages is. */
void afd__kv_restore(struct afd__kv *kv, uint32_t sequence);

/* Free pages of the group that has least, of all groups or of those with a window; 0 when there is
 * no such group. */
uint32_t afd__kv_free(const struct afd__kv *kv);
uint32_t afd__kv_free_windowed(const struct afd__kv *kv);

/* Pages that n_positions in one or more sequences can be spread over in a group with that window,
 * when steps append at most n_rows; see kv.c. */
uint64_t afd__kv_most_pages(uint32_t window, uint32_t page_size, uint32_t n_sequences,
	uint32_t n_rows, uint32_t rollback);

#endif
