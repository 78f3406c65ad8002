/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Any sequence of frames from a joined peer: to the FFN side ('s', 'S' with rows of fp8), to the
 * attention side ('a', 'A' with rows of fp8, with a step open and a frame out), or to a rank of an
 * attention group of two ('g' the first, 'h' the second, with a sum and a gather under way). The
 * input is a list of (slot, bytes low, bytes high, what lies in the slot). Whatever comes, the link
 * is joined or has failed with a text, parts that are taken lie inside their slots, every part can
 * be answered, spans of parts lie where this process has measured, and an operation of a group that
 * is complete has drained each row of each rank once.
 */
#include <stdlib.h>
#include <string.h>

#include "../../kernels/cpu/kernels.h"
#include "../../lib/transport/net.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes);

enum {
	HIDDEN = 4,
	MAX_ROWS = 8,
	LANES = 2,
	N_SLOTS = AFD__N_CONTROL + 2 * LANES,
	SLOT_BYTES = 1024
};

static void expect(int holds)
{
	if (!holds)
		abort();
}

/* ---- a backend that receives the input ---- */

static struct {
	const uint8_t *data;
	size_t n_bytes;
	int held[N_SLOTS], sent[N_SLOTS], shut;
	uint8_t send[N_SLOTS][SLOT_BYTES];
	uint8_t receive[N_SLOTS][SLOT_BYTES];
} peer;

static void *fuzz_send_slot(struct afd__wire *wire, uint32_t slot)
{
	return peer.send[slot];
}
static const void *fuzz_receive_slot(struct afd__wire *wire, uint32_t slot)
{
	return peer.receive[slot];
}

static int fuzz_post_send(struct afd__wire *wire, uint32_t slot, uint32_t bytes)
{
	expect(slot < N_SLOTS && bytes <= SLOT_BYTES);
	peer.sent[slot] = 1;
	return 0;
}

static int fuzz_post_receive(struct afd__wire *wire, uint32_t slot)
{
	expect(slot < N_SLOTS && peer.held[slot]);
	peer.held[slot] = 0;
	return 0;
}

/* What a backend promises: a slot that was posted, and no more bytes than it has. */
static int fuzz_poll(struct afd__wire *wire, struct afd__completion *out, int max)
{
	size_t capacity, bytes;
	uint32_t slot;

	for (slot = 0; slot < N_SLOTS && !peer.shut; slot++) {
		if (!peer.sent[slot])
			continue;
		peer.sent[slot] = 0;
		*out = (struct afd__completion){ .kind = AFD__SENT, .slot = slot };
		return 1;
	}
	if (peer.shut || peer.n_bytes < 3)
		return 0;
	slot = peer.data[0] % N_SLOTS;
	capacity = slot < AFD__N_CONTROL ? AFD__CONTROL_BYTES : SLOT_BYTES;
	bytes = 1 + (peer.data[1] | (size_t)peer.data[2] << 8) % capacity;
	peer.data += 3;
	peer.n_bytes -= 3;
	if (bytes > peer.n_bytes || peer.held[slot])
		return 0;
	memcpy(peer.receive[slot], peer.data, bytes);
	peer.data += bytes;
	peer.n_bytes -= bytes;
	peer.held[slot] = 1;
	*out = (struct afd__completion){
		.kind = AFD__RECEIVED, .slot = slot, .bytes = (uint32_t)bytes
	};
	return 1;
}

static int fuzz_ready(struct afd__wire *wire)
{
	return 0;
}
static void fuzz_shut(struct afd__wire *wire)
{
	peer.shut = 1;
}
static void fuzz_close(struct afd__wire *wire) {}

static const struct afd__transport_ops fuzz_ops = {
	.scheme = "fuzz",
	.send_slot = fuzz_send_slot,
	.receive_slot = fuzz_receive_slot,
	.post_send = fuzz_post_send,
	.post_receive = fuzz_post_receive,
	.poll = fuzz_poll,
	.ready = fuzz_ready,
	.arm = fuzz_ready,
	.shut = fuzz_shut,
	.close = fuzz_close,
};

/* ---- the two sides ---- */

static afd_transport *create(afd_context *ctx, int attention)
{
	struct afd_contract contract = {
		.size = sizeof(contract), .hidden_size = HIDDEN, .n_layers = 3
	};
	const char *address[1] = { "loop:fuzz" };
	struct afd_transport_params params = { .size = sizeof(params),
		.max_rows = MAX_ROWS,
		.lanes = LANES,
		.max_peers = 1,
		.n_listen = !attention,
		.n_connect = attention };
	afd_transport *net;

	params.listen = attention ? NULL : address;
	params.connect = attention ? address : NULL;
	expect(!afd_transport_create(&net, ctx, &contract, &params));
	return net;
}

