/* SPDX-License-Identifier: Apache-2.0 */
/*
 * afd_ffn_forward: a layer for a host that moves rows itself. Its memory is any host memory, which
 * a device cannot read, so rows cross by upload and download, max_rows at a time; numbers of 2
 * bytes are converted on the device. The bits are those of the server, since both end in
 * afd__ffn_layer. This is the one call of a stage that waits for its device.
 *
 * Rows that are on the device already are enqueued between the host's own work, and nothing waits.
 */
#include "stage.h"

#include <string.h>

static bool is_number(int32_t dtype)
{
	return dtype == AFD_DTYPE_F32 || dtype == AFD_DTYPE_BF16 || dtype == AFD_DTYPE_F16;
}

static int check_side(
	const struct afd_ffn *ffn, char side, const void *memory, int32_t dtype, size_t row_bytes)
{
	size_t least;

	if (!memory)
		return afd__error(-EINVAL, "ffn rows: %c is NULL", side);
	if (dtype == AFD_DTYPE_FP8)
		return afd__error(-ENOTSUP,
			"ffn rows: %c_dtype is fp8, supported are f32, bf16 and f16", side);
	if (!is_number(dtype))
		return afd__error(-EINVAL,
			"ffn rows: %c_dtype is %d, must be f32 (1), bf16 (2) or f16 (3)", side,
			dtype);
	least = ffn->hidden * afd_dtype_bytes(dtype);
	if (row_bytes < least)
		return afd__error(-EINVAL, "ffn rows: %c_row_bytes is %zu, a row has %zu", side,
			row_bytes, least);
	return 0;
}

static int check_experts(const struct afd_ffn *ffn, const struct afd_ffn_rows *r)
{
	const struct afd__layer *arch = ffn->weights.layers[r->layer - ffn->first_layer].arch;
	size_t i;

	if (!r->ids && !r->weights && !r->top_k)
		return 0;
	if (arch->ffn_kind != AFD_FFN_MOE)
		return afd__error(-EINVAL, "ffn rows: ids, but layer %d has no experts", r->layer);
	if (!r->ids || !r->weights)
		return afd__error(-EINVAL, "ffn rows: %s is NULL, ids and weights go together",
			r->ids ? "weights" : "ids");
	if (r->top_k != arch->top_k)
		return afd__error(
			-EINVAL, "ffn rows: top_k is %u, the model's is %u", r->top_k, arch->top_k);
	/* On the device nobody looks at them; what is no expert counts for nothing. */
	for (i = 0; !r->on_device && i < (size_t)r->n_rows * r->top_k; i++) {
		if (r->ids[i] < -1 || r->ids[i] >= (int64_t)arch->n_experts)
			return afd__error(-EINVAL, "ffn rows: id %d of row %zu, limit %u",
				r->ids[i], i / r->top_k, arch->n_experts - 1);
	}
	return 0;
}

static int check_place(const struct afd_ffn *ffn, const struct afd_ffn_rows *r)
{
	if (r->on_device < 0 || r->on_device > 1)
		return afd__error(-EINVAL, "ffn rows: on_device is %d, limit 1", r->on_device);
	if (r->on_device && ffn->queue.fd >= 0 && !ffn->options.stream)
		return afd__error(-EINVAL,
			"ffn rows: on_device is 1, but the stage on %s was made without a stream",
			ffn->device->name);
	return 0;
}

/* Fills the defaults in. */
static int check(const struct afd_ffn *ffn, struct afd_ffn_rows *r)
{
	int rc;

	if (ffn->host.compute)
		return afd__error(
			-EINVAL, "ffn: a stage made from a compute function has no forward");
	if (ffn->server.run.under_way)
		return afd__error(-EBUSY, "ffn: a pass of the server is under way");
	if (!afd__ffn_holds(ffn, r->layer))
		return afd__error(-EINVAL, "ffn: layer %d is not held, it holds %u .. %u", r->layer,
			ffn->first_layer, ffn->first_layer + ffn->n_layers - 1);
	r->x_dtype = r->x_dtype ? r->x_dtype : AFD_DTYPE_F32;
	r->y_dtype = r->y_dtype ? r->y_dtype : AFD_DTYPE_F32;
	r->x_row_bytes =
		r->x_row_bytes ? r->x_row_bytes : ffn->hidden * afd_dtype_bytes(r->x_dtype);
	r->y_row_bytes =
		r->y_row_bytes ? r->y_row_bytes : ffn->hidden * afd_dtype_bytes(r->y_dtype);
	rc = check_place(ffn, r);
	if (rc || !r->n_rows)
		return rc;
	rc = check_side(ffn, 'x', r->x, r->x_dtype, r->x_row_bytes);
	if (!rc)
		rc = check_side(ffn, 'y', r->y, r->y_dtype, r->y_row_bytes);
	if (!rc && r->x == r->y &&
		(r->x_dtype != r->y_dtype || r->x_row_bytes != r->y_row_bytes))
		rc = afd__error(-EINVAL,
			"ffn rows: x and y share memory, but not dtype and row bytes");
	return rc ? rc : check_experts(ffn, r);
}

