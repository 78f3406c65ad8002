/* SPDX-License-Identifier: Apache-2.0 */
/* Inside of a checkpoint: shared by checkpoint.c, which answers, and sources.c, which fills the
 * lists when it is opened. */
#ifndef AFD_LIB_CHECKPOINT_STATE_H
#define AFD_LIB_CHECKPOINT_STATE_H

#include <pthread.h>

#include "checkpoint.h"
#include "safetensors.h"

enum { AFD__TENSOR_ALIGNMENT = 4 };

struct afd__stored {
	const char *name;
	struct afd__file *file; /* NULL: lent */
	bool known;        /* the fields below are */
	int32_t dtype;     /* enum afd_dtype; 0: none that we compute with */
	char dtype_name[16];
	uint32_t n_dims;
	uint64_t shape[AFD__SAFETENSORS_MAX_DIMS]; /* [n_dims] */
	uint64_t offset, bytes;
	const void *lent;
	void *aligned; /* a copy, when the file has it at an odd place */
};

struct afd__file {
	const char *name;
	int fd;       /* -1: not opened, or mapped already */
	bool known;   /* its header was read */
	uint64_t bytes;
	char *mapped; /* the whole file; NULL: not yet */
};

struct afd__checkpoint {
	struct afd_context *ctx;
	char *source; /* for errors: the directory */
	int dir_fd;   /* -1: lent tensors */
	pthread_mutex_t lock;
	struct afd__stored *stored; /* [n_stored], sorted by name */
	struct afd__file *files;    /* [n_files] */
	char *names;           /* of tensors and files */
	uint32_t n_stored, n_files;
};

/* Takes dir_fd over; sets *out also on failure, for _close. */
int afd__checkpoint_create(struct afd__checkpoint **out, struct afd_context *ctx, int dir_fd,
			   const char *source);
/* Room for the lists, all zero. */
int afd__checkpoint_alloc(struct afd__checkpoint *cp, size_t n_stored, size_t n_files,
			  size_t name_bytes);
void afd__checkpoint_sort(struct afd__checkpoint *cp);
/* Opens a file and parses its header; the descriptor stays open until the file is mapped. */
int afd__checkpoint_read_header(struct afd__checkpoint *cp, struct afd__file *file,
				struct afd__safetensors *header);
/* Fills in what the list of names could only name. Tensors that it does not name do not exist. */
int afd__checkpoint_apply_header(struct afd__checkpoint *cp, struct afd__file *file,
				 const struct afd__safetensors *header);

#endif