/* What the handshake would have found: one FFN peer that holds everything. */
static void hold_all(struct afd__link *link)
{
	link->placed = true;
	link->shard = (struct afd__target){ .n_targets = 1, .n_tp = 1, .max_rows = MAX_ROWS };
	link->net->n_targets = 1;
	link->net->shards[0] = link->shard;
}

/* Reads rows as a stage does: with the scales that are in them, whatever these are. */
static void read_rows(const void *rows, int32_t dtype, uint32_t n_rows)
{
	float floats[MAX_ROWS * HIDDEN];
	struct afd__convert_args args = { .src = rows,
		.dst = floats,
		.src_stride = afd__row_bytes(HIDDEN, dtype),
		.dst_stride = HIDDEN * sizeof(float),
		.n_rows = n_rows,
		.width = HIDDEN,
		.src_dtype = dtype,
		.dst_dtype = AFD_DTYPE_F32 };

	expect(n_rows <= MAX_ROWS);
	afd__cpu_kernels(AFD__ISA_C)->convert(&args, 0, n_rows);
}

static void join(afd_transport *net, int32_t dtype)
{
	struct afd__link *link = net->links[0] ? net->links[0] : afd__link_create(net, NULL);

	net->links[0] = link;
	link->index = 0;
	link->wire.ops = &fuzz_ops;
	link->open = true;
	link->lanes = LANES;
	link->max_rows = MAX_ROWS;
	link->to_ffn_dtype = link->to_attention_dtype = dtype;
	link->gate = AFD_GATE_ATTENTION;
	if (net->params.group_size > 1) {
		link->kind = AFD__LINK_IN_GROUP;
		link->rank = 1 - net->params.group_index;
	} else if (net->attention) {
		hold_all(link);
	}
	net->complete = net->attention;
	afd__link_joined(link, afd__now_ns());
}

/* On the FFN side a link that ended and of which nothing is held is gone. */
static void check_end(const afd_transport *net)
{
	const struct afd__link *link = net->links[0];

	expect(link ? link->phase == AFD__LINK_JOINED || (link->error < 0 && link->error_text[0])
		    : !net->attention);
}

static void fuzz_ffn(afd_context *ctx, int32_t dtype)
{
	afd_transport *net = create(ctx, 0);
	struct afd__source sources[LANES];
	struct afd__part part;

	join(net, dtype);
	for (int round = 0; round < 64 && afd__link_is_joined(net->links[0]) && peer.n_bytes;
		round++) {
		afd__link_poll(net->links[0], afd__now_ns());
		expect(afd__exchange_sources(net, sources, LANES) <= LANES);
		while (round % 3 && afd__exchange_take(net, &part) == 1) {
			size_t bytes = part.n_rows * afd__row_bytes(HIDDEN, dtype);

			expect(part.layer < 3 && part.lane < LANES && part.n_rows &&
				part.part < part.n_parts);
			expect((const uint8_t *)part.x + bytes <=
				peer.receive[part.slot] + SLOT_BYTES);
			read_rows(part.x, dtype, part.n_rows);
			memcpy(part.y, part.x, bytes);
			expect(!afd__exchange_reply(net, &part, round % 2 ? 0 : -EDOM, 1, 2));
		}
	}
	check_end(net);
	afd_transport_destroy(net);
}

/* What the peer states does not leave the round trip. */
static struct {
	uint64_t begin_ns, id, end_ns;
} traced;

static void check_span(void *user, const struct afd_span *span)
{
	uint64_t end_ns = span->start_ns + span->duration_ns;

	expect(span->id && span->peer);
	expect(span->start_ns >= traced.begin_ns && end_ns >= span->start_ns);
	expect(end_ns <= afd__now_ns());
	expect(span->id != traced.id || span->start_ns == traced.end_ns);
	traced.id = span->id;
	traced.end_ns = end_ns;
}

static int fill(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const struct afd__slot_rows *slot)
{
	const afd_transport *net = user;

	memset(slot->rows, 1, n_rows * afd__row_bytes(HIDDEN, net->links[0]->to_ffn_dtype));
	return 1;
}

static int drain(void *user, uint32_t lane, uint32_t target, uint32_t row0, uint32_t n_rows,
	const void *slot)
{
	const afd_transport *net = user;

	read_rows(slot, net->links[0]->to_attention_dtype, n_rows);
	return 1;
}

static int done(void *user, uint32_t lane, uint32_t target)
{
	return 1;
}

static void fuzz_attention(afd_context *ctx, int32_t dtype)
{
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { 20, 3 } };
	afd_transport *net = create(ctx, 1);
	const struct afd__frame_io io = {
		.fill = fill, .filled = done, .drain = drain, .drained = done, .user = net
	};
	int rc = 0;

	join(net, dtype);
	ctx->tracer = (struct afd_tracer){ .span = check_span };
	traced.begin_ns = afd__now_ns();
	traced.id = 0;
	expect(!afd__exchange_begin(net, &step));
	expect(!afd__exchange_send(net, 0, 1, &step.n_rows[0], &io) &&
		!afd__exchange_send(net, 1, 2, &step.n_rows[1], &io));
	for (int round = 0; round < 64 && rc >= 0 && peer.n_bytes; round++) {
		if (round % 2)
			afd__exchange_computes(net, afd__now_ns());
		rc = afd__exchange_progress(net);
	}
	expect(rc >= 0 || afd_last_error()[0]);
	check_end(net);
	afd_transport_destroy(net);
}

