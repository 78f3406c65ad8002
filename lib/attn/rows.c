/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows [n_rows][hidden] from one place to another: into a wire dtype and back, and into the sum of
 * what shards and ranks return.
 *
 * Invariant: a row is rounded here as a peer will see it, wherever the FFN and the router are, and
 * every sum begins with +0.0; so all layouts have the same bits. Called by local, remote, route and
 * group.
 */
#include "attn.h"

int afd__attn_convert_rows(struct afd_attn *attn, const void *src, int32_t src_dtype, void *dst,
	int32_t dst_dtype, uint32_t n_rows)
{
	uint32_t hidden = attn->arch->hidden_size;
	const struct afd__convert_args convert = {
		.src = src,
		.dst = dst,
		.src_stride = hidden * afd_dtype_bytes(src_dtype),
		.dst_stride = hidden * afd_dtype_bytes(dst_dtype),
		.n_rows = n_rows,
		.width = hidden,
		.src_dtype = src_dtype,
		.dst_dtype = dst_dtype,
	};

	return afd__convert(&attn->queue, &convert);
}

int afd__attn_round_rows(struct afd_attn *attn, const struct afd__lane *lane)
{
	float *x = afd__attn_rows(attn, attn->memory.x, lane->own_row0);
	int32_t dtype = attn->params.to_ffn_dtype;
	void *wire = attn->memory.wire;
	int rc;

	if (dtype == AFD_DTYPE_F32)
		return 0;
	rc = afd__attn_convert_rows(attn, x, AFD_DTYPE_F32, wire, dtype, lane->n_own_rows);
	return rc ? rc
		  : afd__attn_convert_rows(
			    attn, wire, dtype, x, AFD_DTYPE_F32, lane->n_own_rows);
}

int afd__attn_clear_rows(struct afd_attn *attn, float *rows, uint32_t n_rows)
{
	size_t row_bytes = attn->arch->hidden_size * sizeof(float);
	const struct afd__convert_args convert = {
		.src = attn->memory.zeros,
		.dst = rows,
		.index = (const int32_t *)attn->memory.zeros,
		.src_stride = row_bytes,
		.dst_stride = row_bytes,
		.n_rows = n_rows,
		.width = attn->arch->hidden_size,
		.src_dtype = AFD_DTYPE_F32,
		.dst_dtype = AFD_DTYPE_F32,
	};

	return afd__convert(&attn->queue, &convert);
}

int afd__attn_add_rows(struct afd_attn *attn, const void *src, int32_t dtype, float *rows,
	const int32_t *list, uint32_t n_rows)
{
	uint32_t hidden = attn->arch->hidden_size;
	const struct afd__convert_args convert = {
		.src = src,
		.dst = rows,
		.index = list,
		.src_stride = hidden * afd_dtype_bytes(dtype),
		.dst_stride = hidden * sizeof(float),
		.n_rows = n_rows,
		.width = hidden,
		.src_dtype = dtype,
		.dst_dtype = AFD_DTYPE_F32,
		.accumulate = 1,
		.scatter = list != NULL,
	};

	return afd__convert(&attn->queue, &convert);
}
