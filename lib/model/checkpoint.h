/* SPDX-License-Identifier: Apache-2.0 */
/* The tensors of a checkpoint by name, wherever they are: in files of a directory, or in the host's
 * memory. */
#ifndef AFD_LIB_CHECKPOINT_H
#define AFD_LIB_CHECKPOINT_H

#include <stdbool.h>

#include "model.h"

struct afd__checkpoint;

/* Takes dir_fd over, also on failure. `dir` is for error texts. Opens no file but the index, or the
 * one file there is. */
int afd__checkpoint_open(struct afd__checkpoint **out, struct afd_context *ctx, int dir_fd,
			 const char *dir);
/* Over tensors that the host lends. */
int afd__checkpoint_lend(struct afd__checkpoint **out, struct afd_context *ctx,
			 const struct afd_model_params *params);
void afd__checkpoint_close(struct afd__checkpoint *checkpoint); /* NULL is fine */
/* No mapped page counts as ours any more; each comes back from its file when touched. */
void afd__checkpoint_release(struct afd__checkpoint *checkpoint);

/* The checkpoint's own copy of the name; NULL when it has no such tensor, or is NULL. */
const char *afd__checkpoint_name(const struct afd__checkpoint *checkpoint, const char *name);

/*
 * Finds a tensor; opens its file when that has not happened yet, and maps it when with_data is set
 * (data stays NULL without). The shape is as stored, the dtype one of enum afd_dtype. Any thread.
 *
 *   -ENOENT   there is no such tensor, or its file is missing
 *   -EBADMSG  its file contradicts itself or the index
 *   -ENOTSUP  its dtype
 */
int afd__checkpoint_tensor(struct afd__checkpoint *checkpoint, const char *name, bool with_data,
			   struct afd__tensor *out);

/* -ENOENT: none of these names is there. */
int afd__checkpoint_missing(const struct afd__checkpoint *checkpoint, const char *names);

#endif
