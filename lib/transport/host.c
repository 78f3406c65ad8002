/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host's own attention over the exchange: frames from and to its memory, converted to and from
 * the wire dtype by the CPU's kernel, so that the bits are those of the attention stage. The host
 * is a stage like ours: it uses the same frame_io, whose fills and drains are done when they
 * return.
 */
#include <string.h>

#include "../../kernels/cpu/kernels.h"
#include "net.h"

/* ---- frame_io on host memory ---- */

struct rows {
	uint8_t *memory; /* [n_rows][hidden_size] */
	size_t row_bytes;
	int32_t dtype;
};

static void convert_rows(
	const afd_transport *net, struct rows src, struct rows dst, uint32_t n_rows)
{
	struct afd__convert_args args = {
		.src = src.memory,
		.dst = dst.memory,
		.src_stride = src.row_bytes,
		.dst_stride = dst.row_bytes,
		.n_rows = n_rows,
		.width = net->contract.hidden_size,
		.src_dtype = src.dtype,
		.dst_dtype = dst.dtype,
	};

	afd__cpu_kernels(net->ctx->isa)->convert(&args, 0, n_rows);
}

/* The kernel knows f32 on one side; between two others a row goes through it, which is exact. */
static void convert(const afd_transport *net, struct rows src, struct rows dst, uint32_t n_rows)
{
	struct rows between = { (uint8_t *)net->row, 0, AFD_DTYPE_F32 };

	/* One long copy is faster than many of a row. */
	if (src.dtype == dst.dtype && src.row_bytes == dst.row_bytes &&
		src.row_bytes == net->contract.hidden_size * afd_dtype_bytes(src.dtype)) {
		memmove(dst.memory, src.memory, n_rows * src.row_bytes);
		return;
	}
	if (src.dtype == dst.dtype || src.dtype == AFD_DTYPE_F32 || dst.dtype == AFD_DTYPE_F32) {
		convert_rows(net, src, dst, n_rows);
		return;
	}
	for (uint32_t i = 0; i < n_rows; i++) {
		convert_rows(net, src, between, 1);
		convert_rows(net, between, dst, 1);
		src.memory += src.row_bytes;
		dst.memory += dst.row_bytes;
	}
}

static struct rows wire_rows(const afd_transport *net, const void *slot, int32_t dtype)
{
	return (struct rows){ (uint8_t *)slot, afd__row_bytes(net->contract.hidden_size, dtype),
		dtype };
}

/* The first row from `row` on that goes to the target. */
static uint32_t next_row(
	const afd_transport *net, const struct afd_frame *frame, uint32_t target, uint32_t row)
{
	while (frame->ids && row < frame->n_rows &&
		!afd__exchange_wants(net, target, (uint32_t)frame->layer,
			frame->ids + (size_t)row * net->contract.top_k))
		row++;
	return row;
}

/* Rows are counted anew for each part: replies come in any order, and nothing is kept. */
static uint32_t nth_row(
	const afd_transport *net, const struct afd_frame *frame, uint32_t target, uint32_t n)
{
	uint32_t row = next_row(net, frame, target, 0);

	if (!frame->ids)
		return n;
	while (n--)
		row = next_row(net, frame, target, row + 1);
	return row;
}

static struct rows rows_at(const void *memory, size_t row_bytes, int32_t dtype, uint32_t row)
{
	return (struct rows){ (uint8_t *)memory + row * row_bytes, row_bytes, dtype };
}

static int host_fill(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const struct afd__slot_rows *slot)
{
	afd_transport *net = user;
	const struct afd_frame *f = &net->host[lane];
	struct rows to = wire_rows(net, slot->rows, net->params.to_ffn_dtype);
	uint32_t row = nth_row(net, f, target, row0), top_k = net->contract.top_k;

	if (!slot->ids) {
		convert(net, rows_at(f->x, f->x_row_bytes, f->x_dtype, row), to, n_rows);
		return 1;
	}
	for (uint32_t i = 0; i < n_rows; i++) {
		convert(net, rows_at(f->x, f->x_row_bytes, f->x_dtype, row), to, 1);
		to.memory += to.row_bytes;
		memcpy(slot->ids + (size_t)i * top_k, f->ids + (size_t)row * top_k,
			top_k * sizeof(int32_t));
		memcpy(slot->weights + (size_t)i * top_k, f->weights + (size_t)row * top_k,
			top_k * sizeof(float));
		row = next_row(net, f, target, row + 1);
	}
	return 1;
}

