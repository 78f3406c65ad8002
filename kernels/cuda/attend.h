/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the kernels of attention share: where k of a position lies, and the ways that `attend` chooses
 * from.
 */
#ifndef AFD_KERNELS_CUDA_ATTEND_H
#define AFD_KERNELS_CUDA_ATTEND_H

#include "dispatch.h"

/* Bytes from kv.data to k of a position of a kv head. */
GPU_FN size_t k_offset(const struct afd__attend_args &a, const int32_t *pages, unsigned kv_head,
	unsigned position)
{
	return (size_t)pages[position / a.kv.page_size] * a.kv.page_stride +
	       position % a.kv.page_size * a.kv.position_stride + kv_head * a.kv.head_stride;
}

GPU_FN unsigned first_seen(const struct afd__attend_args &a, unsigned position)
{
	return a.window && position >= a.window ? position - a.window + 1 : 0;
}

/* attend_split.cu: tensor cores, the cache in parts. */
int attend_split_fits(const struct afd__attend_args *a);
int attend_split(const struct afd_gpu *gpu, const struct afd__attend_args *a);

/* attend_chunk.cu: the same for rows that follow each other, which read the cache once for all of
 * them. Takes what attend_split takes, in any order of rows. */
int attend_chunk_pays(const struct afd_gpu *gpu, const struct afd__attend_args *a);
int attend_chunk(const struct afd_gpu *gpu, const struct afd__attend_args *a);

#endif