/* ---- rows across ---- */

/* One side of a crossing: rows of host memory, and where they stand on the device. */
struct side {
	char *host, *dev;
	size_t row_bytes;      /* of the numbers of a row */
	size_t host_row_bytes; /* from row to row */
	size_t dev_row_bytes;
};

/* f32 rows stand in x or y; others in staging, each at an address that the seam takes. */
static struct side side_of(const struct afd_ffn *ffn, const void *host, size_t host_row_bytes,
	uint32_t row0, int32_t dtype, float *floats)
{
	struct side side = {
		.host = (char *)host + row0 * host_row_bytes,
		.host_row_bytes = host_row_bytes,
		.dev = (char *)floats,
		.row_bytes = ffn->hidden * afd_dtype_bytes(dtype),
	};

	side.dev_row_bytes = side.row_bytes;
	if (dtype != AFD_DTYPE_F32) {
		side.dev = ffn->staging;
		side.dev_row_bytes = AFD__FFN_STAGING_ROW_BYTES(ffn->hidden);
	}
	return side;
}

/* Rows without gaps cross together, as many at once as the seam allows. */
static int cross(struct afd_ffn *ffn, const struct side *s, uint32_t n_rows, bool up)
{
	bool dense = s->host_row_bytes == s->row_bytes && s->dev_row_bytes == s->row_bytes;
	uint32_t together = dense ? (uint32_t)(AFD__UPLOAD_MAX / s->row_bytes) : 1, row, n;
	int rc = 0;

	for (row = 0; row < n_rows && !rc; row += n) {
		char *host = s->host + row * s->host_row_bytes,
		     *dev = s->dev + row * s->dev_row_bytes;

		n = n_rows - row < together ? n_rows - row : together;
		if (up)
			rc = afd__queue_upload(&ffn->queue, dev, host, n * s->row_bytes);
		else
			rc = afd__queue_download(&ffn->queue, host, dev, n * s->row_bytes);
	}
	return rc;
}

static int rows_in(
	struct afd_ffn *ffn, const struct afd_ffn_rows *r, uint32_t row0, uint32_t n_rows)
{
	struct side x = side_of(ffn, r->x, r->x_row_bytes, row0, r->x_dtype, ffn->x);
	struct afd__convert_args args = {
		.src = x.dev,
		.src_dtype = r->x_dtype,
		.src_stride = x.dev_row_bytes,
		.dst = ffn->x,
		.dst_dtype = AFD_DTYPE_F32,
		.dst_stride = ffn->hidden * sizeof(float),
		.n_rows = n_rows,
		.width = ffn->hidden,
	};
	int rc = cross(ffn, &x, n_rows, true);

	return rc || r->x_dtype == AFD_DTYPE_F32 ? rc : afd__convert(&ffn->queue, &args);
}

/* The host's routing. */
static int experts_in(
	struct afd_ffn *ffn, const struct afd_ffn_rows *r, uint32_t row0, uint32_t n_rows)
{
	size_t at = (size_t)row0 * r->top_k, bytes = (size_t)n_rows * r->top_k * sizeof(float);
	int rc = afd__queue_upload(&ffn->queue, ffn->ids, r->ids + at, bytes);

	return rc ? rc
		  : afd__queue_upload(&ffn->queue, ffn->expert_weights, r->weights + at, bytes);
}

static int rows_out(
	struct afd_ffn *ffn, const struct afd_ffn_rows *r, uint32_t row0, uint32_t n_rows)
{
	struct side y = side_of(ffn, r->y, r->y_row_bytes, row0, r->y_dtype, ffn->y);
	struct afd__convert_args args = {
		.src = ffn->y,
		.src_dtype = AFD_DTYPE_F32,
		.src_stride = ffn->hidden * sizeof(float),
		.dst = y.dev,
		.dst_dtype = r->y_dtype,
		.dst_stride = y.dev_row_bytes,
		.n_rows = n_rows,
		.width = ffn->hidden,
	};
	int rc = r->y_dtype == AFD_DTYPE_F32 ? 0 : afd__convert(&ffn->queue, &args);