/* One row of a partial result is added to y, which begins as +0.0. */
static void add_row(const afd_transport *net, struct rows src, struct rows y)
{
	struct afd__convert_args args = {
		.src = src.memory,
		.dst = y.memory,
		.src_stride = src.row_bytes,
		.dst_stride = y.row_bytes,
		.n_rows = 1,
		.width = net->contract.hidden_size,
		.src_dtype = src.dtype,
		.dst_dtype = y.dtype,
		.accumulate = 1,
	};

	afd__cpu_kernels(net->ctx->isa)->convert(&args, 0, 1);
}

static int host_drain(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const void *slot)
{
	afd_transport *net = user;
	const struct afd_frame *f = &net->host[lane];
	struct rows from = wire_rows(net, slot, net->params.to_attention_dtype);
	uint32_t row = nth_row(net, f, target, row0);

	if (net->n_targets == 1) {
		convert(net, from, rows_at(f->y, f->y_row_bytes, f->y_dtype, row), n_rows);
		return 1;
	}
	for (uint32_t i = 0; i < n_rows; i++) {
		add_row(net, from, rows_at(f->y, f->y_row_bytes, f->y_dtype, row));
		from.memory += from.row_bytes;
		row = next_row(net, f, target, row + 1);
	}
	return 1;
}

static int host_done(void *user, uint32_t lane, uint32_t target)
{
	return 1;
}

/* ---- checks ---- */

static int check_host(const afd_transport *net)
{
	int rc = afd__net_check(net);

	if (!rc && !net->attention)
		rc = afd__error(-EINVAL,
			"transport: made to listen, frames are sent by the attention side");
	if (!rc && net->owner)
		rc = afd__error(-EBUSY, "transport: a stage has it");
	return rc;
}

static int check_memory(const afd_transport *net, const char *what, const void *memory,
	int32_t *dtype, size_t *row_bytes)
{
	size_t least;

	if (!*dtype)
		*dtype = AFD_DTYPE_F32;
	if (*dtype == AFD_DTYPE_FP8)
		return afd__error(-ENOTSUP,
			"frame: %s_dtype is fp8, rows in memory are f32, bf16 or f16; "
			"to_ffn_dtype and to_attention_dtype say what crosses",
			what);
	if (*dtype < AFD_DTYPE_F32 || *dtype > AFD_DTYPE_F16)
		return afd__error(
			-EINVAL, "frame: %s_dtype is %d, limit %d", what, *dtype, AFD_DTYPE_F16);
	if (!memory)
		return afd__error(-EINVAL, "frame: %s is NULL", what);
	least = net->contract.hidden_size * afd_dtype_bytes(*dtype);
	if (!*row_bytes)
		*row_bytes = least;
	if (*row_bytes < least || *row_bytes % afd_dtype_bytes(*dtype))
		return afd__error(-EINVAL,
			"frame: %s_row_bytes is %zu, must be a multiple of %zu, at least %zu", what,
			*row_bytes, afd_dtype_bytes(*dtype), least);
	return 0;
}

/* Ids that are not needed are forgotten. */
static int check_choices(const afd_transport *net, struct afd_frame *frame)
{
	uint32_t top_k = net->contract.top_k;

	if (!afd__exchange_routed(net, (uint32_t)frame->layer)) {
		frame->ids = NULL;
		frame->weights = NULL;
		return 0;
	}
	if (!frame->ids || !frame->weights)
		return afd__error(-EINVAL, "frame: layer %d has experts, and %s is NULL",
			frame->layer, frame->ids ? "weights" : "ids");
	for (size_t i = 0; i < (size_t)frame->n_rows * top_k; i++) {
		if (frame->ids[i] < 0 || (uint32_t)frame->ids[i] >= net->contract.n_experts)
			return afd__error(-EINVAL, "frame: id %zu of row %zu is %d, limit %u",
				i % top_k, i / top_k, frame->ids[i], net->contract.n_experts - 1);
	}
	return 0;
}

/* Rows of the frame for each target; with several of them y becomes +0.0. */
static void count_rows(
	const afd_transport *net, const struct afd_frame *frame, uint32_t n_rows[AFD__TARGETS_MAX])
{
	for (uint32_t t = 0; t < net->n_targets; t++) {
		n_rows[t] = frame->ids ? 0 : frame->n_rows;
		for (uint32_t row = 0; frame->ids && row < frame->n_rows; row++)
			n_rows[t] += next_row(net, frame, t, row) == row;
	}
	for (uint32_t row = 0; net->n_targets > 1 && row < frame->n_rows; row++)
		memset((uint8_t *)frame->y + row * frame->y_row_bytes, 0,
			net->contract.hidden_size * sizeof(float));
}