/* ---- a rank of a group: lane 0 has a sum of 20 rows out, lane 1 gathers 5 ---- */

static const uint32_t group_rows[LANES] = { 20, 5 };
static uint32_t drained_rows[LANES][2]; /* by rank */

static int group_fill(void *user, uint32_t lane, uint32_t row0, uint32_t n_rows, float *slot)
{
	expect(n_rows && n_rows <= MAX_ROWS && row0 + n_rows <= group_rows[lane]);
	memset(slot, 1, n_rows * HIDDEN * sizeof(float));
	return 1;
}

static int group_drain(void *user, uint32_t lane, uint32_t rank, uint32_t row0, uint32_t n_rows,
	const float *slot)
{
	const afd_transport *net = user;
	uint32_t *rows = drained_rows[lane];
	float copy[MAX_ROWS * HIDDEN];
	int own = rank == net->params.group_index;

	expect(rank < 2 && n_rows && n_rows <= MAX_ROWS && row0 + n_rows <= group_rows[lane]);
	expect(own == !slot);
	if (slot) {
		const uint8_t *begin = (const uint8_t *)slot;

		expect(begin >= peer.receive[AFD__N_CONTROL]);
		expect(begin + n_rows * HIDDEN * sizeof(float) <=
			peer.receive[N_SLOTS - 1] + SLOT_BYTES);
		memcpy(copy, slot, n_rows * HIDDEN * sizeof(float));
	}
	/* A sum takes each range of rows of rank 0 first, then of rank 1. */
	if (lane == 0)
		expect(row0 == rows[rank] && rows[0] == row0 + (rank ? n_rows : 0));
	rows[rank] += n_rows;
	return 1;
}

static int group_did(void *user, uint32_t lane)
{
	return 1;
}

static void check_operations(afd_transport *net)
{
	for (uint32_t lane = 0; lane < LANES; lane++) {
		int rc = afd__group_done(net, lane);
		const uint32_t *rows = drained_rows[lane];

		expect(rc >= 0 || afd_last_error()[0]);
		if (rc != 1)
			continue;
		if (lane == 0)
			expect(rows[0] == group_rows[0] && rows[1] == group_rows[0]);
		else
			expect(rows[1 - net->params.group_index] ==
				group_rows[1] / 2 + !net->params.group_index);
	}
}

static void fuzz_group(afd_context *ctx, uint32_t index)
{
	struct afd_contract contract = {
		.size = sizeof(contract), .hidden_size = HIDDEN, .n_layers = 3
	};
	struct afd_transport_params params = { .size = sizeof(params),
		.max_rows = MAX_ROWS,
		.lanes = LANES,
		.group = "loop:fuzz",
		.group_index = index,
		.group_size = 2 };
	struct afd_step_params step = { .size = sizeof(step), .n_rows = { 20, 5 } };
	struct afd__group_io io = { .fill = group_fill,
		.filled = group_did,
		.drain = group_drain,
		.drained = group_did };
	int rc = 0;

	memset(drained_rows, 0, sizeof(drained_rows));
	expect(!afd_transport_create((afd_transport **)&io.user, ctx, &contract, &params));
	join(io.user, AFD_DTYPE_F32);
	expect(!afd__exchange_begin(io.user, &step));
	expect(!afd__group_reduce(io.user, 0, 1, group_rows[0], &io) &&
		!afd__group_gather(io.user, 1, 2, group_rows[1], &io));
	for (int round = 0; round < 64 && rc >= 0 && peer.n_bytes; round++)
		rc = afd__exchange_progress(io.user);
	expect(rc >= 0 || afd_last_error()[0]);
	check_operations(io.user);
	check_end(io.user);
	afd_transport_destroy(io.user);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n_bytes)
{
	afd_context *ctx;

	if (!n_bytes)
		return 0;
	memset(&peer, 0, sizeof(peer));
	peer.data = data + 1;
	peer.n_bytes = n_bytes - 1;
	expect(!afd_context_create(&ctx, NULL));
	if (data[0] == 'a' || data[0] == 'A')
		fuzz_attention(ctx, data[0] == 'A' ? AFD_DTYPE_FP8 : AFD_DTYPE_F32);
	else if (data[0] == 'g' || data[0] == 'h')
		fuzz_group(ctx, data[0] == 'h');
	else
		fuzz_ffn(ctx, data[0] == 'S' ? AFD_DTYPE_FP8 : AFD_DTYPE_F32);
	afd_context_destroy(ctx);
	return 0;
}