	return rc ? rc : cross(ffn, &y, n_rows, false);
}

/* Waits also after a failure: downloads that are enqueued write the host's memory. */
static int forward_pass(
	struct afd_ffn *ffn, const struct afd_ffn_rows *r, uint32_t row0, uint32_t n_rows)
{
	struct afd__ffn_call call = {
		.layer = (uint32_t)r->layer,
		.n_rows = n_rows,
		.x = ffn->x,
		.y = ffn->y,
		.ids = r->ids ? ffn->ids : NULL,
		.weights = r->ids ? ffn->expert_weights : NULL,
	};
	uint64_t started_ns = afd__now_ns(), ticket;
	char text[512];
	int rc = rows_in(ffn, r, row0, n_rows), waited;

	if (!rc && r->ids)
		rc = experts_in(ffn, r, row0, n_rows);
	if (!rc)
		rc = afd__ffn_layer(ffn, &ffn->queue, &call);
	if (!rc)
		rc = rows_out(ffn, r, row0, n_rows);
	if (rc)
		afd__error_save(text, sizeof(text));
	waited = afd__queue_ticket(&ffn->queue, &ticket);
	if (!waited)
		waited = afd__queue_wait(
			&ffn->queue, ticket, AFD__FFN_WAIT_MS, "a pass of the ffn stage");
	if (rc)
		return afd__error(rc, "%s", text);
	if (!waited)
		afd__ffn_count_pass(ffn, (uint32_t)r->layer, n_rows, afd__now_ns() - started_ns);
	return waited;
}

/* ---- rows on the device ---- */

static int enqueue_pass(
	struct afd_ffn *ffn, const struct afd_ffn_rows *r, uint32_t row0, uint32_t n_rows)
{
	const size_t row_bytes = ffn->hidden * sizeof(float), at = (size_t)row0 * r->top_k;
	const struct afd__convert_args in = {
		.src = (const char *)r->x + row0 * r->x_row_bytes,
		.dst = ffn->x,
		.src_stride = r->x_row_bytes,
		.dst_stride = row_bytes,
		.n_rows = n_rows,
		.width = ffn->hidden,
		.src_dtype = r->x_dtype,
		.dst_dtype = AFD_DTYPE_F32,
	};
	const struct afd__convert_args out = {
		.src = ffn->y,
		.dst = (char *)r->y + row0 * r->y_row_bytes,
		.src_stride = row_bytes,
		.dst_stride = r->y_row_bytes,
		.n_rows = n_rows,
		.width = ffn->hidden,
		.src_dtype = AFD_DTYPE_F32,
		.dst_dtype = r->y_dtype,
	};
	const struct afd__ffn_call call = {
		.layer = (uint32_t)r->layer,
		.n_rows = n_rows,
		.x = ffn->x,
		.y = ffn->y,
		.ids = r->ids ? r->ids + at : NULL,
		.weights = r->ids ? r->weights + at : NULL,
	};
	uint64_t started_ns = afd__now_ns();
	int rc = afd__convert(&ffn->queue, &in);

	rc = rc ? rc : afd__ffn_layer(ffn, &ffn->queue, &call);
	rc = rc ? rc : afd__convert(&ffn->queue, &out);
	if (!rc)
		afd__ffn_count_pass(ffn, call.layer, n_rows,
			ffn->queue.fd < 0 ? afd__now_ns() - started_ns : 0);
	return rc;
}

int afd_ffn_forward(afd_ffn *ffn, const struct afd_ffn_rows *rows)
{
	struct afd_ffn_rows r;
	uint32_t row0, n;
	int rc = afd__ffn_check(ffn);

	if (!rc)
		rc = afd__params_copy(&r, sizeof(r), rows, "struct afd_ffn_rows");
	if (!rc)
		rc = check(ffn, &r);
	for (row0 = 0; !rc && row0 < r.n_rows; row0 += n) {
		n = r.n_rows - row0 < ffn->max_rows ? r.n_rows - row0 : ffn->max_rows;
		rc = r.on_device ? enqueue_pass(ffn, &r, row0, n) : forward_pass(ffn, &r, row0, n);
	}
	return rc;
}