static int check_frame(const afd_transport *net, struct afd_frame *frame)
{
	int rc;

	if (frame->lane < 0 || (uint32_t)frame->lane >= net->params.lanes)
		return afd__error(
			-EINVAL, "frame: lane is %d, limit %u", frame->lane, net->params.lanes - 1);
	if (frame->layer < 0 || (uint32_t)frame->layer >= net->contract.n_layers)
		return afd__error(-EINVAL, "frame: layer is %d, limit %u", frame->layer,
			net->contract.n_layers - 1);
	if (frame->_pad)
		return afd__error(-EINVAL, "frame: _pad is %u, must be 0", frame->_pad);
	if (!net->step_open)
		return afd__error(-EINVAL, "frame: no step is open");
	if (!frame->n_rows)
		return 0;
	rc = check_memory(net, "x", frame->x, &frame->x_dtype, &frame->x_row_bytes);
	if (!rc)
		rc = check_memory(net, "y", frame->y, &frame->y_dtype, &frame->y_row_bytes);
	if (!rc)
		rc = check_choices(net, frame);
	if (!rc && net->n_targets > 1 && (frame->y_dtype != AFD_DTYPE_F32 || frame->x == frame->y))
		rc = afd__error(-EINVAL,
			"frame: y is %s, with %u shards it must be f32 and not x",
			frame->x == frame->y ? "x" : afd_dtype_name(frame->y_dtype),
			net->n_targets);
	if (!rc && frame->x == frame->y &&
		(frame->x_dtype != frame->y_dtype || frame->x_row_bytes != frame->y_row_bytes))
		rc = afd__error(
			-EINVAL, "frame: x and y share memory, but not dtype and row bytes");
	return rc;
}

/* ---- what hosts call ---- */

int afd_transport_begin(afd_transport *net, const struct afd_step_params *params)
{
	int rc = check_host(net);

	if (!rc && !params)
		rc = afd__error(-EINVAL, "step params: NULL");
	return rc ? rc : afd__exchange_begin(net, params);
}

/* Also a stage's way to give its own step up, so the owner is not asked. */
int afd_transport_cancel(afd_transport *net)
{
	int rc = afd__net_check(net);

	return rc ? rc : afd__exchange_cancel(net, NULL);
}

int afd_transport_dispatch(afd_transport *net, const struct afd_frame *given)
{
	struct afd__frame_io io = { .fill = host_fill,
		.filled = host_done,
		.drain = host_drain,
		.drained = host_done,
		.user = net,
		.in_order = true };
	uint32_t lane, n_rows[AFD__TARGETS_MAX];
	struct afd_frame frame;
	int rc = check_host(net);

	if (!rc && !given)
		rc = afd__error(-EINVAL, "frame: NULL");
	if (!rc)
		rc = afd__params_copy(&frame, sizeof(frame), given, "frame");
	if (!rc)
		rc = check_frame(net, &frame);
	if (rc)
		return rc;
	lane = (uint32_t)frame.lane;
	if (net->frames[lane].active)
		return afd__error(-EBUSY, "frame: lane %u has one out, at layer %u", lane,
			net->frames[lane].layer);
	net->host[lane] = frame;
	if (!frame.n_rows)
		return afd__frames_clear(net, lane);
	rc = afd__steps_check_links(net);
	if (rc)
		return rc;
	count_rows(net, &frame, n_rows);
	rc = afd__exchange_send(net, lane, (uint32_t)frame.layer, n_rows, &io);
	/* The first parts leave now; a link that fails here is reported by _collect. */
	if (!rc)
		afd__net_move(net);
	return rc;
}

int afd_transport_collect(afd_transport *net, int32_t lane)
{
	int rc = check_host(net), done;

	if (!rc && (lane < 0 || (uint32_t)lane >= net->params.lanes))
		rc = afd__error(
			-EINVAL, "frame: lane is %d, limit %u", lane, net->params.lanes - 1);
	if (rc)
		return rc;
	/* Until nothing moves, so that after 0 the descriptor tells when to come again. */
	do {
		done = afd__exchange_done(net, (uint32_t)lane);
		if (done)
			return done;
		rc = afd__net_move(net);
	} while (rc == 1);
	if (rc < 0)
		return rc;
	return afd__exchange_done(net, (uint32_t)lane);
}

int afd_transport_exchange(afd_transport *net, const struct afd_frame *frame)
{
	int rc = afd_transport_dispatch(net, frame);

	if (rc)
		return rc;
	afd__transport_wait_inside(net, true);
	while (!rc) {
		rc = afd_transport_collect(net, frame->lane);
		if (!rc)
			rc = afd__transport_sleep(net, -1, -1) < 0 ? -EIO : 0;
	}
	afd__transport_wait_inside(net, false);
	return rc < 0 ? rc : 0;
}
