/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Rows [n_rows][hidden] from one place to another: into a wire dtype and back, and into the sum of
 * what shards and ranks return.
 *
 * Invariant: a row is rounded here as a peer will see it, wherever the FFN and the router are, and
 * every sum begins with +0.0; so all layouts have the same bits. Called by local, remote, route,
 * group and head.
 */
#include "attn.h"

int afd__attn_convert_rows(struct afd_attn *attn, const void *src, int32_t src_dtype,
	const int32_t *list, void *dst, int32_t dst_dtype, uint32_t n_rows)
{
	uint32_t hidden = attn->arch->hidden_size;
	const struct afd__convert_args convert = {
		.src = src,
		.dst = dst,
		.index = list,
		.src_stride = afd__row_bytes(hidden, src_dtype),
		.dst_stride = afd__row_bytes(hidden, dst_dtype),
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

	/* Numbers that are rounded one by one are so by the norm. */
	if (dtype != AFD_DTYPE_FP8)
		return 0;
	rc = afd__attn_convert_rows(attn, x, AFD_DTYPE_F32, NULL, wire, dtype, lane->n_own_rows);
	return rc ? rc
		  : afd__attn_convert_rows(
			    attn, wire, dtype, NULL, x, AFD_DTYPE_F32, lane->n_own_rows);
}

int afd__attn_clear_rows(struct afd_attn *attn, float *rows, uint32_t n_rows)
{
	const float *zeros = attn->memory.zeros;

	return afd__attn_convert_rows(attn, zeros, AFD_DTYPE_F32, (const int32_t *)zeros, rows,
		AFD_DTYPE_F32, n_rows);
}

int afd__attn_add_rows(struct afd_attn *attn, const void *src, int32_t dtype, float *rows,
	const int32_t *list, uint32_t n_rows)
{
	uint32_t hidden = attn->arch->hidden_size;
	const struct afd__convert_args convert = {
		.src = src,
		.dst = rows,
		.index = list,
		.src_stride = afd__row_bytes(hidden, dtype),
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
